"""Bad input gets one sentence: the argument, what was given, what is allowed."""

from collections.abc import Iterable


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
