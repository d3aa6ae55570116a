"""Bad input gets one sentence: the argument, what was given, what is allowed."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager


def one_of(name: str, given, allowed: Iterable) -> None:
    """Raise ``ValueError`` unless ``given`` is among ``allowed``."""
    allowed = list(allowed)
    if given not in allowed:
        choices = ", ".join(repr(value) for value in allowed)
        raise ValueError(f"{name} must be one of {choices}; {given!r} was given.")


def require(condition: bool, name: str, given, allowed: str) -> None:
    """Raise ``ValueError`` unless ``condition``; ``allowed`` completes "<name> must be ..."."""
    if not condition:
        raise ValueError(f"{name} must be {allowed}; {given!r} was given.")


@contextmanager
def of_the_study(what: str) -> Iterator[None]:
    """Say how to install what is missing, where ``what`` needs packages of the study.

    Raises:
        ImportError: one is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{what} needs the package {error.name}, which comes with the study: "
            "pip install 'amedlib[study]'."
        ) from error
