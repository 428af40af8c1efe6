"""Memory of a process that decodes for long: whether it grows, and what a drafter takes. See `decode.py`."""

import os
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import POLICIES, Scene, decoding, perturbed, random_prompt, tiny_target
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from timing import Cells

from nab.backends.torch import CausalLM, Warper, early_exit

DRAFTERS = 4
EVERY = 1000
WARM_UP = 2000
LENGTHS = (96, 1000)


def resident() -> int:
    """Bytes of the process in memory now; where that is not told, the most it ever had."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if os.uname().sysname == "Darwin" else most * 1024


def weights(model: Any) -> int:
    """Bytes of parameters and buffers."""
    return sum(w.numel() * w.element_size() for w in (*model.parameters(), *model.buffers()))


def cached(model: CausalLM) -> int:
    """Bytes of the keys and values that a model holds."""
    layers: Any = model._cache.keys.layers
    return sum(x.numel() * x.element_size() for layer in layers for x in (layer.keys, layer.values))


def growth(samples: Sequence[tuple[int, int]]) -> float:
    """Bytes a token: the slope of a least-squares line through ``(tokens, bytes)``."""
    tokens, held = np.array(samples, dtype=float).T
    return float(np.polyfit(tokens, held, 1)[0])


def prepared(cells: Cells, draft_len: int) -> tuple[Scene, CausalLM, list[CausalLM]]:
    """Target and drafters; what each drafter added is kept."""
    target = tiny_target(0.05, torch.float32)
    first = early_exit(target, 1)
    scene = Scene(target, [], random_prompt(target.config.vocab_size), LENGTHS[1], draft_len, 1.0)
    before, models = resident(), []
    for seed in range(DRAFTERS):
        models.append(perturbed(first, 0.05, seed))
    taken = (resident() - before) / DRAFTERS
    cells.add({"drafter": {"resident": taken, "weights": weights(models[0])}})
    return scene, CausalLM(target), [CausalLM(model, Warper()) for model in models]


def main(console: Console, tokens: int, out: Path, about: dict[str, Any]) -> None:
    """Decode ``tokens`` tokens as many queries under normal-hedge, and print what memory did."""
    file = out.with_name(f"{out.stem}-soak.json")
    file.unlink(missing_ok=True)  # a run is one process: nothing to go on with
    cells = Cells(file, {**about, "drafters": DRAFTERS, "lengths": LENGTHS, "soak": tokens})
    scene, target, drafters = prepared(cells, about["draft_len"])
    rng, done, samples, largest = np.random.default_rng(0), 0, list[tuple[int, int]](), 0
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("decoding", total=tokens + WARM_UP)
        try:
            while done < tokens + WARM_UP:
                length = int(rng.integers(*LENGTHS, endpoint=True))
                query = scene._replace(new_tokens=length, prompt=random_prompt(8192, seed=done))
                done += len(decoding(target, drafters, POLICIES["normal-hedge"], query)(done).tokens)
                largest = max(largest, cached(drafters[0]))
                due = WARM_UP + EVERY * len(samples)
                if done >= due:
                    samples.append((done, resident()))
                    cells.add({"samples": samples, "cache": largest})
                progress.update(task, completed=done)
        except KeyboardInterrupt:
            progress.console.print("interrupted")
    show(console, cells, samples)


def show(console: Console, cells: Cells, samples: list[tuple[int, int]]) -> None:
    """What memory did, in MB."""
    table = Table(title="resident memory behind a warm-up, between queries", title_justify="left")
    table.add_column("tokens", justify="right")
    table.add_column("MB", justify="right")
    for done, held in samples:
        table.add_row(str(done), f"{held / 1e6:.1f}")
    console.print(", ".join(f"{name} {value}" for name, value in cells.about.items()))
    console.print(table)
    if len(samples) > 1:
        console.print(f"slope {growth(samples):.1f} bytes a token")
    drafter = {**cells.cells["drafter"], "cache": cells.cells.get("cache", 0)}
    console.print("a drafter, MB: " + ", ".join(f"{what} {size / 1e6:.2f}" for what, size in drafter.items()))
