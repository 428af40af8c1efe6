"""The paper's comparison on models anyone can download: each selector and domain, MAT and tokens per second.

    python scripts/corpora.py out/corpora
    python benchmarks/paper.py record out/corpora --target tiny --out out/paper-tiny --jobs 2
    python benchmarks/paper.py report out/paper-tiny

`record` answers held-out prompts under each policy in turn, prompt by prompt. For each temperature, length of
answers, domain and prompt it writes a trace, OUT/CELL/DOMAIN-NN.jsonl, a cell being `T0.8-256`, and a summary
beside it, .json, for which every policy of `nab replay` was replayed on the text of normal-hedge. What has a
summary is not made again, so a stopped run goes on with the same command. `report` reads the summaries there
are and writes one JSON and one picture per cell and the tables OUT/paper.md.

Prompts: for the tiny target openings of held-out documents, for SmolLM2 held-out requests, then shipped ones.
Prompt k has seed k: every policy meets the same uniforms. Policies that some prompts of a cell lack
(`--policies`) have no figures as decoded, only replayed ones. At temperature 0 every text is compared with
that of plain decoding; a difference is computed again in a higher precision and counted as rounding or not.
"""

import argparse
import json
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import paper_report
import recording
from recording import DRAFT_LEN, Policies, fixed, prompts_of, session

from nab import replays
from nab.experiment import FIXED, PLAIN, Experiment
from nab.losses import Length, Time, Token
from nab.prompts import Prompt
from nab.sim.trace import TraceWriter
from nab.wrappers import seldom

PER_DOMAIN = 20
OWN = f"{FIXED}own"
"""The expert of the prompt's domain, whichever that is."""

LEARNED = {
    "ucb-spec": "ucb-spec",
    "exp3-spec": "exp3-spec",
    "meta-sd": "meta-sd .5",
    "normal-hedge": "normal-hedge",
    "hedge .93 argmax": "hedge .93 argmax",
    "follow-the-leader": "follow-the-leader",
}
"""Policies under the token objective, by their names in ``nab replay``."""

LENGTHS = {"length": Length(DRAFT_LEN), "plug-in": Length(DRAFT_LEN, plug_in=True)}
"""The unbiased estimate of a round's tokens, and the paper's."""


def policies(names: list[str]) -> Policies:
    """Every row of the table that decodes: fresh selectors by seed, in the order in which they answer."""
    n = len(names)
    known = replays.policies(n, DRAFT_LEN, Token())
    timed = replays.policies(n, DRAFT_LEN, Time(DRAFT_LEN))["normal-hedge argmax"].make
    return {
        PLAIN: partial(fixed, np.full(n, 1 / n)),
        **{f"{FIXED}{name}": partial(fixed, row) for name, row in zip(names, np.eye(n), strict=True)},
        "uniform": known["uniform"].make,
        **{name: known[replayed].make for name, replayed in LEARNED.items()},
        **{
            f"normal-hedge {name}": replays.policies(n, DRAFT_LEN, objective)["normal-hedge"].make
            for name, objective in LENGTHS.items()
        },
        paper_report.TIMED: lambda seed: seldom(timed(seed)),
    }


def named(wanted: list[str], every: Policies, domain: str) -> Policies:
    """Policies of a prompt by name: ``every``, its domain's own expert, fixed ones that draft fewer tokens.

    Raises:
        ValueError: on a name that is none of them.
    """
    single = {name: make for name, make in every.items() if name.startswith(FIXED)}
    if own := single.get(FIXED + domain):
        single[OWN] = own
    shorter = {
        f"{name} {k}": partial(make, draft_len=k)
        for name, make in single.items()
        for k in range(1, DRAFT_LEN)
    }
    known = every | single | shorter
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(
            f"policies are {', '.join(every | single)}, "
            f"fixed ones with 1 to {DRAFT_LEN - 1} for shorter drafts ('{paper_report.GENERALIST} 2'), "
            f"got {', '.join(unknown)}"
        )
    return {name: known[name] for name in wanted}


class Unit(NamedTuple):
    """A prompt to be answered under all policies, and where its summary goes, beside its trace."""

    path: Path
    temperature: float
    tokens: int
    number: int
    prompt: Prompt


def answer(target: str, device: str, wanted: list[str] | None, unit: Unit) -> None:
    """Record a unit."""
    made = session(target, unit.temperature, unit.tokens, device)
    every = _policies(target, unit.temperature, unit.tokens, device)
    chosen = named(wanted, every, unit.prompt.domain) if wanted else every
    trace, part = (unit.path.with_suffix(suffix) for suffix in (".jsonl", ".part"))
    experiment = Experiment(made, [unit.prompt], chosen, unit.number)
    header = recording.header(made, unit.number, max_new_tokens=unit.tokens, prompt=unit.prompt.text)
    with TraceWriter(trace, header) as writer:
        experiment.execute(lambda label, query, rounds: [*rounds], writer)
    partings = [
        {"policy": name, **parting._asdict(), "is_rounding": parting.is_rounding}
        for name, _, parting in (experiment.divergences() if unit.temperature == 0 else [])
    ]
    part.write_text(json.dumps(paper_report.summed(trace, partings)))
    part.replace(unit.path)


@cache
def _policies(target: str, temperature: float, tokens: int, device: str) -> Policies:
    """Once in a process, so that what the time objective knows of costs outlives a query."""
    return policies(session(target, temperature, tokens, device).names)


def record(options: argparse.Namespace) -> None:
    """Answer what is not answered yet."""
    domains = options.domains or sorted(
        path.name for path in options.corpora.iterdir() if (path / "requests" / "heldout.txt").exists()
    )
    for needed in (paper_report.HEDGE, *([PLAIN] if 0 in options.temperature else [])):
        if options.policies and needed not in options.policies:
            raise ValueError(f"--policies must have {needed}, got {' '.join(options.policies)}")
    if not domains:
        raise ValueError(
            f"{options.corpora} has no DOMAIN/requests/heldout.txt: scripts/corpora.py makes them"
        )
    found = {
        domain: prompts_of(options.corpora, options.target, domain, options.per_domain) for domain in domains
    }
    units = [
        Unit(
            options.out / f"T{temperature:g}-{tokens}" / f"{domain}-{k:02d}.json",
            temperature,
            tokens,
            k,
            found[domain][k],
        )
        for k in range(options.per_domain)
        for tokens in options.tokens
        for temperature in options.temperature
        for domain in domains
    ]
    for path in (unit.path for unit in units if unit.path.exists()):
        made = paper_report.summary(path)
        if options.target not in made["header"]["target"]:
            raise ValueError(f"{path} is of target {made['header']['target']}, got --target {options.target}")
        if missing := [name for name in options.policies or [] if name not in made["answers"]]:
            raise ValueError(f"{path} was recorded without {', '.join(missing)}: take another --out")
    work = partial(answer, options.target, options.device, options.policies)
    recording.work_through(units, work, options.jobs)


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser, recorder, _ = recording.commands(
        __doc__,
        record,
        lambda options: paper_report.report(options.out, options.seed),
        ["tiny", "smollm2"],
        PER_DOMAIN,
    )
    recorder.add_argument("--tokens", type=int, nargs="+", default=[256])
    recorder.add_argument(
        "--policies",
        nargs="+",
        help=f"default: all; {OWN} is the expert of the prompt's domain, '{OWN} 2' drafts two tokens a round",
    )
    recorder.add_argument("--device", default="cpu")
    return parser.parse_args(words)


if __name__ == "__main__":
    recording.run(parsed)
