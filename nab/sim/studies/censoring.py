"""Censored losses get stuck on drafters that stop early; delayed ones do not.

After token 0 the target says 0 again or goes on to 1; after 1 it says 0. Seven drafters know how often it
goes on, but nothing of what follows: they stop right behind it. The eighth always bets on going on and knows
what follows; its rounds are longer on average, from either token. But while one of the seven drafts, a round
ends where it stops, and what is seen of the text speaks for it. A learner that makes do with that
(``nab.wrappers.Censored``) never leaves the seven in about a third of the queries; one that waits for whole
windows finds the eighth in all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import nab
from nab.sim import exact
from nab.sim.markov import Markov
from nab.sim.sweep import Row, sweep
from nab.wrappers import Censored

N, DRAFT_LEN, GO, BLOCK, TOKENS = 8, 8, 0.6, 50, 500
BEST = N - 1
TARGET = Markov(np.array([[1 - GO, GO], [1.0, 0.0]]))
EARLY = [Markov(np.array([[1 - go, go], [0.0, 1.0]])) for go in GO - 0.01 * np.arange(BEST)]
POOL = [*EARLY, Markov(np.array([[0.0, 1.0], [1.0, 0.0]]))]
SELECTORS: dict[str, Callable[[int], Any]] = {
    "censored": lambda seed: Censored(nab.Selector(nab.NormalHedge(), N, rng=seed), DRAFT_LEN),
    "delayed": lambda seed: nab.Selector(nab.NormalHedge(), N, objective=nab.Length(DRAFT_LEN), rng=seed),
}
COLOURS = {"censored": "#d55e00", "delayed": "#0072b2"}


def measure(*, scale: float = 1.0, seed: int = 0, jobs: int = 1, **sweeping: Any) -> pd.DataFrame:
    """One row per feedback, query and block of 50 tokens: rounds that started there, and those of the best.

    ``mat`` is that of the query's second half; ``early`` and ``deep`` are exact: of the best of those that
    stop early, and of the one that goes on. Other keywords go to ``nab.sim.sweep.sweep``.
    """
    grid: dict[str, list[Any]] = {"feedback": list(SELECTORS), "query": list(range(max(int(40 * scale), 2)))}
    table = sweep(query, grid, seed=seed, jobs=jobs, **sweeping)
    early, deep = (
        exact.mean_acceptance_length(exact.round_law(TARGET, q, DRAFT_LEN)) for q in (POOL[0], POOL[BEST])
    )
    return table.assign(early=early, deep=deep)


def query(feedback: str, query: int, seed: int) -> list[Row]:
    """One query, in blocks."""
    selector = SELECTORS[feedback](seed + query)
    decoded = nab.decode(TARGET, POOL, selector, [0], draft_len=DRAFT_LEN, rng=[seed, query])
    rounds = list(nab.until(decoded, max_new_tokens=TOKENS))
    second = [len(r.emitted) for r in rounds if r.start > TOKENS // 2]
    rows: list[Row] = []
    for block in range(TOKENS // BLOCK):
        chosen = [r.choice for r in rounds if (r.start - 1) // BLOCK == block]
        rows.append(
            {
                "tokens": (block + 1) * BLOCK,
                "rounds": len(chosen),
                "best": chosen.count(BEST),
                "mat": float(np.mean(second)),
            }
        )
    return rows


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """By feedback: queries, those stuck (less than half of the last rounds with the best drafter), MAT."""
    last = table[table["tokens"] == table["tokens"].max()]
    last = last.assign(stuck=2 * last["best"] < last["rounds"], share=last["best"] / last["rounds"])
    by = last.groupby("feedback", sort=False)
    means = by[["share", "mat", "early", "deep"]].mean()
    return pd.concat([by["stuck"].agg(queries="size", stuck="sum"), means], axis=1).round(3).reset_index()


def figure(table: pd.DataFrame) -> Figure:
    """Share of rounds on the best drafter against tokens; MAT of every query's second half."""
    drawing = Figure(figsize=(9, 4), layout="constrained")
    left, right = drawing.subplots(1, 2)
    for place, (feedback, colour) in enumerate(COLOURS.items()):
        rows = table[table["feedback"] == feedback]
        shares = rows.assign(share=100 * rows["best"] / rows["rounds"]).pivot(
            index="tokens", columns="query", values="share"
        )
        left.plot(shares.index, shares, color=colour, lw=0.6, alpha=0.25)
        stuck = (shares.iloc[-1] < 50).sum()
        name = f"{feedback}: {stuck} of {shares.shape[1]} stuck"
        left.plot(shares.index, shares.mean(axis=1), color=colour, lw=2.5, label=name)
        lengths = rows.groupby("query")["mat"].first().sort_values().to_numpy()
        jitter = np.linspace(-0.25, 0.25, len(lengths))
        right.plot(place + jitter, lengths, "o", color=colour, ms=4, alpha=0.7)
    left.set(xlabel="tokens of the query", ylabel="rounds with the best drafter, %", ylim=(-3, 103))
    left.legend(frameon=False, loc="center right", bbox_to_anchor=(1, 0.35))
    for column, text in (("early", "stops early"), ("deep", "the best drafter")):
        value = table[column].iloc[0]
        right.axhline(value, color="0.3", lw=1, ls="--")
        right.text(1.53, value, f"{text},\nexact: {value:.2f}", fontsize=9, va="center")
    right.set_xticks([0, 1], list(COLOURS))
    right.set(xlim=(-0.5, 1.5), ylabel="mean acceptance length, second half", title="one dot a query")
    left.set_title("thin: queries, thick: their mean")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return drawing
