"""Published EAGLE-3 heads: what they compute, and that a folder which does not fit is refused by name."""

import json

import pytest
import tiny
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from tiny import VOCAB, llama
from torch.nn.functional import rms_norm, silu
from transformers import DynamicCache

import nab
from nab.acceptance import Chain
from nab.backends import eagle3, pool
from nab.backends.heads import Head
from nab.backends.pretrained import Pretrained
from nab.backends.torch import CausalLM, Warper
from nab.cli import main
from nab.schemes import DynamicTree, Levels

DRAFT = 100
LAYOUTS = ("safeailab", "speculators")


def target(**changes):
    return llama(**{"num_hidden_layers": 8, **changes})


def weights(
    seed=0, *, width=32, target_width=32, heads=4, kv=2, head=8, inner=48, draft=DRAFT, own=True, fused=3
):
    """As SafeAILab names them; float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.3

    layer = {
        "self_attn.q_proj": (heads * head, 2 * width),
        "self_attn.k_proj": (kv * head, 2 * width),
        "self_attn.v_proj": (kv * head, 2 * width),
        "self_attn.o_proj": (width, heads * head),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
        "hidden_norm": (width,),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    shapes = {f"midlayer.{name}": shape for name, shape in layer.items()}
    shapes |= {"fc": (width, fused * target_width), "norm": (width,), "lm_head": (draft, width)}
    if own:
        shapes["embed_tokens"] = (VOCAB, width)
    tensors = {f"{name}.weight": normal(*shape) for name, shape in shapes.items()}
    chosen = torch.randperm(VOCAB, generator=generator)[:draft].sort().values
    tensors["d2t"] = chosen - torch.arange(draft)
    tensors["t2d"] = torch.zeros(VOCAB, dtype=torch.bool)
    tensors["t2d"][chosen] = True
    return tensors


def config(*, width=32, heads=4, kv=2, inner=48, draft=DRAFT, **changes):
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "num_hidden_layers": 1,
        "rms_norm_eps": 1e-3,
        "rope_theta": 10_000.0,
        "max_position_embeddings": 1024,
        "vocab_size": VOCAB,
        "draft_vocab_size": draft,
        **changes,
    }


def nested(flat):
    """The same in the layout of ``speculators``."""
    outside = ("draft_vocab_size", "norm_before_residual", "target_hidden_size", "norm_output")
    layer = {name: value for name, value in flat.items() if name not in (*outside, "architectures")}
    rest = {name: flat[name] for name in outside if name in flat}
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "transformer_layer_config": layer,
        "target_hidden_size": None,
        "eagle_aux_hidden_state_layer_ids": None,
        **rest,
    }


def save(folder, tensors, fields, layout="safeailab"):
    folder.mkdir(exist_ok=True)
    if layout == "speculators":
        tensors = {name.replace("midlayer.", "layers.0."): w for name, w in tensors.items()}
        fields = nested(fields)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def dense(
    w, ids, hidden, *, own=(), heads=4, kv=2, head=8, eps=1e-3, theta=10_000.0, before=False, swapped=False
):
    """Own features and logits of a text's entries, in plain operators.

    ``hidden`` is ``(rows, layers, target_width)``, and the last entries read the features ``own`` instead;
    ``before`` takes the normalised feature as residual, and ``swapped`` is wrong: the feature before the
    embedding.
    """
    rows = len(ids)

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"]

    def turned(x):  # (heads, rows, head): pairs (i, i + head / 2) turn by the position
        angles = torch.arange(rows).float()[:, None] * (
            1.0 / theta ** (torch.arange(0, head, 2).float() / head)
        )
        cos, sin = angles.cos().double(), angles.sin().double()
        a, b = x[..., : head // 2], x[..., head // 2 :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    feature = torch.cat([linear(hidden.flatten(1), "fc"), *own])
    h, e = (
        norm(feature, "midlayer.hidden_norm"),
        norm(w["embed_tokens.weight"][ids], "midlayer.input_layernorm"),
    )
    x = torch.cat([h, e] if swapped else [e, h], -1)
    q, k, v = (
        linear(x, f"midlayer.self_attn.{name}_proj").unflatten(-1, (-1, head)).transpose(0, 1)
        for name in "qkv"
    )
    q, k = turned(q), turned(k)
    mixed = []
    for i in range(heads):
        shared = i // (heads // kv)
        scores = q[i] @ k[shared].T / head**0.5
        scores = scores.masked_fill(torch.ones(rows, rows).triu(1).bool(), -torch.inf)
        mixed.append(scores.softmax(-1) @ v[shared])
    own = (h if before else feature) + linear(torch.cat(mixed, -1), "midlayer.self_attn.o_proj")
    m = norm(own, "midlayer.post_attention_layernorm")
    gated = silu(linear(m, "midlayer.mlp.gate_proj")) * linear(m, "midlayer.mlp.up_proj")
    own = own + linear(gated, "midlayer.mlp.down_proj")
    return own, linear(norm(own, "norm"), "lm_head")


def pair(folder, layout="safeailab", warper=None):
    """A target of 8 layers, and a head beside it."""
    lm = CausalLM(target(), warper)
    model = eagle3.load(save(folder, weights(), config(), layout), lm.model)
    return lm, Head(model, lm, lm.warper)


def text(rows=12, target_width=32, fused=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (rows,), generator=generator)
    return ids, torch.randn(rows, fused, target_width, generator=generator, dtype=torch.float64)


def forward(model, ids, features, positions=None, *, mask=None, cache=None):
    """Own features ``(rows, width)``; a chain from position 0 unless told."""
    positions = torch.arange(len(ids)) if positions is None else positions
    cache = DynamicCache() if cache is None else cache
    return model(ids[None], features[None], positions=positions[None], mask=mask, cache=cache)[0]


def run(model, ids, hidden):
    own = forward(model, ids, model.fused(hidden))
    return own, model.logits(own)


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def differs(found, expected):
    with pytest.raises(AssertionError):
        same(found, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("before", [False, True])
def test_the_forward_is_that_of_plain_operators(tmp_path, layout, before):
    w, (ids, hidden) = weights(), text()
    model = eagle3.load(save(tmp_path, w, config(norm_before_residual=before), layout), target())
    own, logits = run(model, ids, hidden)
    expected, law = dense(w, ids, hidden, before=before)
    same(own, expected)
    same(logits, law)
    differs(own, dense(w, ids, hidden, before=not before)[0])
    differs(own, dense(w, ids, hidden, before=before, swapped=True)[0])


@pytest.mark.parametrize("name", ["hidden_norm", "input_layernorm", "post_attention_layernorm"])
def test_every_norm_matters(tmp_path, name):
    """The reference without one of them is another: the comparison above sees each."""
    w, (ids, hidden) = weights(), text()
    own, _ = run(eagle3.load(save(tmp_path, w, config()), target()), ids, hidden)
    w[f"midlayer.{name}.weight"] = torch.ones(32, dtype=torch.float64)
    differs(own, dense(w, ids, hidden)[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 500.0},
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ],
)
def test_rope_parameters_are_honoured(tmp_path, layout, rope):
    w, (ids, hidden) = weights(), text()
    own, _ = run(eagle3.load(save(tmp_path, w, config(**rope), layout), target()), ids, hidden)
    same(own, dense(w, ids, hidden, theta=500.0)[0])
    differs(own, dense(w, ids, hidden)[0])


def test_scaled_rope_is_not_dropped(tmp_path):
    """Linear scaling by 4 is the same text at a quarter of the positions."""
    w, (ids, hidden) = weights(), text()
    plain = eagle3.load(save(tmp_path / "a", w, config()), target())
    scaling = {"rope_scaling": {"type": "linear", "factor": 4.0}}
    scaled = eagle3.load(save(tmp_path / "b", w, config(**scaling)), target())
    features, positions = plain.fused(hidden), torch.arange(len(ids))
    same(forward(scaled, ids, features, 4 * positions), forward(plain, ids, features))
    differs(forward(scaled, ids, features), forward(plain, ids, features))


@pytest.mark.parametrize("kv", [1, 2, 4])
def test_heads_of_another_size_and_shared_keys(tmp_path, kv):
    w, (ids, hidden) = weights(kv=kv, head=12), text()
    model = eagle3.load(save(tmp_path, w, config(kv=kv, head_dim=12)), target())
    same(run(model, ids, hidden)[0], dense(w, ids, hidden, kv=kv, head=12)[0])


@pytest.mark.parametrize("named", [False, True])
def test_a_head_of_another_width_than_the_target(tmp_path, named):
    w, (ids, hidden) = weights(target_width=48), text(target_width=48)
    fields = config(target_hidden_size=48) if named else config()
    model = eagle3.load(save(tmp_path, w, fields), target(hidden_size=48))
    assert model.width == 32
    own, logits = run(model, ids, hidden)
    same(own, dense(w, ids, hidden)[0])
    assert logits.shape == (len(ids), DRAFT)


def test_biases_are_read(tmp_path):
    w, (ids, hidden) = weights(), text()
    matrices = ("fc", *(f"midlayer.self_attn.{n}_proj" for n in "qkvo"))
    matrices = (*matrices, *(f"midlayer.mlp.{n}_proj" for n in ("gate", "up", "down")))
    w |= {f"{name}.bias": torch.randn(len(w[f"{name}.weight"]), dtype=torch.float64) for name in matrices}
    model = eagle3.load(save(tmp_path, w, config(attention_bias=True, mlp_bias=True)), target())
    same(run(model, ids, hidden)[0], dense(w, ids, hidden)[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_embeddings_of_its_own_it_shares_the_targets(tmp_path, layout):
    w, (ids, hidden), lm = weights(own=False), text(), target()
    model = eagle3.load(save(tmp_path, w, config(), layout), lm)
    embedding = lm.get_input_embeddings().weight
    assert model.embed_tokens.weight.data_ptr() == embedding.data_ptr()
    assert embedding.requires_grad
    same(run(model, ids, hidden)[0], dense(w | {"embed_tokens.weight": embedding}, ids, hidden)[0])


@pytest.mark.parametrize("steps", [[1] * 12, [5, 1, 6], [1, 11], [7, 5]])
def test_in_steps_with_a_cache_as_all_at_once(tmp_path, steps):
    ids, hidden = text()
    model = eagle3.load(save(tmp_path, weights(), config()), target())
    features, positions, cache, parts = model.fused(hidden), torch.arange(len(ids)), DynamicCache(), []
    for rows in (r.tolist() for r in torch.arange(len(ids)).split(steps)):
        parts.append(forward(model, ids[rows], features[rows], positions[rows], cache=cache))
    same(torch.cat(parts), run(model, ids, hidden)[0])
    assert cache.get_seq_length() == len(ids)


def test_the_recursion_reads_the_own_feature_before_the_final_norm(tmp_path):
    w, (ids, hidden) = weights(), text()
    model = eagle3.load(save(tmp_path, w, config()), target())
    own, logits = run(model, ids, hidden)
    same(logits, rms_norm(own, (32,), w["norm.weight"], 1e-3) @ w["lm_head.weight"].T)
    assert own.shape[-1] == model.width == model.fused(hidden).shape[-1]


def test_a_mask_is_respected(tmp_path):
    """Two branches behind a common text, fed in one forward, are each what it is alone."""
    ids, hidden = text(10)
    model = eagle3.load(save(tmp_path, weights(), config()), target())
    features, stem = model.fused(hidden), 6
    branches = [[6, 7], [8, 9]]
    alone = []
    for rows in branches:
        cache = DynamicCache()
        forward(model, ids[:stem], features[:stem], cache=cache)
        alone.append(forward(model, ids[rows], features[rows], torch.tensor([6, 7]), cache=cache))
    allowed = torch.zeros(4, 10, dtype=torch.bool)
    allowed[:, :stem] = True
    allowed[:, stem:] = torch.block_diag(*[torch.ones(2, 2).tril()] * 2).bool()
    mask = torch.zeros(1, 1, 4, 10, dtype=torch.float64).masked_fill(~allowed, -torch.inf)
    cache, positions = DynamicCache(), torch.tensor([6, 7, 6, 7])
    forward(model, ids[:stem], features[:stem], cache=cache)
    both = forward(model, ids[stem:], features[stem:], positions, mask=mask, cache=cache)
    same(both, torch.cat(alone))
    cache.crop(-4)
    differs(forward(model, ids[stem:], features[stem:], positions, cache=cache), both)


def test_d2t_gives_offsets(tmp_path):
    w = weights()
    model = eagle3.load(save(tmp_path, w, config()), target())
    assert model.tokens.tolist() == [i + offset for i, offset in enumerate(w["d2t"].tolist())]
    assert sorted(model.tokens.tolist()) == w["t2d"].nonzero()[:, 0].tolist()
    assert (model.vocab_size, model.skips_first) == (VOCAB, True)


@pytest.mark.parametrize("kept", [(), ("d2t",), ("d2t", "t2d")])
@pytest.mark.parametrize("size", [VOCAB, None])
def test_a_draft_vocabulary_that_is_the_targets(tmp_path, kept, size):
    """Nothing to map: SafeAILab's buffers are then all zero, or left out."""
    w = weights(draft=VOCAB)
    w |= {"d2t": torch.zeros(VOCAB, dtype=torch.int64), "t2d": torch.zeros(VOCAB, dtype=torch.bool)}
    w = {name: tensor for name, tensor in w.items() if name not in {"d2t", "t2d"} - {*kept}}
    model = eagle3.load(save(tmp_path, w, config(draft=size)), target())
    assert model.tokens.tolist() == list(range(VOCAB))


def test_t2d_may_be_missing(tmp_path):
    w = weights()
    del w["t2d"]
    assert len(eagle3.load(save(tmp_path, w, config()), target()).tokens) == DRAFT


IDS = "eagle_aux_hidden_state_layer_ids"


@pytest.mark.parametrize(
    ("layout", "fields", "layers"),
    [
        ("safeailab", {}, (2, 4, 5)),
        ("speculators", {}, (2, 4, 5)),
        ("speculators", {IDS: [0, 3, 7]}, (0, 3, 7)),
        ("safeailab", {IDS: [1, 3, 4]}, (1, 3, 4)),
        ("safeailab", {"eagle_config": {IDS: [1, 3, 4]}}, (2, 4, 5)),  # counts outputs
        ("safeailab", {"eagle_config": {IDS: [2, 6]}}, (3, 7)),
    ],
)
def test_which_hidden_states_it_reads(tmp_path, layout, fields, layers):
    w = weights(fused=len(layers))
    save(tmp_path, w, config(), layout)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    lm = target()
    model = eagle3.load(tmp_path, lm)
    assert model.layers == layers
    ids, _ = text()
    inputs = []
    for index in layers:
        lm.model.layers[index].register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    states = lm(ids[None], output_hidden_states=True).hidden_states
    for index, given in zip(layers, inputs, strict=True):
        assert torch.equal(states[index], given)
    hidden = torch.stack([states[index][0] for index in model.layers], 1)
    assert model.fused(hidden).shape == (len(ids), 32)


def test_parts_with_an_index(tmp_path):
    w, (ids, hidden) = weights(), text()
    save(tmp_path, w, config())
    (tmp_path / "model.safetensors").unlink()
    names, places = sorted(w), {}
    for number, part in enumerate((names[::2], names[1::2])):
        places |= dict.fromkeys(part, f"model-{number}.safetensors")
        save_file({name: w[name] for name in part}, tmp_path / f"model-{number}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    same(run(eagle3.load(tmp_path, target()), ids, hidden)[0], dense(w, ids, hidden)[0])
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-1\.safetensors"):
        eagle3.load(tmp_path, target())


def test_the_targets_dtype_but_for_the_frequencies(tmp_path):
    model = eagle3.load(save(tmp_path, weights(), config()), target(dtype=torch.bfloat16))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.rotary.inv_freq.dtype == torch.float32
    ids, hidden = text()
    own, logits = run(model, ids, hidden.bfloat16())
    assert own.dtype == logits.dtype == torch.bfloat16
    far = torch.tensor([[1000]])
    cos, _ = model.rotary(own, far)
    exact, _ = eagle3.load(tmp_path, target()).rotary(own.double(), far)
    assert torch.equal(cos, exact.bfloat16())


def without(name):
    def change(tensors):
        del tensors[name]

    return change


def changed(name, value):
    def change(tensors):
        tensors[name] = value(tensors[name]) if name in tensors else value(None)

    return change


def at(index, value):
    def change(tensor):
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return change


Q = "midlayer.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(Q), r"model\.safetensors: tensor LAYERself_attn\.q_proj\.weight \(32, 64\) is missing"),
        (without("fc.weight"), r"tensor fc\.weight \(32, 96\) is missing"),
        (without("d2t"), r"tensor d2t \(100,\) is missing"),
        (
            changed(Q, lambda w: w[:, :32].clone()),
            r"tensor LAYERself_attn\.q_proj\.weight has shape \(32, 32\), expected \(32, 64\)",
        ),
        (
            changed("fc.weight", lambda w: w[:, :64].clone()),
            r"tensor fc\.weight has shape \(32, 64\), expected \(32, 96\)",
        ),
        (
            changed("embed_tokens.weight", lambda w: w[:9].clone()),
            r"embed_tokens\.weight has shape \(9, 32\)",
        ),
        (changed("d2t", lambda w: w[:9].clone()), r"tensor d2t has shape \(9,\), expected \(100,\)"),
        (changed("t2d", lambda w: w[:9].clone()), r"tensor t2d has shape \(9,\), expected \(257,\)"),
        (changed("extra.weight", lambda _: torch.zeros(1)), r"unknown tensors extra\.weight"),
        (changed("fc_norm.0.weight", lambda _: torch.zeros(1)), r"unknown tensors fc_norm\.0\.weight"),
        (changed("d2t", at(99, 500)), r"d2t maps to ids between \d+ and 599, expected 0 to 256"),
        (changed("d2t", at(0, -1)), r"d2t maps to ids between -1 and"),
        (changed("d2t", lambda w: torch.cat([w[:1], w[:1] - 1, w[2:]])), "100 draft ids to only 99 tokens"),
        (changed("d2t", lambda w: w.double()), r"d2t must hold integers, found torch\.float64"),
        (changed("t2d", lambda w: ~w), r"t2d marks other tokens than d2t maps to \(157 marked\)"),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_that_do_not_fit_are_refused(tmp_path, layout, change, message):
    w = weights()
    change(w)
    prefix = {"safeailab": r"midlayer\.", "speculators": r"layers\.0\."}[layout]
    with pytest.raises(ValueError, match=message.replace("LAYER", prefix)):
        eagle3.load(save(tmp_path, w, config(), layout), target())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 300}, r"config\.json: vocab_size is 300, expected 257"),
        ({"target_hidden_size": 48}, "target_hidden_size is 48, expected 32"),
        ({"num_hidden_layers": 2}, "num_hidden_layers is 2, expected 1"),
        ({"hidden_size": None}, "hidden_size must be a positive integer, found None"),
        ({"hidden_size": "32"}, "hidden_size must be a positive integer, found 32"),
        ({"draft_vocab_size": -1}, "draft_vocab_size must be a positive integer, found -1"),
        ({"draft_vocab_size": 90}, r"tensor d2t has shape \(100,\), expected \(90,\)"),
        ({"rms_norm_eps": "small"}, r"config\.json: .*rms_norm_eps"),
        ({"norm_output": True}, "norm_output is True, which is EAGLE-3.1"),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fields_that_do_not_fit_are_refused(tmp_path, layout, fields, message):
    with pytest.raises(ValueError, match=r"(?s)" + message):
        eagle3.load(save(tmp_path, weights(), config(**fields), layout), target())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eagle_config": {"norm_before_fc": True}}, "norm_before_fc is True, which is EAGLE-3.1"),
        ({"eagle_config": 3}, "eagle_config must be an object, found 3"),
        ({"speculators_model_type": "eagle"}, "speculators_model_type is eagle, expected eagle3"),
        ({"transformer_layer_config": {}}, "speculators_model_type is None, expected eagle3"),
        ({IDS: [2, 4, 8]}, r"rising inputs of the target's 8 layers, found \[2, 4, 8\]"),
        ({IDS: [4, 2, 5]}, "rising inputs"),
        ({IDS: [2, 2, 5]}, "rising inputs"),
        ({IDS: [-1, 2, 5]}, "rising inputs"),
        ({IDS: [2, 4.0, 5]}, "must be a list of integers"),
        ({IDS: "245"}, "must be a list of integers"),
        ({IDS: [2, 4]}, r"tensor fc\.weight has shape \(32, 96\), expected \(32, 64\)"),
    ],
)
def test_a_configuration_that_says_something_else_is_refused(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        eagle3.load(save(tmp_path, weights(), config(**fields)), target())


def test_a_target_too_shallow_for_the_default_layers(tmp_path):
    save(tmp_path, weights(), config())
    assert eagle3.load(tmp_path, target(num_hidden_layers=7)).layers == (2, 3, 4)
    with pytest.raises(ValueError, match="a target of at least 7 layers, found 6"):
        eagle3.load(tmp_path, target(num_hidden_layers=6))


def test_a_target_of_another_width_is_refused(tmp_path):
    save(tmp_path, weights(), config())
    with pytest.raises(ValueError, match=r"fc\.weight has shape \(32, 96\), expected \(32, 144\)"):
        eagle3.load(tmp_path, target(hidden_size=48))
    save(tmp_path, weights(own=False, target_width=48), config())
    with pytest.raises(ValueError, match=r"embed_tokens\.weight is missing.*width 48 where the head's is 32"):
        eagle3.load(tmp_path, target(hidden_size=48))


def test_other_heads_are_called_what_they_are(tmp_path):
    w = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in weights().items()}
    first = {name: tensor for name, tensor in w.items() if name.startswith(("layers", "fc", "embed"))}
    del first["layers.0.hidden_norm.weight"]
    save(tmp_path, first, config())
    with pytest.raises(ValueError, match=r"of EAGLE-1 or EAGLE-2.*found embed_tokens\.weight, fc\.weight"):
        eagle3.load(tmp_path, target())
    save(tmp_path, {f"model.{name}": tensor for name, tensor in w.items()}, config())
    with pytest.raises(ValueError, match=r"no EAGLE-3 head.*found model\.d2t"):
        eagle3.load(tmp_path, target())
    save(tmp_path, weights() | w, config())
    with pytest.raises(ValueError, match="no EAGLE-3 head"):
        eagle3.load(tmp_path, target())


def test_files_that_are_missing_or_cannot_be_read(tmp_path):
    lm = target()
    with pytest.raises(FileNotFoundError, match=r"nowhere.model\.safetensors"):
        eagle3.load(tmp_path / "nowhere", lm)
    save(tmp_path, weights(), config())
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        eagle3.load(tmp_path, lm)
    for content, message in (
        (b"{", "no readable JSON"),
        (b"\xff", "no readable JSON"),
        (b"[]", "found list"),
    ):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ValueError, match=rf"config\.json.*{message}"):
            eagle3.load(tmp_path, lm)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        eagle3.load(tmp_path, lm)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        eagle3.load(tmp_path, lm)


def test_pickles_are_not_read(tmp_path):
    save(tmp_path, weights(), config())
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*pickles are not read.*safetensors\.torch"):
        eagle3.load(tmp_path, target())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("read", [1, 2, 9])
def test_a_draft_is_the_recursion_in_plain_operators(tmp_path, layout, read):
    """Fused states up to the last token read, then own features; no mass outside the draft vocabulary."""
    w, (lm, head) = weights(), pair(tmp_path, layout)
    ids = text(read + 1)[0]
    tokens = ids.tolist()
    lm.score(tokens[:read], read)
    draft = Levels([Chain()] * 3).propose(head, tokens, VOCAB, [0.2, 0.5, 0.8])
    assert len(draft.tokens) == 3
    states = lm.model(ids[None, :read], output_hidden_states=True).hidden_states
    hidden = torch.stack([states[layer][0] for layer in (2, 4, 5)], 1)
    marked, own = w["t2d"], []
    for token, q in zip(draft.tokens, draft.q, strict=True):
        features, logits = dense(w, ids[1:], hidden, own=own)
        assert marked[token]
        assert not q[~marked].any()
        same(q[marked], logits[-1].softmax(-1))
        own, ids = [*own, features[-1:]], torch.cat([ids, torch.tensor([token])])


def test_there_is_no_law_of_the_second_token(tmp_path):
    """So a query whose prompt is one token begins with an empty draft."""
    lm, head = pair(tmp_path)
    assert not head.score([5], 1).any()
    assert not head.score([5, 6], 1)[0].any()
    same(head.score([5, 6], 1)[1].sum(), torch.tensor(1.0, dtype=torch.float64))
    for scheme in (None, DynamicTree(2, 5, 3)):
        lm.reset()
        head.reset()
        rounds = nab.decode(lm, [head], nab.Constant([1.0]), [5], draft_len=3, rng=0, scheme=scheme)
        drafted = [next(rounds).drafted for _ in range(3)]
        assert drafted == [0, *[scheme.nodes if scheme else 3] * 2]


def fitted(head, tokens):
    """A head that knows what follows in a text: least squares from its normed own features."""
    model, lm = head.model, head.target
    lm.score(tokens, len(tokens))
    ids, followed = torch.tensor(tokens[1:-1]), torch.tensor(tokens[2:])
    own, _ = run(model, ids, lm.hidden(tokens, model.layers)[:-2])
    wanted = (followed[:, None] == model.tokens).double()
    model.lm_head.weight = torch.nn.Parameter(40 * torch.linalg.lstsq(model.norm(own), wanted)[0].T)


@pytest.mark.parametrize("scheme", [None, DynamicTree(3, 10, 4)])
def test_greedy_text_is_that_of_plain_decoding(tmp_path, scheme):
    lm, head = pair(tmp_path, warper=Warper(temperature=0))
    if scheme:
        head.warper = Warper()  # greedy laws would grow no branches

    def answer(draft_len, scheme=None):
        lm.reset()
        head.reset()
        rounds = nab.decode(
            lm, [head], nab.Constant([1.0]), [1, 2, 3], draft_len=draft_len, rng=0, scheme=scheme
        )
        found = list(nab.until(rounds, max_new_tokens=40))
        return [token for r in found for token in r.emitted], sum(r.accepted for r in found)

    plain, _ = answer(0)
    with torch.inference_mode():
        fitted(head, [1, 2, 3, *plain])
    tokens, accepted = answer(4, scheme)
    assert tokens == plain
    assert accepted > 5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_pool_takes_a_folder(tmp_path, layout, dtype):
    lm = CausalLM(target(dtype=dtype), Warper(temperature=0.5))
    folder = save(tmp_path / "head", weights(), config(), layout)
    drafters = pool.build([str(folder), "lookup"], Pretrained("t", lm.model, tiny.tokenizer()), lm)
    head = drafters["head"]
    assert isinstance(head, Head)
    assert (head.name, head.context, head.warper) == ("head", lm.context, lm.warper)
    for scheme in (None, DynamicTree(3, 10, 4)):
        rounds = nab.decode(lm, [head], nab.Constant([1.0]), [1, 2, 3], draft_len=4, rng=0, scheme=scheme)
        assert sum(next(rounds).drafted for _ in range(4)) == 4 * (scheme.nodes if scheme else 4)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (config(), True),
        (nested(config()), True),
        ({"architectures": ["LlamaForCausalLM"], "draft_vocab_size": 100}, True),
        ({"model_type": "eagle"}, True),
        ({"speculators_model_type": "dflash"}, True),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, False),
        ({}, False),
    ],
)
def test_a_folder_is_told_by_its_configuration(tmp_path, fields, expected):
    assert not eagle3.is_head(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert eagle3.is_head(tmp_path) is expected


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("models") / "target", target(dtype=torch.float32))


def command(folder, head, *more):
    options = ["--target", folder, "--drafters", f"{head},lookup", "--dtype", "float64", "--prompt", "a b a"]
    return CliRunner().invoke(main, [*map(str, ("run", *options, "--max-new-tokens", 12, *more))])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_command_line_names_a_folder(folder, tmp_path, layout):
    head, found = save(tmp_path / "head", weights(), config(), layout), []
    for selector in ("fixed:head", "normal-hedge", "plain"):
        result = command(folder, head, "--selector", selector, "--temperature", 0, "--json")
        assert result.exit_code == 0, result.output
        found.append(json.loads(result.stdout)["queries"][0])
    assert found[0]["choice_share"] == {"head": 1, "lookup": 0}
    assert found[0]["text"] == found[1]["text"] == found[2]["text"]


def test_a_command_line_says_what_does_not_fit(folder, tmp_path):
    head = save(tmp_path / "head", weights(), config(vocab_size=300))
    result = command(folder, head)
    assert result.exit_code == 1
    assert "vocab_size is 300, expected 257 for this target" in result.stderr
    (head / "model.safetensors").rename(head / "model.bin")
    assert "pickles are not read; convert" in command(folder, head).stderr
