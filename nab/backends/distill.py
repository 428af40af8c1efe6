"""Distils drafters from a target: a generalist on all domains, then one expert per domain from it."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from nab.backends import int8
from nab.backends.heads import HeadModel, Shape
from nab.backends.pretrained import Pretrained, llama_file
from nab.backends.training import Progress, Recipe, fit

PAD = -1
REQUESTS = ("Continue this {domain} text:\n\n{text}", "Write more {domain} text in the style of:\n\n{text}")
TEMPERATURES = (1.0, 0.6)
TOGETHER = 4
CHUNK = 64
DEFAULT_RECIPE = Recipe()


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


class Student(Protocol):
    """A drafter in training."""

    @property
    def tokens(self) -> Tensor:
        """Ids of its draft vocabulary, ``(draft_vocab,)``."""

    def laws(self, unit: Unit, depths: int) -> list[Tensor]:
        """Logits over ``tokens`` at depth 1 .. ``depths``, each ``(rows, length, draft_vocab)``."""


class Standalone(nn.Module):
    """A small Llama over the target's whole vocabulary; its law is the same at every depth."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    @property
    def tokens(self) -> Tensor:
        """The target's whole vocabulary."""
        return torch.arange(self.model.config.vocab_size, device=self.model.device)

    def laws(self, unit: Unit, depths: int) -> list[Tensor]:
        """See ``Student``."""
        logits: Tensor = self.model(input_ids=unit.tokens.clamp_min(0)).logits
        return [logits] * min(depths, 1)


class Feature(nn.Module):
    """A feature-level head; deeper laws read its own features."""

    def __init__(self, model: HeadModel) -> None:
        super().__init__()
        self.model = model

    @property
    def tokens(self) -> Tensor:
        """Its draft vocabulary."""
        return self.model.tokens

    def laws(self, unit: Unit, depths: int) -> list[Tensor]:
        """See ``Student``."""
        kept = unit.hidden[:, :, -len(self.model.shape.layers) :].to(self.model.output.dtype)
        own = self.model.unroll(unit.tokens.clamp_min(0), kept, depths)
        return [self.model.logits(features) for features in own]


def small_llama(
    vocab_size: int,
    width: int,
    intermediate: int,
    *,
    layers: int = 1,
    head_width: int = 32,
    context: int,
    end: int | None,
) -> LlamaForCausalLM:
    """A Llama with tied embeddings: the tiny target, and what ``Standalone`` trains."""
    heads = max(width // head_width, 1)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=context,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=end,
            pad_token_id=None,
        )
    )


def teacher_laws(unit: Unit, output: Tensor) -> Tensor:
    """Masses the target gives to some tokens, ``(..., tokens)`` float32; they sum to at most 1.

    Args:
        unit: of any leading shape.
        output: rows of the target's output matrix, ``(tokens, width)``.
    """
    with torch.autocast(unit.hidden.device.type, enabled=False):
        logits = unit.hidden[..., -1, :].float() @ output.float().T
        return (logits - unit.log_mass.float()[..., None]).exp()


def distillation_loss(
    student: Student, unit: Unit, output: Tensor, *, depths: int, rejection: float = 1.0, decay: float = 0.8
) -> Tensor:
    """Cross-entropy from the target's law plus ``rejection`` times the probability of rejection.

    Averaged over positions, depths weighted by ``decay ** (depth - 1)``. The second term is what decoding
    pays, ``1 - sum min(p, q)``; the first has gradients everywhere.
    """
    logits = student.laws(unit, depths)
    weights = torch.zeros(len(logits), *unit.tokens.shape, device=output.device)
    for depth in range(len(logits)):
        weights[depth, :, depth:] = unit.tokens[:, depth:] != PAD
        weights[depth] *= decay**depth / weights[depth].sum()
    weights /= weights.sum()
    flat = Unit(*(part.flatten(0, 1) for part in unit))
    sliced, of_rows = output[student.tokens].float(), [x.flatten(0, 1) for x in logits]
    arguments = flat, sliced, weights.flatten(1), rejection, *of_rows
    loss: Tensor = _Distillation.apply(*arguments)  # type: ignore[no-untyped-call]
    return loss


class _Distillation(torch.autograd.Function):
    """The loss and its gradient in one pass over chunks of positions that stay in the processor's cache."""

    @staticmethod
    def forward(
        ctx: Any, unit: Unit, output: Tensor, weights: Tensor, rejection: float, *logits: Tensor
    ) -> Tensor:
        total, gradients = weights.new_zeros(()), [torch.empty_like(x) for x in logits]
        for start in range(0, len(unit.tokens), CHUNK):
            rows = slice(start, start + CHUNK)
            p = teacher_laws(Unit(*(part[rows] for part in unit)), output)
            mass = p.sum(-1, keepdim=True)
            for weight, x, gradient in zip(weights, logits, gradients, strict=True):
                log_q = x[rows].float().log_softmax(-1)
                q = log_q.exp()
                costs = rejection * (1 - torch.minimum(p, q).sum(-1)) - (p * log_q).sum(-1)
                total += (costs * weight[rows]).sum()  # a product of vectors would be autocast
                below = torch.where(q < p, q, 0)  # min(p, q) grows with q there alone
                slope = q * (mass + rejection * below.sum(-1, keepdim=True)) - p - rejection * below
                gradient[rows] = slope * weight[rows, None]
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Any, ...]:
        return None, None, None, None, *(above * gradient for gradient in ctx.saved_tensors)


@dataclass(frozen=True)
class Plan:
    """What is trained on how much.

    Args:
        draft_vocab: tokens a head can propose, generalist and experts alike; each has its own most frequent.
        intermediate: width of the feed-forward part.
        width: of a standalone drafter; None makes heads.
        depths: steps of own features that a head is trained on.
        text: units of text per domain.
        answers: units of answers per domain.
        generalist_passes: over all units of all domains.
        expert_passes: over the units of the domain.
        batch: units a step.
        seed: of initial weights and order.
        recipe: learning rates.
        expert_rate: peak learning rate of the experts, which start from the generalist.
    """

    draft_vocab: int
    intermediate: int
    width: int | None = None
    depths: int = 3
    text: int = 40
    answers: int = 40
    generalist_passes: float = 1.0
    expert_passes: float = 2.0
    batch: int = 1
    seed: int = 0
    recipe: Recipe = DEFAULT_RECIPE
    expert_rate: float = 2e-3

    def names(self) -> list[tuple[str, int]]:
        """Kind and number of the units of a domain."""
        return [("text", k) for k in range(self.text)] + [("answers", k) for k in range(self.answers)]

    def steps(self, domains: int) -> int:
        """Steps of the generalist on several domains, of an expert on one."""
        passes = self.generalist_passes if domains > 1 else self.expert_passes
        return max(int(passes * domains * len(self.names()) / self.batch), 1)

    def batch_names(self, step: int, domains: Sequence[str]) -> list[tuple[str, str, int]]:
        """Domain, kind and number of the units of a step: domains in turn, each in shuffled order."""
        names, chosen = self.names(), []
        for k in range(step * self.batch, (step + 1) * self.batch):
            turn, which = divmod(k, len(domains))
            epoch, place = divmod(turn, len(names))
            order = np.random.default_rng([self.seed, epoch, which]).permutation(len(names))
            chosen.append((domains[which], *names[order[place]]))
        return chosen


def train(
    teacher: Teacher,
    domains: Sequence[str],
    plan: Plan,
    *,
    folder: Path,
    start: Path | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Train one drafter on ``domains``: the generalist on several, an expert on one.

    Args:
        teacher: units to learn from.
        domains: names.
        plan: sizes and amounts.
        folder: of checkpoint and learning curve; an interrupted run goes on from there.
        start: drafter to start from, as ``int8.save`` wrote it; a head's draft vocabulary may differ.
        progress: see ``fit``.

    Returns:
        Weights and metadata for ``int8.save``.
    """
    torch.manual_seed(plan.seed)
    target: Any = teacher.target.model
    output = target.get_output_embeddings().weight.detach()
    initial = int8.load(start) if start else {}
    if plan.width is None:
        sample = (teacher.unit(d, *name) for d in domains for name in plan.names())
        tokens = draft_vocabulary(sample, plan.draft_vocab, len(output))
        shape = Shape(teacher.layers, plan.intermediate, plan.draft_vocab)
        model: Any = HeadModel(shape, target, tokens).float()
        student: Student = Feature(model)
        initial.pop("tokens", None)
    else:
        model = small_llama(
            len(output),
            plan.width,
            plan.intermediate,
            context=target.config.get_text_config().max_position_embeddings,
            end=teacher.target.tokenizer.eos_token_id,
        )
        student = Standalone(model)
    if initial:
        model.load_state_dict(initial, strict=False)
    model.to(target.device).train()
    recipe = replace(plan.recipe, rate=plan.expert_rate) if start else plan.recipe

    def loss(step: int) -> Tensor:
        units = [teacher.unit(*name) for name in plan.batch_names(step, domains)]
        unit = Unit(*(torch.cat(parts) for parts in zip(*units, strict=True)))
        return distillation_loss(student, unit, output, depths=plan.depths)

    steps = plan.steps(len(domains))
    fit(model, loss, steps=steps, folder=folder, recipe=recipe, progress=progress)
    seen = steps * plan.batch * teacher.rows * teacher.length
    if plan.width is None:
        weights = model.state_dict()
        kind = {"kind": "head", "shape": model.shape.to_json(), "width": str(output.shape[1])}
    else:
        weights, config = llama_file(model)
        kind = {"kind": "standalone", **config}
    learned = {"vocabulary": teacher.target.vocabulary, "domains": ",".join(domains), "tokens": str(seen)}
    return weights, kind | learned


def draft_vocabulary(units: Iterable[Unit], size: int, vocab_size: int) -> Tensor:
    """The ``size`` most frequent tokens of ``units``, by falling frequency."""
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for unit in units:
        tokens = unit.tokens[unit.tokens != PAD].long().cpu()
        counts += torch.bincount(tokens, minlength=vocab_size)
    return counts.argsort(descending=True, stable=True)[:size].int()
