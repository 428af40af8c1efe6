"""Tokens per second with the pace of the machine taken out, from the answers of paper.py.

    python benchmarks/paper.py record out/corpora --target smollm2 --device cuda --out out/cuda-smollm2
    python benchmarks/pace.py out/cuda-smollm2/T0.8-256

Where few answers are measured and a host is slower under one of them than under the next, seconds compare
hosts. So every part of a round is taken at what it takes in the middle: drafting at its median over all
rounds that draft as many tokens, with lookup or with any of the others, which are of one size; verification
at its median over all rounds with as many, whatever the policy; selecting at its mean under the policy. This
is fair where they do not depend on the policy in truth: on a GPU, but not on a processor whose caches scoring
empties. Prints a table.
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median

import recording
from paper_report import GENERALIST, TIMED, is_fixed, table, traces

from nab.decode import Round
from nab.experiment import PLAIN
from nab.sim.trace import TracedQuery


def answers(folder: Path) -> tuple[list[TracedQuery], list[str]]:
    """Those of a cell under policies that all its domains have, and the names of the drafters.

    Raises:
        ValueError: if a policy of the table is none of them.
    """
    whole = [*traces(folder)]
    found = [query for trace in whole for query in trace.queries]
    domains = {query.domain for query in found}
    of = defaultdict[str, set[str | None]](set)
    for query in found:
        of[query.policy].add(query.domain)
    known = {policy for policy, its in of.items() if its == domains}
    if missing := {PLAIN, GENERALIST, TIMED} - known:
        names = ", ".join(sorted(missing))
        raise ValueError(f"{folder} must hold answers of paper.py record by {names} in every domain")
    return [query for query in found if query.policy in known], whole[0].drafters


def at_one_pace(queries: Sequence[TracedQuery], drafters: Sequence[str]) -> list[float]:
    """Seconds of each answer."""

    def drafts(round_: Round) -> tuple[bool, int]:
        return drafters[round_.choice] == "lookup", round_.drafted

    drafting, verifying, selecting = (defaultdict[object, list[float]](list) for _ in range(3))
    for query in queries:
        for round_ in query.rounds:
            drafting[drafts(round_)].append(round_.seconds.draft)
            verifying[round_.drafted].append(round_.seconds.verify)
            selecting[query.policy].append(round_.seconds.select)
    draft, verify = ({key: median(values) for key, values in of.items()} for of in (drafting, verifying))
    select = {policy: mean(values) for policy, values in selecting.items()}
    return [
        sum(draft[drafts(round_)] + verify[round_.drafted] + select[query.policy] for round_ in query.rounds)
        for query in queries
    ]


def report(folder: Path) -> None:
    """Print the table of a cell."""
    queries, drafters = answers(folder)
    tokens, seconds = (defaultdict[tuple[str, str], float](float) for _ in range(2))
    for query, spent in zip(queries, at_one_pace(queries, drafters), strict=True):
        tokens[query.policy, query.domain] += len(query.tokens)
        seconds[query.policy, query.domain] += spent
    policies, domains = (list(dict.fromkeys(names)) for names in zip(*tokens, strict=True))
    speed = {name: [tokens[name, each] / seconds[name, each] for each in domains] for name in policies}
    rows = [(name, [*(f"{each:.0f}" for each in row), f"{mean(row):.0f}"]) for name, row in speed.items()]
    fixed = [speed[name] for name in policies if is_fixed(name)]
    for name, others in (("generalist", [speed[GENERALIST]]), ("fastest fixed policy", fixed)):
        row = [own / max(other) for own, *other in zip(speed[TIMED], *others, strict=True)]
        rows.append((f"time objective / {name}", [f"{each:.2f}" for each in [*row, mean(row)]]))
    print(table([*domains, "mean"], rows))


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of one temperature and length")
    parser.set_defaults(command=lambda options: report(options.folder))
    return parser.parse_args(words)


if __name__ == "__main__":
    recording.run(parsed)
