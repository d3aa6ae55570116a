"""Learned tables: what they start from, what their numbers do, and how they are trained."""

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from toys import TinyNet

import amedlib
from amedlib.denoisers import exact
from amedlib.freedoms import FREEDOMS, LearnedTable
from amedlib.intermediate import Directions, TimeWise
from amedlib.sampling import make_latents, sample
from amedlib.solvers import make_solver
from amedlib.trained import below
from amedlib.training import Trainer, Training, train

SHAPE = (1, 8, 8)
TABLE = {"solver": "ipndm", "form": "table", "uses_bottleneck": False, "scale_dir": 0.0}
END = TABLE | {"objective": "endpoint", "teacher": "heun", "m": 3, "num_steps": 4}
WHOLE = END | {"optimizer": "lbfgs", "images": 8}


def table_of(config: Training) -> LearnedTable:
    return Trainer(TinyNet(), config, SHAPE).predictor


def moved(table: LearnedTable, by: float = 0.2) -> LearnedTable:
    """The table with all numbers moved at random."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for number in table.parameters():
            number += by * torch.randn(number.shape, generator=generator)
    return table.double()


def run(table, config: Training, net=None, batch: int = 3):
    latents = make_latents(range(batch), SHAPE)
    solver = config.make_solver()
    return sample(net or TinyNet(), latents, config.times(), solver, config.afs, table)


PAIRS = [(name,) for name in FREEDOMS] + list(combinations(FREEDOMS, 2)) + [FREEDOMS]


@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("freedoms", PAIRS, ids="+".join)
def test_an_untrained_table_is_the_solver_it_starts_from(freedoms, afs):
    config = Training(**END, freedoms=freedoms, afs=afs)
    half = TimeWise(0.5) if "r" in freedoms else None
    found, expected = run(table_of(config), config), run(half, config)
    torch.testing.assert_close(found.x, expected.x, rtol=1e-5, atol=1e-5)
    assert found.nfe == found.parallel_nfe == expected.nfe


def test_learned_times_descend_and_keep_their_ends():
    config = Training(**END, freedoms=("times", "network_times"))
    times, told = moved(table_of(config), by=5.0).schedule(config.times())
    assert torch.equal(times[[0, -1]], config.times()[[0, -1]])
    assert (times.diff() < 0).all() and len(told) == len(times) - 1 and (told > 0).all()


def test_learned_times_are_another_schedule():
    config = Training(**END, freedoms=("times",))
    table = moved(table_of(config))
    times, _ = table.schedule(config.times())
    latents, net = make_latents(range(3), SHAPE), TinyNet()
    expected = sample(net, latents, times.detach(), config.make_solver(), config.afs).x
    torch.testing.assert_close(run(table, config, net).x, expected, rtol=1e-10, atol=1e-10)


def test_network_times_are_told_and_nothing_else():
    """Euler, by hand: the slope at t from what the network says when it is told another time."""
    config = Training(**END | {"solver": "euler"}, freedoms=("network_times",), afs=False)
    table, net, times = moved(table_of(config)), TinyNet(), config.times()
    x = make_latents(range(3), SHAPE).double() * times[0]
    for t, told, t_next in zip(times[:-1], table.schedule(times)[1], times[1:], strict=True):
        x = x + (t_next - t) * (x - net(x, told.detach())) / t
    torch.testing.assert_close(run(table, config, net).x, x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("solver", ["ipndm", "dpmpp"])
def test_coefficients_make_one_multistep_solver_of_another(solver):
    """From order one: those that the highest order has, solved from three steps of it."""
    times = amedlib.make_schedule("logsnr", 5)
    net, latents = TinyNet(), make_latents(range(2), SHAPE)
    # Equal steps in log t: DPM-Solver++(2M) adds half of the first difference to order one.
    order, half = {"ipndm": (2, 0.5), "dpmpp": (2, 0.5)}[solver]
    options = {} if solver == "ipndm" else {"lower_order_final": False}
    low, high = make_solver(solver, order=1, **options), make_solver(solver, order=order, **options)

    class Longer(type(low)):
        memory = 2

    low = Longer(order=1, **options)

    def coefficients(step, t_cur, t_next, bottleneck):
        return Directions(coefficients=(0.0, half if step else 0.0))

    coefficients.evaluates = False
    found = sample(net, latents, times, low, intermediate=coefficients).x
    torch.testing.assert_close(found, sample(net, latents, times, high).x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("solver", ["amed", "ipndm", "dpmpp"])
@pytest.mark.parametrize("afs", [False, True])
def test_points_that_coincide_are_one(solver, afs):
    net, latents = TinyNet(), make_latents(range(3), SHAPE)
    times, made = amedlib.make_schedule(num_steps=4), make_solver(solver)

    def three(step, t_cur, t_next, bottleneck):
        return Directions((0.3,) * 3, (1.1,) * 3, (0.5, 0.2, 0.3), 0.9)

    def one(step, t_cur, t_next, bottleneck):
        return amedlib.intermediate.Intermediate(0.3, 0.9, 1.1)

    found, expected = (sample(net, latents, times, made, afs, each) for each in (three, one))
    torch.testing.assert_close(found.x, expected.x, rtol=1e-10, atol=1e-10)
    assert expected.nfe == expected.parallel_nfe == found.parallel_nfe == 6 - afs
    assert found.nfe == 3 + 9 - afs


def test_parallel_points_by_hand():
    """One step of EPD: Euler to every point, and a step with the weighted mean of the slopes."""
    net, latents = TinyNet(), make_latents(range(3), SHAPE)
    times = torch.tensor([3.0, 1.0], dtype=torch.float64)
    r, told, weights = (0.2, 0.7), (0.9, 1.2), (0.4, 0.6)
    start = latents.double() * times[0]
    slope, mean = (start - net(start, times[0])) / times[0], 0.0
    for each, scale, weight in zip(r, told, weights, strict=True):
        s = times[1] ** each * times[0] ** (1 - each)
        x = start + (s - times[0]) * slope
        mean = mean + weight * (x - net(x, scale * s)) / s
    expected = start + 0.95 * (times[1] - times[0]) * mean

    def both(*_):
        return Directions(r, told, weights, 0.95)

    found = sample(net, latents, times, make_solver("amed"), intermediate=both)
    torch.testing.assert_close(found.x, expected, rtol=1e-12, atol=1e-12)
    assert (found.nfe, found.parallel_nfe) == (3, 2)


@pytest.mark.parametrize(
    "changes",
    [{}, {"solver": "amed"}, {"solver": "dpmpp"}, {"points": 2}, {"solver": "amed", "points": 3}],
    ids=str,
)
def test_gradients_of_all_freedoms_are_those_of_finite_differences(changes):
    config = Training(**END | changes, freedoms=FREEDOMS, afs=False)
    trainer = Trainer(TinyNet(), config, SHAPE)
    trainer.predictor = moved(trainer.predictor, by=0.1)
    latents = make_latents(range(2), SHAPE)
    end = trainer.end(latents)

    def loss():
        return next(trainer.losses(latents, end=end))[0]

    loss().backward()
    for name, number in trainer.predictor.named_parameters():
        if number.grad is None:  # a coefficient of what is not remembered yet
            assert name.startswith("coefficients")
            continue
        flat, h = number.data.view(-1), 1e-5
        for i in range(len(flat)):
            with torch.no_grad():
                flat[i] += h
                above = loss()
                flat[i] -= 2 * h
                below = loss()
                flat[i] += h
            expected = (above - below) / (2 * h)
            torch.testing.assert_close(
                number.grad.view(-1)[i], expected, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: n + m
            )


def mixture():
    """The exact denoiser of a few images with a little noise."""
    means = make_latents(range(50, 56), SHAPE).double()
    return exact.GaussianMixtureDenoiser(means, 0.3 * means.abs(), torch.full((6,), 1 / 6))


def test_whole_batches_end_where_no_number_helps():
    config = Training(**WHOLE, freedoms=("times", "network_times", "coefficients"), passes=12)
    trainer = Trainer(mixture(), config, SHAPE)
    latents = make_latents(trainer.seeds(0), SHAPE)

    def slope():
        trainer.optimizer.zero_grad()
        next(trainer.losses(latents))[0].backward()
        grads = [number.grad for number in trainer.predictor.parameters()]
        return torch.cat([grad.flatten() for grad in grads if grad is not None]).norm()

    before = slope()
    for _ in range(trainer.batches):
        trainer.step()
    found = [rows[0][0] for rows in trainer.log]
    assert found == sorted(found, reverse=True) and found[-1] < found[0]
    assert slope() < 1e-2 * before


def test_a_line_search_turns_back_from_where_the_network_fails():
    """NaN from a fifth of the way on, on which a network that does not fail takes the last time."""
    config = Training(**WHOLE, freedoms=("network_times",), passes=3, afs=False)
    free = Trainer(mixture(), config, SHAPE)
    for _ in range(free.batches):
        free.step()
    start, end = config.times()[-2].item(), free.predictor.schedule(config.times())[1][-1].item()
    wall, failed, net = start**0.8 * end**0.2, [], mixture()
    other = config.times()[-3].item() / 2  # those above are of other steps

    def fragile(x, t, labels=None):
        told = t.item()
        beyond = (told > wall if end > start else told < wall) and told < other
        failed.append(beyond)
        return net(x, t) * (torch.nan if beyond else 1.0)

    fragile_end = replace(config, m=1)  # a teacher that does not come there
    trainer = Trainer(fragile, fragile_end, SHAPE)
    trainer.end = free.end
    for _ in range(trainer.batches):
        trainer.step()
    found = [rows[0][0] for rows in trainer.log]
    assert any(failed) and found == sorted(found, reverse=True)


@pytest.mark.parametrize(
    "changes",
    [
        WHOLE | {"passes": 3},
        END | {"passes": 3, "images": 8},
        WHOLE | {"passes": 4, "soft": 0.5},
    ],
    ids=str,
)
def test_an_interrupted_training_ends_the_same(tmp_path, changes):
    config = Training(**changes | {"batch": 4}, freedoms=("times", "coefficients"))
    whole = Trainer(TinyNet(), config, SHAPE)
    for _ in range(whole.batches):
        whole.step()
    first = Trainer(TinyNet(), config, SHAPE)
    for _ in range(2):
        first.step()
    first.save(tmp_path / "a.partial")
    second = Trainer(TinyNet(), config, SHAPE)
    second.resume(tmp_path / "a.partial")
    while len(second.log) < second.batches:
        second.step()
    torch.testing.assert_close(
        second.predictor.state_dict(), whole.predictor.state_dict(), rtol=0, atol=0
    )


def test_a_later_pass_asks_the_teacher_nothing():
    config = Training(**END | {"images": 8, "batch": 4, "passes": 3}, freedoms=("times",))
    net = TinyNet()
    trainer = Trainer(net, config, SHAPE)
    for _ in range(trainer.batches):
        trainer.step()
    teacher, student = 2 * 4 * 3, 2  # Heun on four steps for one; AFS saves the first
    assert net.images == 8 * (teacher + 3 * student)


def test_a_soft_teacher_lets_the_student_begin_nearby():
    config = Training(**WHOLE | {"passes": 5, "soft": 0.5, "batch": 4}, freedoms=("times",))
    hard = Trainer(mixture(), replace(config, soft=0.0), SHAPE)
    trainer = Trainer(mixture(), config, SHAPE)
    for _ in range(5):
        hard.step()
        trainer.step()
    latents = make_latents(trainer.seeds(0), SHAPE)
    begun = trainer._inputs(trainer.seeds(0))[0]
    away = (begun - latents).flatten(1).norm(dim=1)
    assert (away <= 0.5 * (1 + 1e-6)).all() and away.max() > 0.2
    ours, theirs = trainer.log, hard.log
    assert ours[0][0][0] == theirs[0][0][0] and ours[-1][0][0] < 0.9 * theirs[-1][0][0]


def test_a_file_of_a_table_samples(tmp_path):
    config = Training(**WHOLE, freedoms=("times", "network_times", "coefficients"))
    net = TinyNet()
    table = train(net, config, SHAPE, tmp_path / "a.safetensors", progress=False)
    sampler = amedlib.load_sampler(tmp_path / "a.safetensors")
    latents = make_latents(range(3), SHAPE)
    assert torch.equal(sampler.sample(net, latents).x, run(table, config, net).x)
    assert sampler.nfe == 2 and sampler.sigmas() == sampler.times.tolist()
    assert not torch.equal(sampler.times, config.times())
    assert not torch.equal(sampler.network_times, sampler.times[:-1])


def test_a_network_and_a_table_go_together(tmp_path):
    config = Training(
        solver="ipndm",
        recipe="paper",
        num_steps=4,
        objective="endpoint",
        images=8,
        batch=4,
        freedoms=("times", "r", "coefficients"),
    )
    net = TinyNet()
    predictor = train(net, config, SHAPE, tmp_path / "a.safetensors", progress=False)
    sampler = amedlib.load_sampler(tmp_path / "a.safetensors")
    found = sampler.sample(net, make_latents(range(3), SHAPE))
    assert torch.equal(found.x, run(predictor, config, net).x)
    assert predictor.uses_bottleneck and sampler.nfe == 5


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"freedoms": ("times",), "objective": "step"}, "objective must be 'endpoint' for"),
        ({"freedoms": ("places",)}, "a freedom must be one of"),
        ({"freedoms": ()}, "freedoms must be a list of different names"),
        ({"freedoms": ("r", "r")}, "freedoms must be a list of different names"),
        ({"freedoms": ("times",), "points": 2}, "points must be 1 for"),
        (
            {"solver": "amed", "options": {}, "freedoms": ("times",)},
            "freedoms must be with 'r' for a single-step",
        ),
        (
            {"solver": "unipc", "options": {}, "freedoms": ("coefficients",)},
            "freedoms must be without 'coeff",
        ),
        ({"optimizer": "sgd"}, "optimizer must be one of"),
        ({"objective": "step", "optimizer": "lbfgs"}, "objective must be 'endpoint' for"),
        ({"soft": -1.0, "passes": 2}, "soft must be a radius of at least zero"),
        ({"soft": 1.0}, "soft must be 0.0 for"),
        ({"passes": 0}, "passes must be a whole number of at least 1; 0 was given."),
        ({"objective": "step", "passes": 2}, "objective must be 'endpoint' for"),
    ],
)
def test_what_does_not_go_together_is_said(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(Training(**END), **changes)


# Written by the released samplers of LD3 and EPD in double precision, for a mixture of Gaussians.
RELEASED = dict(np.load(Path(__file__).parent / "golden" / "successors.npz"))


def released(name: str):
    """The vectors below a name, with the denoiser and the latents."""
    found = {k: torch.from_numpy(v) for k, v in RELEASED.items()}
    denoiser = exact.GaussianMixtureDenoiser(*(found[k] for k in ("means", "stds", "weights")))
    return denoiser, found["latents"], below(f"{name}/", found)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_learned_times_sample_as_the_released_ld3(order):
    denoiser, latents, given = released(f"ld3_{order}")
    config = Training.preset(
        "ld3", solver="dpmpp", options={"order": order}, num_steps=6, afs=False
    )
    table = Trainer(denoiser, config, (1, 4, 4)).predictor.double()
    table.keep(given["times"])
    with torch.no_grad():
        for shift, told, t in zip(
            table.shifts, given["network_times"], given["times"], strict=False
        ):
            shift.copy_((told / t).log())
    solver = config.make_solver()
    found = sample(denoiser, latents, config.times(), solver, intermediate=table).x
    torch.testing.assert_close(found, given["x"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("points", [1, 2, 3])
def test_parallel_points_sample_as_the_released_epd(points, afs):
    denoiser, latents, given = released(f"epd_{points}")

    def directions(step, *_):
        r, told, weights = (tuple(given[k][step]) for k in ("r", "scale_time", "weights"))
        return Directions(r, told, weights, given["scale_dir"][step])

    times, amed = amedlib.make_schedule(num_steps=5), make_solver("amed")
    found = sample(denoiser, latents, times, amed, afs, directions)
    expected = given["afs" if afs else "plain"]
    torch.testing.assert_close(found.x, expected, rtol=1e-9, atol=1e-9)
    assert found.parallel_nfe == 8 - afs and found.nfe == 4 * (1 + points) - afs
