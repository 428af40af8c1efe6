"""Tables and picture of what ``paper.py record`` wrote; loads no model."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from nab import replays
from nab.decode import Round
from nab.experiment import FIXED, PLAIN
from nab.losses import Token, expected_rounds
from nab.selector import Chooses
from nab.sim.trace import Trace, TracedQuery, read_trace
from nab.types import Floats

HEDGE = "normal-hedge"
"""HedgeSpec: the paper's learner, on the token loss; its texts are the ones that are replayed."""

TRACKING = "hedge .93 argmax"
GENERALIST = f"{FIXED}generalist"
TIMED = "normal-hedge time"
BANDITS = ("ucb-spec", "exp3-spec")
RESAMPLED = 4000
REPLAYS = 2
"""Of each text; the mean over prompts does the rest."""


class Cell(NamedTuple):
    """What was measured of answers of one length at one temperature.

    Args:
        about: a header of one of the traces.
        domains: their labels, D of them.
        drafters: their names, n of them.
        tokens: by policy, ``(D, prompts)``.
        rounds: likewise.
        seconds: spent drafting, verifying and selecting, ``(D, prompts, 3)``.
        alone: rounds of each drafter alone on the texts of ``HEDGE``, in expectation, ``(D, prompts, n)``.
        replayed: rounds in expectation of every policy of ``nab.replays`` on these texts, ``(D, prompts)``.
        partings: greedy texts that are not the plain one's, and why.
        fed: answers whose laws were had again from the trace alone, and those where they differ.
    """

    about: dict[str, Any]
    domains: list[str]
    drafters: list[str]
    tokens: dict[str, Floats]
    rounds: dict[str, Floats]
    seconds: dict[str, Floats]
    alone: Floats
    replayed: dict[str, Floats]
    partings: list[dict[str, Any]]
    fed: tuple[int, int]


def is_fixed(policy: str) -> bool:
    """Whether a policy never learns: one drafter, or plain decoding."""
    return policy == PLAIN or policy.startswith(FIXED)


def fed(selector: Chooses, query: TracedQuery) -> Iterator[tuple[Round, int, Floats]]:
    """The rounds of an answer, and what a selector that is fed its scores chooses there, by which law."""
    start = 0
    for round_ in query.rounds:
        yield round_, selector.choice, selector.probs
        stop = start + len(round_.emitted)
        scores = query.gamma[start:stop], query.realised[start:stop]
        selector.observe(stop - start, lambda scores=scores: scores)
        start = stop


def refed(query: TracedQuery, drafters: int, draft_len: int) -> bool:
    """Whether a full-information selector that is fed a trace's scores plays the recorded laws to the bit."""
    selector = replays.policies(drafters, draft_len, Token())[query.policy].make(0)
    return all(np.array_equal(probs, round_.probs) for round_, _, probs in fed(selector, query))


def leading(values: Floats) -> Floats:
    """Of ``(1 + resampled, D, any)`` the largest by domain as it is, the same one in all resamples."""
    return np.take_along_axis(values, values[0].argmax(-1)[None, :, None], 2)[..., 0]


def summed(path: Path, partings: list[dict[str, Any]]) -> dict[str, Any]:
    """What a trace adds to a cell, as plain JSON types.

    Args:
        path: of one prompt under every policy, ``HEDGE`` among them.
        partings: greedy texts that are not the plain one's.
    """
    trace = read_trace(path)
    if trace.broken_off:
        raise ValueError(trace.broken_off)
    full = (HEDGE, TRACKING, "follow-the-leader")
    same = [
        refed(query, len(trace.drafters), trace.draft_len) for query in trace.queries if query.policy in full
    ]
    (query,) = (query for query in trace.queries if query.policy == HEDGE)
    seed = trace.header["seed"]
    texts = replays.texts([trace], HEDGE)
    (rows,) = replays.replayed(texts, trace.draft_len, Token(), replays=REPLAYS, seed=seed)
    return {
        "header": trace.header,
        "domain": query.domain,
        "answers": {
            query.policy: [
                len(query.tokens),
                len(query.rounds),
                np.sum([round_.seconds for round_ in query.rounds], 0).tolist(),
            ]
            for query in trace.queries
        },
        "alone": expected_rounds(query.realised, trace.draft_len).tolist(),
        "replayed": {row.policy: row.rounds for row in rows},
        "fed": [len(same), same.count(False)],
        "partings": partings,
    }


def traces(folder: Path) -> Iterator[Trace]:
    """Those of a cell that have a summary.

    Raises:
        ValueError: if one of them is cut off.
    """
    for path in sorted(folder.glob("*.jsonl")):
        if path.with_suffix(".json").exists():
            trace = read_trace(path)
            if trace.broken_off:
                raise ValueError(f"{trace.broken_off}, but has a summary: remove that and record it again")
            yield trace


def summary(path: Path) -> dict[str, Any]:
    """What ``summed`` made of a trace.

    Raises:
        ValueError: naming a file that is something else.
    """
    try:
        found = json.loads(path.read_text())
        if {"target", "drafters"} <= {*found["header"]} and {"domain", "answers"} <= {*found}:
            return dict(found)
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{path} is none of the summaries that paper.py record writes")


def cell(folder: Path) -> Cell:
    """All summaries of a folder: of each domain as many prompts as all have, and policies that all have."""
    found = [summary(path) for path in sorted(folder.glob("*.json"))]
    by_domain: dict[str, list[Any]] = {}
    for each in found:
        by_domain.setdefault(each["domain"], []).append(each)
    whole = min(map(len, by_domain.values()))
    policies = [name for name in found[0]["answers"] if all(name in each["answers"] for each in found)]

    def laid_out(of: Callable[[Any], Any]) -> Floats:
        return np.array([[of(each) for each in rows[:whole]] for rows in by_domain.values()], float)

    return Cell(
        found[0]["header"],
        list(by_domain),
        found[0]["header"]["drafters"],
        *(
            {name: laid_out(lambda each, name=name, k=k: each["answers"][name][k]) for name in policies}
            for k in range(3)
        ),
        laid_out(lambda each: each["alone"]),
        {name: laid_out(lambda each, name=name: each["replayed"][name]) for name in found[0]["replayed"]},
        [parting for each in found for parting in each["partings"]],
        tuple(np.sum([each["fed"] for each in found], 0).tolist()),
    )


class Figures:
    """Quantities by domain and on average over domains, with intervals: bootstrap over prompts, paired."""

    def __init__(self, cell: Cell, seed: int) -> None:
        self.cell = cell
        domains, prompts = cell.tokens[HEDGE].shape
        rng = np.random.default_rng(seed)
        drawn = rng.integers(0, prompts, (RESAMPLED, domains, prompts))
        self._weights = np.ones((1 + RESAMPLED, domains, prompts))  # first the prompts as they are
        for k in range(prompts):
            self._weights[1:, :, k] = (drawn == k).sum(-1)

    def total(self, values: Floats) -> Floats:
        """Sums over prompts, ``(1 + resampled, D)``."""
        return np.einsum("bdk,dk->bd", self._weights, values)

    def mat(self, policy: str) -> Floats:
        """Tokens per target forward as decoded."""
        return self.total(self.cell.tokens[policy]) / self.total(self.cell.rounds[policy])

    def speed(self, policy: str) -> Floats:
        """Tokens per second as decoded."""
        return self.total(self.cell.tokens[policy]) / self.total(self.cell.seconds[policy].sum(-1))

    def selecting(self, policy: str) -> float:
        """Share of the time in scoring and learning."""
        spent = self.cell.seconds[policy].sum((0, 1))
        return float(spent[2] / spent.sum())

    def replayed(self, policy: str) -> Floats:
        """Tokens per target forward on the texts of ``HEDGE``, in expectation."""
        return self.total(self.cell.tokens[HEDGE]) / self.total(self.cell.replayed[policy])

    def singles(self) -> Floats:
        """``replayed`` of each drafter alone, ``(1 + resampled, D, n)``."""
        rounds = np.einsum("bdk,dkn->bdn", self._weights, self.cell.alone)
        return self.total(self.cell.tokens[HEDGE])[..., None] / rounds

    def best(self) -> Floats:
        """``replayed`` of the drafter that is best in a domain, the same one in all resamples."""
        return leading(self.singles())

    def oracle(self) -> Floats:
        """``replayed`` of the best drafter of each text."""
        return self.total(self.cell.tokens[HEDGE]) / self.total(self.cell.alone.min(-1))

    def fixed_speed(self) -> Floats:
        """Tokens per second of the fastest fixed policy of a domain."""
        return leading(np.stack([self.speed(name) for name in filter(is_fixed, self.cell.tokens)], -1))


def interval(values: Floats, digits: int = 2) -> str:
    """Of ``(1 + resampled,)``: the value and the middle 95 % of the resampled ones."""
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return f"{values[0]:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def ratios(f: Figures) -> dict[str, Floats]:
    """The quotients that are promised, ``(1 + resampled, D)``, by name."""
    hedge, had = f.replayed(HEDGE), f.cell.tokens
    bandits = np.maximum(*(f.replayed(name) for name in BANDITS))
    found = {
        "HedgeSpec / best single drafter of the domain": hedge / f.best(),
        "HedgeSpec / best single drafter of each query": hedge / f.oracle(),
        "tracking / best single drafter of the domain": f.replayed(TRACKING) / f.best(),
        "HedgeSpec / generalist": hedge / f.replayed(GENERALIST),
        "HedgeSpec / better of UCBSpec and EXP3Spec": hedge / bandits,
        "HedgeSpec / UCBSpec": hedge / f.replayed("ucb-spec"),
        "HedgeSpec / EXP3Spec": hedge / f.replayed("exp3-spec"),
        "HedgeSpec / uniform": hedge / f.replayed("uniform"),
        "HedgeSpec / follow the leader": hedge / f.replayed("follow-the-leader"),
    }
    decoded = {
        "generalist": [GENERALIST],
        "better of UCBSpec and EXP3Spec": list(BANDITS),
        "uniform": ["uniform"],
    }
    for name, rows in decoded.items():
        if all(row in had for row in rows):
            best = np.max([f.mat(row) for row in rows], 0)
            found[f"decoded: HedgeSpec / {name}"] = f.mat(HEDGE) / best
    singles = [f"{FIXED}{name}" for name in f.cell.drafters]
    if all(name in had for name in singles):
        best = leading(np.stack([f.mat(name) for name in singles], -1))
        found["decoded: HedgeSpec / best single drafter of the domain"] = f.mat(HEDGE) / best
    if TIMED in had and PLAIN in had:
        timed = f.speed(TIMED)
        found["tokens/s: time objective / fastest fixed policy of the domain"] = timed / f.fixed_speed()
        if GENERALIST in had:
            found["tokens/s: time objective / generalist"] = timed / f.speed(GENERALIST)
    return found


def table(heads: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """Markdown."""
    lines = ["| |" + "|".join(f" {head} " for head in heads) + "|", "|---|" + "---|" * len(heads)]
    lines += [f"| {name} | " + " | ".join(values) + " |" for name, values in rows]
    return "\n".join(lines) + "\n"


def _row(values: Floats, digits: int = 2) -> list[str]:
    """By domain, then the mean over domains with its interval."""
    return [*(f"{each:.{digits}f}" for each in values[0]), interval(values.mean(1), digits)]


def tables(f: Figures) -> str:
    """All of a cell."""
    heads = [*f.cell.domains, "mean (95 %)"]
    decoded = list(f.cell.tokens)
    answers = next(iter(f.cell.tokens.values())).shape[1]
    only = ", so no intervals" if answers == 1 else ""
    rounding = sum(parting["is_rounding"] for parting in f.cell.partings)
    fed, differ = f.cell.fed
    words = [
        f"{answers} prompts a domain{only}. {fed} answers of full-information selectors were fed to them "
        f"again from the traces: {fed - differ} played the recorded laws to the last bit."
    ]
    if f.cell.about["temperature"] == 0:
        words.append(
            f"Texts that are not plain decoding's: {len(f.cell.partings)}, of which {rounding} by rounding."
        )
    return "\n".join(
        [
            *words,
            "\nMAT as decoded:\n",
            table(heads, ((name, _row(f.mat(name))) for name in decoded)),
            "MAT on the texts of normal-hedge, in expectation (replays):\n",
            table(
                heads,
                [
                    *((name, _row(f.replayed(name))) for name in f.cell.replayed),
                    ("best single drafter of the domain", _row(f.best())),
                    ("best single drafter of each query", _row(f.oracle())),
                ],
            ),
            "Tokens per second as decoded, and the share of the time in scoring and learning:\n",
            table(
                [*heads, "selecting"],
                ((name, [*_row(f.speed(name), 0), f"{f.selecting(name):.1%}"]) for name in decoded),
            ),
            "Ratios:\n",
            table(heads, ((name, _row(values, 3)) for name, values in ratios(f).items())),
        ]
    )


def shared(header: Mapping[str, Any]) -> dict[str, Any]:
    """What the traces of a cell say of themselves alike."""
    return {name: value for name, value in header.items() if name not in ("prompt", "prompts", "seed")}


def as_json(f: Figures) -> dict[str, Any]:
    """A cell as plain JSON types."""

    def spread(values: Floats) -> dict[str, Any]:
        mean = values.mean(1)
        low, high = np.quantile(mean[1:], [0.025, 0.975])
        by_domain = dict(zip(f.cell.domains, values[0].tolist(), strict=True))
        return {"domains": by_domain, "mean": float(mean[0]), "interval": [float(low), float(high)]}

    return {
        "about": shared(f.cell.about),
        "prompts": f.cell.tokens[HEDGE].shape[1],
        "mat": {name: spread(f.mat(name)) for name in f.cell.tokens},
        "tokens_per_second": {name: spread(f.speed(name)) for name in f.cell.tokens},
        "selecting": {name: f.selecting(name) for name in f.cell.tokens},
        "replayed_mat": {name: spread(f.replayed(name)) for name in f.cell.replayed},
        "best_of_domain": spread(f.best()),
        "best_of_query": spread(f.oracle()),
        "ratios": {name: spread(values) for name, values in ratios(f).items()},
        "partings": f.cell.partings,
        "refed": {"answers": f.cell.fed[0], "different": f.cell.fed[1]},
    }


SHOWN = {
    GENERALIST: ("generalist", "0.75"),
    "exp3-spec": ("EXP3Spec", "#f2b134"),
    "ucb-spec": ("UCBSpec", "#e4811c"),
    HEDGE: ("HedgeSpec (nab)", "#1f5fa8"),
}


def picture(f: Figures, path: Path, title: str) -> None:
    """MAT by domain and selector, and that of the best single drafter of each domain."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    domains = [*f.cell.domains, "mean"]
    width, places = 0.8 / len(SHOWN), np.arange(len(domains))

    def with_mean(values: Floats) -> Floats:
        return np.concatenate([values, values.mean(1, keepdims=True)], 1)

    for k, (name, (label, color)) in enumerate(SHOWN.items()):
        values = with_mean(f.replayed(name))
        low, high = np.quantile(values[1:], [0.025, 0.975], axis=0)
        spread = np.abs(np.stack([low, high]) - values[0])
        at = places + (k - (len(SHOWN) - 1) / 2) * width
        axes.bar(at, values[0], width, label=label, color=color, yerr=spread, error_kw={"lw": 0.8})
    best = with_mean(f.best())[0]
    axes.hlines(best, places - 0.45, places + 0.45, color="black", lw=1.2, label="best single drafter")
    axes.set_xticks(places, domains)
    axes.set_ylim(1, None)
    axes.set_ylabel("tokens per target forward")
    axes.set_title(title, fontsize=10)
    axes.legend(
        ncols=len(SHOWN) + 1, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=160)


def report(out: Path, seed: int) -> None:
    """Write JSON, tables and pictures of every cell in a folder."""
    folders = sorted(path for path in out.iterdir() if path.is_dir() and any(path.glob("*.json")))
    if not folders:
        raise ValueError(f"{out} holds no answers: paper.py record writes them")
    parts = []
    for folder in folders:
        found = Figures(cell(folder), seed)
        (out / f"{folder.name}.json").write_text(json.dumps(as_json(found), indent=1))
        about = found.cell.about
        title = f"{about['target']}, temperature {about['temperature']:g}, {about['max_new_tokens']} tokens"
        picture(found, out / f"{folder.name}.png", title)
        parts.append(f"## {title}\n\n{tables(found)}")
    (out / "paper.md").write_text("\n".join(parts))
    print("\n".join(parts))
