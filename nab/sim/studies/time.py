"""Time: never much slower than plain decoding, soon as fast as the best pair of drafter and draft length.

Texts of independent positions: a drafter of acceptance a has gammas from Beta(4 a, 4 (1 - a)), realised at
half of the positions as 0 or 1 and elsewhere as gamma. The target takes 5.5 ms for one token and 0.24 ms for
each more, a drafter 1.1 ms a token, scoring n drafters 1.2 n ms however many positions; measured seconds are
5 % off, and five times as long in the first two rounds. Drafts of up to six tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import nab
from nab.learners import AdaHedge, Squint
from nab.losses import Time, expected_rounds
from nab.selector import argmax, draw
from nab.sim.replay import replay
from nab.sim.sweep import Row, sweep
from nab.types import Floats

DRAFT_LEN = 6
POOLS = {
    "five of .05": [0.05] * 5,
    ".05 .05": [0.05] * 2,
    ".3 .2": [0.3, 0.2],
    ".6 .3": [0.6, 0.3],
    ".9 .5": [0.9, 0.5],
    "five mixed": [0.05, 0.3, 0.6, 0.9, 0.5],
}
LENGTHS = [60, 200, 1000]
LAZY: dict[str, Any] = {"every": 8, "above": 0.2}
POLICIES: dict[str, Any] = {
    "NormalHedge, mode": (nab.NormalHedge(), argmax, LAZY, 0.5),
    "NormalHedge, mode, prior .9": (nab.NormalHedge(), argmax, LAZY, 0.9),
    "NormalHedge, drawn": (nab.NormalHedge(), draw, LAZY, 0.5),
    "Hedge, mode": (nab.Hedge(), argmax, LAZY, 0.5),
    "AdaHedge, drawn": (AdaHedge(), draw, LAZY, 0.5),
    "Squint, drawn": (Squint(), draw, LAZY, 0.5),
    "NormalHedge, mode, scored every round": (nab.NormalHedge(), argmax, {"every": 1}, 0.5),
}
SHOWN = {"NormalHedge, mode": "#0072b2", "NormalHedge, drawn": "#009e73", "Hedge, mode": "#d55e00"}


def measure(*, scale: float = 1.0, seed: int = 0, jobs: int = 1, **sweeping: Any) -> pd.DataFrame:
    """One row per pool, policy and length: total time over that of plain decoding and of the best pair."""
    grid: dict[str, Any] = {
        "pool": [*POOLS],
        "policy": [*POLICIES],
        "tokens": LENGTHS,
        "texts": [max(int(200 * scale), 2)],
    }
    return sweep(cell, grid, seed=seed, jobs=jobs, **sweeping).drop(columns="texts")


def cell(pool: str, policy: str, tokens: int, texts: int, seed: int) -> Row:
    """Means over texts; ``scoring`` and ``plain_share``: share of plain decoding's time, share of rounds."""
    found = np.array(
        [one(POOLS[pool], policy, tokens, np.random.default_rng([seed, k])) for k in range(texts)]
    )
    of_plain, of_best, scoring, plain = found.mean(0)
    error = found[:, 0].std(ddof=1) / texts**0.5
    return {
        "of_plain": of_plain,
        "error": error,
        "of_best": of_best,
        "scoring": scoring,
        "plain_share": plain,
    }


def one(
    acceptances: list[float], policy: str, tokens: int, rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """Of one text."""
    learner, pick, lazy, plain = POLICIES[policy]
    n, objective = len(acceptances), Time(DRAFT_LEN, plain=plain)
    gamma, realised = text(np.array(acceptances), tokens, rng)
    selector = nab.Lazy(nab.Selector(learner, n, objective=objective, pick=pick, rng=rng), **lazy)
    measured = partial(noisy, [5.0, 5.0], rng)
    rounds = [*replay(selector, gamma, realised, draft_len=DRAFT_LEN, rng=rng, seconds=measured)]
    scoring = sum(1.2 * n for each in rounds if each.scored)
    total = scoring + sum(sum(spent(each.drafted)) for each in rounds)
    alone = tokens * sum(spent(0))
    best = min(alone, *(expected_rounds(realised, k).min() * sum(spent(k)) for k in objective.lengths[1:]))
    return (
        total / alone,
        total / best,
        scoring / alone,
        sum(not each.drafted for each in rounds) / len(rounds),
    )


def text(acceptance: Floats, tokens: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """``gamma`` and ``realised``, ``(tokens, n)`` each."""
    size = tokens, len(acceptance)
    gamma = rng.beta(4 * acceptance, 4 * (1 - acceptance), size)
    return gamma, np.where(rng.random(size) < 0.5, rng.random(size) < gamma, gamma)


def spent(draft_len: int) -> tuple[float, float]:
    """Milliseconds of drafting and verification."""
    return 1.1 * draft_len, 5.5 + 0.24 * draft_len


def noisy(slow: list[float], rng: np.random.Generator, drafter: int, draft_len: int) -> tuple[float, float]:
    """As they are measured; the first rounds take longer by the factors in ``slow``, which are used up."""
    factor = slow.pop() if slow else 1.0
    draft, verify = np.array(spent(draft_len)) * rng.normal(1, 0.05, 2).clip(0.5) * factor
    return float(draft), float(verify)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Time over that of plain decoding, and of the best pair, after 200 and 1000 tokens."""
    part = table[table["tokens"].isin([200, 1000]) & table["policy"].isin([*SHOWN, *POLICIES])]
    wide = part.pivot(index=["pool", "policy"], columns="tokens", values=["of_plain", "of_best"])
    wide.columns = [f"{name}_{tokens}" for name, tokens in wide.columns]
    return wide.round(3).reset_index()


def figure(table: pd.DataFrame) -> Figure:
    """Time over plain decoding's, and over the best pair's, against the length of the answer."""
    drawing = Figure(figsize=(11, 5), layout="constrained")
    panels = drawing.subplots(2, len(POOLS), sharex=True)
    for column, pool in enumerate(POOLS):
        for row, (value, level) in enumerate((("of_plain", 1.03), ("of_best", 1.0))):
            axes = panels[row][column]
            for policy, colour in SHOWN.items():
                part = table[(table["pool"] == pool) & (table["policy"] == policy)]
                axes.plot(part["tokens"], part[value], "o-", color=colour, label=policy, markersize=3)
            axes.axhline(level, color="0.5", linestyle=":", linewidth=1)
            axes.set(xscale="log", **({"xlabel": "tokens"} if row else {"title": pool}))
            axes.set_xticks(LENGTHS, map(str, LENGTHS))
            axes.minorticks_off()
            axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("time / plain (dots: 1.03)")
    panels[1][0].set_ylabel("time / best pair's")
    handles, labels = panels[0][0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return drawing
