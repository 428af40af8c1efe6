"""Sums, extremes and comparisons over drafters, axis 0, quick on a handful of them.

With eight drafters a learner's time is the number of calls into numpy, and a reduction costs three times a
product or a search: so sums of ``(n,)`` are products with ones, extremes are found by their place. All take
``(n,)``, where the result is a number, and ``(n, batch)``, where it is ``(batch,)``.
"""

from __future__ import annotations

from functools import cache
from math import log
from typing import Any

import numpy as np

from nab.types import Floats

ZERO, ONE, THREE = np.asarray(0.0), np.asarray(1.0), np.asarray(3.0)
"""As operands: numpy converts a Python number anew in every call, which doubles the cost of a small one."""


@cache
def _ones(n: int) -> Floats:
    ones = np.ones(n)
    ones.setflags(write=False)
    return ones


@cache
def quadrature(points: int) -> tuple[Floats, Floats]:
    """Nodes in (-1, 1) and weights of Gauss and Legendre's rule; numpy's is slow to import, so not before."""
    return np.polynomial.legendre.leggauss(points)


def total(a: Floats) -> Any:
    """``sum_i a_i``."""
    return _ones(len(a)).dot(a)


def inner(a: Floats, b: Floats) -> Any:
    """``sum_i a_i b_i``; a of b's shape, or ``(n, 1)``, the same for a whole batch."""
    if a.ndim == 1:
        return a.dot(b)
    return a[:, 0].dot(b) if a.shape[1] == 1 else total(a * b)


def least(a: Floats) -> Any:
    """``min_i a_i``."""
    return a.item(a.argmin()) if a.ndim == 1 else np.minimum.reduce(a, 0)


def greatest(a: Floats) -> Any:
    """``max_i a_i``."""
    return a.item(a.argmax()) if a.ndim == 1 else np.maximum.reduce(a, 0)


def every(condition: Any) -> bool:
    """Whether a comparison, of one number or of an array, holds throughout."""
    return bool(condition.item(condition.argmin()) if isinstance(condition, np.ndarray) else condition)


def ln(x: Any) -> Any:
    """Natural logarithm of a number or of an array."""
    return np.log(x) if isinstance(x, np.ndarray) else log(x)
