"""The paper's tables against each other, and its sentences against its tables; all by code.

The numbers are those of ``data/paper``. Nothing is measured here: ``stored_cells`` shows what the
store of results holds and leaves out what it does not.
"""

from functools import lru_cache

import numpy as np
import pandas as pd

from amedlib.datasets.entries import describe
from amedlib.datasets.files import DATA
from amedlib.study import plans
from amedlib.study.published import across_nfe, published
from amedlib.study.sentences import gap, pairs
from amedlib.study.store import RESULTS, load_result
from amedlib.study.uncertainty import difference

MULTI_STEP = ("DPM-Solver++(3M)", "UniPC", "iPNDM")
TWO_EVALUATIONS = ("DPM-Solver-2", "EDM", "AMED-Solver")
# What makes two cells the same experiment. Tables 4 and 7 also name a teacher and M.
EXPERIMENT = ["dataset", "solver", "afs", "amed", "schedule", "r", "strategy", "guidance", "nfe"]
NAMED = ["teacher", "M"]


def complete(frame: pd.DataFrame) -> pd.DataFrame:
    """Cells of the tables with what the columns leave to be understood.

    ``solver`` is the method, or what a plugin is on; ``r`` is 0.5 for plain DPM-Solver-2 and
    ``strategy`` sample-wise for AMED-Solver unless given (Sec. 4.1, 4.3); ``nfe_without_afs`` is
    the NFE on the same time points without AFS.

    Args:
        frame: columns as of ``published.published``, one or several tables.
    """
    solver = frame["method"].str.replace(r"^AMED-Plugin \((.*)\)$", r"\1", regex=True)
    ours = frame["amed"] & (solver == "AMED-Solver")
    default_r = (solver == "DPM-Solver-2") & ~frame["amed"] & frame["r"].isna()
    return frame.assign(
        table=frame["table"].astype(int),
        solver=solver,
        plugin=frame["amed"] & (solver != "AMED-Solver"),
        multi_step=solver.isin(MULTI_STEP),
        r=frame["r"].mask(default_r, 0.5),
        strategy=frame["strategy"].mask(ours & frame["strategy"].isna(), "sample_wise"),
        nfe_without_afs=frame["nfe"] + frame["afs"],
    ).reset_index(drop=True)


@lru_cache
def cells() -> pd.DataFrame:
    """All cells of Tables 2 to 13."""
    tables = [published(f"table{n}").astype({"strategy": object}) for n in range(2, 14)]
    return complete(plans.concat(tables))


def label(cell: pd.Series) -> str:
    """A cell's row in words."""
    words = [f"AMED-Plugin ({cell['solver']})" if cell["plugin"] else cell["solver"]]
    if cell["schedule"] != plans.METHODS[cell["solver"]].schedule:
        words.append(cell["schedule"])
    if cell["solver"] == "DPM-Solver-2" and pd.notna(cell["r"]) and cell["r"] != 0.5:
        words.append(f"r = {cell['r']:g}")
    words += (
        [cell["strategy"].replace("_", "-")]
        if pd.notna(cell["strategy"]) and cell["table"] == 3
        else []
    )
    words += [f"teacher {cell['teacher']}"] if pd.notna(cell["teacher"]) else []
    words += [f"M = {cell['M']:g}"] if pd.notna(cell["M"]) else []
    return ", ".join(words + (["AFS"] if cell["afs"] else []))


def as_printed(value: float) -> str:
    """A number as the paper prints it: two decimals, one from 100."""
    return (f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}").replace("-", "−")


def _title(dataset: str) -> str:
    return describe(dataset).title


def shown(frame: pd.DataFrame, columns: dict[str, str]):
    """A frame as a table of the page: some columns, under the headings given for them."""
    frame = frame[list(columns)]
    if "dataset" in frame:
        frame = frame.assign(dataset=frame["dataset"].map(_title))
    frame = frame.rename(columns=columns)
    words = {"white-space": "normal", "text-align": "left"}
    styled = frame.style.hide(axis="index").set_properties(
        frame.select_dtypes(exclude="number").columns, **words
    )
    return styled.format(lambda v: as_printed(v) if isinstance(v, float) else v, na_rep="–")


# --- 1. The same experiment in several tables ----------------------------------------------------


def repeated_cells(cells: pd.DataFrame) -> pd.DataFrame:
    """Pairs of FID cells of two tables that describe one experiment (``EXPERIMENT``).

    Cells that name a teacher or M are left to ``best_of_ablation``.

    Returns:
        ``EXPERIMENT``, ``row`` in words, table_a, value_a, table_b, value_b, ``difference`` (b
        minus a) and, where it is not zero, ``elsewhere``: where else one of the two values stands,
        among cells of the same solver, data set and NFE that are another experiment or name a
        teacher or M.
    """
    fid = cells[cells["unit"] == "FID"]
    plain = fid[fid[NAMED].isna().all(axis=1)]
    plain = plain.assign(row=[label(cell) for _, cell in plain.iterrows()])
    found = plain.merge(plain, on=EXPERIMENT, suffixes=("_a", "_b"))
    found = found[found["table_a"] < found["table_b"]].reset_index(drop=True)
    found = found.rename(columns={"row_a": "row"})
    keep = [*EXPERIMENT, "row", "table_a", "value_a", "table_b", "value_b"]
    found = found[keep].assign(difference=found["value_b"] - found["value_a"])
    return found.assign(elsewhere=[_elsewhere(pair, fid) for _, pair in found.iterrows()])


def _elsewhere(pair: pd.Series, fid: pd.DataFrame) -> str:
    if pair["difference"] == 0:
        return ""
    other = fid[["afs", "amed"]].ne(pair[["afs", "amed"]].to_numpy()).any(axis=1)
    same = (fid[["dataset", "solver", "nfe"]] == pair[["dataset", "solver", "nfe"]]).all(axis=1)
    other |= fid[NAMED].notna().any(axis=1)
    held = fid[same & other & fid["value"].isin([pair["value_a"], pair["value_b"]])]
    return "; ".join(
        f"{as_printed(c['value'])}: Table {c['table']}, {label(c)}" for _, c in held.iterrows()
    )


def best_of_ablation(cells: pd.DataFrame) -> pd.DataFrame:
    """Cells of tables that name no teacher or M, beside the tables that do (4 and 7).

    Returns:
        table, ablation, solver, nfe, value; ``best`` of the ablation at this NFE; ``choice``: which
        teacher or M has the printed value, "" if none.
    """
    fid = cells[cells["unit"] == "FID"]
    named = fid[NAMED].notna().any(axis=1)
    choices = [_choice(row) for _, row in fid[named].iterrows()]
    ablation = fid[named].assign(option=choices)[[*EXPERIMENT, "table", "option", "value"]]
    both = fid[~named].merge(ablation, on=EXPERIMENT, suffixes=("", "_ablation"))
    rows = []
    for key, group in both.groupby(["table", "table_ablation", "solver", "nfe"]):
        value = group["value"].iloc[0]
        taken = group.loc[group["value_ablation"] == value, "option"]
        best = group["value_ablation"].min()
        names = ("table", "ablation", "solver", "nfe")
        row = dict(zip(names, key, strict=True))
        rows.append(row | {"value": value, "best": best, "choice": " or ".join(taken)})
    return pd.DataFrame(rows)


def _choice(cell: pd.Series) -> str:
    return cell["teacher"] if pd.notna(cell["teacher"]) else f"M = {cell['M']:g}"


# --- 2. Bold entries -----------------------------------------------------------------------------


def bold_columns(cells: pd.DataFrame) -> list[pd.DataFrame]:
    """The columns of FID in which one entry is bold: per table, data set and NFE.

    Tables 9 and 10 have one in either half (multi-step and single-step), Table 13 per guidance.
    """
    fid = cells[cells["unit"] == "FID"]
    half = fid["multi_step"] & fid["table"].isin([9, 10])
    keys = ["table", "dataset", "nfe", "guidance", half.rename("half")]
    return [column for _, column in fid.groupby(keys, dropna=False)]


def bold_exceptions(cells: pd.DataFrame) -> pd.DataFrame:
    """Columns whose bold entry is not the single smallest one.

    Returns:
        A row per entry that is as small or smaller: table, dataset, nfe, bold, value, other,
        other_value, ``finding``; or one that counts the bold entries where they are not one.
    """
    rows = []
    for column in bold_columns(cells):
        where = column.iloc[0][["table", "dataset", "nfe"]].to_dict()
        bold = column[column["bold"]]
        if len(bold) != 1:
            rows.append(where | {"finding": f"{len(bold)} bold entries"})
            continue
        value = bold["value"].item()
        for _, other in column[~column["bold"] & (column["value"] <= value)].iterrows():
            rows.append(
                where
                | {
                    "bold": label(bold.iloc[0]),
                    "value": value,
                    "other": label(other),
                    "other_value": other["value"],
                    "finding": "as good" if other["value"] == value else "better",
                }
            )
    columns = ["table", "dataset", "nfe", "bold", "value", "other", "other_value", "finding"]
    return pd.DataFrame(rows, columns=columns)


# --- 3. Sentences --------------------------------------------------------------------------------


@lru_cache
def statements() -> pd.DataFrame:
    """Sentences of the paper in our words, each with what tests it on ``cells``.

    The columns: place, sentence and note; ``reading`` is "text", or how a stricter reading of ours
    differs. ``better`` and ``worse`` are pandas queries of cells, and ``better`` is claimed to have
    the lower value; ``same`` lists the columns in which two cells that are compared agree; ``pick``
    says whether "each" cell is compared or the "best" of either side. ``within`` is the share by
    which ``better`` may be worse (negative: must be better), and where there is none it must be
    strictly lower. ``expected`` is "number" or "data set number; ...": what ``worse`` minus
    ``better`` is claimed to be, or ``better`` itself where there is no ``worse``. ``claim`` is
    "always" or "mostly" (in more than half of the comparisons).
    """
    return pd.read_csv(DATA / "paper" / "statements.csv", dtype=str, keep_default_na=False)


def comparisons(statement: pd.Series, cells: pd.DataFrame) -> pd.DataFrame:
    """The comparisons that a statement makes: columns ``met`` and ``tie``."""
    pick = statement["pick"].replace("each", "")
    picks = {"better_pick": pick, "worse_pick": pick}
    found = pairs(cells, {**statement, **picks, "nfe": ""})
    if statement["expected"]:
        return _against_expected(statement["expected"], found)
    factor = 1 + float(statement["within"] or 0)
    gaps = np.array([gap(*pair, factor) for pair in found])
    met = gaps <= 0 if statement["within"] else gaps < 0
    tie = np.array([gap(*pair) == 0 for pair in found], dtype=bool)
    return pd.DataFrame({"met": met, "tie": tie & ~met})


def _against_expected(expected: str, found: list[tuple[dict, dict | None]]) -> pd.DataFrame:
    values = [-gap(*pair) if pair[1] else gap(*pair) for pair in found]
    if " " in expected:  # a number per data set; one that has no cell is not met
        numbers = dict(part.split() for part in expected.split("; "))
        values = pd.Series(values, [better["dataset"] for better, _ in found]).reindex(numbers)
        targets = [float(number) for number in numbers.values()]
    else:
        targets = float(expected)
    return pd.DataFrame({"met": np.abs(np.subtract(values, targets)) < 1e-9, "tie": False})


def judge_statements(cells: pd.DataFrame, statements: pd.DataFrame) -> pd.DataFrame:
    """Statements against cells: the columns of ``statements`` and

    Returns:
        met, tie, of: numbers of comparisons; ``count``: the same in words; ``verdict``:
        *supported* where all are met (more than half, if the claim is "mostly"), *contradicted*
        where none is, else *partly*.

    Raises:
        ValueError: a statement compares nothing.
    """
    rows = []
    for _, statement in statements.iterrows():
        made = comparisons(statement, cells)
        if made.empty:
            raise ValueError(f"The statement {statement['sentence']!r} compares no cells.")
        met, of = int(made["met"].sum()), len(made)
        enough = 2 * met > of if statement["claim"] == "mostly" else met == of
        verdict = "supported" if enough else "partly" if met else "contradicted"
        tie = int(made["tie"].sum())
        count = f"{met} of {of}" + (f", {tie} tie{'s' * (tie > 1)}" if tie else "")
        rows.append({"met": met, "tie": tie, "of": of, "count": count, "verdict": verdict})
    return statements.reset_index(drop=True).join(pd.DataFrame(rows))


# --- 4. What a gain is made of -------------------------------------------------------------------

_KINDS = {(False, False): "plain", (True, False): "with_afs", (True, True): "with_both"}
GAIN = ["dataset", "solver", "nfe"]


def gains(cells: pd.DataFrame) -> pd.DataFrame:
    """The gain of AMED-Plugin with AFS over the plain solver, in two parts.

    Args:
        cells: columns dataset, solver, afs, amed, nfe, value; such as those of Tables 9 and 10.

    Returns:
        For each data set, solver and NFE that has all three: plain, with_afs, with_both (FID);
        ``by_afs`` (plain minus with_afs), ``by_step`` (with_afs minus with_both), ``total``.
    """
    flags = zip(cells["afs"], cells["amed"], strict=True)
    found = cells.assign(kind=[_KINDS.get(flag) for flag in flags])
    wide = found.pivot(index=GAIN, columns="kind", values="value")
    wide = wide.reindex(columns=_KINDS.values()).dropna().reset_index()
    wide.columns.name = None
    return wide.assign(
        by_afs=wide["plain"] - wide["with_afs"],
        by_step=wide["with_afs"] - wide["with_both"],
        total=wide["plain"] - wide["with_both"],
    )


def papers_gains() -> pd.DataFrame:
    """``gains`` of Tables 9 and 10."""
    return gains(cells().query("table in [9, 10]"))


def alone(cells: pd.DataFrame, solver: str = "iPNDM") -> pd.DataFrame:
    """A solver with AFS alone beside the same with a learned step alone, where both are at an NFE.

    Args:
        cells: as in ``gains``.

    Returns:
        Columns dataset, nfe, with_afs, with_step.
    """
    rows = cells[(cells["solver"] == solver) & (cells["afs"] != cells["amed"])]
    rows = rows.assign(kind=np.where(rows["afs"], "with_afs", "with_step"))
    wide = rows.pivot_table(index=["dataset", "nfe"], columns="kind", values="value", sort=False)
    wide = wide.reindex(columns=["with_afs", "with_step"]).dropna()
    return wide.reset_index().rename_axis(columns=None)


def stored_cells(planned: pd.DataFrame, results_dir=RESULTS) -> pd.DataFrame:
    """The rows of a plan whose results are in the store, with ``result``; computes nothing."""
    results = [load_result(what, results_dir) for what in planned["run"]]
    found = complete(planned.assign(table=0, dataset=[what.dataset for what in planned["run"]]))
    found["result"] = results
    return found[found["result"].notna()].reset_index(drop=True)


def our_gains(measured: pd.DataFrame) -> pd.DataFrame:
    """``gains`` of measured cells with the paired differences that they are.

    Args:
        measured: columns dataset, solver, afs, amed, nfe, result; from ``stored_cells``.

    Returns:
        The columns of ``gains``, and the two parts as Estimates, by_afs_found and by_step_found.
    """
    keys = [*GAIN, "afs", "amed"]
    groups = {key: rows["result"].tolist() for key, rows in measured.groupby(keys)}
    found = measured.assign(value=[result.value for result in measured["result"]])
    found = gains(found.groupby(keys, as_index=False)["value"].mean())
    plain, with_afs, with_both = _KINDS
    for part, before, after in (("by_afs", plain, with_afs), ("by_step", with_afs, with_both)):
        found[f"{part}_found"] = [
            difference(groups[(*key, *before)], groups[(*key, *after)])
            for key in found[GAIN].itertuples(index=False, name=None)
        ]
    return found


def missing(planned: pd.DataFrame, measured: pd.DataFrame) -> str:
    """The cells of a plan that ``stored_cells`` did not find, in words; "none" if it found all."""
    names = pd.Series([label(cell) for _, cell in complete(planned.assign(table=0)).iterrows()])
    there = {what.key for what in measured["run"]}
    absent = np.array([what.key not in there for what in planned["run"]])
    nfes = planned["nfe"].reset_index(drop=True)[absent].astype(str).groupby(names, sort=False)
    return "; ".join(f"{name} at {', '.join(group)}" for name, group in nfes) or "none"


# --- 5. Versions, and the cells that calibrate a reproduction -------------------------------------


@lru_cache
def paper_versions() -> pd.DataFrame:
    """Cells that differ between the paper's first and final version, or the repository.

    Columns dataset, method, nfe, first (NaN: a new row), final, source.
    """
    return pd.read_csv(DATA / "paper" / "versions.csv")


@lru_cache
def repository() -> pd.DataFrame:
    """FID of plain solvers without AFS as the authors' repository lists them.

    Columns dataset, method, afs, nfe, value; from https://github.com/zju-pi/diff-sampler,
    diff-solvers-main/README.md at commit 32c2406.
    """
    return pd.read_csv(DATA / "paper" / "repository.csv")


def agree(value, other):
    """Whether numbers agree to the digits that the paper prints."""
    return np.abs(value - other) < np.where(np.maximum(value, other) >= 100, 0.051, 0.0051)


def impossible(cells: pd.DataFrame) -> pd.DataFrame:
    """Cells of two evaluations per step whose NFE is odd without AFS, or even with it.

    Their NFE is twice the number of steps, less one with AFS (Sec. 3.4).
    """
    two = cells["amed"] | cells["solver"].isin(TWO_EVALUATIONS)
    return cells[two & ((cells["nfe"] % 2 == 1) != cells["afs"])]


def against_repository(cells: pd.DataFrame, repository: pd.DataFrame) -> pd.DataFrame:
    """How many cells have the repository's number for the same data set, method and NFE.

    Returns:
        dataset, method, ``equal`` (to the printed digits), ``of``.
    """
    keys = ["dataset", "method", "nfe"]
    both = cells.drop_duplicates(keys).merge(repository, on=keys, suffixes=("", "_there"))
    both["equal"] = agree(both["value"], both["value_there"])
    counts = both.groupby(keys[:2])["equal"].agg(equal="sum", of="size")
    return counts.reset_index()


def calibration(
    cells: pd.DataFrame, versions: pd.DataFrame, repository: pd.DataFrame
) -> pd.DataFrame:
    """Cells of plain solvers in Table 2 that the first and the final version share.

    Returns:
        dataset, method, afs, nfe, value; ``doubt``: why the cell may not be what its label says,
        "" if nothing that is known here speaks for it.
    """
    keys = ["dataset", "method", "nfe"]
    table2 = cells[(cells["table"] == 2) & ~cells["amed"]]
    differs = pd.MultiIndex.from_frame(versions[keys])
    shared = table2[~pd.MultiIndex.from_frame(table2[keys]).isin(differs)]
    doubt = pd.Series("", shared.index)
    two = shared[shared["afs"]].assign(nfe=shared["nfe_without_afs"])
    for row in against_repository(two, repository).itertuples():
        if 2 * row.equal > row.of:
            at = (shared["dataset"] == row.dataset) & (shared["method"] == row.method)
            doubt[at] = (
                f"{row.equal} of the row's {row.of} numbers are the repository's without AFS, at "
                "one evaluation more"
            )
    twins = [*keys, "value"]
    for _, twin in impossible(cells).iterrows():
        at = (shared[twins] == twin[twins]).all(axis=1)
        doubt[at] = f"Table {twin['table']} prints the number without AFS, where NFE cannot be odd"
    return shared[["dataset", "method", "afs", "nfe", "value"]].assign(doubt=doubt)


def versions_table(versions: pd.DataFrame) -> pd.DataFrame:
    """First and final numbers: rows data set and method, columns NFE."""
    arrows = [
        (f"{as_printed(row.first)} →\N{NO-BREAK SPACE}" if pd.notna(row.first) else "new: ")
        + as_printed(row.final)
        for row in versions.itertuples()
    ]
    frame = versions.assign(cell=arrows, dataset=versions["dataset"].map(_title))
    rows = ["dataset", "method"]
    table = across_nfe(frame, rows, "cell").fillna("–")
    return table.reindex(pd.MultiIndex.from_frame(frame[rows].drop_duplicates(), names=[None] * 2))
