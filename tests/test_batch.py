"""Queries decoded together: each gets the text, the laws and the choices that it gets alone."""

import numpy as np
import pytest
import tiny
import torch
from test_learners import LEARNERS
from test_rows import Waits

import nab
from nab import selector as selectors
from nab.backends import batch as batches
from nab.backends.batch import decode_batch
from nab.backends.drafters import Lookup
from nab.backends.torch import CausalLM, Lifted, Warper, early_exit
from nab.learners import Squint
from nab.selector import observe_together


def ragged(queries, rounds, n, seed=0):
    """Scores of some queries in some rounds, of 1 to 5 positions; queries come and go."""
    rng = np.random.default_rng(seed)
    for number in range(rounds):
        live = [q for q in range(queries) if q <= number and rng.random() < 0.9]
        yield {q: rng.random((2, rng.integers(1, 6), n)) for q in live}


def assert_laws_are_those_alone(learner, objective, queries=5, rounds=60, n=3):
    def fresh():
        return [nab.Selector(learner, n, objective=objective, rng=seed) for seed in range(queries)]

    alone, together = fresh(), fresh()
    for scores in ragged(queries, rounds, n):
        for q, score in scores.items():
            alone[q].observe(score.shape[1], lambda score=score: tuple(score))
        told = observe_together(
            [together[q] for q in scores],
            [score.shape[1] for score in scores.values()],
            [lambda score=score: tuple(score) for score in scores.values()],
        )
        for found, score in zip(told, scores.values(), strict=True):
            np.testing.assert_array_equal(found, score)
        for one, other in zip(alone, together, strict=True):
            assert one.choice == other.choice
            np.testing.assert_allclose(other.probs, one.probs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("learner", LEARNERS.values(), ids=LEARNERS.keys())
@pytest.mark.parametrize("objective", [nab.Token(), nab.Length(4)], ids=["token", "length"])
def test_laws_and_choices_of_a_batch_are_those_of_selectors_alone(learner, objective):
    """Queries begin one after the other and miss rounds, so that their losses are ragged."""
    assert_laws_are_those_alone(learner, objective)


@pytest.mark.parametrize("learner", [nab.NormalHedge(), Squint()], ids=str)
def test_that_check_sees_losses_of_another_query(learner, monkeypatch):
    honest = selectors._learn

    def swapped(group):
        first = group[0].losses
        honest([each._replace(losses=np.resize(first, each.losses.shape)) for each in group])

    monkeypatch.setattr(selectors, "_learn", swapped)
    with pytest.raises(AssertionError):
        assert_laws_are_those_alone(learner, nab.Token())


def test_that_check_sees_a_state_put_back_in_another_place(monkeypatch):
    honest = selectors._part
    monkeypatch.setattr(
        selectors, "_part",
        lambda like, state, at: honest(like, state, at if isinstance(at, slice) else 0),
    )  # fmt: skip
    with pytest.raises(AssertionError):
        assert_laws_are_those_alone(nab.NormalHedge(), nab.Token())


def test_like_learners_are_updated_together(monkeypatch):
    """As many calls as the longest query has losses."""
    calls, update = [], nab.NormalHedge.update
    monkeypatch.setattr(
        nab.NormalHedge, "update",
        lambda self, state, *rest: calls.append(np.shape(state.regret)) or update(self, state, *rest),
    )  # fmt: skip
    queries = [nab.Selector(nab.NormalHedge(), 3, rng=q) for q in range(4)]
    for counts in ([2, 1, 4, 2], [1, 1, 1, 3]):
        scores = [np.full((2, count, 3), 0.5) for count in counts]
        observe_together(queries, counts, [lambda score=score: tuple(score) for score in scores])
    assert calls == [(3, 4), (3, 3), (3, 1), (3, 1), (3, 4), (3, 1), (3, 1)]


def test_selectors_of_other_kinds_observe_for_themselves():
    constant, wrapped = nab.Constant([0.5, 0.5], rng=0), nab.Selector(nab.NormalHedge(), 2, rng=0)
    corrected = nab.Corrected(nab.Selector(nab.NormalHedge(), 2, objective=nab.Length(2), rng=0), 2)
    gamma = np.array([[0.9, 0.2], [0.8, 0.1]])

    def refused():
        raise AssertionError("a constant choice asks for no scores")

    told = observe_together(
        [constant, wrapped, corrected], [2, 2, 2], [refused, lambda: (gamma, gamma), lambda: (gamma, gamma)]
    )
    assert told[0] is None
    assert told[1][0] is told[2][0] is gamma
    assert wrapped.probs.tolist() == corrected.probs.tolist() == [1, 0]


torch.set_num_threads(1)

# Of unlike lengths, one of a single token, one longer than the memory's first slots.
PROMPTS = [np.random.default_rng(k).integers(0, 256, length).tolist()
           for k, length in enumerate([5, 1, 40, 300, 3, 17, 2, 90, 8])]  # fmt: skip
ALL = range(len(PROMPTS))
COUNTS = {"max_new_tokens": 30}
MODELS = {"llama": tiny.llama, "mistral": tiny.mistral, "qwen3": tiny.qwen3}


def models(make=tiny.llama, warper=None):
    """A target and drafters of which none is the best for all texts."""
    model, warper = make(), warper or Warper(0)
    drafters = [CausalLM(tiny.perturbed(model, 0.03, seed), warper) for seed in (1, 2)]
    return CausalLM(model, warper), [*drafters, CausalLM(early_exit(model, 2), warper)]


def fresh(n, numbers, objective=None):
    return [nab.Selector(nab.NormalHedge(), n, objective=objective, rng=100 + k) for k in numbers]


def alone(target, drafters, numbers=ALL, *, make=fresh, draft_len=4, **ends):
    """The rounds of each query by ``nab.decode``."""
    found = {}
    for k, selector in zip(numbers, make(len(drafters), numbers), strict=True):
        loop = nab.decode(target, drafters, selector, PROMPTS[k], draft_len=draft_len, rng=k)
        found[k] = list(nab.until(loop, **{**COUNTS, **ends}))
    return found


def together(target, drafters, batch, numbers=ALL, *, make=fresh, draft_len=4, **ends):
    """The same, decoded together."""
    found = {k: [] for k in numbers}
    numbers = list(numbers)
    for place, round_ in decode_batch(
        target, drafters, make(len(drafters), numbers), [PROMPTS[k] for k in numbers],
        batch=batch, draft_len=draft_len, rngs=numbers, **{**COUNTS, **ends},
    ):  # fmt: skip
        found[numbers[place]].append(round_)
    return found


def assert_same(found, expected, atol=1e-10):
    """Text, choices and counts are equal, scores and laws nearly."""
    assert found.keys() == expected.keys()
    for k, rounds in expected.items():
        for one, other in zip(found[k], rounds, strict=True):
            for name in ("start", "choice", "drafted", "accepted", "emitted"):
                assert getattr(one, name) == getattr(other, name), (k, name)
            np.testing.assert_allclose(one.probs, other.probs, rtol=0, atol=atol)
            for name in ("gamma", "realised"):
                if getattr(other, name) is None:
                    assert getattr(one, name) is None
                else:
                    np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=0, atol=atol)


def choices(found):
    return {round_.choice for rounds in found.values() for round_ in rounds}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("warper", [Warper(0), Warper(), Warper(0.7, top_k=20, top_p=0.9)], ids=str)
def test_each_query_is_decoded_as_alone(make, warper):
    target, drafters = models(make, warper)
    expected = alone(target, drafters)
    assert choices(expected) == {0, 1, 2}
    assert len({len(rounds) for rounds in expected.values()}) > 2
    for batch in (1, 2, 5, 8, 20):
        assert_same(together(target, drafters, batch), expected)
