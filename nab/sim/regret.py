"""Regret: what a play lost against single drafters, against groups of them, and against sequences of them."""

from __future__ import annotations

from math import ceil
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nab.checks import checked, whole
from nab.losses import expected_rounds
from nab.types import Floats, as_floats


def regret(played: ArrayLike, losses: ArrayLike) -> Floats:
    """Cumulative regret against each drafter: ``R_T[i] = sum_{t <= T} (<played_t, losses_t> - losses_t[i])``.

    The regret against the best drafter in hindsight of the first T rounds is the maximum of row T.

    Args:
        played: laws in force at each round, ``(rounds, n)`` or ``(rounds, n, batch)``; or the drafters that
            were played, whole numbers, ``(rounds,)`` or ``(rounds, batch)``.
        losses: in [0, 1], ``(rounds, n)`` or ``(rounds, n, batch)``: token losses, length losses, any.

    Returns:
        An array shaped like ``losses``.

    Raises:
        ValueError: on another shape, or a drafter that there is not.

    >>> regret([[0.5, 0.5]], [[0.0, 1.0]]).tolist(), regret([1], [[0.0, 1.0]]).tolist()
    ([[0.5, -0.5]], [[1.0, 0.0]])
    """
    array = as_floats(losses)
    return np.asarray((lost(played, array)[:, None] - array).cumsum(0))


def lost(played: ArrayLike, losses: ArrayLike) -> Floats:
    """What each round cost the play, in expectation over its laws: ``(rounds,)`` or ``(rounds, batch)``.

    Args and errors as ``regret``.
    """
    array, shown = as_floats(losses), np.asarray(played)
    if array.ndim not in (2, 3):
        raise ValueError(f"losses must have shape (rounds, n) or (rounds, n, batch), got {array.shape}")
    if shown.ndim == array.ndim - 1 and shown.dtype.kind in "iu":
        n = array.shape[1]
        if shown.shape != array[:, 0].shape:
            raise ValueError(f"played must have shape {array[:, 0].shape}, got {shown.shape}")
        if not ((shown >= 0) & (shown < n)).all():
            raise ValueError(f"played drafters must lie in 0 .. {n - 1}, got {shown.min()} .. {shown.max()}")
        return np.asarray(np.take_along_axis(array, shown[:, None], 1)[:, 0])
    if shown.shape != array.shape:
        raise ValueError(f"played has shape {shown.shape}, losses {array.shape}: must be equal")
    return np.asarray((shown * array).sum(1))


def quantile(regrets: Floats, eps: float) -> Any:
    """Regret against the eps-quantile: the largest r such that a share eps of the drafters has regret >= r.

    Args:
        regrets: against each drafter, ``(n,)`` or ``(n, batch)``.
        eps: in (0, 1]; up to 1 / n it is the regret against the best drafter.

    Returns:
        A number, or ``(batch,)``.

    >>> quantile(np.array([1.0, 3.0, 2.0, 0.0]), 0.5)
    np.float64(2.0)
    """
    checked("eps", eps, high=1, closed=True)
    if not len(regrets):
        raise ValueError("regrets must be of one drafter at least, got none")
    return np.sort(regrets, axis=0)[-max(ceil(eps * len(regrets) * (1 - 1e-12)), 1)]


def best_sequence(losses: ArrayLike, switches: int) -> Floats:
    """Least loss of a sequence of drafters that changes at most m times, for m = 0 .. ``switches``.

    Dynamic programming over (switches so far, last drafter).

    Args:
        losses: ``(rounds, n)`` or ``(rounds, n, batch)``.
        switches: at least 0.

    Returns:
        ``(switches + 1,)`` or ``(switches + 1, batch)``.

    >>> best_sequence([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]], 1).tolist()
    [1.0, 0.0]
    """
    whole("switches", switches, 0)
    array = as_floats(losses)
    if array.ndim not in (2, 3):
        raise ValueError(f"losses must have shape (rounds, n) or (rounds, n, batch), got {array.shape}")
    least = np.zeros((switches + 1, *array.shape[1:]))
    for loss in array:
        least[1:] = np.minimum(least[1:], least[:-1].min(1, keepdims=True))
        least += loss
    return np.asarray(least.min(1))


def tracking_regret(played: ArrayLike, losses: ArrayLike, switches: int) -> Any:
    """Loss of the play beyond that of the best sequence of drafters with at most so many switches.

    Args:
        played: laws or drafters, as in ``regret``.
        losses: ``(rounds, n)`` or ``(rounds, n, batch)``.
        switches: at least 0; with 0 it is the regret against the best drafter.

    Returns:
        A number, or ``(batch,)``.
    """
    return lost(played, losses).sum(0) - best_sequence(losses, switches)[-1]


def stopping_time_regret(rounds: float, realised: Floats, draft_len: int) -> float:
    """Target forwards a text took beyond the mean number its best single drafter would have taken.

    Exact given the text: ``nab.losses.expected_rounds``. Source of the notion: Hou et al. 2025 (BanditSpec).

    Args:
        rounds: that the policy took for the text.
        realised: acceptances of all positions of the text, ``(positions, n)``.
        draft_len: drafted tokens a round, at least 1.
    """
    return float(rounds - expected_rounds(realised, draft_len).min())


def switches(choices: NDArray[Any]) -> Any:
    """How often the choice changed from one round to the next: ``(rounds,)`` to a number, or by batch."""
    return np.count_nonzero(np.diff(choices, axis=0), axis=0)
