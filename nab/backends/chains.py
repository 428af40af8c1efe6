"""One chain: drawn token by token where the model is, and tested there, with one wait for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from nab.backends import rows
from nab.backends.rows import Drafted

if TYPE_CHECKING:
    from nab.backends.torch import Warper


def chain(
    warper: Warper,
    logits: Tensor,
    read: Callable[[Tensor], Tensor],
    *,
    like: Tensor,
    uniforms: Sequence[float],
    tell: Callable[[Sequence[int]], None],
    vocabulary: Tensor | None = None,
) -> Drafted:
    """Tokens drawn one behind the other; nothing waits for them.

    Args:
        warper: makes laws of logits.
        logits: of the first token, ``(1, 1, draft vocab)``.
        read: gives those behind one more token ``(1, 1)``.
        like: some laws of the target.
        uniforms: one a token.
        tell: see ``Drafted``.
        vocabulary: ids that logits are over, ``(draft vocab,)``; None is the target's.

    Raises:
        ValueError: if the target's laws are over other tokens, or elsewhere.
    """
    own, wanted = ((laws.shape[-1], laws.device) for laws in (logits, like))
    if own != wanted and (vocabulary is None or own[1] != wanted[1]):
        raise ValueError(f"its laws must be like the target's, {wanted}, got {own}")
    if warper.temperature == 0:
        ids = [rows.likeliest(logits)]
        for _ in uniforms[1:]:
            logits = read(ids[-1] if vocabulary is None else vocabulary[ids[-1]])
            ids.append(rows.likeliest(logits))
        drafted, top = torch.cat(ids, 1), rows.at(logits, ids[-1])
        return Drafted(drafted if vocabulary is None else vocabulary[drafted], None, top, tell)
    ids, laws, token = list[Tensor](), list[Tensor](), None
    nothing = logits.new_zeros(1, 1, like.shape[-1], dtype=like.dtype)
    for u in rows.uniforms(uniforms, like).unbind():
        law = warper(logits if token is None else read(token))
        token = rows.draw(law, u[None, None, None])
        if vocabulary is not None:
            law, token = nothing.index_copy(-1, vocabulary, law), vocabulary[token]
        ids.append(token)
        laws.append(law)
    return Drafted(torch.cat(ids, 1), torch.cat([*laws, nothing], 1), None, tell)


class Found(NamedTuple):
    """Drafted tokens, how many of them are accepted, the next one, and whether the laws are numbers."""

    drafted: list[int]
    accepted: int
    token: int
    sound: bool
    drafter_sound: bool


def agreed(draft: Drafted, logits: Tensor) -> Found:
    """At temperature 0: accepted as far as the target's likeliest tokens, from ``(1, levels + 1, vocab)``."""
    best = rows.likeliest(logits)
    known = [] if draft.top is None else [draft.top]
    drafted, likeliest, tops, *own = rows.told(draft.ids, best, rows.at(logits, best), *known)
    accepted, levels = 0, len(drafted)
    while accepted < levels and drafted[accepted] == likeliest[accepted]:
        accepted += 1
    sound = all(map(_finite, tops)), all(map(_finite, *own)) if own else True
    return Found([*map(int, drafted)], accepted, int(likeliest[accepted]), *sound)


def _finite(top: float) -> bool:
    return top < inf  # not so if it is NaN


def tested(draft: Drafted, p: Tensor, uniforms: Sequence[float]) -> Found:
    """As ``nab.sampling.verify``, from laws ``(1, levels + 1, vocab)``; a law is NaN all over or nowhere."""
    ids, levels = draft.ids, draft.ids.shape[1]
    q = draft.q
    if q is None:  # the last law is 0: behind the chain nothing is drafted
        q = one_hot(torch.cat([ids, ids.new_zeros(1, 1)], 1), p.shape[-1]).to(p.dtype)
        q[:, levels] = 0
    u = rows.uniforms([*uniforms[:levels], uniforms[-1]], p)
    accepted, token, carried = rows.verify(p, ids, q, u[None])
    drafted, (count,), (next_token,), first, own = rows.told(ids, accepted, token, p[:, :, 0], carried)
    sound = all(map(_finite, first)), all(map(_finite, own))
    return Found([*map(int, drafted)], int(count), int(next_token), *sound)
