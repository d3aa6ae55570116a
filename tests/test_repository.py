"""What the files around the library promise to one another and to the reader."""

import ast
import hashlib
import importlib.util
import itertools
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml
from bs4 import BeautifulSoup
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from sphinx_external_toc.parsing import parse_toc_yaml

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text())


def requirements(lines):
    """Names and ranges of requirements, as a dict; an extra of our own is what it asks for."""
    parsed = [Requirement(line) for line in lines]
    found = {r.name.lower().replace("_", "-"): r.specifier for r in parsed if r.name != "amedlib"}
    for extra in itertools.chain(*(r.extras for r in parsed if r.name == "amedlib")):
        found |= requirements(EXTRAS[extra])
    return found


def test_conda_environment_asks_for_what_pyproject_asks_for():
    asked = requirements([*PROJECT["dependencies"], *itertools.chain(*EXTRAS.values())])
    asked["pytorch"] = asked.pop("torch")  # its name on conda-forge
    asked["python"] = SpecifierSet(PROJECT["requires-python"])
    lines = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    given = requirements(line for line in lines if isinstance(line, str) and line != "pip")
    assert given == asked


@pytest.mark.parametrize(
    "file, extra", [("constraints.txt", "book"), ("constraints-paper.txt", "paper")]
)
def test_constraints_are_exact_and_satisfy_pyproject(file, extra):
    lines = (ROOT / file).read_text().splitlines()
    lines = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    versions = {name: str(spec).removeprefix("==") for name, spec in requirements(lines).items()}
    asked = requirements(PROJECT["dependencies"] + EXTRAS[extra] + EXTRAS["dev"])
    assert asked.keys() <= versions.keys()
    assert not {name: versions[name] for name in asked if versions[name] not in asked[name]}


def test_every_page_and_notebook_is_in_the_contents_and_exists():
    pages = set(parse_toc_yaml(ROOT / "_toc.yml"))
    sources = [*NOTEBOOKS, *(ROOT / "book").glob("*.md")]
    assert pages == {str(path.relative_to(ROOT).with_suffix("")) for path in sources}


def test_every_module_is_in_the_library_reference():
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "amedlib").rglob("*.py")
        if not path.name.startswith("__")
    }
    pages = (ROOT / "book").glob("api*.md")
    listed = [
        name for page in pages for name in re.findall(r"automodule:: (\S+)", page.read_text())
    ]
    assert sorted(listed) == sorted(modules)


def test_notebooks_are_thin_and_carry_no_outputs():
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert not any(cell.outputs or cell.execution_count for cell in code), path.name
        assert any("parameters" in cell.metadata.get("tags", []) for cell in code), path.name
        thin = [cell for cell in code if "show-input" not in cell.metadata.get("tags", [])]
        assert max(len(cell.source.splitlines()) for cell in thin) <= 25, path.name
        assert notebook.metadata.kernelspec.name == "python3", path.name


def test_launch_addresses_lead_to_the_notebooks(tmp_path):
    for path in NOTEBOOKS:
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True)
        target.write_text(path.read_text())
    pages = [f"notebooks/{path.stem}" for path in NOTEBOOKS]
    toc = {"format": "jb-book", "root": "index", "chapters": [{"file": page} for page in pages]}
    (tmp_path / "_toc.yml").write_text(yaml.safe_dump(toc))
    (tmp_path / "_config.yml").write_text((ROOT / "_config.yml").read_text())
    (tmp_path / "index.md").write_text("# Index\n")
    command = [str(Path(sys.executable).with_name("jupyter-book")), "build", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    colab, repository = CONFIG["launch_buttons"]["colab_url"], CONFIG["repository"]
    base = f"{colab}/github/{repository['url'].removeprefix('https://github.com/')}/blob/main/"
    for page in pages:
        html = (tmp_path / f"_build/html/{page}.html").read_text()
        addresses = set(re.findall(rf'href="({colab}[^"]*)"', html))
        assert addresses == {f"{base}{page}.ipynb"}
        assert (ROOT / addresses.pop().removeprefix(base)).is_file()


def test_the_address_in_the_contents_is_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["repository-code"] == CONFIG["repository"]["url"]
    spec = importlib.util.spec_from_file_location("colab", ROOT / "book/colab.py")
    colab = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(colab)
    for path in NOTEBOOKS:  # else: python book/colab.py
        assert colab.prepared(path) == nbformat.read(path, as_version=4), path.name


def sources():
    """All files of the repository, but not what was installed or built in the checkout."""
    passed_over = {".git", ".venv", ".venv-paper", "_build", "__pycache__", "amedlib.egg-info"}
    passed_over |= {".hypothesis"}
    for folder, folders, names in os.walk(ROOT):
        if folder == str(ROOT / "data"):
            folders[:] = set(folders) - {"cache"}  # downloads
        folders[:] = [f for f in folders if f not in passed_over and not f.endswith("_cache")]
        yield from (Path(folder, name) for name in names)


def test_no_file_names_a_path_of_one_machine():
    machine = re.compile(r"(?<![\w.:/-])/(?:home|root|work|tmp|Users|mnt|farm)/\w")
    found = []
    for path in sources():
        if path.suffix == ".ipynb" and path.parent != ROOT / "notebooks":
            continue  # executed by somebody, with that somebody's paths
        found += [
            f"{path.relative_to(ROOT)}: {line.strip()[:100]}"
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
            if machine.search(line)
        ]
    assert not found


@pytest.fixture
def build():
    spec = importlib.util.spec_from_file_location("book_build", ROOT / "book/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_build_shows_how_far_long_work_is(build, tmp_path, capsys, monkeypatch):
    clock = itertools.count(0, 4)  # seconds, four from one look to the next
    monkeypatch.setattr(build.time, "perf_counter", lambda: next(clock))
    lines = ["Executing Cell 3", "To be computed: trainings: 2. About 1 min."]
    lines += [f"\revaluations: {share}%|#| 5/9" for share in range(0, 100, 10)] + ["done"]
    code = f"import sys; print(*{lines}, sep=chr(10)); sys.exit(3)"
    status = build.follow([sys.executable, "-c", code], {}, tmp_path / "log", "table2")
    shown = capsys.readouterr().out.splitlines()
    assert status == 3
    assert shown[0] == "table2: To be computed: trainings: 2. About 1 min."
    assert 2 <= len(shown[1:]) <= 5  # every ten seconds
    assert all(line.startswith("table2: evaluations: ") for line in shown[1:])
    written = (tmp_path / "log").read_text()
    assert all(f"evaluations: {share}%" in written for share in range(0, 100, 10))
    assert "Executing Cell 3" in written and "done" in written


@pytest.mark.parametrize(
    ("page", "finding"),
    [
        ('<script src="_static/x.js"></script> <a href="https://a.org">link</a>', None),
        (
            '<img alt="A curve." src="figure.svg"> <link href="_static/x.css" rel="stylesheet">',
            None,
        ),
        ('<script async="async" src="https://a.org/x.js"></script>', "https://a.org/x.js"),
        ('<link rel="stylesheet" href="//a.org/x.css">', "//a.org/x.css"),
        ('<img alt="a" src="http://a.org/x.png">', "http://a.org/x.png"),
        ('<style>@import "https://a.org/x.css";</style>', "https://a.org/x.css"),
        ("<style>i { background: url(https://a.org/x.woff) }</style>", "https://a.org/x.woff"),
        ('<script>fetch("https://a.org/x.json")</script>', "https://a.org/x.json"),
    ],
)
def test_a_page_that_leaves_the_book_is_found(build, tmp_path, page, finding):
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: index\n")
    (tmp_path / "index.html").write_text(page)
    expected = [f"index.html fetches {finding}"] if finding else []
    assert build.problems(tmp_path, tmp_path / "_toc.yml") == expected


def test_a_page_that_was_not_written_is_found(build, tmp_path):
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: index\nchapters:\n- file: a/b\n")
    (tmp_path / "index.html").write_text("")
    assert build.problems(tmp_path, tmp_path / "_toc.yml") == ["a/b.html was not written"]


@pytest.mark.parametrize(
    ("tag", "right"),
    [
        ('<img alt="FD against NFE." src="a.svg">', True),
        ('<img src="a.svg">', False),
        ('<img alt="" src="a.svg">', False),
        ('<img alt="../_images/a.svg" src="a.svg">', False),
        (f'<img alt="{"0a" * 20}" src="a.svg">', False),
    ],
)
def test_a_picture_without_words_is_found(build, tmp_path, tag, right):
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: index\n")
    (tmp_path / "index.html").write_text(f"<p>{tag}</p>")
    found = build.problems(tmp_path, tmp_path / "_toc.yml")
    assert found == ([] if right else [f"index.html has a picture without words: {tag}"])


def test_pictures_get_the_words_of_their_notebook(build, tmp_path):
    (tmp_path / "notebooks").mkdir()
    svg = "<svg>\n</svg>\n"
    output = nbformat.v4.new_output("display_data", {"image/svg+xml": svg, "text/plain": "A < B."})
    cell = nbformat.v4.new_code_cell(outputs=[output])
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "notebooks/a.ipynb")
    # What MyST-NB names a picture by.
    name = f"_images/{hashlib.sha256(svg.strip().encode()).hexdigest()}.svg"
    page = tmp_path / "index.html"
    page.write_text(f'<img alt="{name}" src="{name}"><img alt="_images/{"0" * 64}.svg">')
    build.name_pictures(tmp_path, tmp_path)
    first, second = re.findall('alt="([^"]*)"', page.read_text())
    assert first == "A &lt; B." and second == "0" * 64


def test_cells_carry_the_headings_that_they_stand_under(build):
    frame = pd.DataFrame(
        [["1.0 ± 0.1", 2.0], ["3.0 ± 0.1", 4.0]],
        index=pd.MultiIndex.from_product([["iPNDM"], ["✗", "✓"]], names=[None, "AFS"]),
        columns=pd.MultiIndex.from_product([["NFE 3"], ["FD", "paper"]]),
    )
    html = frame.style.to_html()
    labelled = re.sub("<table.*</table>", build._labelled, html, flags=re.DOTALL)
    table = BeautifulSoup(labelled, "html.parser").table
    assert [td["data-label"] for td in table.find_all("td")] == ["NFE 3, FD", "NFE 3, paper"] * 2
    assert [th.get("data-label") for th in table.tbody.find_all("th")] == [None, "AFS", "AFS"]
    assert "1.0 ±\N{NO-BREAK SPACE}0.1" in table.get_text() and "stack" not in table.get(
        "class", []
    )
    wide = (
        pd.concat([frame] * 4, axis=1, keys=list("abcd"))
        .droplevel(0, axis=1)
        .T.reset_index(drop=True)
    )
    labelled = re.sub("<table.*</table>", build._labelled, wide.T.to_html(), flags=re.DOTALL)
    assert "stack" in BeautifulSoup(labelled, "html.parser").table.get("class", [])


def test_a_page_that_is_too_large_is_found(build, tmp_path):
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: index\n")
    (tmp_path / "index.html").write_text(" " * 3_000_000)
    assert build.problems(tmp_path, tmp_path / "_toc.yml") == []
    (tmp_path / "index.html").write_text(" " * 3_100_000)
    found = build.problems(tmp_path, tmp_path / "_toc.yml")
    assert found == ["index.html has 3.1 MB, more than 3"]


# --- the examples of the how-to ------------------------------------------------------------------


def example(name):
    """The code of an example, as a reader copies it."""
    cells = nbformat.read(ROOT / "notebooks/howto.ipynb", as_version=4).cells
    (found,) = [cell for cell in cells if cell.id == name]
    assert found.metadata.tags == ["show-input"]
    assert len([line for line in found.source.splitlines() if line.strip()]) < 30
    return found.source


def run_code(code, folder):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_the_howto_runs_as_it_stands(tmp_path):
    *_, ratio, sampled = run_code(example("function"), tmp_path)
    low, high = ast.literal_eval(ratio)[1:]
    assert low < high < 1  # better than the best untrained sampler
    assert sampled.split()[0] == "5"
    assert (tmp_path / "function.safetensors").is_file()


@pytest.mark.parametrize("name", ["diffusers", "flow"])
def test_the_examples_that_train_a_model_run(tmp_path, name):
    """With three steps of the model's own training and one pass of the sampler's."""
    code, steps = re.subn(r"trange\(\d+\)", "trange(3)", example(name))
    code, trainings = re.subn(r'(\.safetensors")\)\ntrained', r"\1, evaluations=1)\ntrained", code)
    assert steps == trainings == 1
    check = """
noise = torch.randn(8, *denoiser.shape, generator=torch.manual_seed(0))
ours = (trained.sample(denoiser, noise).x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
print(abs(ours.numpy() - out.images).max())"""
    shown = run_code(code + check * (name == "diffusers"), tmp_path)
    assert any(line.startswith("trained ") for line in shown)
    if name == "diffusers":
        assert float(shown[-1]) < 1e-5  # its pipeline draws what the sampler does


def test_code_that_is_the_result_stays_visible(build, tmp_path):
    cells = [
        nbformat.v4.new_code_cell("1", metadata={"tags": tags} if tags else {})
        for tags in ([], ["show-input"], ["remove-input"])
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "a.ipynb")
    build.fold_code(tmp_path / "a.ipynb")
    found = nbformat.read(tmp_path / "a.ipynb", as_version=4).cells
    tags = [cell.metadata.tags for cell in found]
    assert tags == [["hide-input"], ["show-input"], ["remove-input"]]
