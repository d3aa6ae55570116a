"""The ledger: its file, the statistics of its verdicts, and that it computes no result."""

import itertools
import json
import re
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from amedlib.datasets.entries import describe
from amedlib.datasets.files import DATA
from amedlib.study import (
    claims,
    execute,
    facts,
    noise,
    plans,
    procedures,
    published,
    sentences,
    store,
    tables,
    verdicts,
)
from amedlib.study.run import BLOCKS, Result, Run
from amedlib.study.store import save_result
from amedlib.study.uncertainty import Estimate, difference

CLAIMS = claims.claims().to_dict("records")
# Pages whose results test claims.
PAGES = {f"table{n}" for n in range(1, 14)} | {f"figure{n}" for n in range(2, 11)}
PAGES |= {"theory", "audit", "benchmarks", "centring"}
# In how many comparisons the paper's own tables agree; counted by hand.
IN_PRINT = {
    "single-step": "32 of 32",
    "single-step-cat": "4 of 4",
    "multi-step": "24 of 36",
    "multi-step-large": "22 of 24",
    "plugin": "11 of 12",
    "plugin-dpm2": "4 of 4",
    "plugin-beyond-afs": "7 of 8, 1 as good",
    "plugin-any": "57 of 80, 2 as good",
    "plugin-schedules": "12 of 12",
    "plugin-schedules-afs": "1 of 4",
    "plugin-latent": "4 of 4",
    "plugin-guided": "8 of 12",
    "plugin-r-search": "4 of 4",
    "r-sensitivity": "4 of 4",
    "default-r-not-best": "4 of 4",
    "sample-wise": "3 of 4, 1 as good",
    "grid-search-worse": "8 of 8",
    "teacher-similar": "12 of 12",
    "m-two": "12 of 12",
    "schedule-logsnr": "6 of 8",
    "afs-small": "64 of 64",
    "afs-large": "11 of 16",
    "afs-amed-together": "62 of 72, 1 as good",
    "headline-cifar": "7.14",
    "headline-imagenet": "13.75",
    "headline-bedroom": "12.79",
    "plugin-gain": "6.45, 5.24, 4.63",
}


def result(what, value, replicates=None, curves=None):
    replicates = [value] * BLOCKS if replicates is None else list(replicates)
    return Result(what, float(value), replicates, curves or {}, what.nfe, 1.0, "cpu", {}, "", "")


def sampled(what, blocks):
    """A result that is the mean of what its blocks of samples say."""
    blocks = np.asarray(blocks)
    return result(what, blocks.mean(), (blocks.sum() - blocks) / (len(blocks) - 1))


PLAIN = Run(solver="ipndm", samples=100)
OTHER = Run(solver="euler", samples=100)
LEARNED = Run(solver="amed", samples=100, nfe=5, afs=True, predictor={"recipe": "paper"})


def seeded(what, seed):
    return replace(what, predictor=what.predictor | {"seed": seed})


# --- the file -------------------------------------------------------------------------------------


def test_claims_are_whole():
    frame = claims.claims()
    assert frame["id"].is_unique and len(frame) >= 56
    assert {"single-step", "plugin", "multi-step", "state-of-the-art"} <= set(frame["id"])
    assert (frame[["id", "kind", "source", "place", "sentence"]] != "").all().all()
    kinds = {"quality", "value", "cost", "geometry", "theory", "setting"}
    assert set(frame["kind"]) == kinds
    assert set(frame["better_pick"]) | set(frame["worse_pick"]) <= {"", "best", "worst"}
    # A comparison or a function, never both; and every function has its claim.
    assert not ((frame["test"] != "") & (frame["better"] != "")).any()
    assert set(frame["test"]) - {""} == set(facts.TESTS)
    untested = frame[(frame["test"] == "") & (frame["better"] == "")]
    assert set(untested["id"]) == {"protocol"}


def test_every_source_has_a_page():
    named = {source for claim in CLAIMS for source in claim["source"].split()}
    assert named <= PAGES
    pages = {claims.page_of(name) for name in named}
    assert all((DATA.parent / f"notebooks/{name}.ipynb").is_file() for name in pages)


@cache
def planned_cells(source, dataset):
    planned = claims._planned(source, dataset, "fd")
    if source in claims.PRINTED[1:]:  # with the NFE that are not run on digits
        nfes = sorted(published.published(source)["nfe"].unique().tolist())
        planned = plans.table(int(source.removeprefix("table")), dataset, nfes)
    return claims._cells(planned.assign(result=None), store.RESULTS).assign(value=0.0)


@pytest.mark.parametrize(
    "claim", [c for c in CLAIMS if c["better"]], ids=[c["id"] for c in CLAIMS if c["better"]]
)
def test_every_comparison_selects_something(claim):
    """On every data set that it names, from the paper's table or from our plan."""
    for dataset in claim["datasets"].split():
        source = claims._source(claim, dataset)
        if source in claims.PRINTED:
            found = claims.printed(source, claim | {"datasets": dataset})
        else:
            found = sentences.pairs(planned_cells(source, dataset), claim)
        assert len(found) > 0, (dataset, source)


def test_plans_and_print_give_the_same_comparisons():
    """A claim is tested here by as many comparisons as the paper prints for CIFAR-10."""
    for claim in CLAIMS:
        source = claim["source"].split()[0]
        if (
            not claim["better"]
            or source not in claims.PRINTED
            or "cifar10" not in claim["datasets"]
        ):
            continue
        here = sentences.pairs(planned_cells(source, "digits"), claim)
        there = claims.printed(source, claim | {"datasets": "cifar10"})
        assert len(here) == len(there), claim["id"]


def test_most_claims_are_tested_on_digits():
    about = [
        c
        for c in CLAIMS
        if claims._is_about(c, claims._source(c, "digits"), "digits") and (c["better"] or c["test"])
    ]
    assert len(about) >= 40
    assert not any(c["kind"] == "value" for c in about)  # no FID of the paper is a digits' FD


def test_counts_in_print_are_those_made_by_hand():
    found = {c["id"]: claims.in_print(c) for c in CLAIMS}
    assert {name: found[name] for name in IN_PRINT} == IN_PRINT


def test_commands_name_notebooks_and_data_sets_that_exist():
    frame = claims.to_run("digits")
    for command in frame["command"]:
        source, name = re.search(
            r"notebooks/(\w+)\.ipynb out.ipynb --stderr-file - -p dataset (\w+)", command
        ).groups()
        assert source in PAGES | {"not_run"} and describe(name).paper == name
    at = {
        (row["data set"], claim)
        for _, row in frame.iterrows()
        for claim in row["claims"].split(", ")
    }
    assert ("lsun_cat", "single-step-cat") in at and ("imagenet64", "afs-small") in at
    (row,) = frame[frame["data set"] == "lsun_cat"].to_dict("records")
    assert row["command"] == (
        "papermill notebooks/not_run.ipynb out.ipynb --stderr-file - -p dataset lsun_cat "
        "-p device cuda"
    )


# --- selectors ------------------------------------------------------------------------------------


def pair_claim(**fields):
    empty = dict.fromkeys(claims.claims().columns, "") | {"factor": 1.0, "limit": 0.0}
    return empty | fields


CELLS = pd.DataFrame(
    [
        {"method": method, "afs": afs, "nfe": nfe, "value": 10.0 * i + nfe + afs}
        for i, method in enumerate("abc")
        for afs in (False, True)
        for nfe in (3, 4, 5)
    ]
)


def test_pairs_are_those_of_a_plain_loop():
    claim = pair_claim(better="afs", worse="not afs", same="method nfe+afs", nfe="3 4 5")
    rows = CELLS.to_dict("records")
    expected = [
        (a, b)
        for a, b in itertools.product(rows, rows)
        if a["afs"] and not b["afs"] and a["method"] == b["method"] and a["nfe"] + 1 == b["nfe"]
    ]
    found = sentences.pairs(CELLS, claim)
    assert len(found) == 6
    assert sorted(map(str, found)) == sorted(map(str, expected))


def test_picks_and_bounds():
    fields = {"better": "not afs", "worse": "afs", "same": "nfe", "nfe": "5"}
    claim = pair_claim(**fields, better_pick="best", worse_pick="worst")
    ((better, worse),) = sentences.pairs(CELLS, claim)
    assert (better["method"], worse["method"]) == ("a", "c")
    missing = CELLS.assign(value=CELLS["value"].mask(CELLS["method"] == "b"))
    assert sentences.pairs(missing, claim) == []  # the best of what is not all there
    bound = pair_claim(better="method == 'a'", nfe="4")
    assert [(row["afs"], other) for row, other in sentences.pairs(CELLS, bound)] == [
        (False, None),
        (True, None),
    ]
    with pytest.raises(Exception, match="methd"):
        sentences.pairs(CELLS, pair_claim(better="methd == 'a'"))


def test_names_take_as_few_columns_as_tell_apart():
    cells = pd.DataFrame(
        {"method": ["x", "x", "y"], "r": [0.1, 0.2, np.nan], "amed": [False, False, True]}
    )
    assert claims._names(cells) == ["x, r = 0.1", "x, r = 0.2", "y"]
    assert claims._names(cells.assign(method="x")) == ["r = 0.1", "r = 0.2", "x"]
    assert claims._names(cells[:1]) == ["x"]


# --- statistics -----------------------------------------------------------------------------------


def test_holm_by_hand():
    # Sorted: 0.005 x 4, 0.01 x 3, 0.03 x 2, 0.04 x 1; the last is raised to the one before.
    assert claims.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert claims.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert claims.holm([0.02]) == pytest.approx([0.02])
    assert len(claims.holm([])) == 0


def test_holm_is_the_step_down_procedure():
    """Reject the smallest while it is below alpha / (what is left), and stop at the first miss."""
    rng = np.random.default_rng(1)
    for _ in range(200):
        p = rng.uniform(size=rng.integers(1, 12)) ** 3
        rejected, order = set(), np.argsort(p)
        for i, index in enumerate(order):
            if p[index] >= 0.05 / (len(p) - i):
                break
            rejected.add(int(index))
        assert set(np.flatnonzero(claims.holm(p) < 0.05)) == rejected


def test_p_values_are_those_of_the_t_test():
    """Of a mean the block jackknife is the standard error of block means."""
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(2, BLOCKS))
    found = difference([sampled(PLAIN, a)], [sampled(OTHER, b)])
    assert found.p_value == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-9)
    low, high = stats.ttest_rel(a, b).confidence_interval()
    assert found.interval == pytest.approx((low, high), rel=1e-9)
    # No sampling error: what is left is the t test over training seeds.
    values = [4.0, 5.5, 4.4]
    runs = [result(seeded(LEARNED, i), value) for i, value in enumerate(values)]
    found = difference(runs, [result(PLAIN, 3.9)])
    assert found.p_value == pytest.approx(stats.ttest_1samp(values, 3.9).pvalue, rel=1e-9)


def test_exact_and_unknown_differences():
    assert Estimate(-1.0, 0.0, None, 1, 0).p_value == 0
    assert Estimate(0.0, 0.0, None, 1, 0).p_value == 1
    assert Estimate(-1.0, 0.1, np.nan, 1, 100).p_value == 1


def test_a_factor_weighs_one_side_and_its_noise():
    rng = np.random.default_rng(3)
    a, b = rng.normal(5, 1, size=(2, BLOCKS))
    found = difference([sampled(PLAIN, a)], [sampled(OTHER, b)], factor=1.05)
    assert found.value == pytest.approx(a.mean() - 1.05 * b.mean())
    assert found.p_value == pytest.approx(stats.ttest_rel(a, 1.05 * b).pvalue, rel=1e-9)


def simulate(rng, differences):
    """Verdicts of one table: each comparison has its true difference and its own noise."""
    rows = []
    for i, true in enumerate(differences):
        noise = rng.normal(size=(2, BLOCKS))
        found = difference([sampled(PLAIN, 5 + true + noise[0])], [sampled(OTHER, 5 + noise[1])])
        rows.append(claims._comparison(pair_claim(id="x"), f"a{i}", "b", 5, found))
    return claims._decided(rows)


def test_chance_decides_few_tables_and_planted_differences_are_found():
    rng = np.random.default_rng(4)
    tables = [simulate(rng, np.zeros(12)) for _ in range(200)]
    wrong = {
        name: np.mean([(table[name] != "undecided").any() for table in tables])
        for name in ("uncorrected", "verdict")
    }
    assert wrong["verdict"] <= 0.1  # 5 %, and three standard errors of 200 tables
    assert wrong["uncorrected"] > 0.3  # 1 - 0.95^12 = 0.46: what the correction is for
    planted = simulate(rng, [-3.0, 3.0, *np.zeros(10)])
    assert list(planted["verdict"][:2]) == ["holds", "does not hold"]


def test_one_hypothesis_of_two_claims_counts_once():
    found = Estimate(-1.0, 0.4, None, 1, 100)
    rows = [claims._comparison(pair_claim(id=name), "a", "b", 5, found) for name in "xy"]
    judged = claims._decided(rows)
    assert judged["p_holm"].tolist() == pytest.approx([found.p_value] * 2)
    rows.append(claims._comparison(pair_claim(id="z"), "a", "c", 5, found))
    assert claims._decided(rows)["p_holm"].tolist() == pytest.approx([2 * found.p_value] * 3)


@pytest.mark.parametrize(
    "verdicts, word",
    [
        ("", "not run"),
        ("+", "holds"),
        ("++?", "holds"),
        ("+?", "undecided"),
        ("+??", "undecided"),
        ("++++-", "mixed"),
        ("+-??????", "mixed"),
        ("--?", "does not hold"),
        ("-?", "undecided"),
        ("??", "undecided"),
    ],
)
def test_the_word_for_many(verdicts, word):
    assert claims.overall(WORDS_OF[v] for v in verdicts) == word


WORDS_OF = {"+": "holds", "-": "does not hold", "?": "undecided"}


@pytest.mark.parametrize(
    "verdicts, made, word",
    [
        ("", 3, "not run"),
        ("+++", 3, "holds"),
        ("+++", 4, "partly tested"),
        ("++?", 3, "undecided"),
        ("++?", 4, "partly tested"),
        ("++-", 3, "does not hold"),
        ("-?", 4, "does not hold"),
        ("-?", 2, "does not hold"),
    ],
)
def test_a_claim_of_every_comparison_holds_if_all_were_run_and_hold(verdicts, made, word):
    assert claims.overall([WORDS_OF[v] for v in verdicts], made, universal=True) == word


def test_no_sentence_of_every_or_any_is_taken_for_less():
    told = claims.claims().set_index("id")
    words = r"\b(?:every|any|best of all|throughout|stays|the other|others)\b"
    of_all = told["sentence"].str.contains(words, regex=True) & told["kind"].ne("value")
    weaker = {"ipndm-strong"}  # "in many cases"
    assert set(told.index[of_all]) - weaker <= set(told.index[told["universal"] == "yes"])


# --- the noise of training ------------------------------------------------------------------------

NOISE = pd.DataFrame(
    [(False, 5, 0.03, 2), (False, 5, 0.04, 1), (False, 7, 0.1, 2), (True, 7, 0.5, 2)],
    columns=["plugin", "nfe", "relative_sd", "degrees_of_freedom"],
)


def test_noise_is_pooled_over_the_same_kind_at_the_nearest_nfe(monkeypatch):
    monkeypatch.setattr(noise, "widening", lambda known: 1.0)
    at = {n: replace(LEARNED, nfe=n) for n in (3, 5, 7, 9)}
    five = (2 * 0.03**2 + 0.04**2) / 3, 3
    for nfe, (variance, free) in {3: five, 5: five, 7: (0.1**2, 2), 9: (0.1**2, 2)}.items():
        relative, degrees = noise.pooled_noise(NOISE, at[nfe])
        assert relative == pytest.approx(np.sqrt(variance)) and degrees == free
    between = Run(solver="amed", samples=100, nfe=6, predictor={})  # as near to 5 as to 7
    relative, degrees = noise.pooled_noise(NOISE, between)
    assert relative == pytest.approx(np.sqrt((2 * 0.03**2 + 0.04**2 + 2 * 0.1**2) / 5))
    assert degrees == 5
    plugin = Run(solver="ipndm", samples=100, nfe=5, afs=True, predictor={})
    assert noise.pooled_noise(NOISE, plugin) == (pytest.approx(0.5), 2)
    assert noise.pooled_noise(NOISE[:3], plugin) is None


def compared(better, worse, metric="fd", **pooled):
    """A difference of two distances of the digits, as ``_judged`` makes it."""
    run = SimpleNamespace(dataset="digits", metric=metric)
    sides = [{"value": value, "results": [SimpleNamespace(run=run)]} for value in (better, worse)]
    return Estimate(better - worse, 0.1, pooled.get("error"), 3, 100, pooled.get("of")), *sides


@pytest.mark.parametrize(
    "given, powerless",
    [
        (compared(4.0, 5.0), False),
        (compared(4.0, 5.0, error=1.0, of=4), False),
        (compared(4.0, 5.0, error=2.0, of=4), True),  # t = 2.78: half a width of 5.6
        (compared(4.0, 5.0, error=2.0), False),  # its own trainings
        (compared(34.0, 20.0), False),
        (compared(34.0, 40.0), True),  # both farther than noise of the moments, at 33.5
        (compared(34.0, 40.0, metric="fd_joint"), False),
    ],
)
def test_what_could_not_be_told_apart_has_no_power(given, powerless):
    assert claims._powerless(*given, factor=1.0) is powerless


def test_comparisons_without_power_count_for_the_correction():
    """So that no other verdict is the better for them."""
    rows = [{"powerless": i > 0, "p_value": 0.02 * (1 + i), "difference": -1.0} for i in range(4)]
    judged = claims._decided([row | {"nfe": i} for i, row in enumerate(rows)])
    assert judged["verdict"].tolist() == ["undecided", *["no power"] * 3]
    assert claims._decided(rows[:1])["verdict"].tolist() == ["holds"]


def test_one_training_is_given_the_pooled_noise():
    def borrowed(what):
        return 0.1, 4

    once, plain = result(seeded(LEARNED, 0), 4.0), result(PLAIN, 5.0)
    found = difference([once], [plain], noise=borrowed)
    assert found.training_error == pytest.approx(0.4) and found.pooled == 4
    assert found.p_value == pytest.approx(2 * stats.t.sf(1 / 0.4, 4))
    assert np.isnan(difference([once], [plain]).training_error)
    # Where several were trained, their own noise stays.
    three = [result(seeded(LEARNED, i), value) for i, value in enumerate((4.0, 4.1, 4.2))]
    assert difference(three, [plain], noise=borrowed) == difference(three, [plain])


def test_noise_is_read_from_the_store(tmp_path):
    assert noise.training_noise([stored := claims.stored(plans.table2(nfes=[7]), tmp_path)]).empty
    assert not stored["result"].any()
    planned = plans.table2(names=["AMED-Solver", "iPNDM"], nfes=[7])
    values = iter([4.0, 5.0, 6.0, 7.0])
    for what in planned["run"]:
        save_result(result(what, next(values)), tmp_path)
    measured = [claims.stored(plans.table2(nfes=[7]), tmp_path)] * 2  # two tables with one cell
    (row,) = noise.training_noise(measured).to_dict("records")
    assert row.pop("values") == [4.0, 5.0, 6.0] and row.pop("what").solver == "amed"
    expected = {"plugin": False, "nfe": 7, "relative_sd": 0.2, "degrees_of_freedom": 2}
    assert row == pytest.approx(expected)


def test_noise_is_borrowed_from_the_digits_where_trainings_cannot_check_one_another():
    of = {name: claims.stored_tables(name, "fd") for name in ("digits", "cifar10_small")}
    assert noise.training_noise(of["cifar10_small"].values()).empty
    own = claims.known_noise("digits", of["digits"], "fd")
    pd.testing.assert_frame_equal(
        claims.known_noise("cifar10_small", of["cifar10_small"], "fd"), own
    )

    def trained(nfe):
        what = replace(LEARNED, nfe=nfe)
        return {"result": [result(seeded(what, i), v) for i, v in enumerate((4.0, 5.0, 6.0))]}

    found = claims.known_noise("cifar10_small", {"table2": trained(5)}, "fd")
    assert found["relative_sd"].iloc[0] == pytest.approx(0.2) and len(found) == 1 + len(own)
    two = {"table2": trained(5), "table3": trained(7)}  # either says how good the other is
    assert len(claims.known_noise("cifar10_small", two, "fd")) == 2


def test_coverage_of_pooled_noise():
    def training(nfe, values):
        what = replace(LEARNED, nfe=nfe)
        return {"result": [result(seeded(what, i), value) for i, value in enumerate(values)]}

    even, wild = training(5, [4.0, 4.1, 3.9]), training(7, [4.0, 4.0, 9.0])
    assert noise.coverage([even]) == (0, 0)  # nothing to pool
    # The wild one says that anything goes; by the even one its two like seeds are not covered
    # (2.5 from the mean of the rest), and the third is not either.
    assert noise.coverage([even, wild]) == (3, 6)
    assert noise.coverage([even, training(7, [4.0, 4.1, 3.9])]) == (6, 6)


def test_widened_noise_covers_trainings_that_differ_in_their_noise():
    """Predictors whose spread varies by a factor of ten: what is pooled covers too few."""
    rng, counts, plain = np.random.default_rng(0), [], []
    for _ in range(30):
        rows = []
        for _ in range(11):
            values = 4 * (1 + 10 ** rng.uniform(-2, -1) * rng.normal(size=3))
            spread = np.std(values, ddof=1) / values.mean()
            rows.append((False, 5, spread, 2, replace(LEARNED, nfe=5), values.tolist()))
        known = pd.DataFrame(rows, columns=[*NOISE.columns, "what", "values"])
        others, factor = known.drop(0), noise.widening(known.drop(0))
        scores = noise._scores(known, 0)
        counts += [score <= factor for score in scores]
        plain += [score <= 1 for score in scores]
    assert np.mean(plain) < 0.95 <= np.mean(counts) and len(others) == 10


def test_other_seeds_of_a_training_count_where_they_are_stored(tmp_path):
    planned = plans.table(9, nfes=[5], seeds=(0,))
    mine = planned[planned["amed"] & planned["afs"] & (planned["method"] == "iPNDM")]
    what = mine["run"].iloc[0]
    measured = mine.assign(result=[result(what, 4.0)])
    (results,) = claims._cells(measured, tmp_path)["results"]
    assert len(results) == 1
    for seed in plans.SEEDS:
        save_result(result(seeded(what, seed), 4.0 + seed), tmp_path)
    (results,) = claims._cells(measured, tmp_path)["results"]
    assert [r.value for r in results] == [4.0, 5.0, 6.0]


@pytest.mark.parametrize(
    "dataset", ["digits_uncentred", "digits_guidance_2", "cifar10_small_fid", "imagenet256"]
)
def test_the_ledger_of_a_data_set_that_lacks_a_metric_or_a_table(dataset, tmp_path):
    found = claims.ledger(dataset, tmp_path)
    assert len(found) == len(claims.claims())
    of_samples = found[found["kind"].isin(["quality", "value"])]
    for metric in claims.measures(dataset):
        assert {outcome["verdict"] for outcome in of_samples[metric]} == {"not run"}


def test_a_result_that_a_table_has_twice_counts_once(tmp_path):
    planned = plans.table2(names=["AMED-Plugin", "iPNDM"], nfes=[5])
    rows = [result(row.run, 4.0 + 0.1 * i) for i, row in enumerate(planned.itertuples())]
    once = planned.assign(result=rows)
    judged = claims.judge("table2", once, tmp_path)
    assert len(judged) and claims.judge("table2", plans.concat([once, once]), tmp_path).equals(
        judged
    )


# --- judged ---------------------------------------------------------------------------------------


def judged_claim(source, planned, value, name):
    """One claim's verdicts on made-up results; ``value`` takes a row of the plan."""
    rows = [result(row.run, value(row)) for row in planned.itertuples()]
    judged = claims.judge(source, planned.assign(result=rows))
    return judged[judged["id"] == name]


def test_bounds():
    planned = plans.figure4("digits")
    for value, word in ((0.05, "holds"), (0.09, "does not hold")):
        curves = {
            **dict.fromkeys(("cumulative_variance", "cumulative_variance_sd"), [0.5, value]),
        }
        measured = planned.assign(result=[result(planned["run"][0], value, curves=curves)])
        judged = claims.judge("figure4", measured).set_index("id")
        assert judged.loc["plane-error", "verdict"] == word
        assert judged.loc["plane-error", "difference"] == pytest.approx(value - 0.08)
        assert judged.loc["plane-variance", "difference"] == pytest.approx(0.99 - value)


def test_a_plane_is_not_tested_where_a_line_passes():
    planned = plans.figure4("digits")
    curves = {"cumulative_variance": [0.995, 0.9999], "cumulative_variance_sd": [0.0, 0.0]}
    measured = planned.assign(result=[result(planned["run"][0], 0.01, curves=curves)])
    judged = claims.judge("figure4", measured)
    (found,) = judged[judged["id"] == "plane-variance"].to_dict("records")
    assert found["verdict"] == "no power" and "one alone has 99.5 %" in found["worse"]
    assert claims.overall([found["verdict"]], 1, universal=True) == "no power"
    assert judged.loc[judged["id"] == "plane-error", "verdict"].item() == "holds"
    assert "∅ no power" in tables.verdict_table(judged).data
    said = verdicts.of_a_page(judged)
    assert any("**no power** (The margin is ours. Where one component alone" in s for s in said)


def test_what_has_no_power_is_no_comparison_to_correct_for():
    corrected = claims.holm([0.01, np.nan, 0.04])
    assert corrected[[0, 2]] == pytest.approx(claims.holm([0.01, 0.04]))
    assert np.isnan(corrected[1])


def test_values_are_tested_on_the_papers_data_only():
    for dataset, count in (("cifar10", 1), ("digits", 0)):
        planned = plans.table2(dataset, ["AMED-Plugin"], [5])
        for value, word in ((7.4, "holds"), (7.6, "does not hold")):  # 7.14 and 5 % are 7.497
            found = judged_claim("table2", planned, lambda row, v=value: v, "headline-cifar")
            assert len(found) == count
            assert (found["verdict"] == word).all()


def test_a_claim_with_a_margin():
    planned = plans.table(6, nfes=[4])
    by_r = {0.1: 8.0, 0.2: 7.0, 0.3: 9.0, 0.4: 10.0, 0.5: 10.2, 0.6: 10.4}
    for plugin, word in ((7.3, "holds"), (7.4, "does not hold")):  # 1.05 times the best: 7.35
        values = by_r | {"plugin": plugin}

        def value(row, values=values):
            return values["plugin" if row.amed else row.r]

        found = judged_claim("table6", planned, value, "plugin-r-search")
        assert found["verdict"].tolist() == [word]
        assert found["worse"].tolist() == ["1.05 × DPM-Solver-2, r = 0.2"]


def test_claims_about_other_data_are_left_out():
    planned = plans.table(8, nfes=[5])
    rows = [result(row.run, 5.0) for row in planned.itertuples()]
    judged = claims.judge("table8", planned.assign(result=rows))
    assert judged.empty
    assert "No claim" in tables.verdict_table(judged).data


# --- claims that are no comparison of two cells ---------------------------------------------------


def of(name, cells=None, results_dir="no folder"):
    """Comparisons of a function, by what is better and worse: the difference."""
    return {each[:3]: each[3].value for each in facts.TESTS[name](cells, results_dir)}


def test_the_papers_tables_against_its_text():
    assert list(of("headline_rows").values()).count(-1.0) == 2
    assert [row[0] for row, value in of("one_teacher").items() if value < 0] == [
        "teacher DPM-Solver-2"
    ]
    twice = list(of("printed_twice").values())
    assert len(twice) == 100 and twice.count(-1.0) == 88


def test_teachers_that_make_no_more_evaluations_than_their_students():
    equal = {row[:2] for row, value in of("teacher_evaluations").items() if value > 0}
    # Six evaluations: three steps with one intermediate, for student and teacher alike.
    assert equal == {(f"student {name}", "teacher, M = 1") for name in ("dpmpp", "ipndm")}


def test_schedules():
    assert all(value < 0 for value in of("limit_of_schedules").values())
    found = of("first_interval")
    assert len(found) == 14 and all(value < 0 for value in found.values())
    # By the formula: the first interval of logSNR with N = 4 is 80 (1 - q), q = (0.002/80)^(1/3).
    first = 80 * (1 - (0.002 / 80) ** (1 / 3))
    root = (80 ** (1 / 7) + (0.002 ** (1 / 7) - 80 ** (1 / 7)) / 3) ** 7
    assert found["polynomial, N = 4", "logsnr", found_nan(found)] == pytest.approx(
        80 - root - first
    )


def found_nan(found):
    """The NaN in the keys, which equals itself only as the same object."""
    return next(iter(found))[2]


def cells_of(planned, make):
    rows = [make(row) for row in planned.itertuples()]
    return claims._cells(planned.assign(result=rows), "no folder")


def test_degradation_is_a_ratio_of_ratios():
    growth = {"DPM-Solver-2": 30.0, "EDM": 10.0, "iPNDM": 15.0, "UniPC": 20.0}
    growth["DPM-Solver++(3M)"] = 12.0
    planned = plans.table2(names=list(growth), nfes=[3, 9])
    cells = cells_of(
        planned, lambda row: result(row.run, growth[row.method] if row.nfe == 3 else 1.0)
    )
    found = {row[:2]: value for row, value in of("degradation", cells).items()}
    assert len(found) == 6
    assert found["growth of iPNDM", "of DPM-Solver-2"] == pytest.approx(-15)
    assert found["growth of UniPC", "of EDM"] == pytest.approx(10)


def test_geometry_of_figures():
    curves = {
        "DPM-Solver-2": {"searched": [1.0, 4.0], "baseline": [2.0, 3.0], "r": [0.1, 0.9]},
        "AMED-Solver": {"searched": [1.0, 2.0], "baseline": [2.0, 3.0], "r": [0.4, 0.6]},
    }
    planned = plans.figure5()
    planned = planned[planned["method"].isin(list(curves))]
    cells = cells_of(planned, lambda row: result(row.run, 1.0, curves=curves[row.method]))
    # Of DPM-Solver-2 one step of two ends nearer, of AMED-Solver both: "most" is more than half.
    assert list(of("alignment", cells).values()) == [0.0, -0.5]
    assert list(of("end_alignment", cells).values()) == [-2.0]
    assert list(of("stable_r", cells).values()) == pytest.approx([0.1 - 0.4])
    assert of("end_alignment", cells[:1]) == {}
    planned = plans.figure4()
    t = np.array([10.0, 1.0, 0.1])
    # d = 64 on digits, and Eq. 16 is a/2 tanh(b t / 2).
    bound = np.sqrt(3 * 64) / 15 / 2 * np.tanh(3 * t / 2)
    curves = {"t": t, "deviation": bound - [0.3, 0.1, 0.2], "deviation_sd": [0.0] * 3}
    cells = cells_of(planned, lambda row: result(row.run, 1.0, curves=curves))
    (value,) = of("plane_bound", cells).values()
    assert value == pytest.approx(-0.1)


def test_spread_of_r():
    planned = plans.figure7(nfes=[5])
    curves = {"r": [0.5, 0.4], "r_sd": [0.01, 0.02]}
    cells = cells_of(planned, lambda row: result(row.run, 0.5, curves=curves))
    (value,) = of("spread_of_r", cells).values()
    assert value == pytest.approx(0.05 - 0.1)


def test_costs(monkeypatch, tmp_path):
    minutes = {("grid_search", 4): 9.0, ("time_wise", 4): 1.0, ("sample_wise", 4): 25.0}
    monkeypatch.setattr(facts, "_minutes", lambda cells, results_dir: minutes)
    found = of("search_minutes")
    assert found == {("time wise", "grid search", 4): -8.0, ("sample wise", "grid search", 4): 16.0}
    assert list(of("training_minutes").values()) == [5.0]
    assert of("overhead", results_dir=tmp_path) == {}
    rows = [
        {"solver": "euler", "intermediate": kind, "outside the network, %": share}
        for kind, share in (("none", 1.0), ("predictor", 2.5))
    ]
    (tmp_path / "benchmarks.json").write_text(json.dumps({"sampling": rows}))
    assert list(of("overhead", results_dir=tmp_path).values()) == [-3.5]


def test_counted_evaluations():
    planned = plans.table2(names=["DDIM"], nfes=[3, 4])
    cells = cells_of(planned, lambda row: replace(result(row.run, 1.0), nfe=4))
    assert list(of("counted", cells).values()) == [1.0, -1.0]


# --- the ledger -----------------------------------------------------------------------------------


def test_the_ledger_reads_and_never_computes(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("something was computed")

    for name in ("compute", "run", "run_all", "load_dataset"):
        monkeypatch.setattr(execute, name, fail)
    for name in ("make_block", "sample"):
        monkeypatch.setattr(procedures, name, fail)
    ledger = claims.ledger("digits", tmp_path)
    assert len(ledger) == len(CLAIMS) and not list(tmp_path.iterdir())
    run = {row["id"] for row in ledger.to_dict("records") if row["fd"]["verdict"] != "not run"}
    # What needs no results: the paper's own tables, and closed forms.
    assert run == {
        *("headline-attribution", "teacher-choice", "teacher-stronger", "cross-table"),
        *("logsnr-limit", "logsnr-interval"),
    }
    assert {row["verdict"] for row in ledger["endpoint_error"]} == {"not run"}
    assert verdicts.rank_agreement("digits", results_dir=tmp_path).empty
    html = tables.ledger_grid({"here": ledger}).data
    assert html.count("<details") == len(CLAIMS) and '<a href="table2.html">table2</a>' in html
    assert '<span data-label="here" class="not-run">– not run</span>' in html


def test_a_store_with_a_part_of_a_table(tmp_path):
    planned = plans.table2(names=["iPNDM", "AMED-Plugin", "DDIM"], nfes=[5, 7])
    for i, row in enumerate(planned.itertuples()):
        if row.nfe == 5 or row.method == "DDIM":
            value = {"iPNDM": 7.0, "AMED-Plugin": 4.0, "DDIM": 9.0}[row.method]
            save_result(result(row.run, value + 0.01 * (i % 3)), tmp_path)
    ledger = claims.ledger("digits", tmp_path).set_index("id")
    found = ledger.loc["plugin", "fd"]
    assert (found["verdict"], found["holds"], found["made"]) == ("holds", 1, 4)
    assert found["example"].startswith("AMED-Plugin − iPNDM at NFE 5: −")
    assert ledger.loc["single-step", "fd"]["verdict"] == "not run"
    assert ledger.loc["best-is-ours", "fd"]["verdict"] == "not run"  # the best of what is not there
    assert ledger.loc["plugin", "endpoint_error"]["verdict"] == "not run"
    assert "✓ 1, ✗ 0, ? 0 of 4" in tables.ledger_grid({"here": ledger.reset_index()}).data


def test_verdict_tables_show_both_verdicts_and_what_is_pooled():
    rows = [
        claims._comparison(
            pair_claim(id="x", sentence="A is better."), "a", f"b{i}", nfe, Estimate(-1, *error)
        )
        for i, (nfe, error) in enumerate(
            [(10, (0.3, None, 1, 100)), (9, (0.4, None, 1, 100)), (9, (0.1, 0.3, 1, 100, 2))]
        )
    ]
    html = tables.verdict_table(claims._decided(rows)).data
    assert "? (alone ✓)" in html and "†" in html and "Holm" in html
    assert html.index("NFE 9<") < html.index("NFE 10<")


def test_a_comparison_of_all_nfe_takes_the_whole_row():
    claim = pair_claim(id="x", sentence="A is better.")
    found = Estimate(-1, 0.1, None, 1, 100)
    rows = [claims._comparison(claim, "a", "b", 5, found)]
    rows.append(claims._comparison(claim, "growth of a", "of b", np.nan, found))
    html = tables.verdict_table(claims._decided(rows)).data
    assert html.count("–") == 0 and '<td colspan="1">✓<br>−1.00 ± 0.23</td>' in html
    assert "A is better. <strong>✓ holds</strong>" in html


def test_the_order_of_methods(tmp_path):
    """Results that are the paper's own numbers agree with it; their inverses disagree."""
    printed = published.paper_values("table2", "cifar10").set_index(["method", "nfe"])["paper"]
    for nfe, sign in ((3, 1), (5, -1)):
        for row in plans.table2(nfes=[nfe]).itertuples():
            save_result(result(row.run, printed[row.method, nfe] ** sign), tmp_path)
    found = verdicts.rank_agreement("digits", results_dir=tmp_path)
    table2 = found[found["rows"] == "Table 2"].set_index("nfe")
    assert dict(table2["tau"]) == {3: pytest.approx(1), 5: pytest.approx(-1)}
    assert (table2["methods"] == 8).all()
    # Of the 8! orders one agrees wholly and one disagrees wholly.
    assert table2["p_value"][3] == pytest.approx(2 / 40320)
