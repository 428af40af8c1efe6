"""Pools of drafters by name, for a given target."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from nab.backends import eagle3, heads, int8
from nab.backends.drafters import Lookup, NGram
from nab.backends.heads import Head, Shape
from nab.backends.pretrained import Pretrained, load, load_llama
from nab.backends.torch import CausalLM, Certain, Lifted, Warper, early_exit
from nab.types import LanguageModel

EARLY_EXIT_LAYERS = 2
"""Layers of the target that ``early-exit`` drafts with."""

FOR_ANY_TARGET = ("lookup", "early-exit")
"""Names of drafters that need nothing but the target."""

DATA = Path(str(files("nab") / "data"))
"""What comes with the package: a folder a target, and ``NGRAMS``."""

NGRAMS = DATA / "ngrams"
"""The n-gram models for SmolLM2's tokens."""


def shipped(target: Pretrained) -> dict[str, Path]:
    """The drafter files that come with the package and fit ``target``, by name, the generalist first."""
    files = sorted(DATA.glob("*/*.safetensors"), key=lambda file: (file.stem != "generalist", file.stem))
    return {file.stem: file for file in files if not _misfit(int8.metadata(file), target)}


def default(target: Pretrained) -> list[str]:
    """Names of every drafter that fits ``target`` without further files.

    Early exit, an untrained drafter, stands in where no trained one comes with the package.
    """
    fitting = shipped(target)
    trained = any("kind" in int8.metadata(file) for file in fitting.values())
    deep = target.model.config.get_text_config().num_hidden_layers > EARLY_EXIT_LAYERS
    return ["lookup", *["early-exit"] * (deep and not trained), *fitting]


def split(names: str) -> list[str]:
    """Names separated by commas.

    Raises:
        ValueError: if one is empty.
    """
    found = [name.strip() for name in names.split(",")]
    if not all(found):
        raise ValueError(f"a drafter without a name in {names!r}")
    return found


def called(name: str | Path) -> str:
    """How reports call a drafter that is given by name or path."""
    return Path(name).name.removesuffix(".safetensors")


def build(
    names: Sequence[str], target: Pretrained, model: CausalLM, warper: Warper | None = None
) -> dict[str, LanguageModel]:
    """Drafters for ``target``.

    Args:
        names: ``lookup``, ``early-exit``, a shipped drafter, a safetensors file that ``train_drafters.py`` or
            ``ngrams.py`` wrote, a folder of an EAGLE-3 head, or a transformers folder with the same
            vocabulary; files and folders are then called by their name.
        target: shares its device and dtype.
        model: the target as it decodes; heads read its hidden states.
        warper: what processes the drafters' laws; None is the target's.

    Raises:
        ValueError: on an unknown name, the same name twice, or a drafter that does not fit the target.
        OSError: if a folder lacks a file.
    """
    pool: dict[str, LanguageModel] = {}
    for name in names:
        label = called(name)
        if label in pool:
            raise ValueError(f"drafter {label} is named twice")
        pool[label] = _build(name, target, model, warper or model.warper)
    if not pool:
        raise ValueError("the pool needs at least one drafter")
    return pool


def _build(name: str, target: Pretrained, model: CausalLM, warper: Warper) -> LanguageModel:
    if name == "lookup":
        return lifted(Lookup(target.vocab_size), model, warper, name, Certain)
    if name == "early-exit":
        return CausalLM(early_exit(model.model, EARLY_EXIT_LAYERS), warper, name=name)
    available = shipped(target)
    path = available.get(name) or Path(name).expanduser()
    if path.is_file():
        return _read(path, name, target, model, warper)
    if path.is_dir() and eagle3.is_head(path):
        return Head(eagle3.load(path, target.model), model, warper, name=path.name)
    if path.is_dir():
        dtype, device = str(model.model.dtype).removeprefix("torch."), str(model.model.device)
        drafter = load(path, dtype=dtype, device=device)
        if drafter.vocabulary != target.vocabulary:
            raise ValueError(f"drafter {name} has another vocabulary than the target {target.name}")
        if drafter.vocab_size != target.vocab_size:
            sizes = f"{drafter.vocab_size} logits, the target {target.name} {target.vocab_size}"
            raise ValueError(f"drafter {name} has {sizes}")
        return CausalLM(drafter.model, warper, name=path.name)
    known = ", ".join([*FOR_ANY_TARGET, *available])
    raise ValueError(
        f"no drafter {name!r} for the target {target.name}: choose from {known}, or give a file or a "
        "transformers folder"
    )


def _read(file: Path, name: str, target: Pretrained, model: CausalLM, warper: Warper) -> LanguageModel:
    """A drafter from its file, by the kind in its metadata."""
    metadata = int8.metadata(file)
    if misfit := _misfit(metadata, target):
        raise ValueError(f"drafter {name} {misfit} the target {target.name}")
    kind = metadata.get("kind", "ngram")
    if kind == "ngram":
        return lifted(read_ngram(file), model, warper, name)
    if kind == "standalone":
        drafter = load_llama(file).to(model.model.device, model.model.dtype)
        return CausalLM(drafter, warper, name=name)
    if kind == "head":
        head = heads.build(int8.load(file), Shape.from_json(metadata["shape"]), model.model)
        return Head(head, model, warper, name=name)
    raise ValueError(f"{file} holds a {kind}, not a drafter")


def _misfit(metadata: dict[str, str], target: Pretrained) -> str:
    """What keeps a drafter from this target; empty if nothing."""
    config = target.model.config.get_text_config()
    if "vocabulary" not in metadata:
        return "is no drafter for"
    if metadata["vocabulary"] != target.vocabulary:
        return "has another vocabulary than"
    layers = [0] if "shape" not in metadata else Shape.from_json(metadata["shape"]).layers
    width = int(metadata.get("width", config.hidden_size))
    if width != config.hidden_size or max(layers) > config.num_hidden_layers:
        return "reads hidden states of another shape than those of"
    return ""


def lifted(
    drafter: LanguageModel, model: CausalLM, warper: Warper, name: str, kind: type[Lifted] = Lifted
) -> Lifted:
    """A numpy model where the target is, in the dtype of its laws."""
    return kind(drafter, warper, model.model.device, model.law_dtype, name)


def read_ngram(file: Path) -> NGram:
    """An n-gram model from the safetensors file that ``scripts/ngrams.py`` writes."""
    with int8.opened(file, "numpy") as tensors:
        return NGram.from_arrays({name: tensors.get_tensor(name) for name in tensors.keys()})  # noqa: SIM118
