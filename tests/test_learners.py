"""Every learner keeps every promise; the theorems hold without slack; NormalHedge's root is the root."""

from fractions import Fraction
from math import e, log, sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, target
from hypothesis import strategies as st
from scipy.optimize import brentq

import nab
from nab.learners.normal_hedge import NormalHedgeState, solved
from nab.sim import regret

LEARNERS = {
    "hedge": nab.Hedge(),
    "hedge, fixed rate": nab.Hedge(rate=0.5),
    "hedge, discounted": nab.Hedge(discount=0.9),
    "normal-hedge": nab.NormalHedge(),
    "normal-hedge, discounted": nab.NormalHedge(discount=0.9),
}
every_learner = pytest.mark.parametrize("learner", LEARNERS.values(), ids=LEARNERS.keys())

dyadic = st.integers(0, 64).map(lambda k: k / 64)  # sums of these are exact in floats


@st.composite
def loss_matrices(draw, max_rounds=40, max_n=5):
    n = draw(st.integers(2, max_n))
    return np.array(draw(st.lists(st.lists(dyadic, min_size=n, max_size=n), min_size=1, max_size=max_rounds)))


def play(learner, losses):
    """The laws played on ``(rounds, n, ...)`` losses, and the last state."""
    state = learner.init(losses.shape[1], *losses.shape[2:])
    played = []
    for loss in losses:
        played.append(learner.probs(state))
        state = learner.update(state, loss, played[-1])
    return np.array(played), state


@every_learner
@given(loss_matrices())
def test_laws_are_distributions_and_start_uniform(learner, losses):
    played, state = play(learner, losses)
    for law in [*played, learner.probs(state)]:
        assert (law >= 0).all()
        assert law.sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(played[0], 1 / losses.shape[1], rtol=1e-15)


@every_learner
@given(loss_matrices(), st.randoms(use_true_random=False))
def test_renaming_the_drafters_renames_the_weights(learner, losses, random):
    order = list(range(losses.shape[1]))
    random.shuffle(order)
    played, _ = play(learner, losses)
    renamed, _ = play(learner, losses[:, order])
    np.testing.assert_allclose(renamed, played[:, order], atol=1e-9)


@every_learner
@given(loss_matrices(max_rounds=20))
def test_adding_a_constant_to_all_losses_changes_nothing(learner, losses):
    low, _ = play(learner, losses / 2)
    high, _ = play(learner, losses / 2 + 0.5)
    np.testing.assert_allclose(high, low, atol=1e-9)


@every_learner
def test_equal_losses_move_nothing(learner):
    state = learner.update(learner.init(3), [0.25, 0.25, 0.25])
    np.testing.assert_allclose(learner.probs(state), 1 / 3, rtol=1e-15)


@every_learner
def test_update_leaves_its_argument_alone(learner):
    state = learner.update(learner.init(3), [0.0, 0.5, 1.0])
    before = [np.copy(part) for part in state]
    learner.update(state, [1.0, 0.0, 0.0])
    for part, copy in zip(state, before, strict=True):
        np.testing.assert_array_equal(part, copy)


@every_learner
def test_learning_happens(learner):
    losses = np.tile([0.5, 0.25, 0.75], (300, 1))
    played, _ = play(learner, losses)
    assert played[-1].argmax() == 1
    assert played[-1][1] > 0.6


@every_learner
@given(loss_matrices(max_rounds=10))
def test_a_batch_is_a_loop_over_queries(learner, losses):
    both = np.stack([losses, losses[::-1], 1 - losses], axis=2)
    played, _ = play(learner, both)
    for query in range(3):
        alone, _ = play(learner, both[:, :, query])
        np.testing.assert_allclose(played[:, :, query], alone, rtol=1e-12, atol=1e-15)


@every_learner
def test_late_feedback_is_charged_to_what_was_played(learner):
    """Feedback one round late, with the law of its round, gives the same losses to the same laws."""
    losses = np.array([[0.0, 1.0], [1.0, 0.0], [0.5, 0.0]])
    state, pending = learner.init(2), []
    for loss in losses:
        pending.append((loss, learner.probs(state)))
        if len(pending) == 2:
            state = learner.update(state, *pending.pop(0))
    if isinstance(state, NormalHedgeState) and learner.discount == 1:
        # round 1 played (.5, .5), round 2 too as nothing had arrived: regrets are those of uniform play
        np.testing.assert_array_equal(state.regret, [0.5 - 0.0 + 0.5 - 1.0, 0.5 - 1.0 + 0.5 - 0.0])
    assert np.isfinite(learner.probs(state)).all()


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
        ([0.1, float("nan")], r"\[0, 1\], got nan"),
        ([0.1, float("inf")], r"\[0, 1\], got inf"),
        ([-0.5, 0.1], r"\[0, 1\], got -0.5"),
        ([1.5, 0.1], r"\[0, 1\], got 1.5"),
    ],
)
def test_bad_losses_are_named(learner, losses, message):
    with pytest.raises(ValueError, match=message):
        learner.update(learner.init(2), losses)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nab.Hedge().init(0), "n must be at least 1.*got 0"),
        (lambda: nab.NormalHedge().init(2, 0), "batch must be at least 1.*got 0"),
        (lambda: nab.Hedge(rate=0.0), "rate.*got 0.0"),
        (lambda: nab.Hedge(rate=float("inf")), "rate.*got inf"),
        (lambda: nab.NormalHedge(discount=0.0), "discount.*got 0.0"),
        (lambda: nab.Hedge(discount=1.5), "discount.*got 1.5"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@every_learner
def test_one_drafter_is_always_chosen(learner):
    _, state = play(learner, np.array([[0.3], [0.9]]))
    np.testing.assert_array_equal(learner.probs(state), [1.0])


@every_learner
@pytest.mark.parametrize("scale", [1e-300, 1e-12, 1.0])
def test_long_and_tiny_histories_stay_finite(learner, scale):
    state = learner.init(3)
    for t in range(2000):
        state = learner.update(state, np.array([0.0, 0.5, 1.0])[[t % 3, 1, 2]] * scale)
    assert np.isfinite(learner.probs(state)).all()
    assert learner.probs(state).sum() == pytest.approx(1, abs=1e-12)


@given(loss_matrices(max_rounds=80), st.sampled_from([0.125, 0.5, 2.0]))
def test_hedge_bound_at_a_fixed_rate(losses, rate):
    """Cesa-Bianchi and Lugosi 2006, Thm 2.2: no slack."""
    played, _ = play(nab.Hedge(rate=rate), losses)
    rounds, n = losses.shape
    found, bound = regret(played, losses)[-1].max(), log(n) / rate + rate * rounds / 8
    target(found / bound)
    assert found <= bound


def anytime_bound(rounds, n):
    """Master lemma with eta_t = sqrt(8 ln n / t): ln n / eta_T + sum_t eta_t / 8."""
    rates = np.sqrt(8 * log(n) / np.arange(1, rounds + 1))
    return log(n) / rates[-1] + rates.sum() / 8


@given(loss_matrices(max_rounds=80))
def test_hedge_bound_at_the_anytime_rate(losses):
    played, _ = play(nab.Hedge(), losses)
    found, bound = regret(played, losses)[-1].max(), anytime_bound(*losses.shape)
    target(found / bound)
    assert found <= bound


def test_the_bound_check_can_fail():
    """Following the leader (Hedge at a huge rate) breaks that bound where the leader is always wrong."""
    losses = np.concatenate([[[0.5, 0.0]], np.tile([[0.0, 1.0], [1.0, 0.0]], (50, 1))])
    played, _ = play(nab.Hedge(rate=1e6), losses)
    assert regret(played, losses)[-1].max() > anytime_bound(*losses.shape)
    played, _ = play(nab.Hedge(), losses)
    assert regret(played, losses)[-1].max() <= anytime_bound(*losses.shape)


def scale(regrets):
    """c of NormalHedge, from its defining equation, by bracketing."""
    positive = np.maximum(regrets, 0)
    top = positive.max() ** 2

    def excess(lam):
        return np.log(np.mean(np.exp(lam * (positive**2 / top - 1)))) + lam - log(e)

    lam = brentq(excess, 0.5, 2 + log(len(regrets)), xtol=1e-15, rtol=1e-15)
    return top / (2 * lam)


@given(
    st.lists(st.integers(-640, 640).map(lambda k: k / 64), min_size=2, max_size=40).filter(
        lambda r: max(r) > 0
    )
)
def test_normal_hedge_weights_against_an_independent_root(values):
    regrets = np.array(values)
    positive, c = np.maximum(regrets, 0), scale(regrets)
    weights = positive * np.exp((positive**2 - positive.max() ** 2) / (2 * c))
    n = len(regrets)
    found, law = solved(regrets, 10.0, np.float64(1.0), np.full(n, 1 / n), nab.NormalHedge().level)
    assert found == pytest.approx(c, rel=1e-12)
    np.testing.assert_allclose(law, weights / weights.sum(), rtol=1e-10, atol=1e-15)
    assert (law[regrets <= 0] == 0).all()


@given(loss_matrices(max_rounds=80))
def test_normal_hedge_identity(losses):
    """k-th largest regret <= sqrt(2 c (1 + ln(n / k))), by definition of c (1e-12: the root's error)."""
    _, state = play(nab.NormalHedge(), losses)
    if state.regret.max() > 1e-12 * (1 + state.rounds):
        c, n = scale(state.regret), len(state.regret)
        for k, value in enumerate(sorted(state.regret, reverse=True), 1):
            assert value <= sqrt(2 * c * (1 + log(n / k))) * (1 + 1e-12)


def test_hedge_against_exact_rationals():
    """At rate ln 2 the weights are 2^-L: exact in rationals for integer losses."""
    losses = np.array([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    _, state = play(nab.Hedge(rate=log(2)), losses)
    weights = [Fraction(1, 2 ** int(total)) for total in losses.sum(0)]
    expected = [float(w / sum(weights)) for w in weights]
    np.testing.assert_allclose(nab.Hedge(rate=log(2)).probs(state), expected, rtol=1e-14)


def test_discounting_follows_a_change_and_summing_does_not():
    losses = np.concatenate([np.tile([0.25, 0.75], (100, 1)), np.tile([0.75, 0.25], (60, 1))])
    for learner in (nab.Hedge, nab.NormalHedge):
        assert play(learner(discount=0.9), losses)[0][-1][1] > 0.9
        assert play(learner(), losses)[0][-1][1] < 0.5
