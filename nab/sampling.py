"""The one coupling behind every draft: sample, residual, transport, verify.

Written with operators that numpy arrays and torch tensors share, on unnormalised laws; randomness arrives as
uniforms in [0, 1), so the functions are pure and can be enumerated exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any, NamedTuple

from nab.types import LanguageModel, Law


class Draft(NamedTuple):
    """A drafted chain: ``tokens`` and the laws ``q`` they were drawn from, one row each.

    Shorter than asked for where the drafter had nothing more to propose.
    """

    tokens: list[int]
    q: list[Law]


class Verdict(NamedTuple):
    """``accepted`` drafted tokens, then ``next_token``: recovered after a rejection, else the bonus token."""

    accepted: int
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
    rest = (p - q).clip(min=0)
    return rest if rest.sum() > 0 else p


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


def propose(drafter: LanguageModel, tokens: Sequence[int], uniforms: Sequence[Any]) -> Draft:
    """Draw a chain of at most ``len(uniforms)`` tokens; it ends early where the drafter's law is all 0."""
    draft = Draft([], [])
    for u in uniforms:
        context = [*tokens, *draft.tokens]
        q = drafter.score(context, len(context))[0]
        mass = float(q.sum())
        if not 0 <= mass < inf:
            raise ValueError(f"its law must be non-negative and finite, but sums to {mass}")
        if mass == 0:
            break
        draft.tokens.append(sample(q, u))
        draft.q.append(q)
    return draft


def verify(p: Sequence[Law], draft: Draft, uniforms: Sequence[Any]) -> Verdict:
    """Accept a prefix of the draft and add one token, so that what is emitted has exactly the target's law.

    Args:
        p: target laws, one row per drafted token and one for the token behind them, ``(k + 1, vocab)``.
        draft: k drafted tokens with their laws.
        uniforms: at least ``k + 1``; the first k test the drafted tokens, the last draws the next token, so
            a round uses up the same number whatever happens in it.
    """
    v = uniforms[-1]
    for k, (x, q) in enumerate(zip(draft.tokens, draft.q, strict=True)):
        moved = transport(x, q, p[k], uniforms[k], v)
        if moved != x:
            return Verdict(k, moved)
    return Verdict(len(draft.tokens), sample(p[len(draft.tokens)], v))
