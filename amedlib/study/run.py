"""A number is a Result; what determines it is a Run."""

import hashlib
import json
from dataclasses import MISSING, asdict, dataclass, fields

import torch

from amedlib.checks import is_number, one_of, plain, require, whole
from amedlib.datasets.entries import DATASETS, describe
from amedlib.intermediate import TimeWise
from amedlib.method import Method
from amedlib.metrics import jackknife_error
from amedlib.recipes import FIRST_TRAINING_SEED, Training, makes_second_evaluation
from amedlib.sampling import num_steps_for
from amedlib.solvers import TwoStage

BLOCKS = 10  # disjoint blocks of samples, for the jackknife
# What is measured of the samples of a method, and what else is measured.
FRECHET = ("fd", "fd_pixels", "fd_joint")
OF_SAMPLES = (*FRECHET, "endpoint_error")
METRICS = (
    *OF_SAMPLES,
    *("endpoint_accuracy", "floor_fd", "floor_fd_pixels", "floor_fd_joint", "trajectory_pca"),
    *("grid_search", "local_error", "learned_r", "first_slope"),
)


@dataclass(frozen=True)
class Run(Method):
    """Everything that determines a number.

    Attributes:
        metric: what is measured, one of ``METRICS``; ``procedures.py`` says how.
        dataset: a name that ``load_dataset`` knows.
        solver, options, schedule, rho, sigma_min, sigma_max, noise_levels, afs, precision: see
            ``Method``.
        nfe: network evaluations per sample, those that are made side by side counted once; the
            number of time points follows from it.
        r: intermediate of fixed location: a number, or one per step, or ``"searched"``: those that
            a grid search finds (the metric ``"grid_search"``) on as many samples as a predictor
            is trained with here, none of them among those that are measured.
        predictor: learned intermediate: fields of ``Training`` that are not stated here; completed
            with what its recipe says, so that the Run names every one of them. Its ``num_steps`` is
            the Run's own unless stated: that of another Run whose predictor serves here. So may
            ``trained_on``, a data set, be another than the Run's.
        samples: number of samples.
        first_seed: sample i is drawn from seed ``first_seed + i``.

    Raises:
        ValueError: a field is outside its range, or the method cannot have this NFE.
    """

    metric: str = "fd"
    dataset: str = "digits"
    nfe: int = 5
    r: float | tuple[float, ...] | str | None = None
    predictor: dict | None = None
    samples: int = 5000
    first_seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        one_of("metric", self.metric, METRICS)
        self._check_samples()
        require(
            self.r is None or self.predictor is None,
            "r and predictor",
            (self.r, self.predictor),
            "given one at a time",
        )
        if self.r is not None and not (isinstance(self.r, str) and self.r == "searched"):
            self._check_r()
        if self.predictor is not None:
            self._complete_predictor()
        self.times()

    def _check_samples(self):
        data = describe(self.dataset)
        if self.metric in OF_SAMPLES:
            one_of(f"metric of {self.dataset!r}", self.metric, data.metrics)
        for name, low, high in (
            ("samples", 2 * BLOCKS, 10**8),
            ("first_seed", 0, 10**15),
            ("nfe", 1, 1000),
        ):
            allowed = f"a whole number of at least {low} and at most {high:,}"
            self._set(**{name: whole(name, getattr(self, name), low, high, allowed)})
        require(
            self.metric == "grid_search" or self.first_seed + self.samples <= FIRST_TRAINING_SEED,
            "first_seed",
            self.first_seed,
            f"such that all are below {FIRST_TRAINING_SEED:.0e}, where those of training begin",
        )
        require(
            self.metric != "endpoint_error" or self.samples <= data.endpoint_samples,
            "samples",
            self.samples,
            f"at most {data.endpoint_samples} for the endpoint error of {self.dataset!r}",
        )

    def _check_r(self):
        given = plain(self.r)
        several = isinstance(given, tuple | list)
        each = given if several else (given,)
        # Nearer to the ends, differences over the step drown in rounding.
        require(
            all(is_number(r) and 0.001 <= r <= 0.999 for r in each),
            "r",
            given,
            "strictly between 0 and 1, from 0.001 to 0.999; one number or one per step",
        )
        self._set(r=tuple(float(r) for r in each) if several else float(given))
        TimeWise(self.r).check(self.num_steps - 1)

    def _complete_predictor(self):
        given = self.predictor
        require(isinstance(given, dict), "predictor", given, "None or a dictionary")
        shared = [f.name for f in fields(Method)] + ["num_steps"]
        known = [f.name for f in fields(Training) if f.name not in shared]
        for name in given:
            one_of("a field of predictor", name, [*known, "num_steps", "trained_on"])
        one_of("trained_on of predictor", self.trained_on, DATASETS)
        full = asdict(self.training)
        if full["num_steps"] != self.num_steps:
            require(
                full["form"] != "table",
                "num_steps of predictor",
                full["num_steps"],
                f"the Run's own, {self.num_steps}, in the form 'table'",
            )
            known.append("num_steps")
        self._set(predictor={name: full[name] for name in known} | self._elsewhere)

    @property
    def num_steps(self) -> int:
        """Number of time points, from the NFE."""
        solver = self.make_solver()
        learned = self.predictor
        middle = self.r is not None or learned is not None and makes_second_evaluation(**learned)
        if isinstance(solver, TwoStage) and solver.r is None:
            require(
                middle, "r and predictor", None, f"given, one of them, for solver {self.solver!r}"
            )
        per_call = describe(self.dataset).evaluations_per_call
        return num_steps_for(self.nfe, solver, self.afs, middle, per_call)

    @property
    def training(self) -> Training:
        """The training of the predictor."""
        shared = {f.name: getattr(self, f.name) for f in fields(Method)}
        shared["num_steps"] = self.num_steps
        stated = {name: value for name, value in self.predictor.items() if name != "trained_on"}
        return Training(**shared | stated)

    @property
    def trained_on(self) -> str:
        """The data set that the predictor was trained on."""
        return (self.predictor or {}).get("trained_on", self.dataset)

    @property
    def _elsewhere(self) -> dict:
        """That data set, if it is another one than the Run's."""
        return {} if self.trained_on == self.dataset else {"trained_on": self.trained_on}

    def times(self) -> torch.Tensor:
        """The time points [N]."""
        return self.time_points(self.num_steps)

    def refined(self, every: int) -> torch.Tensor:
        """The time points with ``every`` steps for one."""
        return self.time_points(every * (self.num_steps - 1) + 1)

    def search(self) -> "Run":
        """The grid search for the r of a Run whose r is ``"searched"``."""
        images = Training(**describe(self.dataset).training | {"recipe": "paper"}).images
        fields = {"metric": "grid_search", "r": 0.5, "samples": images}
        return Run(**(asdict(self) | fields | {"first_seed": FIRST_TRAINING_SEED}))

    @property
    def key(self) -> str:
        """A hash of all fields that differ from their defaults.

        So a field that is added later leaves the results there are where they are. A default that
        is changed is found out when a result is loaded, since its file states every field.
        """
        predictor = self.predictor and flat(self.training) | self._elsewhere
        # Stored results have a version in their keys, which was never raised.
        stated = {"metric": self.metric, "predictor": predictor, "version": 1}
        return short_hash(flat(self) | stated)

    def with_metric(self, metric: str) -> "Run":
        """The same, measured otherwise."""
        return Run(**(asdict(self) | {"metric": metric}))


def changed(record) -> dict:
    """The fields of a dataclass that differ from their defaults."""
    defaults = {
        f.name: f.default if f.default_factory is MISSING else f.default_factory()
        for f in fields(record)
    }
    return {name: value for name, value in asdict(record).items() if value != defaults[name]}


def flat(record) -> dict:
    """What of a ``Run`` or ``Training`` its key is made of: what differs from the defaults.

    Keys are older than the default of ``thresholding``, which was on.
    """
    found = changed(record)
    teacher = getattr(record, "teacher", None)
    for name, solver in (("options", record.solver), ("teacher_options", teacher)):
        options = getattr(record, name, None)
        if solver in ("dpmpp", "unipc") and options:
            on = options.get("thresholding", False)
            options = {key: value for key, value in options.items() if key != "thresholding"}
            found[name] = options if on else options | {"thresholding": False}
    return found


def short_hash(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Result:
    """A measured number and where it comes from.

    Attributes:
        run: what was asked for.
        value: the number.
        replicates: its values with one of the disjoint blocks of samples left out in turn; empty
            where the procedure has no sampling error.
        curves: what belongs to the number and is more than one number, as named lists.
        nfe: evaluations per sample, counted.
        seconds: of computation, the blocks' added up; without training, search and the ODE's
            solution, which Runs share.
        device, versions, fingerprint, created: where, with what, by which code and weights, when.
    """

    run: Run
    value: float
    replicates: list[float]
    curves: dict[str, list]
    nfe: int
    seconds: float
    device: str
    versions: dict[str, str]
    fingerprint: str
    created: str

    @property
    def error(self) -> float:
        """Standard error of the value from sampling (block jackknife); 0 without replicates."""
        return jackknife_error(self.replicates) if self.replicates else 0.0
