"""Decoding through torch is lossless for every scheme: greedy texts token by token, sampled ones in law."""

from copy import deepcopy
from functools import cache
from itertools import product

import numpy as np
import pytest
import tiny
import torch
from enumeration import outcomes
from test_heads import head_model
from test_schemes import SoftmaxOfCertain

import nab
from nab import audit, sampling
from nab.acceptance import Chain, MultiDraft, TopK, WithoutReplacement
from nab.backends import chains
from nab.backends.cache import Tree, TreeCache
from nab.backends.drafters import Lookup, NGram
from nab.backends.heads import Head
from nab.backends.torch import CausalLM, Lifted, Warper, early_exit
from nab.schemes import DynamicTree, Levels, StaticTree

GREEDY, LENGTH = Warper(temperature=0), 18
SHAPE = [(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 1, 0), (0, 0, 0, 0)]
CHAINS = {"chain of 1": Levels([Chain()]), "chain of 4": Levels([Chain()] * 4)}
TREES = {
    "three drafts, then chains": Levels([MultiDraft(3), Chain(), Chain(), Chain()]),
    "without replacement": Levels([WithoutReplacement(2, 0), WithoutReplacement(2, 0), Chain()]),
    "complete tree": Levels([TopK(3), TopK(2), TopK(1)]),
    "static tree": StaticTree(SHAPE),
    "dynamic tree": DynamicTree(3, 10, 4),
}
SCHEMES = CHAINS | TREES
LONG_SCHEMES = [name for name in SCHEMES if name != "chain of 1"]
every_architecture = pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
every_scheme = pytest.mark.parametrize("name", SCHEMES)

LONG = np.random.default_rng(0).integers(0, tiny.VOCAB, 40).tolist()  # longer than the sliding windows
PROMPTS = {"one token": [7], "long": LONG}  # the answer to the first outgrows the windows


@cache
def models(architecture):
    """The target; copies of it that agree often and seldom, and its first two layers; a head."""
    model = tiny.ARCHITECTURES[architecture]()
    copies = tiny.perturbed(model, 0.015), tiny.perturbed(model, 0.5)
    return model, (*copies, early_exit(model, 2)), head_model(model)


def players(architecture, name):
    """The target, and drafters of all kinds; those of trees keep a softmax, for their second choices."""
    (model, neural, head), warper = models(architecture), GREEDY if name in CHAINS else Warper(0.5)
    target, lookup = CausalLM(model, GREEDY), Lookup(tiny.VOCAB)
    tables = lookup, NGram.fit([np.array(LONG)] * 2, tiny.VOCAB)
    return target, [
        *(CausalLM(copy, warper) for copy in neural),
        *(Lifted(table, warper, torch.device("cpu"), torch.float64) for table in tables),
        Head(head, target, warper),
    ]


def answer(target, drafters, name, prompt, *, seed=0, exact=False, **end):
    """Rounds under a learner whose first choice depends on the seed."""
    scheme, selector = deepcopy(SCHEMES[name]), nab.Selector(nab.NormalHedge(), len(drafters), rng=seed)
    options = {"draft_len": scheme.draft_len, "scheme": scheme, "exact": exact, "rng": seed}
    rounds = nab.decode(target, drafters, selector, PROMPTS[prompt], **options)
    return list(nab.until(rounds, **{"max_new_tokens": LENGTH, **end}))


def text(rounds):
    return [token for round_ in rounds for token in round_.emitted]


@cache
def plain(architecture, prompt):
    """The text without drafts."""
    target = CausalLM(models(architecture)[0], GREEDY)
    rounds = nab.decode(target, [], nab.Constant([1.0]), PROMPTS[prompt], draft_len=0)
    return text(nab.until(rounds, max_new_tokens=LENGTH))


def generated(architecture, prompt, stop=None):
    """The text of transformers' own greedy decoding."""
    with torch.inference_mode():
        ids = torch.tensor([PROMPTS[prompt]])
        found = models(architecture)[0].generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=LENGTH, do_sample=False,
            eos_token_id=stop, pad_token_id=0,
        )  # fmt: skip
    return found[0, ids.shape[1] :].tolist()


def check(architecture, name, prompts=tuple(PROMPTS), **options):
    """Queries in turn with the same model objects have the texts of plain decoding; the rounds of each."""
    target, drafters = players(architecture, name)
    found = []
    for seed, prompt in enumerate(prompts, 4):
        found.append(answer(target, drafters, name, prompt, seed=seed, **options))
        assert text(found[-1]) == plain(architecture, prompt)
    return found


@pytest.fixture
def forks(monkeypatch):
    """Accepted nodes that are not the first child of their parents, of all rounds to come."""
    honest, found = nab.decode.__globals__["verify"], []

    def watched(p, draft, uniforms):
        verdict = honest(p, draft, uniforms)
        found.extend(node for node in verdict.path if draft.parents.index(draft.parents[node]) != node)
        return verdict

    monkeypatch.setitem(nab.decode.__globals__, "verify", watched)
    return found


@every_architecture
@pytest.mark.parametrize("prompt", PROMPTS)
def test_plain_decoding_is_transformers_greedy(architecture, prompt):
    assert plain(architecture, prompt) == generated(architecture, prompt)
    assert len(set(plain(architecture, prompt))) > LENGTH / 2


@every_architecture
@every_scheme
def test_greedy_text_equals_plain_decoding(architecture, name, forks):
    """Drafters of all kinds switch within a query; drafts and, in trees, second choices are accepted."""
    queries = check(architecture, name)
    assert all(len({round_.choice for round_ in rounds}) > 1 for rounds in queries)
    lengths = [round_.accepted for rounds in queries for round_ in rounds]
    assert np.mean(lengths) > (SCHEMES[name].draft_len > 1)
    assert bool(forks) == (name in TREES)


@pytest.mark.parametrize("name", ["chain of 4", "without replacement", "static tree", "dynamic tree"])
def test_scores_by_depth_change_no_text(name):
    ((first, *_),) = check("llama", name, ["one token"], exact=True)
    assert first.gamma.shape[1:] == (SCHEMES[name].draft_len, 6)


@pytest.mark.parametrize("name", LONG_SCHEMES)
def test_an_end_inside_an_accepted_draft_cuts_there(name):
    """A stop token, and the limit; the last round then ends with a draft rather than the target's token."""
    (target, drafters), whole = players("llama", name), plain("llama", "long")
    rounds = answer(target, drafters, name, "long")
    drafted = [r.start - len(LONG) + k for r in rounds for k in range(r.accepted) if k + 1 < len(r.emitted)]
    place = next(at for at in drafted if whole.index(whole[at]) == at)
    for end in ({"stop_tokens": [whole[place]]}, {"max_new_tokens": place + 1}):
        cut = answer(target, drafters, name, "long", **end)
        assert text(cut) == whole[: place + 1]
        assert cut[-1].accepted == len(cut[-1].emitted)
    assert generated("llama", "long", stop=whole[place]) == whole[: place + 1]


class Failing:
    """A drafter that raises at its third call, when it has read the text already."""

    def __init__(self, model):
        self.model, self.calls = model, 0

    def score(self, *question):
        self.calls += 1
        laws = self.model.score(*question)
        if self.calls == 3:
            raise RuntimeError("out of memory")
        return laws


@every_scheme
def test_a_drafter_benched_in_the_middle_changes_no_text(name):
    """It is chosen first and fails while it drafts or is scored; it is back in the next query."""
    target, (good, *others) = players("llama", name)
    pool = nab.Pool([*others, failing := Failing(good)])
    with pytest.warns(nab.DrafterWarning, match="out of memory"):
        rounds = answer(target, pool, name, "long", seed=4)
    assert text(rounds) == plain("llama", "long")
    assert pool.benched.keys() == {rounds[0].choice} == {len(others)}
    assert text(answer(target, [*others, failing], name, "one token")) == plain("llama", "one token")
    assert failing.calls > 4


def shifted(*question):
    """The target's laws, behind the wrong nodes."""
    rows = sampling.scored(*question)
    return rows[[0, *range(len(rows) - 1)]]


def agreeing_with_the_node_before(draft, logits, honest=chains.agreed):
    return honest(draft, logits.roll(1, 1))


def siblings_see_each_other(tree, rows, window=None):
    return torch.ones(len(rows), rows.stop).tril(rows.start) > 0


def keeps_the_first_branch(cache, place, found, honest=TreeCache._keep):
    """Whatever path was accepted."""
    return honest(cache, place, list(range(place, place + len(found))))


@pytest.mark.parametrize(
    ("owner", "function", "broken", "names"),
    [
        (Tree, "visible", siblings_see_each_other, TREES),
        (Tree, "positions", lambda tree, rows: torch.arange(rows.start, rows.stop), TREES),
        (TreeCache, "_keep", keeps_the_first_branch, TREES),
        (nab.decode.__globals__, "scored", shifted, TREES),
        (chains, "agreed", agreeing_with_the_node_before, ["chain of 4"]),
    ],
    ids=[
        "siblings see each other",
        "positions count entries",
        "the first branch is kept",
        "wrong node",
        "wrong node of a chain",
    ],
)
def test_the_same_check_rejects_the_broken_twin(owner, function, broken, names, monkeypatch):
    plain("llama", "one token")  # before anything breaks
    patch = monkeypatch.setitem if isinstance(owner, dict) else monkeypatch.setattr
    patch(owner, function, broken)
    for name in names:
        with pytest.raises((AssertionError, nab.DrafterWarning)):  # its evaluation may see it first
            check("llama", name, ["one token"])


# --- sampled texts ---


VOCAB, WORD, START = 3, 2, 1
WORDS = list(product(range(VOCAB), repeat=WORD))

stays = {"without": lambda law, token: law}
from_p = {"residual": lambda p, q: p}
SAMPLED = {
    "chain": Levels([Chain()] * 2),
    "two drafts": Levels([MultiDraft(2)]),
    "without replacement": Levels([WithoutReplacement(2)]),
    "complete tree": Levels([TopK(2), TopK(1)]),
    "static tree": StaticTree([(0,), (1,), (0, 0)]),
    "dynamic tree": DynamicTree(2, 3, 2),
}
TWINS = {  # a scheme, and what is broken in verification
    "chain, recovered from p": (SAMPLED["chain"], from_p),
    "two drafts, each tested against p": (SAMPLED["two drafts"], from_p),
    "without replacement, each tested against p": (SAMPLED["without replacement"], from_p),
    "complete tree, softmax as its law": (Levels([SoftmaxOfCertain(2), SoftmaxOfCertain(1)]), {}),
    "static tree, rejected tokens stay": (SAMPLED["static tree"], stays),
    "dynamic tree, rejected tokens stay": (SAMPLED["dynamic tree"], stays),
}


class Remembered:
    """A model that is asked each question once; its cache is the subject of the tests above."""

    def __init__(self, model):
        self._score = cache(model.score)

    def score(self, tokens, start, parents=()):
        return self._score(tuple(tokens), start, tuple(parents))


@cache
def pair():
    """A target, and a drafter so unlike it that every twin is far off."""
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    options = {"vocab_size": VOCAB, "num_key_value_heads": 1, "initializer_range": 1.0, "eos_token_id": None}
    return [Remembered(CausalLM(tiny.llama(seed, **shape, **options))) for seed in (0, 6)]


def decoded(scheme, context, rng):
    target, drafter = pair()
    options = {"draft_len": scheme.draft_len, "scheme": scheme, "rng": rng}
    return nab.decode(target, [drafter], nab.Constant([1.0]), context, **options)


def enumerated(scheme, context=(START,), length=WORD):
    """The exact law of answers, as a dict; a round depends on the text alone, not on rounds before it."""
    if length == 0:
        return {(): 1.0}
    law = {}
    rounds = outcomes(lambda rng: next(decoded(scheme, context, rng)).emitted[:length])
    for word, probability in rounds:
        law[word] = law.get(word, 0) + probability
    whole = {}
    for word, probability in law.items():
        for rest, mass in enumerated(scheme, (*context, *word), length - len(word)).items():
            whole[word + rest] = whole.get(word + rest, 0) + probability * mass
    return whole


def exact_law(scheme):
    found = enumerated(scheme)
    return np.array([found.get(word, 0.0) for word in WORDS])


def audited(scheme):
    """Answers of two rounds at least."""
    target, drafter = pair()

    def generate(prompt, seed):
        return text(nab.until(decoded(scheme, prompt, seed), max_new_tokens=2 * WORD))

    options = {"max_new_tokens": 2 * WORD, "drafters": [drafter], "error": 0.1, "rng": 0}
    return audit.sampling(generate, target, [[START]], **options)


def target_law():
    """By plain scoring, ``(words,)``."""
    target, steps = pair()[0], range(WORD)
    laws = [target.score([START, *word[:-1]], 1) for word in WORDS]
    return np.array(
        [np.prod([law[k, word[k]] for k in steps]) for law, word in zip(laws, WORDS, strict=True)]
    )


def distance(law, other):
    return np.abs(law - other).sum()


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_answers_have_the_targets_law(name):
    """Exactly, by enumeration of all rounds; and a sample passes the audit."""
    assert distance(exact_law(SAMPLED[name]), target_law()) < 1e-12
    assert audited(SAMPLED[name]).passed


@pytest.mark.parametrize("name", TWINS)
def test_both_reject_the_broken_twin(name, monkeypatch):
    twin, changes = TWINS[name]
    for function, broken in changes.items():
        monkeypatch.setattr(sampling, function, broken)
    assert distance(exact_law(twin), target_law()) > 1e-3
    assert not audited(twin).accepted
