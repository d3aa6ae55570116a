"""The tables of the book."""

import numpy as np
import pandas as pd
from IPython.display import HTML, Markdown

from amedlib.datasets.entries import describe
from amedlib.datasets.files import ASSETS, DATA
from amedlib.study import audit, claims, noise, plans, verdicts
from amedlib.study.execute import measure
from amedlib.study.published import (
    ROWS,
    across_nfe,
    called,
    nfe_name,
    row_names,
    value_in_words,
)
from amedlib.study.uncertainty import Estimate, against_baseline, estimates, with_interval


def comparison_table(ours: pd.DataFrame, paper: pd.DataFrame | None = None, unit="FD"):
    """Methods against NFE: ours with its 95 % interval, the paper's beside it where it has one.

    Args:
        ours: columns method, nfe, value, half.
        paper: columns method, nfe, paper.
        unit: what ours is called, in the heading.
    """
    cells, best = {}, []
    for nfe, rows in ours.groupby("nfe"):
        rows = rows.set_index("method")
        key = (nfe_name(nfe), unit)
        cells[key] = {m: with_interval(r["value"], r["half"]) for m, r in rows.iterrows()}
        best.append((rows["value"].idxmin(), key))
        if paper is not None:
            values = paper[paper["nfe"] == nfe].set_index("method")["paper"]
            theirs = {m: f"{values[m]:.4g}" for m in rows.index if m in values}
            cells[nfe_name(nfe), "paper"] = theirs
    frame = pd.DataFrame(cells).reindex(ours["method"].unique()).fillna("–")
    frame.index.name = None
    bold = pd.DataFrame("", frame.index, frame.columns)
    for method, key in best:
        bold.loc[method, key] = "font-weight: bold"
    return frame.style.apply(lambda _: bold, axis=None)


def cells_table(number: int, measured: pd.DataFrame, unit: str):
    """One of Tables 3 to 13: ours with its 95 % interval, the paper's number beside it.

    At more than four NFE the paper's number stands below ours, in small print.

    Args:
        measured: columns ``plans.KEY``, ``paper`` and ``result``.
        unit: what ours is called, in the heading.
    """
    keys = [*ROWS[number], "nfe", "paper"]
    found = estimates(row_names(measured, number), by=keys).sort_values("nfe", kind="stable")
    for name in ROWS[number]:
        found[name] = [value_in_words(name, value) for value in found[name]]
    best = found.groupby("nfe")["value"].idxmin()
    ours = [with_interval(row.value, row.half) for row in found.itertuples()]
    theirs = found["paper"].map("{:.4g}".format)
    if measured["result"].iloc[0].run.metric == "endpoint_error":
        columns = {unit: ours}  # an FID says nothing of it
    elif found["nfe"].nunique() > 4:
        columns = {
            unit: [
                f"{a}<br><small style='font-weight: normal'>{b}</small>"
                for a, b in zip(ours, theirs, strict=True)
            ]
        }
    else:
        columns = {unit: ours, "paper": theirs}
    found = found.assign(**columns, style=np.where(found.index.isin(best), "font-weight: bold", ""))
    frame, *rest = (across_nfe(found, ROWS[number], name) for name in columns)
    bold = across_nfe(found, ROWS[number], "style").fillna("")
    if rest:
        frame = pd.concat([frame, *rest], axis=1, keys=columns).swaplevel(axis=1)
        frame = frame[[(nfe, whose) for nfe in bold for whose in columns]]
    frame.index.names = [name if name in ("AFS", "AMED") else None for name in ROWS[number]]
    return frame.fillna("–").style.apply(
        lambda ours: bold.set_axis(ours.columns, axis=1),
        axis=None,
        subset=frame.columns[:: len(columns)],
    )


def entries_tables(entries):
    """Declared data sets, a row each: how they are sampled, and how they are trained and judged."""
    rows = {
        entry.name: {
            "title": entry.title,
            "shape": "x".join(map(str, entry.shape)),
            "noise levels": f"{entry.sigma_min:.3g} to {entry.sigma_max:.4g}",
            "schedule": entry.schedule or "–",
            "plugin on": entry.plugin,
            "AFS": "✓" if entry.afs else "✗",
            "guidance": "–" if entry.guidance is None else f"{entry.guidance:g}",
            "loss": entry.training.get("loss", "l2"),
            "batch": entry.training.get("batch", 128),
            "samples": entry.samples,
            "precision": entry.precision,
            "evaluations per call": entry.evaluations_per_call,
        }
        for entry in entries
    }
    frame = pd.DataFrame(rows).T
    return frame.loc[:, :"guidance"].style, frame.loc[:, "loss":].style


def assets_table(entries):
    """The files of data sets: size, licence, where from, and whether a checksum is published."""
    names = dict.fromkeys(name for entry in entries for name in entry.assets)
    rows = {
        name: {
            "size": f"{asset.size / 1e6:,.0f} MB" if asset.size else "–",
            "licence": asset.licence,
            "checksum": (asset.checksum or "–").split(":")[0],
            "from": asset.urls[0].split("/")[2],
        }
        for name, asset in ((name, ASSETS[name]) for name in names)
    }
    return pd.DataFrame(rows, index=["size", "licence", "checksum", "from"]).T.style


MARKS = {
    "holds": "✓ holds",
    "does not hold": "✗ does not hold",
    "mixed": "~ mixed",
    "partly tested": "◐ partly tested",
    "undecided": "? undecided",
    "no power": "∅ no power",
    "not run": "– not run",
}


def verdict_table(judged: pd.DataFrame):
    """Claims with the differences that test them: a claim's word, below it its comparisons by NFE.

    Args:
        judged: of ``claims.judge``.
    """
    if judged.empty:
        return Markdown("*No claim of the paper about this table can be tested on this data set.*")
    nfes = sorted(judged["nfe"].dropna().unique())
    columns = [nfe_name(nfe) for nfe in nfes] or ["all"]
    head = "".join(f"<th>{name}</th>" for name in ["", *columns])
    rows = []
    for _, some in judged.groupby("id", sort=False):
        claim = some.iloc[0]
        word = claims.overall(some["verdict"], claim["made"], claim["universal"] == "yes")
        heading = f"{claim['sentence']} <strong>{MARKS[word]}</strong>"
        rows.append(f'<th colspan="{1 + len(columns)}" class="claim">{heading}</th>')
        for (better, worse), each in some.groupby(["better", "worse"], sort=False):
            found = {row.nfe: _compared(row) for row in each.itertuples()}
            cells = "".join(f"<td>{found.get(nfe, '–')}</td>" for nfe in nfes)
            if each["nfe"].isna().all():  # of all NFE at once
                cells = f'<td colspan="{len(columns)}">{_compared(next(each.itertuples()))}</td>'
            rows.append(f'<th class="row_heading">{better} − {worse}</th>{cells}')
    exact = judged["low"].eq(judged["high"]).all()
    text = "Differences" if exact else "Paired differences with half widths of 95 % intervals"
    text += (
        "; negative is what is claimed. Verdicts are corrected for the number of different "
        "comparisons by Holm's method"
    )
    if (judged["verdict"] == "no power").any():
        text += "; ∅: the comparison could not have decided anything"
    if (judged["uncorrected"] != judged["verdict"]).any():
        text += '; "alone": by the interval shown'
    if judged["pooled"].any():
        text += ". † Trained once: the noise of training is that of other predictors"
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    below = "caption-side: bottom; text-align: left; font-style: italic"
    table = (
        f'<table class="verdicts"><caption style="{below}">{text}.</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )
    many = len(judged) > MANY
    return folded(f"All {len(judged)} comparisons", table) if many else HTML(table)


MANY = 30  # comparisons, of which a page shows the count first


def folded(summary: str, html: str) -> HTML:
    """What a page shows on a click, below a line that says what it is."""
    return HTML(f"<details><summary>{summary}</summary>{html}</details>")


def _compared(row) -> str:
    """One comparison: its mark, and the difference with its interval."""
    if np.isnan(row.difference):
        return MARKS[row.verdict]
    alone = "" if row.uncorrected == row.verdict else f" (alone {MARKS[row.uncorrected][0]})"
    value = with_interval(row.difference, (row.high - row.low) / 2)
    return f"{MARKS[row.verdict][0]}{alone}<br>{value}{noise.doubt(row)}"


KINDS = {
    "quality": "Quality of samples",
    "value": "Values that the paper names",
    "geometry": "Geometry of trajectories",
    "theory": "Theory",
    "cost": "Costs",
    "setting": "What the paper says of its own runs",
}


def ledger_grid(ledgers: dict[str, pd.DataFrame]) -> HTML:
    """The ledger: claims against data, each with its verdict; the evidence unfolds.

    What is shown is chosen with buttons that need no script.

    Args:
        ledgers: what to call a data set, to rows of ``claims.ledger``; the first has all claims.
    """
    found = {data: rows.set_index("id").to_dict("index") for data, rows in ledgers.items()}
    claimed = next(iter(ledgers.values())).to_dict("records")
    heads = "".join(f"<span>{data}</span>" for data in ledgers)
    body = [f'<div class="head"><span>claim</span>{heads}</div>']
    for kind, title in KINDS.items():
        some = [claim for claim in claimed if claim["kind"] == kind]
        if some:
            body.append(f'<div class="kind" data-kind="{kind}">{title}</div>')
            body += [_claim(claim, found) for claim in some]
    words = {word.replace(" ", "-"): mark for word, mark in MARKS.items()}
    rules = [_hides("data-kind", "=", kind) for kind in KINDS]
    rules += [_hides("data-verdicts", "~=", word, "details") for word in words]
    choices = _choices("verdict", words) + _choices("kind", KINDS)
    style = f"<style>.ledger {{ --data: {len(ledgers)}; }} {' '.join(rules)}</style>"
    return HTML(f'<div class="ledger">{style}{choices}{"".join(body)}</div>')


def _hides(attribute: str, relation: str, value: str, what: str = "") -> str:
    """The rule that hides all rows but those of a choice."""
    return (
        f'.ledger:has(input[value="{value}"]:checked) {what}[{attribute}]'
        f':not([{attribute}{relation}"{value}"]) {{ display: none; }}'
    )


def _choices(name: str, words: dict[str, str]) -> str:
    """Buttons of which one is pressed."""
    button = '<label><input type="radio" name="{}" value="{}"{}> {}</label>'
    every = button.format(name, f"every-{name}", " checked", f"every {name}")
    rest = (button.format(name, value, "", word) for value, word in words.items())
    return f"<fieldset><legend>{name}</legend>{every}{''.join(rest)}</fieldset>"


def _claim(claim: dict, found: dict[str, dict]) -> str:
    """One claim of the ledger with its verdicts, and the evidence for them."""
    rows = {data: each.get(claim["id"]) for data, each in found.items()}
    words = {data: row and row[claims.FIRST]["verdict"] for data, row in rows.items()}
    marks = "".join(
        f'<span data-label="{data}" class="{(word or "").replace(" ", "-")}">'
        f"{MARKS[word] if word else ''}</span>"
        for data, word in words.items()
    )
    verdicts_ = " ".join({word.replace(" ", "-") for word in words.values() if word})
    page = claims.page_of(claim["source"])
    there = (DATA.parent / "notebooks" / f"{page}.ipynb").is_file()
    source = f'<a href="{page}.html">{claim["source"]}</a>' if there else claim["source"]
    told = [f"{claim['place']}. {claim['note']}", f"In the paper's tables: {claim['in_print']}."]
    told[1] += f" Evidence: {source}. Known as <code>{claim['id']}</code>."
    told += [
        f"<strong>{data}</strong>: {text}"
        for data, row in rows.items()
        if row
        for text in [_outcome_in_words(row)]
        if text
    ]
    evidence = "".join(f"<p>{text}</p>" for text in told)
    return (
        f'<details data-kind="{claim["kind"]}" data-verdicts="{verdicts_}">'
        f"<summary><span>{claim['sentence']}</span>{marks}</summary>{evidence}</details>"
    )


def _outcome_in_words(row: dict) -> str:
    """What the results of one data set say of a claim, but for the verdict itself."""
    found = row[claims.FIRST]
    marks = {name: MARKS[word][0] for name, word in claims.COUNTED.items()}
    marks = {n: mark for n, mark in marks.items() if found[n] or n != "powerless"}
    run = sum(found[name] for name in marks)
    counts = ", ".join(f"{mark} {found[name]}" for name, mark in marks.items())
    rest = f" of {found['made']}" if run < found["made"] else ""
    words = verdicts.by_measure(row)
    others = ", ".join(
        f"{MARKS[word][0]} {verdicts.measure_name(metric)}"
        for metric, word in words.items()
        if metric != claims.FIRST and word != "not run"
    )
    told = [counts + rest if run else "", found["example"], others, verdicts.disagreement(words)]
    return ". ".join(filter(None, (text.rstrip(".") for text in told)))


def crossed_table(found: pd.DataFrame, rows: list[str], columns: list[str]):
    """Estimates with their 95 % intervals, crossed by columns of the frame; in words."""
    cells = [with_interval(*each) for each in found[["value", "half"]].to_numpy()]
    named = {key: found[key].map(called) for key in rows + columns}
    named |= {key: found[key].map(nfe_name) for key in columns if key == "nfe"}
    frame = found.assign(cell=cells, **named).pivot_table(
        index=rows, columns=columns, values="cell", aggfunc="first", sort=False
    )
    frame.index.names, frame.columns.names = [None] * len(rows), [None] * len(columns)
    return frame.fillna("–").style


def recommended_table(found: pd.DataFrame, joint: pd.DataFrame):
    """Which sampler for which need: rows NFE, columns needs; FD, and joint FD in small print.

    Args:
        found: estimates of ``standings.candidates``.
        joint: the same samplers' by joint FD.
    """
    both = found.merge(joint[["need", "nfe", "value"]], on=["need", "nfe"], suffixes=("", "_joint"))
    cells = [
        f"{r.who}<br>{with_interval(r.value, r.half)}<br><small>joint {r.value_joint:.2f}</small>"
        for r in both.itertuples()
    ]
    frame = both.assign(cell=cells).pivot(index="nfe", columns="need", values="cell")
    frame = frame[list(both["need"].unique())].rename(index=nfe_name)
    frame.index.name = frame.columns.name = None
    return frame.fillna("not run").style


def marked(found: list[Estimate]) -> list[str]:
    """Differences with their 95 % half widths, and a mark each: ✓ better, ✗ worse, ? undecided.

    The marks are corrected for the number of differences by Holm's method, the intervals are not.
    """
    corrected = claims.holm([each.p_value for each in found])
    said = []
    for each, p_value in zip(found, corrected, strict=True):
        mark = MARKS[claims.verdict(each.value, p_value)][0]
        said.append(f"{mark} {_with_half(each)}")
    return said


MARKED = (
    "✓ better, ✗ worse, ? undecided: corrected for the number of differences in the table by "
    "Holm's method; the intervals are not"
)


def gain_table(found: pd.DataFrame) -> pd.DataFrame:
    """``audit.gains`` or ``our_gains``, ours with intervals: rows solver and part, columns NFE."""
    parts = {"by_afs": "AFS", "by_step": "learned step"}
    words = {part: found[part].map(audit.as_printed) for part in parts}
    if "by_afs_found" in found:
        words = {part: found[f"{part}_found"].map(_with_half) for part in parts}
    titles = found["dataset"].map(lambda name: describe(name).title)
    rows = found.assign(dataset=titles, **words)
    long = rows.melt(["dataset", "solver", "nfe"], list(parts), "part", "cell")
    long["part"] = long["part"].map(parts)
    frame = across_nfe(long, ["dataset", "solver", "part"], "cell").fillna("–")
    order = rows[["dataset", "solver"]].drop_duplicates().itertuples(index=False)
    frame = frame.loc[[(*row, part) for row in order for part in parts.values()]]
    return frame if frame.index.unique(0).size > 1 else frame.droplevel(0)


def gains_in_words(found: pd.DataFrame) -> list[str]:
    """What each part of ``audit.our_gains`` brings, a sentence per solver and NFE."""
    said = []
    for row in found.itertuples():
        once = " (one training)" if np.isnan(row.by_step_found.training_error) else ""
        said.append(
            f"{row.solver} at {row.nfe} evaluations: AFS changes the distance by "
            f"{_with_half(row.by_afs_found, -1)}, and a learned step changes what AFS leaves by "
            f"{_with_half(row.by_step_found, -1)}{once}."
        )
    return said


def _with_half(found: Estimate, sign: int = 1) -> str:
    """A difference with the half width of its 95 % interval; or its negative."""
    low, high = found.interval
    return with_interval(sign * found.value, (high - low) / 2)


# What variants of ``plans.QUESTIONS`` are called on a page.
VARIANTS = {
    "for the step": "trained for the step",
    "for the endpoint": "trained for the end",
    "table, for the step": "free numbers, trained for the step",
    "table, for the endpoint": "free numbers, trained for the end",
    "network": "the network",
    "table": "one free number per step",
    "as the text": "recipe of the text",
    "network of the release": "the text's, with the release's network",
    "start of the release": "the text's, with the release's starts",
    "both": "the text's, with both",
}


def variants_table(frames: dict[str, pd.DataFrame], baselines: list[str]):
    """Variants against baselines: for every frame the value and the paired differences, ``marked``.

    Args:
        frames: heading to frame with columns variant, result; from ``paper.measure``.
        baselines: variants to take differences to.
    """
    cells = {}
    for heading, frame in frames.items():
        values = estimates(frame, by=("variant",)).set_index("variant")
        cells[heading, "value"] = {
            variant: with_interval(row.value, row.half) for variant, row in values.iterrows()
        }
        cells |= {(heading, f"minus {baseline}"): {} for baseline in baselines}
    for (heading, baseline, variant), text in variants_marked(frames, baselines).items():
        cells[heading, f"minus {baseline}"][variant] = text
    order = next(iter(frames.values()))["variant"].unique()
    return pd.DataFrame(cells).reindex(order).fillna("–").style


def variants_marked(frames: dict[str, pd.DataFrame], baselines: list[str]) -> dict[tuple, str]:
    """Differences ``marked``, all of them together; by heading, baseline and variant."""
    found = {
        (heading, baseline, variant): each
        for heading, frame in frames.items()
        for baseline in baselines
        for variant, each in against_baseline(frame, baseline).items()
    }
    return dict(zip(found, marked(list(found.values())), strict=True))


def by_cell(found: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Measures' frames of several methods and NFE, apart: ``variants_marked`` compares within."""
    return {
        f"{method} at {nfe} evaluations, {measure}": rows
        for measure, frame in found.items()
        for (method, nfe), rows in frame.groupby(["method", "nfe"], sort=False)
    }


def variants_in_words(frames: dict[str, pd.DataFrame], baselines: list[str]) -> list[str]:
    """What ``variants_table`` says, a sentence per heading and baseline, with the differences."""
    words = {"✓": "**better**", "✗": "**worse**", "?": "**cannot be told apart**"}
    groups: dict[tuple, dict[str, list[str]]] = {}
    for (heading, baseline, variant), text in variants_marked(frames, baselines).items():
        told = groups.setdefault((heading, baseline), {})
        told.setdefault(words[text[0]], []).append(f"“{variant}” ({text[2:]})")
    said = []
    for (heading, baseline), told in groups.items():
        each = [f"{word}: {', '.join(names)}" for word, names in told.items()]
        said.append(f"{heading}, against “{baseline}”: {'; '.join(each)}.")
    return said


def learned_r_table(measured: pd.DataFrame) -> pd.DataFrame:
    """Learned r: rows method and NFE, columns steps; mean over seeds (largest sd over samples)."""
    rows = {}
    for (method, nfe), group in measured.groupby(["method", "nfe"], sort=False):
        curves = [result.curves for result in group["result"]]
        means = np.mean([c["r"] for c in curves], axis=0)
        spreads = np.max([c["r_sd"] for c in curves], axis=0)
        rows[method, nfe_name(nfe)] = {
            f"step {i}": f"{mean:.3f} ({spread:.3f})"
            for i, (mean, spread) in enumerate(zip(means, spreads, strict=True), 1)
        }
    return pd.DataFrame(rows).T.fillna("–")


def by_training_seed(
    dataset: str, method: str, nfe: int, seeds=plans.SEEDS, n_samples: int = 5000, **how
) -> pd.DataFrame:
    """One method at one NFE, a row per training seed: quality, r and final loss of every step."""
    columns = {}
    for metric, n in (("fd", n_samples), ("endpoint_error", n_samples), ("learned_r", 1000)):
        planned = plans.table2(dataset, [method], [nfe], seeds, n, metric=metric)
        columns[metric] = measure(planned, **how)["result"]
    rows = {}
    for i, seed in enumerate(seeds):
        curves = columns["learned_r"][i].curves
        rows[f"seed {seed}"] = {
            ("final", "FD"): columns["fd"][i].value,
            ("final", "endpoint error"): columns["endpoint_error"][i].value,
            **{("learned r", f"step {n}"): r for n, r in enumerate(curves["r"], 1)},
            **{("loss", f"step {n}"): loss for n, loss in enumerate(curves["loss"], 1)},
        }
    return pd.DataFrame(rows).T
