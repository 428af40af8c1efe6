"""Metrics as Prometheus reads them, made by ``prometheus_client`` (the extra ``metrics``).

The names are those of ``nab.measure.metrics`` behind ``nab_``; what vLLM counts is ``nab_spec_decode_*`` as
vLLM's is ``vllm:spec_decode_*``, by drafter. What is None is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

Found = Iterable[tuple[Mapping[str, str], Mapping[str, Any]]]
"""Labels, such as policy and domain, and the metrics that they are of. All have the same labels."""


_Values = tuple[list[str], Mapping[str, Any]]
"""Values of the labels, and metrics."""


class _Family(NamedTuple):
    """How an entry of the metrics is shown.

    Args:
        entry: its name.
        about: help text.
        kind: ``counter`` or ``gauge``.
        label: of its keys, if it has any.
        shown: name without ``nab_``; empty is the entry's.
    """

    entry: str
    about: str
    kind: str = "gauge"
    label: str = ""
    shown: str = ""


_FAMILIES = (
    _Family("num_tokens", "Emitted tokens.", "counter"),
    _Family("num_spec_steps", "Rounds: target forwards behind the one that reads the prompt.", "counter"),
    _Family(
        *("num_accepted_tokens_per_pos", "Accepted tokens per draft position.", "counter", "position"),
        shown="spec_decode_num_accepted_tokens_per_pos",
    ),
    _Family("benched", "Queries in which a drafter failed.", "counter", "drafter"),
    _Family("mean_acceptance_length", "Emitted tokens per round, the next token included."),
    _Family("draft_acceptance_rate", "Accepted over drafted tokens."),
    _Family("plain_share", "Share of rounds without a draft."),
    _Family("choice_share", "Share of rounds in which a drafter was chosen.", label="drafter"),
    _Family("draft_share", "Share of rounds in which a drafter drafted.", label="drafter"),
    _Family("single_drafters", "Mean acceptance length of a drafter alone, same text.", label="drafter"),
    _Family("regret", "Against the best single drafter of each query in hindsight.", label="loss"),
    _Family("tokens_per_second", "Over the time of the rounds."),
    _Family("selection_share", "Share of the time spent scoring drafters and learning."),
    _Family("replayed_acceptance_length", "Mean acceptance length over replays of the texts."),
)

_RESERVED = ("drafted", "le", *sorted({family.label for family in _FAMILIES if family.label}))
"""Labels that families have themselves."""

_OF_DRAFTERS = {
    "num_drafts": ("num_drafts", "Drafts."),
    "num_draft_tokens": ("num_draft_tokens", "Drafted tokens."),
    "num_accepted_draft_tokens": ("num_accepted_tokens", "Accepted drafted tokens."),
}


class Collector:
    """What a ``prometheus_client`` registry asks for metrics: ``registry.register(Collector(read))``.

    Args:
        read: gives what there is now.

    Raises:
        ImportError: if ``prometheus_client`` is not installed.
    """

    def __init__(self, read: Callable[[], Found]) -> None:
        _client()
        self._read = read

    def collect(self) -> Iterator[Metric]:
        """All families of metrics.

        Raises:
            ValueError: if some have other labels than the others, or the same values; if a label is none.
        """
        found = [*self._read()]
        own = [*found[0][0]] if found else []
        seen = list[Mapping[str, str]]()
        for labels, _ in found:
            if {*labels} != {*own}:
                raise ValueError(f"all metrics need the same labels, got {own} and {[*labels]}")
            if labels in seen:
                raise ValueError(f"metrics need labels of their own, got {dict(labels)} twice")
            for name, value in labels.items():
                if name in _RESERVED or not isinstance(value, str):
                    taken = ", ".join(_RESERVED)
                    raise ValueError(f"a label must be a text, not called {taken}; got {name}={value!r}")
            seen.append(labels)
        values = [([labels[name] for name in own], metrics) for labels, metrics in found]
        families = [_family(family, own, values) for family in _FAMILIES]
        families += [_of_drafters(entry, own, values) for entry in _OF_DRAFTERS]
        families += [_histogram(own, values)]
        yield from (family for family in families if family.samples)


def _family(family: _Family, names: list[str], values: Iterable[_Values]) -> Metric:
    """One family of metrics."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    make = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    labels = [*names, family.label] if family.label else names
    metric = make(f"nab_{family.shown or family.entry}", family.about, labels=labels)
    for own, metrics in values:
        value = metrics.get(family.entry)
        if not family.label:
            if value is not None:
                metric.add_metric(own, value)
            continue
        for key, each in enumerate(value) if isinstance(value, list) else (value or {}).items():
            metric.add_metric([*own, str(key)], each)
    return metric


def _of_drafters(entry: str, names: list[str], values: Iterable[_Values]) -> Metric:
    """What is counted by drafter."""
    shown, about = _OF_DRAFTERS[entry]
    family = _Family(entry, about, "counter", "drafter", f"spec_decode_{shown}")
    counts = [
        (own, {entry: {name: each[entry] for name, each in metrics.get("drafters", {}).items()}})
        for own, metrics in values
    ]
    return _family(family, names, counts)


def _histogram(names: list[str], values: Iterable[_Values]) -> Metric:
    """Rounds by accepted tokens, a histogram by drafted tokens."""
    from prometheus_client.core import HistogramMetricFamily

    about = "Rounds by accepted tokens, the next token not counted."
    metric = HistogramMetricFamily("nab_acceptance_histogram", about, labels=[*names, "drafted"])
    for own, metrics in values:
        for drafted, rounds in metrics.get("acceptance_histogram_by_draft_length", {}).items():
            upto = [*accumulate(rounds)]
            buckets = [(f"{k}.0", float(count)) for k, count in enumerate(upto)]
            total = sum(k * count for k, count in enumerate(rounds))
            metric.add_metric([*own, drafted], [*buckets, ("+Inf", float(upto[-1]))], total)
    return metric


def _registry(found: Found) -> CollectorRegistry:
    registry: CollectorRegistry = _client().CollectorRegistry()
    registry.register(Collector(lambda: found))
    return registry


def text(found: Found) -> str:
    """Metrics in Prometheus' text form.

    Raises:
        ValueError: if some have other labels than the others.
        ImportError: if ``prometheus_client`` is not installed.
    """
    return str(_client().generate_latest(_registry([*found])).decode())


def write(path: Path, found: Found) -> None:
    """``text`` as a file, for instance for the node exporter; it appears whole or not at all.

    Raises:
        ValueError: see ``text``.
        ImportError: likewise.
        OSError: if the file cannot be written.
    """
    _client().write_to_textfile(str(path), _registry([*found]))


def check(path: Path) -> None:
    """Fail now rather than after the run if metrics cannot be written to ``path``; its folder is made.

    Raises:
        ValueError: if ``path`` is a folder.
        ImportError: if ``prometheus_client`` is not installed.
    """
    _client()
    if path.is_dir():
        raise ValueError(f"cannot write metrics to {path}: it is a folder")
    path.parent.mkdir(parents=True, exist_ok=True)


def _client() -> Any:
    try:
        import prometheus_client
    except ImportError as error:
        raise ImportError(
            "metrics as Prometheus reads them need prometheus_client: pip install 'not-a-bandit[metrics]'"
        ) from error
    return prometheus_client
