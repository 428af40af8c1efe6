"""vLLM: drafters chosen online for its ``custom_class`` method. Nothing of vLLM is imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nab.backends.texts import Proposes, Texts
from nab.decode import Round
from nab.selector import Chooses


class Proposer:
    """What vLLM makes by the name of its class, once in each worker.

    ``LLM(..., speculative_config={"method": "custom_class", "model": "nab.backends.vllm.Proposer",
    "num_speculative_tokens": 4})``. vLLM gives a class its configuration and nothing else, so other choices
    are made in a subclass:

    >>> from nab.backends.drafters import Lookup
    >>> class Mine(Proposer):
    ...     def __init__(self, vllm_config):
    ...         super().__init__(vllm_config, drafters={"lookup": Lookup(min_ngram=3)})

    vLLM tells tokens, no laws and no names of requests, and rows move: see ``nab.backends.texts``. It takes
    such drafts for certain ones, so the text has the target's law at any temperature.

    Args:
        vllm_config: ``num_speculative_tokens``, ``max_model_len`` and ``max_num_seqs`` are read.
        drafters: see ``Texts``.
        selector: likewise.
        seed: likewise.
        most: texts that are kept; None is twice ``max_num_seqs``, so that preempted ones find theirs again.
        watch: see ``Texts``.

    Raises:
        ValueError: see ``Texts``.
    """

    def __init__(
        self,
        vllm_config: Any,
        *,
        drafters: Mapping[str, Proposes] | None = None,
        selector: Callable[[Any], Chooses] | None = None,
        seed: int = 0,
        most: int | None = None,
        watch: Callable[[int, Round], Any] | None = None,
    ) -> None:
        self._longest = vllm_config.model_config.max_model_len
        self.texts = Texts(
            vllm_config.speculative_config.num_speculative_tokens,
            drafters=drafters,
            selector=selector,
            seed=seed,
            most=2 * vllm_config.scheduler_config.max_num_seqs if most is None else most,
            watch=watch,
        )

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: Any,
        token_ids_cpu: Any,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Drafts for the rows of the batch.

        Args:
            sampled_token_ids: tokens that each row got in the last step, none while its prompt is read.
            num_tokens_no_spec: tokens of each row, these included, ``(rows,)``.
            token_ids_cpu: the rows, ``(rows, max_model_len)``.
            slot_mappings: not used.

        Returns:
            One list a row, of at most ``num_speculative_tokens`` tokens; as many as fit ``max_model_len``
            together with the token behind them.
        """
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        emitted = {row: len(new) for row, new in enumerate(sampled_token_ids) if len(new)}
        taken = []
        # of texts alike, whoever got most tokens has the fewest to be: it takes its own first
        for row in sorted(emitted, key=lambda row: -emitted[row]):
            tokens = np.asarray(token_ids_cpu[row, : int(num_tokens_no_spec[row])])
            taken.append((row, self.texts.take(tokens, emitted[row])))
        for row, text in taken:
            drafts[row] = text.draft(self._longest - len(text.tokens) - 1)
            self.texts.put(text)
        return drafts

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: there is no model to load."""
