"""Benchmarks: what their figures mean, that all decoders decode, and that a stopped run goes on."""

import importlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from rich.progress import Progress
from scipy.stats import chisquare

import nab
from nab.backends.torch import early_exit
from nab.decode import Round, Seconds
from nab.losses import expected_rounds
from nab.sim.trace import TracedQuery, read_trace

FOLDER = str(Path(nab.__file__).parents[1] / "benchmarks")
sys.path.append(FOLDER)
decode, gpu, peers, soak, timing = map(importlib.import_module, ["decode", "gpu", "peers", "soak", "timing"])
beyond, paper, studies = map(importlib.import_module, ["beyond", "paper", "beyond_studies"])
pace, switching = map(importlib.import_module, ["pace", "switching"])
sys.path.remove(FOLDER)

SHAPE = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4,
}  # fmt: skip
CELL = {
    "tokens": 12, "rounds": 4, "seconds": 2.0, "cpu": 1.5, "phases": [0.5, 1.0, 0.5],
    "forward_seconds": {"target": 0.75, "drafters": 0.25},
    "forward_cpu": {"target": 0.5, "drafters": 0.25},
    "forward_calls": {"target": 4, "drafters": 12},
}  # fmt: skip


def scene(eps=0.05, temperature=0.0, new_tokens=24, dtype=torch.float64):
    target = peers.random_llama(SHAPE, eps, dtype, "cpu")
    return peers.Scene(
        target, [early_exit(target, 1)], peers.random_prompt(97, 8), new_tokens, 5, temperature
    )


def test_figures_of_a_cell():
    assert timing.figures(CELL, (1 / 64, 1 / 32)) == {
        "tokens/s": 6.0,
        "cpu": 125.0,
        "tokens/round": 3.0,
        "round": 500.0,
        "outside": (2.0 - 1.0 - 16 / 64) / 4 * 1e3,
        "outside cpu": (1.5 - 0.75 - 16 / 32) / 4 * 1e3,
        "selecting": 0.25,
    }


def test_a_clock_counts_what_its_models_take(monkeypatch):
    ticks = iter([0.0, 1.0, 10.0, 13.0, 20.0, 25.0])
    monkeypatch.setattr(timing, "perf_counter", lambda: next(ticks))
    busy = iter([0.0, 0.5, 1.0, 2.0, 4.0, 8.0])
    monkeypatch.setattr(timing, "process_time", lambda: next(busy))
    clock, target, drafter = timing.Forwards(), timing._Nothing(), timing._Nothing()
    clock.watch("target", target)
    clock.watch("drafters", drafter)
    drafter.logits = drafter.forward.__wrapped__
    clock.watch("drafters", drafter, "logits")
    for method in (target.forward, drafter.forward, drafter.logits):
        method()
    assert clock.seconds == {"target": 1.0, "drafters": 8.0}
    assert clock.cpu == {"target": 0.5, "drafters": 5.0}
    assert clock.calls == {"target": 1, "drafters": 2}
    clock.reset()
    assert clock.seconds == clock.cpu == clock.calls == {}


def test_quartiles_are_of_the_values():
    assert timing.quartiles([4, 1, 2, 3, 5]) == "3.00 (2.00-4.00)"


def test_cells_come_back_and_are_of_one_setting(tmp_path):
    file = tmp_path / "deeper" / "cells.json"
    timing.Cells(file, {"dtype": "float32", "lengths": (1, 2)}).add({"a": 1.5, "b": [1]})
    assert timing.Cells(file, {"dtype": "float32", "lengths": (1, 2)}).cells == {"a": 1.5, "b": [1]}
    for other in (
        {"dtype": "bfloat16", "lengths": (1, 2)},
        {"dtype": "float32", "lengths": (1, 2), "new": 1},
    ):
        with pytest.raises(ValueError, match=r"was measured with .*: take another --out"):
            timing.Cells(file, other)


@pytest.mark.parametrize("eps", [0.0, 0.05, 0.4])
def test_all_decoders_write_the_same_greedy_text(eps):
    given = scene(eps)
    runs = {name: make(given) for name, make in peers.decoders().items()}
    assert decode.differing(runs) == []
    assert len(runs["plain"](0).tokens) == 24


def test_another_text_is_named():
    def liar(seed):
        tokens = honest(seed).tokens
        return peers.Answer([*tokens[:3], 1 - tokens[3], *tokens[4:]], 1)

    honest = peers.plain(scene(new_tokens=8))
    short = lambda seed: peers.Answer(honest(seed).tokens[:-1], 1)  # noqa: E731
    found = decode.differing({"plain": honest, "same": honest, "liar": liar, "short": short})
    assert found == ["liar parts from plain at token 3", "short parts from plain at token the end"]


@pytest.mark.parametrize("name", ["assisted", "bare loop", "nab constant", "flashspec"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_drafter_that_agrees_has_all_its_drafts_accepted(name, temperature):
    decoder = peers.decoders().get(name) or pytest.skip(f"{name} is not installed")
    given = scene(0.0, temperature)
    bench = decode.watching(given)
    cell = timing.measured(decoder(given), 0, bench)
    assert (cell["tokens"], cell["rounds"]) == (24, 4)  # six tokens a round
    assert cell["forward_calls"]["drafters"] >= 4 * 5 - 1  # assisted generation spares what it cannot use


def first_tokens(q, draws):
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5], [0.0] * 5], dtype=torch.float64)
    laws = torch.tensor([0.5, 0.1, 0.1, 0.2, 0.1], dtype=torch.float64)
    torch.manual_seed(0)
    drafts = laws.multinomial(draws, replacement=True)
    seen = [
        peers._sampled_verdict(logits, draft[None], [laws if q is None else q], 1.0)[1] for draft in drafts
    ]
    return chisquare(np.bincount(seen, minlength=5), draws * logits[0].softmax(-1).numpy()).pvalue


def test_the_bare_loop_samples_the_targets_law():
    # seeded; a correct loop fails with probability 1e-3, the broken one passes with less
    assert first_tokens(None, 4000) > 1e-3
    assert first_tokens(torch.full((5,), 0.2, dtype=torch.float64), 4000) < 1e-3


def test_perturbed_shares_what_it_is_told_to():
    model = scene().drafters[0]
    ends = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    made = peers.perturbed(model, 0.1, 1, ends)
    assert made.get_input_embeddings().weight is ends[0]
    assert made.get_output_embeddings().weight is ends[1]
    layer = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(made.state_dict()[layer], model.state_dict()[layer])
    assert peers.perturbed(model, 0.1, 1).get_input_embeddings().weight is not ends[0]


class Runs:
    """Stand-ins for runs that note who was called, and may be interrupted."""

    def __init__(self, stop_at=None):
        self.called, self.stop_at, self.clock = [], stop_at, timing.Forwards()

    def bench(self):
        return decode.Bench({name: self.run(name) for name in "ab"}, "a", self.clock)

    def run(self, name):
        def run(seed):
            if len(self.called) == self.stop_at:
                raise KeyboardInterrupt
            self.called.append((name, seed))
            self.clock.seconds, self.clock.cpu = {"target": 0.0}, {"target": 0.0}
            self.clock.calls = {"target": 1, "drafters": 0}
            return peers.Answer([1, 2], 1)

        return run


def test_a_stopped_run_goes_on_where_it_was(tmp_path):
    first, second = Runs(stop_at=7), Runs()  # two to warm up, two repetitions, half of the third
    with Progress(disable=True) as progress:
        with pytest.raises(KeyboardInterrupt):
            decode.measure({"s": first.bench()}, timing.Cells(tmp_path / "c.json", {}), 4, progress)
        cells = timing.Cells(tmp_path / "c.json", {})
        assert set(cells.cells) == {f"s/{name}/{r}" for name in "ab" for r in range(2)}
        assert len(list(decode.complete(first.bench(), "s", cells))) == 2
        decode.measure({"s": second.bench()}, cells, 4, progress)
    assert second.called == [(name, r) for r in (2, 2, 3) for name in "ab"]  # warmed up first
    assert len(list(decode.complete(second.bench(), "s", cells))) == 4
    assert decode.table(second.bench(), "s", cells, (0.0, 0.0)).row_count == 2
    assert decode.table(second.bench(), "other", cells, (0.0, 0.0)) is None


def test_patterns_choose_runs():
    bench = Runs().bench()
    assert list(decode.kept(bench, "peers/greedy", ["*"]).runs) == ["a", "b"]
    assert list(decode.kept(bench, "peers/greedy", ["three*", "peers/*/b"]).runs) == ["b"]
    assert list(decode.kept(bench, "peers/greedy", ["greedy"]).runs) == []


@pytest.mark.parametrize(
    "pattern", ["*", "peers/*", "peers/gr*/b", "peers/greedy/b", "peers/greedy/*", "p?ers*"]
)
def test_a_scene_is_made_if_a_pattern_fits_one_of_its_runs(pattern):
    assert decode.may_fit("peers/greedy", [pattern])
    assert decode.kept(Runs().bench(), "peers/greedy", [pattern]).runs


@pytest.mark.parametrize("pattern", ["three/*", "peers/greedy two/*", "greedy"])
def test_a_scene_is_not_made_for_nothing(pattern):
    assert not decode.may_fit("peers/greedy", [pattern])


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    def run(module, *words):
        monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, words), "--out", str(tmp_path / "out.json")])
        module.main()
        file = tmp_path / "out.json"
        return capsys.readouterr().out, json.loads(file.read_text()) if file.exists() else None

    return run


def test_decode_prints_a_table_of_what_it_was_asked_for(command, monkeypatch):
    monkeypatch.setattr(decode, "NEW_TOKENS", {"tiny": 6})
    monkeypatch.setattr(decode, "CHECKED_TOKENS", {"tiny": 6})
    words = ("--repetitions", 1, "--only", "peers/greedy/eps 0.05/nab*,peers/greedy/eps 0.05/plain")
    printed, kept = command(decode, *words)
    hooks = ("in generate", "in assisted")
    names = sorted(["plain", *(f"nab {each}" for each in ("constant", *peers.LEARNING, *hooks))])
    cells = {f"peers/greedy/eps 0.05/{name}/0" for name in names}
    assert set(kept["cells"]) == {"peers/greedy/eps 0.05, agree in float64", *cells}
    assert kept["cells"]["peers/greedy/eps 0.05, agree in float64"] == names
    assert {"hardware", "commit", "torch", "transformers", "dtype", "threads", "seeds"} <= set(kept["about"])
    assert "nab normal-hedge" in printed
    with pytest.raises(ValueError, match="--only nothing fits nothing; scenes are peers/greedy/eps 0"):
        command(decode, "--only", "nothing")


def test_decode_prints_no_times_of_decoders_that_differ(command, monkeypatch, capsys):
    lies = {"plain": peers.plain, "liar": lambda given: lambda seed: peers.Answer([0] * given.new_tokens, 1)}
    monkeypatch.setattr(decode, "decoders", lambda: lies)
    monkeypatch.setattr(decode, "CHECKED_TOKENS", {"tiny": 4})
    with pytest.raises(ValueError, match=r"float64.*peers/greedy/eps 0: liar parts from plain at token 0"):
        command(decode, "--only", "peers/*")
    assert capsys.readouterr().out == ""


def test_soak_reports_memory(command, monkeypatch, tmp_path):
    monkeypatch.setattr(soak, "LENGTHS", (4, 8))
    monkeypatch.setattr(soak, "WARM_UP", 8)
    monkeypatch.setattr(soak, "EVERY", 8)
    printed, _ = command(decode, "--soak", 24)
    cells = json.loads((tmp_path / "out-soak.json").read_text())["cells"]
    assert len(cells["samples"]) >= 2
    target = peers.tiny_target(0.05, torch.float32)
    assert cells["drafter"]["weights"] == soak.weights(early_exit(target, 1))
    keys_and_values, hidden, size = 2, 256, 4
    assert cells["cache"] % (keys_and_values * hidden * size) == 0
    assert "bytes a token" in printed


def test_texts_that_agreed_are_not_compared_again(tmp_path):
    made, asked = [], []

    def make(dtype, new_tokens):
        made.append(dtype)
        runs = {name: lambda seed, n=name: asked.append(n) or peers.Answer([1], 1) for name in "abc"}
        return decode.Bench(runs, "a", timing.Forwards())

    for names in ("ab", "a", "abc", "abc"):
        bench = decode.Bench(dict.fromkeys(names), "a", timing.Forwards())
        cells = timing.Cells(tmp_path / "c.json", {})
        with Progress(disable=True) as progress:
            decode.check({"greedy": bench, "sampling": bench}, {"greedy": make}, cells, 1, progress)
    assert made == [torch.float64] * 2
    assert asked == ["a", "b", "a", "b", "c"]


def test_growth_is_a_slope():
    assert soak.growth([(1000, 7e6), (2000, 7.5e6), (4000, 8.5e6)]) == pytest.approx(500)


def test_gpu_runs_without_one(command):
    printed, kept = command(gpu, "--device", "cpu", "--repetitions", 1, "--new-tokens", 6)
    assert list(kept["cells"]) == ["device", "smoke, forwards", "smoke, evaluation", "smoke, rounds"]
    assert "normal-hedge, n = 32" in printed
    rows = {row["what"]: row["values"] for rows in kept["cells"].values() for row in rows}
    assert rows["fixed, reads"] > rows["plain, reads"]
    with pytest.raises(SystemExit):
        command(gpu, "--device", "cuda:99")


class Whole(gpu.Reads):
    """The broken twin: composite operators are not taken apart."""

    counted = (*gpu.Reads.counted, torch.ops.aten.item, torch.ops.aten.is_nonzero)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in gpu.Reads.counted
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("counter", "seen"), [(gpu.Reads, 4), (Whole, 1)])
def test_reads_are_counted_in_inference_mode(counter, seen):
    x = torch.arange(5.0)
    with torch.inference_mode(), counter() as found:
        bool(x.max() > 1)
        x[1].item()
        int(x[2])
        x.nonzero()
        x.cumsum(0) + 1  # nothing is read
    assert found.count == seen


def test_bytes_read_by_a_forward():
    shape = {**SHAPE, "num_hidden_layers": 1}
    untied = peers.random_llama(shape, 1.0, torch.float32, "cpu")
    tied = peers.random_llama({**shape, "tie_word_embeddings": True}, 1.0, torch.float32, "cpu")
    assert gpu.read_bytes(untied) == gpu.read_bytes(tied)  # one embedding is read as the output matrix
    assert gpu.read_bytes(tied) == 4 * sum(w.numel() for w in tied.parameters())


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Does what a command line says; its workers find the benchmarks, as they do where one is run."""
    root = tmp_path_factory.mktemp("corpora")
    tiny.corpora(root, {"c": "{};= \n", "english": "abcd efgh", "german": "xyz ü"}, 3000)

    def done(module, *words):
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(FOLDER)
            patch.setattr(beyond, "TESTED_ON", 2)
            patch.setattr(beyond, "VARIANTS", dict([*beyond.VARIANTS.items()][:2]))
            options = module.parsed([str(root) if word == "CORPORA" else str(word) for word in words])
            options.command(options)

    return done


SMALL = ("--per-domain", 1, "--temperature", 0)


@pytest.fixture(scope="module")
def recorded(asked, tmp_path_factory):
    """What beyond.py records of three domains."""
    out = tmp_path_factory.mktemp("beyond")
    words = ("record", "CORPORA", "--out", out, *SMALL, "--tokens", 12, "--trained-on", 2)
    asked(beyond, *words)
    return words, out


def written(path):
    """What a trace holds but for the times."""
    trace = read_trace(path)
    return [
        (query.number, query.policy, query.tokens, [round_.choice for round_ in query.rounds])
        for query in trace.queries
    ]


def test_a_stopped_recording_goes_on_and_is_the_same(asked, recorded):
    words, out = recorded
    lost, *kept = sorted(out.rglob("*.jsonl"))
    assert {path.parent.name for path in (lost, *kept)} >= {"stationary", "unseen", "once", "thrice"}
    before, times = written(lost), [path.stat().st_mtime_ns for path in kept]
    lost.rename(lost.with_suffix(".part"))
    asked(beyond, *words)
    assert written(lost) == before
    assert [path.stat().st_mtime_ns for path in kept] == times
    assert not list(out.rglob("*.part"))


def test_a_query_changes_domain_under_one_selector(recorded):
    trace = read_trace(recorded[1] / "T0" / "thrice" / "english-00.jsonl")
    assert trace.policies == list(studies.PLAYED)
    for policy in trace.policies:
        parts = [query for query in trace.queries if query.policy == policy]
        assert [query.domain for query in parts] == ["english", "c"] * 2
        ends = [query.rounds[0].start + len(query.tokens) for query in parts]
        assert all(query.rounds[0].start > end for query, end in zip(parts[1:], ends, strict=False))
        assert all(4 <= len(query.tokens) <= 4 + 4 for query in parts)
    anew = read_trace(recorded[1] / "T0" / "thrice-anew" / "english-00.jsonl")
    first, second = (query for query in anew.queries[:4:2])  # of one domain
    assert first.rounds[0].start == second.rounds[0].start
    assert first.tokens[:4] == second.tokens[:4]  # greedily
    for queries in (trace.queries, anew.queries):
        laws = [query.rounds[0].probs for query in queries if query.policy == "normal-hedge"]
        assert np.ptp(laws[0]) == 0 < np.ptp(laws[1])  # it goes on with what it has learnt


def test_beyond_reports_what_was_recorded(asked, recorded, capsys):
    out = recorded[1]
    asked(beyond, "report", out, "--jobs", 1)
    printed, found = capsys.readouterr().out, json.loads((out / "beyond.json").read_text())
    part = found["temperature 0"]
    assert part["refed"]["different"] == []
    assert f"{part['refed']['answers']} had the recorded laws" in printed
    assert {path.name for path in out.glob("*.png")} == {
        "drafters.png", "regret.png", "router.png", "switching.png"
    }  # fmt: skip
    record = studies.read(out / "T0" / "stationary" / "c-00.jsonl", "stationary")
    ((_, realised),) = record.scores
    assert record.weak[1].shape == (len(realised), studies.MADE_WEAK)
    alone = expected_rounds(realised, 4)
    assert np.array_equal(record.answers["normal-hedge"].alone, alone[None])
    assert set(part["sizes"]["weak drafters added"]["normal-hedge"]) == set(map(str, studies.SIZES))
    assert set(part["warm"]["one domain"]) == set(studies.WARM)


def test_a_report_of_too_little_says_what_is_missing(asked, recorded, tmp_path):
    shutil.copytree(recorded[1], tmp_path / "part", ignore=shutil.ignore_patterns("thrice"))
    with pytest.raises(ValueError, match="no trace of thrice at temperature 0 yet: record goes on"):
        asked(beyond, "report", tmp_path / "part", "--jobs", 1)


@pytest.mark.parametrize("field", ["probs", "choice", "gamma"])
def test_a_trace_with_other_numbers_is_not_fed_again(recorded, tmp_path, field):
    lines = (recorded[1] / "T0" / "once" / "c-00.jsonl").read_text().splitlines()
    at = next(k for k, line in enumerate(lines) if '"kind": "round"' in line)  # of normal-hedge
    round_ = json.loads(lines[at])
    if field == "choice":
        round_["choice"] = (round_["choice"] + 1) % 9
    elif field == "probs":
        round_["probs"] = [*round_["probs"][1:], round_["probs"][0] + 1e-9]
    else:
        round_["gamma"] = (1 - np.array(round_["gamma"])).tolist()
    lines[at] = json.dumps(round_)
    file = tmp_path / "c-00.jsonl"
    file.write_text("\n".join(lines) + "\n")
    answers = studies.read(file, "once").answers
    assert [name for name, answer in answers.items() if not answer.same] == ["normal-hedge"]


def test_a_carried_selector_is_not_a_reset_one():
    rng = np.random.default_rng(0)
    gamma = np.clip(rng.random((60, 3)) + np.array([0.5, 0.0, -0.3]), 0, 1)
    text = (gamma, gamma)
    alone, stream = (studies.played("normal-hedge", [text] * k, (0, 0)) for k in (1, 2))
    assert alone.rounds[0] == stream.rounds[0]  # the same uniforms
    assert np.array_equal(alone.lost, stream.lost[:60])
    assert stream.lost[60:].sum() < alone.lost.sum()
    fixed = studies.played("uniform", [text], (0, 0))
    assert np.allclose(fixed.lost, (1 - gamma).mean(1), rtol=0, atol=1e-15)


def test_queries_that_share_texts_are_drawn_together():
    values, ones = np.array([1.0, 3.0, 5.0, 1.0, 3.0, 5.0]), np.ones(6)
    together = studies.Resampled(["a", "b", "c"] * 2, 0).ratio(values, ones)
    assert np.array_equal(together, studies.Resampled(["a", "b", "c"], 0).ratio(values[:3], ones[:3]))
    apart = studies.Resampled(range(6), 0).ratio(values, ones)
    assert together[0] == apart[0] == 3
    assert together.std() > apart.std()


def test_answers_are_joined_to_queries_that_change_domain():
    """Two domains, each with an expert: by symmetry either is the best single drafter of a query."""
    texts = {}
    for own, domain in enumerate("ab"):
        scores = np.full((64, 2), 0.1)
        scores[:, own] = 0.9
        texts[domain] = [(scores, scores)] * 3
    records = studies.joined(texts, {"drafters": ["a", "b"]}, "twice", 4, 48)
    assert [record.domains for record in records] == [["a", "b", "a", "b"], ["b", "a", "b", "a"]] * 3
    assert all(len(gamma) == 48 for record in records for gamma, _ in record.scores)
    cell = studies.Cell(records, 0, 1)
    found = cell.tracking("twice", ["normal-hedge", "hedge .93 argmax"], shared=True)
    own, other = expected_rounds(texts["a"][0][1][:48], 4)
    assert np.allclose(found[studies.BEST][studies.OF_PARTS], 2 * own / (own + other), rtol=1e-12, atol=0)
    static, tracking = (found[name][studies.OF_BEST][0] for name in ("normal-hedge", "hedge .93 argmax"))
    assert static < 1 < tracking < (own + other) / (2 * own)


def test_at_one_pace_a_slow_host_costs_nobody_anything():
    """Three rounds under each policy, two of the first one's on a slow host: only selecting still differs."""
    law = np.array([0.5, 0.5])

    def round_(choice, took):
        spent = Seconds(draft=took * choice, verify=took, select=took / 4)
        return Round(0, choice, law, 4, 0, (7,), None, None, spent)

    queries = [
        TracedQuery(0, policy, "c", tuple(map(round_, (0, 1, 1), took)), law, law, None)
        for policy, took in (("slow", (1.0, 8.0, 8.0)), ("quick", (1.0, 1.0, 1.0)))
    ]
    both = 2 * 4.5 + 3 * 1.0  # the medians of 8, 8, 1, 1 and of 1, 8, 8, 1, 1, 1
    assert pace.at_one_pace(queries, ["lookup", "head"]) == [both + 17 / 4, both + 3 / 4]


def test_the_paper_is_recorded_and_reported(asked, tmp_path, capsys):
    out = tmp_path / "paper"
    asked(paper, "record", "CORPORA", "--out", out, *SMALL, "--tokens", 8, "--domains", "c", "english")
    asked(paper, "report", out)
    found = json.loads((out / "T0-8.json").read_text())
    assert found["refed"] == {"answers": 6, "different": 0}
    assert found["partings"] == []
    assert found["mat"]["plain"]["mean"] == 1
    assert "HedgeSpec / generalist" in capsys.readouterr().out
    assert (out / "T0-8.png").exists()
    asked(switching, out / "T0-8")
    assert "| best drafter of each segment |" in capsys.readouterr().out
    joined = json.loads((out / "T0-8-switching.json").read_text())
    assert [*joined["studies"]] == ["1 x 8", "2 x 4", "2 x 8", "4 x 3", "4 x 8"]
    with pytest.raises(ValueError, match="answers of two domains at least, got 0"):
        asked(switching, tmp_path)
    asked(pace, out / "T0-8")
    assert "| time objective / fastest fixed policy |" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match=r"answers of .* by fixed:generalist, normal-hedge time, plain in every domain"
    ):
        asked(pace, tmp_path)
    again = ("record", "CORPORA", "--out", out, *SMALL, "--tokens", 8, "--domains", "c")
    with pytest.raises(ValueError, match=r"c-00\.json was recorded without fixed:c 2: take another --out"):
        asked(paper, *again, "--policies", "plain", "normal-hedge", "fixed:c 2")
    with pytest.raises(ValueError, match=r"c-00\.json is of target tiny, got --target smollm2"):
        asked(paper, *again, "--target", "smollm2")
    trace = out / "T0-8" / "c-00.jsonl"
    trace.write_text(trace.read_text()[:-300])
    for reads in (pace, switching):
        with pytest.raises(
            ValueError, match=r"c-00\.jsonl.*, but has a summary: remove that and record it again"
        ):
            asked(reads, out / "T0-8")


def test_prompts_of_a_cell_can_have_different_policies(asked, tmp_path):
    out = tmp_path / "paper"
    warm = [*SMALL, "--temperature", 0.8, "--tokens", 8, "--domains", "c"]
    wanted = ("normal-hedge", "fixed:own", "fixed:own 2")
    asked(paper, "record", "CORPORA", "--out", out, *warm, "--policies", *wanted)
    asked(paper, "report", out)
    both = json.loads((out / "T0.8-8.json").read_text())
    asked(paper, "record", "CORPORA", "--out", out, *warm, "--per-domain", 2, "--policies", "normal-hedge")
    asked(paper, "report", out)
    found = json.loads((out / "T0.8-8.json").read_text())
    assert (list(both["mat"]), both["prompts"]) == (["normal-hedge", "fixed:own", "fixed:own 2"], 1)
    assert (list(found["mat"]), found["prompts"]) == (["normal-hedge"], 2)
    assert found["replayed_mat"].keys() == both["replayed_mat"].keys()
    trace = read_trace(out / "T0.8-8" / "c-00.jsonl")
    own, short = (query for query in trace.queries if query.policy.startswith("fixed:own"))
    assert {round_.choice for round_ in own.rounds + short.rounds} == {trace.drafters.index("c")}
    assert [max(round_.drafted for round_ in each.rounds) for each in (own, short)] == [4, 2]
    with pytest.raises(
        ValueError, match=r"policies are plain, .*, fixed:own, fixed ones with 1 to 3 .*, got fastest"
    ):
        asked(paper, "record", "CORPORA", "--out", tmp_path, *warm, "--policies", "normal-hedge", "fastest")
    with pytest.raises(ValueError, match="must have plain, got normal-hedge"):
        asked(paper, "record", "CORPORA", "--out", out, *SMALL, "--policies", "normal-hedge")


def test_too_few_prompts_are_named(asked, tmp_path):
    empty, alien = tmp_path / "empty", tmp_path / "alien"
    for folder in (empty, alien / "T0-8"):
        folder.mkdir(parents=True)
    for alone in ('{"about": 1}', "{", "[]", '{"header": {}, "domain": "c", "answers": {}}'):
        (alien / "T0-8" / "c-00.json").write_text(alone)
        with pytest.raises(ValueError, match=r"c-00\.json is none of the summaries"):
            asked(paper, "report", alien)
    with pytest.raises(ValueError, match=r"--seed must be .* at least 0, got -1"):
        asked(paper, "report", alien, "--seed", -1)
    with pytest.raises(ValueError, match=r"--jobs must be .* at least 1, got 0"):
        asked(paper, "record", "CORPORA", "--out", tmp_path, *SMALL, "--jobs", 0)
    with pytest.raises(ValueError, match=r"empty has no DOMAIN/requests/heldout\.txt"):
        asked(paper, "record", empty, "--out", tmp_path, *SMALL)
    with pytest.raises(ValueError, match=r"--per-domain must be .*, got 0"):
        asked(paper, "record", "CORPORA", "--out", tmp_path, "--per-domain", 0)
    with pytest.raises(ValueError, match=r"domains of .* are c, english, german, got french"):
        asked(paper, "record", "CORPORA", "--out", tmp_path, *SMALL, "--domains", "french")
    (empty / "french").mkdir()
    with pytest.raises(ValueError, match="french has 0 held-out prompts, 1 are asked for"):
        asked(paper, "record", empty, "--out", tmp_path, *SMALL, "--domains", "french")
    with pytest.raises(ValueError, match="two at least that have drafters, got c"):
        asked(beyond, "record", "CORPORA", "--out", tmp_path, *SMALL, "--domains", "c")
    with pytest.raises(ValueError, match="holds no traces"):
        asked(beyond, "report", tmp_path)
