"""Bad input gets one sentence: the argument, what was given, what is allowed."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path


def short(given) -> str:
    """How something that was given is named in a sentence: one line, and not a long one."""
    text = repr(given)
    if "\n" in text or len(text) > 200:
        return f"something of type {type(given).__name__}"
    return text


def one_of(name: str, given, allowed: Iterable) -> None:
    """Raise ``ValueError`` unless ``given`` is among ``allowed``."""
    allowed = list(allowed)
    if not any(given is each or type(given) is type(each) and given == each for each in allowed):
        choices = ", ".join(repr(value) for value in allowed)
        raise ValueError(f"{name} must be one of {choices}; {short(given)} was given.")


def require(condition: bool, name: str, given, allowed: str) -> None:
    """Raise ``ValueError`` unless ``condition``; ``allowed`` completes "<name> must be ..."."""
    if not condition:
        raise ValueError(f"{name} must be {allowed}; {short(given)} was given.")


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


def is_whole(given) -> bool:
    """Whether something is a whole number, NumPy's included; True and False are none."""
    return isinstance(given, Integral) and not isinstance(given, bool)


def is_number(given) -> bool:
    """Whether something is a real number, NumPy's included; True and False are none."""
    return isinstance(given, Real) and not isinstance(given, bool)


def whole(name: str, given, low: int, high: int, allowed: str | None = None) -> int:
    """``given`` as an int.

    Raises:
        ValueError: it is no whole number from ``low`` to ``high``.
    """
    allowed = allowed or f"a whole number from {low:,} to {high:,}"
    require(is_whole(given) and low <= given <= high, name, given, allowed)
    return int(given)


def different(name: str, given) -> list:
    """``given`` as a list: what is listed twice would count as two.

    Raises:
        ValueError: it is no list, or one that is empty or has an entry twice.
    """
    given = plain(given)
    listed = isinstance(given, list | tuple | range) and len(given) > 0
    require(
        listed and all(list(given).count(each) == 1 for each in given),
        name,
        given,
        "a list of different entries, at least one",
    )
    return list(given)


def flag(name: str, given) -> bool:
    """``given`` as a bool.

    Raises:
        ValueError: it is neither True nor False; a string such as "no" is not.
    """
    require(type(given).__name__ in ("bool", "bool_"), name, given, "True or False")
    return bool(given)


def path(name: str, given) -> Path:
    """``given`` as a Path; ``~`` is the user's home.

    Raises:
        ValueError: it names no place in a file system.
    """
    named = isinstance(given, str | os.PathLike) and str(given) != ""
    require(named, name, given, "a path, as a string or a pathlib.Path")
    return Path(given).expanduser()


def shape(name: str, given) -> tuple[int, ...]:
    """``given`` as a tuple of ints.

    Raises:
        ValueError: it is no list of whole numbers of at least 1.
    """
    each = list(given) if isinstance(given, Iterable) else []
    fits = len(each) > 0 and all(is_whole(size) and size >= 1 for size in each)
    require(fits, name, given, "a tuple of whole numbers of at least 1")
    return tuple(map(int, each))


def plain(value):
    """NumPy's scalars and arrays in a value, its lists and dictionaries, as Python's own."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if hasattr(value, "tolist") and not hasattr(value, "requires_grad"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value))
    return value
