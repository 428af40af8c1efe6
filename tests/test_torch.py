"""The torch backend: the law, the rewinding cache, early exit."""

import numpy as np
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import MambaConfig, MambaForCausalLM

import nab
from nab.backends.cache import Tree, aligned
from nab.backends.drafters import Lookup, NGram
from nab.backends.torch import CausalLM, Lifted, Warper, early_exit

every_architecture = pytest.mark.parametrize(
    "make", tiny.ARCHITECTURES.values(), ids=tiny.ARCHITECTURES.keys()
)


def recomputed(model, tokens, start):
    """Logits without any cache."""
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0, start - 1 :]


@every_architecture
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_any_sequence_of_rewinds_equals_recomputation(make, seed):
    rng, model = np.random.default_rng(seed), CausalLM(make())
    tokens = rng.integers(0, tiny.VOCAB, 5).tolist()
    for _ in range(8):
        kept = int(rng.integers(1, len(tokens) + 1))
        tokens = tokens[:kept] + rng.integers(0, tiny.VOCAB, rng.integers(1, 30)).tolist()
        start = int(rng.integers(1, len(tokens) + 1))
        expected = recomputed(model.model, tokens, start)
        torch.testing.assert_close(model.logits(tokens, start), expected, rtol=0, atol=1e-10)


@every_architecture
def test_a_drafter_may_lag_by_hundreds_of_tokens(make):
    rng, model = np.random.default_rng(0), CausalLM(make())
    tokens = rng.integers(0, tiny.VOCAB, 700).tolist()
    for end, start in ((10, 3), (500, 500), (700, 650), (300, 12), (690, 689), (699, 1)):
        expected = recomputed(model.model, tokens[:end], start)
        torch.testing.assert_close(model.logits(tokens[:end], start), expected, rtol=0, atol=1e-10)


def test_the_rewind_check_can_fail():
    """A cache that is not cropped gives other scores."""
    model = CausalLM(tiny.llama())
    model.logits([1, 2, 3, 4], 1)
    model._cache.tree = Tree([1, 2, 9, 9])  # it now believes that it holds 9, 9
    wrong = model.logits([1, 2, 9, 9, 5], 5)
    assert (wrong - recomputed(model.model, [1, 2, 9, 9, 5], 5)).abs().max() > 1e-3


def test_an_interrupted_forward_leaves_a_clean_cache(monkeypatch):
    model = CausalLM(tiny.llama())
    model.logits([1, 2, 3], 1)
    with monkeypatch.context() as patch:
        patch.setattr(model._cache.keys, "update", tiny.interrupted(model._cache.keys.update, layer=2))
        with pytest.raises(KeyboardInterrupt):
            model.logits([1, 2, 3, 4, 5], 4)
    expected = recomputed(model.model, [1, 2, 3, 4, 5], 2)
    torch.testing.assert_close(model.logits([1, 2, 3, 4, 5], 2), expected, rtol=0, atol=1e-10)


def test_a_good_drafter_is_accepted_and_found():
    model = tiny.llama(3)
    drafters = [CausalLM(tiny.perturbed(model, 2.0)), CausalLM(tiny.perturbed(model, 0.01))]
    selector = nab.Selector(nab.NormalHedge(), 2, rng=0)
    rounds = nab.decode(CausalLM(model), drafters, selector, [1, 2, 3], draft_len=4, rng=0)
    kept = list(nab.until(rounds, max_new_tokens=100))
    assert np.mean([r.choice for r in kept]) > 0.9
    assert 100 / len(kept) > 3


@pytest.mark.parametrize(
    ("warper", "expected"),
    [
        (Warper(), [0.5, 0.25, 0.125, 0.125]),
        (Warper(temperature=0), [1, 0, 0, 0]),
        (Warper(temperature=0.5), np.array([16, 4, 1, 1]) / 22),
        (Warper(top_k=2), [2 / 3, 1 / 3, 0, 0]),
        (Warper(top_k=3), [0.5, 0.25, 0.125, 0.125]),  # the third and fourth tie
        (Warper(top_p=0.4), [1, 0, 0, 0]),
        (Warper(top_p=0.6), [2 / 3, 1 / 3, 0, 0]),
        (Warper(top_p=1e-9), [1, 0, 0, 0]),
        (Warper(temperature=0.5, top_k=2, top_p=0.9), [0.8, 0.2, 0, 0]),
        (Warper(temperature=5e-324), [1, 0, 0, 0]),  # 1 / 5e-324 is infinite
        (Warper(temperature=1e-20), [1, 0, 0, 0]),
    ],
)
def test_the_warped_law(warper, expected):
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64).log() + 3
    torch.testing.assert_close(warper(logits), torch.tensor(expected, dtype=torch.float64).reshape(4))


def test_top_p_that_is_reached_exactly_keeps_no_more():
    law = Warper(top_p=0.5)(torch.zeros(2, dtype=torch.float64))
    assert law.tolist() == [1, 0]


def test_the_warped_law_is_the_one_transformers_samples_from():
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(20, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    theirs = LogitsProcessorList([TemperatureLogitsWarper(0.7), TopKLogitsWarper(30), TopPLogitsWarper(0.8)])
    expected = theirs(torch.zeros(20, 1, dtype=torch.long), logits.clone()).softmax(-1)
    torch.testing.assert_close(Warper(0.7, 30, 0.8)(logits), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Warper(temperature=-1), "temperature .*-1"),
        (lambda: Warper(temperature=float("nan")), "temperature .*nan"),
        (lambda: Warper(top_k=-2), "top_k .*-2"),
        (lambda: Warper(top_p=0), r"top_p .*0"),
        (lambda: early_exit(tiny.llama(), 3), "after 1 to 2 of 3 layers, got 3"),
        (lambda: CausalLM(tiny.llama()).score([1, 2], 0), r"start must lie in \[1, 2\], got 0"),
        (
            lambda: CausalLM(tiny.llama(max_position_embeddings=8), name="t").score([1] * 9, 9),
            "9 .*context of t: 8",
        ),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_logits_name_the_model(value):
    model = tiny.llama()
    model.lm_head.weight.data[7] = value
    with pytest.raises(ValueError, match="the expert returned logits that are NaN or infinite"):
        CausalLM(model, name="the expert").score([1, 2], 1)


def test_models_that_cannot_forget_are_refused():
    config = MambaConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, state_size=4)
    with pytest.raises(ValueError, match="recurrent state"):
        CausalLM(MambaForCausalLM(config))


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_early_exit_is_the_first_layers_and_shares_their_weights(make):
    model = make().train(False)
    shallow = early_exit(model, 2)
    blocks = model.model.layers if hasattr(model, "model") else model.transformer.h
    tokens = [1, 2, 3, 4]
    before = recomputed(shallow, tokens, 1)
    whole = {p.data_ptr() for p in model.parameters()}
    assert all(p.data_ptr() in whole for p in shallow.parameters())
    del blocks[2:]
    torch.testing.assert_close(recomputed(model, tokens, 1), before, rtol=0, atol=0)


def test_early_exit_of_tied_embeddings():
    model = tiny.llama(tie_word_embeddings=True)
    shallow = early_exit(model, 1)
    assert shallow.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_lifted_laws_are_processed_and_silence_stays_silence():
    lookup = Lifted(Lookup(5, 2, 1), Warper(temperature=0.5), torch.device("cpu"), torch.float64)
    laws = lookup.score([1, 2, 3, 1], 3)
    torch.testing.assert_close(laws, torch.tensor([[0, 0, 0, 0, 0], [0, 0, 1, 0, 0]], dtype=torch.float64))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.25])
@pytest.mark.parametrize("warper", [Warper(), Warper(temperature=0)])
def test_a_broken_numpy_law_names_the_model(value, warper):
    class Broken:
        def score(self, tokens, start):
            return np.array([[0.5, value]])

    with pytest.raises(ValueError, match="the table returned a law"):
        Lifted(Broken(), warper, torch.device("cpu"), torch.float32, "the table").score([0], 1)


def test_saturated_ngram_contexts_are_laws_at_every_temperature():
    """Contexts whose kept probabilities fill 1: what is left for the shorter context may round below 0."""
    rng, contexts, kept = np.random.default_rng(0), 500, 7
    model = NGram(
        np.ones(contexts),
        keys=[np.arange(contexts, dtype=np.uint64)],
        offsets=[np.arange(contexts + 1) * kept],
        tokens=[np.tile(np.arange(kept), contexts)],
        probs=[rng.dirichlet(np.ones(kept), contexts).ravel().astype(np.float16)],
    )
    lifted = Lifted(model, Warper(temperature=0.7), torch.device("cpu"), torch.float32)
    laws = lifted.score(list(range(contexts)), 1)
    torch.testing.assert_close(laws.sum(-1), torch.ones(contexts), rtol=0, atol=1e-5)


@tiny.NEEDS_CUDA
@pytest.mark.parametrize(("tokens", "parents"), [([1, 2, 3, 4], None), ([1, 2, 3, 4, 4, 5], [-1, -2, 1])])
def test_cuda_agrees_with_cpu(tokens, parents):
    """To float32's rounding, in float64 too: transformers has norms and angles of positions in float32."""
    expected = CausalLM(tiny.llama()).score(tokens, 1, parents)
    found = CausalLM(tiny.llama().to("cuda")).score(tokens, 1, parents)
    torch.testing.assert_close(found.cpu().float(), expected.float())


@pytest.mark.parametrize("device", tiny.DEVICES)
def test_texts_are_read_on_from_anywhere(device):
    """In float32, whose attention CUDA has kernels of its own for, with demands on where masks lie."""
    model, tokens = tiny.llama(dtype=torch.float32).to(device), [k % 7 for k in range(30)]
    whole = CausalLM(model).score(tokens, 1)
    for known in range(1, 20):
        lm = CausalLM(model)
        lm.score(tokens[:known], known)
        for drafted in (2, 5):
            laws = lm.score(tokens[: known + drafted], known)
            torch.testing.assert_close(laws.float(), whole[known - 1 : known + drafted].float())


def test_slices_of_masks_are_aligned_for_gpus():
    mask = torch.empty(5, 40, device="meta")[:3, 5:18]
    found = aligned(mask)
    assert found.shape == mask.shape
    assert (found.stride(), found.storage_offset()) == ((16, 1), 0)
