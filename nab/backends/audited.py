"""A session under ``nab.audit``, against its target's own forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from nab.audit import Greedy, Sampling, greedy, sampling
from nab.backends.session import Session
from nab.backends.torch import Uncached, Warper
from nab.selector import Chooses

CONTEXT = 32
"""Tokens of a prompt that drawn answers go on from, the last ones: laws must hold behind any text."""


@dataclass
class Audited:
    """What decodes as ``nab run`` does and is audited meanwhile.

    Args:
        session: in float64.
        policy: makes a fresh selector for each answer from a seed.
        drafting: names of the drafters that it may choose; none is plain decoding.
        seed: of everything that is drawn.
        rounds: so far.
        tokens: likewise; where there are not more of them, no draft was accepted and little was audited.
    """

    session: Session
    policy: Callable[[Any], Chooses]
    drafting: Sequence[str]
    seed: int
    rounds: int = 0
    tokens: int = 0

    def greedy(self, prompts: Sequence[Sequence[int]]) -> Iterator[Greedy]:
        """Audits of more and more prompts, at temperature 0."""
        session = replace(self.session, warper=Warper(temperature=0))
        generate, model = partial(self._answer, session, seed=self.seed), Uncached(session.target.model)
        found = Greedy(0, 0)
        for prompt in prompts:
            found += greedy(
                *(generate, model, [prompt]),
                max_new_tokens=session.max_new_tokens,
                stop_tokens=session.target.stop_tokens,
            )
            yield found

    def sampling(self, prompts: Sequence[Sequence[int]], answers: int, error: float) -> Iterator[Sampling]:
        """Audits of more and more answers, each long enough for two drafts; ``error`` is the control's."""
        session = replace(self.session, max_new_tokens=2 * (self.session.draft_len + 1))
        model, rng = Uncached(session.target.model, session.warper), np.random.default_rng(self.seed)
        found: Sampling | None = None
        for number in range(answers):
            each = sampling(
                *(partial(self._answer, session), model, [prompts[number % len(prompts)][-CONTEXT:]]),
                answers=1,
                max_new_tokens=session.max_new_tokens,
                stop_tokens=session.target.stop_tokens,
                drafters=[session.drafters[name] for name in self.drafting],
                error=error,
                rng=rng,
            )
            found = each if found is None else found + each
            yield found

    def _answer(self, session: Session, prompt: Sequence[int], seed: int) -> list[int]:
        choosing, decoding = np.random.SeedSequence(seed).spawn(2)
        query = session.query(plain=not self.drafting)
        for _ in session.decode(query, prompt, self.policy(choosing), decoding):
            pass
        self.rounds += len(query.rounds)
        self.tokens += len(query.tokens)
        return query.tokens
