"""Losses in [0, 1] from acceptance probabilities, and the objectives a selector can minimise.

``gamma`` and ``realised`` are ``(positions, n)`` arrays over consecutive verified positions of one query, or
``(positions, depths, n)`` *by depth*, where acceptance depends on how deep in the draft a position stands:
column k of position t is about a round that began at t - k and has accepted k tokens. A loss that needs
``draft_len`` consecutive positions has ``positions - draft_len + 1`` rows, none if fewer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, ClassVar

import numpy as np

from nab.checks import checked, whole
from nab.types import Floats, as_floats


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
    whole("draft_len", draft_len, 1)
    if np.ndim(scores) < 3:
        shape = len(scores), draft_len, *np.shape(scores)[1:]
        return np.broadcast_to(np.asarray(scores)[:, None], shape)
    if scores.shape[1] < draft_len:
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
    whole("draft_len", draft_len, 1)
    return (draft_len + 1 - length) / (draft_len + 1)


def time_loss(length: Any, seconds: Any, rate: Any, draft_len: Any) -> Floats:
    """``seconds - rate length``, scaled into [0, 1] by one affine map for all arms of a position.

    With ``rate`` the least seconds per token that any arm has, the arm of the least mean loss is the one
    whose mean seconds over mean length is least (Dinkelbach 1967). The map is known before the lengths are:
    it takes the range over all arms and all lengths in [1, draft_len + 1] to [0, 1].

    Args:
        length: tokens per round in [1, draft_len + 1], ``(..., arms)``.
        seconds: of a round of each arm, at least 0, ``(arms,)``.
        rate: seconds per token, above 0, ``(...)``.
        draft_len: drafted tokens a round of each arm, at least 0, ``(arms,)``.

    Returns:
        Losses in [0, 1], shaped like ``length``; all 0 where nothing can differ.

    >>> time_loss([[1.0, 3.0]], [5.0, 9.0], [4.0], [0, 4]).round(3).tolist()
    [[0.75, 0.5]]
    """
    seconds, rate = as_floats(seconds), as_floats(rate)[..., None]
    low = (seconds - rate * (as_floats(draft_len) + 1)).min(-1, keepdims=True)
    span = (seconds - rate).max(-1, keepdims=True) - low
    scaled = (seconds - rate * as_floats(length) - low) / np.where(span > 0, span, 1.0)
    return np.asarray(np.clip(scaled, 0, 1))  # rounding


_Kept = dict[int, deque[tuple[int, float]]]
"""By drafter, or by draft length: the numbers of recent rounds and their seconds."""


def _median(seen: Iterable[tuple[int, float]]) -> float:
    return float(np.median([seconds for _, seconds in seen]))


class Costs:
    """What rounds cost, in seconds: medians over recent rounds, which a few outliers do not move.

    A round of k drafted tokens takes k times its drafter's seconds per drafted token, and the seconds of
    verification at k, which do not fall with k. May be shared by the selectors of many queries, so that the
    second one starts informed.

    What was last seen ``memory`` rounds ago is forgotten. A drafter or length that is not known counts as
    cheap as can be, so it is tried again where its acceptance deserves it: else what was measured while other
    jobs held the machine would for ever be compared with plain decoding on a machine at rest.

    Args:
        window: rounds remembered of each drafter, and of each draft length, at least 1.
        guess: seconds per drafted token until a drafter has drafted, over those of verification at the
            shortest draft known, at least 0. At 0 unknown drafters count as free, and each query would begin
            with a draft that may be worth nothing.
        memory: in rounds, of any kind, at least 1.

    Raises:
        ValueError: if ``window`` or ``memory`` is below 1, or ``guess`` negative or not finite.

    >>> costs = Costs()
    >>> for draft_len, draft, verify in ((0, 0.0, 5.0), (0, 0.0, 900.0), (0, 0.0, 5.0), (4, 8.0, 7.0)):
    ...     costs.add(1, draft_len, draft, verify)
    >>> costs.rounds(2, (0, 2, 4)).tolist()
    [[5.0, 10.0, 15.0], [5.0, 10.0, 15.0]]
    """

    def __init__(self, window: int = 31, *, guess: float = 0.1, memory: int = 128) -> None:
        whole("window", window, 1)
        whole("memory", memory, 1)
        if not (isfinite(guess) and guess >= 0):
            raise ValueError(f"guess must be finite and at least 0, got {guess}")
        self._window, self._guess, self._memory = window, guess, memory
        self._rounds = 0
        self._draft: _Kept = {}
        self._verify: _Kept = {}

    def add(self, drafter: int, draft_len: int, draft: float, verify: float) -> None:
        """Take note of a round.

        Args:
            drafter: which one drafted.
            draft_len: drafted tokens (levels, of a tree), at least 0.
            draft: seconds of drafting; of no meaning where nothing was drafted.
            verify: seconds of the target's forward and of verification.

        Raises:
            ValueError: if the seconds are negative or not finite.
        """
        for name, value in (("draft", draft), ("verify", verify)):
            if not (isfinite(value) and value >= 0):
                raise ValueError(f"seconds of {name} must be finite and at least 0, got {value}")
        self._rounds += 1
        if draft_len:
            self._keep(self._draft, drafter, draft / draft_len)
        self._keep(self._verify, draft_len, verify)
        for kept in (self._draft, self._verify):
            for key in [key for key, seen in kept.items() if seen[-1][0] <= self._rounds - self._memory]:
                del kept[key]

    def _keep(self, kept: _Kept, key: int, seconds: float) -> None:
        kept.setdefault(key, deque(maxlen=self._window)).append((self._rounds, seconds))

    def draft(self, n: int) -> Floats:
        """Seconds per drafted token of drafters ``0 .. n - 1``, ``(n,)``.

        One that has not drafted yet is taken for as fast as the fastest that has, so that it is tried where
        its acceptance deserves it; if none has, for as fast as is guessed.

        Raises:
            ValueError: if no round is known.
        """
        known = {i: _median(seen) for i, seen in self._draft.items() if i < n}
        least = min(known.values()) if known else self._guess * float(self.verify([0])[0])
        return np.array([known.get(i, least) for i in range(n)])

    def verify(self, lengths: Sequence[int]) -> Floats:
        """Seconds of verification at each of some draft lengths.

        The isotonic regression of the medians (weights: rounds), linear between measured lengths and, at
        their mean slope, beyond the longest one; before the shortest one constant.

        Raises:
            ValueError: if no round is known.
        """
        if not self._verify:
            raise ValueError("no round is known: add one first")
        known = sorted(self._verify)
        rounds = [len(self._verify[k]) for k in known]
        level = isotonic([_median(self._verify[k]) for k in known], rounds)
        slope = (level[-1] - level[0]) / max(known[-1] - known[0], 1)
        beyond = np.maximum(as_floats(lengths) - known[-1], 0) * slope
        return np.asarray(np.interp(lengths, known, level) + beyond)

    def rounds(self, n: int, lengths: Sequence[int]) -> Floats:
        """Seconds of a round by drafter and draft length, ``(n, len(lengths))``."""
        return self.draft(n)[:, None] * as_floats(lengths) + self.verify(lengths)

    def state_dict(self) -> dict[str, Any]:
        """Everything that is remembered, as plain JSON types."""
        kept = {"draft": self._draft, "verify": self._verify}
        parts = {
            name: {str(key): [*map(list, seen)] for key, seen in each.items()} for name, each in kept.items()
        }
        return {"rounds": self._rounds, **parts}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Remember what ``state_dict`` gave, and nothing else."""
        self._rounds = saved["rounds"]
        self._draft, self._verify = (
            {int(key): deque(map(tuple, seen), self._window) for key, seen in saved[name].items()}
            for name in ("draft", "verify")
        )


def isotonic(values: Sequence[float], weights: Sequence[float]) -> Floats:
    """The nondecreasing sequence next to ``values`` in weighted least squares.

    By the max-min formula ``max_{a <= j} min_{b >= j} mean(values[a .. b])``; for few values.

    >>> isotonic([1.0, 4.0, 2.0, 5.0], [1, 1, 1, 1]).tolist()
    [1.0, 3.0, 3.0, 5.0]
    """
    places = range(len(values))
    means = {
        (a, b): float(np.average(values[a : b + 1], weights=weights[a : b + 1]))
        for a in places
        for b in places[a:]
    }
    return np.array([max(min(means[a, b] for b in places[j:]) for a in places[: j + 1]) for j in places])


@dataclass(frozen=True)
class Token:
    """Objective: the token loss. It needs one position, so nothing is ever late."""

    window = 1
    lengths: ClassVar = (None,)

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
    lengths: ClassVar = (None,)

    def __post_init__(self) -> None:
        whole("draft_len", self.draft_len, 1)

    @property
    def window(self) -> int:
        """``draft_len`` positions."""
        return self.draft_len

    def __call__(self, gamma: Floats, realised: Floats) -> Floats:
        """Return the length losses, ``(positions - draft_len + 1, n)``."""
        length = expected_length(gamma, gamma if self.plug_in else realised, self.draft_len)
        return np.asarray(length_loss(length, self.draft_len))


class Time:
    """Objective: seconds per token. Its experts are pairs of a drafter and a draft length.

    Length 0 is plain decoding, which needs no drafter: it is there once a drafter and is the same for all of
    them. One evaluation scores all pairs, since a position's window holds those of all shorter drafts. Losses
    are ``time_loss`` at the costs in force and at the least seconds per token that any pair has had so far,
    mean seconds over mean length; each is released when the longest window is complete. What the evaluation
    itself costs is the same for all pairs, so it is no part of the comparison: see docs/theory.md.

    A ``Selector`` works on a copy, so that of two queries only the costs are shared.

    Args:
        draft_len: K, at least 1.
        lengths: drafted tokens to choose from, ascending, from 0 on, at most ``draft_len``; None is 0, 1, 2,
            4, ... and ``draft_len``.
        costs: of rounds; None starts without any.
        plain: prior weight of plain decoding, in (0, 1); the rest is shared by all other pairs alike.

    Raises:
        ValueError: naming the argument that is out of its range.

    >>> Time(6).lengths
    (0, 1, 2, 4, 6)
    """

    def __init__(
        self,
        draft_len: int,
        *,
        lengths: Iterable[int] | None = None,
        costs: Costs | None = None,
        plain: float = 0.5,
    ) -> None:
        whole("draft_len", draft_len, 1)
        powers = {2**k for k in range(int(draft_len).bit_length())}
        found = tuple(sorted({0, draft_len, *powers}) if lengths is None else lengths)
        for length in found:
            whole("each of lengths", length, 0)
        if found[:1] != (0,) or len(found) < 2 or sorted({*found}) != [*found] or found[-1] > draft_len:
            raise ValueError(f"lengths must ascend from 0 to at most {draft_len}, two at least, got {found}")
        checked("plain", plain, high=1)
        self.lengths: tuple[int, ...] = found
        self.costs = Costs() if costs is None else costs
        self.plain = plain
        # sums of lengths, by pair, and positions; at first one position at which nothing is accepted
        self._total: Any = 1.0
        self._positions = 1

    @property
    def window(self) -> int:
        """The longest of ``lengths``."""
        return self.lengths[-1]

    def prior(self, n: int) -> Floats:
        """Law of the first choice over pairs, drafter by drafter, ``(n * len(lengths),)``."""
        drafts = len(self.lengths) - 1
        return np.tile([self.plain, *[(1 - self.plain) / drafts] * drafts], n) / n

    def __call__(self, gamma: Floats, realised: Floats) -> Floats:
        """Return the time losses, ``(positions - window + 1, n * len(lengths))``, drafter by drafter.

        Raises:
            ValueError: if no round's seconds are known.
        """
        windows, n = max(len(gamma) - self.window + 1, 0), gamma.shape[-1]
        length = np.ones((windows, n, len(self.lengths)))
        for column, k in enumerate(self.lengths):
            if k:
                length[..., column] = expected_length(gamma, realised, k)[:windows]
        seconds = self.costs.rounds(n, self.lengths)
        sums = self._total + np.cumsum(length, 0)
        means = (sums - length) / np.arange(self._positions, self._positions + windows)[:, None, None]
        if windows:  # a new array: of copies of this object each has its own
            self._total, self._positions = sums[-1], self._positions + windows
        rates = (seconds / means).min((1, 2))
        arms = np.tile(self.lengths, n)
        return time_loss(length.reshape(windows, len(arms)), seconds.ravel(), rates, arms)

    def state_dict(self) -> dict[str, Any]:
        """What is known of the query and of costs, as plain JSON types."""
        total = np.asarray(self._total).tolist()
        return {"total": total, "positions": self._positions, "costs": self.costs.state_dict()}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from ``state_dict()``; the costs become those saved."""
        self._total, self._positions = np.array(saved["total"]), saved["positions"]
        self.costs.load_state_dict(saved["costs"])
