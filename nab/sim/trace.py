"""Traces: a run as JSON lines, one record each, flushed as it happens so that a crash keeps what there is.

The first record is the header (``kind: header``: version, command, seed, models, dtype, hardware, drafter
names, draft length). Then come ``round`` records, one per target forward, and behind the rounds of each query
one ``query`` record with its metrics. ``gamma`` and ``realised`` stand in the rounds where the selector asked
for them, otherwise in the query record.
"""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from nab.decode import Round


class TraceWriter:
    """Writes a trace; use it as a context manager.

    Args:
        path: file to write; its folder is made, an existing file is replaced.
        header: what to know about the run, plain JSON types.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")
        self.write("header", header)

    def write(self, kind: str, record: dict[str, Any]) -> None:
        """Append one record; numpy arrays become nested lists."""
        line = json.dumps({"kind": kind, **record}, default=np.ndarray.tolist, ensure_ascii=False)
        self._file.write(line + "\n")
        self._file.flush()

    def keep(self, rounds: Iterable[Round], where: dict[str, Any]) -> Iterator[Round]:
        """Hand on ``rounds``, appending each; ``where`` says which query they belong to."""
        for round_ in rounds:
            self.write("round", {**where, **asdict(round_), "seconds": round_.seconds._asdict()})
            yield round_

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
