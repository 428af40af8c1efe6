"""Throughput: rounds a second of every learner, and how long a sweep of 10^9 rounds would take.

10 000 rounds of 200 queries with 8 drafters. A round is one query's ``probs`` and ``update``, border checks
included, on one core; losses are made beforehand.
"""

from __future__ import annotations

from math import ceil
from time import process_time
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import nab
from nab.learners import (
    AdaHedge,
    AdaNormalHedge,
    AdaNormalHedgeTV,
    FixedShare,
    NormalHedgeBH,
    OptimisticHedge,
    Squint,
)
from nab.sim import environments
from nab.sim.play import turns
from nab.sim.sweep import Row, sweep

ROUNDS, QUERIES, N = 10_000, 200, 8
LEARNERS: dict[str, Any] = {
    "Hedge": nab.Hedge(),
    "FixedShare": FixedShare(0.02),
    "OptimisticHedge": OptimisticHedge(),
    "AdaNormalHedge": AdaNormalHedge(),
    "AdaHedge": AdaHedge(),
    "NormalHedge": nab.NormalHedge(),
    "NormalHedgeBH": NormalHedgeBH(),
    "Squint": Squint(),
    "AdaNormalHedgeTV": AdaNormalHedgeTV(),
}
PLANNED = 10**9


def measure(*, scale: float = 1.0, seed: int = 0, jobs: int = 1, **sweeping: Any) -> pd.DataFrame:
    """One row per learner and repetition: rounds, seconds of the processor."""
    cells = [
        {"learner": name, "repetition": k, "rounds": max(int(ROUNDS * scale), 2)}
        for k in range(max(ceil(3 * scale), 1))
        for name in LEARNERS
    ]
    return sweep(timed, cells, seed=seed, jobs=jobs, **sweeping)


def timed(learner: str, repetition: int, rounds: int, seed: int) -> Row:
    """Processor time of one play."""
    few = min(rounds, 1000)
    losses = environments.bernoulli(environments.gapped(few, N), batch=QUERIES, rng=(seed, repetition))
    player = LEARNERS[learner]
    start = process_time()
    for _ in turns(player, player.init(N, QUERIES), [0] * rounds, lambda t, _: losses[t % few]):
        pass
    return {"played": rounds * QUERIES, "seconds": process_time() - start}


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Million rounds a second (median), and hours that 10^9 rounds take on one core."""
    rate = (table["played"] / table["seconds"]).groupby(table["learner"], sort=False).median()
    found = pd.DataFrame({"million_rounds_per_second": rate / 1e6, "hours_for_1e9": PLANNED / rate / 3600})
    return found.round(3).rename_axis("learner").reset_index()


def figure(table: pd.DataFrame) -> Figure:
    """Bars of rounds a second, with the hours of a billion rounds beside them."""
    found = summary(table).iloc[::-1]
    drawing = Figure(figsize=(8, 3.6), layout="constrained")
    axes = drawing.subplots()
    bars = axes.barh(found["learner"], found["million_rounds_per_second"], color="#0072b2")
    texts = [f"{60 * hours:.0f} min for 10⁹" for hours in found["hours_for_1e9"]]
    axes.bar_label(bars, texts, padding=4, fontsize=8)
    axes.set(xlabel="million rounds a second, one core", xlim=(0, 1.25 * np.max(found.iloc[:, 1])))
    axes.spines[["top", "right"]].set_visible(False)
    return drawing
