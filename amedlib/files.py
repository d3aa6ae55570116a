"""Files are written whole or not at all, and nothing read here is ever executed."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save


class Damaged(ValueError):
    """A file is truncated, altered, or not of the kind that it should be."""


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Whatever goes wrong while the content of a file is taken in means that it is not ``what``.

    Raises:
        Damaged: something went wrong.
    """
    try:
        yield
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise Damaged(
            f"The file {path} is not {what} ({type(error).__name__}: {reason}); if nothing else "
            "needs it, delete it, and it is made again."
        ) from error


def check_writable(folder: Path, name: str) -> None:
    """Raise ``ValueError`` unless files can be made in ``folder``; makes it if absent."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{name} must be a folder that can be written; {str(folder)!r} was given "
            f"({error.strerror})."
        ) from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` through a temporary file beside it; makes the folder if absent.

    A reader sees the old file or the new one, whatever happens in between.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically."""
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    write_atomically(path, save(tensors, metadata))


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        ValueError: the file is missing; ``Damaged`` if it is truncated or altered beyond reading.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"The file {path} is missing.")
    with reading(path, "a whole safetensors file"), safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """The shapes of the tensors of a safetensors file; only its header is read.

    Raises:
        Damaged: as of ``load_tensors``.
    """
    with reading(path, "a whole safetensors file"), safe_open(path, framework="pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}
