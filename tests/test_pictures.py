"""Pictures show what they are given: every pixel, every layer, every step."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import amedlib
from amedlib.geometry import accurate_solution
from amedlib.study import figures, pictures, pieces, plans, theory
from amedlib.study.leaderboard import LEARNED, UNTRAINED
from amedlib.study.store import predictor_path

# --- images -------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_a_strip_shows_every_pixel_sharp(channels):
    images = torch.rand(3, channels, 8, 8, generator=torch.manual_seed(0))
    found = pictures.strip(images, size=64)
    gap = 64 // 16
    assert found.shape == (64, 3 * 64 + 2 * gap, 4)
    for i, image in enumerate(images.expand(-1, 3, -1, -1)):
        part = found[:, i * (64 + gap) :][:, :64, :3]
        assert (part[4::8, 4::8] == image.permute(1, 2, 0).numpy()).all()
        assert (part == np.kron(part[::8, ::8], np.ones((8, 8, 1)))).all()
    seen = found[..., 3].all(0)
    assert seen[:64].all() and not seen[64 : 64 + gap].any()  # a dark page shows between images


def test_large_images_are_not_enlarged():
    images = torch.rand(2, 3, 100, 100, generator=torch.manual_seed(0))
    assert (pictures.strip(images)[:, :100, :3] == images[0].permute(1, 2, 0).numpy()).all()


def test_an_image_table():
    images = torch.rand(2, 1, 8, 8, generator=torch.manual_seed(0))
    cells = pd.DataFrame({3: [images, None], 5: [images, images]}, index=["DDIM", "EDM"])
    figure = pictures.image_table(cells, ["NFE 3", "NFE 5"], "Digits")
    shown = [len(ax.images) for ax in figure.axes]
    assert shown == [1, 1, 0, 1]
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles == ["DDIM", "", "EDM", ""]
    heads = [text.get_text() for ax in figure.axes for text in ax.texts]
    assert heads == ["NFE 3", "NFE 5"]
    assert (figure.axes[3].images[0].get_array() == pictures.strip(images)).all()
    assert figures.in_words(figure) == (
        "Sampled images, Digits: in every row the same 2 latents. Columns: "
        "NFE 3, NFE 5. Rows: DDIM; EDM."
    )
    with pytest.raises(ValueError, match="cells must be a table with at least one image"):
        pictures.image_table(cells.iloc[:0], ["NFE 3", "NFE 5"], "Digits")


def test_drawn_images_are_the_samples(tmp_path):
    data, seeds = amedlib.load_dataset("digits"), [4, 2]
    what = plans.table2("digits", ["iPNDM"], [3])["run"][0]
    found = pictures.draw(what, seeds, tmp_path)
    solver = amedlib.make_solver("ipndm")
    times = amedlib.make_schedule(num_steps=4)
    out = amedlib.sample(data.denoiser, amedlib.make_latents(seeds, data.shape), times, solver)
    assert out.nfe == 3
    torch.testing.assert_close(found, (data.to_images(out.x) + 1) / 2)
    assert found.min() >= 0 and found.max() <= 1
    assert not list(tmp_path.iterdir())


def test_a_method_without_a_stored_predictor_is_left_out_and_named(tmp_path):
    names = ["DDIM", "AMED-Solver"]
    planned = plans.table2("digits", names, [3, 5], seeds=[0], images=4, batch=4)
    cells, text = pictures.draw_all(planned, [0], results_dir=tmp_path)
    assert cells.index.tolist() == ["DDIM"] and cells.columns.tolist() == [3, 5]
    assert text == " Left out, since no predictor is stored: AMED-Solver at NFE 3, 5."
    what = planned["run"].iloc[-1]
    assert pictures.draw(what, [0], tmp_path) is None
    trained = pictures.draw(what, [0], tmp_path, train=True)
    assert predictor_path(what, tmp_path).is_file()
    cells, text = pictures.draw_all(planned, [0], results_dir=tmp_path)
    assert cells.index.tolist() == names
    assert text == " Left out, since no predictor is stored: AMED-Solver at NFE 3."
    assert (cells.loc["AMED-Solver", 5] == trained).all()
    assert [len(ax.images) for ax in pictures.image_table(cells, "ab", "Digits").axes] == [
        1,
        1,
        0,
        1,
    ]
    predictor_path(what, tmp_path).unlink()


# --- the network --------------------------------------------------------------------------------

PREDICTORS = {
    "paper": amedlib.Predictor("paper", scale_dir=0.0),
    "release": amedlib.Predictor("release", (4, 2), 0.01, 0.2),
    "release, r and c only": amedlib.Predictor("release"),
}


@pytest.mark.parametrize("name", PREDICTORS)
def test_the_diagram_has_every_layer(name):
    predictor = PREDICTORS[name]
    figure = pictures.architecture({name: predictor})
    (ax,) = figure.axes
    texts = [text.get_text() for text in ax.texts]
    with_weights = {path.split(".")[0] for path, _ in predictor.named_parameters()}
    for layer_name in with_weights:
        layer = getattr(predictor, layer_name)
        (text,) = (t for t in texts if t.startswith(f"{layer_name}\n"))
        count = layer.weight.numel() + layer.bias.numel()
        assert f"{layer.in_features} → {layer.out_features}" in text
        assert f"\n{count:,} weights" in text
    total = sum(p.numel() for p in predictor.parameters())
    assert ax.get_title(loc="left") == f"{name}: {total:,} weights"
    h, w = predictor.bottleneck_size
    assert f"channel mean\n{h} × {w}" in texts
    assert f"concatenation\n{predictor.fc_r.in_features} numbers" in texts
    assert sum(t.startswith("time ") for t in texts) == (1 if name == "paper" else 2)


def test_layers_in_their_order():
    found = pictures.layers(PREDICTORS["release"])
    order = ["enc_layer0", "enc_layer1", "map_layer0", "fc_r", "fc_scale_dir", "fc_scale_time"]
    assert found.index.tolist() == order
    assert found["calls"].tolist() == [1, 1, 2, 1, 1, 1]
    total = sum(p.numel() for p in PREDICTORS["release"].parameters())
    assert found["parameters"].sum() == total
    assert not any(layer._forward_hooks for layer in PREDICTORS["release"].children())


# --- steps and the theory -----------------------------------------------------------------------


def test_steps_lead_where_the_solvers_end():
    data = amedlib.load_dataset("digits")
    fine = amedlib.make_schedule(num_steps=41)
    curve = accurate_solution(data.denoiser, amedlib.make_latents([0], data.shape), fine, fine)
    truth, times, segment = curve[::8], fine[::8], curve[16:25]
    plane = theory.fit_plane(segment)
    steps = {
        name: theory.exact_step(
            data.denoiser, truth, times, 2, amedlib.make_solver(solver), location
        )
        for name, solver, location in (
            ("DDIM", "euler", None),
            ("iPNDM", "ipndm", None),
            ("DPM-Solver-2", "dpm2", None),
            ("AMED-Solver", "amed", theory.at(torch.tensor(0.4))),
        )
    }
    figure = pictures.steps_in_plane(plane, segment, times[2:4], steps)
    for (name, step), ax, evaluated in zip(steps.items(), figure.axes, (1, 1, 2, 2), strict=True):
        assert ax.get_title().endswith(name)
        (end,) = (line for line in ax.lines if line.get_label() == "end of the step")
        expected = plane.coordinates(step.end)[0].numpy()
        np.testing.assert_allclose(np.ravel(end.get_data()), expected)
        rays = [line for line in ax.lines if line.get_label().startswith("slope at t")]
        assert len(rays) == len(step.evaluations)
        assert sum(line.get_marker() == "x" for line in ax.lines) == evaluated
        if name in ("DDIM", "AMED-Solver"):  # these follow one slope to its end
            np.testing.assert_allclose(rays[0].get_xydata()[-1], expected)


def test_pictures_of_the_theory():
    t = [80.0, 1.0, 0.01]
    curves = {"t": t, "deviation": [1.0, 2.0, 3.0], "deviation_sd": [0.1, 0.2, 0.3]}
    ax = pictures.deviation(curves, {"f": theory.scaled_logistic(t, 2.0)}).axes[0]
    mean, bound = ax.lines
    assert mean.get_ydata().tolist() == curves["deviation"] and bound.get_label() == "f"
    assert ax.get_xscale() == ax.get_yscale() == "log" and ax.xaxis_inverted()
    columns = ["worst", "error_max", "error", "perpendicular", "parallel"]
    found = pd.DataFrame({"t": t, **{c: np.arange(3.0) + i for i, c in enumerate(columns, 1)}})
    ax = pictures.proposition_figure(found, {"one": [9.0] * 3, "two": [8.0] * 3}).axes[0]
    assert [line.get_ydata()[0] for line in ax.lines] == [9, 8, 1, 2, 3, 4, 5]
    assert ax.xaxis_inverted() and "t" in ax.get_xlabel()


def test_every_nfe_has_its_line_of_learned_r():
    """Also more than there are colours, and where all trainings agree to the last bit."""
    curves = {"r": [0.4, 0.3], "r_sd": [0.01, 0.02]}
    panels = {"AMED-Solver": {nfe: [curves] * 3 for nfe in range(3, 12)}}
    figure = figures.learned_r_figure(panels)
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert [label for label in labels if label.startswith("NFE")] == [
        f"NFE {nfe}" for nfe in range(3, 12)
    ]


def test_a_method_has_one_look():
    """Colour and marker tell methods apart, in figures and in what a reader operates."""
    assert len(set(figures.LOOKS.values())) == len(figures.LOOKS)
    assert figures.look("AMED-Plugin (iPNDM)") == figures.look("AMED-Plugin")
    looks = figures.variants("DPM-Solver-2", 5)
    assert {each["marker"] for each in looks} == {"v"}
    assert len({str(each["linestyle"]) for each in looks}) == 5
    for method in [*UNTRAINED, *LEARNED]:
        drawn, operated = figures.look(method), pieces.style_of(method, method)
        assert operated["line"]["color"] == drawn["color"]
        assert pieces.MARKERS[operated["marker"]["symbol"]] == drawn["marker"]


def test_the_rows_of_a_method_keep_its_look():
    planned = plans.table(6, nfes=[4, 6], seeds=[0])
    results = [
        SimpleNamespace(run=run, value=2.0 + i, replicates=[2.0 + i] * 10)
        for i, run in enumerate(planned["run"])
    ]
    figure = figures.cells_figure(6, planned.assign(result=results), "FD")
    markers = {line.get_marker() for line in figure.axes[1].lines}
    assert markers == {"v", "X"}  # of DPM-Solver-2 and of the plugin
    said = figures.in_words(figure)
    assert said.startswith("ours: FD against evaluations per sample (NFE). the paper: FID against")
    assert "DPM-Solver-2, r = 0.1" in said and figures.RINGS not in said


def test_rings_of_a_table_are_named_once_and_last():
    planned = plans.table(7, nfes=[5, 7], seeds=[0, 1])
    results = [
        SimpleNamespace(run=run, value=2.0 + 9 * run.predictor["seed"], replicates=[2.0] * 10)
        for run in planned["run"]
    ]
    figure = figures.cells_figure(7, planned.assign(result=results), "FD")
    ours, _ = figure.axes
    rings = [line for line in ours.lines if line.get_markerfacecolor() == "none"]
    assert len(rings) == planned.groupby(["M", "nfe"]).size().eq(2).sum() > 0
    assert all(list(line.get_ydata()) == [2.0, 11.0] for line in rings)
    assert ours.get_ylim()[0] > 0.1  # no bar leaves the axis
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == [*(f"M = {m}" for m in range(1, 6)), figures.RINGS]


def test_rows_are_told_to_who_does_not_see_them():
    rows = [("AMED", "AMED-Plugin", 1.0, 0.1), ("plain", "iPNDM", 2.0, 0.1)]
    found = pd.DataFrame(rows, columns=["variant", "method", "value", "half"])
    theirs = found.drop(columns="half")[::-1]  # no intervals, and in another order
    figure = figures.dots({"ours": found, "paper": theirs}, ["FD", "FID"])
    top = [[x for line in ax.lines for x, y in line.get_xydata() if y == 0] for ax in figure.axes]
    assert np.median(top[0]) == np.median(top[1]) == 1.0  # the first at the top
    said = figures.in_words(figure)
    assert said == "ours: FD. paper: FID. Rows from the top: AMED; plain."


def test_no_distance_is_below_zero():
    rows = [(2, 5, 4.0, 5.8, 3.0), (8, 5, 2.0, 0.3, 4.0)]
    found = pd.DataFrame(rows, columns=["images", "nfe", "value", "half", "seconds"])
    (ax,) = figures.few_figure(found, "FD").axes
    lows = [path.vertices[:, 1].min() for each in ax.collections for path in each.get_paths()]
    assert ax.get_ylim()[0] == 0 and min(lows) == 0
    assert ax.get_xticks().tolist() == [2, 8]
    assert [text.get_text() for text in ax.texts] == ["3 s", "4 s"]


@pytest.mark.parametrize("values, least", [((2, 62), 3), ((0.5, 300), 2), ((5, 9), 2)])
def test_a_logarithmic_axis_has_several_numbers(values, least):
    rows = [("DDIM", nfe, value) for nfe, value in zip((3, 5), values, strict=True)]
    frame = pd.DataFrame(rows, columns=["method", "nfe", "value"])
    (ax,) = figures.against_nfe({"": frame}, ["FD"]).axes
    low, high = ax.get_ylim()
    assert sum(low <= tick <= high for tick in ax.get_yticks()) >= least


def test_points_of_samplers_are_theirs():
    rows = [(3, False, 9.0, 1.0), (3, True, 2.0, 0.5), (5, True, 1.5, 0.2)]
    found = pd.DataFrame(rows, columns=["nfe", "learned", "fd", "endpoint"])
    first, second = figures.agreement_figure(found, "FD").axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in first.lines}
    assert drawn == {"untrained": [[1.0, 9.0]], "learned": [[0.5, 2.0]]}
    assert [line.get_xydata().tolist() for line in second.lines] == [[], [[0.2, 1.5]]]


def test_the_time_outside_the_network_has_a_point_per_solver():
    rows = [("euler", "none", 0.5), ("euler", "predictor", 1.2), ("amed", "predictor", 1.1)]
    columns = ["solver", "intermediate", "outside the network, %"]
    (ax,) = figures.overhead_figure(pd.DataFrame(rows, columns=columns)).axes
    names = [label.get_text() for label in ax.get_yticklabels()]
    plain, learned, _ = ax.lines
    assert [(names[int(y)], x) for x, y in plain.get_xydata()] == [("euler", 0.5)]
    assert [(names[int(y)], x) for x, y in learned.get_xydata()] == [("euler", 1.2), ("amed", 1.1)]
