"""What was written is read back bit for bit, a crash costs what was not written, and damage is named."""

import json
from dataclasses import asdict
from itertools import zip_longest

import numpy as np
import pytest
from test_decode import POOL, TARGET

import nab
from nab import measure
from nab.learners.bandits import UCBSpec
from nab.sim import TraceWriter, read_trace, regret

HEADER = {
    "version": nab.__version__,
    "command": "nab run",
    "seed": 0,
    "target": "markov",
    "drafters": ["sampled", "lookup"],
    "dtype": "float64",
    "draft_len": 3,
    "device": "cpu",
    "processor": "one that counts",
}
SELECTORS = {
    "plain": lambda: nab.Constant([0.5, 0.5], rng=0),
    "fixed:lookup": lambda: nab.Constant([0.0, 1.0]),
    "normal-hedge": lambda: nab.Selector(nab.NormalHedge(), 2, rng=0),
    "lazy": lambda: nab.Lazy(nab.Selector(nab.NormalHedge(), 2, rng=0), every=4),
    "ucb-spec": lambda: nab.BanditSelector(UCBSpec(3), 2, draft_len=3, rng=0),
}


def recorded(path, *, prompts=("red", "blue"), policies=SELECTORS, tokens=12, **header):
    """A trace as the commands write it, of answers by Markov models; the queries that it is of."""
    queries = []
    with TraceWriter(path, {**HEADER, **header}) as trace:
        for number, domain in enumerate(prompts):
            for policy in policies:
                query = measure.Query(HEADER["drafters"], 0 if policy == "plain" else 3, domain)
                where = {"query": number, "policy": policy, "domain": domain}
                selector = SELECTORS[policy]()
                rounds = query.run(TARGET, POOL, selector, [0], max_new_tokens=tokens, rng=number)
                list(trace.keep(rounds, where))
                scores = dict(zip(("gamma", "realised"), query.unasked_scores(), strict=False))
                trace.write("query", {**where, **measure.metrics([query]), **scores})
                queries.append(query)
    return queries


def test_what_was_written_is_read_back_to_the_last_bit(tmp_path):
    path = tmp_path / "t.jsonl"
    queries = recorded(path)
    trace = read_trace(path)
    assert trace.header == {"format": 1, **HEADER}
    assert (trace.drafters, trace.draft_len, trace.broken_off) == (["sampled", "lookup"], 3, "")
    assert trace.policies == list(SELECTORS)
    found = [(query.number, query.domain, query.policy) for query in trace.queries]
    assert found == [(k, domain, policy) for k, domain in enumerate(["red", "blue"]) for policy in SELECTORS]
    for query, written in zip(trace.queries, queries, strict=True):
        assert query.metrics == measure.metrics([written])
        assert query.tokens == written.tokens
        for one, other in zip(query.rounds, written.rounds, strict=True):
            np.testing.assert_equal(asdict(one), asdict(other), strict=True)
        for one, other in zip((query.gamma, query.realised), written.scores(), strict=True):
            np.testing.assert_array_equal(one, other, strict=True)
        if query.policy == "plain":
            assert query.gamma.shape == query.realised.shape == (0, 2)
            continue
        assert len(query.gamma) == 12
        for objective in (nab.Token(), nab.Length(3)):
            losses = query.losses(objective)
            np.testing.assert_array_equal(losses, objective(*written.scores()))
            steps = regret(query.played[: len(losses)], losses)
            np.testing.assert_array_equal(steps, written.regret(objective))


def test_a_selector_that_asks_now_and_then_is_read_as_far_as_it_asked(tmp_path):
    class Lazy(nab.Constant):
        waiting = None

        def observe(self, emitted, evaluate, **spent):
            super().observe(emitted, evaluate, **spent)
            self.waiting = self.waiting + evaluate if self.waiting else evaluate
            if len(self.waiting.tokens) - self.waiting.start < 5:
                return None
            scores, self.waiting = self.waiting(), None
            return scores

    path, where = tmp_path / "t.jsonl", {"query": 0, "policy": "lazy", "domain": ""}
    rounds = nab.decode(TARGET, POOL, Lazy([0.5, 0.5], rng=0), [0], draft_len=3, rng=0)
    with TraceWriter(path, HEADER) as writer:
        rounds = list(writer.keep(nab.until(rounds, max_new_tokens=40), where))
        writer.write("query", where)
    (query,) = read_trace(path).queries
    scored = [round_.gamma for round_ in rounds if round_.gamma is not None]
    assert 2 < len(scored) < len(rounds)
    np.testing.assert_array_equal(query.gamma, np.concatenate(scored))
    assert query.losses(nab.Token()).shape == query.played.shape == query.gamma.shape


def test_wherever_a_crash_cuts_the_file_complete_rounds_are_kept_and_it_is_said(tmp_path):
    path, cut_off = tmp_path / "t.jsonl", tmp_path / "cut.jsonl"
    recorded(path, prompts=["grün"], policies=["normal-hedge", "fixed:lookup"], tokens=6)
    whole = path.read_bytes()
    kinds = [json.loads(line)["kind"] for line in whole.splitlines()]
    starts = np.cumsum([0, *(len(line) for line in whole.splitlines(keepends=True))])
    for length in range(starts[1], len(whole) + 1, 3):
        cut_off.write_bytes(whole[:length])
        trace = read_trace(cut_off)
        # a record is whole even where its line's end is missing
        lines = int(np.searchsorted(starts, length + 1, side="right")) - 1
        lines -= lines == len(kinds) and length < len(whole) - 1
        assert sum(len(query.rounds) for query in trace.queries) == kinds[:lines].count("round")
        closed = [query for query in trace.queries if query.metrics is not None]
        assert len(closed) == kinds[:lines].count("query")
        is_whole = length + 1 in starts or length in starts
        assert (f"line {lines + 1} is cut off" in trace.broken_off) is not is_whole
        assert ("is not complete" in trace.broken_off) is (kinds[lines - 1] == "round")
        assert all(query.domain == "grün" for query in trace.queries)
        asked = [query for query in trace.queries if query.policy == "normal-hedge"]
        assert all(len(query.gamma) == len(query.tokens) for query in [*asked, *closed])


def test_the_answer_that_breaks_off_is_named(tmp_path):
    path = tmp_path / "t.jsonl"
    recorded(path)
    lines = path.read_text().splitlines()
    last = max(k for k, line in enumerate(lines) if json.loads(line)["kind"] == "round")
    path.write_text("\n".join([*lines[:last], lines[last][:-9]]))
    assert read_trace(path).broken_off == (
        f"{path}, line {last + 1} is cut off: the answer to prompt 2 under ucb-spec is not complete"
    )


def test_ctrl_c_between_a_round_and_its_record_costs_that_round_alone(tmp_path):
    path = tmp_path / "t.jsonl"
    (written,) = recorded(path, prompts=["red"], policies=["fixed:lookup"])
    *lines, last, record = path.read_text().splitlines()
    path.write_text("\n".join([*lines, record]) + "\n")
    (query,) = read_trace(path).queries
    assert query.tokens == written.tokens[: -len(json.loads(last)["emitted"])]
    np.testing.assert_array_equal(query.gamma, written.scores()[0][: len(query.tokens)])


def changed(**fields):
    return lambda line: json.dumps({**json.loads(line), **fields})


def without(*names):
    return lambda line: json.dumps({k: v for k, v in json.loads(line).items() if k not in names})


def scores(rows, **fields):
    return changed(**{"gamma": rows, "realised": rows, **fields})


ROUNDS = {  # of the first round of an answer by normal-hedge, line 2
    "cut": (lambda line: line[:-5], "no JSON"),
    "blank": (lambda line: "", "no JSON"),
    "deep": (lambda line: "[" * 100_000, "no JSON"),
    "a list": (lambda line: "[]", "a JSON object with a kind"),
    "no kind": (without("kind"), "a JSON object with a kind"),
    "another kind": (changed(kind="span"), "kind must be round or query behind the header, got 'span'"),
    "a second header": (changed(kind="header"), "got 'header'"),
    "no policy": (without("policy"), "policy is missing"),
    "a policy by number": (changed(policy=3), "policy must be of type str, got 3"),
    "no gamma": (without("gamma"), "a round has the fields start, .*seconds; got"),
    "more": (changed(gain=1), "a round has the fields .*gain"),
    "a choice too high": (changed(choice=2), r"choice must lie in 0 \.\. 1, got 2"),
    "a choice that is true": (changed(choice=True), "choice must be of type int, got True"),
    "drafted too many": (changed(drafted=4), r"drafted must lie in 0 \.\. 3, got 4"),
    "accepted too many": (changed(drafted=1, accepted=2), r"accepted must lie in 0 \.\. 1, got 2"),
    "nothing emitted": (changed(emitted=[]), "emitted must be the .* accepted tokens and the next one"),
    "emitted too many": (changed(emitted=[1] * 5), "emitted must be the .* accepted tokens and the next one"),
    "no token": (changed(emitted=["a"]), "emitted must be token ids"),
    "a negative start": (changed(start=-1), r"start must lie in 0 \.\. inf, got -1"),
    "another law": (changed(probs=[0.5, 0.4]), "probs must be a law over 2 drafters"),
    "a longer law": (changed(probs=[0.5, 0.5, 0.0]), "probs must be a law over 2 drafters"),
    "NaN": (scores([[float("nan"), 0.5]]), "NaN is no number of a trace"),
    "above 1": (scores([[0.5, 1.5]]), r"gamma must lie in \[0, 1\], got 1.5"),
    "below 0": (scores([[0.5, -0.5]]), r"gamma must lie in \[0, 1\], got -0.5"),
    "text": (scores([["0.5", "0.5"]]), "gamma must be an array of numbers"),
    "null": (scores([[None, 0.5]]), "gamma must be an array of numbers"),
    "ragged": (scores([[0.5], [0.5, 0.5]]), "gamma must be an array of numbers"),
    "flat": (scores([0.5, 0.5]), r"must have the shape \(positions, 2\), got \(2,\)"),
    "wide": (scores([[0.5] * 3]), r"must have the shape \(positions, 2\), got \(1, 3\)"),
    "one of them": (changed(realised=None), "realised must be of type list, got None"),
    "unlike": (changed(realised=[]), "must have the shape"),
    "a row too many": (scores([[0.5, 0.5]] * 9), "gamma and realised must have . rows, got 9"),
    "no time": (changed(seconds={"draft": 1.0}), "seconds has the fields draft, verify, select; got draft"),
    "endless": (changed(seconds={"draft": None, "verify": 0.0, "select": 0.0}), "seconds must be finite"),
}


@pytest.mark.parametrize("name", ROUNDS)
def test_a_damaged_round_is_named_with_file_and_line(tmp_path, name):
    damage, message = ROUNDS[name]
    path = tmp_path / "t.jsonl"
    recorded(path, policies=["normal-hedge"])
    header, first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([header, damage(first), *rest]) + "\n")
    with pytest.raises(ValueError, match=message) as raised:
        read_trace(path)
    assert str(raised.value).startswith(f"{path}, line 2: ")


TOO_MANY = [[0.5, 0.5]] * 5


def test_records_out_of_order_are_named(tmp_path):
    path = tmp_path / "t.jsonl"
    recorded(path, policies=["normal-hedge"])
    lines = path.read_text().splitlines()
    end = next(k for k, line in enumerate(lines) if json.loads(line)["kind"] == "query")
    for order, message in (
        ([*lines[:2], *lines[3:]], r"line 3: start must lie in"),
        ([*lines[:end], *lines[end + 1 :]], rf"line {end + 1}: a record of \(1, .* is closed"),
        ([*lines, *lines[1:]], rf"line {len(lines) + 1}: a second answer to \(0, 'normal-hedge', 'red'\)"),
        ([*lines[:end], scores(TOO_MANY)(lines[end]), *lines[end + 1 :]], "5 scored positions of 0 tokens"),
        ([*lines, lines[0]], f"line {len(lines) + 1}: .*got 'header'"),
    ):
        path.write_text("\n".join(order) + "\n")
        with pytest.raises(ValueError, match=message):
            read_trace(path)


@pytest.mark.parametrize("scored", [0, 11])
def test_an_answer_whose_scores_break_off_is_kept_and_named(tmp_path, scored):
    path = tmp_path / "t.jsonl"
    recorded(path, prompts=["red"], policies=["fixed:lookup"])
    expected = read_trace(path).queries[0]
    *lines, record = path.read_text().splitlines()
    path.write_text("\n".join([*lines, scores([[0.5, 0.5]] * scored)(record)]) + "\n")
    trace = read_trace(path)
    (query,) = trace.queries
    assert (query.tokens, query.metrics, len(query.gamma)) == (expected.tokens, expected.metrics, scored)
    assert len(query.tokens) == 12
    assert trace.broken_off == f"{path}: the answer to prompt 1 under fixed:lookup is not complete"


def test_ctrl_c_while_positions_are_scored_leaves_a_trace_that_can_be_read(tmp_path, monkeypatch):
    def interrupted(*arguments, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr("nab.measure.Evaluation.__call__", interrupted)
    path = tmp_path / "t.jsonl"
    with pytest.raises(KeyboardInterrupt):
        recorded(path, prompts=["red"], policies=["fixed:lookup"])
    trace = read_trace(path)
    assert [len(query.tokens) for query in trace.queries] == [12]
    assert "under fixed:lookup is not complete" in trace.broken_off


def interleaved(path, batch):
    """A trace with the answers of three policies side by side, and the same one after the other."""
    recorded(path, prompts=["red"], policies=["normal-hedge", "fixed:lookup", "lazy"], batch=batch)
    expected = read_trace(path)
    header, *lines = path.read_text().splitlines()
    answers = {}
    for line in lines:
        answers.setdefault(json.loads(line)["policy"], []).append(line)
    turns = [line for turn in zip_longest(*answers.values()) for line in turn if line]
    path.write_text("\n".join([header, *turns]) + "\n")
    return expected, [header, *turns]


def test_answers_that_were_given_together_are_told_apart(tmp_path):
    path = tmp_path / "t.jsonl"
    expected, _ = interleaved(path, batch=3)
    found = read_trace(path)
    assert found.broken_off == ""
    np.testing.assert_equal([asdict(query) for query in found.queries], list(map(asdict, expected.queries)))


def test_no_more_answers_than_the_batch_are_open_at_once(tmp_path):
    path = tmp_path / "t.jsonl"
    interleaved(path, batch=2)
    with pytest.raises(ValueError, match=r"line 4: a record of \(0, 'lazy', 'red'\) before that of .*closed"):
        read_trace(path)


def test_a_batch_that_breaks_off_is_named_with_all_its_answers(tmp_path):
    path = tmp_path / "t.jsonl"
    _, lines = interleaved(path, batch=3)
    path.write_text("\n".join(lines[:6]) + "\n")
    trace = read_trace(path)
    assert [len(query.rounds) for query in trace.queries] == [2, 2, 1]
    answers = ", ".join(f"the answer to prompt 1 under {name}" for name in trace.policies)
    assert trace.broken_off == f"{path}: {answers} are not complete"


def test_an_answer_with_two_domains_is_named(tmp_path):
    path = tmp_path / "t.jsonl"
    _, lines = interleaved(path, batch=4)
    path.write_text("\n".join([*lines[:4], changed(domain="blue")(lines[4]), *lines[5:]]) + "\n")
    with pytest.raises(ValueError, match=r"line 5: a second answer to \(0, 'normal-hedge', 'blue'\)"):
        read_trace(path)


HEADERS = {
    "of another version": (changed(format=2), "format must be 1, got 2: written by another version of nab"),
    "without one": (without("format"), "format is missing"),
    "of another program": (lambda line: '{"prompt": "a"}', "a JSON object with a kind"),
    "of another kind": (changed(kind="round"), "a trace begins with a header"),
    "cut": (lambda line: line[:20], "no JSON"),
    "without seed": (without("seed"), "seed is missing"),
    "without drafters": (changed(drafters=[]), "drafters must be different names, at least one"),
    "with one drafter twice": (changed(drafters=["a", "a"]), "drafters must be different names"),
    "with numbers for drafters": (changed(drafters=[1, 2]), "drafters must be different names"),
    "with an empty batch": (changed(batch=0), "batch must be a whole number of at least 1, got 0"),
    "with a negative length": (changed(draft_len=-1), "draft_len must be at least 0, got -1"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_foreign_header_is_named(tmp_path, name):
    damage, message = HEADERS[name]
    path = tmp_path / "t.jsonl"
    recorded(path, policies=["normal-hedge"])
    header, *rest = path.read_text().splitlines()
    path.write_text("\n".join([damage(header), *rest]) + "\n")
    with pytest.raises(ValueError, match=message) as raised:
        read_trace(path)
    assert str(raised.value).startswith(f"{path}, line 1: ")


def test_files_that_are_no_traces_are_named(tmp_path):
    path = tmp_path / "t.jsonl"
    for content, message in (
        (b"", "is empty: a trace begins with a header"),
        (b"\x89PNG\r\n\x1a\n\x00", "line 1: not UTF-8"),
        (b"hello", "line 1: no JSON"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_trace(path)
    recorded(path)
    header, *rest = path.read_bytes().splitlines(keepends=True)
    for place, content in ((1, b"\xff\xfe\n"), (len(rest), b"\xff\xfe"), (len(rest), b"hello")):
        path.write_bytes(b"".join([header, *rest[:place], content, *rest[place:]]))
        with pytest.raises(ValueError, match=f"line {place + 2}: (not UTF-8|no JSON)"):
            read_trace(path)


def test_a_header_that_could_not_be_read_back_is_not_written(tmp_path):
    path = tmp_path / "t.jsonl"
    with pytest.raises(ValueError, match="dtype is missing"):
        TraceWriter(path, {name: value for name, value in HEADER.items() if name != "dtype"})
    assert not path.exists()


@pytest.mark.parametrize("policy", ["normal-hedge", "fixed:lookup"])
def test_scores_by_depth_are_read_back_and_replayed(tmp_path, policy):
    path, scheme = tmp_path / "t.jsonl", nab.DynamicTree(2, 5, 3)
    query = measure.Query(HEADER["drafters"], 3, "red")
    where = {"query": 0, "policy": policy, "domain": "red"}
    with TraceWriter(path, {**HEADER, "nodes": scheme.nodes}) as trace:
        options = {"max_new_tokens": 12, "rng": 0, "scheme": scheme, "exact": True}
        list(trace.keep(query.run(TARGET, POOL, SELECTORS[policy](), [0], **options), where))
        scores = dict(zip(("gamma", "realised"), query.unasked_scores(), strict=False))
        trace.write("query", {**where, **measure.metrics([query]), **scores})
    (found,) = read_trace(path).queries
    np.testing.assert_array_equal(found.gamma, query.scores()[0])
    assert found.gamma.shape == (12, 3, 2)
    assert found.losses(nab.Length(3)).shape == (10, 2)
    if policy == "fixed:lookup":  # of certain drafts, hindsight is what happened
        assert query.single_rounds()[1] == pytest.approx(len(query.rounds), abs=1e-12)


@pytest.mark.parametrize("nodes", [2, 5.0, "5"])
def test_a_header_with_bad_nodes_is_named(tmp_path, nodes):
    with pytest.raises(ValueError, match=f"nodes must be .*{nodes}"):
        TraceWriter(tmp_path / "t.jsonl", {**HEADER, "nodes": nodes})
