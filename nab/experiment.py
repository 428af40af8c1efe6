"""Prompts decoded under policies: what ``nab run`` (one policy) and ``nab compare`` (many) have in common."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from nab.decode import Round
from nab.measure import Query, metrics
from nab.prompts import Prompt
from nab.selector import Chooses
from nab.sim.trace import TraceWriter

if TYPE_CHECKING:
    from nab.backends.session import Divergence, Session

PLAIN = "plain"
FIXED = "fixed:"

Policy = Callable[[Any], Chooses]
"""Makes a fresh selector for one query from a seed."""

Start = Callable[[int, str], tuple[Query, Generator[Round]]]
"""Begins the answer to a prompt (by number) under a policy (by name): a query and the rounds that fill it."""

Watch = Callable[[str, Query, Iterator[Round]], None]
"""Runs the rounds of a query to their end; it is told a label and the query that they fill."""

WatchTogether = Callable[[Iterator[list[tuple[str, Query]]]], None]
"""Runs a batch to its end; it is told labels and queries that have grown by a round each time."""


@dataclass
class _Answer:
    """An answer given together with others, and what a trace has of it: so many rounds, its last record."""

    query: Query
    where: dict[str, Any]
    rounds: int = 0
    closed: bool = False


@dataclass
class Experiment:
    """Decodes prompt by prompt under every policy, so that an interrupted run compares what it has.

    Args:
        session: target and drafters.
        prompts: what to answer.
        policies: selectors by name; the one called ``plain`` decodes without drafts.
        seed: the queries of one prompt use the same uniforms under every policy.
        replays: whether selectors can be replayed on texts; under the time objective they cannot.
        queries: filled by ``execute``, per policy and prompt; the last one may be unfinished.

    Raises:
        ValueError: on a prompt that is empty or too long, before anything is decoded.
    """

    session: Session
    prompts: Sequence[Prompt]
    policies: Mapping[str, Policy]
    seed: int
    replays: bool = True
    queries: dict[str, list[Query]] = field(init=False)

    def __post_init__(self) -> None:
        self.queries = {name: [] for name in self.policies}
        self._encoded = self.session.encoded(self.prompts)

    def start(self, number: int, name: str) -> tuple[Query, Generator[Round]]:
        """See ``Start``; in this process."""
        decoding, choosing = self._seeds(number)
        query, selector = self.query(number, name), self.policies[name](choosing)
        return query, self.session.decode(query, self._encoded[number], selector, decoding)

    def _seeds(self, number: int) -> list[np.random.SeedSequence]:
        """Of what is drawn to decode a prompt, and to choose drafters."""
        return np.random.SeedSequence([self.seed, number]).spawn(2)

    def query(self, number: int, name: str) -> Query:
        """An empty query for a prompt under a policy."""
        return self.session.query(plain=name == PLAIN, domain=self.prompts[number].domain)

    def order(self) -> list[tuple[int, str]]:
        """Prompt number and policy of all queries, in the order of ``execute``."""
        return [(number, name) for number in range(len(self.prompts)) for name in self.policies]

    def execute(self, watch: Watch, trace: TraceWriter | None = None, start: Start | None = None) -> None:
        """Decode everything; ``queries`` and ``trace`` are complete up to the last round at any time."""
        for number, name in self.order():
            query, rounds = (start or self.start)(number, name)
            self.queries[name].append(query)
            where = self._where(number, name)
            try:
                watch(_label(where), query, trace.keep(rounds, where) if trace else rounds)
            finally:  # an interrupted answer is measured and recorded as far as it goes
                rounds.close()
                if trace:
                    trace.write("query", self._record(query, where))

    def execute_together(
        self, name: str, batch: int, watch: WatchTogether, trace: TraceWriter | None = None
    ) -> None:
        """Decode all prompts under one policy, up to ``batch`` of them at once; otherwise as ``execute``."""
        numbers = range(len(self.prompts))
        answers = [_Answer(self.query(number, name), self._where(number, name)) for number in numbers]
        decoding, choosing = zip(*map(self._seeds, numbers), strict=True)
        selectors = [self.policies[name](seed) for seed in choosing]
        queries = [answer.query for answer in answers]
        steps = self.session.decode_together(queries, self._encoded, selectors, decoding, batch)

        def grown() -> Iterator[list[tuple[str, Query]]]:
            for step in steps:
                for number in step:
                    self._tell(answers[number], trace)
                yield [(_label(answers[number].where), queries[number]) for number in step]

        try:
            watch(grown())
        finally:  # interrupted answers are measured and recorded as far as they go
            steps.close()
            self.queries[name] = [query for query in queries if query.rounds]
            for answer in answers:
                if answer.query.rounds and not answer.closed:
                    self._tell(answer, trace, last=True)

    def _tell(self, answer: _Answer, trace: TraceWriter | None, *, last: bool = False) -> None:
        """Write what is new of an answer."""
        if trace is None:
            return
        new = answer.query.rounds[answer.rounds :]
        answer.rounds += len(new)
        for round_ in new:
            trace.round(round_, answer.where)
        if answer.query.finished or last:
            record = self._record(answer.query, answer.where)
            answer.closed = True
            trace.write("query", record)

    def _where(self, number: int, name: str) -> dict[str, Any]:
        """What a trace says of the place of a record."""
        return {"query": number, "policy": name, "domain": self.prompts[number].domain}

    def _record(self, query: Query, where: dict[str, Any]) -> dict[str, Any]:
        """The last record of an answer in a trace."""
        scores = dict(zip(("gamma", "realised"), query.unasked_scores(), strict=False))
        return {**where, **self.result(query), **scores}

    def finished(self) -> Experiment:
        """The part that can be compared: the prompts that every policy has answered.

        If not even the first prompt was answered by all, that prompt under the policies that did.
        """
        answered = {name: sum(query.finished for query in queries) for name, queries in self.queries.items()}
        whole = min(answered.values()) or min(1, max(answered.values()))
        policies = {name: self.policies[name] for name in self.policies if answered[name] >= whole}
        part = Experiment(self.session, self.prompts[:whole], policies, self.seed, self.replays)
        part.queries = {name: self.queries[name][:whole] for name in policies}
        return part

    def result(self, query: Query) -> dict[str, Any]:
        """One query as plain JSON types."""
        return {"domain": query.domain, "text": self.session.text(query.tokens), **metrics([query])}

    def results(self, name: str) -> dict[str, Any]:
        """All queries of a policy and their total, by domain too, as plain JSON types."""
        queries = self.queries[name]
        replayed = self._replayed(name)
        domains = {
            domain: {**metrics(members), "replayed_acceptance_length": replayed.get(domain)}
            for domain, members in self.by_domain(name).items()
        }
        regret = self.stopping_time_regret(name)
        total = {**metrics(queries), "stopping_time_regret": regret, "domains": domains}
        return {"queries": [self.result(query) for query in queries], "total": total}

    def _replayed(self, name: str) -> dict[str, float]:
        """By domain, the mean acceptance length of a selector on the texts it wrote, over replays of them."""
        if not self.replays or name == PLAIN or name.startswith(FIXED):
            return {}
        rng, found = np.random.default_rng(self.seed), {}
        for domain, queries in self.by_domain(name).items():
            each = [query.replayed(self.policies[name], rng) for query in queries]
            tokens, rounds = np.sum(each, axis=0)
            found[domain] = float(tokens / max(rounds, 1))
        return found

    def stopping_time_regret(self, name: str) -> float | None:
        """Mean over prompts of the target forwards beyond those of the best single drafter of the prompt.

        None unless every single drafter was a policy too. Source: Hou et al. 2025, stopping-time regret.
        """
        fixed = [self.queries.get(FIXED + drafter) for drafter in self.session.names]
        singles = [[len(query.rounds) for query in queries] for queries in fixed if queries is not None]
        if len(singles) < len(fixed):
            return None
        rounds = np.array([len(query.rounds) for query in self.queries[name]])
        return float((rounds - np.min(singles, axis=0)).mean())

    def by_domain(self, name: str) -> dict[str, list[Query]]:
        """Queries of a policy by domain."""
        domains = dict.fromkeys(query.domain for query in self.queries[name])
        return {d: [query for query in self.queries[name] if query.domain == d] for d in domains}

    def divergences(self) -> list[tuple[str, int, Divergence]]:
        """Policy, prompt number and place of every answer that is not the plain one (greedy runs only)."""
        found = []
        for name in self.policies:
            for number, (plain, other) in enumerate(
                zip(self.queries[PLAIN], self.queries[name], strict=True)
            ):
                parting = self.session.divergence(self._encoded[number], plain.tokens, other.tokens)
                if parting:
                    found.append((name, number + 1, parting))
        return found


def _label(where: Mapping[str, Any]) -> str:
    return f"{where['domain']} {where['policy']}".strip()


@contextmanager
def workers(jobs: int, make: Callable[[], Experiment]) -> Iterator[Callable[[Experiment], Start]]:
    """Processes that answer queries side by side, each query in one of them; they load at once.

    Gives what turns the experiment into a ``Start`` for its ``execute``. The answers are the same, since what
    a query draws depends on its number alone; they arrive whole.

    Args:
        jobs: processes.
        make: makes the same experiment in each of them; must pickle.
    """
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _open, (make,))
    for _ in range(jobs):
        pool.submit(_ready)

    def of(experiment: Experiment) -> Start:
        answers = iter([pool.submit(_answer, *query) for query in experiment.order()])

        def start(number: int, name: str) -> tuple[Query, Generator[Round]]:
            query = experiment.query(number, name)

            def rounds() -> Generator[Round]:
                vars(query).update(vars(next(answers).result()))
                yield from query.rounds

            return query, rounds()

        return start

    try:
        yield of
    finally:
        for process in multiprocessing.active_children():
            process.terminate()
        pool.shutdown()  # after them: what they leave behind is broken, and nothing is cancelled twice


_opened: list[Experiment | Exception] = []  # of a worker process


def _open(make: Callable[[], Experiment]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    try:
        _opened.append(make())
    except Exception as error:  # the parent meets it too, or else with the first answer
        _opened.append(error)


def _ready() -> None:
    """Nothing: a process starts with its first task."""


def _answer(number: int, name: str) -> Query:
    experiment = _opened[0]
    if isinstance(experiment, Exception):
        raise experiment
    query, rounds = experiment.start(number, name)
    for _ in rounds:
        pass
    return query
