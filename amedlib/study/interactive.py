"""The leaderboard as a piece that a reader operates."""

from itertools import product

import pandas as pd
from IPython.display import HTML

from amedlib.study.leaderboard import LEARNED, UNTRAINED
from amedlib.study.pieces import Control, Frame, View, around, axes, piece, style_of

SHOWN = ("iPNDM", "DPM-Solver++(3M)", "AMED-Solver", "AMED-Plugin", "LD3", "all numbers")
GROUPS = {"a few": SHOWN, "all learned": tuple(LEARNED), "all untrained": tuple(UNTRAINED)}


def leaderboard_piece(found: pd.DataFrame, measures: list[str]) -> HTML:
    """Every sampler against NFE; one chooses the measure, the samplers, the schedule and AFS.

    Args:
        found: columns method, schedule and afs ("" for a learned sampler), nfe, and the measures;
            of ``standings.wide``.
        measures: columns, the first of which is shown at first.
    """
    names = found["method"].unique().tolist()
    schedules, steps = (
        [value for value in found[name].unique() if value] for name in ("schedule", "afs")
    )
    rows = found.sort_values("nfe").groupby(["method", "schedule", "afs"])
    lines = {key: (each["nfe"].tolist(), each) for key, each in rows}
    frames = {}
    for measure, group, schedule, afs in product(measures, GROUPS, schedules, steps):
        drawn = []
        for name in names:
            shown = name in GROUPS[group]
            nfes, each = lines.get((name, "", "")) or lines.get((name, schedule, afs)) or ([], None)
            drawn.append((nfes, each[measure].tolist()) if shown and nfes else ([], []))
        values = [y for _, y in drawn if y]
        frames[measure, group, schedule, afs] = Frame(
            f"Untrained samplers on the schedule {schedule}, {afs}. Lower is better.",
            f"{measure} of {sum(map(bool, values))} samplers against the number of evaluations",
            lines=drawn,
            ranges=(around(found["nfe"]), around(*values, log=True)),
        )
    controls = [
        Control("measure", "Measure", measures, measures[0]),
        Control("group", "Samplers", list(GROUPS), "a few"),
        Control("schedule", "Schedule of the untrained", schedules, schedules[0]),
        Control("afs", "First step of the untrained", steps, steps[-1]),
    ]
    layout = axes("network evaluations per sample (NFE)", "distance, lower is better", log="y")
    layout["xaxis"] |= {"tickvals": sorted(found["nfe"].unique().tolist())}
    view = View(
        [c.name for c in controls], frames, [style_of(name, name) for name in names], layout
    )
    return piece(controls, [view])
