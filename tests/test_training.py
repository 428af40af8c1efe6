"""Training goes on after a kill as if nothing had happened; losses and int8 weights are what they say."""

import hashlib
import json
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from nab.backends import distill, int8, pool, pretrained, training
from nab.backends.distill import Feature, Plan, Standalone, distillation_loss, origin, train
from nab.backends.heads import Head, HeadModel, Shape
from nab.backends.teacher import PAD, Teacher, Unit
from nab.backends.torch import CausalLM, Warper
from nab.backends.training import Recipe, Windows, check_origin, corpus, fit, provenance


class Killed(BaseException):
    """What a signal raises."""


@pytest.fixture(autouse=True)
def heard():
    """Ctrl-C interrupts, also where the tests run in the background of a shell, which ignores it."""
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, usual)


def model_and_loss():
    torch.manual_seed(0)
    model = tiny.llama(dtype=torch.float32)
    data = Windows(np.arange(4096) % 251, 16)

    def loss(step):
        ids = torch.tensor(np.stack([data[k] for k in data.draw(2 * step, 2)]))
        return model(input_ids=ids, labels=ids).loss

    return model, loss


def kill_at(last):
    def progress(step, loss):
        if step == last:
            raise Killed

    return progress


def test_a_killed_training_ends_with_the_same_weights(tmp_path):
    recipe = Recipe(save_every=0.0)
    whole, loss = model_and_loss()
    fit(whole, loss, steps=8, folder=tmp_path / "whole", recipe=recipe)
    for at in (3, 6):
        model, loss = model_and_loss()
        with pytest.raises(Killed):
            fit(model, loss, steps=8, folder=tmp_path / "killed", recipe=recipe, progress=kill_at(at))
    (tmp_path / "killed" / "checkpoint.partial").write_bytes(b"half")  # a kill while saving
    model, loss = model_and_loss()
    fit(model, loss, steps=8, folder=tmp_path / "killed", recipe=recipe)
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name
    curves = [(tmp_path / run / "curve.jsonl").read_text() for run in ("whole", "killed")]
    assert curves[0] == curves[1]
    assert [json.loads(line)["step"] for line in curves[0].splitlines()] == list(range(8))


def test_training_lowers_the_loss_and_refuses_nan(tmp_path):
    model, loss = model_and_loss()
    fit(model, loss, steps=30, folder=tmp_path / "a")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "a" / "curve.jsonl").read_text().splitlines()]
    assert np.mean(losses[20:]) < np.mean(losses[:10])
    with pytest.raises(ValueError, match="the loss of step 0 is nan"):
        fit(model, lambda step: loss(step) * float("nan"), steps=3, folder=tmp_path / "b")


@given(arrays(np.float32, (3, 5), elements=st.integers(-512, 512).map(lambda k: k / 64)))
def test_int8_is_within_half_a_level(values):
    weights = {"w": torch.tensor(values), "v": torch.ones(2), "ids": torch.tensor([1, 2])}
    again = int8.dequantize(int8.quantize(weights))
    level = weights["w"].abs().amax(1, keepdim=True) / 127
    assert (
        (again["w"] - weights["w"]).abs() <= level * (0.5 + 2**-16)
    ).all()  # float32 rounding of 127 levels
    assert torch.equal(again["v"], weights["v"])
    assert torch.equal(again["ids"], weights["ids"])
    assert set(again) == set(weights)


def unit_of(target, tokens, layers):
    output = target(input_ids=tokens.clamp_min(0), output_hidden_states=True)
    hidden = torch.stack([output.hidden_states[layer] for layer in layers], 2)
    return Unit(tokens, hidden, output.logits.logsumexp(-1)), output.logits.softmax(-1)


def test_the_loss_is_cross_entropy_plus_rejection(monkeypatch):
    """Value and gradient against the plain formula, with padding, for a standalone drafter and a head."""
    monkeypatch.setattr(distill, "CHUNK", 5)  # 24 positions: whole chunks and a rest
    target = tiny.llama()
    tokens = torch.randint(tiny.VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    tokens[1, 9:] = PAD
    with torch.no_grad():
        unit, p = unit_of(target, tokens, (1, 3))
    head = HeadModel(Shape((1, 3), 48, 100), target, torch.randperm(tiny.VOCAB)[:100])
    output = target.lm_head.weight.detach()
    for student, depths in ((Standalone(tiny.llama(1)), 1), (Feature(head), 3)):
        masses, plain, scale = p[..., student.tokens], 0.0, 0.0
        for depth, logits in enumerate(student.laws(unit, depths)):
            law = logits.softmax(-1)
            costs = -(masses * law.log()).sum(-1) + 0.5 * (1 - torch.minimum(masses, law).sum(-1))
            plain = plain + 0.8**depth * costs[:, depth:][tokens[:, depth:] != PAD].mean()
            scale += 0.8**depth
        found = distillation_loss(student, unit, output, depths=depths, rejection=0.5)
        torch.testing.assert_close(found.double(), plain / scale, rtol=1e-5, atol=1e-5)  # it works in float32
        parameters = [x for x in student.parameters() if x.requires_grad]
        expected = torch.autograd.grad(plain / scale, parameters)
        for a, b in zip(torch.autograd.grad(found, parameters), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.fixture
def corpora(tmp_path):
    return tiny.corpora(tmp_path / "corpora", {"a": "abc ", "b": "xyz\n"}, 1500)


def test_units_of_other_layers_are_kept_apart(corpora, tmp_path):
    target = pretrained.load(tiny.save(tmp_path / "target", tiny.llama()), dtype="float32")
    for layers in ((1, 3), (2, 3), (3,)):
        teacher = Teacher(target, corpora, tmp_path / "units", layers, rows=4, length=32)
        assert teacher.text("a", 0).hidden.shape == (4, 32, len(layers), target.model.config.hidden_size)
    first, second = (
        Teacher(target, corpora, tmp_path / "units", layers, rows=4, length=32).text("a", 0)
        for layers in ((1, 3), (2, 3))
    )
    assert torch.equal(first.hidden[:, :, 1], second.hidden[:, :, 1])
    assert not torch.equal(first.hidden[:, :, 0], second.hidden[:, :, 0])


def test_listed_requests_take_turns_with_openings(corpora, tmp_path):
    (corpora / "a" / "requests").mkdir()
    (corpora / "a" / "requests" / "train.txt").write_text("first\nsecond\n")
    target = pretrained.load(tiny.save(tmp_path / "target", tiny.llama()), dtype="float32")
    teacher = Teacher(target, corpora, tmp_path / "units", (3,), rows=4, length=32)
    assert all(len(ids) == 8 for ids in teacher.prompts("a", 4, opening=8))  # no chat: openings alone
    target.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    asked = [target.tokenizer.decode(ids) for ids in teacher.prompts("a", 6, opening=8)]
    assert asked[1::2] == ["first", "second", "first"]
    assert all("text" in request for request in asked[::2])


@pytest.mark.parametrize("width", [None, 32])
def test_an_expert_learns_its_domain_and_decodes(corpora, tmp_path, width):
    """The whole way: units, generalist, expert, file, pool; the expert beats the generalist on its domain."""
    folder = tiny.save(tmp_path / "target", tiny.llama(dtype=torch.float32))
    target = pretrained.load(folder, dtype="float32")
    teacher = Teacher(target, corpora, tmp_path / "units", (1, 3), rows=4, length=32)
    plan = Plan(
        draft_vocab=200, intermediate=32, width=width, depths=2, text=2, answers=1, recipe=Recipe(rate=1e-2),
        expert_passes=6.0, expert_rate=1e-2,
    )  # fmt: skip
    files = {}
    for name, domains in {"generalist": ["a", "b"], "expert": ["a"]}.items():
        weights, metadata = train(
            teacher, domains, plan, folder=tmp_path / name, start=files.get("generalist")
        )
        files[name] = tmp_path / f"{name}.safetensors"
        int8.save(weights, files[name], metadata)
    model = CausalLM(target.model, Warper())
    built = pool.build([str(file) for file in files.values()], target, model)
    unit = teacher.text("a", 0)
    output = target.model.lm_head.weight.detach()
    losses = {}
    for name, drafter in built.items():
        student = Feature(drafter.model) if isinstance(drafter, Head) else Standalone(drafter.model)
        with torch.no_grad():
            losses[name] = float(distillation_loss(student, unit, output, depths=1))
    assert losses["expert"] < losses["generalist"]
    laws = built["expert"].score([1, 2, 3], 1)
    assert laws.shape == (3, tiny.VOCAB)


def test_unusable_corpora_and_layers_are_named(corpora, tmp_path):
    target = pretrained.load(tiny.save(tmp_path / "target", tiny.llama()), dtype="float32")
    with pytest.raises(ValueError, match=r"layers must lie in \[0, 3\] and end with 3, got \(1,\)"):
        Teacher(target, corpora, tmp_path, (1,))
    with pytest.raises(ValueError, match="1501 tokens, too few for one unit of 16 windows of 256"):
        Teacher(target, corpora, tmp_path, (3,)).text("a", 0)
    with pytest.raises(FileNotFoundError, match="no folders <domain>/train"):
        _ = Teacher(target, tmp_path / "empty", tmp_path, (3,)).domains


def test_a_manifest_names_data_time_and_machine(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first ")
    digest = hashlib.sha256(b"first second").hexdigest()
    assert corpus(tmp_path) == {"documents": 2, "bytes": 12, "sha256": digest}
    facts = provenance("cpu")
    assert {"hardware", "device", "threads", "torch", "finished"} <= set(facts)
    json.dumps(facts)


def test_units_belong_to_target_text_and_requests(corpora, tmp_path):
    """One cache for all: each gets its own, and what is still right is not made again."""
    targets = [
        pretrained.load(tiny.save(tmp_path / f"target{seed}", tiny.llama(seed)), dtype="float32")
        for seed in (0, 1)
    ]

    def teacher(target=0):
        return Teacher(targets[target], corpora, tmp_path / "units", (3,), rows=4, length=32)

    first, answers, other = teacher().text("a", 0), teacher().answers("a", 0), teacher().text("b", 0)
    assert torch.equal(teacher(1).text("a", 0).tokens, first.tokens)
    assert not torch.equal(teacher(1).text("a", 0).hidden, first.hidden)
    (corpora / "a" / "train" / "1.txt").write_text("more " * 300)
    assert not torch.equal(teacher().text("a", 0).tokens, first.tokens)
    assert not torch.equal(teacher().answers("a", 0).tokens, answers.tokens)
    files = set((tmp_path / "units").rglob("*.safetensors"))
    assert torch.equal(teacher().text("b", 0).tokens, other.tokens)  # its text is the same still
    assert set((tmp_path / "units").rglob("*.safetensors")) == files
    (corpora / "a" / "requests").mkdir()
    (corpora / "a" / "requests" / "train.txt").write_text("first\n")
    targets[0].tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    del targets[0].__dict__["checksum"]
    before = teacher().answers("a", 0)
    text = teacher()._source("text", "a")
    (corpora / "a" / "requests" / "train.txt").write_text("second\n")
    assert not torch.equal(teacher().answers("a", 0).tokens, before.tokens)
    assert teacher()._source("text", "a") == text  # requests are nothing to it


@pytest.mark.parametrize(("device", "made"), [("cpu", range(13, 14)), ("cuda", range(8, 16))])
def test_a_gpu_makes_units_of_answers_together(device, made, tmp_path, monkeypatch):
    monkeypatch.setattr(Teacher, "_cached", lambda self, kind, domain, number, together, make: together)
    model = SimpleNamespace(config=tiny.llama().config, device=torch.device(device))
    teacher = Teacher(SimpleNamespace(model=model), tmp_path, tmp_path, (3,), together=8)
    assert teacher.answers("a", 13) == made


def test_answers_are_the_same_in_any_company_and_follow_the_law(corpora, tmp_path):
    """Alone and together; one request many times: frequencies of the first token, chi-square at 1e-4."""
    target = pretrained.load(tiny.save(tmp_path / "target", tiny.llama()), dtype="float64")
    teacher = Teacher(target, corpora, tmp_path / "units", (3,), rows=4, length=64)
    together = teacher.answered("a", [4, 5, 2, 3])  # two temperatures
    for place, number in enumerate((4, 5, 2, 3)):
        assert torch.equal(teacher.answered("a", [number]), together[4 * place : 4 * place + 4])
    many = Teacher(target, corpora, tmp_path / "units", (3,), rows=400, length=17)
    prompt = list(range(16))
    object.__setattr__(many, "prompts", lambda domain, count: [prompt] * count)
    for number, temperature in ((0, 1.0), (4, 0.6)):
        tokens = many.answered("a", [number])[:, 16]
        with torch.no_grad():
            logits = target.model(input_ids=torch.tensor([prompt])).logits[0, -1]
        law = (logits / temperature).softmax(-1)
        common = law > 5 / 400
        assert common.sum() > 5
        found = torch.bincount(tokens, minlength=tiny.VOCAB)[common]
        counts = [*found.tolist(), 400 - int(found.sum())]
        expected = [*(400 * law[common]).tolist(), 400 * float(law[~common].sum())]
        assert stats.chisquare(counts, expected).pvalue > 1e-4


def test_without_a_gpu_every_unit_of_answers_is_kept_at_once(corpora, tmp_path):
    target = pretrained.load(tiny.save(tmp_path / "target", tiny.llama()), dtype="float32")
    teacher = Teacher(target, corpora, tmp_path / "units", (3,), rows=4, length=32)
    teacher.answers("a", 1)
    assert [file.name for file in tmp_path.glob("units/train/answers/a/*/*")] == ["00001.safetensors"]


def plan_of(**changes):
    sizes = {"draft_vocab": 200, "intermediate": 32, "width": 32, "text": 2, "answers": 1}
    return Plan(**sizes | changes)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"text": 3}, "plan.text was 2 and is 3 now"),
        ({"width": 64}, "plan.width was 32 and is 64 now"),
        ({"recipe": Recipe(rate=1e-2)}, "plan.recipe.rate was 0.003 and is 0.01 now"),
    ],
)
def test_a_checkpoint_of_another_plan_is_refused(corpora, tmp_path, change, field):
    target = pretrained.load(tiny.save(tmp_path / "target", tiny.llama()), dtype="float32")
    teacher = Teacher(target, corpora, tmp_path / "units", (3,), rows=4, length=32)
    with pytest.raises(KeyboardInterrupt):
        train(teacher, ["a"], plan_of(), folder=tmp_path / "run", progress=interrupt_at(2))
    with pytest.raises(ValueError, match=f"something else .{field}.: use another folder or delete .*run"):
        train(teacher, ["a"], plan_of(**change), folder=tmp_path / "run")
    (corpora / "a" / "train" / "2.txt").write_text("more " * 50)
    other = Teacher(target, corpora, tmp_path / "units", (3,), rows=4, length=32)
    with pytest.raises(ValueError, match=r"data\.a\.sha256 was \w{16} and is \w{16} now"):
        train(other, ["a"], plan_of(), folder=tmp_path / "run")
    weights, metadata = train(teacher, ["a"], plan_of(), folder=tmp_path / "run")
    int8.save(weights, tmp_path / "a.safetensors", metadata)
    check_origin(tmp_path / "a.safetensors", origin(teacher, ["a"], plan_of(), None))
    with pytest.raises(ValueError, match="start was absent and is"):
        check_origin(
            tmp_path / "a.safetensors", origin(teacher, ["a"], plan_of(), tmp_path / "a.safetensors")
        )


def interrupt_at(last):
    def progress(step, loss):
        if step == last:
            os.kill(os.getpid(), signal.SIGINT)

    return progress


def test_an_interrupted_training_loses_nothing_and_counts_all_seconds(tmp_path, monkeypatch):
    clock = iter(range(0, 10**6, 10))
    monkeypatch.setattr(training, "monotonic", lambda: next(clock))
    recipe = Recipe(save_every=1e9)
    whole, loss = model_and_loss()
    alone = fit(whole, loss, steps=8, folder=tmp_path / "whole", recipe=recipe)
    model, loss = model_and_loss()
    with pytest.raises(KeyboardInterrupt):
        fit(model, loss, steps=8, folder=tmp_path / "cut", recipe=recipe, progress=interrupt_at(3))
    metadata = int8.metadata(tmp_path / "cut" / "checkpoint.safetensors")
    assert metadata["step"] == "3"

    def interrupted(step):  # before the weights move
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(step)

    model, loss = model_and_loss()
    with pytest.raises(KeyboardInterrupt):
        fit(model, interrupted, steps=8, folder=tmp_path / "cut", recipe=recipe)
    assert int8.metadata(tmp_path / "cut" / "checkpoint.safetensors")["step"] == "5"
    model, loss = model_and_loss()
    seconds = fit(model, loss, steps=8, folder=tmp_path / "cut", recipe=recipe)
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name
    assert seconds >= alone > float(metadata["seconds"]) > 0


def test_an_update_is_never_cut(tmp_path, monkeypatch):
    """Ctrl-C while the weights move: the step is finished, its loss written, and then it counts."""
    model, loss = model_and_loss()
    step_of = torch.optim.AdamW.step

    def step(self, *arguments, **named):
        if len((tmp_path / "curve.jsonl").read_text().splitlines()) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step_of(self, *arguments, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(KeyboardInterrupt):
        fit(model, loss, steps=8, folder=tmp_path)
    assert int8.metadata(tmp_path / "checkpoint.safetensors")["step"] == "4"
    assert len((tmp_path / "curve.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"width": 0}, "width must be a positive multiple of 32, got 0"),
        ({"width": 40}, "width must be a positive multiple of 32, got 40"),
        ({"text": 0, "answers": 0}, "text and answers must not both be 0"),
        ({"depths": 0}, "depths must be at least 1, got 0"),
        ({"text": -3}, "text must be at least 0, got -3"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"expert_rate": float("nan")}, "expert_rate must be positive and finite, got nan"),
        ({"generalist_passes": float("inf")}, "generalist_passes must be positive and finite, got inf"),
    ],
)
def test_impossible_plans_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        plan_of(**change)


@pytest.mark.parametrize("change", [{"rate": 0.0}, {"warmup": -0.1}, {"cooldown": 2.0}, {"save_every": -1.0}])
def test_impossible_recipes_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Recipe(**change)


def test_damaged_files_are_named(corpora, tmp_path):
    model, loss = model_and_loss()
    fit(model, loss, steps=1, folder=tmp_path)
    file = tmp_path / "checkpoint.safetensors"
    for size in (0, 5, file.stat().st_size // 2):
        file.write_bytes(file.read_bytes()[:size] if size else b"")
        with pytest.raises(ValueError, match=r"checkpoint\.safetensors is damaged"):
            fit(model, loss, steps=1, folder=tmp_path)
    target = pretrained.load(tiny.save(tmp_path / "target", tiny.llama()), dtype="float32")
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is damaged"):
        pool.build([str(file)], target, CausalLM(target.model, Warper()))
    (corpora / "a" / "train" / "2.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"2\.txt is not UTF-8"):
        Teacher(target, corpora, tmp_path / "units", (3,), rows=4, length=32).windows("a")
