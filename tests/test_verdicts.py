"""What is said of verdicts follows from them, for whatever measures a data set has."""

import pandas as pd
import pytest

from amedlib.datasets.entries import DATASETS, describe
from amedlib.study import claims, noise, verdicts

MEASURES = ["fd", "fd_joint", "fd_pixels", "endpoint_error"]


def row(words: str, **others) -> dict:
    """A row of a ledger: a verdict per measure, underscores for spaces."""
    found = {"holds": 1, "fails": 0, "undecided": 2, "powerless": 1, "made": 5}
    told = [word.replace("_", " ") for word in words.split()]
    named = {m: found | {"verdict": word} for m, word in zip(MEASURES, told, strict=False)}
    return {"id": "x", "sentence": "A wins."} | others | named


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("holds holds undecided", "The verdict changes by FD (pixels) to undecided."),
        ("holds undecided holds holds", "The verdict changes by joint FD to undecided."),
        (
            "holds mixed undecided",
            "The verdict changes by joint FD to mixed, by FD (pixels) to undecided. The measures "
            "disagree: holds by FD (classifier's features); mixed by joint FD.",
        ),
        (
            "holds holds not_run does_not_hold",
            "The measures disagree: holds by FD (classifier's features) and joint FD; does not "
            "hold by endpoint error.",
        ),
        ("undecided undecided undecided holds", ""),  # another measure, which contradicts none
        ("holds not_run not_run not_run", ""),
        ("holds", ""),
    ],
)
def test_where_measures_disagree_is_said(words, sentence):
    assert verdicts.disagreement(verdicts.by_measure(row(words))) == sentence


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_ledger_has_every_measure_of_a_data_set(dataset):
    found = claims.measures(dataset)
    assert found[0] == "fd" and set(found) == {"fd", *describe(dataset).metrics}


def test_disagreements_are_counted():
    rows = ["holds holds", "holds undecided", "holds does_not_hold", "holds not_run"]
    said = verdicts.how_often_they_disagree(pd.DataFrame([row(words) for words in rows]))
    assert said.startswith("Of 3 claims") and "verdict on 2," in said and "on 1 the" in said


def test_words_have_the_counts_and_what_was_not_run():
    words = verdicts.in_words(pd.DataFrame([row("undecided holds")]))
    counts = "1 hold, 2 undecided, 1 without power, 1 not run"
    assert words == {"x": f"undecided ({counts}). The verdict changes by joint FD to holds."}


def test_a_page_says_of_a_claim_what_the_ledger_would():
    """By all comparisons that the claim makes, not by those that the page shows."""
    rows = [("x", "A wins.", "yes", "holds", 3), ("x", "A wins.", "yes", "holds", 3)]
    rows.append(("y", "B wins.", "", "does not hold", 1))
    columns = ["id", "sentence", "universal", "verdict", "made"]
    assert verdicts.of_a_page(pd.DataFrame(rows, columns=columns)) == [
        "A wins: **partly tested** (2 hold, 1 not run).",
        "B wins: **does not hold** (1 fail).",
    ]


@pytest.mark.parametrize("metric", ["fd", "fd_joint"])
def test_pooled_noise_covers_what_it_says_on_the_shipped_trainings(metric, monkeypatch):
    """About 95 %, each training left out in turn; without the widening it is too little."""
    tables = claims.stored_tables("digits", metric).values()
    covered, of = noise.coverage(tables)
    assert of >= 24 and 0.92 <= covered / of
    monkeypatch.setattr(noise, "widening", lambda known: 1.0)
    covered, of = noise.coverage(tables)
    assert covered / of < 0.9
