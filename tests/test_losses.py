"""Lengths: the two-token counterexample exactly, unbiasedness by enumeration, windows and ranges."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nab import Chain, Length, Token
from nab.losses import expected_length, expected_rounds, length_loss, plug_in_length, token_loss
from nab.sim import Markov

P = Markov(np.full((2, 2), 0.5))
Q = Markov(np.array([[0.9, 0.1], [0.5, 0.5]]))


def mean_over_trajectories(target, drafter, estimate, positions):
    """E[estimate] over the target's trajectories from token 0, by enumeration."""
    total = 0.0
    for word in product(range(len(target.table)), repeat=positions):
        tokens = (0, *word)
        p, q = target.score(tokens[:-1], 1), drafter.score(tokens[:-1], 1)
        probability = np.prod(p[np.arange(positions), word])
        gamma = Chain().probability(p, q)[:, None]
        realised = Chain().realised(p, q, np.array(word))[:, None]
        total += probability * estimate(gamma, realised)[0, 0]
    return total


def true_length(target, drafter, draft_len):
    """Expected tokens of a round from token 0: sum over k of P(first k drafted tokens are accepted)."""
    reach, length = np.eye(len(target.table))[0], 1.0
    for _ in range(draft_len):
        reach = reach @ np.minimum(target.table, drafter.table)
        length += reach.sum()
    return length


def test_the_counterexample():
    assert true_length(P, Q, 2) == pytest.approx(2.0, abs=1e-12)
    plug_in = mean_over_trajectories(P, Q, lambda g, a: plug_in_length(g, 2), 2)
    unbiased = mean_over_trajectories(P, Q, lambda g, a: expected_length(g, a, 2), 2)
    assert plug_in == pytest.approx(2.08, abs=1e-12)
    assert unbiased == pytest.approx(2.0, abs=1e-12)


@pytest.mark.parametrize("draft_len", [1, 2, 3, 4])
def test_the_expected_length_is_unbiased(draft_len):
    rng = np.random.default_rng(draft_len)
    target, drafter = (Markov(rng.dirichlet(np.ones(3), size=3)) for _ in range(2))
    mean = mean_over_trajectories(target, drafter, lambda g, a: expected_length(g, a, draft_len), draft_len)
    assert mean == pytest.approx(true_length(target, drafter, draft_len), abs=1e-12)


@given(st.integers(1, 6), st.integers(0, 12), st.integers(0, 2**32))
def test_every_window_is_scored_by_itself(draft_len, positions, seed):
    gamma, realised = np.random.default_rng(seed).random((2, positions, 3))
    length = expected_length(gamma, realised, draft_len)
    assert length.shape == (max(positions - draft_len + 1, 0), 3)
    for t, row in enumerate(length):
        window = slice(t, t + draft_len)
        carried = np.vstack([np.ones((1, 3)), np.cumprod(realised[window], axis=0)[:-1]])
        np.testing.assert_allclose(row, 1 + (gamma[window] * carried).sum(0), rtol=1e-14)


@given(st.integers(1, 6), st.integers(0, 2**32))
def test_plug_in_is_the_papers_sum(draft_len, seed):
    """sum_k k (1 - gamma_k) prod_{j < k} gamma_j with gamma_{K+1} := 0 (Abel summation)."""
    gamma = np.random.default_rng(seed).random((draft_len, 1))
    padded, carried, total = [*gamma[:, 0], 0.0], 1.0, 0.0
    for k, value in enumerate(padded, 1):
        total += k * (1 - value) * carried
        carried *= value
    assert plug_in_length(gamma, draft_len)[0, 0] == pytest.approx(total, rel=1e-13)


@pytest.mark.parametrize("objective", [Token(), Length(3), Length(3, plug_in=True)])
def test_objectives_stay_in_range_at_the_corners(objective):
    for gamma, realised in product([0.0, 1.0], repeat=2):
        shape = (objective.window, 2)
        losses = objective(np.full(shape, gamma), np.full(shape, realised))
        assert losses.shape == (1, 2)
        assert ((losses >= 0) & (losses <= 1)).all()
    assert (objective(np.ones(shape), np.ones(shape)) == 0).all()
    assert len(objective(np.ones((objective.window - 1, 2)), np.ones((objective.window - 1, 2)))) == 0


def test_losses_of_known_values():
    np.testing.assert_array_equal(token_loss(np.array([0.25, 1.0])), [0.75, 0.0])
    np.testing.assert_array_equal(length_loss(np.array([1.0, 5.0]), 4), [0.8, 0.0])


def test_bad_draft_len_is_named():
    for make in (lambda: Length(0), lambda: expected_length(np.ones((1, 1)), np.ones((1, 1)), 0)):
        with pytest.raises(ValueError, match="draft_len must be a whole number, at least 1, got 0"):
            make()


@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 2**32))
def test_expected_rounds_by_depth_against_every_way_to_cut_the_text(draft_len, positions, seed):
    by_depth = np.random.default_rng(seed).random((positions, draft_len, 2))

    def mean(start):
        """Mean rounds from ``start``, by recursion over the whole tree of outcomes."""
        if start >= positions:
            return 0.0
        total, reached = 1.0, 1.0
        for k in range(min(draft_len, positions - start)):
            total += reached * (1 - by_depth[start + k, k, 1]) * mean(start + k + 1)
            reached *= by_depth[start + k, k, 1]
        return total + reached * mean(start + draft_len + 1)

    assert expected_rounds(by_depth, draft_len)[1] == pytest.approx(mean(0), rel=1e-13)
    alike = np.broadcast_to(by_depth[:, :1], by_depth.shape)
    np.testing.assert_array_equal(
        expected_rounds(by_depth[:, 0], draft_len), expected_rounds(alike, draft_len)
    )


def test_scores_of_too_few_depths_are_refused():
    scores = np.full((9, 2, 3), 0.5)
    assert expected_length(scores, scores, 2).shape == (8, 3)
    with pytest.raises(ValueError, match="scores of 2 depths tell nothing of drafts of 3 tokens"):
        expected_length(scores, scores, 3)


@given(st.integers(1, 4), st.integers(0, 2**32))
def test_lengths_by_depth_are_those_of_each_window(draft_len, seed):
    gamma, realised = np.random.default_rng(seed).random((2, 9, draft_len, 2))
    for t, found in enumerate(expected_length(gamma, realised, draft_len)):
        rows = range(draft_len)
        diagonal = [np.array([scores[t + k, k] for k in rows]) for scores in (gamma, realised)]
        np.testing.assert_allclose(found, expected_length(*diagonal, draft_len)[0], rtol=1e-14)
