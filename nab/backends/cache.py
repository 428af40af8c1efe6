"""Trees of tokens, and the cache that keeps of one tree what the next one shares with it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache


@dataclass(frozen=True)
class Tree:
    """Entries in an order where each comes behind its parent: a chain, the trunk, then branches.

    Args:
        labels: of all entries. Entries with the same labels on their paths are the same computation.
        parents: of the last ``len(parents)`` entries, by index; -1 where there is none. An entry before
            these hangs from the one before it.
    """

    labels: Sequence[int]
    parents: Sequence[int] = ()
    trunk: int = field(init=False)  # leading entries that form a chain
    depths: list[int] = field(init=False, default_factory=list)  # of the entries behind the trunk
    _children: dict[tuple[int, int], int] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        before = len(self.labels) - len(self.parents)
        leading = 0
        while leading < len(self.parents) and self.parents[leading] == before + leading - 1:
            leading += 1
        object.__setattr__(self, "parents", self.parents[leading:])
        object.__setattr__(self, "trunk", before + leading)
        first: dict[int, int] = {}  # of the entries with the same path
        for entry, parent in enumerate(self.parents, self.trunk):
            self.depths.append(self.depths[parent - self.trunk] + 1 if parent >= self.trunk else parent + 1)
            at, label = first.get(parent, parent), self.labels[entry]
            same = self._child(at, label)
            first[entry] = self._children.setdefault((at, label), entry) if same is None else same

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def depth(self) -> int:
        """Entries on the longest path."""
        return max(self.trunk, 1 + max(self.depths, default=-1))

    def parent(self, entry: int) -> int:
        """Index of an entry's parent; -1 if it has none."""
        return entry - 1 if entry < self.trunk else self.parents[entry - self.trunk]

    def positions(self, rows: range) -> Tensor:
        """Depths of some entries, from 0, ``(rows,)``."""
        branches = self.depths[max(rows.start - self.trunk, 0) : max(rows.stop - self.trunk, 0)]
        chain = torch.arange(min(rows.start, self.trunk), min(rows.stop, self.trunk))
        return torch.cat([chain, torch.tensor(branches, dtype=torch.long)])

    def visible(self, rows: range, window: int | None = None) -> Tensor:
        """What some entries see of those up to the last of them: ancestors and themselves.

        Args:
            rows: the entries that look, consecutive.
            window: they see no further than ``window - 1`` positions back, counted along their paths.

        Returns:
            ``(len(rows), rows.stop)`` booleans.
        """
        columns, at = torch.arange(rows.stop), torch.arange(rows.start, rows.stop)
        seen = torch.zeros(len(rows), rows.stop, dtype=torch.bool)
        parents = torch.tensor(self.parents, dtype=torch.long)
        while len(climbing := (at >= self.trunk).nonzero()[:, 0]):
            seen[climbing, at[climbing]] = True
            at[climbing] = parents[at[climbing] - self.trunk]
        seen[:, : self.trunk] = columns[: self.trunk] <= at[:, None]
        if window is not None:
            seen &= self.positions(range(rows.stop)) > self.positions(rows)[:, None] - window
        return seen

    def find(self, other: Tree, most: int) -> tuple[int, list[int]]:
        """Where the first entries of ``other`` are in this tree, at most ``most`` of them.

        Returns:
            How many are in the same place, and the indices of those that follow, up to the first that is
            nowhere.
        """
        trunk, found = min(self.trunk, other.trunk, most), list[int]()
        place = common_prefix(self.labels[:trunk], other.labels[:trunk])
        for entry in range(place, min(most, len(other))):
            parent = other.parent(entry)
            at = self._child(parent if parent < place else found[parent - place], other.labels[entry])
            if at is None:
                break
            found.append(at)
        return place, found

    def _child(self, parent: int, label: int) -> int | None:
        """The first entry with this label behind ``parent``, itself the first of its path."""
        if parent + 1 < self.trunk and self.labels[parent + 1] == label:
            return parent + 1
        return self._children.get((parent, label))


class TreeCache:
    """Keys, values and other states of the entries of one tree, that a model read last.

    Reading another tree keeps the entries both share, drops or reorders the others and feeds what is
    missing; so there is nothing to roll back after a verification, nor after an interrupted forward. Layers
    are full ones under sliding windows too (see docs/decisions/full-caches.md).

    Args:
        states: what an entry leaves besides keys and values: an empty tensor ``(0, ...)`` for each kind.
    """

    tree: Tree
    keys: DynamicCache
    states: list[Tensor]

    def __init__(self, *states: Tensor) -> None:
        self._empty = states
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.tree, self.keys, self.states = Tree([]), DynamicCache(), list(self._empty)

    @contextmanager
    def reading(self, tree: Tree, most: int) -> Iterator[int]:
        """Hold ``tree`` when the body has run; nothing, if the body raises.

        The body gets the number of leading entries that are kept, at most ``most``, and feeds the others, in
        their order, to the model with ``keys`` and to ``add``.
        """
        try:
            kept = self._keep(*self.tree.find(tree, most))
            yield kept
            self.tree = tree
        except BaseException:  # an interrupted forward leaves the layers at different lengths
            self.reset()
            raise

    def add(self, *states: Tensor) -> None:
        """Append the states of entries that were fed, ``(entries, ...)`` of each kind."""
        self.states = [torch.cat(pair) for pair in zip(self.states, states, strict=True)]

    def along(self, labels: Sequence[int]) -> list[Tensor]:
        """States of the longest prefix of a chain that was read, perhaps along a branch."""
        place, found = self.tree.find(Tree(labels), len(labels))
        return [torch.cat([s[:place], s[found]]) if found else s[:place] for s in self.states]

    def _keep(self, place: int, found: list[int]) -> int:
        """Drop all entries but the first ``place`` and those ``found``; their number."""
        kept, held = place + len(found), len(self.tree)
        if found != list(range(place, kept)):
            order = torch.cat([torch.arange(place), torch.tensor(found)])
            layers: list[Any] = self.keys.layers
            for layer in layers:
                if not layer.is_initialized:  # it shares the keys of another
                    continue
                layer.keys = layer.keys.index_select(-2, order.to(layer.keys.device))
                layer.values = layer.values.index_select(-2, order.to(layer.values.device))
            self.states = [s[order.to(s.device)] for s in self.states]
        elif kept < held:
            self.keys.crop(kept - held)
            self.states = [s[:kept] for s in self.states]
        return kept


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask for transformers' sdpa and eager attention, ``(1, 1, rows, entries)``, from booleans."""
    mask = torch.zeros(visible.shape, dtype=dtype)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[None, None]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading tokens that two sequences share."""
    n = min(len(a), len(b))
    a, b = list(a[:n]), list(b[:n])
    return bisect_left(range(1, n + 1), True, key=lambda k: a[:k] != b[:k])
