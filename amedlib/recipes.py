"""What determines the training of a predictor."""

import math
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field, replace

import torch

from amedlib.checks import flag, is_number, one_of, require, whole
from amedlib.compute import in_batches
from amedlib.freedoms import FREEDOMS
from amedlib.intermediate import FORMS
from amedlib.method import Method
from amedlib.sampling import make_latents, num_steps_for, sample
from amedlib.solvers import canonical_options, make_solver

# What the paper's text and the released code do differently. The start of a step: from the
# student's own previous output (Algorithm 1), or from the teacher's sample (the released code, for
# single-step solvers only).
RECIPES = {
    "paper": {"form": "paper", "scale_dir": 0.0, "images": 20_000, "start": "student"},
    "release": {"form": "release", "scale_dir": 0.01, "images": 10_000, "start": "teacher"},
}


# The method of the paper and those that came after it, as fields of ``Training``. Where one of them
# was trained with another optimiser, more trajectories or another distance, that is not repeated
# here: a few trajectories at once by L-BFGS serve all tables the same.
_TABLE = {"recipe": "paper", "form": "table", "uses_bottleneck": False}
_END = {"objective": "endpoint", "teacher": "heun", "m": 8}
_FREE = _TABLE | _END | {"optimizer": "lbfgs", "images": 64, "passes": 8}
PRESETS = {
    "amed": {"recipe": "paper"},
    "amed-release": {"recipe": "release"},
    "gits": _TABLE | {"freedoms": ("times",), "objective": "search", "images": 256},
    "ld3": _FREE | {"freedoms": ("times", "network_times")},
    "s4s": _FREE | {"freedoms": ("coefficients",)},
    "s4s-alt": _FREE | {"freedoms": ("times", "coefficients")},
    "epd": _FREE | {"freedoms": ("r", "scale_dir", "scale_time"), "points": 2},
    "all": _FREE | {"freedoms": ("times", "network_times", "coefficients")},
}


LOSSES = ("l2", "features", "lpips")


OBJECTIVES = ("step", "endpoint", "search")


OPTIMIZERS = ("adam", "lbfgs")


def makes_second_evaluation(form: str | None = None, freedoms=("r",), **rest) -> bool:
    """Whether steps that are trained so have an intermediate point; fields of ``Training``."""
    return form != "table" or "r" in freedoms


# Training latents come from seeds that no evaluation uses.
FIRST_TRAINING_SEED = 10**12


@dataclass(frozen=True)
class Training(Method):
    """Everything that determines a predictor, but the denoiser.

    ``None`` stands for what the recipe says; after construction no field is ``None``.

    Attributes:
        solver, options, schedule, rho, sigma_min, sigma_max, noise_levels, afs, precision: of the
            student, see ``Method``. The teacher never uses AFS.
        num_steps: number of the student's time points.
        recipe: ``"paper"`` or ``"release"``.
        teacher: solver of the teacher; the student's unless given, Heun for AMED-Solver.
        teacher_options: its options, where it is another solver than the student.
        m: M, the number of smooth intermediate steps of the teacher in every interval (Eq. 13).
        loss: ``"l2"`` (squared), ``"features"`` or ``"lpips"``.
        objective: ``"step"``: the distance to the teacher after every step, each by itself
            (Algorithm 1). ``"endpoint"``: the distance of the final states alone, differentiated
            through the whole trajectory, as LD3 and S4S train their few scalars. ``"search"``:
            nothing is differentiated; the times are those of ``search_schedule`` (GITS), of the
            ``FINE`` points of the same schedule.
        form, scale_dir, scale_time, uses_bottleneck: see ``Predictor``; the form ``"table"`` is
            ``LearnedTable``, which uses no bottleneck.
        freedoms: what is learned, see ``LearnedTable``. In the form ``"table"`` a table of all of
            them; else the network predicts r, and scale_dir and scale_time where their bounds are
            not zero, and a table the rest.
        points: K, the number of intermediate points that a table has in a step.
        passes: how often the trajectories are seen; their ends are computed once.
        soft: radius of the ball around its latents in which the student may begin, in their units
            (the soft teacher of LD3); zero is off. Before every pass but the first each latent
            moves downhill by a quarter of it, and stays where that brings its end no nearer.
        optimizer: ``"adam"``, or ``"lbfgs"``, which takes all trajectories at once, with ten
            iterations in every pass. It needs no learning rate: it finds by itself how much the
            end moves with each freedom.
        start: where the student starts a step, ``"student"`` or ``"teacher"``.
        images: trajectories seen in training; a whole number of batches is used.
        batch: trajectories per update; every batch makes one update per step, or only one with the
            objective ``"endpoint"``.
        learning_rate: of Adam.
        gradient: ``"reverse"`` or ``"forward"`` differentiation of the network.
        seed: of the predictor's initial weights and of the training latents.
    """

    solver: str = "amed"
    options: dict = field(default_factory=dict)
    _: KW_ONLY
    num_steps: int = 4
    afs: bool = True
    recipe: str = "release"
    teacher: str | None = None
    teacher_options: dict = field(default_factory=dict)
    m: int = 1
    loss: str = "l2"
    objective: str = "step"
    form: str | None = None
    scale_dir: float | None = None
    scale_time: float = 0.0
    uses_bottleneck: bool = True
    start: str | None = None
    images: int | None = None
    batch: int = 128
    learning_rate: float = 5e-3
    gradient: str = "reverse"
    seed: int = 0
    freedoms: tuple[str, ...] = ("r",)
    points: int = 1
    passes: int = 1
    optimizer: str = "adam"
    soft: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        self._check_freedoms()
        self._complete()
        self._check_choices()
        self._check_numbers()
        same = self.teacher == self.solver  # it shares the student's options
        own = {} if same else canonical_options(self.teacher, self.teacher_options)
        self._set(teacher_options=own)

    @classmethod
    def preset(cls, name: str, **fields) -> "Training":
        """A method by name, one of ``PRESETS``.

        Args:
            fields: go before what the preset says.

        Raises:
            ValueError: no such preset, or a field is outside its range.
        """
        one_of("preset", name, PRESETS)
        return cls(**PRESETS[name] | fields)

    def _complete(self):
        """Say what the recipe says where nothing is said."""
        one_of("recipe", self.recipe, RECIPES)
        defaults = dict(RECIPES[self.recipe])
        defaults["teacher"] = "heun" if self.solver == "amed" else self.solver
        many = not self.make_solver().single_step and self.solver != "euler"
        if many or self.objective != "step":  # the trajectory is the student's own
            defaults["start"] = "student"
        self._set(**{name: v for name, v in defaults.items() if getattr(self, name) is None})

    def _check_freedoms(self):
        given = self.freedoms
        require(
            isinstance(given, list | tuple) and len(given) > 0 and len(set(given)) == len(given),
            "freedoms",
            given,
            "a list of different names",
        )
        for name in given:
            one_of("a freedom", name, FREEDOMS)
        self._set(freedoms=tuple(name for name in FREEDOMS if name in given))

    def _check_choices(self):
        for name, allowed in {
            "loss": LOSSES,
            "form": (*FORMS, "table"),
            "objective": OBJECTIVES,
            "optimizer": OPTIMIZERS,
            "start": ("student", "teacher"),
            "gradient": ("reverse", "forward"),
            "teacher": TEACHERS,
        }.items():
            one_of(name, getattr(self, name), allowed)
        require(
            isinstance(self.teacher_options, dict),
            "teacher_options",
            self.teacher_options,
            "a dictionary",
        )
        self._set(uses_bottleneck=flag("uses_bottleneck", self.uses_bottleneck))
        solver = self.make_solver()
        require(
            self.start == "student" or solver.memory <= 2 and solver.order == 1,
            "start",
            self.start,
            f"'student' for {self.solver!r}, whose history belongs to its own trajectory",
        )
        require(
            self.form != "table" or not self.uses_bottleneck,
            "uses_bottleneck",
            self.uses_bottleneck,
            'False in the form "table"',
        )
        self._check_freedoms_fit(solver)
        whole = {"start": "student", "gradient": "reverse"}
        for name, value in whole.items() if self.objective != "step" else ():
            given = getattr(self, name)
            require(given == value, name, given, f"{value!r} for the objective {self.objective!r}")

    def _check_freedoms_fit(self, solver):
        """That what is learned goes together with how, and with the solver."""
        free, table = self.freedoms, self.form == "table"
        for name, value, needed in (
            ("objective", "endpoint", self.passes > 1 or self.optimizer == "lbfgs"),
            ("objective", "endpoint", "times" in free and self.objective != "search"),
            ("objective", "step", self.objective == "search" and (free != ("times",) or not table)),
            ("soft", 0.0, self.passes == 1),
            ("gradient", "reverse", free != ("r",)),
            ("points", 1, not table or "r" not in free),
        ):
            given = getattr(self, name)
            how = f"{value!r} for the freedoms {free} and {self.passes} passes in this form"
            require(given == value or not needed, name, given, how)
        for name, needed, allowed in (
            ("r", solver.single_step and table, "with 'r' for a single-step solver"),
            ("coefficients", self.solver == "unipc", "without 'coefficients' for UniPC"),
        ):
            require((name in free) == (name == "r") or not needed, "freedoms", free, allowed)

    def _check_numbers(self):
        for name, low, high, allowed in (
            ("m", 1, 10**6, "a whole number of at least 1"),
            ("images", 1, 10**12, "a whole number of at least 1"),
            ("passes", 1, 10**6, "a whole number of at least 1"),
            ("points", 1, 100, "a whole number of at least 1"),
            ("batch", 1, 10**12, "a whole number of at least 1"),
            ("num_steps", 2, 10**6, "a whole number of at least 2 time points"),
            ("seed", 0, 999, "a whole number from 0 to 999"),
        ):
            self._set(**{name: whole(name, getattr(self, name), low, high, allowed)})
        for name in ("scale_dir", "scale_time"):
            value = getattr(self, name)
            require(is_number(value) and 0 <= value < 1, name, value, "a bound in [0, 1)")
        require(
            self.form == "release" or not (self.scale_dir or self.scale_time),
            "scale_dir and scale_time",
            (self.scale_dir, self.scale_time),
            f'zero in the form "{self.form}", which predicts r only',
        )
        soft = self.soft
        require(is_number(soft) and 0 <= soft < math.inf, "soft", soft, "a radius of at least zero")
        rate = self.learning_rate
        require(
            is_number(rate) and 0 < rate < math.inf,
            "learning_rate",
            rate,
            "a positive number",
        )
        floats = ("scale_dir", "scale_time", "learning_rate", "soft")
        self._set(**{name: float(getattr(self, name)) for name in floats})

    @property
    def whole(self) -> bool:
        """Whether all trajectories are taken at once, not batch by batch."""
        return self.optimizer == "lbfgs" or self.objective == "search"

    def times(self, refinement: int = 1) -> torch.Tensor:
        """The student's time points; with ``refinement = m + 1`` the teacher's."""
        return self.time_points(refinement * (self.num_steps - 1) + 1)

    def teacher_times(self) -> torch.Tensor:
        """The teacher's time points; every (m+1)-th is the student's, to the last bit."""
        times = self.times(self.m + 1)
        times[:: self.m + 1] = self.times()
        return times

    def teacher_solver(self):
        """The teacher; it shares the student's options where it is the same solver."""
        same = self.teacher == self.solver
        return make_solver(self.teacher, **(self.options if same else self.teacher_options))


TEACHERS = ("euler", "heun", "dpm2", "ipndm", "deis", "dpmpp", "unipc")


def noise_range(denoiser, sigma_min=None, sigma_max=None) -> dict[str, float]:
    """The ends of a schedule: those given, else the denoiser's own, else EDM's 0.002 and 80."""
    found = {}
    for name, given, usual in (("sigma_min", sigma_min, 0.002), ("sigma_max", sigma_max, 80.0)):
        own = getattr(denoiser, name, None)
        known = isinstance(own, int | float) and 0 < own < math.inf
        found[name] = given if given is not None else float(own) if known else usual
    return found


def best_start(denoiser, config: Training, shape, device="cpu", labels=None) -> tuple:
    """A training from the order whose untrained solver ends nearest to the teacher, on a denoiser.

    What is learned is found by descent: from a solver that is far off on a model, such as iPNDM of
    order 4 on one that is not smooth, it takes many times as long. To try the orders costs little
    beside the teacher.

    Args:
        config: whose solver has an order, and whose teacher is another.
        shape, device, labels: as in ``Trainer``.

    Returns:
        The training with that order, and the evaluations that the choice took.

    Raises:
        ValueError: the teacher's samples are not finite.
    """
    seeds = list(range(FIRST_TRAINING_SEED, FIRST_TRAINING_SEED + config.images))
    errors, made = {}, 0

    def ends(times, solver, afs) -> torch.Tensor:
        nonlocal made

        def work(part):
            latents = make_latents(part, shape, device)
            given = labels and labels(part)
            return sample(denoiser, latents, times, solver, afs, labels=given)

        parts = list(in_batches(seeds, config.batch, work))
        made += parts[0].nfe * len(seeds)
        return torch.cat([part.x for part in parts])

    solution = ends(config.teacher_times(), config.teacher_solver(), False)
    for order in range(1, 5):
        trial = replace(config, options={"order": order})
        with suppress(ValueError):  # this one diverges here
            found = ends(trial.times(), trial.make_solver(), trial.afs)
            errors[order] = (found - solution).square().mean().item()
    order = min(errors, key=errors.get, default=4)
    return replace(config, options={"order": order}), made


def default_training(denoiser, nfe: int, **fields) -> Training:
    """What this book recommends for a model of one's own: times and coefficients of iPNDM, learned.

    The preset ``"all"`` with AFS, for the noise range of the denoiser (``noise_range``).

    Args:
        nfe: network evaluations per sample.
        fields: of ``Training``, before what is said here.

    Raises:
        ValueError: the denoiser cannot make this NFE, or a field is outside its range.
    """
    solver, afs = make_solver("ipndm"), fields.get("afs", True)
    per_call = getattr(denoiser, "evaluations_per_call", 1)
    points = num_steps_for(nfe, solver, afs, False, per_call)
    given = {"solver": "ipndm", "num_steps": points, "afs": afs} | noise_range(denoiser)
    return Training.preset("all", **given | fields)
