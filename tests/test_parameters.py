"""Parameters of notebooks: every notebook, every parameter, refused before work starts."""

import ast
import math
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import papermill
import pytest
from papermill.exceptions import PapermillExecutionError

from amedlib.datasets.entries import DATASETS
from amedlib.study import page
from amedlib.study.parameters import PARAMETERS, check
from amedlib.study.store import RESULTS

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def cells(path, tag=None):
    """The code of a notebook's cells after that for Colab, or of those with a tag."""
    found = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    return [
        cell.source
        for cell in found
        if (tag in cell.metadata.get("tags", []) if tag else "google.colab" not in cell.source)
    ]


def defaults(path):
    """A notebook's parameters as its cell states them."""
    (source,) = cells(path, "parameters")
    namespace = {}
    exec(source, {}, namespace)
    return namespace


def begins(path):
    """What a notebook calls ``page.begin`` with: the names, and the metrics."""
    calls = [
        node
        for source in cells(path)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "page.begin"
    ]
    (call,) = calls
    assert ast.unparse(call.args[0]) == "globals()"
    names = ast.literal_eval(call.args[1]) if isinstance(call.args[1], ast.Constant) else None
    if names is None:  # a variable, assigned just before
        (source,) = (source for source in cells(path) if "page.begin" in source)
        names = re.search(r'parameters = "(.*)"', source).group(1)
    return names, {each.arg: ast.literal_eval(each.value) for each in call.keywords}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_begins_by_checking_all_of_its_parameters(path):
    stated, (names, metrics) = defaults(path), begins(path)
    assert names.split() == [name + "?" * (value is None) for name, value in stated.items()]
    assert stated.keys() <= PARAMETERS.keys()
    # Before it anything is imported, but nothing is done.
    parameters, *rest = cells(path)
    assert parameters == cells(path, "parameters")[0]
    statements = [node for source in rest for node in ast.parse(source).body]
    first = next(node for node in statements if not isinstance(node, ast.Import | ast.ImportFrom))
    if ast.unparse(first).startswith("parameters ="):
        first = statements[statements.index(first) + 1]
    assert "page.begin(" in ast.unparse(first)
    data, how = page.begin(dict(stated), names, **metrics)
    assert (data is None) == (stated.get("dataset") is None)
    assert how == {
        name: stated[name] or (RESULTS if name == "results_dir" else stated[name])
        for name in ("results_dir", "device", "cluster", "train")
        if name in stated
    }


# No parameter may be any of these, but for those that are named.
WRONG = {
    "nothing": (None, {"cluster"}),
    "an empty text": ("", set()),
    "a text": ("nonsense", {"results_dir"}),
    "a number as text": ("5", {"results_dir"}),
    "a list as text": ("[3, 5]", {"results_dir"}),
    "false as text": ("false", {"results_dir"}),
    "true": (True, {"compute", "train", "every_schedule"}),
    "an empty list": ([], set()),
    "a list of nothing": ([None], set()),
    "a list in a list": ([[3]], set()),
    "a list of texts": (["3", "5"], set()),
    "one entry twice": ([3, 3], {"bottleneck_size"}),
    "a list with zero": ([0, -1], set()),
    "three numbers": ([3, 5, 7], {"nfes", "seeds", "dimensions"}),
    "an empty dictionary": ({}, set()),
    "a dictionary": ({"a": 1}, set()),
    "a dictionary with a text": ({"cifar10": "fast"}, set()),
    "zero": (0, {"seed", "seeds", "scale_dir", "scale_time"}),
    "a negative number": (-1, set()),
    "half a number": (1.5, {"s", "t", "teraflops"}),
    "not a number": (math.nan, set()),
    "without end": (math.inf, set()),
    "huge": (10**30, {"cluster", "s", "t", "teraflops"}),
    "an object": (object(), set()),
}
RIGHT = {
    "dataset": ["cifar10_small"],
    "n_samples": [20, np.int64(5000)],
    "nfes": [5, [3], [3, 5], (3, 5), range(3, 6), np.arange(3, 5)],
    "seeds": [0, [0, 1, 2], np.int64(3)],
    "device": ["cpu"],
    "cluster": ["local", 4, "tcp://host:8786"],
    "results_dir": ["elsewhere"],
    "n_images": [1],
    "compute": [True, False],
    "train": [True, False, np.bool_(True)],
    "every_schedule": [True, False],
    "nfe": [6],
    "other_nfe": [6],
    "seed": [0, 2**32 - 1],
    "n_checked": [1],
    "step": [1, 5],
    "bottleneck_size": [[4, 2], (8, 8)],
    "scale_dir": [0, 0.5],
    "scale_time": [0.0],
    "teraflops": [30, 0.5],
    "images_per_second": [{"cifar10": 1000, "ffhq": 0.5}],
    "s": [0.002],
    "t": [80],
    "dimensions": [64, [1, 4]],
    "samples": [2],
    "trajectories": [2],
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_wrong_value_is_refused_in_one_sentence(name):
    for value, allowed in WRONG.values():
        if name in allowed:
            check({name: value}, name)
            continue
        with pytest.raises(ValueError, match=f"^{name} must be ") as caught:
            check({name: value}, name)
        sentence = str(caught.value)
        assert sentence.endswith(" was given.") and "\n" not in sentence
    check({name: None}, f"{name}?")  # where the notebook says what that means


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_right_value_is_taken(name):
    for value in RIGHT[name]:
        check({name: value}, name)


def test_parameters_are_put_as_pages_use_them():
    given = {"nfes": 5, "seeds": np.int64(1), "results_dir": "~/there", "dataset": "digits"}
    given |= {"n_samples": None, "device": None, "cluster": None}
    check(given, "nfes seeds results_dir dataset n_samples? device? cluster?")
    assert given["nfes"] == [5] and given["seeds"] == [1]
    assert given["results_dir"] == Path.home() / "there"
    assert given["n_samples"] == DATASETS["digits"].samples == 5000
    assert given["device"] is given["cluster"] is None


def test_a_device_of_workers_need_not_be_here(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    check({"device": "cuda:99", "cluster": "tcp://host:8786"}, "device? cluster?")
    with pytest.raises(ValueError, match="device must be one that is here: 'cpu'"):
        check({"device": "cuda:99", "cluster": None}, "device? cluster?")


def test_a_file_is_no_results_dir(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="results_dir must be a folder"):
        check({"results_dir": str(tmp_path / "file")}, "results_dir?")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_data_set_without_what_a_page_measures_is_refused(path):
    names, how = begins(path)
    for entry in DATASETS.values() if how else ():
        given = defaults(path) | {"dataset": entry.name}
        if {*how["metrics"]} <= {*entry.metrics}:
            page.begin(given, names, **how)
        else:
            with pytest.raises(ValueError, match=f"dataset must be one with .*{entry.name}"):
                page.begin(given, names, **how)


def test_an_unknown_parameter_is_refused():
    stated = "nfes = None\nseeds = [0]"
    names = "nfes? seeds"
    for injected, unknown in (
        ('# Parameters\nnfe = 5\nseeds = "a"\n', "nfe"),
        ("# Parameters\nseeds = [1]\nPAPERMILL_INPUT_PATH = 'a'\nsede = 1\n", "sede"),
    ):
        given = {"nfes": None, "seeds": [0], "In": ["", stated, injected, "page.begin(...)"]}
        message = f"a parameter of this notebook must be one of 'nfes', 'seeds'; '{unknown}' was"
        with pytest.raises(ValueError, match=message):
            check(given, names)
    # What cells by hand assign is no parameter.
    given = {"nfes": None, "seeds": [0], "In": ["", "other = 1", stated, "# Parameters\nnfes = 5"]}
    check(given, names)


@pytest.mark.parametrize(
    "name, given, sentence",
    [
        ("table2", {"nfe": 5}, "a parameter of this notebook must be one of 'dataset', 'n_s"),
        ("figure3", {"train": "false"}, "train must be True or False; 'false' was given."),
    ],
)
def test_papermill_stops_before_work_starts(name, given, sentence, tmp_path):
    source = next(path for path in NOTEBOOKS if path.stem == name)
    how = {"kernel_name": "python3", "progress_bar": False, "cwd": source.parent}
    with pytest.raises(PapermillExecutionError) as caught:
        papermill.execute_notebook(source, tmp_path / "out.ipynb", given, **how)
    assert caught.value.ename == "ValueError" and caught.value.evalue.startswith(sentence)
    executed = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    shown = [
        o
        for c in executed.cells
        if "papermill-error-cell-tag" not in c.metadata.get("tags", [])
        for o in c.get("outputs", [])
    ]
    assert [output.output_type for output in shown] == ["error"]


def test_how_papermill_hands_values_over(tmp_path):
    """On its command line only True and False are booleans, and a list needs YAML."""
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("a = b = c = None", metadata={"tags": ["parameters"]})],
        metadata={"kernelspec": {"name": "python3", "display_name": "", "language": "python"}},
    )
    nbformat.write(notebook, tmp_path / "in.ipynb")
    command = [sys.executable, "-m", "papermill", str(tmp_path / "in.ipynb")]
    command += [
        str(tmp_path / "out.ipynb"),
        "--prepare-only",
        "-p",
        "a",
        "false",
        "-p",
        "b",
        "True",
    ]
    subprocess.run([*command, "-y", "c: [3, 5]"], check=True, capture_output=True)
    injected = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells[1].source
    namespace = {}
    exec(injected, namespace)
    assert injected.startswith("# Parameters\n")
    assert (namespace["a"], namespace["b"], namespace["c"]) == ("false", True, [3, 5])
