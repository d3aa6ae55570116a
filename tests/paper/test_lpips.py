"""LPIPS on random backbones, with the weights of its layers that the package lpips ships."""

import urllib.error
import warnings
from pathlib import Path

import lpips
import pytest
import torch
import torchvision
from torch.nn import functional

from amedlib.metrics import lpips_distance

NETWORKS = {"vgg": torchvision.models.vgg16, "alex": torchvision.models.alexnet}
# Outputs of these layers of torchvision's ``features`` are compared (Zhang et al., 2018).
LAYERS = {"vgg": (3, 8, 15, 22, 29), "alex": (1, 4, 7, 9, 11)}


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    folder, files = tmp_path_factory.mktemp("weights"), {}
    for net, network in NETWORKS.items():
        torch.manual_seed(0)
        state = network(weights=None).state_dict()
        # as in the published files, but for the classifier, which is most of them
        files[net] = folder / f"{net}.pth"
        torch.save({k: v for k, v in state.items() if k.startswith("features.")}, files[net])
    yield files
    for file in files.values():
        file.unlink()


@pytest.fixture(scope="module")
def alex(backbones):
    return lpips_distance("alex", backbones["alex"])


def pairs(count, side=32, channels=3, dtype=torch.float32):
    x = torch.rand(2, count, channels, side, side, dtype=dtype, generator=torch.manual_seed(1))
    return x * 2 - 1


def by_definition(net, backbone, x, y):
    """LPIPS from torchvision's network and the published weights alone."""
    layers = NETWORKS[net](weights=None).features
    state = torch.load(backbone, weights_only=True)
    layers.load_state_dict({k.removeprefix("features."): v for k, v in state.items()})
    shipped = Path(lpips.__file__).parent / f"weights/v0.1/{net}.pth"
    weights = list(torch.load(shipped, map_location="cpu", weights_only=True).values())
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    deviation = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    total = 0
    with torch.no_grad():
        a, b = (((images + 1) / 2 - mean) / deviation for images in (x, y))
        for i, layer in enumerate(layers):
            a, b = layer(a), layer(b)
            if i in LAYERS[net]:
                difference = (functional.normalize(a) - functional.normalize(b)) ** 2
                weight = weights[LAYERS[net].index(i)]
                total = total + (weight * difference).sum(1).mean((1, 2))
    return total


@pytest.mark.parametrize(("net", "count"), [("alex", 3), ("vgg", 1)])
def test_equals_the_definition_on_enlarged_images(backbones, net, count):
    x, y = pairs(count)
    found = lpips_distance(net, backbones[net])(x, y)
    assert found.shape == (count,)
    large = [functional.interpolate(images, size=(224, 224), mode="bilinear") for images in (x, y)]
    torch.testing.assert_close(found, by_definition(net, backbones[net], *large), rtol=1e-4, atol=0)


def test_large_images_are_taken_as_they_are(backbones, alex):
    x, y = pairs(1, side=256)
    expected = by_definition("alex", backbones["alex"], x, y)
    torch.testing.assert_close(alex(x, y), expected, rtol=1e-4, atol=0)


def test_a_distance(alex):
    x, y = pairs(4)
    assert torch.equal(alex(x, x), torch.zeros(4))
    assert (alex(x, y) > 0).all()
    torch.testing.assert_close(alex(x, y), alex(y, x))
    assert (alex(x, x + 0.05 * (y - x)) < alex(x, y)).all()


def test_every_pair_counts_by_itself(alex):
    x, y = pairs(4)
    alone = torch.cat([alex(x[i : i + 1], y[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(alex(x, y), alone, rtol=1e-5, atol=0)


def test_gradients_reach_both_arguments_and_no_weight(alex):
    x, y = (images.requires_grad_() for images in pairs(2, dtype=torch.float64))
    value = alex(x, y).sum()
    gradients = torch.autograd.grad(value, (x, y))
    step = 1e-2 * gradients[0] / gradients[0].norm()
    for gradient in gradients:
        assert gradient.dtype == torch.float64 and gradient.isfinite().all()
        assert (gradient.flatten(1).norm(dim=1) > 0).all()
    with torch.no_grad():
        slope = (alex(x + step, y).sum() - alex(x - step, y).sum()).item() / 2e-2
    assert slope == pytest.approx(gradients[0].norm().item(), rel=0.02)


def test_double_precision_and_other_devices(alex):
    x, y = pairs(2)
    torch.testing.assert_close(alex(x.double(), y.double()), alex(x, y), check_dtype=False)
    if torch.cuda.is_available():
        torch.testing.assert_close(alex(x.cuda(), y.cuda()).cpu(), alex(x, y), rtol=1e-2, atol=0)
        torch.testing.assert_close(alex(x, y), alex(x, y))


@pytest.mark.parametrize("net", NETWORKS)
def test_small_grey_images_are_images(backbones, net):
    x, y = pairs(1, side=8, channels=1)
    distance = lpips_distance(net, backbones[net])
    found = distance(x, y)
    assert found > 0
    torch.testing.assert_close(found, distance(x.expand(-1, 3, -1, -1), y.expand(-1, 3, -1, -1)))


def test_building_is_silent_and_loads_what_it_is_given(backbones, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = lpips_distance("alex", str(backbones["alex"]))
        again = lpips_distance("alex", backbones["alex"])
    x, y = pairs(1)
    assert torch.equal(first(x, y), again(x, y))
    state = torch.load(backbones["alex"], weights_only=True)
    state["features.8.weight"] *= -1
    torch.save(state, tmp_path / "other.pth")
    assert not torch.equal(first(x, y), lpips_distance("alex", tmp_path / "other.pth")(x, y))


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_other_files_are_refused(backbones, tmp_path):
    whole = backbones["alex"].read_bytes()
    (tmp_path / "short.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pth").write_text("<html>not found</html>")
    state = torch.load(backbones["alex"], weights_only=True)
    torch.save(list(state.values()), tmp_path / "list.pth")
    torch.save(state | {"features.0.weight": torch.zeros(3)}, tmp_path / "shape.pth")
    torch.save({k: v for k, v in state.items() if k != "features.3.bias"}, tmp_path / "part.pth")
    torch.save({"features.0.weight": Trap(tmp_path / "sprung")}, tmp_path / "trap.pth")
    files = [
        tmp_path / f"{n}.pth" for n in ("absent", "short", "text", "list", "shape", "part", "trap")
    ]
    for file in [*files, backbones["vgg"]]:
        with pytest.raises(
            ValueError, match="does not hold torchvision's alexnet weights"
        ) as caught:
            lpips_distance("alex", file)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "sprung").exists()
    with pytest.raises(ValueError, match="net must be one of 'vgg', 'alex'; 'resnet' was given"):
        lpips_distance("resnet")


def test_without_network_one_sentence_says_what_to_do(monkeypatch, tmp_path):
    asked = []

    def offline(url, *_, **__):
        asked.append(url)
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(OSError, match="vgg16 .* could not be downloaded .* as backbone"):
        lpips_distance()
    assert asked == ["https://download.pytorch.org/models/vgg16-397923af.pth"]


def test_a_download_is_checked_and_not_executed(monkeypatch, tmp_path, backbones):
    """The file comes into torch's cache once; there it may hold tensors only."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    prefixes = []

    def served(url, path, hash_prefix, progress):
        prefixes.append(hash_prefix)
        Path(path).write_bytes(backbones["alex"].read_bytes())

    monkeypatch.setattr(torch.hub, "download_url_to_file", served)
    x, y = pairs(1)
    expected = lpips_distance("alex", backbones["alex"])(x, y)
    for _ in range(2):
        assert torch.equal(lpips_distance("alex")(x, y), expected)
    assert prefixes == ["7be5be79"]
    cached = next((tmp_path / "hub/checkpoints").iterdir())
    torch.save({"features.0.weight": Trap(tmp_path / "sprung")}, cached)
    with pytest.raises(OSError, match="UnpicklingError"):
        lpips_distance("alex")
    assert not (tmp_path / "sprung").exists()
