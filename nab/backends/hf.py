"""Drafters chosen online inside ``model.generate`` of transformers: nab's loop as its ``custom_generate``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
)
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import GenerateDecoderOnlyOutput

from nab.backends.members import Drafter, Members, Selecting, have_process, seeds
from nab.backends.processors import Processors
from nab.backends.torch import CausalLM
from nab.decode import decode, levels_of, until
from nab.measure import Query, metrics
from nab.pool import Pool
from nab.selector import Chooses
from nab.types import Evaluate, Floats, Learner, Objective
from nab.wrappers import Wrapped


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """What ``generate`` returns with ``return_dict_in_generate``; there is no cache in it."""

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self._measure: Callable[[], dict[str, Any]] = dict

    @property
    def metrics(self) -> dict[str, Any]:
        """See ``Speculative.metrics``."""
        return self._measure()

    def __getstate__(self) -> dict[str, Any]:
        """With metrics as numbers: models stay where they are."""
        return {**vars(self), "_measure": partial(dict, self.metrics)}


class Speculative:
    """For ``model.generate(..., custom_generate=Speculative([small_model, "lookup"]))``.

    The answer has the law that it has without it: the argmax of the scores behind all processors and warpers,
    or a draw from them. Draws are numpy's, seeded by torch's default generator, which greedy calls leave as
    it is: after ``torch.manual_seed`` they repeat, but they are not those of plain ``generate``, and under
    the time objective the choices of drafters follow the clock. Rows of a batch are decoded one after
    another, each with a fresh selector. Meanwhile models are in eval mode.

    Processors and stopping criteria of one's own see one row at a time, with the padding on its left.
    Processors must be functions of ids and scores: they see drafts that are then rejected. Calls from several
    threads wait for each other.

    Args:
        drafters: by name, or in a sequence: models of transformers, numpy language models, ``"lookup"``,
            ``"early-exit"``; with a ``tokenizer`` all that ``nab.backends.pool.build`` knows, such as folders
            of models and of EAGLE-3 heads.
        learner: None is ``NormalHedge()``.
        draft_len: drafted tokens a round, at least 1.
        objective: None is seconds per token, where shorter drafts and none are among the experts; what is
            measured of costs outlives a call. See ``nab.losses``.
        tokenizer: the target's.
        streamer: of transformers, for a single row; ``generate`` does not hand on the one it is given.

    Attributes:
        queries: of the last call, one a row, as far as they went.

    Raises:
        ValueError: on no drafter, a name without tokenizer, or a bad draft length; when called, on a drafter
            with another vocabulary, and on models and arguments that it does not know, naming them.
    """

    def __init__(
        self,
        drafters: Sequence[Drafter] | Mapping[str, Drafter],
        *,
        learner: Learner[Any] | None = None,
        draft_len: int = 4,
        objective: Objective | None = None,
        tokenizer: Any = None,
        streamer: Any = None,
    ) -> None:
        self._members = Members(drafters, tokenizer)
        self._select = Selecting(learner, draft_len, objective)
        self._draft_len, self._streamer = draft_len, streamer
        self._rows: list[_Row] = []
        self._lock = Lock()
        self._measure: Callable[[], dict[str, Any]] = dict

    @property
    def queries(self) -> list[Query]:
        """See the class."""
        return [row.query for row in self._rows]

    @property
    def metrics(self) -> dict[str, Any]:
        """Of the last call, all rows together: see ``nab.measure.metrics``; empty before the first.

        The first time it is asked for, drafters score the positions that no selector had them score.
        """
        return self._measure()

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        *,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **more: Any,
    ) -> Any:
        """Answer all rows: what ``generate`` calls, see ``GenerationMixin._sample`` for the arguments."""
        check_known(model, generation_config, more)
        prompts = unpadded(input_ids, more.get("attention_mask"), more.get("position_ids"))
        if len(prompts) > 1 and self._streamer is not None:
            raise ValueError(f"a streamer shows one row, got a batch of {len(prompts)}")
        if len(prompts) > 1 and any(isinstance(each, MaxTimeCriteria) for each in stopping_criteria):
            raise ValueError(f"max_time is that of all rows together: give one, got {len(prompts)}")
        with self._lock, self._members.alone(model):
            self._begin(model, input_ids.tolist(), prompts, logits_processor, generation_config)
            self._answer(model, input_ids, stopping_criteria, generation_config)
            return self._output(input_ids, generation_config)

    def _begin(
        self,
        model: Any,
        ids: list[list[int]],
        prompts: list[list[int]],
        processors: LogitsProcessorList,
        config: GenerationConfig,
    ) -> None:
        """Rows with nothing in them, and empty caches."""
        names = self._members.names
        self._rows = rows = [
            _Row(
                Query(names, self._draft_len),
                text,
                prompt,
                row=(number, len(prompts)),
                processors=processors,
                config=config,
            )
            for number, (text, prompt) in enumerate(zip(ids, prompts, strict=True))
        ]

        @cache
        def measure() -> dict[str, Any]:
            with self._members.alone(model):
                target, drafters = self._members.of(model, config)
                for row in rows:
                    row.settle(target, drafters)
            return metrics([row.query for row in rows])

        self._measure = measure
        self._members.forget()

    def _answer(
        self, model: Any, input_ids: Tensor, criteria: StoppingCriteriaList, config: GenerationConfig
    ) -> None:
        """Fill the rows."""
        target, drafters = self._members.of(model, config)
        streamer = self._streamer
        if streamer is not None:
            streamer.put(input_ids.cpu())
        for row in self._rows:
            choosing, drawing = seeds(config)
            selector = self._select(len(drafters), choosing)
            row.answer(target, drafters, selector, rng=drawing, criteria=criteria, streamer=streamer)
        if streamer is not None:
            streamer.end()

    def _output(self, input_ids: Tensor, config: GenerationConfig) -> Any:
        """Rows side by side, padded on the right; scores are 0 where a row has ended."""
        pad = 0 if config._pad_token_tensor is None else int(config._pad_token_tensor)
        texts = [input_ids.new_tensor(row.ids) for row in self._rows]
        sequences: Any = pad_sequence(texts, batch_first=True, padding_value=pad)
        if not config.return_dict_in_generate:
            return sequences
        output = SpeculativeOutput(sequences=sequences)
        if self._rows[0].keeps:
            logits, scores = pad_sequence([torch.stack(row.kept) for row in self._rows]).unbind(2)
            output.logits = tuple(logits) if config.output_logits else None
            output.scores = tuple(scores) if config.output_scores else None
        output._measure = self._measure
        return output


class _Row:
    """One row of a batch.

    Args:
        query: to be filled.
        ids: its text with the padding, which grows.
        prompt: its text.
        row: its number and the number of rows.
        processors: of its scores.
        config: of the call.
    """

    def __init__(
        self,
        query: Query,
        ids: list[int],
        prompt: list[int],
        *,
        row: tuple[int, int],
        processors: LogitsProcessorList,
        config: GenerationConfig,
    ) -> None:
        self.query, self.ids = query, ids
        self.keeps = bool(config.return_dict_in_generate and (config.output_scores or config.output_logits))
        self.kept: list[Tensor] = []
        """Logits and scores of each new token, ``(2, vocab)``."""
        self._prompt, self._tells = prompt, bool(config.output_scores)
        padding = ids[: len(ids) - len(prompt)]
        self._row = row
        self._processors = Processors(processors, padding, row)
        self._of_target = Processors(processors, padding, row, keeps=self.keeps)
        self._pool = Pool([])
        self._emitted = 0  # tokens of the round that were taken

    def _enter(self, target: CausalLM, drafters: Mapping[str, Any]) -> None:
        """Have models of transformers process their logits as this row's."""
        target.process = self._of_target
        have_process(drafters.values(), self._processors)

    def answer(
        self,
        target: CausalLM,
        drafters: Mapping[str, Any],
        selector: Chooses,
        *,
        rng: Any,
        criteria: StoppingCriteriaList,
        streamer: Any,
    ) -> None:
        """Fill the query."""
        self._enter(target, drafters)
        self._pool = Pool(list(drafters.values()))
        self.query.benched = self._pool.benched
        longest = min(each.max_length for each in criteria if type(each) is MaxLengthCriteria)
        stops = [
            token
            for each in criteria
            if type(each) is EosTokenCriteria
            for token in each.eos_token_id.flatten().tolist()
        ]
        others = [each for each in criteria if not _counts(each)]

        def ends(token: int) -> bool:
            self._take(token)
            if streamer is not None:
                streamer.put(torch.tensor([token]))
            return bool(others) and self._is_ended(others, target.device)

        draft_len = self.query.draft_len
        within = _Within(selector, draft_len, lambda: longest - len(self.ids))
        rounds = decode(target, self._pool, within, self._prompt, draft_len=draft_len, rng=rng)
        left = longest - len(self.ids)
        for round_ in until(rounds, max_new_tokens=left, stop_tokens=stops, ends=ends):
            self._emitted = 0
            self.query.take(round_)

    def _take(self, token: int) -> None:
        """Add a token, with the logits and scores it was taken from."""
        self.ids.append(token)
        if self._of_target.kept is not None:
            self.kept.append(torch.stack([part[self._emitted] for part in self._of_target.kept]).clone())
            self._emitted += 1

    def _is_ended(self, criteria: Sequence[Any], device: torch.device) -> bool:
        """Whether a criterion says so, which is shown this row in all places of the batch."""
        number, batch = self._row
        ids = torch.tensor([self.ids], device=device).expand(batch, -1)
        scores = tuple(score.expand(batch, -1) for _, score in self.kept) if self._tells else None
        found = [torch.as_tensor(each(ids, scores)).expand(batch)[number] for each in criteria]
        return any(map(bool, found))

    def settle(self, target: CausalLM, drafters: Mapping[str, Any]) -> None:
        """Score what no round has scored."""
        self._enter(target, drafters)
        self.query.settle(target, self._pool, self._prompt)


class _Within(Wrapped):
    """Drafts no more tokens than an answer has left, but for the one that a round adds."""

    def __init__(self, selector: Chooses, draft_len: int, left: Callable[[], int]) -> None:
        super().__init__(selector)
        self._draft_len, self._left = draft_len, left

    @property
    def draft_len(self) -> int:
        """See ``Chooses``."""
        return min(levels_of(self._selector, self._draft_len), self._left() - 1)

    def observe(
        self, emitted: int, evaluate: Evaluate, *, seconds: tuple[float, float] | None = None
    ) -> tuple[Floats, Floats] | None:
        """See ``Chooses``."""
        return self._selector.observe(emitted, evaluate, seconds=seconds)


def _counts(criterion: Any) -> bool:
    """Whether a stopping criterion is one of those that need no call."""
    return type(criterion) in (EosTokenCriteria, MaxLengthCriteria)


def check_known(model: Any, config: GenerationConfig, more: Mapping[str, Any]) -> None:
    """Raise ValueError, naming it, on what ``generate`` was asked for that nab's loop does not do."""
    mode = config.get_generation_mode()
    states = more.get("past_key_values")
    known = {
        "attention_mask",
        "position_ids",
        "past_key_values",
        "use_cache",
        "logits_to_keep",
        "synced_gpus",
        "cache_params",  # of recurrent models, which are refused as such
    }
    if model.config.is_encoder_decoder:
        raise ValueError(f"only decoders can be speculated for, got {type(model).__name__}")
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(f"generation must be greedy search or sampling, got {mode.value}")
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        raise ValueError("output_attentions and output_hidden_states must be False")
    if more.get("synced_gpus"):
        raise ValueError("synced_gpus must be False: rows of one process end when they end")
    if states is not None and states.get_seq_length():
        raise ValueError(f"past_key_values must be empty, got {states.get_seq_length()} tokens")
    for name, value in more.items():
        if value is not None and name not in known:
            raise ValueError(f"{name} is unknown: models are given token ids and nothing else")


def unpadded(input_ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> list[list[int]]:
    """The rows without their padding.

    Raises:
        ValueError: if an id is none, or a row is empty, masked elsewhere than on its left, or has positions
            of its own.
    """
    seen = torch.ones_like(input_ids) if mask is None else mask.to(input_ids.device).long()
    if seen.shape != input_ids.shape or not ((seen == 0) | (seen == 1)).all():
        raise ValueError(f"attention_mask must be 0 or 1 for each of {tuple(input_ids.shape)} tokens")
    if (seen.diff(dim=1) < 0).any() or not seen[:, -1:].all() or not seen.shape[1]:
        raise ValueError("attention_mask must be 0 for padding on the left alone, of rows that are not empty")
    counted = (seen.cumsum(1) - 1) * seen
    if positions is not None and not (positions.to(seen.device) * seen == counted).all():
        raise ValueError("position_ids must count a row's tokens from 0")
    if input_ids.is_floating_point() or int(input_ids.min()) < 0:
        raise ValueError(f"input_ids must be token ids, at least 0, got {input_ids.min().item()}")
    starts = (seen.shape[1] - seen.sum(1)).tolist()
    return [row[start:] for row, start in zip(input_ids.tolist(), starts, strict=True)]
