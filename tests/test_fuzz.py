"""Random arguments: what is refused is refused in one sentence, what is accepted gives no NaN."""

import math

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from amedlib.denoisers.exact import GaussianMixtureDenoiser
from amedlib.intermediate import TimeWise
from amedlib.recipes import RECIPES, Training
from amedlib.sampling import make_latents, sample
from amedlib.schedules import SCHEDULES, make_schedule
from amedlib.solvers import SOLVERS, make_solver
from amedlib.study import plans
from amedlib.study.cluster import check_cluster
from amedlib.study.procedures import PROCEDURES
from amedlib.study.run import Run


# The same examples every time, and nothing is kept on disk.
def quick(examples):
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


# What people and programs pass by mistake.
ODD = st.sampled_from(
    [None, "", "5", -1, 0, 1, True, 2.5, -0.5, math.nan, math.inf, -math.inf, 10**30, 1e-320, 1e300]
    + [[], [3], {}, {"a": 1}, (0.5, 0.5), b"x", object]
)
UNIT = st.floats(0, 1)
POSITIVE = st.floats(1e-6, 1e6) | st.floats(min_value=0)


def mostly(strategy):
    """The strategy, and something odd once in a while."""
    return st.integers(0, 9).flatmap(lambda n: ODD if n == 0 else strategy)


def some_of(**strategies):
    """Keyword arguments, of which any may be left out."""
    return st.fixed_dictionaries({}, optional={k: mostly(v) for k, v in strategies.items()})


SOLVER_OPTIONS = {
    "order": st.integers(1, 4),
    "r": UNIT,
    "mode": st.sampled_from(["tab", "rhoab"]),
    "variant": st.sampled_from(["bh1", "bh2"]),
    "predict_x0": st.booleans(),
    "lower_order_final": st.booleans(),
    "thresholding": st.booleans(),
}
OF = {"dpm2": ["r"], "ipndm": ["order"], "deis": ["order", "mode"]}
OF["dpmpp"] = ["order", "predict_x0", "lower_order_final", "thresholding"]
OF["unipc"] = [*OF["dpmpp"], "variant"]


def options_of(name):
    """Options that the solver has, and now and then others."""
    own = some_of(**{k: SOLVER_OPTIONS[k] for k in OF.get(name, [])})
    return st.integers(0, 9).flatmap(lambda n: some_of(**SOLVER_OPTIONS) if n == 0 else own)


NAMES = mostly(st.sampled_from(sorted(SOLVERS)))
SOLVER = NAMES.flatmap(lambda n: st.tuples(st.just(n), options_of(n if isinstance(n, str) else "")))
SCHEDULE = {
    "num_steps": st.integers(2, 12),
    "sigma_min": POSITIVE | st.just(0.002),
    "sigma_max": POSITIVE | st.just(80.0),
    "rho": st.none() | POSITIVE,
}
TRAINING = {
    "recipe": st.sampled_from(sorted(RECIPES)),
    "teacher": st.sampled_from(["euler", "heun", "dpm2", "ipndm", "dpmpp", "amed"]),
    "teacher_options": st.fixed_dictionaries({}, optional={"order": st.integers(1, 5)}),
    "m": st.integers(1, 4),
    "loss": st.sampled_from(["l2", "features", "lpips"]),
    "objective": st.sampled_from(["step", "endpoint"]),
    "form": st.sampled_from(["paper", "release", "table"]),
    "scale_dir": UNIT,
    "scale_time": UNIT,
    "uses_bottleneck": st.booleans(),
    "start": st.sampled_from(["student", "teacher"]),
    "images": st.integers(1, 10_000),
    "batch": st.integers(1, 256),
    "learning_rate": st.floats(1e-6, 1),
    "gradient": st.sampled_from(["reverse", "forward"]),
    "precision": st.sampled_from(["float32", "float16"]),
    "seed": st.integers(0, 999),
}


def made(make, *args, **kwargs):
    """What it makes, or ``None`` if that is refused as it should be."""
    try:
        return make(*args, **kwargs)
    except ValueError as error:
        sentence = str(error)
        assert "\n" not in sentence and " must " in sentence, sentence
        assert "was given" in sentence, sentence
        return None


MIXTURE = GaussianMixtureDenoiser(
    torch.tensor([0.5, -0.5])[:, None, None, None] * torch.ones(2, 1, 2, 2),
    torch.tensor([0.2, 0.3])[:, None, None, None] * torch.ones(2, 1, 2, 2),
    torch.tensor([0.4, 0.6]),
)


@quick(400)
@given(mostly(st.sampled_from(SCHEDULES)), some_of(**SCHEDULE))
def test_schedules(name, arguments):
    times = made(make_schedule, name, **arguments)
    if times is not None:
        assert bool(torch.isfinite(times).all()) and bool((times.diff() < 0).all())
        assert times[-1] > 0 and times.dtype == torch.float64


@quick(300)
@given(SOLVER, st.booleans(), st.none() | st.floats(0.001, 0.999), some_of(**SCHEDULE))
def test_solvers_give_no_nan(solver, afs, r, arguments):
    name, options = solver
    solver = made(make_solver, name, **options)
    times = made(make_schedule, **arguments)
    if solver is None or times is None or (name == "amed" and r is None):
        return
    # The state must be a number, and so must its square and that of its time.
    if times[0] > 1e100 or times[-1] < 1e-100:
        return
    out = sample(MIXTURE, make_latents(range(3), (1, 2, 2)), times, solver, afs, r and TimeWise(r))
    assert bool(torch.isfinite(out.x).all())


@quick(300)
@given(SOLVER, some_of(**SCHEDULE | TRAINING))
def test_trainings(solver, arguments):
    name, options = solver
    training = made(Training, name, options, **arguments)
    if training is not None:
        assert bool(torch.isfinite(training.teacher_times()).all())
        assert None not in (training.form, training.images, training.start, training.teacher)


RUN = {
    "metric": st.sampled_from(sorted(PROCEDURES)),
    "dataset": st.sampled_from(["digits", "cifar10", "imagenet256", "lsun_bedroom_ldm"]),
    "precision": st.sampled_from(["float32", "bfloat16"]),
    "nfe": st.integers(1, 20),
    "afs": st.booleans(),
    "r": st.none() | UNIT | st.just("searched") | st.lists(UNIT, min_size=1, max_size=4),
    "predictor": st.none() | some_of(**TRAINING),
    "samples": st.integers(20, 60_000),
    "first_seed": st.integers(0, 10**9),
} | {name: SCHEDULE[name] for name in ("sigma_min", "sigma_max", "rho")}


@quick(400)
@given(SOLVER, mostly(st.sampled_from(SCHEDULES)), some_of(**RUN))
def test_runs(solver, schedule, arguments):
    name, options = solver
    what = made(Run, solver=name, options=options, schedule=schedule, **arguments)
    if what is not None:
        times = what.times()
        assert len(times) == what.num_steps and bool(torch.isfinite(times).all())
        assert len(what.key) == 16 and Run(**vars(what)) == what


@quick(150)
@given(
    st.sampled_from([plans.table2, plans.table1, plans.figure4, plans.figure5, plans.figure7]),
    st.fixed_dictionaries(
        {},
        optional={
            "dataset": mostly(st.sampled_from(["digits", "cifar10", "mnist"])),
            "n_samples": mostly(st.integers(0, 50_000)),
            "nfes": st.none() | st.lists(mostly(st.integers(0, 12)), max_size=2),
            "seeds": st.lists(mostly(st.integers(0, 1000)), max_size=2),
        },
    ),
)
def test_plans(plan, arguments):
    taken = {name: value for name, value in arguments.items() if name in plan.__code__.co_varnames}
    planned = made(plan, **taken)
    if planned is not None:
        assert len(planned) and all(isinstance(what, Run) for what in planned["run"])


@quick(100)
@given(ODD | st.text(max_size=8) | st.integers(-2, 9) | st.just("tcp://host:8786"))
def test_clusters(cluster):
    made(check_cluster, cluster)
