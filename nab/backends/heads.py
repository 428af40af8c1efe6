"""Feature-level drafters: one layer that reads the target's hidden states (EAGLE; Li et al. 2024)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers import DynamicCache, LlamaConfig, LlamaModel, PreTrainedModel
from transformers.cache_utils import Cache

from nab.backends.cache import Bands, Tree, TreeCache, additive
from nab.backends.chains import chain
from nab.backends.decoder import Decoder, Matrix, Parts, share
from nab.backends.rows import UNKNOWN, Drafted
from nab.backends.torch import CausalLM, Warper
from nab.sampling import placed

if TYPE_CHECKING:
    from nab.backends.stack import Stack


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


class FeatureModel(Protocol):
    """What a ``Head`` needs of its model: an entry per token, computed from the token and a feature.

    The feature is the target's of the token before, fused; or, where the target has not read that one yet,
    the model's own output for it; zeros for the first token.
    """

    @property
    def layers(self) -> tuple[int, ...]:
        """Hidden states of the target that it reads."""

    @property
    def vocab_size(self) -> int:
        """Of the target's laws."""

    @property
    def tokens(self) -> Tensor:
        """Ids of the draft vocabulary, ``(draft_vocab,)``."""

    @property
    def width(self) -> int:
        """Of features, fused and own."""

    @property
    def skips_first(self) -> bool:
        """Whether the text's first token has no entry: entry j is then of token j + 1, at position j."""

    def fused(self, hidden: Tensor) -> Tensor:
        """Features ``(..., width)`` from the target's hidden states ``(..., layers, target's width)``."""

    def forward(
        self, ids: Tensor, features: Tensor, *, positions: Tensor, mask: Tensor | None, cache: Cache
    ) -> Tensor:
        """Own features ``(1, rows, width)`` of some entries, whose keys and values ``cache`` gets.

        Args:
            ids: ``(1, rows)``.
            features: ``(1, rows, width)``.
            positions: ``(1, rows)``.
            mask: ``(1, 1, rows, entries)``, added to attention scores; None if all entries are a chain.
            cache: of the entries before.
        """

    def logits(self, own: Tensor) -> Tensor:
        """Over the draft vocabulary, of the token behind each entry: ``(..., draft_vocab)``."""


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
    skips_first = False
    decoder: Decoder | None = None
    """What reads for it once it is trained."""

    def __init__(self, shape: Shape, target: PreTrainedModel, tokens: Tensor) -> None:
        super().__init__()
        config: Any = target.config.get_text_config()
        if tokens.shape != (shape.draft_vocab,) or not 0 <= tokens.min() <= tokens.max() < config.vocab_size:
            raise ValueError(
                f"the draft vocabulary needs {shape.draft_vocab} ids below {config.vocab_size}, got "
                f"{tuple(tokens.shape)} between {int(tokens.min())} and {int(tokens.max())}"
            )
        self.shape = shape
        self.layers = shape.layers
        self.vocab_size: int = config.vocab_size
        self.width: int = config.hidden_size
        width = self.width
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
                bos_token_id=None,  # ids of its default lie outside this vocabulary, which draws a warning
                eos_token_id=None,
            )
        ).to(**parameters)  # rotary frequencies too: those of the shipped heads were bfloat16 in training
        del self.block.embed_tokens
        with torch.no_grad():
            self.mix.weight[:, width:] += torch.eye(width, **parameters)
        tokens = tokens.to(target.device)
        self.register_buffer("tokens", tokens)
        ends: Any = target
        self.register_buffer("embedding", ends.get_input_embeddings().weight.detach(), persistent=False)
        output = ends.get_output_embeddings().weight.detach()[tokens].clone()
        self.register_buffer("output", output, persistent=False)

    def settle(self) -> HeadModel:
        """Train no more: reading gets faster."""
        self.requires_grad_(False)
        self.decoder, self._bands = Decoder.of(self.block), Bands(self.output)
        return self

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

    def forward(
        self, ids: Tensor, features: Tensor, *, positions: Tensor, mask: Tensor | None, cache: Cache
    ) -> Tensor:
        """See ``FeatureModel``; here for any batch."""
        if self.decoder is not None:
            cached = cache.get_seq_length()
            chain = self._bands.all(range(cached, cached + ids.shape[1]))
            seen: Mapping[int | None, Tensor | None] = chain if mask is None else {None: mask}
            return self.decoder(self.inputs(ids, features), cache, positions[0], seen)[-1]
        own: Tensor = self.block(
            inputs_embeds=self.inputs(ids, features),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return own

    def logits(self, own: Tensor) -> Tensor:
        """Over the draft vocabulary: ``(..., width)`` to ``(..., draft_vocab)``."""
        return own @ self.output.T

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
            own = self.forward(tokens, features, positions=positions[None], mask=allowed, cache=cache)
            unrolled.append(own)
            features = _later(own)
        return unrolled


def _later(features: Tensor) -> Tensor:
    """Shifted by one position: zeros, then all but the last."""
    return torch.cat([torch.zeros_like(features[:, :1]), features[:, :-1]], 1)


class Head:
    """A feature-level drafter beside a target as a ``LanguageModel``.

    It reads the hidden states that the target's own forwards left behind, so verified positions are scored in
    one forward; beyond what the target has read it goes on with its own features, level by level. Its cache
    may lag: it catches up from the target's features.

    Args:
        model: trained for this target.
        target: keeps the hidden states; its cache holds the same query.
        warper: the target's.
        name: for error messages.
    """

    def __init__(self, model: FeatureModel, target: CausalLM, warper: Warper, *, name: str = "head") -> None:
        self.model = model
        self.target = target
        self.warper = warper
        self.name = name
        self.stack: Stack | None = None
        self.keeps = True  # a stack keeps its own features
        self.context: int | None = target.context
        target.keep(model.layers)
        self.reset()

    @torch.inference_mode()
    def reset(self) -> None:
        """Forget all cached tokens."""
        if self.stack is not None:
            self.stack.reset()
        self._cache = TreeCache(self.model.fused(self.target.hidden([], self.model.layers)))

    @torch.inference_mode()
    def score(self, tokens: Sequence[int], start: int, parents: Sequence[int] | None = None) -> Tensor:
        """Processed laws ``(len(tokens) - start + 1, vocab)``; arguments as for ``CausalLM.score``.

        A node always reads the head's own feature of its parent, also where the target has read on since: it
        is drafted where the target has not.

        Raises:
            ValueError: if ``start`` is outside [1, len(tokens)], a parent is no earlier token, or the head
                returns NaN.
        """
        self._check(tokens, start)
        return self._laws(tokens, parents or (), range(start - 1, len(tokens)))

    @torch.inference_mode()
    def draft(self, tokens: Sequence[int], levels: int, like: Tensor, uniforms: Sequence[float]) -> Drafted:
        """A chain of ``levels`` tokens behind ``tokens``; see ``CausalLM.draft``."""
        self._entries(tokens, ())
        labels, own = list(self._cache.tree.labels), self._cache.states[0][None, -1:]
        if not labels:  # nothing to draft from behind a first token that has no entry
            return Drafted(torch.empty(1, 0, dtype=torch.long, device=like.device))

        def read(ids: Tensor) -> Tensor:
            cache, states = self._cache.keys, self._cache.states[0]
            at = states.new_tensor([[len(states)]], dtype=torch.long)
            own = self.model.forward(ids, states[None, -1:], positions=at, mask=None, cache=cache)
            self._cache.add(own[0])
            return self.model.logits(own)

        def tell(told: Sequence[int]) -> None:
            self._cache.tree = Tree([*labels, *(~token for token in told[: levels - 1])])

        try:
            first, vocabulary = self.model.logits(own), self.model.tokens.long()
            drafted = chain(
                self.warper,
                first,
                read,
                like=like,
                uniforms=uniforms[:levels],
                tell=tell,
                vocabulary=vocabulary,
            )
        except BaseException:  # an interrupted forward leaves keys and states at different lengths
            self._cache.reset()
            raise
        tell([UNKNOWN] * levels)
        return drafted

    @torch.inference_mode()
    def score_by_depth(self, tokens: Sequence[int], start: int, depths: int) -> Tensor:
        """What the head would have drafted at each depth of a round, had it drafted these very tokens.

        One tree: from each token a branch of the tokens that follow it, in ``depths`` forwards at most.

        Args:
            tokens: verified; the target has read all of them, the last perhaps not.
            start: first position scored.
            depths: tokens of a round, at least 1.

        Returns:
            ``(depths, len(tokens) - start + 1, vocab)``. Row ``[k, i - start]`` is the law of token k + 1 of
            the round that starts from ``tokens[: i - k]``, drafted behind ``tokens[:i]``, the target having
            read ``tokens[: i - k - 1]``; zeros where that round would start from nothing.

        Raises:
            ValueError: if ``start`` is outside [1, len(tokens)], ``depths`` is below 1, the target has read
                too little, or the head returns NaN.
        """
        self._check(tokens, start)
        end, read = len(tokens), len(self.target.hidden(tokens, self.model.layers))
        if depths < 1:
            raise ValueError(f"depths must be at least 1, got {depths}")
        if read < end - 1:
            raise ValueError(f"{self.name} needs {end - 1} tokens read by the target, which has read {read}")
        nodes, parents = list[int](), list[int]()
        place = {(0, i): i - 1 for i in range(1, end + 1)}  # of the entry behind which a row is the law
        for depth in range(1, depths):
            for i in range(max(start - depths + 1 + depth, depth + 1), end + 1):
                place[depth, i] = end + len(nodes)
                parents.append(place[depth - 1, i - 1] - end)
                nodes.append(tokens[i - 1])
        rows = [(depth, i) for depth in range(depths) for i in range(max(start, depth + 1), end + 1)]
        laws = self._laws([*tokens, *nodes], parents, [place[row] for row in rows])
        whole = laws.new_zeros(depths, end - start + 1, laws.shape[-1])
        whole[[depth for depth, _ in rows], [i - start for _, i in rows]] = laws
        return whole

    @property
    def parts(self) -> Parts | None:
        """For a stack, where it is known how to take the model apart."""
        model = self.model
        if not isinstance(model, HeadModel) or model.decoder is None:
            return None
        fuse = [Matrix(part.weight, None) for part in [model.fuse] if isinstance(part, nn.Linear)]
        entry = Matrix(model.mix.weight, None), *fuse
        return Parts(entry, model.decoder, Matrix(model.output, None), model.tokens.long())

    def rebuild(self, parts: Parts) -> None:
        """Go on with other weights of the same form."""
        model = cast(HeadModel, self.model)
        share(model, self.parts, parts)
        model.decoder = parts.decoder

    def enter(self, entry: tuple[Any, ...], tokens: Sequence[int], of: range) -> Tensor:
        """What the layers read of some tokens, ``(members, tokens, width)``, from stacked entry weights."""
        model, (mix, *fuse) = cast(HeadModel, self.model), entry
        hidden = self.target.hidden(tokens, model.layers, max(of.start - 1, 0))[: len(of) - (of.start == 0)]
        width, members = (model.width,), len(mix.weight)
        features = rms_norm(hidden, width).flatten(-2).expand(members, -1, -1)
        for each in fuse:
            features = each(features)
        if of.start == 0:
            features = torch.cat([features.new_zeros(members, 1, model.width), features], 1)
        known = rms_norm(
            model.embedding[torch.tensor(tokens[of.start : of.stop], device=hidden.device)], width
        )
        found: Tensor = mix(torch.cat([known.expand(members, -1, -1), rms_norm(features, width)], -1))
        return found

    def _check(self, tokens: Sequence[int], start: int) -> None:
        if not 1 <= start <= len(tokens):
            raise ValueError(f"start must lie in [1, {len(tokens)}], got {start}")

    def _laws(self, tokens: Sequence[int], parents: Sequence[int], behind: Sequence[int]) -> Tensor:
        """Processed laws behind some tokens, ``(len(behind), vocab)``; zeros where there is no entry."""
        skipped, levels = int(self.model.skips_first), self._entries(tokens, parents)
        own = self._cache.states[0][[levels.places[at - skipped] for at in behind if at >= skipped]]
        logits = self.model.logits(own)
        if not (logits < torch.inf).all():
            raise ValueError(f"{self.name} returned logits that are NaN or infinite")
        law = self.warper(logits)
        whole = law.new_zeros(len(behind), self.model.vocab_size)
        whole[len(behind) - len(law) :, self.model.tokens] = law
        return whole

    def _entries(self, tokens: Sequence[int], parents: Sequence[int]) -> _Levels:
        """Bring the cache to a chain and its nodes, and nothing more."""
        if self.stack is not None:
            self.stack.lend(self, self._cache, tokens)
        skipped, length = int(self.model.skips_first), len(tokens) - len(parents)
        hung = [parent - skipped for parent in placed(tokens, parents)]
        hidden = self.target.hidden(tokens[:length], self.model.layers)
        levels = _by_level(tokens[skipped:], hung, min(length, len(hidden) + 1) - skipped)
        tree = levels.tree
        with self._cache.reading(tree, len(tree)) as kept:
            for begin, end in pairwise([0, *levels.ends]):
                rows = range(max(begin, kept), end)
                if rows:
                    true = rows.start < levels.ends[0]
                    self._feed(tree, rows, self._given(hidden, rows) if true else self._drafted(tree, rows))
        return levels

    def _given(self, hidden: Tensor, rows: range) -> Tensor:
        """Features of some entries: the target's, of the tokens before; zeros before the first token."""
        first, last = (at + int(self.model.skips_first) - 1 for at in (rows.start, rows.stop))
        features = self.model.fused(hidden[max(first, 0) : last])
        return features if first >= 0 else torch.cat([features.new_zeros(1, self.model.width), features])

    def _drafted(self, tree: Tree, rows: range) -> Tensor:
        """Features of some entries: the head's own, of their parents; zeros where there is none."""
        own, parents = self._cache.states[0], torch.tensor([tree.parent(row) for row in rows])
        features = own.new_zeros(len(rows), self.model.width)
        features[parents >= 0] = own[parents[parents >= 0]]
        return features

    def _feed(self, tree: Tree, rows: range, features: Tensor) -> None:
        device, labels = features.device, tree.labels[rows.start : rows.stop]
        tokens = [label if label >= 0 else ~label for label in labels]
        branches = rows.stop > tree.trunk
        own = self.model.forward(
            torch.tensor([tokens], device=device),
            features[None],
            positions=tree.positions(rows)[None].to(device),
            mask=additive(tree.visible(rows), features.dtype).to(device) if branches else None,
            cache=self._cache.keys,
        )
        self._cache.add(own[0])


class _Levels(NamedTuple):
    """A tree whose entries stand level by level, so that each finds its parent's own feature.

    Args:
        tree: labels are tokens, or ``~token`` where the entry reads an own feature: another computation.
        places: of the entries in the order given.
        ends: of each level; the first reads the target's features and may be empty.
    """

    tree: Tree
    places: list[int]
    ends: list[int]


def _by_level(tokens: Sequence[int], parents: Sequence[int], true: int) -> _Levels:
    """Sort a chain and its nodes; ``true`` of the chain read the target's features, parents are indices."""
    behind, levels = [*range(true - 1, len(tokens) - len(parents) - 1), *parents], list[int]()
    for parent in behind:
        levels.append(levels[parent - true] + 1 if parent >= true else 1)
    order = sorted(range(len(behind)), key=levels.__getitem__)
    places = list(range(len(tokens)))
    for place, entry in enumerate(order, true):
        places[true + entry] = place
    labels = [*tokens[:true], *(~tokens[true + entry] for entry in order)]
    tree = Tree(labels, [places[behind[entry]] if behind[entry] >= 0 else -1 for entry in order])
    return _Levels(tree, places, list(accumulate(Counter(levels).values(), initial=true)))


def build(weights: Mapping[str, Tensor], shape: Shape, target: PreTrainedModel) -> HeadModel:
    """A trained head for ``target``.

    Raises:
        ValueError: naming the tensors that are missing, left over or misshapen.
    """
    tokens = weights["tokens"].sort().values  # so that draws are those from laws over all tokens
    model = HeadModel(shape, target, tokens)
    try:
        model.load_state_dict({**weights, "tokens": tokens})
    except RuntimeError as error:
        raise ValueError(f"the weights fit no head for this target: {error}") from None
    return model.settle()
