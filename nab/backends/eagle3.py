"""Published EAGLE-3 heads (Li et al. 2025, arXiv 2503.01840), read from their folders as they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRotaryEmbedding

from nab.backends import int8

PREFIXES = ("midlayer.", "layers.0.")
"""What the one layer's tensors start with: in SafeAILab's files, in those of ``speculators``."""

VARIANTS = ("norm_before_fc", "fc_norm", "norm_output")
"""Switches of EAGLE-3.1, which computes something else; ``norm_output`` does not show in the tensors."""

SMALLEST = 7
"""Layers from which 2, n // 2 and n - 3 are three different ones."""


@dataclass(frozen=True)
class Shape:
    """What a head reads and how it is built.

    Args:
        layer: of the one layer.
        layers: hidden states read, 0 the embeddings, i the input of layer i.
        target_width: of each of them.
        vocab_size: the target's.
        draft_vocab: tokens it can propose.
        norm_before_residual: the residual is the normalised feature.
        fc_bias: the fusion has a bias.
    """

    layer: LlamaConfig
    layers: tuple[int, ...]
    target_width: int
    vocab_size: int
    draft_vocab: int
    norm_before_residual: bool = False
    fc_bias: bool = False


class Eagle3(nn.Module):
    """A ``heads.FeatureModel``: next token's embedding and feature in, own feature out.

    Entry j of a text is (token j + 1, feature j) at position j, so the first token has none. A feature is the
    fusion of the target's hidden states or, where the target has not read that token yet, the own feature of
    the entry before. The law covers a part of the vocabulary. Names of modules are SafeAILab's.

    Args:
        shape: see there.
        tokens: ids of the draft vocabulary in the target's, ``(draft_vocab,)``.
    """

    skips_first = True
    tokens: Tensor

    def __init__(self, shape: Shape, tokens: Tensor) -> None:
        super().__init__()
        config: Any = shape.layer
        self.layers = shape.layers
        self.vocab_size = shape.vocab_size
        self.width: int = config.hidden_size
        self.embed_tokens = nn.Embedding(shape.vocab_size, self.width)
        self.fc = nn.Linear(len(shape.layers) * shape.target_width, self.width, bias=shape.fc_bias)
        self.midlayer = Layer(config, shape.norm_before_residual)
        self.norm = nn.RMSNorm(self.width, config.rms_norm_eps)
        self.lm_head = nn.Linear(self.width, shape.draft_vocab, bias=False)
        self.rotary = LlamaRotaryEmbedding(config)
        self.register_buffer("tokens", tokens, persistent=False)

    def fused(self, hidden: Tensor) -> Tensor:
        """``(..., layers, target_width)`` hidden states of the target to features ``(..., width)``."""
        features: Tensor = self.fc(hidden.flatten(-2))
        return features

    def forward(
        self, ids: Tensor, features: Tensor, *, positions: Tensor, mask: Tensor | None, cache: Cache
    ) -> Tensor:
        """See ``heads.FeatureModel``; own features are before the final norm."""
        rows, cached = ids.shape[1], cache.get_seq_length()
        if mask is None and rows > 1 and cached:  # sdpa's own causal mask would hide the newest entries
            mask = features.new_full((1, 1, rows, cached + rows), -torch.inf).triu(cached + 1)
        rotation = self.rotary(features, positions)
        own: Tensor = self.midlayer(self.embed_tokens(ids), features, rotation, mask, cache)
        return own

    def logits(self, own: Tensor) -> Tensor:
        """Over the draft vocabulary: own features ``(..., width)`` to ``(..., draft_vocab)``."""
        logits: Tensor = self.lm_head(self.norm(own))
        return logits


class Layer(nn.Module):
    """A Llama layer whose attention reads embedding and feature side by side, each behind its own norm.

    Args:
        config: of the layer.
        norm_before_residual: see ``Shape``.
    """

    def __init__(self, config: Any, norm_before_residual: bool) -> None:
        super().__init__()
        width, bias = config.hidden_size, config.attention_bias
        self.norm_before_residual = norm_before_residual
        self.self_attn: Any = LlamaAttention(config, 0)
        for name in ("q_proj", "k_proj", "v_proj"):
            rows = getattr(self.self_attn, name).out_features
            setattr(self.self_attn, name, nn.Linear(2 * width, rows, bias=bias))
        self.mlp: Any = LlamaMLP(config)  # type: ignore[no-untyped-call]
        # not LlamaRMSNorm, which computes in float32 whatever it is given
        self.hidden_norm = nn.RMSNorm(width, config.rms_norm_eps)
        self.input_layernorm = nn.RMSNorm(width, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(width, config.rms_norm_eps)

    def forward(
        self,
        embedded: Tensor,
        features: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: Cache,
    ) -> Tensor:
        """``(1, rows, width)`` embeddings and features to own features."""
        normed = self.hidden_norm(features)
        attended, _ = self.self_attn(
            torch.cat([self.input_layernorm(embedded), normed], -1),
            position_embeddings=rotation,
            attention_mask=mask,
            past_key_values=cache,
        )
        own: Tensor = (normed if self.norm_before_residual else features) + attended
        thought: Tensor = self.mlp(self.post_attention_layernorm(own))
        return own + thought


def is_head(folder: Path) -> bool:
    """Whether the ``config.json`` of a folder speaks of a head, for ``load`` to read or to refuse.

    It does by an ``eagle`` in the type or architecture, a draft vocabulary, or a type of ``speculators``.

    Raises:
        ValueError: if it is no JSON object.
    """
    file = folder / "config.json"
    config = _json(file) if file.exists() else {}
    called = f"{config.get('model_type')} {config.get('architectures')}".lower()
    return "eagle" in called or not config.keys().isdisjoint({"draft_vocab_size", "speculators_model_type"})


def load(folder: Path, target: PreTrainedModel) -> Eagle3:
    """A published head for ``target``, on its device and in its dtype, without gradients.

    Read are ``config.json`` and ``model.safetensors`` (or its index and parts) in SafeAILab's layout or that
    of ``speculators``; no code of the folder is run and nothing is unpickled. Without embeddings of its own
    the head shares the target's.

    Raises:
        FileNotFoundError: if a file is missing, naming it.
        ValueError: if a file cannot be read, is no EAGLE-3 head of one layer, or does not fit the target; the
            message names file and field or tensor, with what was found and what was expected.
    """
    file = folder / "config.json"
    source, weights = _tensors(folder)
    prefix = _prefix(weights, source)
    shape = _shape(_json(file), target, file, fc_bias="fc.bias" in weights)
    tokens = _tokens(weights, shape, source).to(target.device)
    if "embed_tokens.weight" not in weights:
        if shape.layer.hidden_size != shape.target_width:
            raise ValueError(
                f"{source}: embed_tokens.weight is missing, and the target's embeddings have width "
                f"{shape.target_width} where the head's is {shape.layer.hidden_size}"
            )
        ends: Any = target
        weights["embed_tokens.weight"] = ends.get_input_embeddings().weight.detach()
    with torch.device("meta"):
        model = Eagle3(shape, tokens)
    _check(weights, {_named(name, prefix): w.shape for name, w in model.state_dict().items()}, source)
    model.load_state_dict(
        {name: weights[_named(name, prefix)].to(target.device, target.dtype) for name in model.state_dict()},
        assign=True,
    )
    # its frequencies are no weights, and stay float32 in every dtype
    model.rotary = LlamaRotaryEmbedding(shape.layer).to(target.device)
    return model.requires_grad_(False)


def _named(name: str, prefix: str) -> str:
    """A module's tensor as the file calls it."""
    return name.replace(PREFIXES[0], prefix)


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no readable JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, found {type(content).__name__}")
    return content


def _tensors(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The file that speaks for all weights, and these, on the CPU."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():
        source, parts = whole, [whole]
    elif index.exists():
        places = _json(index).get("weight_map")
        if not isinstance(places, dict):
            raise ValueError(f"{index} has no weight_map")
        source, parts = index, [folder / Path(str(part)).name for part in sorted(set(places.values()))]
    else:
        pickles = sorted(f.name for f in folder.glob("*") if f.suffix in (".bin", ".pt", ".pth"))
        if not pickles:
            raise FileNotFoundError(f"{whole} is missing")
        raise ValueError(
            f"{folder} has {', '.join(pickles)} but no model.safetensors, and pickles are not read; convert "
            "them once: safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'model.safetensors')"
        )
    weights = {}
    for part in parts:
        if not part.exists():
            raise FileNotFoundError(f"{part} is missing")
        with int8.opened(part) as tensors:
            weights.update({name: tensors.get_tensor(name) for name in tensors.keys()})  # noqa: SIM118
    return source, weights


def _prefix(weights: Mapping[str, Tensor], source: Path) -> str:
    """What the layer's tensors start with."""
    found = [prefix for prefix in PREFIXES if any(name.startswith(prefix) for name in weights)]
    own_head = {"d2t", "lm_head.weight"} & weights.keys()
    if len(found) == 1 and (own_head or found[0] == PREFIXES[0]):
        return found[0]
    kind = "of EAGLE-1 or EAGLE-2, by its tensors" if found and not own_head else "no EAGLE-3 head"
    some = ", ".join(sorted(weights)[:6])
    raise ValueError(
        f"{source} is {kind}: EAGLE-3's are d2t, fc, lm_head and one of {' or '.join(PREFIXES)}, found {some}"
    )


def _shape(config: dict[str, Any], target: PreTrainedModel, file: Path, *, fc_bias: bool) -> Shape:
    """Of either layout, checked against the target."""
    layer = config
    if "speculators_model_type" in config or "transformer_layer_config" in config:
        if (kind := config.get("speculators_model_type")) != "eagle3":
            raise ValueError(f"{file}: speculators_model_type is {kind}, expected eagle3")
        layer = _part(config, "transformer_layer_config", file)
    switches = config | _part(config, "eagle_config", file)
    for name in VARIANTS:
        if switches.get(name):
            raise ValueError(f"{file}: {name} is {switches[name]}, which is EAGLE-3.1 and not supported")
    text: Any = target.config.get_text_config()
    vocab_size = _size(layer, "vocab_size", file)
    wanted = {
        "num_hidden_layers": (layer.get("num_hidden_layers", 1), 1),
        "vocab_size": (vocab_size, text.vocab_size),
        "target_hidden_size": (config.get("target_hidden_size") or text.hidden_size, text.hidden_size),
    }
    for name, (found, expected) in wanted.items():
        if found != expected:
            raise ValueError(f"{file}: {name} is {found}, expected {expected} for this target")
    draft_vocab = vocab_size
    if config.get("draft_vocab_size") is not None:
        draft_vocab = _size(config, "draft_vocab_size", file)
    return Shape(
        _llama(layer, file),
        _layers(config, text.num_hidden_layers, file),
        text.hidden_size,
        vocab_size,
        draft_vocab,
        bool(config.get("norm_before_residual")),
        fc_bias,
    )


def _part(config: Mapping[str, Any], name: str, file: Path) -> dict[str, Any]:
    part = config.get(name) or {}
    if not isinstance(part, dict):
        raise ValueError(f"{file}: {name} must be an object, found {part}")
    return part


def _size(config: Mapping[str, Any], name: str, file: Path) -> int:
    value = config.get(name)
    if type(value) is not int or value < 1:
        raise ValueError(f"{file}: {name} must be a positive integer, found {value}")
    return value


def _llama(layer: Mapping[str, Any], file: Path) -> LlamaConfig:
    """The one layer's; what is not given has transformers' default, as in the published code."""
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads")
    optional = (
        *("num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "attention_bias", "mlp_bias"),
        *("max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters"),
    )
    fields: dict[str, Any] = {name: _size(layer, name, file) for name in sizes}
    fields |= {name: layer[name] for name in optional if layer.get(name) is not None}
    fields |= {"num_hidden_layers": 1, "attn_implementation": "sdpa"}
    try:
        return LlamaConfig(**fields)
    except (StrictDataclassError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from None


def _layers(config: Mapping[str, Any], depth: int, file: Path) -> tuple[int, ...]:
    """Hidden states to read, as transformers counts them.

    ``speculators`` and vLLM count the inputs of layers, as transformers does; SpecForge, which keeps the ids
    in ``eagle_config``, counts outputs. All read them in rising order. transformers' last hidden state is
    behind the final norm, theirs before it, so it cannot be had.
    """
    name = "eagle_aux_hidden_state_layer_ids"
    given = config.get(name) or _part(config, "eagle_config", file).get(name)
    if not given:
        if depth < SMALLEST:
            raise ValueError(
                f"{file}: without {name} the hidden states 2, n // 2 and n - 3 are read, which needs a "
                f"target of at least {SMALLEST} layers, found {depth}"
            )
        return (2, depth // 2, depth - 3)
    if not isinstance(given, list) or any(type(i) is not int for i in given):
        raise ValueError(f"{file}: {name} must be a list of integers, found {given}")
    layers = tuple(given) if config.get(name) else tuple(i + 1 for i in given)
    if not 0 <= layers[0] <= layers[-1] < depth or list(layers) != sorted(set(layers)):
        raise ValueError(
            f"{file}: {name} must name rising inputs of the target's {depth} layers, found {given}"
        )
    return layers


def _tokens(weights: dict[str, Tensor], shape: Shape, source: Path) -> Tensor:
    """Target ids ``(draft_vocab,)`` of the draft vocabulary; takes d2t and t2d out of ``weights``."""
    ids = torch.arange(shape.draft_vocab)
    offsets, chosen = weights.pop("d2t", None), weights.pop("t2d", None)
    if offsets is None and shape.draft_vocab == shape.vocab_size:
        return ids
    _check({} if offsets is None else {"d2t": offsets}, {"d2t": ids.shape}, source)
    assert offsets is not None
    if offsets.is_floating_point() or offsets.dtype == torch.bool:
        raise ValueError(f"{source}: d2t must hold integers, found {offsets.dtype}")
    ids = ids + offsets
    if not 0 <= ids.min() <= ids.max() < shape.vocab_size:
        raise ValueError(
            f"{source}: d2t maps to ids between {int(ids.min())} and {int(ids.max())}, expected 0 to "
            f"{shape.vocab_size - 1}"
        )
    if (distinct := len(set(ids.tolist()))) < len(ids):
        raise ValueError(f"{source}: d2t maps {len(ids)} draft ids to only {distinct} tokens")
    if chosen is None or shape.draft_vocab == shape.vocab_size:  # SafeAILab leaves t2d empty where all count
        return ids
    _check({"t2d": chosen}, {"t2d": torch.Size([shape.vocab_size])}, source)
    if not torch.equal(chosen.nonzero()[:, 0], ids.sort().values):
        raise ValueError(f"{source}: t2d marks other tokens than d2t maps to ({int(chosen.sum())} marked)")
    return ids


def _check(weights: Mapping[str, Tensor], expected: Mapping[str, torch.Size], source: Path) -> None:
    for name, shape in expected.items():
        if name not in weights:
            raise ValueError(f"{source}: tensor {name} {tuple(shape)} is missing")
        if weights[name].shape != shape:
            found = tuple(weights[name].shape)
            raise ValueError(f"{source}: tensor {name} has shape {found}, expected {tuple(shape)}")
    if unknown := sorted(weights.keys() - expected.keys()):
        raise ValueError(f"{source}: unknown tensors {', '.join(unknown)}")
