"""The training scripts: the same command goes on, another is refused before any work; errors are one line."""

import importlib.util
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import tiny
import torch
from rich.progress import Progress

import nab
from nab.backends import int8

SCRIPTS = Path(nab.__file__).parents[1] / "scripts"
SIZES = ("--set", "text=2", "--set", "answers=0", "--set", "width=32")


def module_of(name):
    """A script; one of them is called as a module of the tests is."""
    spec = importlib.util.spec_from_file_location(f"scripts.{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def corpora(tmp_path):
    tiny.save(tmp_path / "target", tiny.llama(dtype=torch.float32))
    return tiny.corpora(tmp_path / "corpora", {"north": "abc ", "south": "xyz "}, 9000)


@pytest.fixture
def script(monkeypatch, capsys):
    """Runs a script and returns its one line of complaint, empty if it had none."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)

    def run(name, *words):
        module = module_of(name)
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        try:
            module_of("console").guarded(module.main)
        except SystemExit as end:
            lines = capsys.readouterr().err.splitlines() if end.code == 2 else [str(end.code)]
            assert len(lines) == 1
            return lines[0]
        return ""

    yield run
    signal.signal(signal.SIGINT, usual)


def drafters(corpora, *more):
    out = corpora.parent
    words = ("train_drafters", "tiny", corpora, out / "out", "--target", out / "target", "--threads", 1)
    return (*words, *SIZES, *more)


def test_the_same_command_goes_on_and_another_is_refused(corpora, script, monkeypatch):
    out = corpora.parent / "out"
    advance = Progress.update

    def interrupted(self, task, **state):
        advance(self, task, **state)
        if self.tasks[task].description == "north" and state.get("completed") == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "update", interrupted)
        assert script(*drafters(corpora)).startswith("interrupted")
    assert not (out / "north.safetensors").exists()
    assert int8.metadata(out / "training" / "north" / "checkpoint.safetensors")["step"] == "2"
    before = {file: file.read_bytes() for file in out.rglob("*.safetensors")}
    (corpora / "north" / "train" / "2.txt").write_text("more " * 2000)
    said = script(*drafters(corpora))
    assert "data.north.sha256 was " in said
    assert f"use another folder or delete {out}" in said
    (corpora / "north" / "train" / "2.txt").unlink()
    assert "plan.text was 2 and is 3 now" in script(*drafters(corpora, "--set", "text=3"))
    assert "data.south.sha256 was " in script(*drafters(corpora, "--leave-out", "south"))
    assert before == {file: file.read_bytes() for file in out.rglob("*.safetensors")}
    assert script(*drafters(corpora)) == ""
    for name in ("generalist", "north", "south"):
        manifest = json.loads((out / f"{name}.json").read_text())
        assert manifest["origin"]["plan"]["text"] == 2
        assert manifest["seconds"] >= 0
        assert (out / f"{name}.safetensors").exists()
    after = {file: file.stat().st_mtime_ns for file in out.rglob("*.safetensors")}
    assert script(*drafters(corpora)) == ""  # all is there
    assert after == {file: file.stat().st_mtime_ns for file in out.rglob("*.safetensors")}
    experts = ("--only-experts", "--start", out, "--set", "seed=1")
    words = [out.with_name("second") if word == out else word for word in drafters(corpora)]
    assert script(*words, *experts) == ""
    assert {file.stem for file in out.with_name("second").glob("*.safetensors")} == {"north", "south"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "batch=0"], "batch must be at least 1, got 0"),
        (["--set", "text=0"], "text and answers must not both be 0"),
        (["--set", "expert_rate=nan"], "expert_rate must be positive and finite, got nan"),
        (["--set", "depth=1"], "expected FIELD=NUMBER, FIELD one of draft_vocab"),
        (["--threads", "0"], "expected a whole number of at least 1, got 0"),
        (["--threads", "-1"], "expected a whole number of at least 1, got -1"),
        (["--device", "cuda:99"], "cuda:99 is not available here; use cpu"),
        (["--leave-out", "north,south"], "only north, south, and --leave-out north,south"),
        (["--only-experts"], "--only-experts goes with --start"),
        (["--start", "nowhere"], "--start nowhere holds no generalist.safetensors"),
        (["--domain", "west"], "no such domain: west; there are north, south"),
    ],
)
def test_train_drafters_says_what_is_wrong(corpora, script, words, message):
    assert message in script(*drafters(corpora, *words))
    assert not list(corpora.parent.glob("out/**/*.safetensors"))


def test_files_that_are_wrong_are_named(corpora, script):
    out = corpora.parent / "out"
    out.write_text("")
    assert f"{out} is a file, expected a folder" in script(*drafters(corpora))
    out.unlink()
    (out / "training" / "south").mkdir(parents=True)
    for damaged in (out / "training" / "south" / "checkpoint.safetensors", out / "generalist.safetensors"):
        damaged.write_bytes(b"half")
        assert f"{damaged} is damaged" in script(*drafters(corpora))
        damaged.unlink()
    latin = corpora / "south" / "train" / "2.txt"
    latin.write_bytes(b"\xff\xfe")
    for words in (drafters(corpora), ("tiny", corpora, out)):
        assert f"{latin} is not UTF-8" in script(*words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tokens", "100"], "--tokens must be at least 7168, those of a step, got 100"),
        (["--batch", "1"], "--batch must be at least 2, one window a domain, got 1"),
        (["--rate", "nan"], "expected a positive number, got nan"),
        (["--vocab-size", "0"], "expected a whole number of at least 257, got 0"),
    ],
)
def test_tiny_says_what_is_wrong(corpora, script, words, message):
    assert message in script("tiny", corpora, corpora.parent / "made", *words)


def test_tiny_looks_for_heldout_text_first(corpora, script):
    (corpora / "south" / "heldout" / "1.txt").unlink()
    assert "south/heldout has 0 tokens" in script("tiny", corpora, corpora.parent / "made", "--tokens", 10**9)
    assert not list(corpora.parent.glob("made/**/*.safetensors"))


def test_corpora_takes_one_line(corpora, script):
    (corpora.parent / "file").write_text("")
    assert "file is a file, expected a folder" in script("corpora", corpora.parent / "file")
    assert "/proc" in script("corpora", "/proc/nope")
    module = module_of("corpora")
    with pytest.raises(module.CorpusError, match=r"north has no readable SOURCE.json: delete .*north first"):
        module.build({"domains": {"north": {}}, "cap": 0}, "north", corpora, corpora.parent)
