"""Hostile drafters: benched with a warning that names them; the text stays exactly the target's."""

import re
import sys
import threading
import warnings
from time import sleep

import numpy as np
import pytest
import torch
from enumeration import outcomes

import nab
from nab.decode import Evaluation
from nab.schemes import DynamicTree, Levels
from nab.sim import Markov

RNG = np.random.default_rng(20251126)
TARGET = Markov(RNG.dirichlet(np.ones(3), size=3))
GOOD = Markov(RNG.dirichlet(np.ones(3), size=3))


class Hostile:
    """Well behaved for some calls, then not."""

    name = "the expert"

    def __init__(self, does, after=0):
        self.does, self.left = does, after

    def score(self, tokens, start, parents=None):
        laws = GOOD.score(tokens, start, parents)
        self.left -= 1
        return laws if self.left >= 0 else self.does(laws)


def raises(laws):
    raise RuntimeError("out of memory")


def negative(laws):
    laws = laws * 1
    laws[..., 0] -= 2
    laws[..., 1] += 2
    return laws


HOSTILE = {
    "raises": (raises, "RuntimeError: out of memory"),
    "NaN": (lambda laws: laws * np.nan, "nan"),
    "infinite": (lambda laws: laws + np.inf, "inf"),
    "negative": (negative, "non-negative"),
    "sums to 2": (lambda laws: laws * 2, r"must sum to 1, or be all 0, but sums to (2|1\.99)"),
    "sums to .9999": (lambda laws: laws * 0.9999, "must sum to 1"),
    "exits": (lambda laws: sys.exit(3), "SystemExit: 3"),
    "a number": (lambda laws: 0.5, "Error"),
    "nothing": (lambda laws: None, "Error"),
    "no rows": (lambda laws: laws[:0], "its laws must have shape"),
    "a single law": (lambda laws: laws[0], "its laws must have shape"),
    "one axis more": (lambda laws: laws[None], "its laws must have shape"),
    "tokens outside the vocabulary": (
        lambda laws: np.full((*laws.shape[:-1], 5), 0.2),
        r"shape \(\d, 3\), got \(\d, 5\)",
    ),
    "too few tokens": (lambda laws: np.full((*laws.shape[:-1], 2), 0.5), r"shape \(\d, 3\), got \(\d, 2\)"),
}
SCHEMES = {"chain": None, "dynamic tree": DynamicTree(2, 3, 2), "drafts": Levels([nab.MultiDraft(2)] * 2)}


def decode(pool, selector, rng, tokens=3, **options):
    rounds = nab.decode(TARGET, pool, selector, [0], draft_len=2, rng=rng, **options)
    return list(nab.until(rounds, max_new_tokens=tokens))


@pytest.mark.parametrize("does", [does for does, _ in HOSTILE.values()], ids=HOSTILE)
@pytest.mark.parametrize("after", [0, 1, 3])
def test_the_text_is_exactly_the_targets_whatever_a_drafter_does(does, after):
    """By enumeration, under a learner that scores both, from any call on."""
    law = dict.fromkeys(np.ndindex(3, 3), 0.0)

    def run(rng):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", nab.DrafterWarning)
            selector = nab.Selector(nab.Hedge(rate=2.0), 2, rng=rng)
            rounds = decode([GOOD, Hostile(does, after)], selector, rng, tokens=2)
        return tuple(token for round_ in rounds for token in round_.emitted)

    for word, probability in outcomes(run):
        law[word] += probability
    for (a, b), mass in law.items():
        assert mass == pytest.approx(TARGET.table[0, a] * TARGET.table[a, b], abs=1e-12)


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
def test_a_chosen_drafter_that_fails_is_benched_by_name_and_drafts_no_more(name, scheme):
    does, reason = HOSTILE[name]
    drafter = Hostile(does, after=2)
    pool = nab.Pool([drafter])
    with pytest.warns(nab.DrafterWarning, match=r"drafter 0 \(the expert\) is benched for this query: .*"):
        rounds = decode(pool, nab.Constant([1.0]), 1, tokens=12, scheme=scheme)
    assert pool.benched.keys() == {0}
    assert re.search(reason, pool.benched[0])
    failed = next(i for i, round_ in enumerate(rounds) if round_.drafted == 0)
    assert failed <= 2
    assert all(len(r.emitted) == 1 and r.drafted == 0 for r in rounds[failed:])  # plain decoding
    assert drafter.left == -1  # never asked again


def test_its_losses_are_the_worst_and_a_learner_turns_away():
    with pytest.warns(nab.DrafterWarning, match="drafter 1"):
        rounds = decode([GOOD, Hostile(raises)], nab.Selector(nab.NormalHedge(), 2, rng=0), 0, tokens=40)
    assert all((r.gamma[:, 1] == 0).all() and (r.realised[:, 1] == 0).all() for r in rounds)
    assert (rounds[0].gamma[:, 0] > 0).all()
    assert all(r.choice == 0 for r in rounds[5:])


def test_one_warning_a_query_and_a_fresh_chance_in_the_next():
    drafter = Hostile(raises)
    for _ in range(2):
        with pytest.warns(nab.DrafterWarning) as caught:
            decode([GOOD, drafter], nab.Selector(nab.Hedge(), 2, rng=0), 0, tokens=30)
        assert len(caught) == 1


def test_acceptance_outside_its_range_benches_in_the_evaluation_too():
    pool = nab.Pool([GOOD, Hostile(lambda laws: laws - 2)])
    p = TARGET.score([0, 1], 1)
    with pytest.warns(nab.DrafterWarning, match=r"drafter 1 .*must lie in \[0, 1\]"):
        gamma, _ = Evaluation(pool, Levels([nab.Chain()]), (0, 1, 2), 1, (p,))()
    assert (gamma[:, 1] == 0).all()


def test_if_all_fail_decoding_goes_on_plainly():
    with pytest.warns(nab.DrafterWarning):
        rounds = decode([Hostile(raises), Hostile(raises)], nab.Selector(nab.Hedge(), 2, rng=0), 0, tokens=20)
    assert [len(r.emitted) for r in rounds] == [1] * 20


def test_a_drafter_that_hangs_is_left_behind():
    """It is benched in later queries for as long as it hangs; others go on in another thread."""
    release, called = threading.Event(), []

    def hangs(laws):
        called.append(1)
        release.wait()
        return laws

    drafter = Hostile(hangs, after=1)
    pool = nab.Pool([GOOD, drafter], limit=0.2)
    with pytest.warns(
        nab.DrafterWarning, match=r"drafter 1 \(the expert\) .*TimeoutError: .*not done after 0.2 s"
    ):
        rounds = decode(pool, nab.Selector(nab.Hedge(), 2, rng=0), 0, tokens=20)
    assert sum(len(r.emitted) for r in rounds) == 20
    assert len(called) == 1
    with pytest.warns(nab.DrafterWarning, match="still hangs"):
        decode(nab.Pool([GOOD, drafter], limit=0.2), nab.Selector(nab.Hedge(), 2, rng=0), 0, tokens=20)
    assert len(called) == 1
    release.set()
    for _ in range(1000):  # until its thread has noticed
        if drafter not in nab.pool._WORKER._hanging.values():
            break
        sleep(0.01)
    drafter.does = lambda laws: laws
    decode(nab.Pool([GOOD, drafter], limit=10), nab.Selector(nab.Hedge(), 2, rng=0), 0, tokens=20)


def test_a_limit_changes_nothing_for_drafters_that_keep_it():
    plain, limited = (
        decode(nab.Pool([GOOD, TARGET], limit=limit), nab.Selector(nab.Hedge(), 2, rng=0), 0, tokens=30)
        for limit in (None, 60)
    )
    assert [r.emitted for r in plain] == [r.emitted for r in limited]
    for one, other in zip(plain, limited, strict=True):
        np.testing.assert_array_equal(one.gamma, other.gamma)


def test_what_a_drafter_raises_in_its_thread_comes_through():
    def interrupts(laws):
        raise KeyboardInterrupt

    for limit in (None, 60):
        with pytest.raises(KeyboardInterrupt):
            decode(nab.Pool([Hostile(interrupts)], limit=limit), nab.Constant([1.0]), 0)


class Reuses:
    """Answers in the same memory every time."""

    def __init__(self, table):
        self.model, self.memory = Markov(table), np.empty((16, 3))

    def score(self, tokens, start, parents=None):
        laws = self.model.score(tokens, start, parents)
        self.memory[: len(laws)] = laws
        return self.memory[: len(laws)]


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
def test_a_drafter_may_reuse_its_memory(scheme):
    law = dict.fromkeys(np.ndindex(3, 3, 3), 0.0)

    def run(rng):
        return next(
            nab.decode(
                TARGET, [Reuses(GOOD.table)], nab.Constant([1.0]), [0], draft_len=2, rng=rng, scheme=scheme
            )
        ).emitted

    for emitted, probability in outcomes(run):
        for word in law:
            if word[: len(emitted)] == emitted:
                rest = zip(word[len(emitted) - 1 :], word[len(emitted) :], strict=False)
                law[word] += probability * np.prod([TARGET.table[a, b] for a, b in rest])
    for (a, b, c), mass in law.items():
        assert mass == pytest.approx(TARGET.table[0, a] * TARGET.table[a, b] * TARGET.table[b, c], abs=1e-12)


def test_laws_are_normalised_before_they_are_drawn_from_and_held_against_the_targets():
    rounded = Markov(GOOD.table)
    rounded.table[:] = GOOD.table * (1 + 2e-7)
    draft = Levels([nab.Chain()]).propose(rounded, [0], 3, [0.5])
    assert draft.q[0].sum() == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("scheme", [None, SCHEMES["drafts"]], ids=["chain", "drafts"])
def test_laws_of_another_library_than_the_targets_are_refused(scheme):
    with pytest.warns(nab.DrafterWarning, match="its laws must be arrays like the target's"):
        rounds = decode([Hostile(torch.tensor)], nab.Constant([1.0]), 0, tokens=9, scheme=scheme)
    assert [len(r.emitted) for r in rounds] == [1] * 9


def test_a_failure_that_cannot_speak_is_benched_too():
    class MuteError(Exception):
        def __str__(self):
            raise RuntimeError

    class Nameless(Hostile):
        @property
        def name(self):
            raise RuntimeError

    def mute(laws):
        raise MuteError

    with pytest.warns(nab.DrafterWarning, match="drafter 0 is benched for this query: MuteError"):
        decode([Nameless(mute)], nab.Constant([1.0]), 0)


def test_a_thread_that_was_given_up_ends():
    release = threading.Event()
    before = {t for t in threading.enumerate() if t.name == nab.pool.THREAD}
    with pytest.warns(nab.DrafterWarning, match="not done"):
        decode(nab.Pool([Hostile(lambda laws: release.wait())], limit=0.1), nab.Constant([1.0]), 0)
    given_up = {t for t in threading.enumerate() if t.name == nab.pool.THREAD} - before or before
    release.set()
    for thread in given_up:
        thread.join(30)
        assert not thread.is_alive()


@pytest.mark.parametrize("limit", [0, -1, float("nan"), float("inf"), True, "3"])
def test_a_bad_limit_is_named(limit):
    with pytest.raises(
        ValueError, match=f"limit must be a positive number of seconds or None, got {limit!r}"
    ):
        nab.Pool([GOOD], limit=limit)


def test_the_target_is_not_protected():
    with pytest.raises(RuntimeError, match="out of memory"):
        next(nab.decode(Hostile(raises), [GOOD], nab.Constant([1.0]), [0], draft_len=2))


class Chains:
    """A model that knows no trees."""

    def score(self, tokens, start):
        return GOOD.score(tokens, start)


def test_a_model_that_knows_no_trees_is_told_what_it_needs():
    message = "Chains.score takes no parents, which drafts that branch need: see nab.sampling.by_path"
    scheme = DynamicTree(2, 3, 2)
    with pytest.warns(nab.DrafterWarning, match=f"drafter 0 is benched .*{message}"):
        decode([Chains()], nab.Constant([1.0]), 0, scheme=scheme)
    with pytest.raises(TypeError, match=message):
        next(nab.decode(Chains(), [GOOD], nab.Constant([1.0]), [0], draft_len=2, scheme=scheme))
    decode([Chains()], nab.Constant([1.0]), 0)


def test_errors_of_a_tree_model_stay_its_own():
    class Wrong:
        def score(self, tokens, start, parents=None):
            return GOOD.score(tokens, start) if parents is None else len(3)

    with pytest.warns(nab.DrafterWarning, match="object of type 'int' has no len"):
        decode([Wrong()], nab.Constant([1.0]), 0, scheme=DynamicTree(2, 3, 2))
