"""Acceptance rules: one function a(x) describes a verification scheme.

Given that token x is emitted at a position, a(x) is the probability that the draft contained x and was
accepted. Everything else follows: ``gamma = sum_x p(x) a(x)`` is the probability of acceptance before x is
known, ``realised = a(x_t)`` the same afterwards, and ``E_{x ~ p} realised = gamma``. A rule also says which
tokens a drafter's law puts under a position, its ``children``; ``nab.sampling.verify`` tests them all alike.

All rules take numpy arrays and torch tensors, with any leading dimensions, and stay in their dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from nab.sampling import Child, sample, without
from nab.types import AcceptanceRule, Law


class Rule(AcceptanceRule, Protocol):
    """One position of a draft: what stands below it, and what of that is accepted."""

    @property
    def width(self) -> int:
        """Children, at most."""

    def children(self, q: Law, uniforms: Sequence[Any]) -> list[Child]:
        """Tokens drafted from the drafter's law ``(vocab,)``, in the order in which they are to be tested.

        Child j is drawn with ``uniforms[j]``. There are fewer where ``q`` has no more tokens, none where it
        is all 0.
        """


@dataclass(frozen=True)
class Chain:
    """One sampled draft per position: ``a(x) = min(1, q(x) / p(x))``, ``gamma = sum_x min(p, q)(x)``.

    Source: Leviathan, Kalman, Matias 2023, Thm 3.5; Chen et al. 2023. With a one-hot ``q`` this is also the
    rule of a deterministic draft (n-gram argmax, prompt lookup), and with ``q = 0`` that of no draft at all.
    """

    width = 1

    def children(self, q: Law, uniforms: Sequence[Any]) -> list[Child]:
        """One draw from ``q``; none where it is all 0."""
        return MultiDraft(1).children(q, uniforms)

    def probability(self, p: Law, q: Law) -> Any:
        """Return ``sum_x min(p(x), q(x))`` in [0, 1], shape ``(...,)``."""
        return p.clip(max=q).sum(-1).clip(max=1)

    def realised(self, p: Law, q: Law, token: Any) -> Any:
        """Return ``min(1, q / p)`` at ``token``, shape ``(...,)``; ``p(token)`` must be positive."""
        p_token = _at(p, token)
        return _at(q, token).clip(max=p_token) / p_token


@dataclass(frozen=True)
class MultiDraft:
    """``m`` independent drafts per position, tested one after the other against what is left of the target.

    With ``r_1 = p``, ``R_j = sum_x r_j(x)`` and ``r_{j+1} = (r_j - R_j q)_+``, the mass that nobody has
    accepted, ``a(x) = 1 - r_{m+1}(x) / p(x)`` and ``gamma = 1 - R_{m+1}``. It is SpecInfer's recursive
    rejection (Miao et al. 2024, Alg. 2), unnormalised; ``m = 1`` is the chain.
    """

    m: int

    def __post_init__(self) -> None:
        at_least_one("m", self.m)

    @property
    def width(self) -> int:
        """``m`` children."""
        return self.m

    def children(self, q: Law, uniforms: Sequence[Any]) -> list[Child]:
        """``m`` draws from ``q``, possibly alike; none where it is all 0."""
        return [Child(sample(q, u), q) for u in uniforms[: self.m]] if q.sum() > 0 else []

    def probability(self, p: Law, q: Law) -> Any:
        """Return gamma in [0, 1], shape ``(...,)``."""
        return _carried(p, self._rest(p, q))

    def realised(self, p: Law, q: Law, token: Any) -> Any:
        """Return a(``token``) in [0, 1], shape ``(...,)``; ``p(token)`` must be positive."""
        return _carried_at(p, self._rest(p, q), token)

    def _rest(self, p: Law, q: Law) -> Law:
        """What no draft accepts, ``p(x) (1 - a(x))``."""
        rest = p
        for _ in range(self.m):
            rest = (rest - rest.sum(-1)[..., None] * q).clip(0)
        return rest


@dataclass(frozen=True)
class WithoutReplacement:
    """``m`` different drafts per position, each drawn from ``q`` without those before it (Sequoia).

    The law of a draft depends on those before it, so a(x) is a mean over what is drawn, and has no closed
    form from the second draft on. ``probability`` and ``realised`` are **unbiased estimates** in [0, 1]: they
    draw the rejected tokens from their law ``(q_j - p_j)_+``, and go through the recursion of ``MultiDraft``
    with the laws ``q_j`` that remain. Two calls draw anew. Source: Chen et al. 2024 (Sequoia), section 4.1.

    Args:
        m: drafts, at least 1.
        rng: of the estimates, anything ``numpy.random.default_rng`` takes.
    """

    m: int
    rng: Any = field(default=None, compare=False)

    def __post_init__(self) -> None:
        at_least_one("m", self.m)
        object.__setattr__(self, "rng", np.random.default_rng(self.rng))

    @property
    def width(self) -> int:
        """``m`` children."""
        return self.m

    def children(self, q: Law, uniforms: Sequence[Any]) -> list[Child]:
        """``m`` different tokens, fewer where ``q`` has fewer, with the laws they were drawn from."""
        found: list[Child] = []
        for u in uniforms[: self.m]:
            if not q.sum() > 0:
                break
            law = q / q.sum()
            token = sample(law, u)
            found.append(Child(token, law))
            q = without(q, token)
        return found

    def probability(self, p: Law, q: Law) -> Any:
        """Return an unbiased estimate of gamma in [0, 1], shape ``(...,)``."""
        return _carried(p, self._rest(p, q))

    def realised(self, p: Law, q: Law, token: Any) -> Any:
        """Return an unbiased estimate of a(``token``) in [0, 1], shape ``(...,)``."""
        return _carried_at(p, self._rest(p, q), token)

    def _rest(self, p: Law, q: Law) -> Law:
        """What no draft accepts, ``p(x) (1 - a(x))`` in the mean."""
        rest = p.reshape(-1, p.shape[-1]) * 1
        for row, law in enumerate(q.reshape(rest.shape)):
            rest[row] = self._rest_of_one(rest[row], law)
        return rest.reshape(p.shape)

    def _rest_of_one(self, rest: Law, law: Law) -> Law:
        for left in reversed(range(self.m)):
            if not (law.sum() > 0 and rest.sum() > 0):
                break
            proposed = rest.sum() / law.sum() * law
            rest, rejected = (rest - proposed).clip(0), (proposed - rest).clip(0)
            if left == 0 or not rejected.sum() > 0:
                break
            law = without(law, sample(rejected, self.rng.random()))
        return rest


@dataclass(frozen=True)
class TopK:
    """The ``k`` likeliest tokens of ``q`` are drafted: ``a(x) = 1{x in C}``, ``gamma = p(C)``.

    One node of a deterministic draft tree (EAGLE; Liu et al. 2025, Thm 2); ``k = 1`` is a deterministic
    chain. Ties go to the lower token; tokens with ``q = 0`` are never drafted.
    """

    k: int

    def __post_init__(self) -> None:
        at_least_one("k", self.k)

    @property
    def width(self) -> int:
        """``k`` children."""
        return self.k

    def children(self, q: Law, uniforms: Sequence[Any]) -> list[Child]:
        """The ``k`` likeliest tokens, likeliest first; they are certain, whatever the uniforms."""
        return [Child(int(token), None) for token in _children(q, self.k) if q[int(token)] > 0]

    def probability(self, p: Law, q: Law) -> Any:
        """Return the target's mass on the drafted tokens, in [0, 1], shape ``(...,)``."""
        return sum(_at(p, child) * (_at(q, child) > 0) for child in _children(q, self.k)).clip(max=1)

    def realised(self, p: Law, q: Law, token: Any) -> Any:
        """Return 1 where ``token`` was drafted and 0 elsewhere, in the dtype of ``p``, shape ``(...,)``."""
        own = _at(q, token)
        equal = (q == own[..., None]).cumsum(-1)
        rank = (q > own[..., None]).sum(-1) + _at(equal, token)
        return _at(p, token) * 0 + ((rank <= self.k) & (own > 0))


@dataclass(frozen=True)
class Greedy:
    """``TopK`` under a target at temperature 0: ``gamma = 1{argmax p in C}``, whatever the law ``p``."""

    k: int = 1

    def __post_init__(self) -> None:
        at_least_one("k", self.k)

    @property
    def width(self) -> int:
        """``k`` children."""
        return self.k

    def children(self, q: Law, uniforms: Sequence[Any]) -> list[Child]:
        """Those of ``TopK(k)``."""
        return TopK(self.k).children(q, uniforms)

    def probability(self, p: Law, q: Law) -> Any:
        """Return 1 where the target's argmax was drafted and 0 elsewhere, shape ``(...,)``."""
        return TopK(self.k).realised(p, q, p.argmax(-1))

    def realised(self, p: Law, q: Law, token: Any) -> Any:
        """Return 1 where ``token`` was drafted and 0 elsewhere, shape ``(...,)``."""
        return TopK(self.k).realised(p, q, token)


def at_least_one(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is a whole number from 1 on."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _carried(p: Law, rest: Law) -> Any:
    """Gamma, from what no draft accepts."""
    return (p - rest).sum(-1).clip(0, 1)


def _carried_at(p: Law, rest: Law, token: Any) -> Any:
    """a(token), from what no draft accepts."""
    return 1 - _at(rest, token) / _at(p, token)


def _integers(token: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.asarray(token.tolist() if hasattr(token, "tolist") else token, dtype=np.int64)


def _at(law: Law, token: Any) -> Any:
    """``law[..., token]``, one token per row."""
    index = _integers(token)
    rows = law.reshape(-1, law.shape[-1])
    return rows[np.arange(len(rows)), index.reshape(-1)].reshape(law.shape[:-1])


def _children(q: Law, k: int) -> list[Any]:
    """Indices of the ``k`` largest entries of each row, largest first, the lower index first among equals."""
    rest = q.reshape(-1, q.shape[-1]) * 1
    rows, found = np.arange(len(rest)), []
    for _ in range(min(k, q.shape[-1])):
        child = rest.argmax(-1)
        found.append(child.reshape(q.shape[:-1]))
        rest[rows, child] = -1
    return found
