"""Queries decoded together: each gets the text, the laws and the choices that it gets alone."""

import numpy as np
import pytest
import tiny
import torch
from test_rows import Waits

import nab
from nab.backends import rows
from nab.backends.batch import decode_batch
from nab.backends.drafters import Lookup
from nab.backends.reader import Memory, Reader
from nab.backends.torch import CausalLM, Lifted, Warper, early_exit

torch.set_num_threads(1)

# Of unlike lengths, one of a single token, one longer than the memory's first slots.
PROMPTS = [np.random.default_rng(k).integers(0, 256, length).tolist()
           for k, length in enumerate([5, 1, 40, 300, 3, 17, 2, 90, 8])]  # fmt: skip
ALL = range(len(PROMPTS))
COUNTS = {"max_new_tokens": 24}
MODELS = {"llama": tiny.llama, "mistral": tiny.mistral, "qwen3": tiny.qwen3}


def models(make=tiny.llama, warper=None):
    """A target and drafters of which none is the best for all texts."""
    model, warper = make(), warper or Warper(0)
    drafters = [CausalLM(tiny.perturbed(model, 0.03, seed), warper) for seed in (1, 2)]
    return CausalLM(model, warper), [*drafters, CausalLM(early_exit(model, 2), warper)]


def fresh(n, numbers, objective=None):
    return [nab.Selector(nab.NormalHedge(), n, objective=objective, rng=100 + k) for k in numbers]


def alone(target, drafters, numbers=ALL, *, make=fresh, draft_len=4, **ends):
    """The rounds of each query by ``nab.decode``."""
    found = {}
    for k, selector in zip(numbers, make(len(drafters), numbers), strict=True):
        loop = nab.decode(target, drafters, selector, PROMPTS[k], draft_len=draft_len, rng=k)
        found[k] = list(nab.until(loop, **{**COUNTS, **ends}))
    return found


def together(target, drafters, batch, numbers=ALL, *, make=fresh, draft_len=4, **ends):
    """The same, decoded together."""
    found = {k: [] for k in numbers}
    numbers = list(numbers)
    for rounds in decode_batch(
        target, drafters, make(len(drafters), numbers), [PROMPTS[k] for k in numbers],
        batch=batch, draft_len=draft_len, rngs=numbers, **{**COUNTS, **ends},
    ):  # fmt: skip
        for place, round_ in rounds.items():
            found[numbers[place]].append(round_)
    return found


def assert_same(found, expected, atol=1e-10):
    """Text, choices and counts are equal, scores and laws nearly."""
    assert found.keys() == expected.keys()
    for k, rounds in expected.items():
        for one, other in zip(found[k], rounds, strict=True):
            for name in ("start", "choice", "drafted", "accepted", "emitted"):
                assert getattr(one, name) == getattr(other, name), (k, name)
            np.testing.assert_allclose(one.probs, other.probs, rtol=0, atol=atol)
            for name in ("gamma", "realised"):
                if getattr(other, name) is None:
                    assert getattr(one, name) is None
                else:
                    np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=0, atol=atol)


def choices(found):
    return {round_.choice for rounds in found.values() for round_ in rounds}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("warper", [Warper(0), Warper(), Warper(0.7, top_k=20, top_p=0.9)], ids=str)
def test_each_query_is_decoded_as_alone(make, warper):
    target, drafters = models(make, warper)
    expected = alone(target, drafters)
    assert choices(expected) == {0, 1, 2}
    assert len({len(rounds) for rounds in expected.values()}) > 2
    for batch in (1, 2, 5, 8):
        assert_same(together(target, drafters, batch), expected)


def narrow(numbers):
    """Prompts that need little time."""
    return [k for k in numbers if len(PROMPTS[k]) < 50]


SHORT = narrow(ALL)


@pytest.mark.parametrize("warper", [Warper(0), Warper()], ids=str)
@pytest.mark.parametrize("draft_len", [0, 1, 6])
def test_drafts_of_any_length(warper, draft_len):
    target, drafters = models(warper=warper)
    expected = alone(target, drafters, SHORT, draft_len=draft_len)
    assert_same(together(target, drafters, 3, SHORT, draft_len=draft_len), expected)


def late(n, numbers):
    return fresh(n, numbers, nab.Length(4))


def constant(n, numbers):
    """Nobody asks for scores, so drafters read what they missed when they are chosen."""
    return [nab.Constant(np.full(n, 1 / n), rng=k) for k in numbers]


def mixed(n, numbers):
    """Some ask for scores at once, some through another selector, some never, some only now and then."""
    kinds = [
        lambda k: nab.Constant(np.eye(n)[k % n], rng=k),
        lambda k: nab.Selector(nab.NormalHedge(), n, rng=k),
        lambda k: nab.BanditSelector(nab.learners.bandits.UCB1(), n, draft_len=4, rng=k),
        lambda k: nab.Corrected(nab.Selector(nab.NormalHedge(), n, objective=nab.Length(4), rng=k), 4),
    ]
    return [kinds[k % 4](k) for k in numbers]


class Curious(nab.Constant):
    """Asks for scores in every round, which nobody can know beforehand."""

    def observe(self, emitted, evaluate, *, seconds=None):
        super().observe(emitted, evaluate)
        return evaluate()


def curious(n, numbers):
    return [Curious(np.full(n, 1 / n), rng=k) for k in numbers]


@pytest.mark.parametrize("warper", [Warper(0), Warper()], ids=str)
@pytest.mark.parametrize("make", [late, constant, mixed, curious])
def test_selectors_of_every_kind(warper, make):
    target, drafters = models(warper=warper)
    expected = alone(target, drafters, SHORT, make=make)
    assert_same(together(target, drafters, 3, SHORT, make=make), expected)


def test_a_drafter_that_is_always_right_is_read_from_where_it_stopped():
    """It has not read its own last token when all its tokens are accepted."""
    model = tiny.llama()
    target, drafters = CausalLM(model, Warper(0)), [CausalLM(tiny.perturbed(model, 0.0), Warper(0))]
    expected = alone(target, drafters, SHORT, make=constant)
    assert all(r.accepted == 4 for rounds in expected.values() for r in rounds[:-1])
    assert_same(together(target, drafters, 3, SHORT, make=constant), expected)


def test_uniforms_of_another_row_are_seen(monkeypatch):
    target, drafters = models(warper=Warper())
    expected, honest = alone(target, drafters, SHORT), rows.uniforms
    monkeypatch.setattr(rows, "uniforms", lambda values, like: honest(values[::-1], like))
    assert_same(together(target, drafters, 1, SHORT), expected)
    with pytest.raises((AssertionError, ValueError)):
        assert_same(together(target, drafters, 3, SHORT), expected)


class Fading:
    """A numpy drafter that proposes one of the next two tokens, and nothing behind multiples of 4."""

    def score(self, tokens, start):
        ends = np.array(tokens[start - 1 :])
        laws = np.zeros((len(ends), tiny.VOCAB))
        for step, mass in ((1, 0.75), (2, 0.25)):
            laws[np.arange(len(ends)), (ends + step) % tiny.VOCAB] = mass
        return laws * (ends % 4 > 0)[:, None]


def lookup(warper):
    target, drafters = models(warper=warper)
    lifted = [
        Lifted(model, warper, torch.device("cpu"), torch.float64) for model in (Lookup(tiny.VOCAB), Fading())
    ]
    return target, [*lifted, drafters[0]]


@pytest.mark.parametrize("warper", [Warper(0), Warper(0.5), Warper(0.7, top_k=3)], ids=str)
@pytest.mark.parametrize("make", [fresh, constant])
def test_numpy_drafters_draft_on_the_host(warper, make):
    target, drafters = lookup(warper)
    expected = alone(target, drafters, SHORT, make=make)
    assert choices(expected) == {0, 1, 2}
    if make is constant:
        assert len({r.drafted for rounds in expected.values() for r in rounds}) > 2
    assert_same(together(target, drafters, 3, SHORT, make=make), expected)
    assert_same(together(target, drafters[:2], 3, SHORT), alone(target, drafters[:2], SHORT))


@pytest.mark.parametrize("drafting", [Warper(), Warper(0)], ids=str)
@pytest.mark.parametrize("target", [Warper(0), Warper(0.8)], ids=str)
def test_drafters_may_have_another_temperature(target, drafting):
    own, drafters = models(warper=target)
    drafters = [CausalLM(drafter.model, drafting) for drafter in drafters]
    assert_same(together(own, drafters, 3, SHORT), alone(own, drafters, SHORT))


@pytest.mark.parametrize("limit", [1, 2, 3, 7])
def test_answers_end_inside_a_draft(limit):
    target, drafters = models()
    expected = alone(target, drafters, SHORT, max_new_tokens=limit)
    assert_same(together(target, drafters, 3, SHORT, max_new_tokens=limit), expected)


def test_answers_end_at_stop_tokens():
    target, drafters = models()
    answers = [[t for r in rounds for t in r.emitted] for rounds in alone(target, drafters, SHORT).values()]
    stops = {answer[7] for answer in answers[:3]}
    expected = alone(target, drafters, SHORT, stop_tokens=stops)
    assert len({sum(len(r.emitted) for r in rounds) for rounds in expected.values()}) > 1
    assert_same(together(target, drafters, 3, SHORT, stop_tokens=stops), expected)


@pytest.mark.parametrize("warper", [Warper(0), Warper()], ids=str)
def test_neighbours_and_their_order_change_nothing(warper):
    target, drafters = models(warper=warper)
    expected = together(target, drafters, 3, SHORT)
    assert_same(together(target, drafters, 3, SHORT[::-1]), expected)
    for numbers in (SHORT[::2], SHORT[1:2]):
        assert_same(together(target, drafters, 2, numbers), {k: expected[k] for k in numbers})


def assert_text_differs(batch=3):
    target, drafters = models()
    with pytest.raises((AssertionError, ValueError)):  # ValueError: another number of rounds
        assert_same(together(target, drafters, batch, SHORT), alone(target, drafters, SHORT))


def test_a_mask_that_is_one_off_is_seen(monkeypatch):
    honest = Reader._mask
    monkeypatch.setattr(Reader, "_mask", lambda self, at, *rest: honest(self, at - 1, *rest))
    assert_text_differs(1)


def test_a_window_that_is_one_off_is_seen(monkeypatch):
    target, drafters = models(tiny.mistral)
    expected, honest = alone(target, drafters, SHORT), Reader._mask
    monkeypatch.setattr(
        Reader, "_mask", lambda self, at, end, window: honest(self, at, end, window and window + 1)
    )
    with pytest.raises((AssertionError, ValueError)):
        assert_same(together(target, drafters, 3, SHORT), expected)


def test_a_stale_slot_that_is_visible_is_seen(monkeypatch):
    """Each row sees one slot behind its own entries, if another row's text is longer."""
    honest = Reader._mask
    monkeypatch.setattr(Reader, "_mask", lambda self, at, *rest: honest(self, at + 1, *rest))
    assert_text_differs()


def test_rows_that_are_swapped_are_seen(monkeypatch):
    honest = Memory.open

    def swapped(self, places, positions, end):
        if not isinstance(places, slice) and len(places) > 1:
            places = places.flip(0)
        honest(self, places, positions, end)

    monkeypatch.setattr(Memory, "open", swapped)
    assert_text_differs()


def test_a_row_that_takes_a_place_without_its_memory_is_seen(monkeypatch):
    monkeypatch.setattr(Memory, "move", lambda *_: None)
    assert_text_differs()


def poisoned(warper):
    """The first drafter is the best one, but its laws are NaN behind some tokens."""
    target, drafters = models(warper=warper)
    model = tiny.perturbed(target.model, 0.01)
    model.model.embed_tokens.weight.data[30:34] = torch.nan
    return target, [CausalLM(model, warper, name="poisoned"), *drafters[:1]]


@pytest.mark.filterwarnings("ignore::nab.DrafterWarning")
@pytest.mark.parametrize("warper", [Warper(0), Warper()], ids=str)
@pytest.mark.parametrize("make", [fresh, constant])
def test_a_drafter_that_returns_nan_is_benched_for_the_row_alone(warper, make):
    """Nobody is benched for NaN behind a token that another one drafted and that was rejected."""
    target, drafters = poisoned(warper)
    expected = alone(target, drafters, make=make)
    healthy = [k for k, rounds in expected.items() if rounds[-1].choice == 0 and rounds[-1].drafted]
    assert 0 < len(healthy) < len(expected)
    for batch in (1, 4):
        assert_same(together(target, drafters, batch, make=make), expected)


@pytest.mark.filterwarnings("ignore::nab.DrafterWarning")
def test_a_trace_of_nan_is_seen(monkeypatch):
    target, drafters = poisoned(Warper(0))
    expected = alone(target, drafters)
    monkeypatch.setattr(torch, "nan_to_num", lambda x, *_: x)
    with pytest.raises((AssertionError, ValueError)):
        assert_same(together(target, drafters, 4), expected)


def test_who_is_benched_is_said():
    target, drafters = poisoned(Warper(0))
    with pytest.warns(nab.DrafterWarning, match=r"drafter 0 \(poisoned\) .* NaN or infinite"):
        together(target, drafters, 4)


def test_a_target_that_returns_nan_is_named():
    target, drafters = models()
    target.model.model.embed_tokens.weight.data[:] = torch.nan
    with pytest.raises(ValueError, match="model returned logits that are NaN or infinite"):
        together(target, drafters, 2)


@pytest.mark.filterwarnings("ignore::nab.DrafterWarning")
def test_a_drafter_whose_context_ends_is_benched_for_the_row_alone():
    target, drafters = models()
    drafters[0].context = 50
    expected = alone(target, drafters)
    assert_same(together(target, drafters, 3), expected)
    assert len(choices(expected)) == 3


def test_a_text_beyond_the_targets_context_is_refused():
    target, drafters = models()
    target.context = 100
    with pytest.raises(ValueError, match="do not fit the context of model: 100"):
        together(target, drafters, 2)


@pytest.mark.parametrize("warper", [Warper(0), Warper()], ids=str)
@pytest.mark.parametrize("make", [fresh, constant])
def test_a_round_waits_for_the_device_once(warper, make, monkeypatch):
    target, drafters = models(warper=warper)
    lists, tolist = [], torch.Tensor.tolist
    rounds = decode_batch(
        target, drafters, make(3, SHORT), [PROMPTS[k] for k in SHORT], batch=len(SHORT), draft_len=4,
        rngs=SHORT, max_new_tokens=100,
    )  # fmt: skip
    next(rounds)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: lists.append(self.shape) or tolist(self))
    with Waits() as waits:
        for _ in range(5):
            next(rounds)
    assert (len(lists), waits.count) == (5, 0)


def test_memory_is_that_of_the_rows_not_of_the_queries(monkeypatch):
    """300 queries in the place of 2: as many slots as the longest text needs, none made after it."""
    target, drafters = models()
    made, zeros = [], torch.Tensor.new_zeros
    monkeypatch.setattr(
        torch.Tensor, "new_zeros", lambda self, *shape: made.append(shape) or zeros(self, *shape)
    )
    prompts = [[k % 256, 1 + k % 7] for k in range(300)]
    rounds = decode_batch(
        target, drafters, fresh(3, range(300)), prompts, batch=2, draft_len=4, rngs=range(300),
        max_new_tokens=3,
    )  # fmt: skip
    assert sum(len(round_.emitted) for found in rounds for round_ in found.values()) == 900
    slots = [shape for shape in made if len(shape) == 4]
    assert set(slots) == {(2, 2, 256, 8)}
    assert len(slots) == 2 * (3 + 3 + 3 + 2)  # keys and values of all layers of all models


def test_the_models_still_read_for_themselves():
    target, drafters = models()
    expected = target.score([1, 2, 3, 4], 2)
    together(target, drafters, 2, SHORT)
    torch.testing.assert_close(target.score([1, 2, 3, 4], 2), expected, rtol=0, atol=0)


class Other:
    """A drafter that knows no batches."""

    name = "a head"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": CausalLM(tiny.gpt2(), name="gpt")}, "gpt cannot be read in a batch: GPT2LMHeadModel"),
        ({"drafters": [Other()]}, "a head cannot draft in a batch: .* got Other"),
        ({"drafters": [CausalLM(tiny.gpt2(), name="gpt")]}, "gpt cannot be read in a batch"),
        (
            {"drafters": [CausalLM(tiny.llama(vocab_size=300))]},
            "must be like the target's, .257,.* got .300,",
        ),
        ({"batch": 0}, "batch must be a whole number, at least 1, got 0"),
        ({"draft_len": -1}, "draft_len must be a whole number, at least 0, got -1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number, at least 1, got 0"),
        ({"rngs": []}, "rngs must be as many as prompts, 1, got 0"),
        ({"selectors": []}, "selectors must be as many as prompts, 1, got 0"),
        ({"selectors": [nab.Constant([0.5, 0.5])]}, "a selector chooses among 2 drafters, there are 1"),
        ({"pools": []}, "pools must be as many as prompts, 1, got 0"),
        ({"pools": [nab.Pool([])]}, "a pool must be of the same 1 drafters, without a limit"),
        ({"batch": 1.5}, "batch must be a whole number, at least 1, got 1.5"),
        (
            {"selectors": [nab.Corrected(nab.Selector(nab.Hedge(), 1, objective=nab.Time(2)), 2)]},
            "no selector can be lazy or have the time objective, got Corrected",
        ),
        ({"prompts": [[]]}, "prompt 0 must have a token at least, got none"),
    ],
)
def test_bad_input_is_named(changes, message):
    given = {
        "target": CausalLM(tiny.llama()), "drafters": [CausalLM(tiny.llama())], "prompts": [[1]],
        "selectors": [nab.Constant([1.0])], "batch": 1, "draft_len": 2, "rngs": [0], "max_new_tokens": 3,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        decode_batch(**{**given, **changes})


def test_no_prompts_are_no_rounds():
    target, drafters = models()
    assert list(
        decode_batch(target, drafters, [], [], batch=2, draft_len=4, rngs=[], max_new_tokens=3)
    ) == []  # fmt: skip
