"""The embedded set: a target that fits the package, experts that know their domain, the same greedy text."""

from pathlib import Path

import pytest
import torch

import nab
from nab import prompts
from nab.backends import pool, pretrained
from nab.backends.session import Session
from nab.backends.torch import CausalLM, Warper

OPENINGS = prompts.read(prompts.OPENINGS)
DOMAINS = ["c", "english", "javascript", "json", "legal", "mathematics", "python"]


@pytest.fixture(scope="module")
def target():
    return pretrained.load(Path("tiny"), dtype="float32")


def test_it_fits_and_is_the_default_pool(target):
    assert sum(file.stat().st_size for file in pretrained.TINY.iterdir()) < 12e6
    assert pool.default(target) == ["lookup", "generalist", *DOMAINS]
    assert {prompt.domain for prompt in OPENINGS} == set(DOMAINS)
    assert target.stop_tokens == {target.tokenizer.convert_tokens_to_ids("<end>")}


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_expert_is_best_on_held_out_openings_of_its_domain(target, domain):
    """Mean acceptance probability, teacher-forced: no sampling, so nothing to be lucky about."""
    model = CausalLM(target.model, Warper())
    names = ["generalist", *DOMAINS]
    drafters = pool.build(names, target, model)
    means = dict.fromkeys(names, 0.0)
    for prompt in OPENINGS:
        if prompt.domain == domain:
            ids = target.encode(prompt.text)
            p = model.score(ids, 1)
            for name, drafter in drafters.items():
                means[name] += float(torch.minimum(p, drafter.score(ids, 1)).sum(-1).mean())
    assert max(means, key=means.__getitem__) == domain, means


def test_greedy_text_is_the_targets_in_float64():
    target = pretrained.load(Path("tiny"), dtype="float64")
    session = Session(target, pool.default(target), Warper(temperature=0), draft_len=4, max_new_tokens=40)
    n = len(session.names)
    for prompt in OPENINGS[::5]:
        ids = session.encode(prompt.text)
        plain = session.query(plain=True)
        for _ in session.decode(plain, ids, nab.Constant([1 / n] * n), 0):
            pass
        chosen = session.query()
        for _ in session.decode(chosen, ids, nab.Selector(nab.NormalHedge(), n, rng=1), 0):
            pass
        assert chosen.tokens == plain.tokens
        assert len(chosen.rounds) < len(plain.rounds)
