"""Several queries decoded together: every model reads all of them at once, each has its own selector."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from time import perf_counter
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from nab.acceptance import Chain
from nab.backends import rows
from nab.backends.reader import Places, Reader, decoder_of
from nab.backends.rows import UNKNOWN, Drafted
from nab.backends.torch import CausalLM, Lifted
from nab.checks import whole
from nab.decode import Round, Seconds, until
from nab.losses import Time
from nab.pool import Pool
from nab.sampling import Draft
from nab.schemes import Levels
from nab.selector import Chooses, Selector
from nab.together import observe_together
from nab.types import Floats, LanguageModel
from nab.wrappers import Lazy, Wrapped


@dataclass
class _Query:
    """A prompt and what became of it; ``left`` tokens are still to come."""

    number: int
    tokens: list[int]
    selector: Chooses
    rng: np.random.Generator
    pool: Pool
    left: int


class _Round(NamedTuple):
    """All queries in a round: what each knows before it, on the device and on the host.

    Args:
        queries: one a row.
        starts: positions of their first new tokens.
        first: ``starts - 1``, ``(rows,)``.
        last: the tokens there, ``(rows, 1)``.
        draws: uniforms of drafts, ``(rows, draft_len)``.
        tests: uniforms of verification, ``(rows, draft_len + 1)``.
        host: all uniforms of each row, ``(rows, 2 draft_len + 1)``.
    """

    queries: Sequence[_Query]
    starts: list[int]
    first: Tensor
    last: Tensor
    draws: Tensor
    tests: Tensor
    host: Floats

    @property
    def everybody(self) -> slice:
        """All rows."""
        return slice(0, len(self.queries))


class _Verdict(NamedTuple):
    """What the target says of all drafts, on the device.

    Args:
        block: tokens from the last known one on, ``(rows, draft_len + 1)``.
        laws: the target's behind them, ``(rows, draft_len + 1, vocab)``; at temperature 0 the likeliest
            tokens ``(rows, draft_len + 1)``.
        emitted: accepted tokens and the next one, ``(rows, draft_len + 1)``; what follows means nothing.
        told: ``emitted``, number of accepted tokens, whether the target's laws are numbers, and those of the
            drafter that drafted, ``(rows, 2 draft_len + 3)``.
    """

    block: Tensor
    laws: Tensor
    emitted: Tensor
    told: Tensor


class _Engine:
    """The models and their memories; rows are the queries in the order given."""

    def __init__(
        self, target: CausalLM, drafters: Sequence[LanguageModel], count: int, draft_len: int
    ) -> None:
        self.target, self.n = Reader(target, count), len(drafters)
        self.readers = {
            i: Reader(each, count) for i, each in enumerate(drafters) if isinstance(each, CausalLM)
        }
        self.draft_len = draft_len
        models = [target, *(reader.lm for reader in self.readers.values())]
        # then laws need not be computed: their likeliest tokens say all
        self.greedy = all(model.warper.temperature == 0 for model in models)
        self.like = torch.empty(0, dtype=target.law_dtype, device=target.device)  # laws are
        self.vocab = _vocabulary(target)
        self._scheme = Levels([Chain()] * draft_len)

    @torch.inference_mode()
    def round(self, queries: Sequence[_Query]) -> list[Round]:
        """One round of all queries, whose tokens grow."""
        clock = [perf_counter()]
        now = self._begun(queries)
        choices, laws = [q.selector.choice for q in queries], [q.selector.probs for q in queries]
        drafted, counts = self._drafted(now)
        clock.append(perf_counter())

        verdict = self._verified(now, drafted, counts)
        asked = any(isinstance(query.selector, Selector | Wrapped) for query in queries)
        clock.append(perf_counter())
        told = [verdict.told, *([self._scores(now, verdict)] if asked else [])]
        clock.append(perf_counter())
        host = np.asarray(torch.cat([each.double() for each in told], 1).tolist())
        host, scored = np.split(host, [verdict.told.shape[1]], 1)
        emitted = self._taken(now, choices, counts, host)
        clock.append(perf_counter())

        @cache
        def evaluated() -> list[tuple[Floats, Floats]]:
            found = scored if asked else np.asarray(self._scores(now, verdict).tolist())
            return self._evaluated(now, verdict, emitted, found)

        def evaluate(row: int) -> tuple[Floats, Floats]:
            return evaluated()[row]

        observed = observe_together(
            [query.selector for query in queries],
            [len(each) for each in emitted],
            [partial(evaluate, row) for row in range(len(queries))],
        )
        clock.append(perf_counter())
        draft, verify, score, wait, select = (
            (after - before) / len(queries) for before, after in pairwise(clock)
        )
        seconds = Seconds(draft, verify + wait, score + select)
        found = []
        for row, new in enumerate(emitted):
            gamma, realised = observed[row] or (None, None)
            about = now.starts[row], choices[row], laws[row], counts[row], len(new) - 1, new
            found.append(Round(*about, gamma, realised, seconds))
        return found

    @torch.inference_mode()
    def leave(self, row: int, last: int) -> None:
        """Forget a row; the last one takes its place."""
        for reader in (self.target, *self.readers.values()):
            reader.leave(row, last)

    def _begun(self, queries: Sequence[_Query]) -> _Round:
        levels, starts = self.draft_len, [len(query.tokens) for query in queries]
        host = np.stack([query.rng.random(2 * levels + 1) for query in queries])
        uniforms = rows.uniforms(host.tolist(), self.like)
        known = [[len(query.tokens) - 1, query.tokens[-1]] for query in queries]
        first, last = torch.tensor(known, device=self.like.device).T
        return _Round(queries, starts, first, last[:, None], uniforms[:, :levels], uniforms[:, levels:], host)

    def _catch_up(self, reader: Reader, places: Iterable[int], now: _Round) -> None:
        """Have everything read but the last token that was known when the round began."""
        reader.catch_up(places, [query.tokens for query in now.queries], [start - 1 for start in now.starts])

    def _drafted(self, now: _Round) -> tuple[Drafted, list[int]]:
        """The drafts of all rows, and the numbers of their tokens."""
        groups, counts = defaultdict[int, list[int]](list), [0] * len(now.queries)
        for row, query in enumerate(now.queries):
            i, length = query.selector.choice, now.starts[row] + self.draft_len - 1
            if i in self.readers and self.draft_len:
                query.pool.call(i, partial(_check_fits, length))
            if i not in query.pool.benched and self.draft_len:
                groups[i].append(row)
        parts = []
        for i, group in groups.items():
            if i in self.readers:
                parts.append((group, self._chains(self.readers[i], group, now)))
                for row in group:
                    counts[row] = self.draft_len
            else:
                drafts = [self._proposed(i, row, now) for row in group]
                parts.append((group, self._lifted(drafts)))
                for row, draft in zip(group, drafts, strict=True):
                    counts[row] = len(draft.tokens)
        return self._side_by_side(parts, len(counts)), counts

    def _chains(self, reader: Reader, group: list[int], now: _Round) -> Drafted:
        """Chains of one drafter, drawn on the device."""
        self._catch_up(reader, group, now)
        places: Places = now.everybody
        if len(group) < len(now.queries):
            places = torch.tensor(group, device=self.like.device)
        first, fed, u = now.first[places], now.last[places], now.draws[places]
        end, drawn = max(now.starts[row] for row in group), list[Any]()
        for level in range(self.draft_len):
            logits = reader.follow(places, first + level, end + level, fed)
            if self.greedy:
                likeliest, top = _likeliest(logits)
                drawn.append((likeliest, None, top))
            else:
                law = reader.lm.warper(logits).to(self.like.dtype)
                drawn.append((rows.draw(law, u[:, level : level + 1, None]), law, None))
            fed = drawn[-1][0]
        for row in group:
            reader.lengths[row] = now.starts[row]
        parts = zip(*drawn, strict=True)
        return Drafted(*(None if each[0] is None else torch.cat(each, 1) for each in parts))  # type: ignore[arg-type]

    def _proposed(self, i: int, row: int, now: _Round) -> Draft:
        """A chain that a numpy drafter proposes; an empty one where it fails."""
        query, draws = now.queries[row], now.host[row, : self.draft_len].tolist()
        work = partial(_propose, self._scheme, query.tokens, self.vocab, draws)
        return query.pool.call(i, work) or Draft([], [], [])

    def _lifted(self, drafts: Sequence[Draft]) -> Drafted:
        """Chains that the host knows."""
        missing = [[UNKNOWN] * (self.draft_len - len(draft.tokens)) for draft in drafts]
        ids = [[*draft.tokens, *rest] for draft, rest in zip(drafts, missing, strict=True)]
        q = torch.full((len(drafts), self.draft_len, self.vocab), torch.nan, dtype=self.like.dtype)
        for row, draft in enumerate(drafts):
            for level, law in enumerate(draft.q):
                q[row, level] = cast(Tensor, law)
        device = self.like.device
        return Drafted(torch.tensor(ids, device=device), None if self.greedy else q.to(device))

    def _side_by_side(self, parts: Sequence[tuple[list[int], Drafted]], count: int) -> Drafted:
        """The drafts of all groups; tokens that there are not are ``UNKNOWN``, and their laws NaN."""
        if len(parts) == 1 and len(parts[0][0]) == count:
            return parts[0][1]
        shape, device = (count, self.draft_len), self.like.device
        ids = torch.full(shape, UNKNOWN, device=device)
        q = None if self.greedy else self.like.new_full((*shape, self.vocab), torch.nan)
        tops = self.like.new_zeros(shape) if self.greedy else None
        for group, part in parts:
            at = torch.tensor(group, device=device)
            ids[at] = part.ids
            if q is not None and part.q is not None:
                q[at] = part.q
            if tops is not None and part.top is not None:
                tops[at] = part.top.to(tops.dtype)
        return Drafted(ids, q, tops)

    def _verified(self, now: _Round, draft: Drafted, counts: Sequence[int]) -> _Verdict:
        """Accept a part of every draft and add one token."""
        for start, count in zip(now.starts, counts, strict=True):
            self.target.lm._check_fits(start + count)
        self._catch_up(self.target, range(len(counts)), now)
        levels = self.draft_len
        ids = draft.ids.clamp(min=0)
        block = torch.cat([now.last, ids], 1)
        logits = self.target.logits(now.everybody, now.first, max(now.starts) + levels, block)
        if self.greedy:
            laws, top = _likeliest(logits)
            accepted = (draft.ids == laws[:, :levels]).long().cumprod(1).sum(1, keepdim=True)
            token = laws.gather(1, accepted)
            drafter = draft.ids >= UNKNOWN if draft.top is None else draft.top < torch.inf
        else:
            laws = self.target.lm.warper(logits)
            assert draft.q is not None
            q = torch.cat([draft.q, torch.zeros_like(laws[:, :1])], 1)
            accepted, token, carried = rows.verify(laws, ids, q, now.tests)
            top, drafter = laws[..., 0], carried < torch.inf
        steps = torch.arange(levels + 1, device=ids.device)
        emitted = torch.where(steps == accepted, token, torch.cat([ids, token], 1))
        sound = (top < torch.inf).all(1, keepdim=True)
        return _Verdict(block, laws, emitted, torch.cat([emitted, accepted, sound, drafter], 1))

    def _taken(
        self, now: _Round, choices: Sequence[int], counts: Sequence[int], told: Floats
    ) -> list[tuple[int, ...]]:
        """Add each row's new tokens to its text, and return them; bench drafters whose laws are none."""
        levels, taken = self.draft_len, list[tuple[int, ...]]()
        for row, (query, start) in enumerate(zip(now.queries, now.starts, strict=True)):
            accepted, sound = told[row, levels + 1 : levels + 3]
            if not sound:
                raise ValueError(f"{self.target.lm.name} returned logits that are {_NAN}")
            if not told[row, levels + 3 :][: counts[row]].all():
                query.pool.bench(choices[row], f"its laws are {_NAN}")
            new = tuple(map(int, told[row, : int(accepted) + 1]))
            query.tokens.extend(new)
            taken.append(new)
            self.target.lengths[row] = start + len(new) - 1
            if (reader := self.readers.get(choices[row])) and counts[row]:
                reader.lengths[row] = start + min(len(new), levels) - 1
        return taken

    def _scores(self, now: _Round, verdict: _Verdict) -> Tensor:
        """Gamma, realised and whether these are numbers: of every drafter that reads, at every position.

        Returns:
            ``(rows, drafters * 3 * (draft_len + 1))``.
        """
        found, end = [], max(now.starts) + self.draft_len
        for reader in self.readers.values():
            self._catch_up(reader, range(len(now.queries)), now)
            logits = reader.logits(now.everybody, now.first, end, verdict.block)
            if self.greedy:
                likeliest, top = _likeliest(logits)
                gamma = realised = (likeliest == verdict.laws).double()
            else:
                top, law = logits.amax(-1), reader.lm.warper(logits).to(self.like.dtype)
                gamma, realised = _accepted(verdict.laws, law, verdict.emitted)
            found += [gamma.double(), realised.double(), (top < torch.inf).double()]
        return torch.cat([*found, self.like.new_empty(len(now.queries), 0).double()], 1)

    def _evaluated(
        self, now: _Round, verdict: _Verdict, emitted: Sequence[tuple[int, ...]], told: Floats
    ) -> list[tuple[Floats, Floats]]:
        """``gamma`` and ``realised`` of each row, ``(positions, n)``."""
        n, levels = self.n, self.draft_len
        found = np.zeros((len(emitted), n, 3, levels + 1))
        found[:, list(self.readers)] = told.reshape(len(emitted), -1, 3, levels + 1)
        self._bench(now, emitted, found[:, :, 2])
        for i in set(range(n)) - set(self.readers):
            found[:, i, :2] = self._host_scores(i, now, verdict, emitted)
        scores = []
        for row, (query, new) in enumerate(zip(now.queries, emitted, strict=True)):
            own = found[row, :, :2, : len(new)].copy()
            own[list(query.pool.benched)] = 0
            scores.append((own[:, 0].T, own[:, 1].T))
        return scores

    def _bench(self, now: _Round, emitted: Sequence[tuple[int, ...]], sound: Floats) -> None:
        """Bench who has no law for a text, or no room for it."""
        for row, query in enumerate(now.queries):
            length = now.starts[row] + len(emitted[row]) - 1
            for i, reader in self.readers.items():
                reader.lengths[row] = length
                if i in query.pool.benched:
                    continue
                query.pool.call(i, partial(_check_fits, length))
                if not sound[row, i, : len(emitted[row])].all():
                    query.pool.bench(i, f"ValueError: {reader.lm.name} returned logits that are {_NAN}")

    def _host_scores(
        self, i: int, now: _Round, verdict: _Verdict, emitted: Sequence[tuple[int, ...]]
    ) -> Floats:
        """Of a numpy drafter, ``(rows, 2, draft_len + 1)``; where laws are compared, one more wait."""
        law = torch.zeros(len(emitted), self.draft_len + 1, self.vocab, dtype=self.like.dtype)
        for row, (query, new) in enumerate(zip(now.queries, emitted, strict=True)):
            work = partial(_scored, query.tokens[:-1], now.starts[row])
            if (own := query.pool.call(i, work)) is not None:
                law[row, : len(new)] = own
        if self.greedy:
            tokens = [[*new, *[0] * (self.draft_len + 1 - len(new))] for new in emitted]
            hit = rows.at(law, torch.tensor(tokens))
            return np.stack([hit.double().numpy()] * 2, 1)
        scores = _accepted(verdict.laws, law.to(self.like.device), verdict.emitted)
        return np.asarray(torch.stack(scores, 1).double().tolist())


_NAN = "NaN or infinite"


def _propose(
    scheme: Levels, tokens: Sequence[int], vocab: int, draws: Sequence[float], drafter: LanguageModel
) -> Draft:
    return scheme.propose(_on_host(drafter), tokens, vocab, draws)


def _scored(tokens: Sequence[int], start: int, drafter: LanguageModel) -> Tensor:
    return cast(Tensor, _on_host(drafter).score(tokens, start))


def _likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of the largest logits, and these: ``(..., vocab)`` to ``(...,)``."""
    found = rows.likeliest(logits)
    return found, rows.at(logits, found)


def _accepted(p: Tensor, q: Tensor, emitted: Tensor) -> tuple[Tensor, Tensor]:
    """``nab.acceptance.Chain`` at every position, with no wait; ``(..., vocab)`` laws to ``(...,)``."""
    gamma = torch.minimum(p, q).sum(-1).clamp(max=1)
    carried, mass = (rows.at(law, emitted) for law in (q, p))
    return gamma, torch.minimum(carried, mass) / mass


def _check_fits(length: int, drafter: Any) -> None:
    drafter._check_fits(length)


def _vocabulary(lm: CausalLM) -> int:
    return len(lm._head.weight)


def _on_host(drafter: LanguageModel) -> LanguageModel:
    """A numpy drafter with its laws on the host."""
    return replace(cast(Lifted, drafter), device=torch.device("cpu"))


def check_models(target: CausalLM, drafters: Iterable[LanguageModel]) -> None:
    """Raise ValueError unless these can decode in a batch: see ``decode_batch``."""
    decoder_of(target)
    wanted = _vocabulary(target), target.device
    for drafter in drafters:
        if isinstance(drafter, Lifted):
            continue
        if not isinstance(drafter, CausalLM):
            kind, name = type(drafter).__name__, getattr(drafter, "name", "a drafter")
            raise ValueError(f"{name} cannot draft in a batch: it must be a CausalLM or a Lifted, got {kind}")
        decoder_of(drafter)
        if (own := (_vocabulary(drafter), drafter.device)) != wanted:
            raise ValueError(f"{drafter.name}: its laws must be like the target's, {wanted}, got {own}")


def decode_batch(
    target: CausalLM,
    drafters: Sequence[LanguageModel],
    selectors: Sequence[Chooses],
    prompts: Sequence[Sequence[int]],
    *,
    batch: int,
    draft_len: int,
    rngs: Sequence[Any],
    max_new_tokens: int,
    stop_tokens: Iterable[int] = (),
    pools: Sequence[Pool] | None = None,
) -> Iterator[dict[int, Round]]:
    """Decode prompts speculatively, up to ``batch`` of them together, each as ``nab.decode`` does it alone.

    Every query has the rounds, choices and text that ``nab.until(nab.decode(...))`` gives it with its
    selector and generator, as far as forwards of other shapes round alike. A round is one forward of the
    target, and one or more of each drafter, over all queries; where all drafters are ``CausalLM``s it waits
    for the device once. A query that ends leaves its place to the next prompt.

    Args:
        target: of Llama's family (see ``nab.backends.decoder``).
        drafters: such ``CausalLM``s, and ``Lifted`` numpy models, which draft on the host; n of them. Each
            query benches for itself those that fail, see ``nab.Pool``.
        selectors: a fresh one for each prompt. ``Selector``s of one learner learn together.
        prompts: token ids, one at least in each.
        batch: queries decoded together, at least 1.
        draft_len: drafted tokens per round; 0 is plain decoding.
        rngs: for each prompt, anything ``numpy.random.default_rng`` takes.
        max_new_tokens: of an answer, at least 1.
        stop_tokens: an answer ends behind the first of them.
        pools: for each prompt, a fresh ``Pool`` of the drafters without a limit, to see which are benched.

    Returns:
        The rounds of the batch, one after the other: by number of the prompt, the next ``Round`` of each that
        is decoded now. Its seconds are those of all, shared out equally; verification has what the host waits
        for a device that is still scoring drafters. They come in the order of prompts where these begin.

    Raises:
        ValueError: at once on numbers that are out of range or do not fit each other, a model that knows no
            batches, or a drafter whose laws are not like the target's; later on a text that does not fit the
            target's context, or if the target returns NaN.
    """
    least = {"batch": (batch, 1), "draft_len": (draft_len, 0), "max_new_tokens": (max_new_tokens, 1)}
    for name, (value, low) in least.items():
        whole(name, value, low)
    if pools is None:
        pools = [Pool(drafters) for _ in prompts]
    _check(drafters, prompts, selectors, rngs, pools)
    check_models(target, drafters)
    queries = [
        _Query(number, list(prompt), selector, np.random.default_rng(rng), pool, max_new_tokens)
        for number, (prompt, selector, rng, pool) in enumerate(
            zip(prompts, selectors, rngs, pools, strict=True)
        )
    ]
    engine = _Engine(target, drafters, min(batch, len(queries)), draft_len)
    return _rounds(engine, queries, batch, frozenset(stop_tokens))


def _rounds(
    engine: _Engine, queries: Iterable[_Query], batch: int, stops: frozenset[int]
) -> Iterator[dict[int, Round]]:
    waiting, live = deque(queries), list[_Query]()
    while waiting or live:
        while waiting and len(live) < batch:
            live.append(waiting.popleft())
        found, ended = dict[int, Round](), []
        for row, (query, round_) in enumerate(zip(live, engine.round(live), strict=True)):
            [cut] = until([round_], max_new_tokens=query.left, stop_tokens=stops)
            query.left -= len(cut.emitted)
            if query.left == 0 or cut.emitted[-1] in stops:
                ended.append(row)
            found[query.number] = cut
        for row in reversed(ended):
            engine.leave(row, len(live) - 1)
            live[row] = live[-1]
            live.pop()
        yield found


def _check(
    drafters: Sequence[LanguageModel],
    prompts: Sequence[Sequence[int]],
    selectors: Sequence[Chooses],
    rngs: Sequence[Any],
    pools: Sequence[Pool],
) -> None:
    """Raise ValueError unless each prompt has a token, a generator, a pool and a selector among drafters."""
    for name, given in (("selectors", selectors), ("rngs", rngs), ("pools", pools)):
        if len(given) != len(prompts):
            raise ValueError(f"{name} must be as many as prompts, {len(prompts)}, got {len(given)}")
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {number} must have a token at least, got none")
    if len(set(map(id, selectors))) < len(selectors):
        raise ValueError("each prompt needs a selector of its own, got one for several")
    for pool in pools:
        if list(pool.drafters) != list(drafters) or pool.limit is not None:
            raise ValueError(f"a pool must be of the same {len(drafters)} drafters, without a limit")
    for selector in selectors:
        if len(selector.probs) != len(drafters):
            raise ValueError(
                f"a selector chooses among {len(selector.probs)} drafters, there are {len(drafters)}"
            )
        within = list(_within(selector))
        if any(
            isinstance(each, Lazy) or isinstance(getattr(each, "objective", None), Time) for each in within
        ):
            raise ValueError(
                "a batch drafts as many tokens and scores all drafters in every round, so no selector can be "
                f"lazy or have the time objective, got {type(selector).__name__}"
            )


def _within(selector: Any) -> Iterator[Any]:
    """A selector and those that it stands around."""
    yield selector
    if isinstance(selector, Wrapped):
        yield from _within(selector._selector)
