"""What theory promises: one function per theorem, without slack.

Losses in [0, 1], natural logarithms. Regret against drafter i is
``R_i = sum_t (<w_t, l_t> - l_t,i)`` with w_t the law that was played (``nab.sim.regret``). n: drafters, T or
``rounds``: rounds, eps: the share of drafters that the comparator stands for (1 / n: the best one).

Each function says who proved it: **published**, with its number; **derived**, proof in docs/theory.md; or
**conjecture**: supported by search alone, good as a guard, no theorem. A value outside its range raises
ValueError.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import signature
from math import inf, log, log1p, pi, sqrt
from typing import Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from nab.checks import checked, whole
from nab.learners.columns import quadrature
from nab.types import Floats, as_floats

COUNTS = {"n": 1, "rounds": 1, "size": 1, "delay": 0, "switches": 0, "level": 0}
"""Whole numbers, and the least of each, whatever the theorem."""
OPEN = {"rate": inf, "scale": inf, "clock": inf, "start": inf, "delta": 1}
"""Numbers above 0 and below this."""
SHARES = {"eps", "share", "discount"}
"""Numbers in (0, 1]."""
LAWS = {"prior", "comparator"}
"""Arrays of numbers not below 0 whose sum is 1 (to 1e-9)."""

Arguments = ParamSpec("Arguments")
"""A bound's, numbers or arrays."""

Result = TypeVar("Result")
"""A bound's, one number or an array."""


def theorem(bound: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Checks arguments by their names, which mean the same everywhere; what is not named here is a size."""
    named = signature(bound)

    @wraps(bound)
    def stated(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        for name, value in named.bind(*args, **kwargs).arguments.items():
            if name in COUNTS:
                whole(name, value, COUNTS[name])
            elif name in OPEN:
                checked(name, value, high=OPEN[name])
            elif name in SHARES:
                checked(name, value, high=1, closed=True)
            elif value is not None and name != "regret":
                _check_sizes(name, value, number=named.parameters[name].annotation == "float")
        return bound(*args, **kwargs)

    return stated


def _check_sizes(name: str, value: Any, number: bool) -> None:
    """Raise ValueError unless these are finite, not below 0, one ``number`` or some, and a law where due."""
    sizes = as_floats(value)
    if (
        not (sizes.size or name == "moves")
        or (number and sizes.ndim)
        or not ((sizes >= 0) & (sizes < inf)).all()
    ):
        raise ValueError(f"{name} must be {'a number' if number else 'numbers'}, at least 0, got {value}")
    if name in LAWS and abs(sizes.sum() - 1) > 1e-9:
        raise ValueError(f"{name} must sum to 1, got {sizes.sum()}")


def _same_length(**arrays: Floats) -> None:
    """Raise ValueError unless these have the same shape."""
    if len({array.shape for array in arrays.values()}) > 1:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise ValueError(f"these must have the same shape: {shapes}")


# Exponential weights


@theorem
def master(divergence: float, rates: ArrayLike, ranges: ArrayLike) -> float:
    """Exponential weights with hints: ``KL(q, prior) / rate_T + sum_t rate_t range_t^2 / 8``.

    For ``w_t ~ prior exp(-rate_t (S_{t-1} + hint_t))``, rates that do not increase, any hints and losses,
    and the regret against a law q. **Derived**: covers fixed, anytime, prior, quantile and optimistic
    Hedge.

    Args:
        divergence: KL(q, prior), nats; ``ln n`` for one drafter and a uniform prior, ``ln 1 / eps`` for a
            quantile.
        rates: one a round, not increasing.
        ranges: of ``losses - hint`` over drafters, one a round.

    >>> master(log(2), [0.5, 0.5], [1, 1]) == hedge(2, 2, rate=0.5)
    True
    """
    eta, spread = _falling(rates), as_floats(ranges)
    _same_length(rates=eta, ranges=spread)
    return float(divergence / eta[-1] + (eta * spread**2).sum() / 8)


def _falling(rates: ArrayLike) -> Floats:
    """Rates, checked to lie above 0 and not to increase."""
    eta = as_floats(rates)
    if eta.ndim != 1 or not eta.size or not ((eta > 0) & (eta < inf)).all() or (np.diff(eta) > 0).any():
        raise ValueError(f"rates must be above 0 and not increase, got {eta.tolist()}")
    return eta


@theorem
def hedge(n: int, rounds: int, rate: float) -> float:
    """Hedge at a fixed rate: ``ln n / rate + rate T / 8``.

    **Published**: Cesa-Bianchi and Lugosi 2006, Thm 2.2.
    """
    return log(n) / rate + rate * rounds / 8


@theorem
def hedge_tuned(n: int, rounds: int) -> float:
    """Hedge at the best fixed rate ``sqrt(8 ln n / T)``: ``sqrt(T ln n / 2)``.

    **Published**: Cesa-Bianchi and Lugosi 2006, Thm 2.2. Not true of the anytime rate.
    """
    return sqrt(rounds * log(n) / 2)


@theorem
def hedge_anytime(n: int, rounds: int) -> float:
    """Hedge at rates ``sqrt(8 ln n / t)``: ``ln n / rate_T + sum_t rate_t / 8 <= 1.0607 sqrt(T ln n)``.

    **Derived**: ``master``.
    """
    if n == 1:
        return 0.0
    return master(log(n), np.sqrt(8 * log(n) / np.arange(1, rounds + 1)), np.ones(rounds))


@theorem
def hedge_root(n: int, rounds: int) -> float:
    """Hedge at rates ``2 sqrt(ln n / t)``: ``sqrt(T ln n)``.

    **Derived**: ``master`` and ``sum t^-1/2 <= 2 sqrt T``; as Mourtada and Gaiffas 2019.
    """
    return sqrt(rounds * log(n))


@theorem
def hedge_discounted(n: int, discount: float, rates: ArrayLike) -> float:
    """Discounted Hedge's discounted regret: ``g ln n / rate_T + sum_t g^(T-t) rate_t / 8g``, g the discount.

    The regret is ``sum_t g^(T-t) (<w_t, l_t> - l_t,i)``: of about the last ``1 / (1 - g)`` rounds.
    **Derived.**

    Args:
        n: drafters.
        discount: in (0, 1].
        rates: one a round, not increasing.
    """
    eta = _falling(rates)
    weights = discount ** np.arange(len(eta) - 1, -1, -1.0)
    return float(discount * log(n) / eta[-1] + (weights * eta).sum() / (8 * discount))


@theorem
def hedge_delayed(n: int, rate: float, outstanding: ArrayLike) -> float:
    """One Hedge with late feedback: ``ln n / rate + (rate / 8) sum_t (1 + 2 outstanding_t)``.

    **Derived.** At a constant delay d: ``ln n / rate + rate T (1 + 2d) / 8``, tuned ``sqrt((2d + 1) T ln n
    / 2)``.

    Args:
        n: drafters.
        rate: fixed learning rate.
        outstanding: for each round, how many earlier rounds' losses had not arrived when it was played.
    """
    return float(log(n) / rate + rate * (1 + 2 * as_floats(outstanding)).sum() / 8)


@theorem
def interleaved(n: int, rounds: int, delay: int, rate: float) -> float:
    """``delay + 1`` Hedges taking turns: ``(d + 1) ln n / rate + rate T / 8``.

    Tuned: ``sqrt((d + 1) T ln n / 2)``, which is not true of one instance with that delay. **Derived**:
    ``hedge`` for each instance on its own rounds; the idea is Weinberger and Ordentlich's (2002).
    """
    return (delay + 1) * log(n) / rate + rate * rounds / 8


@theorem
def blocks(n: int, rounds: int, size: int, rate: float) -> float:
    """Hedge on the means of blocks, T a multiple of ``size``: ``size ln n / rate + rate T / 8``.

    **Derived**: regret is ``size`` times that of ``T / size`` rounds; tuned ``sqrt(size T ln n / 2)``.
    """
    if rounds % size:
        raise ValueError(f"rounds must be a multiple of size {size}, got {rounds}")
    return size * log(n) / rate + rate * rounds / 8


@theorem
def optimistic_hedge(n: int, spread: float) -> float:
    """OptimisticHedge at its own rate: ``sqrt(ln n (4 + spread))``, hints in [0, 1].

    ``spread`` is the sum of the squared ranges of ``losses - hint``. **Derived**: ``master`` at
    ``2 sqrt(ln n / (4 + spread before t))``, and a squared range is at most 4.
    """
    return sqrt(log(n) * (4 + spread))


@theorem
def optimistic_stability(n: int, rate: float, misses: ArrayLike, moves: ArrayLike) -> float:
    """Regret bounded by variation in utilities (RVU) of optimistic Hedge at a fixed rate.

    ``ln n / rate + rate sum_t max_i |l_t - hint_t|^2 - sum_t |w_t - w_{t-1}|_1^2 / 4 rate``. **Published**:
    Syrgkanis, Agarwal, Luo, Schapire 2015, Prop. 7, for the last loss as hint.

    Args:
        n: drafters.
        rate: fixed learning rate.
        misses: ``max_i |l_t - hint_t|``, one a round.
        moves: ``|w_t - w_{t-1}|_1``, one a round from the second on.
    """
    return float(
        log(n) / rate + rate * (as_floats(misses) ** 2).sum() - (as_floats(moves) ** 2).sum() / (4 * rate)
    )


@theorem
def fixed_share(n: int, rounds: int, switches: int, share: float, rate: float) -> float:
    """FixedShare against the best sequence of drafters with m switches.

    ``[ln n + m ln(n / share) - (T - 1 - m) ln(1 - share + share / n)] / rate + rate T / 8``. **Derived**:
    Hedge over sequences; as Herbster and Warmuth 1998.
    """
    if switches >= rounds:
        raise ValueError(f"switches must be below rounds, {rounds}, got {switches}")
    price = log(n) + switches * log(n / share) - (rounds - 1 - switches) * log1p(-share + share / n)
    return price / rate + rate * rounds / 8


@theorem
def switches(rate: float, ranges: ArrayLike) -> float:
    """Expected switches of Hedge's choice under maximal coupling: ``(rate / 4) sum_t range(l_t)``.

    **Derived**: a round moves the law by ``TV(w_t, w_{t+1}) <= rate range / 4``.
    """
    return float(rate * as_floats(ranges).sum() / 4)


# Learners without a rate


@theorem
def ada_hedge_gap(gap: float) -> float:
    """AdaHedge: ``R <= 2 gap``, the gap between its losses and its mix losses.

    **Published**: de Rooij, van Erven, Grunwald, Koolen 2014, Lemma 3 (with Thm 6).
    """
    return 2 * gap


@theorem
def ada_hedge_variance(n: int, variance: float) -> float:
    """AdaHedge: ``2 sqrt(V ln n) + (4/3) ln n + 2``.

    V is the sum of the variances of the losses under the laws played. **Published**: de Rooij et al. 2014,
    Thm 6 (there with the range of losses for 1).
    """
    return 2 * sqrt(variance * log(n)) + 4 / 3 * log(n) + 2


@theorem
def ada_hedge(n: int, rounds: int) -> float:
    """AdaHedge in the worst case: ``sqrt(T ln n) + (4/3) ln n + 2``.

    **Derived**: ``ada_hedge_variance``, as the variance of a loss in [0, 1] is at most 1/4.
    """
    return ada_hedge_variance(n, rounds / 4)


@theorem
def normal_hedge(scale: float, eps: float) -> float:
    """NormalHedge: the regret against the eps-quantile is at most ``sqrt(2 c (1 + ln 1 / eps))``.

    **Derived**: an identity, by definition of c (``state.scale``); with a discount, of discounted regret. For
    ``eps = k / n`` it bounds the k-th largest regret.
    """
    return sqrt(2 * scale * (1 + log(1 / eps)))


@theorem
def normal_hedge_theorem(n: int, rounds: int, eps: float) -> float:
    """NormalHedge in the worst case, with constants that say little below 10^5 rounds.

    The least over 0 < d <= 1/2 of ``sqrt((1 + ln 1/eps) (3 (1 + 50 d) T + (16 ln^2 n / d) (10.2 / d^2 + ln
    n)))``. **Published**: Chaudhuri, Freund, Hsu 2009, Thm 1.
    """
    if n == 1:
        return sqrt((1 + log(1 / eps)) * 3 * rounds)
    # the derivative in d is 0 where 30.6 / d^4 + ln n / d^2 = 150 T / 16 ln^2 n
    slope = 150 * rounds / (16 * log(n) ** 2)
    d = min(0.5, sqrt(61.2 / (sqrt(log(n) ** 2 + 122.4 * slope) - log(n))))
    least = 3 * (1 + 50 * d) * rounds + 16 * log(n) ** 2 / d * (10.2 / d**2 + log(n))
    return sqrt((1 + log(1 / eps)) * least)


@theorem
def normal_hedge_guard(rounds: int, eps: float, discount: float = 1.0) -> float:
    """NormalHedge: ``c <= 3 W / 8``, so ``sqrt(0.75 W (1 + ln 1 / eps))``.

    W is T, or ``sum_t discount^(2 (T - t))``. **Conjecture**: no sequence was found that breaks it.
    """
    weight = float(rounds) if discount == 1 else (1 - discount ** (2 * rounds)) / (1 - discount**2)
    return normal_hedge(3 * weight / 8, eps)


@theorem
def normal_hedge_bh(clock: float, eps: float, start: float = 1.0) -> float:
    """NormalHedgeBH, against the eps-quantile: ``sqrt(2 c (ln(c / start) / 2 + ln 1 / eps))``.

    **Derived**: an identity, by definition of the clock c (``state.scale``). Together with
    ``normal_hedge_bh_clock`` it is of second order, the form of Freund, Harvey, Portella, Qi, Wang 2026.
    """
    if clock < start:
        raise ValueError(f"clock must be at least start, {start}, got {clock}")
    return sqrt(2 * clock * (log(clock / start) / 2 + log(1 / eps)))


@theorem
def normal_hedge_bh_clock(variance: ArrayLike, start: float = 1.0) -> Any:
    """NormalHedgeBH's clock: ``c_T <= start + 2 V_T``.

    V_T, a number or one a round, is the sum over rounds of ``sum_i rho_i r_i^2``, the squared steps of the
    regret under the law ``rho_i ~ prior_i (1 + x_i^2 / c) exp(x_i^2 / 2c)``, ``x = [R]_+`` before it.
    **Derived** for ``start >= 16 (1 + 2 ln 1 / min prior)``, up to an inequality in four numbers that was
    checked on a grid; for ``start >= 1`` and a uniform prior a **conjecture**. False below 0.398: with many
    drafters, one of them right, the first round moves the clock by ``2 start (e^(1 / 2 start) - 1)`` times V.
    """
    return start + 2 * as_floats(variance)


@theorem
def ada_normal_hedge_mean(spread: ArrayLike, prior: ArrayLike | None = None) -> float:
    """AdaNormalHedge's mean potential: ``B = 1 + (3/2) sum_i prior_i (1 + ln(1 + C_i))``.

    **Published**: Luo and Schapire 2015, Thm 1 and its proof.
    """
    C = as_floats(spread)
    weights = np.full(C.shape, 1 / C.size) if prior is None else as_floats(prior)
    _same_length(spread=C, prior=weights)
    return float(1 + 1.5 * (weights * (1 + np.log1p(C))).sum())


@theorem
def ada_normal_hedge(n: int, spread: ArrayLike) -> Floats:
    """AdaNormalHedge, against each drafter: ``sqrt(3 C_i (ln n + ln B))``, C_i the sum of ``|r_t,i|``.

    **Published**: Luo and Schapire 2015, Thm 1.
    """
    return np.sqrt(3 * as_floats(spread) * (log(n) + log(ada_normal_hedge_mean(spread))))


@theorem
def ada_normal_hedge_law(comparator: ArrayLike, spread: ArrayLike) -> float:
    """AdaNormalHedge, against a law u: ``sqrt(3 <u, C> (KL(u, uniform) + ln B + ln(1 + ln n)))``.

    **Published**: Luo and Schapire 2015, Thm 1.
    """
    u, C = as_floats(comparator), as_floats(spread)
    _same_length(comparator=u, spread=C)
    n, positive = len(u), u > 0
    divergence = (u[positive] * np.log(n * u[positive])).sum()
    logs = divergence + log(ada_normal_hedge_mean(C)) + log(1 + log(n))
    return float(np.sqrt(3 * (u @ C) * logs))


@theorem
def ada_normal_hedge_tv(n: int, spread: ArrayLike, start: int, level: int) -> Floats:
    """AdaNormalHedgeTV on one interval of its cover: ``sqrt(3 C_i ln(n B / q))`` against each drafter.

    ``q = 2^-(level + 1) / (k (k + 1))`` is the prior of the interval that begins with round ``start = k
    2^level``, counted from 1, and ``B = 1 + (3/2) (1 + ln(1 + 2^top))`` with ``2^top`` the longest interval
    begun. **Derived** from Luo and Schapire 2015, Thm 1 with sleeping experts.

    Args:
        n: drafters.
        spread: C_i, the sum of ``|r_t,i|`` over the interval, ``(n,)``.
        start: first round of the interval, from 1.
        level: its length is ``2^level``.
    """
    whole("start", start, 1)
    if start % (1 << level):
        raise ValueError(f"start must be a multiple of 2^level, {1 << level}, got {start}")
    k, last = start >> level, start + (1 << level) - 1
    longest = 1 << (last.bit_length() - 1)
    share = 0.5 ** (level + 1) / (k * (k + 1))
    return np.sqrt(3 * as_floats(spread) * log(n * (1 + 1.5 * (1 + log1p(longest))) / share))


@theorem
def squint(n: int, rounds: int, variance: ArrayLike) -> Floats:
    """Squint, against each drafter, V_i the sum of squared steps of its regret.

    ``sqrt(2 V_i) (1 + sqrt(2 ln(n (1/2 + ln(T + 1))))) + 5 ln(1 + n (1 + 2 ln(T + 1)))``. **Published**:
    Koolen and van Erven 2015, Thm 4 (improper prior).
    """
    inside = n * (0.5 + log(rounds + 1))
    return np.sqrt(2 * as_floats(variance)) * (1 + sqrt(2 * log(inside))) + 5 * log(1 + 2 * inside)


@theorem
def squint_potential(regret: ArrayLike, variance: ArrayLike, prior: ArrayLike | None = None) -> float:
    """Squint's potential ``sum_i prior_i int_0^{1/2} (exp(eta R_i - eta^2 V_i) - 1) / eta d eta``: at most 0.

    **Published**: Koolen and van Erven 2015, Lemma 1 with the improper prior. Gauss-Legendre quadrature with
    400 nodes, exact to rounding for V up to 10^4.
    """
    R, V = np.atleast_1d(as_floats(regret)), np.atleast_1d(as_floats(variance))
    weights = np.full(len(R), 1 / len(R)) if prior is None else as_floats(prior)
    _same_length(regret=R, variance=V, prior=weights)
    nodes, masses = quadrature(400)
    eta = nodes / 4 + 0.25
    steps = np.expm1(eta * R[:, None] - eta**2 * V[:, None]) / eta
    return float(weights @ (steps @ masses) / 4)


# Bandits


@theorem
def exp3(n: int, rounds: int) -> float:
    """EXP3 at the rate ``sqrt(2 ln n / T n)``: expected pseudo-regret ``sqrt(2 T n ln n)``.

    **Published**: Bubeck and Cesa-Bianchi 2012, Thm 3.1.
    """
    return sqrt(2 * rounds * n * log(n))


@theorem
def exp3_anytime(n: int, rounds: int) -> float:
    """EXP3 at the rates ``sqrt(ln n / t n)``: expected pseudo-regret ``2 sqrt(T n ln n)``.

    **Published**: Bubeck and Cesa-Bianchi 2012, Thm 3.1.
    """
    return 2 * sqrt(rounds * n * log(n))


@theorem
def exp3_ix(n: int, rounds: int, delta: float) -> float:
    """EXP3-IX at ``rate = 2 gamma = sqrt(2 ln n / n T)``: regret with probability at least ``1 - delta``.

    ``2 sqrt(2 n T ln n) + (sqrt(2 n T / ln n) + 1) ln(2 / delta)``. **Published**: Neu 2015, Thm 1.
    """
    if n == 1:
        return 0.0
    return 2 * sqrt(2 * n * rounds * log(n)) + (sqrt(2 * n * rounds / log(n)) + 1) * log(2 / delta)


@theorem
def ucb1(gaps: ArrayLike, rounds: int) -> float:
    """UCB1 on independent rewards: ``8 ln T sum_i 1 / gap_i + (1 + pi^2 / 3) sum_i gap_i`` over gaps above 0.

    **Published**: Auer, Cesa-Bianchi, Fischer 2002, Thm 1.
    """
    positive = as_floats(gaps)[as_floats(gaps) > 0]
    return float(8 * log(rounds) * (1 / positive).sum() + (1 + pi**2 / 3) * positive.sum())


@theorem
def thompson(n: int, rounds: int) -> float:
    """Thompson sampling: Bayes regret ``sqrt(n T ln n / 2)``.

    **Published**: Russo and Van Roy 2016, Prop. 1 with Prop. 3.
    """
    return sqrt(n * rounds * log(n) / 2)


# What no learner can beat


@theorem
def full_information_lower(n: int, rounds: int) -> float:
    """``sqrt(T ln n / 2)``: regret that some losses force on every learner, as n and T grow. For plots.

    **Published**: Cesa-Bianchi and Lugosi 2006, Thm 3.7 (asymptotic).
    """
    return sqrt(rounds * log(n) / 2)


@theorem
def bandit_lower(n: int, rounds: int) -> float:
    """``min(sqrt(T n), T) / 20``: regret that some losses force on every bandit. For plots.

    **Published**: Auer, Cesa-Bianchi, Freund, Schapire 2002, Thm 5.1.
    """
    return min(sqrt(rounds * n), rounds) / 20
