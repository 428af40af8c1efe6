"""Hedge: exponential weights on cumulative losses."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, log, sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from nab.learners.border import checked_discount, checked_losses, zeros
from nab.types import Floats


class HedgeState(NamedTuple):
    """Cumulative ``losses`` less their minimum, ``(n,)`` or ``(n, batch)``, and ``rounds`` seen.

    Both are discounted sums where the learner discounts.
    """

    losses: Floats
    rounds: float


@dataclass(frozen=True)
class Hedge:
    """Exponential weights: ``p_i ~ exp(-rate L_i)``.

    Args:
        rate: learning rate above 0, with regret at most ``ln n / rate + rate T / 8`` (Cesa-Bianchi and Lugosi
            2006, Thm 2.2). None is the anytime rate ``sqrt(8 ln n / t)`` of round t, with regret at most
            ``ln n / rate_T + sum_t rate_t / 8 <= 1.0607 sqrt(T ln n)``.
        discount: in (0, 1]; past losses are multiplied by it every round, so that the learner forgets.

    Raises:
        ValueError: on a rate or discount outside its range.

    >>> learner = Hedge(rate=1.0)
    >>> state = learner.update(learner.init(2), [0.0, 1.0])
    >>> learner.probs(state).round(3).tolist()
    [0.731, 0.269]
    """

    rate: float | None = None
    discount: float = 1.0

    def __post_init__(self) -> None:
        if self.rate is not None and not 0 < self.rate < inf:
            raise ValueError(f"rate must be a finite number above 0, or None, got {self.rate}")
        checked_discount(self.discount)

    def init(self, n: int, batch: int | None = None) -> HedgeState:
        """No loss yet; the first law is uniform."""
        return HedgeState(zeros(n, batch), 0.0)

    def probs(self, state: HedgeState) -> Floats:
        """Softmin of the losses at the rate of the coming round."""
        rate = self.rate or sqrt(8 * log(len(state.losses)) / (state.rounds + 1))
        weights = np.exp(-rate * state.losses)
        return np.asarray(weights / weights.sum(0))

    def update(self, state: HedgeState, losses: ArrayLike, played: ArrayLike | None = None) -> HedgeState:
        """Add the losses; ``played`` does not matter to Hedge."""
        total = self.discount * state.losses + checked_losses(losses, state.losses)
        return HedgeState(total - total.min(0), self.discount * state.rounds + 1)
