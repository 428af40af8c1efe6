"""Drafters of the same shape as one: their weights are stacked, and one forward scores all of them.

A stack keeps keys and values of the verified tokens for all its members. A member drafts by itself, as it
does alone, and takes over from the stack what it has not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from nab.backends import rows
from nab.backends.cache import Bands, Memory, Slots, Tree, TreeCache, common_prefix
from nab.backends.decoder import Parts, form, member, stack
from nab.types import LanguageModel


class Stack:
    """Drafters that are scored in one forward.

    Args:
        members: two at least, whose ``parts`` have the same form; their weights become views of the stack's.
    """

    def __init__(self, members: Sequence[Any]) -> None:
        self.members = members
        self._first = members[0]
        self._parts: Parts = stack(*(each.parts for each in members))
        for i, each in enumerate(members):
            each.rebuild(member(self._parts, i))
            each.stack = self
        self._bands = Bands(self._parts.head.weight, self._parts.decoder.windows)
        self.reset()

    def reset(self) -> None:
        """Forget all cached tokens."""
        self._tokens: list[int] = []
        self._keys = Cache(layer_class_to_replicate=Slots)
        self._hidden: list[Memory] = []  # one where members keep their hidden states

    @torch.inference_mode()
    def acceptance(self, tokens: Sequence[int], start: int, p: Sequence[Tensor]) -> Tensor:
        """See ``nab.types.Accepts``, of all members.

        Raises:
            ValueError: if the text does not fit the context of a member.
        """
        room = min((each.context for each in self.members if each.context is not None), default=len(tokens))
        if len(tokens) - 1 > room:
            raise ValueError(f"{len(tokens) - 1} tokens do not fit the context of a member: {room}")
        kept = min(common_prefix(self._tokens, tokens), start - 1)
        layers: list[Any] = self._keys.layers
        for each in (*layers, *self._hidden):
            each.truncate(kept)
        entries, self._tokens = range(kept, len(tokens) - 1), []
        x = self._first.enter(self._parts.entry, tokens, entries)
        hidden = self._parts.decoder(x, self._keys, entries, self._bands.all(entries))[-1]
        if self._first.keeps and not self._hidden:
            self._hidden = [Memory(hidden, -2)]
        for memory in self._hidden:
            memory.append(hidden)
        self._tokens = list(tokens[:-1])
        logits, vocabulary = self._parts.head(hidden[:, start - 1 - kept :]), self._parts.vocabulary
        return rows.acceptance(p, self._first.warper.drafted(logits, vocabulary), tokens[start:], vocabulary)

    @torch.inference_mode()
    def lend(self, member: Any, cache: TreeCache, tokens: Sequence[int]) -> None:
        """Let a member's cache hold what the stack has read of a text, if that is more than it holds."""
        read = common_prefix(self._tokens, tokens)
        place, found = cache.tree.find(Tree(list(tokens[:read])), read)
        if place + len(found) < read:
            row = self.members.index(member)
            states = [memory.view[row, :read] for memory in self._hidden]
            cache.adopt(Tree(list(tokens[:read])), self._keys, row, *states)


def stacked(drafters: Sequence[LanguageModel]) -> list[Stack]:
    """Stack those that have the same form, in groups of two at least; the others stay alone.

    Those that are in a stack stay in that one.
    """
    groups: list[tuple[Any, list[Any]]] = []
    for each in {id(each): each for each in drafters}.values():
        parts = getattr(each, "parts", None)
        if parts is None or getattr(each, "stack", None) is not None:
            continue
        kind = type(each), getattr(each, "warper", None), form(parts)
        members = next((members for known, members in groups if known == kind), None)
        if members is None:
            groups.append((kind, members := []))
        members.append(each)
    return [Stack(members) for _, members in groups if len(members) > 1]
