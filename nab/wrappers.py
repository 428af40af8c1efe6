"""Selectors around selectors: scored seldom, corrected by depth, censored to whole rounds."""

from __future__ import annotations

from collections import deque
from functools import reduce
from operator import add
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from nab.checks import checked, whole
from nab.losses import Token, by_depth, expected_length
from nab.selector import Chooses, Selector, Spent
from nab.types import Evaluate, Floats, as_floats


class Skips(Chooses, Protocol):
    """A selector that can play a round whose positions are scored later: what ``Lazy`` needs."""

    @property
    def leading(self) -> tuple[Any, float]:
        """What has the largest weight now, and that weight."""

    def skip(self, emitted: int, *, seconds: Spent | None = None) -> None:
        """Take note of a finished round and choose again, by the law in force.

        The next ``observe`` has to bring its positions too, before its own, or to leave the first of all out.
        """


class Wrapped:
    """A selector that another one stands around: its choice is passed on."""

    def __init__(self, selector: Chooses) -> None:
        self._selector = selector

    @property
    def choice(self) -> int:
        """The wrapped selector's choice."""
        return self._selector.choice

    @property
    def probs(self) -> Floats:
        """The law ``choice`` was drawn from, ``(n,)``."""
        return self._selector.probs

    @property
    def draft_len(self) -> int | None:
        """The wrapped selector's draft length."""
        return self._selector.draft_len


class Lazy(Wrapped):
    """Has all drafters scored behind every m-th round only, or more seldom while one of them leads.

    The positions of the rounds between are scored then too, in one longer forward of each drafter. So the
    learner gets the losses that it would have got every round, in the same order and with the laws that were
    played, only later: with a delay of d rounds the regret bound of Hedge grows to ``sqrt((2 d + 1) T ln n /
    2)`` (``nab.sim.bounds.hedge_delayed``). Between, each round draws anew from the law in force. With a
    ``span`` positions are left out, and no bound holds for what happened there; but however long one leads,
    scoring costs no more than ``span`` positions each time.

    Args:
        selector: a fresh ``Selector``, or a ``Corrected`` around one.
        every: m, rounds from one scoring to the next, at least 1.
        above: in (0, 1]; None is never. While the same drafter has at least this weight, each wait is twice
            the last one; as soon as another leads, or none so clearly, waits are ``every`` rounds again.
        most: rounds to wait at most, at least ``every``.
        span: of the positions that wait, the last ones are scored, at least so many, in whole rounds; those
            before are left out for good. None leaves nothing out. What waits at most, with the target's laws.

    Raises:
        ValueError: on an argument outside its range, or a selector that cannot skip a round.

    >>> from nab import Hedge, Selector
    >>> from nab.sim.replay import replay
    >>> never = np.zeros((7, 2))
    >>> [each.scored for each in replay(Lazy(Selector(Hedge(), 2), every=3), never, never, draft_len=4)]
    [0, 0, 3, 0, 0, 3, 0]
    """

    _selector: Skips

    def __init__(
        self,
        selector: Skips,
        *,
        every: int = 1,
        above: float | None = None,
        most: int = 128,
        span: int | None = None,
    ) -> None:
        whole("every", every, 1)
        whole("most", most, every)
        if span is not None:
            whole("span", span, 1)
        if above is not None:
            checked("above", above, high=1, closed=True)
        if not hasattr(selector, "skip"):
            raise ValueError(f"selector must be one that can skip rounds, got {type(selector).__name__}")
        super().__init__(selector)
        self._every, self._above, self._most, self._span = every, above, most, span
        self._rounds, self._wait = 0, every  # since the last scoring, and to the next
        self._waiting = deque[tuple[int, Any]]()  # positions of a round, and what scores them
        self._leader, _ = selector.leading

    def observe(
        self, emitted: int, evaluate: Any, *, seconds: Spent | None = None
    ) -> tuple[Floats, Floats] | None:
        """Pass a round on with its scores and those of the rounds before that wait for theirs, or wait.

        Args:
            emitted: see ``Chooses``.
            evaluate: what can be added to that of the next round, see ``nab.decode.Evaluation``.
            seconds: see ``Chooses``.

        Returns:
            The scores of all rounds since the last ones, or of those that are not left out; or None.
        """
        self._waiting.append((emitted, evaluate))
        self._rounds += 1
        if self._span is not None:
            positions = sum(length for length, _ in self._waiting)
            while (positions := positions - self._waiting[0][0]) >= self._span:
                self._waiting.popleft()
        if self._rounds < self._wait:
            self._selector.skip(emitted, seconds=seconds)
            return None
        waiting = reduce(add, (each for _, each in self._waiting))
        scores = self._selector.observe(emitted, waiting, seconds=seconds)
        self._waiting.clear()
        self._rounds = 0
        self._wait = self._next_wait(*self._selector.leading)
        return scores

    def _next_wait(self, leader: Any, weight: float) -> int:
        before, self._leader = self._leader, leader
        if self._above is None or weight < self._above or leader != before:
            return self._every
        return min(2 * self._wait, self._most)


def seldom(selector: Skips, every: int | None = None) -> Lazy:
    """As under the time objective, where having drafters scored costs most: see docs/theory.md."""
    every = every or 8
    return Lazy(selector, every=every, above=0.2, most=max(every, 128), span=16)


class Corrected(Wrapped):
    """Corrects acceptance at depth by what drafters did on the rounds that they really drafted.

    One forward tells acceptance at the first depth. Deeper, a feature-level head reads its own features and a
    dynamic tree has fewer children, so fewer tokens are accepted. Of the rounds of drafter i that accepted k
    tokens, count those that accepted one more, and add up the first depth's gamma there; the quotient is what
    gamma and ``realised`` are multiplied by at depth k + 1, for the selector inside. With few such rounds it
    stays near 1: ``prior`` tokens are counted on both sides, accepted as expected.

    Args:
        selector: a fresh one, whose objective knows depths (``Length``).
        draft_len: drafted tokens a round, at least 1.
        prior: at least 0.
        counts: ``(2, draft_len, n)`` of earlier queries, tokens accepted and expected; None is none.

    Raises:
        ValueError: naming the argument that is out of its range, or of another shape.
    """

    _selector: Selector

    def __init__(
        self, selector: Selector, draft_len: int, *, prior: float = 8.0, counts: ArrayLike | None = None
    ) -> None:
        super().__init__(selector)
        whole("draft_len", draft_len, 1)
        shape = 2, draft_len, len(selector.probs)
        self.counts = np.zeros(shape) if counts is None else as_floats(counts).copy()
        if self.counts.shape != shape or not (self.counts >= 0).all():
            raise ValueError(f"counts must be non-negative, of shape {shape}, got {self.counts.shape}")
        if not 0 <= prior < np.inf:
            raise ValueError(f"prior must be a finite number of at least 0, got {prior}")
        self._prior = prior
        self._skipped: list[tuple[int, int | None, int]] = []  # of rounds not scored yet: see _count

    @property
    def factors(self) -> Floats:
        """What acceptance is multiplied by, ``(draft_len, n)``; 1 at the first depth."""
        accepted, expected = self.counts + self._prior
        ones = np.ones_like(accepted)
        return np.asarray(np.divide(accepted, expected, out=ones, where=expected > 0))

    def observe(
        self, emitted: int, evaluate: Evaluate, *, seconds: Spent | None = None
    ) -> tuple[Floats, Floats]:
        """Score all drafters on the new positions; correct, count, hand on."""
        gamma, realised = evaluate()
        deep = by_depth(as_floats(gamma), self.counts.shape[1])
        rounds = [*self._skipped, (self.choice, self.draft_len, emitted)]
        self._skipped = []
        start = len(deep) - sum(length for *_, length in rounds)  # below 0 where some were left out
        for choice, drafted, length in rounds:
            if start >= 0:
                self._count(choice, drafted, length, deep[start : start + length])
            start += length
        scores = deep, by_depth(as_floats(realised), self.counts.shape[1])
        corrected = [(each * self.factors).clip(max=1) for each in scores]
        self._selector.observe(emitted, lambda: (corrected[0], corrected[1]), seconds=seconds)
        return gamma, realised

    def _count(self, choice: int, draft_len: int | None, emitted: int, gamma: Floats) -> None:
        """Tokens accepted and expected of one round, at the depths behind the first that it drafted."""
        for k, row in enumerate(gamma[: self.counts.shape[1] if draft_len is None else draft_len]):
            if k:
                self.counts[:, k, choice] += k < emitted - 1, row[k, choice]

    @property
    def leading(self) -> tuple[int, float]:
        """Of the selector inside."""
        return self._selector.leading

    def skip(self, emitted: int, *, seconds: Spent | None = None) -> None:
        """Pass the round on; count it when its positions are scored."""
        self._skipped.append((self.choice, self.draft_len, emitted))
        self._selector.skip(emitted, seconds=seconds)


class Censored(Wrapped):
    """One update a round, at once, with lengths from the tokens that the round happened to emit.

    The chunk-level variant (Liu et al. 2025, appendix B.3), kept to show what censoring costs: no drafter's
    estimate reaches behind the token at which the chosen one stopped. What a deeper drafter would have gained
    there is not counted, so a learner can stay with one that stops early. ``Selector`` with ``Length`` waits
    instead.

    Args:
        selector: a fresh one, with the token loss: the loss it is given is the length loss of the round.
        draft_len: drafted tokens a round, at least 1.

    Raises:
        ValueError: on a draft length below 1, or a selector with another objective.
    """

    def __init__(self, selector: Selector, draft_len: int) -> None:
        whole("draft_len", draft_len, 1)
        if not isinstance(selector.objective, Token):
            raise ValueError(f"selector must have the token loss, got {selector.objective}")
        super().__init__(selector)
        self._draft_len = draft_len

    def observe(
        self, emitted: int, evaluate: Evaluate, *, seconds: Spent | None = None
    ) -> tuple[Floats, Floats]:
        """Score all drafters on the new positions, learn from their one censored length, choose again."""
        gamma, realised = evaluate()
        seen = min(len(gamma), self._draft_len)
        share = expected_length(gamma[:seen], realised[:seen], seen) / (self._draft_len + 1)
        self._selector.observe(emitted, lambda: (share, share))
        return gamma, realised
