"""Every scheme is lossless and scored exactly, by enumeration of its rounds; each has a twin that is not."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from enumeration import outcomes
from hypothesis import given
from hypothesis import strategies as st
from test_acceptance import laws

import nab
from nab import sampling
from nab.acceptance import Chain, Greedy, MultiDraft, TopK, WithoutReplacement
from nab.decode import Evaluation
from nab.losses import expected_length
from nab.sampling import Child, verify
from nab.schemes import DynamicTree, Levels, StaticTree
from nab.sim import Markov

RNG = np.random.default_rng(20251125)


def model(vocab, sparse=False):
    table = RNG.dirichlet(np.ones(vocab), size=vocab)
    if sparse:  # tokens that are never drafted, and nothing to propose behind token 2
        table[0, 1] = table[2] = 0
        table[0] /= table[0].sum()
    return Markov(table)


def greedy(of):
    return Markov(np.eye(len(of.table))[of.table.argmax(-1)])


MODELS = {
    "3 tokens": (model(3), model(3)),
    "3 tokens, sparse drafter": (model(3), model(3, sparse=True)),
    "4 tokens": (model(4), model(4)),
    "4 tokens, equal drafter": (same := model(4), same),
    "4 tokens, greedy target": (greedy(model(4)), model(4)),
}
SHAPE = [(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]
SCHEMES = {
    "chain": Levels([Chain()] * 3),
    "lookup": Levels([TopK(1)] * 3),
    "two drafts, then chains": Levels([MultiDraft(2), Chain()]),
    "three drafts": Levels([MultiDraft(3)]),
    "sampled tree": Levels([MultiDraft(2), MultiDraft(2)]),
    "without replacement": Levels([WithoutReplacement(2), Chain()]),
    "three without replacement": Levels([WithoutReplacement(3)]),
    "complete tree": Levels([TopK(2), TopK(2), TopK(1)]),
    "static tree": StaticTree(SHAPE),
    "dynamic tree": DynamicTree(2, 4, 3),
}
every_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
CASES = {
    f"{scheme}, {models}": (SCHEMES[scheme], *MODELS[models])
    for scheme in SCHEMES
    for models in MODELS
    if scheme != "sampled tree" or models.startswith("3")  # its enumeration grows with the sixth power
}


def exact_rules(scheme):
    """Whether ``realised`` and ``gamma`` are values rather than estimates."""
    return not any(isinstance(rule, WithoutReplacement) for rule in getattr(scheme, "rules", ()))


# estimates have a test of their own
EXACT_CASES = {name: case for name, case in CASES.items() if exact_rules(case[0])}
EXACT_SCHEMES = {name: scheme for name, scheme in SCHEMES.items() if exact_rules(scheme)}
every_exact_case = pytest.mark.parametrize(
    ("scheme", "target", "drafter"), EXACT_CASES.values(), ids=EXACT_CASES.keys()
)
every_exact_scheme = pytest.mark.parametrize("scheme", EXACT_SCHEMES.values(), ids=EXACT_SCHEMES.keys())
every_case = pytest.mark.parametrize(("scheme", "target", "drafter"), CASES.values(), ids=CASES.keys())


def words(target, length, first=0):
    """The target's law of ``length`` tokens behind ``first``."""
    table = target.table
    return {
        word: float(np.prod([table[a, b] for a, b in zip((first, *word), word, strict=False)]))
        for word in product(range(len(table)), repeat=length)
    }


def rounds(target, drafter, scheme, first=0):
    """The enumerated first rounds: ``(Round, probability)``."""

    def run(rng):
        selector, length = nab.Constant([1.0]), scheme.draft_len
        return next(
            nab.decode(target, [drafter], selector, [first], draft_len=length, scheme=scheme, rng=rng)
        )

    return list(outcomes(run))


def continued(target, found, length, first=0):
    """Law of ``(word, accepted)`` when the target itself goes on behind the round."""
    law = {}
    for round_, probability in found:
        emitted = round_.emitted[:length]
        for rest, mass in words(target, length - len(emitted), (first, *emitted)[-1]).items():
            key = (*emitted, *rest), round_.accepted
            law[key] = law.get(key, 0) + probability * mass
    return law


def error(target, drafter, scheme, first=0):
    """Distance of a round's law to the target's; rounds that start anywhere have it, so texts have it."""
    expected = words(target, scheme.draft_len + 1, first)
    found = dict.fromkeys(expected, 0.0)
    law = continued(target, rounds(target, drafter, scheme, first), scheme.draft_len + 1, first)
    for (word, _), mass in law.items():
        found[word] += mass
    return max(abs(found[word] - expected[word]) for word in expected)


@every_case
def test_a_round_emits_exactly_the_targets_law_from_everywhere(scheme, target, drafter):
    for first in range(len(target.table) if scheme.nodes < 6 else 1):
        assert error(target, drafter, scheme, first) < 1e-12


TWICE = {
    "two drafts": Levels([MultiDraft(2)]),
    "two without replacement": Levels([WithoutReplacement(2, 0)]),
    "static tree": SCHEMES["static tree"],
    "dynamic tree": SCHEMES["dynamic tree"],
}


@pytest.mark.parametrize("scheme", TWICE.values(), ids=TWICE.keys())
def test_texts_of_several_rounds_have_it_under_a_learner(scheme):
    """Two drafters of which a learner chooses, and as many rounds as two tokens take."""
    target, drafter = MODELS["3 tokens"]
    other = Markov(np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))

    def run(rng):
        selector = nab.Selector(nab.Hedge(rate=2.0), 2, rng=rng)
        pool, length = [drafter, other], scheme.draft_len
        fresh = Levels([WithoutReplacement(2, 0)]) if scheme is TWICE["two without replacement"] else scheme
        text = nab.decode(target, pool, selector, [0], draft_len=length, scheme=fresh, rng=rng)
        return tuple(t for r in nab.until(text, max_new_tokens=2) for t in r.emitted)

    found = dict.fromkeys(words(target, 2), 0.0)
    for word, probability in outcomes(run):
        found[word] += probability
    assert max(abs(found[word] - mass) for word, mass in words(target, 2).items()) < 1e-12


# --- each scheme's broken twin ---


class SoftmaxOfCertain(TopK):
    """Deterministic drafts that claim to be drawn from the drafter's law."""

    def children(self, q, uniforms):
        return [Child(child.token, q) for child in super().children(q, uniforms)]


class ForgetsSiblings(WithoutReplacement):
    """Drafts without replacement that claim to be drawn with it."""

    def children(self, q, uniforms):
        return [Child(child.token, q) for child in super().children(q, uniforms)]


class BestOfSeen(MultiDraft):
    """Keeps the likelier of its draws: looking at draws changes their law."""

    def children(self, q, uniforms):
        return sorted(super().children(q, uniforms), key=lambda child: -q[child.token])[:1]


TWINS = {
    "chain, recovered from p": (SCHEMES["chain"], {"residual": lambda p, q: p}),
    "lookup, recovered from p": (SCHEMES["lookup"], {"without": lambda law, token: law}),
    "lookup, softmax as its law": (Levels([SoftmaxOfCertain(1)] * 2), {}),
    "drafts, each tested against p": (SCHEMES["three drafts"], {"residual": lambda p, q: p}),
    "drafts, the best of those seen": (Levels([BestOfSeen(2)]), {}),
    "sampled tree, each tested against p": (SCHEMES["sampled tree"], {"residual": lambda p, q: p}),
    "without replacement, with the law of with": (Levels([ForgetsSiblings(3)]), {}),
    "complete tree, softmax as its law": (Levels([SoftmaxOfCertain(2)] * 2), {}),
    "static tree, rejected tokens stay": (SCHEMES["static tree"], {"without": lambda law, token: law}),
    "dynamic tree, rejected tokens stay": (SCHEMES["dynamic tree"], {"without": lambda law, token: law}),
}


@pytest.mark.parametrize("name", TWINS)
def test_the_same_enumeration_rejects_the_broken_twin(name, monkeypatch):
    scheme, changes = TWINS[name]
    for function, broken in changes.items():
        monkeypatch.setattr(sampling, function, broken)
    tried = [MODELS["3 tokens"], *[MODELS["4 tokens"]] * (scheme.nodes < 6)]
    assert any(error(*models, scheme, first) > 1e-3 for models in tried for first in range(3))


@every_scheme
def test_it_rejects_laws_of_the_wrong_node(scheme, monkeypatch):
    """For greedy targets too, whose text any residual keeps."""

    def shifted(*question):
        rows = sampling.scored(*question)
        return rows[[0, *range(len(rows) - 1)]]

    monkeypatch.setitem(nab.decode.__globals__, "scored", shifted)
    for name in ("4 tokens, greedy target", "3 tokens")[: 2 if scheme.nodes < 6 else 1]:
        target, drafter = MODELS[name]
        assert any(error(target, drafter, scheme, first) > 1e-3 for first in range(len(target.table)))


# --- what a scheme says of its acceptance ---


def scores(scheme, target, drafter, word, *, first=0, exact=True, split=None):
    """``gamma`` and ``realised`` of a text, ``(positions, depths)``, scored in one or in two parts."""
    tokens, pool = (first, *word), nab.Pool([drafter])
    parts = [(1, len(tokens))] if split is None else [(1, split), (split, len(tokens))]
    found = []
    for start, end in parts:
        p = target.score(tokens[: end - 1], start)
        found.append(Evaluation(pool, scheme, tokens[:end], start, (p,), 1, exact)())
    gamma, realised = (np.concatenate(each)[..., 0] for each in zip(*found, strict=True))
    return gamma, realised


@every_exact_case
def test_realised_is_what_the_text_tells_of_acceptance(scheme, target, drafter):
    """Given the text, the first k tokens are accepted with probability ``prod_j realised[j, j]``."""
    length = scheme.draft_len
    law = continued(target, rounds(target, drafter, scheme), length)
    for word, mass in words(target, length).items():
        if mass == 0:
            continue
        _, realised = scores(scheme, target, drafter, word)
        reached = 1.0
        for k in range(1, length + 1):
            reached *= realised[k - 1, k - 1]
            found = sum(probability for (text, accepted), probability in law.items()
                        if text == word and accepted >= k)  # fmt: skip
            assert found / mass == pytest.approx(reached, abs=1e-12)


@every_exact_case
def test_gamma_is_the_mean_of_realised_and_the_expected_length_is_a_rounds(scheme, target, drafter):
    length, expected = scheme.draft_len, 0.0
    for word, mass in words(target, length).items():
        if mass == 0:
            continue
        gamma, realised = scores(scheme, target, drafter, word)
        expected += mass * expected_length(gamma[..., None], realised[..., None], length)[0, 0]
        for k in range(length):
            last = (0, *word)[k]
            mean = sum(
                target.table[last, x] * scores(scheme, target, drafter, (*word[:k], x))[1][k, k]
                for x in range(len(target.table)) if target.table[last, x] > 0
            )  # fmt: skip
            assert gamma[k, k] == pytest.approx(mean, abs=1e-12)
    brute = sum(p * len(round_.emitted) for round_, p in rounds(target, drafter, scheme))
    assert expected == pytest.approx(brute, abs=1e-12)


@pytest.mark.parametrize("scheme", [SCHEMES["three without replacement"], SCHEMES["without replacement"]])
def test_estimates_without_replacement_are_unbiased(scheme):
    target, drafter = MODELS["3 tokens"]
    length, expected = scheme.draft_len, 0.0
    for word, mass in words(target, length).items():

        def estimated(rng, word=word):
            rules = [replace(rule, rng=rng) if rule.width > 1 else rule for rule in scheme.rules]
            gamma, realised = scores(Levels(rules), target, drafter, word)
            assert ((gamma >= 0) & (gamma <= 1)).all()
            return float(expected_length(gamma[..., None], realised[..., None], length)[0, 0])

        expected += mass * sum(value * probability for value, probability in outcomes(estimated))
    brute = sum(p * len(round_.emitted) for round_, p in rounds(target, drafter, scheme))
    assert expected == pytest.approx(brute, abs=1e-12)


RULES = {
    "chain": Chain(),
    "two drafts": MultiDraft(2),
    "three drafts": MultiDraft(3),
    "two without replacement": WithoutReplacement(2),
    "three without replacement": WithoutReplacement(3),
    "top-1": TopK(1),
    "top-3": TopK(3),
}


@pytest.mark.parametrize("name", RULES)
@given(laws(rows=1, vocab=4), laws(rows=1, vocab=4))
def test_a_rule_against_the_enumeration_of_one_position(name, p, q):
    """Joint law of the token and of whether a draft carried it; means of estimates over what they draw."""
    rule, (p,), (q,) = RULES[name], p, q
    carried, emitted = np.zeros((2, 4))

    def run(rng):
        children = rule.children(q, rng.random(rule.width))
        draft = sampling.Draft([c.token for c in children], [-1] * len(children), [c.q for c in children])
        path, token = verify([p] * (len(children) + 1), draft, rng.random(rule.width + 1))
        return (draft.tokens[path[0]], True) if path else (token, False)

    for (token, accepted), probability in outcomes(run):
        emitted[token] += probability
        carried[token] += probability * accepted
    np.testing.assert_allclose(emitted, p, atol=1e-12)
    assert mean_of(rule, "probability", p, q) == pytest.approx(carried.sum(), abs=1e-12)
    for token in p.nonzero()[0]:
        assert mean_of(rule, "realised", p, q, token) == pytest.approx(carried[token] / p[token], abs=1e-12)


def mean_of(rule, method, *arguments):
    if not isinstance(rule, WithoutReplacement):
        return float(getattr(rule, method)(*arguments))
    drawn = outcomes(lambda rng: float(getattr(WithoutReplacement(rule.m, rng), method)(*arguments)))
    return sum(value * probability for value, probability in drawn)


@given(laws(rows=1, vocab=4), st.integers(1, 3))
def test_greedy_on_a_greedy_target(q, k):
    for best in range(4):
        p = np.eye(4)[best]
        assert Greedy(k).probability(p, q[0]) == TopK(k).probability(p, q[0])
        assert Greedy(k).children(q[0], ()) == TopK(k).children(q[0], ())


@every_exact_scheme
def test_scores_come_out_alike_in_one_piece_and_in_several(scheme):
    target, drafter = MODELS["4 tokens"]
    word = (2, 1, 3, 0, 0, 1)
    meant = np.arange(6)[:, None] >= np.arange(scheme.draft_len)  # others are about rounds before the text
    for split in (2, 4, 6):
        for whole, parts in zip(
            scores(scheme, target, drafter, word),
            scores(scheme, target, drafter, word, split=split),
            strict=True,
        ):
            np.testing.assert_array_equal(np.where(meant, whole, 0), np.where(meant, parts, 0))


@pytest.mark.parametrize(
    "name", ["chain", "lookup", "two drafts, then chains", "sampled tree", "complete tree"]
)
def test_one_forward_tells_all_where_a_rule_serves_a_level(name):
    target, drafter = MODELS["4 tokens"]
    word, scheme = (2, 1, 3, 0, 0, 1), SCHEMES[name]
    for exact, outline in zip(
        scores(scheme, target, drafter, word),
        scores(scheme, target, drafter, word, exact=False),
        strict=True,
    ):
        np.testing.assert_array_equal(exact, outline if outline.ndim == 2 else outline[:, None] + 0 * exact)


# --- shapes ---


def test_a_dynamic_tree_keeps_the_likeliest_nodes():
    table = np.array([[0.1, 0.6, 0.3], [0.05, 0.05, 0.9], [0.2, 0.3, 0.5]])
    draft = DynamicTree(2, 4, 2).propose(Markov(table), [0], 3)
    # 1: .6, 1 2: .54, 2: .3, 2 2: .15, 2 1: .09, 1 0: .03
    assert [(*draft.tokens,), (*draft.parents,)] == [(1, 2, 2, 2), (-1, -1, 0, 1)]
    narrow = DynamicTree(1, 9, 3).propose(Markov(table), [0], 3)
    assert narrow.is_chain
    assert narrow.tokens == [1, 2, 2]


def test_a_dynamic_tree_expands_the_likeliest_nodes_of_a_level():
    """Against a tree that grows everywhere and is then cut: by hand, level by level."""
    table = np.random.default_rng(3).dirichlet(np.ones(4), size=4)
    draft = DynamicTree(2, 9, 3).propose(Markov(table), [0], 4)
    levels, found = [[((), 1.0)]], []
    for _ in range(3):
        grown = []
        for path, mass in levels[-1]:
            last = (0, *path)[-1]
            likeliest = sorted(range(4), key=lambda x: -table[last, x])[:2]
            grown += [((*path, x), mass * table[last, x]) for x in likeliest]
        found += grown
        levels.append(sorted(grown, key=lambda node: -node[1])[:2])
    kept = {path for path, _ in sorted(found, key=lambda node: -node[1])[:9]}
    paths = [()] * 9
    for node, (token, parent) in enumerate(zip(draft.tokens, draft.parents, strict=True)):
        paths[node] = (*(paths[parent] if parent >= 0 else ()), token)
    assert set(paths) == kept
    assert len({path[:2] for path in paths if len(path) == 3}) == 2  # of the four there are


def test_rounds_before_the_answer_are_not_drafted_again():
    """A model of order 2 has no law behind a single token."""
    table = np.random.default_rng(0).dirichlet(np.ones(3), size=(3, 3))
    model, scheme = Markov(table), DynamicTree(2, 3, 3)
    rounds = nab.decode(
        model, [model], nab.Selector(nab.Hedge(), 1, rng=0), [0, 1], draft_len=3, scheme=scheme, exact=True
    )
    assert sum(len(r.gamma) for r in nab.until(rounds, max_new_tokens=9)) == 9


def test_a_certain_path_outlives_its_width():
    """Children as likely as their parents never push these out."""
    certain = Markov(np.eye(3)[[1, 2, 0]])
    draft = DynamicTree(3, 2, 4).propose(certain, [0], 3)
    assert (draft.tokens, draft.parents) == ([1, 2], [-1, 0])


def test_a_static_tree_has_its_shape_unless_the_drafter_runs_out():
    uniform = Markov(np.full((4, 4), 0.25))
    draft = StaticTree(SHAPE).propose(uniform, [3], 4)
    assert draft.tokens == [0, 1, 2, 0, 1, 0, 0]
    assert draft.parents == [-1, -1, -1, 0, 0, 1, 3]
    single = StaticTree(SHAPE).propose(Markov(np.eye(4)), [3], 4)
    assert (single.tokens, single.parents) == ([3, 3, 3], [-1, 0, 1])


def test_levels_count_their_nodes():
    assert Levels([MultiDraft(3), TopK(2), Chain()]).nodes == 3 + 6 + 6
    assert Levels([]).nodes == 0
    assert Levels([Chain()] * 4).draft_len == 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Levels([TopK(9)] * 4), "9 x 9 x 9 x 9 has 7380 nodes, at most 4096"),
        (lambda: Levels([Chain()] * 5000), "1 x 1 x 1 x 1 x 1 x 1 x 1 x 1 x ... has 5000 nodes"),
        (lambda: StaticTree([(0,), (0,)]), "must be different"),
        (lambda: StaticTree([]), "one at least"),
        (lambda: StaticTree([(1,)]), r"path \(1,\) needs .*\(0,\)"),
        (lambda: StaticTree([(0,), (1, 0)]), r"path \(1, 0\) needs \(1,\)"),
        (lambda: StaticTree([(0,), (0, -1)]), r"ranks from 0 on, at least one, got \(0, -1\)"),
        (lambda: StaticTree([()]), r"ranks from 0 on, at least one, got \(\)"),
        (lambda: StaticTree([(0.0,)]), r"ranks from 0 on, at least one, got \(0.0,\)"),
        (lambda: StaticTree([0, 1]), "ranks from 0 on, at least one, got 0"),
        (lambda: StaticTree("01"), "ranks from 0 on, at least one, got '0'"),
        (lambda: DynamicTree(2.5, 4, 2), "width must be a whole number, got 2.5"),
        (lambda: DynamicTree(2, True, 2), "nodes must be a whole number, got True"),
        (lambda: DynamicTree(100, 8, 2), "width 100, 2 levels and 8 kept nodes grows 10100: at most 4096"),
        (lambda: DynamicTree(2, 5000, 2), "5000 kept nodes grows 6: at most 4096"),
        (lambda: MultiDraft(2.0), "m must be a whole number, got 2.0"),
        (lambda: DynamicTree(0, 1, 1), "width must be at least 1, got 0"),
        (lambda: DynamicTree(1, 0, 1), "nodes must be at least 1, got 0"),
        (lambda: DynamicTree(1, 1, 0), "draft_len must be at least 1, got 0"),
        (lambda: MultiDraft(0), "m must be at least 1, got 0"),
        (lambda: WithoutReplacement(-1), "m must be at least 1, got -1"),
        (
            lambda: next(
                nab.decode(
                    *(MODELS["3 tokens"][0], [MODELS["3 tokens"][1]], nab.Constant([1.0]), [0]),
                    draft_len=2,
                    scheme=SCHEMES["chain"],
                )
            ),
            "draft_len is 2, but the scheme drafts 3 levels",
        ),
    ],
)
def test_bad_shapes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
