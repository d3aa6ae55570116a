"""The part Learn: pieces that a reader moves, in a browser, and what is computed for them."""

import io
import json
import re
from base64 import b64decode
from pathlib import Path

import browser
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from amedlib import load_dataset, make_latents, make_solver, sample
from amedlib.geometry import distance, trajectory_pca
from amedlib.intermediate import TimeWise
from amedlib.study import lesson, one_step, pieces, plans
from amedlib.study.pieces import Control, Frame, View

STATIC = Path(__file__).parents[1] / "book/static"
GRID = (0.1, 0.3, 0.5, 0.7)
needs_browser = pytest.mark.skipif(
    browser.FOUND is None, reason="There is no Chromium on this machine: apt-get install chromium."
)


def toy():
    """A piece with a slider that moves a plot, and a list that changes an image."""
    speeds = ["1", "2", "3"]
    plots = {
        (each,): Frame(
            f"speed <{each}>",
            f"a line of slope {each}",
            lines=[([1, 10], [1, int(each)])] * 2,
            ranges=((0, 1), (0, 4)),
        )
        for each in speeds
    }
    images = {
        (name,): Frame(name, f"a {name} square", pieces.mosaic(torch.full((1, 1, 8, 8), grey), 1))
        for name, grey in (("dark", 0.2), ("light", 0.8))
    }
    looks = [pieces.style("one", "#0072B2"), pieces.style("", "#888888", "dot", marker="star")]
    controls = [
        Control("speed", "Speed", speeds, "2", slides=True, plays=True),
        Control("shade", "Shade", ["dark", "light"], "dark"),
    ]
    layout = pieces.axes("time", "way", log="x")
    return pieces.piece(controls, [View(["speed"], plots, looks, layout), View(["shade"], images)])


def page(folder, body):
    """A page around a piece, with the book's script and styles, and the colours of its theme."""
    theme = "html { --pst-color-text-base: rgb(34, 34, 34); background: white; }"
    theme += (
        "html[data-theme=dark] { --pst-color-text-base: rgb(206, 214, 221); background: #121212; }"
    )
    path = folder / "page.html"
    path.write_text(
        '<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f'<link rel="stylesheet" href="{(STATIC / "lesson.css").as_uri()}"><style>{theme}</style>'
        f'<script defer src="{(STATIC / "lesson.js").as_uri()}"></script><body>{body}</body>'
    )
    return path


@pytest.fixture(scope="module")
def chromium():
    with browser.Browser() as found:
        yield found


LINE = "document.querySelector('.plot .scatterlayer .js-line').getAttribute('d')"
DRAWN = "document.querySelector('.plot .scatterlayer .js-line') !== null"
SAYS = "[...document.querySelectorAll('.says')].map(each => each.textContent)"


@needs_browser
@pytest.mark.parametrize("width", [1280, 400])
def test_a_slider_moves_the_picture_by_keyboard(chromium, tmp_path, width):
    chromium.requests.clear()
    chromium.open(page(tmp_path, toy().data), width)
    chromium.wait(DRAWN)
    before = chromium.run(LINE)
    chromium.press("Tab")
    assert chromium.run("document.activeElement.name") == "speed"
    chromium.press("ArrowRight")
    chromium.wait(f"{LINE} !== {json.dumps(before)}")
    assert chromium.run(SAYS) == ["speed <3>", "dark"]
    assert chromium.run("document.querySelector('output').textContent") == "3"
    assert chromium.run("document.activeElement.getAttribute('aria-valuetext')") == "3"
    assert chromium.run("document.querySelector('.plot').ariaLabel") == "a line of slope 3"
    for key in ("Tab", "Tab"):  # past the button
        chromium.press(key)
    assert chromium.run("document.activeElement.name") == "shade"
    chromium.press("ArrowDown")
    assert chromium.run(SAYS) == ["speed <3>", "light"]
    assert chromium.run("document.querySelector('img.pixels').alt") == "a light square"
    # Nothing leaves the book, nothing is wider than the window, no text is too small to read.
    assert all(url.startswith(("file:", "data:")) for url in chromium.requests)
    assert not chromium.problems
    assert chromium.run("document.documentElement.scrollWidth") <= width
    sizes = "[...document.querySelectorAll('.plot text, .says, label')]"
    sizes += ".map(each => parseFloat(getComputedStyle(each).fontSize))"
    assert min(chromium.run(sizes)) >= 9


@needs_browser
def test_a_button_plays_the_slider_to_its_end(chromium, tmp_path):
    chromium.open(page(tmp_path, toy().data))
    chromium.wait(DRAWN)
    chromium.run("document.querySelector('button').click()")
    chromium.wait("document.querySelector('button').textContent === 'Play'")
    assert chromium.run(SAYS)[0] == "speed <3>"


@needs_browser
def test_plotly_knows_every_property_of_a_plot(chromium, tmp_path):
    chromium.open(page(tmp_path, toy().data))
    chromium.wait(DRAWN)
    chromium.run(
        "var piece = JSON.parse(document.querySelector('.lesson script').textContent);"
        "var {data, layout} = piece.views[0], {x, y} = piece.frames[0]['1'];"
        "data.forEach((line, i) => { line.x = x[i]; line.y = y[i]; });"
        "delete layout.legend;"  # which validate falls over
    )
    assert chromium.run("Plotly.validate(data, layout)") is None
    (wrong,) = chromium.run("data[0].line.colour = 'red'; Plotly.validate(data, layout)")
    assert wrong["path"] == ["line", "colour"]


@needs_browser
@pytest.mark.parametrize("decades", [0.7, 2, 5])
def test_numbers_of_a_logarithmic_axis_have_room(chromium, tmp_path, decades):
    frame = Frame("", "", lines=[([1, 10**decades], [1, 2])], ranges=((0, decades), (0, 4)))
    view = View([], {(): frame}, [pieces.style("", "#0072B2")], pieces.axes("time", "way", log="x"))
    chromium.open(page(tmp_path, pieces.piece([], [view]).data), 400)
    chromium.wait(DRAWN)
    boxes = (
        "[...document.querySelectorAll('.xtick text')].map(each => each.getBoundingClientRect())"
    )
    places = sorted(chromium.run(f"{boxes}.map(box => [box.left, box.right])"))
    assert len(places) >= 2
    assert all(right < left for (_, right), (left, _) in zip(places[:-1], places[1:], strict=True))


@needs_browser
def test_text_can_be_read_in_the_dark(chromium, tmp_path):
    chromium.open(page(tmp_path, toy().data))
    chromium.wait(DRAWN)
    colour = "getComputedStyle(document.querySelector('.plot .xtick text')).fill"
    assert chromium.run(colour) == "rgb(34, 34, 34)"
    chromium.run("document.documentElement.dataset.theme = 'dark'")
    assert chromium.run(colour) == "rgb(206, 214, 221)"
    grounds = "[...document.querySelectorAll('.plot .bg, .plot .main-svg')].map(each => "
    grounds += "[getComputedStyle(each).backgroundColor, getComputedStyle(each).fillOpacity])"
    for background, opacity in chromium.run(grounds):
        assert background == "rgba(0, 0, 0, 0)" and opacity in ("0", "1")


@needs_browser
def test_without_scripts_a_still_picture_is_shown(chromium, tmp_path):
    chromium.open(page(tmp_path, toy().data), scripts=False)
    shown = "[...document.querySelectorAll('img')].map(each => [each.naturalWidth, each.width, "
    shown += "each.height, each.alt])"
    plot, image = chromium.run(shown)
    assert min(plot[:3]) > 100 and plot[3] == "a line of slope 2"
    assert image[0] == 8 and image[1] > 100 and image[3] == "a dark square"
    assert chromium.run("document.querySelector('.controls').offsetHeight") == 0


# --- pieces without a browser -------------------------------------------------------------------


def test_a_piece_is_safe_text():
    frame = Frame("</script><b>", 'a "quoted" <alt>', pieces.mosaic(torch.zeros(1, 1, 8, 8), 1))
    html = pieces.piece(
        [Control("a", "<i>", ["<x>"], "<x>")], [View(["a"], {("<x>",): frame})]
    ).data
    assert html.count("</script>") == 1 and "<b>" not in html and "<i>" not in html
    content = json.loads(re.search(r'json">(.*)</script>', html).group(1))
    assert content["frames"][0]["<x>"]["says"] == frame.says


def test_a_mosaic_has_every_pixel():

    images = torch.rand(3, 3, 32, 32, generator=torch.manual_seed(0))
    found = pieces.mosaic(images, 2)
    pixels = np.array(Image.open(io.BytesIO(b64decode(found.split(",")[1]))))
    assert pixels.shape == (66, 66, 4)
    wanted = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    for i, (top, left) in enumerate(((0, 0), (0, 34), (34, 0))):
        assert (pixels[top : top + 32, left : left + 32, :3] == wanted[i]).all()
        assert (pixels[top : top + 32, left : left + 32, 3] == 255).all()
    assert (pixels[32:34, :, 3] == 0).all() and (pixels[34:, 34:, 3] == 0).all()


def test_a_still_shows_what_the_plot_shows():
    view = View([], {}, [pieces.style("one", "#0072B2")], pieces.axes("time", "way", log="y"))
    frame = Frame("", "", lines=[([1, 2], [10, 100])], ranges=((0, 3), (0, 3)))
    svg = pieces.still(view, frame).decode()
    assert "#0072b2" in svg.lower() and svg.startswith("<?xml")


# --- what is computed ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def solved():
    return lesson.solve("digits", [3], steps=20)


def test_a_trajectory_is_that_of_the_sampler(solved):
    data = load_dataset("digits")
    latents = make_latents([3], data.shape)
    out = sample(data.denoiser, latents, solved.times, make_solver("heun"), trajectory=True)
    torch.testing.assert_close(solved.states, out.trajectory)
    for i in (0, 7, 19):
        with torch.no_grad():
            expected = data.denoiser(solved.states[i], solved.times[i])
        torch.testing.assert_close(solved.denoised[i], expected)


def content_of(html):
    """What the script of a piece reads."""
    return json.loads(re.search(r'json">(.*?)</script>', html.data).group(1))


def test_what_is_still_ahead_falls_from_all_to_nothing(solved):
    found = lesson.still_ahead(solved)
    gap = (solved.denoised[7] - solved.states[-1]).norm() / (
        solved.denoised[0] - solved.states[-1]
    ).norm()
    assert found[0] == 1 and found[7] == pytest.approx(gap.item()) and found[-1] < 0.01


def test_images_of_the_end_are_those_that_are_measured(solved):
    data, x = solved.data, solved.states[-1]
    expected = (data.to_images(x) + 1) / 2
    torch.testing.assert_close(lesson.images_of(data, x), expected)
    # With noise, the same image as of the state scaled by hand.
    x, t = solved.states[0], float(solved.times[0])
    torch.testing.assert_close(lesson.images_of(data, x, t), lesson.images_of(data, x / 80.00625))


def test_the_share_outside_the_plane_is_that_of_the_pca():
    found = lesson.solve("digits", [0, 1], steps=20)
    share = trajectory_pca(found.states).relative_error
    content = content_of(lesson.plane_piece({"digits": found}, shown=20))
    flat, parts = content["frames"]
    for i, t in enumerate(found.times.tolist()):
        for j in range(2):
            says = parts[f"{t:.3g}|digits|{j + 1}"]["says"]
            assert f" {100 * share[i, j]:.2g} % of the state's norm" in says
    # The axes to scale have one range.
    first, second = flat[f"{t:.3g}|digits|1|to scale"]["ranges"]
    assert first == second
    # A path keeps its length in its plane, all but what is outside.
    x, y = (flat[f"{t:.3g}|digits|1|enlarged"][axis][0] for axis in "xy")
    length = np.hypot(x[-1] - x[0], y[-1] - y[0])
    assert length == pytest.approx(distance(*found.states[[0, -1], 0]).item(), rel=1e-3)


def test_the_pieces_of_noise_have_every_time(solved):
    film = lesson.filmstrip({"digits": solved}, 5).data
    assert film.count("<img") == 1
    pictures, curves = content_of(lesson.noise_piece({"digits": solved}))["frames"]
    assert len(pictures) == len(curves) == 20
    assert "100 %" in curves["80|digits"]["says"]


def test_greed_moves_one_r_and_leaves_the_others():
    """Each of its samples is that of the plain loop with a table in which one number is another."""
    run = plans.beyond("greedy", "digits", [7], [0])["run"][0]
    table, grid = [0.5, 0.6, 0.7, 0.3], (0.3, 0.7)
    found = one_step.greed(run, table, range(3), grid, few=2)
    data, times = load_dataset("digits"), run.times()
    latents = make_latents(range(3), data.shape)
    fine = sample(data.denoiser, latents, run.refined(20), make_solver("heun"), trajectory=True)
    truth = fine.trajectory[::20]
    how = run.training.teacher_solver()
    fine = sample(data.denoiser, latents, run.training.teacher_times(), how, trajectory=True)
    teacher = fine.trajectory[::3]
    for k, i in ((0, 1), (2, 0), (3, 1)):
        moved = [grid[i] if j == k else r for j, r in enumerate(table)]
        how = make_solver("ipndm"), True, TimeWise(moved)
        out = sample(data.denoiser, latents, times, *how, trajectory=True)
        each = [(found.taught, teacher, k + 1), (found.after, truth, k + 1), (found.end, truth, -1)]
        for errors, goal, n in each:
            gap = distance(out.trajectory[n], goal[n]).square().mean().sqrt()
            assert errors[k, i] == pytest.approx(gap.item())
        torch.testing.assert_close(found.images[k][i], (data.to_images(out.x[:2]) + 1) / 2)
    # Its own r leaves the table as it is, in every step alike.
    assert found.end[2, 1] == found.end[3, 0]
    learned = {"for the step": table, "for the end": table[::-1]}
    curves, drawn = content_of(one_step.greed_piece(found, (0.5, 0.7), learned))["frames"]
    assert len(curves) == len(drawn) == 8
    gap = distance(teacher[3], truth[3]).square().mean().sqrt()
    assert found.teacher[2] == pytest.approx(gap.item())
    assert f"at the end {found.end[2, 1]:.3g} from" in curves["0.70|3"]["says"]


@pytest.mark.parametrize("name", lesson.SHOWN.values())
def test_samplers_have_names_of_their_own_that_say_what_they_do(name):
    planned = lesson.samplers(name, [3, 5])
    assert not planned.duplicated(["method", "nfe"]).any()
    assert {each.key for each in planned["run"]} >= {
        each.key for each in plans.table2(name, nfes=[3, 5], seeds=[0])["run"]
    }
    for row in planned.itertuples():
        assert row.run.nfe == row.nfe
        assert ("AFS" in row.method) == row.run.afs
        learned = "learned r" in row.method or row.method.startswith("AMED-Solver")
        assert learned == (row.run.predictor is not None)


def test_a_gallery_says_what_is_measured_and_what_is_not():
    images = torch.rand(2, 1, 8, 8, generator=torch.manual_seed(0))
    cells = pd.DataFrame({3: [images, None], 5: [images, images]}, index=["DDIM", "EDM"])
    found = pd.DataFrame({"method": ["DDIM"], "nfe": [3], "value": [2.5], "half": [0.1]})
    content = content_of(lesson.gallery(cells, found, "FD", ("DDIM", "EDM")))
    (frames,) = content["frames"]  # shared by both sides
    assert [view["follows"] for view in content["views"]] == [["nfe", "left"], ["nfe", "right"]]
    assert frames["3|DDIM"]["says"] == "DDIM, 3 evaluations: FD 2.50 ± 0.10."
    assert frames["5|EDM"]["says"] == "EDM, 5 evaluations: FD not measured."
    assert frames["3|EDM"]["says"] == "EDM, 3 evaluations: no predictor is stored."
    assert frames["3|DDIM"]["image"] == pieces.mosaic(images, 2)


def test_looks_are_steps_of_the_solvers(solved):
    """Each from the exact state by the plain loop, which knows nothing of grids of r."""
    found = one_step.looks(solved, 2, 5, GRID)
    times, states = solved.times[[8, 12]], solved.states[[8, 12]]
    latents = states[0] / times[0]

    def errors(solver, intermediate=None):
        data = solved.data
        end = sample(data.denoiser, latents, times, make_solver(solver), False, intermediate).x
        return distance(end, states[1]).item()

    def whole(name):
        return np.hypot(*found.errors[name].T)

    assert whole("DDIM") == pytest.approx([errors("euler")])
    assert whole("EDM") == pytest.approx([errors("heun")])
    assert whole("AMED-Solver") == pytest.approx([errors("amed", TimeWise(r)) for r in GRID])
    assert whole("DPM-Solver-2")[2] == pytest.approx(errors("dpm2"))
    # In the plane, distances are those of the coordinates.
    gaps = np.linalg.norm(found.ends["AMED-Solver"] - found.curve[-1], axis=1)
    across_the_end = 1e-2  # the solution itself is that near to its plane
    np.testing.assert_allclose(gaps, found.errors["AMED-Solver"][:, 0], atol=across_the_end)


def test_the_piece_of_a_step_has_every_choice(solved):
    found = {"digits": [one_step.looks(solved, i, 5, GRID) for i in range(5)]}
    content = content_of(one_step.step_piece(found, GRID, 4))
    for view, frames in zip(content["views"], content["frames"], strict=True):
        assert len(frames) == len(GRID) * 5
        for frame in frames.values():
            assert len(frame["x"]) == len(frame["y"]) == len(view["data"])
    marks = [looks["marker"]["symbol"] for looks in content["views"][0]["data"][1:4]]
    assert marks == ["circle", "cross", "triangle-down"]
    alt = content["frames"][0]["0.30|digits|2"]["alt"]
    assert "a circle, Euler, no second look; a plus, Heun, r = 1; a triangle, DPM" in alt
    frame = content["frames"][1]["0.30|digits|2"]
    parts = found["digits"][1].errors["AMED-Solver"][1]
    assert f"{parts[0]:.3g} in the plane, {parts[1]:.3g} across it" in frame["says"]
