"""What a GPU asks for: nothing is read back, half precision, batches that fit. All on a CPU."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from amedlib.compute import in_precision
from amedlib.denoisers import adm, edm
from amedlib.freedoms import LearnedTable
from amedlib.intermediate import Predictor, TimeWise
from amedlib.metrics import Moments
from amedlib.sampling import Sampler, make_latents
from amedlib.schedules import make_schedule
from amedlib.solvers import make_solver
from amedlib.study.procedures import add_up, blocks_of
from amedlib.study.run import Run
from amedlib.training import Trainer, Training

SMALL = {"img_resolution": 8, "img_channels": 3, "model_channels": 16, "channel_mult": [1, 2]}
SMALL |= {"num_blocks": 1, "attn_resolutions": [4], "label_dim": 5}
TINY = SMALL | {"channel_mult": [1], "attn_resolutions": []}
NETWORKS = {
    "SongUNet": lambda: edm.build("EDMPrecond", SMALL | {"model_type": "SongUNet"}),
    "DhariwalUNet": lambda: edm.build("EDMPrecond", SMALL | {"model_type": "DhariwalUNet"}),
    "ADM": lambda: adm.ADMPrecond(**SMALL, middle_bottleneck=True),
    "ADM, levels": lambda: adm.ADMPrecond("levels", **SMALL, middle_bottleneck=True),
    "guided ADM": lambda: adm.GuidedDenoiser(
        adm.ADMPrecond(**SMALL),
        adm.NoisyClassifier(**TINY | {"model_channels": 64}),
        2.0,
    ),
}
SOLVERS = [
    ("euler", {}),
    ("heun", {}),
    ("dpm2", {}),
    ("ipndm", {}),
    ("deis", {"mode": "tab"}),
    ("deis", {"mode": "rhoab"}),
    ("dpmpp", {}),
    ("dpmpp", {"predict_x0": False}),
    ("unipc", {}),
    ("unipc", {"variant": "bh1", "thresholding": False}),
]


class OnMetaOnly(TorchDispatchMode):
    """Refuses tensors of the CPU: on a GPU each would be a copy that waits for it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            assert not torch.is_tensor(leaf) or leaf.is_meta, f"{function} on the CPU"
        return out


def on_meta(make):
    return make().eval().requires_grad_(False).to("meta")


@torch.no_grad()
def drive(net, solver, intermediate=None, afs=False):
    """A whole schedule on tensors that have no values, so that none can be read back."""
    with torch.device("meta"):
        x, labels = torch.empty(2, 3, 8, 8, dtype=torch.float64), torch.empty(2, 5)

    def run(points):
        times = make_schedule(num_steps=points).to("meta")
        with OnMetaOnly() if points == 5 else nullcontext():
            sampler = Sampler(net, x, times, solver, afs, intermediate, labels)
            for _ in range(points - 1):
                sampler.advance()
            sampler.finish()
        return sampler.x

    run(3)  # what is constant may be copied once
    end = run(5)
    assert end.is_meta and end.shape == x.shape


@pytest.fixture(scope="module")
def net():
    return on_meta(lambda: edm.build("EDMPrecond", TINY | {"model_type": "SongUNet"}))


@pytest.mark.parametrize("name, options", SOLVERS)
def test_plain_solvers_read_nothing_back_from_the_device(net, name, options):
    drive(net, make_solver(name, **options))


@pytest.mark.parametrize("name, options", [*SOLVERS, ("amed", {})])
def test_learned_steps_read_nothing_back_from_the_device(net, name, options):
    predictor = on_meta(lambda: Predictor("release", net.bottleneck_size, 0.01, 0.2))
    drive(net, make_solver(name, **options), predictor, afs=True)


@pytest.mark.parametrize(
    "intermediate", [TimeWise(0.4), on_meta(lambda: LearnedTable(torch.linspace(80.0, 1.0, 5)))]
)
def test_other_intermediates_read_nothing_back_from_the_device(net, intermediate):
    drive(net, make_solver("deis"), intermediate)


@pytest.mark.parametrize("network", NETWORKS)
def test_no_network_reads_anything_back_from_the_device(network):
    drive(on_meta(NETWORKS[network]), make_solver("euler"))


def test_something_that_is_read_back_is_found(net):
    def clipped(x, t, labels=None):
        return net(x, t, labels) * (1.0 if t > 1 else 0.5)

    with pytest.raises((RuntimeError, NotImplementedError)):
        drive(clipped, make_solver("euler"))


def test_a_constant_that_is_copied_every_time_is_found(net):
    def shifted(x, t, labels=None):
        return net(x, t, labels) + torch.ones(3, 1, 1).to(x.device)

    with pytest.raises(AssertionError, match="on the CPU"):
        drive(shifted, make_solver("euler"))


# --- half precision -----------------------------------------------------------------------------


def alive(make):
    """A network whose layers that start at zero have moved."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = make().eval().requires_grad_(False)
        for parameter in net.parameters():
            parameter += torch.randn(parameter.shape) / 30
    return net


@pytest.mark.parametrize("precision, unit", [("float16", 2**-11), ("bfloat16", 2**-8)])
@pytest.mark.parametrize("network", ["SongUNet", "DhariwalUNet", "ADM", "guided ADM"])
@torch.no_grad()
def test_half_precision_is_close_and_comes_back_in_single(network, precision, unit):
    net = alive(NETWORKS[network])
    x, t = 5 * make_latents(range(3), (3, 8, 8)).double(), torch.tensor(5.0).double()
    labels = torch.eye(5)[:3]
    half, whole = in_precision(net, precision)(x, t, labels), net(x, t, labels)
    assert half.dtype == whole.dtype
    error = (half - whole).norm() / (whole - x).norm()
    assert unit / 100 < error < 4 * unit


@pytest.mark.parametrize("precision, close", [("float16", 0.015), ("bfloat16", 0.1)])
@pytest.mark.parametrize("network", ["SongUNet", "DhariwalUNet", "ADM"])
def test_forward_mode_has_the_gradient_of_reverse_mode_in_half_precision(network, precision, close):
    net, found = alive(NETWORKS[network]), []
    for kind in ("float32", precision):
        for gradient in ("reverse", "forward"):
            config = Training(
                recipe="release",
                scale_time=0.2,
                num_steps=3,
                batch=3,
                images=3,
                precision=kind,
                gradient=gradient,
            )
            trainer = Trainer(net, config, (3, 8, 8))
            labels = torch.eye(5)[:3]
            for loss, _ in trainer.losses(make_latents(range(3), (3, 8, 8)), labels):
                loss.backward()
            each = [p.grad.flatten() for p in trainer.predictor.parameters() if p.grad is not None]
            found.append(torch.cat(each))
    whole, whole_forward, half, half_forward = found
    torch.testing.assert_close(whole_forward, whole, rtol=0, atol=1e-4 * whole.norm().item())
    for each in (half, half_forward):
        assert 0 < (each - whole).norm() / whole.norm() < close


# --- a device with little memory ----------------------------------------------------------------


def blocks_with_room_for(room):
    """Moments of every block of a Run, where more than ``room`` samples do not fit at once."""
    run = Run(samples=70)  # blocks of seven
    seen = []

    def measure(seeds):
        if len(seeds) > room:
            raise torch.OutOfMemoryError("this device is small")
        seen.extend(seeds)
        rows = make_latents(seeds, (1, 2, 2)).flatten(1)
        return {"a": Moments.of(rows), "b": Moments.of(rows[:, :1])}

    def counted(part):
        return measure(part), 0

    return [add_up(seeds.tolist(), 7, counted)[0] for seeds in blocks_of(run)], seen


@pytest.mark.parametrize("room", [1, 2, 5])
def test_blocks_of_a_device_with_little_memory_are_the_same(room):
    (whole, seeds), (parts, seen) = blocks_with_room_for(7), blocks_with_room_for(room)
    assert seen == seeds == list(range(70))  # each once and in order
    assert len(parts) == len(whole) == 10
    for a, b in zip(whole, parts, strict=True):
        for name in ("a", "b"):
            assert a[name].count == b[name].count == 7
            np.testing.assert_allclose(b[name].mean, a[name].mean, rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(b[name].scatter, a[name].scatter, rtol=1e-12, atol=1e-12)


def test_a_device_without_room_for_one_sample_is_named():
    with pytest.raises(RuntimeError, match="memory does not suffice for sampling with a single"):
        blocks_with_room_for(0)
