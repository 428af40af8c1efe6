"""The drafters of a query, each until it fails: whatever a drafter does, the text stays the target's."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Any, TypeVar, cast

import numpy as np

from nab.types import Accepts, Floats, LanguageModel

T = TypeVar("T")
"""What a call of a drafter gives."""

THREAD = "nab drafters"
"""Name of the thread that drafters with a limit run in."""


class DrafterWarning(UserWarning):
    """A drafter failed and drafts no more in this query."""


class Pool:
    """Drafters that are benched for the rest of the query when they fail.

    A drafter that raises (and so everything that is found wrong with what it returns), or is not done after
    ``limit`` seconds, is benched with a ``DrafterWarning`` that names it. Its rounds then have no draft and
    its acceptance is 0, so its losses are the worst there are. Where all fail, that is plain decoding.

    Args:
        drafters: the members, n of them.
        limit: seconds that a draft or an evaluation may take; None is for ever. With a limit, drafters run in
            a thread of their own. One that hangs is left behind there, and is benched in later queries too
            for as long as it does.

    Raises:
        ValueError: if ``limit`` is not positive.
    """

    def __init__(self, drafters: Sequence[LanguageModel], *, limit: float | None = None) -> None:
        number = isinstance(limit, int | float) and not isinstance(limit, bool)
        if limit is not None and not (number and 0 < limit < threading.TIMEOUT_MAX):
            raise ValueError(f"limit must be a positive number of seconds or None, got {limit!r}")
        self.drafters = drafters
        self.limit = limit
        self.benched: dict[int, str] = {}
        """By index, why."""

    def __len__(self) -> int:
        return len(self.drafters)

    def call(self, i: int, work: Callable[[LanguageModel], T]) -> T | None:
        """``work`` on drafter ``i``, or None if it is benched, before or by this."""
        if i in self.benched:
            return None
        drafter = self.drafters[i]
        try:
            return work(drafter) if self.limit is None else _WORKER.run(work, drafter, self.limit)
        except (Exception, SystemExit) as failure:
            error = failure  # the name of an except clause ends with it
            kind = type(error).__name__
            self.bench(i, _said(lambda: f"{kind}: {error}", kind))
            return None

    def together(self, work: Callable[[Accepts], Floats]) -> dict[int, Floats]:
        """What drafters that score chains by themselves make of ``work``, by index.

        Those of a stack are asked together. Nobody is benched here: where ``work`` fails, or returns NaN, its
        drafters are left out, and who is to blame is seen when they are asked one by one.
        """
        stacks: dict[int, tuple[Any, list[int]]] = {}
        for i, drafter in enumerate(self.drafters):
            stack = getattr(drafter, "stack", None) or drafter
            if hasattr(stack, "acceptance") and i not in self.benched:
                stacks.setdefault(id(stack), (stack, []))[1].append(i)
        found: dict[int, Floats] = {}
        for stack, members in stacks.values():
            limit = self.limit and self.limit * len(members)
            try:
                scores = work(stack) if limit is None else _WORKER.run(work, stack, limit)
                all_members = getattr(stack, "members", [stack])
                own = {i: scores[..., all_members.index(self.drafters[i])] for i in members}
                found |= {i: each for i, each in own.items() if np.isfinite(each).all()}
            except (Exception, SystemExit):
                continue
        return found

    def bench(self, i: int, why: str) -> None:
        """Bench drafter ``i`` for the rest of the query, with a ``DrafterWarning``."""
        drafter: Any = self.drafters[i]
        self.benched[i] = why
        who = _said(lambda: f"drafter {i} ({drafter.name})", f"drafter {i}")
        warnings.warn(f"{who} is benched for this query: {why}", DrafterWarning, stacklevel=4)


def _said(text: Callable[[], str], otherwise: str) -> str:
    """What a drafter says of itself, if it can."""
    try:
        return text()
    except Exception:
        return otherwise


class _Worker:
    """A thread that can be given up, and a new one then."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Any] | None = None
        self._hanging: dict[int, LanguageModel] = {}

    def run(self, work: Callable[[Any], T], drafter: Any, limit: float) -> T:
        """The result of ``work(drafter)``.

        Raises:
            TimeoutError: if it takes longer than ``limit`` seconds, or hangs since an earlier call.
        """
        if id(drafter) in self._hanging:
            raise TimeoutError("it still hangs since an earlier query")
        answer: SimpleQueue[Any] = SimpleQueue()
        self._hanging[id(drafter)] = drafter
        self._thread().put((work, drafter, answer))
        try:
            result, error = answer.get(timeout=limit)
        except Empty:
            self._jobs = None
            raise TimeoutError(f"it was not done after {limit:g} s") from None
        except BaseException:  # Ctrl-C
            self._jobs = None
            raise
        if error is not None:
            raise error
        return cast(T, result)

    def _thread(self) -> SimpleQueue[Any]:
        """What the thread takes its work from; it is started where there is none."""
        if self._jobs is None:
            self._jobs = SimpleQueue()
            jobs = (self._jobs,)
            threading.Thread(target=self._serve, args=jobs, name=THREAD, daemon=True).start()
        return self._jobs

    def _serve(self, jobs: SimpleQueue[Any]) -> None:
        while jobs is self._jobs:  # else it was given up
            work, drafter, answer = jobs.get()
            outcome: tuple[Any, BaseException | None]
            try:
                outcome = work(drafter), None
            except BaseException as error:  # handed on to who waits
                outcome = None, error
            self._hanging.pop(id(drafter), None)
            answer.put(outcome)


_WORKER = _Worker()
