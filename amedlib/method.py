"""The record of how something is sampled, which trainings, studies and trained samplers share."""

from dataclasses import dataclass, field

import torch

from amedlib.checks import flag, one_of, require
from amedlib.compute import PRECISIONS
from amedlib.schedules import canonical_rho, make_schedule
from amedlib.solvers import Solver, canonical_options, make_solver


@dataclass(frozen=True, kw_only=True)
class Method:
    """A solver on a schedule; the number of time points is stated by what uses it.

    Equal methods are equal records, however they were written down: after construction options and
    rho have one form (``canonical_options``, ``canonical_rho``), and ends are floats.

    Attributes:
        solver, options: as in ``make_solver``.
        schedule, rho, sigma_min, sigma_max: as in ``make_schedule``.
        noise_levels: the model's own, for the schedule ``"discrete"``; a schedule of any N given
            times is that of a model with these N levels.
        afs: analytical first step.
        precision: in which the network computes, see ``in_precision``.

    Raises:
        ValueError: a field is outside its range.
    """

    solver: str = "euler"
    options: dict = field(default_factory=dict)
    schedule: str = "polynomial"
    rho: float | None = None
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    noise_levels: str | tuple[float, ...] | None = None
    afs: bool = False
    precision: str = "float32"

    def __post_init__(self):
        require(isinstance(self.options, dict), "options", self.options, "a dictionary")
        one_of("precision", self.precision, PRECISIONS)
        self.time_points(2)  # refuses what is no schedule
        self._set(
            options=canonical_options(self.solver, self.options),
            afs=flag("afs", self.afs),
            rho=canonical_rho(self.schedule, self.rho),
            sigma_min=float(self.sigma_min),
            sigma_max=float(self.sigma_max),
        )
        if not isinstance(self.noise_levels, str | None):
            self._set(noise_levels=tuple(float(level) for level in self.noise_levels))

    def _set(self, **values) -> None:
        """Give fields their final form while the record is made."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def make_solver(self) -> Solver:
        """The solver."""
        return make_solver(self.solver, **self.options)

    def time_points(self, number: int) -> torch.Tensor:
        """``number`` time points of the schedule, descending."""
        ends = self.sigma_min, self.sigma_max
        return make_schedule(self.schedule, number, *ends, self.rho, self.noise_levels)
