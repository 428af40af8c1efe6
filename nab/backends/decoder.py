"""The decoder of Llama's family as one function of weights and entries, for one model or several stacked.

The arithmetic is that of transformers' Llama, Mistral, Qwen2 and Qwen3; what is around it there (masks made
anew in each layer's terms, hooks, one multiplication for each of query, key and value) is left out, which is
most of the time that a small model takes. Other models are read by transformers itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu
from transformers import LlamaModel, MistralModel, Qwen2Model, Qwen3Model
from transformers.cache_utils import Cache

Window = int | None
"""How many positions back a layer sees, itself included; None without limit."""


class Matrix(NamedTuple):
    """A linear map: weight ``(out, in)``, bias ``(out,)`` or None; of n members, one more axis in front."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """``(rows, entries, in)`` to ``(rows, entries, out)``; members take equal parts of the rows."""
        if self.weight.dim() == 2:
            return linear(x, self.weight, self.bias)
        members = x.reshape(len(self.weight), -1, x.shape[-1])
        y = torch.bmm(members, self.weight.mT)
        if self.bias is not None:
            y = y + self.bias[:, None]
        return y.view(*x.shape[:-1], -1)


class Norm(NamedTuple):
    """Root-mean-square norm: scale ``(..., width)``, with n members one more axis in front."""

    scale: Tensor
    eps: float
    members: int | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """``(rows, ..., width)``, or ``(rows, heads, entries, width)`` where heads have their own scales."""
        if self.members is None and self.scale.dim() == 1 and x.dtype == torch.float32:
            return rms_norm(x, self.scale.shape, self.scale, self.eps)
        y = self._scaled(x)
        if self.members is None:
            return y * (self.scale if self.scale.dim() == 1 else self.scale[:, None])
        y = y.view(self.members, -1, *x.shape[1:])
        scale = self.scale[:, None, None] if self.scale.dim() == 2 else self.scale[:, None, :, None]
        return (y * scale).view(x.shape)

    def _scaled(self, x: Tensor) -> Tensor:
        """Rounded where transformers rounds: in float64 it computes in float32, operation by operation."""
        if x.dtype != torch.float64:
            return rms_norm(x, x.shape[-1:], None, self.eps)
        y = x.float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)).double()


@dataclass(frozen=True)
class Layer:
    """Weights of one layer.

    Args:
        before: norm in front of attention.
        project: to queries, keys and values, heads side by side.
        heads: norm of queries and keys, where there is one.
        attend: back from attention.
        between: norm in front of the feed-forward part.
        widen: to its gate and its values, side by side.
        narrow: back from it.
        window: see there.
    """

    before: Norm
    project: Matrix
    heads: Norm | None
    attend: Matrix
    between: Norm
    widen: Matrix
    narrow: Matrix
    window: Window


class Angles:
    """Cosines and sines of rotary embeddings, computed once for each position.

    Args:
        rotary: transformers' module that computes them, for a base that does not depend on the text's length.
        like: of the device and dtype wanted.
    """

    def __init__(self, rotary: nn.Module, like: Tensor) -> None:
        self._rotary, self._like = rotary, like
        self._table = torch.empty(2, 0)

    def __call__(self, positions: range | Tensor, end: int) -> Tensor:
        """Cosines and sines ``(2, ..., width of a head)`` of positions ``(...,)``, all below ``end``."""
        if end > self._table.shape[1]:
            every = torch.arange(max(2 * end, 1024), device=self._like.device)
            self._table = torch.cat(self._rotary(self._like, every[None]))
        if isinstance(positions, range):
            return self._table[:, positions.start : positions.stop]
        return self._table[:, positions]


@dataclass(frozen=True)
class Decoder:
    """Layers, final norm and rotary embedding.

    Args:
        layers: one at least.
        norm: behind them.
        angles: see there.
        shape: queries, keys and width of a head.
    """

    layers: Sequence[Layer]
    norm: Norm
    angles: Angles
    shape: tuple[int, int, int]

    @classmethod
    def of(cls, model: Any) -> Decoder | None:
        """That of a transformers model without its head; None if it is none of the family, or was changed.

        Its weights are shared: matrices that are read together are laid side by side, and the model's
        parameters become views of them.
        """
        if type(model) not in _FAMILY:
            return None
        config: Any = model.config
        rope = model.rotary_emb
        plain = all(
            type(part) in (nn.Linear, nn.Embedding) or type(part).__name__ in _PARTS or part is model
            for part in model.modules()
        )
        if (
            not plain
            or hooked(model.modules())
            or config._attn_implementation not in ("sdpa", "eager")
            or config.hidden_act != "silu"
            or rope.rope_type not in ("default", "linear", "llama3", "yarn")
            or model.layers[0].mlp.act_fn.__class__.__name__ not in ("SiLU", "SiLUActivation")
        ):
            return None
        kinds = getattr(config, "layer_types", None)
        window = getattr(config, "sliding_window", None)
        layers = model.layers
        windows = [
            window if kinds is None or kinds[k] == "sliding_attention" else None for k in range(len(layers))
        ]
        attention = layers[0].self_attn
        shape = config.num_attention_heads, config.num_key_value_heads, attention.head_dim
        read = [_layer(layer, shape, each) for layer, each in zip(layers, windows, strict=True)]
        return cls(read, _norm(model.norm), Angles(rope, model.norm.weight), shape)

    @property
    def windows(self) -> set[Window]:
        """Of all layers."""
        return {layer.window for layer in self.layers}

    def __call__(
        self,
        x: Tensor,
        cache: Cache,
        positions: range | Tensor,
        masks: Mapping[Window, Tensor | None],
    ) -> list[Tensor]:
        """Read entries.

        Args:
            x: ``(rows, entries, width)`` embeddings.
            cache: holds the keys and values of the entries before, and gets those of these.
            positions: of the entries, or ``(rows, entries)``.
            masks: by window, added to attention scores ``(..., entries, all entries)``; None for a single
                entry that sees all, or a chain in an empty cache.

        Returns:
            Hidden states ``(rows, entries, width)``: ``x``, behind each layer but the last, and behind the
            final norm.
        """
        queries, keys, width = self.shape
        rows, entries, _ = x.shape
        end = entries + cache.get_seq_length()
        cos, sin = self.angles(positions, end).unsqueeze(-3)
        states = [x]
        for number, layer in enumerate(self.layers):
            heads = layer.project(layer.before(x)).view(rows, entries, -1, width).transpose(1, 2)
            turned = heads[:, : queries + keys]
            if layer.heads is not None:
                turned = layer.heads(turned)
            first, second = turned.chunk(2, -1)
            turned = turned * cos + torch.cat([-second, first], -1) * sin
            known, values = cache.update(turned[:, queries:], heads[:, queries + keys :], number)
            seen = scaled_dot_product_attention(
                turned[:, :queries],
                known,
                values,
                masks[layer.window],
                is_causal=entries > 1 and masks[layer.window] is None,
                enable_gqa=queries > keys,
            )
            x = x + layer.attend(seen.transpose(1, 2).reshape(rows, entries, -1))
            gate, value = layer.widen(layer.between(x)).chunk(2, -1)
            x = x + layer.narrow(silu(gate) * value)
            states.append(x)
        states[-1] = self.norm(x)
        return states


_FAMILY = (LlamaModel, MistralModel, Qwen2Model, Qwen3Model)
_PARTS = {
    *("ModuleList", "SiLU", "SiLUActivation"),
    *(f"{name}{part}" for name in ("Llama", "Mistral", "Qwen2", "Qwen3")
      for part in ("DecoderLayer", "Attention", "MLP", "RMSNorm", "RotaryEmbedding")),
}  # fmt: skip


def hooked(modules: Iterable[nn.Module]) -> bool:
    """Whether somebody watches or changes what they compute; transformers' own hooks wait to be asked."""
    hooks = [
        hook for m in modules for each in (m._forward_hooks, m._forward_pre_hooks) for hook in each.values()
    ]
    return not all(str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks)


class Parts(NamedTuple):
    """A drafter taken apart.

    Args:
        entry: matrices and tensors from tokens to the first layer, ``(...)``.
        decoder: its layers.
        head: from hidden states to logits.
        vocabulary: ids that logits are over, ``(draft vocab,)``; None is the target's.
    """

    entry: tuple[Matrix | Tensor, ...]
    decoder: Decoder
    head: Matrix
    vocabulary: Tensor | None = None


def form(part: Any) -> Any:
    """What parts must have in common to be stacked: all but the values of their weights."""
    if isinstance(part, Tensor):
        return tuple(part.shape), part.dtype, part.device
    if isinstance(part, Angles):
        return part(range(1, 3), 3).tolist()
    if isinstance(part, Decoder | Layer):
        return [form(getattr(part, field.name)) for field in fields(part)]
    return [form(each) for each in part] if isinstance(part, tuple | list) else part


def stack(*parts: Any) -> Any:
    """The same part of several members as one, whose rows are theirs in turn.

    Args:
        parts: of the same ``form``.
    """
    return _stack(parts, {})


def _stack(parts: Sequence[Any], made: dict[Any, Tensor]) -> Any:
    """See ``stack``; tensors that are one (an embedding and a head may be) stay one."""
    first = parts[0]
    if isinstance(first, Tensor):
        which = tuple((part.data_ptr(), part.shape) for part in parts)
        if which not in made:
            made[which] = torch.stack(list(parts))
        return made[which]
    if isinstance(first, Norm):
        return Norm(_stack([part.scale for part in parts], made), first.eps, len(parts))
    if isinstance(first, Decoder | Layer):
        names = [field.name for field in fields(first)]
        return type(first)(*(_stack([getattr(part, name) for part in parts], made) for name in names))
    if isinstance(first, tuple | list) and not all(isinstance(each, int) for each in first):
        together = [_stack(each, made) for each in zip(*parts, strict=True)]
        return type(first)(*together) if hasattr(first, "_fields") else type(first)(together)
    return first


def member(whole: Any, i: int) -> Any:
    """Inverse of ``stack``: the i-th member's part, a view."""
    if isinstance(whole, Tensor):
        return whole[i]
    if isinstance(whole, Norm):
        return Norm(whole.scale[i], whole.eps)
    if isinstance(whole, Decoder | Layer):
        return type(whole)(*(member(getattr(whole, field.name), i) for field in fields(whole)))
    if isinstance(whole, tuple | list) and not all(isinstance(each, int) for each in whole):
        alone = [member(each, i) for each in whole]
        return type(whole)(*alone) if hasattr(whole, "_fields") else type(whole)(alone)
    return whole


def tensors(part: Any) -> Iterator[Tensor]:
    """All of a part, in an order that depends on its ``form`` alone."""
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, Decoder | Layer):
        for field in fields(part):
            yield from tensors(getattr(part, field.name))
    elif isinstance(part, tuple | list):
        for each in part:
            yield from tensors(each)


def share(module: nn.Module, before: Any, now: Any) -> None:
    """Make parameters that are views of a part's tensors views of those that replace them."""
    places = {
        old.untyped_storage().data_ptr(): (old, new)
        for old, new in zip(tensors(before), tensors(now), strict=True)
    }
    for weight in (*module.parameters(), *module.buffers()):
        if (pair := places.get(weight.untyped_storage().data_ptr())) is not None:
            old, new = pair
            at = new.storage_offset() + weight.storage_offset() - old.storage_offset()
            weight.data = new.as_strided(weight.shape, weight.stride(), at)


def _layer(layer: Any, shape: tuple[int, int, int], window: Window) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    queries, keys, _ = shape
    heads = None
    if hasattr(attention, "q_norm"):
        scales = [attention.q_norm.weight.expand(queries, -1), attention.k_norm.weight.expand(keys, -1)]
        heads = Norm(torch.cat(scales), attention.q_norm.variance_epsilon)
    return Layer(
        _norm(layer.input_layernorm),
        _side_by_side(attention.q_proj, attention.k_proj, attention.v_proj),
        heads,
        Matrix(attention.o_proj.weight, attention.o_proj.bias),
        _norm(layer.post_attention_layernorm),
        _side_by_side(mlp.gate_proj, mlp.up_proj),
        Matrix(mlp.down_proj.weight, mlp.down_proj.bias),
        window,
    )


def _norm(norm: Any) -> Norm:
    return Norm(norm.weight, norm.variance_epsilon)


def _side_by_side(*parts: nn.Linear) -> Matrix:
    """One map for several of the same input; the parts become views of it, so that no memory is doubled."""
    return Matrix(*(_joined(parts, name) for name in ("weight", "bias")))  # type: ignore[arg-type]


def _joined(parts: Sequence[nn.Linear], name: str) -> Tensor | None:
    whole = [getattr(part, name) for part in parts]
    if whole[0] is None:
        return None
    ends, at = [], whole[0].storage_offset()
    for each in whole:
        ends.append(at == each.storage_offset() and each.is_contiguous())
        at += each.numel()
    if all(ends) and len({each.untyped_storage().data_ptr() for each in whole}) == 1:  # they are already
        rows = sum(len(each) for each in whole)
        return torch.as_strided(whole[0].data, (rows, *whole[0].shape[1:]), whole[0].stride())
    joined = torch.cat([each.data for each in whole])
    views = torch.split(joined, [len(each) for each in whole])
    for part, view in zip(parts, views, strict=True):
        getattr(part, name).data = view
    return joined
