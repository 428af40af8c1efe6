"""What is drawn inside ``generate`` of transformers has the law of its processed logits, says an audit."""

from functools import cache
from itertools import product
from types import SimpleNamespace

import pytest
import tiny
import torch
from transformers.generation import logits_process as steps

from nab import audit
from nab.backends import chains, rows
from nab.backends.assisted import Candidates
from nab.backends.hf import Speculative
from nab.losses import Token

PROMPTS = [[5, 9, 5], [77, 3, 200, 41, 5, 9, 5, 9], [8]]
OPTIONS = {"temperature": 0.8, "top_k": 40, "repetition_penalty": 1.2, "no_repeat_ngram_size": 2}
PROCESSORS = [  # what generate makes of these, written down once more
    steps.RepetitionPenaltyLogitsProcessor(1.2),
    steps.NoRepeatNGramLogitsProcessor(2),
    steps.TemperatureLogitsWarper(0.8),
    steps.TopKLogitsWarper(40),
]
PLACES = 7


class Processed:
    """Laws of a model by one plain forward and one call of each processor per position."""

    def __init__(self, model):
        self.model = model

    @torch.inference_mode()
    def score(self, tokens, start):
        ids = torch.tensor([tokens])
        found = []
        for logits, end in zip(
            self.model(ids).logits[0, start - 1 :], range(start, len(tokens) + 1), strict=True
        ):
            scores = logits[None].float()
            for step in PROCESSORS:
                scores = step(ids[:, :end], scores)
            found.append(scores[0].double().softmax(-1))
        return torch.stack(found)


@cache
def models(architecture):
    model = tiny.ARCHITECTURES[architecture]().train(False)
    return model, tiny.perturbed(model, 0.1).train(False), tiny.perturbed(model, 0.3).train(False)


def audited(architecture, generate, answers=120):
    """The audit of what ``generate`` of a model draws."""
    target, *drafters = models(architecture)

    def answer(prompt, seed):
        torch.manual_seed(seed)
        ids = torch.tensor([prompt])
        options = {
            **OPTIONS,
            "do_sample": True,
            "max_new_tokens": PLACES,
            "pad_token_id": 0,
            "eos_token_id": None,
        }
        return generate(target, input_ids=ids, attention_mask=torch.ones_like(ids), **options)[
            0, len(prompt) :
        ].tolist()

    known = {"drafters": [*map(Processed, drafters)], "answers": answers, "error": 0.12, "rng": 0}
    return audit.sampling(answer, Processed(target), PROMPTS, max_new_tokens=PLACES, **known)


def speculative(architecture):
    hook = Speculative([*models(architecture)[1:], "lookup"], objective=Token(), draft_len=3)
    return lambda model, **options: model.generate(**options, custom_generate=hook)


def candidates(architecture):
    hook = Candidates([*models(architecture)[1:], "lookup"], objective=Token(), draft_len=3)
    return hook.generate


WAYS = [*product(tiny.ARCHITECTURES, [speculative]), ("llama", candidates), ("gpt2", candidates)]


@pytest.fixture
def argmax_drafts(monkeypatch):
    """Drafts are the likeliest tokens, and tested as if they had been drawn."""
    broken = SimpleNamespace(**vars(rows))
    broken.draw = lambda law, u: law.argmax(-1)
    monkeypatch.setattr(chains, "rows", broken)


@pytest.mark.parametrize(("architecture", "kind"), WAYS)
def test_draws_have_the_law_of_processed_logits(architecture, kind):
    """False alarms: 1e-3 a case, with these seeds none; the error that is found is in the report."""
    report = audited(architecture, kind(architecture))
    assert report.passed, str(report)


@pytest.mark.parametrize("kind", [speculative, candidates])
@pytest.mark.usefixtures("argmax_drafts")
def test_likeliest_drafts_with_their_softmax_are_rejected(kind):
    assert not audited("llama", kind("llama"), answers=300).accepted
