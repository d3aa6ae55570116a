"""What the Frechet distances make of real images that are corrupted, step by step.

python -m amedlib.study.corruptions digits
python -m amedlib.study.corruptions cifar10_small --images ARCHIVE

A distance is one by which samples can be ordered if it grows with every corruption, and if nothing
is farther than noise. This measures it, of the images themselves, without any model of them.
"""

import argparse
import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from scipy.ndimage import gaussian_filter

from amedlib.checks import one_of, require
from amedlib.datasets.inception import quantise_edm
from amedlib.datasets.loaders import load_dataset
from amedlib.denoisers.cifar10 import load_cifar10_images, scaled
from amedlib.denoisers.digits import load_digits_images, quantise
from amedlib.files import write_atomically
from amedlib.metrics import Moments, moments_distance
from amedlib.study.published import DISTANCES
from amedlib.study.run import OF_SAMPLES, Run
from amedlib.study.store import RESULTS, fingerprint_of

SEED = 0
IMAGES = 2_000  # of CIFAR-10's test images


class Real(NamedTuple):
    """Real images [n, C, H, W] in [-1, 1], their labels [n], and how they become 8 bits or less."""

    images: torch.Tensor
    labels: torch.Tensor
    to_images: Callable


def _digits(source=None) -> Real:
    digits = load_digits_images()
    part = digits.reference_part
    return Real(digits.images[part], digits.labels[part], quantise)


def _cifar10(source) -> Real:
    require(source is not None, "images", source, "a folder or archive of CIFAR-10")
    pixels, labels = load_cifar10_images(source)["test"]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED))[:IMAGES]
    return Real(scaled(pixels[order]), labels[order], quantise_edm)


REAL = {"digits": _digits, "cifar10_small": _cifar10}


def _noise(x, deviation, random):
    return x + deviation * torch.randn(x.shape, generator=random)


def _blur(x, deviation, random):
    return torch.from_numpy(gaussian_filter(x.numpy(), (0, 0, deviation, deviation)))


def _contrast(x, factor, random):
    return factor * x


def _saturation(x, share, random):
    extreme = torch.randn(x.shape, generator=random).sign()
    return torch.where(torch.rand(x.shape, generator=random) < share, extreme, x)


def _shift(x, pixels, random):
    moved = torch.full_like(x, -1)
    moved[..., pixels:, pixels:] = x[..., :-pixels, :-pixels]
    return moved


class Corruption(NamedTuple):
    """A corruption at five strengths.

    Attributes:
        unit: of the strengths.
        small, large: strengths for 8x8 and for 32x32 pixels.
        apply: images in [-1, 1], a strength and a generator to images that are then clipped;
            ``None``: classes are left out.
    """

    unit: str
    small: tuple[float, ...]
    large: tuple[float, ...]
    apply: Callable | None


CORRUPTIONS = {
    "noise": Corruption("standard deviation", *[(0.1, 0.2, 0.4, 0.8, 1.6)] * 2, _noise),
    "blur": Corruption(
        "deviation in pixels", (0.4, 0.6, 0.8, 1.2, 2.0), (0.5, 0.8, 1.2, 2.0, 4.0), _blur
    ),
    "contrast": Corruption("factor", *[(1.25, 1.5, 2.0, 4.0, 8.0)] * 2, _contrast),
    "saturation": Corruption(
        "share black or white", *[(0.05, 0.1, 0.2, 0.4, 0.8)] * 2, _saturation
    ),
    "shift": Corruption("pixels right and down", (1, 2, 3, 4, 5), (1, 2, 4, 6, 8), _shift),
    "mode dropping": Corruption("classes left out", *[(1, 3, 5, 7, 9)] * 2, None),
}
# What has no strength. Pure noise is what a sampler starts from, clipped.
UNTOUCHED, NOISE, GAUSSIAN = "untouched", "pure noise", "Gaussian of their moments"


def _without_strength(x: torch.Tensor, random) -> dict[str, torch.Tensor]:
    mean, n = x.mean(0), len(x)
    weights = torch.randn(n, n, generator=random) / n**0.5
    alike = mean + (weights @ (x - mean).flatten(1)).view_as(x)
    noise = torch.randn(x.shape, generator=random)
    return {
        UNTOUCHED: x,
        GAUSSIAN: alike,
        "plain grey": torch.zeros_like(x),
        "noise of deviation 1": noise,
        NOISE: 80 * noise,
    }


def corrupted(real: Real):
    """Yield kind, strength (``None`` where there is none) and images in [-1, 1]."""
    for kind, images in _without_strength(real.images, torch.Generator().manual_seed(SEED)).items():
        yield kind, None, images
    for kind, corruption in CORRUPTIONS.items():
        small = real.images.shape[-1] == 8
        for strength in corruption.small if small else corruption.large:
            random = torch.Generator().manual_seed(SEED)  # the same noise at every strength
            if corruption.apply is None:
                yield kind, strength, real.images[real.labels < 10 - strength]
            else:
                yield kind, strength, corruption.apply(real.images, strength, random)


@torch.no_grad()
def measure_corrupted(dataset: str, source: Path | str | None = None) -> pd.DataFrame:
    """Frechet distances of corrupted real images to the reference.

    On the digits they are the reference images themselves; on CIFAR-10, 2,000 test images.

    Args:
        dataset: ``"digits"`` or ``"cifar10_small"``.
        source: images of CIFAR-10, as ``load_cifar10_images`` takes them.

    Returns:
        Columns kind, strength, and one for each distance.
    """
    one_of("dataset", dataset, REAL)
    data, real = load_dataset(dataset), REAL[dataset](source)
    rows = []
    for kind, strength, images in corrupted(real):
        row = {"kind": kind, "strength": strength}
        for metric, features in data.features_of.items():
            parts = real.to_images(images).split(data.batch)
            moments = sum(
                (Moments.of(features(part)) for part in parts[1:]), Moments.of(features(parts[0]))
            )
            row[metric] = moments_distance(moments, data.reference[metric])
        rows.append(row)
    return pd.DataFrame(rows)


def judged(table: pd.DataFrame) -> pd.DataFrame:
    """What a distance should do: grow from each strength to the next, and stay below pure noise.

    Args:
        table: of ``measure_corrupted``.

    Returns:
        A row per corruption, strength and distance: columns kind, strength, metric, value, and the
        truth values grows and below.
    """
    whole = table[table["strength"].isna()].set_index("kind")
    rows = []
    for kind in CORRUPTIONS:
        found = table[table["kind"] == kind].sort_values("strength")
        for metric in (name for name in OF_SAMPLES if name in table):
            before, noise = whole.loc[UNTOUCHED, metric], whole.loc[NOISE, metric]
            for strength, value in zip(found["strength"], found[metric], strict=True):
                row = {"kind": kind, "strength": strength, "metric": metric, "value": value}
                rows.append(row | {"grows": value > before, "below": value < noise})
                before = value
    return pd.DataFrame(rows)


def path_of(dataset: str, results_dir=RESULTS) -> Path:
    """Where the measured table is kept."""
    return Path(results_dir) / dataset / "corruptions.json"


def load_table(dataset: str, results_dir=RESULTS) -> pd.DataFrame:
    """The measured table, from the store.

    Raises:
        ValueError: there is none.
    """
    path = path_of(dataset, results_dir)
    require(path.is_file(), "the table of corruptions", str(path), "measured by this module first")
    return pd.DataFrame(json.loads(path.read_text())["rows"])


@cache
def structureless(dataset: str) -> float:
    """FD of noise that has the data's mean and covariance; infinite where it was not measured."""
    if not path_of(dataset).is_file():
        return math.inf
    table = load_table(dataset).set_index("kind")
    return float(table.loc[GAUSSIAN, "fd"])


def ordered_below(run: Run) -> float:
    """The distance beyond which a Run's metric does not order samples: ``structureless`` for FD."""
    return structureless(run.dataset) if run.metric == "fd" else math.inf


def as_table(table: pd.DataFrame):
    """Distances of corrupted real images: rows corruption and distance, columns strengths.

    Marked is what is not above the strength before it, and what is not below pure noise.

    Args:
        table: of ``measure_corrupted``.
    """
    found = judged(table)
    marks = [" ↓" * (not row.grows) + " > noise" * (not row.below) for row in found.itertuples()]
    found["cell"] = [f"{v:.3g}{mark}" for v, mark in zip(found["value"], marks, strict=True)]
    found["strength"] = found.groupby(["kind", "metric"]).cumcount() + 1
    found["metric"] = found["metric"].map(DISTANCES)
    frame = found.pivot(index=["kind", "metric"], columns="strength", values="cell")
    order = [(kind, name) for kind in CORRUPTIONS for name in found["metric"].unique()]
    frame = frame.loc[order].rename_axis(index=[None, None])
    return frame.style


def ends_as_table(table: pd.DataFrame):
    """The same distances of what has no strength: untouched images, grey ones, noise."""
    whole = table[table["strength"].isna()].set_index("kind").drop(columns="strength")
    whole += 0.0  # no minus before a zero
    return whole.rename(columns=DISTANCES).rename_axis(None).style.format("{:.3g}")


def main(arguments=None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", choices=list(REAL))
    parser.add_argument("--images", help="folder or archive of CIFAR-10")
    given = parser.parse_args(arguments)
    table = measure_corrupted(given.dataset, given.images)
    rows = json.loads(table.to_json(orient="records", double_precision=6))
    content = {"fingerprint": fingerprint_of(load_dataset(given.dataset)), "rows": rows}
    text = json.dumps(content, indent=1)
    write_atomically(path_of(given.dataset), f"{text}\n".encode())
    print(table.to_string(float_format="{:.3f}".format, index=False))
    found = judged(table)
    print(found[~(found["grows"] & found["below"])].to_string(index=False))


if __name__ == "__main__":
    main()
