"""Weights at one byte each: matrices as int8 with one scale a row, in safetensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SCALE = ".scale"


def quantize(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices to the nearest of 255 levels, symmetric about 0, row by row; vectors to float16.

    Integer tensors stay. A row of zeros has scale 0; what lies below 1e-28 comes back as zeros too.
    """
    stored = {}
    for name, weight in weights.items():
        if not weight.is_floating_point():
            stored[name] = weight.contiguous()
        elif weight.ndim != 2:
            stored[name] = weight.half().contiguous()
        else:
            scale = weight.float().abs().amax(1) / 127
            levels = (weight.float() / scale.clamp_min(1e-30)[:, None]).round()
            stored[name], stored[name + SCALE] = levels.to(torch.int8), scale
    return stored


def dequantize(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Float32 weights (integers as they are); inverse of ``quantize`` up to half a level of each row."""
    weights = {}
    for name, tensor in stored.items():
        if name + SCALE in stored:
            weights[name] = tensor.float() * stored[name + SCALE][:, None]
        elif not name.endswith(SCALE):
            weights[name] = tensor.float() if tensor.is_floating_point() else tensor
    return weights


def save(weights: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str]) -> None:
    """Write ``quantize(weights)``; the file appears whole or not at all."""
    draft = file.with_suffix(".partial")
    save_file(quantize(weights), draft, dict(metadata))
    draft.replace(file)


@contextmanager
def opened(file: Path, framework: str = "pt") -> Iterator[Any]:
    """A safetensors file, as ``safe_open`` gives it.

    Raises:
        ValueError: if it is none, or not whole, naming it.
    """
    try:
        with safe_open(file, framework=framework) as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or no safetensors file ({error})") from None


def load(file: Path) -> dict[str, Tensor]:
    """Weights that ``save`` wrote."""
    with opened(file) as tensors:
        return dequantize({name: tensors.get_tensor(name) for name in tensors.keys()})  # noqa: SIM118


def metadata(file: Path) -> dict[str, str]:
    """What ``save`` was given to remember."""
    with opened(file, "numpy") as tensors:
        return dict(tensors.metadata() or {})
