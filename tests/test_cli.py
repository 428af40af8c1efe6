"""The commands as a person uses them, on a tiny random target; every error they can meet."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import chain

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner

from nab import prometheus, prompts
from nab.backends import chains, pool
from nab.backends.audited import Audited
from nab.backends.session import Divergence
from nab.cli import main
from nab.console import View
from nab.sim import read_trace


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A target, a drafter that resembles it, one that returns NaN."""
    folder = tmp_path_factory.mktemp("models")
    model = tiny.llama(dtype=torch.float32)
    broken = tiny.perturbed(model, 0.1)
    broken.model.norm.weight.data[:] = float("nan")
    tiny.save(folder / "target", model)
    tiny.save(folder / "close", tiny.perturbed(model, 0.02))
    tiny.save(folder / "broken", broken)
    lines = [{"domain": d, "prompt": f"{d} {i}"} for d in ("red", "blue") for i in range(2)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


def arguments(folder, command, *more, drafters="close,lookup,early-exit"):
    pool = ",".join(str(folder / d) if (folder / d).is_dir() else d for d in drafters.split(","))
    options = {
        "--target": folder / "target",
        "--drafters": pool,
        "--dtype": "float32",
        "--prompts": folder / "prompts.jsonl",
        "--max-new-tokens": 24,
        "--threads": 1,
    }
    if "--prompt" in more:
        del options["--prompts"]
    if command == "audit":
        del options["--dtype"]
    return [command, *(str(word) for pair in options.items() for word in pair), *map(str, more)]


def nab(*arguments):
    return CliRunner().invoke(main, list(arguments))


def test_run_prints_one_json_object_and_writes_trace_and_picture(folder, tmp_path):
    trace, plot = tmp_path / "deep" / "trace.jsonl", tmp_path / "run.png"
    more = ["--objective", "token", "--json", "--trace", trace, "--plot", plot]
    result = nab(*arguments(folder, "run", *more))
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert set(found) == {"queries", "total"}
    assert [query["domain"] for query in found["queries"]] == ["red", "red", "blue", "blue"]
    for query in found["queries"]:
        assert {"text", "num_tokens", "mean_acceptance_length", "draft_acceptance_rate", "regret"} <= set(
            query
        )
        assert sum(query["choice_share"].values()) == pytest.approx(1)
        assert sum(query["draft_share"].values()) + query["plain_share"] == pytest.approx(1)
        assert set(query["choice_share"]) == {"close", "lookup", "early-exit"}
        assert query["tokens_per_second"] > 0
        assert query["num_tokens"] <= 24
    assert plot.read_bytes().startswith(b"\x89PNG")

    header, *records = map(json.loads, trace.read_text().splitlines())
    assert header["kind"] == "header"
    assert header["drafters"] == ["close", "lookup", "early-exit"]
    assert {"version", "command", "seed", "dtype", "processor", "temperature"} <= set(header)
    for number, query in enumerate(found["queries"]):
        rounds = [r for r in records if r["kind"] == "round" and r["query"] == number]
        assert sum(len(r["emitted"]) for r in rounds) == query["num_tokens"]
        assert sum(len(r["gamma"]) for r in rounds) == query["num_tokens"]
        losses = 1 - np.concatenate([r["gamma"] for r in rounds])
        played = np.concatenate([[r["probs"]] * len(r["emitted"]) for r in rounds])
        regret = (played * losses).sum() - losses.sum(0).min()
        assert query["regret"]["token"] == pytest.approx(regret, abs=1e-9)


@pytest.mark.parametrize("selector", ["hedge", "uniform", "fixed:lookup", "normal-hedge"])
@pytest.mark.parametrize("objective", ["token", "length", "time"])
def test_every_selector_is_measured_alike(folder, selector, objective, tmp_path):
    trace = tmp_path / "t.jsonl"
    more = ["--selector", selector, "--objective", objective, "--json", "--trace", trace, "--limit", 1]
    result = nab(*arguments(folder, "run", *more))
    assert result.exit_code == 0, result.output
    query = json.loads(result.stdout)["queries"][0]
    record = next(r for r in map(json.loads, trace.read_text().splitlines()) if r["kind"] == "query")
    asked = selector in ("hedge", "normal-hedge")
    if objective != "time":
        assert ("gamma" in record) is not asked  # who does not ask is scored after the fact
    if not asked:
        assert len(record["gamma"]) == query["num_tokens"]
    assert len(read_trace(trace).queries[0].gamma) == query["num_tokens"]
    assert sum(query["drafted_share"].values()) == pytest.approx(1)
    assert query["plain_share"] == query["drafted_share"].get("0", 0)
    if selector == "fixed:lookup":
        assert query["choice_share"]["lookup"] == 1
        losses = 1 - np.array(record["gamma"])
        best = losses.sum(0).min()
        assert query["regret"]["token"] == pytest.approx(losses[:, 1].sum() - best, abs=1e-9)


@pytest.mark.parametrize("evaluation", ["first", "corrected"])
def test_a_lazy_run_has_all_scores_in_its_trace(folder, evaluation, tmp_path):
    trace = tmp_path / "t.jsonl"
    options = ["--lazy", 3, "--objective", "length", "--evaluation", evaluation, "--limit", 1, "--json"]
    result = nab(*arguments(folder, "run", "--trace", trace, *options))
    assert result.exit_code == 0, result.output
    for query in read_trace(trace).queries:
        assert len(query.gamma) == len(query.tokens)
        asked = [k for k, round_ in enumerate(query.rounds, 1) if round_.gamma is not None]
        assert asked == list(range(3, len(query.rounds) + 1, 3))


def timeless(found):
    """Results without what a clock said."""
    if isinstance(found, dict):
        clocks = ("tokens_per_second", "selection_share", "seconds")
        return {name: timeless(value) for name, value in found.items() if name not in clocks}
    return [timeless(each) for each in found] if isinstance(found, list) else found


def answered(folder, out, *more, drafters="close,lookup,early-exit"):
    """JSON, records of the trace by prompt, the picture, and what was said, of a run that succeeds."""
    out.mkdir()
    files = ["--trace", out / "t.jsonl", "--plot", out / "p.png"]
    result = nab(*arguments(folder, "run", "--json", *files, *more, drafters=drafters))
    assert result.exit_code == 0, result.output
    assert read_trace(out / "t.jsonl").broken_off == ""
    _, *records = map(json.loads, (out / "t.jsonl").read_text().splitlines())
    prompts = sorted({record["query"] for record in records})
    by_prompt = [[timeless(record) for record in records if record["query"] == k] for k in prompts]
    return timeless(json.loads(result.stdout)), by_prompt, (out / "p.png").read_bytes(), result.stderr


@pytest.mark.parametrize(("more", "objective"), [([], "time"), (["--batch", 2], "token")])
def test_run_minimises_seconds_per_token_unless_in_a_batch(folder, tmp_path, more, objective):
    trace = tmp_path / "trace.jsonl"
    assert nab(*arguments(folder, "run", "--limit", 1, "--trace", trace, *more)).exit_code == 0
    found = read_trace(trace)
    assert found.header["objective"] == objective
    assert found.policies == ["normal-hedge argmax" if objective == "time" else "normal-hedge"]


@pytest.mark.parametrize(
    "selector", ["normal-hedge", "hedge .93 argmax", "ucb1", "uniform", "fixed:lookup", "plain"]
)
def test_prompts_decoded_together_give_what_they_give_alone(folder, tmp_path, selector):
    """At temperature 0 scores are 0 or 1, so not a bit may differ, nor in the picture."""
    more = ["--temperature", 0, "--dtype", "float64", "--selector", selector, "--objective", "length"]
    json_, records, picture, _ = answered(folder, tmp_path / "alone", *more)
    found = answered(folder, tmp_path / "together", *more, "--batch", 3)
    assert found[0] == json_
    assert found[1] == records
    assert found[2] == picture
    assert nab("replay", str(tmp_path / "together" / "t.jsonl")).exit_code == (selector == "plain")


def assert_same_draws(one, other):
    """Records with the same texts and choices, and nearly the same scores and laws."""
    for a, b in zip(chain(*one), chain(*other), strict=True):
        for name in ("start", "choice", "drafted", "accepted", "emitted", "text", "benched"):
            assert a.get(name) == b.get(name)
        for name in ("probs", "gamma", "realised"):
            if a.get(name) is not None:
                np.testing.assert_allclose(a[name], b[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize("more", [["token"], ["length", "--evaluation", "corrected"]])
def test_prompts_decoded_together_draw_the_same(folder, tmp_path, more):
    more = ["--temperature", 1, "--dtype", "float64", "--objective", *more]
    _, one, *_ = answered(folder, tmp_path / "alone", *more)
    _, other, *_ = answered(folder, tmp_path / "together", *more, "--batch", 4)
    assert_same_draws(one, other)


@pytest.mark.parametrize("selector", ["normal-hedge", "fixed:lookup"])
def test_a_drafter_that_returns_nan_is_benched_in_a_batch_too(folder, tmp_path, selector):
    more = ["--temperature", 1, "--dtype", "float64", "--selector", selector, "--objective", "token"]
    drafters = "broken,lookup"
    _, one, _, said = answered(folder, tmp_path / "alone", *more, drafters=drafters)
    _, other, _, also = answered(folder, tmp_path / "together", *more, "--batch", 3, drafters=drafters)
    assert_same_draws(one, other)
    line = "warning: drafter 0 (broken) is benched for this query"
    assert said.count(line) == also.count(line) == 4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--scheme", "top:2"], "--scheme top:2 does not go with --batch 2: give chain, or leave it out"),
        (["--evaluation", "exact"], "--evaluation exact does not .*: give first or corrected, or leave"),
        (["--objective", "time"], "--objective time does not .*: give token or length, or leave it out"),
        (["--lazy", 3], "--lazy 3 does not .*: give 1, or leave it out"),
        (["--drafter-limit", 2], "--drafter-limit 2.0 does not go with --batch 2: leave it out"),
        (["--drafters", "lookup,HEAD"], "--batch 2: HEAD cannot draft .* got Other; of these .* lookup can"),
    ],
)
def test_what_does_not_go_with_a_batch_is_named_before_anything_is_decoded(
    folder, tmp_path, more, message, monkeypatch
):
    class Other:
        name = "HEAD"

    build = pool._build
    monkeypatch.setattr(pool, "_build", lambda name, *rest: Other() if name == "HEAD" else build(name, *rest))
    trace = tmp_path / "t.jsonl"
    result = nab(*arguments(folder, "run", "--batch", 2, "--trace", trace, *more))
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert re.search(message, result.stderr)
    assert not trace.exists()


@pytest.mark.parametrize("selector", ["normal-hedge", "uniform"])
@pytest.mark.parametrize("rounds", [1, 4, 9])
def test_an_interrupted_batch_keeps_every_round(folder, tmp_path, monkeypatch, selector, rounds):
    """Ctrl-C while a round is shown: it and all rounds before it are in the results and in the trace."""
    watch = View.watch_together

    def interrupted(view, steps):
        def few():
            for _ in range(rounds):
                yield next(steps)
            raise KeyboardInterrupt

        watch(view, few())

    monkeypatch.setattr(View, "watch_together", interrupted)
    trace = tmp_path / "t.jsonl"
    more = ["--json", "--trace", trace, "--batch", 3, "--temperature", 1, "--selector", selector]
    result = nab(*arguments(folder, "run", *more))
    assert result.exit_code == 130, result.output
    found, read = json.loads(result.stdout)["queries"], read_trace(trace)
    assert read.broken_off == ""
    assert len(found) == len(read.queries) >= 3
    for query, traced in zip(found, read.queries, strict=True):
        assert query["num_spec_steps"] == len(traced.rounds)
        assert query["num_tokens"] == len(traced.tokens) == len(traced.gamma)
        assert traced.metrics["text"] == query["text"]
    assert max(len(traced.rounds) for traced in read.queries) == rounds


def test_compare_under_the_time_objective(folder):
    result = nab(*arguments(folder, "compare", "--objective", "time", "--limit", 1, "--jobs", 1, "--json"))
    assert result.exit_code == 0, result.output
    policies = json.loads(result.stdout)["policies"]
    timed = [policies[name]["total"] for name in ("normal-hedge", "normal-hedge argmax")]
    assert all(0 < total["plain_share"] <= 1 for total in timed)
    assert policies["plain"]["total"]["plain_share"] == 1


def test_run_shows_a_table_per_domain(folder):
    result = nab(*arguments(folder, "run"))
    assert result.exit_code == 0, result.output
    for word in ("red", "blue", "all", "MAT", "regret", "close"):
        assert word in result.stdout


SCHEMES = [
    ("multi-draft:3x2", "first"),
    ("without-replacement:2", "corrected"),
    ("top:3x1", "exact"),
    ("static:0,1,0.0,0.1,0.0.0,0.0.0.0", "exact"),
    ("dynamic:3x8", "corrected"),
]


@pytest.mark.parametrize(("scheme", "evaluation"), SCHEMES)
def test_every_scheme_and_evaluation_runs_and_its_trace_replays(folder, tmp_path, scheme, evaluation):
    trace, options = tmp_path / "t.jsonl", ["--scheme", scheme, "--evaluation", evaluation, "--limit", 1]
    result = nab(*arguments(folder, "run", "--json", "--objective", "length", "--trace", trace, *options))
    assert result.exit_code == 0, result.output
    total = json.loads(result.stdout)["total"]
    assert total["mean_acceptance_length"] > 1
    assert len(total["acceptance_histogram"]) == 5
    assert total["benched"] == {}
    header = json.loads(trace.read_text().splitlines()[0])
    assert (header["scheme"], header["evaluation"]) == (scheme, evaluation)
    assert nab("replay", str(trace), "--out", str(tmp_path / "replay")).exit_code == 0


@pytest.mark.parametrize("scheme", ["top:3x2x1", "dynamic:4x12", "without-replacement:3x1"])
def test_trees_give_the_plain_greedy_text(folder, scheme):
    result = nab(*arguments(folder, "compare", "--temperature", "0", "--limit", 1, "--scheme", scheme))
    assert result.exit_code == 0, result.output
    assert "Every policy produced the same text as plain decoding" in result.output


def test_plain_decoding_is_a_selector_of_run_too(folder, tmp_path):
    plot = tmp_path / "plain.png"
    result = nab(*arguments(folder, "run", "--selector", "plain", "--limit", 1, "--plot", plot))
    assert result.exit_code == 0, result.output
    assert "1.00" in result.stdout


def test_compare_at_temperature_0_finds_the_same_text_everywhere(folder, tmp_path):
    plot = tmp_path / "compare.png"
    result = nab(*arguments(folder, "compare", "--temperature", 0, "--dtype", "float64", "--plot", plot))
    assert result.exit_code == 0, result.output
    assert "Every policy produced the same text as plain decoding" in result.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_compare_json_holds_every_policy(folder):
    result = nab(*arguments(folder, "compare", "--temperature", 1, "--limit", 1, "--json"))
    found = json.loads(result.stdout)
    singles = ["fixed:close", "fixed:lookup", "fixed:early-exit"]
    assert list(found["policies"]) == ["plain", *singles, "uniform", "normal-hedge", "hedge"]
    assert found["same_text"] is None
    totals = {name: policy["total"] for name, policy in found["policies"].items()}
    assert totals["plain"]["mean_acceptance_length"] == 1
    assert min(totals[name]["stopping_time_regret"] for name in singles) >= 0
    assert totals["fixed:close"]["mean_acceptance_length"] > totals["fixed:lookup"]["mean_acceptance_length"]
    for policy in found["policies"].values():
        assert len(policy["queries"]) == 2


@pytest.mark.parametrize("command", ["run", "compare"])
def test_what_prometheus_reads_is_what_the_json_says(folder, tmp_path, command):
    """By policy and domain; that the text is the dictionaries is in tests/test_prometheus.py."""
    file = tmp_path / "deep" / "nab.prom"
    more = ["--json", "--objective", "token", "--limit", 1, "--prometheus", file]
    result = nab(*arguments(folder, command, *more))
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    totals = {"normal-hedge": found["total"]} if command == "run" else found["policies"]
    totals = {name: each.get("total", each) for name, each in totals.items()}
    series = [
        ({"policy": policy, "domain": domain}, each)
        for policy, total in totals.items()
        for domain, each in total["domains"].items()
    ]
    assert {labels["domain"] for labels, _ in series} == {"red", "blue"}
    assert file.read_text() == prometheus.text(series)


def test_answers_side_by_side_are_those_one_after_the_other(folder, tmp_path):
    found = []
    for jobs in (1, 2):
        trace = tmp_path / f"{jobs}.jsonl"
        more = ["--temperature", 1, "--limit", 1, "--json", "--jobs", jobs, "--trace", trace]
        result = nab(*arguments(folder, "compare", *more))
        assert result.exit_code == 0, result.stderr
        found.append((json.loads(result.stdout)["policies"], trace.read_text().splitlines()))
    (one, trace), (two, other) = found
    assert len(trace) == len(other)
    for name in one:
        for a, b in zip(one[name]["queries"], two[name]["queries"], strict=True):
            assert a["text"] == b["text"]
            assert a["choice_share"] == b["choice_share"]
        domains = one[name]["total"]["domains"]
        lengths = {d: each["replayed_acceptance_length"] for d, each in domains.items()}
        assert all(length is None for length in lengths.values()) is (name.startswith(("plain", "fixed")))
        for domain, each in two[name]["total"]["domains"].items():
            assert each["replayed_acceptance_length"] == lengths[domain]


def test_what_goes_wrong_in_another_process_is_one_line(folder):
    more = ["--jobs", 2, "--target", folder / "broken", "--drafters", "lookup"]
    result = nab(*arguments(folder, "compare", *more))
    assert result.exit_code == 1
    assert result.stderr.strip().endswith("broken returned logits that are NaN or infinite")


def test_a_run_repeats_with_its_seed(folder):
    texts = []
    for seed in (1, 1, 2):
        more = ["--json", "--objective", "token", "--seed", seed, "--temperature", 1]
        result = nab(*arguments(folder, "run", *more))
        texts.append([query["text"] for query in json.loads(result.stdout)["queries"]])
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prompt", ""], "prompt 1: the prompt is empty"),
        (["--prompt", "x" * 2000], "prompt 1: 2000 prompt tokens.*more than the context of target, 1024"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--target", "nowhere"], "no model at nowhere"),
        (
            ["--drafters", "lockup"],
            "no drafter 'lockup' for the target target: choose from lookup, early-exit",
        ),
        (
            ["--drafters", "python"],
            "no drafter 'python' for the target target: choose from lookup, early-exit",
        ),
        (
            ["--selector", "best"],
            "unknown selector 'best': choose from normal-hedge, .*uniform, fixed:close",
        ),
        (["--selector", "fixed:nobody"], "unknown selector 'fixed:nobody'.*fixed:lookup"),
        (["--prompt", "a", "--prompts", "b"], "give --prompt or --prompts, not both"),
        (["--scheme", "bush"], "unknown scheme 'bush': choose for instance chain, multi-draft"),
        (["--scheme", "chain:2"], "unknown scheme 'chain:2': choose"),
        (["--scheme", "static:"], "scheme 'static:': it needs whole numbers with '.' between them, got ''"),
        (["--scheme", "dynamic:4"], "it needs a width and a number of nodes, got 1 numbers"),
        (
            ["--evaluation", "corrected", "--objective", "token"],
            "corrected changes nothing under the token objective: give --obj",
        ),
        (["--scheme", "top:0"], "scheme 'top:0': k must be at least 1, got 0; choose for instance"),
        (["--scheme", "top:x"], "scheme 'top:x': it needs whole numbers with 'x' between them, got 'x'"),
        (["--scheme", "top:2x2x2x2x2"], "scheme 'top:2x2x2x2x2': it has 5 widths for 4 levels"),
        (["--scheme", "static:0,0.1"], r"scheme 'static:0,0.1': path \(0, 1\) needs .*\(0, 0\)"),
        (["--scheme", "static:0"], "scheme 'static:0': it is 1 deep, not 4"),
        (["--scheme", "top:9"], "scheme 'top:9': a tree of 9 x 9 x 9 x 9 has 7380 nodes, at most 4096"),
        (["--drafter-limit", "0"], "limit must be a positive number of seconds or None, got 0"),
        (["--drafters", "lookup,"], "a drafter without a name in 'lookup,'"),
        (["--plot", "picture"], "cannot draw into picture: give a file ending in .*png"),
        (["--plot", "picture.xyz"], "cannot draw into picture.xyz: give a file ending in .*png"),
        (["--plot", "."], "cannot draw into"),
        (["--prometheus", "."], "cannot write metrics to .: it is a folder"),
        (["--temperature", "-1"], "temperature must be .* at least 0, got -1"),
        (["--top-p", "2"], r"top_p must lie in \(0, 1\], got 2"),
        (["--device", "cuda:9"], "cuda"),
    ],
)
def test_errors_are_one_line_and_a_non_zero_exit(folder, more, message):
    result = nab(*arguments(folder, "run", *more))
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ")
    assert re.search(message, result.stderr)


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"text": "a"}', '{"prompt": 3}', '"a"', '{"prompt": "\\ud800"}']
)
def test_a_bad_prompt_file_is_named_with_its_line(folder, tmp_path, line):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "good"}\n\n' + line + "\n")
    result = nab(*arguments(folder, "run", "--prompts", file))
    assert result.exit_code == 1
    assert "line 3: expected" in result.stderr


def test_prompt_files_with_a_mark_and_line_separators_inside_strings_are_read(folder, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "one\u2028two"}\r\n', encoding="utf-8-sig")
    assert prompts.read(file) == [prompts.Prompt("one\u2028two")]
    file.write_bytes(b"\xff\xfe")
    assert "p.jsonl is not UTF-8" in nab(*arguments(folder, "run", "--prompts", file)).stderr


def test_damaged_weights_are_one_line(folder, tmp_path):
    damaged = tiny.save(tmp_path / "damaged", tiny.llama())
    (damaged / "model.safetensors").write_bytes(b"garbage")
    result = nab(*arguments(folder, "run", "--target", damaged))
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1


def test_answers_are_printed_where_there_is_no_terminal(folder):
    stdout = nab(*arguments(folder, "run", "--limit", 1, "--max-new-tokens", 4)).stdout
    found = json.loads(nab(*arguments(folder, "run", "--limit", 1, "--max-new-tokens", 4, "--json")).stdout)
    assert all(query["text"].split("\n")[0] in stdout for query in found["queries"])


def test_a_drafter_that_returns_nan_is_named_and_nothing_is_lost(folder, tmp_path):
    trace = tmp_path / "t.jsonl"
    result = nab(*arguments(folder, "run", "--json", "--trace", trace, drafters="close,broken"))
    assert result.exit_code == 0
    line = "warning: drafter 1 (broken) is benched for this query: ValueError: broken returned logits"
    assert result.stderr.count(line) == 4  # one for each prompt
    total = json.loads(result.stdout)["total"]
    assert total["benched"] == {"broken": 4}
    assert total["choice_share"]["close"] > 0.8
    assert len(trace.read_text().splitlines()) > 4


def test_a_drafter_beyond_its_limit_is_benched(folder):
    # scored in every round, so that no drafter is quicker than its clock each time
    more = ["--json", "--objective", "token", "--drafter-limit", 1e-9, "--limit", 1]
    result = nab(*arguments(folder, "run", *more))
    assert result.exit_code == 0, result.output
    assert "TimeoutError: it was not done after 1e-09 s" in result.stderr
    total = json.loads(result.stdout)["total"]
    assert total["benched"]["close"] == 2  # lookup may have been quicker than its clock


def test_debug_shows_the_traceback(folder):
    result = nab(*arguments(folder, "run", "--debug", "--selector", "best"))
    assert isinstance(result.exception, ValueError)


@pytest.fixture
def ctrl_c_is_heard():
    """Background jobs of a shell are born deaf to it, and so would be their children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("command", "more"), [("run", []), ("run", ["--batch", 4]), ("compare", []), ("compare", ["--jobs", 2])]
)
@pytest.mark.usefixtures("ctrl_c_is_heard")
def test_ctrl_c_keeps_the_table_and_the_trace(folder, tmp_path, command, more):
    trace, new = tmp_path / "t.jsonl", 60 if command == "compare" else 900
    more = [*more, "--trace", trace, "--max-new-tokens", new, "--temperature", 1]
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a", "domain": "red"}\n' * 500)
    command = [sys.executable, "-m", "nab", *arguments(folder, command, *more, "--prompts", file)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        while process.poll() is None and (not trace.exists() or trace.read_text().count("\n") < 500):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130, err
    assert err.strip() == "interrupted"
    assert "red" in out
    assert "MAT" in out
    assert all(json.loads(line) for line in trace.read_text().splitlines())
    assert sum(len(query.rounds) for query in read_trace(trace).queries) > 400


@pytest.mark.parametrize(
    ("calls", "answered"), [(3, ["plain", "fixed:close"]), (9, None), (2, ["plain"]), (1, [])]
)
def test_an_interrupted_comparison_shows_what_can_be_compared(folder, monkeypatch, tmp_path, calls, answered):
    """Interrupted in the n-th answer: the prompts all policies answered, or those who answered the first."""
    watch, count = View.watch, iter(range(1, 100))

    def interrupted(view, label, query, rounds):
        if next(count) == calls:
            next(rounds)
            raise KeyboardInterrupt
        watch(view, label, query, rounds)

    monkeypatch.setattr(View, "watch", interrupted)
    picture = tmp_path / "c.png"
    result = nab(*arguments(folder, "compare", "--json", "--temperature", 0, "--plot", picture))
    assert result.exit_code == 130, result.output
    assert picture.exists() == (answered != [])
    if answered == []:
        assert result.stdout == ""
        return
    found = json.loads(result.stdout)["policies"]
    assert answered is None or list(found) == answered
    assert all(len(policy["queries"]) == 1 for policy in found.values())


AUDIT = ["--temperature", 1, "--draft-len", 2, "--error", 0.15, "--answers"]


def test_an_audit_passes_and_says_how_sure_it_is(folder):
    result = nab(*arguments(folder, "audit", *AUDIT, 150, "--json"))
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["passed"] is found["greedy"]["passed"] is found["sampling"]["passed"] is True
    assert found["greedy"]["prompts"] == 4
    assert found["sampling"]["answers"] == 150
    assert found["sampling"]["control"]["power"] >= 0.99
    assert found["mean_acceptance_length"] > 1
    assert (found["header"]["dtype"], found["header"]["objective"]) == ("float64", "token")
    for said in (
        "passed, all are the model's",
        "passed, they have the model's law",
        "tokens per target forward",
    ):
        assert said in result.stderr


@pytest.mark.parametrize(("selector", "orders"), [("fixed:early-exit", 2), ("uniform", 2), ("plain", 1)])
def test_an_audit_of_few_answers_is_undecided(folder, selector, orders):
    more = [*AUDIT, 4, "--selector", selector, "--scheme", "multi-draft:2x1", "--json"]
    result = nab(*arguments(folder, "audit", *more))
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert (found["greedy"]["passed"], found["sampling"]["accepted"], found["passed"]) == (True, True, False)
    assert len(found["sampling"]["chi_squares"]) == 3 * orders
    assert "UNDECIDED" in result.stderr


def test_at_temperature_0_only_greedy_texts_are_audited(folder):
    result = nab(*arguments(folder, "audit", "--temperature", 0, "--scheme", "top:2x1x1x1"))
    assert result.exit_code == 0, result.output
    assert "greedy: 4 answers" in result.stdout
    assert "sampling" not in result.stdout


def always_accepted(draft, logits_or_laws, *uniforms):
    return chains.Found(draft.ids[0].tolist(), draft.ids.shape[1], 0, True, True)


@pytest.mark.parametrize(("name", "part"), [("agreed", "greedy"), ("tested", "sampling")])
def test_an_audit_finds_a_broken_verification(folder, monkeypatch, name, part):
    monkeypatch.setattr(chains, name, always_accepted)
    result = nab(*arguments(folder, "audit", *AUDIT, 60, "--json", drafters="early-exit"))
    assert result.exit_code == 1, result.output
    found = json.loads(result.stdout)
    assert found["passed"] is found[part]["passed"] is False
    assert found["sampling"]["accepted"] is (part == "greedy")
    assert result.stderr.count("FAILED") == 1


@pytest.mark.parametrize(("answers", "parts"), [(3, ["greedy"]), (9, ["greedy", "sampling"]), (0, [])])
def test_an_interrupted_audit_shows_what_it_has(folder, monkeypatch, answers, parts):
    """Ctrl-C in a greedy answer, in a drawn one, before the first."""
    honest, count = Audited._answer, iter(range(100))

    def interrupted(*arguments, **named):
        if next(count) == answers:
            raise KeyboardInterrupt
        return honest(*arguments, **named)

    monkeypatch.setattr(Audited, "_answer", interrupted)
    result = nab(*arguments(folder, "audit", *AUDIT, 20, "--json"))
    assert result.exit_code == 130
    found = json.loads(result.stdout) if parts else {}
    assert [name for name in ("greedy", "sampling") if name in found] == parts
    if parts:
        assert found["passed"] is False
        assert found["greedy"]["prompts"] == min(answers, 4)
    if "sampling" in parts:
        assert found["sampling"]["answers"] == answers - 4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--selector", "best"], "error: unknown selector 'best': choose from"),
        (["--temperature", -1], "error: temperature must be a finite number of at least 0, got -1"),
        (["--prompt", ""], "error: prompt 1: "),
        (["--max-new-tokens", 2000], "error: prompt 1: .* more than the context of target, 1024"),
    ],
)
def test_what_cannot_be_audited_is_one_line(folder, more, message):
    result = nab(*arguments(folder, "audit", *more))
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert re.match(message, result.stderr)
    assert nab(*arguments(folder, "audit", "--dtype", "bfloat16")).exit_code == 2


def test_the_audit_of_the_tiny_target(tmp_path):
    """A prompt a domain and few answers: ``nab audit --target tiny`` alone takes a minute."""
    more = ["--drafters", "lookup,json", "--max-new-tokens", "12", "--answers", "20", "--json"]
    result = nab("audit", "--target", "tiny", *more)
    assert result.exit_code == 1, result.stderr
    found = json.loads(result.stdout)
    assert found["greedy"] == {"passed": True, "prompts": 7, "tokens": 84, "differences": []}
    assert found["sampling"]["accepted"]


def test_without_a_network_and_a_cache_one_line_says_so(tmp_path):
    environment = {**os.environ, "NAB_HOME": str(tmp_path), "PIP_NO_INDEX": "1"}
    environment.pop("PIP_FIND_LINKS", None)
    command = [sys.executable, "-m", "nab", "run", "--prompt", "a"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "error: the default target is not in" in result.stderr.splitlines()[-1]


def test_a_divergence_is_rounding_when_the_gap_is_within_the_errors():
    assert Divergence(0, ("a", "b"), gap=0.1, error=0.05, reference="float32").is_rounding
    assert not Divergence(0, ("a", "b"), gap=0.11, error=0.05, reference="float32").is_rounding


def test_the_tiny_target_brings_its_own_prompts_and_drafters():
    result = nab("run", "--target", "tiny", "--limit", "1", "--max-new-tokens", "6", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert [query["domain"] for query in found["queries"]] == [
        "c", "english", "javascript", "json", "legal", "mathematics", "python"
    ]  # fmt: skip
    assert len(found["total"]["single_drafters"]) == 9
