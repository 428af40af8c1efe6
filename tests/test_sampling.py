"""The coupling moves q to p exactly, and the inverse CDF keeps to its support at every corner."""

import numpy as np
import pytest
import torch
from enumeration import outcomes
from hypothesis import given
from hypothesis import strategies as st
from test_acceptance import laws

from nab.sampling import Draft, Verdict, residual, sample, transport, verify


@given(laws(rows=1))
def test_sample_has_the_law(law):
    found = np.zeros(5)
    for token, probability in outcomes(lambda rng: sample(law[0], rng.random())):
        found[token] += probability
    np.testing.assert_allclose(found, law[0], atol=1e-15)


@given(laws(rows=1), laws(rows=1))
def test_transport_turns_q_into_p_and_moves_with_probability_tv(p, q):
    found, moved = np.zeros(5), 0.0

    def run(rng):
        x = sample(q[0], rng.random())
        return x, transport(x, q[0], p[0], rng.random(), rng.random())

    for (x, y), probability in outcomes(run):
        found[y] += probability
        moved += probability * (x != y)
    np.testing.assert_allclose(found, p[0], atol=1e-14)
    assert moved == pytest.approx(np.abs(p - q).sum() / 2, abs=1e-14)


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-53, 1.0])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_a_token_of_mass_zero_is_never_drawn(u, kind):
    rng = np.random.default_rng(5)
    for _ in range(50):
        law = rng.dirichlet(np.full(1000, 0.1)).astype(kind)
        law[[0, 1, 400, 998, 999]] = 0
        for array in (law, torch.tensor(law)):
            token = sample(array, u)
            assert 0 <= token < 1000
            assert law[token] > 0


def test_residual_of_equal_laws_is_the_law_itself():
    p = np.array([0.5, 0.5])
    np.testing.assert_array_equal(residual(p, p), p)
    np.testing.assert_array_equal(residual(p, np.array([1.0, 0.0])), [0.0, 0.5])


def test_verify_accepts_a_prefix_and_adds_one_token():
    p = np.array([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]])
    q = [np.array([0.5, 0.5])] * 2
    assert verify(p, Draft.chain([1, 0], q), [0.9, 0.9, 0.2]) == Verdict([0, 1], 0)
    assert verify(p, Draft.chain([1, 1], q), [0.9, 0.9, 0.2]) == Verdict([0], 0)
    assert verify(p, Draft.chain([0, 0], q), [0.9, 0.9, 0.2]) == Verdict([], 1)
    assert verify(p, Draft.chain([], []), [0.9, 0.9, 0.2]) == Verdict([], 1)


@given(laws(rows=3), laws(rows=2), st.lists(st.integers(0, 63).map(lambda k: k / 64), min_size=5, max_size=5))
def test_verify_agrees_between_numpy_and_torch(p, q, uniforms):
    tokens = [sample(q[0], uniforms[0]), sample(q[1], uniforms[1])]
    expected = verify(p, Draft.chain(tokens, q), uniforms[2:])
    assert verify(torch.tensor(p), Draft.chain(tokens, torch.tensor(q)), uniforms[2:]) == expected


def test_a_rejection_by_rounding_changes_nothing():
    """In float32 the largest uniform times 1 is 1: a certain token that has all mass may fail its test."""
    p = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    last = 1 - 2**-53
    assert verify(p, Draft([1, 0], [-1, -1], [None, None]), [last, last, last]).next_token == 1
