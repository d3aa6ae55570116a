"""Sentences that pages compute say what the numbers say."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd

from amedlib.study import claims, figures, openings, page, plans, tables
from amedlib.study.published import row_names
from amedlib.study.run import BLOCKS, Result, Run
from amedlib.study.store import save_result
from amedlib.study.uncertainty import Estimate, against_baseline


def test_differences_are_corrected_for_their_number():
    clear, close = Estimate(-2.0, 0.1, None, 1, 100), Estimate(0.25, 0.1, None, 1, 100)
    (alone,) = page.differences_in_words({"b": close}, "FD")
    assert alone == "b: **worse** (difference of FD 0.25 ± 0.23)."
    both = page.differences_in_words({"a": clear, "b": close, "c": close, "d": close}, "FD")
    assert both[0] == "a: **better** (difference of FD −2.00 ± 0.23)."
    assert both[1].startswith("b: **undecided**")


def test_components_are_told_one_by_one():
    curves = {"cumulative_variance": [0.99995, 0.999999, 1.0, 1.0]}
    first, second = page.components_in_words(SimpleNamespace(curves=curves, value=0.0712))
    assert "Two directions explain 99.9999 %" in first and "one alone explains 99.9950 %" in first
    assert "at most 7.1 % of its norm" in second


def test_a_search_that_harms_the_end_is_called_greedy():
    curves = {
        "iPNDM": {"baseline": [0.1, 0.4], "searched": [0.0, 0.9]},
        "DDIM": {"baseline": [0.1, 0.4], "searched": [0.0, 0.3]},
    }
    said = page.search_in_words(curves)
    assert said.endswith(
        "nearer to the solution for DDIM, and takes it farther away for iPNDM (0.400 to 0.900)."
    )
    assert page.search_in_words({"DDIM": curves["DDIM"]}).endswith(
        "nearer to the solution for DDIM."
    )


def made_up(metric: str) -> pd.DataFrame:
    planned = plans.table(6, nfes=[4], seeds=[0], metric=metric)
    results = [
        SimpleNamespace(run=run, value=2.0 + i, replicates=[2.0 + i] * 10)
        for i, run in enumerate(planned["run"])
    ]
    return planned.assign(result=results)


def test_an_endpoint_error_stands_without_an_fid():
    with_fid = tables.cells_table(6, made_up("fd"), "FD").to_html()
    without = tables.cells_table(6, made_up("endpoint_error"), "endpoint error").to_html()
    assert "paper" in with_fid and "paper" not in without


def test_trainings_are_counted_and_exceptions_named():
    planned = plans.table2(names=["AMED-Solver", "iPNDM"], nfes=[3, 5], seeds=[0, 1])
    results = [SimpleNamespace(run=run) for run in planned["run"]]
    assert page.trainings_in_words(page.times_trained(planned.assign(result=results))) == "2"
    both = plans.table(9, nfes=[5], seeds=[0])  # several plugins at one NFE, one trained twice
    both = both[both["amed"]]
    again = both.iloc[:1].copy()
    run = again["run"].iloc[0]
    again["run"] = [replace(run, predictor=run.predictor | {"seed": 1})]
    measured = pd.concat([both, again])
    measured = measured.assign(result=[SimpleNamespace(run=run) for run in measured["run"]])
    name = openings.row_in_words(9, row_names(both, 9).iloc[0])
    assert page.trainings_in_words(page.times_trained(measured, 9)) == f"1, but 2 of “{name}” at 5"
    assert page.trainings_in_words(page.times_trained(measured[:0], 9)) == ""


def test_marks_are_corrected_for_the_number_of_differences():
    clear, close = Estimate(-2.0, 0.1, None, 1, 100), Estimate(0.25, 0.1, None, 1, 100)
    assert tables.marked([close]) == ["✗ 0.25 ± 0.23"]
    assert [text[0] for text in tables.marked([clear, close, close, close])] == list("✓???")


def test_differences_of_all_headings_are_corrected_together():
    runs = [Run(solver="euler", samples=100), Run(solver="ipndm", samples=100)]
    noise = 0.03 * np.random.default_rng(0).normal(size=(2, BLOCKS))

    def frame(gain):
        values = (1.0 + noise[0], 1.0 + gain + noise[1])
        each = [
            SimpleNamespace(run=run, value=v.mean(), replicates=list(v))
            for run, v in zip(runs, values, strict=True)
        ]
        return pd.DataFrame({"variant": ["a", "b"], "result": each})

    found = against_baseline(frame(0.0), "a")["b"]
    gain = 1.02 * (found.interval[1] - found.value) - found.value  # decided, if it is alone
    alone = tables.variants_table({"x": frame(gain)}, ["a"]).to_html()
    three = tables.variants_table({n: frame(gain) for n in "xyz"}, ["a"]).to_html()
    assert alone.count("✗") == 1 and three.count("✗") == 0 and three.count("? ") == 3
    (one,) = tables.variants_in_words({"x": frame(gain)}, ["a"])
    assert re.fullmatch(r"x, against “a”: \*\*worse\*\*: “b” \(0\.\d+ ± 0\.\d+\)\.", one)
    several = tables.variants_in_words({n: frame(gain) for n in "xyz"}, ["a"])
    assert several[1].startswith("y, against “a”: **cannot be told apart**: “b” (")


def test_a_table_shows_every_stored_training_of_a_cell(tmp_path):
    planned = plans.table(6, nfes=[4], seeds=[0], n_samples=40)
    learned = planned[planned["amed"]].iloc[0]["run"]
    for seed, value in ((0, 4.0), (2, 8.0)):
        what = replace(learned, predictor=learned.predictor | {"seed": seed})
        save_result(Result(what, value, [value] * 10, {}, 4, 1.0, "cpu", {}, "", ""), tmp_path)
    measured = claims.stored(planned[planned["amed"]], tmp_path)
    cells = tables.cells_table(6, claims.every_training(measured, tmp_path), "FD")
    assert cells.data["NFE 4", "FD"].item().startswith("6 ")


def test_an_interval_that_reaches_zero_shows_its_trainings():
    rows = pd.DataFrame(
        [("AMED-Plugin", 5, 4.0, 0.8, [4.2, 3.8]), ("AMED-Plugin", 7, 5.5, 7.2, [7.6, 2.0, 6.9])],
        columns=["method", "nfe", "value", "half", "trainings"],
    )
    (ax,) = figures.against_nfe({"ours": rows}, ["FD"]).axes
    rings = [line for line in ax.lines if line.get_markerfacecolor() == "none"]
    assert [list(line.get_ydata()) for line in rings] == [[7.6, 2.0, 6.9]]
    bars = [path.vertices for each in ax.collections for path in each.get_paths()]
    assert np.nanmin([b[:, 1].min() for b in bars]) == 4.0 - 0.8
    assert page.trainings_drawn(rows).endswith("rings show the trainings: AMED-Plugin at NFE 7.")
    assert page.trainings_drawn(rows[:1]) == ""


def test_the_best_single_step_solver_is_told_per_schedule():
    values = {"AMED-Solver": 3.0, "DPM-Solver-2": 2.0, "DDIM": 9.0, "EDM": 8.0, "iPNDM": 1.0}
    planned = plans.on_schedule("logsnr")
    planned = planned[planned["method"].isin(list(values)) & planned["nfe"].eq(5)]
    results = [
        SimpleNamespace(run=row.run, value=values[row.method], replicates=[1.0] * 10)
        for row in planned.itertuples()
    ]
    (said,) = page.single_steps_in_words({"logsnr": planned.assign(result=results)})
    assert said == "Best of the single-step solvers on the logSNR schedule: DPM-Solver-2 at NFE 5."


def test_what_a_picture_of_the_plane_hides_is_said():
    columns = ["error", "along the plane", "across it"]
    errors = pd.DataFrame([[0.7, 0.2, 0.6], [0.5, 0.3, 0.4]], ["A", "B"], columns)
    first, second = page.parts_in_words(errors)
    assert first == "B ends the step nearest to the solution, 0.500 from it."
    assert second.startswith("In the plane A is nearer (0.200 against 0.300), but across the plane")
    assert second.endswith("it is farther off (0.600 against 0.400).")
    assert "picture" not in page.parts_in_words(errors[1:])[1]


def test_an_ablation_tells_its_widest_spread():
    planned = plans.table(6, nfes=[4, 6], seeds=[0])
    results = [
        SimpleNamespace(run=row.run, value=value, replicates=[value] * 10)
        for row in planned.itertuples()
        for value in [64.0 if row.amed and row.nfe == 4 else 8.0 if row.r == 0.1 else 16.0]
    ]
    assert openings.of_ablation(6, planned.assign(result=results), "FD") == (
        "The rows differ most at 4 evaluations: DPM-Solver-2, r = 0.1 has the lowest FD in the "
        "mean, 8, and AMED-Plugin (DPM-Solver-2) the highest, 64."
    )


def test_a_need_that_nothing_was_run_for_says_so():
    rows = [("no training", 3, "a", 2.0, 0.1), ("no training", 5, "b", 1.0, 0.1)]
    rows.append(("training", 3, "c", 1.5, 0.1))
    found = pd.DataFrame(rows, columns=["need", "nfe", "who", "value", "half"])
    html = tables.recommended_table(found, found.assign(value=9.0)).to_html()
    assert html.count("not run") == 1 and "nan" not in html
    assert "c<br>1.50 ± 0.10<br><small>joint 9.00</small>" in html
