"""Drafters for a model of transformers that its user has loaded, and selectors over them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from nab.backends import pool
from nab.backends.decoder import hooked
from nab.backends.heads import Head
from nab.backends.pretrained import Pretrained
from nab.backends.torch import CausalLM, Lifted, Process, Warper
from nab.checks import whole
from nab.learners import NormalHedge
from nab.losses import Time
from nab.selector import Chooses, Selector, argmax, draw
from nab.types import LanguageModel, Learner, Objective
from nab.wrappers import seldom

_LOCKS = WeakKeyDictionary[PreTrainedModel, RLock]()
"""One a target, see ``Members.alone``."""

Drafter = PreTrainedModel | LanguageModel | str | Path
"""A model of transformers, a numpy model, or a name or path as ``nab.backends.pool.build`` takes it."""


class Members:
    """Drafters that follow a target, whichever it is.

    Args:
        drafters: by name, or in a sequence.
        tokenizer: the target's; without it the names are ``lookup`` and ``early-exit``, and it is looked for
            where the target comes from, to be compared with those of drafters.

    Raises:
        ValueError: on no drafter, or a name without tokenizer.
    """

    def __init__(self, drafters: Sequence[Drafter] | Mapping[str, Drafter], tokenizer: Any = None) -> None:
        if not isinstance(drafters, Sequence | Mapping) or isinstance(drafters, str):
            raise ValueError(f"drafters must be a sequence or a mapping, got {type(drafters).__name__}")
        named = drafters if isinstance(drafters, Mapping) else _named(drafters)
        if not named:
            raise ValueError("drafters must be at least one, got none")
        for each in named.values():
            if not (isinstance(each, str | Path | PreTrainedModel) or hasattr(each, "score")):
                raise ValueError(f"a drafter must be a model, a name or a path, got {each!r}")
            if tokenizer is None and isinstance(each, str | Path) and each not in pool.FOR_ANY_TARGET:
                known = " and ".join(pool.FOR_ANY_TARGET)
                raise ValueError(
                    f"drafter {str(each)!r} needs the target's tokenizer: without, there are {known}"
                )
        self._given, self._tokenizer = dict(named), tokenizer
        self._target: CausalLM | None = None
        self._made_of: Any = None
        self._drafters: dict[str, LanguageModel] = {}

    @property
    def names(self) -> list[str]:
        """The drafters', in the order of their indices."""
        return list(self._given)

    def of(
        self, model: PreTrainedModel, config: GenerationConfig
    ) -> tuple[CausalLM, dict[str, LanguageModel]]:
        """The target and its drafters by name, whose laws are tempered as ``config`` says.

        They are made once for a model as it is; anew where modules, parameters, buffers or hooks have changed
        since, of the target or a drafter.

        Raises:
            ValueError: on a model that cannot be rewound, or a drafter that does not fit it.
        """
        models = self._models(model)
        made_of = list(map(_identity, models))
        if self._target is None or self._made_of != made_of:
            name = _name(model)
            self._target = CausalLM(model, name=name)
            self._target.context = None  # generate goes on beyond it
            pretrained = Pretrained(name, model, self._tokenizer)
            self._drafters = {
                name: self._made(name, each, pretrained, self._target) for name, each in self._given.items()
            }
            self._made_of = list(map(_identity, models))  # making may lay weights side by side
        # what processors do to logits is done before; numpy models and heads have a warper alone
        warper = _warper(config)
        alike = Warper() if config.do_sample else Warper(0)
        self._target.warper = alike
        for name, each in self._drafters.items():
            if isinstance(each, CausalLM):
                each.warper = alike
            elif isinstance(each, Head):
                each.warper = warper
            elif isinstance(each, Lifted):
                self._drafters[name] = replace(each, warper=warper)
        return self._target, self._drafters

    @contextmanager
    def alone(self, model: PreTrainedModel) -> Iterator[None]:
        """For the time being, no other hook has this target, and all models are in eval mode.

        What drops at random has no law to keep to.
        """
        models = self._models(model)
        with _LOCKS.setdefault(model, RLock()):
            modes = [(module, module.training) for each in models for module in each.modules()]
            for each in models:
                each.train(False)
            try:
                yield
            finally:
                for module, mode in modes:
                    module.training = mode

    def _models(self, target: PreTrainedModel) -> list[PreTrainedModel]:
        return [target, *(each for each in self._given.values() if isinstance(each, PreTrainedModel))]

    def forget(self) -> None:
        """Begin with empty caches: what a model computes may have changed in ways that nobody can see."""
        for each in (self._target, *self._drafters.values()):
            if isinstance(each, CausalLM | Head):
                each.reset()

    def _made(self, name: str, given: Drafter, pretrained: Pretrained, target: CausalLM) -> LanguageModel:
        if isinstance(given, str | Path):
            (made,) = pool.build([str(given)], pretrained, target).values()
            return made
        if isinstance(given, PreTrainedModel):
            own, wanted = given.config.get_text_config().vocab_size, pretrained.vocab_size
            if own != wanted:
                raise ValueError(
                    f"drafter {name} has another vocabulary than the target: {own} tokens, not {wanted}"
                )
            theirs = _vocabulary(pretrained.model, self._tokenizer), _vocabulary(given)
            if None not in theirs and theirs[0] != theirs[1]:
                raise ValueError(
                    f"drafter {name} has another tokenizer than the target, at {given.name_or_path}"
                )
            return CausalLM(given, name=name)
        if isinstance(given, CausalLM | Head | Lifted):
            raise ValueError(
                f"drafter {name} must be a model of transformers or of numpy, got a {type(given).__name__}"
            )
        return pool.lifted(given, target, target.warper, name)


def have_process(models: Iterable[Any], process: Process) -> None:
    """Have those that are models of transformers process their logits so."""
    for each in models:
        if isinstance(each, CausalLM):
            each.process = process


def _named(drafters: Sequence[Drafter]) -> dict[str, Drafter]:
    """Names for drafters: their own, with a number where several have the same."""
    found: dict[str, Drafter] = {}
    for each in drafters:
        if isinstance(each, PreTrainedModel):
            name = _name(each)
        else:
            name = pool.called(each) if isinstance(each, str | Path) else type(each).__name__
        same = sum(known.split("#")[0] == name for known in found)
        found[f"{name}#{same + 1}" if same else name] = each
    return found


def _name(model: PreTrainedModel) -> str:
    return Path(model.name_or_path or "").name or type(model).__name__


def _identity(model: PreTrainedModel) -> Any:
    """Differs where what a ``CausalLM`` of this model reads with would be another."""
    modules, tensors = list(model.modules()), [*model.parameters(), *model.buffers()]
    return [*map(id, modules), hooked(modules), *((id(t), t.data_ptr(), t._version) for t in tensors)]


_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def _vocabulary(model: PreTrainedModel, tokenizer: Any = None) -> dict[str, int] | None:
    """Tokens by name; None where the model does not come from a place with a tokenizer."""
    source = model.name_or_path
    try:
        found = tokenizer or (source and AutoTokenizer.from_pretrained(source, **_LOCAL))
    except (OSError, ValueError):
        return None
    return dict(found.get_vocab()) if found else None


def seeds(config: GenerationConfig) -> list[np.random.SeedSequence]:
    """Two, by torch's default generator, which greedy generation leaves as it is."""
    with torch.random.fork_rng(devices=[], enabled=not config.do_sample):
        return np.random.SeedSequence(int(torch.randint(2**62, ()))).spawn(2)


def _warper(config: GenerationConfig) -> Warper:
    if not config.do_sample:
        return Warper(0)
    temperature = 1.0 if config.temperature is None else config.temperature
    return Warper(temperature, config.top_k or 0, config.top_p or 1.0)


class Selecting:
    """Makes a fresh selector for every answer.

    Args:
        learner: of the selectors; None is ``NormalHedge()``.
        draft_len: at least 1.
        objective: None is seconds per token, whose costs all selectors share; then drafters are scored now
            and then (``nab.wrappers.seldom``) and the mode is played.

    Raises:
        ValueError: on a draft length below 1.
    """

    def __init__(self, learner: Learner[Any] | None, draft_len: int, objective: Objective | None) -> None:
        whole("draft_len", draft_len, 1)
        learner = learner or NormalHedge()
        if isinstance(learner, type) or not hasattr(learner, "update"):
            raise ValueError(f"learner must be one of nab.learners or the like, got {learner!r}")
        if isinstance(objective, type) or not (objective is None or callable(objective)):
            raise ValueError(f"objective must be one of nab.losses or the like, got {objective!r}")
        self._learner, self._objective = learner, Time(draft_len) if objective is None else objective

    def __call__(self, n: int, seed: Any) -> Chooses:
        """One over n drafters."""
        timed = isinstance(self._objective, Time)
        pick = argmax if timed else draw
        selector = Selector(self._learner, n, objective=self._objective, pick=pick, rng=seed)
        return seldom(selector) if timed else selector
