"""The target as a teacher: its hidden states and laws on text of its domains and on its own answers."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from nab.backends.pretrained import Pretrained

PAD = -1
REQUESTS = ("Continue this {domain} text:\n\n{text}", "Write more {domain} text in the style of:\n\n{text}")
TEMPERATURES = (1.0, 0.6)
TOGETHER = 4


class Unit(NamedTuple):
    """A few rows of text with all that a drafter learns from; cached on disk, one file each.

    Args:
        tokens: ``(rows, length)`` ids, ``PAD`` behind the end of a row.
        hidden: ``(rows, length, layers, width)`` hidden states of the target, the final ones last.
        log_mass: ``(rows, length)`` log of the sum of the exponentials of the target's logits.
    """

    tokens: Tensor
    hidden: Tensor
    log_mass: Tensor


@dataclass(frozen=True)
class Teacher:
    """The target on the text of its domains: windows of documents, and its own answers to requests.

    Every unit is a function of its name (domain, kind, number), computed when first asked for.

    Args:
        target: model and tokenizer.
        corpora: a folder per domain, with ``train/*.txt`` and ``heldout/*.txt``.
        cache: folder of the units.
        layers: hidden states to keep, the final one last.
        part: ``train`` or ``heldout``.
        rows: of a unit.
        length: tokens of a row.
    """

    target: Pretrained
    corpora: Path
    cache: Path
    layers: tuple[int, ...]
    part: str = "train"
    rows: int = 16
    length: int = 256
    _windows: dict[str, NDArray[np.int64]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        last = self.target.model.config.get_text_config().num_hidden_layers
        if not self.layers or self.layers[-1] != last or not all(0 <= k <= last for k in self.layers):
            raise ValueError(f"layers must lie in [0, {last}] and end with {last}, got {self.layers}")

    @cached_property
    def domains(self) -> list[str]:
        """Names of the domains.

        Raises:
            FileNotFoundError: if there is none.
        """
        found = sorted(path.parent.name for path in self.corpora.glob(f"*/{self.part}"))
        if not found:
            raise FileNotFoundError(f"{self.corpora} holds no folders <domain>/{self.part} with text files")
        return found

    def windows(self, domain: str) -> NDArray[np.int64]:
        """All text of a domain, ``(windows, length)``, shuffled; documents end with the end token."""
        if domain not in self._windows:
            tokenizer = self.target.tokenizer
            joined: list[int] = []
            for file in sorted((self.corpora / domain / self.part).glob("*.txt")):
                joined += tokenizer(file.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
                joined.append(tokenizer.eos_token_id)
            count = len(joined) // self.length
            if count < self.rows:
                raise ValueError(
                    f"{self.corpora / domain / self.part} has {len(joined)} tokens, too few for one unit of "
                    f"{self.rows} windows of {self.length}"
                )
            windows = np.array(joined[: count * self.length]).reshape(count, self.length)
            self._windows[domain] = np.random.default_rng(0).permutation(windows)
        return self._windows[domain]

    def text(self, domain: str, number: int) -> Unit:
        """Unit ``number`` of the text of ``domain``; the text repeats when it is used up."""
        windows = self.windows(domain)
        rows = np.arange(number * self.rows, (number + 1) * self.rows) % len(windows)
        return self._cached("text", domain, [number], lambda: torch.tensor(windows[rows]))

    def answers(self, domain: str, number: int) -> Unit:
        """Unit ``number`` of the target's answers to ``prompts`` of ``domain``.

        Sampled at temperatures 1 and .6 in turn, ``TOGETHER`` units at once: large batches cost little more.
        """
        group, place = divmod(number, TOGETHER)
        turns = [(place + k) % TOGETHER for k in range(TOGETHER)]  # the wanted one first
        return self._cached(
            "answers",
            domain,
            [group * TOGETHER + turn for turn in turns],
            lambda: self._answer(domain, group).roll(-place * self.rows, 0),
        )

    def prompts(self, domain: str, count: int, opening: int = 48) -> list[list[int]]:
        """Token ids of the first ``count`` requests of ``domain``.

        Requests to go on from ``opening`` tokens of text and, in turn with them, those that
        ``<domain>/requests/<part>.txt`` lists, one a line, if there is such a file and the target chats.
        """
        # from the far end, so that the answers are not to the first windows of the text units
        windows, found = self.windows(domain)[::-1], []
        tokenizer, file = self.target.tokenizer, self.corpora / domain / "requests" / f"{self.part}.txt"
        listed = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        for k in range(count):
            ids = windows[k % len(windows)][:opening].tolist()
            if tokenizer.chat_template:
                if listed and k % 2:
                    request = listed[k // 2 % len(listed)]
                else:
                    text = tokenizer.decode(ids).strip() or domain
                    request = REQUESTS[k // 2 % len(REQUESTS)].format(domain=domain, text=text)
                ids = self.target.encode(request)
            found.append(ids)
        return found

    def unit(self, domain: str, kind: str, number: int) -> Unit:
        """``text`` or ``answers``, by name."""
        return {"text": self.text, "answers": self.answers}[kind](domain, number)

    def _cached(self, kind: str, domain: str, numbers: list[int], make: Callable[[], Tensor]) -> Unit:
        """The first of several units, of which ``make`` gives the rows of all."""
        folder = self.cache / f"layers-{'-'.join(map(str, self.layers))}" / self.part / kind / domain
        files = [folder / f"{number:05d}.safetensors" for number in numbers]
        if not files[0].exists():
            folder.mkdir(parents=True, exist_ok=True)
            for file, rows in zip(files, torch.split(make(), self.rows), strict=True):
                draft = file.with_suffix(f".{os.getpid()}.partial")  # several processes may fill one cache
                save_file({k: v.contiguous() for k, v in self._read(rows)._asdict().items()}, draft)
                draft.replace(file)
        return Unit(**load_file(files[0], device=str(self.target.model.device)))

    @torch.inference_mode()
    def _read(self, tokens: Tensor) -> Unit:
        """One forward of the target over rows that may end with ``PAD``."""
        tokens = tokens.to(self.target.model.device)
        ids = tokens.clamp_min(0)
        model: Any = self.target.model
        read = model(input_ids=ids, output_hidden_states=True, use_cache=False, logits_to_keep=1)
        hidden = torch.stack([read.hidden_states[layer] for layer in self.layers], 2).bfloat16()
        # of the rounded states, as in ``teacher_laws``, but in float32: a bfloat16 logit of 20 is off by .06
        output = model.get_output_embeddings().weight.float()
        log_mass = torch.stack([(row.float() @ output.T).logsumexp(-1) for row in hidden[:, :, -1]])
        return Unit(tokens.int(), hidden, log_mass)

    def _answer(self, domain: str, group: int) -> Tensor:
        """``(TOGETHER * rows, length)``: requests with their sampled answers."""
        count = TOGETHER * self.rows
        prompts = self.prompts(domain, (group + 1) * count)[group * count :]
        model: Any = self.target.model
        device = model.device
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        torch.manual_seed(zlib.crc32(f"{self.part}/{domain}/{group}".encode()))
        stops = sorted(self.target.stop_tokens)
        generated: Any = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max(self.length - min(map(len, prompts)), 1),
            do_sample=True,
            temperature=TEMPERATURES[group % len(TEMPERATURES)],
            top_k=0,
            top_p=1.0,
            pad_token_id=stops[0],
        )
        rows = torch.full((count, self.length), PAD)
        for k, (prompt, row) in enumerate(zip(prompts, generated[:, longest:].tolist(), strict=True)):
            end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
            whole = [*prompt, *row[:end]][: self.length]
            rows[k, : len(whole)] = torch.tensor(whole)
        return rows
