"""Every learner keeps every promise of the contract; independent references for what is hard to compute."""

import json
from fractions import Fraction
from itertools import pairwise
from math import exp, log

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.optimize import brentq

import nab
from nab.learners import (
    AdaHedge,
    AdaNormalHedge,
    AdaNormalHedgeTV,
    Blocks,
    FixedShare,
    FollowTheLeader,
    Interleaved,
    NormalHedgeBH,
    OptimisticHedge,
    Squint,
    flat,
    restored,
)
from nab.learners.fixed_share import tuned_rate
from nab.learners.normal_hedge import solved
from nab.learners.squint import log_evidence
from nab.sim import bounds, play

LEARNERS = {
    "hedge": nab.Hedge(),
    "hedge, fixed rate": nab.Hedge(rate=0.5),
    "hedge, discounted": nab.Hedge(discount=0.9),
    "optimistic-hedge": OptimisticHedge(),
    "optimistic-hedge, fixed rate": OptimisticHedge(rate=0.5),
    "ada-hedge": AdaHedge(),
    "follow-the-leader": FollowTheLeader(),
    "fixed-share": FixedShare(0.02),
    "fixed-share, fixed rate": FixedShare(0.1, rate=2.0),
    "normal-hedge": nab.NormalHedge(),
    "normal-hedge, discounted": nab.NormalHedge(discount=0.9),
    "normal-hedge-bh": NormalHedgeBH(),
    "ada-normal-hedge": AdaNormalHedge(),
    "ada-normal-hedge-tv": AdaNormalHedgeTV(),
    "squint": Squint(),
    "interleaved": Interleaved(nab.NormalHedge(), 2),
    "blocks": Blocks(AdaHedge(), 2),
}
every_learner = pytest.mark.parametrize("learner", LEARNERS.values(), ids=LEARNERS.keys())


@st.composite
def loss_matrices(draw, max_rounds=30, max_n=5):
    """Multiples of 1/64, whose sums are exact in floats."""
    n, rounds = draw(st.integers(2, max_n)), draw(st.integers(1, max_rounds))
    codes = draw(st.binary(min_size=rounds * n, max_size=rounds * n))
    return (np.frombuffer(codes, np.uint8) % 65 / 64).reshape(rounds, n)


def laws_of(learner, losses, **kwargs):
    """The laws played, and the one that would come next."""
    laws, state = play(learner, losses, **kwargs)
    return np.concatenate([laws, learner.probs(state)[None]])


@every_learner
@given(loss_matrices())
def test_laws_are_distributions_and_start_uniform(learner, losses):
    laws = laws_of(learner, losses)
    assert (laws >= 0).all()
    np.testing.assert_allclose(laws.sum(1), 1, rtol=1e-12)
    np.testing.assert_allclose(laws[0], 1 / losses.shape[1], rtol=1e-15)


@every_learner
@given(loss_matrices(), st.lists(st.integers(1, 9), min_size=5, max_size=5))
def test_the_first_law_is_the_prior(learner, losses, shares):
    prior = np.array(shares[: losses.shape[1]]) / sum(shares[: losses.shape[1]])
    laws = laws_of(learner, losses, prior=prior)
    np.testing.assert_allclose(laws[0], prior, rtol=1e-14)
    np.testing.assert_allclose(laws.sum(1), 1, rtol=1e-12)
    both = laws_of(learner, np.stack([losses] * 2, axis=2), prior=np.stack([prior, prior], axis=1))
    np.testing.assert_allclose(both[:, :, 1], laws, rtol=1e-12, atol=1e-15)


@every_learner
def test_a_likelier_drafter_stays_likelier_on_equal_evidence(learner):
    losses = np.tile([0.75, 0.25, 0.25], (60, 1))
    last = laws_of(learner, losses, prior=[0.5, 0.4, 0.1])[-1]
    assert last[1] > last[2]


@every_learner
@given(loss_matrices(), st.randoms(use_true_random=False))
def test_renaming_the_drafters_renames_the_weights(learner, losses, random):
    order = list(range(losses.shape[1]))
    random.shuffle(order)
    np.testing.assert_allclose(
        laws_of(learner, losses[:, order]), laws_of(learner, losses)[:, order], atol=1e-9
    )


@every_learner
@given(loss_matrices(max_rounds=20))
def test_adding_a_constant_to_all_losses_changes_nothing(learner, losses):
    """Every learner here depends on differences alone."""
    np.testing.assert_allclose(laws_of(learner, losses / 2 + 0.5), laws_of(learner, losses / 2), atol=1e-9)


@every_learner
def test_equal_losses_move_nothing(learner):
    laws = laws_of(learner, np.full((5, 3), 0.25), prior=[0.5, 0.25, 0.25])
    np.testing.assert_allclose(laws, np.tile([0.5, 0.25, 0.25], (6, 1)), rtol=1e-14)


@every_learner
@given(loss_matrices(max_rounds=8))
def test_update_leaves_its_argument_alone(learner, losses):
    _, state = play(learner, losses)
    before = {name: value.copy() for name, value in flat(state).items()}
    learner.probs(state)
    learner.update(state, losses[0])
    for name, value in flat(state).items():
        np.testing.assert_array_equal(value, before[name])


@every_learner
def test_a_state_does_not_change_with_the_arrays_it_was_made_from(learner):
    losses, prior = np.array([0.0, 0.5, 1.0]), np.array([0.5, 0.25, 0.25])
    state = learner.init(3, prior=prior)
    for _ in range(3):
        state = learner.update(state, losses, law := np.array(learner.probs(state)))
    before = learner.probs(state).copy()
    losses[:], prior[:], law[:] = 1, 1, 1
    np.testing.assert_array_equal(learner.probs(state), before)


@every_learner
def test_what_probs_returns_cannot_hurt_the_state(learner):
    _, state = play(learner, [[0.0, 0.5, 1.0]] * 4)
    before = learner.probs(state).copy()
    law = learner.probs(state)
    if law.flags.writeable:
        law[:] = -1
    np.testing.assert_array_equal(learner.probs(state), before)


@every_learner
def test_learning_happens(learner):
    last = laws_of(learner, np.tile([0.5, 0.25, 0.75], (300, 1)))[-1]
    assert last.argmax() == 1
    assert last[1] > 0.6


@every_learner
@given(loss_matrices(max_rounds=10))
def test_a_batch_is_a_loop_over_queries(learner, losses):
    both = np.stack([losses, losses[::-1], 1 - losses], axis=2)
    together = laws_of(learner, both)
    for query in range(3):
        np.testing.assert_allclose(
            together[:, :, query], laws_of(learner, both[:, :, query]), rtol=1e-12, atol=1e-15
        )


@every_learner
@given(loss_matrices(max_rounds=12), st.integers(1, 4))
def test_late_feedback_still_gives_laws(learner, losses, delay):
    laws = laws_of(learner, losses, delay=delay)
    assert (laws >= 0).all()
    np.testing.assert_allclose(laws.sum(1), 1, rtol=1e-12)


def test_late_feedback_is_charged_to_what_was_played():
    """Two rounds played uniformly, as nothing had arrived: regrets are those of uniform play."""
    losses = np.array([[0.0, 1.0], [1.0, 0.0], [0.5, 0.0]])
    for learner in (nab.NormalHedge(), AdaNormalHedge(), Squint()):
        _, state = play(learner, losses, delay=1)
        np.testing.assert_array_equal(state.regret, [0.5 - 0.0 + 0.5 - 1.0, 0.5 - 1.0 + 0.5 - 0.0])


def test_every_learner_that_counts_regret_charges_what_was_played():
    losses, played = np.array([0.25, 1.0, 0.5]), np.array([0.125, 0.25, 0.625])
    step = played @ losses - losses
    for learner in (nab.NormalHedge(), NormalHedgeBH(), AdaNormalHedge(), Squint()):
        np.testing.assert_array_equal(learner.update(learner.init(3), losses, played).regret, step)
    state = AdaNormalHedgeTV().update(AdaNormalHedgeTV().init(3), losses, played)
    assert (state.regret == 0).all()  # level 0 begins anew, level 1 with the next round
    state = AdaNormalHedgeTV().update(state, losses, played)
    np.testing.assert_array_equal(state.regret[1], step)
    inside = Interleaved(Squint(), 2)
    np.testing.assert_array_equal(inside.update(inside.init(3), losses, played).instances[0].regret, step)
    blocks = Blocks(Squint(), 1)
    np.testing.assert_array_equal(blocks.update(blocks.init(3), losses, played).inside.regret, step)


def test_ada_hedge_charges_what_was_played():
    """At no gap yet the mix loss is the leaders': the gap is what was played beyond it."""
    losses, played = np.array([0.25, 1.0, 0.5]), np.array([0.125, 0.25, 0.625])
    state = AdaHedge().update(AdaHedge().init(3), losses, played)
    assert state.gap == pytest.approx(played @ losses - 0.25, abs=1e-12)


def test_rounds_are_discounted_with_what_they_brought():
    for learner in (nab.Hedge(discount=0.5), nab.NormalHedge(discount=0.5)):
        _, state = play(learner, np.eye(2)[[0, 1, 1, 0]])
        assert state.rounds == 1 + 0.5 + 0.25 + 0.125


def test_regret_within_rounding_is_none():
    """The threshold is 1e-12 a round, and the round to come."""
    prior = np.array([0.75, 0.25])
    for factor, law in ((0.99, prior), (1.01, [1.0, 0.0])):
        regret = np.array([factor * 11e-12, -1.0])
        found = solved(regret, 10.0, np.float64(1.0), prior, nab.NormalHedge().level)[1]
        np.testing.assert_allclose(found, law, rtol=1e-12)


@pytest.mark.parametrize("share", [0.001, 0.02, 0.5])
@pytest.mark.parametrize("n", [2, 8])
def test_fixed_shares_own_rate_is_the_best_where_a_switch_comes_every_so_many_rounds(share, n):
    rounds = 10**9  # so many that the first drafter costs nothing
    rate = tuned_rate(share, n)
    at, below, above = (
        bounds.fixed_share(n, rounds, int(share * rounds), share, factor * rate) for factor in (1, 0.99, 1.01)
    )
    assert at < min(below, above)


@every_learner
def test_torch_tensors_and_lists_are_losses_too(learner):
    state = learner.init(2)
    expected = learner.probs(learner.update(state, np.array([0.25, 0.5])))
    for losses in ([0.25, 0.5], torch.tensor([0.25, 0.5]), torch.tensor([0.25, 0.5], dtype=torch.bfloat16)):
        np.testing.assert_array_equal(learner.probs(learner.update(state, losses)), expected)


@every_learner
@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([0.1, 0.2, 0.3], r"shape \(2,\), got \(3,\)"),
        ([[0.1], [0.2]], r"shape \(2,\), got \(2, 1\)"),
        (0.1, r"shape \(2,\), got \(\)"),
        ([0.1, float("nan")], r"\[0, 1\], got nan"),
        ([0.1, float("inf")], r"\[0, 1\], got inf"),
        ([float("-inf"), 0.1], r"\[0, 1\], got -inf"),
        ([-0.5, 0.1], r"\[0, 1\], got -0.5"),
        ([-5e-324, 0.1], r"\[0, 1\], got -5e-324"),
        ([1.5, 0.1], r"\[0, 1\], got 1.5"),
        ([np.nextafter(1, 2), 0.1], r"\[0, 1\], got 1.0000000000000002"),
    ],
)
def test_bad_losses_are_named(learner, losses, message):
    with pytest.raises(ValueError, match=message):
        learner.update(learner.init(2), losses)


@every_learner
def test_the_ends_of_the_range_are_losses(learner):
    state = learner.update(learner.init(3), [-0.0, 1.0, 0.0])
    np.testing.assert_allclose(learner.probs(state).sum(), 1, rtol=1e-12)


@every_learner
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n must be a whole number, at least 1, got 0"),
        ({"n": -3}, "n must be a whole number, at least 1, got -3"),
        ({"n": 2.5}, "n must be a whole number, at least 1, got 2.5"),
        ({"n": 2, "batch": 0}, "batch must be a whole number, at least 1, got 0"),
        ({"n": 2, "prior": [0.5, 0.3, 0.2]}, r"prior must have shape.*got \(3,\)"),
        ({"n": 2, "prior": [1.0, 0.0]}, "prior must be at least 1e-250.*got 0.0"),
        ({"n": 2, "prior": [float("nan"), 1.0]}, "prior must be at least 1e-250.*got nan"),
        ({"n": 2, "prior": [0.5, 0.4]}, "prior must sum to 1.*got 0.9"),
    ],
)
def test_bad_starts_are_named(learner, arguments, message):
    with pytest.raises(ValueError, match=message):
        learner.init(**arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nab.Hedge(rate=0.0), r"rate must lie in \(0, 1e\+300\], got 0.0"),
        (lambda: nab.Hedge(rate=float("inf")), "rate.*got inf"),
        (lambda: nab.Hedge(rate=1e301), r"rate must lie in \(0, 1e\+300\], got 1e\+301"),
        (lambda: nab.Hedge(rate="fast"), "rate.*got fast"),
        (lambda: nab.Hedge(rate=True), "rate.*got True"),
        (lambda: NormalHedgeBH(start=1e308), r"start must lie in \(0, 1e\+300\], got 1e\+308"),
        (lambda: nab.Hedge(discount=None), "discount.*got None"),
        (lambda: nab.Hedge(rate=float("nan")), "rate.*got nan"),
        (lambda: OptimisticHedge(rate=-1.0), "rate.*got -1.0"),
        (lambda: nab.NormalHedge(discount=0.0), r"discount must lie in \(0, 1\], got 0.0"),
        (lambda: nab.Hedge(discount=1.5), "discount.*got 1.5"),
        (lambda: FixedShare(0.0), r"share must lie in \(1e-300, 1\], got 0.0"),
        (lambda: FixedShare(0.1, rate=0.0), "rate.*got 0.0"),
        (lambda: NormalHedgeBH(start=0.0), "start.*got 0.0"),
        (lambda: Interleaved(nab.Hedge(), -1), "delay.*got -1"),
        (lambda: Interleaved(nab.Hedge(), 1.5), "delay.*got 1.5"),
        (lambda: Blocks(nab.Hedge(), 0), "size.*got 0"),
    ],
)
def test_bad_parameters_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@every_learner
@pytest.mark.parametrize(
    ("played", "message"),
    [
        ([0.2, 0.3, 0.5], r"played must have shape \(2,\), got \(3,\)"),
        ([0.5, 0.4], "played must be a law, with sum 1 over drafters, got 0.9"),
        ([20.0, 30.0], "played must be a law, with sum 1 over drafters, got 50.0"),
        ([1.5, -0.5], "played must be a law, with no entry below 0, got -0.5"),
        ([float("nan"), 1.0], "played must be a law, with no entry below 0, got nan"),
    ],
)
def test_bad_laws_are_named(learner, played, message):
    with pytest.raises(ValueError, match=message):
        learner.update(learner.init(2), [0.0, 1.0], played)


@every_learner
def test_one_drafter_is_always_chosen(learner):
    np.testing.assert_array_equal(laws_of(learner, [[0.3], [0.9], [0.0]]), np.ones((4, 1)))


@every_learner
@pytest.mark.parametrize("scale", [1e-300, 1e-12, 1.0])
def test_tiny_losses_stay_finite(learner, scale):
    losses = np.array([[0.0, 0.5, 1.0], [0.5, 0.5, 1.0], [1.0, 0.5, 1.0]] * 200) * scale
    laws = laws_of(learner, losses)
    np.testing.assert_allclose(laws.sum(1), 1, rtol=1e-12)


@pytest.mark.parametrize("rate", [1e-300, 1e-12, 1e12, 1e300])
@pytest.mark.parametrize(
    "make",
    [nab.Hedge, OptimisticHedge, lambda rate: FixedShare(0.1, rate=rate)],
    ids=["hedge", "hint", "share"],
)
def test_extreme_rates_stay_finite(make, rate):
    losses = np.array([[0.75, 0.25, 1.0], [0.5, 0.75, 1.0], [0.5, 0.5, 1.0]] * 20)
    laws = laws_of(make(rate), losses)
    np.testing.assert_allclose(laws.sum(1), 1, rtol=1e-12)
    assert (laws[1:, 2] <= 1 / 3).all()


@every_learner
def test_long_runs_stay_finite(learner):
    """10^6 rounds where time is no matter (profile nightly), else 3000, in stretches of equal losses."""
    rounds = 1_000_000 if settings.get_current_profile_name() == "nightly" else 3000
    rng, state = np.random.default_rng(0), learner.init(3)
    for t in range(rounds):
        if t % (rounds // 20) == 0:
            losses = rng.integers(0, 2, 3).astype(float)
        state = learner.update(state, losses)
    assert learner.probs(state).sum() == pytest.approx(1, abs=1e-12)


@every_learner
@pytest.mark.parametrize("stretch", [1e3, 1e6, 1e9])
def test_states_of_longer_runs_stay_finite(learner, stretch):
    """Sums as large as after 10^5 to 10^11 rounds: what was played, multiplied."""
    _, state = play(learner, np.random.default_rng(1).integers(0, 2, (100, 4)).astype(float))
    sums = {
        name: value
        if value.dtype.kind == "i" or name.endswith(("law", "prior", "hint", "played"))
        else value * stretch
        for name, value in flat(state).items()
    }
    state = restored(state, sums)
    for t in range(40):
        state = learner.update(state, np.eye(4)[t % 4])
        assert learner.probs(state).sum() == pytest.approx(1, abs=1e-12)


@every_learner
@pytest.mark.parametrize("rounds", [1, 7, 40])
def test_a_saved_state_goes_on_bit_for_bit(learner, rounds, tmp_path):
    losses = np.random.default_rng(rounds).random((60, 3))
    _, state = play(learner, losses[:rounds])
    saved = json.loads(json.dumps({name: value.tolist() for name, value in flat(state).items()}))
    np.savez(tmp_path / "state.npz", **flat(state))
    with np.load(tmp_path / "state.npz") as arrays:
        copies = [restored(learner.init(3), saved), restored(learner.init(3), dict(arrays))]
    for loss in losses[rounds:]:
        state = learner.update(state, loss)
        copies = [learner.update(copy, loss) for copy in copies]
        for copy in copies:
            np.testing.assert_array_equal(learner.probs(copy), learner.probs(state))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("losses", [0, 0, 0], r"saved losses must have shape \(2,\), got \(3,\)"),
        ("losses", [[0, 0]], r"saved losses must have shape \(2,\), got \(1, 2\)"),
        ("prior", [1.0], r"saved prior must have shape \(2,\), got \(1,\)"),
        ("losses", [0, float("inf")], "saved losses must be finite, got inf"),
        ("rounds", float("nan"), "saved rounds must be finite, got nan"),
        ("rounds", [1.0, 1.0], "saved rounds must be a number"),
    ],
)
def test_damaged_states_are_named(name, value, message):
    learner = nab.Hedge()
    with pytest.raises(ValueError, match=message):
        restored(learner.init(2), {**flat(learner.init(2)), name: value})
    blocks = Blocks(learner, 3)
    with pytest.raises(ValueError, match=r"saved rounds must be a number like 0, got 1\.5"):
        restored(blocks.init(2), {**flat(blocks.init(2)), "rounds": 1.5})


def test_a_state_of_another_learner_is_refused():
    with pytest.raises(ValueError, match=r"saved state has.*regret.*this learner's has.*losses"):
        restored(nab.Hedge().init(2), flat(Squint().init(2)))


# References of another kind


def test_hedge_against_exact_rationals():
    """At rate ln 2 the weights are 2^-L: exact in rationals for integer losses."""
    losses = np.array([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    weights = [Fraction(1, 2 ** int(total)) for total in losses.sum(0)]
    expected = [float(w / sum(weights)) for w in weights]
    np.testing.assert_allclose(laws_of(nab.Hedge(rate=log(2)), losses)[-1], expected, rtol=1e-14)


@given(loss_matrices(max_rounds=6, max_n=3), st.sampled_from([0.05, 0.5, 1.0]))
def test_fixed_share_is_hedge_over_sequences(losses, share):
    """The forward algorithm against a sum over all n^T sequences of drafters."""
    rounds, n = losses.shape
    weights = np.zeros(n)
    for code in np.ndindex(*[n] * (rounds + 1)):
        lost = sum(losses[t, code[t]] for t in range(rounds))
        steps = [(share / n + (1 - share) * (a == b)) for a, b in pairwise(code)]
        weights[code[-1]] += np.prod(steps) * exp(-1.5 * lost)
    np.testing.assert_allclose(
        laws_of(FixedShare(share, rate=1.5), losses)[-1], weights / weights.sum(), rtol=1e-12
    )


regrets = st.lists(st.integers(-640, 640).map(lambda k: k / 64), min_size=2, max_size=40).filter(
    lambda r: max(r) > 0
)


@pytest.mark.parametrize("learner", [nab.NormalHedge(), NormalHedgeBH(), NormalHedgeBH(30.0)], ids=str)
@given(values=regrets, guess=st.sampled_from([1e-6, 1e-2, 1.0, 1e3, 1e9]))
def test_normal_hedge_scale_against_an_independent_root(learner, values, guess):
    """From wherever the search starts."""
    R, n = np.array(values), len(values)
    x = np.maximum(R, 0)

    def excess(log_s):
        s = exp(log_s)
        return np.log(np.mean(np.exp(s * (x**2 - x.max() ** 2)))) + s * x.max() ** 2 - learner.level(s)[0]

    s = exp(brentq(excess, -60, 60, xtol=1e-15, rtol=1e-14))
    scale, law = solved(R, 10.0, np.float64(guess), np.full(n, 1 / n), learner.level)
    assert scale == pytest.approx(0.5 / s, rel=1e-11)
    weights = x * np.exp(s * (x**2 - x.max() ** 2))
    np.testing.assert_allclose(law, weights / weights.sum(), rtol=1e-9, atol=1e-15)
    assert (law[R <= 0] == 0).all()


@pytest.mark.parametrize("variance", [0.0, 1e-12, 9e-7, 1.1e-6, 1e-3, 0.5, 30.0, 4e3])
@pytest.mark.parametrize("slope", [-30.0, -1.0, -0.01, 0.0, 0.01, 0.9, 1.1, 6.0])
def test_squint_against_quadrature(variance, slope):
    """Regrets from far below to far above what the variance allows."""
    regret = slope * (variance**0.5 if variance else 1e-3)

    def exponent(eta):
        return eta * regret - eta * eta * variance

    peak = min(max(regret / (2 * variance), 0), 0.5) if variance else 0.5 * (regret > 0)
    width = 1 / (variance + abs(regret) + 1) ** 0.5
    edges = sorted({0.0, 0.5, *np.clip(peak + width * np.array([-20, -5, -1, 0, 1, 5, 20]) / 4, 0, 0.5)})
    area = sum(
        quad(lambda eta: exp(exponent(eta) - exponent(peak)), a, b, epsabs=0, epsrel=1e-13)[0]
        for a, b in pairwise(edges)
        if b > a
    )
    found = log_evidence(np.array([regret]), np.array([variance]))[0]
    assert found == pytest.approx(log(area) + exponent(peak), rel=1e-11, abs=1e-11)


@given(loss_matrices(max_rounds=25))
def test_ada_normal_hedge_tv_against_its_definition(losses):
    """Pairs of drafter and running interval of the cover, kept one by one."""
    n = losses.shape[1]
    pairs = {}
    for t, (law, loss) in enumerate(
        zip(laws_of(AdaNormalHedgeTV(), losses), [*losses, None], strict=True), 1
    ):
        for level in range(t.bit_length()):
            if t % 2**level == 0:
                pairs[level] = (np.zeros(n), np.zeros(n), t >> level)
        weights = sum(
            0.5**level / (k * (k + 1)) * (phi(R + 1, C + 1) - phi(R - 1, C + 1))
            for level, (R, C, k) in pairs.items()
        )
        np.testing.assert_allclose(law, weights / weights.sum(), rtol=1e-9)
        if loss is not None:
            r = law @ loss - loss
            pairs = {level: (R + r, C + abs(r), k) for level, (R, C, k) in pairs.items()}


def phi(regret, spread):
    return np.exp(np.maximum(regret, 0) ** 2 / (3 * spread))


# What wrappers and forgetting are for


@given(loss_matrices())
def test_interleaving_is_one_learner_for_each_turn(losses):
    laws, _ = play(Interleaved(nab.NormalHedge(), 2), losses, delay=2)
    for turn in range(3):
        alone, _ = play(nab.NormalHedge(), losses[turn::3]) if len(losses) > turn else (losses[:0], None)
        np.testing.assert_allclose(laws[turn::3], alone, rtol=1e-12, atol=1e-15)


@given(loss_matrices())
def test_blocks_are_the_learner_on_means(losses):
    laws, _ = play(Blocks(AdaNormalHedge(), 3), losses)
    means = losses[: len(losses) // 3 * 3].reshape(-1, 3, losses.shape[1]).mean(1)
    np.testing.assert_allclose(
        laws[::3], laws_of(AdaNormalHedge(), means)[: len(laws[::3])] if len(means) else laws[::3]
    )


TRACKING = [
    nab.Hedge(discount=0.9),
    nab.NormalHedge(discount=0.9),
    FixedShare(0.02),
    AdaNormalHedgeTV(),
]


@pytest.mark.parametrize("learner", TRACKING, ids=str)
def test_trackers_follow_a_change(learner):
    losses = np.concatenate([np.tile([0.0, 1.0], (100, 1)), np.tile([1.0, 0.0], (60, 1))])
    assert laws_of(learner, losses)[-1][1] > 0.9


@pytest.mark.parametrize(
    "learner", [nab.Hedge(), nab.NormalHedge(), AdaHedge(), Squint(), AdaNormalHedge()], ids=str
)
def test_learners_that_only_sum_do_not(learner):
    losses = np.concatenate([np.tile([0.0, 1.0], (100, 1)), np.tile([1.0, 0.0], (60, 1))])
    assert laws_of(learner, losses)[-1][1] < 0.5
