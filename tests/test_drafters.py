"""Prompt lookup against a naive search; n-gram laws by dictionaries; the shipped models."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from nab.backends import pool
from nab.backends.drafters import Lookup, NGram

small_tokens = st.lists(st.integers(0, 3), min_size=1, max_size=40)


def naive_lookup(tokens, longest, shortest):
    for size in range(longest, shortest - 1, -1):
        for end in range(len(tokens) - 1, size - 1, -1):
            if len(tokens) > size and tokens[end - size : end] == tokens[-size:]:
                return tokens[end]
    return None


@given(small_tokens, st.integers(1, 3), st.integers(0, 3), st.data())
def test_lookup_proposes_what_followed_the_last_occurrence(tokens, shortest, more, data):
    lookup = Lookup(4, shortest + more, shortest)
    start = data.draw(st.integers(1, len(tokens)))
    laws = lookup.score(tokens, start)
    assert laws.shape == (len(tokens) - start + 1, 4)
    for row, end in enumerate(range(start, len(tokens) + 1)):
        proposal = naive_lookup(tokens[:end], shortest + more, shortest)
        expected = np.zeros(4) if proposal is None else np.eye(4)[proposal]
        np.testing.assert_array_equal(laws[row], expected)


@given(small_tokens, st.integers(1, 3), st.integers(0, 3))
def test_a_vote_is_won_by_the_commonest_follower_the_latest_of_equals(tokens, shortest, more):
    lookup = Lookup(4, shortest + more, shortest, vote=True)
    for end in range(1, len(tokens) + 1):
        text, expected = tokens[:end], None
        for size in range(shortest + more, shortest - 1, -1):
            ends = [e for e in range(size, end) if text[e - size : e] == text[end - size :]]
            if ends:
                votes = Counter(text[e] for e in ends)
                last = {text[e]: e for e in ends}
                expected = max(votes, key=lambda token: (votes[token], last[token]))
                break
        assert lookup.proposals(text, end) == [expected]


def test_bad_lookup_lengths_are_named():
    with pytest.raises(ValueError, match=r"1 <= min_ngram <= max_ngram, got 3 and 2"):
        Lookup(4, max_ngram=2, min_ngram=3)


def naive_law(documents, vocab, order, context):
    """p_k(x | c) = max(count - D, 0) / total for n-grams seen twice or more, the rest to p_{k-1}."""
    law = np.bincount(np.concatenate(documents), minlength=vocab) + 0.5
    law = law / law.sum()
    for k in range(2, order + 1):
        grams = Counter(tuple(d[i : i + k].tolist()) for d in documents for i in range(len(d) - k + 1))
        once, twice = (sum(c == times for c in grams.values()) for times in (1, 2))
        discount = once / max(once + 2 * twice, 1)
        suffix = tuple(context[len(context) - k + 1 :])
        if len(suffix) < k - 1:
            break
        followers = {gram[-1]: c for gram, c in grams.items() if gram[:-1] == suffix}
        kept = {x: (c - discount) / sum(followers.values()) for x, c in followers.items() if c >= 2}
        if not kept:
            break
        law = law * (1 - sum(kept.values()))
        for x, probability in kept.items():
            law[x] += probability
    return law


@given(st.integers(0, 2**32), st.integers(2, 4))
def test_ngram_laws_follow_the_formula(seed, order):
    rng = np.random.default_rng(seed)
    documents = [rng.integers(0, 4, size) for size in (60, 3, 40)]
    model = NGram.fit(documents, 4, order=order, entries_per_order=10_000)
    tokens = rng.integers(0, 4, 12).tolist()
    laws = model.score(tokens, 1)
    for row, end in enumerate(range(1, len(tokens) + 1)):
        expected = naive_law(documents, 4, order, tokens[:end])
        assert (laws[row] >= 0).all()
        np.testing.assert_allclose(laws[row], expected, atol=4 * 2**-11)  # probabilities are kept as float16
        assert laws[row].sum() == pytest.approx(1, abs=1e-6)  # float32


def test_ngrams_survive_a_file_and_keep_the_most_frequent(tmp_path):
    documents = [np.array([1, 2, 3] * 30 + [1, 0] * 5)]
    model = NGram.fit(documents, 5, order=3, entries_per_order=2)
    assert model.order == 3
    assert [len(tokens) for tokens in model.tokens] == [2, 2]
    save_file(model.arrays(), tmp_path / "m.safetensors")
    again = NGram.from_arrays(load_file(tmp_path / "m.safetensors"))
    np.testing.assert_array_equal(again.score([1, 2, 3, 1], 1), model.score([1, 2, 3, 1], 1))


@pytest.mark.parametrize("name", ["german", "json", "legal", "python"])
def test_the_shipped_models_are_laws_and_name_their_source(name):
    file = pool.NGRAMS / f"ngram-{name}.safetensors"
    assert file.stat().st_size < 1.5e6
    metadata = pool.int8.metadata(file)
    assert {"package", "version", "sha256", "licence", "vocabulary", "tokens"} <= set(metadata)
    model = pool.read_ngram(file)
    assert model.vocab_size == 49152
    laws = model.score([100, 200, 300, 17, 100, 200, 300], 1)
    assert (laws > 0).all()
    np.testing.assert_allclose(laws.sum(1), 1, atol=16 * 2**-24)  # float32, pairwise sums
