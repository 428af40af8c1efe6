"""A text told by tokens alone is decoded and learned from as by ``nab.decode``; texts are told apart."""

import warnings
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_drafters import naive_lookup

import nab
from nab.backends import texts
from nab.backends.drafters import Lookup, NGram
from nab.backends.texts import Text, Texts
from nab.learners.bandits import UCB1
from nab.measure import Query, metrics

VOCAB = 4
POOL = [Lookup(VOCAB, 1), Lookup(VOCAB, 3), Lookup(VOCAB, 4, 2, vote=True)]
PROMPT = [0, 1, 2, 0, 1]


class Answering:
    """A target that is certain of its next token, in turns of sense and nonsense."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        motifs = [rng.integers(0, VOCAB, 5).tolist() for _ in range(3)]
        self.answer = [t for _ in range(30) for t in motifs[rng.integers(3)] + [int(rng.integers(VOCAB))]]

    def score(self, tokens, start):
        after = [self.answer[end - len(PROMPT)] for end in range(start, len(tokens) + 1)]
        return np.eye(VOCAB)[after]


SELECTORS = {
    "token": lambda: nab.Selector(nab.NormalHedge(), 3, rng=7),
    "length": lambda: nab.Selector(nab.Hedge(), 3, objective=nab.Length(4), rng=7),
    "lazy": lambda: nab.Lazy(nab.Selector(nab.NormalHedge(), 3, rng=7), every=3),
    "spans": lambda: nab.Lazy(nab.Selector(nab.NormalHedge(), 3, rng=7), every=4, span=5),
    "bandit": lambda: nab.BanditSelector(UCB1(), 3, draft_len=4, rng=7),
    "uniform": lambda: nab.Constant([1 / 3] * 3, rng=7),
}


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("seed", range(4))
def test_rounds_are_those_of_decode_where_the_target_is_certain(name, seed):
    """Choice, law, draft, acceptance and scores: all that the engine does not say is in the tokens."""
    decoded = nab.decode(Answering(seed), POOL, SELECTORS[name](), PROMPT, draft_len=4, rng=0)
    kept = []
    text = Text(PROMPT, POOL, SELECTORS[name](), 4, watch=kept.append)
    for right in islice(decoded, 40):
        draft = text.draft()
        assert len(draft) == right.drafted
        text.extend(right.emitted)
        found = kept[-1]
        for field in ("start", "choice", "drafted", "accepted", "emitted"):
            assert getattr(found, field) == getattr(right, field), field
        np.testing.assert_array_equal(found.probs, right.probs)
        for ours, theirs in ((found.gamma, right.gamma), (found.realised, right.realised)):
            assert (ours is None) == (theirs is None)
            if theirs is not None:
                np.testing.assert_array_equal(ours, theirs)
    assert any(round_.accepted for round_ in kept)
    assert any(round_.accepted < round_.drafted for round_ in kept)


def test_watched_rounds_are_measured_as_those_of_decode():
    ours, right = Query(["a", "b", "c"], 4), Query(["a", "b", "c"], 4)
    text = Text(PROMPT, POOL, SELECTORS["token"](), 4, watch=ours.take)
    for round_ in islice(
        nab.decode(Answering(1), POOL, SELECTORS["token"](), PROMPT, draft_len=4, rng=0), 40
    ):
        text.draft()
        text.extend(right.take(round_).emitted)
    found, expected = metrics([ours]), metrics([right])
    timed = {"tokens_per_second", "selection_share"}
    assert {k: v for k, v in found.items() if k not in timed} == {
        k: v for k, v in expected.items() if k not in timed
    }
    assert 0 < found["selection_share"] < 1


@given(st.lists(st.floats(0.01, 1), min_size=VOCAB, max_size=VOCAB), st.integers(0, VOCAB))
def test_a_hit_has_the_mean_gamma_whatever_the_targets_law(masses, proposal):
    """Summed over the tokens that may come; ``proposal`` beyond the vocabulary is none."""
    p, q = np.array(masses) / sum(masses), np.append(np.eye(VOCAB), [[0] * VOCAB], 0)[proposal]
    hit = [float(token == proposal) for token in range(VOCAB)]
    assert p @ hit == pytest.approx(float(nab.Chain().probability(p, q)), abs=1e-15)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=30), st.data())
def test_hits_are_those_of_a_naive_search(tokens, data):
    start = data.draw(st.integers(0, len(tokens) - 1))
    pool = nab.Pool([Lookup(max_ngram=3), Lookup(max_ngram=2, min_ngram=2)])
    gamma, realised = texts._Hits(pool, np.array(tokens), start)()
    right = [
        [naive_lookup(tokens[:t], *ngram) == tokens[t] for ngram in ((3, 1), (2, 2))]
        for t in range(start, len(tokens))
    ]
    np.testing.assert_array_equal(gamma, np.array(right, float))
    np.testing.assert_array_equal(realised, gamma)


def text_of(*drafters, draft_len=3):
    n = len(drafters)
    return Text([0, 1, 0], list(drafters), nab.Selector(nab.Hedge(), n, rng=0), draft_len)


def test_a_selector_may_ask_for_less_and_the_engine_have_room_for_less():
    text = text_of(Lookup())
    assert text.draft() == [1, 0, 1]
    assert text.draft(most=2) == [1, 0]
    assert text.draft(most=0) == text.draft(most=-3) == []
    timed = Text([0, 1, 0], [Lookup()], nab.Selector(nab.Hedge(), 1, objective=nab.Time(3), rng=1), 3)
    for token in (1, 0, 1, 0, 1):
        assert len(timed.draft()) == timed.selector.draft_len
        timed.extend([token])


def test_only_a_draft_and_one_token_more_can_have_been_emitted():
    text = text_of(Lookup())
    with pytest.raises(ValueError, match=r"part of the draft \[\] and one token more, got \[1, 0\]"):
        text.extend([1, 0])
    assert text.draft() == [1, 0, 1]
    for wrong in ([], [2, 2], [1, 0, 1, 0, 1]):
        assert not text.continues([0, 1, 0, *wrong])
        with pytest.raises(ValueError, match=r"emitted must be the accepted part of the draft \[1, 0, 1\]"):
            text.extend(wrong)
    assert text.continues([0, 1, 0, 1, 0, 1, 2])
    assert not text.continues([1, 1, 0, 1, 0, 1, 2])
    assert not text.continues([0, 1])
    text.extend(np.array([1, 2], dtype=np.int32))
    assert text.tokens.tolist() == [0, 1, 0, 1, 2]


class Says:
    """A drafter that says what it is told to."""

    def __init__(self, tokens):
        self.tokens = tokens

    def chain(self, tokens, levels):
        if isinstance(self.tokens, Exception):
            raise self.tokens
        return self.tokens[:levels]


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (RuntimeError("out of order"), "RuntimeError: out of order"),
        ([-1], "ValueError: a drafted token must be a whole number, at least 0, got -1"),
        ([0.5], "got 0.5"),
        (["a"], "got 'a'"),
    ],
)
def test_a_drafter_that_fails_is_benched_and_the_text_goes_on(said, why):
    text = text_of(Says(said), Lookup())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        text.extend([1])
    for token in (0, 1, 0, 2):
        draft = text.draft()
        assert text.selector.choice == 1 or draft == []
        text.extend([token])
    assert why in str(told[0].message)
    assert text.selector.probs[0] < text.selector.probs[1]


def test_longer_drafts_are_cut_and_numpy_tokens_become_plain():
    text = text_of(Says(np.array([2, 2, 2, 2, 2])))
    assert text.draft() == [2, 2, 2]
    assert {type(token) for token in text.draft()} == {int}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: text_of(Lookup(), draft_len=0), "draft_len must be a whole number, at least 1, got 0"),
        (
            lambda: Text([0], [Lookup()], nab.Constant([0.5, 0.5]), 2),
            "the selector chooses among 2 drafters, there are 1",
        ),
        (lambda: Text([0.5], [Lookup()], nab.Constant([1.0]), 2), "tokens must be a row of whole numbers"),
        (lambda: Text([[0]], [Lookup()], nab.Constant([1.0]), 2), r"got int64 of shape \(1, 1\)"),
        (lambda: Texts(2, drafters={}), "drafters must be one at least, got none"),
        (lambda: Texts(2, most=0), "most must be a whole number, at least 1, got 0"),
        (lambda: Texts(2, seed=-1), "seed must be a whole number, at least 0, got -1"),
        (
            lambda: Texts(2, selector=lambda seed: nab.Constant([1.0], rng=seed)),
            "the selector chooses among 1 drafters, there are 3",
        ),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- many texts ---


def grown(text, kept, emitted):
    """``text`` as ``kept`` finds it once it has emitted."""
    found = kept.take([*text.tokens, *emitted], len(emitted))
    found.draft()
    kept.put(found)
    return found


def test_a_text_is_found_again_by_its_tokens_and_another_one_is_not():
    kept = Texts(2, most=10)
    text = kept.take([0, 1, 0], 1)
    text.draft()
    kept.put(text)
    assert grown(text, kept, [1, 2]) is text
    assert kept.take([0, 1, 0, 1, 2, 2, 2], 2) is not text  # more than a draft of it can bring
    other = kept.take([0, 1, 0, 1, 1], 1)  # the prompt is the same, the answer is not
    assert other is not text
    assert grown(text, kept, [1]) is text
    assert len(kept) == 1


def test_texts_alike_are_told_apart_by_taking_them():
    kept = Texts(2, most=10)
    twins = [kept.take([0, 1], 1) for _ in range(3)]
    assert len({id(text) for text in twins}) == 3
    for text in twins:
        text.draft()
        kept.put(text)
    again = [kept.take([0, 1, token], 1) for token in (5, 5, 6)]
    assert {id(text) for text in again} == {id(text) for text in twins}
    assert len(kept) == 0


def test_those_longest_untouched_go_first():
    kept = Texts(2, most=2)
    first, second = (kept.take([token], 1) for token in (1, 2))
    kept.put(first)
    kept.put(second)
    assert grown(first, kept, [3]) is first
    kept.put(kept.take([3], 1))
    assert len(kept) == 2
    assert kept.take([2, 5], 1) is not second
    assert kept.take([1, 3, 5], 1) is first


def test_what_is_drawn_depends_on_seed_and_prompt_alone():
    def choices(seed, before):
        kept = Texts(2, seed=seed, most=100)
        for token in range(before):
            kept.put(kept.take([token, 9], 1))
        text, found = kept.take([7, 8, 7], 1), []
        for token in np.random.default_rng(0).integers(0, 9, 30).tolist():
            found.append(text.selector.choice)
            text.draft()
            text.extend([token])
        return found

    assert choices(0, 0) == choices(0, 20) != choices(1, 0)


# --- n-grams without laws ---


@given(st.integers(0, 2**32), st.integers(2, 4), st.lists(st.integers(0, 5), min_size=1, max_size=8))
def test_an_ngram_drafts_the_mode_of_its_law_where_it_knows_the_context(seed, order, tokens):
    rng = np.random.default_rng(seed)
    model = NGram.fit([rng.integers(0, 5, size) for size in (40, 3, 30)], 6, order=order)
    known = {tokens[-1]} & {key for keys in model.keys[:1] for key in keys.tolist()}
    found = model.chain(tokens, 3)
    if not known:
        assert found == []
    for k, token in enumerate(found):
        law = model.score([*tokens, *found[:k]], len(tokens) + k)[0]
        assert token == law.argmax()
    assert len(found) == 3 or not known or found[-1:] != tokens[-1:]
