"""Texts of unlike lengths read together: each is read as alone, in few forwards."""

from itertools import pairwise

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from nab.backends import reader as readers
from nab.backends.batch import decode_batch
from nab.backends.reader import Reader
from nab.backends.torch import CausalLM, Warper
from nab.selector import Constant

MODELS = {"llama": tiny.llama, "mistral": tiny.mistral, "qwen3": tiny.qwen3}


@given(st.lists(st.integers(1, 2000), min_size=1, max_size=40))
def test_rows_are_padded_by_no_more_than_they_miss_or_few_entries(counts):
    missing = dict(enumerate(counts))
    groups = readers._joined(missing)
    assert sorted(row for group in groups for row in group) == list(missing)
    longest = [max(missing[row] for row in group) for group in groups]
    for most, group in zip(longest, groups, strict=True):
        assert missing[group[0]] == most
        for row in group:
            assert most - missing[row] <= max(missing[row], readers._FEW)
    assert all(2 * after < before for before, after in pairwise(longest))
    assert len(groups) <= max(counts).bit_length()


def test_who_reads_with_whom():
    found = readers._joined({0: 20, 1: 900, 2: 30, 3: 450, 4: 449, 5: 3})
    assert found == [[1, 3], [4], [2, 0], [5]]
    assert readers._joined({7: 1, 3: 17, 4: 5}) == [[3, 4, 7]]


def texts(lengths, low=0):
    return [np.random.default_rng(k).integers(low, 256, length).tolist() for k, length in enumerate(lengths)]


def forwards(monkeypatch):
    """The shapes that are read from now on, ``(rows, entries)``."""
    shapes, honest = [], Reader._read

    def counted(self, places, first, end, ids):
        shapes.append(tuple(ids.shape))
        return honest(self, places, first, end, ids)

    monkeypatch.setattr(Reader, "_read", counted)
    return shapes


def assert_read_as_alone(make, lengths, steps=4, seed=0):
    """Rows are read on in steps, some by nothing, and then all their last tokens, as if alone."""
    model, known, rng = make(), texts(lengths), np.random.default_rng(seed)
    reader, alone = Reader(CausalLM(model), len(lengths)), CausalLM(model)
    for step in range(steps):
        ends = [int(rng.integers(low, len(text))) for low, text in zip(reader.lengths, known, strict=True)]
        if step == steps - 1:
            ends = [len(text) - 1 for text in known]
        with torch.inference_mode():
            reader.catch_up(range(len(known)), known, ends)
        assert reader.lengths == ends
    with torch.inference_mode():
        last = torch.tensor([text[-1:] for text in known])
        found = reader.logits(slice(0, len(known)), torch.tensor(ends), max(lengths), last)
    for row, text in zip(found, known, strict=True):
        torch.testing.assert_close(row, alone.logits(text, len(text)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("lengths", [[5, 1, 40, 300, 3, 17, 2, 90, 8], [30, 31, 45, 60, 33]])
def test_ragged_texts_are_read_as_alone(make, lengths):
    assert_read_as_alone(make, lengths)


def test_padding_may_lie_behind_the_context():
    """Rotary angles know no end, so a text near the end of its model's is padded as any other."""
    model = CausalLM(tiny.llama(max_position_embeddings=64))
    reader, known = Reader(model, 2), texts([64, 18])
    with torch.inference_mode():
        reader.catch_up([0], known, [60, 0])
        reader.catch_up([0, 1], known, [63, 17])
        last = torch.tensor([text[-1:] for text in known])
        found = reader.logits(slice(0, 2), torch.tensor([63, 17]), 64, last)
    for row, text in zip(found, known, strict=True):
        torch.testing.assert_close(row, model.logits(text, len(text)), rtol=0, atol=1e-10)


def test_padding_that_can_be_seen_is_seen(monkeypatch):
    honest = Reader._mask
    monkeypatch.setattr(Reader, "_mask", lambda self, at, *rest: honest(self, at + 1, *rest))
    with pytest.raises(AssertionError):
        assert_read_as_alone(tiny.llama, [30, 31, 45], steps=1)


def poisoned():
    """A model that is NaN behind the token that pads."""
    model = tiny.llama()
    model.model.embed_tokens.weight.data[readers._PADDING] = torch.nan
    return CausalLM(model)


def test_padding_makes_no_text_unsound():
    reader, known = Reader(poisoned(), 3), texts([30, 20, 25], low=1)
    known[2][-1] = readers._PADDING
    with torch.inference_mode():
        reader.catch_up(range(3), known, [30, 20, 25])
    assert reader.sound.tolist() == [True, True, False]


def test_prompts_of_unlike_lengths_take_few_forwards(monkeypatch):
    """Of the target: one for those that are near each other, one for the short one, one for all drafts."""
    target, prompts = CausalLM(tiny.llama(), Warper(0)), texts([301, 200, 251, 153, 21, 280])
    shapes = forwards(monkeypatch)
    rounds = decode_batch(
        target, [target], [Constant([1]) for _ in prompts], prompts, batch=6, draft_len=0, rngs=range(6),
        max_new_tokens=2,
    )  # fmt: skip
    next(rounds)
    assert shapes == [(5, 300), (1, 20), (6, 1)]
