"""This library's decoder beside transformers, flashspec and a bare loop: same models, prompt, draft length.

    python benchmarks/decode.py [--target tiny] [--out out/decode.json]
    python benchmarks/decode.py --target default --repetitions 3 --out out/decode-default.json
    python benchmarks/decode.py --only 'peers/greedy/*/nab*,peers/greedy/*/bare*'
    python benchmarks/decode.py --soak 20000

Everything of a scene is run in turn, A B C A B C ..., in one process with one thread; figures are medians
with quartiles over repetitions, ratios are taken within a repetition. Repetition r has seed r. Before
anything is timed, the greedy texts of all are compared in float64. *outside*: time not inside a model's
`forward`, less what watching costs, on the clock on the wall and of the process (*CPU*), which other jobs
disturb less; *select*: share of the round that goes into scoring all drafters and learning.

The tiny target is a random Llama (hidden 256, 8 layers, vocabulary 8192) whose first layer is the drafter;
eps, the weight of the other layers, sets how often it is right. The default one is SmolLM2-135M with the
shipped drafters.

A stopped run prints what it has, and goes on with the same command.
"""

import argparse
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soak
import torch
import transformers
from peers import (
    FLASHSPEC,
    INSTALL,
    LEARNING,
    POLICIES,
    Run,
    Scene,
    bare,
    decoders,
    decoding,
    ours,
    perturbed,
    plain,
    random_prompt,
    tiny_target,
)
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from timing import Cells, Forwards, clock_cost, figures, machine, measured, quartiles, reading

from nab import prompts
from nab.backends import pool, pretrained
from nab.backends.heads import Head
from nab.backends.stack import stacked
from nab.backends.torch import CausalLM, Warper, early_exit
from nab.pool import DrafterWarning

DRAFT_LEN = 5
LEVELS = (0.0, 0.05, 0.15)
TEMPERATURES = {"greedy": 0.0, "sampling": 1.0}
SIZES = (1, 2, 3, 4, 8, 16, 32)
NOISE = 0.05
EXIT_LAYERS = pool.EARLY_EXIT_LAYERS
NEW_TOKENS = {"tiny": 96, "default": 48}
CHECKED_TOKENS = {"tiny": 96, "default": 8}


class Bench(NamedTuple):
    """What is run in turn, by name; what it is compared with; the clock of its models."""

    runs: dict[str, Run]
    baseline: str
    clock: Forwards


Benches = dict[str, Callable[[torch.dtype, int], Bench]]
"""By label; called with a dtype and the number of new tokens."""


def tiny_scene(eps: float, temperature: float, dtype: torch.dtype, new_tokens: int) -> Scene:
    """Target and one drafter."""
    target = tiny_target(eps, dtype)
    prompt = random_prompt(target.config.vocab_size)
    return Scene(target, [early_exit(target, 1)], prompt, new_tokens, DRAFT_LEN, temperature)


def watching(scene: Scene) -> Forwards:
    """A clock of the scene's models."""
    clock = Forwards()
    clock.watch("target", scene.target)
    for drafter in scene.drafters:
        clock.watch("drafters", drafter)
    return clock


def peers_tiny(eps: float, temperature: float, dtype: torch.dtype, new_tokens: int) -> Bench:
    """All decoders with one drafter."""
    scene = tiny_scene(eps, temperature, dtype, new_tokens)
    clock = watching(scene)
    return Bench({name: decoder(scene) for name, decoder in decoders().items()}, "plain", clock)


def evaluation_tiny(temperature: float, dtype: torch.dtype, new_tokens: int) -> Bench:
    """A growing pool under the learner, beside a constant choice of one drafter."""
    scene = tiny_scene(LEVELS[1], temperature, dtype, new_tokens)
    drafters = [perturbed(scene.drafters[0], NOISE, seed) for seed in range(max(SIZES))]
    clock = watching(scene._replace(drafters=drafters))
    runs = {"constant": ours("constant")(scene._replace(drafters=drafters[:1]))}
    for policy in LEARNING:
        for n in SIZES:
            runs[f"{policy}, n = {n}"] = ours(policy)(scene._replace(drafters=drafters[:n]))
    three = scene._replace(drafters=drafters[:3])
    runs["normal-hedge, not stacked, n = 3"] = ours("normal-hedge", stack=False)(three)
    runs["bare loop, n = 1"] = bare(scene._replace(drafters=drafters[:1]))
    runs["bare loop, scoring n = 3"] = bare(three)
    return Bench(runs, "constant", clock)


def three_tiny(temperature: float, dtype: torch.dtype, new_tokens: int) -> Bench:
    """A good drafter between two bad ones, under every policy, beside plain decoding."""
    scene = tiny_scene(LEVELS[1], temperature, dtype, new_tokens)
    good = scene.drafters[0]
    scene = scene._replace(drafters=[good, *(perturbed(good, 0.5, seed) for seed in (1, 2))])
    clock = watching(scene)
    return Bench(
        {"plain": plain(scene), **{policy: ours(policy)(scene) for policy in POLICIES}}, "plain", clock
    )


def default_scene(temperature: float, dtype: torch.dtype, new_tokens: int) -> tuple[Any, Scene]:
    """SmolLM2 and an early exit of it, behind the first shipped prompt."""
    loaded = pretrained.load(dtype=str(dtype).removeprefix("torch."))
    prompt = loaded.encode(prompts.read(prompts.SHIPPED)[0].text)
    drafters = [early_exit(loaded.model, EXIT_LAYERS)]
    return loaded, Scene(loaded.model, drafters, prompt, new_tokens, DRAFT_LEN, temperature)


def of_pool(loaded: Any, scene: Scene, clock: Forwards, names: list[str], policy: str) -> Run:
    """Shipped drafters of the default target under a policy; forwards of those that have any are watched."""
    warper = Warper(scene.temperature)
    target = reading(scene.target, warper)
    drafters = [*pool.build(names, loaded, target, warper).values()]
    for drafter in drafters:
        if isinstance(drafter, CausalLM | Head):
            clock.watch("drafters", drafter.model)
        if isinstance(drafter, Head):
            clock.watch("drafters", drafter.model, "fused")
            clock.watch("drafters", drafter.model, "logits")
    stacked(drafters)
    return decoding(target, drafters, POLICIES[policy], scene)


def peers_default(temperature: float, dtype: torch.dtype, new_tokens: int) -> Bench:
    """All decoders with the early exit, and ours with a trained head."""
    loaded, scene = default_scene(temperature, dtype, new_tokens)
    clock = watching(scene)
    runs = {name: decoder(scene) for name, decoder in decoders().items()}
    runs["nab constant, head"] = of_pool(loaded, scene, clock, ["generalist"], "constant")
    return Bench(runs, "plain", clock)


def evaluation_default(temperature: float, dtype: torch.dtype, new_tokens: int) -> Bench:
    """The shipped heads and the whole default set."""
    loaded, scene = default_scene(temperature, dtype, new_tokens)
    clock = Forwards()
    clock.watch("target", scene.target)
    whole = pool.default(loaded)
    heads = [name for name in whole if name != "lookup" and not name.startswith("ngram")]
    runs = {"plain": plain(scene), "constant": of_pool(loaded, scene, clock, ["generalist"], "constant")}
    for policy in LEARNING:
        for names in (heads, whole):
            runs[f"{policy}, n = {len(names)}"] = of_pool(loaded, scene, clock, names, policy)
    return Bench(runs, "constant", clock)


def benches(target: str) -> Benches:
    """All that can be measured with a target."""
    found: Benches = {}
    for mode, t in TEMPERATURES.items():
        if target == "tiny":
            for eps in LEVELS:
                found[f"peers/{mode}/eps {eps:g}"] = lambda d, n, e=eps, t=t: peers_tiny(e, t, d, n)
            found[f"evaluation/{mode}"] = lambda d, n, t=t: evaluation_tiny(t, d, n)
            found[f"three/{mode}"] = lambda d, n, t=t: three_tiny(t, d, n)
        else:
            found[f"peers/{mode}"] = lambda d, n, t=t: peers_default(t, d, n)
            found[f"evaluation/{mode}"] = lambda d, n, t=t: evaluation_default(t, d, n)
    return found


def kept(bench: Bench, label: str, only: list[str]) -> Bench:
    """Those runs whose ``label/name`` fits one of the patterns."""
    fitting = {n: r for n, r in bench.runs.items() if any(fnmatch(f"{label}/{n}", p) for p in only)}
    return bench._replace(runs=fitting)


def may_fit(label: str, only: list[str]) -> bool:
    """Whether a pattern could fit a run of a scene, as far as it has no wildcard yet; it saves models."""
    literals = [re.split(r"[*?\[]", pattern)[0] for pattern in only]
    return any(f"{label}/".startswith(words) or words.startswith(f"{label}/") for words in literals)


def differing(runs: dict[str, Run]) -> list[str]:
    """Who does not write what the first one writes, and from which token on."""
    texts = {name: run(0).tokens for name, run in runs.items()}
    first, *others = texts
    found = []
    for name in others:
        if texts[name] != texts[first]:
            pairs = zip(texts[name], texts[first], strict=False)
            at = next((k for k, (a, b) in enumerate(pairs) if a != b), "the end")
            found.append(f"{name} parts from {first} at token {at}")
    return found


def check(made: dict[str, Bench], chosen: Benches, cells: Cells, new_tokens: int, progress: Progress) -> None:
    """Compare greedy texts in float64, those of ``made`` by models of their own; what agreed is kept.

    Raises:
        ValueError: naming all that differ.
    """
    found = []
    for label, bench in made.items():
        key, names = f"{label}, agree in float64", set(bench.runs)
        if "greedy" in label and not names <= set(cells.cells.get(key, ())):
            task = progress.add_task(f"{label}, float64", total=None)
            exact = chosen[label](torch.float64, new_tokens).runs
            words = differing({name: run for name, run in exact.items() if name in names})
            progress.remove_task(task)
            found += [f"{label}: {each}" for each in words]
            if not words:
                cells.add({key: sorted(names)})
    if found:
        raise ValueError("greedy texts differ in float64, so times would not compare: " + "; ".join(found))


def measure(made: dict[str, Bench], cells: Cells, repetitions: int, progress: Progress) -> None:
    """Repetition by repetition, all scenes in turn; what is known already is not measured again."""
    task = progress.add_task("measuring", total=repetitions * sum(len(b.runs) for b in made.values()))
    warm = set()
    for repetition in range(repetitions):
        for label, bench in made.items():
            keys = {name: f"{label}/{name}/{repetition}" for name in bench.runs}
            if not all(key in cells.cells for key in keys.values()):
                if label not in warm:
                    for run in bench.runs.values():
                        run(repetition)
                    warm.add(label)
                found = {}
                for name, run in bench.runs.items():
                    progress.update(task, description=f"{label}, {name}")
                    found[keys[name]] = measured(run, repetition, bench.clock)
                    progress.advance(task)
                cells.add(found)
            else:
                progress.advance(task, len(keys))


def complete(bench: Bench, label: str, cells: Cells) -> Iterator[dict[str, Any]]:
    """The cells of each repetition that has all runs, by name."""
    repetition = 0
    while bench.runs and all(f"{label}/{name}/{repetition}" in cells.cells for name in bench.runs):
        yield {name: cells.cells[f"{label}/{name}/{repetition}"] for name in bench.runs}
        repetition += 1


def table(bench: Bench, label: str, cells: Cells, cost: tuple[float, float]) -> Table | None:
    """Medians and quartiles; None where there is no repetition yet."""
    found = [{n: figures(c, cost) for n, c in cell.items()} for cell in complete(bench, label, cells)]
    if not found:
        return None
    base = bench.baseline if bench.baseline in bench.runs else next(iter(bench.runs))
    made = Table(title=f"{label}, {len(found)} repetitions, median (quartiles)", title_justify="left")
    for name in bench.runs:
        shown = row(name, base, found, watched(name, cells.cells[f"{label}/{name}/0"]))
        if not made.columns:
            for head in ("", *shown):
                made.add_column(head, justify="right" if head else "left", overflow="fold")
        made.add_row(name, *shown.values())
    return made


def row(name: str, base: str, found: list[dict[str, Any]], outside: bool) -> dict[str, str]:
    """The cells of one line by their heads; ratios and differences to ``base`` within repetitions."""
    own, other = (
        {key: np.array([each[who][key] for each in found]) for key in found[0][who]} for who in (name, base)
    )
    selecting = np.median(own["selecting"])
    added = {"added ms": quartiles(own["round"] - other["round"], 1)} if base == "constant" else {}
    return {
        "tok/s": quartiles(own["tokens/s"], 0),
        f"tok/s / {base}": quartiles(own["tokens/s"] / other["tokens/s"]),
        "CPU ms/tok": quartiles(own["cpu"]),
        f"CPU / {base}": quartiles(own["cpu"] / other["cpu"]),
        "tok/round": f"{np.median(own['tokens/round']):.2f}",
        "round ms": quartiles(own["round"], 1),
        **added,
        "outside ms": quartiles(own["outside"]) if outside else "",
        "outside CPU ms": quartiles(own["outside cpu"]) if outside else "",
        "select": "" if np.isnan(selecting) else f"{selecting:.0%}",
    }


def watched(name: str, cell: dict[str, Any]) -> bool:
    """Whether all forwards were: without the drafters' there is no time outside of forwards."""
    return name == "plain" or "drafters" in cell["forward_calls"]


def show(console: Console, made: dict[str, Bench], cells: Cells, cost: tuple[float, float]) -> None:
    """All tables there are."""
    console.print(", ".join(f"{name} {value}" for name, value in cells.about.items()))
    console.print(f"watching costs {cost[0] * 1e6:.2f} us a forward, which is subtracted")
    for label, bench in made.items():
        if (found := table(bench, label, cells, cost)) is not None:
            console.print(found)
    if FLASHSPEC not in decoders():
        console.print(f"{FLASHSPEC} is left out, since it is not installed: {INSTALL}")


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", choices=["tiny", "default"], default="tiny")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("out/decode.json"))
    parser.add_argument("--only", default="*", help="patterns of scene/name, with commas between them")
    parser.add_argument("--soak", type=int, nargs="?", const=20_000, metavar="TOKENS", help="watch memory")
    options = parser.parse_args(words)
    for name in ("repetitions", "soak"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    return options


def main() -> None:
    options = parsed()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("error", DrafterWarning)  # times of a pool without it mean nothing
    console = Console(width=None if sys.stdout.isatty() else 190)
    about = {
        **machine(), "target": options.target, "dtype": "float32", "draft_len": DRAFT_LEN,
        "new_tokens": NEW_TOKENS[options.target], "seeds": "the number of the repetition",
    }  # fmt: skip
    if options.soak:
        soak.main(console, options.soak, options.out, about)
        return
    only = options.only.split(",")
    cells = Cells(options.out, about)
    chosen = benches(options.target)
    with Progress(console=Console(stderr=True)) as progress:
        made = {
            label: bench
            for label, make in chosen.items()
            if may_fit(label, only)
            and (bench := kept(make(torch.float32, about["new_tokens"]), label, only)).runs
        }
        if not made:
            raise ValueError(f"--only {options.only} fits nothing; scenes are {', '.join(chosen)}")
        check(made, chosen, cells, CHECKED_TOKENS[options.target], progress)
        try:
            measure(made, cells, options.repetitions, progress)
        except KeyboardInterrupt:
            progress.console.print("interrupted; the same command goes on")
    show(console, made, cells, clock_cost())


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as problem:
        raise SystemExit(f"error: {' '.join(str(problem).split())}") from None
