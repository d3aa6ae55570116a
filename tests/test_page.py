"""Sentences that pages compute say what the numbers say."""

from types import SimpleNamespace

import pandas as pd

from amedlib.study import page, plans, tables
from amedlib.study.uncertainty import Estimate


def test_differences_are_corrected_for_their_number():
    clear, close = Estimate(-2.0, 0.1, None, 1, 100), Estimate(0.25, 0.1, None, 1, 100)
    (alone,) = page.differences_in_words({"b": close})
    assert alone == "b: **worse** (0.25 ± 0.23)."
    both = page.differences_in_words({"a": clear, "b": close, "c": close, "d": close})
    assert both[0] == "a: **better** (−2.00 ± 0.23)."
    assert both[1].startswith("b: **not to be told apart**")


def test_components_are_told_one_by_one():
    curves = {"cumulative_variance": [0.99995, 0.999999, 1.0, 1.0]}
    said = page.components_in_words(SimpleNamespace(curves=curves))
    assert "One component explains 99.9950 %" in said and "two 99.9999 %" in said


def test_a_search_that_harms_the_end_is_called_greedy():
    curves = {
        "iPNDM": {"baseline": [0.1, 0.4], "searched": [0.0, 0.9]},
        "DDIM": {"baseline": [0.1, 0.4], "searched": [0.0, 0.3]},
    }
    said = page.search_in_words(curves)
    assert said.endswith("**farther away** for iPNDM (0.400 to 0.900): the search is greedy.")
    assert page.search_in_words({"DDIM": curves["DDIM"]}).endswith("nearer for DDIM.")


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


def test_trainings_are_counted_by_nfe():
    planned = plans.table2(names=["AMED-Solver", "iPNDM"], nfes=[3, 5], seeds=[0, 1])
    results = [SimpleNamespace(run=run) for run in planned["run"]]
    assert page.trainings_in_words(planned.assign(result=results)) == "2 at NFE 3, 2 at NFE 5"
