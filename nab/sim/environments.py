"""Loss matrices: sequences on which learners are at their worst."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from nab.sim.play import against
from nab.types import Floats, Learner


def leader_killer(rounds: int) -> Floats:
    """Two drafters, ``(rounds, 2)``: after one half loss each is wrong whenever it leads.

    Following the leader loses every round but the first, each drafter loses half of them.

    >>> leader_killer(4).tolist()
    [[0.5, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]
    """
    losses = np.tile([[1.0, 0.0], [0.0, 1.0]], (rounds // 2 + 1, 1))[:rounds]
    losses[0] = [0.5, 0.0]
    return losses


def comb(rounds: int, n: int) -> Floats:
    """``(rounds, n)``: the first two drafters take turns at being right, all others are always wrong.

    >>> comb(2, 3).tolist()
    [[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]]
    """
    losses = np.ones((rounds, n))
    losses[::2, 0] = losses[1::2, 1] = 0
    return losses


Answer = Callable[[Floats], Floats]
"""An adversary's losses of a round, ``(n,)``, from the law it sees played, ``(n,)``."""


def anti_leader(law: Floats) -> Floats:
    """Loss 1 for the likeliest drafter alone."""
    return np.asarray(np.arange(len(law)) == law.argmax(), dtype=float)


def half_mass(law: Floats) -> Floats:
    """Loss 1 for the likeliest drafters that together hold half of the mass."""
    order = np.argsort(-law, kind="stable")
    losses = np.zeros(len(law))
    losses[order[: 1 + np.searchsorted(law[order].cumsum(), 0.5)]] = 1
    return losses


def adaptive(learner: Learner[Any], n: int, rounds: int, answer: Answer, *, delay: ArrayLike = 0) -> Floats:
    """The losses, ``(rounds, n)``, that an adversary gives who sees every law before it answers.

    The learner learns of them ``delay`` rounds late, as in ``nab.sim.play``.
    """
    losses = np.empty((rounds, n))

    def answered(t: int, law: Floats) -> Floats:
        losses[t] = given = answer(law)
        return given

    against(learner, learner.init(n), rounds, answered, delay)
    return losses
