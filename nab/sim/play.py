"""Plays a learner on a loss matrix, with feedback that may come late; draws for many queries at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nab.learners.border import whole
from nab.types import Bandit, Floats, Learner, as_floats


def play(
    learner: Learner[Any], losses: ArrayLike, *, delay: ArrayLike = 0, prior: ArrayLike | None = None
) -> tuple[Floats, Any]:
    """The laws a learner plays on given losses, and its last state.

    Args:
        learner: see ``nab.learners``.
        losses: in [0, 1], ``(rounds, n)``, or ``(rounds, n, batch)`` for independent queries.
        delay: rounds that feedback is late, at least 0: one number, or one a round. Losses of round t are
            learned from before round ``t + delay + 1`` is played, with the law of round t; what would come
            after the last round never comes.
        prior: see ``init``.

    Returns:
        Laws, shaped like ``losses``, and the state after the last round.

    Raises:
        ValueError: on losses of another shape or a negative delay.

    >>> from nab import Hedge
    >>> laws, _ = play(Hedge(rate=1.0), [[0.0, 1.0], [0.0, 1.0]])
    >>> laws.round(3).tolist()
    [[0.5, 0.5], [0.731, 0.269]]
    """
    array = _matrix(losses)
    state = learner.init(*array.shape[1:], prior=prior)
    return against(learner, state, len(array), lambda t, law: array[t], delay)


def _matrix(losses: ArrayLike) -> Floats:
    array = as_floats(losses)
    if array.ndim not in (2, 3):
        raise ValueError(f"losses must have shape (rounds, n) or (rounds, n, batch), got {array.shape}")
    return array


def against(
    learner: Learner[Any],
    state: Any,
    rounds: int,
    answer: Callable[[int, Floats], Floats],
    delay: ArrayLike = 0,
) -> tuple[Floats, Any]:
    """``play`` on, from a state, against losses ``answer(t, law)`` that may depend on their round's law."""
    delays = np.asarray(delay)
    if delays.dtype.kind not in "iu" or delays.shape not in ((), (rounds,)) or (delays < 0).any():
        raise ValueError(f"delay must be whole rounds, at least 0, one or {rounds} of them, got {delay!r}")
    laws = np.empty((rounds, *np.shape(learner.probs(state))))
    due = defaultdict(list)
    for t, late in enumerate(np.broadcast_to(delays, rounds)):
        laws[t] = learner.probs(state)
        due[t + late].append((answer(t, laws[t]), laws[t]))
        for losses, law in due.pop(t, ()):
            state = learner.update(state, losses, law)
    return laws, state


def lazily(rounds: int, period: int) -> NDArray[np.int64]:
    """Delays of lazy evaluation, ``(rounds,)``: losses are looked at behind every ``period``-th round.

    >>> lazily(5, 3).tolist()
    [2, 1, 0, 2, 1]
    """
    whole("rounds", rounds, 0)
    whole("period", period, 1)
    return np.asarray(period - 1 - np.arange(rounds) % period)


def play_bandit(bandit: Bandit[Any], losses: ArrayLike, *, rng: Any = None) -> tuple[NDArray[np.intp], Any]:
    """The arms a bandit plays on given losses, and its last state.

    Args:
        bandit: see ``nab.learners.bandits``; it sees the loss of the arm it plays and of no other.
        losses: in [0, 1], ``(rounds, n)``, or ``(rounds, n, batch)`` for independent queries.
        rng: anything ``numpy.random.default_rng`` takes; one uniform a round and query.

    Returns:
        Arms, ``(rounds,)`` or ``(rounds, batch)``, and the state after the last round.

    Raises:
        ValueError: on losses of another shape.

    >>> from nab.learners.bandits import UCB1
    >>> play_bandit(UCB1(), [[0.0, 1.0]] * 6, rng=0)[0].tolist()
    [1, 0, 0, 0, 0, 0]
    """
    array = _matrix(losses)
    state = bandit.init(*array.shape[1:])
    uniforms = np.random.default_rng(rng).random((len(array), *array.shape[2:]))
    arms = np.empty(uniforms.shape, np.intp)
    for t, u in enumerate(uniforms):
        laws = bandit.probs(state)
        arms[t] = draws(laws, u) if u.ndim else draws(laws[:, None], u[None])[0]
        state = bandit.update(state, arms[t], np.take_along_axis(array[t], arms[t : t + 1], 0)[0])
    return arms, state


def draws(laws: Floats, u: Floats) -> NDArray[np.integer[Any]]:
    """One index for each column of ``laws``, ``(n, batch)``, by inverse CDF of ``u`` in [0, 1), ``(batch,)``.

    Never an index of mass 0. For a handful of rows, counting those that ``u`` has passed costs less than
    summing along an axis.

    >>> draws(np.array([[0.5, 0.0], [0.5, 1.0]]), np.array([0.25, 0.0])).tolist()
    [0, 1]
    """
    passed: NDArray[np.integer[Any]]
    if len(laws) > 64:
        sums = laws.cumsum(0)
        cdf, passed = sums[-1], np.count_nonzero(sums[:-1] <= u, axis=0)
    else:
        cdf, passed = laws[0].copy(), np.zeros(len(u), np.int8)
        for row in laws[1:]:
            passed += (cdf <= u).view(np.int8)
            cdf += row
    for late in np.flatnonzero(cdf <= u):
        passed[late] = laws[:, late].nonzero()[0][-1]
    return passed
