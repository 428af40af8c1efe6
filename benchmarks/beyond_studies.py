"""Studies of what ``beyond.py record`` wrote: numbers with intervals, from traces and replays; no model."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from joblib import Parallel, delayed
from paper_report import BANDITS, GENERALIST, HEDGE, RESAMPLED, fed
from recording import DRAFT_LEN, Policies, fixed

from nab import replays
from nab.experiment import FIXED
from nab.losses import Token, expected_rounds
from nab.sim.regret import lost, regret
from nab.sim.replay import replay, round_lengths
from nab.sim.trace import TracedQuery, read_trace
from nab.types import Floats

TRACKING = ("hedge .93 argmax", "normal-hedge .93", "fixed-share .03", "ada-normal-hedge-tv")
PLAYED = (HEDGE, *TRACKING, GENERALIST, "uniform", *BANDITS)
"""What decodes, in the order of the tables."""

CURVES = (HEDGE, "hedge", "hedge .93 argmax", *BANDITS, "uniform")
COUNTED = (HEDGE, "hedge", *BANDITS, "uniform")
SIZES = (2, 4, 8, 16, 32)
MADE_WEAK = SIZES[-1] - 2
WARM = (HEDGE, "hedge .93 argmax", "fixed-share .03", "ada-normal-hedge-tv", *BANDITS)
REPLAYS = 4
SHUFFLES = 4

BEST = "best drafter of the query"
OF_BEST, OF_PARTS = f"of the {BEST}", "of the best of each segment"

Segment = tuple[Floats, Floats]
"""``gamma`` and ``realised`` of its text, ``(positions, n)``."""


def policies(names: Sequence[str]) -> Policies:
    """Selectors over these drafters by name: each drafter alone, and everything of ``nab replay``."""
    n = len(names)
    known = replays.policies(n, DRAFT_LEN, Token())
    return {
        **{f"{FIXED}{name}": partial(fixed, row) for name, row in zip(names, np.eye(n), strict=True)},
        **{name: policy.make for name, policy in known.items()},
    }


def seeds(seed: int) -> list[np.random.SeedSequence]:
    """Of what is drawn to decode a query, and to choose drafters."""
    return np.random.SeedSequence(seed).spawn(2)


class Answer(NamedTuple):
    """What a policy did on a query of S segments.

    Args:
        tokens: emitted, ``(S,)``.
        rounds: target forwards, ``(S,)``.
        alone: rounds of each drafter alone on this very text, in expectation, ``(S, n)``.
        same: whether its selector, fed again from the trace, played the recorded laws and choices to the last
            bit, and had the recorded regret.
    """

    tokens: Floats
    rounds: Floats
    alone: Floats
    same: bool


class Record(NamedTuple):
    """A trace: a query under several policies.

    ``scores`` are those of the text of ``HEDGE``, ``weak`` of weak drafters on its one segment, or None.
    """

    study: str
    name: str
    about: dict[str, Any]
    domains: list[str]
    answers: dict[str, Answer]
    scores: list[Segment]
    weak: Segment | None

    @property
    def number(self) -> str:
        """Of its prompts among those of their domains."""
        return self.name.rsplit("-", 1)[1]

    @property
    def alone(self) -> Floats:
        """Rounds of each drafter alone on the text of ``HEDGE``, in expectation, ``(S, n)``."""
        return np.array([expected_rounds(realised, DRAFT_LEN) for _, realised in self.scores])


def switched(domains: Sequence[str], count: int, segments: int) -> Iterator[tuple[str, int, list[str]]]:
    """Queries that change domain, ``count`` from each one on: it, their number, the domains of the segments.

    Neighbours differ: query k steps by ``1 + k mod (D - 1)`` domains.
    """
    for k in range(count):
        step = 1 + k % (len(domains) - 1)
        for first, name in enumerate(domains):
            yield name, k, [domains[(first + j * step) % len(domains)] for j in range(segments)]


def joined(
    texts: Mapping[str, Sequence[Segment]], about: dict[str, Any], study: str, segments: int, length: int
) -> list[Record]:
    """Queries that change domain, made of whole answers: as if each segment's text had begun anew.

    Args:
        texts: answers by domain.
        about: a header of the traces that they are from.
        study: its name.
        segments: of a query.
        length: positions of a segment, or as many as an answer has.
    """
    count = min(map(len, texts.values()))
    return [
        Record(
            study,
            f"{name}-{k:02d}",
            about,
            parts,
            {},
            [(gamma[:length], realised[:length]) for gamma, realised in (texts[part][k] for part in parts)],
            None,
        )
        for name, k, parts in switched(list(texts), count, segments)
    ]


def fed_again(policy: str, segments: Sequence[TracedQuery], names: Sequence[str], seed: int) -> bool:
    """See ``Answer.same``."""
    selector = policies(names)[policy](seeds(seed)[1])
    for query in segments:
        for round_, choice, probs in fed(selector, query):
            if choice != round_.choice or not np.array_equal(probs, round_.probs):
                return False
        losses = query.losses(Token())
        left = regret(query.played, losses)[-1].max()
        if query.metrics is None or query.metrics["regret"]["token"] != left:
            return False
    return True


def read(path: Path, study: str) -> Record:
    """A trace of a study."""
    trace = read_trace(path)
    if trace.broken_off:
        raise ValueError(trace.broken_off)
    names, answers, scores = trace.drafters, {}, list[Segment]()
    for policy in trace.policies:
        own = [query for query in trace.queries if query.policy == policy]
        if policy == HEDGE:
            scores = [(query.gamma, query.realised) for query in own]
        answers[policy] = Answer(
            np.array([len(query.tokens) for query in own]),
            np.array([len(query.rounds) for query in own]),
            np.array([expected_rounds(query.realised, DRAFT_LEN) for query in own]),
            fed_again(policy, own, names, trace.header["seed"]),
        )
    file, weak = path.with_suffix(".weak.npz"), None
    if file.exists():
        with np.load(file) as found:
            weak = found["gamma"], found["realised"]
    domains = [query.domain for query in trace.queries if query.policy == HEDGE]
    return Record(study, path.stem, trace.header, domains, answers, scores, weak)


class Played(NamedTuple):
    """A policy's replays: rounds by segment ``(S,)``, and the loss by position of all segments; means."""

    rounds: Floats
    lost: Floats


def played(policy: str, segments: Sequence[Segment], seed: Sequence[int]) -> Played:
    """Replay one selector over segments, without forgetting between them."""
    n = segments[0][0].shape[1]
    plays = replays.policies(n, DRAFT_LEN, Token())[policy]
    lengths = [round_lengths(realised, DRAFT_LEN) for _, realised in segments]
    counts, expected, losses = np.zeros(len(segments)), np.zeros(len(segments)), []
    drawn = np.random.SeedSequence(seed).spawn(2 * REPLAYS)
    for choosing, drawing in zip(drawn[::2], drawn[1::2], strict=True):
        selector, rng, own = plays.make(choosing), np.random.default_rng(drawing), []
        for k, (gamma, realised) in enumerate(segments):
            done = list(replay(selector, gamma, realised, draft_len=DRAFT_LEN, rng=rng))
            counts[k] += len(done)
            expected[k] += sum(lengths[k][each.start, each.choice] for each in done)
            emitted = [each.emitted for each in done]
            which = [each.choice if plays.kind == "argmax" else each.probs for each in done]
            own.append(lost(np.repeat(which, emitted, axis=0), 1 - gamma))
        losses.append(np.concatenate(own))
    positions = np.array([len(gamma) for gamma, _ in segments])
    return Played(positions * counts / expected, np.mean(losses, 0))


def side_by_side(jobs: int, tasks: Iterable[tuple[Any, ...]]) -> list[Played]:
    """``played`` of each task's arguments."""
    return list(Parallel(jobs)(delayed(played)(*task) for task in tasks))


class Resampled:
    """Quotients of sums over queries, with intervals: paired bootstrap, the same queries for all policies.

    Args:
        groups: a label of each query; those of one label share texts, and are drawn together.
        seed: of the draws.
    """

    def __init__(self, groups: Sequence[Any], seed: int) -> None:
        labels, group = np.unique(groups, return_inverse=True)
        count = len(labels)
        drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLED)
        self._weights = np.concatenate([np.ones((1, len(groups))), drawn[:, group]])

    def ratio(self, above: Floats, below: Floats) -> Floats:
        """Of ``(queries,)`` each: as they are, then resampled, ``(1 + RESAMPLED,)``."""
        return np.asarray((self._weights @ above) / (self._weights @ below))


Study = dict[str, dict[str, Floats]]
"""Rows and columns of a table: resampled values."""


class Cell:
    """All studies at one temperature.

    Args:
        records: all of them.
        seed: of replays and bootstrap.
        jobs: processes.
    """

    def __init__(self, records: Sequence[Record], seed: int, jobs: int) -> None:
        self.records, self.seed, self.jobs = records, seed, jobs
        self.names: list[str] = records[0].about["drafters"]

    def of(self, study: str) -> list[Record]:
        """Its records.

        Raises:
            ValueError: if there are none.
        """
        found = [record for record in self.records if record.study == study]
        if not found:
            temperature = self.records[0].about["temperature"]
            raise ValueError(
                f"there is no trace of {study} at temperature {temperature:g} yet: record goes on"
            )
        return found

    def replayed(
        self, policies: Sequence[str], texts: Sequence[Sequence[Segment]]
    ) -> dict[str, list[Played]]:
        """Each policy on each text; a text's uniforms are the same for all policies."""
        tasks = [(name, text, (self.seed, k)) for name in policies for k, text in enumerate(texts)]
        done = iter(side_by_side(self.jobs, tasks))
        return {name: [next(done) for _ in texts] for name in policies}

    def tracking(self, study: str, policies: Sequence[str] = PLAYED, *, shared: bool = False) -> Study:
        """MAT in replays, and as decoded, over that of the best drafter of the query and of each segment.

        Args:
            study: its name.
            policies: what is replayed.
            shared: whether queries of one number share answers.
        """
        records = self.of(study)
        boot = Resampled([each.number if shared else k for k, each in enumerate(records)], self.seed)
        tokens = np.array([sum(len(gamma) for gamma, _ in record.scores) for record in records])
        singles = [record.alone for record in records]
        alone = np.array([each.sum(0) for each in singles])
        parts = np.array([each.min(1).sum() for each in singles])
        best = alone.min(1)
        again = self.replayed([name for name in policies if FIXED not in name], [r.scores for r in records])
        rounds = {name: np.array([each.rounds.sum() for each in done]) for name, done in again.items()}
        rounds |= {FIXED + name: column for name, column in zip(self.names, alone.T, strict=True)}
        found: Study = {}
        for name in (*policies, *(row for row in rounds if row not in policies)):
            row = found[name] = {
                "MAT, replayed": boot.ratio(tokens, rounds[name]),
                OF_BEST: boot.ratio(best, rounds[name]),
                OF_PARTS: boot.ratio(parts, rounds[name]),
                "of normal-hedge": boot.ratio(rounds[HEDGE], rounds[name]),
            }
            if all(name in record.answers for record in records):
                own = [record.answers[name] for record in records]
                forwards = np.array([each.rounds.sum() for each in own])
                row["MAT, decoded"] = boot.ratio(np.array([each.tokens.sum() for each in own]), forwards)
                row["decoded, of the best drafter of the query"] = boot.ratio(
                    np.array([each.alone.sum(0).min() for each in own]), forwards
                )
        ideal = {"MAT, replayed": boot.ratio(tokens, best)}
        ideal[OF_PARTS] = boot.ratio(parts, best)
        found[BEST] = ideal
        return found

    def regret(self) -> dict[str, Floats]:
        """Mean regret, token loss, against the best drafter of each text so far, by tokens."""
        texts = [record.scores for record in self.of("stationary")]
        length = min(len(gamma) for ((gamma, _),) in texts)
        done = self.replayed(CURVES, texts)
        best = np.array([(1 - gamma).cumsum(0).min(1)[:length] for ((gamma, _),) in texts])
        return {
            name: np.mean([each.lost.cumsum()[:length] for each in own] - best, 0)
            for name, own in done.items()
        }

    def sizes(self) -> dict[str, Study]:
        """MAT over that of the best drafter, by n: weak drafters added, and the two of them repeated."""
        records = self.of("stationary")
        boot = Resampled(range(len(records)), self.seed)

        def pair(record: Record, k: int) -> Floats:
            own = [self.names.index("generalist"), self.names.index(record.domains[0])]
            return record.scores[0][k][:, own]

        def with_weak(record: Record, n: int) -> Segment:
            assert record.weak is not None
            gamma, realised = (
                np.concatenate([pair(record, k), weak[:, : n - 2]], 1) for k, weak in enumerate(record.weak)
            )
            return gamma, realised

        def repeated(record: Record, n: int) -> Segment:
            gamma, realised = (np.tile(pair(record, k), (1, n // 2)) for k in (0, 1))
            return gamma, realised

        return {
            title: self._by_size(boot, [{n: [make(record, n)] for n in SIZES} for record in records])
            for title, make in (("weak drafters added", with_weak), ("both repeated", repeated))
        }

    def _by_size(self, boot: Resampled, pools: Sequence[dict[int, list[Segment]]]) -> Study:
        found: Study = {name: {} for name in COUNTED}
        for n in SIZES:
            texts = [pool[n] for pool in pools]
            best = np.array([expected_rounds(text[0][1], DRAFT_LEN).min() for text in texts])
            for name, done in self.replayed(COUNTED, texts).items():
                found[name][str(n)] = boot.ratio(best, np.array([each.rounds[0] for each in done]))
        return found

    def router(self, variant: str, routes: dict[str, dict[str, list[str]]]) -> Study:
        """MAT of each router's expert, of normal-hedge and of others.

        Args:
            variant: of the prompts, as ``beyond.VARIANTS`` names it.
            routes: labels of the prompts by domain and router.
        """
        records = self.of(f"router/{variant.replace(' ', '-')}")
        boot = Resampled(range(len(records)), self.seed)
        at = [(record.domains[0], int(record.number)) for record in records]
        chosen = {
            HEDGE: [HEDGE for _ in at],
            **{f"router: {kind}": [FIXED + routes[d][kind][k] for d, k in at] for kind in routes[at[0][0]]},
            "expert of the domain": [FIXED + domain for domain, _ in at],
            GENERALIST: [GENERALIST for _ in at],
        }
        again = self.replayed([HEDGE], [record.scores for record in records])[HEDGE]
        hedge = np.array([each.rounds.sum() for each in again])
        alone = np.concatenate([record.alone for record in records])  # of their one segment
        best = alone.min(1)
        found: Study = {}
        for row, names in chosen.items():
            own = [record.answers[name] for record, name in zip(records, names, strict=True)]
            tokens, forwards = (np.array([each[k].sum() for each in own]) for k in (0, 1))
            rounds = hedge
            if row != HEDGE:
                places = [self.names.index(name.removeprefix(FIXED)) for name in names]
                rounds = alone[np.arange(len(records)), places]
            found[row] = {
                "MAT, decoded": boot.ratio(tokens, forwards),
                "of normal-hedge, on its texts": boot.ratio(hedge, rounds),
                "of the best drafter, on these texts": boot.ratio(best, rounds),
            }
        return found

    def warm(self) -> dict[str, Study]:
        """MAT over that of the best drafter of each query: state reset per query, or carried on in a stream.

        Streams: the queries of a domain, in order, one for each domain; all queries, in ``SHUFFLES`` orders.
        """
        records = self.of("stationary")
        boot, count = Resampled(range(len(records)), self.seed), len(records)
        best = np.array([record.alone.min() for record in records])
        by_domain: dict[str, list[int]] = {}
        for k, record in enumerate(records):
            by_domain.setdefault(record.domains[0], []).append(k)
        rng = np.random.default_rng(self.seed)
        streams = {
            "one domain": list(by_domain.values()),
            "mixed": [rng.permutation(count).tolist() for _ in range(SHUFFLES)],
        }
        fresh = self.replayed(WARM, [record.scores for record in records])
        found: dict[str, Study] = {}
        for kind, orders in streams.items():
            texts = [[records[k].scores[0] for k in order] for order in orders]
            study = found[kind] = {}
            for name, done in self.replayed(WARM, texts).items():
                rounds, times = np.zeros(count), np.zeros(count)
                for order, each in zip(orders, done, strict=True):
                    np.add.at(rounds, order, each.rounds)
                    np.add.at(times, order, 1)
                carried = rounds / times
                reset = np.array([each.rounds.sum() for each in fresh[name]])
                study[name] = {
                    "reset per query": boot.ratio(best, reset),
                    "carried over": boot.ratio(best, carried),
                    "carried / reset": boot.ratio(reset, carried),
                }
        return found
