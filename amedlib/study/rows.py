"""The rows of Table 2: every method with the settings that the paper states."""

from dataclasses import dataclass, field, replace

from amedlib.checks import different
from amedlib.datasets.entries import describe
from amedlib.study.run import Run

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        solver, options: as in ``make_solver``.
        schedule: the one that the paper uses for it.
        afs: whether the paper uses AFS for it in Table 2.
        learned: whether an intermediate step is learned.
        predictor: fields of ``Training`` that this row sets.
    """

    solver: str
    options: dict = field(default_factory=dict)
    schedule: str = "polynomial"
    afs: bool = False
    learned: bool = False
    predictor: dict = field(default_factory=dict)


# Table 2, with the settings of Sec. 4.1 and Appendix B: orders, schedules, AFS where NFE is odd.
METHODS = {
    "DPM-Solver++(3M)": Row("dpmpp", {"order": 3}, "logsnr"),
    "UniPC": Row("unipc", {"order": 3}, "logsnr"),
    "iPNDM": Row("ipndm", {"order": 4}),
    "DDIM": Row("euler"),
    "DPM-Solver-2": Row("dpm2", afs=True),
    "EDM": Row("heun", afs=True),
    "AMED-Solver": Row("amed", afs=True, learned=True),
    # M = 2: with M = 1 the teacher makes just the student's number of evaluations (`plugin.ipynb`).
    "AMED-Plugin": Row("ipndm", {"order": 4}, afs=True, learned=True, predictor={"m": 2}),
}


# Rows of the digits that were trained twice more than ``SEEDS``, by NFE: those that the first page
# quotes, and where three trainings differ so much that little can be told.
MORE_SEEDS = (3, 4)
TRAINED_MORE = {"AMED-Solver": (5,), "AMED-Plugin": (5, 7)}


# The first version of the paper, whose tables these are, is the default.
RECIPE = {"recipe": "paper"}


def methods(dataset: str) -> dict[str, Row]:
    """The methods of Table 2 with what the paper says of them on a data set.

    There AMED-Plugin may be on another solver, all methods on one schedule, and none with AFS.
    """
    data = describe(dataset)
    base = METHODS[data.plugin]
    plugin = replace(
        METHODS["AMED-Plugin"], solver=base.solver, options=base.options, schedule=base.schedule
    )
    return {
        name: replace(
            method, schedule=data.schedule or method.schedule, afs=method.afs and data.afs
        )
        for name, method in (METHODS | {"AMED-Plugin": plugin}).items()
    }


def run_of(dataset, method: Row, nfe, samples, metric="fd", **fields) -> Run:
    """The Run of a method on a data set; ``fields`` go before what method and data set say."""
    data = describe(dataset)
    samples = data.samples if samples is None else samples
    if metric == "endpoint_error":
        samples = min(samples, data.endpoint_samples)
    return Run(
        **{
            "metric": metric,
            "dataset": dataset,
            "solver": method.solver,
            "options": method.options | data.solver_options.get(method.solver, {}),
            "schedule": method.schedule,
            "sigma_min": data.sigma_min,
            "sigma_max": data.sigma_max,
            "noise_levels": data.noise_levels,
            "precision": data.precision,
            "nfe": nfe,
            "samples": samples,
        }
        | fields
    )


def runs_of(
    dataset, method: Row, nfe, seeds, n_samples=None, metric="fd", first_seed=0, **predictor
) -> list[Run]:
    """The Runs of a method: one, or one per training seed where something is learned.

    ``SEEDS`` stands for all that were trained, with ``MORE_SEEDS`` where there are more.
    """
    fields = {"schedule": method.schedule, "afs": method.afs, "options": method.options}
    fields["first_seed"] = first_seed
    fields["options"] = fields["options"] | describe(dataset).solver_options.get(method.solver, {})
    if not method.learned:
        return [run_of(dataset, method, nfe, n_samples, metric, **fields)]
    learned = RECIPE | describe(dataset).training | method.predictor | predictor
    rows = [METHODS[name] for name, nfes in TRAINED_MORE.items() if nfe in nfes]
    seeds = tuple(different("seeds", seeds))
    if dataset == "digits" and seeds == SEEDS and method in rows and not predictor:
        seeds += MORE_SEEDS
    return [
        run_of(
            dataset, method, nfe, n_samples, metric, **fields, predictor=learned | {"seed": seed}
        )
        for seed in seeds
    ]
