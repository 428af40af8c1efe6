"""Selectors: who drafts the next round. One per query; the only mutable object outside the backends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike

from nab.checks import whole
from nab.learners import flat, restored
from nab.losses import Time, Token
from nab.sampling import transport
from nab.types import Bandit, Evaluate, Floats, Learner, Objective, as_floats


class Before(NamedTuple):
    """The choice of the last round and the law that it was made from."""

    choice: int
    probs: Floats


Spent = tuple[float, float]
"""Seconds that a round spent drafting, and in the target's forward and verification."""


Pick = Callable[[Floats, Callable[[], float], "Before | None"], int]
"""How a law becomes a choice: ``draw``, ``argmax`` or ``coupled``.

Called with the law ``(n,)``, a source of uniforms in [0, 1), and what was chosen before (None at first).
"""


def draw(probs: Floats, uniform: Callable[[], float], before: Before | None = None) -> int:
    """Inverse CDF of one uniform, never an index of mass 0. The regret bounds are for this rule."""
    u, cdf = uniform(), 0.0
    for i, p in enumerate(probs.tolist()):
        cdf += p
        if u < cdf:
            return i
    return int(probs.nonzero()[0][-1])


def argmax(probs: Floats, uniform: Callable[[], float], before: Before | None = None) -> int:
    """The likeliest drafter, the lower index among equals.

    Safe against losses that do not answer to it, such as a text's, as long as one drafter leads for long;
    where leaders take turns it follows the leader, one round late, and no bound holds.
    """
    return int(probs.argmax())


def coupled(probs: Floats, uniform: Callable[[], float], before: Before | None = None) -> int:
    """A draw that moves as seldom as a draw from this law can: ``P(switch) = TV(before.probs, probs)``.

    The maximal coupling of the last law and this one: keeps caches of the others cold, and switches at most
    ``nab.sim.bounds.switches`` times in expectation. The choice has law ``probs`` exactly if ``probs`` does
    not depend on the last draw. That is so for losses that come whatever was drawn, one vector a round. In
    ``decode`` the text is such, but a better draft verifies more of it before the next draw, so there the
    law holds only nearly; the text is the target's all the same.
    """
    if before is None:
        return draw(probs, uniform)
    return transport(before.choice, before.probs, probs, uniform(), uniform())


class Chooses(Protocol):
    """What ``decode`` needs of a selector."""

    @property
    def choice(self) -> int:
        """The drafter of the coming round."""

    @property
    def probs(self) -> Floats:
        """The law ``choice`` was drawn from, ``(n,)``."""

    @property
    def draft_len(self) -> int | None:
        """Tokens to draft in the coming round, 0 for plain decoding; None for all that the decoder drafts."""

    def observe(
        self, emitted: int, evaluate: Evaluate, *, seconds: Spent | None = None
    ) -> tuple[Floats, Floats] | None:
        """Take note of a finished round that emitted ``emitted >= 1`` tokens.

        Args:
            emitted: tokens emitted, between 1 and the draft length plus 1.
            evaluate: call it for the acceptance probabilities of the verified positions; a selector that
                does not need them never pays for them.
            seconds: that the round spent drafting and verifying; only the time objective needs them.

        Returns:
            What ``evaluate`` returned, for the record, or None if it was not called.
        """


class Selector:
    """Plays a full-information learner: every round it scores all drafters on the verified tokens.

    Losses of a position are released when the objective's window of verified positions behind it is complete,
    for all drafters together, and reach the learner in order with the law that was played at the position
    (Liu et al. 2025, section 4). Under the time objective the learner's experts are pairs of a drafter and a
    draft length; ``law`` is over them, ``probs`` what it gives to each drafter.

    Args:
        learner: see ``nab.learners``.
        n: number of drafters, at least 1.
        objective: what to minimise; by default the token loss. It is copied.
        pick: ``draw`` (default) draws the choice from the learner's law, ``argmax`` takes its mode,
            ``coupled`` draws so that it seldom changes.
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
        pick: Pick = draw,
        rng: Any = None,
    ) -> None:
        self.learner = learner
        self.objective = copy(objective or Token())  # what it knows of a query stays with the query
        if isinstance(self.objective, Time):
            prior = self.objective.prior(n)
            self.state = learner.init(len(prior), prior=prior)
        else:
            self.state = learner.init(n)
        self._pick = pick
        self._rng = np.random.default_rng(rng)
        self._choose(None)
        # gamma, realised, played of positions not yet released
        self._pending: tuple[Any, ...] = *(np.empty((0, n)),) * 2, np.empty((0, len(self.law)))
        self._skipped = 0  # positions since the last scores

    def _choose(self, before: Before | None) -> None:
        self.law = self.learner.probs(self.state)
        self._expert = self._pick(self.law, self._rng.random, before)
        self._place()

    def _place(self) -> None:
        """What the learner's choice and law say of drafters and draft lengths."""
        lengths = self.objective.lengths
        self.choice, column = divmod(self._expert, len(lengths))
        self.draft_len = lengths[column]
        self.probs = self.law if len(lengths) == 1 else self.law.reshape(-1, len(lengths)).sum(1).clip(max=1)

    def _note(self, seconds: Spent | None) -> None:
        """What the finished round cost, where that matters."""
        if isinstance(self.objective, Time):
            if seconds is None:
                raise ValueError("the time objective needs the seconds of each round, got None")
            self.objective.costs.add(self.choice, int(self.draft_len or 0), *seconds)

    def observe(
        self, emitted: int, evaluate: Evaluate, *, seconds: Spent | None = None
    ) -> tuple[Floats, Floats]:
        """Score all drafters on the new positions, feed the losses that are complete, choose again.

        Raises:
            ValueError: on scores that are not in [0, 1], or not of shape ``(positions, n)``, or
                ``(positions, depths, n)`` by depth; under the time objective, without ``seconds``.
        """
        self._note(seconds)
        gamma, realised = self._scored(emitted, evaluate)
        for loss, law in zip(*self._released(gamma, realised), strict=True):
            self.state = self.learner.update(self.state, loss, law)
        self._choose(Before(self._expert, self.law))
        return gamma, realised

    def _scored(self, emitted: int, evaluate: Evaluate) -> tuple[Floats, Floats]:
        """Scores of the new positions; those that wait for what follows them go, if that was left out."""
        gamma, realised = evaluate()
        if len(gamma) < self._skipped + emitted:
            self._pending = tuple(each[:0] for each in self._pending)
        self._skipped = 0
        return gamma, realised

    def _released(self, gamma: Floats, realised: Floats) -> tuple[Floats, Floats]:
        """The losses that new scores complete, and the laws that were played there, ``(losses, n)`` each."""
        check_scores(gamma, realised, len(self.probs))
        played = np.tile(self.law, (len(gamma), 1))
        known: tuple[Any, ...] = as_floats(gamma), as_floats(realised), played
        if len(self._pending[0]):
            known = tuple(map(np.concatenate, zip(self._pending, known, strict=True)))
        losses = self.objective(known[0], known[1])
        self._pending = tuple(each[len(losses) :] for each in known)
        return losses, known[2][: len(losses)]

    @property
    def leading(self) -> tuple[int, float]:
        """The likeliest expert and its weight; the copies of plain decoding count as one."""
        law, lengths = self.law.copy(), self.objective.lengths
        if 0 in lengths:
            copies = law[lengths.index(0) :: len(lengths)]
            copies[0], copies[1:] = copies.sum(), 0
        first = int(law.argmax())
        return first, float(law[first])

    def skip(self, emitted: int, *, seconds: Spent | None = None) -> None:
        """Choose again by the law in force; see ``nab.wrappers.Skips``."""
        self._note(seconds)
        self._skipped += emitted
        self._choose(Before(self._expert, self.law))

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on from here, as plain JSON types, exact to the last bit."""
        timed = {"objective": self.objective.state_dict()} if isinstance(self.objective, Time) else {}
        return {
            "learner": _plain(self.state),
            "pending": [each.tolist() for each in self._pending],
            "skipped": self._skipped,
            **_choice_dict(self._expert, self.law, self._rng),
            **timed,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from ``state_dict()`` of a selector made with the same learner, ``n`` and objective.

        Raises:
            ValueError: on another ``n``.
        """
        _check_size(saved, len(self.law))
        self.state = restored(self.state, saved["learner"])
        self._skipped = saved["skipped"]
        empty = [each[:0] for each in self._pending]
        saved_pending = zip(saved["pending"], empty, strict=True)
        self._pending = tuple(np.array(each) if each else none for each, none in saved_pending)
        if isinstance(self.objective, Time):
            self.objective.load_state_dict(saved["objective"])
        self._expert, self.law = saved["choice"], np.array(saved["probs"])
        self._rng.bit_generator.state = saved["rng"]
        self._place()


class BanditSelector:
    """Plays a bandit: of a round it sees the tokens emitted, and it never has another drafter scored.

    The loss of a round is the share of its draft that was missed, ``(draft_len + 1 - emitted) / draft_len``
    in [0, 1] (BanditSpec, Hou et al. 2025). Every bandit gets this one, ``MetaSD`` too, whose authors reward
    it with ``1 - TV(p, q)`` of the drafted tokens: an engine would have to hand that out. So ``UCB1()`` and
    ``MetaSD(beta=1)`` are one policy here, and so are ``EXP3()`` and ``EXP3Spec``.

    Args:
        bandit: see ``nab.learners.bandits``.
        n: number of drafters, at least 1.
        draft_len: drafted tokens per round, at least 1; the one of the decoder.
        rng: anything ``numpy.random.default_rng`` takes.

    Raises:
        ValueError: if ``draft_len`` is no whole number from 1 on.

    >>> from nab import BanditSelector
    >>> from nab.learners.bandits import UCB1
    >>> selector = BanditSelector(UCB1(), 2, draft_len=4, rng=0)
    >>> first = selector.choice
    >>> selector.observe(5, None)
    >>> selector.choice == 1 - first, selector.state.losses.tolist()
    (True, [0.0, 0.0])
    """

    def __init__(self, bandit: Bandit[Any], n: int, *, draft_len: int, rng: Any = None) -> None:
        whole("draft_len", draft_len, 1)
        self.bandit = bandit
        self.draft_len = draft_len
        self.state = bandit.init(n)
        self._rng = np.random.default_rng(rng)
        self._choose()

    def _choose(self) -> None:
        self.probs = self.bandit.probs(self.state)
        self.choice = draw(self.probs, self._rng.random)

    def observe(self, emitted: int, evaluate: Evaluate, *, seconds: Spent | None = None) -> None:
        """Tell the bandit what its round missed, choose again.

        Raises:
            ValueError: on more or fewer tokens than a round of ``draft_len`` can emit.
        """
        if not 1 <= emitted <= self.draft_len + 1:
            raise ValueError(f"emitted must lie in 1 .. {self.draft_len + 1}, got {emitted}")
        loss = (self.draft_len + 1 - emitted) / self.draft_len
        self.state = self.bandit.update(self.state, self.choice, loss)
        self._choose()

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on from here, as plain JSON types, exact to the last bit."""
        return {"bandit": _plain(self.state), **_choice_dict(self.choice, self.probs, self._rng)}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from ``state_dict()`` of a selector made with the same bandit, ``n`` and ``draft_len``.

        Raises:
            ValueError: on another ``n``.
        """
        _check_size(saved, len(self.probs))
        self.state = restored(self.state, saved["bandit"])
        self.choice, self.probs = saved["choice"], np.array(saved["probs"])
        self._rng.bit_generator.state = saved["rng"]


def check_scores(gamma: Any, realised: Any, n: int, *, least: int = 1) -> None:
    """Raise ValueError unless both are in [0, 1], of the same shape, and ``(positions, n)`` or by depth."""
    for name, scores in (("gamma", gamma), ("realised", realised)):
        array = as_floats(scores)
        if array.ndim not in (2, 3) or len(array) < least or array.shape[-1] != n:
            some = ", a position at least" if least else ""
            raise ValueError(f"{name} must have shape (positions, {n}){some}, got {array.shape}")
        outside = array[~((array >= 0) & (array <= 1))]
        if outside.size:
            raise ValueError(f"{name} must lie in [0, 1], got {outside[0]}")
    if len(gamma) != len(realised):
        raise ValueError(f"gamma has {len(gamma)} positions, realised {len(realised)}: must be equal")
    if np.shape(gamma) != np.shape(realised):
        raise ValueError(f"gamma has shape {np.shape(gamma)}, realised {np.shape(realised)}: must be equal")


def _choice_dict(choice: int, law: Floats, rng: np.random.Generator) -> dict[str, Any]:
    """The choice, its law and the draws to come, as plain JSON types."""
    return {"choice": choice, "probs": law.tolist(), "rng": rng.bit_generator.state}


def _plain(state: Any) -> dict[str, Any]:
    """A learner's state as plain JSON types."""
    return {name: value.tolist() for name, value in flat(state).items()}


def _check_size(saved: dict[str, Any], n: int) -> None:
    if len(saved["probs"]) != n:
        raise ValueError(f"saved state is over {len(saved['probs'])} drafters, this selector over {n}")


class Constant:
    """Draws from the same law every round and never evaluates: a fixed drafter (one-hot) or uniform choice.

    Args:
        probs: ``(n,)``, non-negative, summing to 1.
        draft_len: drafted tokens a round, at least 0; None leaves them to the decoder.
        rng: anything ``numpy.random.default_rng`` takes.

    Raises:
        ValueError: if ``probs`` is no distribution, or ``draft_len`` negative.
    """

    def __init__(
        self, probs: ArrayLike | Sequence[float], *, draft_len: int | None = None, rng: Any = None
    ) -> None:
        if draft_len is not None:
            whole("draft_len", draft_len, 0)
        self.probs, self.draft_len = as_floats(probs), draft_len
        if self.probs.ndim != 1 or not (self.probs >= 0).all() or abs(self.probs.sum() - 1) > 1e-9:
            raise ValueError(f"probs must be non-negative and sum to 1, got {self.probs.tolist()}")
        self._rng = np.random.default_rng(rng)
        self._fixed = np.count_nonzero(self.probs) == 1
        self.choice = draw(self.probs, self._rng.random)

    def observe(self, emitted: int, evaluate: Evaluate, *, seconds: Spent | None = None) -> None:
        """Choose again."""
        if not self._fixed:
            self.choice = draw(self.probs, self._rng.random)
