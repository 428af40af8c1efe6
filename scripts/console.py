"""What the training scripts show while they work, and how they end."""

from collections.abc import Callable

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


def steps_bar() -> Progress:
    """A bar whose tasks have a `state` field."""
    state = TextColumn("{task.completed}/{task.total} {task.fields[state]}")
    return Progress(TextColumn("{task.description}"), BarColumn(), state, TimeRemainingColumn())


def guarded(main: Callable[[], None]) -> None:
    """Run `main`; Ctrl-C and what a person can cause end in one line."""
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command goes on from the last checkpoint") from None
    except (OSError, ValueError) as problem:
        raise SystemExit(f"error: {problem}") from None
