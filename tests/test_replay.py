"""A replay has the law of the decoder given the text, by exact enumeration; a broken twin has not."""

from functools import cache

import numpy as np
import pytest
from enumeration import outcomes
from test_decode import POOL, SELECTORS, TARGET

import nab
from nab import measure
from nab.decode import Evaluation
from nab.learners.bandits import EXP3
from nab.sim import replay

LENGTH, DRAFT_LEN = 3, 2


@cache
def decoded_laws(make_selector):
    """The law of what a round chose and emitted, per text: ``{text: {rounds: probability}}``."""
    laws = {}

    def run(rng):
        rounds = nab.decode(TARGET, POOL, make_selector(rng), [0], draft_len=DRAFT_LEN, rng=rng)
        rounds = list(nab.until(rounds, max_new_tokens=LENGTH))
        text = tuple(t for r in rounds for t in r.emitted)
        return text, tuple((r.choice, len(r.emitted)) for r in rounds)

    for (text, rounds), probability in outcomes(run):
        law = laws.setdefault(text, {})
        law[rounds] = law.get(rounds, 0) + probability
    return laws


def replayed_law(make_selector, text, power=1):
    p = TARGET.score([0, *text[:-1]], 1)
    gamma, realised = Evaluation(nab.Pool(POOL), nab.Levels([nab.Chain()]), (0, *text), 1, (p,))()
    law = {}

    def run(rng):
        rounds = replay(make_selector(rng), gamma, realised**power, draft_len=DRAFT_LEN, rng=rng)
        return tuple((r.choice, r.emitted) for r in rounds)

    for rounds, probability in outcomes(run):
        law[rounds] = law.get(rounds, 0) + probability
    return law


def distance(make_selector, power=1, other=None):
    """Largest difference of probabilities, over texts and what may have happened on them."""
    worst = 0.0
    for text, law in decoded_laws(make_selector).items():
        found = replayed_law(other or make_selector, text, power)
        mass = sum(law.values())
        worst = max(worst, *(abs(law.get(k, 0) / mass - found.get(k, 0)) for k in law | found))
    return worst


@pytest.mark.parametrize("name", SELECTORS)
def test_a_replay_has_the_law_of_the_decoder_given_the_text(name):
    assert distance(SELECTORS[name]) < 1e-12


@pytest.mark.parametrize("name", ["uniform", "exp3"])
def test_the_same_test_rejects_a_replay_with_other_acceptances(name):
    assert distance(SELECTORS[name], power=2) > 1e-3


def test_the_same_test_rejects_a_replay_whose_bandit_is_told_other_lengths():
    class Misled(nab.BanditSelector):
        def observe(self, emitted, evaluate, **spent):
            super().observe(self.draft_len + 2 - emitted, evaluate, **spent)

    def replayed(rng):
        return Misled(EXP3(rate=2.0), 2, draft_len=DRAFT_LEN, rng=rng)

    assert distance(SELECTORS["exp3"], other=replayed) > 1e-3


@pytest.mark.parametrize("name", SELECTORS)
def test_the_expected_tokens_of_a_replays_rounds_add_up_to_the_text_in_the_mean(name, monkeypatch):
    """By enumeration of one replay; what ``Query.replayed`` sums is then a martingale with the right mean."""
    monkeypatch.setattr(measure, "REPLAYS", 1)
    query = measure.Query(["a", "b"], DRAFT_LEN)
    list(query.run(TARGET, POOL, nab.Constant([0.5, 0.5]), [0], max_new_tokens=LENGTH, rng=3))

    class Spawns:
        def __init__(self, rng):
            self.rng = rng

        def spawn(self, count):
            return [self.rng] * count

    found = [(r, p) for r, p in outcomes(lambda rng: query.replayed(SELECTORS[name], Spawns(rng)))]
    assert sum(p * tokens for (tokens, _), p in found) == pytest.approx(LENGTH, abs=1e-12)


def test_a_replay_hands_on_the_law_of_each_choice_and_every_position_once():
    rng = np.random.default_rng(0)
    gamma, realised = rng.random((2, 50, 3))
    seen = []

    class Watched(nab.Selector):
        def observe(self, emitted, evaluate, **spent):
            seen.append(evaluate()[0])
            assert len(seen[-1]) == emitted
            return super().observe(emitted, evaluate, **spent)

    selector = Watched(nab.NormalHedge(), 3, rng=1)
    rounds = list(replay(selector, gamma, realised, draft_len=4, rng=2))
    np.testing.assert_array_equal(np.concatenate(seen), gamma)
    assert [r.start for r in rounds] == np.cumsum([0, *(r.emitted for r in rounds[:-1])]).tolist()
    assert all(r.probs[r.choice] > 0 for r in rounds)


def test_a_bad_draft_length_is_named():
    with pytest.raises(ValueError, match="draft_len must be a whole number, at least 1, got 0"):
        next(replay(nab.Constant([1.0]), np.ones((1, 1)), np.ones((1, 1)), draft_len=0))
