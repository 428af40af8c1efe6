"""A sweep of 10^9 rounds: how NormalHedge's regret depends on gap, switches and lazy period.

    python benchmarks/sweep.py --plan               # what it would take, from a few cells
    python benchmarks/sweep.py --jobs 2             # all of it; may be interrupted and goes on

Each cell is 10 000 rounds of 200 queries with 8 drafters, two million rounds. 500 cells: 5 gaps, 4 numbers of
switches, 5 lazy periods, 5 learners.
"""

from __future__ import annotations

import argparse
from functools import partial
from itertools import islice, product
from pathlib import Path
from time import perf_counter
from typing import Any

import nab
from nab.sim import environments
from nab.sim.sweep import play_row, sweep
from nab.sim.trace import processor

ROUNDS, QUERIES = 10_000, 200
GAPS = [0.02, 0.05, 0.1, 0.2, 0.4]
SWITCHES = [0, 1, 7, 63]
PERIODS = [1, 2, 4, 16, 64]
LEARNERS = [nab.NormalHedge(discount=discount) for discount in (1.0, 0.999, 0.99, 0.97, 0.9)]


def cells() -> list[dict[str, Any]]:
    return [
        {
            "player": learner,
            "path": partial(environments.switching, switches=switches, gap=gap),
            "period": period,
        }
        for learner, gap, switches, period in product(LEARNERS, GAPS, SWITCHES, PERIODS)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", action="store_true", help="measure every 50th cell and extrapolate")
    parser.add_argument("--jobs", type=int, default=1, help="cells side by side; default: 1")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder; default: out")
    given = parser.parse_args()
    chosen = list(islice(cells(), 0, None, 50 if given.plan else 1))
    measure = partial(play_row, rounds=ROUNDS, n=8, batch=QUERIES)
    keep = None if given.plan else given.out / "sweep.jsonl"
    before = len(keep.read_bytes().splitlines()) if keep and keep.exists() else 0
    start = perf_counter()
    table = sweep(measure, chosen, jobs=given.jobs, keep=keep, progress=True)
    seconds, done = perf_counter() - start, (len(chosen) - before) * ROUNDS * QUERIES
    rate = done / seconds
    print(
        f"{processor()}, {given.jobs} side by side: {done:.3g} rounds in {seconds:.0f} s, {rate:.3g} a second"
    )
    if given.plan:
        print(f"planned: 500 cells, 10^9 rounds, {1e9 / rate / 60:.0f} minutes")
    else:
        table.to_csv(given.out / "sweep.csv", index=False)
        print(given.out / "sweep.csv")


if __name__ == "__main__":
    main()
