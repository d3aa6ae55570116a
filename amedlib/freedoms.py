"""Learned tables: a few free numbers per step, the same for all samples, and no network.

Each kind of number is a *freedom* of the sampler; what is not named is fixed. The methods that came
after AMED differ in what they free: LD3 (Tong et al., 2025) the times, and apart from them those
that the network is told; S4S (Frankel et al., 2025) the solver's coefficients; EPD (Zhu et al.,
2025) several intermediate points of a step.
"""

import torch
from torch import nn

from amedlib.checks import require
from amedlib.intermediate import Directions, Intermediate

# In the order in which they act: where the steps are, what the network is told there, where the
# second evaluation is, how the step is scaled, what the network is told within, and how the step
# extrapolates.
FREEDOMS = ("times", "network_times", "r", "scale_dir", "scale_time", "coefficients")


class LearnedTable(nn.Module):
    """Free numbers for every step: a schedule, an intermediate, or both, that can be trained.

    It belongs to the number of steps that it was made for, and starts as the plain solver on the
    given times; with K > 1 points r starts at k / (K + 1) for k = 1..K, of equal weight.

    ================  ==========================================================================
    freedom           step n's numbers
    ================  ==========================================================================
    times             the step's share of log(t_0 / t_N), a softmax over all steps
    network_times     b: the network is told t_n exp(b) in the place of t_n
    r                 K locations, each through a sigmoid; and their weights, through a softmax
    scale_dir         c - 1, as in ``Directions``
    scale_time        log a for each of the K points
    coefficients      as in ``Directions`` in units of 0.05, one for every evaluation that the
                      solver remembers: a coefficient moves the end much more than a time does
    ================  ==========================================================================

    Args:
        times: N descending time points.
        freedoms: names from ``FREEDOMS``. Without ``"r"`` a step makes no second evaluation.
        points: K.
        memory: evaluations that the solver remembers.
        network: a ``Predictor`` of r, c_n and a_n for each sample, in the place of the table's.
    """

    trained_for = None  # as of ``Predictor``

    def __init__(self, times, freedoms=("r",), points=1, memory=1, network=None):
        super().__init__()
        self.freedoms, self.points, self.network = tuple(freedoms), points, network
        self.intervals = len(times) - 1
        shares = (times[:-1] / times[1:]).log()
        locations = (torch.arange(points) + 1.0) / (points + 1)
        initial = {
            "times": ("gaps", lambda n: shares[n].log()),
            "network_times": ("shifts", lambda n: torch.zeros(())),
            # A single r has no axis of points, as files have it that are older than they are.
            "r": ("logits", lambda n: locations.logit() if points > 1 else torch.zeros(())),
            "scale_dir": ("directions", lambda n: torch.zeros(())),
            "scale_time": ("inner_shifts", lambda n: torch.zeros(points)),
            "coefficients": ("coefficients", lambda n: torch.zeros(memory)),
        }
        for freedom in self.freedoms:
            name, value = initial[freedom]
            setattr(self, name, self._per_step(value))
        if "r" in self.freedoms and points > 1:
            self.weights = self._per_step(lambda n: torch.zeros(points))

    def _per_step(self, value) -> nn.ParameterList:
        # A parameter each: the optimiser then moves only those that a loss depends on.
        return nn.ParameterList(
            nn.Parameter(value(n).to("cpu", torch.float32)) for n in range(self.intervals)
        )

    @property
    def evaluates(self) -> bool:
        """Whether a step makes a second evaluation."""
        return self.network is not None or "r" in self.freedoms

    @property
    def uses_bottleneck(self) -> bool:
        """Whether what is predicted depends on the sample."""
        return self.network is not None and self.network.uses_bottleneck

    @property
    def bottleneck_size(self) -> tuple[int, int] | None:
        """That of the network, if there is one."""
        return getattr(self.network, "bottleneck_size", None)

    def check(self, intervals: int) -> None:
        """Raise ``ValueError`` unless there are numbers for each of ``intervals`` steps."""
        require(
            self.intervals == intervals,
            "the number of steps of a learned table",
            self.intervals,
            f"the number of steps, {intervals}",
        )

    def schedule(self, times: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The time points [N], float64, and those that the network is told, for a schedule's."""
        if "times" in self.freedoms:
            shares = torch.stack(list(self.gaps)).to(times).softmax(0)
            passed = shares.cumsum(0)[:-1]
            inner = times[0] ** (1 - passed) * times[-1] ** passed
            times = torch.cat([times[:1], inner, times[-1:]])
        if "network_times" not in self.freedoms:
            return times, times
        return times, times[:-1] * torch.stack(list(self.shifts)).to(times).exp()

    @torch.no_grad()
    def keep(self, times: torch.Tensor) -> None:
        """Take these N descending times for the table's own, to single precision."""
        for gap, share in zip(self.gaps, (times[:-1] / times[1:]).log(), strict=True):
            gap.copy_(share.log())

    def forward(self, step, t_cur, t_next, bottleneck) -> Intermediate | Directions:
        """The numbers of a step; the times are not used, the bottleneck by a network alone."""
        if self.freedoms == ("r",) and self.points == 1:
            return Intermediate(self.logits[step].sigmoid())
        r, scale_time, scale_dir = (), (), 1.0
        if self.network is not None:
            found = self.network(step, t_cur, t_next, bottleneck)
            r, scale_time, scale_dir = (found.r,), (found.scale_time,), found.scale_dir
        if "r" in self.freedoms:
            r = tuple(self.logits[step].sigmoid().reshape(-1))
        if "scale_time" in self.freedoms:
            scale_time = tuple(self.inner_shifts[step].exp())
        if "scale_dir" in self.freedoms:
            scale_dir = 1 + self.directions[step]
        return Directions(
            r,
            scale_time or (1.0,) * len(r),
            tuple(self.weights[step].softmax(0)) if self.points > 1 else (1.0,) * len(r),
            scale_dir,
            tuple(0.05 * self.coefficients[step]) if "coefficients" in self.freedoms else (),
        )
