"""The loop: one function serves every target, pool of drafters and selector."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from nab.acceptance import Chain
from nab.pool import Pool
from nab.sampling import Draft, scored, verify
from nab.schemes import Levels, Scheme, accepted
from nab.selector import Chooses, check_scores
from nab.types import Accepts, Evaluate, Floats, LanguageModel, Law, Verified, Verifies, as_floats


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
        drafted: number of drafted tokens, at most ``draft_len`` in a chain; 0 in a round of plain decoding.
        accepted: number of drafted tokens emitted, at most ``draft_len``.
        emitted: the accepted tokens and the next one; ``until`` may have cut them.
        gamma: acceptance probabilities ``(positions, n)``, or ``(positions, draft_len, n)`` by depth, that
            the selector asked for in this round, ending at the last emitted token; None if it did not ask.
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
        pool: n drafters; those that are benched, or fail now, are never accepted.
        scheme: of verification.
        tokens: query so far, verified.
        start: first position to score.
        p: the target's laws at ``start .. len(tokens) - 1``, in one or several arrays ``(rows, vocab)``, or
            what gives them when they are needed.
        begin: first position of the answer.
        exact: score by depth at its true cost (``Scheme.by_depth``) rather than as far as one forward per
            drafter tells (``Scheme.outline``).
    """

    pool: Pool
    scheme: Scheme
    tokens: Sequence[int]
    start: int
    p: tuple[Law | Callable[[], Law], ...]
    begin: int = 1
    exact: bool = False

    def __add__(self, later: Evaluation) -> Evaluation:
        """Join with the evaluation of the positions that follow."""
        return replace(later, start=self.start, p=self.p + later.p)

    def __call__(self) -> tuple[Floats, Floats]:
        """``gamma`` and ``realised``: each ``(positions, n)``, or ``(positions, draft_len, n)`` by depth."""
        p = [laws() if callable(laws) else laws for laws in self.p]
        depths = self.scheme.draft_len if self.exact else len(self.scheme.outline)
        scores = np.zeros((2, len(self.tokens) - self.start, depths, len(self.pool)))
        chain = not self.exact and self.scheme.outline == (Chain(),)
        together = self.pool.together(partial(self._accepted, p)) if chain else {}
        for i in range(len(self.pool)):
            found = self.pool.call(i, partial(self._scores, p, together.get(i)))
            if found is not None:
                scores[..., i] = found
        gamma, realised = scores
        return (gamma, realised) if depths > 1 or self.exact else (gamma[:, 0], realised[:, 0])

    def _accepted(self, p: Sequence[Law], stack: Accepts) -> Floats:
        """Of drafters that score chains by themselves, ``(2, positions, drafters)``."""
        return as_floats(stack.acceptance(self.tokens, self.start, p))

    def _scores(self, p: Sequence[Law], known: Floats | None, drafter: LanguageModel) -> Floats:
        """Of one drafter, ``(2, positions, depths)``; they may be known."""
        if known is not None:
            gamma, realised = known[..., None]
        elif self.exact:
            gamma, realised = self.scheme.by_depth(drafter, self.tokens, self.start, p, self.begin)
        else:
            q = drafter.score(self.tokens[:-1], self.start)
            rules = self.scheme.outline
            gamma, realised = accepted(rules, [q] * len(rules), p, self.tokens[self.start :])
        check_scores(gamma, realised, gamma.shape[1])
        return np.stack([gamma, realised])


def decode(
    target: LanguageModel,
    drafters: Sequence[LanguageModel] | Pool,
    selector: Chooses,
    prompt: Sequence[int],
    *,
    draft_len: int,
    rng: Any = None,
    scheme: Scheme | None = None,
    exact: bool = False,
) -> Iterator[Round]:
    """Decode speculatively for ever; the caller stops, for instance through ``until``.

    The emitted tokens have exactly the target's law, whatever the drafters and the selector do (Leviathan,
    Kalman, Matias 2023, appendix A.1). First the target reads the prompt; then a round makes one target
    forward and uses two uniforms per node of the scheme's tree and one more, whatever happens in it. A
    drafter that fails is benched for the query, see ``nab.pool.Pool``.

    Args:
        target: the model whose law is decoded.
        drafters: one per index the selector may choose; a fresh ``Pool`` of them to set a time limit, or to
            see which are benched.
        selector: a fresh ``Selector`` (state is per query), or a ``Constant``. It is told the seconds of each
            round.
        prompt: token ids, at least one for models that need a first token.
        draft_len: drafted tokens per round, levels of a tree; 0 is plain decoding. A selector may ask for
            fewer in a round, and for none: then no drafter is called.
        rng: anything ``numpy.random.default_rng`` takes.
        scheme: of verification, ``draft_len`` deep: see ``nab.schemes``; None is a chain. If it branches,
            target and drafters are ``TreeModel``s.
        exact: score drafters at every depth of the draft, at its true cost; else as far as one forward tells.

    Yields:
        One ``Round`` per target forward behind the first.

    Raises:
        ValueError: if ``draft_len`` is negative, ``scheme`` has another depth, the selector is over another
            number of drafters or asks for longer drafts, or a law of the target is none.
    """
    pool = drafters if isinstance(drafters, Pool) else Pool(drafters)
    scheme = Levels([Chain()] * draft_len) if scheme is None else scheme
    if draft_len < 0:
        raise ValueError(f"draft_len must be at least 0, got {draft_len}")
    if scheme.draft_len != draft_len:
        raise ValueError(f"draft_len is {draft_len}, but the scheme drafts {scheme.draft_len} levels")
    if draft_len and len(selector.probs) != len(pool):
        raise ValueError(
            f"the selector chooses among {len(selector.probs)} drafters, the pool has {len(pool)}"
        )
    rng = np.random.default_rng(rng)
    tokens = list(prompt)
    itself = target if isinstance(target, Verifies) and scheme == Levels([Chain()] * draft_len) else None
    # drafters that read the target's features find them from the first round on
    like = target.score(tokens, len(tokens))
    cut = cache(scheme.cut)
    while True:
        begun = perf_counter()
        uniforms = rng.random(2 * scheme.nodes + 1)
        start, choice = len(tokens), selector.choice
        levels = levels_of(selector, draft_len)
        shape = cut(levels) if 0 < levels < draft_len else scheme
        draws, tests = uniforms[: scheme.nodes], uniforms[scheme.nodes :]
        work = partial(proposed, shape, tokens, draws, like, itself=itself is not None)
        draft = (pool.call(choice, work) if levels else None) or Draft([], [], [])
        drafted = perf_counter()

        found = itself.verify(tokens, draft, tests) if itself else _tested(target, tokens, draft, tests)
        if found.fault:
            name = getattr(pool.drafters[choice], "name", "it")
            pool.bench(choice, f"ValueError: {name} {found.fault}")
        emitted = found.emitted
        tokens.extend(emitted)
        spent = drafted - begun, perf_counter() - drafted

        evaluation = Evaluation(pool, scheme, tuple(tokens), start, (found.laws,), len(prompt), exact)
        yield observed(selector, evaluation, start=start, drafted=found.drafted, emitted=emitted, spent=spent)


def observed(
    selector: Chooses,
    evaluate: Evaluate,
    *,
    start: int,
    drafted: int,
    emitted: tuple[int, ...],
    spent: tuple[float, float],
) -> Round:
    """The record of a round, of which the selector learns now.

    Args:
        selector: as it chose for the round.
        evaluate: scores the emitted tokens.
        start: see ``Round``.
        drafted: likewise.
        emitted: likewise.
        spent: seconds of the draft, and of the target's forward and verification.
    """
    begun, choice, probs = perf_counter(), selector.choice, selector.probs
    gamma, realised = selector.observe(len(emitted), evaluate, seconds=spent) or (None, None)
    seconds = Seconds(*spent, perf_counter() - begun)
    return Round(start, choice, probs, drafted, len(emitted) - 1, emitted, gamma, realised, seconds)


def levels_of(selector: Chooses, draft_len: int) -> int:
    """Levels of the coming draft, of at most ``draft_len``.

    Raises:
        ValueError: if the selector asks for more.
    """
    asked = selector.draft_len
    if asked is None or draft_len == 0:
        return draft_len
    if not 0 <= asked <= draft_len:
        raise ValueError(f"the selector asks for a draft of {asked} tokens, at most {draft_len} are drafted")
    return asked


def proposed(
    scheme: Scheme,
    tokens: Sequence[int],
    uniforms: Sequence[Any],
    like: Law,
    drafter: LanguageModel,
    *,
    itself: bool,
) -> Any:
    """A draft whose laws are arrays like the target's, which may come as the drafter ``itself`` draws it."""
    if itself and hasattr(drafter, "draft"):
        return drafter.draft(tokens, scheme.draft_len, like, uniforms)
    draft = scheme.propose(drafter, tokens, like.shape[-1], uniforms)
    for q in draft.q:
        kinds = [(type(law), getattr(law, "device", None)) for law in (q, like) if law is not None]
        if len(set(kinds)) > 1:
            raise ValueError(f"its laws must be arrays like the target's, {kinds[1]}, got {kinds[0]}")
    return draft


def _tested(target: LanguageModel, tokens: Sequence[int], draft: Draft, uniforms: Sequence[Any]) -> Verified:
    """Verify a draft by the target's laws."""
    parents = None if draft.is_chain else draft.parents
    p = scored(target, [*tokens, *draft.tokens], len(tokens), parents)
    try:
        path, next_token = verify(p, draft, uniforms)
    except ValueError as error:
        raise ValueError(f"target: {error}") from error
    rows = p[: len(path) + 1] if parents is None else p[[0, *(node + 1 for node in path)]]
    return Verified(len(draft.tokens), (*(draft.tokens[node] for node in path), next_token), lambda: rows)


def until(
    rounds: Iterable[Round],
    *,
    max_new_tokens: int,
    stop_tokens: Iterable[int] = (),
    ends: Callable[[int], bool] | None = None,
) -> Iterator[Round]:
    """Cut ``rounds`` behind the first stop token, or at ``max_new_tokens`` tokens, also inside a round.

    The stop token is kept. Cut positions disappear from ``gamma`` and ``realised`` too.

    Args:
        rounds: as ``decode`` gives them.
        max_new_tokens: at least 1.
        stop_tokens: those that end an answer.
        ends: is told each kept token in turn, and whether the answer ends with it is what it returns.

    Raises:
        ValueError: if ``max_new_tokens`` is below 1.
    """
    stop_tokens, left = frozenset(stop_tokens), max_new_tokens
    if left < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    for round_ in rounds:
        keep, ended = 0, False
        while not ended and keep < len(round_.emitted):
            token = round_.emitted[keep]
            keep += 1
            ended = (ends is not None and ends(token)) or keep == left or token in stop_tokens
        left -= keep
        yield _cut(round_, len(round_.emitted) - keep)
        if ended:
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
