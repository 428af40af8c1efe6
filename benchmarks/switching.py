"""Queries that change domain, joined from the answers of paper.py: tracking learners against static ones.

    python benchmarks/paper.py record out/corpora --target smollm2 --out out/paper-smollm2
    python benchmarks/switching.py out/paper-smollm2/T0.8-256

A query is one, two or four answers of different domains, or their first tokens, one behind the other under
one selector that forgets nothing in between. The target's and the drafters' laws are those of each answer
alone, as if the context had been cleared. So nothing is decoded again, and of each kind of query there are as
many as answers. Queries of one number share their answers, so the bootstrap draws them together.
Selectors are replayed on the texts of normal-hedge. Prints a table, and writes FOLDER-switching.json.
"""

import argparse
import json
from pathlib import Path

import recording
from beyond_report import plain
from beyond_studies import BEST, OF_BEST, OF_PARTS, Cell, Segment, joined
from paper_report import BANDITS, GENERALIST, HEDGE, interval, shared, table, traces
from timing import commit

POLICIES = (HEDGE, "hedge .93 argmax", "normal-hedge .93", GENERALIST, *BANDITS)

PARTS = {1: (1.0,), 2: (0.5, 1.0), 4: (0.375, 1.0)}
"""What of an answer is a segment, by the number of segments."""


def texts(folder: Path) -> tuple[dict[str, list[Segment]], dict[str, object]]:
    """Scores of the answers of ``HEDGE``, by domain, and a header.

    Raises:
        ValueError: if they are not of two domains at least.
    """
    found, about = dict[str, list[Segment]](), dict[str, object]()
    for trace in traces(folder):
        about = trace.header
        for query in trace.queries:
            if query.policy == HEDGE:
                found.setdefault(query.domain, []).append((query.gamma, query.realised))
    if len(found) < 2:
        raise ValueError(f"{folder} must hold answers of two domains at least, got {len(found)}")
    return found, about


def report(folder: Path, seed: int, jobs: int) -> None:
    """Print and write all tables of a cell of paper.py."""
    found, about = texts(folder)
    records = []
    for segments, parts in PARTS.items():
        for part in parts:
            length = round(part * int(about["max_new_tokens"]))
            records += joined(found, about, f"{segments} x {length}", segments, length)
    cell = Cell(records, seed, jobs)
    kinds = dict.fromkeys(record.study for record in records)
    studies = {study: cell.tracking(study, POLICIES, shared=True) for study in kinds}
    queries = len(records) // len(studies)
    print(f"{queries} queries of each kind, segments x tokens. MAT over that of the {BEST}:\n")
    rows = {name: [each[name][OF_BEST] for each in studies.values()] for name in POLICIES}
    rows["best drafter of each segment"] = [1 / each[BEST][OF_PARTS] for each in studies.values()]
    print(table([*studies], ((name, [interval(each, 3) for each in row]) for name, row in rows.items())))
    kept = {
        "about": shared(about),
        "replayed at": commit(),
        "queries": queries,
        "studies": {study: plain(each) for study, each in studies.items()},
    }
    (folder.parent / f"{folder.name}-switching.json").write_text(json.dumps(kept, indent=1))


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of one temperature and length")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap and the replays")
    parser.add_argument("--jobs", type=int, default=1)
    parser.set_defaults(command=lambda options: report(options.folder, options.seed, options.jobs))
    return parser.parse_args(words)


if __name__ == "__main__":
    recording.run(parsed)
