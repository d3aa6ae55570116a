"""Training of g_phi: the student learns to meet its teacher after every step (Algorithm 1)."""

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import KW_ONLY, asdict, dataclass, field
from numbers import Real
from pathlib import Path

import torch
import torch.autograd.forward_ad as fwad
from tqdm.auto import tqdm

from amedlib.checks import one_of, require
from amedlib.compute import halved, in_precision
from amedlib.files import load_tensors, save_tensors
from amedlib.forward_mode import ForwardMode
from amedlib.intermediate import FORMS, LearnedTable, Predictor
from amedlib.method import Method
from amedlib.sampling import Sampler, make_latents
from amedlib.solvers import canonical_options, make_solver

# What the paper's text and the released code do differently. The start of a step: from the
# student's own previous output (Algorithm 1), or from the teacher's sample (the released code, for
# single-step solvers only).
RECIPES = {
    "paper": {"form": "paper", "scale_dir": 0.0, "images": 20_000, "start": "student"},
    "release": {"form": "release", "scale_dir": 0.01, "images": 10_000, "start": "teacher"},
}
LOSSES = ("l2", "features", "lpips")
OBJECTIVES = ("step", "endpoint")
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
            through the whole trajectory, as LD3 and S4S train their few scalars.
        form, scale_dir, scale_time, uses_bottleneck: see ``Predictor``; the form ``"table"`` is
            ``LearnedTable``, which uses no bottleneck.
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

    def __post_init__(self):
        super().__post_init__()
        self._complete()
        self._check_choices()
        self._check_numbers()
        same = self.teacher == self.solver  # it shares the student's options
        own = {} if same else canonical_options(self.teacher, self.teacher_options)
        self._set(teacher_options=own)

    def _complete(self):
        """Say what the recipe says where nothing is said."""
        one_of("recipe", self.recipe, RECIPES)
        defaults = dict(RECIPES[self.recipe])
        defaults["teacher"] = "heun" if self.solver == "amed" else self.solver
        many = not self.make_solver().single_step and self.solver != "euler"
        if many or self.objective == "endpoint":  # the trajectory is the student's own
            defaults["start"] = "student"
        self._set(**{name: v for name, v in defaults.items() if getattr(self, name) is None})

    def _check_choices(self):
        for name, allowed in {
            "loss": LOSSES,
            "form": (*FORMS, "table"),
            "objective": OBJECTIVES,
            "start": ("student", "teacher"),
            "gradient": ("reverse", "forward"),
            "teacher": TEACHERS,
            "uses_bottleneck": (True, False),
        }.items():
            one_of(name, getattr(self, name), allowed)
        require(
            isinstance(self.teacher_options, dict),
            "teacher_options",
            self.teacher_options,
            "a dictionary",
        )
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
        whole = {"start": "student", "gradient": "reverse"}
        for name, value in whole.items() if self.objective == "endpoint" else ():
            given = getattr(self, name)
            require(given == value, name, given, f"{value!r} for the objective 'endpoint'")

    def _check_numbers(self):
        for name, low, high, allowed in (
            ("m", 1, math.inf, "a whole number of at least 1"),
            ("images", 1, math.inf, "a whole number of at least 1"),
            ("batch", 1, math.inf, "a whole number of at least 1"),
            ("num_steps", 2, math.inf, "a whole number of at least 2 time points"),
            ("seed", 0, 999, "a whole number from 0 to 999"),
        ):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            require(whole and low <= value <= high, name, value, allowed)
        for name in ("scale_dir", "scale_time"):
            value = getattr(self, name)
            require(isinstance(value, Real) and 0 <= value < 1, name, value, "a bound in [0, 1)")
        require(
            self.form == "release" or not (self.scale_dir or self.scale_time),
            "scale_dir and scale_time",
            (self.scale_dir, self.scale_time),
            f'zero in the form "{self.form}", which predicts r only',
        )
        rate = self.learning_rate
        require(
            isinstance(rate, Real) and 0 < rate < math.inf,
            "learning_rate",
            rate,
            "a positive number",
        )
        floats = ("scale_dir", "scale_time", "learning_rate")
        self._set(**{name: float(getattr(self, name)) for name in floats})

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


def squared_l2(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Squared Euclidean distance of images, summed over their pixels: [B, C, H, W] twice to [B]."""
    return (x - y).square().flatten(1).sum(1)


# --- Algorithm 1 --------------------------------------------------------------------------------


def _teach(denoiser, x, config, labels):
    """The teacher's states at the student's times, and what it evaluated there.

    Returns:
        Two lists over n = 0..N-1: the states y_n, and for n < N-1 the evaluation (D, bottleneck) at
        y_n or ``None``.
    """
    times = config.teacher_times().to(x.device)
    teacher = Sampler(denoiser, x, times, config.teacher_solver(), labels=labels)
    states, evaluations = [], []
    for i in range(len(teacher.times) - 1):
        evaluated = teacher.advance()
        if i % (config.m + 1) == 0:
            states.append(teacher.start)
            evaluations.append(evaluated)
    teacher.finish()
    return [*states, teacher.x], evaluations


class Trainer:
    """Trains one predictor, batch by batch; what it holds can be saved and taken up again.

    Args:
        denoiser: the frozen network, a callable as in ``sample``; its parameters are not trained.
        config: see ``Training``.
        shape: of one sample, (C, H, W).
        distance: the loss, images twice [B, C, H, W] to [B]; squared L2 unless given.
        device: where the latents and the predictor are.
        labels: seeds to what the denoiser gets as labels; nothing unless given.
    """

    def __init__(
        self,
        denoiser,
        config: Training,
        shape: tuple[int, int, int],
        distance: Callable = squared_l2,
        device="cpu",
        labels: Callable | None = None,
    ):
        require(
            getattr(denoiser, "gives_bottleneck", False) or not config.uses_bottleneck,
            "uses_bottleneck",
            config.uses_bottleneck,
            "False for a denoiser that gives no bottleneck",
        )
        if isinstance(denoiser, torch.nn.Module):
            denoiser.requires_grad_(False)
        self.denoiser = in_precision(denoiser, config.precision)
        self.config, self.shape = config, shape
        self.distance, self.device = distance, device
        self.labels = labels or (lambda seeds: None)
        self.part = config.batch  # trajectories at a time; halved when the memory does not suffice
        self.times = config.times().to(device)
        self.solver = config.make_solver()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            size = getattr(denoiser, "bottleneck_size", (1, 1))
            self.predictor = make_predictor(config, size).to(device)
        self.optimizer = torch.optim.Adam(self.predictor.parameters(), config.learning_rate)
        self.batches = -(-config.images // config.batch)
        # Per batch and step: loss, r, its standard deviation; and the seconds spent on them all.
        self.log: list[list[tuple[float, float, float]]] = []
        self.seconds = 0.0

    def seeds(self, batch: int) -> range:
        """The seeds of the batch-th batch of training latents."""
        first = FIRST_TRAINING_SEED * (1 + self.config.seed) + batch * self.config.batch
        return range(first, first + self.config.batch)

    def losses(self, latents: torch.Tensor, labels=None):
        """Yield the loss of the batch (with its graph) and the r, [B, 1, 1, 1] or [], it judges.

        Step by step, with a list of one r; for the objective ``"endpoint"`` once, with all r. The
        caller may update the predictor in between; the next step sees the update.
        """
        config = self.config
        x = latents.to(torch.float64) * self.times[0]
        with torch.no_grad():
            targets, evaluations = _teach(self.denoiser, x, config, labels)
        forward = config.gradient == "forward"
        student_denoiser = ForwardMode(self.denoiser, self.predictor) if forward else self.denoiser
        seen = []

        def intermediate(*args):
            predict = student_denoiser.intermediate if forward else self.predictor
            out = predict(*args)
            seen.append(fwad.unpack_dual(out.r).primal.detach() if forward else out.r.detach())
            return out

        student = Sampler(
            student_denoiser, x, self.times, self.solver, config.afs, intermediate, labels
        )
        for n, target in enumerate(targets[1:]):
            # Student and teacher are at the same point here: one evaluation serves both.
            known = evaluations[n] if n == 0 or config.start == "teacher" else None
            if config.start == "teacher":
                student.x = targets[n]
            if forward:
                with fwad.dual_level():
                    student.advance(known)
                    student.x = fwad.unpack_dual(student.x).primal
            else:
                student.advance(known)
            if config.objective == "step":
                yield self.distance(student.x, target).mean(), seen[-1:]
                student.detach()
        if config.objective == "endpoint":
            student.finish()
            yield self.distance(student.x, targets[-1]).mean(), seen

    def step(self) -> None:
        """Train on the next batch: one update of the predictor per loss.

        A batch that does not fit the memory is taken in parts; its gradients are added up, so the
        result is the same.

        Raises:
            RuntimeError: not even one trajectory fits.
            ValueError: a loss is not finite.
        """
        start = time.perf_counter()
        before = copy.deepcopy((self.predictor.state_dict(), self.optimizer.state_dict()))
        while True:
            try:
                rows = self._step()
                break
            except torch.OutOfMemoryError as error:
                self.part = halved(self.part, "training", error)
                self.predictor.load_state_dict(before[0])
                self.optimizer.load_state_dict(before[1])
        self.log.append(rows)
        self.seconds += time.perf_counter() - start

    def _step(self) -> list[tuple[float, float, float]]:
        seeds = self.seeds(len(self.log))
        parts = [seeds[i : i + self.part] for i in range(0, len(seeds), self.part)]
        losses = [
            self.losses(make_latents(part, self.shape, self.device), self.labels(part))
            for part in parts
        ]
        rows = []
        while len(rows) < len(self.times) - 1:
            self.optimizer.zero_grad()
            total, locations = 0.0, []
            for part, each in zip(parts, losses, strict=True):
                loss, r = next(each)
                loss = loss * (len(part) / len(seeds))
                loss.backward()
                total += loss.item()
                locations.append(torch.stack([value.expand(len(part), 1, 1, 1) for value in r]))
            require(
                math.isfinite(total),
                f"the loss of batch {len(self.log)}, step {len(rows)},",
                total,
                "finite",
            )
            self.optimizer.step()
            for r in torch.cat(locations, dim=1):
                rows.append((total, r.mean().item(), r.std().item() if len(r) > 1 else 0.0))
        return rows

    def save(self, path: Path) -> None:
        """Write everything that is needed to go on from here."""
        tensors = {f"predictor/{k}": v for k, v in self.predictor.state_dict().items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam/{i}/{name}": torch.as_tensor(v) for name, v in state.items()}
        tensors["log"] = torch.tensor(self.log, dtype=torch.float64)
        tensors["seconds"] = torch.tensor(self.seconds, dtype=torch.float64)
        save_tensors(path, tensors, {"training": json.dumps(asdict(self.config))})

    def resume(self, path: Path) -> None:
        """Go on from what ``save`` wrote; a file of another training is refused."""
        tensors, metadata = load_tensors(path)
        require(
            Training(**json.loads(metadata["training"])) == self.config,
            "the checkpoint",
            str(path),
            "one of the same training",
        )
        self.predictor.load_state_dict(_below("predictor/", tensors))
        state = self.optimizer.state_dict()
        state["state"] = {}
        for name, value in _below("adam/", tensors).items():
            index, key = name.split("/")
            state["state"].setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict(state)
        self.log = tensors["log"].tolist()
        self.seconds = tensors["seconds"].item()


def _below(prefix, tensors):
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def make_predictor(config: Training, bottleneck_size: tuple[int, int] | None):
    """An untrained ``Predictor`` or, in the form ``"table"``, ``LearnedTable``."""
    if config.form == "table":
        return LearnedTable(config.num_steps - 1)
    return Predictor(
        config.form,
        bottleneck_size,
        config.scale_dir,
        config.scale_time,
        config.uses_bottleneck,
    )


def train(
    denoiser,
    config: Training,
    shape: tuple[int, int, int],
    path: Path,
    distance: Callable = squared_l2,
    device="cpu",
    progress: bool = True,
    labels: Callable | None = None,
) -> Predictor | LearnedTable:
    """Train a predictor, or load it if ``path`` holds it; an interrupted training goes on.

    Every 20 batches the state is kept in ``path`` with the suffix ``.partial``. The result is a
    safetensors file with the weights, the log of the last ten batches [10, N-1, 3] (for every step
    the loss that its r was trained on, mean and standard deviation of r over the batch), the
    seconds of training and the configuration. Arguments as in ``Trainer``.
    """
    path = Path(path)
    if path.is_file():
        return load_predictor(path, config)
    trainer = Trainer(denoiser, config, shape, distance, device, labels)
    partial = path.with_suffix(".partial")
    if partial.is_file():
        trainer.resume(partial)
    name = f"{config.solver}, {config.num_steps} points, seed {config.seed}"
    with tqdm(
        total=trainer.batches, initial=len(trainer.log), desc=name, disable=not progress
    ) as bar:
        while len(trainer.log) < trainer.batches:
            trainer.step()
            loss, r, _ = zip(*trainer.log[-1], strict=True)
            bar.set_postfix_str(
                f"loss {sum(loss):.3g}, r " + " ".join(f"{value:.2f}" for value in r)
            )
            bar.update()
            if len(trainer.log) % 20 == 0:
                trainer.save(partial)
    save_predictor(path, trainer)
    partial.unlink(missing_ok=True)
    return trainer.predictor.eval()


LOGGED = 10  # batches whose log is kept with a predictor: how training ended


def save_predictor(path: Path, trainer: Trainer) -> None:
    """Write a trained predictor with its log, the seconds it took and its full configuration."""
    predictor = trainer.predictor
    tensors = {f"predictor/{k}": v for k, v in predictor.state_dict().items()}
    tensors["log"] = torch.tensor(trainer.log[-LOGGED:], dtype=torch.float32)
    metadata = {
        "training": json.dumps(asdict(trainer.config)),
        "bottleneck_size": json.dumps(predictor.bottleneck_size),
        "seconds": f"{trainer.seconds:.3f}",
    }
    save_tensors(path, tensors, metadata)


def load_predictor(path: Path, config: Training | None = None) -> Predictor | LearnedTable:
    """Read what ``save_predictor`` wrote; with ``config``, only if it was trained so.

    Raises:
        ValueError: the file is missing, damaged, or of another training.
    """
    tensors, metadata = load_tensors(path)
    found = Training(**json.loads(metadata["training"]))
    require(
        config in (None, found), "the predictor", str(path), "of the training that is asked for"
    )
    predictor = make_predictor(found, json.loads(metadata["bottleneck_size"]))
    predictor.load_state_dict(_below("predictor/", tensors))
    return predictor.eval()
