"""Trees of tokens, and the cache that keeps of one tree what the next one shares with it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


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


class Slots(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of one layer in memory that is there before it is needed, and doubles when it is full.

    ``keys`` and ``values`` are views of its first entries, those of the last ``update``; so forgetting the
    last ones, and reading others in their place, moves nothing.
    """

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memory: Any = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values ``(rows, heads, entries, width)``; all that there are then."""
        if self._memory is None:
            self.dtype, self.device = key_states.dtype, key_states.device
            self._memory = [Memory(key_states, -2), Memory(value_states, -2)]
            self.is_initialized = True
        pair = zip(self._memory, (key_states, value_states), strict=True)
        self.keys, self.values = (memory.append(states) for memory, states in pair)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Entries held."""
        return 0 if self._memory is None else int(self._memory[0].used)

    def truncate(self, entries: int) -> None:
        """Keep the first ones alone."""
        for memory in self._memory:
            memory.truncate(entries)

    def move(self, found: Tensor, place: int) -> None:
        """Put some entries, by index, behind the first ``place``; nothing comes behind them."""
        self.keys, self.values = (memory.move(found, place) for memory in self._memory)


class Memory:
    """Tensors that are appended to along an axis."""

    def __init__(self, like: Tensor, axis: int) -> None:
        self._axis = axis
        self._whole = like.new_empty(self._sized(like, _FIRST_ENTRIES))
        self.used = 0

    def _sized(self, like: Tensor, entries: int) -> list[int]:
        shape = list(like.shape)
        shape[self._axis] = entries
        return shape

    @property
    def view(self) -> Tensor:
        """What was appended and is still there."""
        return self._whole.narrow(self._axis, 0, self.used)

    def append(self, states: Tensor) -> Tensor:
        """The view with ``states`` at its end."""
        entries = states.shape[self._axis]
        end = self.used + entries
        if end > self._whole.shape[self._axis]:
            held = self.view
            self._whole = states.new_empty(self._sized(states, 2 * end))
            self.view.copy_(held)
        self._whole.narrow(self._axis, self.used, entries).copy_(states)
        self.used = end
        return self.view

    def truncate(self, entries: int) -> None:
        """Keep the first entries alone."""
        self.used = entries

    def move(self, found: Tensor, place: int) -> Tensor:
        """See ``Slots.move``."""
        moved = self._whole.index_select(self._axis, found.to(self._whole.device))
        self.used = place
        return self.append(moved)


_FIRST_ENTRIES = 256


class TreeCache:
    """Keys, values and other states of the entries of one tree, that a model read last.

    Reading another tree keeps the entries both share, drops or moves the others and feeds what is
    missing; so there is nothing to roll back after a verification, nor after an interrupted forward. Layers
    are full ones under sliding windows too (see docs/decisions/full-caches.md).

    Args:
        states: what an entry leaves besides keys and values: an empty tensor ``(0, ...)`` for each kind.
    """

    tree: Tree
    keys: Cache

    def __init__(self, *states: Tensor) -> None:
        self._empty = states
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.tree, self.keys = Tree([]), Cache(layer_class_to_replicate=Slots)
        self._states = [Memory(states, 0) for states in self._empty]

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
        for memory, new in zip(self._states, states, strict=True):
            memory.append(new)

    @property
    def states(self) -> list[Tensor]:
        """Of all entries, of each kind."""
        return [memory.view for memory in self._states]

    def adopt(self, tree: Tree, keys: Cache, row: int, *states: Tensor) -> None:
        """Hold what a row of another cache holds of a chain instead of all that is held.

        Args:
            tree: the chain.
            keys: of at least as many entries, of the same layers.
            row: of it.
            states: of the entries, ``(entries, ...)`` of each kind.
        """
        self.reset()
        layers: list[Any] = keys.layers
        for number, layer in enumerate(layers):
            pair = (each[row : row + 1, :, : len(tree)] for each in (layer.keys, layer.values))
            self.keys.update(*pair, number)
        self.add(*states)
        self.tree = tree

    def along(self, labels: Sequence[int]) -> list[Tensor]:
        """States of the longest prefix of a chain that was read, perhaps along a branch."""
        place, found = self.tree.find(Tree(labels), len(labels))
        return [torch.cat([s[:place], s[found]]) if found else s[:place] for s in self.states]

    def _keep(self, place: int, found: list[int]) -> int:
        """Drop all entries but the first ``place`` and those ``found``; their number."""
        kept, held = place + len(found), len(self.tree)
        in_place = found == list(range(place, kept))
        if in_place and kept == held:
            return kept
        layers: list[Any] = self.keys.layers
        held_by = [*(layer for layer in layers if layer.is_initialized), *self._states]  # others share keys
        if in_place:
            for each in held_by:
                each.truncate(kept)
        else:
            order = torch.tensor(found)
            for each in held_by:
                each.move(order, place)
        return kept


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask for transformers' sdpa and eager attention, ``(1, 1, rows, entries)``, from booleans."""
    mask = torch.zeros(visible.shape, dtype=dtype)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[None, None]


def aligned(mask: Tensor) -> Tensor:
    """The mask ``(rows, entries)``; on a GPU a copy whose rows begin at multiples of 8 entries.

    CUDA's attention kernels read so. Where strides are multiples of it, they do not see that a slice begins
    elsewhere, and fail (torch 2.11: "misaligned address").
    """
    if mask.device.type == "cpu":
        return mask
    rows, entries = mask.shape
    return mask.new_empty(rows, -(-entries // 8) * 8)[:, :entries].copy_(mask)


class Bands:
    """Masks of chains behind others, of which those of few entries are made once.

    Args:
        like: of the device and dtype wanted.
        windows: of the layers, see ``__call__``.
    """

    def __init__(self, like: Tensor, windows: Iterable[int | None] = (None,)) -> None:
        self._like, self._windows = like, frozenset(windows)
        self._none = dict.fromkeys(self._windows)
        self._tables: dict[int | None, Tensor] = {}

    def all(self, rows: range) -> Mapping[int | None, Tensor | None]:
        """The masks of all windows, by window."""
        if len(rows) == 1 and self._windows == _FAR:
            return self._none
        return {window: self(rows, window) for window in self._windows}

    def __call__(self, rows: range, window: int | None) -> Tensor | None:
        """Additive mask ``(len(rows), rows.stop)`` of some entries of a chain; None where none is needed.

        Args:
            rows: the entries that look, consecutive.
            window: they see no further than ``window - 1`` entries back.
        """
        if (len(rows) == 1 or rows.start == 0) and (window is None or rows.stop <= window):
            return None
        if len(rows) > _BAND:
            return self._band(len(rows), rows.start, window)
        table = self._tables.get(window)
        past = -1 if table is None else table.shape[1] - _BAND
        if table is None or rows.start > past:
            past = max(2 * rows.start, 1024)
            table = self._tables[window] = self._band(_BAND, past, window)
        return aligned(table[: len(rows), past - rows.start : past + len(rows)])

    def _band(self, rows: int, past: int, window: int | None) -> Tensor:
        behind = torch.arange(rows)[:, None] - torch.arange(-past, rows)
        visible = (behind >= 0) & (behind < (window or inf))
        return additive(visible, self._like.dtype)[0, 0].to(self._like.device)


_BAND = 64
_FAR = frozenset([None])


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading tokens that two sequences share."""
    n = min(len(a), len(b))
    a, b = list(a[:n]), list(b[:n])
    if a == b:
        return n
    return bisect_left(range(1, n + 1), True, key=lambda k: a[:k] != b[:k])
