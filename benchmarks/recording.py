"""What benchmarks that record traces share: held-out prompts, models, headers, work unit by unit."""

import argparse
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from paper_report import HEDGE
from rich.console import Console
from rich.progress import Progress
from timing import commit, device_name

import nab
from nab import prompts, replays
from nab.backends import pool, pretrained
from nab.backends.session import Session
from nab.backends.torch import Warper
from nab.checks import whole
from nab.losses import Token
from nab.prompts import Prompt
from nab.selector import Constant
from nab.sim.trace import environment

DRAFT_LEN = 4
WARMUP = 20
"""Rounds that a device decodes before anything is measured."""

OPENING = 300
"""Characters of an opening."""

HEADS = ["lookup", "generalist", "c", "english", "javascript", "json", "legal", "mathematics", "python"]

Policies = dict[str, Callable[[Any], Any]]
"""Fresh selectors by seed, by the policy's name."""


def fixed(law: np.ndarray, seed: Any, *, draft_len: int | None = None) -> Constant:
    """The same law and draft length always."""
    return Constant(law, draft_len=draft_len, rng=seed)


def openings(folder: Path, count: int) -> Iterator[str]:
    """Text from inside documents, in turn from each that is long enough; see scripts/openings.py.

    The k-th does not depend on ``count``: the c-th from a document begins at 1/2, 1/4, 3/4, 1/8, ... of it.
    """
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))]
    texts = [text for text in texts if len(text) > 8 * OPENING]
    for k in range(count if texts else 0):
        text, digits = texts[k % len(texts)], f"{1 + k // len(texts):b}"
        place = len(text) * int(digits[::-1], 2) // 2 ** len(digits)
        start = max(text.rfind("\n", 0, place), text.rfind(" ", 0, place)) + 1
        yield text[start : start + OPENING].strip()


def prompts_of(corpora: Path, target: str, domain: str, count: int) -> list[Prompt]:
    """Held-out prompts of a domain.

    Raises:
        ValueError: if there are fewer, or there is no such domain.
    """
    folder = corpora / domain
    if not folder.is_dir():
        known = ", ".join(sorted(path.name for path in corpora.iterdir() if path.is_dir()))
        raise ValueError(f"domains of {corpora} are {known}, got {domain}")
    if target == "tiny":
        found = [Prompt(text, domain) for text in openings(folder / "heldout", count)]
    else:
        file = folder / "requests" / "heldout.txt"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        shipped = [each for each in prompts.read(prompts.SHIPPED) if each.domain == domain]
        found = [*(Prompt(line, domain) for line in lines), *shipped][:count]
    if len(found) < count:
        raise ValueError(f"{domain} has {len(found)} held-out prompts, {count} are asked for")
    return found


@cache
def session(target: str, temperature: float, tokens: int, device: str) -> Session:
    """Target and its default pool, once in a process."""
    torch.set_num_threads(1)
    loaded = pretrained.load(Path("tiny") if target == "tiny" else None, dtype="float32", device=device)
    names = pool.default(loaded) if target == "tiny" else HEADS
    made = Session(loaded, names, Warper(temperature), DRAFT_LEN, tokens)
    if device != "cpu":  # which loads kernels when they are first used
        selector = replays.policies(len(made.names), DRAFT_LEN, Token())[HEDGE].make(0)
        with closing(made.decode(made.query(), made.encode("Once upon a time"), selector, 0)) as rounds:
            for _ in islice(rounds, WARMUP):
                pass
    return made


def header(made: Session, seed: int, **more: Any) -> dict[str, Any]:
    """What a trace says of itself first."""
    return {
        "version": nab.__version__,
        **environment(),
        "command": " ".join(["python", *sys.argv]),
        "commit": commit(),
        "torch": torch.__version__,
        "device": device_name(str(made.model.device)),
        "target": made.target.name,
        "drafters": made.names,
        "dtype": "float32",
        "draft_len": DRAFT_LEN,
        "temperature": made.warper.temperature,
        "seed": seed,
        **more,
    }


def _ready() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    torch.set_num_threads(1)


def work_through(units: Sequence[Any], work: Callable[[Any], None], jobs: int) -> None:
    """Have processes do all units whose ``path`` is not there yet; the work writes it as its last act."""
    left = [unit for unit in units if not unit.path.exists()]
    context = multiprocessing.get_context("spawn")
    with (
        Progress(console=Console(stderr=True)) as progress,
        ProcessPoolExecutor(jobs, context, _ready) as workers,
    ):
        task = progress.add_task("answering", total=len(units), completed=len(units) - len(left))
        try:
            for done in as_completed([workers.submit(work, unit) for unit in left]):
                done.result()
                progress.advance(task)
        except BaseException:
            workers.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def commands(
    doc: str | None,
    record: Callable[[argparse.Namespace], None],
    report: Callable[[argparse.Namespace], None],
    targets: Sequence[str],
    per_domain: int,
) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser, argparse.ArgumentParser]:
    """A command line with ``record`` and ``report``, and these two, for options of their own."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    either = parser.add_subparsers(required=True)
    recorder = either.add_parser("record", help="answer prompts under every policy")
    recorder.add_argument("corpora", type=Path)
    recorder.add_argument("--target", choices=targets, default=targets[0])
    recorder.add_argument("--out", type=Path, required=True)
    recorder.add_argument("--temperature", type=float, nargs="+", default=[0.0, 0.8])
    recorder.add_argument("--per-domain", type=int, default=per_domain)
    recorder.add_argument("--domains", nargs="+", help="default: all that have experts")
    recorder.add_argument("--jobs", type=int, default=1)
    recorder.set_defaults(command=partial(_in_range, record))
    reporter = either.add_parser("report", help="tables and pictures of what is there")
    reporter.add_argument("out", type=Path)
    reporter.add_argument("--seed", type=int, default=0, help="of the bootstrap and the replays")
    reporter.set_defaults(command=partial(_in_range, report))
    return parser, recorder, reporter


def _in_range(command: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> None:
    for name, least in (("per_domain", 1), ("jobs", 1), ("seed", 0)):
        if hasattr(options, name):
            whole(f"--{name.replace('_', '-')}", getattr(options, name), least)
    command(options)


def run(parsed: Callable[[], argparse.Namespace]) -> None:
    """Do what the command line says; errors are one line, and SIGTERM ends workers too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        chosen = parsed()
        chosen.command(chosen)
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command goes on") from None
    except (OSError, ValueError) as problem:
        raise SystemExit(f"error: {' '.join(str(problem).split())}") from None
