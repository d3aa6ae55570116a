"""The paper's numbers, the plans of its tables, verdicts, and the check of shipped results."""

import json
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest

from amedlib.datasets.entries import describe
from amedlib.study import (
    claims,
    execute,
    openings,
    page,
    plans,
    published,
    reproduce,
    store,
    tables,
    uncertainty,
    verdicts,
)
from amedlib.study.run import BLOCKS, Result, Run
from amedlib.study.store import save_result


def result(what, value, replicates=None):
    replicates = [value] * BLOCKS if replicates is None else list(replicates)
    return Result(what, value, replicates, {}, what.nfe, 1.0, "cpu", {}, "", "")


def test_table2_is_complete():
    frame = published.published("table2")
    counts = frame.groupby("dataset").size()
    assert dict(counts) == {"cifar10": 32, "imagenet64": 32, "ffhq": 24, "lsun_bedroom": 24}
    assert not frame.duplicated(["dataset", "method", "nfe"]).any()
    # Three cells that the text quotes as differences (Sec. 4.2): 6.45, 5.24 and 4.63.
    at_five = frame[frame["nfe"] == 5].set_index(["dataset", "method"])["value"]
    for dataset, gain in (("cifar10", 6.45), ("imagenet64", 5.24), ("ffhq", 4.63)):
        found = at_five[dataset, "iPNDM"] - at_five[dataset, "AMED-Plugin (iPNDM)"]
        assert found == pytest.approx(gain, abs=1e-9)


def test_every_row_of_ours_has_the_papers_numbers():
    values = published.paper_values("table2", "cifar10")
    assert set(values["method"]) == set(plans.METHODS)
    assert len(values) == 4 * len(plans.METHODS)


def test_plans_ask_for_the_papers_settings():
    planned = plans.table2("digits")
    assert len(planned) == 4 * (6 + 2 * 3) + 2 + 2 * 2  # AMED-Solver at 5, AMED-Plugin at 5 and 7
    assert len(plans.table2("digits", seeds=[0, 1])) == 4 * (6 + 2 * 2)
    for row in planned.itertuples():
        method = plans.METHODS[row.method]
        assert row.run.nfe == row.nfe
        assert row.run.schedule == method.schedule
        assert (row.run.predictor is not None) == method.learned
    schedules = planned.groupby("method")["schedule"].unique()
    assert list(schedules["UniPC"]) == list(schedules["DPM-Solver++(3M)"]) == ["logsnr"]
    assert list(schedules["iPNDM"]) == ["polynomial"]


@pytest.mark.parametrize("dataset", ["digits", "cifar10", "cifar10_small"])
def test_the_whole_study_has_no_run_twice(dataset):
    runs = plans.whole_study(dataset)
    assert len({what.key for what in runs}) == len(runs)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"schedule": "linear"}, "schedule must be one of"),
        ({"nfes": []}, "nfes must be a list of different entries, at least one"),
        ({"nfes": [5, 5]}, "nfes must be a list of different entries"),
        ({"nfes": 5}, "nfes must be a list of different entries"),
        ({"nfes": "5"}, "nfes must be a list of different entries"),
        ({"nfes": ["5"]}, "nfe must be a whole number from 1 to 1,000; '5' was given"),
        ({"nfes": [5.5]}, "nfe must be a whole number"),
        ({"seeds": [0, 0, 0]}, r"seeds must be a list of different entries.*\[0, 0, 0\] was given"),
        ({"seeds": []}, "seeds must be a list of different entries"),
        ({"seeds": 0}, "seeds must be a list of different entries"),
        ({"names": ["DDIM", "DDIM"]}, "names must be a list of different entries"),
        ({"dataset": "imagenet256", "nfes": [5]}, "nfe must be one that this .* without AFS"),
        ({"names": ["Euler"]}, "method must be one of"),
        ({"n_samples": -1}, "samples must be a whole number"),
        ({"dataset": "cats"}, "dataset must be one of"),
    ],
)
def test_bad_plans_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        plans.table2(**({"dataset": "digits"} | arguments))


@pytest.mark.parametrize("twice", [{"seeds": [0, 0]}, {"nfes": [5, 5]}])
@pytest.mark.parametrize(
    "plan",
    [
        *(partial(plans.table, number) for number in (3, 4, 5, 6, 7, 8, 9)),
        partial(plans.beyond, "objective"),
        plans.figure7,
        plans.figure8,
        plans.recipes,
    ],
)
def test_every_plan_refuses_what_is_listed_twice(plan, twice):
    (name,) = twice
    with pytest.raises(ValueError, match=f"{name} must be a list of different entries"):
        plan(**twice)


@pytest.mark.parametrize(
    "plan", [plans.table1, plans.plugin, plans.headline, partial(plans.figure8, nfes=[3])]
)
def test_plans_without_a_list_of_nfe_refuse_seeds_twice(plan):
    with pytest.raises(ValueError, match="seeds must be a list of different entries"):
        plan(seeds=[1, 0, 1])
    with pytest.raises(ValueError, match="nfes must be a list of different entries"):
        plans.centring(nfes=[3, 3])


def test_lists_may_be_arrays():
    as_arrays = plans.table2(nfes=np.array([3, 5]), seeds=np.arange(2))
    assert as_arrays.equals(plans.table2(nfes=[3, 5], seeds=range(2)))


def test_at_even_nfe_table_2_runs_without_afs():
    with_afs = {"DPM-Solver-2", "EDM", "AMED-Solver", "AMED-Plugin"}
    planned = plans.table2(nfes=[4, 5], seeds=[0])
    assert set(planned[planned["afs"]]["method"]) == with_afs
    for row in planned.itertuples():
        assert row.afs == row.run.afs == (row.nfe == 5 and row.method in with_afs)
        assert row.run.nfe == row.nfe
    # They are the paper's rows without AFS, as Table 9 has them at even NFE.
    printed = plans.table(9, nfes=[4], seeds=[0]).query("not afs")
    for method, amed in (("DPM-Solver-2", False), ("iPNDM", True)):
        (theirs,) = printed.query("method == @method and amed == @amed")["run"]
        ours = planned[planned["method"] == ("AMED-Plugin" if amed else method)]
        assert theirs in ours[ours["nfe"] == 4]["run"].tolist()
    text = page.without_afs(planned)
    assert text == (
        " At NFE 4 without AFS, with which their NFE is odd: DPM-Solver-2, EDM, AMED-Solver, "
        "AMED-Plugin."
    )
    assert page.without_afs(planned.query("nfe == 5")) == ""
    assert page.without_afs(plans.table2("imagenet256", seeds=[0])) == ""  # none has it there


def made_up_table(ours, theirs, noise):
    """Results of AMED-Plugin (three seeds) and iPNDM at 5 NFE, with common sampling noise."""
    wobble = noise * np.random.default_rng(0).normal(size=BLOCKS)
    planned = plans.table2("digits", ["iPNDM", "AMED-Plugin"], nfes=[5])
    rows = []
    for i, row in enumerate(planned.itertuples()):
        value = theirs if row.method == "iPNDM" else ours + 0.01 * i
        rows.append(result(row.run, value, value + wobble))
    return planned.assign(result=rows)


@pytest.mark.parametrize(
    "ours, theirs, expected",
    [(5.0, 7.0, "holds"), (7.0, 5.0, "does not hold"), (5.0, 5.02, "undecided")],
)
def test_verdicts(ours, theirs, expected):
    judged = claims.judge("table2", made_up_table(ours, theirs, noise=0.5))
    row = judged[(judged["better"] == "AMED-Plugin") & (judged["worse"] == "iPNDM")].iloc[0]
    assert row["verdict"] == expected
    assert row["difference"] == pytest.approx(ours - theirs, abs=0.05)
    assert row["low"] < row["difference"] < row["high"]


def test_one_training_seed_decides_nothing(tmp_path):
    """Unless the store knows how much other trainings differ."""
    measured = made_up_table(1.0, 9.0, noise=0.1)
    one = measured[
        [r.run.predictor is None or r.run.predictor["seed"] == 0 for r in measured.result]
    ]
    assert set(claims.judge("table2", one, tmp_path)["verdict"]) == {"undecided"}


def test_interval_formatting():
    assert uncertainty.with_interval(12.345, 1.234) == "12.3 ± 1.2"
    assert uncertainty.with_interval(0.01234, 0.00056) == "0.01234 ± 0.00056"
    assert uncertainty.with_interval(1234.5, 99.0) == "1234 ± 99"
    assert uncertainty.with_interval(4.7961, 0.0) == "4.796"


def test_tables_show_both_sides_and_the_best_in_bold():
    measured = made_up_table(5.0, 7.0, noise=0.1)
    table = tables.comparison_table(
        uncertainty.estimates(measured), published.paper_values("table2", "cifar10")
    )
    html = table.to_html()
    assert "7.14" in html and "13.59" in html  # the paper's numbers
    assert "±" in html
    assert html.count("font-weight: bold") == 1


@pytest.fixture(autouse=True)
def coarse_solution(monkeypatch):
    """The ODE's solution in 8 steps: what it is does not matter here."""
    monkeypatch.setattr(store, "SOLUTION", store.SOLUTION | {"num_steps": 9})


@pytest.fixture
def stored(tmp_path):
    """A store with real results of three samplers of the digits, by every metric."""
    what = Run(solver="euler", nfe=2, samples=40, options={})
    runs = [what, replace(what, nfe=3), replace(what, solver="ipndm")]
    metrics = describe("digits").metrics
    runs = [each.with_metric(metric) for each in runs for metric in metrics]
    execute.run_all(runs, tmp_path, progress=False)
    return tmp_path, runs


def test_a_spot_check_finds_what_has_moved(stored):
    folder, runs = stored
    seed, frame = reproduce.spot_check(
        "digits", len(runs), seed=7, results_dir=folder, seconds=99.0
    )
    assert seed == 7
    assert frame["agrees"].all() and len(frame) == len(runs)
    path = store.result_path(runs[4], folder)
    content = json.loads(path.read_text())
    content["value"] *= 1.2
    path.write_text(json.dumps(content))
    _, frame = reproduce.spot_check("digits", len(runs), seed=7, results_dir=folder, seconds=99.0)
    assert list(frame["agrees"]).count(False) == 1
    assert not frame.loc[frame["NFE"] == 3, "agrees"].all()


def test_a_study_takes_the_results_of_its_own_data_sets_alone(stored):
    folder, runs = stored
    names = ("digits", "digits_uncentred", "cifar10", "cifar10_small")
    (own, variant, other, small) = (folder / name for name in names)
    name = next(own.glob("fd-*.json")).name
    for place in (variant, other, small):
        place.mkdir()
        (place / name).write_bytes((own / name).read_bytes())
    assert small / name not in reproduce.files_of_study("cifar10", folder)
    assert other / name in reproduce.files_of_study("cifar10", folder)
    found = reproduce.files_of_study("digits", folder)
    assert len(found) == len(runs) + 1 and variant / name in found


def test_a_spot_check_needs_enough_results(stored):
    folder, runs = stored
    with pytest.raises(ValueError, match="at most the number of shipped results, 12; 13 was given"):
        reproduce.spot_check("digits", 13, results_dir=folder, seconds=99.0)


def test_retrained_predictors_may_move_further(tmp_path):
    learned = Run(solver="amed", nfe=3, afs=True, predictor={}, samples=40)
    old, new = result(learned, 10.0), result(learned, 10.5)
    assert reproduce.compare([(old, new)], retrained=True)["agrees"].all()
    assert not reproduce.compare([(old, new)], retrained=False)["agrees"].any()
    plain = Run(nfe=3, samples=40)
    pair = result(plain, 10.0), result(plain, 10.5)
    assert not reproduce.compare([pair], retrained=True)["agrees"].any()


def test_reproduction_fails_when_a_number_moves(tmp_path, monkeypatch, capsys):
    what = Run(solver="euler", nfe=2, samples=40)
    monkeypatch.setattr(plans, "whole_study", lambda dataset: [what])
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "shipped")
    monkeypatch.setattr(reproduce, "AGAIN", tmp_path / "again")
    assert reproduce.main(["digits", "--fill", "--workers", "1"]) == 0
    assert reproduce.main(["digits", "--workers", "1"]) == 0
    shipped = store.load_result(what, tmp_path / "shipped")
    save_result(replace(shipped, value=shipped.value + 1), tmp_path / "shipped")
    assert reproduce.main(["digits", "--workers", "1"]) == 1
    assert "1 beyond their tolerance" in capsys.readouterr().out


def test_a_reproduction_without_shipped_results_is_refused_at_once(tmp_path, monkeypatch, capsys):
    """It computed for hours, to compare with nothing and agree."""
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "none")
    monkeypatch.setattr(reproduce, "run_all", lambda *_, **__: pytest.fail("work was started"))
    with pytest.raises(SystemExit) as ended:
        reproduce.main(["digits", "--workers", "1"])
    assert ended.value.code == 2
    assert "none has no results of digits to compare with; --fill" in capsys.readouterr().err


def test_a_table_is_shown_with_its_caption_and_its_figure(tmp_path, monkeypatch):
    given = 6, "digits", [10, 4], [0], 40
    planned = plans.table(*given)
    for i, row in enumerate(planned.itertuples()):
        save_result(result(row.run, 99.0 - i), tmp_path)
    shown = []
    monkeypatch.setattr(page, "display", shown.append)
    how = {"results_dir": tmp_path, "progress": False}
    monkeypatch.setattr(openings, "display", shown.append)
    measured, judged = page.open_table(*given, **how)
    assert [each.value for each in measured["result"]] == [99.0 - i for i in range(len(planned))]
    (found,) = shown
    assert (
        found.data.startswith("**The rows differ most at 10 evaluations")
        and "Of the paper's claims" in found.data
    )
    shown.clear()
    page.show_cells(6, "digits", measured, figure=True)
    figure, table, words = shown

    unit = describe("digits").feature_distance_name
    columns = [(nfe, whose) for nfe in ("NFE 4", "NFE 10") for whose in (unit, "paper")]
    assert list(table.data.columns) == columns
    ours = table.data.xs(unit, axis=1, level=1).map(lambda text: float(text.split()[0]))
    best = {(int(ours.iloc[:, i].argmin()), 2 * i) for i in range(2)}
    style, _ = table.set_uuid("x").to_html().split("</style>")
    bold = re.findall(r"#T_x_row(\d+)_col(\d+)", style)
    assert {(int(row), int(column)) for row, column in bold} == best
    assert style.count("{") == style.count("font-weight: bold") == 1
    assert words.data.startswith("*Table 6 on ")
    assert [ax.get_title() for ax in figure.axes] == ["ours", "the paper"]

    page.show_cells(6, "digits", measured, fold=True)
    assert len(shown) == 5 and shown[3].data.startswith("<details>")  # no figure
    page.show_claims(judged)
    assert "**" in shown[5].data and "verdicts" in shown[6].data


def test_estimates_keep_the_order_of_the_plan():
    frame = uncertainty.estimates(made_up_table(5.0, 7.0, noise=0.1))
    assert list(frame["method"]) == ["iPNDM", "AMED-Plugin"]
    assert isinstance(frame, pd.DataFrame)


def test_the_readme_states_the_shipped_results():
    """Every number of its headline, computed again from data/results."""
    measured = execute.measure(plans.table2("digits"), progress=False)
    numbers = page.headline_numbers(
        uncertainty.estimates(measured), claims.judge("table2", measured)
    )
    readme = (store.RESULTS.parent.parent / "README.md").read_text()
    for method in ("AMED-Plugin", "iPNDM", "AMED-Solver", "DPM-Solver-2", "DPM-Solver++(3M)"):
        assert f"| {numbers[f'table2_{method}']} |" in readme
    variants = execute.measure(plans.plugin("digits"), progress=False)
    afs = page.plugin_numbers(variants, variants)["plugin_fd_iPNDM-AFS"]
    assert f"| {afs} |" in readme
    for name in ("table2", "table9"):
        planned = claims.stored(claims._planned(name, "digits", "fd"))
        judged = claims.judge(name, planned)
        for sentence in verdicts.of_a_page(judged[judged["id"].isin(verdicts.FRONT)]):
            assert f"- {sentence}\n" in readme
