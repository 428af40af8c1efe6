"""Rules: gamma is the mean of a(x) under p; numpy and torch agree; deterministic drafts are one-hot laws."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nab import Chain, Greedy, TopK

RULES = {"chain": Chain(), "top-1": TopK(1), "top-3": TopK(3), "top-9": TopK(9)}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


@st.composite
def laws(draw, vocab=5, rows=3):
    """Exact dyadic laws, zeros and ties included."""
    cuts = st.lists(st.integers(0, 64), min_size=vocab - 1, max_size=vocab - 1).map(sorted)
    return np.array([np.diff([0, *draw(cuts), 64]) / 64 for _ in range(rows)])


@every_rule
@given(laws(), laws())
def test_gamma_is_the_mean_of_what_is_realised(rule, p, q):
    mean = np.zeros(len(p))
    for token in range(p.shape[1]):
        possible = p[:, token] > 0
        realised = np.zeros(len(p))
        realised[possible] = rule.realised(p[possible], q[possible], np.full(possible.sum(), token))
        mean += p[:, token] * realised
    np.testing.assert_allclose(rule.probability(p, q), mean, atol=1e-15)


@every_rule
@given(laws(), laws())
def test_numpy_and_torch_agree(rule, p, q):
    token = p.argmax(-1)
    tensors = torch.tensor(p), torch.tensor(q)
    np.testing.assert_array_equal(rule.probability(*tensors).numpy(), rule.probability(p, q))
    np.testing.assert_array_equal(rule.realised(*tensors, token).numpy(), rule.realised(p, q, token))


@given(laws(rows=6), laws(rows=6))
def test_leading_dimensions_are_kept(p, q):
    token = p.argmax(-1)
    for rule in (Chain(), TopK(2), Greedy(2)):
        flat, shaped = rule.realised(p, q, token), (p.reshape(2, 3, -1), q.reshape(2, 3, -1))
        np.testing.assert_array_equal(rule.realised(*shaped, token.reshape(2, 3)), flat.reshape(2, 3))
        np.testing.assert_array_equal(rule.probability(*shaped).ravel(), rule.probability(p, q).ravel())


@given(laws(), laws())
def test_chain_is_one_minus_total_variation(p, q):
    np.testing.assert_allclose(Chain().probability(p, q), 1 - np.abs(p - q).sum(-1) / 2, atol=1e-15)


@given(laws(), laws())
def test_a_deterministic_draft_is_a_chain_with_a_one_hot_law(p, q):
    one_hot = np.eye(p.shape[1])[q.argmax(-1)]
    token = p.argmax(-1)
    np.testing.assert_array_equal(Chain().probability(p, one_hot), TopK(1).probability(p, q))
    np.testing.assert_array_equal(Chain().realised(p, one_hot, token), TopK(1).realised(p, q, token))


@given(laws(), laws(), st.integers(1, 5))
def test_greedy_is_top_k_under_a_one_hot_target(p, q, k):
    one_hot = np.eye(p.shape[1])[p.argmax(-1)]
    np.testing.assert_array_equal(Greedy(k).probability(p, q), TopK(k).probability(one_hot, q))


def test_no_draft_is_never_accepted():
    p, q = np.array([[0.25, 0.75]]), np.zeros((1, 2))
    for rule in (Chain(), TopK(1), TopK(2), Greedy()):
        assert rule.probability(p, q) == rule.realised(p, q, [1]) == 0


def test_ties_go_to_the_lower_token():
    p, q = np.array([[0.2, 0.3, 0.5]]), np.array([[0.0, 0.5, 0.5]])
    assert TopK(1).probability(p, q) == 0.3
    assert TopK(2).probability(p, q) == 0.8
    assert TopK(3).probability(p, q) == 0.8  # a token the drafter excludes is not drafted


def test_bad_k_is_named():
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        TopK(0)
