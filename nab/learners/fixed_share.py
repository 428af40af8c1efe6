"""Fixed share: Hedge for a best drafter that changes now and then."""

from __future__ import annotations

from dataclasses import dataclass
from math import log, log1p, sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from nab.checks import checked
from nab.learners.border import checked_losses, checked_played, checked_prior, checked_rate, zeros
from nab.learners.columns import least, total
from nab.types import Floats


class FixedShareState(NamedTuple):
    """The ``law`` of the coming round, ``(n,)`` or ``(n, batch)``, and the ``prior``."""

    law: Floats
    prior: Floats


@dataclass(frozen=True)
class FixedShare:
    """Hedge that hands a share of all weight back to the prior every round.

    ``w_{t+1} = (1 - share) w_t exp(-rate l_t) / sum + share prior``: exponential weights over all sequences
    of drafters, each switching with probability ``share`` a round. Regret against the best sequence with m
    switches is at most ``[ln n + m ln(n / share) - (T - 1 - m) ln(1 - share + share / n)] / rate + rate T /
    8`` (Herbster and Warmuth 1998; ``nab.sim.bounds.fixed_share``).

    Args:
        share: in (1e-300, 1]; about one over the rounds between changes.
        rate: learning rate, in (0, 1e300]. None is ``sqrt(8 k)``, k the nats that the prior over sequences
            charges a round where a switch comes every ``1 / share`` rounds: the best constant rate there.

    Raises:
        ValueError: on a share or rate outside its range.

    >>> learner = FixedShare(0.1, rate=2.0)
    >>> state = learner.update(learner.init(2), [0.0, 1.0])
    >>> learner.probs(state).round(3).tolist()
    [0.843, 0.157]
    """

    share: float
    rate: float | None = None

    def __post_init__(self) -> None:
        checked("share", self.share, low=1e-300, high=1, closed=True)
        checked_rate(self.rate)

    def init(self, n: int, batch: int | None = None, *, prior: ArrayLike | None = None) -> FixedShareState:
        """The first law is the prior, by default uniform."""
        law = checked_prior(prior, n, batch)
        return FixedShareState(np.array(np.broadcast_to(law, zeros(n, batch).shape)), law)

    def probs(self, state: FixedShareState) -> Floats:
        """The law of the coming round, as the last update left it."""
        return state.law.copy()

    def update(
        self, state: FixedShareState, losses: ArrayLike, played: ArrayLike | None = None
    ) -> FixedShareState:
        """Weigh by the losses, then share; ``played`` does not matter."""
        new = checked_losses(losses, state.law.shape)
        if played is not None:
            checked_played(played, new.shape)
        rate = self.rate or tuned_rate(self.share, len(new))
        weights = state.law * np.exp(-rate * (new - least(new)))
        weights *= (1 - self.share) / total(weights)
        return FixedShareState(weights + self.share * state.prior, state.prior)


def tuned_rate(share: float, n: int) -> float:
    """``sqrt(8 k)``, k the nats a round that a sequence with a ``share`` of switches costs."""
    stay = log1p(-share + share / n)
    return sqrt(8 * (share * log(n / share) - (1 - share) * stay)) or 1.0
