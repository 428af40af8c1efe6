"""The shapes and protocols everything else is written against. See docs/notation.md for the letters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
"""A float64 numpy array; learners keep drafters on axis 0: ``(n,)``, or ``(n, batch)`` for many queries."""

Law = Any
"""Next-token probabilities, ``(..., vocab)``: a numpy array or a torch tensor, non-negative.

Each row sums to 1; a deterministic drafter's is one-hot. A drafter's row may also be all 0: it has nothing to
propose there.
"""

State = TypeVar("State")
"""Of a learner or bandit: a ``NamedTuple`` of arrays and plain numbers."""


def as_floats(values: Any) -> Floats:
    """Any array-like as float64; torch tensors on any device and of any dtype included."""
    if type(values) is np.ndarray and values.dtype == np.float64:
        return values
    if hasattr(values, "detach"):
        values = values.detach().double().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


class Learner(Protocol[State]):
    """A full-information learner: it sees the loss of every drafter, chosen or not."""

    def init(self, n: int, batch: int | None = None, *, prior: ArrayLike | None = None) -> State:
        """State before the first round.

        Args:
            n: drafters, at least 1.
            batch: independent queries side by side, at least 1; None is a single one without that axis.
            prior: law of the first choice, at least 1e-250, ``(n,)`` or ``(n, batch)``; None is uniform.
        """

    def probs(self, state: State) -> Floats:
        """Law of the next choice, ``(n,)`` or ``(n, batch)``, summing to 1 over axis 0."""

    def update(self, state: State, losses: ArrayLike, played: ArrayLike | None = None) -> State:
        """State after one round of ``losses`` in [0, 1], shaped like ``probs``.

        Args:
            state: left untouched.
            losses: one loss per drafter.
            played: the ``probs`` in force when the round was decided; needed when feedback is late,
                otherwise it is recomputed from ``state``.
        """


class Bandit(Protocol[State]):
    """A baseline that sees the loss of the drafter it played and of no other."""

    def init(self, n: int, batch: int | None = None) -> State:
        """State before the first round for ``n >= 1`` drafters, or for ``batch`` independent queries."""

    def probs(self, state: State) -> Floats:
        """Law of the next arm, ``(n,)`` or ``(n, batch)``, summing to 1 over axis 0."""

    def update(self, state: State, arm: ArrayLike, loss: ArrayLike) -> State:
        """State after a round: ``arm``, drawn from ``probs(state)``, was played and lost ``loss`` in [0, 1].

        One of each, or one a query, ``(batch,)``.
        """


class Objective(Protocol):
    """What a selector minimises: losses of verified positions, from acceptance probabilities."""

    @property
    def window(self) -> int:
        """Consecutive verified positions that one loss needs, at least 1."""

    @property
    def lengths(self) -> tuple[int | None, ...]:
        """Draft lengths to choose from: experts are pairs of a drafter and one of them, drafter by drafter.

        ``(None,)`` where only drafters are chosen, and the decoder's draft length is always drafted.
        """

    def __call__(self, gamma: Floats, realised: Floats) -> Floats:
        """Acceptance probabilities to ``(positions - window + 1, n * len(lengths))`` losses in [0, 1].

        Both are ``(positions, n)``, or ``(positions, depths, n)`` by depth: see ``nab.losses``.
        """


class AcceptanceRule(Protocol):
    """Acceptance of one drafted position, described by a(x): see ``nab.acceptance``."""

    def probability(self, p: Law, q: Law) -> Any:
        """Gamma: probability that a draft from ``q`` is accepted, before the token is known. ``(...,)``."""

    def realised(self, p: Law, q: Law, token: Any) -> Any:
        """a(token): probability that the draft carried ``token``, given that it is emitted. ``(...,)``."""


class LanguageModel(Protocol):
    """Target and drafters alike."""

    def score(self, tokens: Sequence[int], start: int) -> Law:
        """Laws of ``tokens[i]`` given ``tokens[:i]`` for ``i = start .. len(tokens)``.

        Args:
            tokens: any prefix: an implementation with a cache rewinds it by itself.
            start: first position to score, ``1 <= start <= len(tokens)`` (models that know the law of a
                first token also take 0).

        Returns:
            ``(len(tokens) - start + 1, vocab)``.
        """


class TreeModel(LanguageModel, Protocol):
    """A language model that scores branching trees too, which targets and drafters of such need to be."""

    def score(self, tokens: Sequence[int], start: int, parents: Sequence[int] | None = None) -> Law:
        """As ``LanguageModel.score``, but given ``parents`` the last ``len(parents)`` tokens form a tree.

        Node j stands behind node ``parents[j] < j``, where -1 is the last token before the tree, -2 the one
        before that, and so on. Row i is then the law behind ``tokens[i - 1]`` given its path.
        """


@runtime_checkable
class DepthAware(LanguageModel, Protocol):
    """A drafter whose law depends on how deep in the draft it stands, such as a feature-level head."""

    def score_by_depth(self, tokens: Sequence[int], start: int, depths: int) -> Law:
        """Laws of ``tokens[i]``, ``i = start .. len(tokens)``, as the k-th token of a draft, k = 1 .. depths.

        Returns:
            ``(depths, len(tokens) - start + 1, vocab)``: row [k - 1, i - start] as a round that began at
            ``i - k + 1`` would draft it behind the tokens given; zeros where it would begin before 1.
        """


class Verified(NamedTuple):
    """What came of a draft.

    Attributes:
        drafted: number of its tokens.
        emitted: those accepted, and the next one.
        laws: gives the target's at ``emitted``, ``(len(emitted), vocab)``.
        fault: what the drafter did whose laws are none, and were rejected; empty if nothing is wrong.
    """

    drafted: int
    emitted: tuple[int, ...]
    laws: Callable[[], Law]
    fault: str = ""


@runtime_checkable
class Drafts(LanguageModel, Protocol):
    """A drafter that draws chains by itself, where its laws are."""

    def draft(self, tokens: Sequence[int], levels: int, like: Law, uniforms: Sequence[float]) -> Any:
        """What the target's ``verify`` takes: at most ``levels`` tokens behind ``tokens``.

        Args:
            tokens: the text so far.
            levels: at least 1.
            like: some laws of the target, ``(rows, vocab)``.
            uniforms: ``levels`` of them; the k-th token is drawn with the k-th.

        Raises:
            ValueError: if its laws are not like the target's.
        """


@runtime_checkable
class Verifies(LanguageModel, Protocol):
    """A target that verifies chains by itself, where its laws are."""

    def verify(self, tokens: Sequence[int], draft: Any, uniforms: Sequence[float]) -> Verified:
        """``nab.sampling.verify`` of a chain: an ``nab.sampling.Draft``, or what ``Drafts.draft`` returned.

        Args:
            tokens: the text so far.
            draft: the chain.
            uniforms: one tests each token, in order; the last draws the next one.
        """


class Accepts(Protocol):
    """One drafter, or several in one, that scores chains of verified tokens by itself."""

    def acceptance(self, tokens: Sequence[int], start: int, p: Sequence[Law]) -> Any:
        """Gamma and realised of ``nab.Chain``, ``(2, positions, drafters)``.

        Args:
            tokens: the text, verified.
            start: first position to score; the last one is that of the last token.
            p: the target's laws at these positions, in one or several arrays ``(rows, vocab)``.
        """


Evaluate = Callable[[], tuple[Floats, Floats]]
"""Asks for ``gamma`` and ``realised`` of the positions verified since last asked.

Each is ``(positions, n)``, or ``(positions, depths, n)`` by depth: see ``nab.losses``.
"""
