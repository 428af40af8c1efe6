"""AdaNormalHedge: no parameter, regret by each drafter's own excess loss; and its strongly adaptive form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from nab.learners.border import checked_prior, regret_step, zeros
from nab.learners.columns import ONE, THREE, ZERO, every, greatest, total
from nab.types import Floats


class AdaNormalHedgeState(NamedTuple):
    """``regret`` against each drafter, ``spread`` (the sum of its absolute steps), and the ``prior``."""

    regret: Floats
    spread: Floats
    prior: Floats


@dataclass(frozen=True)
class AdaNormalHedge:
    """``w_i ~ prior_i (phi(R_i + 1, C_i + 1) - phi(R_i - 1, C_i + 1))``, ``phi(R, C) = exp([R]_+^2 / 3C)``.

    C_i is the sum of ``|r_t,i|``, the steps of the regret R_i. No parameter; regret against drafter i is at
    most ``sqrt(3 C_i (ln n + ln B))`` with B of order ``ln T`` (Luo and Schapire 2015, Thm 1): small where
    the drafter is seldom better or worse than the play. Where no drafter has weight, as can happen under
    late feedback, the law is the prior.

    >>> learner = AdaNormalHedge()
    >>> state = learner.update(learner.init(3), [0.0, 0.5, 1.0])
    >>> learner.probs(state).round(3).tolist()
    [0.589, 0.359, 0.052]
    """

    def init(
        self, n: int, batch: int | None = None, *, prior: ArrayLike | None = None
    ) -> AdaNormalHedgeState:
        """No regret yet; the first law is the prior, by default uniform."""
        none = zeros(n, batch)
        return AdaNormalHedgeState(none, none, checked_prior(prior, n, batch))

    def probs(self, state: AdaNormalHedgeState) -> Floats:
        """Differences of the potential, normalised."""
        high, low = _exponents(state.regret, state.spread)
        weights = _difference(high, low, greatest(high))
        weights *= state.prior
        mass = total(weights)
        if not every(mass > 0):
            weights, mass = np.where(mass > 0, weights, state.prior), np.where(mass > 0, mass, 1)
        weights /= mass
        return weights

    def update(
        self, state: AdaNormalHedgeState, losses: ArrayLike, played: ArrayLike | None = None
    ) -> AdaNormalHedgeState:
        """Add the regret of the law that was played, by default ``probs(state)``."""
        step = regret_step(self, state, losses, played, state.regret.shape)
        return AdaNormalHedgeState(state.regret + step, state.spread + np.abs(step), state.prior)


def _exponents(regret: Floats, spread: Floats) -> tuple[Floats, Floats]:
    """``[R + 1]_+^2 / 3(C + 1)`` and ``[R - 1]_+^2 / 3(C + 1)``."""
    wide = spread + ONE
    wide *= THREE
    high = regret + ONE
    np.maximum(high, ZERO, out=high)
    high *= high
    high /= wide
    low = regret - ONE
    np.maximum(low, ZERO, out=low)
    low *= low
    low /= wide
    return high, low


def _difference(high: Floats, low: Floats, top: Floats) -> Floats:
    """``exp(high - top) - exp(low - top)``, in place; ``top`` keeps it finite."""
    high -= top
    low -= top
    np.exp(high, high)
    high -= np.exp(low, low)
    return high


class AdaNormalHedgeTVState(NamedTuple):
    """``regret`` and ``spread`` since each level's last restart, ``(levels, n)`` or ``(levels, n, batch)``.

    Level j restarts at every multiple of 2^j; ``rounds`` have been seen, and levels with 2^j <= rounds + 1
    exist.
    """

    regret: Floats
    spread: Floats
    rounds: int
    prior: Floats


@dataclass(frozen=True)
class AdaNormalHedgeTV:
    """AdaNormalHedge that is good on every interval of rounds at once: it follows changes, without parameter.

    Level j restarts AdaNormalHedge at every multiple of 2^j (a geometric cover of time), and all pairs of
    drafter and running level share one law, each pair with the prior of its interval: ``2^-(j+1) / (k (k +
    1))`` for the k-th one of level j. On each interval of the cover regret is at most ``sqrt(3 C_i ln(n B /
    prior))`` (``nab.sim.bounds.ada_normal_hedge_tv``), and every stretch of rounds is a chain of at most
    two of them a level. After Luo and Schapire 2015, section 5, who restart at every round; the
    cover (Daniely, Gonen, Shalev-Shwartz 2015) keeps a round's cost at O(n log t).

    >>> learner = AdaNormalHedgeTV()
    >>> state = learner.init(2)
    >>> for losses in [[0.0, 1.0]] * 40 + [[1.0, 0.0]] * 8:
    ...     state = learner.update(state, losses)
    >>> learner.probs(state).argmax()
    np.int64(1)
    """

    def init(
        self, n: int, batch: int | None = None, *, prior: ArrayLike | None = None
    ) -> AdaNormalHedgeTVState:
        """No regret yet; the first law is the prior, by default uniform."""
        none = zeros(n, batch)[None]
        return AdaNormalHedgeTVState(none, none, 0, checked_prior(prior, n, batch))

    def probs(self, state: AdaNormalHedgeTVState) -> Floats:
        """Differences of the potential of all pairs, summed over levels and normalised."""
        high, low = _exponents(state.regret, state.spread)
        weights = _difference(high, low, high.max((0, 1)))
        level = np.arange(len(weights))
        interval = (state.rounds + 1) >> level
        shares = 0.5**level / (interval * (interval + 1.0))
        mixed = state.prior * np.tensordot(shares, weights, 1)
        return np.asarray(mixed / mixed.sum(0))

    def update(
        self, state: AdaNormalHedgeTVState, losses: ArrayLike, played: ArrayLike | None = None
    ) -> AdaNormalHedgeTVState:
        """Add the regret of the law that was played, by default ``probs(state)``; restart what is due."""
        step = regret_step(self, state, losses, played, state.regret.shape[1:])
        regret, spread, coming = state.regret + step, state.spread + np.abs(step), state.rounds + 2
        due = (coming & -coming).bit_length()
        if due > len(regret):
            regret, spread = (np.concatenate([sums, sums[:1]]) for sums in (regret, spread))
        regret[:due] = spread[:due] = 0
        return AdaNormalHedgeTVState(regret, spread, state.rounds + 1, state.prior)
