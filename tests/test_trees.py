"""Trees of draft tokens: every row is the law given its path, whatever the cache held, and little is fed."""

import numpy as np
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import BloomConfig, BloomForCausalLM

from nab.backends.cache import Tree, common_prefix
from nab.backends.drafters import Lookup, NGram
from nab.backends.torch import CausalLM, Lifted, Warper
from nab.sampling import paths

every_architecture = pytest.mark.parametrize(
    "make", tiny.ARCHITECTURES.values(), ids=tiny.ARCHITECTURES.keys()
)
given_seed = given(seed=st.integers(0, 2**32))
few = settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])


def random_parents(rng, chain, nodes):
    """Mostly near the end of the chain and among the nodes; some hang from far back."""
    lowest = [-chain if rng.random() < 0.2 else -min(chain, 3) for _ in range(nodes)]
    return [int(rng.integers(low, node)) for node, low in enumerate(lowest)]


def random_tokens(rng, count, alphabet=tiny.VOCAB):
    return rng.integers(0, alphabet, count).tolist()


def recomputed(model, tokens, start, parents):
    """Logits path by path, without any cache."""
    chain = len(tokens) - len(parents)
    rows = [tokens[:end] for end in range(start, chain + 1)]
    rows += paths(tokens, parents)[max(start - chain - 1, 0) :]
    with torch.inference_mode():
        return torch.stack([model(torch.tensor([path])).logits[0, -1] for path in rows])


def assert_exact(model, tokens, start, parents, atol=1e-10):
    expected = recomputed(model.model, tokens, start, parents)
    torch.testing.assert_close(model.logits(tokens, start, parents), expected, rtol=0, atol=atol)


def fed(model):
    """Numbers of entries that ``model`` is fed from now on, forward by forward."""
    counts, read = [], model._read

    def counted(ids, *rest):
        counts.append(ids.shape[-1])
        return read(ids, *rest)

    model._read = counted
    return counts


@every_architecture
@few
@given_seed
def test_every_row_is_the_law_given_its_path(make, seed):
    rng, model = np.random.default_rng(seed), CausalLM(make())
    chain, nodes = int(rng.integers(1, 40)), int(rng.integers(1, 12))
    tokens = random_tokens(rng, chain) + random_tokens(rng, nodes, 3)  # siblings that are alike
    assert_exact(model, tokens, int(rng.integers(1, len(tokens) + 1)), random_parents(rng, chain, nodes))


@every_architecture
@few
@given_seed
def test_any_sequence_of_chains_and_trees_equals_recomputation(make, seed):
    """Accepted paths, trees that grow, trees elsewhere, rewinds; and the states that were kept."""
    rng, model = np.random.default_rng(seed), CausalLM(make())
    model.keep([1])
    tokens, parents = random_tokens(rng, 20), []
    for _ in range(8):
        chain = len(tokens) - len(parents)
        step = rng.integers(4)
        if step == 0 and parents:  # a path is accepted
            tokens, parents = (
                [*paths(tokens, parents)[rng.integers(len(parents))], *random_tokens(rng, 1)],
                [],
            )
        elif step == 1:  # the tree grows
            more = random_parents(rng, chain, len(parents) + 5)[len(parents) :]
            tokens, parents = tokens + random_tokens(rng, 5, 3), parents + more
        elif step == 2:  # another tree on another chain
            chain = int(rng.integers(1, len(tokens) + 1))
            tokens, parents = tokens[:chain] + random_tokens(rng, 6, 3), random_parents(rng, chain, 6)
        else:
            tokens, parents = tokens[: rng.integers(1, chain + 1)] + random_tokens(rng, 3, 3), []
        assert_exact(model, tokens, int(rng.integers(1, len(tokens) + 1)), parents)

        path = paths(tokens, parents)[-1] if parents else tokens
        with torch.inference_mode():
            states = model.model(torch.tensor([path]), output_hidden_states=True).hidden_states[1][0]
        torch.testing.assert_close(model.hidden([*path, 0], [1])[: len(path), 0], states, rtol=0, atol=1e-10)
        assert model.hidden([*path[:-1], tiny.VOCAB], [1]).shape == (len(path) - 1, 1, 32)


def test_a_long_context_lies_behind_every_window():
    rng, model = np.random.default_rng(0), CausalLM(tiny.gemma3())
    tokens, parents = random_tokens(rng, 330), random_parents(rng, 300, 30)
    assert_exact(model, tokens, 290, parents)


@pytest.mark.parametrize("make", [tiny.gemma2, lambda: tiny.llama(attn_implementation="eager")])
def test_eager_attention_takes_the_same_mask(make):
    """Up to the float32 of its softmax."""
    rng, model = np.random.default_rng(0), CausalLM(make())
    assert model.model.config._attn_implementation == "eager"
    assert_exact(model, random_tokens(rng, 40), 25, random_parents(rng, 30, 10), atol=1e-4)


@every_architecture
def test_the_accepted_path_is_not_fed_again(make):
    rng, model = np.random.default_rng(0), CausalLM(make())
    prompt, nodes = random_tokens(rng, 30), [5, 6, 5, 7, 7, 8]
    model.logits(prompt, 30)
    counts = fed(model)
    model.logits(prompt + nodes, 31, [-1, -1, -1, 2, 1, 3])
    accepted = [*prompt, 5, 7, 8]  # through the second of two that are alike
    model.logits([*accepted, 9], len(accepted) + 1)
    assert counts == [6, 1]


@every_architecture
def test_a_growing_tree_is_fed_its_new_level(make):
    rng, model = np.random.default_rng(0), CausalLM(make())
    tokens, parents = random_tokens(rng, 30), []
    model.logits(tokens, 30)
    counts, level = fed(model), [-1, -1, -1]
    for _ in range(4):
        start = len(tokens) + 1
        parents = parents + level
        tokens = tokens + random_tokens(rng, 3, 2)
        model.logits(tokens, start, parents)
        level = sorted(int(i) for i in rng.integers(len(parents) - 3, len(parents), 3))
    assert counts == [3, 3, 3, 3]


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.gemma3])
@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("visible", lambda tree, rows, window=None: torch.ones(len(rows), rows.stop).tril(rows.start) > 0),
        ("positions", lambda tree, rows: torch.arange(rows.start, rows.stop)),
    ],
    ids=["siblings see each other", "positions count entries"],
)
def test_the_checks_reject_broken_layouts(make, name, broken, monkeypatch):
    model = CausalLM(make())
    tokens, parents = random_tokens(np.random.default_rng(0), 14), [-1, -1, 0, -2]
    assert_exact(model, tokens, 10, parents)
    model.reset()
    monkeypatch.setattr(Tree, name, broken)
    with pytest.raises(AssertionError):
        assert_exact(model, tokens, 10, parents, atol=1e-3)


def test_the_checks_reject_windows_that_are_one_off(monkeypatch):
    model, visible = CausalLM(tiny.mistral()), Tree.visible
    tokens, parents = random_tokens(np.random.default_rng(0), 40), [-1, -1, 0, -2]
    monkeypatch.setattr(Tree, "visible", lambda tree, rows, window: visible(tree, rows, window + 1))
    with pytest.raises(AssertionError):
        assert_exact(model, tokens, 30, parents, atol=1e-6)


@every_architecture
def test_an_interrupted_tree_leaves_a_clean_cache(make, monkeypatch):
    model = CausalLM(make())
    model.keep([1])
    model.logits([1, 2, 3, 4, 4], 1, [-1, -1])
    with monkeypatch.context() as patch:
        patch.setattr(model._cache.keys, "update", tiny.interrupted(model._cache.keys.update, layer=2))
        with pytest.raises(KeyboardInterrupt):
            model.logits([1, 2, 3, 4, 4, 5], 6, [-1, -1, 1])
    assert len(model.hidden([1, 2, 3], [1])) == 0
    assert_exact(model, [1, 2, 3, 4, 4, 5], 2, [-1, -1, 1])


@pytest.mark.parametrize(
    ("tokens", "parents", "message"),
    [
        ([1, 2, 3], [0], "parent of node 0 must come before it, got 0"),
        ([1, 2, 3], [-1, 2], "parent of node 1 must come before it, got 2"),
        ([1, 2, 3], [-1, -2], "node 1 has parent -2, but 1 tokens precede"),
        ([1, 2], [-1, 0], "node 0 has parent -1, but 0 tokens precede"),
        ([1, 2], [-1, 0, 1], "node 0 has parent -1, but 0 tokens precede"),
    ],
)
def test_bad_parents_are_named(tokens, parents, message):
    lifted = Lifted(Lookup(5), Warper(), torch.device("cpu"), torch.float64)
    for model in (CausalLM(tiny.llama()), lifted):
        with pytest.raises(ValueError, match=message):
            model.score(tokens, 1, parents)


def test_the_context_bounds_paths_not_entries():
    model = CausalLM(tiny.llama(max_position_embeddings=8), name="t")
    assert_exact(model, [1] * 12, 5, [-1] * 5 + [0])
    with pytest.raises(ValueError, match="9 tokens do not fit the context of t: 8"):
        model.logits([1] * 12, 5, [-1] * 4 + [3, 4])


def test_models_that_take_no_mask_are_refused():
    """Bloom counts distances in entries; flash attention knows chains only."""
    bloom = CausalLM(
        BloomForCausalLM(BloomConfig(vocab_size=16, hidden_size=8, n_layer=1, n_head=2)), name="b"
    )
    bloom.logits([1, 2, 3], 1)
    with pytest.raises(ValueError, match="b cannot score trees: BloomForCausalLM"):
        bloom.logits([1, 2, 3, 3], 1, [-1, -1])
    model = tiny.llama()
    model.config._attn_implementation = "flash_attention_2"
    flash = CausalLM(model)
    with pytest.raises(ValueError, match="flash_attention_2"):
        flash.logits([1, 2, 3, 3], 1, [-1, -1])


@pytest.mark.parametrize("warper", [Warper(), Warper(temperature=0.5)])
def test_lifted_models_score_each_path(warper):
    rng = np.random.default_rng(0)
    documents = [np.array(random_tokens(rng, 200, 5))]
    for model in (Lookup(5), NGram.fit(documents, 5)):
        lifted = Lifted(model, warper, torch.device("cpu"), torch.float64)
        tokens, parents = random_tokens(rng, 30, 5), random_parents(rng, 20, 10)
        rows = [tokens[:end] for end in range(15, 21)] + paths(tokens, parents)
        expected = torch.cat([lifted.score(path, len(path)) for path in rows])
        for start in (15, 20, 21, 27):
            assert torch.equal(lifted.score(tokens, start, parents), expected[start - 15 :])


@given_seed
def test_what_a_tree_shares_with_another(seed):
    """Entries found have the labels of the path asked for, and no path that is known is missed."""
    rng = np.random.default_rng(seed)

    def tree():
        chain = int(rng.integers(1, 4))
        labels = random_tokens(rng, chain + 6, 2)
        parents = [chain + p for p in random_parents(rng, chain, 6)]
        return Tree(labels, parents)

    def path(tree, entry):
        return () if entry < 0 else (*path(tree, tree.parent(entry)), tree.labels[entry])

    known, asked = tree(), tree()
    place, found = known.find(asked, len(asked))
    places = [*range(place), *found]
    asked_paths = [path(asked, entry) for entry in range(len(asked))]
    assert [path(known, at) for at in places] == asked_paths[: len(places)]
    missing = asked_paths[len(places) :][:1]
    assert not set(missing) & {path(known, at) for at in range(len(known))}
    assert asked.positions(range(len(asked))).tolist() == [len(p) - 1 for p in asked_paths]
    assert asked.depth == max(map(len, asked_paths))


@pytest.mark.parametrize(("a", "b", "shared"), [([], [1], 0), ([1], [2], 0), ((1, 2, 3), [1, 2, 4, 5], 2)])
def test_common_prefix(a, b, shared):
    assert common_prefix(a, b) == shared
