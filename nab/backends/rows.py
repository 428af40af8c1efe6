"""Drawing and verifying where the laws are: many rows at once, no waiting for the device.

The same decisions as ``nab.sampling``, against which these are tested, from the same uniforms; but uniforms
within a rounding error of 1 are lowered, so that no token behind all mass is drawn: a law changes by at most
``torch.finfo(dtype).eps``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

UNKNOWN = -(1 << 60)
"""Stands for a token that the device has drawn and the host has not seen yet; so does its complement."""


class Drafted(NamedTuple):
    """Chains of tokens that the device has drawn, one a row.

    Args:
        ids: ``(rows, levels)``.
        q: the laws they were drawn from, and one that is 0, ``(rows, levels + 1, vocab)``; None where they
            were certain.
        top: the largest logits where some of them were certain, the last one's at least: ``(rows, any)``.
        tell: to be called with the tokens of the only row, once they are known.
    """

    ids: Tensor
    q: Tensor | None = None
    top: Tensor | None = None
    tell: Callable[[Sequence[int]], None] = lambda drafted: None


def uniforms(values: ArrayLike, like: Tensor) -> Tensor:
    """On the device and in the dtype of ``like``, below 1."""
    most = 1 - torch.finfo(like.dtype).eps
    return torch.from_numpy(np.minimum(values, most)).to(like.device, like.dtype)


def told(*parts: Tensor) -> list[list[Any]]:
    """The first rows of some tensors ``(1, any)`` on the host, which waits for the device once."""
    if all(part.is_cpu for part in parts):
        return [part.tolist()[0] for part in parts]
    whole = torch.cat([part.double() for part in parts], 1).tolist()[0]  # exact for tokens
    ends = list(accumulate(part.shape[1] for part in parts))
    return [whole[begin:end] for begin, end in pairwise([0, *ends])]


def likeliest(logits: Tensor) -> Tensor:
    """Index of the largest entry of each row, the lower one among equals; of a NaN, if there is one.

    On a CPU by numpy, which is five to twenty times as fast as torch there.
    """
    if logits.is_cpu:
        exact = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        return torch.from_numpy(np.asarray(exact.numpy().argmax(-1)))
    return logits.argmax(-1)


def at(laws: Tensor, tokens: Tensor) -> Tensor:
    """Entries of some tokens, one a row: ``(..., vocab)`` and ``(...)`` to ``(...)``."""
    return laws.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def draw(law: Tensor, u: Tensor) -> Tensor:
    """``nab.sampling.sample`` by rows.

    Args:
        law: masses, ``(..., vocab)``. One that is NaN gives some token.
        u: ``uniforms``, ``(..., 1)``.

    Returns:
        Tokens, ``(...)``.
    """
    cdf = law.cumsum(-1)
    found = torch.searchsorted(cdf, u * cdf[..., -1:], right=True)
    return found.clamp_(max=law.shape[-1] - 1)[..., 0]


def verify(p: Tensor, ids: Tensor, q: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``nab.sampling.verify`` of chains by rows.

    Args:
        p: the target's laws, ``(rows, levels + 1, vocab)``.
        ids: drafted tokens, ``(rows, levels)``.
        q: the laws they were drawn from, and one that is 0, ``(rows, levels + 1, vocab)``; a token whose law
            is NaN is rejected.
        u: ``uniforms`` ``(rows, levels + 1)``; one tests each token, the last draws the next one.

    Returns:
        Number of accepted tokens and next token, each ``(rows, 1)``; the probabilities that the drafter gave
        its tokens, ``(rows, levels)``.
    """
    rows, levels = ids.shape
    carried = at(q[:, :levels], ids)
    passed = u[:, :levels] * carried < at(p[:, :levels], ids)
    accepted = passed.cumprod(-1, dtype=torch.long).sum(-1, keepdim=True)
    behind = torch.arange(0, rows * (levels + 1), levels + 1, device=p.device) + accepted[:, 0]
    law, proposed = (each.reshape(-1, p.shape[-1]).index_select(0, behind) for each in (p, q))
    rest = (law - proposed).clamp_(0)
    law = torch.where(rest.sum(-1, keepdim=True) > 0, rest, law)  # the law itself where the rest is NaN
    return accepted, draw(law, u[:, levels:])[:, None], carried


def acceptance(
    p: Sequence[Tensor], q: Tensor, tokens: Sequence[int], vocabulary: Tensor | None = None
) -> Tensor:
    """``nab.Chain`` for many drafters at once: gamma and realised, ``(2, positions, drafters)``.

    Args:
        p: the target's laws, in one or several tensors ``(rows, vocab)``.
        q: the drafters', ``(drafters, positions, draft vocab)``; where they are certain, their tokens,
            ``(drafters, positions)`` integers.
        tokens: verified, ``(positions,)``, of positive probability.
        vocabulary: ids that ``q`` is over, ``(drafters, draft vocab)``; None is the target's.

    Raises:
        ValueError: if ``q`` is not of the positions that ``p`` is of, or not of its vocabulary.
    """
    whole = p[0] if len(p) == 1 else torch.cat(list(p))
    ids = torch.tensor(tokens, device=whole.device)
    if q.shape[1] != len(whole) or (
        q.is_floating_point() and vocabulary is None and q.shape[2] != whole.shape[1]
    ):
        raise ValueError(f"laws must have shape {tuple(whole.shape)}, got {tuple(q.shape[1:])}")
    own = whole.gather(-1, ids[:, None])
    if not q.is_floating_point():
        return torch.stack([whole.gather(-1, q.T), (ids[:, None] == q.T).to(whole.dtype)])
    if vocabulary is None:
        among = whole
        drafted = q.gather(-1, ids[None, :, None].expand(len(q), -1, -1))[..., 0].T
    else:
        among = whole[:, vocabulary].transpose(0, 1)
        drafted = torch.where(vocabulary[:, None] == ids[:, None], q, 0).sum(-1).T
    gamma = torch.minimum(among, q).sum(-1).clamp_(max=1).T
    return torch.stack([gamma, torch.minimum(drafted, own) / own])
