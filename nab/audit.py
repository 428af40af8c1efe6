"""A losslessness audit for any decoder: is its greedy text the model's, have drawn texts the model's law?

Needs a callable that generates and the model as a ``LanguageModel``; see docs/audit.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from operator import index
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nab.checks import checked, whole
from nab.sampling import sample
from nab.schemes import check_shape, normalised
from nab.types import Floats, LanguageModel, as_floats

CELLS = 8
"""Parts of equal mass that every law is cut into."""

TESTS = ("tokens", "tokens by place", "pairs by distance")
"""What is counted: all tokens; those at each place of the answers; pairs so many places apart."""

ORDERS = ("likeliest first", "drafters' own first")
"""Of tokens, in which laws are cut."""

SIMULATIONS = 9999
"""Draws of the law that the statistics have if there is no error."""

CONTROLS, POWER = 999, 0.99
"""Simulated decoders with a known error, and the share of them that must be rejected."""

Cells = NDArray[np.int64]
"""Numbers of cells, below ``CELLS``."""


class Difference(NamedTuple):
    """Where a greedy answer leaves the model's: the first such place.

    ``prompt`` and ``position`` count from 0, the latter among the answer's tokens; ``gap`` is the probability
    of ``expected`` less that of ``token``, at least 0 (0: they tie, and the lower token was due).
    """

    prompt: int
    position: int
    token: int
    expected: int
    gap: float


@dataclass(frozen=True)
class Greedy:
    """Greedy answers against the model's own greedy text, token by token; adds up.

    Args:
        prompts: that were answered.
        tokens: of the answers.
        differences: one for each answer that is not the model's.
    """

    prompts: int
    tokens: int
    differences: tuple[Difference, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether all answers are the model's."""
        return not self.differences

    def __add__(self, later: Greedy) -> Greedy:
        """Both, the prompts of ``later`` counted on."""
        moved = (each._replace(prompt=each.prompt + self.prompts) for each in later.differences)
        prompts, tokens = self.prompts + later.prompts, self.tokens + later.tokens
        return Greedy(prompts, tokens, (*self.differences, *moved))

    def summary(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {
            "passed": self.passed,
            "prompts": self.prompts,
            "tokens": self.tokens,
            "differences": [each._asdict() for each in self.differences],
        }

    def __str__(self) -> str:
        wrong = len(self.differences)
        verdict = f"FAILED: {wrong} are not the model's" if wrong else "passed, all are the model's"
        lines = [f"greedy: {self.prompts} answers, {self.tokens} tokens: {verdict}"]
        for prompt, position, token, expected, gap in self.differences:
            place = f"answer {prompt}, token {position}"
            lines.append(f"  {place}: {token}, not {expected}, which is likelier by {gap:.3g}")
        return "\n".join(lines)


def greedy(
    generate: Callable[[Sequence[int]], Iterable[int]],
    model: LanguageModel,
    prompts: Iterable[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_tokens: Iterable[int] = (),
) -> Greedy:
    """Compare greedy answers with the model's own: the likeliest token each time, the lowest among equals.

    The model reads every answer once. An answer is the model's if each token is the likeliest one behind the
    tokens before it, so no text is decoded for the comparison.

    Args:
        generate: from a prompt to the tokens behind it, greedily; what is behind a stop token, or beyond
            ``max_new_tokens``, is cut off.
        model: gives the laws; float64 expected, at a temperature above 0 so that gaps say something.
        prompts: token ids.
        max_new_tokens: compared, at least 1.
        stop_tokens: an answer may end with one of them.

    Raises:
        ValueError: if there is no prompt, an answer is shorter for no reason or holds a token that is none,
            or a law of the model is none.
    """
    whole("max_new_tokens", max_new_tokens, 1)
    found, stops = Greedy(0, 0), frozenset(stop_tokens)
    for prompt in _some(prompts):
        answer = _cut(generate(prompt), max_new_tokens, stops)
        found += _compared(answer, _laws(model, prompt, answer))
    return found


def _compared(answer: list[int], laws: Floats) -> Greedy:
    """One answer and the laws at its tokens, ``(tokens, vocab)``."""
    expected = laws.argmax(-1)
    parts = (expected != answer).nonzero()[0][:1]
    differences = [
        Difference(0, k, answer[k], int(expected[k]), float(laws[k, expected[k]] - laws[k, answer[k]]))
        for k in parts.tolist()
    ]
    return Greedy(1, len(answer), tuple(differences))


class ChiSquare(NamedTuple):
    """A chi-square statistic, its mean under the model's law, and its p-value, by simulation of that law."""

    order: str
    test: str
    statistic: float
    mean: float
    p_value: float


@dataclass(frozen=True, eq=False)
class Sampling:
    """Drawn answers against the model's law; those drawn with the same settings add up.

    Args:
        cells: where the emitted tokens lie in the model's laws, ``(orders, answers, places)``: see
            ``sampling``. Under these laws all are independent and uniform.
        drafts: likewise of tokens that the drafters would have put there.
        distance: total variation between the laws of drafters and model, ``(answers, places)``.
        impossible: answer and place of tokens to which the model gives probability 0.
        alpha: false-alarm rate.
        error: total variation between the laws of the control's tokens and of the model's, wanted.
    """

    cells: Cells
    drafts: Cells
    distance: Floats
    impossible: tuple[tuple[int, int], ...]
    alpha: float
    error: float

    def __add__(self, later: Sampling) -> Sampling:
        """Both, the answers of ``later`` counted on."""
        settings = [(each.alpha, each.error, each.cells.shape[::2]) for each in (self, later)]
        if settings[0] != settings[1]:
            raise ValueError(f"only audits with the same settings add up, got {settings[0]}, {settings[1]}")
        moved = ((answer + self.answers, place) for answer, place in later.impossible)
        return replace(
            self,
            cells=np.concatenate([self.cells, later.cells], 1),
            drafts=np.concatenate([self.drafts, later.drafts], 1),
            distance=np.concatenate([self.distance, later.distance]),
            impossible=(*self.impossible, *moved),
        )

    @property
    def answers(self) -> int:
        """Number of answers."""
        return len(self.distance)

    @cached_property
    def chi_squares(self) -> tuple[ChiSquare, ...]:
        """Every test in every order of the tokens."""
        null = _null(*self.distance.shape)
        found = [
            zip(TESTS, each.tolist(), null.mean(0).tolist(), _p_values(each, null).tolist(), strict=True)
            for each in map(_chi_squares, self.cells)
        ]
        return tuple(
            ChiSquare(order, *each) for order, rows in zip(ORDERS, found, strict=False) for each in rows
        )

    @property
    def level(self) -> float:
        """P-value at which a single test rejects, so that all together do so wrongly at rate ``alpha``."""
        return self.alpha / len(TESTS) / len(self.cells)

    @property
    def accepted(self) -> bool:
        """Whether no test rejects the answers."""
        return not self.impossible and min(each.p_value for each in self.chi_squares) > self.level

    @property
    def slip(self) -> float:
        """Share of its tokens that the control emits as drafted: so many that they make the ``error``."""
        return self.error / max(float(self.distance.mean()), self.error)

    @property
    def control_error(self) -> float:
        """What that comes to: ``error``, or less where drafters are more like the model than that."""
        return self.slip * float(self.distance.mean())

    @cached_property
    def power(self) -> float:
        """Share of controls, simulated at the places of these answers, that the tests reject.

        Of the order that rejects most of them: all orders together reject at least as many.
        """
        rng, null = np.random.default_rng(CONTROLS), _null(*self.distance.shape)

        def rejected(drafts: Cells) -> bool:
            slips = rng.random(drafts.shape) < self.slip
            control = np.where(slips, drafts, rng.integers(CELLS, size=drafts.shape))
            return bool(_p_values(_chi_squares(control), null).min() <= self.level)

        return max(sum(rejected(drafts) for _ in range(CONTROLS)) / CONTROLS for drafts in self.drafts)

    @property
    def passed(self) -> bool:
        """Whether the answers are accepted and the control is rejected."""
        return self.accepted and self.power >= POWER

    def summary(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {
            "passed": self.passed,
            "accepted": self.accepted,
            "answers": self.answers,
            "places": self.distance.shape[1],
            "alpha": self.alpha,
            "level": self.level,
            "chi_squares": [each._asdict() for each in self.chi_squares],
            "impossible": [list(each) for each in self.impossible],
            "control": {"slip": self.slip, "error": self.control_error, "power": self.power},
        }

    def __str__(self) -> str:
        verdict = "FAILED: they do not have the model's law"
        if self.accepted:
            undecided = "UNDECIDED: controls get through; take more answers, or a higher temperature"
            verdict = "passed, they have the model's law as far as this sees" if self.passed else undecided
        lines = [f"sampling: {self.answers} answers of {self.distance.shape[1]} tokens: {verdict}"]
        lines += [f"  answer {a}, token {t}: its probability is 0" for a, t in self.impossible[:8]]
        lines += [f"  {'chi-square of':<20}{'in the order':<26}{'statistic':>10}{'mean':>8}{'p-value':>10}"]
        lines += [
            f"  {test:<20}{order:<26}{statistic:>10.1f}{mean:>8.1f}{p:>10.4f}"
            for order, test, statistic, mean, p in self.chi_squares
        ]
        rates = f"  p-values up to {self.level:.2g} reject: false-alarm rate {self.alpha:g} in all"
        control = (
            f"  control: {self.slip:.0%} of tokens unverified, an error of {self.control_error:.3f} a token "
            f"(total variation): {self.power:.1%} of {CONTROLS} are rejected"
        )
        return "\n".join([*lines, rates, control])


def sampling(
    generate: Callable[[Sequence[int], int], Iterable[int]],
    model: LanguageModel,
    prompts: Iterable[Sequence[int]],
    *,
    answers: int = 500,
    max_new_tokens: int = 10,
    stop_tokens: Iterable[int] = (),
    drafters: Sequence[LanguageModel] = (),
    alpha: float = 1e-3,
    error: float = 0.05,
    rng: Any = None,
) -> Sampling:
    """Test whether drawn answers have the model's law.

    Lay the tokens out on [0, 1) in some order, each as long as its probability behind the answer so far. A
    point drawn from the part of the emitted token is uniform if the token has the model's law, whatever was
    before (Rosenblatt 1952). With [0, 1) in 8 cells, answers become a table of independent uniform numbers,
    whatever the model and its vocabulary, and chi-square statistics of it have one law, which is simulated.

    Args:
        generate: from a prompt and a seed below 2**32 to the tokens behind it, independent of other answers;
            what is behind a stop token, or beyond ``max_new_tokens``, is cut off.
        model: gives the laws that tokens are drawn from, temperature and the like included.
        prompts: token ids; they take turns.
        answers: number of answers, at least 1.
        max_new_tokens: of an answer, at least 1; a draft and then some, for errors show inside drafts, where
            one is rejected, and behind it.
        stop_tokens: an answer may end with one of them.
        drafters: those of the decoder, if known. Errors of verification follow q(x) / p(x), so a second
            order of the tokens is by the mean over drafters of q(x) / (q(x) + p(x)). And the control emits
            drafts unverified; without drafters it emits likeliest tokens.
        alpha: false-alarm rate, above 6e-4 with drafters, 3e-4 without.
        error: of the control, total variation a token, in (0, 1).
        rng: of seeds, of points, of the control; anything ``numpy.random.default_rng`` takes.

    Raises:
        ValueError: if an argument is out of its range, there is no prompt, an answer is shorter for no
            reason or holds a token that is none, or a law of the model or a drafter is none.
    """
    whole("answers", answers, 1)
    whole("max_new_tokens", max_new_tokens, 1)
    checked("error", error, high=1)
    orders = ORDERS[: 1 + bool(drafters)]
    checked("alpha", alpha, len(TESTS) * len(orders) / (SIMULATIONS + 1), 1)
    rng, turns, stops = np.random.default_rng(rng), _some(prompts), frozenset(stop_tokens)
    cells, drafts = rng.integers(CELLS, size=(2, len(orders), answers, max_new_tokens))  # behind an early end
    distance, impossible = np.zeros((answers, max_new_tokens)), list[tuple[int, int]]()
    for number in range(answers):
        prompt = turns[number % len(turns)]
        answer = _cut(generate(prompt, int(rng.integers(2**32))), max_new_tokens, stops)
        p = _laws(model, prompt, answer)
        q, keys = _drafted(drafters, prompt, answer, p)
        drawn = [sample(law, rng.random()) for law in q]
        for order, key in enumerate(keys):
            for into, tokens in ((cells, answer), (drafts, drawn)):
                into[order, number, : len(answer)] = _cells(p, key, tokens, rng.random(len(answer)))
        distance[number, : len(answer)] = np.abs(p - q).sum(-1) / 2
        impossible += [(number, place) for place, token in enumerate(answer) if p[place, token] == 0]
    return Sampling(cells, drafts, distance, tuple(impossible), alpha, error)


def _some(prompts: Iterable[Sequence[int]]) -> list[Sequence[int]]:
    found = list(prompts)
    if not found:
        raise ValueError("an audit needs at least one prompt")
    for prompt in found:
        if not len(prompt) or not all(hasattr(token, "__index__") for token in prompt):
            raise ValueError(f"a prompt must be token ids, at least one, got {prompt!r}")
    return found


def _cut(answer: Iterable[int], length: int, stop_tokens: frozenset[int]) -> list[int]:
    """The answer up to its first stop token or ``length`` tokens."""
    found = list[int]()
    if not isinstance(answer, Iterable):
        raise ValueError(f"an answer must be tokens, got {answer!r}")
    for token in answer:
        try:
            found.append(index(token))
        except TypeError:
            raise ValueError(f"an answer must be whole numbers, got {token!r}") from None
        if len(found) == length or found[-1] in stop_tokens:
            return found
    raise ValueError(f"an answer must have {length} tokens or end with a stop token, got {found}")


def _laws(
    model: LanguageModel, prompt: Sequence[int], answer: Sequence[int], drafter: int | None = None
) -> Floats:
    """Laws at the tokens of an answer, ``(tokens, vocab)``; those of drafters may be 0."""
    try:
        laws = as_floats(model.score([*prompt, *answer[:-1]], len(prompt)))
        check_shape(laws, len(answer), laws.shape[-1])
        outside = [token for token in answer if not 0 <= token < laws.shape[-1]]
        if outside:
            raise ValueError(f"it has tokens in [0, {laws.shape[-1]}), but the answer holds {outside[0]}")
        laws = np.stack([normalised(law) for law in laws])
        if drafter is None and not laws.any(-1).all():
            raise ValueError("its law must sum to 1, but is all 0")
    except (
        ValueError,
        IndexError,
        RuntimeError,
    ) as error:  # some models index by tokens that they do not have
        raise ValueError(f"{'the model' if drafter is None else f'drafter {drafter}'}: {error}") from error
    return laws


def _drafted(
    drafters: Sequence[LanguageModel], prompt: Sequence[int], answer: Sequence[int], p: Floats
) -> tuple[Floats, list[Floats]]:
    """Laws of the control's drafts, and the keys by which tokens are ordered, each ``(tokens, vocab)``.

    A draft has the mean law of the drafters that propose something, the model's where none does; without
    drafters it is the likeliest token. Keys are 0, and if there are drafters the sum of their q / (q + p).
    """
    nothing = np.zeros_like(p)
    if not drafters:
        mode = nothing.copy()
        np.put_along_axis(mode, p.argmax(-1, keepdims=True), 1, -1)
        return mode, [nothing]
    each = np.array([_laws(drafter, prompt, answer, i) for i, drafter in enumerate(drafters)])
    mass = each.sum((0, 2))[:, None]
    q = np.where(mass > 0, each.sum(0) / np.maximum(mass, 1), p)
    return q, [nothing, np.divide(each, each + p, out=np.zeros_like(each), where=each > 0).sum(0)]


def _cells(p: Floats, key: Floats, tokens: Sequence[int], u: Floats) -> Cells:
    """Cells of tokens when those of the highest key come first, then the likelier, then the lower ones.

    Args:
        p: laws, ``(rows, vocab)``.
        key: likewise.
        tokens: one a row.
        u: points within the tokens' own parts, in [0, 1), ``(rows,)``.
    """
    rows = np.arange(len(tokens))
    own, mass = key[rows, tokens, None], p[rows, tokens, None]
    lower = np.arange(p.shape[-1]) < np.array(tokens)[:, None]
    before = (key > own) | ((key == own) & ((p > mass) | ((p == mass) & lower)))
    points = (p * before).sum(-1) + u * mass[:, 0]
    cells: Cells = np.minimum((CELLS * points).astype(np.int64), CELLS - 1)
    return cells


def _chi_squares(cells: Cells) -> Floats:
    """Pearson's statistics of the three ``TESTS``, for cells ``(answers, places)``."""
    places = cells.shape[1]
    first, second = np.triu_indices(places, 1)
    pairs = ((second - first - 1) * CELLS + cells[:, first]) * CELLS + cells[:, second]
    by_place = _counts(np.arange(places) * CELLS + cells, places, CELLS)
    counts = by_place.sum(0), by_place, _counts(pairs, places - 1, CELLS**2)
    return np.array([_pearson(each) for each in counts])


def _counts(numbers: Cells, rows: int, columns: int) -> Cells:
    return np.bincount(numbers.ravel(), minlength=rows * columns).reshape(rows, columns)


def _pearson(counts: Cells) -> float:
    """Against equal counts in each row."""
    expected = counts.sum(-1, keepdims=True) / counts.shape[-1]
    return float(((counts - expected) ** 2 / expected).sum())


@cache
def _null(answers: int, places: int) -> Floats:
    """The statistics of uniform cells, ``(SIMULATIONS, tests)``."""
    rng = np.random.default_rng(SIMULATIONS)
    return np.array([_chi_squares(rng.integers(CELLS, size=(answers, places))) for _ in range(SIMULATIONS)])


def _p_values(statistics: Floats, null: Floats) -> Floats:
    """Rank among the simulated ones, itself counted: at most x with probability at most x."""
    found: Floats = (1 + (null >= statistics).sum(0)) / (len(null) + 1)
    return found
