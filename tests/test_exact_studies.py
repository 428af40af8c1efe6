"""What the studies of exact models show, where it is exact; and that each gives a table and a figure."""

from itertools import product

import numpy as np
import pytest

from nab.acceptance import Chain
from nab.losses import expected_length
from nab.sim import exact
from nab.sim.studies import censoring, estimators
from nab.sim.studies import exact as decoding

DEEP = censoring.BEST


def seen_lengths(chosen: int) -> np.ndarray:
    """Mean of the censored lengths of all drafters, over rounds of ``chosen`` alone, by enumeration."""
    draft_len, target, pool = censoring.DRAFT_LEN, censoring.TARGET, censoring.POOL
    start = exact.stationary(exact.round_law(target, pool[chosen], draft_len).sum(1))
    total = np.zeros(len(pool))
    for first, *word in product(range(2), repeat=draft_len + 1):
        p = target.score([first, *word[:-1]], 1)
        probability = start[first] * np.prod(p[np.arange(draft_len), word])
        if probability == 0:
            continue
        laws = [q.score([first, *word[:-1]], 1) for q in pool]
        gamma = np.stack([Chain().probability(p, q) for q in laws], axis=1)
        realised = np.stack([Chain().realised(p, q, np.array(word)) for q in laws], axis=1)
        reached = np.append(1, np.cumprod(realised[:, chosen]))  # P(so many tokens are accepted, or more)
        for seen in range(1, draft_len + 1):
            ends = reached[seen - 1] - (reached[seen] if seen < draft_len else 0)
            total += probability * ends * expected_length(gamma[:seen], realised[:seen], seen)[0]
    return total


def test_the_deep_drafter_is_better_from_everywhere():
    laws = [exact.round_law(censoring.TARGET, q, censoring.DRAFT_LEN) for q in censoring.POOL]
    deep = exact.lengths(laws[DEEP])
    assert all((exact.lengths(law) < deep).all() for law in laws[:DEEP])


def test_a_drafter_that_stops_early_makes_itself_look_the_best():
    """Its own censored length is its true one; that of the deep drafter is cut by more than its lead."""
    seen = seen_lengths(0)
    law = exact.round_law(censoring.TARGET, censoring.POOL[0], censoring.DRAFT_LEN)
    assert seen[0] == pytest.approx(exact.mean_acceptance_length(law), abs=1e-12)
    assert seen.argmax() == 0
    assert seen[0] > seen[DEEP] + 0.4


def test_censoring_does_not_hide_the_deep_drafter_while_it_drafts():
    assert seen_lengths(DEEP).argmax() == DEEP


def test_the_choice_by_exact_means_of_the_unbiased_estimate_is_the_best():
    table = estimators.choices(estimators.measure(scale=0.02))
    assert not table.loc[table["estimator"] != "plug-in", "wrong"].any()
    assert (table["cost"] >= 0).all()


def test_the_longest_rounds_from_a_random_position_are_not_always_the_largest_mat():
    """So no estimate of them, unbiased or not, always finds the best drafter."""
    table = estimators.choices(estimators.measure(scale=0.1), "mat")
    assert table.loc[table["estimator"] == "unbiased", "wrong"].any()


@pytest.mark.parametrize("study", [censoring, decoding, estimators])
def test_every_study_gives_a_table_and_a_figure(study):
    table = study.measure(scale=0.01, seed=1)
    assert len(table) == len(table.drop_duplicates())
    drawing = study.figure(table)
    drawing.canvas.draw()
    assert all(axes.get_title() for axes in drawing.axes)
