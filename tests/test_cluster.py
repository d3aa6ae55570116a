"""The order of tasks, and that who does them changes no bit of a result."""

import os
import socket
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import dask
import faulty
import pytest
import torch

from amedlib.study import cluster, execute, store
from amedlib.study.cluster import Task, Workers, check_cluster, connect, do
from amedlib.study.execute import run_all

# --- tasks ----------------------------------------------------------------------------------------


def here(function, *arguments):
    return [function(*arguments)]


def outcome(tasks, executor=None):
    """The order in which tasks were done, and those that failed."""
    done, ticks = [], []

    def act(key, breaks):
        done.append(key)
        if breaks:
            raise OSError(f"{key} is broken")

    given = {
        key: Task(act, (key, key in tasks.get("broken", ())), needs, priority)
        for key, (needs, priority) in tasks["of"].items()
    }
    with connect(executor) as workers:
        failed = do(given, workers, ticks.append)
    assert sorted(ticks) == sorted(set(done) - set(tasks.get("broken", ())))
    return done, {key: str(error) for key, error in failed.items()}


DIAMOND = {
    "end": (("left", "right"), 1),
    "other": ((), 0),
    "left": (("start",), 0),
    "right": (("start", "was done before"), 0),
    "start": ((), 1),
}


def test_what_a_task_needs_goes_before_it():
    assert outcome({"of": DIAMOND}) == (["start", "other", "left", "right", "end"], {})
    with ThreadPoolExecutor(3) as executor:
        done, failed = outcome({"of": DIAMOND}, executor)
    assert sorted(done) == sorted(DIAMOND) and not failed
    place = {key: i for i, key in enumerate(done)}
    assert place["start"] < min(place["left"], place["right"]) and place["end"] == max(
        place["left"], place["right"], place["end"]
    )


def test_a_failure_takes_along_what_needs_it_and_what_nothing_else_needs():
    done, failed = outcome({"of": DIAMOND, "broken": ["left"]})
    assert done == ["start", "other", "left"]  # right would be for nothing
    assert failed == dict.fromkeys(["left", "end"], "left is broken")
    done, failed = outcome({"of": DIAMOND, "broken": ["start"]})
    assert set(done) == {"start", "other"} and set(failed) == {"start", "left", "right", "end"}


def test_what_was_cancelled_has_failed():
    future = Future()
    future.cancel()
    failed = do({"a": Task(print)}, Workers(lambda task: future, here), print)
    assert "cancelled" in str(failed["a"])


@pytest.mark.parametrize("bad", ["nowhere", "", 0, -1, True, 1.5, "host:8786", ["local"]])
def test_what_is_no_cluster_is_refused(bad, tmp_path):
    with pytest.raises(ValueError, match="cluster must be None .* was given"):
        check_cluster(bad)
    with pytest.raises(ValueError, match="cluster must be None"):
        run_all([], tmp_path, cluster=bad)


def test_an_address_where_nobody_answers(monkeypatch):
    monkeypatch.setattr(cluster, "PATIENCE", "1s")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ValueError, match=f"nothing that is one answered at '{address}'"):
        with connect(address):
            pass


def test_every_worker_gets_a_gpu_of_its_own(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [cluster._card(i) for i in range(3)] == ["0", "1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5a")
    assert [cluster._card(i) for i in range(2)] == ["4", "GPU-5a"]


def test_a_worker_that_cannot_share_says_why(tmp_path):
    code = store.code_fingerprint()
    (tmp_path / "mark").touch()
    assert execute._hindrance(tmp_path, "mark", code) is None
    for folder, mark in ((tmp_path, "another"), (tmp_path / "absent", "")):
        sentence = execute._hindrance(folder, mark, code)
        assert sentence.startswith("results_dir must be a folder that all machines see; ")
    assert "has the fingerprint" in execute._hindrance(tmp_path, "mark", "other code")


# --- a study --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address():
    """A Dask cluster of two workers with the toy data set."""
    with dask.config.set({"distributed.worker.preload": [f"{faulty.HERE}/faulty.py"]}):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join([faulty.HERE, os.getcwd()]))
            with cluster.local_cluster(2, "cpu") as there:
                yield there.scheduler_address


@pytest.fixture
def toy():
    with faulty.installed():
        yield


def bits(frame):
    return [
        replace(result, seconds=0.0, created="", device="") for result in frame["result"].tolist()
    ]


def test_where_it_executes_changes_no_bit(toy, address, tmp_path):
    torch.set_num_threads(2)
    try:
        serial = run_all(faulty.RUNS, tmp_path / "here", "cpu", progress=False)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert (serial["seconds"] > 0).all()
    with ThreadPoolExecutor(3) as threads:
        for name, how in {"a": {"cluster": threads}, "b": {"cluster": address}}.items():
            found = run_all(faulty.RUNS, tmp_path / name, "cpu", progress=False, **how)
            assert bits(found) == bits(serial)
            assert not list((tmp_path / name).rglob("*.partial"))
            files = [p.relative_to(tmp_path / name) for p in (tmp_path / name).rglob("*")]
            assert {tmp_path / "here" / p for p in files} == set((tmp_path / "here").rglob("*"))
    # Nor does the order of the Runs.
    alone = run_all(faulty.RUNS[::-1], tmp_path / "c", "cpu", progress=False)
    assert bits(alone)[::-1] == bits(serial)


def test_one_number_on_a_cluster(toy, address, tmp_path):
    what = faulty.RUNS[0]
    found = execute.run(what, tmp_path / "a", "cpu", progress=False, cluster=address)
    assert found.value == execute.run(what, tmp_path / "b", "cpu", progress=False).value


def test_one_bar_counts_blocks_and_trainings(toy, tmp_path, capsys):
    run_all(faulty.RUNS, tmp_path, "cpu")
    assert "evaluations: 100%" in capsys.readouterr().err
    first = execute._tasks(faulty.RUNS[0], tmp_path / "empty", "cpu", "code")
    assert len(first) == 10 + 1 + 10 + 1
    assert list(first.values())[-1].needs[-10:] == tuple(list(first)[-11:-1])
