"""The loop is lossless: by exact enumeration, for any selector; and its twin that is not is caught."""

from itertools import product

import numpy as np
import pytest
from enumeration import outcomes

import nab
from nab import sampling
from nab.decode import Evaluation
from nab.learners.bandits import EXP3, UCBSpec
from nab.sim import Markov

RNG = np.random.default_rng(20251020)
TARGET = Markov(RNG.dirichlet(np.ones(3), size=3))
SAMPLED = Markov(RNG.dirichlet(np.ones(3), size=3))
LOOKUP = Markov(np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))  # nothing to propose after 1
POOL = [SAMPLED, LOOKUP]
CHAIN = nab.Levels([nab.Chain()])


def true_law(length: int) -> dict[tuple[int, ...], float]:
    return {
        word: float(np.prod([TARGET.table[a, b] for a, b in zip((0, *word), word, strict=False)]))
        for word in product(range(3), repeat=length)
    }


def first_tokens(selector: nab.Selector | nab.Constant, rng, *, length: int, draft_len: int):
    rounds = nab.decode(TARGET, POOL, selector, [0], draft_len=draft_len, rng=rng)
    return tuple(t for r in nab.until(rounds, max_new_tokens=length) for t in r.emitted)


def enumerated_law(make_selector, length: int, draft_len: int) -> dict[tuple[int, ...], float]:
    law = dict.fromkeys(true_law(length), 0.0)
    for word, probability in outcomes(
        lambda rng: first_tokens(make_selector(rng), rng, length=length, draft_len=draft_len)
    ):
        law[word] += probability
    return law


def distance(law, other) -> float:
    return max(abs(law[word] - other[word]) for word in law)


SELECTORS = {
    "normal-hedge": lambda rng: nab.Selector(nab.NormalHedge(), 2, rng=rng),
    "hedge, delayed": lambda rng: nab.Selector(nab.Hedge(rate=2.0), 2, objective=nab.Length(2), rng=rng),
    "argmax": lambda rng: nab.Selector(nab.Hedge(rate=2.0), 2, pick=nab.selector.argmax, rng=rng),
    "exp3": lambda rng: nab.BanditSelector(EXP3(rate=2.0), 2, draft_len=2, rng=rng),
    "ucb-spec": lambda rng: nab.BanditSelector(UCBSpec(2), 2, draft_len=2, rng=rng),
    "uniform": lambda rng: nab.Constant([0.5, 0.5], rng=rng),
    "lazy": lambda rng: nab.Lazy(nab.Selector(nab.Hedge(rate=2.0), 2, rng=rng), every=2),
}


@pytest.mark.parametrize("name", SELECTORS)
def test_emitted_tokens_have_exactly_the_targets_law(name):
    assert distance(enumerated_law(SELECTORS[name], length=3, draft_len=2), true_law(3)) < 1e-12


@pytest.mark.parametrize(("draft_len", "length"), [(0, 3), (1, 3), (3, 2)])
def test_the_law_holds_for_every_draft_length(draft_len, length):
    law = enumerated_law(SELECTORS["normal-hedge"], length, draft_len)
    assert distance(law, true_law(length)) < 1e-12


BROKEN = {
    "recovered token from p": ("residual", lambda p, q: p),
    "recovered token from q": ("residual", lambda p, q: q),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_same_test_rejects_a_broken_verification(name, monkeypatch):
    function, broken = BROKEN[name]
    monkeypatch.setattr(sampling, function, broken)
    assert distance(enumerated_law(SELECTORS["uniform"], length=2, draft_len=2), true_law(2)) > 1e-3


@pytest.mark.parametrize("drafter", [0, 1])
def test_expected_rounds_are_those_of_the_drafter_alone_text_by_text(drafter):
    length, draft_len = 3, 2
    selector = nab.Constant(np.eye(2)[drafter])
    rounds_of, probability_of = dict.fromkeys(true_law(length), 0.0), dict.fromkeys(true_law(length), 0.0)

    def run(rng):
        rounds = nab.decode(TARGET, POOL, selector, [0], draft_len=draft_len, rng=rng)
        rounds = list(nab.until(rounds, max_new_tokens=length))
        return tuple(t for r in rounds for t in r.emitted), len(rounds)

    for (word, count), probability in outcomes(run):
        rounds_of[word] += probability * count
        probability_of[word] += probability
    for word, probability in probability_of.items():
        p = TARGET.score([0, *word[:-1]], 1)
        _, realised = Evaluation(nab.Pool(POOL), CHAIN, (0, *word), 1, (p,))()
        expected = nab.losses.expected_rounds(realised, draft_len)[drafter]
        assert rounds_of[word] / probability == pytest.approx(expected, abs=1e-12)


def test_evaluation_scores_verified_tokens_with_the_chain_rule():
    tokens, start = (0, 2, 1, 0, 2), 2
    p = TARGET.score(tokens[:-1], start)
    gamma, realised = Evaluation(nab.Pool(POOL), CHAIN, tokens, start, (p,))()
    for row, position in enumerate(range(start, len(tokens))):
        previous, token = tokens[position - 1], tokens[position]
        for i, drafter in enumerate(POOL):
            law_p, law_q = TARGET.table[previous], drafter.table[previous]
            assert gamma[row, i] == pytest.approx(np.minimum(law_p, law_q).sum(), abs=1e-15)
            assert realised[row, i] == min(1, law_q[token] / law_p[token])


def test_adjacent_evaluations_add_up_to_one():
    tokens = (0, 2, 1, 0, 2, 2)
    p = TARGET.score(tokens[:-1], 1)
    first = Evaluation(nab.Pool(POOL), CHAIN, tokens[:3], 1, (p[:2],))
    second = Evaluation(nab.Pool(POOL), CHAIN, tokens, 3, (p[2:],))
    joined = (first + second)()
    for parts, whole in zip(zip(first(), second(), strict=True), joined, strict=True):
        np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_rounds_account_for_every_token():
    selector = nab.Selector(nab.NormalHedge(), 2, rng=1)
    rounds = list(nab.until(nab.decode(TARGET, POOL, selector, [0], draft_len=3, rng=2), max_new_tokens=200))
    position = 1
    for round_ in rounds:
        assert round_.start == position
        assert len(round_.emitted) == len(round_.gamma) == len(round_.realised)
        assert round_.accepted <= round_.drafted <= 3
        position += len(round_.emitted)
    assert position == 201
    assert all(r.accepted + 1 == len(r.emitted) for r in rounds[:-1])


def test_a_constant_selector_never_pays_for_evaluation():
    class Counted:
        calls = 0

        def score(self, tokens, start):
            Counted.calls += 1
            return SAMPLED.score(tokens, start)

    rounds = nab.decode(TARGET, [LOOKUP, Counted()], nab.Constant([1.0, 0.0]), [0], draft_len=2, rng=0)
    assert all(r.gamma is None for r in nab.until(rounds, max_new_tokens=50))
    assert Counted.calls == 0


def test_a_fixed_drafter_drafts_as_many_tokens_as_it_is_told():
    for length in range(4):
        fixed = nab.Constant([1.0], draft_len=length)
        rounds = nab.decode(TARGET, [SAMPLED], fixed, [0], draft_len=3, rng=0)
        assert {next(rounds).drafted for _ in range(20)} == {length}
    with pytest.raises(ValueError, match="asks for a draft of 4 tokens, at most 3 are drafted"):
        next(nab.decode(TARGET, [SAMPLED], nab.Constant([1.0], draft_len=4), [0], draft_len=3, rng=0))


def test_a_bandit_learns_from_what_its_rounds_emitted_and_never_evaluates():
    selector = nab.BanditSelector(EXP3(rate=2.0), 2, draft_len=2, rng=1)
    state = selector.state
    rounds = nab.decode(TARGET, POOL, selector, [0], draft_len=2, rng=0)
    for round_, _ in zip(rounds, range(50), strict=False):
        np.testing.assert_array_equal(round_.probs, EXP3(rate=2.0).probs(state))
        assert round_.gamma is round_.realised is None
        state = EXP3(rate=2.0).update(state, round_.choice, 1 - round_.accepted / 2)


def test_until_stops_behind_a_stop_token_inside_a_round():
    rounds = nab.decode(TARGET, POOL, nab.Constant([1.0, 0.0]), [0], draft_len=4, rng=3)
    kept = list(nab.until(rounds, max_new_tokens=1000, stop_tokens=[1]))
    text = [t for r in kept for t in r.emitted]
    assert text.count(1) == 1
    assert text[-1] == 1
    assert kept[-1].accepted <= len(kept[-1].emitted)


def test_a_target_that_is_nan_is_named():
    broken = Markov(np.full((3, 3), 1 / 3))
    broken.table[:] = np.nan
    for draft_len in (0, 2):
        with pytest.raises(ValueError, match=r"target: .*nan"):
            next(nab.decode(broken, POOL, nab.Constant([0.5, 0.5]), [0], draft_len=draft_len))


def test_a_pool_of_another_size_than_the_selectors_is_named():
    with pytest.raises(ValueError, match="chooses among 3 drafters, the pool has 2"):
        next(nab.decode(TARGET, POOL, nab.Constant([0.5, 0.5, 0]), [0], draft_len=2))


@pytest.mark.parametrize(("arguments", "message"), [({"draft_len": -1}, r"draft_len.*-1")])
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        next(nab.decode(TARGET, POOL, nab.Constant([0.5, 0.5]), [0], **arguments))
    with pytest.raises(ValueError, match=r"max_new_tokens.*0"):
        next(nab.until([], max_new_tokens=0))
