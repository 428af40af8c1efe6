"""The target as a teacher: its hidden states and laws on text of its domains and on its own answers."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from nab.backends import int8
from nab.backends.pretrained import Pretrained
from nab.backends.training import corpus, decoded, documents

PAD = -1
REQUESTS = ("Continue this {domain} text:\n\n{text}", "Write more {domain} text in the style of:\n\n{text}")
TEMPERATURES = (1.0, 0.6)
TURN = 4
"""Units of answers that are at one temperature before those at the other."""


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

    Every unit is a function of its name (domain, kind, number), computed when first asked for. It is kept
    under a checksum of all it is computed from, so that none of another target or text is taken for it.

    Args:
        target: model and tokenizer.
        corpora: a folder per domain, with ``train/*.txt`` and ``heldout/*.txt``.
        cache: folder of the units.
        layers: hidden states to keep, the final one last.
        part: ``train`` or ``heldout``.
        rows: of a unit.
        length: tokens of a row.
        together: units of answers that a GPU makes at once, in little more time than one.
    """

    target: Pretrained
    corpora: Path
    cache: Path
    layers: tuple[int, ...]
    part: str = "train"
    rows: int = 16
    length: int = 256
    together: int = 4
    _windows: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    _data: dict[str, dict[str, Any]] = field(default_factory=dict)

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

    def data(self, domain: str) -> dict[str, Any]:
        """What a domain is made of: see ``corpus``; and the SHA-256 of ``requests``, if there are any."""
        if domain not in self._data:
            asked = "\n".join(self.requests(domain)).encode()
            listed = {"requests": hashlib.sha256(asked).hexdigest()} if asked else {}
            self._data[domain] = corpus(self.corpora / domain / self.part) | listed
        return self._data[domain]

    def requests(self, domain: str) -> list[str]:
        """Lines of ``<domain>/requests/<part>.txt``, if there is such a file and the target chats."""
        file = self.corpora / domain / "requests" / f"{self.part}.txt"
        return decoded(file).splitlines() if self.target.tokenizer.chat_template and file.exists() else []

    def windows(self, domain: str) -> NDArray[np.int64]:
        """All text of a domain, ``(windows, length)``, shuffled; documents end with the end token."""
        if domain not in self._windows:
            tokenizer = self.target.tokenizer
            joined: list[int] = []
            for text in documents(self.corpora / domain / self.part):
                joined += tokenizer(text, add_special_tokens=False)["input_ids"]
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
        return self._cached("text", domain, number, [number], self._text)

    def answers(self, domain: str, number: int) -> Unit:
        """Unit ``number`` of the target's answers to ``prompts`` of ``domain``.

        Sampled at temperatures 1 and .6 in turn. A GPU makes ``together`` units at once.
        """
        together = self.together if self.target.model.device.type == "cuda" else 1
        first = number - number % together
        return self._cached("answers", domain, number, range(first, first + together), self.answered)

    def prompts(self, domain: str, count: int, opening: int = 48) -> list[list[int]]:
        """Token ids of the first ``count`` requests of ``domain``.

        Requests to go on from ``opening`` tokens of text and, in turn with them, ``requests``.
        """
        # from the far end, so that the answers are not to the first windows of the text units
        windows, found = self.windows(domain)[::-1], []
        tokenizer, listed = self.target.tokenizer, self.requests(domain)
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

    def _cached(
        self,
        kind: str,
        domain: str,
        number: int,
        together: Sequence[int],
        make: Callable[[str, Sequence[int]], Tensor],
    ) -> Unit:
        """Unit ``number``; if it is not there, ``make`` gives the rows of all units ``together``."""
        folder = self.cache / self.part / kind / domain / self._source(kind, domain)[:16]
        if not (wanted := folder / f"{number:05d}.safetensors").exists():
            folder.mkdir(parents=True, exist_ok=True)
            for k, rows in zip(together, torch.split(make(domain, together), self.rows), strict=True):
                file = folder / f"{k:05d}.safetensors"
                draft = file.with_suffix(f".{os.getpid()}.partial")  # several processes may fill one cache
                save_file({k: v.contiguous() for k, v in self._read(rows)._asdict().items()}, draft)
                draft.replace(file)
        with int8.opened(wanted) as tensors:
            return Unit(*(tensors.get_tensor(name).to(self.target.model.device) for name in Unit._fields))

    def _source(self, kind: str, domain: str) -> str:
        """SHA-256 of what units are computed from; of the requests only answers are."""
        data = {k: v for k, v in self.data(domain).items() if kind == "answers" or k != "requests"}
        source = [self.target.checksum, data, self.layers, self.rows, self.length]
        return hashlib.sha256(json.dumps(source).encode()).hexdigest()

    def _text(self, domain: str, numbers: Sequence[int]) -> Tensor:
        """``(len(numbers) * rows, length)``: windows, in turn."""
        windows = self.windows(domain)
        rows = np.concatenate([np.arange(k * self.rows, (k + 1) * self.rows) for k in numbers])
        return torch.tensor(windows[rows % len(windows)])

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

    def answered(self, domain: str, numbers: Sequence[int]) -> Tensor:
        """Rows of units of answers, ``(len(numbers) * rows, length)``: requests with their sampled answers.

        Every unit has random numbers of its own, so that, up to rounding, it is the same in any company.
        """
        prompts, draws, temperatures = self.prompts(domain, (max(numbers) + 1) * self.rows), [], []
        for k in numbers:
            seeded = torch.Generator().manual_seed(zlib.crc32(f"{self.part}/{domain}/{k}".encode()))
            draws.append(torch.rand(self.rows, self.length, generator=seeded, dtype=torch.float64))
            temperatures += [TEMPERATURES[k // TURN % len(TEMPERATURES)]] * self.rows
        prompts = [prompt for k in numbers for prompt in prompts[k * self.rows : (k + 1) * self.rows]]
        model: Any = self.target.model
        device = model.device
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        levels, heat = torch.cat(draws).to(device), torch.tensor(temperatures, device=device)[:, None]

        def sampled(so_far: Tensor, logits: Tensor) -> Tensor:
            """Logits that leave one token: where the distribution function passes the row's next level."""
            masses = (logits.double() / heat).softmax(-1).cumsum(-1)
            level = levels[:, so_far.shape[1] - longest, None] * masses[:, -1:]
            token = (masses <= level).sum(-1, keepdim=True).clamp_max(masses.shape[1] - 1)
            return torch.full_like(logits, -torch.inf).scatter_(1, token, 0.0)

        stops = sorted(self.target.stop_tokens)
        generated: Any = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max(self.length - min(map(len, prompts)), 1),
            do_sample=False,
            logits_processor=[sampled],
            pad_token_id=stops[0],
        )
        rows = torch.full((len(prompts), self.length), PAD)
        for k, (prompt, row) in enumerate(zip(prompts, generated[:, longest:].tolist(), strict=True)):
            end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
            whole = [*prompt, *row[:end]][: self.length]
            rows[k, : len(whole)] = torch.tensor(whole)
        return rows
