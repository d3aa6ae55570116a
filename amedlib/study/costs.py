"""What the paper's tables cost: network evaluations, counted by code, and the time they take.

``python -m benchmarks gpu`` measures how fast a machine is.
"""

import json

import numpy as np
import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from amedlib.datasets.entries import describe
from amedlib.datasets.loaders import load_weights
from amedlib.denoisers import edm
from amedlib.files import load_tensors
from amedlib.study import plans
from amedlib.study.forecast import search_evaluations, training_evaluations
from amedlib.study.published import published
from amedlib.study.run import Run
from amedlib.study.store import RESULTS, load_result, predictor_path

# What evaluations are made for; the last are images through the network that judges samples.
KINDS = ("sampling", "search", "training", "features")
# Data sets whose network has the architecture of another one's.
SAME_NETWORK = {"lsun_cat": "lsun_bedroom"}


def _parts(planned: pd.DataFrame) -> tuple[list[Run], list[Run], list[Run]]:
    """The Runs of a plan, one for each training that they need, and their searches; each once."""
    runs = list({what.key: what for what in planned["run"]}.values())
    trained = {predictor_path(what): what for what in runs if what.predictor is not None}
    searches = [what.search() for what in runs if what.r == "searched"]
    return runs, list(trained.values()), list({what.key: what for what in searches}.values())


def evaluations(planned: pd.DataFrame) -> dict[str, int]:
    """Network evaluations of a plan, by ``KINDS``; what several Runs share counts once."""
    runs, trained, searches = _parts(planned)
    per_call = describe(runs[0].dataset).evaluations_per_call
    return {
        "sampling": sum(what.nfe * what.samples for what in runs),
        "search": per_call * sum(search_evaluations(what) for what in searches),
        "training": per_call * sum(training_evaluations(what.training) for what in trained),
        "features": sum(what.samples for what in runs if what.metric == "fd"),
    }


def planned_table(number: int, dataset: str, **how) -> pd.DataFrame:
    """The Runs of a table of the paper from 2 to 13; arguments as of ``plans.table``."""
    return plans.table2(dataset, **how) if number == 2 else plans.table(number, dataset, **how)


def count_tables(seeds=plans.SEEDS) -> pd.DataFrame:
    """Evaluations of Tables 2 to 13 on the paper's own data sets, each table by itself.

    Returns:
        Columns table, dataset, runs, trainings and ``KINDS``.
    """
    rows = []
    for number in range(2, 14):
        for dataset in published(f"table{number}")["dataset"].unique():
            planned = planned_table(number, dataset, seeds=seeds)
            runs, trained, _ = _parts(planned)
            row = {"table": number, "dataset": dataset, "runs": len(runs)}
            rows.append(row | {"trainings": len(trained)} | evaluations(planned))
    return pd.DataFrame(rows)


def spent(planned: pd.DataFrame, results_dir=RESULTS) -> dict:
    """What a plan took where it was computed, from the store.

    Returns:
        runs and trainings: how many there are; stored and timed: how many of them have their result
        and the seconds of their training in the store; seconds of sampling (with all that is
        measured of the samples), search and training of those; and the devices.
    """
    runs, trained, searches = _parts(planned)
    results = [load_result(what, results_dir) for what in runs]
    found = [load_result(what, results_dir) for what in searches]
    paths = [predictor_path(what, results_dir) for what in trained]
    metadata = [load_tensors(path)[1] for path in paths if path.is_file()]
    # Predictors of an early version do not say how long they took.
    seconds = [float(each["seconds"]) for each in metadata if "seconds" in each]
    return {
        "runs": len(runs),
        "stored": sum(result is not None for result in results),
        "trainings": len(trained),
        "timed": len(seconds),
        "sampling": sum(result.seconds for result in results if result),
        "search": sum(result.seconds for result in found if result),
        "training": sum(seconds),
        "device": ", ".join(sorted({result.device for result in results if result})),
    }


def evaluation_flops(init_kwargs: dict) -> int:
    """Floating point operations of one evaluation of the small model of CIFAR-10, on one image."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        net = edm.build("EDMPrecond", init_kwargs).eval()
        net(torch.empty(1, 3, 32, 32), torch.empty(()))
    return counter.get_total_flops()


# What ``python -m benchmarks gpu`` measures, of networks of the paper's sizes.
GPU_PARTS = {
    "rates": "Images per second of the network alone, at the largest batch that fits.",
    "compiled": "The same with torch.compile.",
    "training": "One batch of training AMED-Solver, three time points; memory beyond the weights.",
    "overhead": "The sampling loop's time against that of the same network calls alone.",
    "features": "Images per second of the network of FID.",
}


def on_gpu(processes: int = 4, results_dir=RESULTS) -> pd.DataFrame:
    """What the small model of CIFAR-10 took of a card: its training, and its stored Table 2.

    Args:
        processes: how many shared the card, each with its own clock; in the stored runs four.

    Returns:
        Rows: what was done; columns evaluations (of the training of the network: images), seconds
        of the card, per second, TFLOP/s (counted operations; training takes three times those of
        an evaluation).
    """
    metadata = load_weights("cifar10_edm.safetensors")[1]
    flops = evaluation_flops(json.loads(metadata["init_kwargs"]))
    runs, trained, _ = _parts(plans.table2("cifar10_small", seeds=[0]))
    found = [result for what in runs if (result := load_result(what, results_dir))]
    known = [what for what in trained if predictor_path(what, results_dir).is_file()]
    seconds = [float(load_tensors(predictor_path(w, results_dir))[1]["seconds"]) for w in known]
    whole = json.loads(metadata["runs"])
    rows = {
        "training of the network": (
            sum(run["images"] for run in whole),
            sum(run["seconds"] for run in whole),
            3,
        ),
        "sampling of Table 2": (
            sum(result.run.nfe * result.run.samples for result in found),
            sum(result.seconds for result in found) / processes,
            1,
        ),
        "trainings of its predictors": (
            sum(training_evaluations(what.training) for what in known),
            sum(seconds) / processes,
            None,  # one evaluation in each step is differentiated
        ),
    }
    frame = pd.DataFrame(rows, index=["evaluations", "seconds", "factor"]).T
    frame["per second"] = frame["evaluations"] / frame["seconds"]
    frame["TFLOP/s"] = frame["per second"] * frame["factor"] * flops / 1e12
    return frame.drop(columns="factor")


def reached(results_dir=RESULTS) -> int:
    """The TFLOP/s that the sampling of Table 2 reached on a card, of ``on_gpu``."""
    return round(on_gpu(results_dir=results_dir).loc["sampling of Table 2", "TFLOP/s"])


# --- projection ---------------------------------------------------------------------------------


def rates(report: dict[str, pd.DataFrame]) -> dict[str, dict[str, float]]:
    """Images per second by data set and kind, from what ``python -m benchmarks gpu`` measured.

    Sampling in the data set's precision, training with its gradient; what was not measured or
    failed is left out.

    Args:
        report: from ``plotting.benchmarks``.
    """
    inception = _column(report, "features")
    found = {}
    for name in {row["dataset"] for row in _rows(report, "rates")}:
        data = describe(name)
        gradient = data.training.get("gradient", "reverse")
        measured = {
            "sampling": _column(report, "rates", dataset=name, variant=data.precision),
            "training": _column(report, "training", dataset=name, gradient=gradient),
            "features": inception,
        }
        measured["search"] = measured["sampling"]
        found[name] = {kind: rate for kind, rate in measured.items() if rate}
    return _of_alike(found)


def assumed(sizes: pd.DataFrame, teraflops: float) -> dict[str, dict[str, float]]:
    """Images per second of a GPU with so many 10^12 operations per second, as from ``rates``.

    An evaluation in training is taken to cost what it does in sampling; of Inception nothing is
    said.

    Args:
        sizes: columns dataset and "GFLOP per evaluation", from ``python -m benchmarks sizes``.
    """
    kinds = ("sampling", "search", "training")
    per_second = 1000 * teraflops / sizes.set_index("dataset")["GFLOP per evaluation"]
    return _of_alike({name: dict.fromkeys(kinds, rate) for name, rate in per_second.items()})


def _of_alike(rates: dict) -> dict:
    """The rates, and those of data sets whose network has the same architecture."""
    return rates | {name: rates[same] for name, same in SAME_NETWORK.items() if same in rates}


def _rows(report, part) -> list[dict]:
    return report[part].to_dict("records") if part in report else []


def _column(report, part, **wanted) -> float | None:
    """The images per second in the row with these values."""
    for row in _rows(report, part):
        if all(row[name] == value for name, value in wanted.items()):
            rate = row.get("images/s")
            return None if pd.isna(rate) else rate
    return None


def project(counted: pd.DataFrame, rates: dict[str, dict[str, float]]) -> pd.DataFrame:
    """Hours that counted evaluations take at given rates: evaluations / rate / 3600.

    Args:
        counted: columns dataset and ``KINDS``, from ``count_tables``.
        rates: images per second by data set and kind. A kind that no data set has a rate for is
            left out; where a data set has none, its hours are NaN.

    Returns:
        Columns table, dataset, the kinds, and total: hours.
    """
    kinds = [kind for kind in KINDS if any(kind in each for each in rates.values())]
    each = pd.DataFrame(
        [{kind: rates.get(name, {}).get(kind) for kind in kinds} for name in counted["dataset"]],
        index=counted.index,
        columns=kinds,
        dtype=float,
    )
    hours = counted[kinds] / each / 3600
    return counted[["table", "dataset"]].join(hours).assign(total=hours.sum(axis=1, skipna=False))


def costs_of_choice(measured: pd.DataFrame, results_dir) -> pd.DataFrame:
    """Table 3's other half: what it costs to find r, and how much r varies between samples.

    Args:
        measured: of ``plans.table(3)``.

    Returns:
        A row per strategy; minutes of one search or training, the paper's minutes, and the largest
        standard deviation of r over a batch among the steps (last batch of training), per NFE.
    """
    theirs = published("table3")
    theirs = theirs[theirs["unit"] == "min"].set_index(["strategy", "nfe"])["value"]
    rows = []
    for (strategy, nfe), group in measured.groupby(["strategy", "nfe"], sort=False):
        what = group["result"].iloc[0].run
        if what.r == "searched":
            seconds, spread = load_result(what.search(), results_dir).seconds, np.nan
        else:
            tensors, metadata = load_tensors(predictor_path(what, results_dir))
            seconds, spread = (
                float(metadata.get("seconds", "nan")),
                tensors["log"][-1, :, 2].max().item(),
            )
        row = {"minutes": seconds / 60, "paper's minutes": theirs[strategy, nfe], "sd of r": spread}
        rows.append({"strategy": strategy, "NFE": nfe} | row)
    return pd.DataFrame(rows).pivot(index="strategy", columns="NFE")
