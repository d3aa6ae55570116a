"""The audit of the paper's tables: planted inconsistencies are found, sound tables pass, and
in the shipped tables a second count finds as much."""

import csv
import itertools
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from amedlib.datasets.files import DATA
from amedlib.study import audit, execute, figures, plans, tables
from amedlib.study.run import BLOCKS, Result
from amedlib.study.store import save_result

BLANK = {
    **dict.fromkeys(("teacher", "r", "M", "strategy", "guidance"), np.nan),
    **{"dataset": "cifar10", "method": "iPNDM", "schedule": "polynomial", "afs": False},
    **{"amed": False, "nfe": 5, "unit": "FID", "bold": False},
}


def made_up(*rows):
    """Cells from (table, value, what differs from a plain iPNDM cell)."""
    return audit.complete(
        pd.DataFrame([BLANK | {"table": t, "value": v, **changes} for t, v, changes in rows])
    )


PLUGIN = {"method": "AMED-Plugin (iPNDM)", "amed": True, "afs": True}
AMED = {"method": "AMED-Solver", "amed": True}
DPM2 = {"method": "DPM-Solver-2", "nfe": 6}


# --- pairs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ({}, {}, True),
        (PLUGIN, PLUGIN | {"method": "iPNDM"}, True),  # Tables 9 and 10 name the base only
        (DPM2, DPM2 | {"r": 0.5}, True),  # the default
        (AMED, AMED | {"strategy": "sample_wise"}, True),  # likewise
        (DPM2, DPM2 | {"r": 0.3}, False),
        (AMED, AMED | {"strategy": "time_wise"}, False),
        ({}, {"afs": True}, False),
        ({}, {"schedule": "logsnr"}, False),
        ({}, {"nfe": 6}, False),
        ({}, {"dataset": "ffhq"}, False),
        ({"guidance": 2.0}, {"guidance": 4.0}, False),
        (PLUGIN, PLUGIN | {"M": 1}, False),  # left to `best_of_ablation`
        ({}, {"unit": "min"}, False),
    ],
)
def test_pairs_are_the_same_experiment(a, b, same):
    found = audit.repeated_cells(made_up((2, 7.0, a), (9, 7.5, b)))
    assert len(found) == same
    if same:
        row = found.iloc[0]
        assert (row["table_a"], row["table_b"]) == (2, 9)
        assert row["difference"] == pytest.approx(0.5)


def test_a_number_under_another_label_is_found():
    frame = made_up((2, 7.0, {"afs": True}), (8, 9.0, {"afs": True}), (8, 7.0, {}))
    (elsewhere,) = audit.repeated_cells(frame)["elsewhere"]
    assert elsewhere == "7.00: Table 8, iPNDM"
    frame.loc[2, "value"] = 8.0
    assert list(audit.repeated_cells(frame)["elsewhere"]) == [""]


def test_shipped_pairs_agree_with_a_second_count():
    """Loops over the files as text, without the library."""
    kept = []
    for number in (2, 3, 5, 6, 8, 9, 10, 11, 12, 13):
        with (DATA / "paper" / f"table{number}.csv").open() as file:
            for row in csv.DictReader(file):
                if row["unit"] != "FID" or row["strategy"] in ("grid_search", "time_wise"):
                    continue
                solver = row["method"].removeprefix("AMED-Plugin (")
                solver = solver[:-1] if solver != row["method"] else solver
                r = row["r"] or (
                    "0.5" if (solver, row["amed"]) == ("DPM-Solver-2", "False") else ""
                )
                key = (solver, r, *(row[k] for k in ("dataset", "afs", "amed", "schedule")))
                kept.append((key + (row["guidance"], row["nfe"]), number, float(row["value"])))
    pairs = [(a, b) for a, b in itertools.combinations(kept, 2) if a[0] == b[0]]
    found = audit.repeated_cells(audit.cells())
    assert len(found) == len(pairs) == 100
    assert (found["difference"] == 0).sum() == sum(a[2] == b[2] for a, b in pairs) == 88
    counted = Counter((a[1], b[1]) for a, b in pairs)
    assert counted == Counter(zip(found["table_a"], found["table_b"], strict=True))
    typed = {(2, 5): 4, (2, 8): 20, (2, 9): 28, (2, 10): 28, (3, 9): 4, (5, 9): 8, (6, 9): 8}
    assert counted == typed


def test_shipped_pairs_that_differ():
    found = audit.repeated_cells(audit.cells())
    found = found[found["difference"] != 0]
    values = {
        (r.dataset, r.row, r.nfe, r.table_a, r.table_b): (r.value_a, r.value_b)
        for r in found.itertuples()
    }
    assert len(values) == 12
    assert values["cifar10", "AMED-Plugin (DPM-Solver-2)", 6, 6, 9] == (9.78, 21.40)
    assert values["cifar10", "AMED-Plugin (DPM-Solver++(3M)), AFS", 3, 5, 9] == (61.99, 40.83)
    assert values["cifar10", "DPM-Solver-2, AFS", 5, 2, 9] == (57.30, 57.28)
    assert values["imagenet64", "AMED-Plugin (iPNDM), AFS", 9, 2, 10] == (5.65, 5.64)
    bedroom = found[found["dataset"] == "lsun_bedroom"]
    assert list(bedroom["elsewhere"]) == [
        f"{v}: Table 8, DPM-Solver-2" for v in ("210.6", "80.60", "23.25", "9.61")
    ]


# --- ablations -----------------------------------------------------------------------------------


def test_what_was_taken_from_an_ablation():
    teachers = [(4, 5.0, AMED | {"teacher": "EDM"}), (4, 6.0, AMED | {"teacher": "iPNDM"})]
    (row,) = audit.best_of_ablation(made_up((2, 6.0, AMED), *teachers)).itertuples()
    assert (row.table, row.ablation, row.value, row.best, row.choice) == (2, 4, 6.0, 5.0, "iPNDM")
    (row,) = audit.best_of_ablation(made_up((2, 5.5, AMED), *teachers)).itertuples()
    assert row.choice == ""
    others = (2, 6.0, AMED | {"afs": True}), (2, 6.0, AMED | {"nfe": 6})
    assert audit.best_of_ablation(made_up(*others, *teachers)).empty


def test_shipped_rows_are_the_best_of_the_ablations_per_nfe():
    found = audit.best_of_ablation(audit.cells())
    table2 = found[found["table"] == 2]
    assert (table2["value"] == table2["best"]).all()
    choices = table2.groupby("ablation")["choice"].agg(list)
    assert choices[4] == ["EDM", "DPM-Solver-2", "EDM", "EDM"]
    assert choices[7] == ["M = 2", "M = 2 or M = 4", "M = 1", "M = 1"]
    table9 = found[(found["table"] == 9) & (found["choice"] == "")]
    assert list(table9["value"]) == [2.79] and list(table9["best"]) == [2.78]


# --- bold ----------------------------------------------------------------------------------------


def column(table, value, other, **changes):
    """A column of a bold iPNDM and another multi-step solver."""
    other_method = {"method": "UniPC"} | changes
    return made_up((table, value, {"bold": True}), (table, other, other_method))


def test_bold_exceptions_are_found():
    assert audit.bold_exceptions(column(2, 5.0, 6.0)).empty
    (row,) = audit.bold_exceptions(column(2, 5.0, 5.0)).itertuples()
    assert (row.bold, row.other, row.finding) == ("iPNDM", "UniPC, polynomial", "as good")
    (row,) = audit.bold_exceptions(column(2, 5.0, 4.9)).itertuples()
    assert (row.finding, row.other_value) == ("better", 4.9)
    (row,) = audit.bold_exceptions(column(2, 5.0, 6.0, bold=True)).itertuples()
    assert row.finding == "2 bold entries"
    (row,) = audit.bold_exceptions(made_up((2, 5.0, {}))).itertuples()
    assert row.finding == "0 bold entries"


@pytest.mark.parametrize(
    ("table", "changes", "blocks"),
    [
        (2, {"method": "DDIM"}, 1),
        (9, {"method": "DDIM"}, 2),  # its halves
        (10, {"method": "DDIM"}, 2),
        (13, {"guidance": 2.0}, 2),
        (2, {"nfe": 6}, 2),
        (2, {"dataset": "ffhq"}, 2),
        (3, {"unit": "min"}, 1),  # no entry of minutes is bold
    ],
)
def test_bold_is_looked_for_in_its_block(table, changes, blocks):
    frame = column(table, 5.0, 4.0, bold=blocks == 2, **changes)
    assert len(audit.bold_columns(frame)) == blocks
    assert len(audit.bold_exceptions(frame)) == (blocks == 1 and "unit" not in changes)


def test_shipped_bold_exceptions():
    found = audit.bold_exceptions(audit.cells())
    columns = set(zip(found["table"], found["nfe"], strict=True))
    assert columns == {(3, 6), (6, 10), (7, 5), (10, 9)}
    better = found[found["finding"] == "better"]
    assert better["other"].item() == "AMED-Plugin (UniPC), AFS"
    assert (better["value"].item(), better["other_value"].item()) == (5.64, 5.61)
    assert set(found["finding"]) == {"as good", "better"}


# --- statements ----------------------------------------------------------------------------------

STATEMENT = {
    **dict.fromkeys(("place", "note", "within", "expected"), ""),
    **{"reading": "text", "sentence": "AFS helps.", "same": "dataset nfe", "pick": "each"},
    **{"better": "afs", "worse": "not afs", "claim": "always"},
}


def judged(frame, **changes):
    (row,) = audit.judge_statements(frame, pd.DataFrame([STATEMENT | changes])).itertuples()
    return row.count, row.verdict


def with_and_without(*values):
    """Cells with AFS and without it at successive NFE."""
    rows = [
        (2, v, {"afs": afs, "nfe": nfe})
        for nfe, pair in enumerate(values)
        for v, afs in zip(pair, (True, False), strict=True)
    ]
    return made_up(*rows)


@pytest.mark.parametrize(
    ("values", "changes", "expected"),
    [
        ([(4.0, 5.0), (3.0, 4.0)], {}, ("2 of 2", "supported")),
        ([(6.0, 5.0), (5.0, 4.0)], {}, ("0 of 2", "contradicted")),
        ([(4.0, 5.0), (5.0, 4.0)], {}, ("1 of 2", "partly")),
        ([(4.0, 5.0), (5.0, 5.0)], {}, ("1 of 2, 1 tie", "partly")),
        ([(5.0, 5.0), (5.0, 5.0)], {}, ("0 of 2, 2 ties", "contradicted")),
        ([(4.0, 5.0), (5.0, 5.0)], {"within": "0"}, ("2 of 2", "supported")),
        ([(5.4, 5.0), (5.6, 5.0)], {"within": "0.1"}, ("1 of 2", "partly")),
        ([(4.4, 5.0), (4.6, 5.0)], {"within": "-0.1"}, ("1 of 2", "partly")),
        ([(4, 5), (4, 5), (6, 5)], {"claim": "mostly"}, ("2 of 3", "supported")),
        ([(4, 5), (6, 5)], {"claim": "mostly"}, ("1 of 2", "partly")),
        ([(6, 5), (6, 5)], {"claim": "mostly"}, ("0 of 2", "contradicted")),
        ([(4, 5), (6, 7)], {"same": "dataset"}, ("3 of 4", "partly")),
        ([(4, 5), (6, 7)], {"same": "dataset", "pick": "best"}, ("1 of 1", "supported")),
        ([(4.0, 5.0), (3.5, 4.5)], {"expected": "1"}, ("2 of 2", "supported")),
        ([(4.0, 5.0), (3.5, 4.4)], {"expected": "1"}, ("1 of 2", "partly")),
    ],
)
def test_verdicts(values, changes, expected):
    assert judged(with_and_without(*values), **changes) == expected


def test_expected_values_per_data_set():
    frame = made_up((2, 7.14, {}), (2, 13.75, {"dataset": "imagenet64"}))
    claimed = {"better": "not afs", "worse": "", "same": ""}
    right = "cifar10 7.14; imagenet64 13.75"
    assert judged(frame, **claimed, expected=right) == ("2 of 2", "supported")
    # What has no cell is not met.
    missing = right + "; lsun_bedroom 12.79"
    assert judged(frame, **claimed, expected=missing) == ("2 of 3", "partly")
    assert judged(frame, **claimed, expected="cifar10 7.15") == ("0 of 1", "contradicted")


def test_a_statement_that_compares_nothing_is_refused():
    with pytest.raises(ValueError, match="compares no cells"):
        judged(with_and_without((4.0, 5.0)), better="afs and nfe == 9")


def test_shipped_statements():
    statements = audit.statements()
    assert set(statements["pick"]) <= {"each", "best"}
    assert set(statements["claim"]) <= {"always", "mostly"}
    assert not statements.duplicated(["sentence", "reading"]).any()
    found = audit.judge_statements(audit.cells(), statements)

    def count(beginning, reading="text"):
        rows = found[found["sentence"].str.startswith(beginning) & (found["reading"] == reading)]
        return rows["count"].item()

    assert count("AMED-Plugin on iPNDM reaches") == "2 of 3"
    assert count("AMED-Plugin improves FID by 6.45") == "3 of 3"
    assert count("The same gains", "equal AFS") == "0 of 2"
    assert count("AMED-Plugin improves other solvers", "equal AFS") == "57 of 80, 2 ties"
    assert count("AMED-Plugin consistently improves") == "12 of 12"
    assert count("The same against DPM-Solver++(3M)", "equal AFS") == "1 of 4"
    assert count("AMED-Solver outperforms") == "36 of 36"  # Table 2: 32, Table 11: 4
    assert count("AMED-Solver beats multi-step") == "22 of 24"
    assert count("Every single-step teacher", "each teacher") == "20 of 24"
    assert count("DPM-Solver++(3M) prefers") == "6 of 8"
    assert count("AFS improves consistently") == "64 of 64"
    assert count("AFS causes inferior") == "9 of 12"
    assert count("AFS and the learned step") == "30 of 40, 1 tie"
    assert count("AMED-Plugin further improves") == "8 of 12"


# --- gains ---------------------------------------------------------------------------------------


def test_gains_add_up_and_need_all_three():
    three = [(9, 13.0, {}), (9, 8.0, {"afs": True}), (9, 9.0, {"afs": True, "amed": True})]
    (row,) = audit.gains(made_up(*three)).itertuples()
    assert (row.by_afs, row.by_step, row.total) == (5.0, -1.0, 4.0)
    for left_out in range(3):
        assert audit.gains(made_up(*(three[:left_out] + three[left_out + 1 :]))).empty
    only_amed = (9, 7.0, {"amed": True})
    assert len(audit.gains(made_up(*three, only_amed))) == 1


def test_gains_of_the_paper():
    found = audit.papers_gains()
    assert len(found) == 2 * 4 * 4  # data sets, solvers with one evaluation per step, NFE
    np.testing.assert_allclose(found["by_afs"] + found["by_step"], found["total"], atol=1e-12)
    at = found.set_index(audit.GAIN)
    row = at.loc[("cifar10", "iPNDM", 5)]
    assert (row["plain"], row["with_afs"], row["with_both"]) == (13.59, 7.76, 7.14)
    assert (row["by_afs"], row["by_step"]) == pytest.approx((5.83, 0.62))
    row = at.loc[("imagenet64", "iPNDM", 5)]
    assert (row["by_afs"], row["by_step"], row["total"]) == pytest.approx((3.46, 1.78, 5.24))
    assert (at["by_afs"] > 0).all()
    table = tables.gain_table(found)
    assert table.loc[("CIFAR-10, 32x32", "iPNDM", "AFS"), "NFE 5"] == "5.83"
    assert table.loc[("CIFAR-10, 32x32", "DPM-Solver++(3M)", "learned step"), "NFE 5"] == "−0.23"


def test_afs_alone_against_a_learned_step_alone():
    """By hand from Table 9: iPNDM on CIFAR-10 at 4, 6, 8 and 10 evaluations."""
    found = audit.alone(audit.cells().query("table in [9, 10]"))
    rows = found[found["dataset"] == "cifar10"]
    assert rows["nfe"].tolist() == [4, 6, 8, 10]
    assert (rows["with_afs"] < rows["with_step"]).all()


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A store with iPNDM at 5 NFE, plain, with AFS and with both, and nothing else."""
    monkeypatch.setattr(execute, "compute", lambda *args: pytest.fail("something is computed"))
    planned = plans.table(9, "digits", [5], n_samples=40)
    values = {(False, False): 7.0, (True, False): 4.0, (True, True): 4.5}
    noise = 0.1 * np.random.default_rng(0).normal(size=(3, BLOCKS))
    for row in planned[planned["method"] == "iPNDM"].itertuples():
        i = list(values).index((row.afs, row.amed))
        value = values[row.afs, row.amed]
        replicates = (value + noise[i]).tolist()
        save_result(Result(row.run, value, replicates, {}, 5, 1.0, "cpu", {}, "", ""), tmp_path)
    return tmp_path, planned, noise


def test_what_is_stored_is_shown_and_the_rest_is_named(store):
    folder, planned, noise = store
    measured = audit.stored_cells(planned, folder)
    assert len(measured) == 3 and set(measured["solver"]) == {"iPNDM"}
    (row,) = audit.our_gains(measured).itertuples()
    assert (row.dataset, row.total) == ("digits", 2.5)
    assert (row.by_afs, row.by_step) == (3.0, -0.5)
    paired = noise[0] - noise[1]
    error = np.sqrt((BLOCKS - 1) / BLOCKS * ((paired - paired.mean()) ** 2).sum())
    half = stats.t.ppf(0.975, BLOCKS - 1) * error
    assert row.by_afs_found.interval == pytest.approx((3.0 - half, 3.0 + half))
    missing = audit.missing(planned, measured)
    assert "AMED-Plugin (UniPC), AFS at 5" in missing and "iPNDM" not in missing
    only = planned[planned["method"] == "iPNDM"]
    assert audit.missing(only, measured) == "none"
    (said,) = tables.gains_in_words(audit.our_gains(measured))
    assert said.startswith("iPNDM at 5 evaluations: AFS changes the distance by −3.00 ± ")
    assert "a learned step changes what AFS leaves by 0.50 ± " in said
    assert said.endswith(" (one training).")
    shown = tables.gain_table(audit.our_gains(measured))
    assert [text[:4] for text in shown.loc["iPNDM", "NFE 5"]] == ["3.00", "−0.5"]


def test_an_empty_store_gives_no_gains(store, tmp_path):
    _, planned, _ = store
    measured = audit.stored_cells(planned, tmp_path / "empty")
    assert measured.empty
    assert audit.our_gains(measured).empty


def test_the_figure_has_a_panel_per_frame():
    papers = audit.papers_gains()
    panels = {name: rows for name, rows in papers.groupby("dataset")}
    figure = figures.gains_figure(panels, ["FID", "FID"])
    assert [ax.get_title() for ax in figure.axes] == ["cifar10", "imagenet64"]
    assert [ax.get_ylabel() for ax in figure.axes] == ["FID", "FID"]
    drawn = np.concatenate([line.get_ydata() for line in figure.axes[0].lines]).astype(float)
    assert {13.59, 7.76, 7.14} <= set(drawn)


# --- calibration ---------------------------------------------------------------------------------

NO_VERSIONS = pd.DataFrame(columns=["dataset", "method", "nfe"])


def repository(*values, method="EDM"):
    rows = [
        {"dataset": "cifar10", "method": method, "afs": False, "nfe": n, "value": v}
        for n, v in values
    ]
    return pd.DataFrame(rows)


def test_a_row_at_another_nfe_is_doubted():
    rows = [(2, v, {"method": "EDM", "afs": True, "nfe": n}) for n, v in ((3, 249.4), (5, 89.63))]
    frame = made_up(*rows, (2, 3.0, {}))
    found = audit.calibration(frame, NO_VERSIONS, repository((4, 249.41), (6, 89.63)))
    assert list(found["doubt"] != "") == [True, True, False]
    for other in (repository((4, 250.0), (6, 89.63)), repository((3, 249.41), (5, 89.63))):
        assert (audit.calibration(frame, NO_VERSIONS, other)["doubt"] == "").all()


def test_a_number_that_stands_under_an_impossible_nfe_is_doubted():
    label = {"method": "DPM-Solver-2", "nfe": 5}
    frame = made_up(
        (2, 80.6, label | {"afs": True}), (8, 80.6, label), (8, 88.8, label | {"afs": True})
    )
    assert list(audit.impossible(frame)["value"]) == [80.6]
    empty = repository((4, 1.0))
    (doubt,) = audit.calibration(frame, NO_VERSIONS, empty)["doubt"]
    assert doubt.startswith("Table 8")
    frame.loc[1, "value"] = 80.7
    assert list(audit.calibration(frame, NO_VERSIONS, empty)["doubt"]) == [""]


def test_what_differs_between_versions_does_not_calibrate():
    frame = made_up((2, 3.0, {}), (2, 4.0, {"nfe": 7}), (2, 5.0, AMED))
    versions = pd.DataFrame([{"dataset": "cifar10", "method": "iPNDM", "nfe": 7}])
    found = audit.calibration(frame, versions, repository((4, 1.0)))
    assert list(found["value"]) == [3.0]


def test_shipped_calibration():
    found = audit.calibration(audit.cells(), audit.paper_versions(), audit.repository())
    assert dict(found["dataset"].value_counts()) == {
        **{"cifar10": 20, "imagenet64": 20},
        **{"ffhq": 12, "lsun_bedroom": 12},
    }
    doubtful = found[found["doubt"] != ""]
    assert Counter(zip(doubtful["dataset"], doubtful["method"], strict=True)) == {
        ("imagenet64", "EDM"): 4,
        ("lsun_bedroom", "DPM-Solver-2"): 4,
    }
    assert "UniPC" not in set(found["method"])


def test_the_repository_has_the_printed_numbers_but_for_unipc():
    plain = audit.cells().query("table in [2, 9, 10] and not amed and not afs")
    found = audit.against_repository(plain, audit.repository()).set_index("method")
    assert (found.loc["UniPC", "equal"] == 0).all()
    others = found.drop("UniPC")
    assert others["equal"].sum() == others["of"].sum() == 64


def test_repository_and_versions_agree():
    """UniPC and DDIM of the final version stand in both files."""
    there = audit.paper_versions()
    there = there[there["source"].str.contains("repository")]
    both = there.merge(audit.repository(), on=["dataset", "method", "nfe"])
    assert len(both) == 8 + 8 + 4 + 4  # UniPC on CIFAR-10, ImageNet and FFHQ, and DDIM there
    assert (both["final"] - both["value"]).abs().max() < 0.051


def test_versions_are_shown_side_by_side():
    table = audit.versions_table(audit.paper_versions())
    assert table.loc[("CIFAR-10, 32x32", "AMED-Solver"), "NFE 5"] == "17.94 →\N{NO-BREAK SPACE}7.59"
    assert table.loc[("FFHQ, 64x64", "DDIM"), "NFE 3"] == "new: 78.21"
    assert table.loc[("FFHQ, 64x64", "UniPC"), "NFE 4"] == "–"
    assert list(table.columns) == [f"NFE {n}" for n in range(3, 11)]


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [(110.0, 110.03, True), (129.8, 129.75, True), (110.0, 110.1, False), (7.0, 7.01, False)],
)
def test_agreement_to_the_printed_digits(a, b, same):
    assert audit.agree(a, b) == same


def test_a_table_of_the_page_names_and_formats():
    frame = pd.DataFrame({"dataset": ["ffhq"], "value": [126.4], "less": [7.1], "no": [1]})
    html = audit.shown(frame, {"dataset": "data", "value": "FID", "less": "other"}).to_html()
    for text in ("FFHQ, 64x64", "126.4", "7.10", ">data<", ">FID<"):
        assert text in html
    assert ">no<" not in html
