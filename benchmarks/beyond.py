"""Beyond the paper's table: queries that change domain, unseen domains, many drafters, routers, warm starts.

    python scripts/corpora.py out/corpora
    python benchmarks/beyond.py record out/corpora --target tiny --out out/beyond --jobs 2
    python benchmarks/beyond.py report out/beyond

On two cores `record` takes about three quarters of an hour.

`record` answers held-out prompts under each policy in turn and writes one trace for each temperature, study
and prompt: OUT/T0.8/STUDY/NAME.jsonl. What is there is not made again, so a stopped run goes on with the same
command; a trace that was being written is begun anew. `report` loads no model: it reads the traces, replays
selectors on their texts and writes OUT/beyond.json, the tables OUT/beyond.md and pictures.

A query is a list of segments. The text goes on for so many tokens behind a held-out opening; then the opening
of the next segment is appended, and the same selector goes on. It learns nothing from openings, as from any
prompt. A segment ends with its last round, so it may be up to DRAFT_LEN tokens longer. Studies:

* `stationary`: one segment; and `unseen`: the same in domains without an expert;
* `once` and `thrice`: two and four segments of different domains;
* `once-anew` and `thrice-anew`: the same, but each segment's text begins with its opening, as if a context
  had been cleared. For the tiny target has only ever read one domain at a time, and otherwise often goes on
  in that of the first segment;
* `router`: one segment, behind the opening as it is and behind the opening with a sentence added.

Stationary texts are also scored by weak drafters: copies of those in the pool with noise in their weights,
NAME.weak.npz.
"""

import argparse
import json
from collections.abc import Generator, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple, cast
from zlib import crc32

import beyond_report
import numpy as np
import recording
import router
import torch
from beyond_studies import MADE_WEAK, PLAYED, Segment, policies, seeds, switched
from paper_report import GENERALIST, HEDGE
from peers import perturbed
from recording import DRAFT_LEN, openings, prompts_of, session

from nab.acceptance import Chain
from nab.backends import pretrained
from nab.backends.session import Session
from nab.backends.stack import stacked
from nab.backends.torch import CausalLM
from nab.decode import Evaluation, Round, decode
from nab.experiment import FIXED
from nab.measure import Query, metrics
from nab.pool import Pool
from nab.prompts import Prompt
from nab.schemes import Levels
from nab.selector import Chooses
from nab.sim.trace import TraceWriter

TARGET = "tiny"
PER_DOMAIN = 4
TOKENS = 256
VARIANTS = {
    "as seen": "{}",
    "request behind": "{}\n\nPlease explain this to a friend in simple words.",
    "comment behind": "{}\n// return the result as a list of numbers",
    "letter behind": "{}\n\nDear Madam or Sir, thank you for your letter of last week.",
    "request in front": "Please go on with the following text:\n\n{}",
}
"""Prompts for routers: openings as they were trained on them, and with one sentence, the same for all."""

AMOUNTS = (0.5, 0.7, 1.0, 1.4)
"""Noise in the weights of weak drafters, in standard deviations of each weight matrix."""

TRAINED_ON = 200
"""Openings a domain that a router is trained on."""

TESTED_ON = 50

ANEW = "-anew"
"""Ends the names of studies in which a segment's text begins with its opening."""


Routes = dict[str, dict[str, dict[str, list[str]]]]
"""Labels that prompts get, by variant, domain and router."""


class Unit(NamedTuple):
    """A query to be answered under policies, and where its trace goes.

    ``prompts`` are the openings of its segments, of at least ``tokens`` tokens each. Where they begin
    ``anew``, a segment's text does not stand behind those before it.
    """

    path: Path
    temperature: float
    tokens: int
    seed: int
    prompts: tuple[Prompt, ...]
    policies: tuple[str, ...]
    anew: bool


def answer(unit: Unit) -> None:
    """Record a unit."""
    made = session(TARGET, unit.temperature, unit.tokens, "cpu")
    every, part = policies(made.names), unit.path.with_suffix(".part")
    texts = [prompt.text for prompt in unit.prompts]
    header = recording.header(made, unit.seed, max_new_tokens=unit.tokens, prompts=texts)
    with TraceWriter(part, header) as trace:
        for name in unit.policies:
            decoding, choosing = seeds(unit.seed)
            selector, rng, text = every[name](choosing), np.random.default_rng(decoding), list[int]()
            for model in (made.model, *made.drafters.values()):
                if hasattr(model, "reset"):
                    model.reset()
            for number, prompt in enumerate(unit.prompts):
                text = [] if unit.anew else text
                text += made.target.encode("\n\n" * bool(text) + prompt.text)
                query = made.query(domain=prompt.domain)
                where = {"query": number, "policy": name, "domain": prompt.domain}
                for _ in trace.keep(segment(made, query, text, selector, rng), where):
                    pass
                scores = dict(zip(("gamma", "realised"), query.unasked_scores(), strict=False))
                trace.write("query", {**where, "text": made.text(query.tokens), **metrics([query]), **scores})
                if name == HEDGE and unit.path.parent.name == "stationary":
                    gamma, realised = weak_scores(made, text, query.tokens)
                    np.savez(unit.path.with_suffix(".weak.npz"), gamma=gamma, realised=realised)
                text += query.tokens
    part.replace(unit.path)


def segment(
    made: Session, query: Query, text: Sequence[int], selector: Chooses, rng: np.random.Generator
) -> Generator[Round]:
    """Fill a query with whole rounds until it has the session's number of tokens, whatever they are."""
    drafters = Pool(list(made.drafters.values()))
    for round_ in decode(made.model, drafters, selector, text, draft_len=DRAFT_LEN, rng=rng):
        query.take(round_)
        yield round_
        if len(query.tokens) >= made.max_new_tokens:
            break
    query.settle(made.model, drafters, text)
    query.finished = True
    if drafters.benched:
        raise ValueError(f"a drafter failed: {drafters.benched}")


@cache
def weak(temperature: float, tokens: int) -> list[CausalLM]:
    """Copies of the pool's models with noise in their weights, by amount, once in a process."""
    made = session(TARGET, temperature, tokens, "cpu")
    models = [each for each in made.drafters.values() if isinstance(each, CausalLM)]
    noisy = [
        CausalLM(perturbed(model.model, amount, seed), made.warper)
        for amount in AMOUNTS
        for seed, model in enumerate(models)
    ][:MADE_WEAK]
    stacked(noisy)
    return noisy


def weak_scores(made: Session, text: Sequence[int], answer: Sequence[int]) -> Segment:
    """``gamma`` and ``realised`` of the weak drafters on an answer, ``(positions, weak)``."""
    tokens = (*text, *answer)
    laws = made.model.score(tokens[:-1], len(text))
    drafters = Pool(weak(made.warper.temperature, made.max_new_tokens))
    return Evaluation(drafters, Levels([Chain()] * DRAFT_LEN), tokens, len(text), (laws,), len(text))()


class Plan(NamedTuple):
    """A unit but for its temperature and seed: ``order`` is the number of its prompt among its domain's."""

    order: int
    study: str
    name: str
    tokens: int
    prompts: list[Prompt]
    policies: Sequence[str] = tuple(PLAYED)


def plans(
    found: dict[str, list[Prompt]], domains: Sequence[str], tokens: int, routes: Routes
) -> Iterator[Plan]:
    """All studies.

    Args:
        found: held-out prompts by domain.
        domains: those with experts; the others are unseen.
        tokens: of an answer whose domain does not change.
        routes: see ``routed``.
    """
    for name, own in found.items():
        study = "stationary" if name in domains else "unseen"
        for k, prompt in enumerate(own):
            yield Plan(k, study, f"{name}-{k:02d}", tokens, [prompt])
    count = len(found[domains[0]])
    for study, segments, length in (("once", 2, tokens // 2), ("thrice", 4, 3 * tokens // 8)):
        for name, k, parts in switched(domains, count, segments):
            for context in ("", ANEW):
                own = [found[part][k] for part in parts]
                yield Plan(k, f"{study}{context}", f"{name}-{k:02d}", length, own)
    for variant, form in VARIANTS.items():
        for name in domains:
            for k, prompt in enumerate(found[name]):
                experts = [name, *(labels[k] for labels in routes[variant][name].values())]
                chosen = dict.fromkeys([HEDGE, GENERALIST, *(FIXED + each for each in experts)])
                study, own = f"router/{variant.replace(' ', '-')}", [Prompt(form.format(prompt.text), name)]
                yield Plan(k, study, f"{name}-{k:02d}", 3 * tokens // 8, own, [*chosen])


def routed(file: Path, corpora: Path, found: dict[str, list[Prompt]], trained_on: int) -> Routes:
    """Train the routers, if ``file`` does not hold their answers to these prompts yet.

    Args:
        file: where to keep the answers, and their accuracy on other held-out prompts.
        corpora: has openings to train on.
        found: prompts by domain.
        trained_on: openings a domain.

    Returns:
        See ``Routes``.
    """
    asked = {name: [prompt.text for prompt in own] for name, own in found.items()}
    if file.exists() and (kept := json.loads(file.read_text()))["prompts"] == asked:
        return cast(Routes, kept["routes"])
    target = pretrained.load(Path(TARGET), dtype="float32")
    train = {name: list(openings(corpora / name / "train", trained_on)) for name in found}
    test = {name: list(openings(corpora / name / "heldout", TESTED_ON)) for name in found}
    names = [name for name, texts in train.items() for _ in texts]
    seen = router.features(target, [text for texts in train.values() for text in texts])
    routers = {kind: router.fit(each, names) for kind, each in seen.items()}

    def answers(texts: list[str]) -> dict[str, list[str]]:
        return {kind: routers[kind].route(each) for kind, each in router.features(target, texts).items()}

    def routes(texts: dict[str, list[str]]) -> Routes:
        return {
            variant: {name: answers([form.format(text) for text in own]) for name, own in texts.items()}
            for variant, form in VARIANTS.items()
        }

    found_routes = routes(asked)
    file.parent.mkdir(parents=True, exist_ok=True)
    kept = {"prompts": asked, "trained_on": len(names), "routes": found_routes, "tested": routes(test)}
    file.write_text(json.dumps(kept, indent=1))
    return found_routes


def record(options: argparse.Namespace) -> None:
    """Answer what is not answered yet."""
    torch.set_num_threads(1)
    names = session(TARGET, 0.0, options.tokens, "cpu").names
    domains = options.domains or [name for name in names if (options.corpora / name).is_dir()]
    if len(domains) < 2 or not set(domains) <= set(names):
        raise ValueError(
            f"domains must be two at least that have drafters, got {', '.join(domains) or 'none'}"
        )
    found = {
        name: prompts_of(options.corpora, TARGET, name, options.per_domain)
        for name in (*domains, *options.unseen)
    }
    seen = {name: found[name] for name in domains}
    routes = routed(options.out / "routes.json", options.corpora, seen, options.trained_on)
    planned = sorted(plans(found, domains, options.tokens, routes), key=lambda plan: plan.order)
    units = [
        Unit(
            options.out / f"T{temperature:g}" / plan.study / f"{plan.name}.jsonl",
            temperature,
            plan.tokens,
            crc32(f"{plan.study}/{plan.name}".encode()),
            tuple(plan.prompts),
            tuple(plan.policies),
            plan.study.endswith(ANEW),
        )
        for plan in planned
        for temperature in options.temperature
        if not options.studies or plan.study in options.studies
    ]
    recording.work_through(units, answer, options.jobs)


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser, recorder, reporter = recording.commands(
        __doc__,
        record,
        lambda options: beyond_report.report(options.out, options.seed, options.jobs),
        [TARGET],
        PER_DOMAIN,
    )
    recorder.add_argument("--tokens", type=int, default=TOKENS, help="of an answer without changes")
    recorder.add_argument("--studies", nargs="+", help="default: all; once-anew, router/as-seen and so on")
    recorder.add_argument("--unseen", nargs="*", default=["german"], help="domains without an expert")
    recorder.add_argument("--trained-on", type=int, default=TRAINED_ON, help="openings a domain, of routers")
    reporter.add_argument("--jobs", type=int, default=2)
    return parser.parse_args(words)


if __name__ == "__main__":
    recording.run(parsed)
