"""Exact quantities against brute force, closed forms and the decoder itself, kept within a bound."""

from itertools import islice, product
from math import log, sqrt

import numpy as np
import pytest
from enumeration import outcomes

import nab
from nab import sampling
from nab.acceptance import Chain, Greedy, TopK
from nab.losses import expected_length, plug_in_length
from nab.sim import Markov, exact
from nab.sim.markov import domains
from nab.wrappers import Censored

RNG = np.random.default_rng(20260105)
TARGET = Markov(RNG.dirichlet(np.ones(3), size=(3, 3)))  # of order 2
SAMPLED = Markov(RNG.dirichlet(np.ones(3), size=3))
DEEPER = Markov(RNG.dirichlet(np.ones(3), size=(3, 3)))
LOOKUP = Markov(np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))  # nothing to propose after 1
POOL = {"sampled": SAMPLED, "of order 2": DEEPER, "lookup": LOOKUP}
RULES = [Chain(), TopK(1), TopK(2)]
P = Markov(np.full((2, 2), 0.5))
Q = Markov(np.array([[0.9, 0.1], [0.5, 0.5]]))


def state(tokens) -> int:
    return 3 * tokens[-2] + tokens[-1]


def words(model, tokens, length):
    """``(text, probability)`` of everything that may follow ``tokens``."""
    for word in product(range(model.table.shape[-1]), repeat=length):
        text = [*tokens, *word]
        laws = model.score(text[:-1], len(tokens))
        yield text, np.prod(laws[np.arange(length), word])


def scores(drafter, rule, text, start):
    """``gamma`` and ``realised`` of the positions from ``start`` on, each ``(positions, 1)``."""
    p, q = TARGET.score(text[:-1], start), drafter.score(text[:-1], start)
    return rule.probability(p, q)[:, None], rule.realised(p, q, np.array(text[start:]))[:, None]


def first_round(drafters, weights, tokens, draft_len):
    """Joint law of a round's emitted tokens and the state behind it, from the enumerated decoder."""
    law = np.zeros((draft_len + 1, 9))

    def run(rng):
        selector = nab.Constant(weights, rng=rng)
        return next(nab.decode(TARGET, drafters, selector, tokens, draft_len=draft_len, rng=rng)).emitted

    for emitted, probability in outcomes(run):
        law[len(emitted) - 1, state([*tokens, *emitted])] += probability
    return law


@pytest.mark.parametrize("name", POOL)
@pytest.mark.parametrize("draft_len", [1, 3])
def test_the_law_of_a_round_is_that_of_the_enumerated_decoder(name, draft_len):
    law = exact.round_law(TARGET, POOL[name], draft_len)
    for tokens in product(range(3), repeat=2):
        decoded = first_round([POOL[name]], [1.0], tokens, draft_len)
        np.testing.assert_allclose(law[state(tokens)], decoded, atol=1e-14)


def test_laws_of_rounds_mix():
    pool, weights = [SAMPLED, LOOKUP], [0.25, 0.75]
    law = np.tensordot(weights, [exact.round_law(TARGET, q, 2) for q in pool], 1)
    np.testing.assert_allclose(law[state([2, 0])], first_round(pool, weights, [2, 0], 2), atol=1e-14)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", POOL)
def test_the_law_of_a_round_is_that_of_every_text_cut_where_a_token_is_not_accepted(name, rule):
    draft_len, law = 2, np.zeros((9, 3, 9))
    for tokens in product(range(3), repeat=2):
        for text, probability in words(TARGET, tokens, draft_len + 1):
            a = scores(POOL[name], rule, text, 2)[1][:, 0]
            for k, stops in enumerate([1 - a[0], a[0] * (1 - a[1]), a[0] * a[1]]):
                law[state(tokens), k, state(text[: 3 + k])] += probability * stops
    np.testing.assert_allclose(exact.round_law(TARGET, POOL[name], draft_len, rule), law, atol=1e-14)


def test_one_child_is_a_chain_of_one_hot_laws():
    one_hot = Markov(np.eye(3)[SAMPLED.table.argmax(-1)])
    by_rule = exact.round_law(TARGET, SAMPLED, 4, TopK(1))
    np.testing.assert_array_equal(by_rule, exact.round_law(TARGET, one_hot, 4))


def test_a_greedy_target_accepts_all_or_nothing():
    greedy = Markov(np.eye(3)[TARGET.table.argmax(-1)])
    law = exact.round_law(greedy, DEEPER, 4, Greedy())
    np.testing.assert_array_equal(law, exact.round_law(greedy, DEEPER, 4, TopK(1)))
    assert set(np.unique(law)) == {0, 1}


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_without_memory_a_round_is_a_cut_geometric(gamma):
    """p = (g, 1 - g), q one-hot: ``P(L = k) = g^(k - 1) (1 - g)`` for k <= K, ``P(L = K + 1) = g^K``."""
    draft_len = 5
    target, drafter = Markov(np.array([[gamma, 1 - gamma]] * 2)), Markov(np.array([[1.0, 0.0]] * 2))
    k = np.arange(draft_len + 1)
    of_length = gamma**k * np.where(k < draft_len, 1 - gamma, 1)
    law = exact.round_law(target, drafter, draft_len)
    np.testing.assert_allclose(law.sum(2), [of_length] * 2, atol=1e-15)
    mean = (gamma**k).sum()
    assert exact.mean_acceptance_length(law) == pytest.approx(mean, abs=1e-14)
    assert exact.variance(law) == pytest.approx(of_length @ (k + 1 - mean) ** 2, abs=1e-13)
    np.testing.assert_allclose(exact.potential(law), 0, atol=1e-13)
    for moments in exact.estimators(target, drafter, draft_len).values():
        np.testing.assert_allclose(moments.mean, mean, atol=1e-14)


def lossless(rule) -> float:
    """Largest difference between laws of emitted tokens and the target's own."""
    start, draft_len, tokens = np.eye(9)[5], 3, 12
    laws = exact.token_laws(TARGET, DEEPER, draft_len, rule, start=start, tokens=tokens)
    chain = np.zeros((9, 9))
    for s, x in product(range(9), range(3)):
        chain[s, 3 * s % 9 + x] = TARGET.table.reshape(9, 3)[s, x]
    own = [start @ np.linalg.matrix_power(chain, t) @ TARGET.table.reshape(9, 3) for t in range(tokens)]
    return np.abs(laws - own).max()


@pytest.mark.parametrize("rule", RULES)
def test_emitted_tokens_have_the_targets_law_at_every_position(rule):
    assert lossless(rule) < 1e-14


def test_that_check_can_fail(monkeypatch):
    right = exact.round_law
    monkeypatch.setattr(exact, "round_law", lambda *args: right(*args)[:, ::-1])
    assert lossless(Chain()) > 1e-3


def test_mean_rounds_are_those_of_the_enumerated_decoder():
    pool, tokens = [DEEPER, LOOKUP], 3
    law = np.mean([exact.round_law(TARGET, q, 1) for q in pool], axis=0)

    def run(rng):
        rounds = nab.decode(TARGET, pool, nab.Constant([0.5, 0.5], rng=rng), [1, 2], draft_len=1, rng=rng)
        return len(list(nab.until(rounds, max_new_tokens=tokens)))

    decoded = sum(count * probability for count, probability in outcomes(run))
    assert exact.mean_rounds(law, tokens)[state([1, 2])] == pytest.approx(decoded, abs=1e-13)
    assert (exact.mean_rounds(law, 0) == 0).all()


@pytest.mark.parametrize("name", POOL)
def test_in_the_long_run_a_token_costs_one_over_mat_rounds(name):
    """The renewal theorem: rounds for T + 1 tokens less those for T go to 1 / MAT, at a geometric rate."""
    law = exact.round_law(TARGET, POOL[name], 3)
    step = exact.mean_rounds(law, 401) - exact.mean_rounds(law, 400)
    np.testing.assert_allclose(step, 1 / exact.mean_acceptance_length(law), atol=1e-11)


def test_deviations_have_mean_zero_and_their_variance_is_that_of_long_sums():
    law = exact.round_law(TARGET, DEEPER, 3)
    deviations, chain, length = exact.deviations(law), law.sum(1), np.arange(1, 5)
    np.testing.assert_allclose((law * deviations).sum((1, 2)), 0, atol=1e-13)
    mean, square, grown = np.zeros(9), np.zeros(9), np.zeros(9)
    for _ in range(300):  # mean and mean square of the tokens of so many rounds, and how their variance grows
        cross = np.einsum("skr,k,r->s", law, length, mean)
        square = law.sum(2) @ length**2 + 2 * cross + chain @ square
        mean = exact.lengths(law) + chain @ mean
        last, grown = grown, square - mean**2
    np.testing.assert_allclose(grown - last, exact.variance(law), atol=1e-8)


def test_the_plug_in_estimate_is_biased_on_the_worked_example():
    means = {name: moments.mean[0] for name, moments in exact.estimators(P, Q, 2).items()}
    assert exact.lengths(exact.round_law(P, Q, 2))[0] == pytest.approx(2.0, abs=1e-12)
    assert means == pytest.approx({"unbiased": 2.0, "plug-in": 2.08, "ratio": 2.0}, abs=1e-12)


ESTIMATES = {
    "unbiased": lambda gamma, realised: expected_length(gamma, realised, 3),
    "plug-in": lambda gamma, realised: plug_in_length(gamma, 3),
    "ratio": lambda gamma, realised: 1 + np.cumprod(realised, axis=0).sum(0, keepdims=True),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ESTIMATES)
def test_moments_of_estimators_are_those_over_every_window(name, rule):
    start = np.random.default_rng(1).dirichlet(np.ones(9))
    mean, square = np.zeros(9), np.zeros(9)
    for tokens in product(range(3), repeat=2):
        for text, probability in words(TARGET, tokens, 3):
            estimate = ESTIMATES[name](*scores(DEEPER, rule, text, 2))[0, 0]
            mean[state(tokens)] += probability * estimate
            square[state(tokens)] += probability * estimate**2
    moments = exact.estimators(TARGET, DEEPER, 3, rule)[name]
    np.testing.assert_allclose(moments.mean, mean, rtol=1e-13)
    np.testing.assert_allclose(moments.square, square, rtol=1e-13)
    over = start @ mean, start @ square - (start @ mean) ** 2
    np.testing.assert_allclose(moments.over(start), over, rtol=1e-12)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("draft_len", [1, 2, 8])
def test_unbiased_and_ratio_have_the_true_mean(draft_len, rule):
    true = exact.lengths(exact.round_law(TARGET, DEEPER, draft_len, rule))
    found = exact.estimators(TARGET, DEEPER, draft_len, rule)
    np.testing.assert_allclose(found["unbiased"].mean, true, rtol=1e-13)
    np.testing.assert_allclose(found["ratio"].mean, true, rtol=1e-13)


ROUNDS, DRAFT_LEN, FALSE_ALARM = 6000, 2, 1e-9


def excess(drafter: int, seed: int) -> float:
    """How far the decoder's mean length of 6000 rounds is off the exact MAT, over the interval's half-width.

    With g the potential, ``sum_t (L_t - MAT) = M_T + g(S_0) - g(S_T)`` for a martingale whose steps, given
    the state, lie in an interval no longer than r, the largest range of ``deviations`` over what is possible.
    By Hoeffding and Azuma ``P(abs(M_T) >= x) <= 2 exp(-2 x^2 / (T r^2))``. So the mean is within
    ``r sqrt(ln(2 / delta) / 2T) + range(g) / T`` of MAT but for a probability delta, here 1e-9 over all
    drafters.
    """
    target, pool = domains(2, 3, switch=0.1, sharpness=1.0, rng=3)
    law = exact.round_law(target, pool[drafter], DRAFT_LEN)
    possible, steps = law > 0, exact.deviations(law)
    ranges = np.max(steps, (1, 2), initial=-9, where=possible) - np.min(
        steps, (1, 2), initial=9, where=possible
    )
    delta = FALSE_ALARM / len(pool)
    half = ranges.max() * sqrt(log(2 / delta) / (2 * ROUNDS)) + np.ptp(exact.potential(law)) / ROUNDS
    rounds = nab.decode(target, pool, nab.Constant(np.eye(3)[drafter]), [0], draft_len=DRAFT_LEN, rng=seed)
    mean = np.mean([len(r.emitted) for r in islice(rounds, ROUNDS)])
    return abs(mean - exact.mean_acceptance_length(law)) / half


@pytest.mark.parametrize("drafter", range(3))
def test_every_fixed_drafters_decoded_mat_is_its_exact_one(drafter):
    assert excess(drafter, seed=drafter) < 1


def test_that_interval_rejects_a_decoder_that_accepts_too_often(monkeypatch):
    def lenient(p, draft, uniforms):
        return sampling.verify(p, draft, [*(u / 2 for u in uniforms[:-1]), uniforms[-1]])

    monkeypatch.setitem(nab.decode.__globals__, "verify", lenient)
    assert excess(1, seed=1) > 1


def test_domains_are_what_they_say():
    target, pool = domains(3, 4, switch=0.3, rng=1)
    by_domain = target.table.reshape(3, 4, 3, 4)
    moves = by_domain.sum(-1)
    np.testing.assert_allclose(moves[np.arange(3), :, np.arange(3)], 0.7)
    np.testing.assert_allclose(moves.sum(-1), 1)
    for domain, expert in enumerate(pool[:3]):
        own = expert.table.reshape(3, 4, 3, 4)
        np.testing.assert_array_equal(own[domain, :, domain], by_domain[domain, :, domain])
        np.testing.assert_allclose(own[0, :, 1] / 0.15, by_domain[domain, :, domain] / 0.7)
    generalist = pool[3].table.reshape(3, 4, 3, 4)
    squared = (generalist[0, :, 0] / 0.7) ** 2  # half of the sharpness: the square root, normalised
    np.testing.assert_allclose(squared / squared.sum(-1, keepdims=True), by_domain[0, :, 0] / 0.7)
    same, (*_, whole) = domains(3, 4, switch=0.3, blur=1, rng=1)
    np.testing.assert_array_equal(whole.table, target.table)
    np.testing.assert_array_equal(same.table, target.table)
    assert len(domains(1, 2, switch=0.0)[1]) == 2


def test_a_censored_learner_updates_once_a_round_with_what_the_round_emitted():
    class Records(nab.NormalHedge):
        def update(self, state, losses, played=None):
            seen.append(losses)
            return super().update(state, losses, played)

    seen = []
    gamma, realised = np.random.default_rng(0).random((2, 5, 3))
    selector = Censored(nab.Selector(Records(), 3, rng=0), draft_len=4)
    for emitted in (2, 5):
        given = selector.observe(emitted, lambda rows=emitted: (gamma[:rows], realised[:rows]))
        assert given[0].shape == (emitted, 3)
    lengths = [
        1 + gamma[0] + realised[0] * gamma[1],
        expected_length(gamma[:4], realised[:4], 4)[0],
    ]
    np.testing.assert_allclose(seen, [nab.losses.length_loss(length, 4) for length in lengths], rtol=1e-14)
    assert selector.probs.shape == (3,)
    assert selector.choice in range(3)


ERRORS = {
    "draft_len must be a whole number, at least 1, got 0": lambda: exact.round_law(P, Q, 0),
    "order must be a whole number, at least 2, got 1": lambda: exact.lifted(TARGET, 1),
    "the drafter must have the target's 2 tokens, got 3": lambda: exact.round_law(P, SAMPLED, 1),
    "rows of the target must all sum to 1, got 0 in state 1": lambda: exact.round_law(LOOKUP, SAMPLED, 1),
    "several stationary laws": lambda: exact.stationary(np.eye(2)),
    "tokens must be a whole number, at least 0, got -1": lambda: exact.mean_rounds(np.ones((1, 1, 1)), -1),
    r"switch must lie in \[0, 0\] for 1 domains, got 0.5": lambda: domains(1, 3, switch=0.5),
    "letters must be a whole number, at least 2, got 1": lambda: domains(1, 1),
    "blur must lie in": lambda: domains(2, 3, blur=0.0),
    "sharpness must lie in": lambda: domains(2, 3, sharpness=0.0),
}


@pytest.mark.parametrize("message", ERRORS)
def test_bad_arguments_are_named(message):
    with pytest.raises(ValueError, match=message):
        ERRORS[message]()
