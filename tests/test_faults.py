"""Whatever dies, nothing finished is lost: real processes, real signals, real failing writes."""

import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import dask
import distributed  # noqa: F401 - its settings must be there before they are changed for a while
import faulty
import nbformat
import papermill
import pytest
import torch
from nbclient.exceptions import DeadKernelError

from amedlib.study import execute, run
from amedlib.study.execute import run_all
from amedlib.study.store import load_result, predictor_path, result_path, solution_path

# In one process: they share what they compare with.
pytestmark = pytest.mark.xdist_group("faults")

# Processes are forked from one that has imported everything, so that a new one takes no time.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["amedlib.study.execute"])


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    folders = [faulty.HERE, *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(folders))


def start(folder, **how):
    process = CONTEXT.Process(target=faulty.compute, args=(folder,), kwargs=how)
    process.start()
    return process


def finish(folder, **how):
    """Run to its end; returns the exit status."""
    process = start(folder, **how)
    process.join()
    return process.exitcode


def numbers(folder):
    """Every stored result without what differs between any two runs."""
    found = {}
    for path in Path(folder).rglob("*.json"):
        content = json.loads(path.read_text())
        assert content.pop("seconds") > 0 and content.pop("created")
        found[path.name] = content
    return found


def finished(folder, log):
    """The blocks, among those begun, that are files or part of a stored result."""
    kept = {
        f"{p.parent.name.removesuffix('.blocks.partial')}/{p.name.split('-')[0]}"
        for p in Path(folder).rglob("*.blocks.partial/*.safetensors")
        if not p.name.startswith(".")
    }
    stored = {path.stem for path in Path(folder).rglob("*.json")}
    return {b for b in faulty.begun(log) if b in kept or b.split("/")[0] in stored}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The study as it is when nothing happens."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", faulty.HERE)
        assert finish(folder / "first") == 0  # starts the server that forks
        assert finish(folder / "second") == 0
    expected = numbers(folder / "first")
    assert len(expected) == 14 and numbers(folder / "second") == expected
    return folder / "first", expected


# --- killed ---------------------------------------------------------------------------------------


def test_killed_at_many_moments_and_nothing_is_computed_twice(undisturbed, tmp_path):
    """At the start, in the first and later blocks, where training and search are, and at the end.

    Each attempt goes on from the one before; 40 blocks are begun in all, and those that a kill cut
    off once more.
    """
    _, expected = undisturbed
    folder, log = tmp_path / "results", tmp_path / "log"
    for blocks in (0, 1, 4, 11, 12, 21, 30, 36, None):
        before, count = finished(folder, log), len(faulty.begun(log))
        process = start(folder, environment={"FAULTS_LOG": str(log)})
        if blocks is not None:
            while len(faulty.begun(log)) < blocks:
                assert process.is_alive()
                time.sleep(0.002)
            process.kill()
        process.join()
        assert process.exitcode == (0 if blocks is None else -signal.SIGKILL)
        assert before.isdisjoint(faulty.begun(log)[count:])
    assert numbers(folder) == expected
    assert not list(folder.rglob("*.partial"))


def test_a_killed_notebook_goes_on(undisturbed, tmp_path):
    _, expected = undisturbed
    folder, log = tmp_path / "results", tmp_path / "log"
    code = (
        "import os, faulty\n"
        f"os.environ |= {{'FAULTS_LOG': '{log}', 'FAULTS_SLOW': slow}}\n"
        "faulty.install()\n"
        f"faulty.run_all(faulty.RUNS, '{folder}', 'cpu', progress=False)"
    )
    parameters = nbformat.v4.new_code_cell("slow = '0'", metadata={"tags": ["parameters"]})
    notebook = nbformat.v4.new_notebook(
        cells=[parameters, nbformat.v4.new_code_cell(code)],
        metadata={"language_info": {"name": "python"}},
    )
    nbformat.write(notebook, tmp_path / "study.ipynb")

    def kill():
        while len(faulty.begun(log)) < 4:
            time.sleep(0.02)
        os.kill(int(log.read_text().split()[-1]), signal.SIGKILL)

    def execute(slow):
        given = [str(tmp_path / "study.ipynb"), str(tmp_path / "out.ipynb"), {"slow": slow}]
        papermill.execute_notebook(*given, kernel_name="python3", progress_bar=False)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(DeadKernelError):
        execute("0.3")
    killer.join()
    before, count = finished(folder, log), len(faulty.begun(log))
    assert len(before) >= 3 and len(numbers(folder)) < len(expected)
    execute("0")
    assert before.isdisjoint(faulty.begun(log)[count:])
    assert numbers(folder) == expected


@pytest.fixture
def workers(monkeypatch, tmp_path):
    """Workers of a cluster are given the toy data set; the log of their blocks."""
    monkeypatch.setenv("FAULTS_LOG", str(tmp_path / "log"))
    preload = {"distributed.worker.preload": [f"{faulty.HERE}/faulty.py"]}
    with dask.config.set(preload), faulty.installed():
        yield tmp_path / "log"


def test_workers_that_die_lose_no_number(undisturbed, workers, monkeypatch, tmp_path):
    """One is killed in the middle of a block; and a Run kills all who try it."""
    _, expected = undisturbed
    monkeypatch.setenv("FAULTS_SLOW", "0.2")
    monkeypatch.setenv("FAULTS_DEADLY", "6")
    deadly = run.Run(solver="euler", nfe=6, samples=100)
    killed = []

    def kill():
        while not faulty.begun(workers):
            time.sleep(0.02)
        block, pid = workers.read_text().splitlines()[-1].split()
        os.kill(int(pid), signal.SIGKILL)
        killed.append(block)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(RuntimeError) as caught:
        run_all([*faulty.RUNS, deadly], tmp_path / "a", "cpu", progress=False, cluster=2)
    killer.join()
    sentence = str(caught.value)
    assert sentence.startswith("1 of 5 computations failed, all others are stored: digits, euler, ")
    assert "NFE 6" in sentence and "the process that computes it dies, every time" in sentence
    assert "\n" not in sentence
    assert numbers(tmp_path / "a") == expected
    marks = list((tmp_path / "a").rglob("failed.txt"))
    assert [mark.parent.name for mark in marks] == [f"{result_path(deadly).stem}.blocks.partial"]
    # It was not tried block by block: by both workers at once, and the first block once more.
    assert 2 <= sum(result_path(deadly).stem in b for b in faulty.begun(workers)) <= 3
    # One block was begun twice: the one that was being computed when its worker was killed.
    of_others = [b for b in faulty.begun(workers) if result_path(deadly).stem not in b]
    assert sorted(of_others) == sorted([*set(of_others), *killed]) and len(set(of_others)) == 40


# --- disks ----------------------------------------------------------------------------------------


def test_a_full_disk_is_named_and_harms_nothing(undisturbed, tmp_path):
    _, expected = undisturbed
    folder, why = tmp_path / "results", tmp_path / "why"
    assert finish(folder, file_size=600, environment={"FAULTS_WHY": str(why)}) == 1
    sentence = why.read_text()
    assert "4 of 4 computations failed" in sentence and "File too large" in sentence
    assert "\n" not in sentence
    assert not numbers(folder)
    left = [p for p in folder.rglob("*") if p.is_file() and p.name != "failed.txt"]
    assert not [p for p in left if p.name.startswith(".")]  # no half of a file
    assert finish(folder) == 0
    assert numbers(folder) == expected
    assert not list(folder.rglob("*.partial"))


@pytest.fixture
def readable():
    """A folder that every user can reach."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_a_store_that_cannot_be_written_is_read_all_the_same(undisturbed, readable, tmp_path):
    original, _ = undisturbed
    shutil.copytree(original, readable / "results")
    why = readable / "why"
    why.touch()
    why.chmod(0o666)
    how = {"environment": {"FAULTS_WHY": str(why)}}
    how["user"] = 65534 if os.geteuid() == 0 else None  # root may write everywhere
    folders = [readable / "results", readable / "results" / "digits"]
    for folder in folders:
        folder.chmod(0o555)
    try:
        assert finish(readable / "results", **how) == 0
        more = [replace(faulty.RUNS[0], nfe=5)]
        assert finish(readable / "results", runs=more, **how) == 1
        assert why.read_text().startswith("results_dir must be a folder that can be written; ")
    finally:
        for folder in folders:
            folder.chmod(0o755)


# --- others ---------------------------------------------------------------------------------------


def test_two_studies_in_one_store(undisturbed, tmp_path):
    _, expected = undisturbed
    both = [start(tmp_path / "results") for _ in range(2)]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert numbers(tmp_path / "results") == expected
    assert not list((tmp_path / "results").rglob("*.partial"))


def test_another_study_tidies_up_while_a_block_is_written(undisturbed, monkeypatch, tmp_path):
    """It has finished the Run, and takes the folder away in which the block is to be kept."""
    _, expected = undisturbed
    monkeypatch.setenv("FAULTS_LOG", str(tmp_path / "log"))
    make, taken = tempfile.mkstemp, []

    def late(*args, dir, **how):
        if dir.suffix == ".partial" and dir not in taken:
            taken.append(dir)
            shutil.rmtree(dir)
        return make(*args, dir=dir, **how)

    monkeypatch.setattr(tempfile, "mkstemp", late)
    with faulty.installed():
        run_all(faulty.RUNS, tmp_path / "results", "cpu", progress=False)
    assert len(taken) == 5  # of the solution, of three sets of samples, and of their r
    assert numbers(tmp_path / "results") == expected


def test_a_spoilt_predictor_or_solution_is_made_again(undisturbed, tmp_path):
    original, expected = undisturbed
    folder = tmp_path / "results"
    shutil.copytree(original, folder)
    for path in folder.rglob("*.json"):
        path.unlink()
    with faulty.installed():
        shared = [predictor_path(faulty.RUNS[1], folder), solution_path(faulty.RUNS[1], folder)]
    for spoil in (lambda old: old[:-9], lambda old: b"<html>"):
        for path in shared:
            path.write_bytes(spoil(path.read_bytes()))
        with faulty.installed(), pytest.warns(UserWarning, match="was set aside as") as warned:
            run_all(faulty.RUNS[:2], folder, "cpu", progress=False)
        assert len(warned) == 2
        assert {path.with_suffix(".corrupt").is_file() for path in shared} == {True}
        found = numbers(folder)
        assert found and all(expected[name] == found[name] for name in found)
        for path in folder.rglob("*.json"):
            path.unlink()


def test_the_age_of_files_decides_nothing(undisturbed, tmp_path):
    """As after a clock that jumped: files are from 1970 and from the next century."""
    _, expected = undisturbed
    folder, log = tmp_path / "results", tmp_path / "log"
    how = {"environment": {"FAULTS_LOG": str(log)}}
    process = start(folder, **how)
    while len(faulty.begun(log)) < 14:
        time.sleep(0.005)
    process.kill()
    process.join()
    what = faulty.RUNS[1]
    with faulty.installed():
        shared = [predictor_path(what, folder), solution_path(what, folder)]
    before, count = finished(folder, log), len(faulty.begun(log))
    assert len(before) >= 13
    for i, path in enumerate(p for p in folder.rglob("*") if p.is_file()):
        os.utime(path, (0, 0) if i % 2 else (2**32, 2**32))
    stamps = [path.stat().st_mtime for path in shared]
    assert finish(folder, **how) == 0
    assert [path.stat().st_mtime for path in shared] == stamps
    assert before.isdisjoint(faulty.begun(log)[count:])
    assert numbers(folder) == expected  # where seconds are positive


def test_nan_is_named_with_its_step_and_no_number_is_shown(monkeypatch, tmp_path):
    def breaks_down(x, t, labels=None):
        return torch.where(torch.as_tensor(t) < 1, torch.nan, x / (1 + 4 * t**2))

    data = faulty.toy_dataset(breaks_down)
    monkeypatch.setattr(execute, "load_dataset", lambda name, device="cpu": data)
    coarse = run.Run("fd", "digits_uncentred", nfe=2, samples=60)  # t = 80, 2.5, 0.002
    fine = replace(coarse, nfe=4)  # t = 80, 17.5, 2.5, 0.17, 0.002
    with pytest.raises(RuntimeError) as caught:
        run_all([fine, coarse], tmp_path, "cpu", progress=False)
    sentence = str(caught.value)
    assert sentence.startswith("1 of 2 computations failed, all others are stored: ")
    assert "NFE 4" in sentence and "NaN or inf arose in step 4 of 4, from t = 0.1698" in sentence
    assert load_result(coarse, tmp_path) and not load_result(fine, tmp_path)
    (mark,) = tmp_path.rglob("failed.txt")
    assert "in step 4 of 4" in mark.read_text() and result_path(fine).stem in mark.parent.name
    # Once that is repaired, the mark is gone.
    data = faulty.toy_dataset(lambda x, t, labels=None: x / (1 + 4 * t**2))
    assert run_all([fine], tmp_path, "cpu", progress=False)["value"].notna().all()
    assert not list(tmp_path.rglob("failed.txt"))
