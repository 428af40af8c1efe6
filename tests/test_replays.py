"""What ``nab replay`` computes, where it is known exactly, and the command as a person uses it."""

import csv
import json
import re
from math import ceil

import numpy as np
import pytest
from click.testing import CliRunner
from test_trace import recorded

import nab
from nab import learners, measure, replays
from nab.cli import main
from nab.learners import bandits
from nab.sim import TracedQuery, read_trace
from nab.sim.trace import Trace

POSITIONS, DRAFT_LEN = 22, 3


def text(accepted, number=0, domain=""):
    """A text on which each drafter is accepted with these certainties, ``(positions, n)``."""
    accepted = np.array(accepted, dtype=float)
    query = TracedQuery(number, "normal-hedge", domain, (), accepted, accepted, {})
    names = [f"d{i}" for i in range(accepted.shape[1])]
    return replays.Text(Trace("t.jsonl", {"drafters": names, "draft_len": DRAFT_LEN}, (query,), ""), query)


def table(*texts, objective=None, **options):
    rows = replays.replayed(texts, DRAFT_LEN, objective or nab.Token(), **{"replays": 2, **options})
    return replays.compared([row for each in rows for row in each])


def by_policy(rows):
    return {row["policy"]: row for row in rows}


def test_every_learner_and_bandit_is_replayed():
    played = replays.policies(2, DRAFT_LEN, nab.Token())
    selectors = [policy.make(0) for policy in played.values()]
    full = {type(each.learner) for each in selectors if isinstance(each, nab.Selector)}
    wrapped = {learners.Interleaved, learners.Blocks}
    classes = {getattr(learners, name) for name in learners.__all__}
    assert full == {each for each in classes if isinstance(each, type)} - wrapped
    seen = {type(each.bandit) for each in selectors if isinstance(each, nab.BanditSelector)}
    same = {bandits.EXP3}  # see test_bandits_that_differ_in_their_loss_alone_are_one_here
    classes = {each for each in vars(bandits).values() if hasattr(each, "update") and hasattr(each, "probs")}
    assert seen | same == {each for each in classes if each is not bandits.Hedge}


@pytest.mark.parametrize("objective", [nab.Token(), nab.Length(DRAFT_LEN)])
@pytest.mark.parametrize("n", [1, 3])
def test_where_drafters_are_alike_every_policy_is_the_best_drafter(n, objective):
    column = np.random.default_rng(0).integers(0, 2, (POSITIONS, 1))
    for row in table(text(np.repeat(column, n, axis=1)), objective=objective):
        assert row["of_query_best"] == row["of_domain_best"] == pytest.approx(1, abs=1e-12)
        assert row["stopping_time_regret"] == pytest.approx(0, abs=1e-12)
        assert row["token_regret"] == pytest.approx(0, abs=1e-12)
        assert row["token_loss"] == pytest.approx(POSITIONS - column.sum(), abs=1e-12)


def test_one_drafter_is_always_and_one_never_accepted():
    rows = by_policy(table(text([[1, 0]] * POSITIONS)))
    best = ceil(POSITIONS / (DRAFT_LEN + 1))
    assert (rows["fixed:d0"]["rounds"], rows["fixed:d1"]["rounds"]) == (best, POSITIONS)
    assert rows["fixed:d1"]["stopping_time_regret"] == POSITIONS - best
    assert rows["fixed:d1"]["of_query_best"] == best / POSITIONS
    assert (rows["fixed:d0"]["token_regret"], rows["fixed:d1"]["token_regret"]) == (0, POSITIONS)
    assert rows["uniform"]["token_regret"] == POSITIONS / 2
    # the first draw of argmax is drafter 0, and the law that it was the mode of is not what was played
    assert rows["hedge .93 argmax"]["token_regret"] == 0
    assert rows["hedge .93 argmax"]["rounds"] == best
    assert 0 < rows["hedge .93"]["token_regret"] < POSITIONS / 2
    for row in rows.values():
        assert row["scored"] == (row["kind"] in ("learner", "argmax"))
        assert row["rounds"] >= best


def test_what_is_said_of_single_drafters_is_what_is_measured_in_a_run(tmp_path):
    path = tmp_path / "t.jsonl"
    recorded(path, policies=["plain", "normal-hedge"], tokens=40)
    trace = read_trace(path)
    answers = replays.texts([trace])
    assert [answer.query.policy for answer in answers] == ["normal-hedge"] * 2
    for answer, found in zip(answers, replays.replayed(answers, 3, nab.Token()), strict=True):
        rows = by_policy(replays.compared(found))
        singles = answer.query.metrics["single_drafters"]
        for name, length in singles.items():
            assert rows[f"fixed:{name}"]["mean_acceptance_length"] == pytest.approx(length, rel=1e-12)
        best = max(singles.values())
        for row in rows.values():
            assert row["of_query_best"] == pytest.approx(row["mean_acceptance_length"] / best, rel=1e-12)


def test_a_replay_of_the_command_is_that_of_a_comparison():
    rng = np.random.default_rng(0)
    one = text(rng.random((POSITIONS, 3)))
    query = measure.Query(one.trace.drafters, DRAFT_LEN)
    query.scores = lambda: (one.query.gamma, one.query.realised)

    class Seeds:
        def spawn(self, count):
            return np.random.SeedSequence([5, 0]).spawn(count)

    rows = by_policy(table(one, replays=measure.REPLAYS, seed=5))
    for name, policy in replays.policies(3, DRAFT_LEN, nab.Token()).items():
        tokens, rounds = query.replayed(policy.make, Seeds())
        assert rows[name]["mean_acceptance_length"] == pytest.approx(tokens / rounds, rel=1e-12)


def test_domains_are_set_against_their_own_best_drafter():
    red = text([[1, 0]] * 20, 0, "red"), text([[0, 1]] * 8, 1, "red")
    rows = table(*red, text([[0, 1]] * 20, 2, "blue"))
    found = {(row["policy"], row["query"]): row for row in rows}
    assert [found["fixed:d0", k]["of_domain_best"] for k in range(3)] == [1, 1, 5 / 20]
    assert [found["fixed:d1", k]["of_domain_best"] for k in range(3)] == [5 / 20, 8 / 2, 1]
    assert [found["fixed:d0", k]["of_query_best"] for k in range(3)] == [1, 2 / 8, 5 / 20]
    totals = replays.totals(rows)
    assert totals["fixed:d0"]["domains"] == {"red": 1, "blue": 5 / 20}
    assert totals["fixed:d1"]["domains"] == {"red": (5 + 8) / (20 + 2), "blue": 1}
    assert totals["fixed:d0"]["relative"] == (5 + 8 + 5) / (5 + 8 + 20)
    assert totals["fixed:d0"]["mean_acceptance_length"] == 48 / (5 + 8 + 20)
    assert totals["fixed:d0"]["stopping_time_regret"] == (6 + 15) / 3
    assert totals["fixed:d0"]["token_regret"] == (8 + 20) / 3
    assert totals["normal-hedge"]["scored"] == 1


def test_a_text_meets_its_own_uniforms_whatever_else_is_replayed():
    rng = np.random.default_rng(1)
    first, second = (text(rng.random((POSITIONS, 3)), k) for k in range(2))
    alone, both, other = table(first), table(first, second), table(first, seed=1)
    assert [row["rounds"] for row in both if row["query"] == 0] == [row["rounds"] for row in alone]
    assert [row["rounds"] for row in other] != [row["rounds"] for row in alone]


# The command


def run(*arguments):
    return CliRunner().invoke(main, ["replay", *map(str, arguments)])


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("traces") / "t.jsonl"
    recorded(path)
    return path


def test_a_table_a_picture_and_tidy_rows(trace, tmp_path):
    out = tmp_path / "deep" / "out"
    result = run(trace, "--replays", 1, "--out", out)
    assert result.exit_code == 0, result.output
    for word in (
        "red",
        "blue",
        "MAT",
        "normal-hedge",
        "ucb-spec",
        "fixed:lookup",
        "fixed:lookup, draft length 3",
    ):
        assert word in result.stdout
    assert result.stderr == ""
    assert (out / "replay.png").read_bytes().startswith(b"\x89PNG")
    with (out / "replay.csv").open() as file:
        rows = list(csv.DictReader(file))
    policies = len(replays.policies(2, 3, nab.Token())) + 2
    assert len(rows) == 2 * policies
    assert {(row["query"], row["domain"], row["recorded"]) for row in rows} == {
        ("0", "red", "fixed:lookup"), ("1", "blue", "fixed:lookup")
    }  # fmt: skip
    assert all(float(row["stopping_time_regret"]) >= 0 for row in rows if row["kind"] == "single")


def test_json_holds_what_the_table_shows(trace):
    options = ["--policy", "ucb-spec", "--objective", "length", "--draft-len", 2, "--replays", 1, "--json"]
    result = run(trace, *options)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert set(found) == {"broken_off", "policies", "rows"}
    assert {row["recorded"] for row in found["rows"]} == {"ucb-spec"}
    assert replays.totals(found["rows"]) == found["policies"]
    assert "2 texts of ucb-spec, draft length 2, length objective" in result.stderr


def test_several_traces_are_pooled(trace, tmp_path):
    other = tmp_path / "other.jsonl"
    recorded(other, prompts=["green"], policies=["normal-hedge"])
    found = json.loads(run(trace, other, "--replays", 1, "--json").stdout)
    assert {row["trace"] for row in found["rows"]} == {str(trace), str(other)}
    assert list(found["policies"]["uniform"]["domains"]) == ["red", "blue", "green"]


def test_a_trace_that_breaks_off_is_replayed_as_far_as_it_goes(trace, tmp_path):
    path = tmp_path / "cut.jsonl"
    recorded(path, policies=["normal-hedge"])
    *before, last_round, _ = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*before, last_round[:40]]))
    result = run(path, "--replays", 1, "--json")
    assert result.exit_code == 0, result.output
    warning, found = result.stderr.splitlines()[0], json.loads(result.stdout)
    assert re.fullmatch(
        r"warning: .*cut.jsonl, line \d+ is cut off: the answer to prompt 2 under .*", warning
    )
    assert [warning] == [f"warning: {each}" for each in found["broken_off"]]
    tokens = {row["query"]: row["tokens"] for row in found["rows"]}
    assert 0 < tokens[1] < tokens[0] == 12


def test_ctrl_c_keeps_the_texts_that_are_done(trace, tmp_path, monkeypatch):
    whole = replays.replayed

    def interrupted(*arguments, **options):
        yield next(whole(*arguments, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(replays, "replayed", interrupted)
    result = run(trace, "--replays", 1, "--json", "--out", tmp_path)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "interrupted"
    assert {row["query"] for row in json.loads(result.stdout)["rows"]} == {0}
    assert (tmp_path / "replay.png").exists()
    assert (tmp_path / "replay.csv").exists()

    def at_once(*arguments, **options):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(replays, "replayed", at_once)
    result = run(trace, "--json")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "interrupted\n")


def test_errors_are_one_line_and_a_non_zero_exit(trace, tmp_path):
    def file(name, content=None, **options):
        path = tmp_path / name
        if content is None:
            recorded(path, prompts=["red"], **options)
        else:
            path.write_bytes(content)
        return path

    header, first, *rest = trace.read_bytes().splitlines(keepends=True)
    others = file("others.jsonl", policies=["normal-hedge"], drafters=["sampled", "bigram"])
    longer = file("longer.jsonl", policies=["normal-hedge"], draft_len=5)
    none = file("none.jsonl", policies=["normal-hedge"], draft_len=0)
    for arguments, message in (
        ([tmp_path / "nowhere.jsonl"], "nowhere.jsonl"),
        ([tmp_path], "directory"),
        ([file("empty.jsonl", b"")], "empty.jsonl is empty: a trace begins with a header"),
        ([file("foreign.jsonl", b'{"prompt": "a"}\n')], "foreign.jsonl, line 1: expected a JSON object"),
        (
            [file("middle.jsonl", b"".join([header, first[:9], b"\n", *rest]))],
            "middle.jsonl, line 2: no JSON",
        ),
        ([file("head.jsonl", header)], "head.jsonl has no answer of a policy with scored drafters"),
        ([trace, "--policy", "plain"], "has no answer of plain with scored drafters"),
        (
            [trace, "--policy", "best"],
            "no policy 'best' in .*: choose from plain, fixed:lookup, normal-hedge",
        ),
        (
            [trace, others],
            "others.jsonl has the drafters sampled, bigram, .* sampled, lookup: replay them one",
        ),
        ([trace, longer], r"the traces have draft lengths \[3, 5\]: say which one to replay"),
        ([none], r"line 2: drafted must lie in 0 \.\. 0"),
        ([trace, "--out", trace], "t.jsonl"),
    ):
        result = run(*arguments)
        assert result.exit_code == 1, result.output
        assert result.stderr.count("\n") == 1
        assert result.stderr.startswith("error: ")
        assert re.search(message, result.stderr), result.stderr
    assert run().exit_code == 2
    assert run(trace, longer, "--draft-len", 3, "--replays", 1).exit_code == 0
    assert isinstance(run(others.parent / "empty.jsonl", "--debug").exception, ValueError)


@pytest.mark.parametrize(("command", "more"), [("run", []), ("compare", ["--jobs", "1"])])
def test_what_run_and_compare_write_replays(tmp_path, command, more):
    path = tmp_path / "t.jsonl"
    tiny = ["--target", "tiny", "--prompt", "def f(", "--max-new-tokens", "12", "--trace", str(path)]
    result = CliRunner().invoke(main, [command, *tiny, *more])
    assert result.exit_code == 0, result.output
    found = json.loads(run(path, "--replays", 1, "--json").stdout)
    (query,) = [query for query in read_trace(path).queries if query.policy == found["rows"][0]["recorded"]]
    singles = query.metrics["single_drafters"]
    for name, length in singles.items():
        assert found["policies"][f"fixed:{name}"]["mean_acceptance_length"] == pytest.approx(length, rel=1e-9)
    assert read_trace(path).broken_off == ""
