"""What choosing costs: milliseconds per round outside the models. Learners alone: `learners.py`.

    python benchmarks/overhead.py

Medians and quartiles over repetitions in one interleaved run, one thread. The round is timed with a target
and drafters that answer at once (laws looked up in a table), so all of it is the loop, the verification, the
evaluation of every drafter and the learner. Of the hook into vLLM it is one row of one step, drafts of its
default drafters included. That and imports, in fresh interpreters, are in processor time.
"""

import platform
import subprocess
import sys
from time import perf_counter, process_time
from types import SimpleNamespace

import numpy as np

import nab
from nab.backends.vllm import Proposer
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


def hook_time(rows: int, length: int, steps: int = 4) -> float:
    """Milliseconds of a row of ``length`` tokens of Zipf's law; a random part of each draft is right."""
    rng, room = np.random.default_rng(0), length + 5 * (steps + 1)
    numbers = {"num_speculative_tokens": 4, "max_model_len": room, "max_num_seqs": rows}
    part = SimpleNamespace(**numbers)
    config = SimpleNamespace(speculative_config=part, model_config=part, scheduler_config=part)
    proposer, spent = Proposer(config), 0.0
    tokens = rng.zipf(1.3, (rows, room)).clip(max=30_000).astype(np.int32)
    lengths, new = np.full(rows, length), [[0]] * rows
    for step in range(steps + 1):
        started = process_time()
        drafts = proposer.propose(new, lengths, tokens)
        spent += (process_time() - started) * (step > 0)  # in the first one texts begin
        for row, draft in enumerate(drafts):
            accepted = draft[: rng.integers(len(draft) + 1)]
            new[row] = [*accepted, int(tokens[row, lengths[row] + len(accepted)])]
            tokens[row, lengths[row] : lengths[row] + len(new[row])] = new[row]
            lengths[row] += len(new[row])
    return spent / steps / rows * 1e3


def main() -> None:
    cases = {
        f"round, {n} drafters, vocabulary {vocab}, ms": lambda n=n, vocab=vocab: round_time(n, vocab)
        for vocab in (2048, 49152)
        for n in (1, 8)
    }
    cases |= {f"import {name}, ms": lambda name=name: import_time(name) for name in ("numpy", "nab.learners")}
    cases |= {
        f"vLLM's hook, {rows} rows of {length} tokens, ms a row": lambda case=(rows, length): hook_time(*case)
        for rows, length in ((1, 2000), (32, 500), (32, 2000), (32, 8000))
    }
    times = {name: [] for name in cases}
    for _ in range(REPETITIONS):
        for name, measure in cases.items():
            times[name].append(measure())
    print(f"{processor()}, Python {platform.python_version()}, numpy {np.__version__}, one thread")
    for name, values in times.items():
        low, median, high = np.percentile(values, [25, 50, 75])
        print(f"{name:50} {median:8.2f}   ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
