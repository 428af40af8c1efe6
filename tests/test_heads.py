"""Feature-level drafters: what they read, that they rewind, and that training unrolls what decoding does."""

import pytest
import torch
from tiny import VOCAB, llama

import nab
from nab.backends import heads
from nab.backends.heads import Head, HeadModel, Shape
from nab.backends.torch import CausalLM, Warper


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


def test_the_first_round_drafts_from_the_targets_features(monkeypatch):
    """The prompt is read in one forward; without the target's features it would be token by token."""
    target, head = pair()
    extend, read = head._extend, []

    def counted(tokens, features):
        read.append(len(tokens))
        extend(tokens, features)

    monkeypatch.setattr(head, "_extend", counted)
    next(nab.decode(target, [head], nab.Constant([1.0]), list(range(20)), draft_len=3, rng=0))
    assert read == [20, 1, 1]
