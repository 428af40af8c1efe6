"""Environments, plays and regrets of the simulator."""

from itertools import pairwise, product
from math import log, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nab
from nab.learners import bandits
from nab.losses import expected_rounds
from nab.sim import (
    best_sequence,
    draws,
    environments,
    lazily,
    play,
    play_bandit,
    quantile,
    regret,
    stopping_time_regret,
    switches,
    tracking_regret,
)
from nab.sim.play import pulls
from nab.sim.regret import lost

rng = np.random.default_rng


@st.composite
def small(draw, max_rounds=5, max_n=3):
    n, rounds = draw(st.integers(2, max_n)), draw(st.integers(1, max_rounds))
    codes = draw(st.binary(min_size=rounds * n, max_size=rounds * n))
    return (np.frombuffer(codes, np.uint8) % 65 / 64).reshape(rounds, n)


# Regret


@given(small())
def test_the_best_sequence_against_all_sequences(losses):
    rounds, n = losses.shape
    least = np.full(rounds, np.inf)
    for sequence in product(range(n), repeat=rounds):
        changes = sum(a != b for a, b in pairwise(sequence))
        least[changes] = min(least[changes], losses[np.arange(rounds), sequence].sum())
    np.testing.assert_array_equal(best_sequence(losses, rounds - 1), np.minimum.accumulate(least))


@given(small(max_rounds=20))
def test_tracking_regret_begins_with_regret(losses):
    laws, _ = play(nab.Hedge(), losses)
    assert tracking_regret(laws, losses, 0) == pytest.approx(regret(laws, losses)[-1].max(), abs=1e-12)
    more = [tracking_regret(laws, losses, m) for m in range(4)]
    assert more == sorted(more)
    paid = (laws * losses).sum()
    assert more == pytest.approx((paid - best_sequence(losses, 3)).tolist(), abs=1e-12)
    both = np.stack([losses, 1 - losses], axis=2)
    np.testing.assert_array_equal(best_sequence(both, 2)[:, 1], best_sequence(1 - losses, 2))


def test_regret_of_drafters_is_that_of_their_one_hot_laws():
    losses = rng(0).random((7, 3, 2))
    arms = rng(1).integers(0, 3, (7, 2))
    laws = np.eye(3)[arms].transpose(0, 2, 1)
    np.testing.assert_allclose(regret(arms, losses), regret(laws, losses), rtol=1e-14, atol=1e-14)
    np.testing.assert_array_equal(lost(arms[:, 0], losses[:, :, 0]), lost(arms, losses)[:, 0])


@pytest.mark.parametrize(
    ("played", "message"),
    [
        ([[0.5, 0.5]], r"played has shape \(1, 2\), losses \(2, 2\)"),
        ([0, 1, 1], r"played must have shape \(2,\), got \(3,\)"),
        ([0, 2], r"played drafters must lie in 0 .. 1, got 0 .. 2"),
        ([0.5, 0.5], r"played has shape \(2,\), losses \(2, 2\)"),
    ],
)
def test_bad_plays_are_named(played, message):
    with pytest.raises(ValueError, match=message):
        regret(played, np.zeros((2, 2)))


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=9), st.integers(1, 900), st.sampled_from([1, 100]))
def test_quantiles_count_drafters(values, k, times):
    regrets = np.arange(len(values) * times) + 10.0 * np.repeat(values, times)
    k, values = min(k, len(regrets)), regrets
    found = quantile(regrets, k / len(values))
    assert np.count_nonzero(regrets >= found) >= k
    assert np.count_nonzero(regrets > found) < k


def test_stopping_time_regret_is_against_the_best_single_drafter():
    realised = rng(0).random((30, 3))
    singles = expected_rounds(realised, 4)
    assert stopping_time_regret(20, realised, 4) == 20 - singles.min()
    assert switches(np.array([0, 0, 1, 2, 2])) == 2


# Plays


@pytest.mark.parametrize("period", [1, 3, 4])
def test_lazy_feedback_is_the_same_feedback_later(period):
    losses = rng(2).integers(0, 65, (12, 3)) / 64
    eager, last = play(nab.Hedge(rate=0.5), losses)
    lazy, after = play(nab.Hedge(rate=0.5), losses, delay=lazily(12, period))
    np.testing.assert_array_equal(lazy, np.repeat(eager[::period], period, axis=0))
    np.testing.assert_array_equal(after.losses, last.losses)


def test_delays_are_checked():
    for delay in (-1, 0.5, [0, 1]):
        with pytest.raises(ValueError, match="delay must be whole rounds, at least 0, one or 3 of them"):
            play(nab.Hedge(), np.zeros((3, 2)), delay=delay)
    with pytest.raises(ValueError, match="period must be a whole number, at least 1, got 0"):
        lazily(4, 0)


def test_bandits_see_the_loss_of_their_arm_and_of_no_other():
    losses = environments.bernoulli(environments.gapped(40, 3), batch=5, rng=3)
    arms, state = play_bandit(bandits.UCB1(), losses, rng=4)
    hidden = losses.copy()
    shown = np.zeros(losses.shape, dtype=bool)
    np.put_along_axis(shown, arms[:, None], True, 1)
    hidden[~shown] = 1 - hidden[~shown]
    again, after = play_bandit(bandits.UCB1(), hidden, rng=4)
    np.testing.assert_array_equal(again, arms)
    np.testing.assert_array_equal(after.losses, state.losses)
    np.testing.assert_array_equal(state.counts, shown.sum(0))


def test_a_batch_of_bandits_is_a_loop():
    losses = rng(5).random((30, 4, 3))
    bandit = bandits.EXP3()
    together = play_bandit(bandit, losses, rng=6)[0]
    uniforms = rng(6).random((30, 3))
    for query in range(3):
        alone = pulls(bandit, bandit.init(4), uniforms[:, query], lambda t, _, k=query: losses[t, :, k])
        assert [arm for arm, _ in alone] == together[:, query].tolist()


@pytest.mark.parametrize("n", [3, 64, 65, 300])
def test_draws_invert_the_cdf_at_any_number_of_drafters(n):
    laws = rng(n).integers(0, 3, (n, 50)) + 0.0
    laws[0] += 1e-9
    laws /= laws.sum(0)
    u = rng(1).random(50)
    found = draws(laws, u)
    cdf = laws.cumsum(0)
    for k, (i, x) in enumerate(zip(found, u, strict=True)):
        assert laws[i, k] > 0
        assert x < cdf[i, k] or i == np.flatnonzero(laws[:, k])[-1]
        assert i == 0 or x >= cdf[i - 1, k]


def test_a_uniform_on_an_edge_belongs_to_the_drafter_behind_it():
    for n in (2, 80):
        laws = np.zeros((n, 1))
        laws[[0, n - 1]] = 0.5
        assert draws(laws, np.array([0.5])).tolist() == [n - 1]


def test_players_are_told_apart():
    with pytest.raises(ValueError, match=r"UCB1\(\) is a bandit: play_bandit plays it"):
        play(bandits.UCB1(), np.zeros((3, 2)))
    with pytest.raises(ValueError, match="is no bandit: play plays it"):
        play_bandit(nab.Hedge(), np.zeros((3, 2)))


# Environments


def test_segments_have_their_best_drafter():
    means = environments.switching(10, 3, switches=2, gap=0.25, first=1, level=0.75)
    assert means.argmin(1).tolist() == [1, 1, 1, 1, 2, 2, 2, 0, 0, 0]
    assert set(np.unique(means)) == {0.5, 0.75}
    np.testing.assert_array_equal(
        environments.gapped(4, 2), environments.switching(4, 2, switches=0, gap=0.1)
    )


def test_drifting_drafters_are_best_in_turn():
    means = environments.drifting(400, 4, period=400)
    assert [means[t].argmin() for t in (0, 100, 200, 300)] == [0, 1, 2, 3]
    assert means.min() == pytest.approx(0.3)
    assert means.max() == pytest.approx(0.7)


def test_domains_move_on_as_often_as_they_should():
    """Moves are a binomial number: Hoeffding, off by more than the margin with probability 1e-9 at most."""
    rounds, stay = 20_000, 0.9
    path = environments.domain_path(rounds, 3, stay=stay, rng=0)
    margin = sqrt(log(2 / 1e-9) / (2 * rounds))

    def held(wanted):
        return abs(switches(path) / rounds - wanted) <= margin + 1 / rounds

    assert held(1 - stay)
    assert not held(1 - stay + 0.05)
    assert set(path.tolist()) == {0, 1, 2}
    assert len(set(environments.domain_path(50, 3, stay=1.0, rng=1).tolist())) == 1


@pytest.mark.parametrize("noise", [environments.bernoulli, environments.beta])
def test_noise_has_its_means(noise):
    """Hoeffding over 6 cells of 40 000 losses in [0, 1]: false alarm 1e-9 at most in all."""
    means = np.array([[0.0, 0.3, 1.0], [0.5, 0.9, 0.25]])
    losses = noise(means, batch=40_000, rng=0)
    margin = sqrt(log(2 * 6 / 1e-9) / (2 * 40_000))
    assert (abs(losses.mean(2) - means) <= margin).all()
    assert not (abs(losses.mean(2) - means[::-1]) <= margin).all()
    assert noise(means, rng=1).shape == (2, 3)
    assert ((losses >= 0) & (losses <= 1)).all()


def test_beta_is_as_smooth_as_it_should_be():
    """Squares of losses in [0, 1] have a mean within Hoeffding's margin, false alarm 1e-9."""
    losses = environments.beta([[0.3]], concentration=9.0, batch=40_000, rng=0)
    margin = sqrt(log(2 / 1e-9) / (2 * 40_000))
    assert abs((losses**2).mean() - (0.3**2 + 0.3 * 0.7 / 10)) <= margin
    assert abs((losses**2).mean() - (0.3**2 + 0.3 * 0.7 / 2)) > margin


@given(small(max_rounds=1, max_n=3))
def test_adversaries_see_a_batch_as_a_loop(row):
    laws = (row.T + 0.01) / (row.T + 0.01).sum(0)
    both = np.hstack([laws, laws[::-1]])
    for adversary in (environments.anti_leader, environments.half_mass):
        for k in range(2):
            np.testing.assert_array_equal(adversary(both)[:, k], adversary(both[:, k]))
    hit = environments.half_mass(both)
    assert ((hit * both).sum(0) >= 0.5 - 1e-12).all()


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: environments.gapped(0, 2), "rounds must be a whole number, at least 1, got 0"),
        (lambda: environments.gapped(5, 2, best=2), "the best drafter must be in 0 .. 1, got 2"),
        (lambda: environments.gapped(5, 2, gap=0.6), "means must lie in .*level 0.5 and gap 0.6"),
        (lambda: environments.switching(5, 2, switches=5), "switches must be below rounds, 5, got 5"),
        (lambda: environments.drifting(5, 2, period=0), r"period must lie in \(0, inf\), got 0"),
        (lambda: environments.experts([0, 2], 3), "domains must be whole numbers in 0 .. 1"),
        (lambda: environments.experts([0], 3, own=-0.1), "means must lie in .*own -0.1"),
        (lambda: environments.domain_path(5, 2, stay=1.5), r"stay must lie in \[0, 1\], got 1.5"),
        (lambda: environments.bernoulli([0.5]), r"shape \(rounds, n\), got \(1,\)"),
        (lambda: environments.bernoulli([[1.5]]), r"means must lie in \[0, 1\]"),
        (lambda: environments.bernoulli([[0.5]], batch=0), "batch must be a whole number, at least 1, got 0"),
        (lambda: environments.beta([[0.5]], concentration=0), "concentration.*got 0"),
        (lambda: environments.leader_killer(0), "rounds must be a whole number, at least 1, got 0"),
        (lambda: environments.comb(3, 1), "n must be a whole number, at least 2, got 1"),
        (lambda: quantile(np.array([]), 0.5), "regrets must be of one drafter at least"),
        (lambda: best_sequence([0.5], 1), r"shape \(rounds, n\) or .*got \(1,\)"),
    ],
)
def test_bad_environments_are_named(ask, message):
    with pytest.raises(ValueError, match=message):
        ask()
