"""Environments: loss matrices, ``(rounds, n)`` or ``(rounds, n, batch)``, and what they are made of.

A stochastic one is a *mean path* (what each drafter loses on average, round by round) under *noise*:
``bernoulli(switching(1000, 8, switches=3), batch=200, rng=0)``. Losses of one round are independent between
drafters, given the means. Adversarial ones are deterministic; ``adaptive`` answers the law it sees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from nab.checks import checked, whole
from nab.sim.play import delays, turns
from nab.types import Floats, Learner, as_floats

# Mean paths


def gapped(rounds: int, n: int, *, gap: float = 0.1, best: int = 0, level: float = 0.5) -> Floats:
    """``(rounds, n)``: all drafters lose ``level`` on average, the best one ``gap`` less, throughout.

    Raises:
        ValueError: if ``rounds`` or ``n`` is below 1, ``best`` no drafter, or a mean would leave [0, 1].

    >>> gapped(2, 3, gap=0.25, best=1).tolist()
    [[0.5, 0.25, 0.5], [0.5, 0.25, 0.5]]
    """
    return switching(rounds, n, switches=0, gap=gap, first=best, level=level)


def switching(
    rounds: int, n: int, *, switches: int, gap: float = 0.4, first: int = 0, level: float = 0.5
) -> Floats:
    """``(rounds, n)``: ``gapped``, but the best drafter is the next one in each of ``switches + 1`` segments.

    Segments have equal lengths, to within a round.

    Raises:
        ValueError: as ``gapped``, or if ``switches`` is not in 0 .. rounds - 1.

    >>> switching(4, 2, switches=1, gap=0.5).tolist()
    [[0.0, 0.5], [0.0, 0.5], [0.5, 0.0], [0.5, 0.0]]
    """
    _whole_at_least_one(rounds=rounds, n=n)
    whole("switches", switches, 0)
    if switches >= rounds:
        raise ValueError(f"switches must be below rounds, {rounds}, got {switches}")
    if not 0 <= first < n:
        raise ValueError(f"the best drafter must be in 0 .. {n - 1}, got {first}")
    if not 0 <= level - gap <= level <= 1:
        raise ValueError(f"means must lie in [0, 1], got level {level} and gap {gap}")
    means = np.full((rounds, n), level)
    segment = np.arange(rounds) * (switches + 1) // rounds
    means[np.arange(rounds), (first + segment) % n] = level - gap
    return means


def drifting(rounds: int, n: int, *, period: float, gap: float = 0.4) -> Floats:
    """``(rounds, n)``: means ``0.5 - gap cos(2 pi (t / period - i / n)) / 2``; drafters are best in turn.

    Raises:
        ValueError: if ``rounds`` or ``n`` is below 1, ``gap`` not in (0, 1] or ``period`` not above 0.

    >>> drifting(4, 2, period=4, gap=1.0).round(3).tolist()
    [[0.0, 1.0], [0.5, 0.5], [1.0, 0.0], [0.5, 0.5]]
    """
    _whole_at_least_one(rounds=rounds, n=n)
    checked("gap", gap, high=1, closed=True)
    checked("period", period)
    phase = np.arange(rounds)[:, None] / period - np.arange(n) / n
    return np.asarray(0.5 - gap * np.cos(2 * np.pi * phase) / 2)


def experts(
    domains: ArrayLike, n: int, *, own: float = 0.2, other: float = 0.7, general: float = 0.4
) -> Floats:
    """``(rounds, n)``: one expert per domain, and a generalist, the last drafter, that is fair at everything.

    Args:
        domains: of each round, whole numbers in 0 .. n - 2, ``(rounds,)``.
        n: drafters, the generalist included.
        own: what an expert loses on average in its domain, in [0, 1].
        other: what it loses elsewhere.
        general: what the generalist loses everywhere.

    Raises:
        ValueError: on a domain without an expert or a mean outside [0, 1].

    >>> experts([0, 1], 3).tolist()
    [[0.2, 0.7, 0.4], [0.7, 0.2, 0.4]]
    """
    whole("n", n, 2)
    where = np.asarray(domains)
    if where.ndim != 1 or where.dtype.kind not in "iu" or not ((where >= 0) & (where < n - 1)).all():
        raise ValueError(f"domains must be whole numbers in 0 .. {n - 2}, one a round, got {domains!r}")
    if not all(0 <= mean <= 1 for mean in (own, other, general)):
        raise ValueError(f"means must lie in [0, 1], got own {own}, other {other}, general {general}")
    means = np.full((len(where), n), other)
    means[:, -1] = general
    means[np.arange(len(where)), where] = own
    return means


def domain_path(rounds: int, domains: int, *, stay: float, rng: Any = None) -> Any:
    """A query's domains, ``(rounds,)``: a hidden chain that stays with probability ``stay``, else moves on.

    Raises:
        ValueError: if ``stay`` is not in [0, 1], or ``rounds`` or ``domains`` is below 1.
    """
    _whole_at_least_one(rounds=rounds, domains=domains)
    if not 0 <= stay <= 1:
        raise ValueError(f"stay must lie in [0, 1], got {stay}")
    random = np.random.default_rng(rng)
    moves = (random.random(rounds) >= stay) * random.integers(1, max(domains, 2), rounds)
    moves[0] = random.integers(domains)
    return moves.cumsum() % domains


def _whole_at_least_one(**numbers: int) -> None:
    for name, value in numbers.items():
        whole(name, value, 1)


# Noise


def bernoulli(means: ArrayLike, *, batch: int | None = None, rng: Any = None) -> Floats:
    """Losses 0 or 1 with these means: independent draws, ``(rounds, n)`` or ``(rounds, n, batch)``.

    Args:
        means: in [0, 1], ``(rounds, n)``.
        batch: independent queries; None is a single one without that axis.
        rng: anything ``numpy.random.default_rng`` takes.
    """
    (path, shape), random = _path(means, batch), np.random.default_rng(rng)
    return (random.random(shape) < path).astype(np.float64)


def beta(
    means: ArrayLike, *, concentration: float = 4.0, batch: int | None = None, rng: Any = None
) -> Floats:
    """Losses from ``Beta(c m, c (1 - m))``, mean m: smoother than ``bernoulli`` the higher c is.

    Args:
        means: in [0, 1], ``(rounds, n)``.
        concentration: c above 0; the variance is ``m (1 - m) / (c + 1)``.
        batch: independent queries; None is a single one without that axis.
        rng: anything ``numpy.random.default_rng`` takes.
    """
    checked("concentration", concentration)
    (path, shape), random = _path(means, batch), np.random.default_rng(rng)
    tiny = np.finfo(float).tiny  # a mean of 0 or 1 has no beta law, but its limit
    return random.beta(
        np.maximum(concentration * path, tiny), np.maximum(concentration * (1 - path), tiny), shape
    )


def _path(means: ArrayLike, batch: int | None) -> tuple[Floats, tuple[int, ...]]:
    """Means checked, with an axis for the batch where there is one, and the shape of the losses."""
    path = as_floats(means)
    if path.ndim != 2 or not ((path >= 0) & (path <= 1)).all():
        raise ValueError(f"means must lie in [0, 1] and have shape (rounds, n), got {path.shape}")
    if batch is None:
        return path, path.shape
    whole("batch", batch, 1)
    return path[:, :, None], (*path.shape, batch)


# Adversaries


def leader_killer(rounds: int) -> Floats:
    """Two drafters, ``(rounds, 2)``: after one half loss each is wrong whenever it leads.

    Following the leader loses every round but the first, each drafter loses half of them.

    >>> leader_killer(4).tolist()
    [[0.5, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]
    """
    _whole_at_least_one(rounds=rounds)
    losses = np.tile([[1.0, 0.0], [0.0, 1.0]], (rounds // 2 + 1, 1))[:rounds]
    losses[0] = [0.5, 0.0]
    return losses


def comb(rounds: int, n: int) -> Floats:
    """``(rounds, n)``: the first two drafters take turns at being right, all others are always wrong.

    >>> comb(2, 3).tolist()
    [[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]]
    """
    _whole_at_least_one(rounds=rounds)
    whole("n", n, 2)
    losses = np.ones((rounds, n))
    losses[::2, 0] = losses[1::2, 1] = 0
    return losses


Adversary = Callable[[Floats], Floats]
"""Losses of a round from the law it sees played; both ``(n,)`` or ``(n, batch)``."""


def anti_leader(law: Floats) -> Floats:
    """Loss 1 for the likeliest drafter alone.

    >>> anti_leader(np.array([0.2, 0.5, 0.3])).tolist()
    [0.0, 1.0, 0.0]
    """
    return np.asarray(_ranks(law) == 0, dtype=np.float64)


def half_mass(law: Floats) -> Floats:
    """Loss 1 for the likeliest drafters that together hold half of the mass.

    >>> half_mass(np.array([0.2, 0.4, 0.3, 0.1])).tolist()
    [0.0, 1.0, 1.0, 0.0]
    """
    ordered = -np.sort(-law, axis=0)
    return np.asarray(_ranks(law) <= np.count_nonzero(ordered.cumsum(0) < 0.5, axis=0), dtype=np.float64)


def _ranks(law: Floats) -> Any:
    """Places of the drafters by mass, from 0 for the likeliest; the lower index first among equals."""
    return np.argsort(np.argsort(-law, axis=0, kind="stable"), axis=0)


def adaptive(
    learner: Learner[Any], n: int, rounds: int, answer: Adversary, *, delay: ArrayLike = 0
) -> Floats:
    """The losses, ``(rounds, n)``, that an adversary gives who sees every law before it answers.

    The learner learns of them ``delay`` rounds late, as in ``nab.sim.play``.
    """
    given: list[Floats] = []

    def answered(_: int, law: Floats) -> Floats:
        given.append(answer(law))
        return given[-1]

    for _ in turns(learner, learner.init(n), delays(rounds, delay), answered):
        pass
    return np.array(given).reshape(rounds, n)
