"""Every position is scored once, whoever asks and whenever; interrupted answers are measured too."""

import numpy as np
import pytest
from test_decode import POOL, TARGET

import nab
from nab.decode import Evaluation
from nab.losses import expected_rounds
from nab.measure import Query, metrics


class Lazy:
    """Asks every third round, for all rounds since; or, forgetful, for that round alone."""

    choice, probs, draft_len = 0, np.array([1.0, 0.0]), None

    def __init__(self, *, forgetful):
        self.forgetful, self.rounds, self.pending = forgetful, 0, None

    def observe(self, emitted, evaluate, **spent):
        self.rounds += 1
        joined = evaluate if self.pending is None or self.forgetful else self.pending + evaluate
        self.pending = joined
        if self.rounds % 3:
            return None
        self.pending = None
        return joined()


SELECTORS = {
    "asks every round": lambda: nab.Selector(nab.NormalHedge(), 2, rng=0),
    "never asks": lambda: nab.Constant([0.5, 0.5], rng=0),
    "asks late": lambda: Lazy(forgetful=False),
    "asks sometimes": lambda: Lazy(forgetful=True),
    "lazy": lambda: nab.Lazy(nab.Selector(nab.NormalHedge(), 2, rng=0), every=5),
    "lazy for long": lambda: nab.Lazy(nab.Selector(nab.NormalHedge(), 2, rng=0), every=70, most=70),
    "leaves positions out": lambda: nab.Lazy(nab.Selector(nab.NormalHedge(), 2, rng=0), every=5, span=4),
}


@pytest.mark.parametrize("name", SELECTORS)
def test_every_position_is_scored_once_in_order(name):
    query = Query(["a", "b"], draft_len=3)
    list(query.run(TARGET, POOL, SELECTORS[name](), [0], max_new_tokens=250, rng=4))
    tokens = (0, *query.tokens)
    p = TARGET.score(tokens[:-1], 1)
    expected = Evaluation(nab.Pool(POOL), nab.Levels([nab.Chain()]), tokens, 1, (p,))()
    for found, right in zip(query.scores(), expected, strict=True):
        np.testing.assert_array_equal(found, right)


@pytest.mark.parametrize("name", ["asks every round", "never asks"])
def test_an_interrupted_answer_is_measured_as_far_as_it_goes(name):
    query = Query(["a", "b"], draft_len=3)
    rounds = query.run(TARGET, POOL, SELECTORS[name](), [0], max_new_tokens=100, rng=4)
    for _ in range(7):
        next(rounds)
    rounds.close()
    assert not query.finished
    assert len(query.scores()[0]) == len(query.tokens)
    found = metrics([query])
    singles = expected_rounds(query.scores()[1], 3)
    assert found["num_spec_steps"] == 7
    assert found["regret"]["rounds"] == pytest.approx(7 - singles.min())
    assert found["single_drafters"]["a"] == pytest.approx(len(query.tokens) / singles[0])


@pytest.mark.parametrize("name", ["asks every round", "never asks"])
@pytest.mark.parametrize("tokens", [5, 64, 65, 200])
def test_an_answer_given_together_with_others_is_measured_as_alone(name, tokens):
    alone, other = Query(["a", "b"], draft_len=3), Query(["a", "b"], draft_len=3)
    for round_ in alone.run(TARGET, POOL, SELECTORS[name](), [0], max_new_tokens=tokens, rng=4):
        other.take(round_)
    other.settle(TARGET, nab.Pool(POOL), [0])
    assert other.tokens == alone.tokens
    for found, right in zip(other.scores(), alone.scores(), strict=True):
        np.testing.assert_array_equal(found, right)
    for found, right in zip(other.unasked_scores(), alone.unasked_scores(), strict=True):
        np.testing.assert_array_equal(found, right)
    assert metrics([other]) == metrics([alone])


def test_plain_decoding_has_length_one_and_no_regret():
    query = Query(["a", "b"], draft_len=0)
    list(query.run(TARGET, POOL, nab.Constant([0.5, 0.5]), [0], max_new_tokens=20, rng=0))
    found = metrics([query])
    assert found["mean_acceptance_length"] == 1
    assert found["draft_acceptance_rate"] is None
    assert found["regret"] == found["choice_share"] == found["draft_share"] == {}
