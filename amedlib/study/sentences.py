"""Sentences: what is listed in them, and those that compare cells of a table, which with which
others and by how much.

The latter are the language of ``data/paper/claims.csv`` and ``data/paper/statements.csv``.
"""

import numpy as np
import pandas as pd


def listed(words: list[str]) -> str:
    """``a, b and c``."""
    *rest, last = words
    return f"{', '.join(rest)} and {last}" if rest else last


def pairs(cells: pd.DataFrame, sentence: dict) -> list[tuple[dict, dict | None]]:
    """The comparisons of a sentence: cells that it calls better, each with a worse one.

    Of "best" and "worst" there is none where a value is missing.

    Args:
        cells: with a column ``value`` and those that the sentence names.
        sentence: ``better`` and ``worse``, pandas queries of cells, of which ``better_pick`` and
            ``worse_pick`` ("best", "worst" or "") keep one; ``same``, expressions over the columns
            in which both agree; ``nfe``, those that it is about. Each is one text, its parts
            separated by spaces, and may be "": without ``worse`` a cell is compared with nothing.
    """
    if sentence["nfe"]:
        cells = cells[cells["nfe"].isin([int(n) for n in sentence["nfe"].split()])]
    better, worse = (
        _chosen(cells, sentence[side], sentence["same"].split(), sentence[f"{side}_pick"])
        for side in ("better", "worse")
    )
    if not sentence["worse"]:
        return [(a, None) for some in better.values() for a in some]
    return [(a, b) for key, some in better.items() for a in some for b in worse.get(key, [])]


def _chosen(cells, query: str, same: list[str], pick: str) -> dict[tuple, list[dict]]:
    """The cells of one side, by what they have in common with those of the other."""
    rows = cells.query(query, engine="python") if query else cells[:0]
    keys = zip(*(rows.eval(name, engine="python") for name in same), strict=True)
    groups: dict[tuple, list[dict]] = {}
    for row, key in zip(rows.to_dict("records"), keys if same else [()] * len(rows), strict=True):
        groups.setdefault(key, []).append(row)
    if not pick:
        return groups
    chosen = {"best": min, "worst": max}[pick]
    return {
        key: [chosen(some, key=lambda row: row["value"])]
        for key, some in groups.items()
        if all(np.isfinite(row["value"]) for row in some)
    }


def gap(better: dict, worse: dict | None, factor: float = 1.0) -> float:
    """Better's value less ``factor`` times worse's; the value itself where there is no worse."""
    return better["value"] - (factor * worse["value"] if worse else 0.0)
