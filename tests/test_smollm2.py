"""The real target, fetched on the first run: greedy text in float64 equals plain decoding."""

import numpy as np
import pytest

from nab import prompts
from nab.backends import pool, pretrained
from nab.backends.session import Session
from nab.backends.torch import Warper
from nab.learners import NormalHedge
from nab.selector import Constant, Selector

PROMPTS = [
    p for p in prompts.limited(prompts.read(prompts.SHIPPED), 1) if p.domain in ("python", "legal", "json")
]


@pytest.fixture(scope="module")
def session():
    target = pretrained.load(dtype="float64")
    return Session(target, pool.default(target), Warper(temperature=0), draft_len=4, max_new_tokens=24)


@pytest.mark.parametrize("prompt", PROMPTS, ids=[p.domain for p in PROMPTS])
def test_greedy_text_equals_plain_decoding(session, prompt):
    ids, n = session.encode(prompt.text), len(session.names)
    answers = []
    for plain, selector in ((True, Constant(np.eye(n)[0])), (False, Selector(NormalHedge(), n, rng=0))):
        query = session.query(plain=plain)
        for _ in session.decode(query, ids, selector, 0):
            pass
        answers.append(query.tokens)
    assert answers[0] == answers[1]
    assert len(query.rounds) < len(query.tokens)  # some drafts were accepted


def test_the_default_pool_fits_it(session):
    ngrams = [f"ngram-{domain}" for domain in ("german", "json", "legal", "python")]
    experts = ["c", "english", "javascript", "json", "legal", "mathematics", "python"]
    assert session.names == ["lookup", "generalist", *sorted(experts + ngrams)]
    assert session.text(session.encode("Hallo Welt, äöü €")).count("Hallo Welt, äöü €") == 1
