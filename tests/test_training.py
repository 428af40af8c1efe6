"""Training goes on after a kill as if nothing had happened; losses and int8 weights are what they say."""

import hashlib
import json
import time

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nab.backends import distill, int8, pool, pretrained
from nab.backends.distill import Feature, Plan, Standalone, distillation_loss, train
from nab.backends.heads import Head, HeadModel, Shape
from nab.backends.teacher import PAD, Teacher, Unit
from nab.backends.torch import CausalLM, Warper
from nab.backends.training import Recipe, Windows, fit, provenance


class Killed(BaseException):
    """What a signal raises."""


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
    for domain, letters in (("a", "abc "), ("b", "xyz\n")):
        for part in ("train", "heldout"):
            folder = tmp_path / "corpora" / domain / part
            folder.mkdir(parents=True)
            rng = np.random.default_rng(0)
            (folder / "1.txt").write_text("".join(rng.choice(list(letters), 1500)))
    return tmp_path / "corpora"


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
    facts = provenance({"prose": tmp_path}, device="cpu", began=time.time() - 60)
    digest = hashlib.sha256(b"first second").hexdigest()
    assert facts["data"] == {"prose": {"documents": 2, "bytes": 12, "sha256": digest}}
    assert facts["seconds"] >= 60
    assert {"hardware", "device", "threads", "torch", "finished"} <= set(facts)
    json.dumps(facts)
