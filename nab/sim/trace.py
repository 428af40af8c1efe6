"""Traces: a run as JSON lines, one record each, flushed as it happens so that a crash keeps what there is.

The first record is the header (``kind: header``: version, command, seed, models, dtype, hardware, drafter
names, draft length). Then come ``round`` records, one per target forward, and behind the rounds of each query
one ``query`` record with its metrics; the records of queries that were decoded together interleave. ``gamma``
and ``realised`` stand in the rounds where the selector asked for them, with those of earlier rounds that had
waited, and of the positions behind the last such round in the query record. ``read_trace`` reads all of it
back, every bit of it.
"""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from math import isfinite
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from nab.decode import Round, Seconds
from nab.types import Floats, Objective

FORMAT = 1
"""Of the records; another one is refused."""

HEADER = {
    "format": int,
    "version": str,
    "command": str,
    "seed": int,
    "target": str,
    "drafters": list,
    "dtype": str,
    "draft_len": int,
    "device": str,
    "processor": str,
}
"""What a header holds at least, and of which type.

Where drafts branch, also ``nodes``: tokens in one, at most. Where queries were decoded together, also
``batch``: how many at once, at most.
"""

WHERE = {"query": int, "policy": str, "domain": str}
"""What every other record holds: number of the prompt, name of the policy, label of the prompt."""


class TraceWriter:
    """Writes a trace; use it as a context manager.

    Args:
        path: file to write; its folder is made, an existing file is replaced.
        header: what to know about the run, plain JSON types: at least the fields of ``HEADER``, without
            ``format``.

    Raises:
        ValueError: on a header without one of them, before anything is written.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        header = {"format": FORMAT, **header}
        _check_header(header)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")
        self.write("header", header)

    def write(self, kind: str, record: dict[str, Any]) -> None:
        """Append one record; numpy arrays become nested lists."""
        line = json.dumps({"kind": kind, **record}, default=np.ndarray.tolist, ensure_ascii=False)
        self._file.write(line + "\n")
        self._file.flush()

    def keep(self, rounds: Iterable[Round], where: dict[str, Any]) -> Iterator[Round]:
        """Hand on ``rounds``, appending each; ``where`` says which query they belong to, see ``WHERE``."""
        for round_ in rounds:
            self.round(round_, where)
            yield round_

    def round(self, round_: Round, where: dict[str, Any]) -> None:
        """Append one round."""
        self.write("round", {**where, **asdict(round_), "seconds": round_.seconds._asdict()})

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, *exception: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._file.close()


def environment() -> dict[str, Any]:
    """What a reader of a measurement wants to know about the machine and the command."""
    return {
        "command": shlex.join(["nab", *sys.argv[1:]]),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": platform.machine(),
        "processor": processor(),
    }


def processor() -> str:
    """The processor's model name, or what the platform knows of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@dataclass(frozen=True)
class TracedQuery:
    """One answer of a trace.

    Args:
        number: of the prompt, from 0.
        policy: name of what chose the drafters.
        domain: label of the prompt, may be empty.
        rounds: in order; ``start`` of the first one is the length of the prompt.
        gamma: acceptance probabilities of the scored positions, from the first on, ``(positions, n)`` or by
            depth ``(positions, depths, n)``: all of the answer's, or less of it where the trace breaks off;
            none of plain decoding.
        realised: likewise.
        metrics: what the trace says of the whole answer; None where it breaks off before.
    """

    number: int
    policy: str
    domain: str
    rounds: tuple[Round, ...]
    gamma: Floats
    realised: Floats
    metrics: dict[str, Any] | None

    @property
    def tokens(self) -> list[int]:
        """The answer's tokens."""
        return [token for round_ in self.rounds for token in round_.emitted]

    @property
    def played(self) -> Floats:
        """The law in force at each scored position, ``(positions, n)``."""
        laws = [round_.probs for round_ in self.rounds for _ in round_.emitted]
        return np.array(laws).reshape(-1, self.gamma.shape[-1])[: len(self.gamma)]

    def losses(self, objective: Objective) -> Floats:
        """The loss matrix, ``(positions - window + 1, n)``: what ``nab.sim.play`` and ``regret`` take."""
        return objective(self.gamma, self.realised)


@dataclass(frozen=True)
class Trace:
    """A trace that was read.

    Args:
        path: where it was.
        header: what is known about the run, the fields of ``HEADER`` at least.
        queries: in the order of their first records.
        broken_off: where and how the file ends too early; empty if it does not. Whoever shows results of a
            trace says so.
    """

    path: Path
    header: dict[str, Any]
    queries: tuple[TracedQuery, ...]
    broken_off: str

    @property
    def drafters(self) -> list[str]:
        """Their names, n of them."""
        return list(self.header["drafters"])

    @property
    def draft_len(self) -> int:
        """Drafted tokens a round."""
        return int(self.header["draft_len"])

    @property
    def policies(self) -> list[str]:
        """Names of the policies, in the order of their first answers."""
        return list(dict.fromkeys(query.policy for query in self.queries))


def read_trace(path: Path | str) -> Trace:
    """Read a trace back, line by line; what ``TraceWriter`` wrote comes back to the last bit.

    A crash leaves a last line that is cut off, or an answer without its last record, Ctrl-C an answer of
    which not all positions are scored: what is complete is kept, and ``broken_off`` says so.

    Raises:
        ValueError: naming the file and the line that is no record of a trace: no JSON, not UTF-8, of another
            format or kind, out of order, with a missing field, another shape, or a number outside its range
            (NaN included); or if the file is empty.
    """
    path, reader, broken_off = Path(path), None, ""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if reader is None:
                    reader = _Reader(_parsed(line))
                elif _is_cut(line):
                    broken_off = f"{path}, line {number} is cut off"
                else:
                    reader.take(_parsed(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    if reader is None:
        raise ValueError(f"{path} is empty: a trace begins with a header")
    if left := reader.close():
        answers = ", ".join(f"the answer to prompt {number + 1} under {policy}" for number, policy in left)
        broken_off = f"{broken_off or path}: {answers} {'are' if len(left) > 1 else 'is'} not complete"
    return Trace(path, reader.header, tuple(reader.queries.values()), broken_off)


class _Reader:
    """Takes the records of a trace one by one; ``queries``, by number and policy, are those begun so far."""

    def __init__(self, header: dict[str, Any]) -> None:
        if header.pop("kind") != "header":
            raise ValueError("a trace begins with a header")
        _check_header(header)
        self.header = header
        self.queries: dict[tuple[int, str], TracedQuery] = {}
        self._open: dict[tuple[Any, ...], _Answer] = {}
        self._short: list[tuple[int, str]] = []

    def take(self, record: dict[str, Any]) -> None:
        """One record behind the header."""
        kind = record.pop("kind")
        if kind not in ("round", "query"):
            raise ValueError(f"kind must be round or query behind the header, got {kind!r}")
        where = tuple(_typed(record, name, of) for name, of in WHERE.items())
        if where not in self._open:
            self._begin(where)
        answer = self._open[where]
        rest = {name: value for name, value in record.items() if name not in WHERE}
        if kind == "round":
            answer.add(rest)
        else:
            self.queries[where[:2]] = ended = answer.closed(rest)
            del self._open[where]
            if "gamma" in rest and len(ended.gamma) < answer.tokens:
                self._short.append(where[:2])

    def _begin(self, where: tuple[Any, ...]) -> None:
        if len(self._open) == self.header.get("batch", 1):
            raise ValueError(f"a record of {where} before that of {next(iter(self._open))} is closed")
        answer = _Answer(where, self.header)
        if where[:2] in self.queries:
            raise ValueError(f"a second answer to {where}")
        self._open[where] = answer
        self.queries[where[:2]] = answer.closed(None)  # which keeps its place among them

    def close(self) -> list[tuple[int, str]]:
        """End what is open; the numbers and policies of answers without their last record or all scores."""
        ended = {where[:2]: answer.closed(None) for where, answer in self._open.items()}
        self.queries.update(ended)
        return [*self._short, *ended]


class _Answer:
    """What is known of an answer: its ``rounds``, and how many ``tokens`` they emitted and ``scored``."""

    def __init__(self, where: tuple[Any, ...], header: dict[str, Any]) -> None:
        self.header, self.n = header, len(header["drafters"])
        self.rounds: list[Round] = []
        self.tokens = self.scored = 0
        self._where = where
        self._scores: list[Floats] = []

    def add(self, record: dict[str, Any]) -> None:
        """Its next round."""
        self.rounds.append(round_ := _round(record, self))
        self.tokens += len(round_.emitted)
        if round_.gamma is not None and round_.realised is not None:
            self.scored = self.tokens
            self._scores.append(np.stack([round_.gamma, round_.realised]))

    def closed(self, metrics: dict[str, Any] | None) -> TracedQuery:
        """All of it, with the scores its last record holds, of positions that no round has."""
        scored = list(self._scores)
        if metrics and ("gamma" in metrics or "realised" in metrics):
            gamma, realised = _scores(metrics, self.n)
            unscored = self.tokens - self.scored
            # Ctrl-C may come between a round and its record, and while what is left is scored
            if len(gamma) - unscored > self.header["draft_len"] + 1:
                raise ValueError(
                    f"{len(gamma)} scored positions of {unscored} tokens that rounds left unscored"
                )
            scored.append(np.stack([gamma, realised])[:, :unscored])
            metrics = {name: value for name, value in metrics.items() if name not in ("gamma", "realised")}
        if len({scores.shape[2:] for scores in scored}) > 1:
            raise ValueError("scores by depth and scores alike at all depths")
        gamma, realised = np.concatenate(scored or [np.empty((2, 0, self.n))], axis=1)
        number, policy, domain = self._where
        return TracedQuery(number, policy, domain, tuple(self.rounds), gamma, realised, metrics)


def _parsed(line: bytes) -> dict[str, Any]:
    """The record of a line."""
    try:
        record = json.loads(line.decode(), parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error}") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        raise ValueError("expected a JSON object with a kind")
    return record


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of a trace")


def _is_cut(line: bytes) -> bool:
    """Whether a line is the beginning of a record, written when the writer died; only a last one can be."""
    begin = b'{"kind": "'
    if line.endswith(b"\n") or line[: len(begin)] != begin[: len(line)]:
        return False
    try:
        json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return True
    return False


def _check_header(header: dict[str, Any]) -> None:
    """Raise ValueError unless a header holds the fields of ``HEADER``."""
    if _typed(header, "format", int) != FORMAT:
        raise ValueError(
            f"format must be {FORMAT}, got {header['format']}: written by another version of nab"
        )
    for name, of in HEADER.items():
        _typed(header, name, of)
    names = header["drafters"]
    if not names or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ValueError(f"drafters must be different names, at least one, got {names}")
    if header["draft_len"] < 0:
        raise ValueError(f"draft_len must be at least 0, got {header['draft_len']}")
    nodes = header.get("nodes", header["draft_len"])
    if type(nodes) is not int or nodes < header["draft_len"]:
        raise ValueError(f"nodes must be a whole number of at least {header['draft_len']}, got {nodes!r}")
    batch = header.get("batch", 1)
    if type(batch) is not int or batch < 1:
        raise ValueError(f"batch must be a whole number of at least 1, got {batch!r}")


def _typed(record: dict[str, Any], name: str, of: type) -> Any:
    """A field of a record, which must be there and of this type."""
    if name not in record:
        raise ValueError(f"{name} is missing")
    if type(record[name]) is not of:
        raise ValueError(f"{name} must be of type {of.__name__}, got {record[name]!r}")
    return record[name]


def _count(record: dict[str, Any], name: str, low: int, high: float) -> int:
    """A whole number of a record, in ``low .. high``."""
    value = _typed(record, name, int)
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in {low} .. {high:g}, got {value}")
    return int(value)


def _array(record: dict[str, Any], name: str) -> Floats:
    """An array of a record, in [0, 1]."""
    values = _typed(record, name, list)
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError):  # rows of several lengths
        array = np.empty(0, dtype=object)
    if array.dtype.kind not in "if":
        raise ValueError(f"{name} must be an array of numbers")
    outside = array[~((array >= 0) & (array <= 1))]
    if outside.size:
        raise ValueError(f"{name} must lie in [0, 1], got {outside.flat[0]}")
    return array.astype(np.float64)


def _scores(record: dict[str, Any], n: int) -> tuple[Floats, Floats]:
    """``gamma`` and ``realised`` of a record: ``(positions, n)`` or, by depth, ``(positions, depths, n)``."""
    gamma, realised = (_array(record, name) for name in ("gamma", "realised"))
    if gamma.shape == realised.shape == (0,):
        return np.empty((0, n)), np.empty((0, n))
    if gamma.ndim not in (2, 3) or gamma.shape[-1] != n or gamma.shape != realised.shape:
        shapes = f"{gamma.shape} and {realised.shape}"
        raise ValueError(f"gamma and realised must have the shape (positions, {n}), got {shapes}")
    return gamma, realised


def _round(record: dict[str, Any], before: _Answer) -> Round:
    """A round, held to its own numbers and to the rounds before it."""
    known = [field.name for field in fields(Round)]
    if set(record) != set(known):
        raise ValueError(f"a round has the fields {', '.join(known)}; got {', '.join(record)}")
    first = before.rounds[0].start if before.rounds else _count(record, "start", 0, np.inf)
    start = _count(record, "start", first + before.tokens, first + before.tokens)
    nodes = before.header.get("nodes", before.header["draft_len"])
    drafted = _count(record, "drafted", 0, nodes)
    accepted = _count(record, "accepted", 0, min(drafted, before.header["draft_len"]))
    emitted = _typed(record, "emitted", list)
    if not all(type(token) is int and token >= 0 for token in emitted):
        raise ValueError(f"emitted must be token ids, got {emitted}")
    if not max(accepted, 1) <= len(emitted) <= accepted + 1:
        raise ValueError(f"emitted must be the {accepted} accepted tokens and the next one, got {emitted}")
    probs = _array(record, "probs")
    if probs.shape != (before.n,) or abs(probs.sum() - 1) > 1e-6:
        raise ValueError(f"probs must be a law over {before.n} drafters, got {probs.tolist()}")
    gamma, realised = _round_scores(record, before, len(emitted))
    seconds = _seconds(_typed(record, "seconds", dict))
    choice = _count(record, "choice", 0, before.n - 1)
    return Round(start, choice, probs, drafted, accepted, tuple(emitted), gamma, realised, seconds)


def _round_scores(
    record: dict[str, Any], before: _Answer, emitted: int
) -> tuple[Floats, Floats] | tuple[None, None]:
    """``gamma`` and ``realised`` of a round: of all positions up to its end that had none yet."""
    if record["gamma"] is None and record["realised"] is None:
        return None, None
    gamma, realised = _scores(record, before.n)
    unscored = before.tokens + emitted - before.scored
    if len(gamma) != unscored:
        raise ValueError(f"gamma and realised must have {unscored} rows, got {len(gamma)}")
    return gamma, realised


def _seconds(record: dict[str, Any]) -> Seconds:
    if tuple(record) != Seconds._fields:
        raise ValueError(f"seconds has the fields {', '.join(Seconds._fields)}; got {', '.join(record)}")
    if not all(isinstance(value, float | int) and isfinite(value) for value in record.values()):
        raise ValueError(f"seconds must be finite numbers, got {record}")
    return Seconds(**record)
