"""Causal language models of transformers, and any numpy model, as torch ``LanguageModel``s.

The engine knows nothing about text: token ids in, laws out. Each model owns a KV cache that rewinds itself.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nab.backends.cache import Tree, TreeCache, additive
from nab.sampling import by_path, placed
from nab.types import LanguageModel


@dataclass(frozen=True)
class Warper:
    """Logits to the law that tokens are really drawn from: temperature, then top-k, then top-p.

    Args:
        temperature: 0 is greedy: all mass on the argmax, the lower token among equals.
        top_k: keep the ``top_k`` likeliest tokens and whatever ties with the last of them; 0 keeps all.
        top_p: keep the fewest likeliest tokens whose mass reaches ``top_p``, in (0, 1].

    Raises:
        ValueError: on a value outside its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be a finite number of at least 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0 (0 keeps all tokens), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")

    def __call__(self, logits: Tensor) -> Tensor:
        """``(..., vocab)`` logits to laws: float64 stays, everything else becomes float32."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.temperature == 0:
            return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1)
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            threshold = logits.topk(self.top_k, -1).values[..., -1:]
            logits = logits.masked_fill(logits < threshold, -torch.inf)
        law = logits.softmax(-1)
        if self.top_p < 1:
            masses, order = law.sort(stable=True, dim=-1, descending=True)
            outside = masses.cumsum(-1) - masses >= self.top_p
            law = law.masked_fill(torch.zeros_like(outside).scatter_(-1, order, outside), 0)
            law = law / law.sum(-1, keepdim=True)
        return law


class CausalLM:
    """A transformers causal language model as a ``LanguageModel`` on its own device and dtype.

    The cache compares the tokens given with the tokens cached, keeps the paths they share and feeds the rest,
    so any order of calls gives the scores of a full recomputation: after a tree was scored, the branch that
    was accepted is found in the cache, and a tree that grows is fed its new nodes alone. A prompt that shares
    a prefix with the last query reuses it. Memory grows with the longest sequence; there is one tree at a
    time.

    Args:
        model: put in eval mode. Its cache must be able to forget, so recurrent models are refused.
        warper: what turns logits into the law.
        name: for error messages.

    Raises:
        ValueError: if the model keeps a recurrent state, which cannot be rewound.
    """

    def __init__(self, model: PreTrainedModel, warper: Warper | None = None, *, name: str = "model") -> None:
        layers = getattr(model.config, "layer_types", None) or []
        if getattr(model, "_is_stateful", False) or any(
            "attention" not in t or "linear" in t for t in layers
        ):
            raise ValueError(
                f"{name} keeps a recurrent state, which cannot be rewound: {type(model).__name__}"
            )
        self.model = model
        self.model.train(False)
        self.warper = warper or Warper()
        self.name = name
        self.context: int | None = getattr(model.config, "max_position_embeddings", None)
        self._layers: list[int] = []
        self.reset()

    def keep(self, layers: Iterable[int]) -> None:
        """From now on, keep the hidden states of these layers for ``hidden``.

        Raises:
            ValueError: if a layer is outside [0, number of layers].
        """
        last = self.model.config.get_text_config().num_hidden_layers
        for layer in layers:
            if not 0 <= layer <= last:
                raise ValueError(f"{self.name} has the hidden states 0 to {last}, not {layer}")
            if layer not in self._layers:
                self._layers.append(layer)
        self.reset()

    def hidden(self, tokens: Sequence[int], layers: Sequence[int]) -> Tensor:
        """Kept states of the longest prefix of ``tokens`` that was read, ``(read, len(layers), width)``.

        It may have been read along a branch of a tree.
        """
        states = dict(zip(self._layers, self._cache.along(tokens), strict=True))
        return torch.stack([states[layer] for layer in layers], 1)

    def reset(self) -> None:
        """Forget all cached tokens."""
        width = self.model.config.get_text_config().hidden_size
        empty = torch.empty(0, width, device=self.model.device, dtype=self.model.dtype)
        self._cache = TreeCache(*[empty] * len(self._layers))

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int], start: int, parents: Sequence[int] | None = None) -> Tensor:
        """Raw logits ``(len(tokens) - start + 1, vocab)``; arguments as for ``score``.

        Raises:
            ValueError: if ``start`` is outside [1, len(tokens)], a parent is no earlier token, a path does
                not fit the context, the tokens branch but the model takes no mask, or it returns NaN.
        """
        if not 1 <= start <= len(tokens):
            raise ValueError(f"start must lie in [1, {len(tokens)}], got {start}")
        tree = Tree(list(tokens), placed(tokens, parents or ()))
        if self.context is not None and tree.depth > self.context:
            raise ValueError(f"{tree.depth} tokens do not fit the context of {self.name}: {self.context}")
        with self._cache.reading(tree, start - 1) as kept:
            output = self.model(
                input_ids=torch.tensor([tokens[kept:]], device=self.model.device),
                past_key_values=self._cache.keys,
                use_cache=True,
                logits_to_keep=len(tokens) - start + 1,
                output_hidden_states=bool(self._layers),
                **self._layout(tree, range(kept, len(tree))),
            )
            self._cache.add(*(output.hidden_states[layer][0] for layer in self._layers))
        logits: Tensor = output.logits[0]
        if not logits.max() < torch.inf:
            raise ValueError(f"{self.name} returned logits that are NaN or infinite")
        return logits

    def score(self, tokens: Sequence[int], start: int, parents: Sequence[int] | None = None) -> Tensor:
        """Processed laws ``(len(tokens) - start + 1, vocab)``; see ``LanguageModel.score``.

        Args:
            tokens: a chain, or a chain and the nodes of a tree that hangs from it.
            start: the first row is the law behind ``tokens[start - 1]``.
            parents: of the last ``len(parents)`` tokens, the nodes, counted from the first of them: below 0 a
                token of the chain, -1 the last; else an earlier node. Siblings may be alike. A row is the law
                of the token behind an entry, given the path to it.
        """
        return self.warper(self.logits(tokens, start, parents))

    def _layout(self, tree: Tree, rows: range) -> dict[str, Any]:
        """Mask and position ids of some entries, as the model takes them; a chain needs none."""
        if len(tree) == tree.trunk:
            return {}
        device, dtype = self.model.device, self.model.dtype
        masks = {
            kind: additive(tree.visible(rows, window), dtype).to(device)
            for kind, window in self._windows.items()
        }
        return {
            "attention_mask": masks if len(masks) > 1 else next(iter(masks.values())),
            "position_ids": tree.positions(rows)[None].to(device),
        }

    @cached_property
    def _windows(self) -> dict[str, int | None]:
        """How far the layers see, by their type; None without limit.

        Raises:
            ValueError: if the model's attention does not follow a mask and position ids that it is given.
        """
        config: Any = self.model.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        alone = "full_attention" if window is None else "sliding_attention"
        kinds = set(getattr(config, "layer_types", None) or [alone])
        implementation = config._attn_implementation
        if (
            implementation not in ("sdpa", "eager")
            or kinds - {"full_attention", "sliding_attention"}
            or "position_ids" not in signature(self.model.forward).parameters
            or getattr(config, "alibi", False)  # distances are counted in entries
            or config.model_type == "gpt_neo"  # its local layers have a mask of their own
        ):
            kind = f"{type(self.model).__name__}, {implementation} attention"
            raise ValueError(f"{self.name} cannot score trees: {kind}, takes no mask for them")
        return {kind: window if kind == "sliding_attention" else None for kind in kinds}


@dataclass(frozen=True)
class Lifted:
    """A numpy ``LanguageModel`` (n-gram, prompt lookup) on a device, its laws processed like the target's.

    Args:
        model: returns ``(rows, vocab)`` laws, all-zero rows where it has nothing to propose.
        warper: the target's.
        device: where the target's laws live.
        dtype: their dtype.
        name: for error messages.
    """

    model: LanguageModel
    warper: Warper
    device: torch.device
    dtype: torch.dtype
    name: str = "model"

    def score(self, tokens: Sequence[int], start: int, parents: Sequence[int] | None = None) -> Tensor:
        """Processed laws on the device, of trees as of chains (see ``CausalLM.score``); all-zero rows stay.

        Raises:
            ValueError: if a parent is no earlier token, or the model's law is negative, NaN or infinite
                somewhere.
        """
        parts = by_path(self.model.score, tokens, start, parents or ())
        law = torch.cat([torch.as_tensor(part) for part in parts]).to(self.device, self.dtype)
        if not (law.min() >= 0 and law.max() < torch.inf):
            raise ValueError(f"{self.name} returned a law that is negative, NaN or infinite somewhere")
        if self.warper == Warper():
            return law
        return self.warper(law.log()).masked_fill(law.sum(-1, keepdim=True) == 0, 0)


def early_exit(model: PreTrainedModel, layers: int) -> PreTrainedModel:
    """The first ``layers`` layers of ``model`` under its own final norm and head; all weights are shared.

    Raises:
        ValueError: if ``layers`` is not in [1, number of layers - 1].
    """
    total = model.config.get_text_config().num_hidden_layers
    if not 1 <= layers < total:
        raise ValueError(f"early exit needs between 1 and {total - 1} layers, got {layers}")
    config = copy.deepcopy(model.config)
    config.get_text_config().num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    with torch.device("meta"):
        shallow: PreTrainedModel = type(model)(config)
    weights: dict[str, Any] = {k: v for k, v in model.state_dict().items() if k in shallow.state_dict()}
    shallow.load_state_dict(weights, assign=True)
    buffers = dict(model.named_buffers())
    for name, _ in list(shallow.named_buffers()):  # those outside the state dict, such as rotary frequencies
        owner, _, leaf = name.rpartition(".")
        setattr(shallow.get_submodule(owner), leaf, buffers[name])
    shallow.tie_weights()
    shallow.train(False)
    return shallow
