"""What is measured on a GPU, tried on small networks without one; evaluations and hours."""

import importlib.util
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from toys import TinyNet

from amedlib import costs, plans, plotting
from amedlib.files import save_tensors
from amedlib.study import Result, Run, predictor_path, save_result
from amedlib.training import Trainer, Training

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def benchmarks(monkeypatch):
    """The folder beside the library, which is not installed with it."""
    monkeypatch.syspath_prepend(ROOT)
    import benchmarks.__main__

    return benchmarks


@pytest.fixture
def gpu(benchmarks):
    return benchmarks.gpu


def measure(benchmarks, path, *arguments):
    given = ["gpu", "--tiny", "--device", "cpu", "--output", str(path), *arguments]
    benchmarks.__main__.main(given)
    return json.loads(path.read_text())


# --- python -m benchmarks gpu -------------------------------------------------------------------


def test_everything_is_measured_and_kept(benchmarks, gpu, tmp_path):
    path = tmp_path / "deep" / "card.json"
    report = measure(benchmarks, path, "--networks", "lsun_bedroom")
    assert {"torch", "date", "processor"} <= set(report["machine"])
    rates = {row["variant"]: row["images/s"] for row in report["rates"]}
    assert list(rates) == list(gpu.VARIANTS)
    trained = {row["gradient"]: row["images/s"] for row in report["training"]}
    assert list(trained) == ["forward", "reverse"]
    (compiled,) = report["compiled"]
    assert all(rate > 0 for rate in [*rates.values(), *trained.values(), compiled["images/s"]])
    assert all(row["loop / bare calls, ratio"] > 0 for row in report["overhead"])
    (inception,) = report["features"]
    installed = importlib.util.find_spec("torch_fidelity")
    assert installed or inception.pop("failed") == "ModuleNotFoundError"
    rows = [row for part in report if part != "machine" for row in report[part]]
    assert not [row for row in rows if "failed" in row]

    found = costs.rates(plotting.benchmarks(path))
    assert set(found) == {"lsun_bedroom", "lsun_cat"}
    for each in found.values():
        assert each["sampling"] == each["search"] == rates["float16"]
        assert each["training"] == trained["forward"]


def test_nothing_is_begun_when_the_time_is_up(benchmarks, tmp_path):
    report = measure(benchmarks, tmp_path / "card.json", "--seconds", "-1")
    rows = [row for part in report if part != "machine" for row in report[part]]
    assert len(rows) > 40
    assert {row["failed"] for row in rows} == {"TimeoutError"}
    assert costs.rates(plotting.benchmarks(tmp_path / "card.json")) == dict.fromkeys(
        ["cifar10", "ffhq", "imagenet64", "lsun_bedroom", "lsun_cat"], {}
    )


def test_a_variant_that_fails_is_recorded_and_the_others_go_on(gpu):
    bench = gpu.Bench("cpu", 100, tiny=True)
    variants = {"broken": {"precision": "float8"}, "float32": {}}
    broken, whole = gpu.rates(bench, ["cifar10"], variants)
    assert broken["failed"] == "ValueError" and "images/s" not in broken
    assert whole["images/s"] > 0


def test_the_batch_is_halved_until_it_fits(gpu):
    tried = []

    def call_with(batch):
        tried.append(batch)
        if batch > 3:
            raise torch.OutOfMemoryError
        return lambda: None

    bench = gpu.Bench("cpu", 100, tiny=True)
    assert bench.largest(call_with, 16)[0] == 2
    assert tried == [16, 8, 4, 2]


@pytest.mark.parametrize(
    "name, published", [("cifar10", 55.7), ("imagenet64", 295.9), ("lsun_bedroom", 526)]
)
def test_networks_have_their_true_size(gpu, name, published):
    # million parameters; the last is a fourth of the bytes of the published file
    assert gpu.size(name)["million parameters"] == pytest.approx(published, rel=1e-3)


def test_operations_are_counted_twice_per_product(gpu):
    """Against sums over the layers of the small network, which has no attention."""
    net = gpu.NETWORKS["cifar10"][0](gpu.TINY)
    total = 0

    class Products(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            nonlocal total
            out = function(*args, **(kwargs or {}))
            if function.__name__ in ("conv2d", "linear"):
                total += 2 * out[0].numel() * args[1][0].numel()
            if function.__name__ in ("matmul", "__matmul__"):
                total += 2 * out.numel() * args[0].shape[-1]
            return out

    with torch.no_grad(), Products():
        net(torch.zeros(1, 3, 8, 8), torch.tensor(1.0))
    assert gpu.size("cifar10", gpu.TINY)["GFLOP per evaluation"] == pytest.approx(total / 1e9)


def test_the_share_of_the_peak_is_known_for_listed_cards_only(gpu):
    half = {"precision": "float16"}
    assert gpu.peak_share("NVIDIA A100-SXM4-40GB", half, 156e12) == 0.5
    assert gpu.peak_share("NVIDIA A100-SXM4-40GB", {}, 78e12) == 0.5
    assert gpu.peak_share("NVIDIA A100-SXM4-40GB", {"tf32": False}, 19.5e12) == 1
    assert gpu.peak_share("Tesla T4", {}, 8.1e12) == 1  # has no TF32
    assert gpu.peak_share("some other card", half, 1e12) is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("cpu", 1, ["cifar10"], False), "device must be a GPU"),
        (("cpu", 1, ["mnist"], True), "networks must be one of 'cifar10'.*'mnist' was given"),
    ],
)
def test_bad_arguments_are_refused(gpu, arguments, message):
    with pytest.raises(ValueError, match=message):
        gpu.parts(*arguments)


# --- evaluations --------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["paper", "release"])
@pytest.mark.parametrize("solver, m", [("amed", 1), ("ipndm", 2), ("unipc", 1)])
def test_training_makes_as_many_evaluations_as_are_counted(solver, m, recipe):
    for gradient in ("reverse", "forward"):
        config = Training(
            solver=solver, m=m, recipe=recipe, num_steps=4, batch=2, images=6, gradient=gradient
        )
        net = TinyNet()
        trainer = Trainer(net, config, (1, 8, 8))
        while len(trainer.log) < trainer.batches:
            trainer.step()
        assert costs.training_evaluations(config) == net.images


def test_evaluations_of_a_search():
    what = Run(solver="amed", nfe=6, r="searched", samples=40)
    # Heun's truth with 14 steps for each of the three; 49 trials each with one shared evaluation;
    # two trajectories for the comparison.
    per_sample = 2 * 14 * 3 + 3 * (1 + 49) + 2 * 6
    assert costs.search_evaluations(what.search()) == 10_000 * per_sample


def test_a_plan_counts_what_its_runs_share_once():
    learned = {"images": 16, "batch": 8, "seed": 1}
    runs = [
        Run(nfe=4, samples=50),
        Run(nfe=4, samples=50),
        Run(nfe=4, samples=30, metric="endpoint_error"),
        Run(solver="amed", nfe=4, samples=50, predictor=learned),
        Run(solver="amed", nfe=4, samples=20, predictor=learned, metric="endpoint_error"),
        Run(solver="amed", nfe=4, samples=50, predictor=learned | {"seed": 2}),
        Run(solver="amed", nfe=4, samples=50, r="searched"),
        Run(solver="amed", nfe=4, samples=40, r="searched", metric="endpoint_error"),
    ]
    found = costs.evaluations(pd.DataFrame({"run": runs}))
    assert found == {
        "sampling": 4 * (50 + 30 + 50 + 20 + 50 + 50 + 40),
        "search": costs.search_evaluations(runs[-1].search()),
        "training": 2 * costs.training_evaluations(runs[3].training),
        "features": 4 * 50,
    }


def test_every_table_of_the_paper_is_counted():
    counted = costs.count_tables(seeds=[0])
    assert list(counted["table"].unique()) == list(range(2, 14))
    table = counted.set_index(["table", "dataset"])
    # Table 8: its cells without those that DPM-Solver-2 cannot have, with 50,000 samples each.
    cells = plans.published("table8")
    cells = cells[(cells["method"] != "DPM-Solver-2") | cells["afs"]]
    found = table.loc[8, "lsun_bedroom"]
    assert found["sampling"] == 50_000 * cells["nfe"].sum()
    assert found["features"] == 50_000 * len(cells)
    assert found["trainings"] == cells["amed"].sum()
    assert (counted["search"] > 0).tolist() == (counted["table"] == 3).tolist()


# --- hours --------------------------------------------------------------------------------------


def test_hours_are_evaluations_by_rate():
    counted = pd.DataFrame(
        {
            "table": [2, 3],
            "dataset": ["a", "b"],
            "sampling": [7200, 3600],
            "search": [0, 3600],
            "training": [3600, 0],
            "features": [3600, 3600],
        }
    )
    rates = {"a": {"sampling": 2.0, "search": 2.0, "training": 0.5}, "b": {"sampling": 1.0}}
    hours = costs.project(counted, rates)
    assert hours.loc[0].to_dict() == {
        "table": 2,
        "dataset": "a",
        "sampling": 1.0,
        "search": 0.0,
        "training": 2.0,
        "total": 3.0,
    }
    assert hours.loc[1, "sampling"] == 1.0 and pd.isna(hours.loc[1, "total"])
    assert list(costs.project(counted, {}).columns) == ["table", "dataset", "total"]


def test_time_spent_comes_from_the_store(tmp_path):
    learned = {"images": 16, "batch": 8}
    plain, missing = Run(nfe=4), Run(nfe=5)
    trained = [Run(solver="amed", nfe=4, predictor=learned | {"seed": s}) for s in range(3)]
    searched = Run(solver="amed", nfe=4, r="searched")

    def store(what, seconds):
        save_result(Result(what, 1.0, [], {}, 4, seconds, "a CPU", {}, "", ""), tmp_path)

    for what in (plain, *trained, searched):
        store(what, 10.0)
    store(searched.search(), 100.0)
    for what, metadata in zip(trained, ({"seconds": "3.5"}, {"seconds": "4.5"}, {}), strict=True):
        save_tensors(predictor_path(what, tmp_path), {"x": torch.zeros(1)}, metadata)
    planned = pd.DataFrame({"run": [plain, missing, *trained, searched]})
    assert costs.spent(planned, tmp_path) == {
        "runs": 6,
        "stored": 5,
        "trainings": 3,
        "timed": 2,
        "sampling": 50.0,
        "search": 100.0,
        "training": 8.0,
        "device": "a CPU",
    }
