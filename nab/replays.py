"""What every learner, every bandit and every single drafter would have done on the texts of traces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from nab import learners
from nab.experiment import FIXED, PLAIN
from nab.learners import bandits
from nab.losses import Length, Time, Token, expected_rounds
from nab.selector import BanditSelector, Chooses, Constant, Pick, Selector, argmax, draw
from nab.sim.regret import lost
from nab.sim.replay import Replayed, replay, round_lengths
from nab.sim.trace import Trace, TracedQuery
from nab.types import Bandit, Learner, Objective

KINDS = ("learner", "argmax", "bandit", "uniform", "single")
"""Of what is replayed, in the order of reports."""

LEARNERS: dict[str, Learner[Any]] = {
    "normal-hedge": learners.NormalHedge(),
    "normal-hedge .93": learners.NormalHedge(discount=0.93),
    "normal-hedge-bh": learners.NormalHedgeBH(),
    "ada-normal-hedge": learners.AdaNormalHedge(),
    "ada-normal-hedge-tv": learners.AdaNormalHedgeTV(),
    "squint": learners.Squint(),
    "ada-hedge": learners.AdaHedge(),
    "optimistic-hedge": learners.OptimisticHedge(),
    "hedge": learners.Hedge(),
    "hedge .93": learners.Hedge(discount=0.93),
    "fixed-share .03": learners.FixedShare(0.03),
    "follow-the-leader": learners.FollowTheLeader(),
}
"""The number is a discount, or a share."""

ARGMAX = ["hedge .93", "fixed-share .03"]
"""Learners whose mode is played too; that of ``normal-hedge .93`` is that of ``hedge .93``."""


OBJECTIVES: dict[str, Callable[[int], Objective]] = {
    "token": lambda draft_len: Token(),
    "length": Length,
    "time": Time,
}
"""From the draft length; the selectors of one time objective share what they measure of costs."""

TIMED = "normal-hedge"
"""Learner whose mode is played too under the time objective, where drawing costs most."""


class Policy(NamedTuple):
    """A kind (``learner``, ``argmax``, ``bandit`` or ``uniform``), and what makes a selector from a seed."""

    kind: str
    make: Callable[[Any], Chooses]


def policies(n: int, draft_len: int, objective: Objective) -> dict[str, Policy]:
    """Everything that is replayed, by name.

    Of bandits that are one policy under the loss of ``BanditSelector`` there is one: ``exp3-spec`` is also
    ``EXP3()``, and ``ucb1`` also ``MetaSD(beta=1)``.
    """
    played: dict[str, Bandit[Any]] = {
        "ucb-spec": bandits.UCBSpec(draft_len),
        "exp3-spec": bandits.EXP3Spec(draft_len),
        "exp3-ix": bandits.EXP3IX(),
        "ucb1": bandits.UCB1(),
        "meta-sd .5": bandits.MetaSD(beta=0.5),
        "thompson": bandits.Thompson(),
        "epsilon-greedy": bandits.EpsilonGreedy(),
    }

    modes = [*ARGMAX, TIMED] if isinstance(objective, Time) else ARGMAX

    def full(learner: Learner[Any], pick: Pick, seed: Any) -> Chooses:
        return Selector(learner, n, objective=objective, pick=pick, rng=seed)

    def bandit(plays: Bandit[Any], seed: Any) -> Chooses:
        return BanditSelector(plays, n, draft_len=draft_len, rng=seed)

    return {
        **{name: Policy("learner", partial(full, each, draw)) for name, each in LEARNERS.items()},
        **{f"{name} argmax": Policy("argmax", partial(full, LEARNERS[name], argmax)) for name in modes},
        **{name: Policy("bandit", partial(bandit, each)) for name, each in played.items()},
        "uniform": Policy("uniform", lambda seed: Constant(np.full(n, 1 / n), rng=seed)),
    }


class Row(NamedTuple):
    """What one policy would have done on one text: means over replays; of single drafters exactly.

    ``recorded`` is the policy that wrote the text, ``policy`` the one replayed; ``rounds`` are target
    forwards, ``token_loss`` the sum over positions of the law in force, ``scored`` the share of the positions
    at which all drafters were scored.
    """

    trace: str
    recorded: str
    query: int
    domain: str
    policy: str
    kind: str
    tokens: int
    rounds: float
    token_loss: float
    scored: float

    @property
    def text(self) -> tuple[str, str, int]:
        """Which text it is."""
        return self.trace, self.recorded, self.query


class Text(NamedTuple):
    """An answer to replay and the trace that it is from."""

    trace: Trace
    query: TracedQuery


def texts(traces: Sequence[Trace], policy: str | None = None) -> list[Text]:
    """The answers of one policy in each trace that have scored positions.

    Args:
        traces: with the same drafters.
        policy: its name; None is the first of each trace that is not plain decoding.

    Raises:
        ValueError: on traces of other drafters, an unknown policy, or if nothing is left.
    """
    found = []
    for trace in traces:
        if trace.drafters != traces[0].drafters:
            raise ValueError(
                f"{trace.path} has the drafters {', '.join(trace.drafters)}, {traces[0].path} has "
                f"{', '.join(traces[0].drafters)}: replay them one by one"
            )
        if policy is not None and policy not in trace.policies:
            raise ValueError(f"no policy {policy!r} in {trace.path}: choose from {', '.join(trace.policies)}")
        name = policy or next((name for name in trace.policies if name != PLAIN), None)
        answers = [Text(trace, query) for query in trace.queries if query.policy == name and len(query.gamma)]
        if not answers:
            raise ValueError(f"{trace.path} has no answer of {name or 'a policy'} with scored drafters")
        found += answers
    return found


def draft_length(traces: Sequence[Trace]) -> int:
    """Drafted tokens a round of all these traces.

    Raises:
        ValueError: if they differ, or are 0.
    """
    recorded = {trace.draft_len for trace in traces}
    if len(recorded) > 1 or 0 in recorded:
        raise ValueError(f"the traces have draft lengths {sorted(recorded)}: say which one to replay")
    return recorded.pop()


def replayed(
    answers: Iterable[Text], draft_len: int, objective: Objective, *, replays: int = 8, seed: int = 0
) -> Iterator[list[Row]]:
    """The rows of each text in turn: every single drafter, then all ``policies``.

    All policies meet the same uniforms, and a text meets its own whatever else is replayed.

    Args:
        answers: see ``texts``.
        draft_len: drafted tokens a round, at least 1; not necessarily the one recorded.
        objective: of the learners, token or length: a text does not say what other rounds would have cost.
        replays: of each policy, at least 1.
        seed: of the draws.
    """
    for number, text in enumerate(answers):
        seeds = np.random.SeedSequence([seed, number]).spawn(2 * replays)
        pairs = list(zip(seeds[::2], seeds[1::2], strict=True))
        rows = list(_singles(text, draft_len))
        for name, policy in policies(len(text.trace.drafters), draft_len, objective).items():
            rows.append(_replayed(text, name, policy, draft_len, pairs))
        yield rows


def _singles(text: Text, draft_len: int) -> Iterator[Row]:
    """Each drafter alone, exactly."""
    losses = text.query.losses(Token()).sum(0)
    rounds = expected_rounds(text.query.realised, draft_len)
    for name, each, loss in zip(text.trace.drafters, rounds.tolist(), losses.tolist(), strict=True):
        yield _row(text, FIXED + name, "single", rounds=each, token_loss=loss, scored=0)


def _replayed(text: Text, name: str, policy: Policy, draft_len: int, seeds: Sequence[tuple[Any, Any]]) -> Row:
    """One policy on one text."""
    gamma, realised = text.query.gamma, text.query.realised
    losses, lengths = text.query.losses(Token()), round_lengths(realised, draft_len)
    expected = rounds = loss = scored = 0.0
    for choosing, drawing in seeds:
        done = list(replay(policy.make(choosing), gamma, realised, draft_len=draft_len, rng=drawing))
        expected += sum(float(lengths[each.start, each.choice]) for each in done)
        rounds += len(done)
        loss += float(lost(_played(done, policy.kind), losses).sum())
        scored += sum(each.scored for each in done)
    positions = len(seeds) * len(gamma)
    return _row(
        text,
        name,
        policy.kind,
        rounds=len(gamma) * rounds / expected,
        token_loss=loss / len(seeds),
        scored=scored / positions,
    )


def _played(done: Sequence[Replayed], kind: str) -> Any:
    """By position, the law in force, or the drafter where it was not drawn."""
    emitted = [each.emitted for each in done]
    if kind == "argmax":
        return np.repeat([each.choice for each in done], emitted)
    return np.repeat([each.probs for each in done], emitted, axis=0)


def _row(text: Text, name: str, kind: str, **measured: Any) -> Row:
    trace, query = text
    where = str(trace.path), query.policy, query.number, query.domain
    return Row(*where, name, kind, len(query.gamma), **measured)


def title(rows: Sequence[Row]) -> str:
    """How many texts there are, and what wrote them."""
    count = len({row.text for row in rows})
    return f"{count} text{'s' * (count > 1)} of {', '.join(dict.fromkeys(row.recorded for row in rows))}"


def compared(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The rows as a tidy table, plain JSON types, each text set against its best single drafters.

    Besides the fields of ``Row``: ``mean_acceptance_length``; ``of_query_best`` and ``of_domain_best``, it
    over that of the best single drafter of the text, or of the domain, on this text; ``token_regret`` and
    ``stopping_time_regret``, token loss and target forwards beyond those of the text's best single drafter.
    """
    rows = list(rows)
    singles = [row for row in rows if row.kind == "single"]
    texts_of = {row.text: [single for single in singles if single.text == row.text] for row in singles}
    leaders = {domain: _leader(singles, domain) for domain in {row.domain for row in singles}}
    table = []
    for row in rows:
        alone = texts_of[row.text]
        least = min(single.rounds for single in alone)
        of_domain = next(single.rounds for single in alone if single.policy == leaders[row.domain])
        table.append(
            {
                **row._asdict(),
                "mean_acceptance_length": row.tokens / row.rounds,
                "of_query_best": least / row.rounds,
                "of_domain_best": of_domain / row.rounds,
                "token_regret": row.token_loss - min(single.token_loss for single in alone),
                "stopping_time_regret": row.rounds - least,
            }
        )
    return table


def _leader(singles: Sequence[Row], domain: str) -> str:
    """The single drafter that takes the fewest rounds over a domain."""
    rounds: dict[str, float] = {}
    for row in singles:
        if row.domain == domain:
            rounds[row.policy] = rounds.get(row.policy, 0) + row.rounds
    return min(rounds, key=lambda name: rounds[name])


def totals(table: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By policy, pooled over the texts of ``compared``, as plain JSON types.

    ``relative`` is the mean acceptance length over that of the best single drafter of each domain,
    ``domains`` the same by domain; regrets are means a text.
    """
    found = {}
    for name in dict.fromkeys(row["policy"] for row in table):
        own = [row for row in table if row["policy"] == name]
        domains = dict.fromkeys(row["domain"] for row in own)
        tokens = sum(row["tokens"] for row in own)
        found[name] = {
            "kind": own[0]["kind"],
            "mean_acceptance_length": tokens / sum(row["rounds"] for row in own),
            "relative": _relative(own),
            "domains": {d: _relative([row for row in own if row["domain"] == d]) for d in domains},
            "token_regret": sum(row["token_regret"] for row in own) / len(own),
            "stopping_time_regret": sum(row["stopping_time_regret"] for row in own) / len(own),
            "scored": sum(row["scored"] * row["tokens"] for row in own) / tokens,
        }
    return found


def _relative(rows: Sequence[Mapping[str, Any]]) -> float:
    """Rounds of the domains' best single drafters over those of the policy."""
    best = sum(row["of_domain_best"] * row["rounds"] for row in rows)
    return float(best / sum(row["rounds"] for row in rows))
