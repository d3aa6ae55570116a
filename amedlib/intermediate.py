"""Where inside a step the extra evaluation is: a fixed r, a searched table, or learned by g_phi.

An intermediate is any callable ``(step, t_cur, t_next, bottleneck) -> Intermediate`` and is asked
once per interval, after the evaluation at t_cur. The intermediate time is the weighted geometric
mean s = t_next^r t_cur^(1-r) (Sec. 3.3): r = 0 is t_cur, r = 1 is t_next.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn

from amedlib.checks import is_number, one_of, require


class Intermediate(NamedTuple):
    """Where and how the second evaluation of a step is made.

    Each is a number, a 0-dimensional tensor or [B, 1, 1, 1].

    Attributes:
        r: location in (0, 1).
        scale_dir: c_n of the final version of the paper; multiplies the step that follows.
        scale_time: a_n of the final version; the network is told the time ``scale_time * s``.
    """

    r: torch.Tensor | float
    scale_dir: torch.Tensor | float = 1.0
    scale_time: torch.Tensor | float = 1.0


class Directions(NamedTuple):
    """An ``Intermediate`` of more freedom: any number of points, and the solver's coefficients.

    Attributes:
        r, scale_time: as of ``Intermediate``, one for each of K points that are evaluated side by
            side; none for a step without a second evaluation.
        weights: of these points; what they find counts as one evaluation, their weighted mean (the
            parallel directions of EPD, Zhu et al., 2025).
        scale_dir: as of ``Intermediate``.
        coefficients: what is added to the solver's own coefficients in the step that follows: for
            j = 0, 1, ... a multiple of the first-order step with the j-th backward difference of
            the outputs in the history. With them a multistep solver is any other (S4S).
    """

    r: tuple = ()
    scale_time: tuple = ()
    weights: tuple = ()
    scale_dir: torch.Tensor | float = 1.0
    coefficients: tuple = ()


def directions(found: Intermediate | Directions) -> Directions:
    """What an intermediate returned, in the form of more freedom."""
    if isinstance(found, Directions):
        return found
    r, scale_dir, scale_time = found
    return Directions((r,), (scale_time,), (1.0,), scale_dir)


@torch.no_grad()
def numbers(intermediate, times: torch.Tensor) -> list[Directions]:
    """The numbers of an intermediate for every step between ``times``, as Python's own.

    Raises:
        ValueError: they depend on the sample.
    """
    require(
        not getattr(intermediate, "uses_bottleneck", False),
        "the predictor",
        "one that uses the bottleneck",
        'one whose numbers all samples share: train with form="table" or uses_bottleneck=False',
    )
    steps = []
    for n, (t_cur, t_next) in enumerate(pairwise(times)):
        r, scale_time, weights, scale_dir, coefficients = directions(
            intermediate(n, t_cur, t_next, None)
        )
        several = [tuple(map(float, each)) for each in (r, scale_time, weights)]
        steps.append(Directions(*several, float(scale_dir), tuple(map(float, coefficients))))
    return steps


class TimeWise:
    """The same r for all samples: one number for all steps, or a table with one per step."""

    def __init__(self, r: float | Sequence[float]):
        given = r.tolist() if hasattr(r, "tolist") else r
        self.constant = is_number(given)
        table = [given] if self.constant else given
        require(
            isinstance(table, Sequence)
            and len(table) > 0
            and all(is_number(value) and 0 < value < 1 for value in table),
            "r",
            r,
            "strictly between 0 and 1",
        )
        self.table = [float(value) for value in table]

    def check(self, intervals: int) -> None:
        """Raise ``ValueError`` unless there is an r for each of ``intervals`` steps."""
        require(
            self.constant or len(self.table) == intervals,
            "the length of r",
            len(self.table),
            f"the number of steps, {intervals}",
        )

    def __call__(self, step, t_cur, t_next, bottleneck) -> Intermediate:
        return Intermediate(self.table[0] if self.constant else self.table[step])


FORMS = ("paper", "release")


class Predictor(nn.Module):
    """g_phi: predicts the intermediate from the U-Net's bottleneck and the times (Fig. 6, Eq. 11).

    The channel mean of the bottleneck goes through two layers, the raw noise level through a
    sinusoidal embedding and a layer; one linear layer and a sigmoid give each output.

    Args:
        form: ``"paper"``: r from the bottleneck and t_cur (Eq. 11). ``"release"``: t_next is an
            input as well, and scale_dir and scale_time are outputs where their bound is not zero.
        bottleneck_size: (h, w) of the bottleneck.
        scale_dir, scale_time: bounds b; the output lies in (1 - b, 1 + b). Zero fixes it at 1.
        uses_bottleneck: ``False`` feeds zeros, which gives the time-wise variant (Table 3).

    The parameter names are those of the released predictors.
    """

    hidden, encoded, frequencies = 128, 4, 4
    trained_for = None  # the record of its training; then `sample` refuses another method

    def __init__(
        self,
        form: str = "release",
        bottleneck_size: tuple[int, int] = (8, 8),
        scale_dir: float = 0.01,
        scale_time: float = 0.0,
        uses_bottleneck: bool = True,
    ):
        super().__init__()
        one_of("form", form, FORMS)
        for name, bound in (("scale_dir", scale_dir), ("scale_time", scale_time)):
            require(0 <= bound < 1, name, bound, "a bound in [0, 1)")
            require(form == "release" or bound == 0, name, bound, 'zero in the form "paper"')
        self.form, self.bottleneck_size = form, tuple(bottleneck_size)
        self.scale_dir, self.scale_time = scale_dir, scale_time
        self.uses_bottleneck = uses_bottleneck
        embedded = 2 * self.frequencies
        inputs = self.encoded + (2 if form == "release" else 1) * embedded
        # The same weights whatever the defaults of the process are.
        linear = partial(nn.Linear, dtype=torch.float32, device="cpu")
        self.map_layer0 = linear(embedded, embedded)
        self.enc_layer0 = linear(self.bottleneck_size[0] * self.bottleneck_size[1], self.hidden)
        self.enc_layer1 = linear(self.hidden, self.encoded)
        self.fc_r = linear(inputs, 1)
        if scale_dir:
            self.fc_scale_dir = linear(inputs, 1)
        if scale_time:
            self.fc_scale_time = linear(inputs, 1)
        for name, layer in self.named_children():
            nn.init.zeros_(layer.bias)
            if name == "map_layer0":
                nn.init.xavier_uniform_(layer.weight)
            else:
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)

    def _embed(self, t):
        k = torch.arange(self.frequencies, device=t.device, dtype=torch.float32)
        # Single precision on purpose: these frequencies belong to the released predictors.
        frequency = ((1 / 10000) ** (k / (self.frequencies - 1))).to(t.dtype)
        angle = t.reshape(1, 1) * frequency
        embedding = torch.cat([angle.sin(), angle.cos()], dim=1)
        return nn.functional.silu(self.map_layer0(embedding))

    def forward(self, step, t_cur, t_next, bottleneck) -> Intermediate:
        """Predict for one interval.

        Args:
            step: number of the interval; not used, the times tell it.
            t_cur, t_next: numbers or 0-dimensional tensors.
            bottleneck: [B, Ch, h, w], its channel mean [B, h, w], or ``None`` for zeros (under the
                analytical first step there is no evaluation to take it from).

        Returns:
            Intermediate with entries [B, 1, 1, 1], or [1, 1, 1, 1] when all samples share them.
        """
        weight = self.fc_r.weight
        if bottleneck is None or not self.uses_bottleneck:
            bottleneck = weight.new_zeros(1, *self.bottleneck_size)
        if bottleneck.ndim == 4:
            bottleneck = bottleneck.mean(1)
        hidden = nn.functional.silu(self.enc_layer0(bottleneck.to(weight).flatten(1)))
        hidden = self.enc_layer1(hidden)
        times = [t_cur, t_next] if self.form == "release" else [t_cur]
        embedded = [self._embed(torch.as_tensor(t).to(weight)) for t in times]
        hidden = torch.cat([hidden, *[e.expand(len(hidden), -1) for e in embedded]], dim=1)

        def output(layer):
            return torch.sigmoid(layer(hidden)).reshape(-1, 1, 1, 1)

        def near_one(bound, name):
            return 1 - bound + 2 * bound * output(getattr(self, name)) if bound else 1.0

        return Intermediate(
            output(self.fc_r),
            near_one(self.scale_dir, "fc_scale_dir"),
            near_one(self.scale_time, "fc_scale_time"),
        )
