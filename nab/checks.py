"""Numbers that are checked where they come in, in the same words everywhere."""

from __future__ import annotations

from math import inf
from numbers import Integral, Real


def whole(name: str, value: int, least: int) -> None:
    """Raise ValueError unless ``value`` is a whole number, at least ``least``."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number, at least {least}, got {value!r}")


def checked(name: str, value: float, low: float = 0, high: float = inf, *, closed: bool = False) -> None:
    """Raise ValueError unless ``low < value < high``, or ``low < value <= high`` where ``closed``."""
    if (
        not isinstance(value, Real)
        or isinstance(value, bool)
        or not (low < value < high or (closed and value == high))
    ):
        raise ValueError(f"{name} must lie in ({low}, {high}{']' if closed else ')'}, got {value}")
