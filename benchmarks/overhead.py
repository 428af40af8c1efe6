"""What choosing costs: milliseconds per round outside the models. Learners alone: `learners.py`.

    python benchmarks/overhead.py

Medians and quartiles over repetitions in one interleaved run, one thread. The round is timed with a target
and drafters that answer at once (laws looked up in a table), so all of it is the loop, the verification, the
evaluation of every drafter and the learner. Imports are in fresh interpreters, processor time.
"""

import platform
import subprocess
import sys
from time import perf_counter

import numpy as np

import nab
from nab.sim.trace import processor

REPETITIONS = 31


class Table:
    """A language model that costs nothing: the same stored laws at every position."""

    def __init__(self, law: np.ndarray) -> None:
        self.rows = np.tile(law, (64, 1))

    def score(self, tokens: list[int], start: int) -> np.ndarray:
        """The stored laws."""
        return self.rows[: len(tokens) - start + 1]


def round_time(n: int, vocab: int, rounds: int = 20) -> float:
    """Milliseconds of one round with draft length 4."""
    laws = np.random.default_rng(0).dirichlet(np.ones(vocab), size=n + 1).astype(np.float32)
    target, *drafters = map(Table, laws)
    selector = nab.Selector(nab.NormalHedge(), n, rng=0)
    loop = nab.decode(target, drafters, selector, [0], draft_len=4, rng=0)
    next(loop)
    started = perf_counter()
    for _ in range(rounds):
        next(loop)
    return (perf_counter() - started) / rounds * 1e3


def import_time(module: str) -> float:
    """Milliseconds of one import."""
    code = f"from time import process_time as now; t = now(); import {module}; print(now() - t)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(result.stdout) * 1e3


def main() -> None:
    cases = {
        f"round, {n} drafters, vocabulary {vocab}, ms": lambda n=n, vocab=vocab: round_time(n, vocab)
        for vocab in (2048, 49152)
        for n in (1, 8)
    }
    cases |= {f"import {name}, ms": lambda name=name: import_time(name) for name in ("numpy", "nab.learners")}
    times = {name: [] for name in cases}
    for _ in range(REPETITIONS):
        for name, measure in cases.items():
            times[name].append(measure())
    print(f"{processor()}, Python {platform.python_version()}, numpy {np.__version__}, one thread")
    for name, values in times.items():
        low, median, high = np.percentile(values, [25, 50, 75])
        print(f"{name:45} {median:8.2f}   ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
