"""Exact quantities of speculative decoding on Markov models, by dynamic programming instead of sampling.

A *state* is the last ``order`` tokens, where ``order`` is the larger of the target's and the drafter's, as a
number in base ``vocab`` whose last digit is the last token; with models of order 1 it is the last token.

Almost everything follows from the *law of a round*, ``law[s, k, r]``: the probability that a round from s
emits ``k + 1`` tokens and leaves state r. Laws of rounds mix like any others: where the drafter is drawn with
fixed probabilities ``w``, the law is ``np.tensordot(w, laws, 1)``.

>>> target, drafter = Markov(np.full((2, 2), 0.5)), Markov(np.array([[0.9, 0.1], [0.5, 0.5]]))
>>> law = round_law(target, drafter, draft_len=2)
>>> lengths(law).round(12).tolist()
[2.0, 2.8]
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from nab.acceptance import Chain
from nab.checks import whole
from nab.sim.markov import Markov
from nab.types import AcceptanceRule, Floats, as_floats

CHAIN = Chain()
"""The rule where none is given."""


def lifted(model: Markov, order: int) -> Markov:
    """The same model as one of a higher order, for instance so that laws of rounds of a pool can be mixed.

    Raises:
        ValueError: if ``order`` is below the model's.

    >>> lifted(Markov(np.array([[0.0, 1.0], [0.5, 0.5]])), 2).table[1, 0].tolist()
    [0.0, 1.0]
    """
    whole("order", order, model.order)
    return Markov(np.broadcast_to(model.table, model.table.shape[-1:] * (order + 1)))


class Step(NamedTuple):
    """What a position does, by state and token, each ``(states, vocab)``.

    ``p``: the target's law; ``a``: a(x), 0 where p is; ``gamma``: ``sum_x p(x) a(x)``, ``(states, 1)``;
    ``after``: the state that follows.
    """

    p: Floats
    a: Floats
    gamma: Floats
    after: np.ndarray[tuple[int, int], np.dtype[np.intp]]

    def move(self, mass: Floats) -> Floats:
        """Masses of (state, token), ``(states, vocab)``, to those of (state, state that follows)."""
        moved = np.zeros((len(self.p), len(self.p)))
        np.add.at(moved, (np.arange(len(self.p))[:, None], self.after), mass)
        return moved


def step(target: Markov, drafter: Markov, rule: AcceptanceRule = CHAIN) -> Step:
    """One position under a drafter and an acceptance rule.

    Raises:
        ValueError: on different vocabularies, or if the target has no law somewhere.
    """
    vocab = target.table.shape[-1]
    if drafter.table.shape[-1] != vocab:
        raise ValueError(f"the drafter must have the target's {vocab} tokens, got {drafter.table.shape[-1]}")
    order = max(target.order, drafter.order)
    p, q = (lifted(model, order).table.reshape(-1, vocab) for model in (target, drafter))
    if not p.any(-1).all():
        raise ValueError(f"rows of the target must all sum to 1, got 0 in state {p.any(-1).argmin()}")
    state, token = p.nonzero()
    a = np.zeros_like(p)
    a[state, token] = rule.realised(p[state], q[state], token)
    after = (np.arange(len(p))[:, None] * vocab + np.arange(vocab)) % len(p)
    return Step(p, a, (p * a).sum(-1, keepdims=True), after)


def round_law(target: Markov, drafter: Markov, draft_len: int, rule: AcceptanceRule = CHAIN) -> Floats:
    """Joint law of the tokens a round emits and the state it leaves, from every state.

    Token x is accepted with mass ``p(x) a(x)`` and recovered with mass ``p(x) (1 - a(x))``, whatever the
    verification scheme.

    Args:
        target: the model that is decoded.
        drafter: of any order; both are lifted to the larger one.
        draft_len: drafted tokens a round, at least 1.
        rule: acceptance of one position; trees are those of ``TopK``, ``draft_len`` levels deep.

    Returns:
        ``(states, draft_len + 1, states)``: ``law[s, k, r]`` of ``k + 1`` tokens and state r, given s.

    Raises:
        ValueError: on different vocabularies, a target without a law somewhere, or ``draft_len`` below 1.
    """
    whole("draft_len", draft_len, 1)
    one = step(target, drafter, rule)
    accepted, rejected = one.move(one.p * one.a), one.move(one.p * (1 - one.a))
    law = np.empty((len(one.p), draft_len + 1, len(one.p)))
    reached = np.eye(len(one.p))
    for k in range(draft_len):
        law[:, k] = reached @ rejected
        reached = reached @ accepted
    law[:, draft_len] = reached @ (accepted + rejected)
    return law


def lengths(law: Floats) -> Floats:
    """Expected tokens of a round from each state, in [1, draft_len + 1], ``(states,)``."""
    return np.asarray(law.sum(2) @ np.arange(1, law.shape[1] + 1))


def stationary(chain: Floats) -> Floats:
    """The stationary law of a chain, ``(states,)``, from its transition probabilities, ``(states, states)``.

    Raises:
        ValueError: if it has several: where a long run ends up then depends on its start.

    >>> stationary(np.array([[0.5, 0.5], [1.0, 0.0]])).round(12).tolist()
    [0.666666666667, 0.333333333333]
    """
    states = len(chain)
    balance = np.vstack([np.eye(states) - chain.T, np.ones(states)])
    found, _, rank, _ = np.linalg.lstsq(balance, np.append(np.zeros(states), 1.0))
    if rank < states:
        raise ValueError("the chain has several stationary laws: the long run depends on its start")
    return np.asarray(found)


def mean_acceptance_length(law: Floats) -> float:
    """Long-run MAT: tokens of a round in the stationary law of the states that rounds start in.

    The best fixed drafter is the one whose law has the largest.

    Raises:
        ValueError: if it depends on where the text starts.
    """
    return float(stationary(law.sum(1)) @ lengths(law))


def potential(law: Floats) -> Floats:
    """What a start in each state is worth, in tokens, over the stationary one: g, ``(states,)``.

    It solves Poisson's equation ``g = lengths - MAT + P g``, with P the chain of states between rounds. So
    lengths L_t of T rounds, from states S_t, have ``sum_t (L_t - MAT) = M_T + g(S_0) - g(S_T)``, where M_T is
    a martingale with steps ``L_t - MAT + g(S_t+1) - g(S_t)``, the ``deviations``.
    """
    chain = law.sum(1)
    start, length = stationary(chain), lengths(law)
    return np.linalg.solve(np.eye(len(chain)) - chain + start, length - start @ length)


def deviations(law: Floats) -> Floats:
    """Steps of the martingale in ``potential``, shaped like ``law``: of mean 0 from every state."""
    g, tokens = potential(law), np.arange(1, law.shape[1] + 1)
    return np.asarray(tokens[:, None] - mean_acceptance_length(law) + g - g[:, None, None])


def variance(law: Floats) -> float:
    """Of the central limit: n rounds have a mean length with variance ``variance(law) / n``, for large n."""
    return float(np.einsum("s,skr,skr->", stationary(law.sum(1)), law, deviations(law) ** 2))


def mean_rounds(law: Floats, tokens: int) -> Floats:
    """Expected rounds for a text of so many tokens from each state, ``(states,)``; the last may be cut."""
    whole("tokens", tokens, 0)
    states, most, _ = law.shape
    to_come = np.zeros((tokens + most, states))  # rounds for t tokens in row most - 1 + t, none for t <= 0
    for t in range(most, most + tokens):
        to_come[t] = 1 + np.einsum("skr,kr->s", law, to_come[t - most : t][::-1])
    return np.asarray(to_come[-1])


def token_laws(
    target: Markov,
    drafter: Markov,
    draft_len: int,
    rule: AcceptanceRule = CHAIN,
    *,
    start: ArrayLike,
    tokens: int,
) -> Floats:
    """Laws of the emitted tokens, position by position, ``(tokens, vocab)``, under a fixed drafter.

    They are the target's own, whatever the drafter: that is what lossless means. The sum runs over the rounds
    that a position can belong to.

    Args:
        target: the model that is decoded.
        drafter: of any order.
        draft_len: drafted tokens a round, at least 1.
        rule: acceptance of one position.
        start: law of the state that the text starts in, ``(states,)``.
        tokens: positions, at least 0.
    """
    law, one = round_law(target, drafter, draft_len, rule), step(target, drafter, rule)
    accepted, vocab = one.move(one.p * one.a), one.p.shape[1]
    begins = np.zeros((tokens + draft_len + 1, len(one.p)))  # P(a round starts at t, in s)
    begins[0] = as_floats(start)
    found = np.zeros((tokens, vocab))
    for t in range(tokens):
        reached = begins[t]
        for k in range(draft_len + 1):
            begins[t + k + 1] += begins[t] @ law[:, k]
            if t + k < tokens:
                found[t + k] += reached @ one.p
            reached = reached @ accepted
    return found


class Moments(NamedTuple):
    """Mean and mean square of an estimate made from the positions behind each state, ``(states,)`` each."""

    mean: Floats
    square: Floats

    def over(self, start: Floats) -> tuple[float, float]:
        """Mean and variance from a random state with law ``start``, ``(states,)``."""
        mean = float(start @ self.mean)
        return mean, float(start @ self.square) - mean**2


def estimators(
    target: Markov, drafter: Markov, draft_len: int, rule: AcceptanceRule = CHAIN
) -> dict[str, Moments]:
    """Exact moments of three estimates of a round's length from ``draft_len`` verified positions.

    All are ``1 + Y_1`` with ``Y_k = c_k + b_k Y_{k+1}``, zero behind the window: ``unbiased`` with
    ``c, b = gamma, a`` (``nab.losses.expected_length``), ``plug-in`` with ``gamma, gamma``
    (``plug_in_length``), ``ratio`` with ``a, a``, that is ``1 + sum_k prod_{j<=k} a_j``. So their moments
    follow backwards, state by state.

    Returns:
        Moments by name.
    """
    whole("draft_len", draft_len, 1)
    one = step(target, drafter, rule)
    gamma = np.broadcast_to(one.gamma, one.p.shape)
    return {
        name: _moments(one, constant, factor, draft_len)
        for name, constant, factor in (
            ("unbiased", gamma, one.a),
            ("plug-in", gamma, gamma),
            ("ratio", one.a, one.a),
        )
    }


def _moments(one: Step, constant: Floats, factor: Floats, draft_len: int) -> Moments:
    """Of ``1 + Y`` with ``Y = constant + factor Y'``, ``draft_len`` deep."""
    mean = square = np.zeros(len(one.p))
    for _ in range(draft_len):
        ahead, ahead_square = mean[one.after], square[one.after]
        mean = (one.p * (constant + factor * ahead)).sum(-1)
        square = (one.p * (constant**2 + 2 * constant * factor * ahead + factor**2 * ahead_square)).sum(-1)
    return Moments(1 + mean, 1 + 2 * mean + square)
