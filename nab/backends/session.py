"""A loaded target with its pool of drafters, ready to decode prompts under any selector."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from nab.acceptance import Chain
from nab.backends import pool
from nab.backends.batch import check_models, decode_batch
from nab.backends.heads import Head
from nab.backends.pretrained import Pretrained
from nab.backends.stack import stacked
from nab.backends.torch import CausalLM, Warper
from nab.decode import Round
from nab.measure import Query
from nab.pool import Pool
from nab.prompts import Prompt
from nab.schemes import Scheme
from nab.selector import Chooses
from nab.types import LanguageModel


class Divergence(NamedTuple):
    """Where two greedy answers part, and how close the call was.

    ``position`` counts answer tokens from 0; ``gap`` is how far apart the logits of the two tokens lie when
    computed in ``reference`` precision, ``error`` the largest error of a logit there in the run's precision.
    """

    position: int
    tokens: tuple[str, str]
    gap: float
    error: float
    reference: str

    @property
    def is_rounding(self) -> bool:
        """Whether errors of this size can turn the order of the two tokens."""
        return self.gap <= 2 * self.error


@dataclass
class Session:
    """One target and one pool; each query starts with empty caches, so that none profits from another.

    Args:
        target: model and tokenizer.
        drafter_names: see ``pool.build``.
        warper: processes the laws of target and drafters.
        draft_len: drafted tokens per round, at least 1.
        max_new_tokens: answers are cut there.
        scheme: of verification; None is a chain. Where it goes by ranks, drafters keep their own law, at
            temperature 1, so that their second choices exist at temperature 0 too.
        exact: score drafters at every depth, at its true cost.
        limit: seconds that a drafter may take; None is for ever.
    """

    target: Pretrained
    drafter_names: Sequence[str]
    warper: Warper
    draft_len: int
    max_new_tokens: int
    scheme: Scheme | None = None
    exact: bool = False
    limit: float | None = None
    model: CausalLM = field(init=False)
    drafters: dict[str, LanguageModel] = field(init=False)
    _reference: Any = field(init=False, default=None)

    def __post_init__(self) -> None:
        for name, value in (("draft_len", self.draft_len), ("max_new_tokens", self.max_new_tokens)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.model = CausalLM(self.target.model, self.warper, name=self.target.name)
        own = Warper() if self.scheme is not None and self.scheme.ranks else self.warper
        self.drafters = pool.build(self.drafter_names, self.target, self.model, own)
        if not self.exact and (self.scheme is None or self.scheme.outline == (Chain(),)):
            stacked(list(self.drafters.values()))

    @property
    def names(self) -> list[str]:
        """The drafters' names, in the order of their indices."""
        return list(self.drafters)

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt.

        Raises:
            ValueError: if it is empty, or its answer would not fit the context of the target or a drafter.
        """
        ids = self.target.encode(prompt)
        needed = len(ids) + self.max_new_tokens + self.draft_len
        for model in self._models():
            if model.context is not None and needed > model.context:
                raise ValueError(
                    f"{len(ids)} prompt tokens, {self.max_new_tokens} new and {self.draft_len} drafted "
                    f"ones make {needed}, more than the context of {model.name}, {model.context}"
                )
        return ids

    def encoded(self, prompts: Iterable[Prompt]) -> list[list[int]]:
        """Token ids of prompts.

        Raises:
            ValueError: numbering the first one that ``encode`` refuses.
        """
        found = []
        for number, prompt in enumerate(prompts, 1):
            try:
                found.append(self.encode(prompt.text))
            except ValueError as error:
                raise ValueError(f"prompt {number}: {error}") from None
        return found

    def _models(self) -> list[CausalLM | Head]:
        """Those with a cache and a context."""
        models = (self.model, *self.drafters.values())
        return [model for model in models if isinstance(model, CausalLM | Head)]

    def query(self, *, plain: bool = False, domain: str = "") -> Query:
        """An empty query over this pool; ``plain`` decodes without drafts."""
        return Query(self.names, 0 if plain else self.draft_len, domain)

    def decode(self, query: Query, prompt: Sequence[int], selector: Chooses, rng: Any) -> Generator[Round]:
        """Fill ``query`` with the answer to ``prompt``, round by round."""
        for model in self._models():
            model.reset()
        return query.run(
            self.model,
            Pool(list(self.drafters.values()), limit=self.limit),
            selector,
            prompt,
            max_new_tokens=self.max_new_tokens,
            stop_tokens=self.target.stop_tokens,
            rng=rng,
            scheme=self.scheme,
            exact=self.exact,
        )

    def check_together(self) -> None:
        """Raise ValueError, naming drafters that can stay, unless ``decode_together`` knows such models."""
        check_models(self.model, [])
        fit, errors = list[str](), list[ValueError]()
        for name, drafter in self.drafters.items():
            try:
                check_models(self.model, [drafter])
                fit.append(name)
            except ValueError as error:
                errors.append(error)
        if errors:
            raise ValueError(f"{errors[0]}; of these drafters {', '.join(fit) or 'none'} can")

    def decode_together(
        self,
        queries: Sequence[Query],
        prompts: Sequence[Sequence[int]],
        selectors: Sequence[Chooses],
        rngs: Sequence[Any],
        batch: int,
    ) -> Generator[list[int]]:
        """Fill ``queries``, of one draft length, as ``decode`` does, up to ``batch`` of them at once.

        A chain is drafted and scored as far as one forward tells; nothing has a limit.

        Yields:
            Behind each round of the batch, the numbers of the queries that have grown by one.

        Raises:
            ValueError: see ``decode_batch``.
        """
        drafters = list(self.drafters.values())
        pools, growing = [Pool(drafters) for _ in queries], set[int]()
        for query, own in zip(queries, pools, strict=True):
            query.benched = own.benched
        rounds = decode_batch(
            self.model,
            drafters,
            selectors,
            prompts,
            batch=batch,
            draft_len=queries[0].draft_len,
            rngs=rngs,
            max_new_tokens=self.max_new_tokens,
            stop_tokens=self.target.stop_tokens,
            pools=pools,
        )
        try:
            for found in rounds:
                for number, round_ in found.items():
                    queries[number].take(round_)
                growing |= found.keys()
                for number, round_ in found.items():
                    query = queries[number]
                    whole = len(query.tokens) == self.max_new_tokens
                    if whole or round_.emitted[-1] in self.target.stop_tokens:
                        query.settle(self.model, pools[number], prompts[number])
                        query.finished = True
                        growing.remove(number)
                yield list(found)
        finally:  # interrupted answers are measured as far as they go
            for number in growing:
                queries[number].settle(self.model, pools[number], prompts[number])

    def text(self, tokens: Sequence[int]) -> str:
        """The answer as text, without the token that ended it."""
        return str(self.target.tokenizer.decode(tokens, skip_special_tokens=True))

    def divergence(
        self, prompt: Sequence[int], answer: Sequence[int], other: Sequence[int]
    ) -> Divergence | None:
        """Where two greedy answers to ``prompt`` part, with the evidence on whether it is rounding.

        The logits at that position are computed again in a higher precision than the run's; None if the
        answers are equal as far as both go.
        """
        parts = [k for k, (a, b) in enumerate(zip(answer, other, strict=False)) if a != b]
        if not parts:
            return None
        at, model = parts[0], self.target.model
        a, b = answer[at], other[at]
        if self._reference is None:
            half = model.dtype in (torch.bfloat16, torch.float16)
            self._reference = copy.deepcopy(model)
            self._reference = self._reference.float() if half else self._reference.double()
        prefix = [*prompt, *answer[:at]]
        exact = CausalLM(self._reference).logits(prefix, len(prefix))[0].double()
        rounded = CausalLM(model).logits(prefix, len(prefix))[0].double()
        return Divergence(
            at,
            (self.target.tokenizer.decode([a]), self.target.tokenizer.decode([b])),
            abs(float(exact[a] - exact[b])),
            float((rounded - exact).abs().max()),
            str(self._reference.dtype).removeprefix("torch."),
        )
