"""Acceptance rules: one function a(x) describes a verification scheme.

Given that token x is emitted at a position, a(x) is the probability that the draft contained x and was
accepted. Everything else follows: ``gamma = sum_x p(x) a(x)`` is the probability of acceptance before x is
known, ``realised = a(x_t)`` the same afterwards, and ``E_{x ~ p} realised = gamma``.

All rules take numpy arrays and torch tensors, with any leading dimensions, and stay in their dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from nab.types import Law


@dataclass(frozen=True)
class Chain:
    """One sampled draft per position: ``a(x) = min(1, q(x) / p(x))``, ``gamma = sum_x min(p, q)(x)``.

    Source: Leviathan, Kalman, Matias 2023, Thm 3.5; Chen et al. 2023. With a one-hot ``q`` this is also the
    rule of a deterministic draft (n-gram argmax, prompt lookup), and with ``q = 0`` that of no draft at all.
    """

    def probability(self, p: Law, q: Law) -> Any:
        """Return ``sum_x min(p(x), q(x))`` in [0, 1], shape ``(...,)``."""
        return p.clip(max=q).sum(-1).clip(max=1)

    def realised(self, p: Law, q: Law, token: Any) -> Any:
        """Return ``min(1, q / p)`` at ``token``, shape ``(...,)``; ``p(token)`` must be positive."""
        p_token = _at(p, token)
        return _at(q, token).clip(max=p_token) / p_token


@dataclass(frozen=True)
class TopK:
    """The ``k`` likeliest tokens of ``q`` are drafted: ``a(x) = 1{x in C}``, ``gamma = p(C)``.

    One node of a deterministic draft tree (EAGLE; Liu et al. 2025, Thm 2); ``k = 1`` is a deterministic
    chain. Ties go to the lower token; tokens with ``q = 0`` are never drafted.
    """

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")

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

    def probability(self, p: Law, q: Law) -> Any:
        """Return 1 where the target's argmax was drafted and 0 elsewhere, shape ``(...,)``."""
        return TopK(self.k).realised(p, q, p.argmax(-1))

    def realised(self, p: Law, q: Law, token: Any) -> Any:
        """Return 1 where ``token`` was drafted and 0 elsewhere, shape ``(...,)``."""
        return TopK(self.k).realised(p, q, token)


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
