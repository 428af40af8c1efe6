"""Drafters that are no neural network: prompt lookup and n-gram models. Numpy alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
"""Of any dtype."""


@dataclass(frozen=True)
class Lookup:
    """Prompt lookup: proposes the token that followed an earlier occurrence of the latest tokens.

    The longest suffix of at most ``max_ngram`` tokens that occurs earlier decides, by its last occurrence
    (Saxena 2023) or by the token that followed it most often. Its law is one-hot, or all 0 where nothing
    matches. It has no state.

    Args:
        vocab_size: length of the law; 0 where only proposals are asked for.
        max_ngram: longest suffix tried, at least 1.
        min_ngram: shortest suffix tried, at least 1.
        vote: of all that followed, the most frequent token, the latest of equals; else the latest.
    """

    vocab_size: int = 0
    max_ngram: int = 4
    min_ngram: int = 1
    vote: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.min_ngram <= self.max_ngram:
            raise ValueError(f"need 1 <= min_ngram <= max_ngram, got {self.min_ngram} and {self.max_ngram}")

    def score(self, tokens: Sequence[int], start: int) -> NDArray[np.float32]:
        """``(len(tokens) - start + 1, vocab_size)`` one-hot or zero laws; see ``LanguageModel.score``."""
        proposals = self.proposals(tokens, start)
        laws = np.zeros((len(proposals), self.vocab_size), dtype=np.float32)
        for law, proposal in zip(laws, proposals, strict=True):
            if proposal is not None:
                law[proposal] = 1
        return laws

    def proposals(self, tokens: Sequence[int], start: int) -> list[int | None]:
        """What carries all mass of each law of ``score``; None where it is all 0."""
        history = np.asarray(tokens, dtype=np.int64)
        return [self._proposal(history[:end]) for end in range(start, len(tokens) + 1)]

    def chain(self, tokens: Sequence[int], levels: int) -> list[int]:
        """At most ``levels`` tokens, each the proposal behind the one before; fewer where there is none."""
        return _chain(self._proposal, tokens, levels)

    def _proposal(self, history: Array) -> int | None:
        """The token behind the latest earlier occurrence of the longest matching suffix, or the vote's."""
        ends = self._ends(history)
        if len(ends) == 0:
            return None
        if not self.vote:
            return int(history[ends[-1] + 1])
        followers = history[ends[::-1] + 1]
        tokens, first, counts = np.unique(followers, return_index=True, return_counts=True)
        return int(tokens[np.lexsort((first, -counts))[0]])

    def _ends(self, history: Array) -> Array:
        """Where the earlier occurrences of the longest matching suffix end, ascending."""
        found = np.empty(0, dtype=np.int64)
        ends = np.flatnonzero(history[:-1] == history[-1:])
        for back in range(min(self.max_ngram, len(history) - 1)):
            if back:
                ends = ends[ends >= back]
                ends = ends[history[ends - back] == history[-1 - back]]
            if len(ends) == 0:
                break
            if back + 1 >= self.min_ngram:
                found = ends
        return found


def _chain(proposal: Callable[[Array], int | None], tokens: Sequence[int], levels: int) -> list[int]:
    """At most ``levels`` tokens, each the proposal behind the one before."""
    history, found = np.empty(len(tokens) + levels, dtype=np.int64), list[int]()
    history[: len(tokens)] = tokens
    for end in range(len(tokens), len(history)):
        token = proposal(history[:end])
        if token is None:
            break
        history[end] = token
        found.append(token)
    return found


class NGram:
    """Interpolated n-grams, absolute discounting: ``p = kept(x | context) + rest(context) p_shorter(x)``.

    Each order keeps some tokens of some contexts with their discounted probabilities; what they leave of 1
    goes to the next shorter context, down to the unigram law, which gives every token positive probability.
    ``fit`` makes one from token documents; ``arrays`` and ``from_arrays`` are the plain form to save.

    Args:
        unigram: ``(vocab,)`` law of a token without context.
        keys: per longer order k = 2, 3, ...: sorted packed contexts ``(contexts,)``, see ``_pack``.
        offsets: per order: slice of each context's tokens, ``(contexts + 1,)``.
        tokens: per order: kept tokens, ``(entries,)``.
        probs: per order: their discounted probabilities, ``(entries,)``.
    """

    def __init__(
        self,
        unigram: Array,
        keys: Sequence[Array],
        offsets: Sequence[Array],
        tokens: Sequence[Array],
        probs: Sequence[Array],
    ) -> None:
        self.unigram = (unigram.astype(np.float64) / unigram.sum(dtype=np.float64)).astype(np.float32)
        self.keys, self.offsets, self.tokens, self.probs = keys, offsets, tokens, probs
        self._commonest = int(self.unigram.argmax())

    @property
    def vocab_size(self) -> int:
        """Length of the law."""
        return len(self.unigram)

    @property
    def order(self) -> int:
        """Tokens looked at, the predicted one included."""
        return len(self.keys) + 1

    def score(self, tokens: Sequence[int], start: int) -> NDArray[np.float32]:
        """``(len(tokens) - start + 1, vocab_size)`` laws; see ``LanguageModel.score``."""
        history = np.asarray(tokens, dtype=np.int64)
        return np.stack([self._law(history[:end]) for end in range(start, len(tokens) + 1)])

    def _law(self, history: Array) -> NDArray[np.float32]:
        law: NDArray[np.float32] = self.unigram.copy()
        for tokens, probs in self._contexts(history):
            law *= max(1 - probs.sum(), 0)
            law[tokens] += probs
        return law

    def _contexts(self, history: Array) -> Iterator[tuple[Array, NDArray[np.float32]]]:
        """Kept tokens and their probabilities of the known contexts at the end, the shortest first."""
        for level, keys in enumerate(self.keys[: len(history)]):
            key = _pack(history[len(history) - level - 1 :])
            slot = int(np.searchsorted(keys, key))
            if slot == len(keys) or keys[slot] != key:
                return
            entries = slice(int(self.offsets[level][slot]), int(self.offsets[level][slot + 1]))
            probs = self.probs[level][entries].astype(np.float32)
            probs /= max(probs.sum(), 1)  # rounding to float16 may have lifted a full context above 1
            yield self.tokens[level][entries], probs

    def chain(self, tokens: Sequence[int], levels: int) -> list[int]:
        """At most ``levels`` tokens, each the likeliest behind the one before; none behind an unknown one."""
        return _chain(self._likeliest, tokens, levels)

    def _likeliest(self, history: Array) -> int | None:
        """The likeliest token, the lowest of equals; None where the last token is no known context.

        No token but those that a context keeps can be likelier than the likeliest of the unigram law.
        """
        contexts = [*self._contexts(history)]
        if not contexts:
            return None
        tokens = np.unique(np.concatenate([[self._commonest], *(kept for kept, _ in contexts)])).astype(int)
        law = self.unigram[tokens]
        for kept, probs in contexts:
            law *= max(1 - probs.sum(), 0)
            law[np.searchsorted(tokens, kept)] += probs
        return int(tokens[law.argmax()])

    def arrays(self) -> dict[str, Array]:
        """Plain named arrays, for instance for a safetensors file."""
        parts = {"keys": self.keys, "offsets": self.offsets, "tokens": self.tokens, "probs": self.probs}
        levels = {f"{name}.{k}": part[k] for name, part in parts.items() for k in range(len(part))}
        return {"unigram": self.unigram, **levels}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> NGram:
        """Inverse of ``arrays``."""
        levels = range(sum(name.startswith("keys.") for name in arrays))
        lists = {
            name: [arrays[f"{name}.{k}"] for k in levels] for name in ("keys", "offsets", "tokens", "probs")
        }
        return cls(arrays["unigram"], **lists)

    @classmethod
    def fit(
        cls, documents: Sequence[Array], vocab_size: int, *, order: int = 4, entries_per_order: int = 40_000
    ) -> NGram:
        """Count n-grams within ``documents`` and keep the ``entries_per_order`` most frequent of each order.

        The discount of an order is ``n1 / (n1 + 2 n2)``, from its n-grams seen once and twice (Ney, Essen,
        Kneser 1994). N-grams seen once are never kept.
        """
        counts = np.bincount(np.concatenate(documents), minlength=vocab_size)
        levels = [_level(documents, k, entries_per_order) for k in range(2, order + 1)]
        keys, offsets, tokens, probs = map(list, zip(*levels, strict=True)) if levels else ([], [], [], [])
        return cls(counts + 0.5, keys, offsets, tokens, probs)


_BITS = 17  # per token: room for vocabularies up to 131 072 and contexts of three tokens


def _pack(context: Array) -> np.uint64:
    """Up to three tokens as one integer."""
    packed = 0
    for token in context.tolist():
        packed = packed << _BITS | token
    return np.uint64(packed)


def _level(documents: Sequence[Array], order: int, most: int) -> tuple[Array, Array, Array, Array]:
    """Contexts, offsets, tokens and discounted probabilities of one order."""
    grams = [_windows(document, order) for document in documents if len(document) >= order]
    found, counts = np.unique(np.concatenate(grams), return_counts=True)
    contexts = found >> np.uint64(_BITS)
    _, owner = np.unique(contexts, return_inverse=True)
    totals = np.bincount(owner, weights=counts)[owner]
    once, twice = (counts == 1).sum(), (counts == 2).sum()
    discounted = (counts - once / max(once + 2 * twice, 1)) / totals

    kept = np.flatnonzero(counts >= 2)
    kept = np.sort(kept[np.argsort(-counts[kept], kind="stable")[:most]])
    keys, starts = np.unique(contexts[kept], return_index=True)
    tokens = found[kept] & np.uint64(2**_BITS - 1)
    tokens = tokens.astype(np.uint16 if tokens.max(initial=0) < 2**16 else np.uint32)
    return keys, np.append(starts, len(kept)).astype(np.uint32), tokens, discounted[kept].astype(np.float16)


def _windows(document: Array, order: int) -> NDArray[np.uint64]:
    """Every window of ``order`` tokens, packed."""
    packed = np.zeros(len(document) - order + 1, dtype=np.uint64)
    for k in range(order):
        packed = (packed << np.uint64(_BITS)) | document[k : len(packed) + k].astype(np.uint64)
    return packed
