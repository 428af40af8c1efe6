"""What a person sees: the answer as it grows, the tables at the end, one line where something is wrong."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import numpy as np
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from nab.decode import Round
from nab.experiment import FIXED, PLAIN
from nab.measure import REPLAYS, Query, metrics
from nab.pool import DrafterWarning
from nab.replays import KINDS

COLOURS = ["cyan", "magenta", "green", "yellow", "blue", "red", "bright_black", "bright_cyan"]


EXPECTED = (
    "What single drafters would have had is told by their first forward: exact for chains of drafters "
    "alike at all depths, a few per cent too much for heads, more for static and dynamic trees; "
    "--evaluation exact is exact."
)

Step = TypeVar("Step")


class View:
    """Shows a series of queries: answers and a line about each; a terminal sees them grow under a bar.

    Args:
        console: where to show it.
        total: number of queries.
        to_text: tokens to text.
        show_text: whether answers are shown, or only a line about each.
    """

    def __init__(
        self, console: Console, total: int, to_text: Callable[[Sequence[int]], str], *, show_text: bool
    ) -> None:
        self.console, self.total, self.done = console, total, 0
        self._to_text, self._show_text = to_text, show_text
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        )
        self._task = self._progress.add_task("", total=total)

    def watch(self, label: str, query: Query, rounds: Iterable[Round]) -> None:
        """Run ``rounds`` to their end or interruption, showing the answer coloured by drafter."""
        self._progress.update(self._task, description=label)
        live = Live(console=self.console, transient=True, refresh_per_second=8)
        try:
            with live if self.console.is_terminal else nullcontext():
                for _ in rounds:
                    if self.console.is_terminal:
                        live.update(Group(*self._tail(query), self._progress))
        finally:
            self._print(query)
        self._finish(label, query)

    def watch_together(self, steps: Iterable[list[tuple[str, Query]]]) -> None:
        """Run answers that grow side by side to their end or interruption, showing each where it ends.

        Args:
            steps: labels and queries that have grown by a round each time.
        """
        live = Live(console=self.console, transient=True, refresh_per_second=8)
        growing: dict[int, Query] = {}
        try:
            with live if self.console.is_terminal else nullcontext():
                for step in steps:
                    growing |= {id(query): query for _, query in step}
                    for label, query in step:
                        if query.finished:
                            self._print(growing.pop(id(query)))
                            self._finish(label, query)
                    self._progress.update(self._task, description=f"{len(growing)} at once")
                    if self.console.is_terminal:
                        live.update(self._progress)
        finally:
            for query in growing.values():
                self._print(query)

    def _print(self, query: Query) -> None:
        if self._show_text:
            self.console.print(self._answer(query), soft_wrap=True)

    def _finish(self, label: str, query: Query) -> None:
        """A line about an answer, and a step of the bar."""
        self.done += 1
        self._progress.advance(self._task)
        line = f"[{self.done}/{self.total}] {label}: {_line(query)}"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _tail(self, query: Query) -> list[Text]:
        """The last lines of the answer so far, as many as the terminal has room for."""
        if not self._show_text:
            return []
        lines = self._answer(query).wrap(self.console, self.console.width)
        return list(lines[-max(self.console.height - 3, 1) :])

    def _answer(self, query: Query) -> Text:
        """The answer so far, each piece in the colour of the drafter of its round."""
        tokens: list[int] = []
        text, shown = Text(), ""
        for round_ in query.rounds:
            tokens.extend(round_.emitted)
            whole = self._to_text(tokens).rstrip("\N{REPLACEMENT CHARACTER}")  # half a character so far
            text.append(whole[len(shown) :], style=COLOURS[round_.choice % len(COLOURS)])
            shown = whole
        return text


def progress(console: Console, steps: Iterable[Step], total: int) -> Iterator[Step]:
    """Hand on ``steps``; a terminal sees a bar meanwhile."""
    bar = Progress(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console, transient=True)
    with bar if console.is_terminal else nullcontext():
        yield from bar.track(steps, total=total)


def _line(query: Query) -> str:
    found = metrics([query])
    chosen = _chosen(found)
    return (
        f"{found['num_tokens']} tokens, {found['mean_acceptance_length']:.2f} per target forward, "
        f"{found['tokens_per_second'] or 0:.1f} tokens/s" + (f" ({chosen})" if chosen else "")
    )


def run_table(domains: Mapping[str, Sequence[Query]], title: str) -> Group:
    """One row per domain: metrics, regret per query, share of rounds per drafter."""
    caption = (
        "MAT: mean acceptance length, tokens per target forward. single: what the best single drafter would "
        "have had on the same text. select: share of the time spent scoring all drafters and learning. "
        f"regret: token loss a query, against its best single drafter in hindsight. {EXPECTED}"
    )
    headings = ["MAT", "single", "accept", "tokens/s", "select", "regret"]
    table = _table(["domain"], headings)
    table.add_column("rounds by drafter", min_width=16)
    for domain, queries in domains.items():
        found = metrics(queries)
        table.add_row(
            domain or "-",
            f"{found['mean_acceptance_length']:.2f}",
            f"{max(found['single_drafters'].values()):.2f}" if found["single_drafters"] else "-",
            _percent(found["draft_acceptance_rate"]),
            f"{found['tokens_per_second'] or 0:.1f}",
            _percent(found["selection_share"]),
            f"{found['regret']['token'] / len(queries):.2f}" if found["regret"] else "-",
            _chosen(found),
        )
    return Group(Text(title), table, Text(caption))


def comparison_table(totals: Mapping[str, Mapping[str, Any]], title: str) -> Group:
    """One row per policy: MAT per domain, over all, tokens/s, and extra target forwards per query.

    Args:
        totals: per policy, the total of ``Experiment.results``.
        title: above the table.
    """
    caption = (
        "*: the best single drafter of the domain. extra: target forwards a query beyond those of its best "
        "single drafter."
    )
    domains = list(totals[PLAIN]["domains"])
    table = _table(["MAT of"], [*(d or "-" for d in domains), "all", "tokens/s", "extra"])
    lengths = {name: [_mat(total["domains"][d]) for d in domains] for name, total in totals.items()}
    singles = [row for name, row in lengths.items() if name.startswith(FIXED)]
    best = np.reshape(singles, (-1, len(domains))).max(0, initial=0).tolist()
    for policy, total in totals.items():
        marks = ["*" if policy.startswith(FIXED) else ""] * len(domains)
        cells = zip(marks, lengths[policy], best, strict=True)
        table.add_row(
            policy,
            *(f"{mark if length == most else ''}{length:.2f}" for mark, length, most in cells),
            f"{_mat(total):.2f}",
            f"{total['tokens_per_second']:.1f}",
            "-" if total["stopping_time_regret"] is None else f"{total['stopping_time_regret']:+.1f}",
        )
    return Group(Text(title), table, Text(caption))


def same_text_table(totals: Mapping[str, Mapping[str, Any]]) -> Group:
    """One row per selector: its MAT over the best single drafter's, both expected on the texts it wrote."""
    caption = (
        "Above temperature 0 every policy writes other texts. Here the texts that a selector wrote are "
        f"replayed, by that selector {REPLAYS} times and by every single drafter in expectation. {EXPECTED}"
    )
    title = "MAT over the best single drafter's on the same text"
    domains = list(totals[PLAIN]["domains"])
    table = _table([""], [domain or "-" for domain in domains])
    for policy, total in totals.items():
        found = [total["domains"][domain] for domain in domains]
        if all(each["replayed_acceptance_length"] for each in found):
            best = [max(each["single_drafters"].values()) for each in found]
            ratios = [each["replayed_acceptance_length"] / b for each, b in zip(found, best, strict=True)]
            table.add_row(policy, *(f"{ratio:.3f}" for ratio in ratios))
    return Group(Text(title), table, Text(caption))


def frame_table(frame: Any, title: str) -> Group:
    """A pandas data frame as it is, numbers to four places; text on the left."""
    texts = [name for name in frame.columns if frame[name].dtype.kind not in "iuf"]
    numbers = [name for name in frame.columns if name not in texts]
    table = _table(list(map(str, texts)), list(map(str, numbers)))
    for row in frame[[*texts, *numbers]].itertuples(index=False):
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    return Group(Text(title), table)


def replay_table(totals: Mapping[str, Mapping[str, Any]], title: str) -> Group:
    """One row per policy of ``nab.replays.totals``, by kind, the best of each kind first."""
    caption = (
        "Per domain and over all: MAT (mean acceptance length, tokens per target forward) over that of the "
        "domain's best single drafter (*) on the same texts. regret, extra: token loss and target forwards a "
        "text beyond those of its own best single drafter. scored: share of the positions at which all "
        "drafters were scored. Single drafters: exact, in expectation. .93: discount, .03: share, .5: beta."
    )
    domains = list(next(iter(totals.values()))["domains"])
    shown = domains if len(domains) > 1 else []
    table = _table(["replayed"], [*(d or "-" for d in shown), "all", "MAT", "regret", "extra", "scored"])
    for kind in KINDS:
        members = [(name, total) for name, total in totals.items() if total["kind"] == kind]
        for name, total in sorted(members, key=lambda member: -member[1]["relative"]):
            marks = ["*" if kind == "single" and total["domains"][d] == 1 else "" for d in shown]
            table.add_row(
                name,
                *(f"{mark}{total['domains'][d]:.2f}" for mark, d in zip(marks, shown, strict=True)),
                f"{total['relative']:.2f}",
                f"{total['mean_acceptance_length']:.2f}",
                f"{total['token_regret']:.2f}",
                f"{total['stopping_time_regret']:+.1f}",
                f"{total['scored']:.0%}",
            )
        table.add_section()
    return Group(Text(title), table, Text(caption))


def _mat(found: Mapping[str, Any]) -> float:
    return float(found["mean_acceptance_length"])


def _table(left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for heading in left:
        table.add_column(heading, no_wrap=True)
    for heading in right:
        # a heading may be cut, no number
        table.add_column(heading, justify="right", no_wrap=True, min_width=5)
    return table


def _chosen(found: Mapping[str, Any]) -> str:
    """Shares of rounds by who drafted, largest first."""
    shares = {**found["draft_share"], "no draft": found["plain_share"] if found["draft_share"] else 0}
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {share:.0%}" for name, share in ordered if share)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def console_for(as_json: bool = False) -> Console:
    """Where a command writes: standard error beside JSON; 120 columns wherever no terminal says otherwise."""
    return Console(stderr=as_json, width=None if sys.stdout.isatty() else 120)


def guarded(action: Callable[[], None], debug: bool) -> None:
    """Run a command; what a person can cause ends in one line and exit status 1, Ctrl-C in 130.

    A drafter that is benched is a line too, however often it happens.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", DrafterWarning)
            warnings.showwarning = lambda message, *where: print(f"warning: {message}", file=sys.stderr)
            action()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        print(f"error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        sys.exit(1)
