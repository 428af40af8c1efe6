"""What Prometheus reads, parsed back, is what the dictionaries say; nothing more, and nothing is lost."""

import sys

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from test_decode import POOL, TARGET

import nab
from nab import prometheus
from nab.measure import Query, metrics

COUNTED = {"num_tokens": "num_tokens", "num_spec_steps": "num_spec_steps"}
SHOWN_BY_DRAFTER = {
    "num_drafts": "spec_decode_num_drafts",
    "num_draft_tokens": "spec_decode_num_draft_tokens",
    "num_accepted_draft_tokens": "spec_decode_num_accepted_tokens",
}
NUMBERS = ["mean_acceptance_length", "draft_acceptance_rate", "plain_share", "tokens_per_second"]
NUMBERS += ["selection_share", "replayed_acceptance_length"]
BY_DRAFTER = ["choice_share", "draft_share", "single_drafters"]


def answered(selector, draft_len, seed, domain=""):
    query = Query(["a", "b"], draft_len, domain)
    list(query.run(TARGET, POOL, selector, [0], max_new_tokens=60, rng=seed))
    return query


FOUND = [
    (
        {"policy": "normal-hedge", "domain": 'odd "name" \\ with\nbreaks, ü'},
        metrics([answered(nab.Selector(nab.NormalHedge(), 2, rng=0), 3, seed) for seed in range(3)]),
    ),
    (
        {"policy": "fixed:b", "domain": ""},
        {**metrics([answered(nab.Constant([0, 1]), 3, 4)]), "replayed_acceptance_length": 1.25},
    ),
    ({"policy": "plain", "domain": "red"}, metrics([answered(nab.Constant([1, 0]), 0, 5)])),
]


def expected(found):
    """Samples by name and labels, from the dictionaries."""
    samples = {}

    def add(name, labels, value):
        if value is not None:
            # an empty label is the same as none, but here all are shown
            assert samples.setdefault((f"nab_{name}", frozenset(labels.items())), float(value)) == value

    for labels, entries in found:
        for entry, name in COUNTED.items():
            add(f"{name}_total", labels, entries[entry])
        for k, count in enumerate(entries["num_accepted_tokens_per_pos"]):
            add("spec_decode_num_accepted_tokens_per_pos_total", {**labels, "position": str(k)}, count)
        for drafter, counts in entries["drafters"].items():
            for entry, name in SHOWN_BY_DRAFTER.items():
                add(f"{name}_total", {**labels, "drafter": drafter}, counts[entry])
        for drafter, count in entries["benched"].items():
            add("benched_total", {**labels, "drafter": drafter}, count)
        for entry in NUMBERS:
            add(entry, labels, entries.get(entry))
        for entry in BY_DRAFTER:
            for drafter, value in entries[entry].items():
                add(entry, {**labels, "drafter": drafter}, value)
        for loss, value in entries["regret"].items():
            add("regret", {**labels, "loss": loss}, value)
        for drafted, rounds in entries["acceptance_histogram_by_draft_length"].items():
            own = {**labels, "drafted": drafted}
            for k in range(len(rounds)):
                add("acceptance_histogram_bucket", {**own, "le": f"{k}.0"}, sum(rounds[: k + 1]))
            add("acceptance_histogram_bucket", {**own, "le": "+Inf"}, sum(rounds))
            add("acceptance_histogram_count", own, sum(rounds))
            add("acceptance_histogram_sum", own, sum(k * count for k, count in enumerate(rounds)))
    return samples


def parsed(text):
    samples = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        assert family.type in ("counter", "gauge", "histogram")
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in samples
            samples[key] = sample.value
    return samples


@pytest.mark.parametrize("found", [FOUND, FOUND[:1], FOUND[2:], []])
def test_the_text_parsed_back_is_the_dictionaries(found):
    assert parsed(prometheus.text(found)) == expected(found)


def test_a_lost_or_changed_number_would_be_seen():
    (labels, entries), *_ = FOUND
    changed = {**entries, "num_tokens": entries["num_tokens"] + 1}
    assert parsed(prometheus.text([(labels, changed)])) != expected([(labels, entries)])


def test_counts_by_drafter_add_up_to_those_of_all():
    entries = FOUND[0][1]
    for entry in ("num_drafts", "num_draft_tokens", "num_accepted_draft_tokens"):
        assert sum(each[entry] for each in entries["drafters"].values()) == entries[entry] > 0


def test_a_registry_asks_anew_each_time():
    found, registry = [], CollectorRegistry()
    registry.register(prometheus.Collector(lambda: found))
    labels = {"policy": "plain", "domain": "red"}
    assert registry.get_sample_value("nab_num_tokens_total", labels) is None
    found.append(FOUND[2])
    assert registry.get_sample_value("nab_num_tokens_total", labels) == FOUND[2][1]["num_tokens"]


def test_a_file_has_the_text_and_is_replaced_whole(tmp_path):
    file = tmp_path / "deep" / "nab.prom"
    prometheus.check(file)
    for found in (FOUND, FOUND[:1]):
        prometheus.write(file, found)
        assert file.read_text() == prometheus.text(found)
    assert [each.name for each in file.parent.iterdir()] == ["nab.prom"]
    with pytest.raises(ValueError, match="it is a folder"):
        prometheus.check(tmp_path)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            [{"policy": "a", "domain": "b"}, {"policy": "a"}],
            r"same labels, got \['policy', 'domain'\] and \['policy'\]",
        ),
        ([{"policy": "a"}, {"policy": "a"}], r"labels of their own, got \{'policy': 'a'\} twice"),
        ([{"drafter": "a"}], "not called drafted, le, drafter, .*; got drafter='a'"),
        ([{"run": 3}], "a label must be a text, .*; got run=3"),
    ],
)
def test_wrong_labels_are_named(labels, message):
    with pytest.raises(ValueError, match=message):
        prometheus.text([(each, FOUND[0][1]) for each in labels])


@pytest.mark.parametrize(
    "use",
    [
        prometheus.check,
        lambda path: prometheus.write(path, FOUND),
        lambda path: prometheus.text(FOUND),
        lambda path: prometheus.Collector(list),
    ],
)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, tmp_path, use):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ImportError, match=r"prometheus_client: pip install 'not-a-bandit\[metrics\]'"):
        use(tmp_path / "nab.prom")
