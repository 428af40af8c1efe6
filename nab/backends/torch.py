"""Causal language models of transformers, and any numpy model, as torch ``LanguageModel``s.

The engine knows nothing about text: token ids in, laws out. Each model owns a KV cache that rewinds itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from itertools import count
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from transformers import PreTrainedModel

from nab.backends import chains, rows
from nab.backends.cache import Bands, Tree, TreeCache, additive
from nab.backends.decoder import Decoder, Matrix, Parts, hooked, share
from nab.backends.drafters import Lookup
from nab.backends.rows import UNKNOWN, Drafted
from nab.sampling import Draft, by_path, placed
from nab.types import LanguageModel, Verified

if TYPE_CHECKING:
    from nab.backends.stack import Stack


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
            return torch.zeros_like(logits).scatter_(-1, rows.likeliest(logits)[..., None], 1)
        if self.temperature < _COLD:  # it might overflow
            logits = logits - logits.amax(-1, keepdim=True)
        if self.temperature != 1:
            logits = logits / self.temperature
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

    def drafted(self, logits: Tensor, vocabulary: Tensor | None = None) -> Tensor:
        """What ``rows.acceptance`` takes: laws, or at temperature 0 the tokens that are certain.

        Args:
            logits: ``(drafters, positions, draft vocab)``.
            vocabulary: ids that they are over, ``(drafters, draft vocab)``; None is the target's.
        """
        if self.temperature:
            return self(logits)
        best = rows.likeliest(logits)
        return best if vocabulary is None else vocabulary.gather(-1, best)


Process = Callable[[Tensor, Callable[[], Tensor]], Tensor]
"""Changes logits ``(rows, vocab)`` given the text, ids ``(1, length)``: row r is behind all of it but for the
last ``rows - 1 - r`` tokens."""


class CausalLM:
    """A transformers causal language model as a ``LanguageModel`` on its own device and dtype.

    The cache compares the tokens given with the tokens cached, keeps the paths they share and feeds the rest,
    so any order of calls gives the scores of a full recomputation: after a tree was scored, the branch that
    was accepted is found in the cache, and a tree that grows is fed its new nodes alone. A prompt that shares
    a prefix with the last query reuses it. Memory grows with the longest sequence; there is one tree at a
    time.

    Args:
        model: put in eval mode. Its cache must be able to forget, so recurrent models are refused; those
            without a cache are when they are first called.
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
        self.device = model.device  # which transformers looks for anew each time
        self.warper = warper or Warper()
        self.process: Process | None = None
        """What is done to logits before the warper has them; a member of a stack has none."""
        self.name = name
        self.stack: Stack | None = None
        self.keeps = False  # a stack need not keep its hidden states
        self.context: int | None = getattr(model.config, "max_position_embeddings", None)
        self._layers: list[int] = []
        self.decoder = _decoder(model)
        if self.decoder is not None:
            self._embedding: Any = model.model.embed_tokens.weight
            self._head = Matrix(model.lm_head.weight, model.lm_head.bias)
            self._bands = Bands(self._embedding, self.decoder.windows)
        self.reset()

    @property
    def law_dtype(self) -> torch.dtype:
        """That of its laws: see ``Warper``."""
        return torch.float64 if self.model.dtype == torch.float64 else torch.float32

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

    def hidden(self, tokens: Sequence[int], layers: Sequence[int], first: int = 0) -> Tensor:
        """Kept states of the longest prefix of ``tokens`` that was read, ``(read, len(layers), width)``.

        It may have been read along a branch of a tree. Without those of the ``first`` tokens.
        """
        states = dict(zip(self._layers, self._cache.along(tokens), strict=True))
        return torch.stack([states[layer][first:] for layer in layers], 1)

    def reset(self) -> None:
        """Forget all cached tokens."""
        if self.stack is not None:
            self.stack.reset()
        width = self.model.config.get_text_config().hidden_size
        empty = torch.empty(0, width, device=self.device, dtype=self.model.dtype)
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
        self._borrow(tokens)
        tree = Tree(list(tokens), placed(tokens, parents or ()))
        self._check_fits(tree.depth)
        with self._cache.reading(tree, start - 1) as kept:
            ids = torch.tensor([tokens[kept:]], device=self.device)
            branches = None if len(tree) == tree.trunk else tree
            logits = self._read(ids, branches, kept, len(tokens) - start + 1)[0]
        if not logits.max() < torch.inf:
            raise ValueError(f"{self.name} returned logits that are {_NAN}")
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
        logits = self.logits(tokens, start, parents)
        if self.process is None:
            return self.warper(logits)
        unprocessed = iter(logits)

        def part(path: Sequence[int], start: int) -> Tensor:
            of = torch.stack([next(unprocessed) for _ in range(start, len(path) + 1)])
            return self._processed(of[None], path)[0]

        return self.warper(torch.cat(by_path(part, tokens, start, parents or ())))

    def _processed(self, logits: Tensor, tokens: Sequence[int], drawn: Sequence[Tensor] = ()) -> Tensor:
        """Of logits ``(1, rows, vocab)``, the last one behind ``tokens`` and what was ``drawn`` since."""
        if self.process is None:
            return logits

        def ids() -> Tensor:
            return torch.cat([torch.tensor([tokens], device=self.device), *drawn], 1)

        return self.process(logits[0], ids)[None]

    @torch.inference_mode()
    def draft(self, tokens: Sequence[int], levels: int, like: Tensor, uniforms: Sequence[float]) -> Drafted:
        """A chain of ``levels`` tokens behind ``tokens``, drawn where the model is: nothing waits for it.

        Args:
            tokens: the text so far.
            levels: at least 1.
            like: some laws of the target.
            uniforms: as many as levels.

        Raises:
            ValueError: if the text and the chain do not fit the context, or the target has another vocabulary
                or is elsewhere.
        """
        self._check_fits(len(tokens) + levels - 1)
        self._borrow(tokens)

        def tell(told: Sequence[int]) -> None:
            self._cache.tree = Tree([*tokens, *told[: levels - 1]])

        with self._cache.reading(Tree(list(tokens)), len(tokens) - 1) as kept:
            known = torch.tensor([tokens[kept:]], device=self.device)
            first, reached, drawn = self._read(known, None, kept, 1), count(len(tokens)), list[Tensor]()

            def read(ids: Tensor) -> Tensor:
                drawn.append(ids)
                return self._processed(self._read(ids, None, next(reached), 1), tokens, drawn)

            drafted = chains.chain(
                self.warper,
                self._processed(first, tokens),
                read,
                like=like,
                uniforms=uniforms[:levels],
                tell=tell,
            )
        tell([UNKNOWN] * levels)
        return drafted

    @torch.inference_mode()
    def verify(self, tokens: Sequence[int], draft: Draft | Drafted, uniforms: Sequence[float]) -> Verified:
        """Accept a part of a chain and add one token: ``nab.sampling.verify``, with one wait for the device.

        At temperature 0 nothing but the likeliest tokens is computed.

        Args:
            tokens: the text so far.
            draft: a chain; its laws, if it has any, are like this model's.
            uniforms: one tests each token, the last draws the next one.

        Raises:
            ValueError: if the text and the chain do not fit the context, or the model returns NaN.
        """
        if isinstance(draft, Draft):
            draft = self._on_device(draft)
        start, drafted = len(tokens), draft.ids.shape[1]
        self._check_fits(start + drafted)
        with self._cache.reading(Tree(list(tokens)), start - 1) as kept:
            known = torch.tensor([tokens[kept:]], device=self.device)
            logits = self._read(torch.cat([known, draft.ids], 1), None, kept, drafted + 1)
        logits = self._processed(logits, tokens, [draft.ids])
        p = None if self.warper.temperature == 0 else self.warper(logits)
        found = chains.agreed(draft, logits) if p is None else chains.tested(draft, p, uniforms)
        if not found.sound:
            self.reset()
            made = "returned logits" if self.process is None else "has logits, once processed,"
            raise ValueError(f"{self.name} {made} that are {_NAN}")
        self._cache.tree = Tree([*tokens, *found.drafted])
        draft.tell(found.drafted)

        def laws() -> Tensor:
            return (self.warper(logits) if p is None else p)[0, : found.accepted + 1]

        fault = "" if found.drafter_sound else f"returned logits that are {_NAN}"
        return Verified(drafted, (*found.drafted[: found.accepted], found.token), laws, fault)

    def _on_device(self, draft: Draft) -> Drafted:
        """A chain that the host knows."""
        ids = torch.tensor([draft.tokens], dtype=torch.long, device=self.device)
        laws = [q for q in draft.q if q is not None]
        if self.warper.temperature == 0 or not laws:
            return Drafted(ids)
        certain = one_hot(ids[0], len(laws[0])).to(laws[0].dtype)
        whole = [own if q is None else q for q, own in zip(draft.q, certain, strict=True)]
        return Drafted(ids, torch.stack([*whole, torch.zeros_like(laws[0])])[None])

    def _check_fits(self, length: int) -> None:
        if self.context is not None and length > self.context:
            raise ValueError(f"{length} tokens do not fit the context of {self.name}: {self.context}")

    def _read(self, ids: Tensor, tree: Tree | None, first: int, last: int) -> Tensor:
        """Feed ``ids`` ``(1, entries)`` behind the ``first`` entries: a chain, or entries of a ``tree``.

        Returns:
            Logits of the last ones, ``(1, last, vocab)``.
        """
        entries = range(first, first + ids.shape[1])
        if self.decoder is None:
            states, logits = self._forward(ids, self._layout(tree, entries) if tree else {}, last)
        elif tree:
            masks = {window: self._mask(tree, entries, window) for window in self.decoder.windows}
            states, logits = self._decoded(ids, tree.positions(entries).to(ids.device), masks, last)
        else:
            states, logits = self._decoded(ids, entries, self._bands.all(entries), last)
        if states:
            self._cache.add(*states)
        return logits

    def _forward(self, ids: Tensor, layout: dict[str, Any], last: int) -> tuple[list[Tensor], Tensor]:
        """Kept hidden states of ``ids`` and logits of the last ones, by transformers."""
        output = self.model(
            input_ids=ids,
            past_key_values=self._cache.keys,
            use_cache=True,
            logits_to_keep=last,
            output_hidden_states=bool(self._layers),
            **layout,
        )
        if not self._cache.keys.get_seq_length():
            raise ValueError(f"{self.name} keeps nothing of what it has read: {type(self.model).__name__}")
        return [output.hidden_states[layer][0] for layer in self._layers], output.logits

    def _decoded(
        self, ids: Tensor, positions: range | Tensor, masks: Mapping[int | None, Tensor | None], last: int
    ) -> tuple[list[Tensor], Tensor]:
        """As ``_forward``, by the decoder."""
        decoder = cast(Decoder, self.decoder)
        states = decoder(self._embedding[ids], self._cache.keys, positions, masks)
        return [states[layer][0] for layer in self._layers], self._head(states[-1][:, -last:])

    @torch.inference_mode()
    def acceptance(self, tokens: Sequence[int], start: int, p: Sequence[Tensor]) -> Tensor:
        """See ``nab.types.Accepts``.

        Raises:
            ValueError: if the text does not fit the context.
        """
        self._check_fits(len(tokens) - 1)
        self._borrow(tokens)
        tree = Tree(list(tokens[:-1]))
        with self._cache.reading(tree, start - 1) as kept:
            ids = torch.tensor([tokens[kept:-1]], device=self.device)
            logits = self._read(ids, None, kept, len(tokens) - start)
        logits = self._processed(logits, tokens[:-1])
        return rows.acceptance(p, self.warper.drafted(logits), tokens[start:])

    def _borrow(self, tokens: Sequence[int]) -> None:
        """Take over what a stack has read of a text."""
        if self.stack is not None:
            self.stack.lend(self, self._cache, tokens)

    @property
    def parts(self) -> Parts | None:
        """For a stack, where it is known how to take the model apart."""
        if self.decoder is None or self._layers:
            return None
        return Parts((self._embedding,), self.decoder, self._head)

    def rebuild(self, parts: Parts) -> None:
        """Go on with other weights of the same form."""
        share(self.model, self.parts, parts)
        self._embedding, self.decoder, self._head = parts.entry[0], parts.decoder, parts.head

    def enter(self, entry: tuple[Any, ...], tokens: Sequence[int], of: range) -> Tensor:
        """What the layers read of some tokens, ``(members, tokens, width)``, from stacked entry weights."""
        found: Tensor = entry[0][:, torch.tensor(tokens[of.start : of.stop], device=self.device)]
        return found

    def _layout(self, tree: Tree, rows: range) -> dict[str, Any]:
        """Mask and position ids of entries of a tree, as transformers takes them."""
        masks = {kind: self._mask(tree, rows, window) for kind, window in self._windows.items()}
        return {
            "attention_mask": masks if len(masks) > 1 else next(iter(masks.values())),
            "position_ids": tree.positions(rows)[None].to(self.device),
        }

    def _mask(self, tree: Tree, rows: range, window: int | None) -> Tensor:
        return additive(tree.visible(rows, window), self.model.dtype).to(self.device)

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


class Uncached:
    """A transformers model as a ``LanguageModel`` by its own forward over the whole text.

    Slow, and free of the caches and kernels of this package: what audits compare with.

    Args:
        model: in eval mode.
        warper: what turns logits into the law.
    """

    def __init__(self, model: PreTrainedModel, warper: Warper | None = None) -> None:
        self.model, self.warper = model, warper or Warper()

    @torch.inference_mode()
    def score(self, tokens: Sequence[int], start: int) -> Tensor:
        """Processed laws ``(len(tokens) - start + 1, vocab)``, from ``start >= 1`` on."""
        ids = torch.tensor([tokens], device=self.model.device)
        logits: Tensor = self.model(ids, use_cache=False).logits
        return self.warper(logits[0, start - 1 :])


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
        law: Tensor = torch.cat([torch.as_tensor(part) for part in parts]).to(self.device, self.dtype)
        if not (law.min() >= 0 and law.max() < torch.inf):
            raise ValueError(f"{self.name} returned a law that is negative, NaN or infinite somewhere")
        if self.warper == Warper():
            return law
        return self.warper(law.log()).masked_fill(law.sum(-1, keepdim=True) == 0, 0)

    def acceptance(self, tokens: Sequence[int], start: int, p: Sequence[Tensor]) -> Tensor:
        """See ``CausalLM.acceptance``."""
        return rows.acceptance(p, self.score(tokens[:-1], start)[None], tokens[start:])


@dataclass(frozen=True)
class Certain(Lifted):
    """Prompt lookup on a device: what it proposes is certain, so that no law need be made of it."""

    model: Lookup

    def draft(self, tokens: Sequence[int], levels: int, like: Tensor, uniforms: Sequence[float]) -> Draft:
        """See ``nab.types.Drafts``.

        Raises:
            ValueError: if the target's laws are over other tokens, or elsewhere.
        """
        own, wanted = (self.model.vocab_size, self.device), (like.shape[-1], like.device)
        if own != wanted:
            raise ValueError(f"its laws must be like the target's, {wanted}, got {own}")
        found = self.model.chain(tokens, levels)
        return Draft.chain(found, [None] * len(found))

    def acceptance(self, tokens: Sequence[int], start: int, p: Sequence[Tensor]) -> Tensor:
        """See ``nab.types.Accepts``."""
        proposals = self.model.proposals(tokens[:-1], start)
        ids = torch.tensor([[0 if token is None else token for token in proposals]], device=self.device)
        there = torch.tensor([[token is not None] for token in proposals], device=self.device)
        return rows.acceptance(p, ids, tokens[start:]) * there


_NAN = "NaN or infinite"
_COLD = 2.0**-20


def _decoder(model: Any) -> Decoder | None:
    """That of a causal language model whose head does nothing but multiply."""
    head = getattr(model, "lm_head", None)
    if type(model).__name__ not in _FAMILY or type(head) is not nn.Linear or "forward" in vars(model):
        return None
    return None if hooked([model, head]) else Decoder.of(model.model)


_FAMILY = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def early_exit(model: PreTrainedModel, layers: int) -> PreTrainedModel:
    """The first ``layers`` layers of ``model`` under its own final norm and head; all weights are shared.

    Raises:
        ValueError: if ``layers`` is not in [1, number of layers - 1], or weights lie elsewhere than in a
            plain model of this class, as those under adapters do.
    """
    total = model.config.get_text_config().num_hidden_layers
    if not 1 <= layers < total:
        raise ValueError(f"early exit must be after 1 to {total - 1} of {total} layers, got {layers}")
    config = copy.deepcopy(model.config)
    config.get_text_config().num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    with torch.device("meta"):
        shallow: PreTrainedModel = type(model)(config)
    weights: dict[str, Any] = {k: v for k, v in model.state_dict().items() if k in shallow.state_dict()}
    if missing := shallow.state_dict().keys() - weights:
        raise ValueError(f"early exit takes the layers of a plain {type(model).__name__}: no {min(missing)}")
    shallow.load_state_dict(weights, assign=True)
    buffers = dict(model.named_buffers())
    for name, _ in list(shallow.named_buffers()):  # those outside the state dict, such as rotary frequencies
        owner, _, leaf = name.rpartition(".")
        setattr(shallow.get_submodule(owner), leaf, buffers[name])
    shallow.tie_weights()
    shallow.train(False)
    return shallow
