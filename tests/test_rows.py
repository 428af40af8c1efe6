"""Drawing and verifying by rows: the decisions of ``nab.sampling``, one by one and in whole answers."""

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_heads import head_model

import nab
from nab import sampling
from nab.backends import heads, rows
from nab.backends.drafters import Lookup
from nab.backends.heads import Head
from nab.backends.torch import CausalLM, Certain, Lifted, Warper

sixteenths = st.integers(0, 16)


def laws(count, vocab=4):
    """Dyadic masses: sums are exact, so equal decisions are not a matter of rounding."""
    law = st.lists(sixteenths, min_size=vocab, max_size=vocab).filter(any)
    return st.lists(law, min_size=count, max_size=count).map(lambda x: np.array(x) / 16)


def draws(count):
    return st.lists(st.integers(0, 63).map(lambda k: k / 64), min_size=count, max_size=count)


@given(laws(3), draws(3))
def test_draws_are_those_of_sample(masses, us):
    found = rows.draw(torch.tensor(masses), rows.uniforms(us, torch.tensor(masses))[:, None])
    assert found.tolist() == [sampling.sample(law, u) for law, u in zip(masses, us, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_token_behind_all_mass_is_drawn(dtype):
    law = torch.tensor([[0.1, 0.2, 0.7, 0.0, 0.0]], dtype=dtype)
    u = rows.uniforms([float(np.nextafter(1, 0))], law)
    assert rows.draw(law, u[:, None]).item() == 2
    assert rows.draw(law, torch.ones(1, 1, dtype=dtype)).item() == 4  # what lowering is for


@given(st.data(), st.integers(0, 3), st.integers(1, 3))
def test_verdicts_are_those_of_verify(data, levels, count):
    p = np.stack([data.draw(laws(levels + 1)) for _ in range(count)])
    q = np.stack([data.draw(laws(levels)) for _ in range(count)]).reshape(count, levels, 4)
    p, q = p / p.sum(-1, keepdims=True), q / np.maximum(q.sum(-1, keepdims=True), 1 / 16)
    ids = np.array([[int(law.argmax()) for law in each] for each in q], dtype=np.int64).reshape(count, levels)
    us = np.array(data.draw(draws(count * (levels + 1)))).reshape(count, levels + 1)
    behind = np.concatenate([q, np.zeros((count, 1, 4))], 1)
    accepted, token, carried = rows.verify(*map(torch.tensor, (p, ids, behind, us)))
    for row in range(count):
        expected = sampling.verify(p[row], sampling.Draft.chain(ids[row].tolist(), q[row]), us[row])
        assert (accepted[row].item(), token[row].item()) == (len(expected.path), expected.next_token)
    assert torch.equal(carried, torch.tensor(q).gather(-1, torch.tensor(ids)[..., None])[..., 0])


def test_a_law_that_is_nan_is_rejected_and_the_next_token_is_the_targets():
    p = torch.tensor([[[0.0, 1.0], [0.5, 0.5]]])
    accepted, token, carried = rows.verify(
        p, torch.tensor([[1]]), torch.tensor([[[torch.nan] * 2, [0.0] * 2]]), torch.tensor([[0.0, 0.9]])
    )
    assert (accepted.item(), token.item(), carried.isnan().all().item()) == (0, 1, True)


class Plainly:
    """A model that neither drafts nor verifies by itself."""

    def __init__(self, model):
        self.score = model.score


def decoded(target, drafters, n=120, learner=nab.NormalHedge()):  # noqa: B008
    selector = nab.Selector(learner, len(drafters), rng=1)
    loop = nab.decode(target, drafters, selector, [1, 2, 3], draft_len=4, rng=2)
    return list(nab.until(loop, max_new_tokens=n))


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        names = ("start", "choice", "drafted", "accepted", "emitted")
        assert [getattr(one, name) for name in names] == [getattr(other, name) for name in names]
        np.testing.assert_allclose(one.gamma, other.gamma, rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.gemma3, tiny.mistral])
@pytest.mark.parametrize("warper", [Warper(0), Warper(), Warper(0.6, top_k=20, top_p=0.9)], ids=str)
def test_answers_are_those_of_the_plain_loop(make, warper):
    """Round by round, from the same uniforms, in float64."""
    model = make()
    target = CausalLM(model, warper)
    drafters = [CausalLM(tiny.perturbed(model, amount), warper) for amount in (0.02, 0.3)]
    found = decoded(target, drafters)
    assert sum(r.accepted for r in found) > 0 < sum(r.accepted < r.drafted for r in found)
    for plain in (
        decoded(Plainly(target), list(map(Plainly, drafters))),
        decoded(target, list(map(Plainly, drafters))),  # the host's drafts, verified by the target itself
    ):
        assert_same(found, plain)


@pytest.mark.parametrize("warper", [Warper(0), Warper(), Warper(0.6, top_k=20, top_p=0.9)], ids=str)
def test_answers_with_lookup_are_those_from_its_laws(warper):
    """What is certain needs no law: same drafts, decisions and scores as from one-hot laws."""
    model = tiny.llama()
    target, other = CausalLM(model, warper), CausalLM(tiny.perturbed(model, 0.3), warper)
    parts = Lookup(tiny.VOCAB), warper, torch.device("cpu"), torch.float64
    both = nab.Hedge(rate=1e-9)  # goes on playing both
    found, expected = (
        decoded(target, [other, kind(*parts)], n=300, learner=both) for kind in (Certain, Lifted)
    )
    assert {0, 4} <= {r.drafted for r in found if r.choice == 1}
    assert_same(found, expected)
    with pytest.raises(ValueError, match=r"must be like the target's, \(7, .*, got \(257, "):
        Certain(*parts).draft([1, 2, 1], 2, target.score([1], 1)[:, :7], [0.5, 0.5])


@pytest.mark.parametrize("warper", [Warper(0), Warper(), Warper(0.6, top_k=20, top_p=0.9)], ids=str)
def test_answers_with_heads_are_those_of_the_plain_loop(warper):
    """Heads draft from their own features; text and heads are of few tokens, so that some are accepted."""
    model = tiny.llama()
    target = CausalLM(model, warper)
    models = [head_model(model, draft_vocab=250, seed=seed) for seed in (0, 1)]
    weights = [dict(each.state_dict()) for each in models]
    built = [heads.build(each, models[0].shape, model) for each in weights]
    drafters = [Head(each, target, warper) for each in built]
    found = decoded(target, drafters, 200)
    assert sum(r.accepted for r in found) > 0
    assert_same(found, decoded(target, list(map(Plainly, drafters)), 200))


def test_that_check_can_fail(monkeypatch):
    model = tiny.llama()
    target, drafters = CausalLM(model), [CausalLM(tiny.perturbed(model, 0.05))]
    expected = decoded(Plainly(target), list(map(Plainly, drafters)))
    honest = rows.verify
    monkeypatch.setattr(rows, "verify", lambda p, ids, q, u: honest(p, ids, q, 0.99 * u))
    with pytest.raises(AssertionError):
        assert_same(decoded(target, drafters), expected)


class Waits(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts what makes the host wait for a device: values read, and shapes that depend on them."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += any(name in str(func) for name in self.NAMES)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_round_waits_for_the_device_once(temperature, monkeypatch):
    model, warper = tiny.llama(), Warper(temperature)
    target, drafter = CausalLM(model, warper), CausalLM(tiny.perturbed(model, 0.05), warper)
    loop = nab.decode(target, [drafter], nab.Constant([1.0], rng=0), [1, 2, 3], draft_len=4, rng=0)
    next(loop)
    transfers, inside, lists = [], [], []
    tolist, told = torch.Tensor.tolist, rows.told

    def counted(*parts):
        transfers.append(len(parts))
        inside.append(True)
        try:
            return told(*parts)
        finally:
            inside.pop()

    monkeypatch.setattr(rows, "told", counted)
    monkeypatch.setattr(
        torch.Tensor, "tolist", lambda self: (None if inside else lists.append(1), tolist(self))[1]
    )
    with Waits() as waits:
        for _ in range(5):
            next(loop)
    assert (len(transfers), len(lists), waits.count) == (5, 0, 0)
    with Waits() as waits:  # and that it sees what there is to see
        bool(target.logits([1, 2, 3], 3).max() < torch.inf)
    assert waits.count > 0


class Broken(CausalLM):
    """Its logits are NaN from the second token of a draft on."""

    def _read(self, ids, *rest):
        logits = super()._read(ids, *rest)
        return logits if ids.shape[1] > 1 else logits * torch.nan


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_drafter_that_returns_nan_is_benched_and_the_text_is_the_targets(temperature):
    model, warper = tiny.llama(), Warper(temperature)
    target = CausalLM(model, warper)
    pool = nab.Pool([Broken(tiny.perturbed(model, 0.0), warper)])
    with pytest.warns(nab.DrafterWarning, match="model returned logits that are NaN or infinite"):
        found = list(
            nab.until(
                nab.decode(target, pool, nab.Constant([1.0]), [1], draft_len=3, rng=0), max_new_tokens=9
            )
        )
    assert [r.drafted for r in found][1:] == [0] * (len(found) - 1)
    if temperature == 0:
        plain = nab.decode(target, pool, nab.Constant([1.0]), [1], draft_len=0)
        assert [t for r in found for t in r.emitted] == [
            t for r in nab.until(plain, max_new_tokens=9) for t in r.emitted
        ]


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_target_that_returns_nan_is_named(temperature):
    warper = Warper(temperature)
    drafter = CausalLM(tiny.llama(), warper)
    target = CausalLM(tiny.llama(), warper, name="the target")
    loop = nab.decode(target, [drafter], nab.Constant([1.0]), [1, 2], draft_len=2, rng=0)
    next(loop)
    target.model.lm_head.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="the target returned logits that are NaN or infinite"):
        next(loop)


def test_a_drafter_with_another_vocabulary_is_benched():
    pool = nab.Pool([CausalLM(tiny.llama(vocab_size=300))])
    with pytest.warns(nab.DrafterWarning, match="must be like the target's, .257,.* got .300,"):
        next(nab.decode(CausalLM(tiny.llama()), pool, nab.Constant([1.0]), [1, 2], draft_len=2, rng=0))
