"""The one coupling behind every draft: sample, accept or take the residual, verify.

Written with operators that numpy arrays and torch tensors share, on unnormalised laws; randomness arrives as
uniforms in [0, 1), so the functions are pure and can be enumerated exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from math import inf
from typing import Any, NamedTuple, cast

from nab.types import LanguageModel, Law, TreeModel


class Child(NamedTuple):
    """A drafted token and the law it was drawn from given its earlier siblings; None: it was certain."""

    token: int
    q: Law | None


class Draft(NamedTuple):
    """A drafted tree: node k has a token, a parent (-1: the text so far) and the law it was drawn from.

    Parents stand before their children, siblings in the order in which they are to be tested. ``q`` is None
    where the token was certain, which saves a one-hot law. A chain is the tree whose node k hangs from k - 1.
    """

    tokens: list[int]
    parents: list[int]
    q: list[Law | None]

    @classmethod
    def chain(cls, tokens: Sequence[int], q: Sequence[Law | None]) -> Draft:
        """Every token behind the one before it."""
        return cls(list(tokens), list(range(-1, len(tokens) - 1)), list(q))

    @property
    def is_chain(self) -> bool:
        """Whether every node hangs from the one before it."""
        return self.parents == list(range(-1, len(self.tokens) - 1))

    def below(self, node: int) -> dict[int, int]:
        """Children of a node (-1: the root) by token."""
        return {token: k for k, (token, parent) in enumerate(zip(*self[:2], strict=True)) if parent == node}

    def part(self, nodes: Sequence[int]) -> Draft:
        """These nodes, ascending, the parent of each among them."""
        number = {-1: -1, **{node: k for k, node in enumerate(nodes)}}
        parents = [number[self.parents[node]] for node in nodes]
        return Draft([self.tokens[node] for node in nodes], parents, [self.q[node] for node in nodes])


class Verdict(NamedTuple):
    """Nodes of the accepted ``path``, then ``next_token``: recovered after a rejection, else the bonus."""

    path: list[int]
    next_token: int


def sample(law: Law, u: Any) -> int:
    """Inverse CDF: the first token whose cumulative mass exceeds ``u`` times the total.

    Never returns a token of mass 0, whatever the rounding of the sum: positions that have reached the total
    are not stepped over.

    Args:
        law: ``(vocab,)`` non-negative masses, not all 0; they need not sum to 1.
        u: uniform in [0, 1).

    Raises:
        ValueError: if the total mass is 0, NaN or infinite.
    """
    cdf = law.cumsum(-1)
    if not 0 < cdf[-1] < inf:
        raise ValueError(f"cannot draw from a law of total mass {float(cdf[-1])}")
    return int(((cdf <= u * cdf[-1]) & (cdf < cdf[-1])).sum())


def residual(p: Law, q: Law) -> Law:
    """``(p - q)_+``, unnormalised: what is left to emit after a rejection. ``p`` itself where nothing is."""
    rest = (p - q).clip(0)
    return rest if rest.sum() > 0 else p


def without(law: Law, token: int) -> Law:
    """``law`` with no mass on ``token``, unnormalised."""
    rest = law * 1
    rest[token] = 0
    return rest


def transport(x: int, q: Law, p: Law, u: Any, v: Any) -> int:
    """Turn a draw ``x ~ q`` into a draw from ``p``, moving it with probability TV(p, q).

    Source: Leviathan, Kalman, Matias 2023, Thm 3.5 (it is the maximal coupling of p and q).

    Args:
        x: a draw from ``q``.
        q: ``(vocab,)`` the law it was drawn from.
        p: ``(vocab,)`` the law wanted.
        u: uniform of the acceptance test.
        v: uniform of the residual draw, used after a rejection only.
    """
    return x if u * q[x] < p[x] else sample(residual(p, q), v)


def placed(tokens: Sequence[int], parents: Sequence[int]) -> list[int]:
    """Index in ``tokens`` of the parents of the tree nodes among them.

    Args:
        tokens: a chain, then one token per node.
        parents: of the nodes, relative to the first node: below 0 a token of the chain, -1 the last; else an
            earlier node.

    Raises:
        ValueError: naming a parent that is no earlier node, or lies before the first token.
    """
    chain = len(tokens) - len(parents)
    for node, parent in enumerate(parents):
        if parent >= node:
            raise ValueError(f"the parent of node {node} must come before it, got {parent}")
        if chain + parent < 0:
            raise ValueError(f"node {node} has parent {parent}, but {max(chain, 0)} tokens precede the nodes")
    return [chain + parent for parent in parents]


def paths(tokens: Sequence[int], parents: Sequence[int]) -> list[list[int]]:
    """The tokens from the first one to each node; arguments and errors as for ``placed``."""
    chain, found = len(tokens) - len(parents), list[list[int]]()
    for token, parent in zip(tokens[chain:], placed(tokens, parents), strict=True):
        before = found[parent - chain] if parent >= chain else tokens[: parent + 1]
        found.append([*before, token])
    return found


def scored(
    model: LanguageModel, tokens: Sequence[int], start: int, parents: Sequence[int] | None = None
) -> Law:
    """``model.score``, of a tree given ``parents``.

    Raises:
        TypeError: if the model scores chains alone, saying what would help.
    """
    if parents is None:
        return model.score(tokens, start)
    try:
        return cast(TreeModel, model).score(tokens, start, parents)
    except TypeError:
        try:
            signature(model.score).bind(tokens, start, parents)
        except TypeError:
            name = type(model).__name__
            text = f"{name}.score takes no parents, which drafts that branch need: see nab.sampling.by_path"
            raise TypeError(text) from None
        raise


def by_path(
    score: Callable[..., Law], tokens: Sequence[int], start: int, parents: Sequence[int]
) -> list[Law]:
    """Rows of ``TreeModel.score`` from a ``LanguageModel.score``, path by path, in parts ``(rows, vocab)``.

    Raises:
        ValueError: as for ``placed``.
    """
    nodes = paths(tokens, parents)
    chain = len(tokens) - len(nodes)
    parts = [score(tokens[:chain], start)] if start <= chain else []
    return parts + [score(path, len(path)) for path in nodes[max(start - chain - 1, 0) :]]


def verify(p: Sequence[Law], draft: Draft, uniforms: Sequence[Any]) -> Verdict:
    """Accept a path of the draft and add one token, so that what is emitted has exactly the target's law.

    From the root on, children are tested in turn: one drawn from q is accepted with probability
    ``min(1, p(x) / q(x))``, otherwise p becomes its normalised residual for the next. That is recursive
    rejection (Miao et al. 2024), of which a chain is the case of single children, and a deterministic tree
    the case of certain ones: those are accepted with probability p(x) in all.

    Args:
        p: target laws ``(nodes + 1, vocab)``: behind the text, then behind each node.
        draft: nodes and laws.
        uniforms: at least ``nodes + 1``; one tests each node, the last draws the next token, so a round uses
            up the same number whatever happens in it.
    """
    at, path, law, mass = -1, list[int](), p[0], 1.0
    for node, (x, parent, q) in enumerate(zip(*draft, strict=True)):
        if parent != at:
            continue
        weight = mass if q is None else mass * q[x]
        if uniforms[node] * weight < law[x]:
            at, law, mass = node, p[node + 1], 1.0
            path.append(node)
        else:
            rest = without(law, x) if q is None else residual(law, mass * q)
            if rest.sum() > 0:  # else the rejection was rounding, and what follows draws x after all
                law, mass = rest, rest.sum()
    return Verdict(path, sample(law, uniforms[-1]))
