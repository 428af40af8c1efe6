"""Tables and pictures of what ``beyond.py record`` wrote; loads no model."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from beyond_studies import OF_BEST, PLAYED, SIZES, TRACKING, Cell, Record, Study, read
from joblib import Parallel, delayed
from matplotlib.figure import Figure
from paper_report import HEDGE, interval, shared, table

from nab.sim import bounds
from nab.types import Floats

SHOWN = (16, 32, 64, 128, 256)
"""Tokens at which the table has regret."""

SWITCHED = {
    "stationary": "no change",
    "once": "one change",
    "thrice": "three changes",
    "once-anew": "one, text anew",
    "thrice-anew": "three, text anew",
}
COLOURS = {
    HEDGE: "#1f5fa8",
    "hedge": "#58a4dd",
    **dict(zip(TRACKING, ("#1b7f5c", "#57b894", "#8bc34a", "#b5a642"), strict=True)),
    "ucb-spec": "#e4811c",
    "exp3-spec": "#f2b134",
    "uniform": "0.6",
    "fixed:generalist": "0.8",
}


def shown(study: Study) -> str:
    """A study as a table, with intervals."""
    heads = list(dict.fromkeys(head for row in study.values() for head in row))
    rows = ((name, [interval(row[h], 3) if h in row else "" for h in heads]) for name, row in study.items())
    return table(heads, rows)


def plain(study: Study) -> dict[str, Any]:
    """A study as plain JSON types: value, and the ends of its interval."""
    return {
        name: {
            head: [float(values[0]), *np.quantile(values[1:], [0.025, 0.975]).tolist()]
            for head, values in row.items()
        }
        for name, row in study.items()
    }


def accuracy(routes: dict[str, Any]) -> str:
    """Share of held-out prompts that routers send to their domain's expert, by variant."""
    tested = routes["tested"]
    first = next(iter(tested.values()))
    kinds = list(next(iter(first.values())))
    rows = (
        (variant, [f"{right(by_domain, kind):.3f}" for kind in kinds])
        for variant, by_domain in tested.items()
    )
    return table(kinds, rows)


def right(by_domain: Mapping[str, Mapping[str, Sequence[str]]], kind: str) -> float:
    """Accuracy of a router, from its labels by domain."""
    return float(np.mean([label == domain for domain, own in by_domain.items() for label in own[kind]]))


def regrets(curves: Mapping[str, Floats], n: int) -> str:
    """Regret at some numbers of tokens."""
    length = len(next(iter(curves.values())))
    at = [tokens for tokens in SHOWN if tokens <= length]
    rows = [(name, [f"{curve[t - 1]:.2f}" for t in at]) for name, curve in curves.items()]
    rows.append(("sqrt(T ln n / 2)", [f"{bounds.hedge_tuned(n, t):.2f}" for t in at]))
    return table([f"T = {tokens}" for tokens in at], rows)


def switching_picture(cells: Mapping[str, Mapping[str, Study]], path: Path) -> None:
    """MAT over that of the best drafter of the query, by policy and number of changes."""
    figure = Figure(figsize=(9.2, 0.8 + 3.2 * len(cells)), layout="constrained")
    for axes, (title, studies) in zip(
        figure.subplots(len(cells), 1, squeeze=False)[:, 0], cells.items(), strict=True
    ):
        column, width = OF_BEST, 0.8 / len(PLAYED)
        for k, name in enumerate(PLAYED):
            values = np.array([study[name][column] for study in studies.values()])
            low, high = np.quantile(values[:, 1:], [0.025, 0.975], axis=1)
            at = np.arange(len(studies)) + (k - (len(PLAYED) - 1) / 2) * width
            spread = np.abs(np.stack([low, high]) - values[:, 0])
            axes.errorbar(at, values[:, 0], spread, fmt="o", ms=4, lw=1.2, label=name, color=COLOURS[name])
        axes.axhline(1, color="black", lw=1)
        axes.set_title(title, fontsize=10)
        axes.set_xticks(range(len(studies)), [SWITCHED[study] for study in studies])
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylabel("MAT / best single drafter")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)


def regret_picture(cells: Mapping[str, Mapping[str, Floats]], n: int, path: Path) -> None:
    """Mean regret against tokens."""
    figure = Figure(figsize=(9.2, 3.6), layout="constrained")
    for axes, (title, curves) in zip(
        figure.subplots(1, len(cells), squeeze=False, sharey=True)[0], cells.items(), strict=True
    ):
        for name, curve in curves.items():
            axes.plot(np.arange(1, len(curve) + 1), curve, color=COLOURS[name], label=name)
        tokens = np.arange(1, len(curve) + 1)
        bound = [bounds.hedge_tuned(n, int(t)) for t in tokens]
        axes.plot(tokens, bound, "k--", lw=1, label=r"$\sqrt{T\,\ln n\,/\,2}$")
        lowest = min(curve.min() for curve in curves.values())
        axes.set(title=title, xlabel="tokens", ylim=(1.1 * min(lowest, 0), 3 * bound[-1]))
        axes.axhline(0, color="black", lw=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("regret, token loss")
    figure.axes[0].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)


def sizes_picture(cells: Mapping[str, Mapping[str, Study]], path: Path) -> None:
    """MAT over that of the best drafter, by n."""
    figure = Figure(figsize=(9.2, 3.4 * len(cells)), layout="constrained")
    grid = figure.subplots(len(cells), 2, squeeze=False, sharey="row", sharex=True)
    for row, (title, studies) in zip(grid, cells.items(), strict=True):
        for axes, (kind, study) in zip(row, studies.items(), strict=True):
            for name, by_size in study.items():
                values = np.array([by_size[str(n)] for n in SIZES])
                low, high = np.quantile(values[:, 1:], [0.025, 0.975], axis=1)
                axes.plot(SIZES, values[:, 0], "o-", ms=3, color=COLOURS[name], label=name)
                axes.fill_between(SIZES, low, high, color=COLOURS[name], alpha=0.2, lw=0)
            axes.axhline(1, color="black", lw=1)
            axes.set_xscale("log", base=2)
            axes.set_xticks(SIZES, [str(n) for n in SIZES])
            axes.set_title(f"{title}: {kind}", fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel("MAT / best single drafter")
    for axes in grid[-1]:
        axes.set_xlabel("drafters")
    grid[0, 0].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)


def router_picture(cells: Mapping[str, Mapping[str, Study]], routes: dict[str, Any], path: Path) -> None:
    """Accuracy of routers, and MAT of where they route over that of normal-hedge, by variant."""
    figure = Figure(figsize=(9.2, 3.2 + 0.4 * len(cells)), layout="constrained")
    grid = figure.subplots(1, 1 + len(cells), sharey=True)
    variants = list(routes["tested"])
    kinds = list(next(iter(routes["tested"][variants[0]].values())))
    colours = dict(zip([*kinds, "own"], ("#7b4fa3", "#c06fb0", "#e3a9d6", "0.7"), strict=True))
    places, width = np.arange(len(variants)), 0.8 / (len(kinds) + 1)
    for k, kind in enumerate(kinds):
        values = [right(routes["tested"][variant], kind) for variant in variants]
        grid[0].barh(places + (k - 1) * width, values, width, color=colours[kind], label=f"router: {kind}")
    grid[0].set_title("sent to the expert of the domain", fontsize=9)
    for axes, (title, studies) in zip(grid[1:], cells.items(), strict=True):
        rows = {
            **{f"router: {kind}": colours[kind] for kind in kinds},
            "expert of the domain": colours["own"],
        }
        for k, (row, colour) in enumerate(rows.items()):
            values = np.array(
                [studies[variant][row]["of normal-hedge, on its texts"] for variant in variants]
            )
            low, high = np.quantile(values[:, 1:], [0.025, 0.975], axis=1)
            spread = np.abs(np.stack([low, high]) - values[:, 0])
            axes.barh(
                places + (k - 1) * width, values[:, 0], width, xerr=spread, color=colour, label=row,
                error_kw={"lw": 0.8},
            )  # fmt: skip
        axes.axvline(1, color="#1f5fa8", lw=1.2)
        axes.set_title(f"MAT / normal-hedge, {title}", fontsize=9)
    grid[0].set_yticks(places + width / 2, variants)
    grid[0].invert_yaxis()
    for axes in grid:
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = grid[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)


def report(out: Path, seed: int, jobs: int) -> None:
    """Write JSON, tables and pictures of what is in a folder.

    Raises:
        ValueError: if there is nothing, or nothing yet of a study.
    """
    folders = sorted(path for path in out.glob("T*") if path.is_dir())
    if not any(folder.rglob("*.jsonl") for folder in folders):
        raise ValueError(f"{out} holds no traces: beyond.py record writes them")
    routes = json.loads((out / "routes.json").read_text())
    parts, kept = [], {"routes": routes}
    pictures: dict[str, dict[str, Any]] = {"switching": {}, "regret": {}, "sizes": {}, "router": {}}
    for folder in folders:
        paths = sorted(folder.rglob("*.jsonl"))
        records: list[Record] = Parallel(jobs)(
            delayed(read)(path, str(path.parent.relative_to(folder))) for path in paths
        )
        cell, title = Cell(records, seed, jobs), f"temperature {records[0].about['temperature']:g}"
        answers = [(record, name) for record in records for name in record.answers]
        differ = [f"{r.study}/{r.name}: {name}" for r, name in answers if not r.answers[name].same]
        said = f"{len(answers)} answers were fed to their selectors again from the traces: " + (
            f"{len(answers) - len(differ)} had the recorded laws, choices and regret to the last bit."
        )
        switching = {study: cell.tracking(study) for study in SWITCHED}
        curves, sizes, warm = cell.regret(), cell.sizes(), cell.warm()
        unseen = cell.tracking("unseen") if any(record.study == "unseen" for record in records) else {}
        routing = {variant: cell.router(variant, by) for variant, by in routes["routes"].items()}
        counted = {study: len(cell.of(study)) for study in dict.fromkeys(r.study for r in records)}
        queries = ", ".join(f"{study} {count}" for study, count in counted.items())
        parts += [f"## {title}\n\n{said} Queries: {queries}.\n", *differ]
        parts += [f"### {SWITCHED[study]}\n\n{shown(each)}" for study, each in switching.items()]
        parts.append(f"### Regret, token loss, n = {len(cell.names)}\n\n{regrets(curves, len(cell.names))}")
        parts += [f"### Drafters: {kind}, by n\n\n{shown(each)}" for kind, each in sizes.items()]
        parts += [f"### Unseen domain\n\n{shown(unseen)}"] if unseen else []
        parts += [f"### Routers: {variant}\n\n{shown(each)}" for variant, each in routing.items()]
        parts += [f"### Streams: {kind}\n\n{shown(each)}" for kind, each in warm.items()]
        kept[title] = {
            "about": shared(records[0].about),
            "queries": counted,
            "refed": {"answers": len(answers), "different": differ},
            "switching": {study: plain(each) for study, each in switching.items()},
            "regret": {name: curve.tolist() for name, curve in curves.items()},
            "sizes": {kind: plain(each) for kind, each in sizes.items()},
            "unseen": plain(unseen),
            "router": {variant: plain(each) for variant, each in routing.items()},
            "warm": {kind: plain(each) for kind, each in warm.items()},
        }
        for name, each in zip(pictures, (switching, curves, sizes, routing), strict=True):
            pictures[name][title] = each
    parts.append(f"## Routers\n\nAccuracy on held-out openings:\n\n{accuracy(routes)}")
    switching_picture(pictures["switching"], out / "switching.png")
    regret_picture(pictures["regret"], len(cell.names), out / "regret.png")
    sizes_picture(pictures["sizes"], out / "drafters.png")
    router_picture(pictures["router"], routes, out / "router.png")
    (out / "beyond.json").write_text(json.dumps(kept, indent=1))
    (out / "beyond.md").write_text("\n".join(parts))
    print("\n".join(parts))
