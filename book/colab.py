"""Give every notebook its badge and its first cell for Colab: python book/colab.py

The repository's address is set in _config.yml alone; this brings a change to the notebooks.
"""

from pathlib import Path

import nbformat
import yaml

ROOT = Path(__file__).resolve().parents[1]
CELL = """\
# On Colab: fetch the project, install it beside the preinstalled PyTorch, look for a GPU.
# Elsewhere: nothing.
import sys

if "google.colab" in sys.modules:
    %cd /content
    ![ -d {folder} ] || git clone --quiet --depth 1 {address}.git
    %pip install --quiet --editable "{folder}[paper]"
    %cd {folder}
    sys.path.insert(0, ".")
    !nvidia-smi --query-gpu=name --format=csv,noheader || echo "no GPU: Runtime > Change runtime"
"""


def repository() -> tuple[str, str]:
    """Address and branch of the repository."""
    found = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]
    return found["url"], found["branch"]


def badge(name: str) -> str:
    """The line under a notebook's title."""
    address, branch = repository()
    opened = address.replace("https://github.com", "https://colab.research.google.com/github")
    return f"[![Open in Colab](../book/static/colab.svg)]({opened}/blob/{branch}/notebooks/{name})"


def prepared(path: Path) -> nbformat.NotebookNode:
    """A notebook as it should be: title, badge, cell for Colab, the rest."""
    notebook = nbformat.read(path, as_version=4)
    title, colab, *_ = notebook.cells
    heading, *text = (line for line in title.source.split("\n") if "colab.svg" not in line)
    text = "\n".join(text).strip()
    title.source = "\n\n".join([heading, badge(path.name), *([text] if text else [])])
    address, _ = repository()
    source = CELL.format(address=address, folder=address.rpartition("/")[2]).rstrip()
    if "google.colab" in colab.source:
        colab.source = source
    else:
        cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["remove-cell"]})
        notebook.cells.insert(1, cell)
    return notebook


if __name__ == "__main__":
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        nbformat.write(prepared(path), path)
