"""Pools of drafters by name, for a given target."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import torch
from safetensors import safe_open

from nab.backends.drafters import Lookup, NGram
from nab.backends.pretrained import Pretrained, load
from nab.backends.torch import CausalLM, Lifted, Warper, early_exit
from nab.types import LanguageModel

EARLY_EXIT_LAYERS = 2
NGRAMS = Path(str(files("nab") / "data" / "ngrams"))


def shipped() -> dict[str, Path]:
    """The n-gram models that come with the package, over SmolLM2's vocabulary, by domain."""
    return {file.stem: file for file in sorted(NGRAMS.glob("*.safetensors"))}


def default(target: Pretrained) -> list[str]:
    """Names of every drafter that fits ``target`` without further files."""
    fitting = [name for name, file in shipped().items() if _metadata(file)["vocabulary"] == target.vocabulary]
    deep = target.model.config.get_text_config().num_hidden_layers > EARLY_EXIT_LAYERS
    return ["lookup", *["early-exit"] * deep, *fitting]


def split(names: str) -> list[str]:
    """Names separated by commas.

    Raises:
        ValueError: if one is empty.
    """
    found = [name.strip() for name in names.split(",")]
    if not all(found):
        raise ValueError(f"a drafter without a name in {names!r}")
    return found


def build(names: Sequence[str], target: Pretrained, warper: Warper) -> dict[str, LanguageModel]:
    """Drafters for ``target`` whose laws are processed as the target's.

    Args:
        names: ``lookup``, ``early-exit``, a shipped n-gram model, or a transformers folder with the same
            vocabulary, which is then called by the folder's name.
        target: shares its device and dtype.
        warper: the target's.

    Raises:
        ValueError: on an unknown name, the same name twice, or a drafter over another vocabulary.
    """
    pool: dict[str, LanguageModel] = {}
    for name in names:
        label = Path(name).name
        if label in pool:
            raise ValueError(f"drafter {label} is named twice")
        pool[label] = _build(name, target, warper)
    if not pool:
        raise ValueError("the pool needs at least one drafter")
    return pool


def _build(name: str, target: Pretrained, warper: Warper) -> LanguageModel:
    model = target.model
    law_dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    if name == "lookup":
        return Lifted(Lookup(target.vocab_size), warper, model.device, law_dtype, name)
    if name == "early-exit":
        return CausalLM(early_exit(model, EARLY_EXIT_LAYERS), warper, name=name)
    if name in shipped():
        _same_vocabulary(name, _metadata(shipped()[name])["vocabulary"], target)
        return Lifted(read_ngram(shipped()[name]), warper, model.device, law_dtype, name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        drafter = load(folder, dtype=str(model.dtype).removeprefix("torch."), device=str(model.device))
        _same_vocabulary(name, drafter.vocabulary, target)
        if drafter.vocab_size != target.vocab_size:
            sizes = f"{drafter.vocab_size} logits, the target {target.name} {target.vocab_size}"
            raise ValueError(f"drafter {name} has {sizes}")
        return CausalLM(drafter.model, warper, name=name)
    known = ", ".join(["lookup", "early-exit", *shipped()])
    raise ValueError(f"unknown drafter {name!r}: choose from {known}, or give a transformers folder")


def _same_vocabulary(name: str, vocabulary: str, target: Pretrained) -> None:
    if vocabulary != target.vocabulary:
        raise ValueError(f"drafter {name} has another vocabulary than the target {target.name}")


def _metadata(file: Path) -> dict[str, str]:
    with safe_open(file, framework="numpy") as tensors:
        return dict(tensors.metadata())


def read_ngram(file: Path) -> NGram:
    """An n-gram model from the safetensors file that ``scripts/ngrams.py`` writes."""
    with safe_open(file, framework="numpy") as tensors:
        return NGram.from_arrays({name: tensors.get_tensor(name) for name in tensors.keys()})  # noqa: SIM118
