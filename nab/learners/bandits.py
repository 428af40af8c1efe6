"""Bandits: baselines that see the loss of the drafter they played and of no other.

Frozen dataclasses of hyperparameters with three pure functions, as the learners of ``nab.learners``, but
``update(state, arm, loss)`` takes one arm and its loss, ``()`` or ``(batch,)`` of each. A round's loss is one
less its reward; for UCBSpec and EXP3Spec it is ``(draft_len + 1 - Y) / draft_len``, where the round drafted
draft_len tokens and emitted Y, next token included.

In the formulas below t is the coming round, counted from 1, n the number of arms, n_i how often arm i was
played and mean_i the mean reward that it gave. A deterministic bandit's law is uniform over its maximisers;
arms that were never played come first, all alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log, sqrt
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nab.checks import checked, whole
from nab.learners.border import checked_arms, checked_losses, checked_rate, zeros
from nab.learners.columns import greatest, least, quadrature, total
from nab.learners.hedge import Hedge, HedgeState, softmin
from nab.types import Floats


def _seen(arm: ArrayLike, loss: ArrayLike, shape: tuple[int, ...]) -> tuple[NDArray[np.intp], Floats]:
    """Where the played arms' entries are in a flattened array of this shape, and their losses.

    Raises:
        ValueError: on an arm that is no integer in 0 .. n - 1, a loss outside [0, 1] or another shape.
    """
    cells = checked_arms(arm, shape[0], shape[1:]).astype(np.intp)
    if cells.ndim:
        cells *= len(cells)
        cells += np.arange(len(cells))
    return cells, checked_losses(loss, shape[1:])


def _added(sums: Floats, cells: NDArray[np.intp], values: Floats | float) -> Floats:
    """A copy of ``sums`` with ``values`` added to the played arms' entries."""
    copy = sums.copy()
    copy.reshape(-1)[cells] += values
    return copy


def _leaders(index: Floats, counts: Floats) -> Floats:
    """Uniform over the arms that were never played, else over those with the largest index."""
    best: Floats = (index == greatest(index)).astype(np.float64)
    if np.count_nonzero(counts) < counts.size:
        fresh = counts == 0
        best = np.where(fresh.any(0), fresh, best)
    best /= total(best)
    return best


class TallyState(NamedTuple):
    """Sums of ``losses`` and ``counts`` of plays by arm, and the ``rounds`` played."""

    losses: Floats
    counts: Floats
    rounds: int


def _untallied(n: int, batch: int | None) -> TallyState:
    none = zeros(n, batch)
    return TallyState(none, none, 0)


def _tallied(state: TallyState, arm: ArrayLike, loss: ArrayLike) -> TallyState:
    cells, new = _seen(arm, loss, state.counts.shape)
    return TallyState(_added(state.losses, cells, new), _added(state.counts, cells, 1.0), state.rounds + 1)


def _ucb(state: TallyState, scale: float) -> Floats:
    """Leaders by ``mean_i + scale sqrt(2 ln t / n_i)``; mean losses stand for 1 less the mean rewards."""
    pulls = np.maximum(state.counts, 1)
    index = 2 * scale * scale * log(state.rounds + 1) / pulls
    np.sqrt(index, index)
    index -= state.losses / pulls
    return _leaders(index, state.counts)


@dataclass(frozen=True)
class UCB1:
    """``argmax_i mean_i + sqrt(2 ln t / n_i)`` after one play of each arm.

    On independent rewards the expected regret is at most ``8 ln T sum_i 1 / gap_i + (1 + pi^2 / 3) sum_i
    gap_i`` (``nab.sim.bounds.ucb1``). Source: Auer, Cesa-Bianchi, Fischer 2002, Thm 1.

    >>> bandit = UCB1()
    >>> state = bandit.update(bandit.init(2), 0, 0.25)
    >>> bandit.probs(state).tolist()
    [0.0, 1.0]
    >>> bandit.probs(bandit.update(state, 1, 0.75)).tolist()
    [1.0, 0.0]
    """

    def init(self, n: int, batch: int | None = None) -> TallyState:
        """Nothing played yet; the first law is uniform."""
        return _untallied(n, batch)

    def probs(self, state: TallyState) -> Floats:
        """Uniform over the maximisers, or over the arms that were never played."""
        return _ucb(state, 1)

    def update(self, state: TallyState, arm: ArrayLike, loss: ArrayLike) -> TallyState:
        """Count the play and add its loss."""
        return _tallied(state, arm, loss)


@dataclass(frozen=True)
class MetaSD:
    """MetaSD-UCB: ``argmax_i mean_i + beta sqrt(2 ln t / n_i)`` after one play of each arm.

    A round's reward is the mean over its drafted tokens of ``1 - TV(p, q_i)``, which is
    ``gamma`` of chain verification; its loss is the mean of TV. Source: Kim et al. (arXiv 2604.05417), who
    do not say which beta they used.

    Args:
        beta: weight of exploration, above 0.

    Raises:
        ValueError: if ``beta`` is not above 0.

    >>> bandit = MetaSD(beta=0.5)
    >>> state = bandit.update(bandit.update(bandit.init(2), 0, 0.25), 1, 0.75)
    >>> bandit.probs(state).tolist()
    [1.0, 0.0]
    """

    beta: float = 1.0

    def __post_init__(self) -> None:
        checked("beta", self.beta)

    def init(self, n: int, batch: int | None = None) -> TallyState:
        """Nothing played yet; the first law is uniform."""
        return _untallied(n, batch)

    def probs(self, state: TallyState) -> Floats:
        """Uniform over the maximisers, or over the arms that were never played."""
        return _ucb(state, self.beta)

    def update(self, state: TallyState, arm: ArrayLike, loss: ArrayLike) -> TallyState:
        """Count the play and add its loss."""
        return _tallied(state, arm, loss)


@dataclass(frozen=True)
class UCBSpec:
    """UCB on the tokens a round emits, Y in [1, draft_len + 1], after one play of each arm.

    ``argmax_i mean(Y)_i + (draft_len / 2) sqrt((1 + n_i) / n_i^2 (1 + 2 ln(n t^2 sqrt(1 + n_i) / delta)))``
    with ``delta = 1/2``. The loss is ``(draft_len + 1 - Y) / draft_len``, so that in units of the loss
    draft_len cancels: the law depends on it through the losses alone. Source: BanditSpec (Hou et al. 2025,
    arXiv 2505.15141), Alg. 4.

    Args:
        draft_len: drafted tokens per round, at least 1.

    Raises:
        ValueError: if ``draft_len`` is not a whole number, at least 1.

    >>> bandit = UCBSpec(draft_len=4)
    >>> state = bandit.init(2)
    >>> for arm, emitted in (0, 4), (1, 2):
    ...     state = bandit.update(state, arm, (4 + 1 - emitted) / 4)
    >>> bandit.probs(state).tolist()
    [1.0, 0.0]
    """

    draft_len: int

    def __post_init__(self) -> None:
        whole("draft_len", self.draft_len, 1)

    def init(self, n: int, batch: int | None = None) -> TallyState:
        """Nothing played yet; the first law is uniform."""
        return _untallied(n, batch)

    def probs(self, state: TallyState) -> Floats:
        """Uniform over the maximisers, or over the arms that were never played."""
        pulls, t = np.maximum(state.counts, 1), state.rounds + 1
        more = 1 + pulls
        radius = np.log(more)
        radius += 1 + 2 * log(len(pulls) * t * t / 0.5)
        radius *= more
        np.sqrt(radius, radius)
        radius *= 0.5
        radius -= state.losses
        radius /= pulls
        return _leaders(radius, state.counts)

    def update(self, state: TallyState, arm: ArrayLike, loss: ArrayLike) -> TallyState:
        """Count the play and add its loss."""
        return _tallied(state, arm, loss)


def _exp3_rate(rate: float | None, state: HedgeState) -> float:
    """The rate given, or ``sqrt(ln n / (t n))``, which is 0 where there is one arm."""
    n = len(state.losses)
    return rate or sqrt(log(n) / ((state.rounds + 1) * n))


def _exp3_law(rate: float | None, state: HedgeState) -> Floats:
    """Softmin of the estimated losses at the rate of the coming round."""
    return softmin(state.losses, _exp3_rate(rate, state), state.prior)


def _estimated(
    rate: float | None, optimism: float, state: HedgeState, arm: ArrayLike, loss: ArrayLike
) -> HedgeState:
    """Add ``loss / (p + optimism rate_t)`` to the played arm's sum, p its probability by the state's own law.

    A p below 1e-100, of which no draw ever comes, counts as 1e-100, so that no sum overflows.
    """
    cells, new = _seen(arm, loss, state.losses.shape)
    chance = _exp3_law(rate, state).reshape(-1)[cells] + optimism * _exp3_rate(rate, state)
    sums = _added(state.losses, cells, new / np.maximum(chance, 1e-100))
    sums -= least(sums)
    return HedgeState(sums, state.rounds + 1, state.prior)


@dataclass(frozen=True)
class EXP3:
    """Hedge on importance-weighted losses: ``w_i ~ exp(-rate_t sum of loss / w over plays of i)``.

    The estimate ``1{i played} loss / w_i`` has the mean loss_i under the law that drew the arm, so it must be
    that of ``probs`` of the same state. Its sums are kept less their minimum. Source: Bubeck and Cesa-Bianchi
    2012, Thm 3.1, without mixing.

    Args:
        rate: learning rate, in (0, 1e300]; ``sqrt(2 ln n / (T n))`` has expected pseudo-regret at most
            ``sqrt(2 T n ln n)`` after T rounds (``nab.sim.bounds.exp3``). None is the anytime rate
            ``sqrt(ln n / (t n))``, with ``2 sqrt(T n ln n)`` at every T (``nab.sim.bounds.exp3_anytime``).

    Raises:
        ValueError: on a rate outside its range.

    >>> bandit = EXP3(rate=0.5)
    >>> state = bandit.update(bandit.init(2), 0, 0.5)
    >>> bandit.probs(state).round(3).tolist()
    [0.378, 0.622]
    """

    rate: float | None = None

    def __post_init__(self) -> None:
        checked_rate(self.rate)

    def init(self, n: int, batch: int | None = None) -> HedgeState:
        """No loss yet; the first law is uniform."""
        return Hedge().init(n, batch)

    def probs(self, state: HedgeState) -> Floats:
        """Softmin of the estimated losses at the rate of the coming round."""
        return _exp3_law(self.rate, state)

    def update(self, state: HedgeState, arm: ArrayLike, loss: ArrayLike) -> HedgeState:
        """Add the estimate of the loss; the arm was drawn from ``probs(state)``."""
        return _estimated(self.rate, 0, state, arm, loss)


@dataclass(frozen=True)
class EXP3IX:
    """EXP3 with implicit exploration: the estimate is ``loss / (p + gamma)``, ``gamma = rate_t / 2``.

    Its mean is ``p loss / (p + gamma)``, below the loss, and its tails are light: regret is bounded with high
    probability. Source: Neu 2015, Thm 1.

    Args:
        rate: learning rate, in (0, 1e300]; ``sqrt(2 ln n / (n T))`` has regret at most ``2 sqrt(2 n T ln n) +
            (sqrt(2 n T / ln n) + 1) ln(2 / delta)`` with probability at least ``1 - delta``
            (``nab.sim.bounds.exp3_ix``). None is the anytime rate ``sqrt(ln n / (n t))``.

    Raises:
        ValueError: on a rate outside its range.

    >>> bandit = EXP3IX(rate=0.5)
    >>> state = bandit.update(bandit.init(2), 0, 0.75)
    >>> state.losses.tolist()
    [1.0, 0.0]
    """

    rate: float | None = None

    def __post_init__(self) -> None:
        checked_rate(self.rate)

    def init(self, n: int, batch: int | None = None) -> HedgeState:
        """No loss yet; the first law is uniform."""
        return Hedge().init(n, batch)

    def probs(self, state: HedgeState) -> Floats:
        """Softmin of the estimated losses at the rate of the coming round."""
        return _exp3_law(self.rate, state)

    def update(self, state: HedgeState, arm: ArrayLike, loss: ArrayLike) -> HedgeState:
        """Add the estimate of the loss; the arm was drawn from ``probs(state)``."""
        return _estimated(self.rate, 0.5, state, arm, loss)


@dataclass(frozen=True)
class EXP3Spec:
    """``EXP3()``, at its anytime rate, on the share of a round's tokens that is missed.

    The loss is ``(draft_len + 1 - Y) / draft_len`` where the round emitted Y; the law depends on draft_len
    through the losses alone. Source: BanditSpec (Hou et al. 2025, arXiv 2505.15141), Alg. 5.

    Args:
        draft_len: drafted tokens per round, at least 1.

    Raises:
        ValueError: if ``draft_len`` is not a whole number, at least 1.

    >>> bandit = EXP3Spec(draft_len=4)
    >>> state = bandit.update(bandit.init(2), 0, (4 + 1 - 3) / 4)
    >>> bandit.probs(state).round(3).tolist()
    [0.397, 0.603]
    """

    draft_len: int

    def __post_init__(self) -> None:
        whole("draft_len", self.draft_len, 1)

    def init(self, n: int, batch: int | None = None) -> HedgeState:
        """No loss yet; the first law is uniform."""
        return EXP3().init(n, batch)

    def probs(self, state: HedgeState) -> Floats:
        """Law of ``EXP3()``."""
        return _exp3_law(None, state)

    def update(self, state: HedgeState, arm: ArrayLike, loss: ArrayLike) -> HedgeState:
        """Add the estimate of the loss; the arm was drawn from ``probs(state)``."""
        return _estimated(None, 0, state, arm, loss)


class ThompsonState(NamedTuple):
    """Sums of 1 - loss, ``accepted``, and of loss, ``rejected``, by arm."""

    accepted: Floats
    rejected: Floats


@dataclass(frozen=True)
class Thompson:
    """Plays each arm with the probability that it is the best, given what it showed and a uniform prior.

    Arm i is best if its draw from ``Beta(1 + accepted_i, 1 + rejected_i)`` is the largest; ``probs`` is the
    probability of that, not one draw of it. On 0/1 losses the Bayes regret is at most ``sqrt(n T ln n / 2)``
    (``nab.sim.bounds.thompson``; Russo and Van Roy 2016); a loss between counts as so much of a rejection.

    >>> bandit = Thompson()
    >>> bandit.probs(bandit.update(bandit.init(2), 0, 1.0)).round(12).tolist()
    [0.333333333333, 0.666666666667]
    """

    def init(self, n: int, batch: int | None = None) -> ThompsonState:
        """Nothing seen yet; the first law is uniform."""
        none = zeros(n, batch)
        return ThompsonState(none, none)

    def probs(self, state: ThompsonState) -> Floats:
        """Probability that each arm's draw is the largest; see ``largest``."""
        return largest(1 + state.accepted, 1 + state.rejected)

    def update(self, state: ThompsonState, arm: ArrayLike, loss: ArrayLike) -> ThompsonState:
        """Add the loss to the rejected, the rest of 1 to the accepted."""
        cells, new = _seen(arm, loss, state.accepted.shape)
        return ThompsonState(_added(state.accepted, cells, 1 - new), _added(state.rejected, cells, new))


STEPS = np.array([-32.0, -16, -8, -4, -2, 0, 2, 4, 8, 16, 32])
"""Break points of the quadrature in ``largest``, in standard deviations from the mean."""


def largest(a: Floats, b: Floats) -> Floats:
    """Probability that draw i of independent ``Beta(a_i, b_i)`` is the largest, for a and b at least 1.

    ``integral f_i(x) prod_{j != i} F_j(x) dx``, by Gauss-Legendre quadrature on the logit of x, where
    densities are smooth whatever the exponents, in pieces that end at the mean +- 0, 2, 4, 8, 16 and 32
    standard deviations of every arm's logit. Error, measured against exact rationals: below 1e-14 for counts
    up to 3000; against a rule with ten times the nodes: below 1e-12 up to 10^6, 1e-10 up to 10^8.

    Args:
        a: ``(n,)`` or ``(n, batch)``.
        b: likewise.

    Returns:
        Laws of that shape.

    >>> largest(np.array([1.0, 2.0]), np.array([2.0, 2.0])).round(12).tolist()
    [0.3, 0.7]
    """
    from scipy import special

    centre = special.digamma(a) - special.digamma(b)
    spread = np.sqrt(special.zeta(2, a) + special.zeta(2, b))
    edges = np.sort(np.concatenate([centre + step * spread for step in STEPS]), 0)
    half = np.diff(edges, axis=0) / 2
    nodes, weights = quadrature(16)
    u = np.concatenate([edges[:-1] + half * (1 + node) for node in nodes])
    a, b = a[:, None], b[:, None]
    mass = -a * np.logaddexp(0, -u) - b * np.logaddexp(0, u)
    mass = np.exp(mass - mass.max(1, keepdims=True)) * np.concatenate([half * weight for weight in weights])
    mass /= mass.sum(1, keepdims=True)
    below = special.betainc(a, b, special.expit(u))
    law = np.stack([(m * np.delete(below, i, 0).prod(0)).sum(0) for i, m in enumerate(mass)])
    return np.asarray(law / law.sum(0))


class WindowState(NamedTuple):
    """The last losses of each arm, ``recent``, ``(window, n)`` or ``(window, n, batch)``, and ``counts``."""

    recent: Floats
    counts: Floats


@dataclass(frozen=True)
class EpsilonGreedy:
    """With probability epsilon any arm, else the one whose last ``window`` plays lost least in the mean.

    ``p = epsilon / n + (1 - epsilon)`` uniform over the arms that were never played, or over the least means.

    Args:
        epsilon: in (0, 1].
        window: plays of an arm that are remembered, at least 1.

    Raises:
        ValueError: if ``epsilon`` is outside (0, 1] or ``window`` is not a whole number, at least 1.

    >>> bandit = EpsilonGreedy(epsilon=0.5)
    >>> state = bandit.update(bandit.update(bandit.init(2), 0, 0.25), 1, 0.75)
    >>> bandit.probs(state).tolist()
    [0.75, 0.25]
    """

    epsilon: float = 0.1
    window: int = 32

    def __post_init__(self) -> None:
        checked("epsilon", self.epsilon, high=1, closed=True)
        whole("window", self.window, 1)

    def init(self, n: int, batch: int | None = None) -> WindowState:
        """Nothing played yet; the first law is uniform."""
        none = zeros(n, batch)
        return WindowState(np.zeros((self.window, *none.shape)), none)

    def probs(self, state: WindowState) -> Floats:
        """Mostly the leaders by windowed mean."""
        pulls = np.clip(state.counts, 1, self.window)
        leaders = _leaders(-state.recent.sum(0) / pulls, state.counts)
        return self.epsilon / len(pulls) + (1 - self.epsilon) * leaders

    def update(self, state: WindowState, arm: ArrayLike, loss: ArrayLike) -> WindowState:
        """Put the loss in the place of the arm's oldest."""
        cells, new = _seen(arm, loss, state.counts.shape)
        recent = state.recent.copy()
        oldest: Any = state.counts.reshape(-1)[cells] % self.window
        recent.reshape(self.window, -1)[oldest.astype(np.intp), cells] = new
        return WindowState(recent, _added(state.counts, cells, 1.0))
