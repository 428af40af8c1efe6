"""Clocks, machines and files of measurements, shared by the benchmarks."""

import json
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from functools import cache, wraps
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
import transformers

from nab.backends.torch import CausalLM, Warper
from nab.sim.trace import processor


class Forwards:
    """Wall and processor seconds and calls inside the ``forward`` of models, by kind.

    Watching replaces the method for good; a copy of a watched model would run the original.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """All counts to 0."""
        self.seconds: dict[str, float] = {}
        self.cpu: dict[str, float] = {}
        self.calls: dict[str, int] = {}

    def watch(self, kind: str, model: Any, method: str = "forward") -> None:
        """Count ``model`` as one of a kind; ``method`` does the work, or a part that is called on its own."""
        inner = getattr(model, method)

        @wraps(inner)  # generate and others look at the signature
        def timed(*args: Any, **kwargs: Any) -> Any:
            started, busy = perf_counter(), process_time()
            try:
                return inner(*args, **kwargs)
            finally:
                self.cpu[kind] = self.cpu.get(kind, 0.0) + process_time() - busy
                self.seconds[kind] = self.seconds.get(kind, 0.0) + perf_counter() - started
                self.calls[kind] = self.calls.get(kind, 0) + 1

        timed.watcher = self, kind
        setattr(model, method, timed)


def reading(model: Any, warper: Warper) -> CausalLM:
    """This library's reader of a watched model, watched likewise where its own decoder does the work.

    That is from token ids, positions and masks to logits, as ``forward`` is, but for the masks.
    """
    (reader,) = readers([model], lambda: [CausalLM(model, warper)])
    return reader


def readers(models: Sequence[Any], made: Callable[[], Sequence[CausalLM]]) -> Sequence[CausalLM]:
    """What is made of watched models, one reader of each: see ``reading``."""
    watched = [vars(model).pop("forward", None) for model in models]
    found = made()
    for model, reader, forward in zip(models, found, watched, strict=True):
        if forward is not None:
            model.forward = forward
            if reader.decoder is not None:
                clock, kind = forward.watcher
                clock.watch(kind, reader, "_decoded")
    return found


class _Nothing:
    def forward(self) -> None:
        """Do nothing."""


def clock_cost(calls: int = 20_000) -> tuple[float, float]:
    """Wall and processor seconds that a watched call adds to what is outside of forwards."""
    clock, model = Forwards(), _Nothing()
    clock.watch("none", model)
    started, busy = perf_counter(), process_time()
    for _ in range(calls):
        model.forward()
    wall, cpu = perf_counter() - started, process_time() - busy
    return (wall - clock.seconds["none"]) / calls, (cpu - clock.cpu["none"]) / calls


def measured(run: Callable[[int], Any], seed: int, clock: Forwards) -> dict[str, Any]:
    """One run: its tokens and rounds, wall and processor seconds, and what ``clock`` counted meanwhile."""
    clock.reset()
    started, busy = perf_counter(), process_time()
    answer = run(seed)
    wall, cpu = perf_counter() - started, process_time() - busy
    return {
        "tokens": len(answer.tokens),
        "rounds": answer.rounds or clock.calls["target"],
        "seconds": wall,
        "cpu": cpu,
        "forward_seconds": dict(clock.seconds),
        "forward_cpu": dict(clock.cpu),
        "forward_calls": dict(clock.calls),
        "phases": answer.phases,
    }


def figures(cell: dict[str, Any], cost: tuple[float, float]) -> dict[str, float]:
    """What tables show of a cell; milliseconds, per token or round; ``cost`` is that of the clock."""
    calls = sum(cell["forward_calls"].values())
    wall, cpu = (
        (cell[name] - sum(cell[f"forward_{name}"].values()) - each * calls) / cell["rounds"] * 1e3
        for name, each in zip(("seconds", "cpu"), cost, strict=True)
    )
    return {
        "tokens/s": cell["tokens"] / cell["seconds"],
        "cpu": cell["cpu"] / cell["tokens"] * 1e3,
        "tokens/round": cell["tokens"] / cell["rounds"],
        "round": cell["seconds"] / cell["rounds"] * 1e3,
        "outside": wall,
        "outside cpu": cpu,
        "selecting": cell["phases"][2] / sum(cell["phases"]) if cell["phases"] else float("nan"),
    }


def quartiles(values: Any, digits: int = 2) -> str:
    """Median and quartiles."""
    low, median, high = np.percentile(np.asarray(values, dtype=float), [25, 50, 75])
    return f"{median:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


@cache
def commit() -> str:
    """The commit that is checked out, with a mark if files differ from it; as a process first asks."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine(device: str = "cpu") -> dict[str, Any]:
    """Hardware and versions."""
    about = {
        "hardware": f"{processor()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "commit": commit(),
    }
    if device != "cpu":
        about["device"] = device_name(device)
    return about


def device_name(device: str) -> str:
    """What hardware a torch device is, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


class Cells:
    """Measurements in one JSON file, by key; written whenever one is added, so that nothing is lost.

    Args:
        file: made if it is missing.
        about: what all cells were measured with.

    Raises:
        ValueError: if the file was measured with something else.
    """

    def __init__(self, file: Path, about: dict[str, Any]) -> None:
        self.file, self.about = file, about
        self.cells: dict[str, Any] = {}
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            return
        kept = json.loads(file.read_text())
        for name in {**kept["about"], **about}:
            before, now = kept["about"].get(name), json.loads(json.dumps(about.get(name)))
            if before != now:
                raise ValueError(
                    f"{file} was measured with {name} {before!r}, not {now!r}: take another --out"
                )
        self.cells = kept["cells"]

    def add(self, cells: dict[str, Any]) -> None:
        """Keep cells that belong together, all or none."""
        self.cells |= cells
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps({"about": self.about, "cells": self.cells}, indent=1))
        part.replace(self.file)
