"""Feature-level drafters: one layer that reads the target's hidden states (EAGLE; Li et al. 2024)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers import DynamicCache, LlamaConfig, LlamaModel, PreTrainedModel

from nab.backends.cache import common_prefix
from nab.backends.torch import CausalLM, Warper


@dataclass(frozen=True)
class Shape:
    """What a head reads and how large it is; widths and attention heads are the target's.

    Args:
        layers: hidden states read, 0 the embeddings, ``num_hidden_layers`` the final ones behind the norm.
        intermediate_size: width of the feed-forward part.
        draft_vocab: tokens it can propose, by falling frequency.
    """

    layers: tuple[int, ...]
    intermediate_size: int
    draft_vocab: int

    def to_json(self) -> str:
        """For a file's metadata."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Shape:
        """Inverse of ``to_json``."""
        values = json.loads(text)
        return cls(**{**values, "layers": tuple(values["layers"])})


class HeadModel(nn.Module):
    """Token embedding and feature in, next feature out: ``h_k = block(mix[e(x_k); g_(k-1)])``.

    ``g`` is the target's feature of the token before, or, where the target has not read that token yet, the
    head's own ``h`` of it. The law of token k + 1 is the softmax of a frozen slice of the target's head on
    ``h_k``. Embedding and slice belong to the target and are no parameters.

    Args:
        shape: see there.
        target: gives widths, embedding and output matrix, on its device and in its dtype.
        tokens: ids of the draft vocabulary, ``(draft_vocab,)``.

    Raises:
        ValueError: if the draft vocabulary has another size than ``shape`` says, or ids outside the target's.
    """

    embedding: Tensor
    output: Tensor
    tokens: Tensor

    def __init__(self, shape: Shape, target: PreTrainedModel, tokens: Tensor) -> None:
        super().__init__()
        config: Any = target.config.get_text_config()
        if tokens.shape != (shape.draft_vocab,) or not 0 <= tokens.min() <= tokens.max() < config.vocab_size:
            raise ValueError(
                f"the draft vocabulary needs {shape.draft_vocab} ids below {config.vocab_size}, got "
                f"{tuple(tokens.shape)} between {int(tokens.min())} and {int(tokens.max())}"
            )
        self.shape = shape
        width = config.hidden_size
        parameters: dict[str, Any] = {"device": target.device, "dtype": target.dtype}
        self.fuse: nn.Module = nn.Identity()  # one feature is in the space that own features live in
        if len(shape.layers) > 1:
            self.fuse = nn.Linear(len(shape.layers) * width, width, bias=False, **parameters)
        self.mix = nn.Linear(2 * width, width, bias=False, **parameters)
        self.block = LlamaModel(
            LlamaConfig(
                vocab_size=1,
                hidden_size=width,
                intermediate_size=shape.intermediate_size,
                num_hidden_layers=1,
                num_attention_heads=config.num_attention_heads,
                num_key_value_heads=getattr(config, "num_key_value_heads", config.num_attention_heads),
                head_dim=getattr(config, "head_dim", None),
                max_position_embeddings=config.max_position_embeddings,
                rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
                pad_token_id=None,
            )
        ).to(**parameters)
        del self.block.embed_tokens
        with torch.no_grad():
            self.mix.weight[:, width:] += torch.eye(width, **parameters)
        tokens = tokens.to(target.device)
        self.register_buffer("tokens", tokens)
        ends: Any = target
        self.register_buffer("embedding", ends.get_input_embeddings().weight.detach(), persistent=False)
        output = ends.get_output_embeddings().weight.detach()[tokens].clone()
        self.register_buffer("output", output, persistent=False)

    def inputs(self, tokens: Tensor, features: Tensor) -> Tensor:
        """Of the block: ``(..., width)`` from ids ``(...)`` and fused or own features ``(..., width)``."""
        width = (features.shape[-1],)
        parts = [rms_norm(self.embedding[tokens], width), rms_norm(features, width)]
        mixed: Tensor = self.mix(torch.cat(parts, -1))
        return mixed

    def fused(self, hidden: Tensor) -> Tensor:
        """``(..., layers, width)`` hidden states of the target to features ``(..., width)``."""
        fused: Tensor = self.fuse(rms_norm(hidden, hidden.shape[-1:]).flatten(-2))
        return fused

    def logits(self, features: Tensor) -> Tensor:
        """Over the draft vocabulary: ``(..., width)`` to ``(..., draft_vocab)``."""
        return features @ self.output.T

    def unroll(self, tokens: Tensor, hidden: Tensor, steps: int) -> list[Tensor]:
        """Own features at depth 1 .. ``steps`` of every position, as decoding would make them.

        At depth s, position k read the target's features up to k - s and its own since, with keys to match.

        Args:
            tokens: ``(batch, length)`` ids.
            hidden: ``(batch, length, layers, width)`` hidden states of the target.
            steps: depths, at least 1.

        Returns:
            Per depth ``(batch, length, width)``; at depth s the first s - 1 positions have no meaning.
        """
        length = tokens.shape[1]
        positions = torch.arange(length, device=tokens.device)
        behind = positions[:, None] - positions  # of the query, seen from the key
        features = _later(self.fused(hidden))
        cache, unrolled, allowed = DynamicCache(), [], torch.empty(length, 0, dtype=torch.bool)
        for depth in range(1, steps + 1):
            # true keys up to k - depth + 1, then one key for each depth since
            masks = [behind >= depth - 1, *(behind == depth - own for own in range(2, depth + 1))]
            allowed = torch.cat(masks, 1)[None, None].expand(len(tokens), 1, -1, -1)
            own: Tensor = self.block(
                inputs_embeds=self.inputs(tokens, features),
                attention_mask=allowed,
                position_ids=positions[None],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            unrolled.append(own)
            features = _later(own)
        return unrolled


def _later(features: Tensor) -> Tensor:
    """Shifted by one position: zeros, then all but the last."""
    return torch.cat([torch.zeros_like(features[:, :1]), features[:, :-1]], 1)


class Head:
    """A ``HeadModel`` beside a target as a ``LanguageModel``.

    It reads the hidden states that the target's own forwards left behind, so verified positions are scored in
    one forward; beyond what the target has read it goes on with its own features, token by token. Its cache
    may lag: it catches up from the target's features.

    Args:
        model: trained for this target.
        target: keeps the hidden states; its cache holds the same query.
        warper: the target's.
        name: for error messages.
    """

    def __init__(self, model: HeadModel, target: CausalLM, warper: Warper, *, name: str = "head") -> None:
        self.model = model.requires_grad_(False)
        self.target = target
        self.warper = warper
        self.name = name
        self.context: int | None = target.context
        target.keep(model.shape.layers)
        self.reset()

    def reset(self) -> None:
        """Forget all cached tokens."""
        self._tokens: list[int] = []
        self._true = 0  # leading cached positions that were computed from the target's features
        self._cache = DynamicCache()
        self._own = self.model.output.new_zeros(0, self.model.output.shape[1])

    @torch.inference_mode()
    def score(self, tokens: Sequence[int], start: int) -> Tensor:
        """Processed laws ``(len(tokens) - start + 1, vocab)``; see ``LanguageModel.score``.

        Raises:
            ValueError: if ``start`` is outside [1, len(tokens)], or the head returns NaN.
        """
        if not 1 <= start <= len(tokens):
            raise ValueError(f"start must lie in [1, {len(tokens)}], got {start}")
        hidden = self.target.hidden(tokens, self.model.shape.layers)
        true = min(len(tokens), len(hidden) + 1)  # positions whose predecessor the target has read
        keep = min(common_prefix(self._tokens, tokens), start - 1)
        if self._true < true:
            keep = min(keep, self._true)
        try:
            self._crop(keep)
            if keep < true:
                features = self.model.fused(hidden[max(keep - 1, 0) : true - 1])
                if keep == 0:
                    features = torch.cat([torch.zeros_like(self.model.output[:1]), features])
                self._extend(tokens[keep:true], features)
                self._true = true
            for k in range(max(keep, true), len(tokens)):
                self._extend(tokens[k : k + 1], self._own[-1:])
        except BaseException:  # an interrupted forward leaves cache and features at different lengths
            self.reset()
            raise
        logits = self.model.logits(self._own[start - 1 :])
        if not logits.max() < torch.inf:
            raise ValueError(f"{self.name} returned logits that are NaN or infinite")
        law = self.warper(logits)
        whole = law.new_zeros(len(law), len(self.model.embedding))
        whole[:, self.model.tokens] = law
        return whole

    def _crop(self, keep: int) -> None:
        if keep < len(self._tokens):
            self._cache.crop(keep - len(self._tokens))
            self._tokens, self._own = self._tokens[:keep], self._own[:keep]
        self._true = min(self._true, keep)

    def _extend(self, tokens: Sequence[int], features: Tensor) -> None:
        ids = torch.tensor(tokens, device=features.device)
        own = self.model.block(
            inputs_embeds=self.model.inputs(ids, features)[None],
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state[0]
        self._own = torch.cat([self._own, own])
        self._tokens = [*self._tokens, *tokens]


def build(weights: Mapping[str, Tensor], shape: Shape, target: PreTrainedModel) -> HeadModel:
    """A trained head for ``target``.

    Raises:
        ValueError: naming the tensors that are missing, left over or misshapen.
    """
    model = HeadModel(shape, target, weights["tokens"])
    try:
        model.load_state_dict(dict(weights))
    except RuntimeError as error:
        raise ValueError(f"the weights fit no head for this target: {error}") from None
    return model
