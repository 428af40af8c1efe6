"""Regret: what the play lost against every single drafter."""

from __future__ import annotations

import numpy as np

from nab.types import Floats


def regret(played: Floats, losses: Floats) -> Floats:
    """Cumulative regret against each drafter: ``R_T[i] = sum_{t <= T} (<played_t, losses_t> - losses_t[i])``.

    The regret against the best drafter in hindsight of the first T rounds is the maximum of row T.

    Args:
        played: laws in force at each round, ``(rounds, n)`` or ``(rounds, n, batch)``.
        losses: in [0, 1], likewise.

    Returns:
        An array of the same shape.

    >>> regret(np.array([[0.5, 0.5]]), np.array([[0.0, 1.0]])).tolist()
    [[0.5, -0.5]]
    """
    if np.shape(played) != np.shape(losses):
        raise ValueError(f"played has shape {np.shape(played)}, losses {np.shape(losses)}: must be equal")
    return np.asarray(((played * losses).sum(1, keepdims=True) - losses).cumsum(0))
