"""Selectors release losses late and whole, remember what was played, and continue bit for bit."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nab
from nab.selector import argmax


class Recorder:
    """A learner that keeps what it is fed; its weights depend on how often it was fed."""

    def init(self, n, batch=None):
        return ()

    def probs(self, state):
        weights = np.ones(3)
        weights[len(state) % 3] += 1
        return weights / weights.sum()

    def update(self, state, losses, played=None):
        return (*state, (np.array(losses), np.array(played)))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=12), st.integers(1, 4), st.integers(0, 2**32))
def test_delayed_losses_are_those_of_the_whole_trajectory(emitted, draft_len, seed):
    gamma, realised = np.random.default_rng(seed).random((2, sum(emitted), 3))
    selector = nab.Selector(Recorder(), 3, objective=nab.Length(draft_len), rng=0)
    played, start = [], 0
    for count in emitted:
        played += [selector.probs] * count
        rows = slice(start, start := start + count)
        selector.observe(count, lambda rows=rows: (gamma[rows], realised[rows]))
        assert len(selector.state) == max(
            start - draft_len + 1, 0
        )  # released as soon as verified, not before
    expected = nab.Length(draft_len)(gamma, realised)
    for t, (losses, then) in enumerate(selector.state):
        np.testing.assert_allclose(losses, expected[t], rtol=1e-15)
        np.testing.assert_array_equal(then, played[t])


def rounds(seed, count=30):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        gamma, realised = rng.random((2, rng.integers(1, 5), 3))
        yield len(gamma), lambda gamma=gamma, realised=realised: (gamma, realised)


@pytest.mark.parametrize("learner", [nab.NormalHedge(), nab.Hedge()])
@pytest.mark.parametrize("objective", [nab.Token(), nab.Length(4)])
def test_a_restored_selector_continues_bit_for_bit(learner, objective):
    first = nab.Selector(learner, 3, objective=objective, rng=7)
    for count, evaluate in rounds(1):
        first.observe(count, evaluate)
    second = nab.Selector(learner, 3, objective=objective, rng=99)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for (count, evaluate), (_, again) in zip(rounds(2), rounds(2), strict=True):
        assert second.choice == first.choice
        np.testing.assert_array_equal(second.probs, first.probs)
        first.observe(count, evaluate)
        second.observe(count, again)
    assert second.state_dict() == first.state_dict()


def test_a_state_over_another_number_of_drafters_is_refused():
    saved = nab.Selector(nab.NormalHedge(), 5).state_dict()
    with pytest.raises(ValueError, match="over 5 drafters, this selector over 3"):
        nab.Selector(nab.NormalHedge(), 3).load_state_dict(saved)


def test_argmax_plays_the_mode_and_sample_plays_the_law():
    gamma = np.array([[0.2, 0.6, 0.4]])
    mode = nab.Selector(nab.Hedge(rate=0.1), 3, pick=argmax, rng=0)
    drawn = nab.Selector(nab.Hedge(rate=0.1), 3, rng=0)
    choices = set()
    for _ in range(60):
        for selector in (mode, drawn):
            selector.observe(1, lambda: (gamma, gamma))
        assert mode.choice == 1
        choices.add(drawn.choice)
    assert choices == {0, 1, 2}


def test_a_constant_selector_draws_from_its_law_and_never_evaluates():
    def never():
        raise AssertionError("asked")

    fixed = nab.Constant([0.0, 1.0, 0.0])
    uniform = nab.Constant(np.full(3, 1 / 3), rng=0)
    seen = set()
    for _ in range(60):
        assert fixed.observe(1, never) is uniform.observe(1, never) is None
        assert fixed.choice == 1
        seen.add(uniform.choice)
    assert seen == {0, 1, 2}


@pytest.mark.parametrize("probs", [[0.5, 0.6], [-0.5, 1.5], [], [float("nan"), 1.0]])
def test_a_law_that_is_none_is_named(probs):
    with pytest.raises(ValueError, match="probs must be non-negative and sum to 1"):
        nab.Constant(probs)
