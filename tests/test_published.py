"""The transcription of the paper's tables: shapes, second typing, and where the paper repeats a
number. The exceptions listed here are the paper's, not ours."""

import itertools

import numpy as np
import pandas as pd
import pytest

from amedlib.datasets.files import DATA
from amedlib.study import plans, published

COLUMNS = (
    "table dataset method teacher schedule r M afs amed strategy guidance nfe value unit bold"
).split()
# Rows times columns of NFE as printed; a dash is no row.
FULL = 8 + 8 + 4 + 4  # a solver of one evaluation per step: plain, AFS, AMED, both
ABLATION = 4 * FULL + 4 * 4 + 2 * 4  # four such solvers, DPM-Solver-2, AMED-Solver
COUNTS = {
    2: (8 + 8 + 6 + 6) * 4,  # CIFAR-10, ImageNet, FFHQ, LSUN Bedroom
    3: 2 * 3 * 4,  # FID and minutes, three strategies
    4: 5 * 4,
    5: 2 * 3 * 4,  # with and without plugin, three schedules
    6: (6 + 1) * 4,
    7: 5 * 4,
    8: (2 * 4 + 1) * 4,
    9: ABLATION,
    10: ABLATION,
    11: 5 * 4,
    12: 2 * 4,
    13: 3 * 2 * 4,  # three guidance scales
}
# Sums over each column (NFE ascending) of a second transcription, made by eye;
# in Table 3 of FID and minutes together.
SUMS = {
    2: (3029.68, 941.55, 360.78, 206.77),
    3: (133.73, 144.57, 165.45, 195.48),
    4: (156.40, 91.07, 32.83, 19.61),
    5: (399.73, 126.14, 60.48, 42.52),
    6: (577.88, 262.19, 65.35, 32.84),
    7: (98.76, 36.46, 20.16, 14.26),
    8: (1188.06, 339.31, 136.00, 70.54),
    9: (999.57, 608.01, 333.21, 264.95, 138.88, 120.19, 90.20, 83.54),
    10: (1045.36, 741.41, 379.42, 310.75, 189.43, 165.99, 127.24, 118.19),
    11: (600.91, 203.34, 102.43, 69.70),
    12: (177.63, 27.44, 9.56, 7.38),
    13: (230.56, 84.23, 52.33, 40.66),
}
# A few cells of every table, typed by eye: what selects the row, and its values.
CELLS = {
    2: ({"dataset": "ffhq", "method": "UniPC"}, [126.4, 17.89, 7.07, 4.53]),
    3: ({"strategy": "time_wise", "unit": "min"}, [8.60, 12.73, 16.87, 20.93]),
    4: ({"teacher": "DPM-Solver-2"}, [25.17, 17.94, 6.67, 3.89]),
    5: ({"schedule": "time_uniform", "amed": True}, [40.66, 17.34, 13.14, 10.90]),
    6: ({"r": 0.2}, [24.44, 21.94, 8.23, 4.17]),
    7: ({"M": 4}, [18.37, 7.14, 4.14, 2.88]),
    8: ({"method": "UniPC", "afs": True}, [103.4, 21.24, 17.46, 6.97]),
    9: ({"method": "DDIM", "afs": True, "amed": True}, [50.64, 31.74, 21.80, 15.27]),
    10: ({"method": "DPM-Solver-2", "afs": False, "amed": True}, [41.90, 29.74, 11.47, 6.98]),
    11: ({"method": "iPNDM"}, [69.68, 30.52, 16.69, 10.48]),
    12: ({"amed": True}, [61.93, 9.00, 4.38, 3.62]),
    13: ({"guidance": 4.0, "amed": True}, [31.73, 8.87, 6.90, 5.99]),
}
# Columns whose bold entry is not the single smallest one: table, NFE -> what else is as small.
NOT_THE_ONLY_BEST = {
    (3, 6): [9.46],  # time-wise, as good as sample-wise
    (6, 10): [3.89],  # r = 0.3, as good as the plugin
    (7, 5): [7.14],  # M = 4, as good as M = 2
    (10, 9): [5.61, 5.64],  # UniPC with both is better than the bold one, iPNDM with AFS as good
}
# Numbers that the paper prints twice with two values: dataset, solver, AFS, AMED, NFE.
PRINTED_TWICE = {
    ("cifar10", "DPM-Solver-2", True, False, 5): {(2, 57.30), (9, 57.28)},
    ("cifar10", "iPNDM", True, True, 9): {(2, 2.78), (9, 2.79)},
    ("imagenet64", "iPNDM", True, True, 9): {(2, 5.65), (10, 5.64)},
    ("cifar10", "DPM-Solver-2", False, True, 6): {(6, 9.78), (9, 21.40)},
    ("cifar10", "DPM-Solver++(3M)", True, True, 3): {(5, 61.99), (9, 40.83)},
    ("cifar10", "DPM-Solver++(3M)", True, True, 5): {(5, 9.73), (9, 10.17)},
    ("cifar10", "DPM-Solver++(3M)", True, True, 7): {(5, 4.32), (9, 4.45)},
    ("cifar10", "DPM-Solver++(3M)", True, True, 9): {(5, 3.07), (9, 3.10)},
    # Table 2 says that it uses AFS, and prints the row that Table 8 calls the one without.
    ("lsun_bedroom", "DPM-Solver-2", True, False, 3): {(2, 210.6), (8, 241.8)},
    ("lsun_bedroom", "DPM-Solver-2", True, False, 5): {(2, 80.60), (8, 88.79)},
    ("lsun_bedroom", "DPM-Solver-2", True, False, 7): {(2, 23.25), (8, 22.59)},
    ("lsun_bedroom", "DPM-Solver-2", True, False, 9): {(2, 9.61), (8, 9.07)},
}


@pytest.fixture(scope="module")
def cells():
    """All tables as one frame; ``solver`` is the method, or what a plugin is applied on."""
    frame = pd.concat([published.published(f"table{n}") for n in COUNTS], ignore_index=True)
    solver = frame["method"].str.replace(r"AMED-Plugin \((.+)\)", r"\1", regex=True)
    return frame.assign(table=frame["table"].astype(int), solver=solver)


def test_every_table_has_the_printed_shape(cells):
    assert dict(cells["table"].value_counts()) == COUNTS
    for n in COUNTS:
        assert list(published.published(f"table{n}").columns) == COLUMNS
        assert set(published.published(f"table{n}")["table"]) == {str(n)}
    assert not cells.duplicated([c for c in COLUMNS if c not in ("value", "bold")]).any()


def test_names_units_and_ranges(cells):
    datasets = "cifar10 ffhq imagenet64 lsun_bedroom lsun_cat lsun_bedroom_ldm imagenet256"
    assert set(cells["dataset"]) == set(datasets.split())
    # All but the plugin, whose `solver` is what it is applied on.
    assert set(cells["solver"]) == set(plans.METHODS) - {"AMED-Plugin"}
    assert set(cells["schedule"]) == set(plans.SCHEDULES)
    assert set(cells["teacher"].dropna()) <= set(plans.METHODS)
    assert cells["bold"].dtype == cells["afs"].dtype == cells["amed"].dtype == bool
    minutes = cells[cells["unit"] == "min"]
    assert set(cells["unit"]) == {"FID", "min"} and set(minutes["table"]) == {3}
    assert len(minutes) == 12 and not minutes["bold"].any()
    assert cells["value"].between(2.5, 350).all()
    assert cells["nfe"].between(3, 10).all()


def test_columns_are_filled_where_they_apply(cells):
    for column, tables in {"teacher": {4}, "M": {7}, "strategy": {3}, "guidance": {13}}.items():
        assert (cells[column].notna() == cells["table"].isin(tables)).all()
    plain = (cells["table"] == 6) & ~cells["amed"]
    assert (cells["r"].notna() == plain).all()


def test_two_evaluations_per_step_have_an_odd_nfe_only_with_afs(cells):
    """NFE is 2(N - 1), less one with AFS (Sec. 3.4); one row cannot be as printed."""
    pairs = cells[cells["amed"] | cells["solver"].isin(["DPM-Solver-2", "EDM"])]
    wrong = pairs[(pairs["nfe"] % 2 == 1) != pairs["afs"]]
    assert set(zip(wrong["table"], wrong["method"], strict=True)) == {(8, "DPM-Solver-2")}
    assert not wrong["afs"].any() and len(wrong) == 4


@pytest.mark.parametrize("n", COUNTS)
def test_agrees_with_a_second_transcription(cells, n):
    frame = cells[cells["table"] == n]
    sums = frame.groupby("nfe")["value"].sum()
    assert tuple(sums) == pytest.approx(SUMS[n], abs=1e-6)
    which, values = CELLS[n]
    for column, value in which.items():
        frame = frame[frame[column] == value]
    assert list(frame.sort_values("nfe")["value"]) == values


def test_bold_is_the_smallest_but_for_the_papers_exceptions(cells):
    """The best of a column, in Tables 9 and 10 of its half, in Table 13 of its guidance scale."""
    multi = cells["solver"].isin(["DPM-Solver++(3M)", "UniPC", "iPNDM"])
    half = multi.where(cells["table"].isin([9, 10]), False)
    fid = cells.assign(half=half, guidance=cells["guidance"].fillna(0))
    fid = fid[fid["unit"] == "FID"]
    exceptions = {}
    for key, column in fid.groupby(["table", "nfe", "dataset", "half", "guidance"]):
        assert column["bold"].sum() == 1, key
        bold = column.loc[column["bold"], "value"].item()
        others = column[~column["bold"] & (column["value"] <= bold)]["value"]
        if len(others):
            exceptions[key[:2]] = sorted(others)
    assert exceptions == NOT_THE_ONLY_BEST


def test_numbers_printed_twice_are_equal_but_for_the_papers_exceptions(cells):
    """Same data, solver, schedule, AFS and AMED; r is 0.5 where the paper names none."""
    fid = cells[(cells["unit"] == "FID") & ~cells["table"].isin([4, 7])].copy()
    r = fid["r"].mask((fid["solver"] == "DPM-Solver-2") & ~fid["amed"] & fid["r"].isna(), 0.5)
    same = ["dataset", "solver", "afs", "amed", "nfe", "schedule", "guidance"]
    fid = fid.assign(r=r.fillna(0), guidance=fid["guidance"].fillna(0))
    fid = fid[~fid["strategy"].isin(["grid_search", "time_wise"])]  # the rest is sample-wise
    pairs, differing = 0, {}
    for key, group in fid.groupby([*same, "r"]):
        for a, b in itertools.combinations(group.itertuples(), 2):
            pairs += 1
            if a.value != b.value:
                differing[key[:5]] = {(a.table, a.value), (b.table, b.value)}
    assert pairs == 100
    assert differing == PRINTED_TWICE


@pytest.mark.parametrize("n", [4, 7])
def test_main_tables_print_the_best_of_the_ablations(cells, n):
    """Table 2 takes the best teacher (Table 4) and M (Table 7) at each NFE; not one for all."""
    ablation = cells[cells["table"] == n]
    best = ablation.loc[ablation.groupby("nfe")["value"].idxmin()].set_index("nfe")
    table2 = cells[(cells["table"] == 2) & (cells["dataset"] == "cifar10") & cells["amed"]]
    table2 = table2[table2["method"] == ablation["method"].iloc[0]].set_index("nfe")
    assert dict(best["value"]) == dict(table2["value"])
    assert best["teacher" if n == 4 else "M"].nunique() == 2


def test_versions_start_from_the_first_one(cells):
    frame = pd.read_csv(DATA / "paper" / "versions.csv")
    assert list(frame.columns) == ["dataset", "method", "nfe", "first", "final", "source"]
    # 14 rows of Table 2, of which DDIM's two are new, and four rows at even NFE.
    assert len(frame) == (14 + 4) * 4
    assert not frame.duplicated(["dataset", "method", "nfe"]).any()
    assert (frame["final"] != frame["first"]).all() and (frame["final"] > 0).all()
    new = frame["first"].isna()
    assert set(zip(frame["dataset"][new], frame["method"][new], strict=True)) == {
        ("ffhq", "DDIM"),
        ("lsun_bedroom", "DDIM"),
    }
    # Odd NFE are of Table 2, even ones (from the repository) of Tables 9 and 10 without AFS.
    odd, even = cells["table"] == 2, cells["table"].isin([9, 10]) & ~cells["afs"]
    printed = cells[odd | even & (cells["nfe"] % 2 == 0)]
    keys = ["dataset", "solver", "amed", "nfe"]
    old = frame[~new].assign(
        solver=frame["method"].str.replace(r"AMED-Plugin \((.+)\)", r"\1", regex=True),
        amed=frame["method"].str.startswith("AMED"),
    )
    both = old.merge(printed, on=keys, validate="one_to_one")
    assert len(both) == len(old) and (both["first"] == both["value"]).all()
    # Of the plain solvers only UniPC has other numbers; the rest calibrates a reproduction.
    plain = set(frame["method"][~frame["method"].str.startswith("AMED")])
    assert plain == {"UniPC", "DDIM"}


def test_columns_go_by_the_number_of_evaluations_and_end_with_what_is_about_all():
    frame = pd.DataFrame({"row": list("abab"), "nfe": [10, np.nan, 9, 10], "cell": list("wxyz")})
    table = published.across_nfe(frame, ["row"], "cell")
    assert list(table.columns) == ["NFE 9", "NFE 10", "all"]
    assert table.fillna("").to_numpy().tolist() == [["y", "w", ""], ["", "z", "x"]]
