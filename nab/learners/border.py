"""What every learner checks at its border, once, in the same words."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from nab.types import Floats, as_floats


def zeros(n: int, batch: int | None) -> Floats:
    """Zeros of shape ``(n,)`` or ``(n, batch)``.

    Raises:
        ValueError: if ``n`` or ``batch`` is below 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1 drafter, got {n}")
    if batch is not None and batch < 1:
        raise ValueError(f"batch must be at least 1 query, got {batch}")
    return np.zeros(n if batch is None else (n, batch))


def checked_losses(losses: ArrayLike, like: Floats) -> Floats:
    """``losses`` as float64 shaped like ``like``.

    Raises:
        ValueError: on another shape, or any value that is not in [0, 1] (NaN included).
    """
    array = as_floats(losses)
    if array.shape != like.shape:
        raise ValueError(f"losses must have shape {like.shape}, got {array.shape}")
    if not (array.min() >= 0 and array.max() <= 1):
        bad = array[~((array >= 0) & (array <= 1))].flat[0]
        raise ValueError(f"losses must lie in [0, 1], got {bad}")
    return array


def checked_discount(discount: float) -> None:
    """Raise ValueError unless ``discount`` lies in (0, 1]."""
    if not 0 < discount <= 1:
        raise ValueError(f"discount must lie in (0, 1], got {discount}")
