"""Verification schemes: how a drafter's laws grow into a tree, and what that makes of its acceptance.

A scheme proposes a ``Draft`` of ``draft_len`` levels; ``nab.sampling.verify`` serves them all. Three classes:
``Levels`` has a rule per depth (chains, several drafts, sampled and complete trees), ``StaticTree`` a shape
by rank, ``DynamicTree`` grows where the drafter is sure.

What a round accepts is described by ``gamma`` and ``realised`` *by depth*, ``(positions, draft_len)``: column
k of position t is about a round that began at t - k and has accepted k tokens. That is exact for every
scheme, since a verified text settles the node such a round has reached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf
from typing import Any, ClassVar, Protocol

import numpy as np

from nab.acceptance import Chain, Greedy, MultiDraft, Rule, TopK, WithoutReplacement, at_least_one
from nab.sampling import Child, Draft, scored
from nab.types import AcceptanceRule, DepthAware, Floats, LanguageModel, Law, as_floats


class Scheme(Protocol):
    """What ``decode`` needs of a verification scheme."""

    @property
    def draft_len(self) -> int:
        """Levels of the tree: a round emits at most one token more."""

    @property
    def nodes(self) -> int:
        """Drafted tokens of a round, at most."""

    @property
    def ranks(self) -> bool:
        """Whether only the order of a drafter's tokens matters, so that drafts are certain given its laws."""

    @property
    def outline(self) -> tuple[AcceptanceRule, ...]:
        """Acceptance as far as one forward of a drafter tells: a rule per depth, or one for all of them.

        Exact for ``Levels`` of drafters that are alike at all depths; of other trees it is the first level.
        """

    def propose(
        self, drafter: LanguageModel, tokens: Sequence[int], vocab: int, uniforms: Sequence[Any]
    ) -> Draft:
        """Let a drafter grow its tree behind ``tokens``.

        Args:
            drafter: a branching tree needs one whose ``score`` takes ``parents``.
            tokens: the text so far.
            vocab: tokens in the target's laws.
            uniforms: ``nodes`` of them; node k is drawn with the k-th.

        Raises:
            ValueError: if one of its laws is none.
        """

    def cut(self, draft_len: int) -> Scheme:
        """The same scheme with fewer levels, between 1 and its own ``draft_len``."""

    def by_depth(
        self, drafter: LanguageModel, tokens: Sequence[int], start: int, p: Sequence[Law], begin: int
    ) -> tuple[Floats, Floats]:
        """Exact ``gamma`` and ``realised`` by depth, each ``(positions, draft_len)``, at their true cost.

        Args:
            drafter: see ``propose``.
            tokens: the text, verified.
            start: first position to score; the last one is that of the last token.
            p: the target's laws at these positions, in one or several arrays ``(rows, vocab)``.
            begin: no round began before this position; entries about such rounds have no meaning.
        """


@dataclass(frozen=True)
class Levels:
    """The same rule for all nodes of a level: every node grows ``rules[depth].width`` children.

    ``Levels([Chain()] * 4)`` is a chain, ``Levels([MultiDraft(3), Chain(), Chain()])`` three chains that part
    at once (SpecInfer, SpecTr), ``Levels([TopK(4), TopK(2)])`` a complete deterministic tree (Medusa).

    Raises:
        ValueError: on trees of more than 4096 nodes.
    """

    rules: tuple[Rule, ...]

    def __init__(self, rules: Iterable[Rule]) -> None:
        object.__setattr__(self, "rules", tuple(rules))
        if self.nodes > _MOST_NODES:
            shown = [str(rule.width) for rule in self.rules[:8]]
            widths = " x ".join([*shown, "..."] if len(self.rules) > len(shown) else shown)
            raise ValueError(f"a tree of {widths} has {self.nodes} nodes, at most {_MOST_NODES} are allowed")

    @property
    def draft_len(self) -> int:
        """One level a rule."""
        return len(self.rules)

    @cached_property
    def nodes(self) -> int:
        """All nodes of the complete tree."""
        return int(np.cumprod([rule.width for rule in self.rules], dtype=object).sum()) if self.rules else 0

    @property
    def ranks(self) -> bool:
        """Whether all rules are of ranks."""
        return bool(self.rules) and all(isinstance(rule, TopK | Greedy) for rule in self.rules)

    @property
    def outline(self) -> tuple[AcceptanceRule, ...]:
        """The rules, or one where all are the same; that of a chain where nothing is drafted."""
        return self.rules if len(set(self.rules)) > 1 else (self.rules or (Chain(),))[:1]

    def propose(
        self, drafter: LanguageModel, tokens: Sequence[int], vocab: int, uniforms: Sequence[Any]
    ) -> Draft:
        """See ``Scheme``."""
        depth = [-1]  # by node, the root's at the end

        def children(node: int, law: Law) -> list[Child]:
            rule = self.rules[depth[node] + 1]
            found = rule.children(law, uniforms[len(depth) - 1 :])
            depth[-1:] = [*[depth[node] + 1] * len(found), -1]
            return found

        branching = any(rule.width > 1 for rule in self.rules)
        return _grown(drafter, tokens, vocab, self.draft_len, children, branching=branching)

    def cut(self, draft_len: int) -> Levels:
        """The first levels."""
        return Levels(self.rules[:draft_len])

    def by_depth(
        self, drafter: LanguageModel, tokens: Sequence[int], start: int, p: Sequence[Law], begin: int
    ) -> tuple[Floats, Floats]:
        """See ``Scheme``. One forward; of drafters that know their depth, their recursion is run again."""
        if isinstance(drafter, DepthAware):
            laws = drafter.score_by_depth(tokens[:-1], start, self.draft_len)
        else:
            laws = [drafter.score(tokens[:-1], start)] * self.draft_len
        return accepted(self.rules, laws, p, tokens[start:])


@dataclass(frozen=True)
class StaticTree:
    """A deterministic tree of fixed shape: which ranks are drafted below which (Medusa, Sequoia).

    A node's children are the likeliest tokens of the drafter's law there, as many as the shape has.

    Args:
        paths: one tuple per node, the ranks from the root to it: ``(0,)`` is the likeliest token, ``(0, 1)``
            the second likeliest behind it. Any order.

    Raises:
        ValueError: on a path that is no sequence of ranks from 0 on, twice there, or whose parent or likelier
            sibling is missing.
    """

    paths: tuple[tuple[int, ...], ...]
    ranks: ClassVar[bool] = True

    def __init__(self, paths: Iterable[Sequence[int]]) -> None:
        ordered = sorted((_ranks(path) for path in paths), key=lambda path: (len(path), path))
        object.__setattr__(self, "paths", tuple(ordered))
        known = {(), *ordered}
        for path in ordered:
            before = path[:-1], (*path[:-1], path[-1] - 1) if path[-1] else path[:-1]
            if not set(before) <= known:
                raise ValueError(f"path {path} needs {' and '.join(map(str, dict.fromkeys(before)))}")
        if len(known) <= len(ordered) or not ordered:
            raise ValueError(f"paths must be different, and one at least, got {self.paths}")

    @property
    def draft_len(self) -> int:
        """Of the longest path."""
        return len(self.paths[-1])

    @property
    def nodes(self) -> int:
        """One per path."""
        return len(self.paths)

    @cached_property
    def _width(self) -> dict[tuple[int, ...], int]:
        width: dict[tuple[int, ...], int] = {}
        for path in self.paths:
            width[path[:-1]] = width.get(path[:-1], 0) + 1
        return width

    @property
    def outline(self) -> tuple[AcceptanceRule, ...]:
        """``TopK`` of the first level."""
        return (TopK(self._width[()]),)

    def propose(
        self, drafter: LanguageModel, tokens: Sequence[int], vocab: int, uniforms: Sequence[Any] = ()
    ) -> Draft:
        """See ``Scheme``; no uniform is used."""
        paths: list[tuple[int, ...]] = [()]  # by node, the root's at the end

        def children(node: int, law: Law) -> list[Child]:
            width = self._width.get(paths[node], 0)
            found = TopK(width).children(law, ()) if width else []
            paths[-1:] = [*((*paths[node], rank) for rank in range(len(found))), ()]
            return found

        return _grown(drafter, tokens, vocab, self.draft_len, children)

    def cut(self, draft_len: int) -> StaticTree:
        """Without the longer paths."""
        return StaticTree([path for path in self.paths if len(path) <= draft_len])

    def by_depth(
        self, drafter: LanguageModel, tokens: Sequence[int], start: int, p: Sequence[Law], begin: int
    ) -> tuple[Floats, Floats]:
        """See ``Scheme``. The tree of every position is drafted again."""
        return _retraced(self, drafter, tokens, start, p=p, begin=begin)


@dataclass(frozen=True)
class DynamicTree:
    """EAGLE-2's tree: expand the ``width`` likeliest nodes of each level, then keep the ``nodes`` likeliest.

    How likely a node is: the product of the drafter's probabilities along its path. Every expanded node
    grows ``width`` children. The drafter alone decides, before the target's laws are seen, so the tree is
    deterministic. Source: Li et al. 2024 (EAGLE-2), section 4.

    Args:
        width: at least 1.
        nodes: kept, at least 1.
        draft_len: levels, at least 1.

    Raises:
        ValueError: naming the one that is no whole number from 1 on; if more than 4096 nodes grow.
    """

    width: int
    nodes: int
    draft_len: int
    ranks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("width", "nodes", "draft_len"):
            at_least_one(name, getattr(self, name))
        grown = self.width + (self.draft_len - 1) * self.width**2
        if max(grown, self.nodes) > _MOST_NODES:
            raise ValueError(
                f"a tree of width {self.width}, {self.draft_len} levels and {self.nodes} kept nodes grows "
                f"{grown}: at most {_MOST_NODES} are allowed"
            )

    @property
    def outline(self) -> tuple[AcceptanceRule, ...]:
        """``TopK`` of the first level, of which few ``nodes`` may keep less."""
        return (TopK(min(self.width, self.nodes)),)

    def propose(
        self, drafter: LanguageModel, tokens: Sequence[int], vocab: int, uniforms: Sequence[Any] = ()
    ) -> Draft:
        """See ``Scheme``; no uniform is used."""
        likely = [1.0]  # by node, the root's at the end

        def children(node: int, law: Law) -> list[Child]:
            found = TopK(self.width).children(law, ())
            likely[-1:] = [*(likely[node] * float(law[child.token]) for child in found), 1.0]
            return found

        def likeliest(nodes: Iterable[int], most: int) -> list[int]:
            return sorted(sorted(nodes, key=lambda node: -likely[node])[:most])

        draft = _grown(
            *(drafter, tokens, vocab, self.draft_len, children),
            chosen=lambda new: likeliest(new, self.width),
        )
        return draft.part(likeliest(range(len(draft.tokens)), self.nodes))

    def cut(self, draft_len: int) -> DynamicTree:
        """As many nodes on fewer levels: at their depths it accepts no less than the whole tree."""
        return replace(self, draft_len=draft_len)

    def by_depth(
        self, drafter: LanguageModel, tokens: Sequence[int], start: int, p: Sequence[Law], begin: int
    ) -> tuple[Floats, Floats]:
        """See ``Scheme``. The tree of every position is drafted again."""
        return _retraced(self, drafter, tokens, start, p=p, begin=begin)


_MOST_NODES = 4096


def _ranks(path: Any) -> tuple[int, ...]:
    if not isinstance(path, Sequence) or not path or not all(type(r) is int and r >= 0 for r in path):
        raise ValueError(f"a path must be a sequence of ranks from 0 on, at least one, got {path!r}")
    return tuple(path)


NAMES = "chain, multi-draft:3x2, without-replacement:3x2, top:4x2, static:0,1,0.0,0.1 or dynamic:4x16"
"""Examples of what ``named`` takes."""


def named(text: str, draft_len: int, *, rng: Any = None) -> Scheme:
    """A scheme by the name that a person gives it.

    ``chain``; ``multi-draft:W``, ``without-replacement:W`` and ``top:W`` with the widths of the levels, as in
    ``3x2x1``, of which the last one goes on to the last level; ``static:`` with the paths of a
    ``StaticTree``, ranks separated by dots; ``dynamic:WIDTHxNODES``.

    Args:
        text: see above.
        draft_len: levels, at least 1.
        rng: of estimates, anything ``numpy.random.default_rng`` takes.

    Raises:
        ValueError: on another text, or a tree that is not ``draft_len`` deep.
    """
    kind, _, numbers = text.partition(":")
    rules: dict[str, Callable[[int], Rule]] = {
        "multi-draft": MultiDraft,
        "without-replacement": lambda m: WithoutReplacement(m, rng),
        "top": TopK,
    }
    try:
        if text == "chain":
            return Levels([Chain()] * draft_len)
        if kind == "static":
            scheme = StaticTree([_numbers(path, ".") for path in numbers.split(",")])
            if scheme.draft_len != draft_len:
                raise ValueError(f"it is {scheme.draft_len} deep, not {draft_len}")
            return scheme
        if kind == "dynamic":
            widths = _numbers(numbers, "x")
            if len(widths) != 2:
                raise ValueError(f"it needs a width and a number of nodes, got {len(widths)} numbers")
            return DynamicTree(widths[0], widths[1], draft_len)
        if kind in rules:
            widths = _numbers(numbers, "x")
            if len(widths) > draft_len:
                raise ValueError(f"it has {len(widths)} widths for {draft_len} levels")
            widths += widths[-1:] * (draft_len - len(widths))
            return Levels(Chain() if width == 1 and kind != "top" else rules[kind](width) for width in widths)
    except ValueError as error:
        raise ValueError(f"scheme {text!r}: {error}; choose for instance {NAMES}") from None
    raise ValueError(f"unknown scheme {text!r}: choose for instance {NAMES}")


def _numbers(text: str, separator: str) -> list[int]:
    found = text.split(separator)
    if not all(number.isdecimal() for number in found):
        raise ValueError(f"it needs whole numbers with {separator!r} between them, got {text!r}")
    return [int(number) for number in found]


def _grown(
    drafter: LanguageModel,
    tokens: Sequence[int],
    vocab: int,
    levels: int,
    children: Callable[[int, Law], list[Child]],
    *,
    chosen: Callable[[list[int]], list[int]] = list,
    branching: bool = True,
) -> Draft:
    """A tree, level by level, in one forward of the drafter for each.

    Args:
        drafter: see ``Scheme.propose``.
        tokens: the text so far.
        vocab: see there.
        levels: at most; it ends early where nothing has children.
        children: of a node (-1: the text so far), from the law there; asked once a node, in order.
        chosen: which of the new nodes to expand, in ascending order.
        branching: whether to tell the drafter of ``parents``.
    """
    draft, frontier = Draft([], [], []), [-1]
    for _ in range(levels):
        context, first = [*tokens, *draft.tokens], len(tokens) + 1 + frontier[0]
        parents = draft.parents if branching and draft.tokens else None
        laws, behind = scored(drafter, context, first, parents), len(draft.tokens)
        check_shape(laws, len(context) - first + 1, vocab)
        for node in frontier:
            law = normalised(laws[node - frontier[0]])
            for token, q in children(node, law):
                draft.tokens.append(token)
                draft.parents.append(node)
                draft.q.append(q)
        frontier = chosen(list(range(behind, len(draft.tokens))))
        if not frontier:
            break
    return draft


def check_shape(laws: Law, rows: int, vocab: int) -> None:
    """Raise ValueError unless ``laws`` are so many."""
    if tuple(laws.shape) != (rows, vocab):
        raise ValueError(f"its laws must have shape {(rows, vocab)}, got {tuple(laws.shape)}")


def normalised(law: Law) -> Law:
    """A copy of a drafter's law ``(vocab,)`` that sums to 1, or is all 0; its memory may be used again.

    Raises:
        ValueError: if it is negative, NaN or infinite somewhere, or its sum is neither 0 nor 1, up to what
            adding up ``vocab`` float32 numbers can cost.
    """
    mass, least = float(law.sum()), float(law.min())
    if not (least >= 0 and mass < inf):
        raise ValueError(
            f"its law must be non-negative and finite, but sums to {mass}, and its least is {least}"
        )
    if mass and abs(mass - 1) > len(law) * np.finfo(np.float32).eps:
        raise ValueError(f"its law must sum to 1, or be all 0, but sums to {mass}")
    return law / (mass or 1.0)


def accepted(
    rules: Sequence[AcceptanceRule], laws: Sequence[Law], p: Sequence[Law], tokens: Sequence[int]
) -> tuple[Floats, Floats]:
    """``gamma`` and ``realised``, each ``(positions, rules)``.

    Args:
        rules: one for each depth.
        laws: the drafter's, ``(positions, vocab)`` for each depth; another shape is a ValueError.
        p: the target's, in one or several arrays ``(rows, vocab)``.
        tokens: the verified ones, ``(positions,)``.
    """
    gamma, realised = np.empty((2, len(tokens), len(rules)))
    for q in laws:
        check_shape(q, len(tokens), p[0].shape[-1])
    row = 0
    for part in p:
        rows = slice(row, row := row + len(part))
        for k, (rule, q) in enumerate(zip(rules, laws, strict=True)):
            gamma[rows, k] = as_floats(rule.probability(part, q[rows]))
            realised[rows, k] = as_floats(rule.realised(part, q[rows], tokens[rows]))
    return gamma, realised


def _retraced(
    scheme: StaticTree | DynamicTree,
    drafter: LanguageModel,
    tokens: Sequence[int],
    start: int,
    *,
    p: Sequence[Law],
    begin: int,
) -> tuple[Floats, Floats]:
    """Draft again from every position, and follow the text down each tree; see ``Scheme.by_depth``."""
    gamma, realised = np.zeros((2, len(tokens) - start, scheme.draft_len))
    laws = [law for part in p for law in part]
    for began in range(max(start - scheme.draft_len + 1, begin), len(tokens)):
        draft, at = scheme.propose(drafter, tokens[:began], p[0].shape[-1]), -1
        for k, token in enumerate(tokens[began : began + scheme.draft_len]):
            row, below = began + k - start, draft.below(at)
            if row >= 0:
                gamma[row, k] = min(sum(float(laws[row][drafted]) for drafted in below), 1.0)
                realised[row, k] = token in below
            if token not in below:
                break
            at = below[token]
    return gamma, realised
