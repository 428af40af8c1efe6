"""Commands that load no model: ``nab replay`` and ``nab simulate``."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

import nab
from nab import plots, replays
from nab.console import console_for, frame_table, guarded, progress, replay_table
from nab.sim.trace import environment, read_trace


@click.command()
@click.argument("traces", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--policy", help="Whose texts to replay. Default: the first in each trace but plain.")
@click.option("--objective", type=click.Choice([*replays.OBJECTIVES]), default="token", show_default=True)
@click.option("--draft-len", type=click.IntRange(1), help="Default: the one recorded.")
@click.option(
    "--replays", "times", type=click.IntRange(1), default=8, show_default=True, help="Of each text."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Folder for replay.csv and replay.png.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object to standard output.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def replay(debug: bool, **options: Any) -> None:
    """Replay the texts of traces under every learner, bandit and single drafter; loads no model."""
    guarded(lambda: _replay(**options), debug)


def _replay(
    *,
    traces: Sequence[Path],
    policy: str | None,
    objective: str,
    draft_len: int | None,
    times: int,
    seed: int,
    out: Path | None,
    as_json: bool,
) -> None:
    if objective == "time":
        raise ValueError("replays know the objectives token and length only: a text has no times of its own")
    if out:
        plots.check(out / "replay.png")
    found = [read_trace(path) for path in traces]
    for trace in found:
        if trace.broken_off:
            print(f"warning: {trace.broken_off}", file=sys.stderr)
    answers, draft_len = replays.texts(found, policy), draft_len or replays.draft_length(found)
    minimised = replays.OBJECTIVES[objective](draft_len)
    done = replays.replayed(answers, draft_len, minimised, replays=times, seed=seed)
    console = console_for(as_json)
    rows: list[replays.Row] = []
    try:
        for each in progress(console, done, len(answers)):
            rows += each
    finally:
        if rows:
            table = replays.compared(rows)
            totals = replays.totals(table)
            title = (
                replays.title(rows) + f", draft length {draft_len}, {objective} objective, replays: {times}"
            )
            console.print(replay_table(totals, title))
            if as_json:
                broken_off = [trace.broken_off for trace in found if trace.broken_off]
                result = {"broken_off": broken_off, "policies": totals, "rows": table}
                print(json.dumps(result, ensure_ascii=False))
            if out:
                _write_csv(table, out / "replay.csv")
                plots.replays(table, totals, out / "replay.png", title)


def _write_csv(table: Sequence[dict[str, Any]], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)


@click.command()
@click.argument("study", required=False)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("out"), show_default=True, help="Folder."
)
@click.option("--table", type=click.Choice(["csv", "parquet"]), default="csv", show_default=True)
@click.option(
    "--scale", type=click.FloatRange(0, min_open=True), default=1.0, help="Of all sizes. Default: 1."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--jobs", type=click.IntRange(1), help="Cells side by side. Default: one per processor.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def simulate(
    *, study: str | None, out: Path, table: str, scale: float, seed: int, jobs: int | None, debug: bool
) -> None:
    """Measure a STUDY and write its table and picture; without one, list what there is.

    What is measured is kept as it comes: run the command again to go on where it was interrupted.
    """
    guarded(
        lambda: _simulate(study, out, table, jobs or os.cpu_count() or 1, {"scale": scale, "seed": seed}),
        debug,
    )


def _simulate(study: str | None, out: Path, suffix: str, jobs: int, sizes: dict[str, Any]) -> None:
    from nab.sim import studies

    console = console_for()
    if study is None:
        for name in studies.NAMES:
            console.print(f"[bold]{name}[/bold]: {studies.headline(name)}", highlight=False)
        return
    module = studies.load(study)
    if not 0 < sizes["scale"] <= 1000:
        raise ValueError(f"scale must lie in (0, 1000], got {sizes['scale']}")
    plots.check(out / f"{study}.png")
    keep = out / f"{study}.cells.jsonl"
    found = module.measure(jobs=jobs, keep=keep, progress=True, **sizes)
    path = out / f"{study}.{suffix}"
    found.to_csv(path, index=False) if suffix == "csv" else found.to_parquet(path)
    module.figure(found).savefig(out / f"{study}.png", dpi=150)
    summary = module.summary(found)
    about = {
        "version": nab.__version__,
        **environment(),
        **sizes,
        "summary": json.loads(summary.to_json(orient="records")),
    }
    (out / f"{study}.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
    keep.unlink(missing_ok=True)
    console.print(frame_table(summary, studies.headline(study)))
    console.print(f"{path}, {out / study}.json, {out / study}.png", highlight=False)
