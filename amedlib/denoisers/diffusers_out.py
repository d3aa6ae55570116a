"""Our samplers inside an unchanged pipeline of diffusers, as a scheduler.

A pipeline evaluates its network, and its scheduler says at which time and takes the steps. So the
one loop of ``sampling.py`` runs here up to the evaluation that is due next; the scheduler hands the
state and the time to the pipeline, and goes on with what comes back.

What cannot be had in a pipeline, and is refused with a sentence: predictors that look at the
bottleneck, which pipelines do not show; AFS with thresholding, where the first input of the network
is no multiple of the noise; beginning in the middle (image to image) and replacing samples on the
way (inpainting). Parallel points of a step are evaluated one after the other. Guidance is the
pipeline's, and so is the precision of the network; a sampler fits best to those that it was trained
with.
"""

import inspect
import json
from contextlib import contextmanager
from dataclasses import asdict

import numpy as np
import torch

from amedlib.checks import flag, require
from amedlib.denoisers.diffusers_models import library
from amedlib.denoisers.diffusers_pipelines import network_of
from amedlib.denoisers.diffusers_schedulers import convention
from amedlib.intermediate import Directions, numbers
from amedlib.sampling import Sampler, check_inputs, sample, tensor
from amedlib.solvers import SOLVERS, Solver, TwoStage, make_solver
from amedlib.trained import TrainedSampler

diffusers = library()
SchedulerMixin = diffusers.SchedulerMixin  # by this name diffusers looks for it, to load a pipeline

# A pipeline that never scales the noise begins with it as it is, if that is right to this fraction.
TOLERANCE = 0.02


class _Due(Exception):
    """An evaluation is due: of the state x, at the noise level sigma."""

    def __init__(self, x, sigma):
        self.x, self.sigma = x, sigma


class _Listed:
    """An intermediate whose times and numbers for every step are listed."""

    def __init__(self, times, network_times, steps):
        self.steps, self.found = steps, (times, network_times)

    @property
    def evaluates(self):
        return any(step["r"] for step in self.steps)

    def check(self, intervals):
        fields = set(Directions._fields)
        whole = len(self.steps) == intervals and all(set(each) == fields for each in self.steps)
        require(whole, "steps", self.steps, f"{intervals} of the fields {', '.join(fields)}")
        told = len(self.found[1])
        require(told >= intervals, "network_times", told, f"one for each of {intervals} steps")

    def schedule(self, times):
        return tuple(each.to(times) for each in self.found)

    def __call__(self, step, t_cur, t_next, bottleneck):
        return Directions(**self.steps[step])


class AmedlibScheduler(SchedulerMixin, diffusers.ConfigMixin):
    """A sampler whose numbers all samples share, for pipelines; made by ``to_diffusers``.

    It is saved and loaded as any scheduler of diffusers, alone or with its pipeline, as numbers in
    ``scheduler_config.json``. Each time step is one evaluation of the network, and at the end of
    the last the sample is that of ``amedlib.sample``.

    The first input of the network is the noise times ``first_scale``. Pipelines that call
    ``scale_model_input``, such as those of Stable Diffusion, begin with exactly that. The others
    (``DDPMPipeline``, and those of flow matching) begin with the noise itself, as with any
    scheduler: they sample as ours from latents that are the noise divided by ``first_scale``. Where
    that is more than 2 % from one, which AFS and learned network times can make it, they are
    refused outside of ``with scheduler.scaling(pipeline):``.

    Args:
        times: the N time points, descending.
        solver, options: as in ``make_solver``.
        afs: analytical first step.
        network_times: what the network is told at the beginnings of the steps; ``times`` unless
            given.
        steps: of an intermediate, the fields of ``Directions`` for every step.
        scheduler: configuration of the scheduler whose convention the network follows.

    Attributes:
        model_scheduler: that scheduler.
        num_inference_steps: evaluations of the network, the only number that pipelines may ask for.
        timesteps: what the network is told, [num_inference_steps].
        sigmas: their noise levels, and a zero; of flow matching t / (1 + t). Some pipelines read
            them.
        first_scale: see above.

    Raises:
        ValueError: an argument is not of this form.
    """

    order = 1  # time steps that belong together, by which pipelines count
    init_noise_sigma = 1.0

    @diffusers.configuration_utils.register_to_config
    def __init__(
        self,
        times: list[float] | None = None,
        solver: str | None = None,
        options: dict | None = None,
        afs: bool = False,
        network_times: list[float] | None = None,
        steps: list[dict] | None = None,
        scheduler: dict | None = None,
    ):
        self.model_scheduler = _scheduler_of(scheduler)
        self._convention = convention(self.model_scheduler)
        points = tensor("times", times, torch.float64).cpu()
        listed, made = None, make_solver(solver, **(options or {}))
        if steps is not None:
            told = tensor("network_times", network_times or times, torch.float64).cpu()
            listed = _Listed(points, told, steps)
        nonlinear = afs and getattr(made, "thresholding", False)
        require(not nonlinear, "thresholding", True, "False with AFS in a pipeline of diffusers")
        self._method = points, made, flag("afs", afs), listed
        asked = []

        def zero(x, t, labels=None):
            asked.append((x, t))
            return 0 * x

        sample(zero, torch.ones(1, 1, device="cpu"), *self._method)
        require(len(asked) > 0, "a sampler's evaluations", 0, "at least one in a pipeline")
        # Before the first evaluation there is at most AFS, which multiplies the noise by a number.
        (x, sigma), told = asked[0], torch.stack([t for _, t in asked])
        self.first_scale = float(self._convention.alpha(sigma) * x)
        self.timesteps = self._convention.time_step(told).float()
        self.num_inference_steps, self._outside = len(told), False
        levels = told * self._convention.alpha(told) if self._convention.flow else told
        self.sigmas = torch.cat([levels, levels.new_zeros(1)]).float()
        self.set_timesteps(self.num_inference_steps)

    @property
    def config(self):
        """The configuration, with what pipelines read of the model's scheduler."""
        both = {**self.model_scheduler.config, **self._internal_dict}
        return diffusers.configuration_utils.FrozenDict(both)

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None):
        """Begin anew.

        Args:
            num_inference_steps: the sampler's own number.
            device: of ``timesteps``.
            sigmas, mu: what pipelines of flow matching propose, equal spacing and a shift; not
                used.

        Raises:
            ValueError: another number, or other sigmas; the sampler has its own.
        """
        count = self.num_inference_steps
        if sigmas is not None:
            num_inference_steps = len(sigmas)
            equal = np.linspace(1, 1 / num_inference_steps, num_inference_steps)
            require(np.allclose(sigmas, equal), "sigmas", sigmas, "None: the sampler has its own")
        allowed = f"{count}, the evaluations of this sampler"
        require(num_inference_steps == count, "num_inference_steps", num_inference_steps, allowed)
        self.timesteps = self.timesteps.to(device=device)
        self._index, self._scaled, self._returned = 0, None, None
        self._sampler, self._made = None, []

    def set_begin_index(self, begin_index: int = 0):
        """Nothing: a sampler begins at its beginning.

        Raises:
            ValueError: another index.
        """
        require(begin_index == 0, "begin_index", begin_index, "0: no sampler begins in the middle")

    def scale_model_input(self, sample: torch.Tensor, timestep=None) -> torch.Tensor:
        """The network's input; only the first differs from the sample, by ``first_scale``."""
        return sample if self._outside else self._input(sample)

    def _input(self, sample):
        if self._index > 0:
            return sample
        # Rounded once, as the first input of `DiffusersDenoiser` is.
        self._scaled = (self.first_scale * sample.to(torch.float64)).to(sample.dtype)
        return self._scaled

    @contextmanager
    def scaling(self, pipeline):
        """Where a pipeline does not call ``scale_model_input``, its network does it here itself.

        ::

            with pipeline.scheduler.scaling(pipeline):
                pipeline(...)
        """
        network = network_of(pipeline)
        signature = inspect.signature(network.forward)
        name = next(iter(signature.parameters))

        def scale(module, args, options):
            call = signature.bind(*args, **options)
            call.arguments[name] = self._input(call.arguments[name])
            return call.args, call.kwargs

        hook = network.register_forward_pre_hook(scale, with_kwargs=True)
        self._outside = True
        try:
            yield
        finally:
            hook.remove()
            self._outside = False

    @torch.no_grad()
    def step(self, model_output, timestep, sample, generator=None, return_dict: bool = True):
        """Go on to the next evaluation, or to the end.

        Args:
            model_output: of the network, [B, ...].
            timestep: of ``timesteps``, one after the other.
            sample: what the latest step returned; first the noise, [B, ...].
            generator: not used.
            return_dict: whether the sample comes as ``prev_sample`` or in a tuple.

        Raises:
            ValueError: the pipeline does what cannot be had, see above; or samples become NaN or
                infinite.
        """
        self._check(timestep, sample)
        if self._index == 0:
            self._begin(sample)
        x, sigma = self._due
        output = model_output[:, : x.shape[1]].to(x.dtype)  # learned variances come last
        self._made.append(self._convention.denoised(x, sigma, output))
        self._due = x, sigma = self._next()
        self._index += 1
        if self._index == self.num_inference_steps:
            if not bool(torch.isfinite(x).all()):
                raise ValueError("Samples must be finite; NaN or inf arose in the pipeline.")
        else:
            x = self._convention.alpha(sigma) * x
        self._returned = x.to(sample.dtype)
        output = diffusers.schedulers.scheduling_utils.SchedulerOutput(self._returned)
        return output if return_dict else (self._returned,)

    def _check(self, timestep, sample):
        """That a pipeline goes through all steps and changes nothing in between."""
        index, count = self._index, self.num_inference_steps
        require(index < count, "steps", index + 1, f"{count}; set_timesteps begins anew")
        if index > 0:
            kept = sample is self._returned or torch.equal(sample, self._returned)
            allowed = "what the latest step returned: multistep samplers remember it"
            require(kept, "sample", "another one", allowed)
            return
        first = float(self.timesteps[0])
        require(float(timestep) == first, "the first time step", float(timestep), f"{first:g}")
        require(
            self._scaled is not None or abs(self.first_scale - 1) <= TOLERANCE,
            "the pipeline",
            "one that begins with the noise as it is",
            f"called within `with scheduler.scaling(pipeline):`, because its network begins with "
            f"{self.first_scale:.3g} times the noise",
        )

    def _begin(self, noise):
        times, solver, afs, listed = self._method
        # Some pipelines forget the noise for the scaled one (`DiTPipeline`).
        scaled = self._scaled is None or noise is self._scaled
        latents = noise.to(torch.float64) / (self.first_scale if scaled else 1.0)
        times = times.to(noise.device)
        self._sampler = Sampler(None, latents * times[0], times, solver, afs, listed)
        self._scaled, self._made = None, []
        self._due = self._next()

    def _next(self):
        """The state and the noise level of the evaluation that is due; None for the latter at last.

        An interval is crossed again for every evaluation in it, with those that have been made: at
        most as many times as it has points, at the cost of a solver's step.
        """
        while True:
            trial, made = self._sampler.fork(), iter(self._made)
            trial.denoiser = _asking(made)
            last = trial.interval == len(trial.times) - 1
            try:
                trial.finish() if last else trial.advance()
            except _Due as due:
                return due.x, due.sigma
            if last:
                return trial.x, None
            self._sampler, self._made = trial, []


def _asking(made):
    """A denoiser that has made some evaluations and asks for the next."""

    def denoiser(x, t, labels=None):
        for denoised in made:
            return denoised
        raise _Due(x, t)

    return denoiser


def _scheduler_of(config):
    """The scheduler of diffusers that a configuration describes."""
    name = (config or {}).get("_class_name")
    kind = getattr(diffusers, str(name), None)
    known = isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)
    require(known, "scheduler", name, "the configuration of a scheduler of diffusers")
    return kind.from_config(config)


def _written(solver: Solver) -> dict:
    """A solver's name and options for ``make_solver``."""
    two = isinstance(solver, TwoStage)
    name = next((name for name, kind in SOLVERS.items() if kind is type(solver)), None)
    require(name is not None, "solver", solver, "made by amedlib.make_solver")
    options = {} if name == "euler" else asdict(solver)
    if two:
        name, options = solver.name, {"r": solver.r} if solver.name == "dpm2" else {}
    return {"solver": name, "options": options}


def to_diffusers(
    sampler, scheduler, solver=None, afs: bool = False, intermediate=None
) -> AmedlibScheduler:
    """A sampler as a scheduler for pipelines of diffusers.

    ::

        pipeline.scheduler = amedlib.to_diffusers(trained, pipeline.scheduler)
        pipeline(..., num_inference_steps=pipeline.scheduler.num_inference_steps)

    Args:
        sampler: a ``TrainedSampler``, which says all the rest; or the time points of an untrained
            one, with ``solver``, ``afs`` and ``intermediate`` as in ``amedlib.sample``.
        scheduler: the one with which the network was trained, or any that says the same of it.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: the sampler cannot be had in a pipeline, or an argument is not of this form.
    """
    scheduler = getattr(scheduler, "model_scheduler", scheduler)
    known = isinstance(scheduler, diffusers.SchedulerMixin)
    require(known, "scheduler", type(scheduler).__name__, "a scheduler of diffusers")
    times = sampler
    if isinstance(sampler, TrainedSampler):
        require(solver is None, "solver", solver, "None for a trained sampler")
        training, intermediate = sampler.training, sampler.predictor.cpu()
        times, solver, afs = training.times(), training.make_solver(), training.afs
    times, found = tensor("times", times, torch.float64).cpu(), {}
    if not getattr(intermediate, "uses_bottleneck", False):  # which `numbers` refuses
        check_inputs(to_diffusers, torch.ones(1, 1), times, solver, intermediate)
    if intermediate is not None:
        learned = getattr(intermediate, "schedule", None)
        with torch.no_grad():
            times, told = learned(times) if learned else (times, times)
        steps = [step._asdict() for step in numbers(intermediate, times)]
        found = {"network_times": told.tolist(), "steps": json.loads(json.dumps(steps))}
    found |= _written(solver) | {"scheduler": json.loads(scheduler.to_json_string())}
    return AmedlibScheduler(times=times.tolist(), afs=afs, **found)
