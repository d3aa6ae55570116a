"""What is measured on a GPU, tried on small networks without one; evaluations and hours."""

import importlib.util
import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from toys import TinyNet

import amedlib
from amedlib.datasets.loaders import load_weights
from amedlib.files import save_tensors
from amedlib.study import costs, execute, page, plans, published, store
from amedlib.study.run import Result, Run
from amedlib.study.store import predictor_path, save_result
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


@pytest.fixture
def card(benchmarks):
    return importlib.import_module("benchmarks.card")


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

    found = costs.rates(page.benchmarks(path))
    assert set(found) == {"lsun_bedroom", "lsun_cat"}
    for each in found.values():
        assert each["sampling"] == each["search"] == rates["float16"]
        assert each["training"] == trained["forward"]


def test_nothing_is_begun_when_the_time_is_up(benchmarks, tmp_path, capsys):
    path = tmp_path / "card.json"
    benchmarks.__main__.main(
        ["gpu", "--tiny", "--device", "cpu", "--output", str(path), "--seconds", "-1"]
    )
    assert capsys.readouterr().out.count("not begun, the time is up") == 7
    assert not path.exists()
    assert costs.rates({}) == {}


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


# --- the race -----------------------------------------------------------------------------------


@pytest.fixture
def race(benchmarks):
    return benchmarks.race


@pytest.fixture
def net(gpu):
    """EDM's network for CIFAR-10, small, in float64, with weights that let everything through."""
    torch.manual_seed(0)
    net = gpu.NETWORKS["cifar10"][0](gpu.TINY).eval().requires_grad_(False).double()
    for weight in net.parameters():
        weight += 0.1 * torch.randn_like(weight)
    return net


def students(race):
    options = dict(race.STUDENTS) | {
        "iPNDM of order 2": {"solver": "ipndm", "options": {"order": 2}}
    }
    return options.items()


def test_both_sides_of_the_race_have_equal_gradients(race, net):
    for student, options in students(race):
        for gradient in ("reverse", "forward"):
            config = Training(batch=3, num_steps=4, gradient=gradient, **race.RELEASE, **options)
            found = race.gradients(net, config, (3, 8, 8), torch.float64)
            assert found < 1e-10, (student, gradient)


def test_unequal_gradients_would_be_noticed(race, net):
    """The paper's recipe goes on from the student, the restated code from the teacher."""
    config = Training(batch=3, start="student", **race.RELEASE)
    assert race.gradients(net, config, (3, 8, 8), torch.float64) > 1e-6


def test_both_sides_of_the_race_train_the_same_predictor(race, net):
    for student, options in students(race):
        config = Training(batch=3, **race.RELEASE, **options)
        both = race.Pair(net, config, (3, 8, 8), torch.float64)
        for trainer in (both.ours, both.official):
            trainer.predictor.double()
        for _ in range(3):
            both.step_ours()
            both.step_official()
        ours, theirs = (t.predictor.state_dict() for t in (both.ours, both.official))
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-9, msg=student)
        losses = torch.tensor(both.ours.log).flatten(0, 1)[:, :2]
        torch.testing.assert_close(losses, torch.tensor(both.official.log), rtol=1e-6, atol=0)


def test_both_sides_of_the_race_draw_the_same_samples(race, benchmarks, net):
    latents = amedlib.make_latents(range(4), (3, 8, 8)).double()
    for student, options in students(race):
        config = Training(**race.RELEASE, **options)
        torch.manual_seed(1)
        predictor = amedlib.Predictor("release", net.bottleneck_size, 0.01, 0.2).double()
        solver = amedlib.make_solver(config.solver, **config.options)
        ours = amedlib.sample(net, latents, config.times(), solver, config.afs, predictor).x
        theirs = benchmarks.official.sample(net, latents, config, predictor)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9, msg=student)


def test_the_released_procedure_makes_the_evaluations_that_are_shared_here(race, net):
    """Per interval one more with AMED-Solver, but where AFS needs none; with iPNDM in the first."""
    counts = {}
    for student, options in race.STUDENTS.items():
        both = race.Pair(
            net, Training(batch=3, **race.RELEASE, **options), (3, 8, 8), torch.float64
        )
        for side in ("ours", "official"):
            calls = []
            handle = net.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
            getattr(both, f"step_{side}")()
            handle.remove()
            counts[student, side] = len(calls)
    extra = {name: counts[name, "official"] - counts[name, "ours"] for name in race.STUDENTS}
    assert list(extra.values()) == [2, 3, 0, 1]
    assert counts["AMED-Solver", "official"] == 4 * 3 + 2 * 3 - 1


def test_a_distance_through_files_is_the_one_in_memory(race):
    data = amedlib.load_dataset("digits")
    draw = {"latents": lambda latents: latents * 0.4}
    ours = race.draw_distance(data, draw["latents"], range(1100))
    theirs = race.draw_distance_officially(data, draw["latents"], range(1100))
    assert theirs == pytest.approx(ours, rel=1e-9)


@pytest.mark.parametrize("channels", [1, 3])
def test_files_hold_the_images_in_order(benchmarks, tmp_path, channels):
    official = benchmarks.official
    images = torch.randint(256, (5, channels, 8, 8), dtype=torch.uint8)
    official.write_pngs(images, range(998, 1003), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000000", "001000"]
    read = torch.from_numpy(np.stack(list(official.Pictures(tmp_path))))
    assert torch.equal(read, images)


def test_a_small_race_is_run(race):
    rows = [
        *race.training("digits", 2, 2, {"AMED-Solver": race.STUDENTS["AMED-Solver"]}),
        *race.sampling(repeats=2, batch=4),
        *race.distance(repeats=2, samples=66),
        *race.table(nfe=3, images=2, samples=66, repeats=2),
    ]
    assert all(row["ratio"] > 0 and row["ours, s"] > 0 and row["official, s"] > 0 for row in rows)
    by_name = {row["what"]: row for row in rows}
    fd = by_name["samples to FD, AMED-Solver, 5 NFE"]
    assert fd["difference of FD"] < 1e-3
    assert {name: fd[name] for name in fd if name.endswith((", batch", ", threads"))} == {
        "ours, batch": 64,
        "official, batch": 64,
        "ours, threads": 1,
        "official, threads": 1,
    }
    forward = by_name["training, AMED-Solver, forward"]
    assert forward["memory ratio"] < 1 and forward["in float64"] < 1e-10


def backend():
    """What decides how fast PyTorch is, whatever is asked of it."""
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    return {
        "cuDNN": cudnn.enabled,
        "benchmark": cudnn.benchmark,
        "deterministic": cudnn.deterministic,
        "TF32 in convolutions": cudnn.allow_tf32,
        "TF32 in products": products.allow_tf32,
        "threads": torch.get_num_threads(),
    }


def watch(monkeypatch, trainer) -> list[dict]:
    """The backend at the start of every step of a trainer and in every call of its network."""
    seen, step = [], trainer.step

    def watched(self, *args):
        seen.append(backend())
        net = getattr(self, "net", None) or self.denoiser
        net = getattr(net, "denoiser", net)  # out of what sets the precision
        handle = net.register_forward_pre_hook(lambda *_: seen.append(backend()))
        step(self, *args)
        handle.remove()

    monkeypatch.setattr(trainer, "step", watched)
    return seen


@pytest.mark.parametrize(
    "racer", ["float32", "float16", "float16, compiled", "bfloat16", "bfloat16, ours alone"]
)
def test_both_sides_of_the_race_on_a_gpu_have_the_same_backend(gpu, card, monkeypatch, racer):
    ours = watch(monkeypatch, gpu.Trainer)
    theirs = watch(monkeypatch, gpu.official.Trainer)
    before = backend()
    bench = gpu.Bench("cpu", 1000, tiny=True)
    racers = gpu.RACERS | gpu.COMPILED | card.RACERS
    (row,) = gpu.race(bench, ["cifar10"], {racer: racers[racer]})
    assert "failed" not in row
    # Stated, not only compared: both sides could be wrong.
    expected = before | {
        "cuDNN": True,
        "benchmark": True,
        "deterministic": False,
        "TF32 in convolutions": False,
        "TF32 in products": False,
    }
    assert len(ours) > row["ours, calls"] and len(theirs) > row["official, calls"]
    assert all(state == expected for state in ours + theirs)
    assert backend() == before


def test_both_sides_of_the_way_to_a_distance_have_the_same_backend(race, monkeypatch):
    """In every evaluation of the network, whoever asks for it; the timed ones too."""
    seen = {"draw_distance": [], "draw_distance_officially": []}

    def watched(function, noted, data, draw, *args):
        def noting(latents):
            noted.append((len(latents), backend()))
            return draw(latents)

        return function(data, noting, *args)

    for name, noted in seen.items():
        monkeypatch.setattr(race, name, partial(watched, getattr(race, name), noted))
    before = backend()
    list(race.distance(repeats=2, samples=66))
    list(race.table(nfe=3, images=2, samples=66, repeats=2))
    ours, theirs = seen.values()
    assert len(ours) == len(theirs) > 0
    assert {size for size, _ in ours} == {size for size, _ in theirs} == {64, 2}
    assert all(state == before | {"threads": 1} for _, state in ours + theirs)
    assert backend() == before


def test_the_race_on_a_gpu_is_tried(gpu):
    bench = gpu.Bench("cpu", 1000, tiny=True)
    rows = list(gpu.race(bench, ["imagenet64", "lsun_bedroom"], gpu.RACERS))
    assert [row["variant"] for row in rows] == list(gpu.RACERS)
    assert not [row for row in rows if "failed" in row]
    assert all(row["ratio"] > 0 for row in rows)


@pytest.mark.parametrize("racer", ["float32", "bfloat16", "bfloat16, ours alone"])
def test_each_side_of_the_race_has_the_precision_that_is_said(gpu, card, monkeypatch, racer):
    seen = {"ours": set(), "released": set()}

    def look(side, trainer):
        step = trainer.step

        def watched(self, *args):
            net = getattr(self, "net", None) or self.denoiser
            while hasattr(net, "denoiser"):
                net = net.denoiser
            convolution = next(m for m in net.modules() if type(m).__name__ == "Conv2d")
            handle = convolution.register_forward_hook(lambda *a: seen[side].add(a[-1].dtype))
            step(self, *args)
            handle.remove()

        monkeypatch.setattr(trainer, "step", watched)

    look("ours", gpu.Trainer), look("released", gpu.official.Trainer)
    # The evaluations are counted by another pair, which has a precision of its own.
    counted = {"ours, calls": 1, "official, calls": 1}
    monkeypatch.setattr(gpu, "count_evaluations", lambda both: dict(counted))
    bench = gpu.Bench("cpu", 1000, tiny=True)
    (row,) = gpu.race(bench, ["cifar10"], {racer: card.RACERS[racer]})
    assert "failed" not in row
    half = {torch.bfloat16} if "bfloat16" in racer else {torch.float32}
    assert seen["ours"] == half
    assert seen["released"] == ({torch.float32} if "alone" in racer else half)


# --- python -m benchmarks.card ------------------------------------------------------------------


@pytest.fixture
def planned(card, monkeypatch):
    """Three parts, which share a training and the ODE's solution; that in few steps."""
    monkeypatch.setitem(store.SOLUTION, "num_steps", 9)
    learned = {"images": 4, "batch": 2}
    amed = Run(solver="amed", nfe=3, afs=True, samples=20, predictor=learned)
    plain = Run(nfe=3, samples=20)
    found = {
        "plain": [plain, plain.with_metric("fd_joint")],
        "trained": [amed],
        "again": [amed.with_metric("endpoint_error"), replace(plain, nfe=4)],
    }
    monkeypatch.setattr(card, "parts", lambda tiny: found)
    return found


def test_a_card_is_used_until_the_time_is_up_and_then_resumed(
    card, planned, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(card, "RACES", card.RACES[:2])
    expected = card.estimate(planned, tmp_path)
    assert expected["results"].sum() == 5
    evaluated, data = [], amedlib.load_dataset("digits", "cpu")
    handle = data.denoiser.register_forward_pre_hook(lambda _, x: evaluated.append(len(x[0])))
    done, begin, most = [], card._in_time, [15]
    # The time is up after so many pieces of work.
    late = lambda: time.time() + 10**6 * (len(done) >= most[0])  # noqa: E731
    monkeypatch.setattr(card, "time", SimpleNamespace(time=late))

    def noted(deadline, function, *args):
        found = begin(deadline, function, *args)
        if function.__name__ == "_work":
            done.append(str(args))
        return found

    monkeypatch.setattr(card, "_in_time", noted)
    given = ["--tiny", "--device", "cpu", "--processes", "1", "--into", str(tmp_path)]
    try:
        assert card.main(given) == 0
        assert 0 < sum(evaluated) < expected["evaluations"].sum()
        assert "race: 0 of 2 rows not run" in (said := capsys.readouterr().out)
        assert "again: 2 of 2 results not run." in said
        (record,) = (tmp_path / "gpu").iterdir()
        raced, written = json.loads(record.read_text()), record.stat().st_mtime_ns
        most[0] = 10**6
        assert card.main(given) == 0
        assert sum(evaluated) == expected["evaluations"].sum()  # counted before; none made twice
        assert card.main(given) == 0
        assert sum(evaluated) == expected["evaluations"].sum()
    finally:
        handle.remove()
    assert "not run" not in capsys.readouterr().out.replace("0 of 2 rows not run", "")
    assert len(set(done)) == len(done)
    assert card.estimate(planned, tmp_path)["evaluations"].sum() == 0
    assert [row["variant"] for row in raced["race"]] == ["float32", "bfloat16"]
    assert record.stat().st_mtime_ns == written


def test_what_fails_on_a_card_is_said_and_the_rest_is_done(
    card, planned, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(card, "RACES", [])
    monkeypatch.setattr(execute, "train", lambda *_: 1 / 0)
    given = ["--tiny", "--device", "cpu", "--processes", "1", "--into", str(tmp_path)]
    assert card.main(given) == 1
    captured = capsys.readouterr()
    assert "division by zero" in captured.err
    assert "trained: 1 of 1 results not run." in captured.out and "plain" in captured.out
    assert card.missing(planned["plain"], tmp_path) == 0


def test_the_plan_for_a_card_is_what_the_book_shows(card):
    """The leaderboard has every metric, the tables one training; what tells most goes first."""
    planned = card.parts()
    names = list(planned)
    assert names[0] == "leaderboard, solvers, NFE 5"
    first_table = next(i for i, name in enumerate(names) if name.startswith("Table"))
    assert all(name.startswith("Table") for name in names[first_table:])
    asked = {run.metric for name in names[:first_table] for run in planned[name]}
    assert asked == set(amedlib.describe("cifar10_small").metrics)
    ends = [run for runs in planned.values() for run in runs if run.metric == "endpoint_error"]
    others = [run for runs in planned.values() for run in runs if run.metric != "endpoint_error"]
    assert {run.samples for run in ends} == {1024} and {run.samples for run in others} == {10_000}
    wanted = {run.key for run in plans.table2("cifar10_small", ["AMED-Solver"])["run"]}
    assert wanted <= {run.key for run in others}


# --- growth --------------------------------------------------------------------------------------


def test_growth_is_fitted(benchmarks):
    few = {"images": ((20, 40),), "NFE": ((3, 6), 2), "pixels": ((4, 8), 2)}
    rows = {
        row["quantity"]: row
        for row in benchmarks.growth.rows(1, **few, methods=(("euler", "amed", "unipc"), 2))
    }
    assert rows["images"]["values"] == [20, 40]
    assert rows["NFE"]["values"] == [3, 6]
    assert rows["pixels"]["values"] == [16, 64]
    assert rows["methods"]["values"] == [1, 2, 3]
    for row in rows.values():
        slope = np.log(row["seconds"][-1] / row["seconds"][-2])
        slope /= np.log(row["values"][-1] / row["values"][-2])
        assert row["at the end"] == pytest.approx(slope)
        if len(row["values"]) == 2:
            assert row["exponent"] == pytest.approx(slope)


def test_varied_calls_make_as_many_evaluations_as_they_say(benchmarks):
    growth, data = benchmarks.growth, amedlib.load_dataset("digits")
    calls = []
    handle = data.denoiser.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        for expected, vary in (
            ([3, 12, 25], growth.evaluations(data, (3, 12, 25), 2)),
            ([4, 8, 12], growth.methods(data, ("euler", "amed", "heun"), 2)),
            ([3, 3, 6], growth.images(data, (20, 500, 501))),
        ):
            for count, (_, call) in zip(expected, vary, strict=True):
                calls.clear()
                call()
                assert len(calls) == count
    finally:
        handle.remove()


def test_pixels_are_all_the_same_work(benchmarks):
    """The convolutions' products per pixel approach a constant from below: 4/3 of one level's."""
    from torch.utils.flop_counter import FlopCounterMode

    per_pixel = []
    for side in (16, 32, 64):
        net = benchmarks.growth.small_network(side)
        assert net.bottleneck_size == (4, 4)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            net(torch.zeros(1, 3, side, side), torch.tensor(1.0))
        per_pixel.append(counter.get_total_flops() / side**2)
    assert max(per_pixel) / min(per_pixel) < 1.4


def test_memory_does_not_grow_with_the_images(benchmarks):
    few, many = (benchmarks.growth.peak(count)["tensors, MiB"] for count in (1000, 2000))
    assert many == few


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
    cells = published.published("table8")
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


def test_what_a_card_did_agrees_with_what_it_wrote_down():
    found, shared = (costs.on_gpu(processes=n) for n in (1, 4))
    (run,) = json.loads(load_weights("cifar10_edm.safetensors")[1]["runs"])
    training, sampling, _ = found.index
    per_image = run["TFLOP/s"] / run["images_per_second"]
    assert found.loc[training, "TFLOP/s"] == pytest.approx(
        per_image * run["images"] / run["seconds"], rel=1e-3
    )
    cells = plans.table2("cifar10_small", seeds=[0])["run"]
    assert found.loc[sampling, "evaluations"] == sum(10_000 * what.nfe for what in cells)
    assert shared.loc[sampling, "per second"] == pytest.approx(
        4 * found.loc[sampling, "per second"]
    )


def test_the_papers_tables_take_less_together_than_one_by_one():
    """Cells that tables share are computed once; no table is left out."""
    cluster = importlib.import_module("benchmarks.cluster")
    sizes = importlib.import_module("benchmarks.gpu")
    tasks, seconds = cluster.counted(seeds=(0,))
    rates = costs.assumed(pd.DataFrame(sizes.sizes()), costs.reached())
    each = costs.project(costs.count_tables(seeds=(0,)), rates)["total"]
    together = sum(seconds.values()) / 3600
    assert 0.5 * each.sum() < together < each.sum()
    assert together > each.max()
    assert cluster.makespan(tasks, seconds, 1) / 3600 == pytest.approx(together)
