"""Figures, drawn with matplotlib (extra ``plots``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from math import log
from pathlib import Path
from typing import Any

import numpy as np

from nab.experiment import FIXED, PLAIN
from nab.losses import Token
from nab.measure import Query
from nab.replays import KINDS
from nab.types import Floats, as_floats


def answers(queries: Sequence[Query], path: Path, title: str, *, timed: bool = False) -> None:
    """Per domain, four a row: the weights along its longest answer, and below what became of all its answers.

    That is the regret of the token loss, against the best single drafter of the tokens so far. The dashed
    line, ``sqrt(T ln n)``, gives the scale: it is Hedge's bound at the rate ``2 sqrt(ln n / t)``. If they
    were ``timed``, it is tokens per second so far over those of the answer's own rounds without a draft, and
    weights are shown where something was drafted.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    domains = list(dict.fromkeys(query.domain for query in queries))
    names = queries[0].names
    colours = colormaps["tab20"].colors * (len(names) // 20 + 1)  # type: ignore[attr-defined]
    columns = min(len(domains), 4)
    bands = -(-len(domains) // columns)
    figure = Figure(figsize=(3.6 * max(columns, 2), 5.4 * bands + 0.8), layout="constrained")
    grid = figure.subplots(2 * bands, columns, squeeze=False)
    for k in range(len(domains), bands * columns):
        for row in (0, 1):
            grid[2 * (k // columns) + row, k % columns].set_axis_off()
    for k, domain in enumerate(domains):
        above, below = grid[2 * (k // columns), k % columns], grid[2 * (k // columns) + 1, k % columns]
        members = [query for query in queries if query.domain == domain and query.rounds]
        if not members:
            continue
        longest = max(members, key=lambda query: len(query.tokens))
        shown = [r.probs * (not timed or r.drafted > 0) for r in longest.rounds]
        weights = np.repeat(shown, [len(r.emitted) for r in longest.rounds], axis=0)
        places = np.arange(len(weights))
        areas = above.stackplot(places, weights.T, labels=names, step="post", colors=colours)
        above.set(title=domain or "all prompts", ylim=(0, 1), xlim=(0, len(weights) - 1 or 1))
        for query in members:
            curve = _speed(query) if timed else query.regret(Token()).max(1, initial=-np.inf)
            below.plot(np.arange(1, len(curve) + 1), curve, color="tab:blue", alpha=0.6, lw=1)
        if timed:
            below.axhline(1, color="black", ls="--", lw=1)
        else:
            rounds = np.arange(1, max(len(query.tokens) for query in members) + 1)
            bound = np.sqrt(rounds * log(len(names)))
            below.plot(rounds, bound, "k--", lw=1, label=r"$\sqrt{T\,\ln n}$")
            below.legend(frameon=False)
        below.set(xlabel="tokens of the answer")
        if k % columns == 0:
            above.set_ylabel("weight, white: no draft" if timed else "weight of each drafter")
            below.set_ylabel("speed over rounds without draft" if timed else "regret, token loss")
        figure.legends = []
        figure.legend(areas, names, loc="outside lower center", ncols=min(len(names), 8), frameon=False)
    figure.suptitle(title, fontsize="medium")
    _save(figure, path)


def _speed(query: Query) -> Floats:
    """Tokens per second so far, over those of its rounds without a draft, ``(tokens,)``; none without any."""
    plain = [r.seconds.draft + r.seconds.verify for r in query.rounds if r.drafted == 0]
    if not plain:
        return np.empty(0)
    lengths = [len(r.emitted) for r in query.rounds]
    seconds = np.repeat(np.cumsum([sum(r.seconds) for r in query.rounds]), lengths)
    tokens = np.repeat(np.cumsum(lengths), lengths)
    return as_floats(tokens / seconds * np.mean(plain))


def comparison(totals: Mapping[str, Mapping[str, Any]], path: Path, title: str) -> None:
    """Mean acceptance length by domain, from the totals of ``Experiment.results`` by policy.

    Single drafters are grey dots, the best of each domain with its name; selectors are coloured; plain
    decoding, which has length 1, is the floor.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    domains = list(totals[PLAIN]["domains"])
    columns = [*(domain or "no domain" for domain in domains), "all"]
    lengths = {
        policy: [
            found["mean_acceptance_length"] for found in (*(total["domains"][d] for d in domains), total)
        ]
        for policy, total in totals.items()
    }
    figure = Figure(figsize=(1.1 * len(columns) + 4, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.axhline(1, color="0.3", lw=1, ls=":", label="plain decoding")
    singles = {policy: row for policy, row in lengths.items() if policy.startswith(FIXED)}
    selectors = [policy for policy in lengths if policy not in singles and policy != PLAIN]
    for x in range(len(columns)):
        heights = [(row[x], policy.removeprefix(FIXED)) for policy, row in singles.items()]
        label = "single drafters,\nthe best by name" if x == 0 else None
        dots = [x - 0.2] * len(heights), [height for height, _ in heights]
        axes.plot(*dots, "o", color="0.6", ms=4, alpha=0.7, label=label)
        if heights:
            height, name = max(heights)
            axes.annotate(name, (x - 0.2, height), (0, 5), textcoords="offset points", ha="center", size=8)
    for k, (policy, marker) in enumerate(zip(selectors, cycle("sD^vP*X"), strict=False)):
        xs = np.arange(len(columns)) + 0.1 + 0.12 * k
        axes.plot(xs, lengths[policy], marker, color=colormaps["Dark2"](k % 8), ms=6, label=policy)
    axes.axvline(len(domains) - 0.5, color="0.8", lw=1)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_xlim(-0.6, len(columns) - 0.4)
    axes.set_ylabel("mean acceptance length\n(tokens per target forward)")
    axes.margins(y=0.08)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(title, fontsize="medium")
    _save(figure, path)


REPLAYED = dict(zip(KINDS, ["#0072B2", "#56B4E9", "#D55E00", "#000000", "#999999"], strict=True))
"""Colours that the colour-blind tell apart too (Okabe and Ito 2008)."""


def replays(
    table: Sequence[Mapping[str, Any]], totals: Mapping[str, Mapping[str, Any]], path: Path, title: str
) -> None:
    """Mean acceptance length over that of the domain's best single drafter: a panel a domain, a row a policy.

    Args:
        table: of ``nab.replays.compared``.
        totals: of ``nab.replays.totals``.
        path: picture to write.
        title: above it.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    singles = [name for name, total in totals.items() if total["kind"] == "single"]
    policies = [name for name in totals if name not in singles]
    policies.sort(key=lambda name: (KINDS.index(totals[name]["kind"]), -totals[name]["relative"]))
    domains = list(totals[singles[0]]["domains"])
    panels = [None, *domains] if len(domains) > 1 else [None]
    columns = min(len(panels), 4)
    bands = -(-len(panels) // columns)
    height = 0.19 * (len(policies) + 1) + 0.7
    figure = Figure(figsize=(2.2 + 2.3 * max(columns, 2), bands * height + 0.9), layout="constrained")
    grid = figure.subplots(bands, columns, squeeze=False, sharex=True, sharey=True)
    for axes, domain in zip(grid.flat, panels, strict=False):
        rows = [row for row in table if domain in (None, row["domain"])]
        axes.axvline(1, color="0.3", lw=1, ls=":")
        for place, name in enumerate([*policies, *singles]):
            total, y = totals[name], min(place, len(policies))
            colour = REPLAYED[total["kind"]]
            if total["kind"] != "single":
                each = [row["of_domain_best"] for row in rows if row["policy"] == name]
                axes.plot(each, [y] * len(each), "|", color=colour, ms=6, alpha=0.5)
            pooled = total["relative"] if domain is None else total["domains"][domain]
            axes.plot(pooled, y, "o", color=colour, ms=4.5)
        axes.set_title("all texts" if domain is None else domain or "no domain", size="medium")
        axes.set_ylim(len(policies) + 0.6, -0.6)
        axes.set_yticks(range(len(policies) + 1), [*policies, "single drafters"], size=8)
        axes.grid(axis="y", color="0.92")
        axes.set_axisbelow(True)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes in grid.flat[max(len(panels) - columns, 0) : len(panels)]:
        axes.xaxis.set_tick_params(labelbottom=True)
        axes.set_xlabel("MAT / best single drafter's", size=8)
    keys = [Line2D([], [], color=colour, marker="o", ls="", ms=4.5) for colour in REPLAYED.values()]
    keys.append(Line2D([], [], color="0.3", marker="|", ls="", ms=6))
    names = ["learner", "learner, mode played", "bandit", "uniform", "single drafter", "one text"]
    figure.legend(keys, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=8)
    figure.suptitle(title, fontsize="medium")
    _save(figure, path)


def check(path: Path) -> None:
    """Fail now rather than after the run if no picture can be written to ``path``; its folder is made.

    Raises:
        ValueError: if ``path`` is a folder or ends in no format that matplotlib writes.
    """
    from matplotlib.figure import Figure

    formats = Figure().canvas.get_supported_filetypes()
    if path.is_dir() or path.suffix.removeprefix(".") not in formats:
        raise ValueError(f"cannot draw into {path}: give a file ending in {', '.join(sorted(formats))}")
    path.parent.mkdir(parents=True, exist_ok=True)


def _save(figure: object, path: Path) -> None:
    figure.savefig(path, dpi=130)  # type: ignore[attr-defined]
