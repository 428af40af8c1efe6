"""Exponential weights on cumulative losses, and the learner that follows the leader."""

from __future__ import annotations

from dataclasses import dataclass
from math import log, sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from nab.checks import checked
from nab.learners.border import checked_losses, checked_played, checked_prior, checked_rate, zeros
from nab.learners.columns import greatest, inner, least, total
from nab.types import Floats


class HedgeState(NamedTuple):
    """Cumulative ``losses`` less their minimum, ``rounds`` seen, and the ``prior``.

    Losses and rounds are discounted sums where the learner discounts.
    """

    losses: Floats
    rounds: float
    prior: Floats


def softmin(losses: Floats, rate: float | Floats, prior: Floats) -> Floats:
    """``prior exp(-rate losses)``, normalised over axis 0; losses have minimum 0, or close to it."""
    weights = losses * -rate
    np.exp(weights, weights)
    weights *= prior
    weights /= total(weights)
    return weights


@dataclass(frozen=True)
class Hedge:
    """Exponential weights: ``w_i ~ prior_i exp(-rate S_i)``.

    Args:
        rate: learning rate, in (0, 1e300], with regret at most ``ln n / rate + rate T / 8`` (Cesa-Bianchi and
            Lugosi 2006, Thm 2.2). None is the anytime rate ``sqrt(8 ln n / t)`` of round t, with regret at
            most ``ln n / rate_T + sum_t rate_t / 8 <= 1.0607 sqrt(T ln n)``.
        discount: in (0, 1]; past losses are multiplied by it every round, so that the learner forgets
            (``nab.sim.bounds.hedge_discounted``).

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
        checked_rate(self.rate)
        checked("discount", self.discount, high=1, closed=True)

    def init(self, n: int, batch: int | None = None, *, prior: ArrayLike | None = None) -> HedgeState:
        """No loss yet; the first law is the prior, by default uniform."""
        return HedgeState(zeros(n, batch), 0.0, checked_prior(prior, n, batch))

    def probs(self, state: HedgeState) -> Floats:
        """Softmin of the losses at the rate of the coming round."""
        losses, rounds, prior = state
        return softmin(losses, self.rate or sqrt(8 * log(len(losses)) / (rounds + 1)), prior)

    def update(self, state: HedgeState, losses: ArrayLike, played: ArrayLike | None = None) -> HedgeState:
        """Add the losses; ``played`` does not matter to Hedge."""
        return _summed(state, losses, played, self.discount)


def _summed(state: HedgeState, losses: ArrayLike, played: ArrayLike | None, discount: float) -> HedgeState:
    """The state with the losses added."""
    past, rounds, prior = state
    new = checked_losses(losses, past.shape)
    if played is not None:
        checked_played(played, past.shape)
    sums = past + new if discount == 1 else past * discount + new
    sums -= least(sums)
    return HedgeState(sums, discount * rounds + 1, prior)


class OptimisticHedgeState(NamedTuple):
    """Cumulative ``losses`` less their minimum, the ``hint`` for the coming round, its misses, the ``prior``.

    ``spread`` is the sum of squared ranges of ``losses - hint`` so far, ``()`` or ``(batch,)``.
    """

    losses: Floats
    hint: Floats
    spread: Floats
    prior: Floats


@dataclass(frozen=True)
class OptimisticHedge:
    """Hedge that counts a guess of the coming losses in: ``w_i ~ prior_i exp(-rate (S_i + hint_i))``.

    The hint is the last loss vector unless ``hinted`` puts another in its place. Good hints make regret
    small, bad ones cost no more than a constant factor: with r_t the range of ``losses_t - hint_t`` over
    drafters, regret is at most ``ln n / rate + (rate / 8) sum_t r_t^2`` (``nab.sim.bounds.master``; Rakhlin
    and Sridharan 2013, Syrgkanis et al. 2015 for the last loss as hint).

    Args:
        rate: learning rate, in (0, 1e300]. None is ``2 sqrt(ln n / (4 + sum_{s<t} r_s^2))``, with regret at
            most ``sqrt(ln n (4 + sum_t r_t^2))`` for hints in [0, 1] (``nab.sim.bounds.optimistic_hedge``).

    Raises:
        ValueError: on a rate outside its range.

    >>> learner = OptimisticHedge(rate=1.0)
    >>> learner.probs(learner.hinted(learner.init(2), [0.0, 1.0])).round(3).tolist()
    [0.731, 0.269]
    """

    rate: float | None = None

    def __post_init__(self) -> None:
        checked_rate(self.rate)

    def init(
        self, n: int, batch: int | None = None, *, prior: ArrayLike | None = None
    ) -> OptimisticHedgeState:
        """No loss and no hint yet; the first law is the prior, by default uniform."""
        none = zeros(n, batch)
        return OptimisticHedgeState(none, none, np.asarray(none[0]), checked_prior(prior, n, batch))

    def hinted(self, state: OptimisticHedgeState, hint: ArrayLike) -> OptimisticHedgeState:
        """The state with another hint, in [0, 1], for the coming round alone."""
        return state._replace(hint=checked_losses(hint, state.losses.shape, "hint").copy())

    def probs(self, state: OptimisticHedgeState) -> Floats:
        """Softmin of the losses and the hint at the rate of the coming round."""
        guess = state.losses + state.hint
        rate = self.rate or 2 * np.sqrt(log(len(guess)) / (4 + state.spread))
        return softmin(guess - least(guess), rate, state.prior)

    def update(
        self, state: OptimisticHedgeState, losses: ArrayLike, played: ArrayLike | None = None
    ) -> OptimisticHedgeState:
        """Add the losses, which become the next hint; ``played`` does not matter."""
        new = checked_losses(losses, state.losses.shape)
        if played is not None:
            checked_played(played, new.shape)
        sums = state.losses + new
        sums -= least(sums)
        miss = new - state.hint
        spread = state.spread + (greatest(miss) - least(miss)) ** 2
        return OptimisticHedgeState(sums, new.copy(), np.asarray(spread), state.prior)


class AdaHedgeState(NamedTuple):
    """Cumulative ``losses`` less their minimum, the ``gap``, ``()`` or ``(batch,)``, and the ``prior``."""

    losses: Floats
    gap: Floats
    prior: Floats


@dataclass(frozen=True)
class AdaHedge:
    """Hedge at the rate ``ln n / gap``, the gap between its losses and its mix losses so far.

    No parameter; with a uniform prior regret is at most twice the gap, and at most
    ``2 sqrt(V ln n) + (4/3) ln n + 2`` with V the sum of the variances of the losses under the laws played:
    small on easy sequences. Source: de Rooij, van Erven, Grunwald, Koolen 2014, Thm 6 and 8.

    >>> learner = AdaHedge()
    >>> state = learner.update(learner.init(3), [0.0, 1.0, 1.0])
    >>> learner.probs(state).round(3).tolist()
    [0.722, 0.139, 0.139]
    """

    def init(self, n: int, batch: int | None = None, *, prior: ArrayLike | None = None) -> AdaHedgeState:
        """No loss yet; the first law is the prior, by default uniform."""
        none = zeros(n, batch)
        return AdaHedgeState(none, np.asarray(none[0]), checked_prior(prior, n, batch))

    def probs(self, state: AdaHedgeState) -> Floats:
        """Softmin of the losses; it follows the leaders alone while there is no gap."""
        return softmin(state.losses, self._rate(state), state.prior)

    def update(
        self, state: AdaHedgeState, losses: ArrayLike, played: ArrayLike | None = None
    ) -> AdaHedgeState:
        """Add the losses, and to the gap what the law that was played lost beyond its mix loss."""
        new = checked_losses(losses, state.losses.shape)
        law = self.probs(state) if played is None else checked_played(played, new.shape)
        sums = state.losses + new
        best = least(sums)
        rate = self._rate(state)
        sums -= best
        before, after = _log_mean(state.losses, rate, state.prior), _log_mean(sums, rate, state.prior)
        mix = best + (before - after) / rate
        gap = state.gap + np.maximum(inner(law, new) - mix, 0)
        return AdaHedgeState(sums, np.asarray(gap), state.prior)

    def _rate(self, state: AdaHedgeState) -> Floats:
        """``ln n / gap``, finite: where there is no gap, a rate at which only leaders have weight."""
        return np.asarray(np.minimum(log(max(len(state.losses), 2)) / np.maximum(state.gap, 1e-300), 1e300))


def _log_mean(losses: Floats, rate: Floats, prior: Floats) -> Floats:
    """``ln sum_i prior_i exp(-rate losses_i)`` of losses with minimum 0."""
    return np.asarray(np.log(total(prior * np.exp(-rate * losses))))


@dataclass(frozen=True)
class FollowTheLeader:
    """The drafter with the least loss so far, uniformly among equals (by the prior, where there is one).

    What one would write first, and no guarantee: where two drafters take turns at being right, it is always
    one round late and loses every round while each of them loses half
    (``nab.sim.environments.leader_killer``).

    >>> learner = FollowTheLeader()
    >>> state = learner.update(learner.init(3), [0.5, 0.25, 0.25])
    >>> learner.probs(state).tolist()
    [0.0, 0.5, 0.5]
    """

    def init(self, n: int, batch: int | None = None, *, prior: ArrayLike | None = None) -> HedgeState:
        """No loss yet; the first law is the prior, by default uniform."""
        return HedgeState(zeros(n, batch), 0.0, checked_prior(prior, n, batch))

    def probs(self, state: HedgeState) -> Floats:
        """Uniform over the leaders."""
        weights = state.prior * (state.losses == 0)
        return np.asarray(weights / total(weights))

    def update(self, state: HedgeState, losses: ArrayLike, played: ArrayLike | None = None) -> HedgeState:
        """Add the losses; ``played`` does not matter."""
        return _summed(state, losses, played, 1.0)
