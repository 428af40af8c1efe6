"""nab inside transformers' ``generate``: the same ids, scores and stops as without it."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import cache

import pytest
import tiny
import torch
from test_heads import head_model
from transformers import (
    AutoModelForCausalLM,
    EosTokenCriteria,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessor,
    LogitsProcessorList,
    MambaConfig,
    MambaForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    StoppingCriteria,
    StoppingCriteriaList,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.generation.streamers import BaseStreamer

from nab.backends import int8
from nab.backends.assisted import HOOK, Candidates
from nab.backends.drafters import NGram
from nab.backends.hf import Speculative
from nab.backends.pretrained import Pretrained
from nab.backends.torch import early_exit
from nab.learners import Hedge
from nab.losses import Length, Token
from nab.pool import DrafterWarning

PAD, LENGTH, EPS = 0, 24, torch.finfo(torch.float32).eps
ROW = torch.randint(1, tiny.VOCAB, (1, 20), generator=torch.Generator().manual_seed(0))
GREEDY = {"do_sample": False, "pad_token_id": PAD, "max_new_tokens": LENGTH}
OBJECTIVES = {"token": Token(), "length": Length(4), "time": None}
PROCESSED = {
    "none": {},
    "penalties": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_new_tokens": 8},
    "forced": {
        "forced_eos_token_id": 5,
        "suppress_tokens": [3, 4],
        "sequence_bias": {(7,): 3.0, (9, 8): 1.0},
    },
    "decayed": {
        "exponential_decay_length_penalty": (4, 1.1),
        "eos_token_id": 11,
        "bad_words_ids": [[6], [2, 1]],
    },
}
every_architecture = pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)


@cache
def models(architecture):
    """The target, a copy that agrees with it often, one that seldom does, and its first layers."""
    model = tiny.ARCHITECTURES[architecture]().train(False)
    return model, tiny.perturbed(model, 0.015), tiny.perturbed(model, 0.5), early_exit(model, 2)


def drafters(architecture):
    table = NGram.fit([ROW[0].numpy()] * 2, tiny.VOCAB)
    return {
        **dict(zip(["near", "far", "shallow"], models(architecture)[1:], strict=True)),
        "lookup": "lookup",
        "table": table,
    }


def padded(*lengths):
    """Rows of ``ROW`` of these lengths, padded on the left."""
    width = max(lengths)
    ids, mask = torch.full((len(lengths), width), PAD), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, width - length :], mask[row, width - length :] = ROW[0, :length], 1
    return {"input_ids": ids, "attention_mask": mask}


def both(architecture, inputs, hook, **options):
    """Outputs of ``generate`` without and with a hook."""
    options = GREEDY | options
    model = models(architecture)[0]
    return model.generate(**inputs, **options), model.generate(**inputs, **options, custom_generate=hook)


def answered(hook, model, inputs):
    """What ``generate`` gives with a hook of either kind."""
    if isinstance(hook, Candidates):
        return hook.generate(model, **inputs, **GREEDY)
    return model.generate(**inputs, **GREEDY, custom_generate=hook)


@every_architecture
@pytest.mark.parametrize("processed", PROCESSED)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_ids_and_scores_are_those_of_generate(architecture, processed, objective):
    hook = Speculative(drafters(architecture), objective=OBJECTIVES[objective])
    kept = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    plain, found = both(architecture, padded(20), hook, **PROCESSED[processed], **kept)
    assert found.sequences.tolist() == plain.sequences.tolist()
    for ours, theirs in ((found.scores, plain.scores), (found.logits, plain.logits)):
        assert len(ours) == len(theirs)
        # float64 rounded to float32 in other orders of summation, then at most three operations
        torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=4 * EPS, atol=0)
    assert found.metrics["num_tokens"] == found.sequences.shape[1] - 20
    if objective != "time":  # which may find that nothing is worth drafting
        assert found.metrics["mean_acceptance_length"] > 1


@every_architecture
@pytest.mark.parametrize("processed", PROCESSED)
def test_ragged_rows_are_those_of_generate(architecture, processed):
    hook = Speculative(drafters(architecture), objective=Token())
    plain, found = both(architecture, padded(20, 3, 11), hook, **PROCESSED[processed])
    assert found.tolist() == plain.tolist()
    assert len(hook.queries) == 3


@every_architecture
@pytest.mark.parametrize("new", [1, 2, 3, 7])
def test_an_answer_may_end_inside_a_draft(architecture, new):
    """By its length; by a token that the target and a copy of it agree on; by either of two tokens."""
    same = Speculative([models(architecture)[0]], objective=Token())  # accepts all of each draft
    plain, found = both(architecture, padded(20), same, max_new_tokens=new)
    assert found.tolist() == plain.tolist()
    assert [len(round_.emitted) for round_ in same.queries[0].rounds] == {1: [1], 2: [2], 3: [3], 7: [5, 2]}[
        new
    ]
    whole = both(architecture, padded(20), same)[0][0, 20:].tolist()
    for ends in (whole[new], [tiny.VOCAB - 2, whole[new]]):
        plain, found = both(architecture, padded(20, 9), same, eos_token_id=ends)
        assert found.tolist() == plain.tolist()


class Switched(LogitsProcessor):
    """Bans the tokens of a row's last two, and more in row 1: depends on ids and on the row."""

    def __call__(self, input_ids, scores):
        banned = scores.scatter(1, input_ids[:, -2:], -torch.inf)
        banned[1:, ::2] = -torch.inf
        return banned


class Sum(StoppingCriteria):
    """Ends a row at a token that depends on the one before it."""

    def __call__(self, input_ids, scores, **_):
        return input_ids[:, -2:].sum(1) % 7 == 0


def test_processors_and_criteria_of_ones_own():
    hook = Speculative(drafters("llama"), objective=Token())
    own = {
        "logits_processor": LogitsProcessorList([Switched()]),
        "stopping_criteria": StoppingCriteriaList([Sum(), EosTokenCriteria(torch.tensor([77]))]),
    }
    plain, found = both("llama", padded(20, 12), hook, **own)
    assert found.tolist() == plain.tolist()
    assert found.shape[1] < 20 + LENGTH
    allowed = {"prefix_allowed_tokens_fn": lambda row, ids: range(1, 40) if row else range(40, 90)}
    plain, found = both("llama", padded(20, 12), hook, **allowed)
    assert found.tolist() == plain.tolist()


def test_criteria_are_shown_the_scores_so_far():
    seen = []

    class Watching(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            seen.append((input_ids.tolist(), scores and [each.argmax().item() for each in scores]))
            return torch.zeros(len(input_ids), dtype=torch.bool)

    hook = Speculative(drafters("llama"), objective=Token())
    criteria = {"stopping_criteria": StoppingCriteriaList([Watching()])}
    both("llama", padded(20), hook, **criteria)
    kept = {"return_dict_in_generate": True, "output_scores": True}
    both("llama", padded(20), hook, **criteria, **kept)
    parts = [seen[k * LENGTH : (k + 1) * LENGTH] for k in range(4)]
    assert parts[0] == parts[1]
    assert parts[2] == parts[3]
    assert [scores for _, scores in parts[0]] == [None] * LENGTH
    assert parts[2][-1][1] == parts[2][-1][0][0][20:]


class Listener(BaseStreamer):
    def __init__(self):
        self.heard, self.ended = [], False

    def put(self, value):
        self.heard.extend(value.flatten().tolist())

    def end(self):
        self.ended = True


def test_a_streamer_hears_every_token():
    streamer = Listener()
    hook = Speculative(drafters("llama"), streamer=streamer)
    found = both("llama", padded(20), hook)[1]
    assert streamer.heard == found[0].tolist()
    assert streamer.ended
    with pytest.raises(ValueError, match="a streamer shows one row, got a batch of 2"):
        both("llama", padded(20, 3), hook)


def test_sampled_texts_repeat_with_torchs_seed():
    hook = Speculative(drafters("llama"), objective=Token())
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(
            both("llama", padded(20), hook, do_sample=True, temperature=0.7, top_k=50, top_p=0.9)[1].tolist()
        )
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("kind", [Speculative, Candidates])
def test_greedy_answers_leave_torchs_generator_as_it_is(kind):
    hook, before = kind(drafters("llama"), objective=Token()), torch.get_rng_state()
    answered(hook, models("llama")[0], padded(9))
    assert torch.equal(torch.get_rng_state(), before)


def test_num_return_sequences_are_rows():
    hook = Speculative(drafters("llama"), objective=Token())
    found = both("llama", padded(20), hook, do_sample=True, num_return_sequences=3)[1]
    assert len({tuple(row) for row in found.tolist()}) == 3


def test_metrics_are_of_the_whole_answer():
    """Also where a lazy selector left positions out, and of the same drafters under the same processors."""
    model = models("llama")[0]
    alike = Speculative({"same": model, "far": models("llama")[2]})
    both("llama", padded(20, 9), alike, repetition_penalty=1.3)
    metrics = alike.metrics
    assert metrics["num_tokens"] == 2 * LENGTH
    assert all(len(query.scores()[0]) == LENGTH for query in alike.queries)
    assert metrics["single_drafters"]["same"] == 2 * LENGTH / (2 * -(-LENGTH // 5))
    assert Speculative(["lookup"]).metrics == {}


def test_what_is_returned_can_be_sent_elsewhere():
    hook = Speculative(drafters("llama"), objective=Token())
    found = both("llama", padded(20, 9), hook, return_dict_in_generate=True, output_scores=True)[1]
    for copied in (pickle.loads(pickle.dumps(found)), deepcopy(found)):
        assert copied.metrics == found.metrics != {}
        assert copied.sequences.tolist() == found.sequences.tolist()
        assert torch.equal(torch.stack(copied.scores), torch.stack(found.scores))


def test_models_in_training_drop_nothing_and_go_on_training():
    """Of target and drafter, modules that were frozen in eval mode stay so."""
    target, drafter = (
        GPT2LMHeadModel(GPT2Config(vocab_size=257, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0.5)).double()
        for _ in range(2)
    )
    hook = Speculative([drafter], objective=Token())
    plain = target.train(False).generate(**padded(20), **GREEDY).tolist()
    for each in (target, drafter):
        each.train()
        each.transformer.h[0].mlp.train(False)
    modes = [module.training for each in (target, drafter) for module in each.modules()]
    for _ in range(2):
        assert target.generate(**padded(20), **GREEDY, custom_generate=hook).tolist() == plain
        assert Candidates([drafter]).generate(target, **padded(20), **GREEDY).tolist() == plain
        assert hook.metrics["num_tokens"] == LENGTH
        assert [module.training for each in (target, drafter) for module in each.modules()] == modes
    assert set(modes) == {False, True}


def test_a_hook_follows_another_model_and_other_settings():
    hook = Speculative(["lookup", "early-exit"], objective=Token())
    for architecture, options in (
        ("llama", {}),
        ("gpt2", {}),
        ("gpt2", {"repetition_penalty": 1.5}),
        ("gpt2", {}),
    ):
        plain, found = both(architecture, padded(20), hook, **options)
        assert found.tolist() == plain.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "greedy search or sampling, got beam_search"),
        ({"prompt_lookup_num_tokens": 3}, "greedy search or sampling, got assisted_generation"),
        ({"return_dict_in_generate": True, "output_attentions": True}, "output_attentions and"),
        ({"guidance_scale": 1.5}, "UnbatchedClassifierFreeGuidanceLogitsProcessor keeps a state"),
        ({"position_ids": torch.arange(5, 25)[None]}, "position_ids must count"),
        ({"attention_mask": torch.tensor([[1] * 10 + [0] * 10])}, "padding on the left alone"),
        ({"attention_mask": torch.tensor([[1, 0] * 10])}, "padding on the left alone"),
        ({"token_type_ids": torch.ones(1, 20, dtype=torch.long)}, "token_type_ids is unknown"),
    ],
)
def test_what_is_not_known_is_named(options, message):
    model = models("gpt2")[0] if "token_type_ids" in options else models("llama")[0]
    with pytest.raises(ValueError, match=message):
        model.generate(**{**padded(20), **options}, max_new_tokens=4, custom_generate=Speculative(["lookup"]))


def test_models_that_do_not_fit_are_named():
    encoder = T5ForConditionalGeneration(
        T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    with pytest.raises(ValueError, match="only decoders can be speculated for, got T5"):
        encoder.generate(
            ROW % 20, max_new_tokens=4, custom_generate=Speculative(["lookup"]), decoder_start_token_id=0
        )
    recurrent = MambaForCausalLM(MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1))
    with pytest.raises(ValueError, match="keeps a recurrent state, which cannot be rewound: Mamba"):
        recurrent.generate(ROW % 20, max_new_tokens=4, custom_generate=Speculative(["lookup"]))
    shallow, adapted = tiny.llama(5, num_hidden_layers=2), tiny.llama(5)
    adapted.model.layers[0].mlp.up_proj = torch.nn.Sequential(adapted.model.layers[0].mlp.up_proj)
    for model, message in (
        (shallow, "early exit must be after 1 to 1 of 2 layers, got 2"),
        (
            adapted,
            r"early exit takes the layers of a plain LlamaForCausalLM: no model\.layers\.0\.mlp\.up_proj",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(**padded(9), max_new_tokens=4, custom_generate=Speculative(["early-exit"]))
    other = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(
        ValueError, match="drafter small has another vocabulary than the target: 100 tokens, not 257"
    ):
        both("llama", padded(20), Speculative({"small": other}))
    for given, message in (
        ([], "drafters must be at least one, got none"),
        ("lookup", "drafters must be a sequence or a mapping, got str"),
        (None, "drafters must be a sequence or a mapping, got NoneType"),
        ([3], "a drafter must be a model, a name or a path, got 3"),
        (["json"], "drafter 'json' needs the target's tokenizer: without, there are lookup and early-exit"),
    ):
        for hook in (Speculative, Candidates):
            with pytest.raises(ValueError, match=message):
                hook(given)
    with pytest.raises(ValueError, match=r"draft_len must be .*at least 1, got 0"):
        Speculative(["lookup"], draft_len=0)
    for learner in ("hedge", Hedge):
        with pytest.raises(ValueError, match=r"learner must be one of nab\.learners or the like, got ['<]"):
            Speculative(["lookup"], learner=learner)
    for objective in ("token", Token):
        with pytest.raises(ValueError, match=r"objective must be one of nab\.losses or the like, got ['<]"):
            Candidates(["lookup"], objective=objective)
    with pytest.raises(ValueError, match="input_ids must be token ids, at least 0, got -3"):
        models("llama")[0].generate(
            ROW[:, :3] * 0 - 3, max_new_tokens=4, custom_generate=Speculative(["lookup"])
        )
    with pytest.raises(ValueError, match="max_time is that of all rows together: give one, got 2"):
        both("llama", padded(20, 3), Speculative(["lookup"]), max_time=60.0)
    beams = GenerationConfig(num_beams=2)
    for options in ({"num_beams": 2}, {"generation_config": beams}, {"prompt_lookup_num_tokens": 3}):
        with pytest.raises(
            ValueError, match="num_beams must be 1, and prompt_lookup_num_tokens is given here"
        ):
            Candidates(["lookup"]).generate(models("llama")[0], **padded(9), **options)
    with pytest.raises(ValueError, match="assistant_model must be None: drafters are given to the constr"):
        Candidates(["lookup"]).generate(models("llama")[0], **padded(9), assistant_model=models("llama")[1])
    cacheless = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=20, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="keeps nothing of what it has read: OpenAIGPTLMHeadModel"):
        cacheless.generate(ROW % 20, max_new_tokens=4, custom_generate=Speculative(["lookup"]))


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


def test_drafters_with_another_tokenizer_are_named(tmp_path):
    """By what their folders say; also where the target has its tokenizer from elsewhere."""
    target = loaded(tiny.save(tmp_path / "target", tiny.llama()))
    fitting = loaded(tiny.save(tmp_path / "fitting", tiny.llama(1)))
    other = loaded(tiny.save(tmp_path / "other", tiny.llama(2), tiny.tokenizer(missing=1)))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD}
    plain = target.generate(**padded(9), **options)
    found = target.generate(**padded(9), **options, custom_generate=Speculative([fitting, "lookup"]))
    assert found.tolist() == plain.tolist()
    for hook in (Speculative([other]), Speculative([other], tokenizer=tiny.tokenizer())):
        with pytest.raises(
            ValueError, match=f"drafter other has another tokenizer than the target, at {tmp_path}"
        ):
            target.generate(**padded(9), **options, custom_generate=hook)
    assert models("llama")[0].generate(**padded(9), **options, custom_generate=Speculative([other])).shape


def save_head(file, target):
    """A random head, as a drafter's file."""
    head = head_model(target)
    known = Pretrained("target", target, tiny.tokenizer()).vocabulary
    about = {"kind": "head", "vocabulary": known, "shape": head.shape.to_json(), "width": "32"}
    int8.save(head.state_dict(), file, about)


@pytest.mark.parametrize("sampled", [{"do_sample": False}, {"do_sample": True, "temperature": 0.7}])
def test_folders_and_heads_by_name_with_a_tokenizer(tmp_path, sampled):
    folder = tiny.save(tmp_path / "small", tiny.perturbed(tiny.llama(), 0.015))
    target = loaded(tiny.save(tmp_path / "target", tiny.llama()))
    head = tmp_path / "head.safetensors"
    save_head(head, target)
    even = Hedge(rate=1e-9)
    hook = Speculative([head, folder, "lookup"], tokenizer=tiny.tokenizer(), objective=Token(), learner=even)
    torch.manual_seed(0)
    options = {"max_new_tokens": LENGTH, "pad_token_id": PAD, **sampled}
    found = target.generate(**padded(20), **options, custom_generate=hook)
    assert list(hook.metrics["choice_share"]) == ["head", "small", "lookup"]
    assert not hook.metrics["benched"]
    assert all(hook.metrics["choice_share"].values())
    if not sampled["do_sample"]:
        assert found.tolist() == target.generate(**padded(20), **options).tolist()
    with pytest.raises(ValueError, match="drafter head reads hidden states"):
        Candidates([head], tokenizer=tiny.tokenizer()).generate(target, **padded(20), **options)


def test_drafters_of_one_kind_have_names_of_their_own():
    hook = Speculative([models("llama")[1], models("llama")[2], "lookup"], objective=Token())
    both("llama", padded(20), hook)
    assert list(hook.metrics["choice_share"]) == ["LlamaForCausalLM", "LlamaForCausalLM#2", "lookup"]


@every_architecture
@pytest.mark.parametrize("processed", PROCESSED)
def test_transformers_verifies_candidates(architecture, processed):
    for objective in OBJECTIVES.values():
        candidates = Candidates(drafters(architecture), objective=objective)
        options = GREEDY | PROCESSED[processed]
        model = models(architecture)[0]
        found = candidates.generate(model, **padded(20), **options)
        assert found.tolist() == model.generate(**padded(20), **options).tolist()
        assert candidates.query.tokens == found[0, 20:].tolist()
        assert candidates.metrics["num_tokens"] == len(candidates.query.scores()[0]) == found.shape[1] - 20
        assert HOOK not in vars(model)


def test_candidates_learn_what_the_loop_learns():
    """At temperature 0 drafters are scored alike, whoever verifies."""
    loop, candidates = (kind(drafters("llama"), objective=Token()) for kind in (Speculative, Candidates))
    torch.manual_seed(3)
    models("llama")[0].generate(**padded(20), **GREEDY, custom_generate=loop)
    candidates.generate(models("llama")[0], **padded(20), **GREEDY)
    for ours, theirs in zip(loop.queries[0].scores(), candidates.query.scores(), strict=True):
        assert ours.tolist() == theirs.tolist()


def test_another_transformers_is_named(monkeypatch):
    monkeypatch.setattr("nab.backends.assisted.WANTED", {HOOK: {"input_ids", "gone"}})
    with pytest.raises(ImportError, match=f"has no {HOOK} of gone: use nab.backends.hf.Speculative"):
        Candidates(["lookup"]).generate(models("llama")[0], **padded(20))


def test_a_model_that_was_changed_is_read_anew():
    """Weights replaced, in place or not; another module; a hook that changes what a layer computes."""
    model, hook = tiny.llama(5).train(False), Speculative([tiny.llama(6), "lookup"], objective=Token())
    texts = []

    def check():
        plain = model.generate(**padded(20), **GREEDY)
        assert model.generate(**padded(20), **GREEDY, custom_generate=hook).tolist() == plain.tolist()
        texts.append(plain.tolist())

    check()
    other = tiny.llama(7).state_dict()
    model.load_state_dict(other)
    check()
    model.load_state_dict(tiny.llama(8).state_dict(), assign=True)
    check()
    layer = model.model.layers[1].mlp
    layer.down_proj = torch.nn.Linear(64, 32, bias=True, dtype=torch.float64)
    check()
    layer.register_forward_hook(lambda module, given, found: 2 * found)
    check()
    assert len({str(text) for text in texts}) == len(texts)


def test_what_nobody_can_see_changes_the_next_call_too():
    """Weights through ``.data``, a rotary buffer: no cache outlives a call."""
    model, hook = tiny.llama(5).train(False), Speculative([tiny.llama(6), "lookup"], objective=Token())
    texts = []

    def weights():
        for parameter in model.parameters():
            parameter.data.mul_(0.7)

    for change in (lambda: None, weights, lambda: model.model.rotary_emb.inv_freq.mul_(0.1)):
        change()
        texts.append(model.generate(**padded(20), **GREEDY).tolist())
        assert model.generate(**padded(20), **GREEDY, custom_generate=hook).tolist() == texts[-1]
    assert texts[0] != texts[1] != texts[2]


def test_threads_wait_for_each_other():
    hook, model = Speculative(drafters("llama"), objective=Token()), models("llama")[0]
    inputs = [padded(length) for length in (20, 5, 12, 9)]
    with ThreadPoolExecutor(4) as pool:
        found = list(
            pool.map(lambda each: model.generate(**each, **GREEDY, custom_generate=hook).tolist(), inputs)
        )
    assert found == [model.generate(**each, **GREEDY).tolist() for each in inputs]


@pytest.mark.parametrize("kind", [Speculative, Candidates])
def test_hooks_of_several_threads_wait_for_a_model_they_share(kind):
    """Each thread its own hook; the model is in training, and other threads use it without any."""
    config = GPT2Config(vocab_size=257, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0.5)
    model = GPT2LMHeadModel(config).double()
    inputs = [padded(length) for length in (20, 5, 12, 9)]
    plain = [model.train(False).generate(**each, **GREEDY).tolist() for each in inputs]
    model.train()

    def answer(each):
        return answered(kind(["lookup"], objective=Token()), model, each).tolist()

    def without(each):
        return model.generate(**each, **GREEDY, prompt_lookup_num_tokens=3).shape

    with ThreadPoolExecutor(8) as pool:
        found, others = pool.map(answer, inputs), pool.map(without, inputs)
        assert [*found] == plain
        assert [*others] == [torch.Size(torch.tensor(each).shape) for each in plain]
    assert model.training
    assert HOOK not in vars(model)


def test_an_answer_may_go_beyond_the_context_as_it_may_without():
    model, drafter = (tiny.llama(seed, max_position_embeddings=24).train(False) for seed in (5, 6))
    with pytest.warns(DrafterWarning, match="do not fit the context"):
        found = model.generate(
            **padded(20), **GREEDY, custom_generate=Speculative([drafter], objective=Token())
        )
    assert found.tolist() == model.generate(**padded(20), **GREEDY).tolist()


def test_a_model_can_be_saved_and_trained_as_before(tmp_path):
    model, fresh = tiny.llama(5), tiny.llama(5)
    hook = Speculative(["early-exit"], objective=Token())
    model.generate(**padded(20), do_sample=False, pad_token_id=PAD, max_new_tokens=4, custom_generate=hook)
    for name, weight in fresh.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)
    model.save_pretrained(tmp_path)
    for name, weight in loaded(tmp_path).state_dict().items():
        assert torch.equal(fresh.state_dict()[name], weight)
    for each in (model, fresh):
        each.train(False)
        each(ROW, labels=ROW).loss.backward()
        torch.optim.SGD(each.parameters(), 0.1).step()
    for name, weight in fresh.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)
