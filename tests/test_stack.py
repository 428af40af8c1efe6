"""Drafters stacked into one are scored and draft as they do alone."""

import numpy as np
import pytest
import tiny
import torch

import nab
from nab.backends import heads
from nab.backends.drafters import Lookup
from nab.backends.heads import Head, Shape
from nab.backends.stack import stacked
from nab.backends.torch import CausalLM, Lifted, Warper

WARPERS = [Warper(0), Warper(), Warper(0.7, top_k=30)]


def head(target, seed, warper, layers=(0, 2)):
    """An untrained one, with a draft vocabulary of its own."""
    rng = np.random.default_rng(seed)
    tokens = torch.tensor(rng.permutation(tiny.VOCAB)[:100])
    torch.manual_seed(seed)
    model = heads.HeadModel(Shape(layers, 48, 100), target.model, tokens)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.3)
    return Head(model.settle(), target, warper, name=f"head {seed}")


def pool(kind, warper):
    """A target and drafters of one form, and a lookup that has none."""
    target = CausalLM(tiny.llama(), warper)
    drafters = {
        "models": lambda: [
            CausalLM(tiny.perturbed(tiny.llama(), 0.05 * 2**k, seed=k), warper) for k in range(3)
        ],
        "heads": lambda: [head(target, k, warper) for k in range(3)],
        "heads of one layer": lambda: [head(target, k, warper, (3,)) for k in range(2)],
    }[kind]()
    drafters.append(Lifted(Lookup(tiny.VOCAB), warper, torch.device("cpu"), torch.float64))
    return target, drafters


def decoded(target, drafters, seed=1, tokens=100, evaluate=None):
    loop = nab.decode(
        target,
        drafters,
        nab.Selector(nab.NormalHedge(), len(drafters), rng=seed),
        [3, 1, 2],
        draft_len=3,
        rng=seed,
    )
    return list(nab.until(loop, max_new_tokens=tokens))


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert (one.choice, one.drafted, one.emitted) == (other.choice, other.drafted, other.emitted)
        np.testing.assert_allclose(one.gamma, other.gamma, rtol=0, atol=1e-10)
        np.testing.assert_allclose(one.realised, other.realised, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["models", "heads", "heads of one layer"])
@pytest.mark.parametrize("warper", WARPERS, ids=str)
def test_a_stack_scores_and_drafts_as_its_members_alone(kind, warper):
    """Whole answers in float64: choices, drafts, texts and scores; drafters are switched within them."""
    expected = decoded(*pool(kind, warper))
    target, drafters = pool(kind, warper)
    (stack,) = stacked(drafters)
    assert stack.members == drafters[:-1]
    assert getattr(drafters[-1], "stack", None) is None
    calls, acceptance = [], stack.acceptance
    stack.acceptance = lambda *question: calls.append(1) or acceptance(*question)
    found = decoded(target, drafters)
    assert_same(found, expected)
    assert len(calls) == len(found)
    assert len({r.choice for r in found}) > 1
    for each in (target, *drafters[:-1]):
        each.reset()
    assert_same(decoded(target, drafters), expected)


def test_that_check_can_fail():
    target, drafters = pool("models", Warper())
    expected = decoded(target, drafters)
    stacked(drafters)
    drafters[1].stack.members = [drafters[1], drafters[0], drafters[2]]
    with pytest.raises((AssertionError, ValueError)):
        assert_same(decoded(target, drafters), expected)


@pytest.mark.parametrize("kind", ["models", "heads"])
def test_scores_are_those_of_the_rule(kind):
    """Of members one by one, from dense laws; of parts of the text, in any order."""
    target, drafters = pool(kind, Warper())
    tokens = np.random.default_rng(0).integers(0, tiny.VOCAB, 60).tolist()
    p = target.score(tokens, 1)
    alone = [drafter.score(tokens[:-1], 1) for drafter in drafters[:-1]]
    (stack,) = stacked(drafters)
    for start, end in ((1, 5), (5, 6), (6, 30), (12, 20), (20, 60)):
        gamma, realised = stack.acceptance(
            tokens[:end], start, [p[start - 1 : end - 2], p[end - 2 : end - 1]]
        )
        for i, q in enumerate(alone):
            own = p[start - 1 : end - 1], q[start - 1 : end - 1]
            torch.testing.assert_close(gamma[:, i], nab.Chain().probability(*own), rtol=0, atol=1e-10)
            expected = nab.Chain().realised(*own, torch.tensor(tokens[start:end]))
            torch.testing.assert_close(realised[:, i], expected, rtol=0, atol=1e-10)


def test_a_member_takes_over_what_the_stack_has_read():
    """It is fed what neither has read, and nothing twice."""
    target, drafters = pool("models", Warper())
    stacked(drafters)
    tokens = np.random.default_rng(0).integers(0, tiny.VOCAB, 40).tolist()
    drafters[0].stack.acceptance(tokens, 1, [target.score(tokens, 1)[:-1]])
    counts, read = [], drafters[2]._read
    drafters[2]._read = lambda ids, *rest: counts.append(ids.shape[1]) or read(ids, *rest)
    drafters[2].draft(tokens, 2, target.score(tokens, 40), [0.5, 0.5])
    assert counts == [1, 1]
    fresh, cold = pool("models", Warper())[1][2], drafters[2].score(tokens, 30)
    torch.testing.assert_close(cold, fresh.score(tokens, 30), rtol=0, atol=1e-10)


def test_drafters_that_differ_are_not_stacked():
    small, warper = tiny.llama(num_hidden_layers=1), Warper()
    models = [
        CausalLM(small, warper), CausalLM(tiny.llama(), warper), CausalLM(tiny.gpt2(), warper),
        CausalLM(tiny.gpt2(), warper), CausalLM(tiny.llama(), Warper(0.5)),
    ]  # fmt: skip
    assert stacked(models) == []
    assert (
        next(stack.members for stack in stacked([*models, CausalLM(tiny.llama(3), warper)]))[0] is models[1]
    )


def test_weights_are_views_of_the_stack():
    _, drafters = pool("models", Warper())
    before = [model.model.state_dict() for model in drafters[:-1]]
    before = [{name: weight.clone() for name, weight in each.items()} for each in before]
    stacked(drafters)
    storages = set()
    for drafter, known in zip(drafters[:-1], before, strict=True):
        for name, weight in drafter.model.state_dict().items():
            assert torch.equal(weight, known[name]), name
            storages.add(weight.untyped_storage().data_ptr())
    parts = drafters[0].stack._parts
    read = {each.untyped_storage().data_ptr() for each in nab.backends.decoder.tensors(parts)}
    assert storages - read <= {
        each.untyped_storage().data_ptr() for d in drafters[:-1] for each in d.model.buffers()
    }


def test_a_member_that_breaks_is_benched_alone():
    target, drafters = pool("models", Warper())
    stacked(drafters)
    drafters[1].model.lm_head.weight.data.fill_(torch.nan)
    benches = nab.Pool(drafters)
    with pytest.warns(nab.DrafterWarning, match="drafter 1"):
        rounds = decoded(target, benches, tokens=40)
    assert list(benches.benched) == [1]
    assert all(r.gamma[:, 1].max() == 0 for r in rounds)
    assert rounds[-1].gamma[:, [0, 2]].max() > 0


def test_what_is_stacked_stays_so_and_nobody_is_stacked_with_itself():
    model = tiny.llama()
    drafters = [CausalLM(tiny.perturbed(model, amount)) for amount in (0.1, 0.2)]
    assert stacked(drafters[:1] * 2) == []
    (stack,) = stacked(drafters)
    assert stacked(drafters) == []
    assert [each.stack for each in drafters] == [stack, stack]
