"""Feature-level drafters: what they read, that they rewind, and that training unrolls what decoding does."""

import numpy as np
import pytest
import test_eagle3 as published
import torch
from tiny import NEEDS_CUDA, VOCAB, llama
from transformers import DynamicCache

import nab
from nab.backends import heads
from nab.backends.heads import Head, HeadModel, Shape
from nab.backends.torch import CausalLM, Warper
from nab.sampling import paths
from nab.schemes import Levels, named


def head_model(target, layers=(1, 3), draft_vocab=100, seed=0):
    torch.manual_seed(seed)
    chosen = torch.randperm(VOCAB)[:draft_vocab]
    model = HeadModel(Shape(layers, 48, draft_vocab), target, chosen)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def pair(**options):
    target = llama()
    lm = CausalLM(target)
    return lm, Head(head_model(target, **options), lm, Warper())


@pytest.mark.parametrize("layers", [(3,), (1, 3), (0, 2, 3)])
def test_decoding_is_what_training_unrolls(layers):
    """Row s of a draft is depth s of the unrolled head, to float64's rounding."""
    target, head = pair(layers=layers)
    tokens = torch.randint(VOCAB, (1, 24)).tolist()[0]
    target.score(tokens, 1)
    hidden = target.hidden(tokens, layers)[None]
    depths = head.model.unroll(torch.tensor([tokens]), hidden, 4)
    laws = [Warper()(head.model.logits(own))[0] for own in depths]
    for read in (1, 7, 20):
        target.reset()
        head.reset()
        target.score(tokens[:read], read)
        for depth in range(1, 5):
            law = head.score(tokens[: read + depth], read + depth)[0]
            torch.testing.assert_close(
                law[head.model.tokens], laws[depth - 1][read + depth - 1], rtol=1e-10, atol=1e-12
            )


def test_any_order_of_calls_gives_the_scores_of_a_fresh_head():
    target, head = pair()
    generator = torch.Generator().manual_seed(1)
    tokens: list[int] = [5]
    for _ in range(60):
        cut = int(torch.randint(1, len(tokens) + 1, (1,), generator=generator))
        new = torch.randint(
            VOCAB, (int(torch.randint(1, 6, (1,), generator=generator)),), generator=generator
        )
        tokens = [*tokens[:cut], *new.tolist()]
        if torch.rand(1, generator=generator) < 0.5:
            read = int(torch.randint(1, len(tokens) + 1, (1,), generator=generator))
            target.score(tokens[:read], read)
        start = int(torch.randint(1, len(tokens) + 1, (1,), generator=generator))
        fresh = Head(head.model, _same_state(target), Warper())
        torch.testing.assert_close(
            head.score(tokens, start), fresh.score(tokens, start), rtol=1e-10, atol=1e-12
        )


def _same_state(target):
    """A target that has read the same tokens, for a head whose construction resets it."""

    class Reader:
        context = target.context

        def keep(self, layers):
            pass

        hidden = staticmethod(target.hidden)

    return Reader()


def test_a_head_draws_no_warning(monkeypatch):
    monkeypatch.setattr("transformers.configuration_utils.logger.warning_once", pytest.fail)
    head_model(llama())


def test_frequencies_have_the_precision_of_training():
    """The heads that come with the package were made beside a bfloat16 target, then trained in float32."""
    model = head_model(llama(dtype=torch.bfloat16))
    rounded = model.block.rotary_emb.inv_freq
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(model.float().block.rotary_emb.inv_freq, rounded.float())


def test_a_saved_head_needs_the_right_tensors():
    target = llama()
    model = head_model(target)
    weights = model.state_dict()
    heads.build(weights, model.shape, target)
    weights.pop("mix.weight")
    with pytest.raises(ValueError, match=r"mix\.weight"):
        heads.build(weights, model.shape, target)


def test_a_draft_vocabulary_outside_the_targets_is_refused():
    target = llama()
    with pytest.raises(ValueError, match="ids below 257"):
        HeadModel(Shape((3,), 48, 2), target, torch.tensor([1, 257]))


def fed(head, monkeypatch):
    """Numbers of entries that the head is fed from now on, forward by forward."""
    forward, counts = head.model.forward, []

    def counted(ids, features, **options):
        counts.append(ids.shape[1])
        return forward(ids, features, **options)

    monkeypatch.setattr(head.model, "forward", counted)
    return counts


def test_the_first_round_drafts_from_the_targets_features(monkeypatch):
    """The prompt is read in one forward; without the target's features it would be token by token."""
    target, head = pair()
    counts = fed(head, monkeypatch)
    next(nab.decode(target, [head], nab.Constant([1.0]), list(range(20)), draft_len=3, rng=0))
    assert counts == [20, 1, 1]


def test_a_target_that_forgets_takes_its_features_along():
    target, head = pair()
    tokens = list(range(20))
    target.score(tokens, 1)
    head.score(tokens, 1)
    target.score(tokens[:5], 5)
    fresh = Head(head.model, _same_state(target), Warper())
    torch.testing.assert_close(head.score(tokens, 20), fresh.score(tokens, 20), rtol=1e-10, atol=1e-12)


class Shifted(HeadModel):
    """It has no entry for the first token, and each reads the target's feature of the token before."""

    skips_first = True


def shifted():
    target, head = pair()
    head.model.__class__ = Shifted
    return target, head


def test_a_head_may_have_no_entry_for_the_first_token():
    target, head = shifted()
    tokens = list(range(8))
    target.score(tokens, 1)
    features = head.model.fused(target.hidden(tokens, head.model.layers)[:-1])
    own = head.model.forward(
        torch.tensor([tokens[1:]]), features[None], positions=torch.arange(7)[None], mask=None,
        cache=DynamicCache(),
    )  # fmt: skip
    laws = head.score(tokens, 1)
    assert not laws[0].any()
    expected = head.model.logits(own[0]).softmax(-1)
    torch.testing.assert_close(laws[1:, head.model.tokens], expected, rtol=1e-10, atol=1e-12)


@pytest.fixture(params=["own", "shifted", *published.LAYOUTS])
def both(request, tmp_path):
    """A target and a head: of this project's with and without a first entry, or a published one."""
    if request.param in published.LAYOUTS:
        return published.pair(tmp_path, request.param)
    return pair() if request.param == "own" else shifted()


def drafted(target, head, path, read):
    """The law behind ``path`` that a fresh head drafts when the target has read ``read`` of its tokens."""
    target.reset()
    head.reset()
    if read:
        target.score(path[:read], read)
    return head.score(path, len(path))[0]


def random_parents(rng, chain, nodes):
    return [int(rng.integers(-min(chain, 4), node)) for node in range(nodes)]


@pytest.mark.parametrize("seed", range(4))
def test_a_node_is_drafted_as_if_the_target_had_read_the_chain_before_its_branch(both, seed):
    """All but the last token of it, however much the target has read by now."""
    rng, (target, head) = np.random.default_rng(seed), both
    chain, tokens = 12, rng.integers(0, VOCAB, 12).tolist() + rng.integers(0, 3, 10).tolist()
    parents = random_parents(rng, chain, 10)
    hangs = []  # the chain token that each branch starts from
    for parent in parents:
        hangs.append(chain + parent if parent < 0 else hangs[parent])
    expected = torch.stack(
        [drafted(target, head, path, at) for path, at in zip(paths(tokens, parents), hangs, strict=True)]
    )
    for read in (chain, chain - 1):
        target.reset()
        head.reset()
        target.score(tokens[:read], 1)
        laws = head.score(tokens, chain + 1, parents)
        torch.testing.assert_close(laws, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(head.score(tokens, 5, parents)[-10:], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_any_sequence_of_chains_and_trees_gives_the_scores_of_a_fresh_head(both, seed):
    rng, (target, head) = np.random.default_rng(seed), both
    tokens = [5]
    for _ in range(30):
        cut = int(rng.integers(1, len(tokens) + 1))
        tokens = tokens[:cut] + rng.integers(0, VOCAB, rng.integers(1, 6)).tolist()
        if rng.random() < 0.5:
            read = int(rng.integers(1, len(tokens) + 1))
            target.score(tokens[:read], read)
        nodes = int(rng.integers(0, 6))
        parents = random_parents(rng, len(tokens), nodes)
        asked = tokens + rng.integers(0, 3, nodes).tolist()
        start = int(rng.integers(1, len(asked) + 1))
        fresh = Head(head.model, _same_state(target), Warper())
        torch.testing.assert_close(
            head.score(asked, start, parents), fresh.score(asked, start, parents), rtol=1e-10, atol=1e-12
        )
        if nodes:
            tokens = paths(asked, parents)[-1]


def test_a_growing_tree_is_fed_level_by_level_and_dropped_afterwards(monkeypatch):
    target, head = pair()
    tokens = list(range(20))
    target.score(tokens, 20)
    counts = fed(head, monkeypatch)
    head.score(tokens, 20)
    nodes, parents = [], []
    for level in ([-1, -1, -1], [0, 0, 2], [3, 4, 5]):
        nodes, parents = [*nodes, 7, 7, 8], parents + level
        head.score(tokens + nodes, len(tokens + nodes) - 2, parents)
    assert counts == [20, 3, 3, 3]
    target.score([*tokens, 7, 8], 20)
    head.score([*tokens, 7, 8], 22)
    assert counts == [20, 3, 3, 3, 2]


@pytest.mark.parametrize(("start", "depths"), [(1, 4), (7, 3), (12, 5), (3, 1)])
def test_scores_by_depth_are_what_rounds_would_have_drafted(both, start, depths, monkeypatch):
    target, head = both
    tokens = torch.randint(VOCAB, (12,), generator=torch.Generator().manual_seed(0)).tolist()
    expected = torch.zeros(depths, 13 - start, VOCAB, dtype=torch.float64)
    for depth in range(depths):
        for i in range(max(start, depth + 1), 13):
            expected[depth, i - start] = drafted(target, head, tokens[:i], i - depth - 1)
    target.reset()
    head.reset()
    target.score(tokens, 1)
    head.score(tokens[:8], 8)
    counts = fed(head, monkeypatch)
    laws = head.score_by_depth(tokens, start, depths)
    torch.testing.assert_close(laws, expected, rtol=1e-10, atol=1e-12)
    assert len(counts) == depths
    assert counts[0] == 4
    head.score([*tokens, 1], 13)
    assert counts[depths:] == [1]


def test_scores_by_depth_are_what_training_unrolls():
    target, head = pair()
    tokens = torch.randint(VOCAB, (24,), generator=torch.Generator().manual_seed(0)).tolist()
    target.score(tokens, 1)
    own = head.model.unroll(torch.tensor([tokens]), target.hidden(tokens, head.model.layers)[None], 4)
    laws = head.score_by_depth(tokens, 1, 4)
    for depth in range(4):
        unrolled = head.model.logits(own[depth])[0, depth:].softmax(-1)
        torch.testing.assert_close(laws[depth, depth:, head.model.tokens], unrolled, rtol=1e-10, atol=1e-12)
        assert not laws[depth, :depth].any()


def test_an_interrupted_tree_leaves_a_clean_head(monkeypatch):
    target, head = pair()
    tokens, parents = [1, 2, 3, 4, 4, 5], [-1, -1, 1]
    target.score(tokens[:3], 3)
    expected = head.score(tokens, 1, parents)
    head.score(tokens[:3], 3)
    with monkeypatch.context() as patch:
        counts, forward = [], head.model.forward

        def interrupted(*arguments, **options):
            counts.append(1)
            if len(counts) == 2:
                raise KeyboardInterrupt
            return forward(*arguments, **options)

        patch.setattr(head.model, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            head.score(tokens, 1, parents)
    torch.testing.assert_close(head.score(tokens, 1, parents), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda head: head.score([1, 2], 3), r"start must lie in \[1, 2\], got 3"),
        (lambda head: head.score([1, 2, 3], 1, [0]), "node 0 must come before it, got 0"),
        (lambda head: head.score([1, 2, 3], 1, [-3]), "node 0 has parent -3"),
        (lambda head: head.score_by_depth([1, 2], 1, 0), "depths must be at least 1, got 0"),
        (lambda head: head.score_by_depth([1, 2, 3, 4], 1, 2), "needs 3 tokens read .* has read 2"),
    ],
)
def test_bad_questions_are_named(ask, message):
    target, head = pair()
    target.score([1, 2], 2)
    with pytest.raises(ValueError, match=message):
        ask(head)


@NEEDS_CUDA
def test_trees_on_cuda_agree_with_cpu():
    """To float32's rounding, in float64 too: transformers has norms and angles of positions in float32."""
    laws = []
    for device in ("cpu", "cuda"):
        model = llama()
        drafting, target = head_model(model).to(device).settle(), CausalLM(model.to(device))
        head = Head(drafting, target, Warper())
        target.score([1, 2, 3], 1)
        trees = head.score([1, 2, 3, 4, 4, 5, 6], 2, [-1, -2, 1, 1])
        laws.append((trees.cpu().float(), head.score_by_depth([1, 2, 3], 1, 3).cpu().float()))
    torch.testing.assert_close(*laws)


@pytest.mark.parametrize("widths", ["chain", "multi-draft:2x1"])
def test_exact_evaluation_is_acceptance_under_the_laws_that_were_drafted(widths):
    """Row by row against the drafts of the rounds themselves; the first depth alone would not do.

    But for the first round: the target has then read the last token of the prompt too.
    """
    target, head = pair()
    drafts = {}

    class Recorded(Levels):
        def propose(self, drafter, tokens, vocab, uniforms):
            drafts[len(tokens)] = super().propose(drafter, tokens, vocab, uniforms)
            return drafts[len(tokens)]

    scheme = Recorded(named(widths, 3).rules)
    selector, prompt = nab.Selector(nab.Hedge(), 1, rng=0), [1, 2, 3, 4]
    options = {"draft_len": 3, "scheme": scheme, "rng": 0}
    rounds = nab.decode(target, [head], selector, prompt, exact=True, **options)
    rounds = list(nab.until(rounds, max_new_tokens=40))
    tokens = [*prompt, *(token for round_ in rounds for token in round_.emitted)]
    gamma, realised = (np.concatenate([getattr(r, name) for r in rounds]) for name in ("gamma", "realised"))
    assert gamma.shape == (40, 3, 1)
    p = target.score(tokens[:-1], 4)
    differences = []
    assert drafts.pop(4)
    for start, draft in drafts.items():
        at = -1
        for k in range(min(3, len(tokens) - start)):
            below = draft.below(at)
            position, q = start - 4 + k, draft.q[min(below.values())]
            for scores, found in (
                (gamma, scheme.rules[k].probability(p[position], q)),
                (realised, scheme.rules[k].realised(p[position], q, tokens[start + k])),
            ):
                assert scores[position, k, 0] == pytest.approx(float(found), abs=1e-12)
            differences.append(abs(gamma[position, k, 0] - gamma[position, 0, 0]))
            if tokens[start + k] not in below:
                break
            at = below[tokens[start + k]]
    assert max(differences) > 0.01
