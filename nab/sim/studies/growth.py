"""How regret grows with rounds and drafters: full information against bandits.

The table has the expected regret against the best drafter in hindsight, under several adversaries of which
the worst counts, since that is what bounds are about: independent losses 0 or 1 with mean 1/2, less by a gap
for one drafter, at six gaps; and loss 1 for the likeliest drafters that together hold half of the mass (not
for UCB1, which has no bound there). Full information grows as ``sqrt(T ln n)``, EXP3 as ``sqrt(T n ln n)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

import nab
from nab.learners import AdaNormalHedge, bandits
from nab.sim import bounds, environments
from nab.sim.play import pulls, turns
from nab.sim.sweep import Row, sweep
from nab.types import Floats

GAPS, BLOCKS = 6, 10
LEARNERS = {"Hedge": nab.Hedge(), "NormalHedge": nab.NormalHedge(), "AdaNormalHedge": AdaNormalHedge()}
BANDITS = {"EXP3": bandits.EXP3(), "UCB1": bandits.UCB1()}
POLICIES: dict[str, Any] = LEARNERS | BANDITS
COLOURS = dict(zip(POLICIES, ["#0072b2", "#009e73", "#56b4e9", "#d55e00", "#cc79a7"], strict=True))


def measure(*, scale: float = 1.0, seed: int = 0, jobs: int = 1, **sweeping: Any) -> pd.DataFrame:
    """One row per policy, rounds, n, adversary and block of seeds."""
    most = max(int(16384 * scale), 64)
    counts = [n for n in (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if 4 * n <= most]
    sizes = dict.fromkeys([*((most, n) for n in counts), *((4 * most // 4**k, 8) for k in range(4))])
    cells = [{"policy": name, "rounds": rounds, "n": n} for rounds, n in sizes for name in POLICIES]
    return sweep(regrets, cells, seed=seed, jobs=jobs, **sweeping)


def regrets(policy: str, rounds: int, n: int, seed: int) -> Iterator[Row]:
    """Regret of one policy under all adversaries, without keeping a loss."""
    gaps = np.geomspace(rounds**-0.5, 0.5, GAPS)
    batch = GAPS * BLOCKS * (4 if n <= 64 else 1)
    means = np.full((n, batch), 0.5)
    means[0] -= np.repeat(gaps, batch // GAPS)
    random = np.random.default_rng(seed)
    found = final(policy, means.shape, rounds, seed, lambda _: random.random(means.shape) < means)
    for gap, row in zip(gaps, found.reshape(GAPS, BLOCKS, -1).mean(2), strict=True):
        yield from (
            {"adversary": f"gap {gap:.3g}", "block": b, "regret": x} for b, x in enumerate(row.tolist())
        )
    if policy != "UCB1":
        found = final(policy, (n, BLOCKS), rounds, seed, environments.half_mass)
        yield from ({"adversary": "half mass", "block": b, "regret": x} for b, x in enumerate(found.tolist()))


def final(
    policy: str, shape: tuple[int, int], rounds: int, seed: int, losses: Callable[[Any], Any]
) -> Floats:
    """Expected regret against the best drafter after the last round, ``(batch,)``."""
    sums, lost = np.zeros(shape), np.zeros(shape[1])

    def answer(_: int, law: Floats) -> Floats:
        given = np.asarray(losses(law), dtype=np.float64)
        np.add(sums, given, out=sums)
        np.add(lost, (law * given).sum(0), out=lost)
        return given

    player = POLICIES[policy]
    if policy in BANDITS:
        uniforms = np.random.default_rng((seed, 1)).random((rounds, shape[1]))
        played: Iterator[Any] = pulls(player, player.init(*shape), uniforms, answer)
    else:
        played = turns(player, player.init(*shape), [0] * rounds, answer)
    for _ in played:
        pass
    return np.asarray(lost - sums.min(0))


def worst(table: pd.DataFrame) -> pd.DataFrame:
    """Regret under the adversary where its mean is largest, per policy, rounds, n and block."""
    where = ["policy", "rounds", "n"]
    means = table.groupby([*where, "adversary"], as_index=False)["regret"].mean()
    at = means.loc[means.groupby(where)["regret"].idxmax(), [*where, "adversary"]]
    return at.merge(table, on=[*where, "adversary"])


def across_at(table: pd.DataFrame) -> int:
    """The number of rounds at which drafters are counted."""
    return int(table.loc[table["n"] == table["n"].max(), "rounds"].max())


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Exponents: of T in the regret at n = 8, of ln n and of n in the regret at one T.

    Least squares on logarithms, block by block; the interval is that of the mean of the blocks' slopes, 95 %.
    """
    found = worst(table)
    most = across_at(found)
    fits = []
    for policy, rows in found.groupby("policy", sort=False):
        along, across = rows[rows["n"] == 8], rows[rows["rounds"] == most]
        for axis, part, x in (
            ("T", along, np.log(along["rounds"])),
            ("ln n", across, np.log(np.log(across["n"]))),
            ("n", across, np.log(across["n"])),
        ):
            slopes = [
                np.polyfit(x[part["block"] == block], np.log(part.loc[part["block"] == block, "regret"]), 1)[
                    0
                ]
                for block in range(BLOCKS)
            ]
            half = stats.t.ppf(0.975, BLOCKS - 1) * np.std(slopes, ddof=1) / BLOCKS**0.5
            fits.append({"policy": policy, "of": axis, "exponent": np.mean(slopes), "half_width": half})
    return pd.DataFrame(fits)


def figure(table: pd.DataFrame) -> Figure:
    """Regret against T at n = 8, and against n at one T; exponents in the legend."""
    found = worst(table)
    means = found.groupby(["policy", "rounds", "n"], as_index=False, sort=False)["regret"].mean()
    fits = summary(table).set_index(["policy", "of"])
    most = across_at(found)
    drawing = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = drawing.subplots(1, 2)
    for policy in POLICIES:
        rows = means[means["policy"] == policy]
        bandit = policy in BANDITS
        style = {"color": COLOURS[policy], "marker": "s" if bandit else "o", "markersize": 4}
        slope, half = fits.loc[(policy, "T"), ["exponent", "half_width"]]
        along = rows[rows["n"] == 8].sort_values("rounds")
        left.plot(along["rounds"], along["regret"], label=f"{policy}: T^{slope:.2f} ± {half:.2f}", **style)
        name = "n" if bandit else "ln n"
        slope, half = fits.loc[(policy, name), ["exponent", "half_width"]]
        across = rows[rows["rounds"] == most].sort_values("n")
        power = f"n^{slope:.2f}" if bandit else f"(ln n)^{slope:.2f}"
        right.plot(across["n"], across["regret"], label=f"{policy}: {power} ± {half:.2f}", **style)
    rounds, n = np.sort(means["rounds"].unique()), np.sort(means["n"].unique())
    for name, bound, line in (("Hedge", bounds.hedge_anytime, "--"), ("EXP3", bounds.exp3_anytime, ":")):
        style = {"color": "0.55", "linewidth": 1, "linestyle": line, "label": f"bound of {name}"}
        left.plot(rounds, [bound(8, int(t)) for t in rounds], **style)
        right.plot(n, [bound(int(k), most) for k in n], **style)
    left.set(
        xscale="log", yscale="log", xlabel="rounds T", ylabel="regret, worst adversary", title="8 drafters"
    )
    right.set(xscale="log", yscale="log", xlabel="drafters n", title=f"T = {most}")
    right.set_xscale("log", base=2)
    left.set_ylim(bottom=1)
    right.set_ylim(top=1e6)
    left.legend(fontsize=8, frameon=False, loc="lower right")
    right.legend(fontsize=8, frameon=False, loc="upper left")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return drawing
