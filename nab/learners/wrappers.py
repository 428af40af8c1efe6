"""Wrappers: learners made of learners, for feedback that comes late or is looked at now and then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from nab.checks import whole
from nab.learners.border import checked_losses, checked_played
from nab.types import Floats, Learner


class InterleavedState(NamedTuple):
    """One state per instance, and how many ``updates`` they have had together."""

    instances: tuple[Any, ...]
    updates: int


@dataclass(frozen=True)
class Interleaved:
    """``delay + 1`` instances that take turns, so that each of them has its feedback before it plays again.

    For losses that arrive exactly ``delay`` rounds late, in order: those of round t come after round ``t +
    delay`` was played (0: before round ``t + 1``). Each instance then sees an undelayed problem of ``T /
    (delay + 1)`` rounds, so every learner's bound carries over, NormalHedge's too, which has none when one
    instance gets stale feedback (Weinberger and Ordentlich 2002; ``nab.sim.bounds.interleaved``). Where
    delays vary, hold losses back until the longest has passed, or give ``played`` to a single Hedge
    (``nab.sim.bounds.hedge_delayed``).

    Args:
        learner: see ``nab.learners``.
        delay: rounds, at least 0.

    Raises:
        ValueError: if ``delay`` is not a whole number of rounds, at least 0.

    >>> from nab.learners import Hedge
    >>> learner = Interleaved(Hedge(rate=1.0), delay=1)
    >>> state = learner.update(learner.init(2), [0.0, 1.0])   # of round 0, after round 1 was played
    >>> learner.probs(state).round(3).tolist()                # of round 2: the instance of round 0
    [0.731, 0.269]
    """

    learner: Learner[Any]
    delay: int

    def __post_init__(self) -> None:
        whole("delay", self.delay, 0)

    def init(self, n: int, batch: int | None = None, *, prior: ArrayLike | None = None) -> InterleavedState:
        """All instances at their start."""
        return InterleavedState((self.learner.init(n, batch, prior=prior),) * (self.delay + 1), 0)

    def probs(self, state: InterleavedState) -> Floats:
        """Law of the instance whose turn it is: the one that was updated last (at first, any)."""
        return self.learner.probs(state.instances[(state.updates - 1) % len(state.instances)])

    def update(
        self, state: InterleavedState, losses: ArrayLike, played: ArrayLike | None = None
    ) -> InterleavedState:
        """Hand the losses of the oldest round that waits to the instance that played it."""
        turn = state.updates % len(state.instances)
        instances = list(state.instances)
        instances[turn] = self.learner.update(instances[turn], losses, played)
        return InterleavedState(tuple(instances), state.updates + 1)


class BlocksState(NamedTuple):
    """State of the learner inside, and the ``rounds`` of the open block: sums of losses and of laws."""

    inside: Any
    losses: Floats
    played: Floats
    rounds: int


@dataclass(frozen=True)
class Blocks:
    """One update every ``size`` rounds, with the mean of their losses; the law stands still in between.

    Saves learner calls. Regret is ``size`` times that of ``T / size`` rounds: tuned Hedge's is at most
    ``sqrt(size T ln n / 2)`` (``nab.sim.bounds.blocks``). The open block at the end is not learned from.

    Args:
        learner: see ``nab.learners``.
        size: rounds in a block, at least 1.

    Raises:
        ValueError: if ``size`` is not a whole number of rounds, at least 1.

    >>> from nab.learners import Hedge
    >>> learner = Blocks(Hedge(rate=1.0), size=2)
    >>> state = learner.update(learner.init(2), [0.0, 1.0])
    >>> learner.probs(state).tolist()
    [0.5, 0.5]
    >>> learner.probs(learner.update(state, [0.0, 1.0])).round(3).tolist()
    [0.731, 0.269]
    """

    learner: Learner[Any]
    size: int

    def __post_init__(self) -> None:
        whole("size", self.size, 1)

    def init(self, n: int, batch: int | None = None, *, prior: ArrayLike | None = None) -> BlocksState:
        """No round in the block yet."""
        inside = self.learner.init(n, batch, prior=prior)
        none = np.zeros(np.shape(self.learner.probs(inside)))
        return BlocksState(inside, none, none, 0)

    def probs(self, state: BlocksState) -> Floats:
        """Law of the learner inside."""
        return self.learner.probs(state.inside)

    def update(self, state: BlocksState, losses: ArrayLike, played: ArrayLike | None = None) -> BlocksState:
        """Add to the block; when it is full, hand its means to the learner inside.

        Where the laws played within a block differ (late feedback), their mean is what the learner is
        charged for.
        """
        inside, past, laws, rounds = state
        total = past + checked_losses(losses, past.shape)
        law = self.learner.probs(inside) if played is None else checked_played(played, past.shape)
        laws, rounds = laws + law, rounds + 1
        if rounds < self.size:
            return BlocksState(inside, total, laws, rounds)
        inside = self.learner.update(inside, np.minimum(total / rounds, 1), laws / rounds)
        return BlocksState(inside, np.zeros_like(past), np.zeros_like(past), 0)
