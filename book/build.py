"""Build the book: run the notebooks, render the pages, check what came out.

``make book`` calls this. Everything is written below ``_build``: ``stage`` (the sources that are
rendered, with the executed notebooks), ``logs`` (what each notebook printed), ``executed`` (copies
of them, used again while nothing that they read has changed) and ``html``.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from html import escape
from itertools import zip_longest
from pathlib import Path

import nbformat
from bs4 import BeautifulSoup
from ipykernel.kernelspec import install
from sphinx_external_toc.parsing import parse_toc_yaml

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "_build"
STAGE = BUILD / "stage"
HTML = BUILD / "html"
EXECUTED = BUILD / "executed"
CPUS = os.cpu_count() or 1
WORKERS = min(2, CPUS)

# Pixels: a page on a telephone, and what a column and a letter of a table take of it.
NARROW, PER_COLUMN, PER_LETTER = 340, 10, 7.2
SHORT = 20  # letters of a cell and its heading, of which two stand side by side there
LARGEST = 3e6  # bytes of a page, so that it opens on a telephone

# What a browser fetches by itself when it opens a page, if the address leaves the book.
REQUEST = re.compile(
    r"""(?:<(?:script|img|iframe|embed|source|audio|video)\b[^>]*?\bsrc\s*=
         |<link\b[^>]*?\bhref\s*=
         |\burl\(|@import|\bfetch\(|\bimport\(|\.src\s*=)
        \s*["'`]?((?:https?:)?//[^"'`)>\s]+)""",
    re.IGNORECASE | re.VERBOSE,
)


def stage() -> None:
    """Copy the sources into an empty tree with the layout of the repository.

    The layout keeps relative links and launch addresses true; the emptiness keeps out everything
    that merely lies about in a clone, such as the virtual environment.
    """
    for old in (STAGE, HTML, BUILD / "logs", BUILD / ".doctrees"):
        shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(ROOT / "book", STAGE / "book", ignore=shutil.ignore_patterns("*.py*"))
    for name in ("_config.yml", "_toc.yml"):
        shutil.copy(ROOT / name, STAGE)
    (STAGE / "notebooks").mkdir()


def run_notebooks() -> bool:
    """Execute all notebooks, two at a time; False if any failed."""
    (BUILD / "logs").mkdir()
    # A kernel that is this very interpreter: JUPYTER_PATH goes before a user's own "python3".
    install(prefix=str(BUILD / "kernel"), kernel_name="python3")
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    notebooks.sort(key=lambda path: path.stem != "spotcheck")  # it takes longest
    run = partial(run_notebook, inputs=inputs_of_notebooks())
    with ThreadPoolExecutor(WORKERS) as pool:
        return all(list(pool.map(run, notebooks)))


def inputs_of_notebooks() -> str:
    """A hash of all that a notebook's output may depend on: notebooks, library, data, versions."""
    digest = hashlib.sha256((ROOT / "constraints.txt").read_bytes())
    for folder in ("notebooks", "amedlib", "data"):
        for path in sorted((ROOT / folder).rglob("*")):
            ignored = {"cache", "__pycache__"} & set(path.relative_to(ROOT).parts)
            if path.is_file() and not ignored:
                digest.update(f"{path.relative_to(ROOT)} ".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def run_notebook(notebook: Path, inputs: str) -> bool:
    """Execute one notebook into the staged tree; what it prints goes to ``_build/logs``."""
    target = STAGE / "notebooks" / notebook.name
    log = BUILD / "logs" / f"{notebook.stem}.log"
    env = {
        "OMP_NUM_THREADS": str(CPUS // WORKERS),
        **os.environ,
        "JUPYTER_PATH": str(BUILD / "kernel/share/jupyter"),
    }
    # Relative paths, because papermill records them in the notebook and the book publishes that.
    command = [sys.executable, "-m", "papermill", "--kernel", "python3", "--cwd", "notebooks"]
    command += ["--no-progress-bar", "--log-output"]
    command += [str(path.relative_to(ROOT)) for path in (notebook, target)]
    # The spot check draws anew at every build.
    kept = None if notebook.stem == "spotcheck" else EXECUTED / f"{notebook.stem}-{inputs}.ipynb"
    if kept and kept.exists():
        shutil.copy(kept, target)
        print(f"{notebook.stem}: as executed before", flush=True)
        return True
    print(f"{notebook.stem}: running", flush=True)
    start = time.perf_counter()
    failed = follow(command, env, log, notebook.stem)
    seconds = time.perf_counter() - start
    if failed:
        print("\n".join(log.read_text().splitlines()[-40:]))
        print(f"{notebook.stem}: failed after {seconds:.0f} s; executed copy: {target}", flush=True)
        return False
    fold_code(target)
    if kept:
        EXECUTED.mkdir(exist_ok=True)
        shutil.copy(target, kept.with_suffix(".new"))
        kept.with_suffix(".new").replace(kept)
    print(f"{notebook.stem}: done in {seconds:.0f} s", flush=True)
    return True


def follow(command: list[str], env: dict[str, str], log: Path, name: str) -> int:
    """Run a command; what it prints goes to a log, and of its progress a line to the terminal.

    That is what it says before long work (`forecast`), and its bar every ten seconds.

    Returns:
        Its exit status.
    """
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    said = time.perf_counter()
    with (
        log.open("w", buffering=1, encoding="utf-8") as out,
        subprocess.Popen(
            command, cwd=ROOT, env=env, encoding="utf-8", errors="replace", **how
        ) as process,
    ):
        for line in process.stdout:
            out.write(line)
            bar = "%|" in line and time.perf_counter() - said > 10
            if bar or line.startswith("To be computed: "):
                said = time.perf_counter()
                print(f"{name}: {line.strip()}", flush=True)
    return process.returncode


def fold_code(path: Path) -> None:
    """Tag the code cells of a notebook: a page shows results, and code on a click.

    Cells with a tag of their own on this (``remove-input``, ``remove-cell``, or ``show-input`` for
    code that is the result) keep to it.
    """
    notebook, own = nbformat.read(path, as_version=4), {"remove-input", "remove-cell", "show-input"}
    for cell in notebook.cells:
        tags = cell.metadata.setdefault("tags", [])
        if cell.cell_type == "code" and not own & set(tags):
            tags.append("hide-input")
    nbformat.write(notebook, path)


def render() -> bool:
    """Run Jupyter Book on the staged tree; False if there was a single warning."""
    jupyter_book = Path(sys.executable).with_name("jupyter-book")
    command = [str(jupyter_book), "build", str(STAGE), "--path-output", str(ROOT)]
    command += ["-W", "-n", "--keep-going", "--quiet"]
    return subprocess.run(command, cwd=ROOT).returncode == 0


def name_pictures(stage: Path, html: Path) -> None:
    """Give every picture of a page the words that stand beside it in its notebook, as its alt.

    Jupyter Book calls a picture by the hash of its content, and would show that to who cannot see.
    """
    words = {}
    for path in (stage / "notebooks").glob("*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            for data in (output.get("data", {}) for output in cell.get("outputs", [])):
                if picture := data.get("image/svg+xml"):
                    content = os.linesep.join(picture.splitlines()).encode()
                    words[hashlib.sha256(content).hexdigest()] = data.get("text/plain", "")

    def named(found: re.Match) -> str:
        return f'alt="{escape(words.get(found[1], found[1]))}"'

    for path in html.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        path.write_text(re.sub(r'alt="[^"]*/([0-9a-f]{64})\.svg"', named, text), encoding="utf-8")


def label_tables(html: Path) -> None:
    """Tell every cell of a table what it is of, so that a narrow page can set cells in lines."""
    for path in html.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        found = re.sub(r"<table\b.*?</table>", _labelled, text, flags=re.DOTALL)
        path.write_text(found, encoding="utf-8")


def _labelled(found: re.Match) -> str:
    """A table whose cells carry their headings; of class ``stack`` if a telephone is too narrow.

    Of class ``short`` besides if its cells are. An empty cell or a dash is of class ``none``.
    """
    soup = BeautifulSoup(found[0], "html.parser")
    table = soup.table
    for text in table.find_all(string=re.compile("± ")):
        text.replace_with(text.replace("± ", "±\N{NO-BREAK SPACE}"))
    heads = _grid(table.thead.find_all("tr")) if table.thead else []
    names = _names_of_columns(heads)
    words = [max(map(len, name.split()), default=0) for name in names]
    longest = 0
    for row in _grid(tr for tr in table.find_all("tr") if tr.find_parent("thead") is None):
        for column, (cell, name) in enumerate(zip(row, names, strict=False)):
            if cell is None or cell.get("colspan", "1") != "1":
                continue
            if name:
                cell["data-label"] = name
            lines = cell.get_text("\n").splitlines() or [""]
            if lines in (["–"], [""]):
                cell["class"] = [*cell.get("class", []), "none"]
            words[column] = max(words[column], *(len(word) for x in lines for word in x.split(" ")))
            if cell.name == "td":
                longest = max(longest, len(name) + max(map(len, lines)))
    if sum(PER_COLUMN + PER_LETTER * letters for letters in words) > NARROW:
        short = ["short"] if longest <= SHORT else []
        table["class"] = [*table.get("class", []), "stack", *short]
    return str(soup)


def _grid(rows) -> list[list]:
    """The cells of rows by column, with those that span several in each of them."""
    grid, hanging = [], {}
    for tr in rows:
        row, cells, column = [], iter(tr.find_all(["th", "td"], recursive=False)), 0
        while True:
            if hanging.get(column, (None, 0))[1]:
                cell, left = hanging[column]
                hanging[column] = cell, left - 1
                row.append(None)  # it stands in a row above
            elif cell := next(cells, None):
                for place in range(int(cell.get("colspan", 1))):
                    hanging[column + place] = cell, int(cell.get("rowspan", 1)) - 1
                    row.append(cell)
                column += int(cell.get("colspan", 1)) - 1
            elif column >= max(hanging, default=-1):
                break
            else:
                row.append(None)
            column += 1
        grid.append(row)
    return grid


def _names_of_columns(heads: list[list]) -> list[str]:
    """What the columns of a table are called, in all lines of its head."""
    names = []
    for column in zip_longest(*heads):
        words = [" ".join(cell.get_text(" ").split()) for cell in column if cell is not None]
        names.append(", ".join(dict.fromkeys(filter(None, words))))
    return names


def without_words(text: str) -> list[str]:
    """The pictures of a page whose alt is missing, empty, or the name of a file."""
    found = []
    for tag in re.findall(r"<img\b[^>]*>", text):
        alt = re.search(r'\balt="([^"]*)"', tag)
        if not alt or not alt[1].strip() or re.search(r"[0-9a-f]{32}|\.\w{3}$", alt[1]):
            found.append(tag[:80])
    return found


def problems(html: Path, toc: Path) -> list[str]:
    """Return what is wrong with a rendered book: pages missing or large, requests that leave it,
    pictures without words."""
    found = [
        f"{page}.html was not written"
        for page in ["index", *parse_toc_yaml(toc)]
        if not (html / f"{page}.html").is_file()
    ]
    for path in sorted(html.rglob("*.html")):
        if path.stat().st_size > LARGEST:
            size = f"{path.stat().st_size / 1e6:.1f} MB"
            found.append(f"{path.relative_to(html)} has {size}, more than {LARGEST / 1e6:g}")
        wordless = without_words(path.read_text(encoding="utf-8", errors="replace"))
        found += [
            f"{path.relative_to(html)} has a picture without words: {tag}" for tag in wordless
        ]
    for path in sorted(html.rglob("*")):
        if path.suffix in {".html", ".css", ".js"}:
            text = path.read_text(encoding="utf-8", errors="replace")
            found += [f"{path.relative_to(html)} fetches {url}" for url in REQUEST.findall(text)]
    return found


def main() -> str | None:
    """Build; return what went wrong, if anything did."""
    stage()
    if not run_notebooks():
        return "A notebook failed: see above."
    if not render():
        return "The book has warnings or errors: see above."
    name_pictures(STAGE, HTML)
    label_tables(HTML)
    if found := problems(HTML, ROOT / "_toc.yml"):
        return "\n".join(found)
    print(f"The book: {HTML / 'index.html'}")
    return None


if __name__ == "__main__":
    sys.exit(main())
