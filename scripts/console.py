"""What the training scripts show while they work, and how they end."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from nab.backends.pretrained import available


def steps_bar() -> Progress:
    """A bar whose tasks have a `state` field."""
    state = TextColumn("{task.completed}/{task.total} {task.fields[state]}")
    return Progress(TextColumn("{task.description}"), BarColumn(), state, TimeRemainingColumn())


class Parser(argparse.ArgumentParser):
    """Of the command line; what is wrong with it takes one line."""

    def __init__(self, about: str | None) -> None:
        super().__init__(description=about, formatter_class=argparse.RawTextHelpFormatter)

    def error(self, message: str) -> NoReturn:
        """End with the message."""
        self.exit(2, f"error: {message}\n")


def whole(least: int) -> Callable[[str], int]:
    """The type of an argument: a whole number that is at least `least`."""

    def parsed(text: str) -> int:
        number = int(text) if text.removeprefix("-").isdecimal() else least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text}")
        return number

    return parsed


def rate(text: str) -> float:
    """The type of an argument: a positive, finite number."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return number


def device(text: str) -> str:
    """The type of an argument: a device of torch that is there."""
    try:
        return available(text)
    except ValueError as problem:
        raise argparse.ArgumentTypeError(str(problem)) from None


def folder(text: str) -> Path:
    """The type of an argument: a folder, there or not."""
    if Path(text).exists() and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a file, expected a folder")
    return Path(text)


def domains_in(corpora: Path, part: str, left_out: str) -> list[str]:
    """The domains in a folder but for those left out, which are separated by commas.

    Raises:
        ValueError: if none is left.
    """
    found = sorted(path.parent.name for path in corpora.glob(f"*/{part}"))
    left = [domain for domain in found if domain not in left_out.split(",")]
    if not left:
        there = f"only {', '.join(found)}, and --leave-out {left_out}" if found else "none"
        raise ValueError(
            f"no domains (folders <domain>/{part} with text files) are left in {corpora}: {there}"
        )
    return left


def guarded(main: Callable[[], None]) -> None:
    """Run `main`; Ctrl-C and what a person can cause end in one line."""
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command goes on from the last checkpoint") from None
    except (OSError, ValueError) as problem:
        raise SystemExit(f"error: {' '.join(str(problem).split())}") from None
