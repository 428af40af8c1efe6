"""Selectors that learn together: each gets the laws and makes the choices that it makes alone."""

import numpy as np
import pytest
from test_learners import LEARNERS

import nab
from nab import together as learning
from nab.learners import Squint
from nab.together import observe_together


def ragged(queries, rounds, n, seed=0):
    """Scores of some queries in some rounds, of 1 to 5 positions; queries come and go."""
    rng = np.random.default_rng(seed)
    for number in range(rounds):
        live = [q for q in range(queries) if q <= number and rng.random() < 0.9]
        yield {q: rng.random((2, rng.integers(1, 6), n)) for q in live}


@pytest.fixture
def few(monkeypatch):
    """Also few learners are updated together."""
    monkeypatch.setattr(learning, "_MANY", 2)


def assert_laws_are_those_alone(learner, objective, queries=5, rounds=60, n=3):
    def fresh():
        return [nab.Selector(learner, n, objective=objective, rng=seed) for seed in range(queries)]

    alone, together = fresh(), fresh()
    for scores in ragged(queries, rounds, n):
        for q, score in scores.items():
            alone[q].observe(score.shape[1], lambda score=score: tuple(score))
        told = observe_together(
            [together[q] for q in scores],
            [score.shape[1] for score in scores.values()],
            [lambda score=score: tuple(score) for score in scores.values()],
        )
        for found, score in zip(told, scores.values(), strict=True):
            np.testing.assert_array_equal(found, score)
        for one, other in zip(alone, together, strict=True):
            assert one.choice == other.choice
            np.testing.assert_allclose(other.probs, one.probs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("learner", LEARNERS.values(), ids=LEARNERS.keys())
@pytest.mark.parametrize("objective", [nab.Token(), nab.Length(4)], ids=["token", "length"])
@pytest.mark.usefixtures("few")
def test_laws_and_choices_of_a_batch_are_those_of_selectors_alone(learner, objective):
    """Queries begin one after the other and miss rounds, so that their losses are ragged."""
    assert_laws_are_those_alone(learner, objective)


@pytest.mark.parametrize("learner", [nab.NormalHedge(), Squint()], ids=str)
@pytest.mark.usefixtures("few")
def test_that_check_sees_losses_of_another_query(learner, monkeypatch):
    honest = learning._learn

    def swapped(group):
        first = group.members[0].losses
        members = [each._replace(losses=np.resize(first, each.losses.shape)) for each in group.members]
        honest(group._replace(members=members))

    monkeypatch.setattr(learning, "_learn", swapped)
    with pytest.raises(AssertionError):
        assert_laws_are_those_alone(learner, nab.Token())


@pytest.mark.usefixtures("few")
def test_that_check_sees_a_state_put_back_in_another_place(monkeypatch):
    honest = learning._part
    monkeypatch.setattr(
        learning, "_part",
        lambda like, state, at: honest(like, state, at if isinstance(at, slice) else 0),
    )  # fmt: skip
    with pytest.raises(AssertionError):
        assert_laws_are_those_alone(nab.NormalHedge(), nab.Token())


@pytest.mark.usefixtures("few")
def test_like_learners_are_updated_together(monkeypatch):
    """As many calls as the longest query has losses."""
    calls, update = [], nab.NormalHedge.update
    monkeypatch.setattr(
        nab.NormalHedge, "update",
        lambda self, state, *rest: calls.append(np.shape(state.regret)) or update(self, state, *rest),
    )  # fmt: skip
    queries = [nab.Selector(nab.NormalHedge(), 3, rng=q) for q in range(4)]
    for counts in ([2, 1, 4, 2], [1, 1, 1, 3]):
        scores = [np.full((2, count, 3), 0.5) for count in counts]
        observe_together(queries, counts, [lambda score=score: tuple(score) for score in scores])
    assert calls == [(3, 4), (3, 3), (3,), (3,), (3, 4), (3,), (3,)]


def test_laws_of_many_queries_are_those_alone():
    assert_laws_are_those_alone(nab.NormalHedge(), nab.Token(), queries=24, rounds=40)


def test_selectors_of_other_kinds_observe_for_themselves():
    constant, wrapped = nab.Constant([0.5, 0.5], rng=0), nab.Selector(nab.NormalHedge(), 2, rng=0)
    corrected = nab.Corrected(nab.Selector(nab.NormalHedge(), 2, objective=nab.Length(2), rng=0), 2)
    gamma = np.array([[0.9, 0.2], [0.8, 0.1]])

    def refused():
        raise AssertionError("a constant choice asks for no scores")

    told = observe_together(
        [constant, wrapped, corrected], [2, 2, 2], [refused, lambda: (gamma, gamma), lambda: (gamma, gamma)]
    )
    assert told[0] is None
    assert told[1][0] is told[2][0] is gamma
    assert wrapped.probs.tolist() == corrected.probs.tolist() == [1, 0]
