"""Learners with priors against their formulas, written down plainly: loops, no shifts, no shared code."""

from dataclasses import dataclass
from math import exp, log, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.optimize import brentq

import nab
from nab.learners import (
    AdaHedge,
    AdaNormalHedge,
    Blocks,
    FollowTheLeader,
    NormalHedgeBH,
    OptimisticHedge,
    Squint,
)
from nab.learners.normal_hedge import solved
from nab.sim import bounds, environments, play, regret


@st.composite
def problems(draw, max_rounds=12):
    """Losses and a prior."""
    n = draw(st.integers(2, 4))
    row = st.lists(st.integers(0, 8).map(lambda k: k / 8), min_size=n, max_size=n)
    shares = np.array(draw(st.lists(st.integers(1, 9), min_size=n, max_size=n)), dtype=float)
    return np.array(draw(st.lists(row, min_size=1, max_size=max_rounds))), shares / shares.sum()


def normalised(weights):
    return weights / weights.sum()


def hedge(prior, losses, laws, discount=1.0):
    """The anytime rate of round t is sqrt(8 ln n / t); with a discount t is the discounted count."""
    L, t = np.zeros(len(prior)), 1.0
    for loss in losses:
        L, t = discount * L + loss, discount * (t - 1) + 2
    return normalised(prior * np.exp(-sqrt(8 * log(len(prior)) / t) * L))


def optimistic(prior, losses, laws):
    hints = [np.zeros(len(prior)), *losses]
    spread = sum(np.ptp(loss - hint) ** 2 for loss, hint in zip(losses, hints, strict=False))
    rate = 2 * sqrt(log(len(prior)) / (4 + spread))
    return normalised(prior * np.exp(-rate * (sum(losses, hints[0]) + hints[-1])))


def ada_hedge(prior, losses, laws):
    """Mix losses of each round by its own weights, the gap their shortfall."""
    L, gap = np.zeros(len(prior)), 0.0
    for loss, law in zip(losses, laws, strict=False):
        if gap == 0:  # the limit of the mix loss at an infinite rate: the loss of the best leader
            mix = min(L + loss) - min(L)
        else:
            rate = log(len(prior)) / gap
            mix = (log(prior @ np.exp(-rate * L)) - log(prior @ np.exp(-rate * (L + loss)))) / rate
        L, gap = L + loss, gap + max(0.0, law @ loss - mix)
    return normalised(prior * (min(L) == L) if gap == 0 else prior * np.exp(-log(len(prior)) / gap * L))


def follow_the_leader(prior, losses, laws):
    L = sum(losses, np.zeros(len(prior)))
    return normalised(prior * (min(L) == L))


def steps(losses, laws, n):
    return np.array([law @ loss - loss for loss, law in zip(losses, laws, strict=False)]).reshape(-1, n)


def phi(gained, spread):
    return np.exp(np.maximum(gained, 0) ** 2 / (3 * spread))


def ada_normal_hedge(prior, losses, laws, inside=1):
    r = steps(losses, laws, len(prior))
    R, C = r.sum(0), np.abs(r).sum(0)
    return normalised(prior * (phi(R + 1, C + 1) - phi(R - 1, C + inside)))


def squint(prior, losses, laws):
    r = steps(losses, laws, len(prior))
    areas = [
        quad(lambda eta, a=a, b=b: exp(eta * a - eta * eta * b), 0, 0.5, epsabs=0, epsrel=1e-12)[0]
        for a, b in zip(r.sum(0), (r**2).sum(0), strict=True)
    ]
    return normalised(prior * np.array(areas))


def normal_hedge(prior, losses, laws, level=lambda c: 1.0):
    x = np.maximum(steps(losses, laws, len(prior)).sum(0), 0)
    if x.max() <= 1e-12 * (1 + len(losses)):
        return prior
    c = exp(
        brentq(
            lambda u: log(prior @ np.exp(x**2 / (2 * exp(u)))) - level(exp(u)), log(x.max() ** 2 / 1000), 9
        )
    )
    return normalised(prior * x * np.exp(x**2 / (2 * c)))


REFERENCES = [
    (nab.Hedge(), hedge),
    (nab.Hedge(discount=0.75), lambda *a: hedge(*a, discount=0.75)),
    (OptimisticHedge(), optimistic),
    (AdaHedge(), ada_hedge),
    (FollowTheLeader(), follow_the_leader),
    (AdaNormalHedge(), ada_normal_hedge),
    (Squint(), squint),
    (nab.NormalHedge(), normal_hedge),
    (NormalHedgeBH(2.0), lambda *a: normal_hedge(*a, level=lambda c: log(c / 2) / 2)),
]


@pytest.mark.parametrize(
    ("learner", "reference"), REFERENCES, ids=[str(learner) for learner, _ in REFERENCES]
)
@given(problem=problems())
def test_laws_against_plain_definitions(learner, reference, problem):
    losses, prior = problem
    laws, _ = play(learner, losses, prior=prior)
    for t, law in enumerate(laws):
        np.testing.assert_allclose(law, reference(prior, list(losses[:t]), laws[:t]), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("level", ["normal", "heat"])
@pytest.mark.parametrize("n", [2, 730, 5000])
@pytest.mark.parametrize("least", [None, 1e-3, 1e-12, 1e-250])
@pytest.mark.parametrize("ahead", [1e-6, 0.1, 1.0, 300.0])
@pytest.mark.parametrize("guess", [1e-9, 1.0, 1e9])
def test_normal_hedge_scale_with_many_drafters_and_small_priors(level, n, least, ahead, guess):
    """One drafter is ahead, the unlikeliest: from every guess the root is found, and no term overflows."""
    learner = nab.NormalHedge() if level == "normal" else NormalHedgeBH()
    prior = np.full(n, 1 / n) if least is None else np.array([least, *[(1 - least) / (n - 1)] * (n - 1)])
    R = np.array([ahead, *np.linspace(-1, 0.5 * ahead, n - 1)])
    c, law = solved(R, 1.0, np.float64(guess), prior, learner.level)
    x = np.maximum(R, 0)
    wanted = 1.0 if level == "normal" else 0.5 * log(c)
    mean = log(prior @ np.exp((x**2 - x.max() ** 2) / (2 * c))) + x.max() ** 2 / (2 * c)
    assert mean == pytest.approx(wanted, rel=1e-11, abs=1e-11)
    assert law.sum() == pytest.approx(1, abs=1e-12)


def test_small_losses_are_learned_from():
    """Regrets of 1e-5 are no rounding."""
    laws, _ = play(nab.NormalHedge(), np.tile([1e-5, 0.0], (3, 1)))
    np.testing.assert_array_equal(laws[-1], [0.0, 1.0])


def test_blocks_charge_the_mean_of_the_laws_that_were_played():
    learner = Blocks(nab.NormalHedge(), 2)
    state = learner.update(learner.init(2), [0.0, 1.0], [1.0, 0.0])
    state = learner.update(state, [1.0, 0.0], [0.0, 1.0])
    np.testing.assert_allclose(state.inside.regret, [0.0, 0.0], atol=1e-15)
    state = learner.update(learner.init(2), [0.0, 1.0], [0.75, 0.25])
    state = learner.update(state, [0.0, 1.0], [0.25, 0.75])
    np.testing.assert_allclose(state.inside.regret, [0.5, -0.5], atol=1e-15)


def test_priors_must_sum_to_one_nearly_exactly():
    with pytest.raises(ValueError, match="prior must sum to 1"):
        nab.Hedge().init(2, prior=[0.5, 0.5 + 1e-6])


@given(problems(max_rounds=60))
def test_squints_potential(problem):
    """With V from its definition, not from the learner's own state."""
    losses, prior = problem
    laws, _ = play(Squint(), losses, prior=prior)
    r = steps(losses, laws, len(prior))
    assert bounds.squint_potential(r.sum(0), (r**2).sum(0), prior) <= 1e-14


def test_squints_potential_on_the_worst_sequences():
    for n in (2, 8):
        for answer in (environments.anti_leader, environments.half_mass):
            losses = environments.adaptive(Squint(), n, 300, answer)
            r = steps(losses, play(Squint(), losses)[0], n)
            assert bounds.squint_potential(r.sum(0), (r**2).sum(0)) <= 0
    assert bounds.squint_potential(np.array([9.0, -9.0]), np.array([4.0, 4.0])) > 0


# Slips of public code, each rejected by what the real learner passes


def test_ada_normal_hedge_with_c_minus_1_is_another_law():
    """C - 1 for C + 1 in the second term, which is exp of a negative number while C is below 1."""
    losses = np.tile([0.0, *[1.0] * 7], (2, 1))
    laws, state = play(AdaNormalHedge(), losses)
    right, prior = AdaNormalHedge().probs(state), np.full(8, 1 / 8)
    np.testing.assert_allclose(ada_normal_hedge(prior, losses, laws), right, rtol=1e-12)
    assert not np.allclose(ada_normal_hedge(prior, losses, laws, inside=-1), right, atol=0.01)


@dataclass(frozen=True)
class Unshifted(nab.Hedge):
    """Hedge that exponentiates sums as they are, or multiplies weights."""

    def probs(self, state):
        with np.errstate(all="ignore"):
            return normalised(state.prior * np.exp(-self.rate * state.losses))

    def update(self, state, losses, played=None):
        return state._replace(losses=state.losses + losses)


def test_hedge_without_a_shift_ends_in_nan():
    losses = np.tile([0.5, 1.0], (4000, 1))
    assert np.isnan(play(Unshifted(rate=1.0), losses)[0][-1]).any()
    laws, _ = play(nab.Hedge(rate=1.0), losses)
    assert regret(laws, losses)[-1].max() <= bounds.hedge(2, 4000, 1.0)


def test_weights_that_underflow_never_come_back():
    """Multiplied weights forget a drafter for good once its weight is 0; sums of losses do not."""
    losses = np.concatenate([np.tile([0.0, 1.0], (1000, 1)), np.tile([1.0, 0.0], (1100, 1))])
    weights = np.full(2, 0.5)
    for loss in losses:
        weights = normalised(weights * np.exp(-loss))
    assert weights[1] == 0
    assert play(nab.Hedge(rate=1.0), losses)[0][-1][1] > 0.99


def test_equal_first_losses_are_no_error():
    """sktime's NormalHedge raises there."""
    laws, _ = play(nab.NormalHedge(), [[0.3, 0.3], [0.1, 0.2]])
    np.testing.assert_array_equal(laws, np.full((2, 2), 0.5))
