"""What every learner checks at its border, once, in the same words."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nab.checks import checked, whole
from nab.learners.columns import every, inner, least, total
from nab.types import Floats, Learner, as_floats

BITS_OF_ONE = int(np.float64(1).view(np.uint64))
"""A float64 is in [0, 1], and not -0.0, if its bits, as an unsigned integer, are at most these."""


def zeros(n: int, batch: int | None) -> Floats:
    """Zeros of shape ``(n,)`` or ``(n, batch)``.

    Raises:
        ValueError: if ``n`` or ``batch`` is below 1.
    """
    whole("n", n, 1)
    if batch is not None:
        whole("batch", batch, 1)
    return np.zeros(n if batch is None else (n, batch))


def checked_prior(prior: ArrayLike | None, n: int, batch: int | None) -> Floats:
    """The prior as ``(n,)``, or ``(n, 1)`` for a batch that shares it; uniform where it is None.

    Raises:
        ValueError: on another shape, an entry below 1e-250, or a sum other than 1 (to 1e-9).
    """
    shape = zeros(n, batch).shape
    law = np.full(n, 1 / n) if prior is None else as_floats(prior).copy()
    if law.shape not in ((n,), shape):
        raise ValueError(f"prior must have shape {(n,)} or {shape}, got {law.shape}")
    if not (law >= 1e-250).all():
        low = law[~(law >= 1e-250)][0]
        raise ValueError(f"prior must be at least 1e-250 (leave a drafter out instead), got {low}")
    if not (abs(law.sum(0) - 1) <= 1e-9).all():
        raise ValueError(f"prior must sum to 1 over drafters, got {law.sum(0)}")
    return law if law.shape == shape else law[:, None]


def check_shape(name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
    """Raise ValueError unless ``array`` has this shape."""
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")


def checked_losses(losses: ArrayLike, shape: tuple[int, ...], name: str = "losses") -> Floats:
    """``losses`` as float64 of this shape.

    Raises:
        ValueError: on another shape, or any value that is not in [0, 1] (NaN included).
    """
    array = as_floats(losses)
    check_shape(name, array, shape)
    bits = array.view(np.uint64)
    if bits.item(bits.argmax()) > BITS_OF_ONE:
        outside = array[~((array >= 0) & (array <= 1))]
        if outside.size:
            raise ValueError(f"{name} must lie in [0, 1], got {outside[0]}")
    return array


def checked_played(played: ArrayLike, shape: tuple[int, ...]) -> Floats:
    """The law that was in force when a round was decided, as float64 of this shape.

    Raises:
        ValueError: on another shape, an entry below 0 (NaN included), or a sum other than 1 (to 1e-6, as a
            law may come from a device's float32).
    """
    law = as_floats(played)
    check_shape("played", law, shape)
    if not every((low := least(law)) >= 0):
        raise ValueError(f"played must be a law, with no entry below 0, got {low}")
    if not every(abs((mass := total(law)) - 1) <= 1e-6):
        raise ValueError(f"played must be a law, with sum 1 over drafters, got {mass}")
    return law


def regret_step(
    learner: Learner[Any], state: Any, losses: ArrayLike, played: ArrayLike | None, shape: tuple[int, ...]
) -> Floats:
    """One round's ``<played, losses> - losses_i``; what was played is by default ``probs(state)``."""
    new = checked_losses(losses, shape)
    law = learner.probs(state) if played is None else checked_played(played, shape)
    return np.asarray(inner(law, new) - new)


def checked_arms(arm: ArrayLike, n: int, batch: tuple[int, ...]) -> NDArray[np.intp]:
    """One arm per query, shape ``batch``: ``()`` or ``(batch,)``.

    Raises:
        ValueError: on another shape, or an arm outside 0 .. n - 1.
    """
    arms = np.asarray(arm)
    check_shape("arm", arms, batch)
    if arms.dtype.kind not in "iu":
        raise ValueError(f"arm must be an integer, got {arm!r}")
    low, high = arms.item(arms.argmin()), arms.item(arms.argmax())
    if low < 0 or high >= n:
        raise ValueError(f"arm must lie in 0 .. {n - 1}, got {low if low < 0 else high}")
    return arms


def checked_rate(rate: float | None) -> None:
    """Raise ValueError unless ``rate`` is None or in (0, 1e300], where ``rate * loss`` is finite."""
    if rate is not None:
        checked("rate", rate, high=1e300, closed=True)
