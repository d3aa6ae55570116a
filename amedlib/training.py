"""Training of g_phi: the student learns to meet its teacher after every step (Algorithm 1)."""

import copy
import json
import math
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.autograd.forward_ad as fwad
from tqdm import tqdm

from amedlib import checks
from amedlib.checks import is_number, is_whole, require
from amedlib.compute import best_device, check_precision, halved, in_precision
from amedlib.files import Damaged, check_writable, load_tensors, reading, save_tensors
from amedlib.forward_mode import ForwardMode
from amedlib.freedoms import LearnedTable
from amedlib.intermediate import Predictor
from amedlib.optimizer_state import flat, nested
from amedlib.recipes import FIRST_TRAINING_SEED, Training, best_start, default_training
from amedlib.sampling import Sampler, check_labels, make_latents
from amedlib.search import FINE, search_schedule
from amedlib.trained import (
    below,
    load_predictor,
    make_predictor,
    save_predictor,
    weights_fingerprint,
)
from amedlib.wrapper import Wrapper, unwrapped


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
    return teacher.run(config.m + 1)


class _Frozen(Wrapper):
    """A network whose parameters are constants in any graph, whatever else is done with them."""

    def __init__(self, denoiser):
        super().__init__(denoiser)
        inner = unwrapped(denoiser)
        parameters = inner.parameters() if isinstance(inner, torch.nn.Module) else ()
        self.learning = [each for each in parameters if each.requires_grad]
        self.evaluations = 0  # made so far, one for each sample

    def __call__(self, x, t, labels=None, **options):
        self.evaluations += len(x) * getattr(self.denoiser, "evaluations_per_call", 1)
        try:
            for each in self.learning:
                each.requires_grad_(False)
            return super().__call__(x, t, labels, **options)
        finally:
            for each in self.learning:
                each.requires_grad_(True)


def _location(r) -> torch.Tensor:
    """What the log shows of r: its value, the mean of several points, NaN where there is none."""
    if isinstance(r, tuple):
        r = torch.stack(r).mean(0) if r else torch.tensor(math.nan)
    return fwad.unpack_dual(r).primal.detach()


class Trainer:
    """Trains one predictor, batch by batch; what it holds can be saved and taken up again.

    Args:
        denoiser: the frozen network, a callable as in ``sample``; its parameters are not trained.
        config: see ``Training``.
        shape: of one sample, such as (C, H, W); any number of sizes.
        distance: the loss, images twice [B, C, H, W] to [B]; squared L2 unless given.
        device: where the latents and the predictor are.
        labels: seeds to what the denoiser gets as labels; nothing unless given.
    """

    def __init__(
        self,
        denoiser,
        config: Training,
        shape: tuple[int, ...],
        distance: Callable = squared_l2,
        device="cpu",
        labels: Callable | None = None,
    ):
        require(callable(denoiser), "denoiser", denoiser, "a callable (x, t, labels=None)")
        require(isinstance(config, Training), "config", config, "an amedlib.Training")
        shape, device = checks.shape("shape", shape), best_device(device)
        require(
            getattr(denoiser, "gives_bottleneck", False) or not config.uses_bottleneck,
            "uses_bottleneck",
            config.uses_bottleneck,
            "False for a denoiser that gives no bottleneck",
        )
        check_precision(denoiser)
        require(labels is None or callable(labels), "labels", labels, "None or a callable of seeds")
        self._counted = _Frozen(denoiser)
        self.denoiser = in_precision(self._counted, config.precision)
        self.config, self.shape = config, shape
        self.fingerprint = weights_fingerprint(denoiser)
        self.distance, self.device = distance, device
        self.labels = labels or (lambda seeds: None)
        self.part = config.batch  # trajectories at a time; halved when the memory does not suffice
        self.times = config.times().to(device)
        self.solver = config.make_solver()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            size = getattr(denoiser, "bottleneck_size", (1, 1))
            self.predictor = make_predictor(config, size).to(device)
        self.optimizer = self._make_optimizer()
        self.batches_per_pass = 1 if config.whole else -(-config.images // config.batch)
        self.batches = config.passes * self.batches_per_pass
        # Where the teacher ends, kept if a later pass needs it; and where the student begins, if
        # not where the teacher did; both by seed.
        self._ends: dict[int, torch.Tensor] = {}
        self._begins: dict[int, torch.Tensor] = {}
        # Per batch and step: loss, r, its standard deviation; and the seconds spent on them all.
        self.log: list[list[tuple[float, float, float]]] = []
        self.seconds = 0.0
        self.gradients = 0  # taken so far, each of a batch

    @property
    def evaluations(self) -> int:
        """Of the network so far, by teacher and student, one for each sample; counted."""
        return self._counted.evaluations

    def _make_optimizer(self) -> torch.optim.Optimizer:
        parameters = self.predictor.parameters()
        if self.config.optimizer == "lbfgs":
            how = {"max_iter": 10, "history_size": 20, "line_search_fn": "strong_wolfe"}
            return torch.optim.LBFGS(parameters, **how)
        return torch.optim.Adam(parameters, self.config.learning_rate)

    def seeds(self, batch: int) -> range:
        """The seeds of the batch-th batch of training latents; every pass has the same."""
        config, number = self.config, batch % self.batches_per_pass
        size = config.images if config.whole else config.batch
        first = FIRST_TRAINING_SEED * (1 + config.seed) + number * size
        return range(first, first + size)

    def end(self, latents: torch.Tensor, labels=None) -> torch.Tensor:
        """Where the teacher ends, [B, ...]: all of it that the objective ``"endpoint"`` needs."""
        with torch.no_grad():
            x = latents.to(torch.float64) * self.times[0]
            return _teach(self.denoiser, x, self.config, labels)[0][-1]

    def losses(
        self, latents: torch.Tensor, labels=None, end: torch.Tensor | None = None, mean=True
    ):
        """Yield the loss of the batch (with its graph) and the r, [B, 1, 1, 1] or [], it judges.

        Step by step, with a list of one r; for the objective ``"endpoint"`` once, with all r. The
        caller may update the predictor in between; the next step sees the update.

        Args:
            end: of ``end``, if it is known already and the objective is ``"endpoint"``; the
                student's latents may then be others.
            mean: whether over the batch; else the losses are [B].
        """
        config = self.config
        x = latents.to(torch.float64) * self.times[0]
        targets, evaluations = [None] * (len(self.times) - 1) + [end], [None] * len(self.times)
        if end is None:
            with torch.no_grad():
                targets, evaluations = _teach(self.denoiser, x, config, labels)
        forward = config.gradient == "forward"
        student_denoiser = ForwardMode(self.denoiser, self.predictor) if forward else self.denoiser
        seen = []

        def intermediate(*args):
            predict = student_denoiser.intermediate if forward else self.predictor
            out = predict(*args)
            seen.append(_location(out.r))
            return out

        if isinstance(self.predictor, LearnedTable):
            intermediate.schedule = self.predictor.schedule
            intermediate.evaluates = self.predictor.evaluates
        student = Sampler(
            student_denoiser, x, self.times, self.solver, config.afs, intermediate, labels
        )
        for n, target in enumerate(targets[1:]):
            # Student and teacher are at the same point here: one evaluation serves both.
            same = "network_times" not in config.freedoms
            known = evaluations[n] if same and (n == 0 or config.start == "teacher") else None
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
            distance = self.distance(student.x, targets[-1])
            yield distance.mean() if mean else distance, seen

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

    def _inputs(self, seeds: range) -> tuple[torch.Tensor, object, torch.Tensor | None]:
        """What ``losses`` takes: the student's latents, labels, and where the teacher ends."""
        latents = make_latents(seeds, self.shape, self.device)
        labels = check_labels(self.labels(seeds), len(seeds))
        if self.config.passes == 1 and not self.config.whole:
            return latents, labels, None
        if seeds[0] not in self._ends:
            self._ends |= zip(seeds, self.end(latents, labels), strict=True)
        end = torch.stack([self._ends[seed] for seed in seeds])
        begin = [self._begins.get(seed, x) for seed, x in zip(seeds, latents, strict=True)]
        return torch.stack(begin), labels, end

    def _soften(self, seeds: range) -> None:
        """Move the student's latents within their balls to where they end nearer to the teacher."""
        latents = make_latents(seeds, self.shape, self.device)
        begin, labels, end = self._inputs(seeds)

        def ends(x):
            return next(self.losses(x, labels, end, mean=False))[0]

        def norm(x):
            return x.flatten(1).norm(dim=1).reshape(-1, *[1] * (x.ndim - 1))

        begin.requires_grad_(True)
        before = ends(begin)
        (slope,) = torch.autograd.grad(before.sum(), begin)
        with torch.no_grad():
            away = begin - self.config.soft / 4 * slope / norm(slope) - latents
            moved = latents + away * (self.config.soft / norm(away)).clamp(max=1)
            nearer = ends(moved) < before
        for seed, better, x in zip(seeds, nearer, moved, strict=True):
            if better:
                self._begins[seed] = x

    def _step(self) -> list[tuple[float, float, float]]:
        seeds = self.seeds(len(self.log))
        if self.config.objective == "search":
            return self._search(seeds)
        parts = [seeds[i : i + self.part] for i in range(0, len(seeds), self.part)]
        if self.config.soft and len(self.log) >= self.batches_per_pass:
            for part in parts:
                self._soften(part)
        if self.config.whole:
            found = []

            def closure():
                losses = [self.losses(*self._inputs(part)) for part in parts]
                rows = self._gradient(parts, losses)
                if found and not math.isfinite(rows[0][0]):
                    self.optimizer.zero_grad()  # a line search turns back from a high plain
                    return torch.tensor(1e3 * max(found)[0][0])
                self._check_loss(rows)
                found.append(rows)
                return torch.tensor(rows[0][0])

            self.optimizer.step(closure)
            return min(found)
        losses, rows = [self.losses(*self._inputs(part)) for part in parts], []
        while len(rows) < len(self.times) - 1:
            new = self._gradient(parts, losses)
            self._check_loss(new, len(rows))
            self.optimizer.step()
            rows += new
        return rows

    def _search(self, seeds: range) -> list[tuple[float, float, float]]:
        config = self.config
        times, cost = search_schedule(
            self.denoiser,
            make_latents(seeds, self.shape, self.device),
            config.time_points(FINE).to(self.device),
            config.num_steps,
            self.solver,
            config.teacher_solver(),
            config.afs,
            check_labels(self.labels(seeds), len(seeds)),
        )
        self.predictor.keep(times)
        return [(cost, math.nan, math.nan)] * (len(times) - 1)

    def _check_loss(self, rows: list[tuple], step: int = 0) -> None:
        loss = rows[0][0]
        where = f"the loss of batch {len(self.log)}, step {step},"
        require(math.isfinite(loss), where, loss, "finite")

    def _gradient(self, parts: list[range], losses: list) -> list[tuple[float, float, float]]:
        """Add up the gradients of the next loss of all parts; what the log says of it."""
        self.optimizer.zero_grad()
        self.gradients += 1
        number = sum(map(len, parts))
        total, locations = 0.0, []
        for part, each in zip(parts, losses, strict=True):
            loss, r = next(each)
            loss = loss * (len(part) / number)
            loss.backward()
            total += loss.item()
            locations.append(torch.stack([value.expand(len(part), 1, 1, 1) for value in r]))
        return [
            (total, r.mean().item(), r.std().item() if number > 1 else 0.0)
            for r in torch.cat(locations, dim=1)
        ]

    def save(self, path: Path) -> None:
        """Write everything that is needed to go on from here."""
        tensors = {f"predictor/{k}": v for k, v in self.predictor.state_dict().items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{i}/{name}": value for name, value in flat(state).items()}
        tensors |= {f"begins/{seed}": x for seed, x in self._begins.items()}
        tensors["log"] = torch.tensor(self.log, dtype=torch.float64)
        tensors["seconds"] = torch.tensor(self.seconds, dtype=torch.float64)
        tensors["gradients"] = torch.tensor(self.gradients)
        tensors["evaluations"] = torch.tensor(self.evaluations)
        metadata = {
            "training": json.dumps(asdict(self.config)),
            "shape": json.dumps(self.shape),
            "denoiser": self.fingerprint or "",
        }
        save_tensors(path, tensors, metadata)

    def resume(self, path: Path) -> None:
        """Go on from what ``save`` wrote.

        Raises:
            ValueError: the file is missing, or of another training; ``Damaged`` if no training
                wrote it, or not so.
        """
        tensors, metadata = load_tensors(path)
        with reading(path, "the state of a training"):
            same = Training(**json.loads(metadata["training"])) == self.config
            same &= json.loads(metadata["shape"]) == list(self.shape)
            same &= metadata["denoiser"] == (self.fingerprint or "")
            state = self.optimizer.state_dict() | {"state": {}}
            for name, value in below("optimizer/", tensors).items():
                index, key = name.split("/", 1)
                # A copy is aligned in memory, on which the last bits of a product depend.
                state["state"].setdefault(int(index), {})[key] = value.clone()
            states = state["state"].items()
            state["state"] = {i: nested(each, self.config.optimizer) for i, each in states}
            begins = {int(k): v.to(self.device) for k, v in below("begins/", tensors).items()}
            log = tensors["log"].tolist()
            counts = ("seconds", "gradients", "evaluations")
            seconds, gradients, evaluations = (tensors[name].item() for name in counts)
        allowed = "the state of the same training of this denoiser; delete it to begin anew"
        require(same, "the file", str(path), allowed)
        with reading(path, "the state of a training"):
            self.predictor.load_state_dict(below("predictor/", tensors))
            self.optimizer.load_state_dict(state)
        self.log, self._begins = log, begins
        self.seconds, self.gradients = seconds, gradients
        self._counted.evaluations = evaluations


def _begun(make: Callable[[], Trainer], partial: Path) -> Trainer:
    """A trainer that goes on from the state in a file, if there is one that can be read."""
    trainer = make()
    if partial.is_file():
        try:
            trainer.resume(partial)
        except Damaged as error:
            warnings.warn(f"{error} Training begins anew.", stacklevel=3)
            return make()
        except ValueError:
            if partial.is_file():  # else another process has just finished this training
                raise
    return trainer


def _from_best_start(denoiser, config, shape, device, labels, *files: Path) -> tuple:
    """``best_start``, or what one of these files began with; with the seconds and evaluations."""
    for file in filter(Path.is_file, files):
        with suppress(ValueError, KeyError):  # else it is of another training, which will be said
            kept = json.loads(load_tensors(file)[1]["training"])
            return replace(config, options=kept["options"]), (0.0, 0)
    start = time.perf_counter()
    config, made = best_start(denoiser, config, shape, best_device(device), labels)
    return config, (time.perf_counter() - start, made)


def train(
    denoiser,
    config: Training | int,
    shape: tuple[int, ...],
    path: Path,
    distance: Callable = squared_l2,
    device="cpu",
    progress: bool | Callable[[], None] = True,
    labels: Callable | None = None,
    seconds: float = math.inf,
    evaluations: float = math.inf,
) -> Predictor | LearnedTable:
    """Train a predictor, or load it if ``path`` holds it; an interrupted training goes on.

    Every 20 batches the state is kept beside ``path``, under its name and ``.partial``. The result
    is a safetensors file with the weights, the log of the last ten batches [10, N-1, 3] (for every
    step the loss that its r was trained on, mean and standard deviation of r over the batch), the
    seconds of training and the configuration; ``load_sampler`` makes a sampler of it. Other
    arguments as in ``Trainer``.

    Args:
        config: what is trained; a number is the NFE of ``default_training``, from ``best_start``.
        shape: of one sample, any number of sizes.
        progress: whether a bar shows it; or what is called after every batch in its place.
        seconds, evaluations: a budget, of network evaluations times samples; after either no
            further batch (by L-BFGS: pass) begins, and what is learned so far is the result.

    Raises:
        ValueError: ``path`` cannot be written; or it or the state beside it is of another training,
            of another denoiser's weights or of another shape. A state that cannot be read is left
            out with a warning.
    """
    path = checks.path("path", path)
    for name, budget in (("seconds", seconds), ("evaluations", evaluations)):
        require(is_number(budget) and budget > 0, name, budget, "a positive number")
    partial, spent = path.with_name(f"{path.name}.partial"), (0.0, 0)
    require(path.is_file() or not path.exists(), "path", str(path), "that of a file")
    if not path.is_file():
        check_writable(path.parent, "the folder of path")
    if is_whole(config):
        config = default_training(denoiser, config)
        config, spent = _from_best_start(denoiser, config, shape, device, labels, path, partial)
    if path.is_file():
        return load_predictor(path, config, denoiser, shape)

    def make() -> Trainer:
        trainer = Trainer(denoiser, config, shape, distance, device, labels)
        trainer.seconds, trainer._counted.evaluations = spent
        return trainer

    trainer = _begun(make, partial)
    name = f"{config.solver}, {config.num_steps} points, seed {config.seed}"
    with tqdm(
        total=trainer.batches,
        initial=len(trainer.log),
        desc=name,
        disable=callable(progress) or not progress,
    ) as bar:
        while len(trainer.log) < trainer.batches and not (
            trainer.log and (trainer.seconds >= seconds or trainer.evaluations >= evaluations)
        ):
            trainer.step()
            loss, r, _ = zip(*trainer.log[-1], strict=True)
            where = "" if math.isnan(sum(r)) else ", r " + " ".join(f"{value:.2f}" for value in r)
            bar.set_postfix_str(f"loss {sum(loss):.3g}{where}")
            bar.update()
            if callable(progress):
                progress()
            if len(trainer.log) % 20 == 0 or config.whole:
                trainer.save(partial)
    save_predictor(path, trainer)
    partial.unlink(missing_ok=True)
    trainer.predictor.trained_for = config
    return trainer.predictor.eval()
