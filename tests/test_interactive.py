"""Plots that a reader operates, in a headless browser: what is chosen is what is drawn."""

import json
import re
import shutil
import subprocess
from itertools import product

import pandas as pd
import pytest
from bokeh.embed import file_html
from bokeh.resources import INLINE
from IPython.display import HTML

from amedlib.study.interactive import SCRIPTS, embedded_plot, leaderboard_plot

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FOUND = pd.DataFrame(
    [
        ("iPNDM", schedule, afs, nfe, 10 / nfe, 5 / nfe)
        for schedule, afs, nfe in product(
            ("polynomial", "logSNR"), ("with AFS", "without AFS"), (3, 5)
        )
    ]
    + [("LD3", "", "", nfe, 3 / nfe, 2 / nfe) for nfe in (3, 5)],
    columns=["method", "schedule", "afs", "nfe", "FD", "endpoint error"],
)

# Chooses, waits until it is drawn, and writes what is visible into the page.
OPERATE = """
<script>
window.addEventListener("load", () => setTimeout(() => {
  const page = Bokeh.documents[0], chosen = %s;
  for (const [name, value] of Object.entries(chosen)) {
    const widget = page.get_model_by_name(name);
    widget[Array.isArray(value) ? "active" : "value"] = value;
  }
  setTimeout(() => {
    const lines = page.roots()[0].select({type: "GlyphRenderer"});
    const seen = lines.filter(m => m.visible).map(m => [...m.tags, m.glyph.y.field]);
    document.body.innerHTML = "<pre id=seen>" + JSON.stringify(seen) + "</pre>";
  }, 500);
}, 500));
</script></body>"""


def operated(tmp_path, chosen: dict) -> list[list[str]]:
    """What is drawn after widgets were set: method, schedule, AFS and measure of each line."""
    html = file_html(leaderboard_plot(FOUND, ["FD", "endpoint error"]), INLINE)
    page = tmp_path / "page.html"
    before, _, after = html.rpartition("</body>")  # the scripts have this text in them too
    page.write_text(before + OPERATE % json.dumps(chosen) + after)
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000"]
    command += ["--dump-dom", page.as_uri()]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    seen = re.search(r'<pre id="seen">(.*?)</pre>', found)
    assert seen, found[-500:]
    return [line for i, line in enumerate(json.loads(seen[1])) if i % 2 == 0]  # lines, no points


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium to open the page with")
@pytest.mark.parametrize(
    "chosen, lines",
    [
        ({}, [["iPNDM", "polynomial", "with AFS", "FD"], ["LD3", "", "", "FD"]]),
        (
            {"measure": "endpoint error"},
            [
                ["iPNDM", "polynomial", "with AFS", "endpoint error"],
                ["LD3", "", "", "endpoint error"],
            ],
        ),
        (
            {"schedule": "logSNR", "afs": "without AFS", "learned": []},
            [["iPNDM", "logSNR", "without AFS", "FD"]],
        ),
    ],
    ids=["first", "measure", "others"],
)
def test_what_is_chosen_is_drawn(tmp_path, chosen, lines):
    assert operated(tmp_path, chosen) == lines


def test_a_page_takes_scripts_from_the_book_and_has_a_picture_without_them():
    html = embedded_plot(leaderboard_plot(FOUND, ["FD"]), HTML('<img alt="FD against NFE">')).data
    assert re.findall(r'src="([^"]+)"', html) == [f"../_static/bokeh/{name}" for name in SCRIPTS]
    assert html.endswith('<noscript><img alt="FD against NFE"></noscript>')
    assert "https://cdn" not in html
