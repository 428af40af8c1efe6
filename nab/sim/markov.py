"""Markov language models over a small vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nab.checks import checked, whole
from nab.sampling import by_path
from nab.types import Floats


@dataclass(frozen=True)
class Markov:
    """A ``LanguageModel`` whose next-token law depends on the last ``order`` tokens.

    Args:
        table: ``(vocab,) * order + (vocab,)``; ``table[a, b]`` is the law after ``..., a, b``. Rows sum to 1,
            or to 0 where a drafter has nothing to propose.

    Raises:
        ValueError: if ``table`` is not of that shape or its rows are no laws.

    >>> Markov(np.array([[0.0, 1.0], [0.5, 0.5]])).score([0, 1], start=1).tolist()
    [[0.0, 1.0], [0.5, 0.5]]
    """

    table: Floats

    def __post_init__(self) -> None:
        mass = self.table.sum(-1)
        if self.table.ndim < 2 or len(set(self.table.shape)) != 1:
            raise ValueError(f"table must have shape (vocab,) * order + (vocab,), got {self.table.shape}")
        if not ((self.table >= 0).all() and (np.isclose(mass, 1) | (mass == 0)).all()):
            raise ValueError("rows of table must be non-negative and sum to 1 or 0")

    @property
    def order(self) -> int:
        """Number of tokens the law depends on, at least 1."""
        return self.table.ndim - 1

    def score(self, tokens: Sequence[int], start: int, parents: Sequence[int] | None = None) -> Floats:
        """Laws at ``start .. len(tokens)``, with ``start >= order``; a ``TreeModel``."""
        if parents is not None:
            return np.concatenate(by_path(self.score, tokens, start, parents))
        if not self.order <= start <= len(tokens):
            raise ValueError(f"start must lie in [{self.order}, {len(tokens)}], got {start}")
        history = np.asarray(tokens[start - self.order :], dtype=np.int64)
        positions = len(tokens) + 1 - start
        return np.asarray(self.table[tuple(history[k : k + positions] for k in range(self.order))])


def domains(
    n: int, letters: int, *, switch: float = 0.02, sharpness: float = 2.0, blur: float = 0.5, rng: Any = None
) -> tuple[Markov, list[Markov]]:
    """A target over domains, an expert for each of them, and a generalist: ``n + 1`` drafters.

    Tokens are pairs, ``domain * letters + letter``. With probability ``switch`` a token moves to another
    domain, any of them alike; its letter then has the law of the domain it is in, given the letter before:
    ``softmax(sharpness * z)`` with standard normal ``z``. An expert takes the letter laws of its own domain
    for those of all. The generalist knows every domain, at ``blur`` times the sharpness.

    Args:
        n: domains, at least 1.
        letters: in each domain, at least 2.
        switch: in [0, 1]; needs a second domain if above 0.
        sharpness: above 0; laws are the nearer to deterministic the higher it is.
        blur: in (0, 1]; at 1 the generalist is the target.
        rng: anything ``numpy.random.default_rng`` takes.

    Returns:
        The target and the drafters, experts in the order of the domains, then the generalist.

    Raises:
        ValueError: if an argument is out of its range.

    >>> target, drafters = domains(2, 3, rng=0)
    >>> target.table.shape, len(drafters)
    ((6, 6), 3)
    """
    whole("n", n, 1)
    whole("letters", letters, 2)
    checked("sharpness", sharpness)
    checked("blur", blur, high=1, closed=True)
    if not 0 <= switch <= (n > 1):
        raise ValueError(f"switch must lie in [0, {int(n > 1)}] for {n} domains, got {switch}")
    z = np.random.default_rng(rng).standard_normal((n, letters, letters))
    moves = np.full((n, n), switch / max(n - 1, 1))
    np.fill_diagonal(moves, 1 - switch)

    def model(of: Floats, sharpness: float) -> Markov:
        laws = np.exp(sharpness * (of - of.max(-1, keepdims=True)))
        laws /= laws.sum(-1, keepdims=True)
        return Markov(np.einsum("de,eab->daeb", moves, laws).reshape(n * letters, n * letters))

    experts = [model(np.broadcast_to(own, z.shape), sharpness) for own in z]
    return model(z, sharpness), [*experts, model(z, blur * sharpness)]
