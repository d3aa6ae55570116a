"""The leaderboard to operate, in a headless browser: what is chosen is what is drawn."""

from itertools import product

import browser
import pandas as pd
from test_lesson import needs_browser, page

from amedlib.study.interactive import leaderboard_piece

FOUND = pd.DataFrame(
    [
        ("iPNDM", schedule, afs, nfe, 10 / nfe, 5 / nfe)
        for schedule, afs, nfe in product(
            ("polynomial", "logSNR"), ("without AFS", "with AFS"), (3, 5)
        )
    ]
    + [("LD3", "", "", nfe, 3 / nfe, 2 / nfe) for nfe in (3, 5)]
    + [("GITS", "", "", nfe, 4 / nfe, 3 / nfe) for nfe in (3, 5)],
    columns=["method", "schedule", "afs", "nfe", "FD", "endpoint error"],
)
DRAWN = """(() => {
  const plot = document.querySelector(".plot");
  return plot.data.filter((line) => line.x.length).map((line) => [line.name, ...line.y]);
})()"""
CHOOSE = """(() => {
  const list = document.querySelector('select[name="%s"]');
  list.value = "%s"; list.dispatchEvent(new Event("input"));
})()"""


@needs_browser
def test_what_is_chosen_is_drawn(tmp_path):
    with browser.Browser() as opened:
        opened.open(page(tmp_path, leaderboard_piece(FOUND, ["FD", "endpoint error"]).data))
        opened.wait("document.querySelector('.plot').data")
        assert opened.run(DRAWN) == [["iPNDM", 3.333, 2], ["LD3", 1, 0.6]]
        opened.run(CHOOSE % ("measure", "endpoint error"))
        opened.wait("document.querySelector('.plot').data[0].y[0] < 2")
        assert opened.run(DRAWN) == [["iPNDM", 1.667, 1], ["LD3", 0.6667, 0.4]]
        opened.run(CHOOSE % ("group", "all learned"))
        opened.wait("document.querySelector('.plot').data[0].x.length === 0")
        assert [line[0] for line in opened.run(DRAWN)] == ["LD3", "GITS"]
        assert not opened.problems


def test_a_choice_of_schedule_and_first_step_is_its_own_frame():
    html = leaderboard_piece(FOUND, ["FD"]).data
    for schedule, afs in product(("polynomial", "logSNR"), ("without AFS", "with AFS")):
        assert f"Untrained samplers on the schedule {schedule}, {afs}." in html
    assert '<img alt="FD of 2 samplers against the number of evaluations"' in html
