"""The searched schedule: against the released search, and against trying every path."""

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

import amedlib
from amedlib.denoisers.exact import GaussianMixtureDenoiser
from amedlib.sampling import Sampler
from amedlib.schedules import make_schedule
from amedlib.search import cheapest_path, jump_costs, search_schedule
from amedlib.solvers import make_solver
from amedlib.training import Trainer, Training, train

# Written by the released `get_dp_list` in double precision, for a mixture of Gaussians, 16 latents
# and 21 points of the schedule polynomial, with iPNDM as teacher and student.
GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "gits.npz"))
CASES = json.loads(str(GOLDEN["cases"]))
# Where there was no point to insert for AFS, the release goes on with one step less.
CASES = [case for case in CASES if len(case["path"]) == case["intervals"] + 1 + case["afs"]]
TIMES = make_schedule("polynomial", 21)
LATENTS = torch.from_numpy(GOLDEN["latents"])


def mixture():
    return GaussianMixtureDenoiser(
        *(torch.from_numpy(GOLDEN[k]) for k in ("means", "stds", "weights"))
    )


@pytest.mark.parametrize("metric", ["dev", "l1", "l2"])
def test_costs_are_those_of_the_released_search(metric):
    sampler = Sampler(mixture(), LATENTS * TIMES[0], TIMES, make_solver("ipndm"))
    states, evaluations = sampler.run()
    slopes = [(x - d) / t for x, (d, _), t in zip(states, evaluations, TIMES, strict=False)]
    costs = jump_costs(torch.stack(states), torch.stack(slopes), TIMES, metric)
    upper = np.triu_indices(21, 1)
    theirs = GOLDEN[f"costs_{metric}"][upper]
    np.testing.assert_allclose(costs.numpy()[upper], theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, list(c.values())[:4])))
def test_paths_are_those_of_the_released_search(case):
    ipndm = make_solver("ipndm")
    how = {name: case[name] for name in ("metric", "coefficient", "afs")}
    number = len(case["path"])
    times, _ = search_schedule(mixture(), LATENTS, TIMES, number, ipndm, ipndm, **how)
    assert torch.equal(times, TIMES[case["path"]])


@pytest.mark.parametrize("coefficient", [0.8, 1.0, 1.15])
@pytest.mark.parametrize("intervals", [1, 2, 3, 5])
def test_no_path_is_cheaper(intervals, coefficient):
    costs = np.random.default_rng(intervals).random((9, 9))
    costs[np.tril_indices(9)] = np.inf

    def total(path):
        jumps = zip(path[:-1], path[1:], strict=True)
        return sum(coefficient**n * costs[i, j] for n, (i, j) in enumerate(jumps))

    every = [[0, *inner, 8] for inner in combinations(range(1, 8), intervals - 1)]
    assert cheapest_path(costs, intervals, coefficient) == min(every, key=total)


@pytest.mark.parametrize("afs", [False, True])
def test_a_searched_schedule_is_a_file_that_samples(tmp_path, afs):
    net, shape = mixture(), (1, 4, 4)
    config = Training.preset("gits", solver="ipndm", num_steps=6, afs=afs, images=8)
    train(net, config, shape, tmp_path / "a.safetensors", progress=False)
    sampler = amedlib.load_sampler(tmp_path / "a.safetensors")
    latents = amedlib.make_latents(Trainer(net, config, shape).seeds(0), shape)
    ipndm = make_solver("ipndm")
    times, _ = search_schedule(net, latents, config.time_points(61), 6, ipndm, ipndm, afs=afs)
    torch.testing.assert_close(sampler.times, times, rtol=1e-5, atol=0)
    assert len(latents) == 8 and sampler.nfe == 5 - afs
    assert set(sampler.times.tolist()) != set(config.times().tolist())


def test_what_cannot_be_searched_is_said():
    ipndm = make_solver("ipndm")
    with pytest.raises(ValueError, match="num_steps must be .* from 2 to 21; 22 was given"):
        search_schedule(mixture(), LATENTS, TIMES, 22, ipndm, ipndm)
    with pytest.raises(ValueError, match="metric must be one of"):
        search_schedule(mixture(), LATENTS, TIMES, 5, ipndm, ipndm, metric="l3")
    with pytest.raises(ValueError, match="teacher must be a multistep solver"):
        search_schedule(mixture(), LATENTS, TIMES, 5, ipndm, make_solver("heun"))
