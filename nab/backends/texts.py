"""Texts that an engine decodes: drafts for them, chosen by what their tokens turn out to be. Numpy alone.

An engine that verifies certain drafts may tell tokens and nothing else: no laws, and no acceptance but that
which the tokens show. For drafters whose drafts are certain that is full information all the same. A
drafter's token would have been accepted where it is the token that came, so ``realised`` is 1 there and 0
elsewhere, and so is the estimate of ``gamma``, whose mean over the target's law is gamma itself. Losses are
therefore unbiased at any temperature, noisier than those from laws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any, Protocol, cast
from zlib import crc32

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nab.backends.drafters import Lookup
from nab.checks import whole
from nab.decode import Round, levels_of, observed
from nab.learners import NormalHedge
from nab.pool import Pool
from nab.selector import Chooses, Selector
from nab.types import Floats

Tokens = NDArray[np.int64]
"""Token ids, ``(tokens,)``."""


class Proposes(Protocol):
    """A drafter whose drafts are certain, given the text."""

    def chain(self, tokens: Sequence[int], levels: int) -> Sequence[int]:
        """At most ``levels`` tokens to come behind ``tokens``; fewer, or none, where it has nothing to say.

        The k-th is what would be first behind ``tokens`` and the ones before it; drafters that go on in
        another way are chosen by their first tokens.
        """


DRAFTERS: Mapping[str, Proposes] = {
    "lookup-8": Lookup(max_ngram=8),
    "lookup-2": Lookup(max_ngram=2),
    "vote-2": Lookup(max_ngram=2, vote=True),
}
"""What needs no training and knows every vocabulary: who followed the latest 8 or 2 tokens last, or most."""


class Text:
    """One text, decoded by an engine, and the selector that chooses who drafts for it.

    Args:
        tokens: the text so far; nothing is learned from them.
        drafters: n of them, without state. One that fails is benched, see ``nab.pool.Pool``.
        selector: a fresh one over them.
        draft_len: drafted tokens a round, at most; at least 1.
        watch: is told every round. ``Query.take`` keeps them and measures.

    Raises:
        ValueError: on another number of drafters than the selector's, or a draft length below 1.

    >>> from nab import NormalHedge, Selector
    >>> text = Text([5, 6, 7, 5, 6], [Lookup(), Lookup(vote=True)], Selector(NormalHedge(), 2, rng=0), 4)
    >>> text.draft()
    [7, 5, 6, 7]
    >>> text.extend([7, 5, 9])  # two are accepted, then comes another token
    >>> text.tokens.tolist()
    [5, 6, 7, 5, 6, 7, 5, 9]
    """

    def __init__(
        self,
        tokens: ArrayLike,
        drafters: Sequence[Proposes],
        selector: Chooses,
        draft_len: int,
        *,
        watch: Callable[[Round], Any] | None = None,
    ) -> None:
        whole("draft_len", draft_len, 1)
        if len(selector.probs) != len(drafters):
            raise ValueError(
                f"the selector chooses among {len(selector.probs)} drafters, there are {len(drafters)}"
            )
        self.tokens = _tokens(tokens)
        self.selector, self.draft_len = selector, draft_len
        self._pool, self._watch = Pool(cast(Any, drafters)), watch
        self._drafted: list[int] = []
        self._spent, self._handed = 0.0, perf_counter()  # seconds of the draft, and when it was given

    def draft(self, most: int | None = None) -> list[int]:
        """The chosen drafter's tokens for the coming round.

        Args:
            most: tokens that the engine has room for; None is any number.
        """
        start = perf_counter()
        levels = levels_of(self.selector, self.draft_len)
        levels = levels if most is None else min(levels, most)
        work = partial(_drafted, self.tokens, levels)
        self._drafted = (self._pool.call(self.selector.choice, work) if levels > 0 else None) or []
        self._handed = perf_counter()
        self._spent = self._handed - start
        return [*self._drafted]

    def continues(self, tokens: ArrayLike) -> bool:
        """Whether ``tokens`` are this text, the accepted part of its last draft, and one token more."""
        longer, known = np.asarray(tokens), len(self.tokens)
        new = longer[known:].tolist()
        return self._follows(new) and np.array_equal(longer[:known], self.tokens)

    def _follows(self, new: list[int]) -> bool:
        return 1 <= len(new) <= len(self._drafted) + 1 and new[:-1] == self._drafted[: len(new) - 1]

    def extend(self, emitted: ArrayLike) -> None:
        """Learn from a round: every drafter is compared with the tokens that came.

        Args:
            emitted: the accepted part of the last draft and the next token; one token without a draft.

        Raises:
            ValueError: on other tokens.
        """
        spent = self._spent, perf_counter() - self._handed
        new = _tokens(emitted)
        if not self._follows(new.tolist()):
            raise ValueError(
                f"emitted must be the accepted part of the draft {self._drafted} and one token more, got "
                f"{new.tolist()}"
            )
        start = len(self.tokens)
        self.tokens = np.concatenate([self.tokens, new])
        hits = _Hits(self._pool, self.tokens, start)
        drafted, came = len(self._drafted), tuple(new.tolist())
        round_ = observed(self.selector, hits, start=start, drafted=drafted, emitted=came, spent=spent)
        self._handed = perf_counter()
        if self._watch is not None:
            self._watch(round_)
        self._drafted, self._spent = [], 0.0


def _tokens(values: ArrayLike) -> Tokens:
    """A copy, as whole numbers."""
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"tokens must be a row of whole numbers, got {array.dtype} of shape {array.shape}")
    return array.astype(np.int64)


def _drafted(tokens: Tokens, levels: int, drafter: Any) -> list[int]:
    """At most ``levels`` tokens of a drafter."""
    found = [*drafter.chain(tokens, levels)][:levels]
    for token in found:
        whole("a drafted token", token, 0)
    return [*map(int, found)]


@dataclass(frozen=True)
class _Hits:
    """Positions of a text, from ``start`` on, at which drafters are not compared with it yet.

    Args:
        pool: n drafters.
        tokens: the text up to the last of these positions.
        start: first of them.
    """

    pool: Pool
    tokens: Tokens
    start: int

    def __add__(self, later: _Hits) -> _Hits:
        return replace(later, start=self.start)

    def __call__(self) -> tuple[Floats, Floats]:
        """``gamma`` and ``realised``, each ``(positions, n)`` of 0 and 1."""
        hits = np.zeros((len(self.tokens) - self.start, len(self.pool)))
        for i in range(len(self.pool)):
            found = self.pool.call(i, self._of)
            if found is not None:
                hits[:, i] = found
        return hits, hits

    def _of(self, drafter: Any) -> list[bool]:
        ends = range(self.start, len(self.tokens))
        return [_drafted(self.tokens[:end], 1, drafter) == [self.tokens[end]] for end in ends]


class Texts:
    """Texts of an engine that moves them about and does not name them: each is known by its tokens.

    A text goes on as itself where the tokens given are its own, the accepted part of its draft, and one token
    more. Anything else is another text, with a fresh selector: another prompt, an answer that another request
    gave to the same prompt, a chat with one more question. Of two texts with the same tokens so far each is
    given to one row, and they are alike in all that matters: what was emitted is what was learned from.

    Args:
        draft_len: drafted tokens a round, at most; at least 1.
        drafters: by name, without state; None is ``DRAFTERS``.
        selector: makes a fresh selector over them, of seed; None is ``NormalHedge`` with the token loss.
        seed: at least 0. What is drawn for a text depends on it and on the tokens that the text begins with.
        most: texts that are kept; those longest untouched go first. At least 1.
        watch: is told every round, and before it the number of its text, counted as they come.

    Raises:
        ValueError: naming the argument that is out of its range; if there are no drafters, or the selector is
            over another number of them.
    """

    def __init__(
        self,
        draft_len: int,
        *,
        drafters: Mapping[str, Proposes] | None = None,
        selector: Callable[[Any], Chooses] | None = None,
        seed: int = 0,
        most: int = 1,
        watch: Callable[[int, Round], Any] | None = None,
    ) -> None:
        whole("most", most, 1)
        whole("seed", seed, 0)
        pool = DRAFTERS if drafters is None else drafters
        if not pool:
            raise ValueError("drafters must be one at least, got none")
        self.names = [*pool]
        self._drafters = [*pool.values()]
        self._selector = selector or partial(_default, len(pool))
        self._draft_len, self._seed, self._most, self._watch = draft_len, seed, most, watch
        self._kept: dict[int, list[Text]] = {}  # by what their tokens hash to, the longest untouched first
        self._count = self._begun = 0
        Text([], self._drafters, self._selector(seed), draft_len)  # what is wrong is said now

    def __len__(self) -> int:
        return self._count

    def take(self, tokens: ArrayLike, emitted: int | None = None) -> Text:
        """The text that has these tokens now, which nobody else gets until it is ``put`` back.

        Args:
            tokens: a whole text.
            emitted: tokens that are new, at least 1; None if the engine does not say.
        """
        given = _tokens(tokens)
        keys = [*self._kept] if emitted is None else [_key(given[: len(given) - emitted])]
        for key in keys:
            for text in self._kept.get(key, ()):
                if text.continues(given):
                    self._remove(key, text)
                    text.extend(given[len(text.tokens) :])
                    return text
        return self._fresh(given)

    def put(self, text: Text) -> None:
        """Keep a text for its next round."""
        key = _key(text.tokens)
        self._kept[key] = [*self._kept.pop(key, ()), text]
        self._count += 1
        while self._count > self._most:
            oldest = next(iter(self._kept))
            self._remove(oldest, self._kept[oldest][0])

    def _remove(self, key: int, text: Text) -> None:
        self._count -= 1
        rest = [each for each in self._kept[key] if each is not text]
        if rest:
            self._kept[key] = rest
        else:
            del self._kept[key]

    def _fresh(self, tokens: Tokens) -> Text:
        watch = None if self._watch is None else partial(self._watch, self._begun)
        self._begun += 1
        selector = self._selector([self._seed, crc32(tokens.tobytes())])
        return Text(tokens, self._drafters, selector, self._draft_len, watch=watch)


def _key(tokens: Tokens) -> int:
    return hash(tokens.tobytes())


def _default(n: int, seed: Any) -> Selector:
    return Selector(NormalHedge(), n, rng=seed)
