"""What a scheduler of the diffusers library says about its networks, in terms of sigma.

A network F is asked for F(alpha x, time step). The scheduler says what alpha and the time step are
at the noise level sigma, and what F predicts; D is linear in x and F (``PREDICTIONS``; Karras et
al., 2022, arXiv:2206.00364, Table 1). alpha is 1 / sqrt(1 + sigma^2) of variance-preserving models
and 1 / (1 + sigma) of flow matching, whose time is sigma / (1 + sigma) and whose shift only
multiplies sigma.

Between two levels that a network was trained on, its time step is linear in log sigma, and beyond
the ends it is constant, as in diffusers and k-diffusion. What differs from diffusers:

- Nothing is rounded, while DPM-Solver++, UniPC and DEIS round time steps between two levels. And
  where time steps are given, as for Euler's equal spacing, diffusers takes sigma itself as linear.
- What schedulers do to D (``clip_sample``, ``thresholding``) is left out; it belongs to a solver.
- Flow matching starts at the highest finite sigma instead of noise alone, where sigma is infinite.
- Times end above zero. A scheduler's last step to zero is D at the last time, for which
  ``sample`` makes no evaluation; and lower orders at the end come one step earlier than there.
- DEIS of diffusers has its polynomial in log sigma; ours is in the VP time or in sigma.

Otherwise our solvers take the steps of Euler, Heun, DPM-Solver++, UniPC and FlowMatchEuler in
diffusers, up to the single precision of its tables (``tests/test_denoisers_diffusers.py``).
"""

import copy
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from amedlib.checks import one_of, require

# (skip, gain) of D = skip x + gain F(alpha x); s is the standard deviation of data in alpha.
PREDICTIONS = {
    "epsilon": lambda sigma, alpha, s: (1, -sigma),
    "sample": lambda sigma, alpha, s: (0, 1),
    "v_prediction": lambda sigma, alpha, s: ((s * alpha) ** 2, -sigma * alpha * s),
    "flow_prediction": lambda sigma, alpha, s: (alpha, -sigma * alpha),
    "edm": lambda sigma, alpha, s: ((s * alpha) ** 2, sigma * alpha * s),
}


class Convention(NamedTuple):
    """How a network is asked; the functions take sigma, a float64 tensor.

    Attributes:
        flow: whether the path of noise is a straight line.
        alpha: the scale of the input.
        time_step: what the network is told as its time.
        combine: (skip, gain) of D, of sigma and alpha.
        levels: the noise levels that it was trained on, ascending; ``None`` for continuous times.
        ends: the lowest and the highest noise level.
    """

    flow: bool
    alpha: Callable
    time_step: Callable
    combine: Callable
    levels: np.ndarray | None
    ends: tuple[float, float]

    def denoised(self, x, sigma, output):
        """D(x; sigma) in the dtype of x, of what the network gave for alpha x."""
        skip, gain = self.combine(sigma, self.alpha(sigma))
        return (skip * x + gain * output).to(x.dtype)


def convention(scheduler) -> Convention:
    """How the networks of a scheduler of diffusers are asked.

    Raises:
        ValueError: the scheduler does not say what they predict, or its noise levels repeat.
    """
    config, name = scheduler.config, type(scheduler).__name__
    predicts, data = config.get("prediction_type"), 1.0
    if predicts is None and any("FlowMatch" in each.__name__ for each in type(scheduler).mro()):
        predicts = "flow_prediction"
    one_of(f"prediction_type of {name}", predicts, list(PREDICTIONS)[:-1])
    flow = predicts == "flow_prediction" or bool(config.get("use_flow_sigmas"))
    if hasattr(scheduler, "precondition_noise"):  # EDM and its kin
        levels, time_step, data = None, scheduler.precondition_noise, config["sigma_data"]
        ends = config["sigma_min"], config["sigma_max"]
        predicts = "edm" if predicts == "epsilon" else predicts
    else:
        levels = _flow_levels(config) if flow else _levels(scheduler)
        ascending = len(levels) > 1 and levels[0] > 0 and bool((np.diff(levels) > 0).all())
        allowed = "at least two, positive, and ascending without repeating"
        require(ascending, f"noise levels of {name}", levels.tolist(), allowed)
        time_step, ends = _between(levels), (levels[0], levels[-1])
        if flow:
            count = config["num_train_timesteps"]
            time_step = lambda sigma: count * sigma / (1 + sigma)  # noqa: E731
        elif config.get("timestep_type") == "continuous" and predicts == "v_prediction":
            levels, time_step = None, lambda sigma: sigma.log() / 4
            ends = config["sigma_min"] or ends[0], config["sigma_max"] or ends[1]
    return Convention(
        flow,
        (lambda sigma: 1 / (1 + sigma)) if flow else (lambda sigma: (sigma**2 + data**2).rsqrt()),
        time_step,
        lambda sigma, alpha: PREDICTIONS[predicts](sigma, alpha, data),
        levels,
        (float(ends[0]), float(ends[1])),
    )


def _levels(scheduler) -> np.ndarray:
    """The finite noise levels of a variance-preserving process."""
    name, known = type(scheduler).__name__, hasattr(scheduler, "alphas_cumprod")
    require(known, "scheduler", name, "one that lists its noise levels (alphas_cumprod)")
    alphas = np.asarray(scheduler.alphas_cumprod, dtype=np.float64)
    alphas = alphas[alphas > 0]
    return np.sqrt((1 - alphas) / alphas)


def _flow_levels(config) -> np.ndarray:
    """The finite noise levels of flow matching."""
    require(not config.get("invert_sigmas"), "invert_sigmas", True, "False")
    shift = config.get("flow_shift", config.get("shift", 1.0))
    u = np.arange(1, config["num_train_timesteps"]) / config["num_train_timesteps"]
    # A dynamic shift depends on the size of the sample; it is an option of `scheduler_times`.
    return (1.0 if config.get("use_dynamic_shifting") else shift) * u / (1 - u)


def _between(levels: np.ndarray) -> Callable:
    """The number of a level, from 0; linear in log sigma in between, constant beyond the ends."""
    table = torch.from_numpy(np.log(levels))

    @cache
    def on(device):  # copied to a device once, which waits for it
        return table.to(device)

    def time_step(sigma):
        log_sigma, logs = sigma.log(), on(sigma.device)
        above = torch.searchsorted(logs, log_sigma.detach()).clamp(1, len(logs) - 1)
        low, high = logs[above - 1], logs[above]
        return above - 1 + ((log_sigma - low) / (high - low)).clamp(0, 1)

    return time_step


def scheduler_times(scheduler, num_inference_steps: int, **options) -> torch.Tensor:
    """The noise levels at which a scheduler of diffusers evaluates, as times for ``sample``, [N].

    A final zero is left out: D at the last time is what the scheduler's step to zero gives.

    Args:
        num_inference_steps: as in diffusers.
        options: of the scheduler's ``set_timesteps``, such as ``mu``.

    Raises:
        ValueError: they repeat, as rounding makes them where there are few levels.
    """
    found = convention(scheduler)
    scheduler = copy.deepcopy(scheduler)  # whoever gave it may be using it
    scheduler.set_timesteps(num_inference_steps, **options)
    if hasattr(scheduler, "sigmas"):  # schedulers of second order name each twice
        sigmas = np.asarray(scheduler.sigmas, dtype=np.float64)[:: scheduler.order]
    else:  # PNDM evaluates twice at one of them
        sigmas = found.levels[np.unique(np.asarray(scheduler.timesteps))[::-1]]
    if len(sigmas) > 1 and sigmas[-1] in (0, sigmas[-2]):
        sigmas = sigmas[:-1]
    if found.flow:
        with np.errstate(divide="ignore"):
            sigmas = (sigmas / (1 - sigmas)).clip(max=found.ends[1])
    descending = len(sigmas) > 1 and bool((np.diff(sigmas) < 0).all())
    what = f"noise levels of {type(scheduler).__name__} for {num_inference_steps} steps"
    require(descending, what, sigmas.tolist(), "at least two that descend without repeating")
    return torch.from_numpy(sigmas.copy())
