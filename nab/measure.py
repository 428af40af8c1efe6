"""A query decoded and measured: the metrics of engines (under vLLM's names) and regret."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from nab.acceptance import Chain
from nab.decode import Evaluation, Round, decode, until
from nab.losses import Length, Token, expected_rounds
from nab.pool import Pool
from nab.schemes import Levels, Scheme
from nab.selector import Chooses
from nab.sim.regret import regret
from nab.sim.replay import replay, round_lengths
from nab.types import Floats, LanguageModel, Objective

REPLAYS = 8
"""Of each answer, for ``replayed_acceptance_length``."""

_TOGETHER = 64  # positions that are scored at once when an answer has ended


@dataclass
class Query:
    """One prompt and what was measured of it so far; complete up to the last finished round at any time.

    Args:
        names: of the drafters.
        draft_len: drafted tokens per round; 0 is plain decoding.
        domain: label for reports.
        rounds: filled by ``run``, or by ``take`` where the answer is given together with others.
        finished: whether that is the whole answer.
        benched: by index, why a drafter failed.
        scored: ``gamma`` and ``realised`` of positions from the first one on, where there are drafts.
    """

    names: Sequence[str]
    draft_len: int
    domain: str = ""
    rounds: list[Round] = field(default_factory=list)
    finished: bool = False
    benched: dict[int, str] = field(default_factory=dict)
    scored: list[tuple[Floats, Floats]] = field(default_factory=list)

    def run(
        self,
        target: LanguageModel,
        drafters: Sequence[LanguageModel] | Pool,
        selector: Chooses,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        stop_tokens: Iterable[int] = (),
        rng: Any = None,
        scheme: Scheme | None = None,
        exact: bool = False,
    ) -> Generator[Round]:
        """Decode, keep every round and hand it on; see ``decode`` and ``until`` for the arguments."""
        pool = drafters if isinstance(drafters, Pool) else Pool(drafters)
        self.benched = pool.benched
        trees: dict[str, Any] = {"scheme": scheme, "exact": exact} if self.draft_len else {}
        rounds = decode(target, pool, selector, prompt, draft_len=self.draft_len, rng=rng, **trees)
        try:
            for round_ in until(rounds, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens):
                yield self.take(round_)
            self.finished = True
        finally:  # an interrupted answer is measured as far as it goes
            self.settle(target, pool, prompt, scheme, exact=exact)

    def take(self, round_: Round) -> Round:
        """Keep the next round, and give it as it is kept.

        Without its scores, if positions before them have none: those are all left to ``settle``.
        """
        if round_.gamma is not None and round_.realised is not None:
            tokens = sum(len(each.emitted) for each in (*self.rounds, round_))
            if len(round_.gamma) == tokens - sum(len(gamma) for gamma, _ in self.scored):
                self.scored.append((round_.gamma, round_.realised))
            else:
                round_ = replace(round_, gamma=None, realised=None)
        self.rounds.append(round_)
        return round_

    def settle(
        self,
        target: LanguageModel,
        pool: Pool,
        prompt: Sequence[int],
        scheme: Scheme | None = None,
        *,
        exact: bool = False,
    ) -> None:
        """Score all positions that no round holds, when the answer has ended, outside the clocks of rounds.

        Earlier, it would do a part of what the selector is going to ask for. It takes one more reading of the
        answer; arguments as for ``run``.
        """
        if not self.draft_len:
            return
        scheme = Levels([Chain()] * self.draft_len) if scheme is None else scheme
        tokens = (*prompt, *self.tokens)
        for start in range(len(prompt) + len(self.scores()[0]), len(tokens), _TOGETHER):
            text = tokens[: start + _TOGETHER]
            laws = partial(target.score, text[:-1], start)
            self.scored.append(Evaluation(pool, scheme, text, start, (laws,), len(prompt), exact)())

    @property
    def tokens(self) -> list[int]:
        """The answer's tokens."""
        return [token for round_ in self.rounds for token in round_.emitted]

    def scores(self) -> tuple[Floats, Floats]:
        """``gamma`` and ``realised`` of the answer's scored positions, ``(positions, n)``."""
        gamma, realised = map(np.concatenate, zip(*self.scored or [self._none], strict=True))
        return gamma[: len(self.tokens)], realised[: len(self.tokens)]

    @property
    def _none(self) -> tuple[Floats, Floats]:
        """Scores of no position."""
        return (np.empty((0, len(self.names))),) * 2

    def unasked_scores(self) -> tuple[Floats, Floats] | tuple[()]:
        """``scores`` of the positions behind the last round that holds any itself, for the record."""
        if not self.draft_len:
            return ()
        asked = [k for k, round_ in enumerate(self.rounds, 1) if round_.gamma is not None]
        held = sum(len(round_.emitted) for round_ in self.rounds[: max(asked, default=0)])
        gamma, realised = self.scores()
        return (gamma[held:], realised[held:]) if len(gamma) > held or not asked else ()

    def single_rounds(self) -> Floats:
        """Mean rounds each drafter alone would have needed for the scored part of this answer, ``(n,)``."""
        return expected_rounds(self.scores()[1], self.draft_len)

    def replayed(self, policy: Callable[[Any], Chooses], rng: np.random.Generator) -> tuple[float, int]:
        """Tokens and rounds of selectors of ``policy`` on the scored part of this answer, over replays.

        The tokens of a round are those that its drafter could expect there, ``round_lengths``, so that the
        quotient is the selector's mean acceptance length without most of the noise of acceptance.
        """
        gamma, realised = self.scores()
        lengths = round_lengths(realised, self.draft_len)
        seeds, tokens, rounds = rng.spawn(2 * REPLAYS), 0.0, 0
        for choosing, drawing in zip(seeds[::2], seeds[1::2], strict=True):
            selector = policy(choosing)
            for each in replay(selector, gamma, realised, draft_len=self.draft_len, rng=drawing):
                tokens += float(lengths[each.start, each.choice])
                rounds += 1
        return tokens, rounds

    def regret(self, objective: Objective) -> Floats:
        """Cumulative regret ``(positions, n)`` under an objective, over positions with a whole window."""
        gamma, realised = self.scores()
        losses = objective(gamma, realised)
        played = np.array([r.probs for r in self.rounds for _ in r.emitted]).reshape(-1, len(self.names))
        return regret(played[: len(losses)], losses)


def metrics(queries: Sequence[Query]) -> dict[str, Any]:
    """Metrics of one query, or pooled over several with the same drafters, as plain JSON types.

    ``mean_acceptance_length`` is emitted tokens per target forward, the recovered or bonus token included, in
    [1, draft_len + 1] (plain decoding has 1); ``draft_acceptance_rate`` accepted over drafted tokens, None if
    none was drafted; ``num_drafts`` the rounds with drafted tokens, ``num_accepted_tokens_per_pos[k]`` those
    that accepted more than k; ``drafted_share`` the share of rounds by drafted tokens, ``plain_share`` that
    of rounds without any; ``draft_share`` the share of rounds in which each drafter drafted, ``choice_share``
    that of those in which it was chosen, draft or not; ``drafters`` counts by drafter what ``num_drafts``,
    ``num_draft_tokens`` and ``num_accepted_draft_tokens`` count of all; ``acceptance_histogram[k]`` the
    rounds with k accepted tokens, ``acceptance_histogram_by_draft_length`` those by drafted tokens too;
    ``selection_share`` the share of time spent evaluating drafters and updating the learner; ``regret`` the
    sum over queries of the regret against the best single drafter of each query in hindsight, in units of the
    loss and in rounds.
    ``benched`` is the number of queries in which a drafter failed. ``single_drafters`` is the mean acceptance
    length that each drafter alone would have had on the same text, in expectation: see ``expected_rounds``.

    Raises:
        ValueError: if there is no query, or they differ in drafters or draft length.
    """
    if not queries:
        raise ValueError("metrics need a query at least, got none")
    if len(different := {(tuple(query.names), query.draft_len) for query in queries}) > 1:
        raise ValueError(f"metrics need queries with the same drafters and draft length, got {different}")
    names, draft_len = queries[0].names, queries[0].draft_len
    rounds = [round_ for query in queries for round_ in query.rounds]
    tokens = sum(len(r.emitted) for r in rounds)
    drafted, drafts = sum(r.drafted for r in rounds), Counter(r.drafted for r in rounds)
    seconds = np.array([r.seconds for r in rounds]).reshape(-1, 3).sum(0)
    found: dict[str, Any] = {
        "num_tokens": tokens,
        "num_spec_steps": len(rounds),
        "num_spec_tokens": draft_len,
        "num_drafts": len(rounds) - drafts[0],
        "num_draft_tokens": drafted,
        "num_accepted_draft_tokens": sum(r.accepted for r in rounds),
        "num_accepted_tokens_per_pos": [sum(r.accepted > k for r in rounds) for k in range(draft_len)],
        "mean_acceptance_length": tokens / max(len(rounds), 1),
        "draft_acceptance_rate": sum(r.accepted for r in rounds) / drafted if drafted else None,
        "drafted_share": {str(k): drafts[k] / len(rounds) for k in sorted(drafts)},
        "plain_share": drafts[0] / len(rounds) if rounds else None,
        "acceptance_histogram": _histogram(rounds, draft_len),
        "acceptance_histogram_by_draft_length": {
            str(k): _histogram([r for r in rounds if r.drafted == k], k) for k in sorted(drafts)
        },
        "tokens_per_second": tokens / seconds.sum() if rounds else None,
        "selection_share": seconds[2] / seconds.sum() if rounds else None,
    }
    if draft_len == 0:
        return {
            **found,
            "choice_share": {},
            "draft_share": {},
            "drafters": {},
            "benched": {},
            "single_drafters": {},
            "regret": {},
        }
    failed = Counter(names[i] for query in queries for i in query.benched)
    chosen, drafting = (
        np.bincount([r.choice for r in some], minlength=len(names)) / max(len(rounds), 1)
        for some in (rounds, [r for r in rounds if r.drafted])
    )
    singles = np.array([query.single_rounds() for query in queries])
    lengths = tokens / np.maximum(singles.sum(0), 1)
    return {
        **found,
        "choice_share": dict(zip(names, chosen.tolist(), strict=True)),
        "draft_share": dict(zip(names, drafting.tolist(), strict=True)),
        "drafters": {name: _drafts([r for r in rounds if r.choice == i]) for i, name in enumerate(names)},
        "benched": dict(failed),
        "single_drafters": dict(zip(names, lengths.tolist(), strict=True)),
        "regret": {
            "token": sum(_final(query.regret(Token())) for query in queries),
            "length": sum(_final(query.regret(Length(draft_len))) for query in queries),
            "rounds": float(len(rounds) - singles.min(1).sum()),
        },
    }


def _histogram(rounds: Sequence[Round], most: int) -> list[int]:
    """Rounds by accepted tokens, from 0 to ``most``."""
    counts = Counter(r.accepted for r in rounds)
    return [counts[k] for k in range(most + 1)]


def _drafts(rounds: Sequence[Round]) -> dict[str, int]:
    """Counts of the drafts of one drafter, whose rounds these are."""
    return {
        "num_drafts": sum(r.drafted > 0 for r in rounds),
        "num_draft_tokens": sum(r.drafted for r in rounds),
        "num_accepted_draft_tokens": sum(r.accepted for r in rounds),
    }


def _final(cumulative: Floats) -> float:
    return float(cumulative[-1].max()) if len(cumulative) else 0.0
