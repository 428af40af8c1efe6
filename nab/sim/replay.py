"""Replay: what a selector would have done on a text whose every position is scored, without any model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from nab.checks import whole
from nab.losses import by_depth, plug_in_length
from nab.selector import Chooses, Spent, check_scores
from nab.types import Floats


class Replayed(NamedTuple):
    """A round of a replay.

    First position, drafter, the law it was drawn from ``(n,)``, tokens emitted, positions at which the
    selector then had all drafters scored, and tokens drafted.
    """

    start: int
    choice: int
    probs: Floats
    emitted: int
    scored: int
    drafted: int


def replay(
    selector: Chooses,
    gamma: Floats,
    realised: Floats,
    *,
    draft_len: int,
    rng: Any = None,
    seconds: Callable[[int, int], Spent] | None = None,
) -> Iterator[Replayed]:
    """Draw the rounds of ``decode`` from their law given the text.

    Whatever drafted it, the text has the target's law; given the text, a round of drafter i at t has its
    first k tokens accepted with probability ``prod_{j<k} realised[t + j, i]``. So the choices, lengths and
    number of rounds drawn here are distributed as those of a run that emitted this very text.

    Args:
        selector: a fresh one.
        gamma: ``(positions, n)`` in [0, 1], or by depth (``nab.losses``), all positions of the text.
        realised: likewise.
        draft_len: drafted tokens per round, at least 1; a selector may ask for fewer, and for none.
        rng: anything ``numpy.random.default_rng`` takes.
        seconds: what a round spends drafting and verifying, by drafter and drafted tokens; the time objective
            needs it.

    Yields:
        The rounds; the last is cut at the end of the text.

    Raises:
        ValueError: if ``draft_len`` is below 1, on scores of another shape or outside [0, 1], or a selector
            that needs ``seconds`` where there are none.

    >>> from nab import Constant
    >>> certain = np.ones((10, 1))
    >>> [r.emitted for r in replay(Constant([1.0]), certain, certain, draft_len=3)]
    [4, 4, 2]
    """
    whole("draft_len", draft_len, 1)
    check_scores(gamma, realised, len(selector.probs), least=0)
    rng, accepts = np.random.default_rng(rng), by_depth(realised, draft_len)
    start = 0
    while start < len(realised):
        choice, probs = selector.choice, selector.probs
        drafted = draft_len if selector.draft_len is None else selector.draft_len
        accepted, uniforms = 0, rng.random(draft_len)[:drafted]
        for k, (u, a) in enumerate(zip(uniforms, accepts[start:, :, choice], strict=False)):
            if not u < a[k]:
                break
            accepted += 1
        emitted = min(accepted + 1, len(realised) - start)
        spent = seconds(choice, drafted) if seconds else None
        scores = selector.observe(emitted, _Scores(gamma, realised, start, start + emitted), seconds=spent)
        yield Replayed(start, choice, probs, emitted, len(scores[0]) if scores else 0, drafted)
        start += emitted


def round_lengths(realised: Floats, draft_len: int) -> Floats:
    """Tokens that a round of each drafter emits in expectation, given the text, by its first position.

    A round ends with the text. Over a replay, the lengths of its rounds add up to the text's in the mean
    (optional stopping), and move with the number of rounds: their quotient is the replay's mean acceptance
    length without most of the noise of acceptance.

    Args:
        realised: ``(positions, n)`` in [0, 1], or by depth, all positions of the text, at least one.
        draft_len: drafted tokens per round, at least 1.

    Returns:
        ``(positions, n)`` lengths in [1, draft_len + 1].

    >>> round_lengths(np.ones((4, 1)), 2)[:, 0].tolist()
    [3.0, 3.0, 2.0, 1.0]
    """
    behind = np.zeros((draft_len, *realised.shape[1:]))
    return plug_in_length(np.concatenate([realised[:-1], behind]), draft_len)


@dataclass(frozen=True)
class _Scores:
    """Scores of the positions ``start .. stop - 1``, in the place of a ``nab.decode.Evaluation``."""

    gamma: Floats
    realised: Floats
    start: int
    stop: int

    def __add__(self, later: _Scores) -> _Scores:
        return replace(later, start=self.start)

    def __call__(self) -> tuple[Floats, Floats]:
        return self.gamma[self.start : self.stop], self.realised[self.start : self.stop]
