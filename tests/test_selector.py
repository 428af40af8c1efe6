"""Selectors release losses late and whole, remember what was played, and continue bit for bit."""

import json
from functools import partial
from itertools import islice, pairwise

import numpy as np
import pytest
from enumeration import outcomes
from hypothesis import given
from hypothesis import strategies as st

import nab
from nab.decode import Evaluation
from nab.learners import AdaNormalHedgeTV, Interleaved, Squint, bandits
from nab.losses import by_depth
from nab.schemes import DynamicTree
from nab.selector import Before, argmax, coupled, draw
from nab.sim import Markov


class Recorder:
    """A learner that keeps what it is fed; its weights depend on how often it was fed."""

    def init(self, n, batch=None):
        return ()

    def probs(self, state):
        weights = np.ones(3)
        weights[len(state) % 3] += 1
        return weights / weights.sum()

    def update(self, state, losses, played=None):
        return (*state, (np.array(losses), np.array(played)))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=12), st.integers(1, 4), st.integers(0, 2**32))
def test_delayed_losses_are_those_of_the_whole_trajectory(emitted, draft_len, seed):
    gamma, realised = np.random.default_rng(seed).random((2, sum(emitted), 3))
    selector = nab.Selector(Recorder(), 3, objective=nab.Length(draft_len), rng=0)
    played, start = [], 0
    for count in emitted:
        played += [selector.probs] * count
        rows = slice(start, start := start + count)
        selector.observe(count, lambda rows=rows: (gamma[rows], realised[rows]))
        assert len(selector.state) == max(
            start - draft_len + 1, 0
        )  # released as soon as verified, not before
    expected = nab.Length(draft_len)(gamma, realised)
    for t, (losses, then) in enumerate(selector.state):
        np.testing.assert_allclose(losses, expected[t], rtol=1e-15)
        np.testing.assert_array_equal(then, played[t])


@given(st.integers(1, 4), st.integers(0, 2**32))
def test_delayed_losses_by_depth_are_those_of_the_whole_trajectory(draft_len, seed):
    gamma, realised = np.random.default_rng(seed).random((2, 20, draft_len, 3))
    selector = nab.Selector(Recorder(), 3, objective=nab.Length(draft_len), rng=0)
    for rows in (slice(0, 3), slice(3, 4), slice(4, 20)):
        selector.observe(1, lambda rows=rows: (gamma[rows], realised[rows]))
    expected = nab.Length(draft_len)(gamma, realised)
    np.testing.assert_allclose([loss for loss, _ in selector.state], expected, rtol=1e-15)
    tokens = nab.Selector(Recorder(), 3, rng=0)
    tokens.observe(1, lambda: (gamma, realised))
    np.testing.assert_array_equal([loss for loss, _ in tokens.state], 1 - gamma[:, 0])


def test_a_selector_restored_amid_scores_by_depth_continues_bit_for_bit():
    gamma, realised = np.random.default_rng(0).random((2, 20, 3, 2))
    first = nab.Selector(nab.NormalHedge(), 2, objective=nab.Length(3), rng=0)
    first.observe(1, lambda: (gamma[:7], realised[:7]))
    second = nab.Selector(nab.NormalHedge(), 2, objective=nab.Length(3), rng=1)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for selector in (first, second):
        selector.observe(1, lambda: (gamma[7:], realised[7:]))
    assert first.state_dict() == second.state_dict()


def rounds(seed, count=30):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        gamma, realised = rng.random((2, rng.integers(1, 5), 3))
        yield len(gamma), lambda gamma=gamma, realised=realised: (gamma, realised)


@pytest.mark.parametrize(
    "learner", [nab.NormalHedge(), nab.Hedge(), AdaNormalHedgeTV(), Interleaved(Squint(), 1)], ids=str
)
@pytest.mark.parametrize("objective", [nab.Token(), nab.Length(4)])
def test_a_restored_selector_continues_bit_for_bit(learner, objective):
    first = nab.Selector(learner, 3, objective=objective, rng=7)
    for count, evaluate in rounds(1):
        first.observe(count, evaluate)
    second = nab.Selector(learner, 3, objective=objective, rng=99)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for (count, evaluate), (_, again) in zip(rounds(2), rounds(2), strict=True):
        assert second.choice == first.choice
        np.testing.assert_array_equal(second.probs, first.probs)
        first.observe(count, evaluate)
        second.observe(count, again)
    assert second.state_dict() == first.state_dict()


BANDITS = [
    bandits.UCB1(), bandits.MetaSD(), bandits.UCBSpec(4), bandits.EXP3(), bandits.EXP3IX(),
    bandits.EXP3Spec(4), bandits.Thompson(), bandits.EpsilonGreedy(window=3),
]  # fmt: skip


@pytest.mark.parametrize("bandit", BANDITS, ids=str)
def test_a_restored_bandit_continues_bit_for_bit(bandit):
    first = nab.BanditSelector(bandit, 3, draft_len=4, rng=7)
    lengths = np.random.default_rng(0).integers(1, 6, 60)
    for emitted in lengths[:30]:
        first.observe(emitted, None)
    second = nab.BanditSelector(bandit, 3, draft_len=4, rng=99)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for emitted in lengths[30:]:
        assert second.choice == first.choice
        np.testing.assert_array_equal(second.probs, first.probs)
        first.observe(emitted, None)
        second.observe(emitted, None)
    assert second.state_dict() == first.state_dict()


@pytest.mark.parametrize(("emitted", "loss"), [(1, 1.0), (3, 0.5), (5, 0.0)])
def test_a_bandit_is_told_the_share_of_the_draft_that_was_missed(emitted, loss):
    selector = nab.BanditSelector(bandits.UCB1(), 3, draft_len=4, rng=0)
    played = selector.choice
    assert selector.observe(emitted, None) is None
    assert selector.state.losses.tolist() == [loss * (i == played) for i in range(3)]
    assert selector.state.counts.sum() == selector.state.counts[played] == 1


@pytest.mark.parametrize("pair", [(bandits.UCB1(), bandits.MetaSD(1)), (bandits.EXP3(), bandits.EXP3Spec(4))])
def test_bandits_that_differ_in_their_loss_alone_are_one_here(pair):
    first, second = (nab.BanditSelector(bandit, 3, draft_len=4, rng=7) for bandit in pair)
    for emitted in np.random.default_rng(0).integers(1, 6, 60):
        np.testing.assert_array_equal(second.probs, first.probs)
        first.observe(emitted, None)
        second.observe(emitted, None)


@pytest.mark.parametrize("emitted", [0, 6])
def test_a_length_that_no_round_has_is_named(emitted):
    selector = nab.BanditSelector(bandits.UCB1(), 3, draft_len=4)
    with pytest.raises(ValueError, match=rf"emitted must lie in 1 .. 5, got {emitted}"):
        selector.observe(emitted, None)
    with pytest.raises(ValueError, match="draft_len must be a whole number, at least 1, got 0"):
        nab.BanditSelector(bandits.UCB1(), 3, draft_len=0)


def test_a_state_over_another_number_of_drafters_is_refused():
    saved = nab.Selector(nab.NormalHedge(), 5).state_dict()
    with pytest.raises(ValueError, match="over 5 drafters, this selector over 3"):
        nab.Selector(nab.NormalHedge(), 3).load_state_dict(saved)
    saved = nab.BanditSelector(bandits.UCB1(), 5, draft_len=4).state_dict()
    with pytest.raises(ValueError, match="over 5 drafters, this selector over 3"):
        nab.BanditSelector(bandits.UCB1(), 3, draft_len=4).load_state_dict(saved)


def test_argmax_plays_the_mode_and_sample_plays_the_law():
    gamma = np.array([[0.2, 0.6, 0.4]])
    mode = nab.Selector(nab.Hedge(rate=0.1), 3, pick=argmax, rng=0)
    drawn = nab.Selector(nab.Hedge(rate=0.1), 3, rng=0)
    choices = set()
    for _ in range(60):
        for selector in (mode, drawn):
            selector.observe(1, lambda: (gamma, gamma))
        assert mode.choice == 1
        choices.add(drawn.choice)
    assert choices == {0, 1, 2}


def test_a_constant_selector_draws_from_its_law_and_never_evaluates():
    def never():
        raise AssertionError("asked")

    fixed = nab.Constant([0.0, 1.0, 0.0])
    uniform = nab.Constant(np.full(3, 1 / 3), rng=0)
    seen = set()
    for _ in range(60):
        assert fixed.observe(1, never) is uniform.observe(1, never) is None
        assert fixed.choice == 1
        seen.add(uniform.choice)
    assert seen == {0, 1, 2}


@pytest.mark.parametrize("probs", [[0.5, 0.6], [-0.5, 1.5], [], [float("nan"), 1.0]])
def test_a_law_that_is_none_is_named(probs):
    with pytest.raises(ValueError, match="probs must be non-negative and sum to 1"):
        nab.Constant(probs)


def test_a_draft_length_below_zero_is_named():
    with pytest.raises(ValueError, match=r"draft_len must be .* at least 0, got -1"):
        nab.Constant([1.0], draft_len=-1)


@given(st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=5))
def test_a_coupled_draw_keeps_the_law_and_moves_as_seldom_as_can_be(columns):
    """Exactly, by enumeration, for laws that do not depend on the draws."""
    laws = [(np.array(c) + (sum(c) == 0)) / (sum(c) or 3) for c in columns]

    def run(pick):
        def chain(rng):
            before, choices = None, []
            for law in laws:
                before = Before(pick(law, rng.random, before), law)
                choices.append(before.choice)
            return tuple(choices)

        return [(np.array(path), mass) for path, mass in outcomes(chain)]

    for pick in (coupled, draw):
        paths = run(pick)
        for t, law in enumerate(laws):
            found = [sum(mass for path, mass in paths if path[t] == i) for i in range(3)]
            np.testing.assert_allclose(found, law, atol=1e-12)
    for t, (old, new) in enumerate(pairwise(laws)):
        moved = sum(mass for path, mass in run(coupled) if path[t] != path[t + 1])
        assert moved == pytest.approx(np.abs(new - old).sum() / 2, abs=1e-12)


def test_redrawing_with_probability_tv_would_not_keep_the_law():
    """The twin that looks right: stay with probability 1 - TV, else draw afresh."""
    laws = [np.array([0.5, 0.5]), np.array([0.9, 0.1])]

    def chain(rng):
        first = draw(laws[0], rng.random)
        return first if not rng.random() < 0.4 else draw(laws[1], rng.random)

    found = sum(mass for choice, mass in outcomes(chain) if choice == 0)
    assert found == pytest.approx(0.6 * 0.5 + 0.4 * 0.9)
    assert abs(found - 0.9) > 0.2


@given(st.lists(st.integers(0, 3), min_size=1, max_size=9).filter(any), st.floats(0, 1, exclude_max=True))
def test_a_draw_never_has_mass_zero(masses, u):
    law = np.array(masses) / sum(masses)
    assert law[draw(law, lambda: u)] > 0
    assert law[draw(law, lambda: np.nextafter(1, 0))] > 0


def test_a_coupled_selector_switches_less_and_goes_on_after_saving():
    losses = np.random.default_rng(0).random((400, 1, 3))
    chosen = {}
    for pick in (draw, coupled):
        selector = nab.Selector(nab.Hedge(rate=0.2), 3, pick=pick, rng=1)
        chosen[pick] = []
        for t, gamma in enumerate(losses):
            selector.observe(1, lambda gamma=gamma: (gamma, gamma))
            if t == 200:
                saved, selector = selector.state_dict(), nab.Selector(nab.Hedge(rate=0.2), 3, pick=pick)
                selector.load_state_dict(saved)
            chosen[pick].append(selector.choice)
    switches = {pick: np.count_nonzero(np.diff(choices)) for pick, choices in chosen.items()}
    assert switches[coupled] < 0.2 * switches[draw]


def test_rounding_never_draws_a_drafter_without_mass():
    """The masses add up to less than the uniform: the last one that has any is drawn."""
    assert draw(np.array([0.3, 0.3, 0.3999999, 0.0]), lambda: 1 - 2.0**-53) == 2


@pytest.mark.parametrize(
    ("gamma", "message"),
    [
        ([[0.5, 1.5]], r"gamma must lie in \[0, 1\], got 1.5"),
        ([[0.5, float("nan")]], r"gamma must lie in \[0, 1\], got nan"),
        ([[0.5, 0.5, 0.5]], r"gamma must have shape \(positions, 2\), a position at least, got \(1, 3\)"),
        (np.empty((0, 2)), r"gamma must have shape .* got \(0, 2\)"),
    ],
)
def test_bad_scores_are_named(gamma, message):
    selector = nab.Selector(nab.NormalHedge(), 2)
    with pytest.raises(ValueError, match=message):
        selector.observe(1, lambda: (np.array(gamma), np.array(gamma)))


# --- acceptance at depth, corrected ---

TARGET, DRAFTER = (Markov(np.random.default_rng(seed).dirichlet(np.ones(3), size=3)) for seed in (0, 1))
THINNING = DynamicTree(2, 3, 3)  # two children at first, then one, then hardly any


def test_corrections_count_what_was_accepted_and_what_the_first_depth_expects():
    """In the mean over all first rounds, by enumeration: so their quotient tends to acceptance at depth."""

    def run(rng):
        inner = nab.Selector(nab.Hedge(), 1, objective=nab.Length(3), rng=0)
        selector = nab.Corrected(inner, 3)
        options = {"draft_len": 3, "scheme": THINNING, "rng": rng}
        round_ = next(nab.decode(TARGET, [TARGET], selector, [0], **options))
        return selector.counts[..., 0], round_.accepted, round_.emitted

    counts, accepted, expected = np.zeros((2, 3)), np.zeros(3), np.zeros(3)
    for (found, length, emitted), probability in outcomes(run):
        counts += probability * found
        accepted += probability * (length > np.arange(3))
        laws = [TARGET.table[last] for last in (0, *emitted[:-1])]
        for k in range(min(length + 1, 3)):
            expected[k] += probability * float(nab.TopK(2).probability(laws[k], laws[k]))
    np.testing.assert_allclose(counts, [[0, *accepted[1:]], [0, *expected[1:]]], atol=1e-12)
    assert (accepted[1:] < expected[1:]).all()  # there is something to correct


def test_what_is_corrected_is_what_the_selector_inside_learns_from():
    counts = np.zeros((2, 2, 2))
    counts[:, 1] = [[2, 30], [12, 15]]
    inner = nab.Selector(Recorder2(), 2, objective=nab.Length(2), rng=0)
    selector = nab.Corrected(inner, 2, prior=0, counts=counts)
    np.testing.assert_allclose(selector.factors, [[1, 1], [1 / 6, 2]])
    gamma = np.full((3, 2), 0.6)
    returned = selector.observe(1, lambda: (gamma, gamma))
    assert returned[0] is gamma
    expected = 1 - (1 + 0.6 + 0.6 * np.array([0.1, 1])) / 3  # 1.2 is cut to 1
    np.testing.assert_allclose(inner.state[0], expected, rtol=1e-14)

    inner = nab.Selector(Recorder2(), 2, objective=nab.Length(3), rng=0)
    counts = np.repeat([[[0], [1], [1]], [[0], [2], [4]]], 2, axis=2)
    longer = nab.Corrected(inner, 3, prior=0, counts=counts)
    longer.observe(1, lambda: (gamma, gamma))
    length = 1 + 0.6 + 0.6 * 0.3 + 0.6 * 0.3 * 0.15  # realised is corrected too
    np.testing.assert_allclose(inner.state[0], [1 - length / 4] * 2, rtol=1e-14)
    assert (selector.choice, selector.probs.tolist()) == (inner.choice, inner.probs.tolist())


class Recorder2(Recorder):
    def probs(self, state):
        return np.array([0.5, 0.5])

    def update(self, state, losses, played=None):
        return (*state, losses)


def test_corrections_of_drafters_alike_at_all_depths_stay_near_one():
    """Accepted less expected is a martingale with steps in [-1, 1]: within Azuma's bound, false alarm
    1e-9."""
    selector = nab.Corrected(nab.Selector(nab.Hedge(), 1, rng=0), 2)
    rounds = nab.decode(TARGET, [DRAFTER], selector, [0], draft_len=2, rng=0)
    steps = 0
    for round_, _ in zip(rounds, range(3000), strict=False):
        steps += round_.accepted >= 1
    accepted, expected = selector.counts[:, 1, 0]
    assert steps > 1000
    assert abs(accepted - expected) <= np.sqrt(2 * steps * np.log(2e9))
    assert accepted < 0.9 * steps  # it is no trivial agreement


def test_corrections_count_no_round_that_was_left_out():
    """What is counted is what the scored rounds have, as if there had been no others."""
    inner = nab.Corrected(nab.Selector(Recorder(), 3, objective=nab.Length(3), rng=0), 3)
    rounds, (gamma, _) = decoded(nab.Lazy(inner, every=4, span=5))
    alone = nab.Corrected(nab.Selector(Recorder(), 3, objective=nab.Length(3), rng=0), 3)
    counted, deep = 0, by_depth(gamma, 3)
    for last in range(3, len(rounds), 4):
        first = sum(len(round_.emitted) for round_ in rounds[: last + 1]) - len(rounds[last].gamma)
        for round_ in rounds[last - 3 : last + 1]:
            at, length = round_.start - 1, len(round_.emitted)
            if at >= first:
                alone._count(round_.choice, None, length, deep[at : at + length])
                counted += 1
    assert counted < len(rounds)
    np.testing.assert_array_equal(inner.counts, alone.counts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft_len": 0}, "draft_len .*at least 1, got 0"),
        ({"draft_len": 2, "prior": -1}, "prior must be a finite number of at least 0, got -1"),
        ({"draft_len": 2, "counts": np.zeros((2, 3, 1))}, r"counts .*shape \(2, 2, 1\), got \(2, 3, 1\)"),
        ({"draft_len": 2, "counts": -np.ones((2, 2, 1))}, "counts must be non-negative"),
    ],
)
def test_bad_corrections_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        nab.Corrected(nab.Selector(nab.Hedge(), 1), **options)


# --- lazy evaluation ---


class Noting(nab.Lazy):
    """Keeps what was played at each position."""

    played: tuple = ()
    asked: tuple = ()

    def observe(self, emitted, evaluate, **spent):
        self.played += (self.probs,) * emitted
        scores = super().observe(emitted, evaluate, **spent)
        self.asked += (scores is not None,)
        return scores


def decoded(selector, rounds=40):
    """Rounds of a real loop, and ``gamma`` and ``realised`` of its whole text."""
    done = list(islice(nab.decode(TARGET, POOL, selector, [0], draft_len=3, rng=5), rounds))
    text = (0, *(token for round_ in done for token in round_.emitted))
    p = TARGET.score(text[:-1], 1)
    return done, Evaluation(nab.Pool(POOL), nab.Levels([nab.Chain()]), text, 1, (p,))()


POOL = [DRAFTER, TARGET, Markov(np.full((3, 3), 1 / 3))]


@pytest.mark.parametrize("every", [1, 2, 5])
@pytest.mark.parametrize("objective", [nab.Token(), nab.Length(3)])
def test_a_lazy_selector_feeds_the_losses_of_an_eager_one_in_order_with_the_laws_played(every, objective):
    """Everything up to the last scored round, no loss changed, none lost, each with the law of its round."""
    inner = nab.Selector(Recorder(), 3, objective=objective, rng=0)
    lazy = Noting(inner, every=every)
    rounds, (gamma, realised) = decoded(lazy)
    scored = sum(len(r.emitted) for r in rounds[: len(rounds) // every * every])
    expected = objective(gamma[:scored], realised[:scored])
    assert len(inner.state) == len(expected)
    assert len({tuple(law) for law in lazy.played}) > 1  # the laws do change
    for t, (losses, law) in enumerate(inner.state):
        np.testing.assert_array_equal(losses, expected[t])
        np.testing.assert_array_equal(law, lazy.played[t])
    held = [np.empty((0, 3)) if r.gamma is None else r.gamma for r in rounds]
    np.testing.assert_array_equal(np.concatenate(held), gamma[:scored])


def test_a_lazy_selector_on_every_round_is_the_selector_itself():
    makers = [
        lambda: nab.Selector(nab.Hedge(), 3, rng=0),
        lambda: nab.Lazy(nab.Selector(nab.Hedge(), 3, rng=0)),
    ]
    eager, lazy = (decoded(make())[0] for make in makers)
    assert [(r.choice, r.emitted) for r in eager] == [(r.choice, r.emitted) for r in lazy]


def test_a_lazy_selector_that_forgets_what_waits_would_be_caught():
    class Forgetful(nab.Lazy):
        def observe(self, emitted, evaluate, **spent):
            self._waiting.clear()
            return super().observe(emitted, evaluate, **spent)

    inner = nab.Selector(Recorder(), 3, rng=0)
    _, (gamma, _) = decoded(Forgetful(inner, every=2))
    assert len(inner.state) < len(gamma)


@pytest.mark.parametrize("span", [1, 4, 7])
@pytest.mark.parametrize("objective", [nab.Token(), nab.Length(3)])
def test_a_lazy_selector_with_a_span_leaves_out_what_came_before(span, objective):
    """The last rounds of each wait are scored, as few as have ``span`` positions; no gap in a window."""
    inner = nab.Selector(Recorder(), 3, objective=objective, rng=0)
    lazy = Noting(inner, every=5, span=span)
    rounds, (gamma, realised) = decoded(lazy)
    expected = []
    for last in range(4, len(rounds), 5):
        lengths = [len(round_.emitted) for round_ in rounds[last - 4 : last + 1]]
        kept = next(k for k in range(1, 6) if k == 5 or sum(lengths[-k:]) >= span)
        stop = sum(len(round_.emitted) for round_ in rounds[: last + 1])
        start = stop - sum(lengths[-kept:])
        np.testing.assert_array_equal(rounds[last].gamma, gamma[start:stop])
        losses = objective(gamma[start:stop], realised[start:stop])
        expected += [(each, lazy.played[start + t]) for t, each in enumerate(losses)]
    assert len(expected) < len(gamma)
    for (losses, law), right in zip(inner.state, expected, strict=True):
        np.testing.assert_array_equal(losses, right[0])
        np.testing.assert_array_equal(law, right[1])


def test_windows_over_a_gap_would_be_caught(monkeypatch):
    scored = lambda self, emitted, evaluate: evaluate()  # noqa: E731
    monkeypatch.setattr(nab.Selector, "_scored", scored)
    with pytest.raises((AssertionError, ValueError)):
        test_a_lazy_selector_with_a_span_leaves_out_what_came_before(4, nab.Length(3))


def test_what_waits_for_its_window_survives_saving_and_goes_at_a_gap():
    """Restored between two scorings, a selector still knows what was skipped."""
    gamma = np.array([[0.9, 0.4]])
    make = partial(nab.Selector, Recorder2(), 2, objective=nab.Length(2), rng=0)
    selector, other = make(), make()
    selector.observe(1, lambda: (gamma, gamma))
    selector.skip(3)
    other.load_state_dict(json.loads(json.dumps(selector.state_dict())))
    for each in (selector, other):
        each.observe(1, lambda: (gamma, gamma))
        assert each.state == ()  # one position behind the gap, and the one before it is gone
        each.observe(1, lambda: (gamma, gamma))
        assert len(each.state) == 1


def test_between_scorings_the_choice_is_drawn_anew_from_the_law_in_force():
    """Exactly: all paths of four choices have the product of the law's masses."""
    gamma = np.array([[0.9, 0.4]])

    def run(rng):
        selector = nab.Selector(nab.Hedge(rate=1.0), 2, rng=rng)
        lazy = nab.Lazy(selector, every=4)
        choices = [lazy.choice]
        for _ in range(3):
            lazy.observe(1, Joined(gamma))
            choices.append(lazy.choice)
        return tuple(choices)

    paths = list(outcomes(run))
    assert len(paths) == 16
    assert all(mass == pytest.approx(1 / 16, abs=1e-15) for _, mass in paths)


class Joined:
    def __init__(self, scores):
        self.scores = scores

    def __add__(self, later):
        return Joined(np.concatenate([self.scores, later.scores]))

    def __call__(self):
        return self.scores, self.scores


def asked_rounds(better, **options):
    """Rounds behind which all were scored; ``better`` says by round which of two drafters is right."""
    lazy = Noting(nab.Selector(nab.Hedge(rate=5.0), 2, rng=0), **options)
    for first in better:
        lazy.observe(1, Joined(np.array([[1.0, 0.0] if first else [0.0, 1.0]])))
    return [k for k, asked in enumerate(lazy.asked, 1) if asked]


def test_waits_double_while_one_leads_up_to_a_cap_and_start_again_when_another_does():
    assert asked_rounds([True] * 40, every=2) == list(range(2, 41, 2))
    assert asked_rounds([True] * 70, every=2, above=0.9, most=16) == [2, 6, 14, 30, 46, 62]
    turn = [True] * 30 + [False] * 40
    assert asked_rounds(turn, every=1, above=0.9, most=8) == [1, 3, 7, 15, 23, 31, 39, 47, 55, 63, 64, 66, 70]
    assert asked_rounds([True, False] * 10, every=1, above=0.999) == list(range(1, 21))


def test_corrections_of_a_lazy_selector_are_those_of_an_eager_one():
    """On the same rounds: the selector inside is a constant law, so that choices do not depend on losses."""
    counts = []
    for every in (1, 4):
        corrected = nab.Corrected(nab.Selector(Recorder2(), 2, objective=nab.Length(3), rng=3), 3)
        lazy = nab.Lazy(corrected, every=every)
        rounds = nab.decode(TARGET, [DRAFTER, TARGET], lazy, [0], draft_len=3, rng=2)
        choices = [round_.choice for round_ in islice(rounds, 40)]
        counts.append((choices, corrected.counts.tolist()))
    assert counts[0] == counts[1]
    assert np.sum(counts[0][1]) > 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be a whole number, at least 1, got 0"),
        ({"every": 8, "most": 7}, "most must be a whole number, at least 8, got 7"),
        ({"span": 0}, "span must be a whole number, at least 1, got 0"),
        ({"above": 0.0}, r"above must lie in \(0, 1\], got 0.0"),
    ],
)
def test_bad_laziness_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        nab.Lazy(nab.Selector(nab.Hedge(), 2), **options)
    with pytest.raises(ValueError, match="selector must be one that can skip rounds, got Constant"):
        nab.Lazy(nab.Constant([1.0]))
