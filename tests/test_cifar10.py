"""CIFAR-10: reading, augmentation, training in several runs, what is published; tiny networks."""

import importlib.util
import io
import itertools
import json
import math
import shutil
import sys
import tarfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from amedlib.datasets import loaders
from amedlib.datasets.entries import describe
from amedlib.datasets.files import DATA
from amedlib.datasets.inception import quantise_edm
from amedlib.datasets.loaders import load_dataset, load_weights
from amedlib.denoisers.cifar10 import (
    CLASSES,
    COUNTS,
    Cifar10Classifier,
    load_cifar10_images,
    moments_from_tensors,
    moments_to_tensors,
    scaled,
)
from amedlib.files import load_tensors
from amedlib.metrics import Moments, feature_distance, moments_distance
from amedlib.study import execute, plans, store

spec = importlib.util.spec_from_file_location("train_cifar10", DATA / "models" / "train_cifar10.py")
script = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = script
spec.loader.exec_module(script)

COUNT = script.TINY.counts
HALF = script.TINY.images // 2
CPU = torch.device("cpu")


def picture(label, number):
    """A flat colour, which JPEG keeps within a few levels."""
    colour = (25 * label, 200 - 20 * label, 10 * number)
    return np.broadcast_to(np.array(colour, np.uint8), (32, 32, 3))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder with as many images as the tiny settings ask for."""
    root = tmp_path_factory.mktemp("images")
    for part, count in COUNT.items():
        for label, name in enumerate(CLASSES):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(count // len(CLASSES)):
                Image.fromarray(picture(label, number)).save(folder / f"{number}.jpg")
    return root


@pytest.fixture(scope="module")
def archive(images, tmp_path_factory):
    path = tmp_path_factory.mktemp("archive") / "images.tar.xz"
    with tarfile.open(path, "w:xz") as tar:
        for part in COUNT:
            tar.add(images / part, part)
    return path


# --- images -------------------------------------------------------------------------------------


def test_images_of_a_folder(images):
    data = load_cifar10_images(images, COUNT)
    for part, count in COUNT.items():
        pixels, labels = data[part]
        assert pixels.shape == (count, 3, 32, 32) and pixels.dtype == torch.uint8
        assert (labels.bincount(minlength=10) == count // 10).all()
        each = count // 10
        for i, label in enumerate(labels.tolist()):
            expected = torch.from_numpy(picture(label, i % each).copy()).movedim(2, 0)
            assert (pixels[i].int() - expected.int()).abs().max() <= 3


def test_an_archive_holds_the_same(images, archive):
    folder, packed = (load_cifar10_images(source, COUNT) for source in (images, archive))
    for part in COUNT:
        assert all(map(torch.equal, folder[part], packed[part]))


def binary_archive(path, parts):
    with tarfile.open(path, "w:gz") as tar:
        for name, (labels, pixels) in parts.items():
            flat = pixels.reshape(len(pixels), -1)
            content = np.concatenate([labels[:, None], flat], axis=1).astype(np.uint8).tobytes()
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_the_published_binary_form(tmp_path):
    """Five files of training images and one of test images, as the archive has them."""
    random = np.random.default_rng(0)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    parts = {
        name: (random.integers(10, size=4), random.integers(256, size=(4, 3, 32, 32)))
        for name in names
    }
    binary_archive(tmp_path / "cifar.tar.gz", parts)
    data = load_cifar10_images(tmp_path / "cifar.tar.gz", {"train": 20, "test": 4})
    pixels = np.concatenate([pixels for name, (_, pixels) in parts.items() if "test" not in name])
    assert (data["train"].pixels.numpy() == pixels).all()
    assert (data["test"].labels.numpy() == parts["test_batch.bin"][0]).all()


def test_half_an_image_is_named(tmp_path):
    with tarfile.open(tmp_path / "half.tar", "w") as tar:
        info = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
        info.size = 5000
        tar.addfile(info, io.BytesIO(bytes(5000)))
    with pytest.raises(ValueError, match="the bytes of .*test_batch.bin must be 3073 per image"):
        load_cifar10_images(tmp_path / "half.tar")


def test_what_is_no_cifar10_is_refused(images, archive, tmp_path):
    with pytest.raises(ValueError, match="images must be an existing folder"):
        load_cifar10_images(tmp_path / "none", COUNT)
    with pytest.raises(ValueError, match=r"number of images in .* must be 50000 .*; 60 was given"):
        load_cifar10_images(images)
    cut = tmp_path / "cut.tar.xz"
    cut.write_bytes(archive.read_bytes()[:600])
    (tmp_path / "no.tar").write_text("no archive")
    folder = tmp_path / "train" / "cat"
    folder.mkdir(parents=True)
    (folder / "0.jpg").write_text("no picture")
    for source in (cut, tmp_path / "no.tar", tmp_path):
        with pytest.raises(ValueError, match="cannot be read"):
            load_cifar10_images(source, COUNT)
    Image.new("RGB", (16, 16)).save(folder / "0.jpg")
    with pytest.raises(ValueError, match="must be 32x32 pixels"):
        load_cifar10_images(tmp_path, COUNT)
    folder.rename(tmp_path / "train" / "lynx")
    with pytest.raises(ValueError, match=r"class of an image must be one of .*'lynx' was given"):
        load_cifar10_images(tmp_path, COUNT)


def test_scaling_and_quantising_are_inverse():
    pixels = torch.arange(256, dtype=torch.uint8)
    x = scaled(pixels)
    assert x[0] == -1 and x[-1] == 1
    assert torch.equal(quantise_edm(x), pixels)


# --- classifier ---------------------------------------------------------------------------------


def test_the_classifier_is_small_and_smooth():
    net = Cifar10Classifier().eval()
    assert sum(t.numel() for t in net.state_dict().values()) * 2 < 5e6
    net = Cifar10Classifier(4).eval().double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    assert net.features(x).shape == (2, Cifar10Classifier.FEATURES) and net(x).shape == (2, 10)
    direction = torch.randn_like(x)
    slope = (torch.autograd.grad(net.features(x).sum(), x)[0] * direction).sum()
    with torch.no_grad():
        ends = [net.features(x + h * direction).sum() for h in (1e-4, -1e-4)]
    torch.testing.assert_close((ends[0] - ends[1]) / 2e-4, slope, rtol=1e-5, atol=1e-8)


def test_moved_images_are_crops_of_the_mirrored_ones():
    torch.manual_seed(0)
    image = torch.rand(1, 1, 6, 6)
    out = script.moved(image.expand(200, -1, -1, -1), most=1)
    padded = torch.nn.functional.pad(image, [1] * 4, mode="reflect")[0, 0]
    crops = [padded[i : i + 6, j : j + 6] for i in range(3) for j in range(3)]
    crops = torch.stack(crops + [crop.flip(1) for crop in crops])
    found = (out == crops[None, :, :, :].movedim(1, 0)[:, :, None]).flatten(2).all(2)
    assert found.any(0).all()  # each is one of them
    assert found.any(1).all()  # and each occurs


def test_the_classifier_learns_what_can_be_learned(images):
    data = load_cifar10_images(images, COUNT)
    settings = script.Settings(batch=10, epochs=5, width=4, counts=COUNT)
    net, _ = script.train_classifier(data, settings, CPU)
    assert script.accuracy(net, data["test"], CPU) > 0.3  # by chance it is 0.1


def test_moments_survive_a_file():
    x = torch.randn(40, 5, dtype=torch.float64)
    blocks = {"train": [Moments.of(x)], "test": [Moments.of(part) for part in x.chunk(4)]}
    again = moments_from_tensors(moments_to_tensors(blocks))
    assert [len(each) for each in again.values()] == [1, 4]
    whole = sum(again["test"][1:], start=again["test"][0])
    assert whole.count == 40
    np.testing.assert_allclose(whole.mean, x.mean(0))
    np.testing.assert_allclose(again["train"][0].covariance, x.T.cov())


# --- augmentation -------------------------------------------------------------------------------


def transform(x, **given):
    """``transformed`` with what is given, and nothing else done."""
    still = {name: torch.zeros(len(x)) for name in ("scale", "angle", "stretch", "direction")}
    still |= {name: torch.zeros(len(x), 2) for name in ("flips", "shift")}
    given = {
        name: torch.tensor(value).expand(len(x), *still[name].shape[1:])
        for name, value in given.items()
    }
    return script.transformed(x, **(still | given))


def blob(x=0.0, y=0.0, width=3.0, size=48):
    """A Gaussian at a place in pixels from the centre."""
    at = torch.arange(size) - (size - 1) / 2
    return (-((at[None] - x) ** 2 + (at[:, None] - y) ** 2) / (2 * width**2)).exp()[None, None]


def centre_and_covariance(image):
    at = torch.arange(image.shape[-1]) - (image.shape[-1] - 1) / 2
    points = torch.stack(torch.meshgrid(at, at, indexing="xy"), dim=-1).reshape(-1, 2)
    weights = image.flatten().clamp(min=0)  # which cubic interpolation goes a little below
    return (weights @ points) / weights.sum(), points.T.cov(aweights=weights)


def test_nothing_done_changes_nothing():
    x = torch.randn(3, 3, 32, 32)
    assert torch.equal(transform(x), x)
    flips = transform(x, flips=[1.0, 0.0]), transform(x, flips=[0.0, 1.0])
    assert torch.equal(flips[0], x.flip(3)) and torch.equal(flips[1], x.flip(2))


def test_a_unit_of_movement_is_an_eighth_of_the_size():
    x = torch.rand(2, 3, 32, 32)
    for shift, (right, down) in (([1.0, 0.0], (4, 0)), ([0.5, -1.5], (2, -6))):
        moved = transform(x, shift=shift)
        inside = (..., slice(8, 24), slice(8, 24))
        expected = x.roll((down, right), (2, 3))
        torch.testing.assert_close(moved[inside], expected[inside], rtol=0, atol=1e-5)


def test_a_rotation_goes_from_x_to_y():
    x = torch.rand(2, 3, 32, 32)
    turned = transform(x, angle=math.pi / 2)
    torch.testing.assert_close(turned, x.rot90(-1, (2, 3)), rtol=0, atol=1e-5)
    centre, _ = centre_and_covariance(transform(blob(x=8), angle=math.pi / 6))
    expected = torch.tensor([8 * math.cos(math.pi / 6), 8 * math.sin(math.pi / 6)])
    torch.testing.assert_close(centre, expected, rtol=0, atol=0.05)


def test_scale_and_stretch_multiply_the_width():
    _, covariance = centre_and_covariance(transform(blob(), scale=5.0))
    torch.testing.assert_close(covariance, 36 * torch.eye(2), rtol=0.02, atol=0.02)
    direction = 0.7
    _, covariance = centre_and_covariance(transform(blob(), stretch=2.5, direction=direction))
    along = torch.tensor([math.cos(direction), math.sin(direction)])
    across = torch.tensor([-along[1], along[0]])
    torch.testing.assert_close(along @ covariance @ along, torch.tensor(18.0), rtol=0.02, atol=0)
    torch.testing.assert_close(across @ covariance @ across, torch.tensor(4.5), rtol=0.02, atol=0)


def test_the_movement_comes_last():
    """Of the size of the image, however it was scaled, turned and stretched."""
    how = {"scale": 1.0, "angle": 1.0, "stretch": 1.0, "direction": 2.0}
    centre, covariance = centre_and_covariance(transform(blob(), shift=[1.0, -0.5], **how))
    torch.testing.assert_close(centre, torch.tensor([6.0, -3.0]), rtol=0, atol=0.05)
    # The stretch follows the rotation, so that its direction is that of the result.
    _, unmoved = centre_and_covariance(transform(blob(), **how | {"angle": 0.0}))
    torch.testing.assert_close(covariance, unmoved, rtol=0.02, atol=0.02)


def test_labels_say_what_was_done():
    torch.manual_seed(0)
    x = torch.rand(20_000, 1, 4, 4)
    out, labels = script.augment(x)
    assert labels.shape == (20_000, 9)
    untouched = (labels == 0).all(1)
    assert torch.equal(out[untouched], x[untouched])
    flipped = (labels == torch.tensor([1.0] + [0] * 8)).all(1)
    assert torch.equal(out[flipped], x[flipped].flip(3)) and flipped.sum() > 1000
    # Angles make cosine and sine; the others are normal where they are not zero.
    torch.testing.assert_close((labels[:, 3] + 1) ** 2 + labels[:, 4] ** 2, torch.ones(20_000))
    shares = (labels != 0).float().mean(0)
    expected = torch.tensor([0.5, 0.06] + [0.12] * 7)
    assert ((shares - expected).abs() < 4 * (expected * (1 - expected) / 20_000).sqrt()).all()
    stretch = labels[:, 5:7].norm(dim=1)
    for values in (labels[:, 2], labels[:, 7], labels[:, 8], stretch):
        assert values[values != 0].square().mean() == pytest.approx(1, abs=0.15)


# --- training -----------------------------------------------------------------------------------


class Known(torch.nn.Module):
    """A denoiser that knows the image, and errs by ``off`` times c_out."""

    sigma_data = 0.5

    def __init__(self, images, off):
        super().__init__()
        self.images, self.off = images, off

    def forward(self, x, sigma, augment_labels):
        c_out = sigma * self.sigma_data / (sigma**2 + self.sigma_data**2).sqrt()
        return self.images + self.off * c_out


def test_the_loss_is_the_networks_error_in_units_of_c_out():
    """Karras et al., 2022, Eq. 8 and the choice of lambda in Table 1."""
    x = torch.randn(50, 3, 4, 4)
    for off in (0.0, 1.0, 2.0):
        loss = script.denoising_loss(Known(x, off), x, None)
        assert loss.item() == pytest.approx(off**2, rel=1e-4, abs=1e-9)


def test_the_learning_rate_rises_and_falls():
    s = script.Settings()
    rates = [script.learning_rate(n, s) for n in (0, s.ramp // 2, s.ramp, s.plateau, 4 * s.plateau)]
    assert rates == pytest.approx([s.learning_rate * k for k in (0, 0.5, 1, 1, 0.5)])


def test_the_denoiser_is_of_the_size_that_was_asked_for():
    with torch.device("meta"):
        net = script.edm.build("EDMPrecond", script.Settings().init_kwargs)
    count = sum(p.numel() for p in net.parameters())
    assert 6e6 < count < 12e6 and 2 * count < 14e6
    assert net.bottleneck_size == (8, 8)
    layer = 2 * 32 * 32 * 9 * 3 * 64  # the first convolution alone
    assert script.evaluation_flops(script.Settings().init_kwargs) > layer


def test_the_step_can_be_compiled_without_a_break():
    state = script.State(script.TINY, CPU)
    x, labels = script.augment(torch.rand(2, 3, 32, 32))
    traced = torch.compile(script.denoising_loss, backend="eager", fullgraph=True)
    losses = []
    for function in (script.denoising_loss, traced):
        torch.manual_seed(0)
        losses.append(function(state.net, x, labels).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.fixture(scope="module")
def half_way(images, tmp_path_factory):
    """Half of what the tiny settings train."""
    folder = tmp_path_factory.mktemp("checkpoint")
    data = load_cifar10_images(images, COUNT)
    half = script.Settings(**vars(script.TINY) | {"images": HALF})
    script.make_denoiser(data, folder, half, CPU)
    return data, folder


@pytest.fixture
def trained(half_way, tmp_path):
    """The images, and a copy of the checkpoint."""
    data, folder = half_way
    return data, Path(shutil.copytree(folder, tmp_path / "checkpoint"))


def checkpoint(folder):
    about = script.read_index(folder)
    return about, script.read_checkpoint(folder, about)


def test_short_trainings_add_up(trained):
    data, folder = trained
    about, before = checkpoint(folder)
    assert (about["images"], about["updates"], len(about["runs"])) == (HALF, 5, 1)
    script.make_denoiser(data, folder, script.TINY, CPU)
    about, after = checkpoint(folder)
    assert (about["images"], about["updates"]) == (2 * HALF, 10)
    assert [each["images"] for each in about["runs"]] == [HALF, HALF]
    assert all(math.isfinite(each["loss"]) for each in about["runs"])
    for kind in ("net", "average", "exp_avg", "exp_avg_sq"):
        name = f"{kind}/model.map_layer0.weight"
        assert not torch.equal(before[name], after[name])
    # The average follows the network, so it lies between where that was and is.
    name = "model.map_layer0.weight"
    first = before[f"average/{name}"].float()
    apart = [(t.float() - first).norm() for t in (after[f"average/{name}"], after[f"net/{name}"])]
    assert 0 < apart[0] < 2 * apart[1]


def test_a_checkpoint_gives_back_what_it_was_given(trained):
    _, folder = trained
    _, stored = checkpoint(folder)
    state = script.State(script.TINY, CPU)
    state.load(folder)
    assert {t.dtype for t in stored.values()} == {torch.float16, torch.bfloat16}
    for name, tensor in state.tensors().items():
        assert torch.equal(tensor, stored[name].to(tensor.dtype))
    steps = {values["step"].item() for values in state.optimiser.state.values()}
    assert steps == {5.0}
    # Moments lie in memory as parameters do, which the fused Adam asks for.
    for p, values in state.optimiser.state.items():
        assert values["exp_avg"].stride() == p.stride()


def test_after_a_deadline_the_training_stops_with_a_checkpoint(trained, monkeypatch):
    data, folder = trained
    script.make_denoiser(data, folder, script.TINY, CPU, deadline=0.0)
    about, _ = checkpoint(folder)
    assert about["images"] == HALF and len(about["runs"]) == 1
    longer = script.Settings(**vars(script.TINY) | {"images": 10_000})
    for calls in range(1, 7):  # wherever between two looks at the clock it falls
        clock = itertools.count()
        monkeypatch.setattr(script, "time", SimpleNamespace(monotonic=lambda c=clock: next(c)))
        before = checkpoint(folder)[0]["images"]
        script.make_denoiser(data, folder, longer, CPU, deadline=calls)
        steps = (checkpoint(folder)[0]["images"] - before) / longer.batch
        assert steps <= calls
    assert steps > 1


def test_files_of_a_checkpoint_are_small_and_change_together(trained, monkeypatch):
    _, folder = trained
    state = script.State(script.TINY, CPU)
    state.load(folder)
    monkeypatch.setattr(script, "PART_BYTES", 20_000)
    state.about["images"] += 1

    def full(path, content):
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:  # as if it were ended before the index is written
        patch.setattr(script, "write_atomically", full)
        with pytest.raises(OSError, match="full"):
            state.save(folder)
    assert checkpoint(folder)[0]["images"] == HALF
    state.save(folder)
    about, stored = checkpoint(folder)
    files = sorted(folder.glob("checkpoint-*.safetensors"))
    assert [path.name for path in files] == sorted(about["files"]) and len(files) > 3
    assert all(path.stat().st_size < 30_000 for path in files)
    assert stored.keys() == state.tensors().keys()
    files[1].unlink()
    with pytest.raises(ValueError, match=f"{files[1].name} is missing"):
        state.load(folder)


def test_a_checkpoint_of_another_network_is_refused(trained):
    _, folder = trained
    other = script.TINY.init_kwargs | {"model_channels": 16}
    state = script.State(script.Settings(**vars(script.TINY) | {"init_kwargs": other}), CPU)
    with pytest.raises(ValueError, match="network of the checkpoint in"):
        state.load(folder)


def test_arguments_of_the_script(tmp_path):
    for arguments, message in (
        (
            ["teacher"],
            "one of 'classifier', 'denoiser', 'publish', 'joint'; 'teacher'",
        ),
        (["--seconds", "5"], "seconds must be more than 10"),
        (["--images", str(tmp_path / "none")], "images must be an existing folder"),
    ):
        with pytest.raises(ValueError, match=message):
            script.main(arguments)


# --- what is published --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(archive, tmp_path_factory):
    """All that the script writes."""
    folder = tmp_path_factory.mktemp("models")
    how = ["--tiny", "--images", str(archive), "--into", str(folder), "--device", "cpu"]
    script.main(["classifier", "denoiser", *how])
    script.main(["publish", "joint", *how])
    return folder


@pytest.fixture
def small(published, monkeypatch):
    monkeypatch.setattr(loaders, "load_weights", partial(load_weights, folder=published))
    loaders._load.cache_clear()
    yield load_dataset("cifar10_small")
    loaders._load.cache_clear()


def test_without_weights_the_error_says_how_to_make_them(tmp_path, monkeypatch):
    monkeypatch.setattr(loaders, "load_weights", partial(load_weights, folder=tmp_path))
    loaders._load.cache_clear()
    with pytest.raises(ValueError, match="missing; `make models DATASET=cifar10_small` trains it"):
        load_dataset("cifar10_small")


def test_the_entry_is_known_without_weights():
    entry = describe("cifar10_small")
    assert entry.shape == (3, 32, 32) and entry.samples == COUNTS["test"]
    assert entry.feature_distance_name == "FD (CIFAR-10 features)"
    runs = plans.table2("cifar10_small")["run"]
    assert {what.samples for what in runs} == {10_000}


def test_published_weights_are_the_average_of_the_checkpoint(published, small):
    _, stored = checkpoint(published)
    for name, tensor in small.denoiser.state_dict().items():
        assert torch.equal(tensor, stored[f"average/{name}"].float())
    files = [load_tensors(published / f"cifar10_{n}.safetensors")[0] for n in ("edm", "classifier")]
    assert all(t.dtype in (torch.float16, torch.int64) for each in files for t in each.values())
    _, metadata = load_tensors(published / "cifar10_edm.safetensors")
    assert json.loads(metadata["runs"])[0]["images"] == script.TINY.images


def test_the_reference_is_the_training_images(small, archive):
    data = load_cifar10_images(archive, COUNT)
    for metric, of in small.features_of.items():
        reference, features = small.reference[metric], of(data["train"].pixels)
        assert reference.count == len(features) == COUNT["train"]
        np.testing.assert_allclose(reference.mean, features.double().mean(0), rtol=1e-4, atol=1e-5)
        held_out = small.held_out[metric]
        whole = sum(held_out[1:], start=held_out[0])
        of_test = Moments.of(of(data["test"].pixels))
        assert moments_distance(whole, of_test) == pytest.approx(0, abs=1e-5)


def test_the_floor_is_of_the_test_images_to_the_training_images(small, archive, tmp_path):
    data = load_cifar10_images(archive, COUNT)
    for metric, what in plans.floor_runs("cifar10_small").items():
        features = small.features_of[metric]
        parts = [Moments.of(features(data[part].pixels)) for part in ("test", "train")]
        result = execute.run(what, tmp_path, "cpu", progress=False)
        assert result.value == pytest.approx(moments_distance(*parts), rel=1e-4, abs=1e-6)
        assert result.curves == {"images": [COUNT["test"]]} and len(result.replicates) == 10


def test_a_number_is_measured_on_it(small, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SOLUTION", store.SOLUTION | {"num_steps": 5})
    planned = plans.table2("cifar10_small", ["iPNDM"], [3], n_samples=20)
    result = execute.run(planned["run"][0], tmp_path, "cpu", progress=False)
    assert result.nfe == 3 and math.isfinite(result.value) and len(result.replicates) == 10


def test_fid_takes_the_same_images_to_the_published_network(small, monkeypatch):
    monkeypatch.setattr(loaders, "fetch", lambda asset: asset.name)
    monkeypatch.setattr(loaders, "inception_features", lambda path, device: (path, device))
    monkeypatch.setattr(loaders, "load", lambda asset: asset.name)
    fid = load_dataset("cifar10_small_fid")
    assert fid.features == (loaders.INCEPTION, "cpu")
    assert fid.reference == {"fd": "fid-refs/cifar10-32x32.npz"}
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(fid.to_images(x), small.to_images(x))
    assert fid.to_images(x).dtype == torch.uint8 and fid.fingerprint == small.fingerprint


def test_losses_compare_features(small, published):
    x = torch.randn(2, 3, 32, 32)
    y = x + 0.1
    assert (small.distances("l2")(x, y) > 0).all()
    distance = small.distances("features")(x, y)
    net = Cifar10Classifier(script.TINY.width).eval()
    weights, _ = load_tensors(published / "cifar10_classifier.safetensors")
    net.load_state_dict(weights)
    torch.testing.assert_close(distance, feature_distance(net.features)(x, y))
    with pytest.raises(ValueError, match="loss must be one of 'l2', 'features', 'lpips'"):
        small.distances("l1")


def test_cards_and_checksums(published):
    card = (published / "cifar10_edm.md").read_text()
    about = json.loads((published / "checkpoint.json").read_text())
    assert f"{about['images']:,} draws" in card and "JPEG copies" in card
    assert "60 training images" in (published / "cifar10_classifier.md").read_text()
    for name in ("edm", "classifier", "moments"):
        load_weights(f"cifar10_{name}.safetensors", published)  # checks SHA256SUMS
