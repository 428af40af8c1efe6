"""Models that read several texts at once.

Positions are addresses: entry j of a row's text is at slot j of the row's memory. So rewinding is forgetting,
what pads a row is behind its end, and the only mask is ``slot <= position``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from nab.backends.decoder import Decoder, Window
from nab.backends.torch import CausalLM

Places = slice | Tensor
"""Some rows: the first ones, or those of these numbers ``(rows,)``."""


class Memory:
    """Keys and values of the texts of some rows, of all layers, entry j of a text at slot j.

    What is written is seen by position alone: entries behind the one that looks are hidden until they are
    overwritten. What is hidden is multiplied by 0, so all that is held is finite: zeros stand for what is no
    number. It stands in for a transformers ``Cache`` where ``Decoder`` reads.

    Args:
        layers: of the model.
        shape: ``(rows, heads, width of a head)``.
        like: of the device and dtype wanted.
    """

    def __init__(self, layers: int, shape: tuple[int, int, int], like: Tensor) -> None:
        count, heads, width = shape
        self._layers = [
            [like.new_zeros(count, heads, _FIRST_SLOTS, width) for _ in range(2)] for _ in range(layers)
        ]

    @property
    def slots(self) -> int:
        """How many entries a row has room for; it doubles when that is too few."""
        return self._layers[0][0].shape[2]

    def open(self, places: Places, positions: Tensor, end: int) -> None:
        """From now on, ``update`` is about these rows, positions ``(rows, entries)``, all below ``end``."""
        self._places, self._end, self._entries = places, end, positions.shape[1]
        if isinstance(places, slice):
            places = torch.arange(places.stop, device=positions.device)
        self._at = places[:, None], positions
        if end > self.slots:
            self._layers = [[self._grown(part, 2 * end) for part in layer] for layer in self._layers]

    def _grown(self, part: Tensor, slots: int) -> Tensor:
        grown = part.new_zeros(*part.shape[:2], slots, part.shape[3])
        grown[:, :, : part.shape[2]] = part
        return grown

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Write ``(rows, heads, entries, width)``; all there is then in these rows, ``(..., end, width)``."""
        for part, new in zip(self._layers[layer], (keys, values), strict=True):
            part.transpose(1, 2)[self._at] = torch.nan_to_num(new.transpose(1, 2), 0, 0, 0)
        known, seen = (part[self._places, :, : self._end] for part in self._layers[layer])
        return known, seen

    def get_seq_length(self) -> int:
        """So many that the new entries end at ``end``."""
        return self._end - self._entries

    def move(self, row: int, to: int) -> None:
        """Put a row's text in another row's place."""
        for layer in self._layers:
            for part in layer:
                part[to] = part[row]


_FIRST_SLOTS = 256


class Reader:
    """A model that reads several texts at once: the weights of a ``CausalLM``, and a memory of its own.

    Args:
        lm: of Llama's family; it is left as it is, and still reads for itself.
        count: of rows.

    Raises:
        ValueError: see ``decoder_of``.
    """

    def __init__(self, lm: CausalLM, count: int) -> None:
        self._decoder = decoder_of(lm)
        self.lm = lm
        self.lengths = [0] * count
        """Of each row, how many leading entries are those of its text."""
        self.sound = torch.ones(count, dtype=torch.bool, device=lm.device)
        """Whether all that was read of each row by ``follow`` is a number."""
        heads, width = self._decoder.shape[1:]
        self.memory = Memory(len(self._decoder.layers), (count, heads, width), lm._embedding)

    def logits(self, places: Places, first: Tensor, end: int, ids: Tensor) -> Tensor:
        """Read entries of some rows, each row's from its own position on.

        Args:
            places: the rows.
            first: positions of their first entries, ``(rows,)``; all entries before are there.
            end: above all positions.
            ids: ``(rows, entries)``.

        Returns:
            ``(rows, entries, vocab)``.
        """
        states = self._read(places, first, end, ids)
        return self.lm._head(states.masked_fill(~self.sound[places, None, None], torch.nan))

    def follow(self, places: Places, first: Tensor, end: int, ids: Tensor) -> Tensor:
        """As ``logits``, of entries that all laws from now on depend on: NaN among them makes those NaN."""
        states = self._read(places, first, end, ids)
        self.sound[places] &= states.isfinite().flatten(1).all(1)
        return self.lm._head(states.masked_fill(~self.sound[places, None, None], torch.nan))

    def _read(self, places: Places, first: Tensor, end: int, ids: Tensor) -> Tensor:
        positions = first[:, None] + torch.arange(ids.shape[1], device=ids.device)
        self.memory.open(places, positions, end)
        masks = {window: self._mask(positions, end, window) for window in self._decoder.windows}
        x = self.lm._embedding[ids]
        return self._decoder(x, cast(Any, self.memory), positions, masks)[-1]

    def _mask(self, positions: Tensor, end: int, window: Window) -> Tensor:
        """Additive, ``(rows, 1, entries, end)``."""
        slots, at = torch.arange(end, device=positions.device), positions[..., None]
        hidden = slots > at if window is None else (slots > at) | (slots <= at - window)
        mask = torch.zeros(hidden.shape, dtype=self.lm.model.dtype, device=hidden.device)
        return mask.masked_fill_(hidden, torch.finfo(mask.dtype).min)[:, None]

    def catch_up(self, places: Iterable[int], texts: Sequence[Sequence[int]], ends: Sequence[int]) -> None:
        """Read what is missing of the first entries of some rows: those that miss about as many, together.

        They are padded at their ends, where nobody looks before the entries of the text are there.
        """
        missing = {row: ends[row] - self.lengths[row] for row in places if ends[row] > self.lengths[row]}
        for group in _joined(missing):
            counts, first = [missing[row] for row in group], [self.lengths[row] for row in group]
            longest, device = counts[0], self.lm.device
            ids = [
                [*texts[row][self.lengths[row] : ends[row]], *[_PADDING] * (longest - missing[row])]
                for row in group
            ]
            at, begin, fed, read = (torch.tensor(each, device=device) for each in (group, first, ids, counts))
            states = self._read(at, begin, max(first) + longest, fed)
            padding = torch.arange(longest, device=device) >= read[:, None]
            self.sound[at] &= (states.isfinite().all(2) | padding).all(1)
            for row in group:
                self.lengths[row] = ends[row]

    def leave(self, row: int, last: int) -> None:
        """Forget a row; the last one takes its place."""
        if row != last:
            self.memory.move(last, row)
        self.lengths[row], self.lengths[last] = self.lengths[last], 0
        self.sound[row] = self.sound[last]
        self.sound[last] = True


def decoder_of(lm: CausalLM) -> Decoder:
    """What a reader reads with.

    Raises:
        ValueError: if ``lm`` is read by transformers, which has no memory of this kind.
    """
    if lm.decoder is None:
        kind = type(lm.model).__name__
        raise ValueError(f"{lm.name} cannot be read in a batch: {kind}, only plain models of Llama's family")
    return lm.decoder


_PADDING = 0
"""A token that every model has."""

_FEW = 16
"""So many entries more take next to no time beside the weights that a forward reads."""


def _joined(missing: Mapping[int, int]) -> list[list[int]]:
    """Rows that are read in one forward, the longest first, by how many entries each one misses.

    A row is padded by no more than it misses itself, or by few entries: so a prompt of 20 tokens does not pay
    for one of 900, and since the longest row of each forward misses less than half of what that of the one
    before does, forwards are few however many rows there are.
    """
    groups: list[list[int]] = []
    for row in sorted(missing, key=lambda row: -missing[row]):
        if groups and missing[groups[-1][0]] - missing[row] <= max(missing[row], _FEW):
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups
