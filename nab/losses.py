"""Losses in [0, 1] from acceptance probabilities, and the objectives a selector can minimise.

``gamma`` and ``realised`` are ``(positions, n)`` arrays over consecutive verified positions of one query, or
``(positions, depths, n)`` *by depth*, where acceptance depends on how deep in the draft a position stands:
column k of position t is about a round that began at t - k and has accepted k tokens. A loss that needs
``draft_len`` consecutive positions has ``positions - draft_len + 1`` rows, none if fewer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from nab.types import Floats


def token_loss(gamma: Any) -> Any:
    """``1 - gamma``: probability that the drafter's next token is rejected (Liu et al. 2025, ETAP).

    Args:
        gamma: acceptance probabilities in [0, 1], any shape.

    Returns:
        Losses in [0, 1], shaped like ``gamma``.
    """
    return 1 - gamma


def by_depth(scores: Floats, draft_len: int) -> Floats:
    """Acceptance by depth, ``(positions, draft_len, n)``, of scores that may be alike at all depths.

    Raises:
        ValueError: if ``draft_len`` is below 1, or the scores know fewer depths.
    """
    if np.ndim(scores) < 3:
        shape = len(scores), _at_least_one(draft_len), *np.shape(scores)[1:]
        return np.broadcast_to(np.asarray(scores)[:, None], shape)
    if scores.shape[1] < _at_least_one(draft_len):
        raise ValueError(f"scores of {scores.shape[1]} depths tell nothing of drafts of {draft_len} tokens")
    return scores[:, :draft_len]


def expected_length(gamma: Floats, realised: Floats, draft_len: int) -> Floats:
    """Unbiased estimate of the tokens a round starting at each position would emit.

    ``L_t = 1 + sum_{k=1..K} gamma_{t+k-1} prod_{j=0..k-2} realised_{t+j}``. Its mean is the expected length,
    since ``E_{x ~ p}[prod a] = P(the first k tokens are accepted)``; the last factor is replaced by its
    conditional mean (Rao-Blackwell).

    Args:
        gamma: ``(positions, n)`` in [0, 1], or by depth.
        realised: likewise.
        draft_len: K >= 1 drafted tokens a round.

    Returns:
        ``(positions - K + 1, n)`` lengths in [1, K + 1].
    """
    gamma, realised = by_depth(gamma, draft_len), by_depth(realised, draft_len)
    windows = max(len(gamma) - draft_len + 1, 0)
    length = np.ones((windows, *gamma.shape[2:]))
    carried = np.ones_like(length)
    for k in range(draft_len):
        length += gamma[k : k + windows, k] * carried
        carried *= realised[k : k + windows, k]
    return length


def plug_in_length(gamma: Floats, draft_len: int) -> Floats:
    """``L_t = 1 + sum_{k=1..K} prod_{j<k} gamma_{t+j}`` (Liu et al. 2025, Thm 3; their EAL).

    Exact when acceptance does not correlate with later acceptance probabilities (temperature 0, K = 1, models
    without memory), otherwise biased: see docs/theory.md.

    Args:
        gamma: ``(positions, n)`` in [0, 1], or by depth.
        draft_len: K >= 1 drafted tokens a round.

    Returns:
        ``(positions - K + 1, n)`` lengths in [1, K + 1].
    """
    return expected_length(gamma, gamma, draft_len)


def expected_rounds(realised: Floats, draft_len: int) -> Floats:
    """Exact mean number of rounds that each drafter, used alone, would have needed for this very text.

    Given the text, a round that starts at t has its first k tokens accepted with probability
    ``prod_{j<k} realised_{t+j}``, whoever decoded it, so the rounds still to come from t satisfy
    ``E_t = 1 + sum_{k=0..K} P(k accepted) E_{t+k+1}`` with ``E = 0`` behind the end.

    Args:
        realised: ``(positions, n)`` in [0, 1], or by depth, all positions of the text.
        draft_len: K >= 1 drafted tokens a round.

    Returns:
        ``(n,)`` means in [positions / (K + 1), positions].
    """
    realised = by_depth(realised, draft_len)
    positions, _, n = realised.shape
    to_come = np.zeros((positions + draft_len + 1, n))
    padded = np.concatenate([realised, np.zeros((draft_len, draft_len, n))])
    for t in reversed(range(positions)):
        reached = np.ones(n)
        to_come[t] = 1
        for k in range(draft_len):
            to_come[t] += reached * (1 - padded[t + k, k]) * to_come[t + k + 1]
            reached *= padded[t + k, k]
        to_come[t] += reached * to_come[t + draft_len + 1]
    return np.asarray(to_come[0])


def length_loss(length: Any, draft_len: int) -> Any:
    """``(K + 1 - L) / (K + 1)``: the share of a round's possible tokens that is missed.

    Args:
        length: tokens per round in [1, K + 1], any shape.
        draft_len: K >= 1 drafted tokens a round.

    Returns:
        Losses in [0, K / (K + 1)], shaped like ``length``.
    """
    return (_at_least_one(draft_len) + 1 - length) / (draft_len + 1)


@dataclass(frozen=True)
class Token:
    """Objective: the token loss. It needs one position, so nothing is ever late."""

    window = 1

    def __call__(self, gamma: Floats, realised: Floats) -> Floats:
        """Return ``token_loss`` of the first depth, ``(positions, n)``."""
        return np.asarray(token_loss(by_depth(gamma, 1)[:, 0]))


@dataclass(frozen=True)
class Length:
    """Objective: the length loss of rounds of ``draft_len`` tokens, released ``draft_len`` positions later.

    Waiting for the whole window is what keeps it free of censoring: a loss from the tokens that happen to be
    there favours drafters that stop early (Liu et al. 2025, section 4). ``plug_in=True`` is the paper's
    estimator, otherwise the unbiased one.
    """

    draft_len: int
    plug_in: bool = False

    def __post_init__(self) -> None:
        _at_least_one(self.draft_len)

    @property
    def window(self) -> int:
        """``draft_len`` positions."""
        return self.draft_len

    def __call__(self, gamma: Floats, realised: Floats) -> Floats:
        """Return the length losses, ``(positions - draft_len + 1, n)``."""
        length = expected_length(gamma, gamma if self.plug_in else realised, self.draft_len)
        return np.asarray(length_loss(length, self.draft_len))


def _at_least_one(draft_len: int) -> int:
    if draft_len < 1:
        raise ValueError(f"draft_len must be at least 1, got {draft_len}")
    return draft_len
