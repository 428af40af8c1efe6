"""What a round costs: seconds from bytes, FLOPs and the machine, and how many drafters are worth scoring.

A forward reads its weights and the context's keys and values once and computes meanwhile, so it takes the
longer of the two (the roofline: Williams, Waterman, Patterson 2009) and the launches of its layers besides. A
round is ``draft_len`` drafter forwards, one target forward and what choosing costs: scoring all n drafters on
the verified tokens and the learner's update. Formulas and the figures of Liu et al. 2025: docs/costs.md.

Bytes, FLOPs and seconds everywhere; ``n`` and ``length`` may be arrays, results have their broadcast shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from nab.checks import checked, whole
from nab.types import as_floats

BITS = 53
"""The break-even is sought among whole numbers below 2^53, which are exact in float64."""


@dataclass(frozen=True)
class Machine:
    """What reads and computes.

    Args:
        bandwidth: bytes a second, above 0; ``inf`` where reading costs nothing.
        peak: FLOPs a second, above 0; ``inf`` where computing costs nothing.
        launch: seconds that each layer of a forward takes whatever is in it, at least 0.

    Raises:
        ValueError: on a value outside its range.
    """

    bandwidth: float
    peak: float = inf
    launch: float = 0.0

    def __post_init__(self) -> None:
        checked("bandwidth", self.bandwidth, closed=True)
        checked("peak", self.peak, closed=True)
        _at_least("launch", self.launch, 0)


@dataclass(frozen=True)
class Model:
    """What one forward reads and computes.

    Args:
        weights: bytes, at least 0.
        flops: FLOPs per token, at least 0; about two per parameter. Those of attention, which grow with the
            context, are left out.
        kv: bytes of keys and values per token of context, at least 0.
        layers: launches of a forward, one behind the other, at least 0; 1 if ``Machine.launch`` is meant per
            forward.

    Raises:
        ValueError: on a value outside its range.
    """

    weights: float
    flops: float = 0.0
    kv: float = 0.0
    layers: float = 1.0

    def __post_init__(self) -> None:
        for name in ("weights", "flops", "kv", "layers"):
            _at_least(name, getattr(self, name), 0)


@dataclass(frozen=True)
class Engine:
    """A target, a pool of drafters of one shape, and how they are scored.

    Args:
        machine: where all of it runs.
        target: the model that verifies.
        drafter: each member of the pool.
        draft_len: drafted tokens a round, at least 0; with 0 the round is one target forward, the yardstick
            of some published shares.
        context: tokens whose keys and values a forward reads, at least 0.
        update: seconds of the learner's update, each round, at least 0.
        period: rounds from one scoring to the next, at least 1; above 1 evaluation is lazy and scores all
            tokens since in one forward per drafter.
        batched: score all drafters in one forward over stacked weights, which pays one drafter's launches;
            otherwise one after the other.
        hidden: score while the target verifies, so that losses come a round later: launches overlap, bytes
            and FLOPs add up.

    Raises:
        ValueError: on a value outside its range, or a target whose forward takes no time.
    """

    machine: Machine
    target: Model
    drafter: Model
    draft_len: int
    context: float = 0.0
    update: float = 0.0
    period: int = 1
    batched: bool = False
    hidden: bool = False

    def __post_init__(self) -> None:
        whole("draft_len", self.draft_len, 0)
        whole("period", self.period, 1)
        _at_least("context", self.context, 0)
        _at_least("update", self.update, 0)
        if not _verifying(self) > 0:
            raise ValueError(f"the target's forward must take time, got {self.target} on {self.machine}")


def forward_time(machine: Machine, model: Model, tokens: ArrayLike, context: float = 0.0) -> Any:
    """Seconds of one forward: ``max(bytes / bandwidth, FLOPs / peak) + layers launch``.

    Args:
        machine: where it runs.
        model: what runs.
        tokens: positions scored, at least 0; a number or an array.
        context: tokens whose keys and values are read, at least 0.

    Returns:
        A number, or an array shaped like ``tokens``.

    Raises:
        ValueError: on a value below 0, or not finite.

    >>> machine = Machine(bandwidth=2.0, peak=3.0, launch=0.25)
    >>> model = Model(weights=4.0, flops=1.0, kv=1.0, layers=2)
    >>> forward_time(machine, model, [1, 6, 12]).tolist()         # 2 s to read, 1/3 s to compute a token
    [2.5, 2.5, 4.5]
    """
    count = _at_least("tokens", tokens, 0)
    read, flops = _work(model, count, _at_least("context", context, 0))
    return _seconds(machine, read, flops, model.layers)


def single_time(engine: Engine) -> float:
    """Seconds of a round of one fixed drafter, where nothing is scored.

    ``draft_len`` drafter forwards of one token, and the target's forward over ``draft_len + 1``.
    """
    drafting = engine.draft_len * forward_time(engine.machine, engine.drafter, 1, engine.context)
    return float(drafting + _verifying(engine))


def choosing_time(engine: Engine, n: ArrayLike, length: ArrayLike) -> Any:
    """Seconds a round, on average, that choosing among n drafters adds.

    Every ``period`` rounds all drafters score the ``period length`` tokens emitted since; every round the
    learner updates. Rounds are taken to emit ``length`` tokens each, which is a little low where computing
    takes about as long as reading. An engine that drafts on from the chosen drafter's score saves a forward.

    Args:
        engine: see there.
        n: drafters, whole numbers, at least 1.
        length: tokens a round emits on average, at least 1 (MAT).

    Returns:
        A number, or an array of the broadcast shape of ``n`` and ``length``.

    Raises:
        ValueError: on a value outside its range.
    """
    count, emitted = _at_least("n", n, 1), _at_least("length", length, 1)
    if (count % 1 != 0).any():
        raise ValueError(f"n must be whole, got {n!r}")
    read, flops = _work(engine.drafter, engine.period * emitted, engine.context)
    layers = engine.drafter.layers * (1 if engine.batched else count)
    if engine.hidden:
        with_target = _work(engine.target, engine.draft_len + 1, engine.context)
        together = _seconds(
            engine.machine,
            count * read + with_target[0],
            count * flops + with_target[1],
            np.maximum(layers, engine.target.layers),
        )
        scoring = together - _verifying(engine)
    else:
        scoring = _seconds(engine.machine, count * read, count * flops, layers)
    return scoring / engine.period + engine.update


def round_time(engine: Engine, n: ArrayLike, length: ArrayLike) -> Any:
    """Seconds of a round, on average, that chooses among n drafters: ``single_time + choosing_time``.

    Args, result and errors as ``choosing_time``.
    """
    return single_time(engine) + choosing_time(engine, n, length)


def overhead(engine: Engine, n: ArrayLike, length: ArrayLike) -> Any:
    """What choosing adds, as a share of a round without: ``choosing_time / single_time``.

    Choosing with mean acceptance length ``length`` gives more tokens a second than one drafter with ``alone``
    exactly if the overhead is below ``length / alone - 1``.

    Args, result and errors as ``choosing_time``.

    >>> limit = Engine(Machine(bandwidth=2e12), Model(16e9), Model(0.76e9), draft_len=0)
    >>> float(overhead(limit, 7, 1).round(6))
    0.3325
    """
    return choosing_time(engine, n, length) / single_time(engine)


def break_even(engine: Engine, length: ArrayLike, alone: ArrayLike) -> Any:
    """Largest n at which choosing with ``length`` gives more tokens a second than one drafter with ``alone``.

    Found bit by bit, since a round does not get shorter with n.

    Args:
        engine: see there.
        length: mean acceptance length of choosing, at least 1.
        alone: of the single drafter, at least 1.

    Returns:
        A whole number as a float, or an array of them: 0 if it never pays, ``inf`` if still at 2^53 - 1.

    Raises:
        ValueError: on a length below 1, or not finite.

    >>> limit = Engine(Machine(bandwidth=2e12), Model(16e9), Model(1e9), draft_len=0)
    >>> break_even(limit, [5.0, 6.0], 4.0).tolist()               # gains of 1/4 and 1/2, at 1/16 a drafter
    [3.0, 7.0]
    """
    chosen, fixed = np.broadcast_arrays(_at_least("length", length, 1), _at_least("alone", alone, 1))
    n = np.zeros(chosen.shape)
    for bit in reversed(range(BITS)):
        more = n + 2.0**bit
        pays = fixed * round_time(engine, more, chosen) < chosen * single_time(engine)
        n = np.where(pays, more, n)
    return np.where(n == 2.0**BITS - 1, inf, n)[()]


def _verifying(engine: Engine) -> Any:
    return forward_time(engine.machine, engine.target, engine.draft_len + 1, engine.context)


def _work(model: Model, tokens: Any, context: Any) -> tuple[Any, Any]:
    """Bytes and FLOPs of a forward."""
    return model.weights + context * model.kv, tokens * model.flops


def _seconds(machine: Machine, read: Any, flops: Any, layers: Any) -> Any:
    return np.maximum(read / machine.bandwidth, flops / machine.peak) + layers * machine.launch


def _at_least(name: str, value: ArrayLike, least: float) -> Any:
    """The value as a float64 array, checked."""
    array = as_floats(value)
    if not (np.isfinite(array) & (array >= least)).all():
        raise ValueError(f"{name} must be finite and at least {least}, got {value!r}")
    return array
