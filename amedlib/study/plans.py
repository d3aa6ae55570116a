"""What is run: the Runs of every table and figure, with the settings that the paper states."""

import re
from dataclasses import dataclass, replace

import pandas as pd

from amedlib.checks import different, one_of, whole
from amedlib.comparison import SCHEDULES
from amedlib.datasets.entries import DATASETS, describe
from amedlib.study.published import KEY, published
from amedlib.study.rows import METHODS, MORE_SEEDS, RECIPE, SEEDS, methods, run_of, runs_of
from amedlib.study.run import Run


def table2(
    dataset: str = "digits",
    names=tuple(METHODS),
    nfes=None,
    seeds=SEEDS,
    n_samples: int | None = None,
    schedule: str | None = None,
    metric: str = "fd",
    **predictor,
) -> pd.DataFrame:
    """The Runs of Table 2: a row per method, NFE and training seed.

    With AFS the methods that make two evaluations per step have odd NFE; at even ones, which the
    paper's other tables have without AFS, they run without.

    Args:
        names: of methods.
        nfes, n_samples: those of the paper's tables on this data set unless given.
        schedule: for every method; ``None`` gives each the one that the paper uses for it.
        predictor: fields of ``Training`` for all learned methods, such as ``recipe``.

    Returns:
        Columns ``KEY`` and ``run``.

    Raises:
        ValueError: an argument is outside its range, something is listed twice, or a method cannot
            have an NFE.
    """
    one_of("schedule", schedule, (None, *SCHEDULES))
    nfes = different("nfes", describe(dataset).nfes if nfes is None else nfes)
    nfes, seeds = [whole("nfe", nfe, 1, 1000) for nfe in nfes], different("seeds", seeds)
    rows = []
    for name in different("names", names):
        one_of("method", name, METHODS)
        method = methods(dataset)[name]
        method = replace(method, schedule=schedule or method.schedule)
        row = {"method": name, "schedule": method.schedule}
        row = dict.fromkeys(KEY) | row | {"amed": method.learned}
        for nfe in nfes:
            each = replace(method, afs=method.afs and nfe % 2 == 1)
            for what in runs_of(dataset, each, nfe, seeds, n_samples, metric, **predictor):
                rows.append(row | {"afs": each.afs, "nfe": nfe, "run": what})
    return pd.DataFrame(rows)


def on_schedule(schedule: str, dataset: str = "digits", n_samples=None) -> pd.DataFrame:
    """Table 2 with all methods on one schedule, at the two smallest NFE and with one training."""
    nfes = describe(dataset).nfes[:2]
    return table2(dataset, nfes=nfes, seeds=SEEDS[:1], n_samples=n_samples, schedule=schedule)


# --- Tables 3 to 13: a Run for every cell that the paper prints -----------------------------------


def cell(
    dataset: str, row: pd.Series, seeds=SEEDS, n_samples=None, metric: str = "fd"
) -> list[Run]:
    """The Runs that measure a printed cell on a data set, one per training seed.

    Args:
        row: of ``published``; its columns ``KEY`` say what is run.
    """
    given = {name: value for name, value in row[KEY].items() if pd.notna(value)}
    base = re.sub(r"^AMED-Plugin \((.*)\)$", r"\1", row["method"])
    method = replace(METHODS[base], afs=row["afs"], learned=row["amed"])
    method = replace(method, schedule=describe(dataset).schedule or row["schedule"])
    predictor = {} if base == "AMED-Solver" else {"m": given.get("M", 2)}
    if "teacher" in given:
        # A multistep teacher makes half the evaluations per step: with three intermediate steps it
        # makes as many in all as the others, twice those of the student.
        teacher = METHODS[given["teacher"]]
        predictor["teacher"] = teacher.solver
        predictor["teacher_options"] = teacher.options | describe(dataset).solver_options.get(
            teacher.solver, {}
        )
        predictor["m"] = 1 if teacher.afs else 3
    if "r" in given:
        method = replace(method, options={"r": given["r"]})
    if "guidance" in given:
        dataset = f"{dataset}_guidance_{given['guidance']:g}"
    if given.get("strategy") == "time_wise":
        predictor["uses_bottleneck"] = False
    if given.get("strategy") == "grid_search":
        fields = {"schedule": method.schedule, "afs": method.afs, "r": "searched"}
        return [run_of(dataset, method, row["nfe"], n_samples, metric, **fields)]
    return runs_of(dataset, method, row["nfe"], seeds, n_samples, metric, **predictor)


def table(
    number: int,
    dataset: str = "digits",
    nfes=None,
    seeds=SEEDS,
    n_samples: int | None = None,
    metric: str = "fd",
) -> pd.DataFrame:
    """The Runs of one of the paper's tables from 3 to 13 on a data set.

    Beyond six evaluations, and in Tables 9, 10 and 13, which are large, the first training seed
    alone is run.

    Args:
        nfes: those printed unless given, up to the data set's ``most_nfe``.

    Returns:
        Columns ``KEY``, ``paper`` (the printed number) and ``run``; a row per training seed.

    Raises:
        ValueError: no such table, it has no such NFE, or something is listed twice.
    """
    rows = published(f"table{number}")
    rows, seeds = rows[rows["unit"] == "FID"], different("seeds", seeds)
    if number == 13:
        guided = [name for name in DATASETS if f"{name}_guidance_2" in DATASETS]
        one_of("the data set of Table 13", dataset, guided)
    nfes = None if nfes is None else different("nfes", nfes)
    for nfe in nfes or []:
        one_of("nfe", nfe, sorted(rows["nfe"].unique().tolist()))
    if number == 8:  # prints DPM-Solver-2 without AFS at odd NFE, which it cannot have
        rows = rows[(rows["method"] != "DPM-Solver-2") | rows["afs"]]
    planned = []
    shown = rows["nfe"].isin(nfes) if nfes else rows["nfe"] <= describe(dataset).most_nfe
    for _, row in rows[shown].iterrows():
        few = row["nfe"] > 6 or number in (9, 10, 13)
        for what in cell(dataset, row, seeds[:1] if few else seeds, n_samples, metric):
            planned.append({**row[KEY], "paper": row["value"], "run": what})
    return pd.DataFrame(planned)


# The ablations and the large table, in the order in which they are computed.
TABLES = (3, 6, 4, 7, 8, 5, 9)


def figure8(
    dataset: str = "digits", nfes=None, seeds=SEEDS, n_samples=None, metric: str = "fd"
) -> pd.DataFrame:
    """Both AMED rows of Table 2 trained with either loss; columns method, nfe, loss, run."""
    data = describe(dataset)
    perceptual = "features" if data.floor else "lpips"
    printed = [nfe for nfe in data.nfes if nfe <= data.most_nfe]
    nfes = different("nfes", printed if nfes is None else nfes)
    seeds, planned = different("seeds", seeds), []
    for name in ("AMED-Solver", "AMED-Plugin"):
        for nfe in nfes:
            for loss in ("l2", perceptual):
                some = seeds if nfe <= 6 else seeds[:1]
                each = table2(dataset, [name], [nfe], some, n_samples, metric=metric, loss=loss)
                planned.append(each.assign(loss=loss))
    return concat(planned)


def table1(dataset: str = "digits", seeds=SEEDS, n_samples: int = 1000) -> pd.DataFrame:
    """Local errors of the single-step solvers over five steps; columns method, nfe, run."""
    training = RECIPE | describe(dataset).training
    rows = []
    for name in ("DDIM", "EDM", "DPM-Solver-2", "AMED-Solver"):
        method = methods(dataset)[name]
        nfe = (5 if name == "DDIM" else 10) * describe(dataset).evaluations_per_call
        for seed in different("seeds", seeds) if method.learned else [None]:
            learned = training | {"seed": seed} if method.learned else None
            what = run_of(dataset, method, nfe, n_samples, "local_error", predictor=learned)
            rows.append({"method": name, "nfe": nfe, "run": what})
    return pd.DataFrame(rows)


def figure4(dataset: str = "digits", n_samples: int = 1000) -> pd.DataFrame:
    """PCA of trajectories of EDM's sampler with 80 NFE; columns method, nfe, run."""
    nfe = 80 * describe(dataset).evaluations_per_call
    what = run_of(dataset, METHODS["EDM"], nfe, n_samples, "trajectory_pca")
    return pd.DataFrame([{"method": "EDM", "nfe": nfe, "run": what}])


def figure5(dataset: str = "digits", n_samples: int = 500) -> pd.DataFrame:
    """Greedy grid search on r with N = 6 for every solver; columns method, nfe, run."""
    rows = []
    for name in ("DPM-Solver++(3M)", "UniPC", "iPNDM", "DDIM", "DPM-Solver-2", "AMED-Solver"):
        nfe = 10 * describe(dataset).evaluations_per_call
        fields = {"schedule": "polynomial", "r": 0.5}
        what = run_of(dataset, METHODS[name], nfe, n_samples, "grid_search", **fields)
        rows.append({"method": name, "nfe": nfe, "run": what})
    return pd.DataFrame(rows)


def figure7(dataset: str = "digits", nfes=None, seeds=SEEDS, n_samples: int = 1000) -> pd.DataFrame:
    """Learned r per step, of the predictors of Table 2; columns method, nfe, schedule, run."""
    learned = [name for name, method in METHODS.items() if method.learned]
    return table2(dataset, learned, nfes, seeds, n_samples, metric="learned_r")


def slope_angle(dataset: str = "digits", n_samples: int = 1000) -> pd.DataFrame:
    """How far the slope at the first time is from the direction of the noise; as ``figure4``."""
    nfe = 5 * describe(dataset).evaluations_per_call  # of a Run that has no method of its own
    what = run_of(dataset, METHODS["DDIM"], nfe, n_samples, "first_slope")
    return pd.DataFrame([{"method": "DDIM", "nfe": nfe, "run": what}])


def centring(dataset: str = "digits", nfes=(3, 5, 7), n_samples: int = 5000) -> pd.DataFrame:
    """Solvers with and without AFS, on data centred or not; columns method, data, nfe, run.

    A two-stage solver's NFE is one less with AFS; a row keeps the number of its time points.
    """
    one_of("dataset", dataset, [name for name in DATASETS if f"{name}_uncentred" in DATASETS])
    rows, nfes = [], different("nfes", nfes)
    for name in ("DDIM", "iPNDM", "DPM-Solver++(3M)"):
        for afs in (False, True):
            for data, label in ((dataset, "centred"), (f"{dataset}_uncentred", "not centred")):
                for nfe in nfes:
                    what = run_of(data, METHODS[name], nfe, n_samples, afs=afs)
                    method = f"{name}, AFS" if afs else name
                    rows.append({"method": method, "data": label, "nfe": nfe, "run": what})
    return pd.DataFrame(rows)


def recipes(
    dataset: str = "digits",
    nfes=(5,),
    seeds=SEEDS,
    n_samples: int | None = None,
    metric: str = "fd",
) -> pd.DataFrame:
    """The AMED rows of Table 2 by the text's recipe and by the released code's.

    That code runs AMED-Solver on the schedule time_uniform, which a recipe does not set: both
    recipes run on both schedules.

    Returns:
        Columns as of ``table2``, and recipe.
    """
    planned = []
    for name, schedule, a in (
        ("AMED-Solver", None, 0.0),
        ("AMED-Solver", "time_uniform", 0.0),
        ("AMED-Plugin", None, 0.2),
    ):
        for recipe, how in (
            ("paper", {}),
            ("release", {"recipe": "release", "scale_time": a}),
        ):
            rows = table2(dataset, [name], nfes, seeds, n_samples, schedule, metric, **how)
            planned.append(rows.assign(recipe=recipe))
    return concat(planned)


# What could keep the plugin from improving iPNDM, one change at a time from the row of Table 2.
VARIANTS = {
    "AMED-Plugin, M = 1": ("AMED-Plugin", {"m": 1}),
    "AMED-Plugin, M = 2": ("AMED-Plugin", {}),
    "AMED-Plugin, M = 4": ("AMED-Plugin", {"m": 4}),
    "AMED-Plugin, M = 2, loss on features": ("AMED-Plugin", {"loss": "features"}),
    "AMED-Plugin, M = 2, 20,000 images": ("AMED-Plugin", {"images": 20_000}),
    "AMED-Solver": ("AMED-Solver", {}),
}


def plugin(
    dataset: str = "digits",
    nfe: int = 5,
    seeds=SEEDS,
    n_samples: int | None = None,
    metric: str = "fd",
) -> pd.DataFrame:
    """iPNDM at one NFE, plain and with AFS, and variants of its plugin.

    Columns variant, method, nfe, run.
    """
    plain = METHODS["iPNDM"]
    rows = [
        {"variant": label, "method": "iPNDM", "nfe": nfe, "run": what}
        for label, afs in (("iPNDM", False), ("iPNDM, AFS", True))
        for what in [run_of(dataset, plain, nfe, n_samples, metric, afs=afs)]
    ]
    for label, (method, changes) in VARIANTS.items():
        each = table2(dataset, [method], [nfe], seeds, n_samples, metric=metric, **changes)
        rows += each.assign(variant=label)[["variant", "method", "nfe", "run"]].to_dict("records")
    return pd.DataFrame(rows)


def headline(
    dataset: str = "digits", nfe: int = 5, seeds=SEEDS, n_samples: int | None = None
) -> pd.DataFrame:
    """Table 2 at one NFE, with iPNDM's AFS alone and the plugin trained for the endpoint.

    Columns variant (a method's name, with what is changed), method, paper (its FID, where it has
    one), run.
    """
    rows = published("table9").query("method == 'iPNDM' and afs and not amed and nfe == @nfe")
    afs = [
        {"variant": "iPNDM, AFS", "method": "iPNDM", "paper": row["value"], "run": what}
        for _, row in rows.iterrows()
        for what in cell(dataset, row, n_samples=n_samples)
    ]
    theirs = published("table2").query("nfe == @nfe and dataset == @describe(@dataset).paper")
    theirs = theirs.assign(method=theirs["method"].str.replace(r" \(.*\)$", "", regex=True))
    plain = table2(dataset, nfes=[nfe], seeds=seeds, n_samples=n_samples)
    plain = plain.assign(
        variant=plain["method"], paper=plain["method"].map(theirs.set_index("method")["value"])
    )
    end = table2(dataset, ["AMED-Plugin"], [nfe], seeds, n_samples, objective="endpoint")
    end = end.assign(variant="AMED-Plugin, trained for the end", paper=float("nan"))
    return concat([plain, pd.DataFrame(afs), end])[["variant", "method", "paper", "run"]]


# --- beyond the paper: questions of ours, asked of the AMED rows of Table 2 -----------------------

LEARNED = tuple(name for name, method in METHODS.items() if method.learned)
# One free number per step in the place of g_phi. Adam moves each by about its learning rate; it is
# larger here than for the weights of a network, of which many act on every r.
FREE_R = {"form": "table", "uses_bottleneck": False, "learning_rate": 0.05}


@dataclass(frozen=True)
class Question:
    """What is changed in training.

    Attributes:
        variants: name to fields of ``Training``; the first is what the others are compared with,
            where it has no fields the row of Table 2.
        nfes: where it is asked.
        names: of methods.
        dataset: where it is asked, if on another data set than the study's.
    """

    variants: dict[str, dict]
    nfes: tuple[int, ...] = (5,)
    names: tuple[str, ...] = LEARNED
    dataset: str | None = None


OBJECTIVES = {"for the step": {}, "for the endpoint": {"objective": "endpoint"}}
QUESTIONS = {
    "objective": Question(OBJECTIVES, nfes=(5, 7), names=("AMED-Plugin",)),
    # Free numbers, in which nothing but the objective differs between trainings.
    "greedy": Question(
        {
            "table, for the step": FREE_R,
            "table, for the endpoint": FREE_R | {"objective": "endpoint"},
        },
        nfes=(7,),
        names=("AMED-Plugin",),
    ),
    "parameters": Question({"network": {}, "table": FREE_R}),
    "images": Question(
        {f"{count:,} images": {"images": count} for count in (10_000, 2048, 512, 128)}
    ),
    # The two differences between the recipes that can be crossed; the schedule is in `release`.
    "recipe": Question(
        {
            "as the text": {},
            "network of the release": {"form": "release"},
            "start of the release": {"start": "teacher"},
            "both": {"form": "release", "start": "teacher"},
        },
        names=("AMED-Solver",),
    ),
    "transfer": Question(
        # 5 NFE have four time points.
        {"trained at this NFE": {}, "trained at 5 NFE": {"num_steps": 4}},
        nfes=(3, 7, 9),
    ),
    "objective, AMED-Solver": Question(OBJECTIVES, names=("AMED-Solver",)),
    "data": Question(
        {"trained with labels": {}, "trained without labels": {"trained_on": "digits"}},
        names=("AMED-Plugin",),
        dataset="digits_conditional",
    ),
}


# How often the AMED rows are trained where the luck of a training is asked for.
TRAININGS = len(SEEDS + MORE_SEEDS)


def beyond(
    question: str,
    dataset: str = "digits",
    nfes=None,
    seeds=SEEDS,
    n_samples: int | None = None,
    metric: str = "fd",
) -> pd.DataFrame:
    """The Runs of one of ``QUESTIONS``; columns ``KEY``, variant, run.

    Raises:
        ValueError: no such question.
    """
    one_of("question", question, QUESTIONS)
    asked = QUESTIONS[question]
    dataset = asked.dataset or dataset
    nfes = asked.nfes if nfes is None else nfes
    return concat(
        table2(dataset, [name], nfes, seeds, n_samples, metric=metric, **fields).assign(
            variant=variant
        )
        for name in asked.names
        for variant, fields in asked.variants.items()
    )


def beyond_all(dataset: str = "digits") -> list[pd.DataFrame]:
    """Every plan of ``beyond.ipynb``."""
    found = []
    for metric, n_samples in (("fd", None), ("endpoint_error", None), ("learned_r", 1000)):
        how = {"n_samples": n_samples, "metric": metric}
        asked = QUESTIONS if metric != "learned_r" else ("objective", "greedy", "transfer")
        for question in asked:
            on = describe(QUESTIONS[question].dataset or dataset)
            if metric in (*on.metrics, "learned_r"):
                found.append(beyond(question, dataset, **how))
        found.append(table2(dataset, LEARNED, (5,), range(TRAININGS), **how))
    return found


def concat(plans) -> pd.DataFrame:
    """Several plans as one."""
    return pd.concat(plans, ignore_index=True)


def floor_runs(dataset: str = "digits") -> dict[str, Run]:
    """The Runs of the floors of the Frechet distances that a data set has, by metric."""
    distances = [metric for metric in describe(dataset).metrics if metric != "endpoint_error"]
    return {metric: Run(f"floor_{metric}", dataset) for metric in distances}


def limit_run(dataset: str = "digits", n_samples: int | None = None, metric: str = "fd") -> Run:
    """Heun with about 80 NFE: the ODE is all but solved, and what is left is the model's limit."""
    data = describe(dataset)
    nfe = 79 if data.afs else 80 * data.evaluations_per_call
    return run_of(dataset, methods(dataset)["EDM"], nfe, n_samples, metric, afs=data.afs)


def accuracy_run(dataset: str = "digits") -> Run:
    """How far the ODE's accurate solution moves when its steps are halved."""
    nfe = 5 * describe(dataset).evaluations_per_call  # of a Run that has no method of its own
    return run_of(dataset, METHODS["DDIM"], nfe, 500, "endpoint_accuracy")


def whole_study(dataset: str = "digits") -> list[Run]:
    """Every Run that the book shows for a data set."""
    metrics = describe(dataset).metrics
    found = [table2(dataset, metric=metric) for metric in metrics]
    found += [plan(dataset) for plan in (table1, figure4, figure5, figure7, slope_angle)]
    found += [on_schedule(schedule, dataset) for schedule in SCHEDULES]
    for metric in (m for m in metrics if m in ("fd", "endpoint_error")):
        found += [recipes(dataset, metric=metric), plugin(dataset, metric=metric)]
        found += [table(n, dataset, seeds=SEEDS[:1], metric=metric) for n in TABLES]
        found.append(figure8(dataset, seeds=SEEDS[:1], metric=metric))
    if dataset == "digits":
        found += [centring(), *beyond_all()]
        found += [slope_angle(name) for name in ("digits_uncentred", "digits_conditional")]
        found += [table(10, "digits_conditional", seeds=SEEDS[:1]), table(13, seeds=SEEDS[:1])]
    # First what all others are compared with.
    runs = [limit_run(dataset, metric=metric) for metric in metrics]
    runs += floor_runs(dataset).values() if describe(dataset).floor else []
    runs += [what for plan in found for what in plan["run"]] + [accuracy_run(dataset)]
    # The joint distance stands beside every other one.
    distances = [what for what in runs if what.metric == "fd"]
    has_joint = [what for what in distances if "fd_joint" in describe(what.dataset).metrics]
    runs += [what.with_metric("fd_joint") for what in has_joint]
    return list({what.key: what for what in runs}.values())
