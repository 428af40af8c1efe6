"""What every learner, every bandit and every single drafter would have done on the texts of traces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from nab import learners
from nab.learners import bandits
from nab.losses import Token, expected_rounds
from nab.selector import BanditSelector, Chooses, Constant, Pick, Selector, argmax, draw
from nab.sim.regret import lost
from nab.sim.replay import replay, round_lengths
from nab.sim.trace import Trace, TracedQuery
from nab.types import Bandit, Learner, Objective

PLAIN = "plain"
SINGLE = "single"

LEARNERS: dict[str, Learner[Any]] = {
    "normal-hedge": learners.NormalHedge(),
    "normal-hedge, discount .93": learners.NormalHedge(discount=0.93),
    "normal-hedge-bh": learners.NormalHedgeBH(),
    "ada-normal-hedge": learners.AdaNormalHedge(),
    "ada-normal-hedge-tv": learners.AdaNormalHedgeTV(),
    "squint": learners.Squint(),
    "ada-hedge": learners.AdaHedge(),
    "optimistic-hedge": learners.OptimisticHedge(),
    "hedge": learners.Hedge(),
    "hedge, discount .93": learners.Hedge(discount=0.93),
    "fixed-share, share .03": learners.FixedShare(0.03),
    "follow-the-leader": learners.FollowTheLeader(),
}

ARGMAX = ["normal-hedge, discount .93", "hedge, discount .93", "fixed-share, share .03"]
"""Learners whose mode is played too."""


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
        "meta-sd, beta .5": bandits.MetaSD(beta=0.5),
        "thompson": bandits.Thompson(),
        "epsilon-greedy": bandits.EpsilonGreedy(),
    }

    def full(learner: Learner[Any], pick: Pick, seed: Any) -> Chooses:
        return Selector(learner, n, objective=objective, pick=pick, rng=seed)

    def bandit(plays: Bandit[Any], seed: Any) -> Chooses:
        return BanditSelector(plays, n, draft_len=draft_len, rng=seed)

    return {
        **{name: Policy("learner", partial(full, each, draw)) for name, each in LEARNERS.items()},
        **{f"{name}, argmax": Policy("argmax", partial(full, LEARNERS[name], argmax)) for name in ARGMAX},
        **{name: Policy("bandit", partial(bandit, each)) for name, each in played.items()},
        "uniform": Policy("uniform", lambda seed: Constant(np.full(n, 1 / n), rng=seed)),
    }


class Row(NamedTuple):
    """What one policy would have done on one text, the mean over replays; of single drafters exactly.

    ``recorded`` chose the drafters when the text was written, ``policy`` in the replay. ``rounds``: target
    forwards. ``token_regret``: token loss beyond that of the text's best single drafter.
    ``stopping_time_regret``: target forwards beyond those of the text's best single drafter. ``scored``:
    share of the positions at which all drafters were scored. ``of_query_best`` and ``of_domain_best``: mean
    acceptance length over that of the text's, or the domain's, best single drafter, on this text.
    """

    trace: str
    recorded: str
    query: int
    domain: str
    policy: str
    kind: str
    tokens: int
    rounds: float
    mean_acceptance_length: float
    token_regret: float
    stopping_time_regret: float
    scored: float
    of_query_best: float
    of_domain_best: float = float("nan")


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


def replayed(
    answers: Iterable[Text], draft_len: int, objective: Objective, *, replays: int = 8, seed: int = 0
) -> Iterator[list[Row]]:
    """The rows of each text: every single drafter, then all ``policies``.

    All policies meet the same uniforms, and a text meets its own whatever else is replayed.

    Args:
        answers: see ``texts``.
        draft_len: drafted tokens a round, at least 1; not necessarily the one recorded.
        objective: of the learners.
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
        yield _row(text, name, SINGLE, each, loss - losses.min(), rounds.min(), 0)


def _replayed(text: Text, name: str, policy: Policy, draft_len: int, seeds: Sequence[tuple[Any, Any]]) -> Row:
    """One policy on one text."""
    query = text.query
    losses = query.losses(Token())
    lengths = round_lengths(query.realised, draft_len)
    expected = rounds = scored = loss = 0.0
    for choosing, drawing in seeds:
        selector = policy.make(choosing)
        done = list(replay(selector, query.gamma, query.realised, draft_len=draft_len, rng=drawing))
        expected += sum(float(lengths[each.start, each.choice]) for each in done)
        rounds += len(done)
        scored += sum(each.scored for each in done)
        loss += float(lost(_played(done, policy.kind), losses).sum())
    tokens, best = len(losses), expected_rounds(query.realised, draft_len).min()
    regret = loss / len(seeds) - losses.sum(0).min()
    return _row(
        text, name, policy.kind, tokens * rounds / expected, regret, best, scored / tokens / len(seeds)
    )


def _played(done: Sequence[Any], kind: str) -> Any:
    """By position, the law in force, or the drafter where no law was drawn from."""
    emitted = [each.emitted for each in done]
    if kind == "argmax":
        return np.repeat([each.choice for each in done], emitted)
    return np.repeat([each.probs for each in done], emitted, axis=0)


def _row(text: Text, name: str, kind: str, rounds: float, regret: float, best: float, scored: float) -> Row:
    query, tokens = text.query, len(text.query.gamma)
    where = str(text.trace.path), query.policy, query.number, query.domain
    measured = (
        tokens,
        rounds,
        tokens / rounds,
        float(regret),
        float(rounds - best),
        scored,
        float(best / rounds),
    )
    return Row(*where, name, kind, *measured)


def against_domains(rows: Iterable[Row]) -> list[Row]:
    """The rows with ``of_domain_best``; a domain's best single drafter takes the fewest rounds over it."""
    rows = list(rows)
    best = {}
    for domain in dict.fromkeys(row.domain for row in rows):
        singles = [row for row in rows if row.kind == SINGLE and row.domain == domain]
        names = dict.fromkeys(row.policy for row in singles)
        leader = min(names, key=lambda name: sum(row.rounds for row in singles if row.policy == name))
        best |= {_place(row): row.rounds for row in singles if row.policy == leader}
    return [row._replace(of_domain_best=best[_place(row)] / row.rounds) for row in rows]


def _place(row: Row) -> tuple[Any, ...]:
    return row.trace, row.recorded, row.query, row.domain


def totals(rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """By policy: its kind, means a text, and mean acceptance lengths over the domain's best single drafter's.

    ``domains`` has the latter by domain, pooled over texts, ``relative`` pooled over all of them.
    """
    rows = list(rows)
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(row.policy for row in rows):
        own = [row for row in rows if row.policy == name]
        domains = dict.fromkeys(row.domain for row in own)
        found[name] = {
            "kind": own[0].kind,
            "relative": _relative(own),
            "domains": {
                domain: _relative([row for row in own if row.domain == domain]) for domain in domains
            },
            "mean_acceptance_length": sum(row.tokens for row in own) / sum(row.rounds for row in own),
            "token_regret": float(np.mean([row.token_regret for row in own])),
            "stopping_time_regret": float(np.mean([row.stopping_time_regret for row in own])),
            "scored": float(np.average([row.scored for row in own], weights=[row.tokens for row in own])),
        }
    return found


def _relative(rows: Sequence[Row]) -> float:
    """Rounds of the domains' best single drafters over the policy's."""
    return sum(row.of_domain_best * row.rounds for row in rows) / sum(row.rounds for row in rows)
