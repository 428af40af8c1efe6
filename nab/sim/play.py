"""Plays a learner on a loss matrix, with feedback that may come late; draws for many queries at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from inspect import signature
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nab.checks import whole
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
        ValueError: on losses of another shape, a negative delay, or a bandit.

    >>> from nab import Hedge
    >>> laws, _ = play(Hedge(rate=1.0), [[0.0, 1.0], [0.0, 1.0]])
    >>> laws.round(3).tolist()
    [[0.5, 0.5], [0.731, 0.269]]
    """
    if is_bandit(learner):
        raise ValueError(f"{learner!r} is a bandit: play_bandit plays it")
    array = _matrix(losses)
    state, laws = learner.init(*array.shape[1:], prior=prior), np.empty_like(array)
    for t, (law, after) in enumerate(turns(learner, state, delays(len(array), delay), lambda t, _: array[t])):
        laws[t], state = law, after
    return laws, state


Answer = Callable[[int, Floats], Floats]
"""The losses of round t, from t and the law that was played in it; both ``(n,)`` or ``(n, batch)``."""


def turns(
    learner: Learner[Any], state: Any, late: Iterable[int], answer: Answer
) -> Iterator[tuple[Floats, Any]]:
    """Rounds one by one, as they are played: the law of each, and the state after it.

    Args:
        learner: see ``nab.learners``.
        state: to begin with.
        late: delay of each round; as many rounds are played.
        answer: gives the losses; unlike a matrix it may make them as it goes, or answer the law.
    """
    due = defaultdict(list)
    for t, wait in enumerate(late):
        law = learner.probs(state)
        due[t + wait].append((answer(t, law), law))
        for losses, played in due.pop(t, ()):
            state = learner.update(state, losses, played)
        yield law, state


def delays(rounds: int, delay: ArrayLike) -> NDArray[np.integer[Any]]:
    """One delay a round, ``(rounds,)``, from one number or as many.

    Raises:
        ValueError: if they are no whole numbers, at least 0, or another number of them.
    """
    late = np.asarray(delay)
    if late.dtype.kind not in "iu" or late.shape not in ((), (rounds,)) or (late < 0).any():
        raise ValueError(f"delay must be whole rounds, at least 0, one or {rounds} of them, got {delay!r}")
    return np.broadcast_to(late, rounds)


def is_bandit(player: Any) -> bool:
    """Whether a player sees the loss of its arm alone: its ``update`` says so."""
    return "arm" in signature(player.update).parameters


def _matrix(losses: ArrayLike) -> Floats:
    array = as_floats(losses)
    if array.ndim not in (2, 3):
        raise ValueError(f"losses must have shape (rounds, n) or (rounds, n, batch), got {array.shape}")
    return array


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
        ValueError: on losses of another shape, or a learner that is no bandit.

    >>> from nab.learners.bandits import UCB1
    >>> play_bandit(UCB1(), [[0.0, 1.0]] * 6, rng=0)[0].tolist()
    [1, 0, 0, 0, 0, 0]
    """
    if not is_bandit(bandit):
        raise ValueError(f"{bandit!r} is no bandit: play plays it")
    array = _matrix(losses)
    state = bandit.init(*array.shape[1:])
    uniforms = np.random.default_rng(rng).random((len(array), *array.shape[2:]))
    arms = np.empty(uniforms.shape, np.intp)
    for t, (arm, after) in enumerate(pulls(bandit, state, uniforms, lambda t, _: array[t])):
        arms[t], state = arm, after
    return arms, state


def pulls(
    bandit: Bandit[Any], state: Any, uniforms: Iterable[Any], answer: Answer
) -> Iterator[tuple[Any, Any]]:
    """A bandit's rounds one by one: the arm of each, ``()`` or ``(batch,)``, and the state after it.

    Args:
        bandit: see ``nab.learners.bandits``.
        state: to begin with.
        uniforms: in [0, 1), ``()`` or ``(batch,)``, one a round; as many rounds are played.
        answer: gives the losses, of which the bandit sees the arm's.
    """
    for t, u in enumerate(uniforms):
        law = bandit.probs(state)
        arm = draws(law, u) if np.ndim(u) else draws(law[:, None], np.asarray([u]))[0]
        state = bandit.update(state, arm, np.take_along_axis(answer(t, law), np.asarray(arm)[None], 0)[0])
        yield arm, state


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
