"""Learning for many queries with one update: what their selectors do, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from nab.learners.normal_hedge import NormalHedgeState
from nab.selector import Before, Chooses, Selector
from nab.types import Evaluate, Floats, Learner


def observe_together(
    selectors: Sequence[Chooses], emitted: Sequence[int], evaluate: Sequence[Evaluate]
) -> list[tuple[Floats, Floats] | None]:
    """What each selector's ``observe`` does, with one update a step for learners that are alike and many.

    Queries release different numbers of losses in a round; step k updates those that have a k-th one. Laws
    are those of ``observe`` but for rounding: learners promise 1e-12 (tests/test_learners.py).

    Args:
        selectors: one a query, each its own. Other kinds than ``Selector`` observe one by one.
        emitted: for each, see ``Chooses.observe``.
        evaluate: likewise.

    Returns:
        What each evaluation returned, or None where it was not called.

    Raises:
        ValueError: on scores as ``Selector.observe`` refuses them.
    """
    scores: list[tuple[Floats, Floats] | None] = []
    asking = list[_Released]()
    for selector, count, scored in zip(selectors, emitted, evaluate, strict=True):
        if type(selector) is not Selector:
            scores.append(selector.observe(count, scored))
            continue
        gamma, realised = selector._scored(count, scored)
        scores.append((gamma, realised))
        asking.append(_Released(selector, *selector._released(gamma, realised)))
    for group in _alike(asking):
        _learn(group)
    for selector, _, _ in asking:
        selector._choose(Before(selector._expert, selector.law))
    return scores


class _Released(NamedTuple):
    """A selector, the losses that it has to learn and the laws played there, ``(losses, n)`` each."""

    selector: Selector
    losses: Floats
    played: Floats


class _Group(NamedTuple):
    """Selectors of one learner over n drafters whose states can stand side by side, like those of a batch."""

    learner: Learner[Any]
    n: int
    like: Any
    common: list[Any]
    members: list[_Released]


def _alike(asking: Sequence[_Released]) -> list[_Group]:
    """Selectors of one learner whose states have the same numbers without batch axis.

    Such numbers count rounds, as a rule, so queries that have learned from unlike many positions are apart.
    """
    groups: list[_Group] = []
    for each in asking:
        learner, n = each.selector.learner, len(each.selector.probs)
        kin = [group for group in groups if group.n == n and group.learner == learner]
        like = kin[0].like if kin else _outline(each.selector)
        common = list(_common(like, each.selector.state))
        group = next((group for group in kin if group.common == common), None)
        if group is None:
            groups.append(group := _Group(learner, n, like, common, []))
        group.members.append(each)
    return groups


def _common(like: Any, state: Any) -> Iterator[Any]:
    """What states that stand side by side have in common: numbers, and the shapes of arrays."""
    if isinstance(like, tuple):
        for part, own in zip(like, state, strict=True):
            yield from _common(part, own)
    else:
        yield np.shape(state) if isinstance(like, np.ndarray) else state


def _outline(selector: Selector) -> Any:
    """A state for a batch of two: what has no axis there is common to all queries."""
    state: Any = selector.learner.init(len(selector.probs), 2)
    if isinstance(state, NormalHedgeState):
        rounds: Any = np.zeros(2)  # they say how large rounding errors are, no more, and broadcast
        return state._replace(rounds=rounds)
    return state


def _learn(group: _Group) -> None:
    """Update the states of a group: together for as many steps as enough of them have losses, then alone."""
    learner, like = group.learner, group.like
    members = sorted(group.members, key=lambda each: -len(each.losses))  # whoever is left is in front
    going = [sum(len(each.losses) > step for each in members) for step in range(len(members[0].losses))]
    steps = sum(count >= _MANY for count in going)
    state = _joined(like, [each.selector.state for each in members]) if steps else None
    for step, (count, left) in enumerate(pairwise([*going[:steps], 0])):
        losses = np.stack([each.losses[step] for each in members[:count]], -1)
        played = np.stack([each.played[step] for each in members[:count]], -1)
        state = learner.update(_part(like, state, slice(count)), losses, played)
        for query in range(left, count):
            members[query].selector.state = _part(like, state, query)
    for selector, losses, played in members:
        for loss, law in zip(losses[steps:], played[steps:], strict=True):
            selector.state = learner.update(selector.state, loss, law)


_MANY = 8
"""An update of a batch takes as long as some five of single queries, whose sums are products."""


def _joined(like: Any, states: Sequence[Any]) -> Any:
    """States of single queries as that of a batch."""
    if isinstance(like, tuple):
        parts = [_joined(*each) for each in zip(like, zip(*states, strict=True), strict=True)]
        return type(like)(*parts) if hasattr(like, "_fields") else tuple(parts)
    return np.stack(states, -1) if isinstance(like, np.ndarray) else states[0]


def _part(like: Any, state: Any, queries: int | slice) -> Any:
    """The state of one query, which keeps nothing of the others, or of the first ones."""
    if isinstance(like, tuple):
        parts = [_part(*each, queries) for each in zip(like, state, strict=True)]
        return type(like)(*parts) if hasattr(like, "_fields") else tuple(parts)
    if not isinstance(like, np.ndarray):
        return state
    part = state[..., queries]
    if isinstance(queries, slice):
        return part
    return part.copy() if part.ndim else part.item()
