"""What a page begins with: its result, in at most two short sentences."""

import pandas as pd
from IPython.display import Markdown, display

from amedlib.datasets.entries import describe
from amedlib.study import claims, corruptions, leaderboard, plans, standings, tables, verdicts
from amedlib.study.published import ROWS, row_names, value_in_words
from amedlib.study.run import Result
from amedlib.study.sentences import listed
from amedlib.study.uncertainty import Estimate, difference, estimates, with_interval

AROUND = 5  # the number of evaluations that the paper is about
OF_TABLE2 = "the samplers of Table 2"
# What one claim, and what several claims do.
COUNTED = {
    "holds": ("holds", "hold"),
    "does not hold": ("does not hold", "do not hold"),
    "mixed": ("is mixed", "are mixed"),
    "partly tested": ("is tested in part", "are tested in part"),
    "undecided": ("is undecided", "are undecided"),
    "no power": ("has a test without power", "have tests without power"),
    "not run": ("is not run", "are not run"),
}


def show(first: str, second: str = "") -> None:
    """Show what a page found, above everything else: the first sentence in bold."""
    display(Markdown(f"**{first.replace('**', '')}** {second}".strip()))


def counted(words: pd.Series, what: str = "claims tested on this page") -> str:
    """How many claims hold, fail, and so on, in a sentence.

    Args:
        words: a verdict per claim.
    """
    count = words.value_counts()
    each = [f"{count[w]} {some[int(count[w] > 1)]}" for w, some in COUNTED.items() if w in count]
    return f"Of the paper's {what}, {listed(each)}."


def of_claims(judged: pd.DataFrame) -> str:
    """What the comparisons of a page say of the paper's claims, in a sentence.

    Args:
        judged: of ``claims.judge``.
    """
    told = verdicts.each_claim(judged)
    if not told:
        return verdicts.of_a_page(judged)[0]
    if len(told) == 1:
        sentence, word, counts = told[0]
        return f"The paper's claim {COUNTED[word][0]} here ({counts}): “{sentence}”."
    return counted(pd.Series([word for _, word, _ in told]))


def nearest(nfes) -> int:
    """The number of evaluations nearest to five, the smaller of two."""
    return min(sorted(nfes), key=lambda nfe: abs(nfe - AROUND))


def extremes(found: pd.DataFrame, nfe: int, unit: str, of: str = "") -> str:
    """The best and the worst row at one number of evaluations, in a sentence.

    Args:
        found: ``uncertainty.estimates``, with the rows' names in a column ``method``.
        of: what the rows are, where a page has others too.
    """
    rows = found[found["nfe"] == nfe].set_index("method")
    low, high = rows["value"].idxmin(), rows["value"].idxmax()
    told = [with_interval(rows["value"][name], rows["half"][name]) for name in (low, high)]
    where = f"Of {of} at {nfe} evaluations," if of else f"At {nfe} evaluations"
    return (
        f"{where} {low} has the lowest {unit} in the mean, {told[0]}, and {high} the highest, "
        f"{told[1]}."
    )


def of_samplers(measured: pd.DataFrame, unit: str, of: str = OF_TABLE2) -> str:
    """``extremes`` of a table of samplers, at the number of evaluations nearest to five."""
    return extremes(estimates(measured), nearest(measured["nfe"]), unit, of)


def of_images(dataset: str, nfe: int, results_dir) -> str:
    """What the images of ``plans.table2`` at one NFE were measured to be worth.

    Nothing is computed; where the store has nothing the sentence says so.
    """
    planned = plans.table2(dataset, nfes=[nfe])
    measured = claims.stored(planned, results_dir).dropna(subset="result")
    if measured.empty:
        return f"No distance of these images is stored for {describe(dataset).title}."
    return extremes(estimates(measured), nfe, describe(dataset).feature_distance_name, OF_TABLE2)


def of_ablation(number: int, measured: pd.DataFrame, unit: str) -> str:
    """At which NFE the rows of Tables 3 to 7 differ most, and from what to what."""
    found = estimates(row_names(measured, number), by=[*ROWS[number], "nfe"])
    found = found.assign(method=[row_in_words(number, row) for _, row in found.iterrows()])
    several = {nfe: rows["value"] for nfe, rows in found.groupby("nfe") if len(rows) > 1}
    if not several:
        return ""
    widest = max(several, key=lambda nfe: several[nfe].max() / several[nfe].min())
    said = extremes(found, widest, unit).removeprefix(f"At {widest} evaluations ")
    return f"The rows differ most at {widest} evaluations: {said}"


def row_in_words(number: int, row: pd.Series) -> str:
    """What a row of a table is called: ``M = 2``, ``DPM-Solver-2, r = 0.3``, ``DDIM with AFS``."""
    named = [value_in_words(name, row[name]) for name in ROWS[number]]
    words = {"AFS": "AFS", "AMED": "a learned step"}
    marks = [words[name] for name in ROWS[number] if name in words and row[name] == "✓"]
    plain = [each for each in named if each not in ("✓", "✗", "–")]
    if number == 5:  # schedule and method
        plain = [" on ".join(reversed(plain)) + " times"]
    text = f"the teacher {plain[0]}" if number == 4 else ", ".join(plain)
    return f"{text} with {listed(marks)}" if marks else text


def of_afs(measured: pd.DataFrame, unit: str) -> str:
    """In how many cells of a table AFS lowers the mean, in a sentence."""
    values = measured.assign(value=[result.value for result in measured["result"]])
    values["amed"] = values["amed"].astype(bool)
    found = values.pivot_table(index=["method", "amed", "nfe"], columns="afs", values="value")
    found = found.dropna()
    lower = (found[True] < found[False]).sum()
    return (
        f"The analytical first step (AFS) lowers {unit} in {lower} of the {len(found)} cells that "
        "have a value with it and without it."
    )


def of_guided(measured: pd.DataFrame, unit: str) -> str:
    """In how many cells of Table 13 a learned step lowers the mean, in a sentence."""
    values = estimates(measured, by=("guidance", "nfe", "amed")).pivot(
        index=["guidance", "nfe"], columns="amed", values="value"
    )
    lower = (values[True] < values[False]).sum()
    return f"In the mean a learned step lowers {unit} in {lower} of {len(values)} cells."


def of_table(number: int, measured: pd.DataFrame, judged: pd.DataFrame, unit: str) -> None:
    """Begin the page of one of Tables 3 to 13.

    Args:
        measured: columns ``plans.KEY`` and ``result``.
        judged: the claims about it, of ``claims.judge``.
        unit: what is measured.
    """
    if number in range(3, 8):
        first = of_ablation(number, measured, unit)
    elif number == 13:  # guidance, not the sampler, makes the extremes
        first = of_guided(measured, unit)
    elif number == 8:
        first = of_afs(measured, unit)
    else:
        named = row_names(measured, number)
        named = named.assign(method=[row_in_words(number, row) for _, row in named.iterrows()])
        first = of_samplers(named, unit, f"the rows of Table {number}")
    second = of_claims(judged) if len(judged) or not first else ""
    show(*filter(None, [first, second]))


def of_local_errors(found: pd.DataFrame) -> str:
    """The smallest and the largest error of a step that starts on the solution, in a sentence."""
    rows = found.set_index("method")["value"]
    return (
        f"{rows.idxmin()} ends a step nearest to the solution, {rows.min():.3g} from it in the "
        f"mean; {rows.idxmax()} ends farthest, {rows.max():.3g}."
    )


def of_steps(curves: dict[str, dict]) -> str:
    """Which solver ends every single step nearest to the solution, in a sentence.

    Args:
        curves: method to a dict with rms, a value per step.
    """
    errors = pd.DataFrame({name: found["rms"] for name, found in curves.items()})
    steps = pd.Series((errors.index + 1).astype(str)).groupby(errors.idxmin(axis=1), sort=False)
    each = [f"{name} in step {listed(list(some))}" for name, some in steps]
    return f"Step by step the nearest is {'; '.join(each)}."


def of_bound(t, distance, bound, factor: float) -> None:
    """Whether a bound is one: at how many times the distance is above it."""
    beyond = distance > bound
    first = (
        f"The paper's bound is broken at {beyond.sum()} of {len(t)} times: there the mean "
        "distance from the plane is larger."
        if beyond.any()
        else f"The paper's bound holds of the mean distance at all {len(t)} times."
    )
    show(first, f"With the paper's b the smallest bound of its form is {factor:.3g} times as high.")


def of_places(results: dict[str, list[Result]]) -> str:
    """How many learned places are before the middle of their step, by method, in a sentence."""
    told = []
    for method, some in results.items():
        places = [r for result in some for r in result.curves["r"]]
        told.append(f"{sum(r < 0.5 for r in places)} of {len(places)} cases for {method}")
    return f"The learned place is before the middle of its step (r below 1/2) in {listed(told)}."


def of_losses(found: pd.DataFrame) -> str:
    """In how many cells a loss other than L2 has the lower mean; estimates by method, loss, nfe."""
    values = found.pivot(index=["method", "nfe"], columns="loss", values="value").dropna()
    told = [
        f"With the training loss {name} instead of L2 the mean is lower in "
        f"{(values[name] < values['l2']).sum()} of {len(values)} cells."
        for name in values.columns.drop("l2")
    ]
    return " ".join(told)


TOLD = {"✓": "is better than", "✗": "is worse than", "?": "cannot be told apart from"}


def of_plugin(frames: dict[str, pd.DataFrame]) -> tuple[str, str]:
    """What iPNDM gains from AFS, and from the learned step besides, in two sentences.

    Args:
        frames: measure to what was measured of ``plans.plugin``; told is the first.
    """
    unit, measured = next(iter(frames.items()))
    plain, afs, both = "iPNDM", "iPNDM, AFS", "AMED-Plugin, M = 2"
    rows = estimates(measured, by=("variant",)).set_index("variant")
    value = {name: with_interval(row["value"], row["half"]) for name, row in rows.iterrows()}
    found = tables.variants_marked(frames, [plain, afs])[unit, afs, both]
    return (
        f"At {measured['nfe'].iloc[0]} evaluations iPNDM has {unit} {value[plain]}, with the "
        f"analytical first step (AFS) {value[afs]}, with AFS and a learned step {value[both]}.",
        f"AFS with a learned step {TOLD[found[0]]} AFS alone (difference {found[2:]}).",
    )


def of_objectives(found: dict[str, pd.DataFrame]) -> tuple[str, str]:
    """What training for the end of the trajectory changes, in two sentences.

    Args:
        found: measure to what was measured of ``plans.beyond("objective")``; told is the first.
    """
    unit, measured = next(iter(found.items()))
    step, end = measured["variant"].unique()
    values = estimates(measured, by=("variant", "nfe")).set_index(["variant", "nfe"])["value"]
    nfes = measured["nfe"].unique()
    each = [f"{values[end, n]:.2f} instead of {values[step, n]:.2f} at {n}" for n in nfes]
    marks = tables.variants_marked(tables.by_cell(found), [step])
    marks = [marks[name, step, end][0] for name in tables.by_cell({unit: measured})]
    told = [
        f"{TOLD[mark]} training for the step at {n}" for mark, n in zip(marks, nfes, strict=True)
    ]
    return (
        f"Trained for the end of the trajectory and not for the next step, AMED-Plugin has {unit} "
        f"{listed(each)} evaluations.",
        f"By paired differences, training for the end {listed(told)} evaluations.",
    )


def of_centring(found: pd.DataFrame, unit: str) -> tuple[str, str]:
    """What centring changes with AFS and without it, in two sentences.

    Args:
        found: estimates by method, data and nfe, of ``plans.centring``.
    """
    values = found.pivot(index=["method", "nfe"], columns="data", values="value")
    ratio = values["not centred"] / values["centred"]
    afs = ratio.index.get_level_values("method").str.endswith("AFS")
    name, nfe = ratio[afs].idxmax()
    higher, lower = (ratio[afs] > 1).sum(), (ratio[afs] < 1).sum()
    return (
        f"With the analytical first step (AFS) {unit} is {ratio[afs].min():.2f} to "
        f"{ratio[afs].max():.2f} times that on centred data where data are not centred: higher in "
        f"{higher} of {afs.sum()} cells, lower in {lower}; most for {name.split(',')[0]} at {nfe} "
        "evaluations.",
        f"Without AFS it is {ratio[~afs].min():.2f} to {ratio[~afs].max():.2f} times.",
    )


def of_corruptions(found: dict[str, pd.DataFrame]) -> tuple[str, str]:
    """Of how many corruptions a distance grows at every step, in a sentence per distance.

    Args:
        found: data set to its table, of ``corruptions.load_table``.
    """
    judged = pd.concat(corruptions.judged(table).assign(on=name) for name, table in found.items())
    right = judged.assign(right=judged["grows"] & judged["below"])
    right = right.groupby(["metric", "on", "kind"])["right"].all()
    joint, alone = (
        f"{right[metric].sum()} of {len(right[metric])}" for metric in ("fd_joint", "fd")
    )
    return (
        f"Joint FD grows at every step, and stays below that of noise, for {joint} corruptions of "
        "digits and colour images.",
        f"FD of a classifier's features alone does so for {alone}.",
    )


def of_freedoms(worth: pd.DataFrame) -> tuple[str, str]:
    """Which freedom brings the largest gain at every NFE, and how large, in two sentences.

    Args:
        worth: of ``standings.effects``.
    """
    first = worth.loc[worth.groupby("nfe")["value"].idxmin()].set_index("nfe")
    each = [
        f"{standings.WORDS[name]} at {listed([str(nfe) for nfe in nfes])}"
        for name, nfes in first.groupby("factor", sort=False).groups.items()
    ]
    reached = worth["low"] <= worth["nfe"].map(first["high"])
    nfe = nearest(first.index)
    value, low, high = first.loc[nfe, ["value", "low", "high"]]
    return (
        f"In the mean the largest gain comes from {', and from '.join(each)} evaluations; the "
        f"intervals of {reached.sum() - len(first)} of {len(worth) - len(first)} other gains "
        "overlap with theirs.",
        f"At {nfe} {standings.WORDS[first['factor'][nfe]]} multiply FD by {value:.2f} ({low:.2f} "
        f"to {high:.2f}), in the mean over all else that is learned or not.",
    )


def of_last(values: pd.DataFrame) -> str:
    """What each freedom multiplies FD by where the other two are learned already, in a sentence.

    Args:
        values: means over trainings, with columns nfe, afs, value and ``leaderboard.FACTORS``.
    """
    names, told = list(leaderboard.FACTORS), []
    table = values.set_index(["nfe", "afs", *names])["value"]
    of_all = table.xs((True,) * len(names), level=names)
    for name in names:
        ratio = of_all / table.xs(tuple(other != name for other in names), level=names)
        told.append(f"{standings.WORDS[name]} by {ratio.min():.2f} to {ratio.max():.2f}")
    return f"Learned after the other two, {listed(told)}: that is what each multiplies FD by."


def correlated(found: tuple[float, tuple[float, float]]) -> str:
    """A value of ``standings.rank_correlation`` with its interval."""
    value, (low, high) = found
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


def of_optimisers(values: pd.DataFrame, nfe: int) -> list[str]:
    """What each set of numbers reaches by every optimiser, best first, a sentence each.

    Args:
        values: estimates by method, optimiser, nfe.
    """
    said = []
    for method, rows in values[values["nfe"] == nfe].groupby("method", sort=False):
        each = [
            f"{with_interval(row.value, row.half)} by {row.optimiser}"
            for row in rows.sort_values("value").itertuples()
        ]
        said.append(f"*{method}* at {nfe} evaluations reaches {listed(each)}.")
    return said


def of_few(measured: pd.DataFrame) -> dict[str, Estimate]:
    """What fewer trajectories differ by from the most: paired differences, by their names.

    Args:
        measured: columns images, nfe, result.
    """
    found = {}
    for nfe, rows in measured.groupby("nfe"):
        by_count = rows.groupby("images")["result"].agg(list).sort_index()
        most = by_count.index[-1]
        for count in by_count.index[:-1]:
            name = f"At {nfe} evaluations {count} trajectories instead of {most}"
            found[name] = difference(by_count[count], by_count[most])
    return found


def of_transfer(values: pd.DataFrame, nfe: int) -> list[str]:
    """What samplers are worth where they were learned and elsewhere, a sentence per method.

    Args:
        values: estimates by method, learned on (data sets, or "nothing"), nfe.
    """
    said = []
    for method, rows in values[values["nfe"] == nfe].groupby("method", sort=False):
        each = [
            f"{with_interval(row.value, row.half)} learned on {name}"
            for row, name in zip(rows.itertuples(), rows["learned on"], strict=True)
        ]
        said.append(f"*{method}* at {nfe} evaluations: {', '.join(each)}.")
    return said
