"""Drafters chosen online where transformers verifies: nab as a candidate generator of assisted generation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import signature
from threading import Lock, get_ident
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers.generation import candidate_generator
from transformers.generation.utils import GenerationMixin

from nab.acceptance import Chain
from nab.backends.heads import Head
from nab.backends.members import Drafter, Members, Selecting, have_process, seeds
from nab.backends.processors import Processors
from nab.backends.rows import Drafted
from nab.decode import Evaluation, levels_of, observed, proposed
from nab.measure import Query, metrics
from nab.pool import Pool
from nab.sampling import Draft
from nab.schemes import Levels
from nab.types import Learner, Objective

HOOK = "_get_candidate_generator"
"""Method of a model that gives the candidate generator: no part of transformers' documented interface."""

WANTED = {
    HOOK: {"generation_config", "input_ids", "logits_processor", "model_kwargs"},
    "_assisted_decoding": {"input_ids", "logits_processor", "generation_config"},
}
"""What this relies on; tested with transformers 5.23."""


class Candidates(candidate_generator.CandidateGenerator):
    """Drafts for transformers' own verifier: ``Candidates([small_model, "lookup"]).generate(model, ...)``.

    Compared with ``nab.backends.hf.Speculative``, verification and so all that surrounds it is transformers',
    which takes one row. Drafters that read the target's hidden states cannot take part.

    Args:
        drafters: see ``nab.backends.hf.Speculative``.
        learner: likewise.
        draft_len: likewise.
        objective: likewise.
        tokenizer: likewise.

    Raises:
        ValueError: see ``nab.backends.hf.Speculative``.
    """

    def __init__(
        self,
        drafters: Sequence[Drafter] | Mapping[str, Drafter],
        *,
        learner: Learner[Any] | None = None,
        draft_len: int = 4,
        objective: Objective | None = None,
        tokenizer: Any = None,
    ) -> None:
        self._members = Members(drafters, tokenizer)
        self._select = Selecting(learner, draft_len, objective)
        self._scheme = Levels([Chain()] * draft_len)
        self.query = Query(self._members.names, draft_len)
        self._lock = Lock()

    def generate(self, model: Any, *arguments: Any, **named: Any) -> Any:
        """``model.generate`` with these drafts.

        Raises:
            ValueError: on beams, on another model to assist, or on a number of tokens for prompt lookup.
            ImportError: if the installed transformers has another hook than is known here.
        """
        config = named.get("generation_config") or model.generation_config
        if (named.get("num_beams") or config.num_beams or 1) != 1 or "prompt_lookup_num_tokens" in named:
            raise ValueError("num_beams must be 1, and prompt_lookup_num_tokens is given here, by draft_len")
        if named.get("assistant_model") is not None:
            raise ValueError("assistant_model must be None: drafters are given to the constructor")
        with self._lock, self._members.alone(model), self._installed(model):
            return model.generate(*arguments, **named, prompt_lookup_num_tokens=self.query.draft_len)

    @contextmanager
    def _installed(self, model: Any) -> Iterator[None]:
        """For the time being, have a model take this thread's candidates here."""
        for name, wanted in WANTED.items():
            found = getattr(GenerationMixin, name, None)
            missing = wanted - (set(signature(found).parameters) if found else set())
            if missing:
                raise ImportError(
                    f"transformers {transformers.__version__} has no {name} of {', '.join(sorted(missing))}: "
                    "use nab.backends.hf.Speculative, which needs its documented interface alone"
                )
        own, others = get_ident(), getattr(model, HOOK)

        def begin(**known: Any) -> Any:
            return self._begin(model, **known) if get_ident() == own else others(**known)

        setattr(model, HOOK, begin)
        try:
            yield
        finally:
            delattr(model, HOOK)

    def _begin(self, model: Any, **known: Any) -> Candidates:
        """What ``generate`` asks for before its first round."""
        config, prompt = known["generation_config"], known["input_ids"][0].tolist()
        target, drafters = self._members.of(model, config)
        self._members.forget()
        process = Processors(known["logits_processor"])
        for name, each in drafters.items():
            if isinstance(each, Head):
                raise ValueError(
                    f"drafter {name} reads hidden states, which transformers does not hand on here"
                )
        have_process([target, *drafters.values()], process)
        self.query = Query(self._members.names, self.query.draft_len)
        self._pool = Pool(list(drafters.values()))
        self.query.benched = self._pool.benched
        choosing, drawing = seeds(config)
        self._rng = np.random.default_rng(drawing)
        self._selector = self._select(len(drafters), choosing)
        self._tokens, self._prompt, self._longest = prompt, len(prompt), config.max_length
        self._target, self._warper, self._device = target, target.warper, model.device
        vocab = model.config.get_text_config().vocab_size
        self._like = torch.empty(1, vocab, device=model.device, dtype=target.law_dtype)
        return self

    def get_candidates(self, input_ids: Tensor, **_: Any) -> Any:
        """The text ``(1, length)`` and a draft behind it, and logits of its laws ``(1, drafted, vocab)``.

        No logits but None where nothing was drawn: at temperature 0, and of what is certain.
        """
        begun, selector = perf_counter(), self._selector
        room = self._longest - len(self._tokens) - 1
        levels = min(levels_of(selector, self.query.draft_len), room)
        uniforms = self._rng.random(self.query.draft_len).tolist()
        found: Any = None
        if levels > 0:
            scheme = self._scheme.cut(levels) if levels < self.query.draft_len else self._scheme
            work = partial(proposed, scheme, self._tokens, uniforms, self._like, itself=True)
            found = self._pool.call(selector.choice, work)
        draft = _Chain.of(found, self._device)
        self._drafted = len(draft.tokens)
        self._clock = begun, perf_counter()
        if not draft.tokens:
            return input_ids, None
        ids = input_ids.new_tensor([draft.tokens])
        return torch.cat([input_ids, ids], 1), draft.logits if self._warper.temperature else None

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        """Have all drafters scored on what was verified.

        Args:
            input_ids: the text ``(1, length)``.
            scores: the target's, processed, ``(1, drafted + 1, vocab)``.
            num_matches: accepted tokens that were kept.
        """
        begun, drafted = self._clock
        spent, start = (drafted - begun, perf_counter() - drafted), len(self._tokens)
        emitted = tuple(input_ids[0, start:].tolist())
        self._tokens = [*self._tokens, *emitted]
        laws = partial(self._laws, scores[0, : len(emitted)])
        evaluation = Evaluation(self._pool, self._scheme, tuple(self._tokens), start, (laws,), self._prompt)
        self.query.take(
            observed(
                *(self._selector, evaluation),
                start=start,
                drafted=self._drafted,
                emitted=emitted,
                spent=spent,
            )
        )

    def _laws(self, scores: Tensor) -> Tensor:
        return self._warper(scores.to(self._like.dtype))

    @property
    def metrics(self) -> dict[str, Any]:
        """See ``nab.backends.hf.Speculative.metrics``."""
        if not self.query.rounds:
            return {}
        with self._members.alone(self._target.model):
            self.query.settle(self._target, self._pool, self._tokens[: self._prompt])
        return metrics([self.query])


class _Chain(NamedTuple):
    """Drafted tokens, and logits of the laws they were drawn from ``(1, levels, vocab)``; None: certain."""

    tokens: list[int]
    logits: Tensor | None

    @classmethod
    def of(cls, found: Draft | Drafted | None, device: torch.device) -> _Chain:
        """What a drafter has drafted, which is told its tokens."""
        if found is None:
            return cls([], None)
        if isinstance(found, Draft):
            laws = [q for q in found.q if q is not None]
            return cls(found.tokens, torch.stack(laws)[None].log() if laws else None)
        tokens = found.ids[0].tolist()
        found.tell(tokens)
        return cls(tokens, None if found.q is None else found.q[:, : len(tokens)].log())
