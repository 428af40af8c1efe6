"""Late, block-wise and lazy feedback: what each costs in regret, against its bound, and saves in evaluations.

Left: Hedge at the rate its bound is tuned for, eight drafters, 4096 rounds, against the worst adversary: one
hits half of the law's mass; under the others two drafters take turns, every p rounds, and the rest are
always wrong. One instance with feedback d rounds late, d + 1 interleaved ones, and blocks of d + 1 rounds.
Right: all drafters scored behind every m-th round only, on independent losses of eight drafters with a gap
of 0.1, 2000 rounds; bandits never score the others.
"""

from __future__ import annotations

from math import log, sqrt
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import nab
from nab.learners import AdaNormalHedge, Blocks, Interleaved, bandits
from nab.sim import bounds, environments, lazily, play, play_bandit, regret
from nab.sim.sweep import Row, sweep

ROUNDS, N = 4096, 8
DELAYS = [0, 1, 3, 7, 15, 31]
PERIODS = [1, 2, 4, 8, 16, 32, 64]
LAZY: dict[str, Any] = {
    "NormalHedge": nab.NormalHedge(),
    "Hedge": nab.Hedge(),
    "AdaNormalHedge": AdaNormalHedge(),
}
BANDITS: dict[str, Any] = {"UCB1": bandits.UCB1(), "EXP3": bandits.EXP3()}
COLOURS = {
    "one instance": "#0072b2",
    "interleaved": "#009e73",
    "blocks": "#d55e00",
    "NormalHedge": "#0072b2",
    "Hedge": "#009e73",
    "AdaNormalHedge": "#d55e00",
    "UCB1": "#999999",
    "EXP3": "#000000",
}


def measure(*, scale: float = 1.0, seed: int = 0, jobs: int = 1, **sweeping: Any) -> pd.DataFrame:
    """Rows of both panels; ``lag`` is d, or m, and 0 for bandits."""
    rounds, queries = max(int(ROUNDS * scale) // 32, 2) * 32, max(int(200 * scale), 4)
    cells = [
        *({"panel": "late", "policy": name, "lag": d, "size": rounds} for d in DELAYS for name in LATE),
        *({"panel": "lazy", "policy": name, "lag": m, "size": queries} for m in PERIODS for name in LAZY),
        *({"panel": "lazy", "policy": name, "lag": 0, "size": queries} for name in BANDITS),
    ]
    return sweep(cell, cells, seed=seed, jobs=jobs, **sweeping).drop(columns="size")


def cell(panel: str, policy: str, lag: int, size: int, seed: int) -> Row:
    """One row of either panel."""
    return late(policy, lag, size) if panel == "late" else lazy(policy, lag, size, seed)


def one_instance(delay: int, rounds: int) -> tuple[Any, int, float]:
    """Learner, delay and bound of one Hedge with late feedback."""
    outstanding = np.minimum(np.arange(rounds), delay)
    rate = sqrt(8 * log(N) / (1 + 2 * outstanding).sum())
    return nab.Hedge(rate), delay, bounds.hedge_delayed(N, rate, outstanding)


def interleaved(delay: int, rounds: int) -> tuple[Any, int, float]:
    """Likewise of ``delay + 1`` instances that take turns."""
    rate = sqrt(8 * (delay + 1) * log(N) / rounds)
    return Interleaved(nab.Hedge(rate), delay), delay, bounds.interleaved(N, rounds, delay, rate)


def blocks(delay: int, rounds: int) -> tuple[Any, int, float]:
    """Likewise of blocks of ``delay + 1`` rounds."""
    rate = sqrt(8 * (delay + 1) * log(N) / rounds)
    return Blocks(nab.Hedge(rate), delay + 1), 0, bounds.blocks(N, rounds, delay + 1, rate)


LATE = {"one instance": one_instance, "interleaved": interleaved, "blocks": blocks}


def late(policy: str, delay: int, rounds: int) -> Row:
    """The largest regret found, and the bound."""
    learner, waits, bound = LATE[policy](delay, rounds)
    paces = {1, delay + 1, 2 * delay + 1, 2 * delay + 2}
    combs = [np.repeat(environments.comb(rounds, N), pace, axis=0)[:rounds] for pace in paces]
    hits = environments.adaptive(learner, N, rounds, environments.half_mass, delay=waits)
    candidates = [hits, *combs]
    found = [regret(play(learner, losses, delay=waits)[0], losses)[-1].max() for losses in candidates]
    return {"regret": float(max(found)), "error": 0.0, "bound": bound}


def lazy(policy: str, period: int, queries: int, seed: int) -> Row:
    """Mean regret over queries against the drafter that is better on average, and its standard error."""
    means = environments.gapped(2000, N, gap=0.1)
    losses = environments.bernoulli(means, batch=queries, rng=seed)
    if policy in BANDITS:
        played: Any = play_bandit(BANDITS[policy], losses, rng=(seed, 1))[0]
    else:
        played = play(LAZY[policy], losses, delay=lazily(len(losses), period))[0]
    found = regret(played, np.broadcast_to(means[:, :, None], losses.shape))[-1].max(0)
    return {"regret": found.mean(), "error": found.std(ddof=1) / queries**0.5, "bound": np.nan}


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Regret by policy and lag; of its bound where there is one."""
    shown = table.assign(of_bound=table["regret"] / table["bound"], evaluations=_share(table))
    return shown.round({"regret": 1, "error": 1, "bound": 1, "of_bound": 2, "evaluations": 3})


def _share(table: pd.DataFrame) -> Any:
    """Share of rounds behind which all drafters are scored."""
    return np.where(table["panel"] == "lazy", np.where(table["lag"] > 0, 1 / table["lag"].clip(1), 0), 1.0)


def figure(table: pd.DataFrame) -> Figure:
    """Regret and bound against the delay; regret against the share of evaluations paid."""
    drawing = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = drawing.subplots(1, 2)
    for policy in LATE:
        rows = table[(table["panel"] == "late") & (table["policy"] == policy)]
        left.plot(rows["lag"] + 1, rows["regret"], "o-", color=COLOURS[policy], label=policy)
        left.plot(rows["lag"] + 1, rows["bound"], ":", color=COLOURS[policy])
    left.plot([], [], ":", color="0.4", label="bound of the same colour")
    left.set(xscale="log", yscale="log", xlabel="d + 1, d: delay in rounds", ylabel="regret, worst found")
    left.set_xticks([d + 1 for d in DELAYS], [str(d + 1) for d in DELAYS])
    left.set_yticks([50, 100, 200, 400], ["50", "100", "200", "400"])
    left.minorticks_off()
    for policy in LAZY:
        rows = table[(table["panel"] == "lazy") & (table["policy"] == policy)]
        right.errorbar(
            1 / rows["lag"],
            rows["regret"],
            1.96 * rows["error"],
            fmt="o-",
            color=COLOURS[policy],
            label=policy,
        )
    for policy in BANDITS:
        rows = table[(table["panel"] == "lazy") & (table["policy"] == policy)]
        right.axhline(
            rows["regret"].iloc[0], color=COLOURS[policy], linestyle="--", label=f"{policy}, pays none"
        )
    right.set(xscale="log", yscale="log", xlabel="share of evaluations paid, 1 / m", ylabel="mean regret")
    right.set_yticks([10, 20, 50, 100, 200], ["10", "20", "50", "100", "200"])
    right.set_xticks([1 / m for m in PERIODS], [f"1/{m}" if m > 1 else "1" for m in PERIODS])
    right.minorticks_off()
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return drawing
