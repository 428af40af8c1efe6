"""Why not follow the leader: as good as any learner where nothing changes, linear regret where it does.

Left: independent losses, one drafter better on average, eight drafters. Middle: two drafters that take turns
at being right after one half loss: the leader is always wrong. Right: the better of two drafters changes
every 250 rounds; regret there is against the drafter that is better at the time.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

import nab
from nab.learners import AdaHedge, FixedShare, FollowTheLeader
from nab.sim import environments, play
from nab.sim.regret import lost
from nab.sim.sweep import Row, sweep
from nab.types import Floats

ROUNDS = 2000
POLICIES: dict[str, Any] = {
    "FollowTheLeader": FollowTheLeader(),
    "NormalHedge": nab.NormalHedge(),
    "AdaHedge": AdaHedge(),
    "FixedShare .01": FixedShare(0.01),
    "NormalHedge, discount .97": nab.NormalHedge(discount=0.97),
}
STYLES = [("#d55e00", "-"), ("#0072b2", "--"), ("#000000", ":"), ("#009e73", "-"), ("#cc79a7", "-")]


def stationary(queries: int, seed: int) -> tuple[Floats, Floats]:
    """Losses, and what the drafter to compare with lost by each round, ``(rounds, batch)``."""
    losses = environments.bernoulli(environments.gapped(ROUNDS, 8, gap=0.1), batch=queries, rng=seed)
    return losses, losses.cumsum(0).min(1)


def leader_killer(queries: int, seed: int) -> tuple[Floats, Floats]:
    """Likewise; deterministic."""
    losses = environments.leader_killer(ROUNDS)[:, :, None]
    return losses, losses.cumsum(0).min(1)


def switching(queries: int, seed: int) -> tuple[Floats, Floats]:
    """Likewise, with the drafter that is better at the time; deterministic."""
    losses = environments.switching(ROUNDS, 2, switches=7, gap=0.5, level=0.75)[:, :, None]
    return losses, losses.min(1).cumsum(0)


PLACES = [stationary, leader_killer, switching]


def measure(*, scale: float = 1.0, seed: int = 0, jobs: int = 1, **sweeping: Any) -> pd.DataFrame:
    """One row per environment, policy and every 20th round: mean regret so far."""
    grid: dict[str, Any] = {
        "environment": PLACES,
        "policy": [*POLICIES],
        "queries": [max(int(64 * scale), 2)],
    }
    return sweep(curve, grid, seed=seed, jobs=jobs, **sweeping).drop(columns="queries")


def curve(environment: Any, policy: str, queries: int, seed: int) -> list[Row]:
    """Mean regret after every 20th round."""
    losses, best = environment(queries, seed)
    laws, _ = play(POLICIES[policy], losses)
    regret = (lost(laws, losses).cumsum(0) - best).mean(1)
    return [{"rounds": t + 1, "regret": float(regret[t])} for t in range(19, ROUNDS, 20)]


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Regret at the end, by policy and environment."""
    last = table[table["rounds"] == ROUNDS]
    return last.pivot(index="policy", columns="environment", values="regret").round(1).reset_index()


def figure(table: pd.DataFrame) -> Figure:
    """Regret against rounds in the three environments."""
    drawing = Figure(figsize=(10.5, 3.8), layout="constrained")
    titles = ["stationary", "made against the leader", "the better drafter changes"]
    panels = drawing.subplots(1, 3)
    for axes, place, title in zip(panels, PLACES, titles, strict=True):
        rows = table[table["environment"] == place.__name__]
        for policy, (colour, dash) in zip(POLICIES, STYLES, strict=True):
            part = rows[rows["policy"] == policy]
            axes.plot(part["rounds"], part["regret"], color=colour, linestyle=dash, linewidth=2, label=policy)
        axes.set(title=title, xlabel="rounds", ylim=(min(0, rows["regret"].min()), None))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("regret")
    handles, labels = panels[0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return drawing
