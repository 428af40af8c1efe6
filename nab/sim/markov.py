"""Markov language models over a small vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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

    def score(self, tokens: Sequence[int], start: int) -> Floats:
        """Laws at ``start .. len(tokens)``, with ``start >= order``."""
        if not self.order <= start <= len(tokens):
            raise ValueError(f"start must lie in [{self.order}, {len(tokens)}], got {start}")
        positions = np.arange(start, len(tokens) + 1)
        history = np.asarray(tokens, dtype=np.int64)
        return np.asarray(self.table[tuple(history[positions - back] for back in range(self.order, 0, -1))])
