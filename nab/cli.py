"""The command line: ``nab run``, ``compare``, ``audit``, ``replay`` and ``simulate``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from rich.console import Console

import nab
from nab import offline, plots, prometheus, replays, schemes
from nab import prompts as prompt_files
from nab.audit import Greedy, Sampling
from nab.console import View, comparison_table, console_for, guarded, progress, run_table, same_text_table
from nab.experiment import FIXED, PLAIN, Experiment, Policy, Start, workers
from nab.prompts import Prompt
from nab.selector import Chooses, Constant, Selector
from nab.sim.trace import TraceWriter, environment
from nab.wrappers import Corrected, Lazy, seldom

if TYPE_CHECKING:
    from nab.backends.session import Session

COMPARED = ["normal-hedge", "hedge"]
"""Learners that ``compare`` compares; ``nab replay`` plays all of them on the texts of its trace."""


TIMED = ["normal-hedge", "normal-hedge argmax"]
"""Those of the time objective."""

EVALUATIONS = ("first", "corrected", "exact")
"""How drafters are scored deep in the draft; see docs/theory.md."""


@dataclass(kw_only=True)
class Options:
    """What ``run``, ``compare`` and ``audit`` take; one field per option."""

    prompt: tuple[str, ...]
    prompts: Path | None
    limit: int | None
    target: Path | None
    drafters: str | None
    objective: str | None
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    draft_len: int
    scheme: str
    evaluation: str
    lazy: int | None
    drafter_limit: float | None
    seed: int
    device: str | None
    dtype: str | None = None
    threads: int | None
    as_json: bool
    prometheus: Path | None = None
    trace: Path | None = None
    plot: Path | None = None

    def __post_init__(self) -> None:
        self.tiny = self.target == Path("tiny")
        self.dtype = self.dtype or ("float32" if self.tiny else "bfloat16")
        if self.tiny:  # its layers are too small to share
            self.threads = self.threads or 1

    def read_prompts(self) -> list[Prompt]:
        """``--prompt``, else ``--prompts``, else the shipped ones."""
        if self.prompt and self.prompts:
            raise ValueError("give --prompt or --prompts, not both")
        shipped = prompt_files.OPENINGS if self.tiny else prompt_files.SHIPPED
        if self.prompt:
            found = [Prompt(text) for text in self.prompt]
        else:
            found = prompt_files.read(self.prompts or shipped)
        return found if self.limit is None else prompt_files.limited(found, self.limit)

    def open(self) -> Session:
        """Load the target and build the pool."""
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve busy cores
        import torch

        from nab.backends import pool, pretrained
        from nab.backends.session import Session
        from nab.backends.torch import Warper

        warper = Warper(self.temperature, self.top_k, self.top_p)
        scheme = schemes.named(self.scheme, self.draft_len, rng=self.seed)
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        target = pretrained.load(self.target, dtype=str(self.dtype), device=device)
        names = pool.split(self.drafters) if self.drafters else pool.default(target)
        exact = self.evaluation == "exact"
        return Session(
            target, names, warper, self.draft_len, self.max_new_tokens, scheme, exact, self.drafter_limit
        )

    def policy(self, name: str, drafters: Sequence[str]) -> Policy:
        """What makes fresh selectors over ``drafters``, by the name a person gives it."""
        n = len(drafters)
        constants = {FIXED + drafter: row for drafter, row in zip(drafters, np.eye(n), strict=True)}
        constants[PLAIN] = np.full(n, 1 / n)  # plain decoding never drafts
        if name in constants:
            return lambda seed: Constant(constants[name], rng=seed)
        if self.evaluation == "corrected" and self.objective == "token":
            raise ValueError(
                "--evaluation corrected changes nothing under the token objective: give --objective length"
            )
        objective = replays.OBJECTIVES[str(self.objective)](self.draft_len)
        named = replays.policies(n, self.draft_len, objective)
        if name in named:
            return partial(self._wrapped, named[name].make)
        raise ValueError(f"unknown selector {name!r}: choose from {', '.join([*named, *constants])}")

    def _wrapped(self, make: Policy, seed: Any) -> Chooses:
        """A learner's selector, corrected and lazy as asked for; bandits score nobody."""
        selector = make(seed)
        if not isinstance(selector, Selector):
            return selector
        scored = Corrected(selector, self.draft_len) if self.evaluation == "corrected" else selector
        if self.objective == "time":
            return seldom(scored, self.lazy)
        every = self.lazy or 1
        return scored if every == 1 else Lazy(scored, every=every, most=max(every, 128))

    def header(self, session: Session) -> dict[str, Any]:
        """What a reader of the results needs to know to repeat them."""
        import torch

        device = session.target.model.device
        return {
            "version": nab.__version__,
            **environment(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "device": str(device),
            "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            "target": session.target.name,
            "drafters": session.names,
            "dtype": self.dtype,
            "draft_len": self.draft_len,
            "nodes": session.scheme.nodes if session.scheme else self.draft_len,
            "scheme": self.scheme,
            "evaluation": self.evaluation,
            "objective": self.objective,
            "lazy": self.lazy,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "max_new_tokens": self.max_new_tokens,
            "seed": self.seed,
        }


def _shared_options(command: Callable[..., None], *, audit: bool = False) -> Callable[..., None]:
    """Declare the options of ``Options`` and hand them to ``command`` as one object.

    An audit is in float64 and has neither trace nor picture.
    """

    def collected(debug: bool, **values: Any) -> None:
        own = {name: values.pop(name) for name in list(values) if name not in Options.__annotations__}
        guarded(lambda: command(Options(**values), **own), debug)

    collected.__doc__, collected.__name__ = command.__doc__, command.__name__
    path = click.Path(path_type=Path)
    options = [
        click.option("--prompt", multiple=True, help="A prompt; may be repeated. Default: a shipped set."),
        click.option("--prompts", type=path, help="JSON lines: an object with prompt, optionally domain."),
        click.option("--limit", type=click.IntRange(1), help="At most so many prompts per domain."),
        click.option("--target", type=path, help="Folder, GGUF file or tiny. Default: SmolLM2-135M."),
        click.option("--drafters", help="Names or folders, comma-separated. Default: all that fit."),
        click.option(
            "--objective",
            type=click.Choice([*replays.OBJECTIVES]),
            help="What learners minimise; bandits have losses of their own. Default: time, seconds per "
            "token, so that choices follow the clock and drawn texts do not repeat; token in compare, audit "
            "and batches.",
        ),
        click.option("--max-new-tokens", type=click.IntRange(1), default=128, show_default=True),
        click.option("--temperature", type=float, default=0.7, show_default=True, help="0 is greedy."),
        click.option("--top-k", type=int, default=0, help="0 keeps all tokens."),
        click.option("--top-p", type=float, default=1.0, help="1 keeps all tokens."),
        click.option("--draft-len", type=click.IntRange(1), default=4, show_default=True),
        click.option(
            "--scheme", default="chain", show_default=True, help=f"Of verification: {schemes.NAMES}."
        ),
        click.option(
            "--evaluation",
            type=click.Choice([*EVALUATIONS]),
            default="first",
            show_default=True,
            help="Of drafters deep in the draft: as at the first token; the same, corrected by what was "
            "accepted; or exactly, at its cost.",
        ),
        click.option(
            "--lazy",
            type=click.IntRange(1),
            help="Rounds from one scoring of all drafters to the next, for learners: bandits score nobody. "
            "Default: 1; under the time objective 8, and more while one leads.",
        ),
        click.option("--drafter-limit", type=float, help="Seconds after which a drafter is benched."),
        click.option("--seed", type=click.IntRange(0), default=0, show_default=True),
        click.option("--device", help="cpu, cuda, cuda:1, ... Default: cuda where there is one."),
        click.option(
            "--threads", type=click.IntRange(1), help="Torch threads. Default: torch's, 1 for tiny."
        ),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object to standard output."),
        click.option("--debug", is_flag=True, help="Show tracebacks."),
    ]
    recorded = [
        click.option(
            "--dtype",
            type=click.Choice(["bfloat16", "float32", "float64"]),
            help="Default: bfloat16, float32 for tiny.",
        ),
        click.option(
            "--prometheus", type=path, help="Write the metrics to this file, as Prometheus reads them."
        ),
        click.option("--trace", type=path, help="Write every round to this file, as JSON lines."),
        click.option("--plot", type=path, help="Draw a picture into this file."),
    ]
    decorated: Any = collected
    for option in reversed(options if audit else [*options, *recorded]):
        decorated = option(decorated)
    return decorated  # type: ignore[no-any-return]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(nab.__version__)
def main() -> None:
    """Choose, online and with guarantees, which draft model a speculative decoder uses."""


_SELECTOR = click.option(
    "--selector",
    help="Any learner or bandit of nab replay, uniform, plain, fixed:NAME. Default: normal-hedge argmax, its "
    "mode, under the time objective; normal-hedge, a draw, under the others.",
)


@main.command()
@_SELECTOR
@click.option(
    "--batch",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Prompts decoded together, at most. From 2 on: chains, models of Llama's family, lookup, n-grams.",
)
@_shared_options
def run(options: Options, selector: str | None, batch: int) -> None:
    """Decode prompts with a pool of drafters; show what was chosen and what it brought."""
    if batch > 1:
        _check_batch(options, batch)
    options.objective = options.objective or ("time" if batch == 1 else "token")
    selector = selector or TIMED[-(options.objective == "time")]
    experiment, console = _experiment(options, lambda names: [selector]), console_for(options.as_json)
    if batch > 1:
        try:
            experiment.session.check_together()
        except ValueError as error:
            raise ValueError(f"--batch {batch}: {error}") from None
    try:
        _execute(options, experiment, console, batch=batch)
    finally:
        queries = [query for query in experiment.queries[selector] if query.rounds]
        if queries:
            title = _title(options, experiment.session, selector, len(experiment.queries[selector]))
            groups = experiment.by_domain(selector)
            console.print(run_table({**groups, "all": queries} if len(groups) > 1 else groups, title))
            results = experiment.results(selector) if options.as_json or options.prometheus else {}
            if options.as_json:
                print(json.dumps(results, ensure_ascii=False))
            if options.prometheus:
                prometheus.write(options.prometheus, _series({selector: results["total"]}))
            if options.plot:
                plots.answers(queries, options.plot, title, timed=options.objective == "time")


def _check_batch(options: Options, batch: int) -> None:
    """Raise ValueError naming an option that does not go with ``--batch``."""
    for option, given, allowed in (
        ("--scheme", options.scheme, "chain"),
        ("--evaluation", options.evaluation, "first, corrected"),
        ("--objective", options.objective, "token, length"),
        ("--lazy", options.lazy, "1"),
        ("--drafter-limit", options.drafter_limit, ""),
    ):
        if given is not None and str(given) not in allowed.split(", "):
            ways = f"give {' or '.join(allowed.split(', '))}, or leave it out" if allowed else "leave it out"
            raise ValueError(f"{option} {given} does not go with --batch {batch}: {ways}")


@main.command()
@click.option(
    "--jobs",
    type=click.IntRange(1),
    help="Answers side by side. Default: 1, for tiny one per processor, up to 4.",
)
@_shared_options
def compare(options: Options, jobs: int | None) -> None:
    """Decode the same prompts plainly, with each drafter alone, and under every selector."""
    jobs = jobs or (min(os.cpu_count() or 1, 4) if options.tiny else 1)
    options.objective = options.objective or "token"
    make = partial(_experiment, options, partial(_all_policies, options.objective))
    with workers(jobs, make) if jobs > 1 else nullcontext() as starter:
        experiment, console = make(), console_for(options.as_json)
        try:
            _execute(options, experiment, console, starter and starter(experiment))
        finally:
            _report(options, experiment.finished(), console)


def _report(options: Options, done: Experiment, console: Console) -> None:
    """Tables, JSON and picture of a comparison."""
    if not done.prompts:
        return
    title = _title(options, done.session, "", len(done.prompts))
    results = {name: done.results(name) for name in done.policies}
    totals = {name: result["total"] for name, result in results.items()}
    console.print(comparison_table(totals, title))
    found = [domain for total in totals.values() for domain in total["domains"].values()]
    if any(domain["replayed_acceptance_length"] for domain in found):
        console.print("", same_text_table(totals))
    same_text = _same_text(done, console) if options.temperature == 0 else None
    if options.as_json:
        print(json.dumps({"policies": results, "same_text": same_text}, ensure_ascii=False))
    if options.prometheus:
        prometheus.write(options.prometheus, _series(totals))
    if options.plot:
        plots.comparison(totals, options.plot, title)


def _series(totals: Mapping[str, Any]) -> list[tuple[dict[str, str], Any]]:
    """Metrics with their labels: by policy and domain."""
    return [
        ({"policy": policy, "domain": domain}, found)
        for policy, total in totals.items()
        for domain, found in total["domains"].items()
    ]


@main.command()
@_SELECTOR
@click.option(
    "--answers", type=click.IntRange(1), default=500, show_default=True, help="Drawn for the sampling test."
)
@click.option(
    "--error",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.05,
    show_default=True,
    help="What must be found out: total variation a token.",
)
@partial(_shared_options, audit=True)
def audit(options: Options, selector: str | None, answers: int, error: float) -> None:
    """Audit decoding: is the greedy text the target's, have drawn texts the target's law?

    In float64, against the target's own forward without a cache. Exit status 0: both, and a decoder with a
    known error was found out; 1: not so. At temperature 0 greedy texts alone are compared.
    """
    from nab.backends.audited import Audited

    options.dtype, options.objective = "float64", options.objective or "token"
    selector = selector or TIMED[-(options.objective == "time")]
    if not (options.prompt or options.prompts):
        options.limit = options.limit or 1
    texts, session, console = options.read_prompts(), options.open(), console_for(options.as_json)
    prompts, policy = session.encoded(texts), options.policy(selector, session.names)
    only = [selector.removeprefix(FIXED)] if selector.startswith(FIXED) else session.names
    audited = Audited(session, policy, [] if selector == PLAIN else only, options.seed)
    parts: dict[str, Greedy | Sampling] = {}
    console.print(_title(options, session, selector, len(prompts)), markup=False)
    try:
        for parts["greedy"] in progress(console, audited.greedy(prompts), len(prompts)):
            pass
        drawn = audited.sampling(prompts, answers, error) if options.temperature else iter(())
        for parts["sampling"] in progress(console, drawn, answers):
            pass
    finally:
        for part in parts.values():
            console.print(str(part), markup=False, highlight=False, soft_wrap=True)
        passed = all(part.passed for part in parts.values()) and len(parts) > (options.temperature > 0)
        if parts:
            length = audited.tokens / audited.rounds
            console.print(f"decoded at {length:.2f} tokens per target forward", highlight=False)
            if options.as_json:
                found = {name: part.summary() for name, part in parts.items()}
                header = options.header(session)
                print(
                    json.dumps(
                        {"passed": passed, **found, "mean_acceptance_length": length, "header": header}
                    )
                )
    sys.exit(0 if passed else 1)


def _all_policies(objective: str | None, drafters: list[str]) -> list[str]:
    """What ``compare`` compares."""
    learners = TIMED if objective == "time" else COMPARED
    return [PLAIN, *(FIXED + drafter for drafter in drafters), "uniform", *learners]


def _experiment(options: Options, policies: Callable[[list[str]], list[str]]) -> Experiment:
    """Load everything and check every argument before the first token is decoded."""
    if options.plot:
        plots.check(options.plot)
    if options.prometheus:
        prometheus.check(options.prometheus)
    prompts, session = options.read_prompts(), options.open()
    makers = {name: options.policy(name, session.names) for name in policies(session.names)}
    return Experiment(session, prompts, makers, options.seed, options.objective != "time")


def _execute(
    options: Options, experiment: Experiment, console: Console, start: Start | None = None, batch: int = 1
) -> None:
    total = len(experiment.prompts) * len(experiment.policies)
    view = View(console, total, experiment.session.text, show_text=len(experiment.policies) == 1)
    header = {**options.header(experiment.session), "batch": batch}
    with TraceWriter(options.trace, header) if options.trace else nullcontext() as trace:
        if batch == 1:
            experiment.execute(view.watch, trace, start)
            return
        for name in experiment.policies:
            experiment.execute_together(name, batch, view.watch_together, trace)


def _title(options: Options, session: Session, selector: str, prompts: int) -> str:
    return (
        f"{selector} on {session.target.name}".removeprefix(" on ")
        + f", {options.dtype}, temperature {options.temperature:g}, draft length {options.draft_len}, "
        + f"{options.scheme}, " * (options.scheme != "chain")
        + f"{options.objective} objective, {prompts} prompt{'s' * (prompts > 1)}"
    )


def _same_text(experiment: Experiment, console: Console) -> list[dict[str, Any]]:
    """Say whether all greedy answers equal the plain ones; return the differences as plain JSON types."""
    differences = []
    for name, number, parting in experiment.divergences():
        a, b = parting.tokens
        verdict = "rounding" if parting.is_rounding else "NOT explained by rounding"
        console.print(
            f"{name}, prompt {number}: {b!r} instead of {a!r} at token {parting.position}: {verdict} (logits "
            f"{parting.gap:.3g} apart in {parting.reference}, the run's off by up to {parting.error:.3g})",
            markup=False,
        )
        differences.append(
            {"policy": name, "prompt": number, **parting._asdict(), "is_rounding": parting.is_rounding}
        )
    if not differences:
        console.print("Every policy produced the same text as plain decoding, on every prompt.")
    return differences


main.add_command(offline.replay)
main.add_command(offline.simulate)
