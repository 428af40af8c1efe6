"""What scoring every drafter costs a round, up to which n it pays, and what the paper reports.

Facts of Liu et al. 2025 (arXiv 2510.20064), from their tables and measurements, set against ``nab.sim.cost``.
docs/costs.md says what follows from the numbers and what does not.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from nab.sim.cost import Engine, Machine, Model, break_even, overhead, round_time

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

TABLES = {
    "Llama-3.1-8B": {
        "EAGLE-3": (5.69, 74.3),
        "UCBSpec": (5.09, 68.9),
        "EXP3Spec": (4.86, 65.2),
        "HedgeSpec": (7.15, 90.4),
    },
    "Qwen3-8B": {"EAGLE-3": (4.23, 47.5), "HedgeSpec": (6.37, 69.4)},
    "Qwen3-32B": {
        "EAGLE-3": (2.88, 20.8),
        "UCBSpec": (4.50, 33.2),
        "EXP3Spec": (4.33, 31.6),
        "HedgeSpec": (6.21, 40.4),
    },
}
"""MAT and tokens per second, means over seven domains, as printed: two decimals and one."""
LENGTH, ALONE = TABLES["Llama-3.1-8B"]["HedgeSpec"][0], TABLES["Llama-3.1-8B"]["EAGLE-3"][0]
GAIN = LENGTH / ALONE - 1
REPORTED = (0.012, 0.020)
"""Evaluation overhead as the paper reports it."""
TARGET_SECONDS, DRAFTER_SECONDS, UPDATE_SECONDS = 75.7e-3, 2.5e-3, 0.413e-3
"""Measured there with Llama-3.1-8B on A100s: a target forward, a drafter forward, a learner update."""
POOL = 7

TARGET = Model(weights=16e9, flops=16e9, kv=2**17, layers=32)
"""Llama-3.1-8B in FP16: 8e9 parameters, two FLOPs and two bytes each; 32 layers of 8 heads of 128."""
DRAFTER = Model(weights=0.76e9, flops=0.76e9, kv=2**12, layers=1)
"""An EAGLE-3 head: 0.76 GB, and 32 MB of keys and values for 8192 tokens."""
A100 = Machine(bandwidth=2.039e12, peak=312e12)
"""SXM, 80 GB; NVIDIA's data sheet."""
LAUNCH = DRAFTER_SECONDS - DRAFTER.weights / A100.bandwidth
"""Seconds a layer that explain the drafter's 2.5 ms; from the target's 75.7 ms follows nearly the same."""

EAGER = Engine(replace(A100, launch=LAUNCH), TARGET, DRAFTER, draft_len=0, update=UPDATE_SECONDS)
MEASURED = Engine(
    Machine(bandwidth=np.inf, launch=DRAFTER_SECONDS),
    replace(TARGET, layers=TARGET_SECONDS / DRAFTER_SECONDS),
    DRAFTER,
    draft_len=0,
    update=UPDATE_SECONDS,
)
"""A forward takes what was measured, whatever is in it."""
ENGINES = {
    "loop": EAGER,
    "batched": replace(EAGER, batched=True),
    "bandwidth limit": replace(EAGER, machine=A100, update=0.0),
    "measured, loop": MEASURED,
    "measured, batched": replace(MEASURED, batched=True),
    "measured, hidden": replace(MEASURED, hidden=True),
}
DRAFT_LENS = (0, 8)
"""0: over the target's forward alone, as shares are published; 8: the least that gives lengths of 8.5."""
PERIODS = (1, 2, 4, 8, 16, 32)
DRAWN = {
    "loop": "2.1 ms a layer, one after the other",
    "batched": "2.1 ms a layer, one batched forward",
    "bandwidth limit": "memory-bandwidth limit",
}
SHOWN = {1: "#D55E00", 4: "#0072B2", 16: "#009E73"}
"""Periods drawn and their colours (Okabe and Ito's)."""
MARKERS = {"Llama-3.1-8B": ("o", 1.0), "Qwen3-8B": ("s", 1.15), "Qwen3-32B": ("^", 1.0)}
"""And a little to the side, where two targets are one above the other."""


def implied(target: str, method: str) -> tuple[float, float, float]:
    """Seconds of a round, ``MAT / (tokens per second)``: as printed, between what rounding allows."""
    length, rate = TABLES[target][method]
    return (length - 0.005) / (rate + 0.05), length / rate, (length + 0.005) / (rate - 0.05)


def measure(*, scale: float = 1.0, seed: int = 0, jobs: int = 1, **sweeping: Any) -> DataFrame:
    """One row for each engine, ``draft_len``, period and n; then one for each figure of the paper.

    Nothing is drawn and all of it takes a moment, so the arguments change nothing.

    Returns:
        Columns ``source`` (model, reported, implied); ``engine``, or the paper's ``target`` and ``method``;
        ``draft_len``, ``period``, ``n``; ``overhead`` as a share, with ``low`` and ``high`` (implied: of
        HedgeSpec's rounds over this method's); ``round_ms``, and ``break_even`` at Llama's lengths.
    """
    import pandas as pd

    return pd.DataFrame([*_predicted(), *_published()])


def _predicted() -> list[dict[str, Any]]:
    n = np.arange(1, 65)
    rows = []
    for name, base in ENGINES.items():
        for draft_len in DRAFT_LENS:
            for period in PERIODS:
                engine = replace(base, draft_len=draft_len, period=period)
                fixed = {"source": "model", "engine": name, "draft_len": draft_len, "period": period}
                fixed["break_even"] = float(break_even(engine, LENGTH, ALONE))
                shares, times = overhead(engine, n, LENGTH), 1e3 * round_time(engine, n, LENGTH)
                for count, share, time in zip(n.tolist(), shares.tolist(), times.tolist(), strict=True):
                    rows.append({**fixed, "n": count, "overhead": share, "round_ms": time})
    return rows


def _published() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"source": "reported", "n": POOL, "low": REPORTED[0], "high": REPORTED[1]}]
    for target, methods in TABLES.items():
        low, middle, high = implied(target, "HedgeSpec")
        for method in methods:
            least, time, most = implied(target, method)
            row = {"source": "implied", "target": target, "method": method, "n": POOL, "round_ms": 1e3 * time}
            if method != "HedgeSpec":
                row |= {"overhead": middle / time - 1, "low": low / most - 1, "high": high / least - 1}
            rows.append(row)
    return rows


def summary(table: DataFrame) -> DataFrame:
    """Overhead over the target's forward at seven drafters, and break-even n, by engine and period."""
    rows = table[(table["n"] == POOL) & (table["draft_len"] == 0)]
    found = rows[["engine", "period", "overhead", "round_ms", "break_even"]]
    return found.round({"overhead": 4, "round_ms": 1})


def figure(table: DataFrame) -> Figure:
    """Overhead against n, over the target's forward: a panel per engine, a line per period.

    Dots are the break-even n, where scoring costs what it gains. The paper's figures stand at its seven
    drafters, in the panels of its stack, with what rounding of the printed tables allows.
    """
    from matplotlib.figure import Figure

    picture = Figure(figsize=(10, 4.6), layout="constrained")
    panels = picture.subplots(1, len(DRAWN), sharex=True, sharey=True)
    drawn = table[(table.source == "model") & (table.draft_len == 0)]
    for axes, (engine, title) in zip(panels, DRAWN.items(), strict=True):
        _curves(axes, drawn[drawn.engine == engine])
        axes.set_title(title, size="medium")
    for axes in panels[:2]:
        points = _points(axes, table)
    words = {"textcoords": "offset points", "size": "small"}
    panels[1].annotate("gained: MAT 7.15 over 5.69", (1, 100 * GAIN), (0, 3), **words)
    weights = POOL * DRAFTER.weights / TARGET.weights
    panels[2].plot(POOL, 100 * weights, "k*", ms=11, zorder=4)
    panels[2].annotate("7 x 0.76 / 16 GB", (POOL, 100 * weights), (-8, 5), ha="right", **words)
    panels[0].set_ylabel("evaluation overhead,\n% of the target's forward")
    panels[1].set_xlabel("n, drafters scored")
    picture.legend(
        handles=points, loc="outside lower center", ncols=len(points), frameon=False, fontsize="small"
    )
    return picture


def _curves(axes: Any, rows: DataFrame) -> None:
    """Overhead by period, and where it meets the gain."""
    axes.axhline(100 * GAIN, color="0.4", lw=1, ls="--")
    for (period, colour), style in zip(SHOWN.items(), ("-", "-.", ":"), strict=True):
        line = rows[rows.period == period]
        n = line.break_even.iloc[0]
        label = f"every {period} rounds" if period > 1 else "every round"
        axes.plot(line.n, 100 * line.overhead, style, color=colour, label=f"{label}: pays up to n = {n:.0f}")
        if n <= line.n.max():
            axes.plot(n, 100 * line.overhead[line.n == n], "o", color=colour, ms=6)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(2 ** np.arange(7), [str(2**k) for k in range(7)])
    axes.set_yticks([0.3, 1, 3, 10, 30, 100, 300], ["0.3", "1", "3", "10", "30", "100", "300"])
    axes.minorticks_off()
    axes.set(xlim=(0.9, 72), ylim=(0.2, 1500))
    axes.grid(color="0.92")
    axes.legend(loc="upper left", frameon=False, fontsize="small")


def _points(axes: Any, table: DataFrame) -> list[Any]:
    """The paper's figures at its pool of seven; their handles."""
    reported = table[table.source == "reported"].iloc[0]
    ends = [100 * reported.low, 100 * reported.high]
    handles = axes.plot([POOL] * 2, ends, "-", color="k", lw=5, solid_capstyle="butt", label="reported")
    for target, (marker, shift) in MARKERS.items():
        rows = table[(table.source == "implied") & (table.target == target) & table.overhead.notna()]
        spread = 100 * np.stack([rows.overhead - rows.low, rows.high - rows.overhead])
        places = [POOL * shift] * len(rows)
        drawn = axes.errorbar(places, 100 * rows.overhead, spread, fmt=f"k{marker}", mfc="w", ms=5, lw=1)
        aside = " (drawn aside)" if shift > 1 else ""
        drawn.set_label(f"implied by the tables, {target}{aside}")
        handles.append(drawn)
    return list(handles)
