"""Plots that a reader operates: with Bokeh, offline, by keyboard; a picture without scripts.

The book serves Bokeh's scripts itself (``book/build.py`` copies them), once for all pages.
"""

import pandas as pd
from bokeh.embed import components
from bokeh.layouts import column, row
from bokeh.models import (
    CheckboxGroup,
    ColumnDataSource,
    CustomJS,
    LayoutDOM,
    Legend,
    LegendItem,
    Select,
)
from bokeh.plotting import figure
from IPython.display import HTML

from amedlib.study.figures import LOOKS

SCRIPTS = ("bokeh.min.js", "bokeh-widgets.min.js")
# Readable on a light page and on a dark one.
GREY = "#808080"
COLOURED = (
    "axis_label_text_color",
    "major_label_text_color",
    "axis_line_color",
    "major_tick_line_color",
    "minor_tick_line_color",
)
READABLE = [f":host {{ color: {GREY}; }}"]  # the words of a widget
MARKERS = {
    **{"o": "circle", "s": "square", "D": "diamond", "^": "triangle", "v": "inverted_triangle"},
    **{"P": "plus", "X": "x", "*": "star", "p": "hex", "h": "hex"},
}


def embedded_plot(layout: LayoutDOM, instead: HTML) -> HTML:
    """A plot in a page of the book; ``instead`` is shown where scripts are off."""
    script, place = components(layout)
    served = "".join(f'<script src="../_static/bokeh/{name}"></script>' for name in SCRIPTS)
    return HTML(f"{served}{place}{script}<noscript>{instead.data}</noscript>")


def _plain_figure(x_label: str, **options):
    """A figure without a background, whose text can be read on any."""
    plot = figure(
        sizing_mode="stretch_width",
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        toolbar_location=None,
        tools="",
        x_axis_label=x_label,
        **options,
    )
    for part in (*plot.axis, *plot.grid):
        for name in COLOURED:
            if hasattr(part, name):
                setattr(part, name, GREY)
    plot.grid.grid_line_color, plot.grid.grid_line_alpha = GREY, 0.2
    return plot


SHOWN = ("iPNDM", "DPM-Solver++(3M)", "AMED-Solver", "AMED-Plugin", "LD3", "all numbers")

CHANGED = """
const names = new Set([...untrained.active.map(i => untrained.labels[i]),
                       ...learned.active.map(i => learned.labels[i])]);
const there = new Set();
for (const line of lines) {
  const [name, of_schedule, of_afs] = line.tags;
  const fits = of_schedule === "" || (of_schedule === schedule.value && of_afs === afs.value);
  line.visible = fits && names.has(name);
  line.glyph.y = {field: measure.value};
  if (line.visible) there.add(name);
}
for (const item of items) item.visible = there.has(item.label.value);
y_axis.axis_label = measure.value;
"""


def leaderboard_plot(found: pd.DataFrame, measures: list[str]) -> LayoutDOM:
    """Every sampler against NFE; one chooses the measure, the methods, schedule and AFS.

    Args:
        found: columns method, schedule and afs ("" for a learned sampler), nfe, and the measures.
        measures: columns, the first of which is shown at first.
    """
    plot = _plain_figure("network evaluations per sample (NFE)", y_axis_type="log", height=420)
    plot.yaxis.axis_label = measures[0]
    plot.xaxis.ticker = sorted(found["nfe"].unique().tolist())
    schedule, afs = (found.loc[found[name] != "", name].iloc[0] for name in ("schedule", "afs"))
    lines, items, kinds = [], {}, {"untrained": {}, "learned": {}}
    for key, rows in found.groupby(["method", "schedule", "afs"], sort=False):
        name, *where = key
        kinds["untrained" if where[0] else "learned"][name] = name in SHOWN
        colour, marker = LOOKS.get(name, (GREY, "o"))
        source = ColumnDataSource(rows.sort_values("nfe")[["nfe", *measures]].to_dict("list"))
        shown = name in SHOWN and where in ([schedule, afs], ["", ""])
        look = {"color": colour, "source": source, "visible": shown}
        new = [
            plot.line("nfe", measures[0], line_width=2, **look),
            plot.scatter("nfe", measures[0], marker=MARKERS[marker], size=9, **look),
        ]
        for line in new:
            line.tags = list(key)
        lines += new
        item = items.setdefault(name, LegendItem(label=name, renderers=[], visible=False))
        item.renderers += new
        item.visible |= shown
    legend = Legend(items=list(items.values()), label_text_color=GREY, ncols=2, location="top_left")
    legend.background_fill_color = legend.border_line_color = None
    plot.add_layout(legend, "below")
    choose = {
        "measure": Select(
            title="Measure",
            value=measures[0],
            options=measures,
            name="measure",
            stylesheets=READABLE,
        ),
        "schedule": _choice("schedule", "Schedule of the untrained", found["schedule"]),
        "afs": _choice("afs", "First step of the untrained", found["afs"]),
    }
    for kind, names in kinds.items():
        active = [i for i, on in enumerate(names.values()) if on]
        choose[kind] = CheckboxGroup(
            labels=list(names), active=active, name=kind, stylesheets=READABLE
        )
    arguments = choose | {"lines": lines, "items": legend.items, "y_axis": plot.yaxis[0]}
    changed = CustomJS(args=arguments, code=CHANGED)
    for widget in choose.values():
        widget.js_on_change("active" if isinstance(widget, CheckboxGroup) else "value", changed)
    style = {"flex-wrap": "wrap"}
    selects = row(*[choose[name] for name in ("measure", "schedule", "afs")], styles=style)
    boxes = row(choose["untrained"], choose["learned"], styles=style)
    return column(selects, plot, boxes, sizing_mode="stretch_width")


def _choice(name: str, title: str, values: pd.Series) -> Select:
    options = [value for value in values.unique() if value]
    return Select(name=name, title=title, value=options[0], options=options, stylesheets=READABLE)
