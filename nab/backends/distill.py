"""Distils drafters from a target: a generalist on all domains, then one expert per domain from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from nab.backends import int8
from nab.backends.heads import HeadModel, Shape
from nab.backends.pretrained import llama_file
from nab.backends.teacher import PAD, Teacher, Unit
from nab.backends.training import Progress, Recipe, at_least, check_origin, fit, positive

CHUNK = 64
"""Positions whose loss a processor computes at once."""
HEAD_WIDTH = 32
DEFAULT_RECIPE = Recipe()


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
        kept = unit.hidden[:, :, -len(self.model.layers) :].to(self.model.output.dtype)
        own = self.model.unroll(unit.tokens.clamp_min(0), kept, depths)
        return [self.model.logits(features) for features in own]


def small_llama(
    vocab_size: int,
    width: int,
    intermediate: int,
    *,
    layers: int = 1,
    head_width: int = HEAD_WIDTH,
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
    """The loss and its gradient in one pass: on a processor over chunks that stay in its cache."""

    @staticmethod
    def forward(
        ctx: Any, unit: Unit, output: Tensor, weights: Tensor, rejection: float, *logits: Tensor
    ) -> Tensor:
        total, gradients = weights.new_zeros(()), [torch.empty_like(x) for x in logits]
        size = CHUNK if output.device.type == "cpu" else len(unit.tokens)
        for start in range(0, len(unit.tokens), size):
            rows = slice(start, start + size)
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
        width: of a standalone drafter, a multiple of ``HEAD_WIDTH``; None makes heads.
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

    def __post_init__(self) -> None:
        at_least(self, draft_vocab=1, intermediate=1, depths=1, text=0, answers=0, batch=1, seed=0)
        positive(self, "generalist_passes", "expert_passes", "expert_rate")
        if self.width is not None and (self.width < 1 or self.width % HEAD_WIDTH):
            raise ValueError(f"width must be a positive multiple of {HEAD_WIDTH}, got {self.width}")
        if not self.names():
            raise ValueError("text and answers must not both be 0: there would be nothing to learn from")

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


def origin(teacher: Teacher, domains: Sequence[str], plan: Plan, start: Path | None) -> dict[str, Any]:
    """What a drafter depends on: plan, target, text of its domains and the drafter to start from."""
    data = {d: {k: v for k, v in teacher.data(d).items() if k in ("sha256", "requests")} for d in domains}
    found = {"plan": asdict(plan), "target": teacher.target.checksum, "layers": teacher.layers, "data": data}
    return found | ({"start": hashlib.sha256(start.read_bytes()).hexdigest()} if start else {})


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
        folder: of checkpoint and learning curve; an interrupted run of the same ``origin`` goes on.
        start: drafter to start from, as ``int8.save`` wrote it; a head's draft vocabulary may differ.
        progress: see ``fit``.

    Returns:
        Weights and metadata for ``int8.save``, with the seconds that ``fit`` counted.

    Raises:
        ValueError: if the checkpoint is of another origin.
    """
    made_of = origin(teacher, domains, plan, start)
    check_origin(folder / "checkpoint.safetensors", made_of)
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
    seconds = fit(model, loss, steps=steps, folder=folder, recipe=recipe, progress=progress, origin=made_of)
    seen = steps * plan.batch * teacher.rows * teacher.length
    if plan.width is None:
        weights = model.state_dict()
        kind = {"kind": "head", "shape": model.shape.to_json(), "width": str(output.shape[1])}
    else:
        weights, config = llama_file(model)
        kind = {"kind": "standalone", **config}
    learned = {"vocabulary": teacher.target.vocabulary, "domains": ",".join(domains), "tokens": str(seen)}
    made = {"seconds": str(round(seconds)), "origin": json.dumps(made_of)}
    return weights, kind | learned | made


def draft_vocabulary(units: Iterable[Unit], size: int, vocab_size: int) -> Tensor:
    """The ``size`` most frequent tokens of ``units``, by falling frequency."""
    if size > vocab_size:
        raise ValueError(f"draft_vocab must be at most {vocab_size}, the target's vocabulary, got {size}")
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for unit in units:
        tokens = unit.tokens[unit.tokens != PAD].long().cpu()
        counts += torch.bincount(tokens, minlength=vocab_size)
    return counts.argsort(descending=True, stable=True)[:size].int()
