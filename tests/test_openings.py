"""A page begins with its result: at most two sentences, which say what the numbers say."""

import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest

from amedlib.study import leaderboard, openings, plans
from amedlib.study.run import BLOCKS, Run

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# A bibliography begins with its entries.
PROSE = [p for p in sorted((ROOT / "book").glob("*.md")) if p.stem != "bibliography"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_page_begins_with_prose(path):
    """Between title and result there is nothing but what sets the page up."""
    cells = nbformat.read(path, as_version=4).cells
    title = cells[0].source
    assert title.splitlines()[0].startswith("# ")
    rest = re.sub(r"\[!\[Open in Colab\].*", "", title.split("\n", 1)[1]).strip()
    if re.fullmatch(r"(\W*\{glue:text\}`\w+:s`\W*)+", rest):
        return  # the result is measured further down, and shown here
    assert rest == "", rest[:80]
    shows = r"openings\.(show|of_bound)\(|page\.open_table\(|Markdown\(|standings\.answer"
    before = []
    for cell in cells[1:]:
        if re.search(shows, cell.source):
            break
        before.append(cell)
    else:
        pytest.fail("the page shows no result")
    assert not [cell for cell in before if cell.cell_type == "markdown"]


def test_claims_are_counted():
    words = pd.Series(["holds", "undecided", "undecided", "no power"])
    assert openings.counted(words) == (
        "Of the paper's claims tested on this page, 1 holds, 2 are undecided and 1 has a test "
        "without power."
    )


def test_one_claim_is_quoted_and_none_is_said():
    row = {"id": "x", "sentence": "A wins.", "universal": "", "verdict": "holds", "made": 1}
    assert (
        openings.of_claims(pd.DataFrame([row]))
        == "The paper's claim holds here (1 hold): “A wins”."
    )
    none = pd.DataFrame(columns=list(row))
    assert openings.of_claims(none) == "No claim of the paper can be tested here."


def test_the_extremes_of_a_column():
    rows = [("A", 5, 2.0, 0.1), ("B", 5, 1.0, 0.2), ("B", 3, 9.0, 0.1)]
    found = pd.DataFrame(rows, columns=["method", "nfe", "value", "half"])
    assert openings.extremes(found, 5, "FD") == (
        "At 5 evaluations B has the lowest FD in the mean, 1.00 ± 0.20, and A the highest, "
        "2.00 ± 0.10."
    )
    assert openings.extremes(found, 5, "FD", "all").startswith("Of all at 5 evaluations, B has")
    assert openings.nearest([3, 4, 6, 8]) == 4


def test_rows_are_named_by_their_marks():
    row = pd.Series({"method": "iPNDM", "AFS": "✓", "AMED": "✓"})
    assert openings.row_in_words(9, row) == "iPNDM with AFS and a learned step"
    row = pd.Series({"method": "DPM-Solver-2", "r": "0.3"})
    assert openings.row_in_words(6, row) == "DPM-Solver-2, r = 0.3"


def test_afs_is_counted_by_cells():
    rows = [("A", 3, afs, value) for afs, value in ((True, 1.0), (False, 2.0))]
    rows += [("B", 3, afs, value) for afs, value in ((True, 3.0), (False, 2.0))]
    rows.append(("C", 3, True, 1.0))
    frame = pd.DataFrame(rows, columns=["method", "nfe", "afs", "value"]).assign(amed=False)
    frame["result"] = [SimpleNamespace(value=value) for value in frame.pop("value")]
    assert "lowers FD in 1 of the 2 cells" in openings.of_afs(frame, "FD")


@pytest.mark.parametrize("height, said", [(2.0, "broken at 1 of 2"), (9.0, "at all 2 times")])
def test_a_bound_is_broken_or_holds(monkeypatch, height, said):
    shown = []
    monkeypatch.setattr(openings, "display", lambda text: shown.append(text.data))
    t = np.array([1.0, 2.0])
    openings.of_bound(t, np.array([1.0, 3.0]), np.array([2.0, height]), 1.5)
    assert said in shown[0] and shown[0].endswith("is 1.5 times as high.")


def test_learned_places_are_counted_by_method():
    results = {"AMED-Solver": [SimpleNamespace(curves={"r": [0.4, 0.6]})]}
    assert openings.of_places(results).endswith("1 of 2 cases for AMED-Solver.")


@pytest.mark.parametrize("path", PROSE, ids=lambda path: path.stem)
def test_prose_begins_with_its_result_too(path):
    """A bold sentence, and at most one more."""
    text = re.sub(r"\{glue:text\}`[^`]*`", "X", path.read_text()).split("\n\n")
    assert text[0].startswith("# ") and text[1].startswith("**")
    sentences = re.split(r"(?<=[.?])(?:\*\*)?\s+(?=[A-Z`])", text[1].strip())
    assert len(sentences) <= 3, sentences  # a question and its answer count as two


def test_what_centring_changes_is_told_with_afs_and_without():
    rows = [("A", 3, "centred", 2.0), ("A", 3, "not centred", 2.0)]
    rows += [("A, AFS", 3, "centred", 1.0), ("A, AFS", 3, "not centred", 2.5)]
    found = pd.DataFrame(rows, columns=["method", "nfe", "data", "value"])
    first, second = openings.of_centring(found, "FD")
    assert "is 2.50 to 2.50 times" in first and "higher in 1 of 1 cells, lower in 0" in first
    assert "A at 3 evaluations" in first
    assert second == "Without AFS it is 1.00 to 1.00 times."


def test_few_trajectories_are_compared_by_paired_differences():
    """Noise that two counts share decides nothing."""
    shared, own = np.random.default_rng(0).normal(size=(2, BLOCKS))

    def result(value, count):
        replicates = value + 0.1 * shared + 0.01 * own * (count < 64)
        return SimpleNamespace(
            run=Run(solver="euler", samples=100), value=value, replicates=list(replicates)
        )

    rows = [(2, 5, result(9.0, 2)), (8, 5, result(1.51, 8)), (64, 5, result(1.5, 64))]
    found = pd.DataFrame(rows, columns=["images", "nfe", "result"])
    two, eight = openings.of_few(found).items()
    assert two[0] == "At 5 evaluations 2 trajectories instead of 64" and two[1].value == 7.5
    assert eight[1].value == pytest.approx(0.01)
    assert eight[1].interval[1] - eight[1].interval[0] < 0.2  # shared, it would be 1.2


def test_the_nearest_of_every_step_is_named():
    curves = {"A": {"rms": [1.0, 3.0, 1.0]}, "B": {"rms": [2.0, 2.0, 2.0]}}
    assert (
        openings.of_steps(curves) == "Step by step the nearest is A in step 1 and 3; B in step 2."
    )


def test_what_is_largest_is_told_with_how_many_reach_it():
    rows = [
        ("times", 5, 0.6, 0.5, 0.7),
        ("coefficients", 5, 0.65, 0.6, 0.8),
        ("afs", 5, 0.9, 0.8, 1),
    ]
    worth = pd.DataFrame(rows, columns=["factor", "nfe", "value", "low", "high"])
    first, second = openings.of_freedoms(worth)
    assert "from learned times at 5 evaluations; the intervals of 1 of 2 other gains" in first
    assert second.startswith("At 5 learned times multiply FD by 0.60 (0.50 to 0.70)")


def test_what_a_freedom_adds_last():
    """The product of three factors, but for the last of them where all are there."""
    columns = ["nfe", "afs", *leaderboard.FACTORS, "value"]
    rows = [
        (5, False, *on, 8.0 * 0.5 ** sum(on) * (2.0 if all(on) else 1.0))
        for on in itertools.product((False, True), repeat=3)
    ]
    said = openings.of_last(pd.DataFrame(rows, columns=columns))
    assert said.count("by 1.00 to 1.00") == 3


def test_a_sampler_is_told_where_it_was_learned():
    rows = [("A", "digits", 5, 2.0, 0.1), ("A", "letters", 5, 1.0, 0.1), ("B", "nothing", 3, 9, 1)]
    found = pd.DataFrame(rows, columns=["method", "learned on", "nfe", "value", "half"])
    assert openings.of_transfer(found, 5) == [
        "*A* at 5 evaluations: 2.00 ± 0.10 learned on digits, 1.00 ± 0.10 learned on letters."
    ]


def test_guided_cells_are_compared_one_by_one():
    columns = ["guidance", "nfe", "amed", "value"]
    rows = [(8.0, 4, False, 2.0), (8.0, 4, True, 1.0), (2.0, 4, False, 1.0), (2.0, 4, True, 3.0)]
    measured = pd.DataFrame(rows, columns=columns)
    measured["result"] = [
        SimpleNamespace(run=plans.table2(names=["iPNDM"], nfes=[5])["run"][0], value=v)
        for v in measured["value"]
    ]
    for result in measured["result"]:
        result.replicates = [result.value] * 10
    said = "In the mean a learned step lowers FD in 1 of 2 cells."
    assert openings.of_guided(measured, "FD") == said
