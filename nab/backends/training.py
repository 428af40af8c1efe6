"""One training loop for targets and drafters: resumable at any moment, on CPU and CUDA."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from nab.backends import int8
from nab.sim.trace import processor


def at_least(options: object, **least: int) -> None:
    """Raise ``ValueError`` with the name of the first attribute that is below its least value, or NaN."""
    for name, value in least.items():
        if not getattr(options, name) >= value:
            raise ValueError(f"{name} must be at least {value}, got {getattr(options, name)}")


def positive(options: object, *names: str) -> None:
    """Raise ``ValueError`` with the name of the first attribute that is not positive and finite."""
    for name in names:
        if not 0 < getattr(options, name) < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {getattr(options, name)}")


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

    def __post_init__(self) -> None:
        at_least(self, save_every=0)
        positive(self, "rate", "clip")
        for name in ("warmup", "cooldown"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")

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
    origin: Mapping[str, Any] | None = None,
) -> float:
    """Minimise ``loss(step)`` over the parameters of ``model`` that require gradients.

    What a step sees depends on its number alone, so a run that was killed goes on from its last checkpoint
    (at most ``save_every`` seconds and a step old, written whole or not at all) as if nothing had happened.
    Ctrl-C writes one.

    Args:
        model: trained in place.
        loss: scalar of a step.
        steps: number of steps in all.
        folder: gets ``checkpoint.safetensors`` and ``curve.jsonl``, one object a step.
        recipe: see there.
        progress: told the number of finished steps and the loss of the last.
        origin: what the training depends on; kept in the checkpoint, see ``check_origin``.

    Returns:
        Seconds that it took, those of earlier processes up to their last checkpoints included.

    Raises:
        ValueError: if a loss is not finite, naming the step; if the checkpoint is damaged or of another
            origin.
    """
    recipe, origin = recipe or Recipe(), origin or {}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "checkpoint.safetensors"
    check_origin(file, origin)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizers = _optimizers(trained)
    done, before = _restore(file, trained, optimizers)
    device = next(iter(trained.values())).device.type
    bfloat16 = device != "cpu" if recipe.bfloat16 is None else recipe.bfloat16
    began = saved = monotonic()

    def save() -> None:
        seconds = before + monotonic() - began
        facts = {"step": str(done), "seconds": str(seconds), "origin": json.dumps(origin)}
        _save(file, trained, optimizers, facts)

    with _curve(folder / "curve.jsonl", done) as curve:
        try:
            while done < steps:
                with torch.autocast(device, dtype=torch.bfloat16, enabled=bfloat16):
                    value = loss(done)
                value.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(trained.values(), recipe.clip)
                now = value.item()
                if not math.isfinite(now):
                    raise ValueError(f"the loss of step {done} is {now}: lower the rate, {recipe.rate}")
                with _uninterrupted():
                    for optimizer in optimizers:
                        for group in optimizer.param_groups:
                            group["lr"] = recipe.rate * recipe.factor(done, steps)
                        optimizer.step()
                        optimizer.zero_grad()
                    curve(done, now)
                    done += 1
                if monotonic() - saved > recipe.save_every or done == steps:
                    save()
                    saved = monotonic()
                if progress:
                    progress(done, now)
        except KeyboardInterrupt:
            save()
            raise
    return before + monotonic() - began


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C, where it interrupts at all, waits for the end of the block."""
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or usual != signal.default_int_handler:
        yield
        return
    heard: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if heard:
        raise KeyboardInterrupt


def check_origin(file: Path, origin: Mapping[str, Any]) -> None:
    """Refuse a file, if it is there, that does not come from ``origin``, as its metadata say.

    Raises:
        ValueError: naming every field that differs, or the file if it is damaged.
    """
    if not file.exists():
        return
    old = dict(_flat(json.loads(int8.metadata(file).get("origin", "{}"))))
    new = dict(_flat(json.loads(json.dumps(origin))))
    if old == new:
        return
    fields = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    said = [f"{k} was {old.get(k, 'absent')!s:.16} and is {new.get(k, 'absent')!s:.16} now" for k in fields]
    differ = "; ".join(said) if old else "it does not say of what"
    raise ValueError(
        f"{file} was made of something else ({differ}): use another folder or delete {file.parent}"
    )


def _flat(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        yield from _flat(value, f"{path}{key}.") if isinstance(value, Mapping) else [(path + key, value)]


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
    file: Path,
    trained: dict[str, nn.Parameter],
    optimizers: list[torch.optim.Optimizer],
    facts: dict[str, str],
) -> None:
    tensors = {f"model.{name}": p.detach() for name, p in trained.items()}
    for k, optimizer in enumerate(optimizers):
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{k}.{i}.{key}": torch.as_tensor(value) for key, value in state.items()}
    draft = file.with_suffix(".partial")
    save_file({name: t.contiguous() for name, t in tensors.items()}, draft, facts)
    draft.replace(file)


def _restore(
    file: Path, trained: dict[str, nn.Parameter], optimizers: list[torch.optim.Optimizer]
) -> tuple[int, float]:
    """Steps already done and the seconds they took; zeros without a checkpoint."""
    if not file.exists():
        return 0, 0.0
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    with int8.opened(file) as tensors:
        for name in tensors.keys():  # noqa: SIM118
            kind, _, rest = name.partition(".")
            if kind == "model":
                trained[rest].data.copy_(tensors.get_tensor(name))
            else:
                k, i, key = rest.split(".")
                states[int(k)].setdefault(int(i), {})[key] = tensors.get_tensor(name)
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        return int(tensors.metadata()["step"]), float(tensors.metadata()["seconds"])


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


def documents(folder: Path) -> list[str]:
    """The texts of a folder, in the order of their names.

    Raises:
        ValueError: if one is not UTF-8, naming it.
    """
    return [decoded(file) for file in sorted(folder.glob("*.txt"))]


def decoded(file: Path) -> str:
    """The text of a file; raises ``ValueError`` with its name if it is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}") from None


def corpus(folder: Path) -> dict[str, Any]:
    """What a manifest says of the texts of a folder: number, bytes, and the SHA-256 of all in turn.

    Raises:
        ValueError: if one is not UTF-8, naming it.
    """
    files, digest, size = sorted(folder.glob("*.txt")), hashlib.sha256(), 0
    for file in files:
        decoded(file)  # what could not be learnt from is refused before any work
        text = file.read_bytes()
        size += len(text)
        digest.update(text)
    return {"documents": len(files), "bytes": size, "sha256": digest.hexdigest()}


def provenance(device: str) -> dict[str, Any]:
    """What a manifest says of the machine that finished the training just now.

    Args:
        device: that trained.
    """
    return {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
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
