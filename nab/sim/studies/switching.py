"""Queries whose domain changes: learners that track against learners that sum, and what tracking costs.

Four experts and a generalist; the domain changes m times in a query of 512 positions, and losses are about as
smooth as acceptance probabilities (Beta, concentration 8). What a policy loses beyond the best single drafter
in hindsight is negative where tracking wins; tracking regret is against the best sequence of drafters with m
switches in hindsight.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import nab
from nab.learners import AdaNormalHedge, AdaNormalHedgeTV, FixedShare
from nab.learners.fixed_share import tuned_rate
from nab.sim import best_sequence, bounds, environments, play
from nab.sim.regret import lost
from nab.sim.sweep import Row, sweep

ROUNDS, DOMAINS, QUERIES = 512, 4, 64
STATIC = {"Hedge": nab.Hedge(), "NormalHedge": nab.NormalHedge(), "AdaNormalHedge": AdaNormalHedge()}
TRACKING = {
    "NormalHedge, discount .97": nab.NormalHedge(discount=0.97),
    "NormalHedge, discount .9": nab.NormalHedge(discount=0.9),
    "FixedShare .03": FixedShare(0.03),
    "FixedShare .03, argmax": FixedShare(0.03),
    "AdaNormalHedgeTV": AdaNormalHedgeTV(),
}
POLICIES: dict[str, Any] = STATIC | TRACKING
COLOURS = ["#999999", "#666666", "#000000", "#0072b2", "#56b4e9", "#009e73", "#d55e00", "#cc79a7"]


def measure(*, scale: float = 1.0, seed: int = 0, jobs: int = 1, **sweeping: Any) -> pd.DataFrame:
    """One row per policy, number of switches and query; losses are means per position."""
    grid: dict[str, Any] = {
        "switches": [0, 1, 3, 7, 15, 31],
        "queries": [max(int(QUERIES * scale), 2)],
        "policy": [*POLICIES],
    }
    return sweep(query_losses, grid, seed=seed, jobs=jobs, **sweeping).drop(columns="queries")


def query_losses(policy: str, switches: int, queries: int, seed: int) -> list[Row]:
    """What a policy, the best single drafter and the best sequence lose on the same queries."""
    domains = np.arange(ROUNDS) * (switches + 1) // ROUNDS % DOMAINS
    means = environments.experts(domains, DOMAINS + 1)
    losses = environments.beta(means, concentration=8, batch=queries, rng=(seed, switches))
    laws, _ = play(POLICIES[policy], losses)
    if policy.endswith("argmax"):
        laws = np.eye(DOMAINS + 1)[laws.argmax(1)].transpose(0, 2, 1)
    paid = lost(laws, losses).sum(0)
    found = np.array([paid, losses.sum(0).min(0), best_sequence(losses, switches)[-1]]) / ROUNDS
    return [
        dict(zip(("query", "loss", "best_single", "best_sequence"), (i, *row), strict=True))
        for i, row in enumerate(found.T.tolist())
    ]


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Loss beyond the best single drafter, in per cent of it, by policy and number of switches; means."""
    ratio = 100 * (table["loss"] / table["best_single"] - 1)
    rows = table.assign(percent=ratio).pivot_table(
        values="percent", index="policy", columns="switches", sort=False
    )
    return (rows.round(1) + 0.0).reset_index()


def figure(table: pd.DataFrame) -> Figure:
    """Loss beyond the best single drafter's, and tracking regret, against switches; 95 % intervals."""
    drawing = Figure(figsize=(10.5, 4.4), layout="constrained")
    left, right = drawing.subplots(1, 2)
    counts = np.sort(table["switches"].unique())
    places = np.arange(len(counts))
    beyond = {
        left: table["loss"] - table["best_single"],
        right: ROUNDS * (table["loss"] - table["best_sequence"]),
    }
    for axes, values in beyond.items():
        groups = table.assign(value=values).groupby(["policy", "switches"])["value"]
        middle, error = groups.mean(), 1.96 * groups.sem()
        for policy, colour in zip(POLICIES, COLOURS, strict=True):
            dashed = "--" if policy in STATIC else "-"
            y = middle[policy].to_numpy()
            axes.errorbar(places, y, error[policy], label=policy, color=colour, linestyle=dashed, capsize=2)
        axes.set_xticks(places, counts)
        axes.set_xlabel("domain changes in a query of 512 positions")
        axes.spines[["top", "right"]].set_visible(False)
    left.axhline(0, color="black", linewidth=0.8)
    left.set_title("loss a position beyond the best single's", fontsize=10)
    rate = tuned_rate(0.03, DOMAINS + 1)
    limit = [bounds.fixed_share(DOMAINS + 1, ROUNDS, int(m), 0.03, rate) for m in counts]
    right.plot(places, limit, color="#009e73", linestyle=":", label="bound of FixedShare .03")
    right.set_title("tracking regret: beyond the best sequence", fontsize=10)
    right.set_yscale("symlog", linthresh=1)
    handles, labels = right.get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    return drawing
