"""What verdicts say of one another, in words, and whether methods come in the paper's order."""

import pandas as pd
from scipy import stats

from amedlib.datasets.entries import describe
from amedlib.study import plans
from amedlib.study.claims import COUNTED, FIRST, counted, overall, stored
from amedlib.study.published import DISTANCES, paper_values, published
from amedlib.study.store import RESULTS
from amedlib.study.uncertainty import estimates

DECIDED = ("holds", "does not hold", "mixed")


def measure_name(metric: str) -> str:
    """What a measure is called: one of ``DISTANCES``, or the metric's own name in words."""
    return DISTANCES.get(metric, metric.replace("_", " "))


def by_measure(row: dict) -> dict[str, str]:
    """The verdicts on one claim, by metric, the first of them ``FIRST``.

    Args:
        row: of ``claims.ledger``, as a dict.
    """
    found = {k: v["verdict"] for k, v in row.items() if isinstance(v, dict) and "verdict" in v}
    return {FIRST: found[FIRST]} | found


def changed(words: dict[str, str]) -> dict[str, str]:
    """By which other Frechet distances the verdict is another one, and which; by metric.

    Args:
        words: of ``by_measure``.
    """
    return {
        metric: word
        for metric, word in words.items()
        if metric in DISTANCES and word not in ("not run", words[FIRST])
    }


def contradictory(words: dict[str, str]) -> bool:
    """Whether two measures decide a claim differently: *undecided* contradicts none."""
    return len({word for word in words.values() if word in DECIDED}) > 1


def disagreement(words: dict[str, str]) -> str:
    """What the verdicts on one claim by several measures say of one another; empty if they agree.

    Args:
        words: of ``by_measure``.
    """
    said = []
    if others := changed(words):
        each = ", by ".join(f"{measure_name(metric)} to {word}" for metric, word in others.items())
        said.append(f"The verdict changes by {each}.")
    if contradictory(words):
        told = {}
        for metric, word in words.items():
            if word in DECIDED:
                told.setdefault(word, []).append(measure_name(metric))
        each = "; ".join(f"{word} by {' and '.join(names)}" for word, names in told.items())
        said.append(f"The measures disagree: {each}.")
    return " ".join(said)


def how_often_they_disagree(ledger: pd.DataFrame) -> str:
    """In how many claims another distance changes the verdict, and measures contradict each other.

    Args:
        ledger: of ``claims.ledger``.
    """
    words = [by_measure(row) for row in ledger.to_dict("records")]
    several = [some for some in words if sum(word != "not run" for word in some.values()) > 1]
    if not several:
        return "No claim was tested by more than one measure."
    other, against = sum(map(bool, map(changed, several))), sum(map(contradictory, several))
    return (
        f"Of {len(several)} claims tested by more than one measure, another distance changes the "
        f"verdict on {other}, and on {against} the measures contradict each other."
    )


def _counted(counts: dict, made: int) -> str:
    """Counts of ``claims.counted`` in words, and how many comparisons were not run."""
    words = {"holds": "hold", "fails": "fail", "powerless": "without power"}
    told = {words.get(name, name): counts[name] for name in COUNTED}
    told["not run"] = made - sum(told.values())
    return ", ".join(f"{n} {word}" for word, n in told.items() if n > 0)


def in_words(ledger: pd.DataFrame) -> dict[str, str]:
    """Verdicts with their counts, and where other measures disagree, for the book's prose.

    Args:
        ledger: of ``claims.ledger``.

    Returns:
        Words by claim.
    """
    words = {}
    for row in ledger.to_dict("records"):
        found = row[FIRST]
        run = any(found[name] for name in COUNTED)
        text = found["verdict"] + (f" ({_counted(found, found['made'])})" if run else "")
        said = disagreement(by_measure(row))
        words[row["id"]] = f"{text}. {said}" if said else text
    return words


# The claims of the first page.
FRONT = ("single-step", "plugin", "plugin-beyond-afs", "state-of-the-art", "afs-small")


def front_page(ledgers: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """The table of the first page: what the paper says, and what ledgers say of it.

    Args:
        ledgers: heading of a column to what ``claims.ledger`` returns.

    Returns:
        Columns "the paper says" and the headings, a row per claim of ``FRONT``.
    """
    first = next(iter(ledgers.values())).set_index("id")
    found = {"the paper says": [first.loc[claim, "sentence"] for claim in FRONT]}
    for heading, ledger in ledgers.items():
        words = in_words(ledger)
        found[heading] = [words[claim] for claim in FRONT]
    return pd.DataFrame(found)


def of_a_page(judged: pd.DataFrame) -> list[str]:
    """What the comparisons of one page say of each claim of the paper, a sentence per claim.

    Args:
        judged: of ``claims.judge``.
    """
    said = [f"{sentence}: **{word}** ({counts})." for sentence, word, counts in each_claim(judged)]
    return said or ["No claim of the paper can be tested here."]


def each_claim(judged: pd.DataFrame) -> list[tuple[str, str, str]]:
    """Sentence, verdict and counts of each claim; of ``claims.judge``."""
    found = []
    for _, some in judged.groupby("id", sort=False):
        claim, words = some.iloc[0], list(some["verdict"])
        word = overall(words, claim["made"], claim["universal"] == "yes")
        told = word == "no power" and claim["test"]
        counts = claim["note"] if told else _counted(counted(words), claim["made"])
        found.append((claim["sentence"].rstrip("."), word, counts.rstrip(".")))
    return found


def rank_agreement(dataset: str, metric: str = "fd", results_dir=RESULTS) -> pd.DataFrame:
    """Whether methods come in the same order here and in the paper: Kendall's tau per NFE.

    Returns:
        Columns rows (which of the paper's tables), nfe, methods (their number), tau, p_value (of
        no association; exact).
    """
    theirs = describe(dataset).paper
    table2 = stored(plans.table2(dataset, metric=metric), results_dir)
    frames = {"Table 2": (table2, paper_values("table2", theirs))}
    for number in (9, 10):
        if theirs in set(published(f"table{number}")["dataset"]):
            plain = plans.table(number, dataset, metric=metric)
            plain = stored(plain[~(plain["afs"] | plain["amed"])], results_dir)
            printed_values = plain[["method", "nfe", "paper"]].drop_duplicates()
            frames[f"Table {number}, neither AFS nor AMED"] = plain, printed_values
    rows = []
    for label, (measured, printed_values) in frames.items():
        measured = measured.dropna(subset="result")
        if measured.empty:
            continue
        both = estimates(measured).merge(printed_values, on=["method", "nfe"])
        for nfe, group in both.groupby("nfe"):
            if len(group) > 2:
                tau, p = stats.kendalltau(group["value"], group["paper"])
                rows.append((label, nfe, len(group), tau, p))
    return pd.DataFrame(rows, columns=["rows", "nfe", "methods", "tau", "p_value"])
