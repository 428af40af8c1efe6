"""Selectors: who drafts the next round. One per query; the only mutable object outside the backends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from nab.learners import flat, restored
from nab.losses import Token
from nab.sampling import sample
from nab.types import Evaluate, Floats, Learner, Objective, as_floats

Pick = Callable[[Floats, float], int]
"""How a law becomes a choice: ``sample`` draws from it, ``argmax`` takes its mode."""


def argmax(probs: Floats, u: float) -> int:
    """The likeliest drafter, the lower index among equals; ``u`` is ignored."""
    return int(np.argmax(probs))


class Chooses(Protocol):
    """What ``decode`` needs of a selector."""

    @property
    def choice(self) -> int:
        """The drafter of the coming round."""

    @property
    def probs(self) -> Floats:
        """The law ``choice`` was drawn from, ``(n,)``."""

    def observe(self, emitted: int, evaluate: Evaluate) -> tuple[Floats, Floats] | None:
        """Take note of a finished round that emitted ``emitted >= 1`` tokens.

        Args:
            emitted: tokens emitted, between 1 and the draft length plus 1.
            evaluate: call it for the acceptance probabilities of the verified positions; a selector that
                does not need them never pays for them.

        Returns:
            What ``evaluate`` returned, for the record, or None if it was not called.
        """


class Selector:
    """Plays a full-information learner: every round it scores all drafters on the verified tokens.

    Losses of a position are released when the objective's window of verified positions behind it is complete,
    for all drafters together, and reach the learner in order with the law that was played at the position
    (Liu et al. 2025, section 4).

    Args:
        learner: see ``nab.learners``.
        n: number of drafters, at least 1.
        objective: what to minimise; by default the token loss.
        pick: ``sample`` (default) draws the choice from the learner's law, ``argmax`` takes its mode. The
            regret bounds are for the draw.
        rng: anything ``numpy.random.default_rng`` takes.

    >>> from nab import NormalHedge, Selector
    >>> selector = Selector(NormalHedge(), 2, rng=0)
    >>> gamma = np.array([[0.9, 0.2], [0.8, 0.1]])
    >>> _ = selector.observe(2, lambda: (gamma, gamma))
    >>> selector.choice, selector.probs.tolist()
    (0, [1.0, 0.0])
    """

    def __init__(
        self,
        learner: Learner[Any],
        n: int,
        *,
        objective: Objective | None = None,
        pick: Pick = sample,
        rng: Any = None,
    ) -> None:
        self.learner = learner
        self.objective = objective or Token()
        self.state = learner.init(n)
        self._pick = pick
        self._rng = np.random.default_rng(rng)
        self._pending = np.empty((3, 0, n))  # gamma, realised, played of positions not yet released
        self._choose()

    def _choose(self) -> None:
        self.probs = self.learner.probs(self.state)
        self.choice = self._pick(self.probs, self._rng.random())

    def observe(self, emitted: int, evaluate: Evaluate) -> tuple[Floats, Floats]:
        """Score all drafters on the new positions, feed the losses that are complete, choose again."""
        gamma, realised = evaluate()
        new = np.stack([gamma, realised, np.broadcast_to(self.probs, np.shape(gamma))])
        self._pending = np.concatenate([self._pending, new], axis=1)
        losses = self.objective(self._pending[0], self._pending[1])
        for loss, played in zip(losses, self._pending[2], strict=False):
            self.state = self.learner.update(self.state, loss, played)
        self._pending = self._pending[:, len(losses) :]
        self._choose()
        return gamma, realised

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on from here, as plain JSON types, exact to the last bit."""
        return {
            "learner": {name: value.tolist() for name, value in flat(self.state).items()},
            "pending": self._pending.tolist(),
            "choice": self.choice,
            "probs": self.probs.tolist(),
            "rng": self._rng.bit_generator.state,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from ``state_dict()`` of a selector made with the same learner, ``n`` and objective.

        Raises:
            ValueError: on another ``n``.
        """
        n = self._pending.shape[2]
        if len(saved["probs"]) != n:
            raise ValueError(f"saved state is over {len(saved['probs'])} drafters, this selector over {n}")
        self.state = restored(self.state, saved["learner"])
        self._pending = np.array(saved["pending"]).reshape(3, -1, n)
        self.choice = saved["choice"]
        self.probs = np.array(saved["probs"])
        self._rng.bit_generator.state = saved["rng"]


class Constant:
    """Draws from the same law every round and never evaluates: a fixed drafter (one-hot) or uniform choice.

    Args:
        probs: ``(n,)``, non-negative, summing to 1.
        rng: anything ``numpy.random.default_rng`` takes.

    Raises:
        ValueError: if ``probs`` is no distribution.
    """

    def __init__(self, probs: ArrayLike | Sequence[float], *, rng: Any = None) -> None:
        self.probs = as_floats(probs)
        if self.probs.ndim != 1 or not (self.probs >= 0).all() or abs(self.probs.sum() - 1) > 1e-9:
            raise ValueError(f"probs must be non-negative and sum to 1, got {self.probs.tolist()}")
        self._rng = np.random.default_rng(rng)
        self.choice = sample(self.probs, self._rng.random())

    def observe(self, emitted: int, evaluate: Evaluate) -> None:
        """Choose again."""
        self.choice = sample(self.probs, self._rng.random())
