"""The decoder of Llama's family against transformers, alone and stacked; what it is not for is left to it."""

import copy

import numpy as np
import pytest
import tiny
import torch
from scipy.stats import binom
from torch.nn.functional import rms_norm
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from nab.backends import decoder
from nab.backends.cache import Bands, Slots
from nab.backends.decoder import Decoder, Norm, form, stack
from nab.backends.torch import CausalLM, early_exit

ROUNDING = 1e-10  # as in tests/test_torch.py; float64 errors of these models stay below 1e-13


def qwen2(seed=0):
    """Queries, keys and values have biases; layers 2 and 3 see the last 8 tokens only."""
    model = tiny._small(
        Qwen2Config, Qwen2ForCausalLM, seed, torch.float64, sliding_window=8, use_sliding_window=True,
        max_window_layers=1,
    )  # fmt: skip
    for layer in model.model.layers:
        for part in ("q_proj", "k_proj", "v_proj"):
            torch.nn.init.normal_(getattr(layer.self_attn, part).bias)
    return model


def scaled_llama(seed=0):
    """Rotary frequencies of long contexts."""
    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    }  # fmt: skip
    return tiny.llama(seed, rope_parameters=rope, attention_bias=True, mlp_bias=True)


FAMILY = {
    "llama": tiny.llama, "mistral": tiny.mistral, "qwen3": tiny.qwen3, "qwen2": qwen2, "scaled": scaled_llama,
}  # fmt: skip
every_member = pytest.mark.parametrize("make", FAMILY.values(), ids=FAMILY.keys())


def slots():
    return Cache(layer_class_to_replicate=Slots)


def read(of, embedding, ids, lengths):
    """Final hidden states ``(rows, entries, width)``, read in parts of some lengths."""
    cache, bands, at, parts = slots(), Bands(embedding), 0, []
    for length in lengths:
        entries = range(at, at := at + length)
        masks = {window: bands(entries, window) for window in of.windows}
        parts.append(of(embedding[ids[:, entries.start : at]], cache, entries, masks)[-1])
    return torch.cat(parts, 1)


def test_norms_round_where_transformers_rounds():
    """In bfloat16, but where a sum in another order crosses a boundary between two numbers.

    A mean of ``width`` squares is off by at most ``width`` units in the last place of float32, its root by
    half of them, both sides and the operations behind by less than ``width + 6``: so likely is a crossing.
    """
    width, generator = 64, torch.Generator().manual_seed(0)
    x, scale = (torch.randn(shape, generator=generator).bfloat16() for shape in ((4096, width), (width,)))
    known = LlamaRMSNorm(width, eps=1e-5).bfloat16()
    known.weight.data = scale
    expected = known(x)
    crossing = 2 * (width + 6) * torch.finfo(torch.float32).eps / torch.finfo(torch.bfloat16).eps
    most = binom.isf(1e-6, x.numel(), crossing)
    assert (Norm(scale, 1e-5)(x) != expected).sum() <= most
    assert (rms_norm(x, (width,), scale, 1e-5) != expected).sum() > most


@torch.inference_mode()
@every_member
def test_hidden_states_are_those_of_transformers(make):
    """All of them, of several rows, read in parts whose lengths need each kind of mask."""
    model = make()
    ids = torch.tensor(np.random.default_rng(0).integers(0, tiny.VOCAB, (2, 140)))
    expected = model(ids, output_hidden_states=True).hidden_states
    of, embedding = Decoder.of(model.model), model.model.embed_tokens.weight
    assert of is not None
    found = of(embedding[ids], slots(), range(140), {w: Bands(embedding)(range(140), w) for w in of.windows})
    for state, known in zip(found, expected, strict=True):
        torch.testing.assert_close(state, known, rtol=0, atol=ROUNDING)
    for lengths in ([140], [1] * 12 + [128], [7, 1, 1, 3, 70, 58]):
        torch.testing.assert_close(read(of, embedding, ids, lengths), expected[-1], rtol=0, atol=ROUNDING)


@torch.inference_mode()
@every_member
def test_a_window_that_is_one_off_is_seen(make, monkeypatch):
    model = make()
    ids = torch.tensor(np.random.default_rng(0).integers(0, tiny.VOCAB, (1, 40)))
    of, embedding = Decoder.of(model.model), model.model.embed_tokens.weight
    expected, band = read(of, embedding, ids, [30, 10]), Bands._band
    monkeypatch.setattr(
        Bands, "_band", lambda self, rows, past, window: band(self, rows, past + 1, window)[:, :-1]
    )
    assert (read(of, embedding, ids, [30, 10]) - expected).abs().max() > 1e-3


@torch.inference_mode()
@every_member
def test_stacked_members_are_each_what_they_are_alone(make):
    models = [make(seed) for seed in range(3)]
    alone = [Decoder.of(model.model) for model in models]
    together = stack(*alone)
    ids = torch.tensor(np.random.default_rng(0).integers(0, tiny.VOCAB, (1, 40)))
    embeddings = [model.model.embed_tokens.weight for model in models]
    expected = [read(of, e, ids, [25, 1, 14]) for of, e in zip(alone, embeddings, strict=True)]
    cache, bands, at, parts = slots(), Bands(embeddings[0]), 0, []
    for length in (25, 1, 14):
        entries = range(at, at := at + length)
        x = torch.cat([embedding[ids[:, entries.start : at]] for embedding in embeddings])
        masks = {window: bands(entries, window) for window in together.windows}
        parts.append(together(x, cache, entries, masks)[-1])
    torch.testing.assert_close(torch.cat(parts, 1), torch.cat(expected), rtol=0, atol=ROUNDING)
    assert not torch.allclose(expected[0], expected[1])


def test_models_of_another_shape_or_base_have_another_form():
    one = form(Decoder.of(tiny.llama().model))
    assert form(Decoder.of(tiny.llama(1).model)) == one
    for other in (tiny.llama(intermediate_size=32), tiny.llama(num_hidden_layers=2), scaled_llama()):
        assert form(Decoder.of(other.model)) != one


def hooked():
    model = tiny.llama()
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    return model


def adapted():
    model = tiny.llama()
    model.model.layers[1].mlp.down_proj = torch.nn.Sequential(model.model.layers[1].mlp.down_proj)
    return model


@pytest.mark.parametrize(
    "make",
    [
        tiny.gemma2, tiny.gpt2, hooked, adapted, lambda: tiny.llama(hidden_act="gelu"),
        lambda: tiny.llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
    ],
    ids=["gemma2", "gpt2", "a hook", "a layer replaced", "another activation", "a base that moves"],
)  # fmt: skip
def test_other_models_are_read_by_transformers(make):
    model = make()
    lm = CausalLM(model)
    assert lm.decoder is None
    with torch.inference_mode():
        expected = model(torch.tensor([[1, 2, 3, 4]])).logits[0, 1:]
    torch.testing.assert_close(lm.logits([1, 2, 3, 4], 2), expected, rtol=0, atol=ROUNDING)


def test_weights_are_shared_not_doubled():
    model = tiny.llama()
    before = copy.deepcopy(model)
    shallow = early_exit(model, 2)
    for each in (model, shallow, model):
        CausalLM(each)
    storages = {
        part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in model.parameters()
    }
    assert sum(storages.values()) == sum(part.nbytes for part in model.parameters())
    for (name, weight), known in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(weight, known), name
    read_by = Decoder.of(model.model).layers[0].widen.weight
    model.model.layers[0].mlp.up_proj.weight.data.zero_()
    assert read_by[64:].abs().max() == 0 < read_by[:64].abs().max()


def test_the_decoder_knows_no_other_classes():
    """A class that is added here needs its arithmetic checked above."""
    assert len(decoder._FAMILY) == len({type(make().model) for make in FAMILY.values()})
