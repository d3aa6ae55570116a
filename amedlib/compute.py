"""How a device is used: precision, batches that fit its memory, threads."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from threadpoolctl import threadpool_limits

from amedlib.checks import one_of, require
from amedlib.wrapper import Wrapper, unwrapped


def halved(size: int, what: str, error: Exception) -> int:
    """Half as many samples at a time, after the memory did not suffice for ``size``.

    Raises:
        RuntimeError: there is nothing left to halve.
    """
    if size == 1:
        raise RuntimeError(
            f"The device's memory does not suffice for {what} with a single sample: {error}"
        ) from error
    return size // 2


PRECISIONS = {"float32": None, "float16": torch.float16, "bfloat16": torch.bfloat16}


class _HalfPrecision(Wrapper):
    def __init__(self, denoiser, dtype):
        super().__init__(denoiser)
        self.dtype = dtype

    def __call__(self, x, t, labels=None, **options):
        with torch.autocast(x.device.type, self.dtype):
            return super().__call__(x, t, labels, **options)


def in_precision(denoiser, precision: str):
    """The denoiser with the matrix products of its network in half precision.

    Normalisations, softmax and all outside the network stay as they are (``torch.autocast``).

    Args:
        precision: ``"float32"`` changes nothing; ``"float16"`` or ``"bfloat16"``.
    """
    one_of("precision", precision, PRECISIONS)
    dtype = PRECISIONS[precision]
    return denoiser if dtype is None else _HalfPrecision(denoiser, dtype)


def check_precision(denoiser) -> None:
    """That a network has its weights in a precision in which its device computes well.

    Raises:
        ValueError: they are in half precision on a CPU.
    """
    network = unwrapped(denoiser)
    for each in network.parameters() if isinstance(network, torch.nn.Module) else ():
        half = each.is_floating_point() and each.dtype.itemsize < 4 and each.device.type == "cpu"
        allowed = "in float32 on a CPU; move it to a GPU first, or call .float()"
        require(not half, f"weights of {type(network).__name__}", each.dtype, allowed)


def in_batches(seeds: list[int], batch: int, work: Callable) -> Iterator:
    """``work(part)`` of one part of the seeds after the other; halved if the memory is too small.

    Raises:
        RuntimeError: the memory does not suffice for a single sample.
    """
    first = 0
    while first < len(seeds):
        part = seeds[first : first + batch]
        try:
            found = work(part)
        except torch.OutOfMemoryError as error:
            batch = halved(len(part), "sampling", error)
            continue
        yield found
        first += len(part)


def best_device(device: str | torch.device | None) -> str:
    """The device that is asked for; with ``None`` the GPU, if there is one.

    Raises:
        ValueError: there is no such device, or none that knows float64.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        require(isinstance(device, str | torch.device), "device", device, "a name")
        torch.empty(0, dtype=torch.float64, device=device)
    except (RuntimeError, AssertionError, TypeError, ValueError, NotImplementedError):
        found = ["'cpu'", *(f"'cuda:{i}'" for i in range(torch.cuda.device_count()))]
        require(False, "device", device, f"one that is here: {', '.join(found)}")
    return str(device)


@contextmanager
def one_thread():
    """One thread in this process, for PyTorch and for what NumPy and SciPy call."""
    before = torch.get_num_threads()
    with threadpool_limits(1):
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)
