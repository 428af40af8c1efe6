"""One training loop for targets and drafters: resumable at any moment, on CPU and CUDA."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic, time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nab.sim.trace import processor


@dataclass(frozen=True)
class Recipe:
    """How to train: Muon for the matrices inside, AdamW for embeddings and vectors.

    Args:
        rate: peak learning rate of both (Muon's updates are scaled to AdamW's root mean square).
        warmup: share of the steps that rises linearly to ``rate``.
        cooldown: share of the steps at the end that falls linearly to zero.
        clip: largest norm of the gradient.
        bfloat16: autocast the forward; None does so on CUDA alone, since many CPUs multiply float32 faster.
        save_every: seconds between checkpoints.
    """

    rate: float = 3e-3
    warmup: float = 0.02
    cooldown: float = 0.4
    clip: float = 1.0
    bfloat16: bool | None = None
    save_every: float = 30.0

    def factor(self, step: int, steps: int) -> float:
        """Share of the peak rate at ``step`` of ``steps``."""
        rising = (step + 1) / max(self.warmup * steps, 1)
        falling = (steps - step) / max(self.cooldown * steps, 1)
        return min(1.0, rising, falling)


Progress = Callable[[int, float], None]


def fit(
    model: nn.Module,
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    folder: Path,
    recipe: Recipe | None = None,
    progress: Progress | None = None,
) -> None:
    """Minimise ``loss(step)`` over the parameters of ``model`` that require gradients.

    What a step sees depends on its number alone, so a run that was killed goes on from its last checkpoint
    (at most ``save_every`` seconds old, written whole or not at all) as if nothing had happened.

    Args:
        model: trained in place.
        loss: scalar of a step.
        steps: number of steps in all.
        folder: gets ``checkpoint.safetensors`` and ``curve.jsonl``, one object a step.
        recipe: see there.
        progress: told the number of finished steps and the loss of the last.

    Raises:
        ValueError: if a loss is not finite, naming the step.
    """
    recipe = recipe or Recipe()
    folder.mkdir(parents=True, exist_ok=True)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizers = _optimizers(trained)
    done = _restore(folder / "checkpoint.safetensors", trained, optimizers)
    device = next(iter(trained.values())).device.type
    bfloat16 = device != "cpu" if recipe.bfloat16 is None else recipe.bfloat16
    saved = monotonic()
    with _curve(folder / "curve.jsonl", done) as curve:
        for step in range(done, steps):
            with torch.autocast(device, dtype=torch.bfloat16, enabled=bfloat16):
                value = loss(step)
            value.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(trained.values(), recipe.clip)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = recipe.rate * recipe.factor(step, steps)
                optimizer.step()
                optimizer.zero_grad()
            now = value.item()
            if not math.isfinite(now):
                raise ValueError(f"the loss of step {step} is {now}: lower the rate, {recipe.rate}")
            curve(step, now)
            if monotonic() - saved > recipe.save_every or step == steps - 1:
                _save(folder / "checkpoint.safetensors", trained, optimizers, step + 1)
                saved = monotonic()
            if progress:
                progress(step + 1, now)


def _optimizers(trained: dict[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
    embedding = {name for name in trained if "embed" in name or "lm_head" in name}
    matrices = [p for name, p in trained.items() if p.ndim == 2 and name not in embedding]
    others = [p for name, p in trained.items() if p.ndim != 2 or name in embedding]
    made: list[torch.optim.Optimizer] = []
    if matrices:
        made.append(torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    if others:
        made.append(torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0))
    return made


def _save(
    file: Path, trained: dict[str, nn.Parameter], optimizers: list[torch.optim.Optimizer], step: int
) -> None:
    tensors = {f"model.{name}": p.detach() for name, p in trained.items()}
    for k, optimizer in enumerate(optimizers):
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{k}.{i}.{key}": torch.as_tensor(value) for key, value in state.items()}
    draft = file.with_suffix(".partial")
    save_file({name: t.contiguous() for name, t in tensors.items()}, draft, {"step": str(step)})
    draft.replace(file)


def _restore(file: Path, trained: dict[str, nn.Parameter], optimizers: list[torch.optim.Optimizer]) -> int:
    """Steps already done; 0 without a checkpoint."""
    if not file.exists():
        return 0
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            kind, _, rest = name.partition(".")
            if kind == "model":
                trained[rest].data.copy_(tensors.get_tensor(name))
            else:
                k, i, key = rest.split(".")
                states[int(k)].setdefault(int(i), {})[key] = tensors.get_tensor(name)
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        return int(tensors.metadata()["step"])


@contextmanager
def _curve(file: Path, done: int) -> Iterator[Callable[[int, float], None]]:
    """Appends steps to the learning curve; what lies behind the checkpoint is dropped first."""
    lines = file.read_text().splitlines()[:done] if file.exists() else []
    file.write_text("".join(f"{line}\n" for line in lines))
    with file.open("a") as stream:

        def append(step: int, loss: float) -> None:
            stream.write(json.dumps({"step": step, "loss": round(loss, 5)}) + "\n")
            stream.flush()

        yield append


def provenance(folders: Mapping[str, Path], *, device: str, began: float) -> dict[str, Any]:
    """What a manifest says beside plan and seed: the data, the time since ``began``, the machine.

    Args:
        folders: of the text files of each domain.
        device: that trained.
        began: what ``time.time()`` was at the start of this process's part.
    """
    data = {}
    for domain, folder in folders.items():
        files, digest, size = sorted(folder.glob("*.txt")), hashlib.sha256(), 0
        for file in files:
            text = file.read_bytes()
            size += len(text)
            digest.update(text)
        data[domain] = {"documents": len(files), "bytes": size, "sha256": digest.hexdigest()}
    return {
        "data": data,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time() - began),
        "hardware": torch.cuda.get_device_name(device) if device.startswith("cuda") else processor(),
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


@dataclass(frozen=True)
class Windows:
    """Fixed-length windows of token documents in a shuffled order that repeats with a new shuffle.

    Args:
        tokens: all documents joined, each closed by an end token where the target has one.
        length: tokens in a window.
        seed: of the shuffles.
    """

    tokens: NDArray[np.int64]
    length: int
    seed: int = 0

    def __len__(self) -> int:
        """Number of windows, at least 1 if there is text enough for one."""
        return len(self.tokens) // self.length

    def __getitem__(self, number: int) -> NDArray[Any]:
        """Window ``number`` in order of place, ``(length,)``."""
        return self.tokens[number * self.length : (number + 1) * self.length]

    def draw(self, first: int, count: int) -> list[int]:
        """The numbers of the ``first``-th to ``first + count - 1``-th window in shuffled order."""
        return [self._shuffle(i // len(self))[i % len(self)] for i in range(first, first + count)]

    def _shuffle(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self))
