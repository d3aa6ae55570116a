"""CIFAR-10: its images, and the classifier whose features carry their Frechet distance.

60,000 colour images of ten classes, 32x32 pixels (Krizhevsky, "Learning Multiple Layers of Features
from Tiny Images", 2009). They do not come with this library: they are read from a folder or an
archive, and only the moments of their features are shipped.
"""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from amedlib.checks import one_of, require
from amedlib.metrics import Moments

# Alphabetical, which is the order of the labels too.
CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
COUNTS = {"train": 50_000, "test": 10_000}


class Images(NamedTuple):
    """One part of the data set.

    Attributes:
        pixels: [n, 3, 32, 32] uint8.
        labels: [n] int64, indices into ``CLASSES``.
    """

    pixels: torch.Tensor
    labels: torch.Tensor


def load_cifar10_images(source: Path | str, counts=COUNTS) -> dict[str, Images]:
    """The parts ``"train"`` and ``"test"`` of CIFAR-10.

    Args:
        source: a folder, or a tar archive of any compression, with ``train/CLASS/*.jpg`` and
            ``test/CLASS/*.jpg``; or the archive cifar-10-binary.tar.gz as published.
        counts: how many images each part must have.

    Raises:
        ValueError: there is no such file or folder, it holds something else, or another number of
            images.
    """
    source = Path(source)
    require(source.exists(), "images", str(source), "an existing folder or tar archive")
    found = {part: ([], []) for part in COUNTS}
    try:
        for part, label, pixels in _read(source):
            found[part][0].append(pixels)
            found[part][1].append(label)
    except (OSError, EOFError, tarfile.TarError) as error:  # Pillow raises OSErrors
        raise ValueError(f"The images {source} cannot be read: {error}.") from error
    for part, (pixels, _) in found.items():
        wanted = f"{counts[part]} in {part}/CLASS/*.jpg, of all ten classes"
        require(
            len(pixels) == counts[part], f"the number of images in {source}", len(pixels), wanted
        )
    return {
        part: Images(torch.from_numpy(np.stack(pixels)), torch.tensor(labels))
        for part, (pixels, labels) in found.items()
    }


def _read(source: Path) -> Iterator[tuple[str, int, np.ndarray]]:
    """Part, label and pixels of every image."""
    if source.is_dir():
        paths = sorted(p for part in COUNTS for p in (source / part).glob("*/*") if p.is_file())
        for path in paths:
            yield from _decoded(path.relative_to(source), path.read_bytes())
        return
    with tarfile.open(source) as archive:  # nothing is unpacked to the disk
        for member in archive:
            if member.isfile():
                yield from _decoded(Path(member.name), archive.extractfile(member).read())


def _decoded(path: Path, content: bytes):
    """The images of one file: a picture, or one of the published binary files."""
    if path.suffix == ".bin":
        # A record is the label and the three colour planes, a byte each.
        part = "test" if path.stem == "test_batch" else "train"
        size = 1 + 3 * 32 * 32
        require(len(content) % size == 0, f"the bytes of {path}", len(content), f"{size} per image")
        records = np.frombuffer(content, np.uint8).reshape(-1, size)
        for record in records:
            yield part, int(record[0]), record[1:].reshape(3, 32, 32)
    elif path.suffix == ".jpg":
        from PIL import Image  # only those who train need it

        require(len(path.parts) >= 3, "the path of an image", str(path), "PART/CLASS/NAME")
        part, name = path.parts[-3:-1]
        one_of("the part of an image", part, COUNTS)
        one_of("the class of an image", name, CLASSES)
        with Image.open(io.BytesIO(content)) as picture:
            require(picture.size == (32, 32), f"the size of {path}", picture.size, "32x32 pixels")
            pixels = np.asarray(picture.convert("RGB")).transpose(2, 0, 1)
        yield part, CLASSES.index(name), pixels


def scaled(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels to float32 in [-1, 1]; ``quantise_edm`` is the way back."""
    return pixels.float() / 127.5 - 1


class _Residual(nn.Module):
    """Two convolutions with normalisation before each; the first may halve the resolution."""

    def __init__(self, cin, cout, stride):
        super().__init__()
        self.norm0, self.norm1 = nn.BatchNorm2d(cin), nn.BatchNorm2d(cout)
        self.conv0 = nn.Conv2d(cin, cout, 3, stride, padding=1, bias=False)
        self.conv1 = nn.Conv2d(cout, cout, 3, padding=1, bias=False)
        self.skip = nn.Identity() if cin == cout else nn.Conv2d(cin, cout, 1, stride, bias=False)

    def forward(self, x):
        y = self.conv0(F.silu(self.norm0(x)))
        return self.skip(x) + self.conv1(F.silu(self.norm1(y)))


class Cifar10Classifier(nn.Module):
    """A small residual network, whose features carry the Frechet distance of CIFAR-10.

    It is smooth (SiLU), so that its features can serve as a perceptual distance too.

    Args:
        width: channels at full resolution; twice and four times as many at half and a quarter.
    """

    FEATURES = 128

    def __init__(self, width: int = 64):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(
            _Residual(width, width, 1),
            _Residual(width, 2 * width, 2),
            _Residual(2 * width, 2 * width, 1),
            _Residual(2 * width, 4 * width, 2),
        )
        self.norm = nn.BatchNorm2d(4 * width)
        self.hidden = nn.Linear(4 * width, self.FEATURES)
        self.out = nn.Linear(self.FEATURES, len(CLASSES))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Penultimate features [B, 128] of images [B, 3, 32, 32] in [-1, 1]."""
        x = F.silu(self.norm(self.blocks(self.stem(x)))).mean((2, 3))
        return F.silu(self.hidden(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [B, 10] of images [B, 3, 32, 32] in [-1, 1]."""
        return self.out(self.features(x))


_FIELDS = ("count", "total", "outer")


def moments_to_tensors(blocks: dict[str, list[Moments]]) -> dict[str, torch.Tensor]:
    """Moments of blocks of images, by name, as tensors for a file."""
    return {
        f"{name}/{field}": torch.stack([torch.as_tensor(getattr(m, field)) for m in each])
        for name, each in blocks.items()
        for field in _FIELDS
    }


def moments_from_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, list[Moments]]:
    """What ``moments_to_tensors`` was given."""
    blocks = {}
    for name in (key.removesuffix("/count") for key in tensors if key.endswith("/count")):
        count, total, outer = (tensors[f"{name}/{field}"].numpy() for field in _FIELDS)
        blocks[name] = [
            Moments.from_sums(int(n), *sums) for n, *sums in zip(count, total, outer, strict=True)
        ]
    return blocks
