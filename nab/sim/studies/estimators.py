"""The plug-in length estimate against the unbiased one: exact bias, spread, and what the bias costs.

Random Markov targets with drafters that know some contexts and not others. For every instance, rule and draft
length the table has the exact mean and standard deviation of the three estimators at a random position of a
long text, and the exact length of a round that starts there. The plug-in takes acceptances for independent:
wrong as soon as what was accepted says something about what comes next, and more so for trees. A learner that
believes it goes for the drafter with the largest mean estimate, at times not the best one.

Best is here whose rounds are the longest from a random position. The rounds of a drafter start at positions
of their own, so the one with the largest MAT can be another: ``choices(table, "mat")`` says how often each of
the three estimators misses that one, which no estimate at random positions sees.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from nab.acceptance import Chain, TopK
from nab.sim import exact
from nab.sim.markov import Markov
from nab.sim.sweep import Row, sweep
from nab.types import AcceptanceRule

VOCAB, N = 16, 6
RULES: dict[str, AcceptanceRule] = {"chain": Chain(), "top-4 tree": TopK(4)}
COLOURS = {"chain": "#0072b2", "top-4 tree": "#d55e00"}
ESTIMATORS = {"plug-in": "o", "unbiased": "s", "ratio": "^"}
DRAFT_LENS = [2, 4, 8]


def measure(*, scale: float = 1.0, seed: int = 0, jobs: int = 1, **sweeping: Any) -> pd.DataFrame:
    """One row per rule, draft length, instance, drafter and estimator; the worked example is instance -1.

    Columns ``mean`` and ``deviation`` are the estimator's, ``length`` is the true one and ``mat`` that of the
    positions where rounds start. Other keywords go to ``nab.sim.sweep.sweep``.
    """
    instances = range(-1, max(int(200 * scale), 2))
    return sweep(moments, {"instance": list(instances)}, seed=seed, jobs=jobs, **sweeping)


def moments(instance: int, seed: int) -> list[Row]:
    """All rules, draft lengths, drafters and estimators on one instance."""
    if instance < 0:
        found = exact.estimators(*worked_example(), 2)
        return [
            {"rule": "chain", "draft_len": 2, "drafter": 0, "estimator": name, "length": 2.0}
            | {"mean": each.mean[0], "deviation": (each.square[0] - each.mean[0] ** 2) ** 0.5}
            for name, each in found.items()
        ]
    target, pool = random_instance(np.random.default_rng([seed, instance]))
    start = exact.stationary(target.table)
    rows: list[Row] = []
    for rule, draft_len in ((rule, draft_len) for rule in RULES for draft_len in DRAFT_LENS):
        for drafter, q in enumerate(pool):
            law = exact.round_law(target, q, draft_len, RULES[rule])
            true = {"length": float(exact.lengths(law) @ start), "mat": exact.mean_acceptance_length(law)}
            for name, each in exact.estimators(target, q, draft_len, RULES[rule]).items():
                mean, variance = each.over(start)
                row = {"rule": rule, "draft_len": draft_len, "drafter": drafter, "estimator": name}
                rows.append(row | true | {"mean": mean, "deviation": max(variance, 0.0) ** 0.5})
    return rows


def worked_example() -> tuple[Markov, Markov]:
    """From token 0, at draft length 2: true length 2.000, plug-in 2.080."""
    return Markov(np.full((2, 2), 0.5)), Markov(np.array([[0.9, 0.1], [0.5, 0.5]]))


def random_instance(random: np.random.Generator) -> tuple[Markov, list[Markov]]:
    """A sparse target; each drafter mixes it with a law of its own, by a share that depends on the token."""
    shape, sparse = (VOCAB, VOCAB), np.full(VOCAB, 0.3)
    target = random.dirichlet(sparse, VOCAB)
    shares = random.beta(0.5, 0.5, (N, VOCAB, 1))
    others = random.dirichlet(sparse, (N, VOCAB)).reshape(N, *shape)
    return Markov(target), [Markov(each) for each in (1 - shares) * target + shares * others]


def choices(table: pd.DataFrame, by: str = "length") -> pd.DataFrame:
    """Per rule, draft length, estimator and instance: is the drafter of the largest mean a worse one.

    ``cost`` is the share of the best drafter's length that is lost by choosing it; ``by`` is the column that
    says which is the best, ``length`` or ``mat``.
    """
    keys = ["rule", "draft_len", "estimator", "instance"]
    drawn = table[table["instance"] >= 0]
    picked = drawn.loc[drawn.groupby(keys)["mean"].idxmax()].set_index(keys)
    best = drawn.groupby(keys)[by].max()
    cost = 1 - picked[by] / best
    return pd.DataFrame({"wrong": cost > 1e-9, "cost": cost.clip(lower=0)}).reset_index()


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Per rule, draft length and estimator: bias, deviation, wrong choices and what the worst of them costs.

    Bias in per cent of the length, choices and costs in per cent, by the length that is estimated and by MAT.
    """
    keys = ["rule", "draft_len", "estimator"]
    drawn = table[table["instance"] >= 0]
    bias = drawn.assign(bias=100 * (drawn["mean"] / drawn["length"] - 1)).groupby(keys)
    columns = {
        "least": bias["bias"].min(),
        "most": bias["bias"].max(),
        "deviation": bias["deviation"].mean(),
    }
    for by in ("length", "mat"):
        picks = choices(table, by).groupby(keys)
        columns |= {f"wrong_{by}": 100 * picks["wrong"].mean(), f"cost_{by}": 100 * picks["cost"].max()}
    return (pd.DataFrame(columns).round(2) + 0.0).reset_index()


def figure(table: pd.DataFrame) -> Figure:
    """Bias of the plug-in, standard deviations of all three, and how often the bias picks a worse drafter."""
    drawing = Figure(figsize=(11, 4), layout="constrained")
    bias, spread, wrong = drawing.subplots(1, 3)
    drawn, place = table[table["instance"] >= 0], np.arange(len(DRAFT_LENS))
    picks = choices(table)
    for shift, (rule, colour) in zip((-0.18, 0.18), COLOURS.items(), strict=True):
        rows = drawn[drawn["rule"] == rule]
        plug_in = rows[rows["estimator"] == "plug-in"]
        off = [
            100 * (each["mean"] / each["length"] - 1)
            for each in (plug_in[plug_in["draft_len"] == k] for k in DRAFT_LENS)
        ]
        bias.boxplot(
            off,
            positions=place + shift,
            widths=0.3,
            whis=(0, 100),
            patch_artist=True,
            boxprops={"facecolor": colour, "alpha": 0.5},
            medianprops={"color": "black"},
        )
        for name, marker in ESTIMATORS.items():
            each = rows[rows["estimator"] == name].groupby("draft_len")["deviation"].mean()
            line = "-" if rule == "chain" else "--"
            spread.plot(place, each, line, marker=marker, color=colour, ms=5, label=f"{name}, {rule}")
        chosen = picks[(picks["rule"] == rule) & (picks["estimator"] == "plug-in")].groupby("draft_len")
        bars = wrong.bar(place + shift, 100 * chosen["wrong"].mean(), 0.34, color=colour, label=rule)
        wrong.bar_label(bars, [f"{100 * cost:.1f} %" for cost in chosen["cost"].max()], fontsize=8, padding=2)
    example = table[(table["instance"] < 0) & (table["estimator"] == "plug-in")].iloc[0]
    off = 100 * (example["mean"] / example["length"] - 1)
    bias.plot(0, off, "*", color="black", ms=9)
    note = f"two tokens, K = 2:\n{example['mean']:.3f} for {example['length']:.3f}"
    bias.annotate(
        note, (0, off), (-4, 30), textcoords="offset points", fontsize=8, arrowprops={"arrowstyle": "-"}
    )
    bias.axhline(0, color="0.6", lw=0.8)
    bias.set(ylabel="% of the true length", title="bias of the plug-in\n(median, quartiles, extremes)")
    spread.set(ylabel="standard deviation, tokens", title="spread of one estimate\n(mean over drafters)")
    spread.legend(fontsize=8, frameon=False)
    wrong.set(ylabel="% of instances", title="plug-in prefers a worse drafter\n(label: most length lost)")
    wrong.margins(y=0.2)
    wrong.legend(fontsize=8, frameon=False, loc="upper left")
    for axes in (bias, spread, wrong):
        axes.set_xticks(place, [str(k) for k in DRAFT_LENS])
        axes.set_xlabel("draft length K")
        axes.spines[["top", "right"]].set_visible(False)
    return drawing
