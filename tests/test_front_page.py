"""The first page judges nothing by itself: what it says of samplers comes from verdicts."""

import re

import numpy as np
import pandas as pd
import pytest

from amedlib.datasets.files import DATA
from amedlib.study import claims, standings, verdicts
from amedlib.study.run import BLOCKS, Result, Run

INTRO = DATA.parent / "book/intro.md"
JUDGING = (
    r"\b(?:better|best|worse|worst|wins?|beats?|outperforms?|improves?|holds?|fails?|helps?|gains?|"
    r"nearly all|too close|undecided|mixed|stronger|weaker|superior|equal)\b"
)
# Of the field's words; what they say is no verdict on the paper.
NEUTRAL = ("the best untrained sampler, chosen on other samples",)


def judgements(text: str) -> list[str]:
    """Sentences that name a sampler and judge it, where they are not computed."""
    text = re.sub(r"```\{glue\}.*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"\{glue:text\}`[^`]*`", "X", text)
    text = " ".join(text.split())
    for phrase in NEUTRAL:
        text = text.replace(phrase, "")
    named = r"AMED|AFS|iPNDM|DPM-Solver|UniPC|plugin|learned step"
    sentences = re.split(r"(?<=[.:;?])\s", text)
    return [s for s in sentences if re.search(named, s) and re.search(JUDGING, s)]


def test_the_first_page_judges_by_verdicts_only():
    assert judgements(INTRO.read_text()) == []


@pytest.mark.parametrize(
    "sentence",
    [
        "AMED-Plugin improves iPNDM.",
        "At five AMED-Solver wins {glue:text}`a::b:s` of 12.",
        "Nearly all of that is AFS, and nearly all of it is wrong.",
    ],
)
def test_a_judgement_in_prose_is_found(sentence):
    assert judgements(f"# Title\n\nSomething else. {sentence} The end.")


def ledger(verdict: str) -> pd.DataFrame:
    found = {"verdict": verdict, "made": 1} | claims.counted(["holds"])
    known = claims.claims().set_index("id")["sentence"]
    return pd.DataFrame(
        [{"id": name, "sentence": known[name], "fd": found} for name in verdicts.FRONT]
    )


def test_the_table_of_the_first_page_follows_the_ledger():
    table = verdicts.front_page({"here": ledger("holds"), "there": ledger("does not hold")})
    assert (table["here"] == "holds (1 hold)").all()
    assert (table["there"].str.startswith("does not hold")).all()
    assert table["the paper says"].str.contains("polynomial schedule").any()


@pytest.mark.parametrize(
    "untrained, minute, answer",
    [
        (-2, -3, "Not as the paper trains it."),
        (-2, 2, "Not as the paper trains it."),
        (2, 2, "Yes."),
        (0, 2, "It cannot be told."),
    ],
)
def test_whether_to_use_it_follows_from_differences(untrained, minute, answer):
    noise = 0.01 * np.random.default_rng(0).normal(size=(3, BLOCKS))

    def result(value, i):
        run = Run(solver="euler", samples=100)
        return Result(run, value, list(value + noise[i]), {}, 5, 1.0, "cpu", {}, "", "")

    others = pd.DataFrame(
        {
            "need": ["no training", "a minute of training"],
            "who": ["A", "B"],
            "result": [result(5.0 + untrained, 1), result(5.0 + minute, 2)],
        }
    )
    said, why = standings.use_it([result(5.0, 0)], others)
    assert said == answer
    words = {-1: "worse than", 0: "not to be told apart from", 1: "better than"}
    assert f"{words[np.sign(untrained)]} “A”" in why and f"{words[np.sign(minute)]} “B”" in why
