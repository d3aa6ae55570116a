"""What the leaderboard says: the best of each kind, its cost, and what each freedom is worth."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from amedlib.comparison import SCHEDULES
from amedlib.datasets.entries import describe
from amedlib.files import load_tensors
from amedlib.study import claims, leaderboard
from amedlib.study.execute import measure
from amedlib.study.forecast import training_evaluations
from amedlib.study.published import DISTANCES, called
from amedlib.study.rows import SEEDS
from amedlib.study.run import Result
from amedlib.study.sentences import listed
from amedlib.study.store import RESULTS, load_result, predictor_path
from amedlib.study.uncertainty import difference, estimates, with_interval
from amedlib.trained import below

BEST = "best untrained"
ON_BEST = ", best schedule"
AMED = ("AMED-Solver", "AMED-Plugin")


class Plans(NamedTuple):
    """What a leaderboard is made of: plans, and the same on the latents that choose."""

    untrained: pd.DataFrame
    learned: pd.DataFrame
    choice: pd.DataFrame
    choice_of_learned: pd.DataFrame
    not_run: str


def plans_of(dataset: str, nfes, seeds, n_samples, metrics, compute=False, **how) -> Plans:
    """The plans of a leaderboard: what the store has of them, or all of them, to be computed."""
    which = {"metrics": metrics, "compute": compute} | how
    alone = {"compute": compute} | how
    untrained = leaderboard.untrained(dataset, nfes, n_samples)
    learned = leaderboard.learned(dataset, nfes=nfes, seeds=seeds, n_samples=n_samples)
    if dataset == "digits" and tuple(seeds) == SEEDS:
        more = leaderboard.more_trainings(nfes, n_samples)
        learned = pd.concat([learned, more], ignore_index=True)
    others = leaderboard.CHOICE
    choice = kept(leaderboard.untrained(dataset, nfes, **others), **alone)
    of_learned = kept(leaderboard.learned(dataset, nfes=nfes, seeds=seeds, **others), **alone)
    left = kept(untrained, **which), kept(learned, **which)
    said = [not_run(untrained, left[0]), not_run(learned, left[1])]
    more, chosen, untried = best_schedules(dataset, nfes, seeds, n_samples, metrics, compute, **how)
    learned = pd.concat([left[1], more], ignore_index=True)
    of_learned = pd.concat([of_learned, chosen], ignore_index=True)
    return Plans(left[0], learned, choice, of_learned, " ".join(filter(None, [untried, *said])))


def best_schedules(dataset: str, nfes, seeds, n_samples, metrics, compute=False, **how):
    """Each row of AMED on the schedule that is best for it, by its first training on other latents.

    Returns:
        Two plans of such rows where all schedules were tried and the best is not the row's own: on
        the samples that are shown, and on those that the best of a need is chosen by. Their names
        end with ``ON_BEST``. And where no schedule was tried, in words.
    """
    tried = leaderboard.on_schedules(dataset, nfes, seeds[:1], **leaderboard.CHOICE)
    tried = kept(tried, compute=compute, **how)
    rows = ["method", "nfe"]
    tried = tried[tried.groupby(rows)["run"].transform("size") == len(SCHEDULES)]
    values = [result.value for result in measure(tried, **how)["result"]]
    first = tried.loc[tried.assign(value=values).groupby(rows)["value"].idxmin()]
    own = first["method"].map(lambda name: leaderboard.LEARNED[name].schedule)
    first = first.loc[first["schedule"] != own, CELL]
    on = {"shown": {"n_samples": n_samples}, "choice": leaderboard.CHOICE}
    planned = {k: leaderboard.on_schedules(dataset, nfes, seeds, **on[k]).merge(first) for k in on}
    shown = kept(planned["shown"], metrics, compute, **how)
    choice = kept(planned["choice"], compute=compute, **how)
    left = [str(nfe) for nfe in nfes if nfe not in set(tried["nfe"])]
    said = f"Schedules were not tried at {listed(left)}." if left else ""
    return *(each.assign(method=each["method"] + ON_BEST) for each in (shown, choice)), said


def with_metric(planned: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The same plan, measured otherwise; endpoint errors on as many samples as there are ends."""

    def other(run):
        most = describe(run.dataset).endpoint_samples
        few = metric == "endpoint_error" and run.samples > most
        return (replace(run, samples=most) if few else run).with_metric(metric)

    return planned.assign(run=[other(run) for run in planned["run"]])


CELL = ["method", "schedule", "afs", "nfe"]


def kept(
    planned: pd.DataFrame, metrics=("fd",), compute: bool = False, results_dir=RESULTS, **_
) -> pd.DataFrame:
    """The cells of a plan that the store has in full, by every metric; or all, to be computed."""
    if compute:
        return planned
    there = [
        all(load_result(run.with_metric(metric), results_dir) for metric in metrics)
        for run in planned["run"]
    ]
    whole = planned.assign(there=there).groupby(CELL, sort=False)["there"].transform("all")
    return planned[whole.to_numpy(dtype=bool)].reset_index(drop=True)


def not_run(planned: pd.DataFrame, left: pd.DataFrame) -> str:
    """A sentence on what ``kept`` left out; empty where that is nothing."""
    missing = planned.merge(left[CELL].drop_duplicates(), how="left", indicator=True)
    missing = missing[missing["_merge"] == "left_only"].drop_duplicates(CELL)
    names: dict[str, list[str]] = {}
    for name, rows in missing.groupby("method", sort=False):
        names.setdefault(listed(rows["nfe"].unique().astype(str).tolist()), []).append(name)
    every = planned["method"].nunique()
    each = [
        f"at {nfes} evaluations {', '.join(some) if len(some) < every else f'all {every}'}"
        for nfes, some in names.items()
    ]
    return f"Not run: {'; '.join(each)}. `-p compute True` runs it." if names else ""


def best(planned: pd.DataFrame, choice: pd.DataFrame, metric: str = "fd", **how) -> pd.DataFrame:
    """The sampler of a plan that is best at each NFE, chosen on other latents than it is shown on.

    Args:
        planned: of ``leaderboard.untrained`` or ``learned``.
        choice: the same on the latents ``leaderboard.CHOICE``.
        metric: what is shown; the choice is by FD, means over trainings.

    Returns:
        The rows of the plan for these samplers, with ``result``.
    """
    found = measure(choice.merge(planned[CELL].drop_duplicates()), **how)
    found = found.assign(value=[result.value for result in found["result"]])
    found = found.groupby(CELL, sort=False)["value"].mean().reset_index()
    first = found.loc[found.groupby("nfe")["value"].idxmin(), CELL]
    return measure(with_metric(first.merge(planned), metric), **how)


def candidates(plans: Plans, **how) -> pd.DataFrame:
    """The best sampler for each of ``leaderboard.NEEDS``; columns need, nfe, who, result.

    There is none at an NFE where only some of a need's samplers were run.
    """
    found = []
    for need, names in leaderboard.NEEDS.items():
        if names:
            of_need = plans.learned[plans.learned["method"].str.removesuffix(ON_BEST).isin(names)]
            run = of_need[of_need["method"].isin(names)].groupby("nfe")["method"].nunique()
            of_need = of_need[of_need["nfe"].map(run) == len(names)]
            if of_need.merge(plans.choice_of_learned[CELL]).empty:
                continue  # there is nothing to choose by
            each = best(of_need, plans.choice_of_learned, **how)
            each = each.assign(who=each["method"])
        else:
            each = best(plans.untrained, plans.choice, **how)
            each = each.assign(who=each.apply(label, axis=1))
        found.append(each.assign(need=need))
    return pd.concat(found, ignore_index=True)


def use_it(plugin: list[Result], others: pd.DataFrame) -> tuple[str, str]:
    """Whether to use AMED-Plugin as the paper trains it: against what needs no more than it does.

    Args:
        plugin: its results, on the latents of the others.
        others: rows of ``candidates`` at the same NFE; by "no training" and by "a minute of
            training" it is decided, where they were run, corrected for these two.

    Returns:
        The answer, and why.
    """
    needs = [n for n in ("no training", "a minute of training") if n in set(others["need"])]
    found, names = {}, {}
    for need in needs:
        rows = others[others["need"] == need]
        found[need] = difference(plugin, rows["result"].tolist())
        names[need] = rows["who"].iloc[0]
    corrected = claims.holm([each.p_value for each in found.values()])
    verdicts = [claims.verdict(e.value, p) for e, p in zip(found.values(), corrected, strict=True)]
    words = {"holds": "better than", "does not hold": "worse than"}
    said = [
        f"{words.get(verdict, 'not to be told apart from')} “{names[need]}” ({need})"
        for need, verdict in zip(needs, verdicts, strict=True)
    ]
    if "does not hold" in verdicts:
        answer = "Not as the paper trains it"
    else:
        answer = "Yes" if set(verdicts) == {"holds"} else "It cannot be told"
    nfe = plugin[0].run.nfe
    on = called(plugin[0].run.schedule)
    return (
        f"{answer}.",
        f"At {nfe} evaluations AMED-Plugin, on the {on} schedule, is {', and '.join(said)}.",
    )


def label(row) -> str:
    """An untrained sampler in words: its solver, schedule and whether AFS is on."""
    return f"{row['method']}, {called(row['schedule'])}{', AFS' if row['afs'] else ''}"


def standings(plans: Plans, metric: str = "fd", **how) -> pd.DataFrame:
    """The best untrained sampler and the learned ones; columns method, nfe, value, half, who.

    ``who`` says which untrained sampler it is.
    """
    first = best(plans.untrained, plans.choice, metric, **how)
    first = first.assign(who=first.apply(label, axis=1), method=BEST)
    learned = measure(with_metric(plans.learned, metric), **how).assign(who="")
    return estimates(pd.concat([first, learned], ignore_index=True), by=("method", "nfe", "who"))


_CALLED = {
    **{"step": "the next step", "endpoint": "the end", "search": "the whole path, by search"},
    **{"heun": "Heun", "ipndm": "iPNDM", "adam": "Adam", "lbfgs": "L-BFGS"},
}


def how_trained(planned: pd.DataFrame) -> pd.DataFrame:
    """What learned samplers were trained for, on and by; a row per method, of its first Run."""
    rows = {}
    for row in planned.drop_duplicates("method").itertuples():
        it = row.run.training
        by = f"{_CALLED[it.optimizer]}, {it.passes} {'pass' if it.passes == 1 else 'passes'}"
        rows[row.method] = {
            "for": _CALLED[it.objective],
            "teacher": f"{_CALLED[it.teacher]}, {1 + it.m} steps for one",
            "trajectories": f"{it.images:,}",
            "by": "–" if it.objective == "search" else by,
        }
    return pd.DataFrame(rows).T


def training_costs(planned: pd.DataFrame, results_dir=RESULTS) -> pd.DataFrame:
    """What it costs to train learned samplers; means over seeds, a row per method and NFE.

    Columns: numbers (that are learned), trajectories, evaluations (of the network, teacher's and
    student's; of ``training_evaluations``, with the gradients that training counted), seconds (on
    one thread where it was trained), of the predictors that say so.
    """
    rows = []
    for row in planned.to_dict("records"):
        training = row["run"].training
        path = predictor_path(row["run"], results_dir or RESULTS)
        tensors, stated = load_tensors(path)
        gradients = int(stated["gradients"]) if "gradients" in stated else None
        rows.append(
            {
                "method": row["method"],
                "nfe": row["nfe"],
                "numbers": sum(number.numel() for number in below("predictor/", tensors).values()),
                "trajectories": training.images,
                "evaluations": training_evaluations(training, gradients),
                "seconds": float(stated.get("seconds", "nan")),
            }
        )
    return pd.DataFrame(rows).groupby(["method", "nfe"], sort=False).mean().reset_index()


# --- which freedom is worth what ------------------------------------------------------------------


def effects(measured: pd.DataFrame, factors) -> pd.DataFrame:
    """The factor by which each freedom multiplies a distance, averaged over all else that differs.

    Main effects of a linear model of log FD, with the cells of all other factors and NFE as its
    own constants: within each the cells with and without are compared. 95 % intervals (Student's t)
    over these comparisons.

    Args:
        measured: columns of ``factors`` (boolean), nfe, result; several trainings are averaged.

    Returns:
        Columns factor, nfe, value, low, high, comparisons.
    """
    cells = measured.assign(log=[np.log(result.value) for result in measured["result"]])
    cells = cells.groupby([*factors, "nfe"])["log"].mean().reset_index()
    rows = []
    for factor in factors:
        others = [name for name in factors if name != factor]
        pairs = cells.pivot(index=[*others, "nfe"], columns=factor, values="log")
        gains = (pairs[True] - pairs[False]).rename("gain").reset_index()
        for nfe, some in gains.groupby("nfe")["gain"]:
            mean, error = some.mean(), some.std(ddof=1) / np.sqrt(len(some))
            half = stats.t.ppf(0.975, len(some) - 1) * error
            low, value, high = np.exp([mean - half, mean, mean + half])
            rows.append([factor, nfe, value, low, high, len(some)])
    return pd.DataFrame(rows, columns=["factor", "nfe", "value", "low", "high", "comparisons"])


def rank_correlation(
    a, b, resamples: int = 2000, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """Spearman's rank correlation of two measures over samplers, with a 95 % bootstrap interval."""
    pairs = np.column_stack([a, b])
    draw = np.random.default_rng(seed).integers(len(pairs), size=(resamples, len(pairs)))
    found = [stats.spearmanr(*pairs[rows].T).statistic for rows in draw]
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return float(stats.spearmanr(a, b).statistic), (float(low), float(high))


def answer(found: pd.DataFrame, nfe: int, limit: float) -> tuple[str, str]:
    """Which sampler is best at one NFE, untrained and trained, in two sentences.

    Args:
        found: of ``standings``.
        limit: FD of the ODE all but solved.
    """
    rows = found[found["nfe"] == nfe].set_index("method")
    said = {method: with_interval(row["value"], row["half"]) for method, row in rows.iterrows()}
    first = rows.drop(BEST)["value"].idxmin()
    behind = [name for name in AMED if rows["value"][name] > rows["value"][BEST]]
    text = {0: "neither row", 1: f"{''.join(behind)} alone", 2: "both rows"}
    return (
        f"At {nfe} evaluations the best untrained sampler is {rows['who'][BEST]}, with "
        f"{said[BEST]}, and the best learned one *{first}*, with {said[first]}, where solving the "
        f"equation exactly gives {limit:.2f}.",
        f"In its mean the best untrained sampler is ahead of {text[len(behind)]} of the paper: "
        f"AMED-Solver has {said['AMED-Solver']}, AMED-Plugin {said['AMED-Plugin']}.",
    )


WORDS = {
    "times": "learned times",
    "network_times": "times told to the network",
    "coefficients": "learned coefficients",
    "afs": "AFS",
}


def named(measured: pd.DataFrame) -> list[str]:
    """Which of ``leaderboard.FACTORS`` are learned, in words, a text per row."""
    rows = measured[list(leaderboard.FACTORS)].to_dict("records")
    return [" + ".join(WORDS[k] for k, on in row.items() if on) or "nothing" for row in rows]


def worth_in_words(worth: pd.DataFrame) -> str:
    """What helps most at each NFE, and what does not, in sentences; of ``effects``."""
    said = []
    for nfe, rows in worth.groupby("nfe"):
        rows = rows.set_index("factor")
        first = rows["value"].idxmin()
        no_help = [WORDS[name] for name, row in rows.iterrows() if row["high"] >= 1]
        text = (
            f"At {nfe} evaluations **{WORDS[first]}** help most: they multiply FD by "
            f"{rows['value'][first]:.2f} ({rows['low'][first]:.2f} to {rows['high'][first]:.2f})."
        )
        if no_help:
            text += f" No gain can be told for {' and '.join(no_help)}."
        said.append(text)
    return " ".join(said)


def in_numbers(found: pd.DataFrame) -> dict[str, str]:
    """Estimates of ``candidates``, for the book's prose: name and value by need and NFE."""
    short = dict(
        zip(leaderboard.NEEDS, ("untrained", "minute", "network", "parallel"), strict=True)
    )
    numbers = {}
    for row in found.itertuples():
        key = f"which_{short[row.need]}_{row.nfe}"
        numbers |= {f"{key}_who": row.who, f"{key}_fd": with_interval(row.value, row.half)}
    return numbers


def _firsts(means: pd.DataFrame) -> str:
    """In which column of a frame by NFE the lowest mean stands, where every column has one."""
    firsts = means.dropna().idxmin(axis=1)
    each = [
        f"“{need}” at {listed(firsts.index[firsts == need].astype(str).tolist())}"
        for need in means
        if (firsts == need).any()
    ]
    return "; ".join(each)


def needs_in_words(found: pd.DataFrame, joint: pd.DataFrame, runs: pd.DataFrame) -> dict[str, str]:
    """What the table of needs says, for the book's prose.

    Args:
        found: estimates of ``candidates``.
        joint: the same samplers' by joint FD.
        runs: of ``candidates``.
    """
    means = found.pivot(index="nfe", columns="need", values="value")
    ahead = {}
    for need in ("no training", "a minute of training"):
        if {need, "a network on the bottleneck"} <= set(means):
            both = means[[need, "a network on the bottleneck"]].dropna()
            first = (both["a network on the bottleneck"] < both[need]).sum()
            ahead[need] = f"“{need}” at {first} of {len(both)} numbers of evaluations"
    parallel = runs[runs["need"] == "evaluations side by side"].drop_duplicates("nfe")
    counts = [
        f"{(run.num_steps - 1) * (1 + run.training.points) - run.afs} for {run.nfe}"
        for run in parallel["run"]
    ]
    of_both = " and of ".join(ahead.values())
    return {
        "which_network": f"In its mean the third column is ahead of {of_both}.",
        "which_first": (
            f"In the mean the first of all columns by FD is {_firsts(means)} evaluations; by joint "
            f"FD {_firsts(joint.pivot(index='nfe', columns='need', values='value'))}."
        ),
        "which_parallel": ", ".join(counts),
    }


def by_endpoint_error(plans: Plans, **how) -> pd.DataFrame:
    """The untrained sampler that ends nearest to the solution, and the one that FD chooses.

    The first is chosen by the endpoint error of the samples that it is shown on, the second as
    ``best`` chooses.

    Returns:
        Columns nfe, chosen (by endpoint error, by FD), who, value and half (of FD).
    """
    ends = measure(with_metric(plans.untrained, "endpoint_error"), **how)
    ends = ends.assign(value=[result.value for result in ends["result"]])
    nearest = ends.loc[ends.groupby("nfe")["value"].idxmin(), CELL].merge(plans.untrained)
    chosen = {
        "by endpoint error": measure(nearest, **how),
        "by FD": best(plans.untrained, plans.choice, **how),
    }
    both = pd.concat(frame.assign(chosen=name) for name, frame in chosen.items())
    both = both.assign(who=both.apply(label, axis=1))
    return estimates(both, by=("nfe", "chosen", "who"))


def endpoint_error_in_words(found: pd.DataFrame) -> str:
    """What choosing by endpoint error costs in FD, in a sentence; of ``by_endpoint_error``."""
    values = found.pivot(index="nfe", columns="chosen", values="value")
    who = found.pivot(index="nfe", columns="chosen", values="who")
    same = who["by FD"] == who["by endpoint error"]
    other = [
        f"{row['by endpoint error']:.2f} in place of {row['by FD']:.2f} at {nfe}"
        for nfe, row in values[~same].iterrows()
    ]
    told = [f"FD is {listed(other)} evaluations"] if other else []
    if same.any():
        told.append(f"at {listed(values.index[same].astype(str).tolist())} it is the same sampler")
    return f"Chosen by the error at the end, the untrained sampler's {'; '.join(told)}."


def below_limit(found: pd.DataFrame, limit: float) -> str:
    """Which means lie below the limit of the model, and how many of them by more than their half.

    Args:
        found: of ``standings``.
        limit: of the ODE all but solved.
    """
    under = found[found["value"] < limit]
    if under.empty:
        return ""
    apart = (under["value"] + under["half"] < limit).sum()
    which = ", ".join(f"{row.method} at {row.nfe}" for row in under.itertuples())
    return f"Below the limit of {limit:.2f}: {which}; {apart} of them by more than their interval. "


def firsts_in_words(frames: dict[str, pd.DataFrame]) -> list[str]:
    """Which sampler has the lowest mean by each measure, a sentence per NFE.

    Args:
        frames: measure to ``standings`` by it.
    """
    said = []
    for nfe in next(iter(frames.values()))["nfe"].unique():
        firsts: dict[str, list[str]] = {}
        for by, found in frames.items():
            values = found[found["nfe"] == nfe].set_index("method")["value"]
            if len(values) > 1:
                firsts.setdefault(values.idxmin(), []).append(by)
        each = [f"“{name}” by {listed(by)}" for name, by in firsts.items()]
        said += [f"At {nfe} evaluations the first is {'; '.join(each)}."] if each else []
    return said


def wide(planned: pd.DataFrame, metrics, **how) -> tuple[pd.DataFrame, list[str]]:
    """Means over trainings by every metric, for ``interactive.leaderboard_plot``.

    Returns:
        A frame with columns method, schedule, afs, nfe and a column per metric; and their names.
    """
    keys, columns = ["method", "schedule", "afs", "nfe"], {}
    words = {True: "with AFS", False: "without AFS", "": ""}
    planned = planned.assign(afs=[words[afs] for afs in planned["afs"]])
    for metric in metrics:
        measured = measure(with_metric(planned, metric), **how)
        measured = measured.assign(value=[result.value for result in measured["result"]])
        name = DISTANCES.get(metric, "endpoint error")
        columns[name] = measured.groupby(keys, sort=False)["value"].mean()
    return pd.DataFrame(columns).reset_index(), list(columns)
