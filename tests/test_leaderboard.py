"""The leaderboard: like is compared with like, and what is said of it follows from the numbers."""

from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from amedlib.study import leaderboard, openings, standings
from amedlib.study.leaderboard import CHOICE, FACTORS, LEARNED, NEEDS, UNTRAINED
from amedlib.study.uncertainty import estimates, with_interval


def test_every_solver_is_untrained_on_every_schedule_with_afs_and_without():
    found = leaderboard.untrained(nfes=(4, 5))
    for name, row in UNTRAINED.items():
        rows = found[found["method"] == name]
        two = row.solver in ("heun", "dpm2")
        assert len(rows) == 3 * 2 * (1 if two else 2)
        assert not two or (rows["afs"] == (rows["nfe"] % 2 == 1)).all()
    for row in found.itertuples():
        run = row.run
        assert (run.schedule, run.afs, run.nfe) == (row.schedule, row.afs, row.nfe)
        assert run.predictor is None and run.samples == 5000 and run.first_seed == 0


@pytest.mark.parametrize("nfe", [3, 4, 5, 8])
def test_learned_samplers_have_the_evaluations_that_are_asked_for(nfe):
    found = leaderboard.learned(nfes=[nfe], seeds=[0])
    assert set(found["method"]) == set(LEARNED) and set(found["nfe"]) == {nfe}
    twice = found["run"].map(lambda run: run.num_steps - 1 == (nfe + run.afs) // 2)
    alone = found["run"].map(lambda run: run.num_steps - 1 == nfe + run.afs)
    assert (twice | alone).all()
    assert found["afs"][alone].all()  # a step more where the first costs nothing


def test_choice_and_show_share_no_latents():
    chosen = leaderboard.untrained(nfes=[5], **CHOICE)["run"][0]
    shown = leaderboard.untrained(nfes=[5])["run"][0]
    assert shown.first_seed + shown.samples <= chosen.first_seed


def test_needs_are_met_by_different_samplers_and_by_all_of_them():
    names = [name for names in NEEDS.values() for name in names]
    assert sorted(names) == sorted(LEARNED)


def result(value):
    return SimpleNamespace(value=value)


def test_effects_are_the_factors_by_which_a_distance_is_made():
    rows = []
    for nfe, *free in product((3, 5), *[(False, True)] * 3):
        value = 10.0 / nfe * 0.5 ** free[0] * 0.9 ** free[1]
        for noise in (0.99, 1 / 0.99):  # two trainings
            cell = dict(zip(FACTORS, free, strict=True))
            rows.append(cell | {"nfe": nfe, "result": result(value * noise)})
    found = standings.effects(pd.DataFrame(rows), FACTORS).set_index(["nfe", "factor"])
    for nfe in (3, 5):
        np.testing.assert_allclose(found["value"][nfe], [0.5, 0.9, 1.0], rtol=1e-9)
    assert (found["comparisons"] == 4).all() and np.allclose(found["high"], found["value"])


def test_words_name_what_helps_and_what_does_not():
    worth = pd.DataFrame(
        [["times", 5, 0.5, 0.4, 0.6, 4], ["afs", 5, 0.9, 0.7, 1.1, 4]],
        columns=["factor", "nfe", "value", "low", "high", "comparisons"],
    )
    said = standings.worth_in_words(worth)
    assert "**learned times** help most: they multiply FD by 0.50 (0.40 to 0.60)." in said
    assert said.endswith("No gain can be told for AFS.")


def test_rank_correlation_is_that_of_ranks():
    a = np.arange(20.0)
    value, (low, high) = standings.rank_correlation(a, np.exp(a))
    assert np.allclose([value, low, high], 1)
    value, (low, high) = standings.rank_correlation(a, np.random.default_rng(0).permutation(a))
    assert low < value < high and low < 0 < high


def test_the_best_is_chosen_where_it_is_not_shown(monkeypatch):
    """In the choice a is better, in the show b: a is shown, with the value of the show."""
    plan = leaderboard.untrained(nfes=[5])
    names = ["DDIM", "iPNDM"]
    plan = plan[plan["method"].isin(names) & plan["afs"] & plan["schedule"].eq("logsnr")]
    values = {(10_000, "euler"): 1.0, (10_000, "ipndm"): 2.0, (0, "euler"): 4.0, (0, "ipndm"): 3.0}

    def measure(planned):
        values_of = [values[run.first_seed, run.solver] for run in planned["run"]]
        return planned.assign(result=[result(value) for value in values_of])

    monkeypatch.setattr(standings, "measure", measure)
    choice = leaderboard.untrained(nfes=[5], **CHOICE)
    choice = choice[choice["method"].isin(names) & choice["afs"] & choice["schedule"].eq("logsnr")]
    found = standings.best(plan, choice)
    assert found["method"].tolist() == ["DDIM"] and found["result"][0].value == 4.0


def test_the_answer_says_what_the_numbers_say():
    rows = [
        (standings.BEST, 5, "iPNDM, logSNR, AFS", 2.5, 0.1),
        ("AMED-Solver", 5, "", 5.2, 0.3),
        ("AMED-Plugin", 5, "", 2.4, 0.2),
        ("all numbers", 5, "", 1.3, 0.1),
    ]
    found = pd.DataFrame(rows, columns=["method", "nfe", "who", "value", "half"])
    first, second = standings.answer(found, 5, 1.22)
    assert "the best untrained sampler is iPNDM, logSNR, AFS, with 2.5" in first
    assert "the best learned one *all numbers*, with 1.3" in first and "gives 1.22." in first
    assert "is ahead of AMED-Solver alone of the paper: AMED-Solver has 5.2" in second


def test_the_readme_states_the_best_of_the_leaderboard():
    """Untrained and learned, at five evaluations, from data/results."""
    metrics = ("fd",)
    board = standings.plans_of("digits", [5], (0, 1, 2), 5000, metrics)
    measured = standings.candidates(board, progress=False)
    found = estimates(measured, by=("need", "nfe", "who")).set_index("need")
    readme = " ".join((Path(__file__).parents[1] / "README.md").read_text().split())
    for need, words in (
        ("a minute of training", "times, times told to the network, coefficients"),
        ("no training", "iPNDM of order 3, uniform schedule"),
    ):
        row = found.loc[need]
        assert f"{words} | {with_interval(row['value'], row['half'])} |" in readme
    assert found["who"]["no training"] == "iPNDM-3, uniform"
    assert found["who"]["a minute of training"] == "all numbers"
    assert f"the best of {len(board.choice)} untrained samplers" in readme


def test_a_published_schedule_runs_at_its_own_times():
    found = leaderboard.published_schedule()
    theirs = found[found["schedule"].eq("GITS, published")]["run"].item()
    np.testing.assert_allclose(theirs.times(), leaderboard.GITS_CIFAR10[::-1], rtol=1e-12)
    assert len({run.key for run in found["run"]}) == len(found) == 7
    assert {run.nfe for run in found["run"]} == {6} and theirs.num_steps == 7


def test_the_best_schedule_of_amed_is_chosen_by_its_first_training_on_other_latents(monkeypatch):
    """AMED-Solver is best on logSNR in the choice; AMED-Plugin on its own schedule, so that it has
    no other row; the schedules of all others were not all run."""
    seen = []

    def kept(planned, metrics=("fd",), compute=False, **_):
        seen.append((planned, metrics))
        runs = planned["method"].isin(["AMED-Solver", "AMED-Plugin"])
        runs |= planned["schedule"].eq("polynomial")
        return planned[runs].reset_index(drop=True)

    def measure(planned):
        values = {"polynomial": 2.0, "logsnr": 1.0, "time_uniform": 3.0}
        own = planned["method"].eq("AMED-Plugin") & planned["schedule"].eq("polynomial")
        found = planned["schedule"].map(values).mask(own, 0.5)
        return planned.assign(result=[result(value) for value in found])

    monkeypatch.setattr(standings, "kept", kept)
    monkeypatch.setattr(standings, "measure", measure)
    shown, choice, untried = standings.best_schedules("digits", [5], (0, 1, 2), 5000, ("fd",))
    assert untried == ""
    assert shown["method"].tolist() == ["AMED-Solver, best schedule"] * 3
    assert {run.schedule for run in shown["run"]} == {"logsnr"}
    assert [run.predictor["seed"] for run in shown["run"]] == [0, 1, 2]
    assert choice["schedule"].tolist() == ["logsnr"] * 3  # as many trainings as are shown
    assert {run.first_seed for run in choice["run"]} == {CHOICE["first_seed"]}
    tried = seen[0][0]["run"]
    assert {run.predictor["seed"] for run in tried} == {0}
    assert {run.first_seed for run in tried} == {CHOICE["first_seed"]}


def test_more_trainings_are_made_where_three_do_not_do():
    found = leaderboard.more_trainings((5, 7), 2_000)
    cells = {(row.method, row.nfe) for row in found.itertuples()}
    assert cells == {("EPD, K = 3", 5), ("AMED-Solver, release", 7)}
    own = leaderboard.learned(nfes=(5, 7), n_samples=2_000)
    for cell, rows in found.groupby(["method", "nfe"]):
        assert [run.predictor["seed"] for run in rows["run"]] == [3, 4]
        same = own[(own["method"] == cell[0]) & (own["nfe"] == cell[1])]["run"]
        assert len({str(run.predictor | {"seed": 0}) for run in [*same, *rows["run"]]}) == 1
    assert leaderboard.more_trainings((4,)).empty


def test_optimisers_differ_in_nothing_else_and_make_equal_updates():
    found = leaderboard.optimisers(nfes=[5], seeds=[0])
    for name, rows in found.groupby("method"):
        trainings = rows.set_index("optimiser")["run"].map(lambda run: run.training)
        lbfgs = trainings.pop("L-BFGS")
        (known,) = leaderboard.learned(names=(name,), nfes=[5], seeds=[0])["run"]
        assert known.training == lbfgs
        for training in trainings:
            how = {f: getattr(lbfgs, f) for f in ("optimizer", "learning_rate", "batch", "passes")}
            assert replace(training, **how) == lbfgs
            # Ten iterations of L-BFGS in every pass, one update of Adam for every batch.
            assert training.passes * training.images // training.batch == 10 * lbfgs.passes


def test_what_optimisers_reach_is_told_best_first():
    rows = [("S4S", "slow", 5, 3.0, 0.5), ("S4S", "fast", 5, 2.0, 0.5), ("S4S", "fast", 3, 9, 1)]
    found = pd.DataFrame(rows, columns=["method", "optimiser", "nfe", "value", "half"])
    assert openings.of_optimisers(found, 5) == [
        "*S4S* at 5 evaluations reaches 2.00 ± 0.50 by fast and 3.00 ± 0.50 by slow."
    ]


def test_needs_are_told_by_the_table():
    """A table of K = 2 with AFS makes 3 steps at 5 evaluations: 9 evaluations, one of them free."""
    needs = ["no training", "a minute of training", "a network on the bottleneck"]
    rows = [(3, needs[0], 2.0), (3, needs[1], 1.0), (3, needs[2], 1.5)]
    rows += [(5, needs[0], 1.0), (5, needs[1], 1.2), (5, needs[2], 1.1)]
    found = pd.DataFrame(rows, columns=["nfe", "need", "value"])
    runs = leaderboard.learned(names=("EPD, K = 2",), nfes=[5], seeds=[0])
    joint = found.assign(value=[1.0, 2.0, 3.0, 2.0, 1.0, 3.0])
    said = standings.needs_in_words(found, joint, runs.assign(need="evaluations side by side"))
    assert said == {
        "which_network": "In its mean the third column is ahead of “no training” at 1 of 2 numbers "
        "of evaluations and of “a minute of training” at 1 of 2 numbers of evaluations.",
        "which_first": "In the mean the first of all columns by FD is “a minute of training” at 3; "
        "“no training” at 5 evaluations; by joint FD “a minute of training” at 5; “no training” at "
        "3.",
        "which_parallel": "8 for 5",
    }


def test_choosing_by_the_error_at_the_end(monkeypatch):
    """FD prefers the second sampler, the error at the end the first."""
    planned = leaderboard.untrained(nfes=[5])
    planned = planned[planned["method"].isin(["DDIM", "iPNDM"]) & planned["afs"]]
    planned = planned[planned["schedule"] == "polynomial"].reset_index(drop=True)

    def measured(rows, **_):
        found = []
        for run, name in zip(rows["run"], rows["method"], strict=True):
            value = 1.0 + ((run.metric == "endpoint_error") != (name == "DDIM"))
            found.append(SimpleNamespace(run=run, value=value, replicates=[value] * 10))
        return rows.assign(result=found)

    monkeypatch.setattr(standings, "measure", measured)
    plans = standings.Plans(planned, planned[:0], planned, planned[:0], "")
    found = standings.by_endpoint_error(plans)
    assert dict(zip(found["chosen"], found["who"], strict=True)) == {
        "by endpoint error": "DDIM, polynomial, AFS",
        "by FD": "iPNDM, polynomial, AFS",
    }
    said = standings.endpoint_error_in_words(found)
    assert "FD is 2.00 in place of 1.00 at 5 evaluations" in said
    same = found.assign(who="one", value=1.0)
    assert "at 5 it is the same sampler" in standings.endpoint_error_in_words(same)


def test_how_each_row_was_trained_is_told():
    table = standings.how_trained(leaderboard.learned(nfes=[5], seeds=[0]))
    assert list(table.index) == list(LEARNED)
    assert table.loc["AMED-Plugin"].tolist() == [
        "the next step",
        "iPNDM, 3 steps for one",
        "10,000",
        "Adam, 1 pass",
    ]
    assert table.loc["GITS", "by"] == "–"


def test_firsts_are_named_by_measure_and_what_is_below_the_limit():
    rows = [("a", 5, 1.0, 0.3), ("b", 5, 2.0, 0.1)]
    found = pd.DataFrame(rows, columns=["method", "nfe", "value", "half"])
    frames = {"FD": found, "joint FD": found.assign(value=[3.0, 2.0]), "error": found}
    assert standings.firsts_in_words(frames) == [
        "At 5 evaluations the first is “a” by FD and error; “b” by joint FD."
    ]
    assert standings.below_limit(found, 0.9) == ""
    said = "Below the limit of {}: a at 5; {} of them by more than their interval. "
    assert standings.below_limit(found, 1.2) == said.format("1.20", 0)
    assert standings.below_limit(found, 1.5) == said.format("1.50", 1)


def test_what_was_not_run_is_said_once_for_all_samplers_that_lack_it():
    def plan(*cells):
        rows = [(name, "polynomial", True, nfe) for name, nfe in cells]
        return pd.DataFrame(rows, columns=standings.CELL)

    whole = plan(("a", 3), ("b", 3), ("a", 5), ("b", 5), ("a", 7), ("b", 7))
    assert standings.not_run(whole, whole) == ""
    said = "Not run: at {}. `-p compute True` runs it."
    left = plan(("a", 3), ("b", 3), ("a", 5), ("b", 5))
    assert standings.not_run(whole, left) == said.format("7 evaluations all 2")
    left = plan(("a", 3), ("b", 3), ("b", 5), ("a", 7), ("b", 7))
    assert standings.not_run(whole, left) == said.format("5 evaluations a")


def test_a_need_has_no_best_where_some_of_its_samplers_were_not_run(monkeypatch):
    monkeypatch.setattr(
        standings,
        "measure",
        lambda planned: planned.assign(result=[result(1.0 + i) for i in range(len(planned))]),
    )
    names = NEEDS["evaluations side by side"]
    learned = leaderboard.learned(names=names, nfes=[5, 7], seeds=[0])
    some = learned[~((learned["nfe"] == 7) & (learned["method"] == names[0]))]
    untrained = leaderboard.untrained(nfes=[5, 7])
    plans = standings.Plans(untrained, some, untrained, learned, "")
    found = standings.candidates(plans)
    assert found.loc[found["need"] == "evaluations side by side", "nfe"].tolist() == [5]
    assert found.loc[found["need"] == "no training", "nfe"].tolist() == [5, 7]
