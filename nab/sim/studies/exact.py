"""Decoding simulated and computed: every fixed drafter, uniform choice and HedgeSpec on Markov domains.

Queries over four domains whose tokens move to another domain with probability ``switch``; an expert for each
and a generalist. The decode loop runs on many queries; beside its MAT (tokens of a query over mean rounds,
with a 99 % interval from the queries) stands the exact one, by dynamic programming, where the choice does not
depend on the text. Where queries stay in a domain, HedgeSpec finds its expert and beats every fixed drafter;
where domains change it takes a learner that forgets.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

import nab
from nab.sim import exact
from nab.sim.markov import domains
from nab.sim.sweep import Row, sweep

DOMAINS, LETTERS, DRAFT_LEN, TOKENS = 4, 6, 4, 200
NAMES = [*(f"expert {k}" for k in range(DOMAINS)), "generalist"]
N = len(NAMES)


def fixed(drafter: int, seed: int) -> nab.Constant:
    """A selector of this drafter alone."""
    return nab.Constant(np.eye(N)[drafter])


SELECTORS: dict[str, Callable[[int], Any]] = {
    **{name: partial(fixed, i) for i, name in enumerate(NAMES)},
    "uniform choice": lambda seed: nab.Constant(np.full(N, 1 / N), rng=seed),
    "HedgeSpec, token": lambda seed: nab.Selector(nab.NormalHedge(), N, rng=seed),
    "HedgeSpec, length": lambda seed: nab.Selector(
        nab.NormalHedge(), N, objective=nab.Length(DRAFT_LEN), rng=seed
    ),
    "token, discount .9": lambda seed: nab.Selector(nab.NormalHedge(discount=0.9), N, rng=seed),
}
SWITCHES = {0.0: "queries of one domain", 0.05: "domains change every 20 tokens"}


def measure(*, scale: float = 1.0, seed: int = 0, jobs: int = 1, **sweeping: Any) -> pd.DataFrame:
    """One row per switch probability and policy: MAT with its 99 % interval, and the exact one if it has one.

    Other keywords go to ``nab.sim.sweep.sweep``.
    """
    grid: dict[str, list[Any]] = {
        "switch": list(SWITCHES),
        "policy": list(SELECTORS),
        "groups": [max(int(24 * scale), 2)],
    }
    return sweep(mat, grid, seed=seed, jobs=jobs, **sweeping)


def mat(switch: float, policy: str, groups: int, seed: int) -> Row:
    """MAT of one policy, simulated and exact; a group of queries has one that starts in each domain."""
    target, pool = domains(DOMAINS, LETTERS, switch=switch, rng=seed)
    starts = range(0, DOMAINS * LETTERS, LETTERS)
    rounds = []
    for query, start in enumerate([*starts] * groups):
        chooser, random = SELECTORS[policy](seed + query), [seed, query]
        decoded = nab.decode(target, pool, chooser, [start], draft_len=DRAFT_LEN, rng=random)
        rounds.append(sum(1 for _ in nab.until(decoded, max_new_tokens=TOKENS)))
    within = np.reshape(rounds, (groups, DOMAINS)).mean(1)
    half = stats.t.ppf(0.995, groups - 1) * stats.sem(within)
    fewest, most = TOKENS / (DRAFT_LEN + 1), TOKENS
    low, mid, high = (TOKENS / np.clip(within.mean() + side * half, fewest, most) for side in (1, 0, -1))
    return {"mat": mid, "low": low, "high": high, "exact": expected(target, pool, policy, starts)}


def expected(target: Any, pool: list[Any], policy: str, starts: range) -> float:
    """Tokens over exact mean rounds, of a fixed drafter or a uniform choice; NaN for what learns."""
    laws = [exact.round_law(target, q, DRAFT_LEN) for q in pool]
    if policy in NAMES:
        law = laws[NAMES.index(policy)]
    elif policy == "uniform choice":
        law = np.mean(laws, axis=0)
    else:
        return float("nan")
    return float(TOKENS / exact.mean_rounds(law, TOKENS)[list(starts)].mean())


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """The table itself, rounded."""
    return table.drop(columns="groups").round(3)


def figure(table: pd.DataFrame) -> Figure:
    """A panel per switch probability: dots with intervals, bars for the exact values."""
    drawing = Figure(figsize=(9, 4), layout="constrained")
    panels = drawing.subplots(1, len(SWITCHES), sharex=True, sharey=True)
    for axes, (switch, title) in zip(panels, SWITCHES.items(), strict=True):
        rows = table[table["switch"] == switch].reset_index(drop=True)
        place = np.arange(len(rows))[::-1]
        known = rows["exact"].notna()
        best = rows["exact"].max()
        axes.axvline(best, color="0.7", lw=1, ls=":", label="best fixed drafter")
        axes.plot(rows["exact"][known], place[known], "|", color="#0072b2", ms=18, mew=2.5, label="exact")
        sides = [rows["mat"] - rows["low"], rows["high"] - rows["mat"]]
        style: Any = {"fmt": "o", "color": "#d55e00", "ms": 4, "capsize": 3, "lw": 1.2}
        axes.errorbar(rows["mat"], place, xerr=sides, label="simulated, 99 %", **style)
        axes.set_yticks(place, rows["policy"])
        axes.set(title=title, xlabel="mean acceptance length (tokens per target forward)")
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return drawing
