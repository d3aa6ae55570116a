"""The library as it is installed, from a wheel, beside a clone that is not on its path."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the unpacked wheel, as pip makes it from the sources that git tracks."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    source = folder / "source"
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if name.startswith(("amedlib/", "data/models", "data/paper")) or "/" not in name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([*pip, *offline, "--wheel-dir", str(folder), str(source)], check=True)
    (wheel,) = folder.glob("amedlib-*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def run(site, tmp_path, code):
    """The output of ``code`` where the wheel is found before the clone."""
    blocked = "import sys\n" + "\n".join(
        f"sys.modules[{name!r}] = None"
        for name in ("pandas", "sklearn", "requests", "tenacity", "matplotlib", "papermill")
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{blocked}\n{code}"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_embedded_model_is_sampled_with_the_methods_own_dependencies(site, tmp_path):
    found = run(
        site,
        tmp_path,
        "import amedlib\n"
        "data = amedlib.load_dataset('digits')\n"
        "latents = amedlib.make_latents(range(3), data.shape)\n"
        "times, solver = amedlib.make_schedule(num_steps=4), amedlib.make_solver('ipndm')\n"
        "out = amedlib.sample(data.denoiser, latents, times, solver)\n"
        "print(amedlib.__file__, out.nfe, float(out.x.std()))",
    )
    place, nfe, spread = found.split()
    assert Path(place).is_relative_to(site) and nfe == "3" and 0.1 < float(spread) < 2


def test_a_type_checker_is_told_that_there_are_types(site):
    assert (site / "amedlib/py.typed").is_file()


@pytest.mark.parametrize(
    "code, needs",
    [
        ("amedlib.run_all", "pandas"),
        ("amedlib.load_dataset('digits').reference", "sklearn"),
    ],
)
def test_what_needs_the_study_says_how_to_install_it(site, tmp_path, code, needs):
    found = run(
        site,
        tmp_path,
        f"import amedlib\ntry:\n    {code}\nexcept ImportError as error:\n    print(error)",
    )
    assert needs in found and "pip install 'amedlib[study]'" in found


def test_what_a_wheel_lacks_is_not_made_by_make(site, tmp_path):
    found = run(
        site,
        tmp_path,
        "import amedlib\ntry:\n    amedlib.load_dataset('cifar10_small')\n"
        "except ValueError as error:\n    print(error)",
    )
    assert found.startswith(f"The weights file {site}/amedlib/data/models/cifar10_edm.safetensors")
    assert "copy it there from the folder data/models" in found and "make" not in found
