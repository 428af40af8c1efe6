"""The hooks under engines that call them as vLLM and llama-cpp-python do, and do to rows what those do."""

import importlib
import sys
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from types import ModuleType, SimpleNamespace
from zlib import crc32

import numpy as np
import pytest
import torch
from test_drafters import naive_lookup

import nab
from nab.backends import texts
from nab.backends.drafters import Lookup
from nab.backends.llama_cpp import LlamaDraftModel
from nab.backends.texts import Text
from nab.backends.vllm import Proposer

POOL = {"short": Lookup(max_ngram=1), "long": Lookup(max_ngram=3, min_ngram=2)}
NAIVE = [(1, 1), (3, 2)]
DRAFT_LEN, LONGEST, ROWS = 3, 60, 4


class Noting:
    """A learner that keeps what it is told."""

    inner = nab.NormalHedge()

    def init(self, n, batch=None, *, prior=None):
        return self.inner.init(n), ()

    def probs(self, state):
        return self.inner.probs(state[0])

    def update(self, state, losses, played=None):
        return self.inner.update(state[0], losses, played), (*state[1], (losses.tolist(), played.tolist()))


def noting(seed):
    return nab.Selector(Noting(), 2, rng=seed)


def naive_draft(tokens, choice, most):
    found = []
    while len(found) < most:
        token = naive_lookup([*tokens, *found], *NAIVE[choice])
        if token is None:
            break
        found.append(token)
    return found


def config(**changed):
    numbers = {"max_model_len": 30, "max_num_seqs": 2, "num_speculative_tokens": 4, **changed}
    return SimpleNamespace(
        speculative_config=SimpleNamespace(num_speculative_tokens=numbers["num_speculative_tokens"]),
        model_config=SimpleNamespace(max_model_len=numbers["max_model_len"]),
        scheduler_config=SimpleNamespace(max_num_seqs=numbers["max_num_seqs"]),
    )


@dataclass
class Request:
    """A prompt and the answer that the target will give to it, token for token."""

    prompt: list
    answer: list
    unread: int = 1  # steps until the prompt is read
    away: int = 0  # steps until it comes back
    given: int = 0
    draft: list = field(default_factory=list)
    steps: list = field(default_factory=list)  # (tokens before, draft, emitted)

    @property
    def tokens(self):
        return self.prompt + self.answer[: self.given]


class Engine:
    """A batch as vLLM's: its rows move, come in parts, are preempted, and hold rubbish behind the text."""

    def __init__(self, served, seed, kind=Proposer, as_tensor=False):
        self.rounds, self.selectors = defaultdict(list), []
        self.proposer = kind(
            config(max_model_len=LONGEST, max_num_seqs=ROWS, num_speculative_tokens=DRAFT_LEN),
            drafters=POOL,
            selector=self.selector,
            seed=5,
            most=len(served),
            watch=lambda number, round_: self.rounds[number].append(round_),
        )
        self.proposer.load_model(None)
        self.waiting, self.running, self.rng = [*served], [], np.random.default_rng(seed)
        self.as_tensor = as_tensor

    def selector(self, seed):
        self.selectors.append(noting(seed))
        return self.selectors[-1]

    def run(self):
        """To the end of all requests."""
        for _ in range(400):
            if not (self.waiting or self.running):
                return
            self.schedule()
            before, sampled = (
                zip(*map(self.verified, self.running), strict=True) if self.running else ((), ())
            )
            drafts = self.propose([*sampled])
            for request, old, new, draft in zip(self.running, before, sampled, drafts, strict=True):
                if new:
                    request.steps.append((old, request.draft, new))
                else:
                    assert draft == []
                request.draft = draft
            self.leave()
        raise AssertionError("the engine never ends")

    def schedule(self):
        """Fill the rows, in another order than before."""
        for request in self.waiting:
            request.away -= 1
        for request in [each for each in self.waiting if each.away <= 0][: ROWS - len(self.running)]:
            self.waiting.remove(request)
            self.running.append(request)
        self.rng.shuffle(self.running)

    def verified(self, request):
        """The tokens before, and those that the target emits now; some drafts are cut by the scheduler."""
        old, new = request.tokens, []
        if request.unread:
            request.unread -= 1
            return old, new
        most = self.rng.integers(DRAFT_LEN + 1) if self.rng.random() < 0.2 else DRAFT_LEN
        for token in request.answer[request.given :]:
            new.append(token)
            if len(new) > len(request.draft[:most]) or token != request.draft[len(new) - 1]:
                break
        request.given += len(new)
        return old, new

    def propose(self, sampled):
        """What vLLM calls, with what it has."""
        ids = self.rng.integers(0, 3, (ROWS, LONGEST)).astype(np.int32)
        lengths = np.zeros(ROWS, dtype=np.int32)
        for row, request in enumerate(self.running):
            lengths[row] = len(request.tokens)
            ids[row, : lengths[row]] = request.tokens
        if self.as_tensor:
            ids, lengths = torch.from_numpy(ids), torch.from_numpy(lengths)
        return self.proposer.propose(sampled, lengths, ids, slot_mappings=None)

    def leave(self):
        """Some are done; some are preempted: their draft is lost, their text is read again."""
        for request in [*self.running]:
            if request.given == len(request.answer):
                self.running.remove(request)
            elif self.rng.random() < 0.1:
                self.running.remove(request)
                self.waiting.append(request)
                request.unread, request.away, request.draft = *self.rng.integers(0, 4, 2).tolist(), []


def requests(seed, twins=False):
    """Answers that repeat themselves and their prompts, some of these the same; ``twins`` come twice."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 3, size).tolist() for size in (4, 9, 17)]
    found = []
    for prompt in (prompts[0], prompts[0], prompts[0], prompts[1], prompts[1], prompts[2]):
        motif = rng.integers(0, 3, 6).tolist()
        answer = [t for _ in range(6) for t in motif[: rng.integers(2, 7)]]
        found.append(Request(prompt, answer[: LONGEST - len(prompt)], unread=int(rng.integers(3))))
    more = [replace(each, unread=int(rng.integers(3)), steps=[]) for each in found] if twins else []
    return [*found, *more]


def run(seed, twins=False, **options):
    served = requests(seed, twins)
    engine = Engine(served, seed, **options)
    engine.run()
    return engine, served


def rounds_of(request):
    """(start, emitted) of all but the first step, which only starts the text."""
    return [(len(old), tuple(new)) for old, _, new in request.steps[1:]]


def check(engine, served):
    """Every request had one text to itself, which drafted and learned as a naive replay of it does."""
    told = {number: [(r.start, r.emitted) for r in rounds] for number, rounds in engine.rounds.items()}
    assert sorted(told.values()) == sorted(rounds_of(each) for each in served if len(each.steps) > 1)
    assert len(engine.selectors) == len(served) + 1  # the first one was made to see whether it fits
    for number, mine in told.items():
        request = next(each for each in served if rounds_of(each) == mine)
        (old, _, new), *steps = request.steps
        replayed = check_learned(engine, number, [*old, *new])
        for round_, choice, (old, draft, _) in zip(engine.rounds[number], replayed, steps, strict=True):
            assert round_.choice == choice
            whole = naive_draft(old, choice, min(DRAFT_LEN, LONGEST - len(old) - 1))
            assert draft in ([], whole)  # none if it was preempted
            assert round_.drafted == len(whole)


def check_learned(engine, number, tokens):
    """What a naive replay of a text's rounds learns is what was learned; the choices of that replay."""
    replayed = noting([5, crc32(np.array(tokens, dtype=np.int64).tobytes())])
    choices, losses = [], []
    for round_ in engine.rounds[number]:
        assert round_.start == len(tokens)
        choices.append(replayed.choice)
        scores = []
        for token in round_.emitted:
            scores.append([float(naive_lookup(tokens, *ngram) == token) for ngram in NAIVE])
            losses.append([1 - score for score in scores[-1]])
            tokens = [*tokens, token]
        found = np.array(scores)
        replayed.observe(len(round_.emitted), lambda found=found: (found, found))
    learned = engine.selectors[number + 1].state[1]
    assert [loss for loss, _ in learned] == losses
    assert learned == replayed.state[1]  # with the laws that were played
    return choices


@pytest.mark.parametrize("seed", range(12))
def test_vllm_rows_that_move_return_and_share_prompts_learn_each_their_own(seed):
    engine, served = run(seed)
    check(engine, served)
    drafted = sum(r.drafted for rounds in engine.rounds.values() for r in rounds)
    accepted = sum(r.accepted for rounds in engine.rounds.values() for r in rounds)
    assert 0 < accepted < drafted


@pytest.mark.parametrize("seed", range(12))
def test_vllm_requests_alike_share_no_state_and_lose_none(seed):
    """Where two have the same tokens, each goes on with either's text: both texts are what both emitted."""
    engine, served = run(seed, twins=True)
    assert len(engine.selectors) == len(served) + 1
    told = Counter((r.start, r.emitted) for rounds in engine.rounds.values() for r in rounds)
    assert told == Counter(each for request in served for each in rounds_of(request))
    for number, rounds in engine.rounds.items():
        answered = [token for round_ in rounds for token in round_.emitted]
        request = next(
            each
            for each in served
            if each.tokens[rounds[0].start :] == answered
            and len(each.tokens) == rounds[0].start + len(answered)
        )
        check_learned(engine, number, request.tokens[: rounds[0].start])


def test_vllm_tensors_do_as_well_as_arrays():
    check(*run(0, as_tensor=True))


def test_texts_whose_hashes_collide_are_told_apart(monkeypatch):
    monkeypatch.setattr(texts, "_key", lambda tokens: 0)
    check(*run(3))


@pytest.mark.parametrize("seed", range(3))
def test_texts_known_by_their_prompt_alone_would_be_caught(monkeypatch, seed):
    alike = lambda self, tokens: tokens[:4].tolist() == self.tokens[:4].tolist()  # noqa: E731
    monkeypatch.setattr(Text, "continues", alike)
    monkeypatch.setattr(texts, "_key", lambda tokens: 0)
    with pytest.raises((AssertionError, ValueError, StopIteration)):
        check(*run(seed))


class ByRow(Proposer):
    """Takes a row for the text that stood there before."""

    def propose(self, sampled_token_ids, num_tokens_no_spec, token_ids_cpu, slot_mappings=None):
        kept = vars(self).setdefault("kept", {})
        drafts = [[] for _ in sampled_token_ids]
        for row, new in enumerate(sampled_token_ids):
            if new:
                if row in kept:
                    kept[row]._drafted = new[:-1]
                    kept[row].extend(new)
                else:
                    kept[row] = self.texts.take(token_ids_cpu[row, : num_tokens_no_spec[row]], len(new))
                drafts[row] = kept[row].draft()
        return drafts


def test_texts_known_by_their_row_would_be_caught():
    with pytest.raises((AssertionError, StopIteration)):
        check(*run(1, kind=ByRow))


def proposed(proposer, *rows, sampled=None):
    ids = np.zeros((len(rows), 64), dtype=np.int32)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = tokens
    lengths = np.array([len(tokens) for tokens in rows], dtype=np.int32)
    new = [tokens[-1:] for tokens in rows] if sampled is None else sampled
    return proposer.propose(new, lengths, ids, slot_mappings={"layer": None})


def test_drafts_fit_the_model_with_the_token_behind_them():
    for room in range(6):
        proposer = Proposer(config(max_model_len=6 + room))
        assert len(proposed(proposer, [0, 1, 0, 1, 0, 1])[0]) == max(0, min(4, room - 1))


def test_finished_texts_are_forgotten_and_as_many_are_kept_as_may_run_and_wait():
    proposer = Proposer(config(max_num_seqs=3))
    for token in range(50):
        proposed(proposer, [token, 7], [token, 8])
        assert len(proposer.texts) <= 6
    assert len(proposer.texts) == 6
    assert len(Proposer(config(), most=17).texts._kept) == 0


def test_no_row_and_rows_that_only_read_leave_nothing_behind():
    proposer = Proposer(config())
    assert proposed(proposer) == []
    assert proposed(proposer, [0, 1, 0], [1, 1, 1], sampled=[[], []]) == [[], []]
    assert len(proposer.texts) == 0


def test_of_texts_alike_each_row_gets_one_that_its_tokens_go_on_with():
    """Two rows with the same tokens and other drafts: the one that accepted more is not robbed of its own."""
    chosen = iter([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    pool = {"one": Lookup(max_ngram=1), "two": Lookup(max_ngram=1, vote=True)}
    seen = defaultdict(list)
    proposer = Proposer(
        config(),
        drafters=pool,
        selector=lambda seed: nab.Constant(next(chosen)),
        watch=lambda number, round_: seen[number].append(round_.emitted),
    )
    text = [0, 1, 0, 1, 0, 2, 0]
    drafts = proposed(proposer, text, text)
    assert drafts[0][0] == 2
    assert drafts[1][0] == 1
    for tokens in ((2, 5), (1, 5)):
        fresh = Proposer(config(), drafters=pool, selector=lambda seed: nab.Constant([1.0, 0.0]))
        assert proposed(fresh, [*text, *tokens], sampled=[list(tokens)])  # a new text is no error
    proposed(proposer, [*text, 5], [*text, 2, 5], sampled=[[5], [2, 5]])
    assert seen == {0: [(2, 5)], 1: [(5,)]}


def test_vllm_finds_the_class_by_its_name_and_a_subclass_chooses_for_itself():
    path = "nab.backends.vllm.Proposer"
    module, name = path.rsplit(".", 1)
    found = getattr(importlib.import_module(module), name)(config())
    assert found.texts.names == list(texts.DRAFTERS)
    assert callable(found.propose)

    class Mine(Proposer):
        def __init__(self, vllm_config):
            super().__init__(vllm_config, drafters={"own": Lookup(min_ngram=2)})

    assert proposed(Mine(config()), [0, 1, 0], [0, 1, 0, 1]) == [[], [0, 1, 0, 1]]


# --- llama-cpp-python ---


class Llama:
    """Generates as ``llama_cpp.Llama`` does with a draft model: one buffer, drafts cut at its end."""

    def __init__(self, draft_model, n_ctx=64):
        self.draft_model, self.n_ctx = draft_model, n_ctx
        self.input_ids = np.zeros(n_ctx, dtype=np.intc)

    def generate(self, prompt, answer):
        """Tokens of the answer; what was drafted and accepted stands in ``rounds``."""
        self.rounds, given, draft = [], 0, []
        while given < len(answer):
            new = []
            for token in answer[given:]:
                new.append(token)
                yield token
                if len(new) > len(draft) or token != draft[len(new) - 1]:
                    break
            given += len(new)
            self.rounds.append((draft, new))
            text = [*prompt, *answer[:given]]
            self.input_ids[: len(text)] = text
            found = self.draft_model(self.input_ids[: len(text)])
            assert found.dtype == np.intc
            draft = found.astype(int)[: self.n_ctx - len(text)].tolist()
            self.input_ids[len(text) :] = 99  # the buffer is the engine's, and written over


@pytest.mark.parametrize("seed", range(6))
def test_llama_learns_what_its_tokens_say(seed):
    seen, selectors = defaultdict(list), []

    def selector(seed):
        selectors.append(noting(seed))
        return selectors[-1]

    watch = lambda number, round_: seen[number].append(round_)  # noqa: E731
    model = LlamaDraftModel(POOL, draft_len=DRAFT_LEN, selector=selector, seed=5, watch=watch)
    engine, accepted = Llama(model), 0
    for number, request in enumerate(requests(seed)[:6]):
        assert list(engine.generate(request.prompt, request.answer)) == request.answer
        rounds, tokens, losses = engine.rounds, [*request.prompt, *engine.rounds[0][1]], []
        assert [round_.emitted for round_ in seen[number]] == [tuple(new) for _, new in rounds[1:]]
        for round_, (draft, new) in zip(seen[number], rounds[1:], strict=True):
            assert draft == naive_draft(tokens, round_.choice, DRAFT_LEN)[: engine.n_ctx - len(tokens)]
            accepted += round_.accepted
            for token in new:
                losses.append([1 - float(naive_lookup(tokens, *ngram) == token) for ngram in NAIVE])
                tokens.append(token)
        assert [loss for loss, _ in selectors[number + 1].state[1]] == losses
    assert accepted > 20
    assert len(model.texts) == 1


def test_llama_starts_afresh_unless_the_text_goes_on():
    model = LlamaDraftModel(draft_len=2)
    draft = model(np.array([0, 1, 0], dtype=np.intc))
    assert draft.tolist() == [1, 0]
    first = model.texts._begun
    model(np.array([0, 1, 0, 1, 2], dtype=np.intc))
    assert model.texts._begun == first
    for other in ([0, 1, 0, 1, 2, 2, 2], [1, 1, 0], [1, 1], [1, 1], [3]):
        model(np.array(other, dtype=np.intc))
        first += 1
        assert model.texts._begun == first
    assert len(model.texts) == 1


def test_llama_gets_an_empty_draft_where_nothing_is_known():
    found = LlamaDraftModel()(np.array([5], dtype=np.intc), anything="else")
    assert found.shape == (0,)
    assert found.dtype == np.intc


def test_a_llama_draft_model_is_one_of_llama_cpp_where_that_is_installed(monkeypatch):
    class Base(ABC):
        @abstractmethod
        def __call__(self, input_ids, /, **kwargs): ...

    class Own(LlamaDraftModel):
        pass

    Base.__name__ = "LlamaDraftModel"
    package, module = ModuleType("llama_cpp"), ModuleType("llama_cpp.llama_speculative")
    module.LlamaDraftModel, package.llama_speculative = Base, module
    monkeypatch.setitem(sys.modules, "llama_cpp", package)
    monkeypatch.setitem(sys.modules, "llama_cpp.llama_speculative", module)
    assert isinstance(LlamaDraftModel(), Base)
    assert isinstance(Own(), Base)


def test_it_works_where_llama_cpp_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    assert LlamaDraftModel(draft_len=1)(np.array([0, 1, 0], dtype=np.intc)).tolist() == [1]
