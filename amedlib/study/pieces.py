"""Pieces of a page that a reader moves: sliders and lists, and pictures that follow them.

A piece is HTML that ``book/static/lesson.js`` brings to life, with Plotly where it draws. Where no
script runs, it shows its first frame as a still picture.
"""

import base64
import io
import json
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np
import torch
from IPython.display import HTML
from matplotlib.figure import Figure
from PIL import Image

from amedlib.study.figures import look


class Control(NamedTuple):
    """What a reader chooses: with a slider, or from a list.

    Attributes:
        name: what views call it.
        label: beside it.
        values: in words, in their order.
        start: the one that is chosen at first.
        slides: whether it is a slider.
        plays: whether a button moves the slider by itself.
    """

    name: str
    label: str
    values: Sequence[str]
    start: str
    slides: bool = False
    plays: bool = False


class Frame(NamedTuple):
    """What a view shows for one choice.

    Attributes:
        says: a sentence below it, with its numbers.
        alt: what is seen, for who does not see it.
        image: an image as a data URI; or, of a plot:
        lines: x and y of each of its lines.
        ranges: of its two axes; of a logarithmic one the exponents.
    """

    says: str
    alt: str
    image: str | None = None
    lines: Sequence[tuple[Sequence[float], Sequence[float]]] = ()
    ranges: tuple[tuple[float, float], tuple[float, float]] | None = None


class View(NamedTuple):
    """A picture that follows some of the controls.

    Attributes:
        follows: the names of these.
        frames: for every choice, the values in the order of ``follows``.
        data, layout: of a plot, as Plotly takes them: the looks of its lines, and of its axes.
    """

    follows: Sequence[str]
    frames: dict[tuple[str, ...], Frame]
    data: Sequence[dict] = ()
    layout: dict | None = None


def style(name: str, colour: str, dash="solid", width=2.0, marker=None, last=False) -> dict:
    """The looks of a line of a plot.

    Args:
        name: in the legend; an empty one is not in it.
        dash: one of ``DASHES``.
        width: in pixels; zero leaves the points alone.
        marker: of its points, one of ``MARKERS``.
        last: whether its last point alone is marked, of two.
    """
    found = {"type": "scatter", "mode": "lines", "name": name, "showlegend": bool(name)}
    found["line"] = {"color": colour, "dash": dash, "width": width}
    if marker:
        found["mode"] = "lines+markers" if width else "markers"
        found["marker"] = {"color": colour, "symbol": marker, "size": [0, 10] if last else 10}
        found["marker"]["line"] = {"width": 0}
    return found


def style_of(method: str, name: str, width=2.0, dash="solid", marked=True) -> dict:
    """The looks of a method's line, which are those of ``figures.look``; arguments of ``style``."""
    found = look(method)
    words = {mark: word for word, mark in MARKERS.items()}
    marker = words[found["marker"]] if marked else None
    return style(name, found["color"], dash, width, marker)


def axes(x: str, y: str, log: str = "", **more) -> dict:
    """The layout of a plot: titles of its axes, and which of them, ``"xy"``, are logarithmic."""
    clear = "rgba(0,0,0,0)"
    each = {"gridcolor": "rgba(128,128,128,0.25)", "zeroline": False, "fixedrange": True}
    each |= {"tickformat": "~g", "automargin": True}
    kinds = {name: {"type": "log" if name in log else "linear"} for name in "xy"}
    return {
        "paper_bgcolor": clear,
        "plot_bgcolor": clear,
        "font": {"size": 12},
        "margin": {"l": 10, "r": 10, "t": 10, "b": 10},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "height": 380,
        "dragmode": False,
        "xaxis": each | {"title": {"text": x}} | kinds["x"],
        "yaxis": each | {"title": {"text": y}} | kinds["y"],
    } | more


def piece(controls: Sequence[Control], views: Sequence[View]) -> HTML:
    """Views side by side, or below one another where there is no room, and their controls above."""
    start = {control.name: control.start for control in controls}
    boxes, content, sets = [], [], {}
    for view in views:
        boxes.append(_box(view, view.frames[tuple(start[name] for name in view.follows)]))
        # Views that show the same frames, each for its own controls, share them.
        sets[id(view.frames)] = {"|".join(k): _slim(frame) for k, frame in view.frames.items()}
        about = {"follows": view.follows, "frames": list(sets).index(id(view.frames))}
        content.append(about | {"data": view.data, "layout": view.layout} if view.layout else about)
    content = {"views": content, "frames": list(sets.values())}
    # A script would end, or change its meaning, with some that begin with this sign.
    text = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
    return HTML(
        '<div class="lesson"><div class="controls" hidden>'
        + "".join(map(_control, controls))
        + f'</div><div class="views">{"".join(boxes)}</div>'
        + f'<script type="application/json">{text}</script></div>'
    )


def _slim(frame: Frame) -> dict:
    """A frame as the script reads it; four digits of a number are more than a screen shows."""
    found = {"says": frame.says, "alt": frame.alt}
    if frame.image:
        return found | {"image": frame.image}

    def short(values):
        return [float(f"{value:.4g}") for value in values]

    x, y = zip(*frame.lines, strict=True)
    found |= {"x": [short(each) for each in x], "y": [short(each) for each in y]}
    return found | {"ranges": [short(each) for each in frame.ranges]}


def _control(control: Control) -> str:
    name, start = escape(control.name), control.values.index(control.start)
    if not control.slides:
        options = "".join(
            f"<option{' selected' if i == start else ''}>{escape(value)}</option>"
            for i, value in enumerate(control.values)
        )
        found = f'<select name="{name}">{options}</select>'
        return f"<label>{escape(control.label)} {found}</label>"
    first, last = escape(control.start), len(control.values) - 1
    found = f'<input type="range" name="{name}" min="0" max="{last}" value="{start}" '
    found += f'aria-valuetext="{first}" data-values="{escape(json.dumps(list(control.values)))}">'
    found = f"<label>{escape(control.label)} {found}<output>{first}</output></label>"
    return found + f'<button type="button" value="{name}">Play</button>' * control.plays


def _box(view: View, first: Frame) -> str:
    source = first.image or _uri("image/svg+xml", still(view, first))
    looks = ' class="pixels"' if first.image else ""
    plot = "" if first.image else '<div class="plot" role="img"></div>'
    return (
        f'<div class="view">{plot}<img{looks} alt="{escape(first.alt)}" src="{source}">'
        f'<p class="says" aria-live="polite">{escape(first.says)}</p></div>'
    )


# Markers and dashes of plots, in the words of Plotly and of matplotlib.
MARKERS = {
    **{"circle": "o", "x": "X", "star": "*", "diamond": "D", "square": "s", "triangle-up": "^"},
    **{"triangle-down": "v", "triangle-left": "<", "cross": "P", "pentagon": "p", "hexagon": "h"},
}
DASHES = {"solid": "-", "dash": "--", "dot": ":"}


def still(view: View, frame: Frame) -> bytes:
    """One frame of a plot, drawn by matplotlib as SVG."""
    figure = Figure(figsize=(4.6, 4.2), layout="constrained")
    ax = figure.subplots()
    for looks, (x, y) in zip(view.data, frame.lines, strict=True):
        if not len(x):
            continue
        line, marker = looks["line"], looks.get("marker", {}).get("symbol")
        how = {"color": line["color"], "linewidth": line["width"], "label": looks["name"] or None}
        if isinstance(looks.get("marker", {}).get("size"), list):
            how["markevery"] = [len(x) - 1]
        ax.plot(x, y, DASHES[line["dash"]], marker=MARKERS.get(marker), **how)
    for axis, limits in zip("xy", frame.ranges, strict=True):
        about = view.layout[f"{axis}axis"]
        log = about["type"] == "log"
        ends = [10**end for end in limits] if log else limits
        ax.set(**{f"{axis}label": about["title"]["text"], f"{axis}scale": about["type"]})
        ax.set(**{f"{axis}lim": ends})
    if longest := max((len(looks["name"]) for looks in view.data), default=0):
        figure.legend(loc="outside upper left", ncols=2 if longest < 25 else 1)
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def around(*values, room: float = 0.08, log: bool = False) -> tuple[float, float]:
    """The range of an axis with room for all of these values; of a logarithmic one, exponents."""
    every = np.concatenate([np.ravel(value) for value in values])
    every = np.log10(every) if log else every
    spare = room * float(np.ptp(every))
    return float(every.min()) - spare, float(every.max()) + spare


def mosaic(images: torch.Tensor, columns: int) -> str:
    """Images [B, C, H, W] in [0, 1] as one PNG in a data URI, a pixel for a pixel.

    Between them, and where there is none, it is transparent.
    """
    pixels = (images.clamp(0, 1) * 255).round().byte().expand(-1, 3, -1, -1)
    pixels = torch.cat([pixels, torch.full_like(pixels[:, :1], 255)], dim=1)
    high, wide = pixels.shape[2:]
    gap = max(1, wide // 16)
    rows = max(1, -(-len(pixels) // columns))
    canvas = torch.zeros(4, rows * (high + gap) - gap, columns * (wide + gap) - gap).byte()
    for i, image in enumerate(pixels):
        top, left = i // columns * (high + gap), i % columns * (wide + gap)
        canvas[:, top : top + high, left : left + wide] = image
    file = io.BytesIO()
    Image.fromarray(canvas.permute(1, 2, 0).numpy()).save(file, format="PNG", optimize=True)
    return _uri("image/png", file.getvalue())
