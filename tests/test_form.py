"""The form of pages, in a headless browser: tables fit, and the ledger filters without a script."""

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import browser
import pandas as pd
import pytest
from test_lesson import needs_browser

from amedlib.study import claims, plans, tables

BOOK = Path(__file__).parents[1] / "book"
TOO_WIDE = """[...document.querySelectorAll("table")]
  .filter((table) => table.scrollWidth > table.parentElement.clientWidth).length"""
SHOWN = """[...document.querySelectorAll("details")]
  .filter((each) => each.checkVisibility()).map((each) => each.dataset.verdicts)"""


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("build", BOOK / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def page(folder, body):
    """A page of the book around some output, with its styles and a column as wide as its own."""
    style = (BOOK / "static/custom.css").read_text()
    column = (
        "body { margin: 0; font-family: sans-serif } article { max-width: 676px; padding: 16px }"
    )
    path = folder / "page.html"
    path.write_text(
        '<!DOCTYPE html><html><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{column} {style}</style></head><body>"
        f'<article class="bd-article"><div class="cell_output">{body}</div></article></body></html>'
    )
    return path


@needs_browser
def test_a_wide_table_fits_a_telephone(tmp_path, build):
    cells = {
        (f"NFE {n}", name): ["12.34 ± 0.56"] * 2 for n in (3, 5, 7, 9) for name in ("FD", "it")
    }
    html = pd.DataFrame(cells, index=["DPM-Solver++(3M)", "AMED-Plugin"]).style.to_html()
    labelled = re.sub("<table.*</table>", build._labelled, html, flags=re.DOTALL)
    with browser.Browser() as opened:
        opened.open(page(tmp_path, html), width=400)
        assert opened.run(TOO_WIDE) == 1  # as it was
        opened.open(page(tmp_path, labelled), width=400)
        assert opened.run(TOO_WIDE) == 0
        label = opened.run("getComputedStyle(document.querySelector('td'), '::before').content")
        assert label == '"NFE 3, FD"'
        opened.open(page(tmp_path, labelled), width=1280)
        assert opened.run(TOO_WIDE) == 0
        assert opened.run("getComputedStyle(document.querySelector('td')).display") == "table-cell"


@needs_browser
def test_the_ledger_filters_and_unfolds_without_a_script(tmp_path):
    ledger = claims.ledger("digits", tmp_path)  # of an empty store
    verdicts = ledger["fd"].map(lambda outcome: outcome["verdict"])
    with browser.Browser() as opened:
        opened.open(page(tmp_path, tables.ledger_grid({"here": ledger}).data), scripts=False)
        assert len(opened.run(SHOWN)) == len(ledger)
        opened.run("document.querySelector('input[value=mixed]').click()")
        assert opened.run(SHOWN) == ["mixed"] * verdicts.eq("mixed").sum()
        opened.run("document.querySelector('input[value=not-run]').click()")
        opened.run("document.querySelector('input[value=geometry]').click()")
        both = verdicts.eq("not run") & ledger["kind"].eq("geometry")
        assert 0 < len(opened.run(SHOWN)) == both.sum() < verdicts.eq("not run").sum()
        first = "[...document.querySelectorAll('details')].find((each) => each.checkVisibility())"
        assert not opened.run(f"{first}.querySelector('p').checkVisibility()")
        opened.run(f"{first}.querySelector('summary').click()")
        assert opened.run(f"{first}.querySelector('p').checkVisibility()")
        assert not opened.run("document.body.scrollWidth > innerWidth")


def test_a_crossed_table_uses_words_of_the_reader():
    rows = [("iPNDM", "time_uniform", True, 3, 2.0, 0.1), ("iPNDM", "logsnr", False, 5, 1.0, 0.1)]
    found = pd.DataFrame(rows, columns=["method", "schedule", "afs", "nfe", "value", "half"])
    table = tables.crossed_table(found, ["method", "schedule"], ["nfe", "afs"]).data
    assert table.index.tolist() == [("iPNDM", "uniform"), ("iPNDM", "logSNR")]
    assert table.columns.tolist() == [("NFE 3", True), ("NFE 5", False)]
    assert not any([*table.index.names, *table.columns.names])
    assert table.to_numpy().tolist() == [["2.00 ± 0.10", "–"], ["–", "1.00 ± 0.10"]]


def test_no_row_of_a_table_is_a_bare_number():
    planned = plans.table(7, nfes=[5], seeds=[0])
    results = [SimpleNamespace(run=run, value=2.0, replicates=[2.0] * 10) for run in planned["run"]]
    rows = tables.cells_table(7, planned.assign(result=results), "FD").data.index
    assert rows.tolist() == [f"M = {m}" for m in range(1, 6)]
