"""NormalHedge: no learning rate, no horizon."""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from nab.learners.border import checked_discount, checked_losses, zeros
from nab.types import Floats, as_floats


class NormalHedgeState(NamedTuple):
    """Regret of the play against each drafter, ``(n,)`` or ``(n, batch)``, and ``rounds`` seen.

    Both are discounted sums where the learner discounts.
    """

    regret: Floats
    rounds: float


@dataclass(frozen=True)
class NormalHedge:
    """``p_i ~ [R_i]_+ exp([R_i]_+^2 / 2c)`` with c such that ``mean_i exp([R_i]_+^2 / 2c) = e``.

    Source: Chaudhuri, Freund, Hsu 2009. Drafters without positive regret get weight exactly 0; where all
    regrets are within rounding (1e-12 a round) of 0 or below, the law is uniform.

    Args:
        discount: in (0, 1]; past regrets are multiplied by it every round, so that the learner forgets.

    Raises:
        ValueError: on a discount outside (0, 1].

    >>> learner = NormalHedge()
    >>> state = learner.update(learner.init(3), [0.0, 0.5, 1.0])
    >>> learner.probs(state).tolist()
    [1.0, 0.0, 0.0]
    """

    discount: float = 1.0

    def __post_init__(self) -> None:
        checked_discount(self.discount)

    def init(self, n: int, batch: int | None = None) -> NormalHedgeState:
        """No regret yet; the first law is uniform."""
        return NormalHedgeState(zeros(n, batch), 0.0)

    def probs(self, state: NormalHedgeState) -> Floats:
        """Weights of the half-normal potential at the scale that solves its defining equation."""
        top = state.regret.max(0)
        positive = top > 1e-12 * (1 + state.rounds)
        share = np.where(positive, state.regret / np.where(positive, top, 1), 1).clip(0)
        squares = share**2
        weights = share * np.exp(_potential_scale(squares) * (squares - 1))
        return np.asarray(weights / weights.sum(0))

    def update(
        self, state: NormalHedgeState, losses: ArrayLike, played: ArrayLike | None = None
    ) -> NormalHedgeState:
        """Add the regret of the law that was played, by default ``probs(state)``."""
        losses = checked_losses(losses, state.regret)
        played = self.probs(state) if played is None else as_floats(played)
        regret = self.discount * state.regret + ((played * losses).sum(0) - losses)
        return NormalHedgeState(regret, self.discount * state.rounds + 1)


def _potential_scale(squares: Floats) -> Floats:
    """Root ``lam`` of ``ln mean exp(lam squares) = 1``, squares in [0, 1] with maximum 1 along axis 0.

    The left side is convex and increasing with its root in [1, 1 + ln n], so Newton started at the right end
    falls monotonically to it and needs no bracket: 5 steps at n = 8 and 7 at n = 10^6 reach 1e-13.
    """
    lam = np.full(squares.shape[1:], 1 + log(len(squares)))
    for _ in range(7):
        powers = np.exp(lam * (squares - 1))
        mean = powers.mean(0)
        lam = np.maximum(lam - (lam + np.log(mean) - 1) * mean / (squares * powers).mean(0), 1)
    return lam
