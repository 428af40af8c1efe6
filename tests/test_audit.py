"""The audit accepts what is lossless at its stated rate, and finds out what is not."""

import json
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, chisquare
from test_schemes import SoftmaxOfCertain

import nab
from nab import audit, sampling
from nab.acceptance import Chain
from nab.sampling import Child
from nab.schemes import Levels
from nab.sim import Markov

RISK = 1e-6  # of each test that counts verdicts
VOCAB, PLACES, ANSWERS = 12, 6, 60
RNG = np.random.default_rng(20251126)


def noisy(table):
    """Its laws times independent noise: as often too high as too low, likely tokens or not."""
    table = table * np.exp(2 * RNG.normal(size=table.shape))
    return Markov(table / table.sum(-1, keepdims=True))


TARGET = Markov(RNG.dirichlet(np.full(VOCAB, 0.4), size=VOCAB))
DRAFTERS = [noisy(TARGET.table) for _ in range(2)]
PROMPTS = [[0], [1, 2], [3]]


def decoder(scheme=None, target=TARGET):
    """From prompt and seed to an answer, under a learner that chooses between two drafters."""
    scheme = scheme or Levels([Chain()] * 3)

    def generate(prompt, seed=0):
        choosing, decoding = np.random.SeedSequence(seed).spawn(2)
        selector = nab.Selector(nab.NormalHedge(), 2, rng=choosing)
        rounds = nab.decode(
            target, DRAFTERS, selector, prompt, draft_len=scheme.draft_len, scheme=scheme, rng=decoding
        )
        return [token for r in nab.until(rounds, max_new_tokens=PLACES) for token in r.emitted]

    return generate


def audited(generate, **options):
    settings = {"max_new_tokens": PLACES, "drafters": DRAFTERS, "error": 0.1, "rng": 0} | options
    return audit.sampling(generate, TARGET, PROMPTS, **settings)


# --- greedy ---


def greedy(table):
    return Markov(np.eye(len(table))[table.argmax(-1)])


MODES = Markov(np.roll(np.eye(VOCAB), 1, axis=1) * 0.6 + 0.4 / VOCAB)  # counts up


def counted(prompt, wrong=None):
    found = [(prompt[-1] + k) % VOCAB for k in range(1, PLACES + 1)]
    return found if wrong is None else [*found[:wrong], (found[wrong] + 5) % VOCAB, *found[wrong + 1 :]]


def test_greedy_answers_of_the_decoder_are_the_models():
    found = audit.greedy(decoder(target=greedy(TARGET.table)), TARGET, PROMPTS, max_new_tokens=PLACES)
    assert found == audit.Greedy(len(PROMPTS), len(PROMPTS) * PLACES)
    assert found.passed
    assert str(found) == "greedy: 3 answers, 18 tokens: passed, all are the model's"


@pytest.mark.parametrize("wrong", range(PLACES))
def test_a_wrong_token_is_named(wrong):
    def generate(prompt):
        return counted(prompt, wrong if prompt == [1, 2] else None)

    found = audit.greedy(generate, MODES, PROMPTS, max_new_tokens=PLACES)
    expected = (2 + wrong + 1) % VOCAB
    (difference,) = found.differences
    assert difference[:4] == (1, wrong, (expected + 5) % VOCAB, expected)
    assert difference.gap == pytest.approx(0.6)
    assert not found.passed
    assert f"answer 1, token {wrong}: {difference.token}, not {expected}, which is likelier by 0.6" in str(
        found
    )
    assert json.loads(json.dumps(found.summary()))["differences"] == [difference._asdict()]


def test_shifted_rows_of_the_target_are_found_out(monkeypatch):
    def shifted(*question):
        found = sampling.scored(*question)
        return found[[0, *range(len(found) - 1)]]

    monkeypatch.setitem(nab.decode.__globals__, "scored", shifted)
    generate = decoder(target=greedy(TARGET.table))
    assert not audit.greedy(generate, TARGET, PROMPTS, max_new_tokens=PLACES).passed


def test_of_equals_the_lowest_token_is_due():
    even = Markov(np.full((3, 3), 1 / 3))
    assert audit.greedy(lambda prompt: [0, 0], even, [[2]], max_new_tokens=2).passed
    assert audit.greedy(lambda prompt: [0, 1], even, [[2]], max_new_tokens=2).differences == (
        (0, 1, 1, 0, 0.0),
    )


def test_answers_end_with_a_stop_token_and_what_is_behind_is_cut():
    for answer in ([4, 5], [4, 5, 0, 0]):
        found = audit.greedy(lambda prompt, a=answer: a, MODES, [[3]], max_new_tokens=4, stop_tokens=[5])
        assert found == audit.Greedy(1, 2)
    missed = audit.greedy(lambda prompt: [4, 6, 7, 8], MODES, [[3]], max_new_tokens=4, stop_tokens=[5])
    assert missed.differences[0][1:4] == (1, 6, 5)


def test_greedy_audits_add_up():
    def generate(prompt):
        return counted(prompt, 2 if len(prompt) == 2 else None)

    parts = [audit.greedy(generate, MODES, [prompt], max_new_tokens=PLACES) for prompt in PROMPTS]
    assert parts[0] + parts[1] + parts[2] == audit.greedy(generate, MODES, PROMPTS, max_new_tokens=PLACES)


# --- the numbers behind the sampling test ---


@given(
    st.lists(st.integers(0, 16), min_size=4, max_size=4), st.lists(st.integers(0, 2), min_size=5, max_size=5)
)
def test_tokens_are_laid_out_in_order_and_every_cell_has_an_eighth_of_the_law(pieces, key):
    """Of 64 equal pieces of [0, 1), of which tokens have some each: so the cell of a point is uniform."""
    pieces = [*pieces, 64 - sum(pieces)]
    order = sorted(range(5), key=lambda x: (-key[x], -pieces[x], x))
    tokens = [x for x in order for _ in range(pieces[x])]
    u = [(k + 0.5) / pieces[x] for x in order for k in range(pieces[x])]
    p, keys = (np.tile(np.array(row, dtype=float), (64, 1)) for row in (pieces, key))
    assert audit._cells(p / 64, keys, tokens, np.array(u)).tolist() == np.repeat(range(8), 8).tolist()


def test_statistics_are_pearsons():
    cells = RNG.integers(8, size=(50, 4))
    every, by_place, pairs = audit._chi_squares(cells)

    def pearson(values, n):
        return chisquare(np.bincount(np.ravel(values), minlength=n)).statistic

    assert every == pytest.approx(pearson(cells, 8))
    assert by_place == pytest.approx(sum(pearson(column, 8) for column in cells.T))
    apart = [8 * cells[:, :-d] + cells[:, d:] for d in (1, 2, 3)]
    assert pairs == pytest.approx(sum(pearson(each, 64) for each in apart))
    assert audit._chi_squares(cells[:, :1])[2] == 0  # answers of one token have no pairs


def test_the_null_law_has_the_mean_it_must_have():
    """Cells are uniform, and overlapping pairs do not correlate on average."""
    null = audit._null(30, 5)
    error = null.std(0) / np.sqrt(len(null))
    assert (np.abs(null.mean(0) - [7, 5 * 7, 4 * 63]) < 6 * error).all()  # 2e-9 each, two-sided


def test_a_p_value_is_at_most_x_in_a_share_x_of_all_draws():
    """Any of equals may be the observed one; ties only make p-values larger."""
    for values in product(range(3), repeat=5):
        p = [audit._p_values(np.array(x), np.delete(values, i)) for i, x in enumerate(values)]
        for x in np.arange(1, 6) / 5:
            assert np.mean(np.array(p) <= x) <= x


# --- sampling ---


def test_lossless_answers_pass_and_the_report_says_how_sure_it_is():
    found = audited(decoder())
    assert found.passed
    assert found.power >= audit.POWER
    report = json.loads(json.dumps(found.summary()))
    assert report["passed"] is report["accepted"] is True
    assert (report["answers"], report["places"]) == (500, PLACES)
    assert len(report["chi_squares"]) == 6
    assert report["control"] == {"slip": found.slip, "error": pytest.approx(0.1), "power": found.power}
    for said in (
        "500 answers of 6 tokens: passed, they have",
        "false-alarm rate 0.001",
        "0.100 a token",
    ):
        assert said in str(found)


def test_false_alarms_are_as_rare_as_stated():
    verdicts = [audited(decoder(), answers=ANSWERS, alpha=0.1, rng=seed) for seed in range(60)]
    alarms = sum(not each.accepted for each in verdicts)
    assert alarms <= binom.isf(RISK, len(verdicts), 0.1)
    half = sum(each.chi_squares[0].p_value <= 0.5 for each in verdicts)  # and p-values are not idle
    assert binom.ppf(RISK, len(verdicts), 0.45) <= half <= binom.isf(RISK, len(verdicts), 0.5)


def test_the_control_is_rejected_as_often_as_stated():
    """By audits of a decoder that emits one token in five as drafted, without a test."""

    def careless(prompt, seed):
        rng, tokens = np.random.default_rng(seed), list(prompt)
        for _ in range(PLACES):
            model = DRAFTERS[rng.integers(2)] if rng.random() < 0.2 else TARGET
            tokens.append(sampling.sample(model.score(tokens, len(tokens))[0], rng.random()))
        return tokens[len(prompt) :]

    error = 0.2 * float(audited(careless, answers=3 * ANSWERS).distance.mean())
    found = [audited(careless, answers=3 * ANSWERS, error=error, rng=seed) for seed in range(30)]
    power = min(each.power for each in found[:3])
    assert 0.5 < power < 1  # so that it could be missed
    assert sum(not each.accepted for each in found) >= binom.ppf(RISK, len(found), power)


class FromTheRowBefore(Chain):
    """Drafts that claim the law of the draft before."""

    def __init__(self):
        super().__init__()
        object.__setattr__(self, "last", [])

    def children(self, q, uniforms):
        self.last.append(q)
        return [Child(child.token, self.last[-2:][0]) for child in super().children(q, uniforms)]


class Unverified(Chain):
    """Every draft is accepted."""

    def children(self, q, uniforms):
        return [Child(child.token, q * 0) for child in super().children(q, uniforms)]


def same_uniforms(prompt, seed):
    """Each round begins the random numbers anew."""
    found, selector = [], nab.Constant([0.5, 0.5], rng=seed)
    while len(found) < PLACES:
        rounds = nab.decode(TARGET, DRAFTERS, selector, [*prompt, *found], draft_len=2, rng=seed)
        found += next(rounds).emitted
    return found


def first_token_greedy(prompt, seed):
    first = int(TARGET.score(prompt, len(prompt))[0].argmax())
    return [first, *decoder()([*prompt, first], seed)]


TWINS = {
    "argmax drafts, softmax as their law": (lambda: decoder(Levels([SoftmaxOfCertain(1)] * 3)), {}),
    "recovered from p": (decoder, {"residual": lambda p, q: p}),
    "recovered from the draft's row before": (lambda: decoder(Levels([FromTheRowBefore()] * 3)), {}),
    "never verified": (lambda: decoder(Levels([Unverified()] * 3)), {}),
    "the same uniforms each round": (lambda: same_uniforms, {}),
    "the first token is greedy": (lambda: first_token_greedy, {}),
}


@pytest.mark.parametrize("name", TWINS)
def test_broken_twins_are_found_out(name, monkeypatch):
    make, changes = TWINS[name]
    for function, broken in changes.items():
        monkeypatch.setattr(sampling, function, broken)
    found = audited(make())
    assert not found.accepted
    assert not found.passed
    assert "FAILED: they do not have the model's law" in str(found)


def test_an_error_that_follows_the_drafter_is_seen_best_in_its_order(monkeypatch):
    """By each test, whose mean under the model's law is the same in both orders."""
    monkeypatch.setattr(sampling, "residual", lambda p, q: p)
    found = audited(decoder())
    likeliest, preferred = (
        {each.test: each.statistic for each in found.chi_squares if each.order == order}
        for order in audit.ORDERS
    )
    assert all(preferred[test] > likeliest[test] for test in audit.TESTS)
    assert not found.accepted


def test_random_numbers_that_are_used_twice_are_seen_in_pairs_not_by_place():
    """Two numbers in turn lay every token: at each place they are uniform, as the test by place wants."""

    def generate(prompt, seed):
        turns, found = np.random.default_rng(seed).random(2), []
        for place in range(PLACES):
            p = TARGET.score([*prompt, *found], len(prompt) + len(found))[0]
            order = np.argsort(-p, kind="stable")
            found.append(int(order[np.searchsorted(p[order].cumsum(), turns[place % 2], side="right")]))
        return found

    found = audited(generate, drafters=())
    p_value = {each.test: each.p_value for each in found.chi_squares}
    assert p_value["pairs by distance"] <= found.level < p_value["tokens by place"]


def test_a_token_of_probability_0_is_enough():
    model = Markov(np.array([[0.5, 0.5, 0.0]] * 3))
    one = {"answers": 3, "max_new_tokens": 1, "rng": 0}
    found = audit.sampling(lambda prompt, seed: [2 if seed % 2 else 0], model, [[0]], **one)
    assert 0 < len(found.impossible) < 3
    assert min(each.p_value for each in found.chi_squares) > found.level
    assert not found.accepted
    assert f"answer {found.impossible[0][0]}, token 0: its probability is 0" in str(found)


def test_a_control_has_the_error_that_is_asked_for_or_verifies_nothing():
    found = audited(decoder(), answers=5, error=0.9)
    assert found.slip == 1
    assert replace(found, error=0.1).control_error == pytest.approx(0.1)
    same = audit.sampling(decoder(), TARGET, PROMPTS, answers=5, max_new_tokens=PLACES, drafters=[TARGET])
    assert same.accepted
    assert not same.passed  # nothing can be found out where drafts have the model's law


def test_few_answers_leave_it_undecided():
    found = audited(decoder(), answers=10)
    assert found.accepted
    assert not found.passed
    assert "UNDECIDED" in str(found)


def test_vocabularies_of_real_models():
    """One law of 50 000 tokens; drawn a little too often from its head."""
    law = 1 / np.arange(10, 50_010)
    law /= law.sum()
    model = SimpleNamespace(score=lambda tokens, start: np.tile(law, (len(tokens) - start + 1, 1)))

    def drawn(law):
        return lambda prompt, seed: np.random.default_rng(seed).choice(len(law), size=2, p=law)

    for audited_law, passed in ((law, True), (law**1.1 / (law**1.1).sum(), False)):
        settings = {"answers": 200, "max_new_tokens": 2, "error": 0.2, "rng": 0}
        assert audit.sampling(drawn(audited_law), model, [[0]], **settings).passed == passed


def test_answers_that_stop_early_are_whole():
    def stopped(prompt, seed):
        answer = decoder()(prompt, seed)
        return answer[: answer.index(7) + 1] if 7 in answer else answer

    assert audited(stopped, stop_tokens=[7]).accepted
    with pytest.raises(ValueError, match=r"must have 6 tokens or end with a stop token, got \[.*7\]"):
        audited(stopped)


def test_sampling_audits_add_up():
    found = [audited(decoder(), answers=n, rng=n) for n in (2, 3)]
    whole = found[0] + found[1]
    assert whole.answers == 5
    np.testing.assert_array_equal(whole.cells[:, 2:], found[1].cells)
    np.testing.assert_array_equal(whole.drafts[:, :2], found[0].drafts)
    one = {"answers": 1, "max_new_tokens": 1, "rng": 0}
    bad = audit.sampling(lambda prompt, seed: [1], Markov(np.eye(2)), [[0]], **one)
    assert (bad + bad).impossible == ((0, 0), (1, 0))
    with pytest.raises(
        ValueError, match=r"only audits with the same settings add up, got \(0.001, 0.1, .*\(0.001, 0.5"
    ):
        found[0] + audited(decoder(), answers=1, error=0.5)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_seed_gives_the_same_audit(seed):
    one, other = (audited(decoder(), answers=5, rng=seed) for _ in range(2))
    assert one.summary() == other.summary()


def changed(change):
    return SimpleNamespace(score=lambda tokens, start: change(TARGET.score(tokens, start)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"answers": 0}, "answers must be a whole number, at least 1, got 0"),
        ({"max_new_tokens": 1.5}, "max_new_tokens must be a whole number, at least 1, got 1.5"),
        ({"alpha": 6e-4}, r"alpha must lie in \(0.0006, 1\), got 0.0006"),
        ({"error": 1}, r"error must lie in \(0, 1\), got 1"),
        ({"generate": lambda prompt, seed: [0] * 5}, r"must have 6 tokens or end .*, got \[0, 0, 0, 0, 0\]"),
        (
            {"generate": lambda prompt, seed: [0] * 5 + [12]},
            r"the model: it has tokens in \[0, 12\), but .* 12",
        ),
        ({"generate": lambda prompt, seed: [-1] * 6}, r"the model: it has tokens in \[0, 12\), but .* -1"),
        ({"generate": lambda prompt, seed: None}, "an answer must be tokens, got None"),
        ({"generate": lambda prompt, seed: [0.5]}, "an answer must be whole numbers, got 0.5"),
        ({"prompts": []}, "an audit needs at least one prompt"),
        ({"prompts": [[0], []]}, r"a prompt must be token ids, at least one, got \[\]"),
        ({"prompts": [[0.5]]}, r"a prompt must be token ids, at least one, got \[0.5\]"),
        ({"model": Markov(np.zeros((12, 12)))}, "the model: its law must sum to 1, but is all 0"),
        ({"model": changed(np.log)}, "the model: its law must be non-negative and finite"),
        (
            {"model": changed(lambda laws: laws[1:])},
            r"the model: its laws must have shape \(6, 12\), got \(5, 12\)",
        ),
        (
            {"drafters": [*DRAFTERS, changed(lambda laws: 2 * laws)]},
            "drafter 2: its law must sum to 1, or be all 0",
        ),
    ],
)
def test_what_cannot_be_audited_is_named(options, message):
    settings = {"generate": decoder(), "model": TARGET, "prompts": PROMPTS, "max_new_tokens": PLACES}
    settings |= {"drafters": DRAFTERS, "answers": 2} | options
    with pytest.raises(ValueError, match=message):
        audit.sampling(**settings)
