"""What a round of learning costs: every learner and bandit of `nab`, and the packages to compare with.

    python benchmarks/learners.py
    python benchmarks/learners.py --quick

Two measurements, interleaved over repetitions in one run, one thread:

* Microseconds of one round of one query, at n = 8, 64 and 1024 drafters: read the law (`probs`), give it back
  with the losses (`update(state, losses, law)`); checks of losses and laws are inside. 200 rounds from the
  start in every repetition; medians and quartiles over repetitions.
* Millions of rounds a second of 200 queries side by side, n = 8, states of shape `(8, 200)`: one run of
  10 000 rounds, a part of it in every repetition; medians and quartiles over the parts. A round of one query
  counts as one.

Time is the processor's, spent in this thread: what else the machine does counts less. Losses and the uniforms
of draws, all uniform on [0, 1), are drawn beforehand, outside the timing. Bandits: the draw is inside. Each
round is one call of a Python function that holds the state, for all alike; the last row is such a call alone.

Peers are measured where they are installed (none is needed, and none is a dependency), one query at a time:
what is called is said below the table.
"""

import argparse
import platform
from collections.abc import Callable, Iterator
from importlib import import_module
from math import log
from time import thread_time
from typing import Any, NamedTuple

import numpy as np

from nab import learners
from nab.selector import draw
from nab.sim import draws
from nab.sim.trace import processor

SIZES = (8, 64, 1024)
ROUNDS = 200
QUERIES = 200
BATCHED_ROUNDS = 10_000

Round = Callable[[Any, Any], Any]
"""Plays one round, given the losses and a uniform per query."""

Start = Callable[..., Round]
"""Round of a fresh run, given `n` and, where it can do many queries at once, their number."""


class Row(NamedTuple):
    """A line of the table; `batched` where it plays many queries at once; `note` says what is called."""

    name: str
    start: Start
    batched: bool = False
    sizes: tuple[int, ...] = SIZES
    note: str = ""


def learning(learner: Any) -> Start:
    """A learner with full information: `probs`, then `update` with the law."""

    def start(n: int, batch: int | None = None) -> Round:
        state = learner.init(n, batch)

        def play(losses: Any, _: Any) -> None:
            nonlocal state
            state = learner.update(state, losses, learner.probs(state))

        return play

    return start


def drawing(bandit: Any) -> Start:
    """A bandit: `probs`, a draw, then `update` with the arm and its loss."""

    def start(n: int, batch: int | None = None) -> Round:
        state = bandit.init(n, batch)

        def play_one(losses: Any, u: Any) -> None:
            nonlocal state
            arm = draw(bandit.probs(state), lambda: u)
            state = bandit.update(state, arm, losses[arm])

        columns = np.arange(batch or 1)

        def play_many(losses: Any, u: Any) -> None:
            nonlocal state
            arms = draws(bandit.probs(state), u)
            state = bandit.update(state, arms, losses[arms, columns])

        return play_one if batch is None else play_many

    return start


def full_information() -> Iterator[Row]:
    """All learners that see every loss."""
    for name, learner in {
        "Hedge": learners.Hedge(),
        "Hedge, discount 0.97": learners.Hedge(discount=0.97),
        "OptimisticHedge": learners.OptimisticHedge(),
        "AdaHedge": learners.AdaHedge(),
        "NormalHedge": learners.NormalHedge(),
        "NormalHedge, discount 0.97": learners.NormalHedge(discount=0.97),
        "NormalHedgeBH": learners.NormalHedgeBH(),
        "AdaNormalHedge": learners.AdaNormalHedge(),
        "AdaNormalHedgeTV": learners.AdaNormalHedgeTV(),
        "Squint": learners.Squint(),
        "FixedShare, share 0.02": learners.FixedShare(0.02),
        "FollowTheLeader": learners.FollowTheLeader(),
    }.items():
        yield Row(name, learning(learner), batched=True)


def bandits() -> Iterator[Row]:
    """The baselines that see the loss of what they chose alone."""
    module = import_module("nab.learners.bandits")
    for name in ("UCB1", "EXP3"):
        yield Row(f"{name} (bandit), with its draw", drawing(getattr(module, name)()), batched=True)


def single_draws() -> Iterator[Row]:
    """One draw from a law, and numpy's own."""
    laws = {n: np.random.default_rng(n).dirichlet(np.ones(n)) for n in SIZES}

    def numpy_choice(n: int) -> Round:
        rng, law = np.random.default_rng(0), laws[n]
        return lambda _, u: rng.choice(n, p=law)

    yield Row("one draw, `nab.selector.draw`", lambda n: lambda _, u, law=laws[n]: draw(law, lambda: u))
    yield Row("one draw, numpy", numpy_choice, note="`Generator.choice(n, p=law)`")


def nothing(n: int) -> Round:
    """What every row contains: a call."""
    return lambda losses, u: None


def sktime() -> Iterator[Row]:
    """NormalHedge of sktime; its laws are `nab`'s, to the bisection that it finds them by."""
    module = import_module("sktime.forecasting.online_learning._prediction_weighted_ensembler")
    truth = np.zeros(1)

    def start(n: int) -> Round:
        ensemble = module.NormalHedgeEnsemble(n_estimators=n, loss_func=lambda predicted, _: predicted[0])

        def play(losses: Any, _: Any) -> Any:
            ensemble.update(losses[:, None], truth)
            return ensemble.weights

        return play

    yield Row(
        "NormalHedge (sktime)",
        start,
        note="`NormalHedgeEnsemble.update`, its loss function handing the losses on, then `weights`",
    )


def river() -> Iterator[Row]:
    """Bandits of river."""
    module = import_module("river.bandit")

    def starting(make: Callable[[], Any]) -> Start:
        def start(n: int) -> Round:
            policy, arms = make(), range(n)

            def play(losses: Any, _: Any) -> None:
                arm = policy.pull(arms)
                policy.update(arm, 1 - losses[arm])

            return play

        return start

    note = "`pull(arms)` and `update(arm, 1 - loss)`; it draws by itself"
    yield Row("UCB (river)", starting(lambda: module.UCB(delta=1, seed=0)), note=note)
    yield Row("Exp3 (river)", starting(lambda: module.Exp3(gamma=0.1, seed=0)), note=note)


def mabwiser() -> Iterator[Row]:
    """UCB1 of MABWiser."""
    module = import_module("mabwiser.mab")

    def start(n: int) -> Round:
        bandit = module.MAB(list(range(n)), module.LearningPolicy.UCB1(alpha=1), seed=0)
        bandit.fit(list(range(n)), [0.5] * n)  # it predicts only after a fit

        def play(losses: Any, _: Any) -> None:
            arm = bandit.predict()
            bandit.partial_fit([arm], [1 - losses[arm]])

        return play

    yield Row("UCB1 (MABWiser)", start, note="`predict()` and `partial_fit([arm], [1 - loss])`")


def poold() -> Iterator[Row]:
    """AdaHedgeD of poold, never late: its laws are AdaHedge's; it keeps its whole history."""
    module = import_module("poold")

    def start(n: int) -> Round:
        learner, t = module.create("adahedged", model_list=[str(i) for i in range(n)], T=ROUNDS), 0
        learner.update_and_play([], None)

        def play(losses: Any, _: Any) -> Any:
            nonlocal t
            loss = {"fun": lambda w: losses @ w, "grad": lambda w: losses}
            law = learner.update_and_play([(t, loss)], None)
            t += 1
            return law

        return play

    yield Row(
        "AdaHedgeD (poold)", start, note="`update_and_play([(t, loss)], None)`, loss and gradient linear"
    )


def pynol() -> Iterator[Row]:
    """Meta-learners of PyNOL: Hedge is lazy, at the rates of `nab`'s, and so has its laws."""
    module = import_module("pynol.learner.meta")

    def hedge(n: int) -> Round:
        rates = np.sqrt(8 * log(n) / np.arange(2, ROUNDS + 2))
        meta = module.Hedge(np.full(n, 1 / n), rates, is_lazy=True)

        def play(losses: Any, _: Any) -> None:
            meta.opt_by_optimism(None)
            meta.opt_by_gradient(losses, meta.prob @ losses)

        return play

    def ada_normal_hedge(n: int) -> Round:
        meta, awake, waking = module.AdaNormalHedge(n), np.ones(n), np.full(n, 2)
        meta.active_state = waking

        def play(losses: Any, _: Any) -> None:
            meta.active_state = awake
            meta.opt_by_gradient(losses, meta.prob @ losses)

        return play

    yield Row("Hedge (PyNOL)", hedge, note="`opt_by_optimism`, `prob` and `opt_by_gradient`")
    yield Row(
        "AdaNormalHedge (PyNOL)",
        ada_normal_hedge,
        note="`active_state` set (that normalises), `prob` and `opt_by_gradient`",
    )


OPTIONAL = {
    "nab.learners.bandits": bandits,
    "sktime": sktime,
    "river": river,
    "mabwiser": mabwiser,
    "poold": poold,
    "pynol-xzp multiprocess": pynol,
}
"""What is left out where it cannot be imported, by the names pip knows."""


def available() -> list[Row]:
    """Every row that can be measured here; says which cannot."""
    rows = [*full_information(), *single_draws()]
    for name, found in OPTIONAL.items():
        try:
            rows += found()
        except ImportError as error:
            print(f"{name} is not installed, left out: {error}")
    return [*rows, Row("a call that does nothing", nothing)]


def microseconds(row: Row, losses: np.ndarray, uniforms: list[float]) -> float:
    """Of one round, from the start."""
    play = row.start(losses.shape[1])
    started = thread_time()
    for loss, u in zip(losses, uniforms, strict=True):
        play(loss, u)
    return (thread_time() - started) / len(losses) * 1e6


def batched_rate(play: Round, losses: np.ndarray, uniforms: np.ndarray) -> float:
    """Millions of rounds a second, each query counted, over these rounds of a run that goes on."""
    started = thread_time()
    for loss, u in zip(losses, uniforms, strict=True):
        play(loss, u)
    return uniforms.size / (thread_time() - started) / 1e6


def cell(values: list[float]) -> str:
    """Median, then quartiles; empty where nothing was measured."""
    if not values:
        return ""
    low, median, high = np.percentile(values, [25, 50, 75])
    digits = 2 if median < 10 else 1 if median < 1000 else 0
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def measured(rows: list[Row], repetitions: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """All cells, by row and column: one value a repetition."""
    rng = np.random.default_rng(0)
    losses = {n: rng.random((ROUNDS, n)) for n in SIZES}
    uniforms = rng.random(ROUNDS).tolist()
    many_losses, many_uniforms = rng.random((rounds, 8, QUERIES)), rng.random((rounds, QUERIES))
    running = {row.name: row.start(8, QUERIES) for row in rows if row.batched}
    cells = {row.name: {f"n = {n}, us": [] for n in SIZES} | {"batched, M rounds/s": []} for row in rows}
    for part in np.array_split(np.arange(rounds), repetitions):
        chunk = slice(part[0], part[-1] + 1)
        for row in rows:
            for n in row.sizes:
                cells[row.name][f"n = {n}, us"].append(microseconds(row, losses[n], uniforms))
            if row.batched:
                rate = batched_rate(running[row.name], many_losses[chunk], many_uniforms[chunk])
                cells[row.name]["batched, M rounds/s"].append(rate)
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=31, help="of everything, interleaved (31)")
    parser.add_argument("--quick", action="store_true", help="5 repetitions and a batched run of 500 rounds")
    options = parser.parse_args()
    repetitions, rounds = (5, 500) if options.quick else (options.repetitions, BATCHED_ROUNDS)
    if not 1 <= repetitions <= rounds:
        parser.error(f"repetitions must lie in 1 .. {rounds}, got {repetitions}")
    rows = available()
    cells = measured(rows, repetitions, rounds)
    print(f"{processor()}, Python {platform.python_version()}, numpy {np.__version__}, one thread")
    print(
        f"Processor time, medians (and quartiles) of {repetitions} repetitions. Batched: {QUERIES} queries,"
    )
    print(f"{rounds} rounds in all.\n")
    columns = list(next(iter(cells.values())))
    print(f"| learner | {' | '.join(columns)} |")
    print(f"|---|{'---:|' * len(columns)}")
    for name, values in cells.items():
        print(f"| {name} | {' | '.join(map(cell, values.values()))} |")
    print()
    for row in rows:
        if row.note:
            print(f"* {row.name}: {row.note}.")


if __name__ == "__main__":
    main()
