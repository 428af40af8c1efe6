"""Every position is scored once, whoever asks and whenever; interrupted answers are measured too."""

import json

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


@pytest.mark.parametrize("name", ["asks every round", "never asks"])
def test_counts_are_those_of_the_rounds_one_by_one(name):
    query = Query(["a", "b"], draft_len=3)
    rounds = list(query.run(TARGET, POOL, SELECTORS[name](), [0], max_new_tokens=200, rng=3))
    found = metrics([query])
    assert found["num_spec_tokens"] == 3
    assert found["num_drafts"] == len([r for r in rounds if r.drafted])
    if name == "never asks":  # and so stays with the drafter that has nothing to say now and then
        assert 0 < found["num_drafts"] < found["num_spec_steps"]
    assert found["num_draft_tokens"] == sum(r.drafted for r in rounds)
    assert found["num_accepted_draft_tokens"] == sum(r.accepted for r in rounds)
    assert found["num_accepted_tokens_per_pos"] == [
        len([r for r in rounds if r.accepted > k]) for k in range(3)
    ]
    by_length = found["acceptance_histogram_by_draft_length"]
    assert by_length == {
        str(k): [len([r for r in rounds if (r.drafted, r.accepted) == (k, j)]) for j in range(k + 1)]
        for k in sorted({r.drafted for r in rounds})
    }
    for i, drafter in enumerate(["a", "b"]):
        own = [r for r in rounds if r.choice == i]
        assert found["drafters"][drafter] == {
            "num_drafts": len([r for r in own if r.drafted]),
            "num_draft_tokens": sum(r.drafted for r in own),
            "num_accepted_draft_tokens": sum(r.accepted for r in own),
        }


@pytest.mark.parametrize("draft_len", [0, 3])
def test_counts_agree_with_each_other_and_are_plain_json(draft_len):
    query = Query(["a", "b"], draft_len)
    list(query.run(TARGET, POOL, nab.Constant([0.5, 0.5], rng=1), [0], max_new_tokens=200, rng=3))
    found = metrics([query, query])
    assert json.loads(json.dumps(found)) == found
    histogram, accepted = found["acceptance_histogram"], found["num_accepted_draft_tokens"]
    assert sum(histogram) == found["num_spec_steps"]
    assert sum(k * rounds for k, rounds in enumerate(histogram)) == accepted
    assert sum(found["num_accepted_tokens_per_pos"]) == accepted
    assert found["num_accepted_tokens_per_pos"] == [sum(histogram[k + 1 :]) for k in range(draft_len)]
    columns = zip(
        *(row + [0] * 3 for row in found["acceptance_histogram_by_draft_length"].values()), strict=False
    )
    assert [sum(column) for column in columns][: draft_len + 1] == histogram
    if draft_len:
        assert found["draft_acceptance_rate"] == accepted / found["num_draft_tokens"]
    # a round that the end of an answer cuts emits no next token
    whole = found["num_spec_steps"] + accepted
    assert whole - 2 <= found["num_tokens"] <= whole


def test_plain_decoding_has_length_one_and_no_regret():
    query = Query(["a", "b"], draft_len=0)
    list(query.run(TARGET, POOL, nab.Constant([0.5, 0.5]), [0], max_new_tokens=20, rng=0))
    found = metrics([query])
    assert found["mean_acceptance_length"] == 1
    assert found["draft_acceptance_rate"] is None
    assert found["regret"] == found["choice_share"] == found["draft_share"] == {}


def test_queries_that_do_not_go_together_are_named():
    with pytest.raises(ValueError, match="metrics need a query at least, got none"):
        metrics([])
    for other in (Query(["b"], 4), Query(["a"], 3)):
        with pytest.raises(ValueError, match="queries with the same drafters and draft length, got"):
            metrics([Query(["a"], 4), other])
