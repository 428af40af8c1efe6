"""Runs code that consumes uniforms once per distinguishable outcome, with each outcome's exact probability.

A ``Uniform`` stands in for a number in [0, 1). It knows the interval it lies in; a comparison whose answer is
not settled by that interval splits it, and the enumeration visits every piece. The code under test is the
production code, unchanged; the arithmetic on the uniform is real-number arithmetic.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Tape:
    """The decisions of one run: those to repeat, then the first piece of whatever comes up."""

    decisions: list[tuple[int, int]] = field(default_factory=list)  # (piece, number of pieces)
    position: int = 0
    probability: float = 1.0

    def decide(self, weights: np.ndarray) -> int:
        if self.position == len(self.decisions):
            self.decisions.append((0, len(weights)))
        piece, _ = self.decisions[self.position]
        self.position += 1
        self.probability *= weights[piece]
        return piece


class Uniform:
    """A number in [low, high) times a scale, compared with numbers and arrays only."""

    __array_ufunc__ = None  # numpy arrays hand comparisons over to us

    def __init__(self, tape: Tape, low=0.0, high=1.0):
        self.tape, self.low, self.high = tape, low, high

    def __mul__(self, scale):
        return Scaled(self, float(scale))

    def __lt__(self, bound):
        return self * 1.0 < bound

    def narrow(self, points: np.ndarray) -> None:
        inner = np.unique(points[(points > self.low) & (points < self.high)])
        if len(inner):
            edges = np.concatenate([[self.low], inner, [self.high]])
            piece = self.tape.decide(np.diff(edges) / (self.high - self.low))
            self.low, self.high = edges[piece], edges[piece + 1]


@dataclass
class Scaled:
    uniform: Uniform
    scale: float
    __array_ufunc__ = None

    def __lt__(self, bound):
        return bool(~self.__ge__(np.asarray(bound)))

    def __ge__(self, bounds):
        points = bounds / self.scale  # an array or a tensor
        self.uniform.narrow(np.atleast_1d(points))
        return points <= self.uniform.low


class EnumeratedGenerator(np.random.Generator):
    """A generator whose uniforms are enumerated."""

    def __init__(self, tape: Tape):
        super().__init__(np.random.PCG64(0))
        self.tape = tape

    def random(self, size=None):
        return Uniform(self.tape) if size is None else [Uniform(self.tape) for _ in range(size)]


def outcomes(run: Callable[[EnumeratedGenerator], object]) -> Iterator[tuple[object, float]]:
    """``(run(rng), probability)`` for every outcome of the uniforms that ``run`` looks at."""
    decisions: list[tuple[int, int]] = []
    while True:
        tape = Tape(list(decisions))
        result = run(EnumeratedGenerator(tape))
        yield result, tape.probability
        decisions = tape.decisions
        while decisions and decisions[-1][0] + 1 == decisions[-1][1]:
            decisions.pop()
        if not decisions:
            return
        piece, pieces = decisions.pop()
        decisions.append((piece + 1, pieces))
