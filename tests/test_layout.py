"""Imports go one way, and the method brings none of the study."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

LIBRARY = Path(__file__).parents[1] / "amedlib"
WINGS = ("method", "denoisers", "datasets", "study")
# What `import amedlib` must not load.
HEAVY = {"pandas", "matplotlib", "sklearn", "requests", "papermill", "dask", "IPython", "diffusers"}


def wing(module: str) -> str:
    """The wing of a module of the library, by its dotted name."""
    second = [*module.split("."), ""][1]
    return second if second in WINGS else "method"


def imported(path: Path) -> set[str]:
    """The library's modules that a file imports at its top level or in a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if node.module == "amedlib" else {node.module, *names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("relative")
    return {name for name in found if name == "relative" or name.split(".")[0] == "amedlib"}


def test_imports_go_one_way():
    seen = 0
    for path in LIBRARY.rglob("*.py"):
        module = ".".join(path.relative_to(LIBRARY.parent).with_suffix("").parts)
        if module == "amedlib.__init__":  # offers what it loads later
            continue
        for name in imported(path):
            assert name != "relative", f"{module} has a relative import"
            assert WINGS.index(wing(name)) <= WINGS.index(wing(module)), f"{module} uses {name}"
            seen += 1
    assert seen > 100


def test_modules_import_one_another_in_no_circle():
    graph = {}
    for path in LIBRARY.rglob("*.py"):
        module = ".".join(path.relative_to(LIBRARY.parent).with_suffix("").parts)
        graph[module] = imported(path)

    TopologicalSorter(
        {module: uses & graph.keys() for module, uses in graph.items()}
    ).prepare()  # raises where there is a circle


def loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(found.stdout.split())


def test_the_method_loads_little():
    assert not loaded_by("import amedlib") & HEAVY
    # Sampling with it as well.
    assert not loaded_by("import amedlib; amedlib.denoisers.edm; amedlib.denoisers.exact") & HEAVY
    assert "pandas" in loaded_by("import amedlib; amedlib.run_all")


def test_public_names_are_there():
    import amedlib

    for name in amedlib.__all__:
        assert getattr(amedlib, name) is not None
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        amedlib.nothing_of_this_name  # noqa: B018
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        amedlib.denoisers.nothing_of_this_name  # noqa: B018
