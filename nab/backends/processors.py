"""The logits processors that ``generate`` of transformers prepares, as the ``process`` of a ``CausalLM``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process

ROWWISE = (
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "MinPLogitsWarper",
    "TypicalLogitsWarper",
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "SuppressTokensLogitsProcessor",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
)
"""Processors of transformers that look at scores alone: all rows of a draft go through them at once."""

STATEFUL = (
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    "SynthIDTextWatermarkLogitsProcessor",
    "WhisperTimeStampLogitsProcessor",
    "WhisperNoSpeechDetection",
    "DiaEOSDelayPatternLogitsProcessor",
)
"""Those that remember earlier calls or run a model: a rejected draft would leave its traces in them."""


class Processors:
    """All processors of a call, one behind the other, for one row of its batch.

    Those that look at ids too are shown the row's in all places of the batch, and asked about its own: some
    know things about each row.

    Args:
        steps: functions of ids ``(batch, length)`` and scores ``(batch, vocab)``.
        padding: ids in front of the row's text, which they are shown too.
        row: its number and the number of rows.
        keeps: whether logits and scores of the last call are kept, in ``kept``.

    Raises:
        ValueError: on a processor that keeps a state.
    """

    def __init__(
        self,
        steps: LogitsProcessorList,
        padding: Sequence[int] = (),
        row: tuple[int, int] = (0, 1),
        *,
        keeps: bool = False,
    ) -> None:
        for step in steps:
            if _is_one_of(STATEFUL, step):
                raise ValueError(f"{type(step).__name__} keeps a state that drafts would disturb")
        self._steps = [(step, _is_one_of(ROWWISE, step)) for step in steps]
        self._padding, (self._number, self._batch), self._keeps = padding, row, keeps
        self.kept: tuple[Tensor, Tensor] | None = None
        """Logits and scores, ``(rows, vocab)`` each."""

    def __call__(self, logits: Tensor, ids: Callable[[], Tensor]) -> Tensor:
        """Scores, computed in float32 like those of ``generate``; see ``Process``."""
        dtype, scores = logits.dtype, (logits := logits.float())
        text = None
        for step, rowwise in self._steps:
            if rowwise:
                scores = step(logits.new_empty(len(logits), 0), scores)
                continue
            if text is None:
                known = ids()
                text = torch.cat([known.new_tensor([self._padding], dtype=torch.long), known], 1)
            scores = self._by_row(step, text, scores)
        if self._keeps:
            self.kept = logits, scores
        return scores.double() if dtype == torch.float64 else scores

    def _by_row(self, step: Any, text: Tensor, scores: Tensor) -> Tensor:
        """Scores behind the last prefixes of a text."""
        first, found = text.shape[1] - len(scores) + 1, []
        for end, row in enumerate(scores, first):
            every = step(text[:, :end].expand(self._batch, -1), row.expand(self._batch, -1).clone())
            found.append(every[self._number])
        return torch.stack(found)


def _is_one_of(names: Sequence[str], step: Any) -> bool:
    kind = type(step)
    return kind.__name__ in names and kind.__module__ == logits_process.__name__
