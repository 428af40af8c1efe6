"""The loop: one function serves every target, pool of drafters and selector."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from nab.acceptance import Chain
from nab.sampling import propose, verify
from nab.selector import Chooses
from nab.types import AcceptanceRule, Floats, LanguageModel, Law, as_floats


class Seconds(NamedTuple):
    """Wall-clock seconds a round spent: drafting, in the target's forward and verification, in the selector.

    The selector's share holds the evaluation of all drafters and the learner's update.
    """

    draft: float
    verify: float
    select: float


@dataclass(frozen=True)
class Round:
    """The record of one round.

    Args:
        start: position of the first emitted token.
        choice: index of the drafter.
        probs: law the choice was drawn from, ``(n,)``.
        drafted: number of drafted tokens, at most ``draft_len``.
        accepted: number of drafted tokens emitted.
        emitted: the accepted tokens and the next one; ``until`` may have cut them.
        gamma: acceptance probabilities ``(positions, n)`` the selector asked for in this round, ending at
            the last emitted token; None if it did not ask.
        realised: likewise.
        seconds: where the time went.
    """

    start: int
    choice: int
    probs: Floats
    drafted: int
    accepted: int
    emitted: tuple[int, ...]
    gamma: Floats | None
    realised: Floats | None
    seconds: Seconds


@dataclass(frozen=True)
class Evaluation:
    """Verified positions whose drafters are not scored yet; calling it scores them all.

    Adjacent evaluations add up to one, so that a selector may wait and score many rounds in one forward per
    drafter. Dropping it costs nothing and frees the target's laws it holds.

    Args:
        drafters: the pool, n members.
        rule: the verification scheme.
        tokens: query so far, verified.
        start: first position to score.
        p: the target's laws at ``start .. len(tokens) - 1``, in one or several arrays ``(rows, vocab)``.
    """

    drafters: Sequence[LanguageModel]
    rule: AcceptanceRule
    tokens: Sequence[int]
    start: int
    p: tuple[Law, ...]

    def __add__(self, later: Evaluation) -> Evaluation:
        """Join with the evaluation of the positions that follow."""
        return replace(later, start=self.start, p=self.p + later.p)

    def __call__(self) -> tuple[Floats, Floats]:
        """``gamma`` and ``realised``, each ``(positions, n)``."""
        tokens, context = self.tokens[self.start :], self.tokens[:-1]
        gamma = np.empty((len(tokens), len(self.drafters)))
        realised = np.empty_like(gamma)
        for i, drafter in enumerate(self.drafters):
            q, row = drafter.score(context, self.start), 0
            for p in self.p:
                rows = slice(row, row := row + len(p))
                gamma[rows, i] = as_floats(self.rule.probability(p, q[rows]))
                realised[rows, i] = as_floats(self.rule.realised(p, q[rows], tokens[rows]))
            if not ((gamma[:, i] >= 0) & (gamma[:, i] <= 1)).all():
                raise ValueError(f"drafter {i}: acceptance probabilities {gamma[:, i]} are not in [0, 1]")
        return gamma, realised


def decode(
    target: LanguageModel,
    drafters: Sequence[LanguageModel],
    selector: Chooses,
    prompt: Sequence[int],
    *,
    draft_len: int,
    rng: Any = None,
) -> Iterator[Round]:
    """Decode speculatively for ever; the caller stops, for instance through ``until``.

    The emitted tokens have exactly the target's law, whatever the drafters and the selector do (Leviathan,
    Kalman, Matias 2023, appendix A.1). First the target reads the prompt; then a round makes one target
    forward and uses ``2 draft_len + 1`` uniforms whatever happens in it.

    Args:
        target: the model whose law is decoded.
        drafters: the pool, one per index the selector may choose.
        selector: a fresh ``Selector`` (state is per query), or a ``Constant``.
        prompt: token ids, at least one for models that need a first token.
        draft_len: drafted tokens per round; 0 is plain decoding.
        rng: anything ``numpy.random.default_rng`` takes.

    Yields:
        One ``Round`` per target forward behind the first.

    Raises:
        ValueError: if ``draft_len`` is negative, the selector is over another number of drafters, or a law is
            none, naming whose it is.
    """
    if draft_len < 0:
        raise ValueError(f"draft_len must be at least 0, got {draft_len}")
    if draft_len and len(selector.probs) != len(drafters):
        raise ValueError(
            f"the selector chooses among {len(selector.probs)} drafters, the pool has {len(drafters)}"
        )
    rng = np.random.default_rng(rng)
    tokens = list(prompt)
    # drafters that read the target's features find them from the first round on
    target.score(tokens, len(tokens))
    while True:
        clock = [perf_counter()]
        uniforms = rng.random(2 * draft_len + 1)
        start, choice, probs = len(tokens), selector.choice, selector.probs
        try:
            draft = propose(drafters[choice], tokens, uniforms[:draft_len])
        except ValueError as error:
            raise ValueError(f"drafter {choice}: {error}") from error
        clock.append(perf_counter())

        p = target.score([*tokens, *draft.tokens], start)
        try:
            accepted, next_token = verify(p, draft, uniforms[draft_len:])
        except ValueError as error:
            raise ValueError(f"target: {error}") from error
        emitted = (*draft.tokens[:accepted], next_token)
        tokens.extend(emitted)
        clock.append(perf_counter())

        evaluation = Evaluation(drafters, Chain(), tuple(tokens), start, (p[: len(emitted)],))
        gamma, realised = selector.observe(len(emitted), evaluation) or (None, None)
        clock.append(perf_counter())

        seconds = Seconds(*np.diff(clock).tolist())
        drafted = len(draft.tokens)
        yield Round(start, choice, probs, drafted, accepted, emitted, gamma, realised, seconds)


def until(
    rounds: Iterable[Round], *, max_new_tokens: int, stop_tokens: Iterable[int] = ()
) -> Iterator[Round]:
    """Cut ``rounds`` behind the first stop token, or at ``max_new_tokens`` tokens, also inside a round.

    The stop token is kept. Cut positions disappear from ``gamma`` and ``realised`` too.

    Raises:
        ValueError: if ``max_new_tokens`` is below 1.
    """
    stop_tokens, left = frozenset(stop_tokens), max_new_tokens
    if left < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    for round_ in rounds:
        stops = [k + 1 for k, token in enumerate(round_.emitted) if token in stop_tokens]
        keep = min([left, len(round_.emitted), *stops])
        left -= keep
        yield _cut(round_, len(round_.emitted) - keep)
        if left == 0 or stops:
            return


def _cut(round_: Round, removed: int) -> Round:
    """``round_`` without its last ``removed`` tokens."""
    if removed == 0:
        return round_
    keep = len(round_.emitted) - removed
    return replace(
        round_,
        accepted=min(round_.accepted, keep),
        emitted=round_.emitted[:keep],
        gamma=None if round_.gamma is None else round_.gamma[:-removed],
        realised=None if round_.realised is None else round_.realised[:-removed],
    )
