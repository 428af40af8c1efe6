"""NormalHedge and its second-order sister: a half-normal potential, no learning rate, no horizon."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from nab.checks import checked
from nab.learners.border import checked_losses, checked_played, checked_prior, zeros
from nab.learners.columns import ONE, ZERO, every, greatest, inner, ln, total
from nab.types import Floats


class NormalHedgeState(NamedTuple):
    """Regret of the play against each drafter, rounds seen, scale, the coming law and the prior.

    Regret and law are ``(n,)`` or ``(n, batch)``; scale, the c of the potential, is ``()`` or ``(batch,)``.
    Regret and rounds are discounted sums where the learner discounts.
    """

    regret: Floats
    rounds: float
    scale: Floats
    law: Floats
    prior: Floats


@dataclass(frozen=True)
class NormalHedge:
    """``w_i ~ prior_i [R_i]_+ exp([R_i]_+^2 / 2c)``, the half-normal potential's slope at its own scale.

    c is such that ``sum_i prior_i exp([R_i]_+^2 / 2c) = e``. Source: Chaudhuri, Freund, Hsu 2009. Drafters
    without positive regret get weight exactly 0; where all regrets are within rounding (1e-12 a round) of 0
    or below, the law is the prior.

    Args:
        discount: in (0, 1]; past regrets are multiplied by it every round, so that the learner forgets. While
            losses stay equal regrets decay together, which changes little, until they are within rounding
            and the law falls back to the prior (at 0.9 after about 200 such rounds).

    Raises:
        ValueError: on a discount outside (0, 1].

    >>> learner = NormalHedge()
    >>> state = learner.update(learner.init(3), [0.0, 0.5, 1.0])
    >>> learner.probs(state).tolist()
    [1.0, 0.0, 0.0]
    """

    discount: float = 1.0

    def __post_init__(self) -> None:
        checked("discount", self.discount, high=1, closed=True)

    def init(self, n: int, batch: int | None = None, *, prior: ArrayLike | None = None) -> NormalHedgeState:
        """No regret yet; the first law is the prior, by default uniform."""
        return _start(n, batch, prior, 1.0)

    def probs(self, state: NormalHedgeState) -> Floats:
        """The law of the coming round, which ``update`` has computed."""
        return state.law.copy()

    def update(
        self, state: NormalHedgeState, losses: ArrayLike, played: ArrayLike | None = None
    ) -> NormalHedgeState:
        """Add the regret of the law that was played, by default ``probs(state)``, and find the next law."""
        return _next(state, losses, played, self.discount, self.level)

    def level(self, s: Any) -> tuple[Any, Any]:
        """What the log of the mean potential has to be, 1 at every scale, and its derivative."""
        return 1.0, 0.0


@dataclass(frozen=True)
class NormalHedgeBH:
    """NormalHedge with a potential that solves the backwards heat equation: its regret is of second order.

    ``w_i ~ prior_i [R_i]_+ exp([R_i]_+^2 / 2c)`` with c such that ``sum_i prior_i c^(-1/2) exp([R_i]_+^2 /
    2c) = start^(-1/2)``: the potential ``c^(-1/2) exp(y^2 / 2c)`` stays constant, and c is a clock that
    moves as fast as regrets spread, from ``start``. What is proved of it and what is checked is in
    docs/theory.md (``nab.sim.bounds.normal_hedge_bh``). After Freund, Harvey, Portella, Qi and Wang 2026
    (arXiv 2602.08151), derived here from the potential alone.

    Args:
        start: c before the first round, in (0, 1e300]. Below 0.4 one round can break the bound of the clock.

    Raises:
        ValueError: on a start outside its range.

    >>> learner = NormalHedgeBH()
    >>> state = learner.update(learner.init(3), [0.0, 0.5, 1.0])
    >>> learner.probs(state).tolist()
    [1.0, 0.0, 0.0]
    """

    start: float = 1.0

    def __post_init__(self) -> None:
        checked("start", self.start, high=1e300, closed=True)

    def init(self, n: int, batch: int | None = None, *, prior: ArrayLike | None = None) -> NormalHedgeState:
        """No regret yet; the first law is the prior, by default uniform."""
        return _start(n, batch, prior, self.start)

    def probs(self, state: NormalHedgeState) -> Floats:
        """The law of the coming round, which ``update`` has computed."""
        return state.law.copy()

    def update(
        self, state: NormalHedgeState, losses: ArrayLike, played: ArrayLike | None = None
    ) -> NormalHedgeState:
        """Add the regret of the law that was played, by default ``probs(state)``, and find the next law."""
        return _next(state, losses, played, 1.0, self.level)

    def level(self, s: Any) -> tuple[Any, Any]:
        """What the log of the mean potential has to be, ``ln sqrt(c / start)``, and its derivative."""
        return -0.5 * np.log(2 * self.start * s), -0.5 / s


Level = Callable[[Any], tuple[Any, Any]]
"""What the log of the mean potential has to be at ``s = 1 / 2c``, and its derivative in s."""


def _start(n: int, batch: int | None, prior: ArrayLike | None, scale: float) -> NormalHedgeState:
    none, law = zeros(n, batch), checked_prior(prior, n, batch)
    first = np.broadcast_to(law, none.shape)
    return NormalHedgeState(none, 0.0, np.full(none.shape[1:], scale), first, law)


def _next(
    state: NormalHedgeState, losses: ArrayLike, played: ArrayLike | None, discount: float, level: Level
) -> NormalHedgeState:
    past, rounds, scale, law, prior = state
    new = checked_losses(losses, past.shape)
    if played is not None:
        law = checked_played(played, past.shape)
    regret = past - new if discount == 1 else past * discount - new
    regret += inner(law, new)
    rounds = discount * rounds + 1
    return NormalHedgeState(regret, rounds, *solved(regret, rounds, scale, prior, level), prior)


LIMIT = 2000.0
"""Above every root lam, for ``ln 1 / prior`` is below 600."""


def solved(
    regret: Floats, rounds: float, scale: Floats, prior: Floats, level: Level
) -> tuple[Floats, Floats]:
    """The scale c at which the potential is on its level, searched from the last one, and the law at it.

    In units of the largest regret M, with ``x = [R]_+ / M`` and ``lam = M^2 / 2c``,
    ``lam + ln sum_i prior_i exp(lam (x_i^2 - 1))`` is convex and increasing, and no term overflows. Newton
    overshoots NormalHedge's root once at most, to ``LIMIT`` at most, and then falls to it; BH's level adds a
    concave term, so steps must not leave lam > 0. The play keeps c constant to first order, so from the last
    c two or three steps do; a step of 4e-7, or as much of lam where that is below 1, leaves an error of
    about 1e-13.
    """
    top = greatest(regret)
    live = top > 1e-12 * (1 + rounds)
    if not every(live):
        regret, top = np.where(live, regret, 1.0), np.where(live, top, 1.0)
    x = np.maximum(regret, ZERO)
    x /= top
    lead = prior * x
    weighted = lead * x
    gap = x * x
    gap -= ONE
    square = top * top
    lam = 0.5 * square / scale
    if not every(lam <= LIMIT):
        lam = np.minimum(lam, LIMIT)
    for _ in range(100):
        powers = gap * lam
        np.exp(powers, powers)
        mean = inner(prior, powers)
        wanted, slope = level(lam / square)
        step = (ln(mean) + lam - wanted) / (inner(weighted, powers) / mean - slope / square)
        before, lam, size = lam, lam - step, abs(step)
        if every(size * (1 + before) < 4e-7 * before):
            break
        if not every(size < 0.5 * before):
            lam = np.clip(lam, 0.1 * before, LIMIT)
    gap *= lam
    law = np.exp(gap, gap)
    law *= lead
    law /= total(law)
    found = 0.5 * square / lam
    return found if every(live) else np.where(live, found, scale), law
