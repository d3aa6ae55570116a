"""The paper's printed numbers, from ``data/paper``, and the words of the rows and columns."""

from functools import lru_cache

import numpy as np
import pandas as pd

from amedlib.checks import one_of
from amedlib.datasets.files import DATA

# What identifies a cell, in the columns of `data/paper/table*.csv`.
KEY = ["method", "teacher", "schedule", "r", "M", "afs", "amed", "strategy", "guidance", "nfe"]


@lru_cache
def published(table: str) -> pd.DataFrame:
    """The paper's numbers of one table, tidy; from ``data/paper``.

    Raises:
        ValueError: there is no such table.
    """
    one_of("table", table, sorted(p.stem for p in (DATA / "paper").glob("table*.csv")))
    return pd.read_csv(DATA / "paper" / f"{table}.csv", dtype={"table": str})


def paper_values(table: str, dataset: str) -> pd.DataFrame:
    """The paper's numbers for our rows of a table: columns method, nfe, paper."""
    frame = published(table)
    frame = frame[frame["dataset"] == dataset]
    # "AMED-Plugin (iPNDM)" says what the plugin is on; `Entry.plugin` knows.
    frame = frame.assign(
        method=frame["method"].str.replace(r"^AMED-Plugin .*", "AMED-Plugin", regex=True)
    )
    return frame.rename(columns={"value": "paper"})[["method", "nfe", "paper"]]


# What tells the rows of a table apart, in the columns of `plans.KEY`, with the words of the page.
ROWS = {
    3: ["strategy"],
    4: ["teacher"],
    5: ["schedule", "method"],
    6: ["method", "r"],
    7: ["M"],
    8: ["method", "AFS"],
    9: ["method", "AFS", "AMED"],
    10: ["method", "AFS", "AMED"],
    11: ["method"],
    12: ["method"],
    13: ["guidance", "method"],
}


WORDS = {
    "grid_search": "grid search (time-wise)",
    "time_wise": "AMED-Solver (time-wise)",
    "sample_wise": "AMED-Solver (sample-wise)",
    "time_uniform": "uniform",
    "logsnr": "logSNR",
    "l2": "L2",
    "digits_conditional": "digits with labels",
}


def called(value):
    """What a value of a plan is called in the book: a schedule, a strategy, a loss, a data set."""
    return WORDS.get(value, value)


def value_in_words(name: str, value: str) -> str:
    """What tells a row of a table apart, with its name where it would be a bare number."""
    words = {"r": "r = ", "M": "M = ", "guidance": "guidance "}
    return value if value == "–" else words.get(name, "") + value


def row_names(frame, number):
    """The frame with columns for the rows of a table, in words."""
    marks = {True: "✓", False: "✗"}
    frame = frame.assign(AFS=frame["afs"].map(marks), AMED=frame["amed"].map(marks))
    return frame.assign(
        **{
            name: [
                "–"
                if pd.isna(v)
                else WORDS.get(v, f"{v:g}" if name in ("r", "M", "guidance") else v)
                for v in col
            ]
            for name, col in frame[ROWS[number]].items()
        }
    )


def nfe_name(nfe: float) -> str:
    """The heading of a column; of what is about all NFE together, and has none, "all"."""
    return f"NFE {nfe:.0f}" if np.isfinite(nfe) else "all"


def across_nfe(frame: pd.DataFrame, rows: list[str], value: str) -> pd.DataFrame:
    """A column of a frame, crossed: ``rows`` not sorted, against the column nfe, ascending."""
    found = frame.assign(nfe=frame["nfe"].fillna(np.inf)).pivot_table(
        index=rows, columns="nfe", values=value, aggfunc="first", sort=False
    )
    found = found.sort_index(axis=1).rename(columns=nfe_name)
    return found.rename_axis([None] * len(rows)).rename_axis(None, axis=1)


# What the Frechet distances of the study are called.
DISTANCES = {
    "fd": "FD (classifier's features)",
    "fd_pixels": "FD (pixels)",
    "fd_joint": "joint FD",
}
