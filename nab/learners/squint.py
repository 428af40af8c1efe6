"""Squint: second-order regret for every drafter, all learning rates at once."""

from __future__ import annotations

from dataclasses import dataclass
from math import log, pi
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from nab.learners.border import checked_prior, regret_step, zeros
from nab.learners.columns import every, greatest, quadrature, total
from nab.types import Floats


class SquintState(NamedTuple):
    """``regret`` against each drafter, ``variance`` (the sum of its squared steps), and the ``prior``."""

    regret: Floats
    variance: Floats
    prior: Floats


@dataclass(frozen=True)
class Squint:
    """``w_i ~ prior_i int_0^{1/2} exp(eta R_i - eta^2 V_i) d eta``: Hedge at all learning rates at once.

    V_i is the sum of squared steps of the regret R_i. No parameter; the improper prior over learning rates
    of Koolen and van Erven 2015. Regret against drafter i is of order ``sqrt(V_i (ln n + ln ln T))``, small
    where the drafter and the play seldom differ (``nab.sim.bounds.squint``).

    >>> learner = Squint()
    >>> state = learner.update(learner.init(3), [0.0, 0.5, 1.0])
    >>> learner.probs(state).round(3).tolist()
    [0.373, 0.336, 0.291]
    """

    def init(self, n: int, batch: int | None = None, *, prior: ArrayLike | None = None) -> SquintState:
        """No regret yet; the first law is the prior, by default uniform."""
        none = zeros(n, batch)
        return SquintState(none, none, checked_prior(prior, n, batch))

    def probs(self, state: SquintState) -> Floats:
        """The integrals in closed form, normalised."""
        log_weights = log_evidence(state.regret, state.variance)
        log_weights -= greatest(log_weights)
        weights = np.exp(log_weights, log_weights)
        weights *= state.prior
        weights /= total(weights)
        return weights

    def update(self, state: SquintState, losses: ArrayLike, played: ArrayLike | None = None) -> SquintState:
        """Add the regret of the law that was played, by default ``probs(state)``."""
        step = regret_step(self, state, losses, played, state.regret.shape)
        return SquintState(state.regret + step, state.variance + step * step, state.prior)


def log_evidence(regret: Floats, variance: Floats) -> Floats:
    """``ln int_0^{1/2} exp(eta R - eta^2 V) d eta`` for V >= 0.

    With ``u = R / 2 sqrt V`` and ``v = sqrt(V) / 2 - u`` the integral is ``sqrt(pi / 4V) e^{u^2} (erf u +
    erf v)``. Where the lower of u and v is below 0 that is a difference of two tails, taken with ``erfcx(x)
    = e^{x^2} erfc(x)`` and ``u^2 - v^2 = R / 2 - V / 4`` so that nothing overflows or cancels; where V is
    below 1e-6, too small to divide by, quadrature is exact to rounding.
    """
    from scipy.special import erf, erfcx

    wide = np.maximum(variance, 1e-6)
    root = np.sqrt(wide)
    half, reach = 0.5 * regret, 0.5 * root
    u = half / root
    v = reach - u
    low, high, gap = np.minimum(u, v), np.maximum(u, v), half - reach * reach
    straddles = low >= 0
    tails = erfcx(np.abs(low)) - np.exp(-np.abs(gap)) * erfcx(high)
    mass = np.where(straddles, erf(low) + erf(high), tails) / root
    result = np.where(straddles, u * u, np.maximum(gap, 0)) + np.log(mass)
    result += log(pi) / 2 - log(2)
    if not every(variance >= 1e-6):
        narrow = variance < 1e-6
        R, V = regret[narrow][..., None], variance[narrow][..., None]
        nodes, masses = quadrature(10)
        eta = nodes / 4 + 0.25
        result[narrow] = np.log(np.exp(eta * R - eta**2 * V) @ (masses / 4))
    return np.asarray(result)
