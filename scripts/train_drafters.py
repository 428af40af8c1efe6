"""Distil a generalist and one expert per domain from a target: standalone drafters or feature-level heads.

    python scripts/corpora.py out/corpora
    python scripts/tiny.py out/corpora out/tiny-target
    python scripts/train_drafters.py tiny out/corpora out/tiny --target out/tiny-target
    python scripts/train_drafters.py smollm2 out/corpora out/heads

The first word picks the sizes; --target may be any transformers folder, the corpora any folder with one
folder per domain (`<domain>/train/*.txt`). May be killed at any moment: run the same command again.
`--prepare` only computes what the target contributes (answers and hidden states), so that several processes
can share that work.
"""

import argparse
import json
import time
from dataclasses import fields, replace
from pathlib import Path

import torch
from console import guarded, steps_bar

from nab.backends import int8
from nab.backends.distill import Plan, train
from nab.backends.pretrained import load
from nab.backends.teacher import Teacher
from nab.backends.training import Recipe, provenance

PLANS = {
    "tiny": Plan(
        draft_vocab=2048,
        intermediate=384,
        width=128,
        depths=1,
        text=60,
        answers=16,
        generalist_passes=0.5,
        expert_passes=1.5,
        recipe=Recipe(rate=6e-3),
        expert_rate=3e-3,
    ),
    "smollm2": Plan(
        draft_vocab=6144,
        intermediate=416,
        depths=3,
        text=30,
        answers=24,
        generalist_passes=1.0,
        expert_passes=2.2,
    ),
}
LAYERS = {"tiny": (-1,), "smollm2": (20, -1)}
"""Hidden states that heads read, counted as in Python."""


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("plan", choices=PLANS)
    parser.add_argument("corpora", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--target", type=Path, help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--domain", action="append", help="only this one; may be repeated")
    parser.add_argument("--leave-out", default="german", metavar="DOMAINS", help="comma-separated; german")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=NUMBER", help="change the plan")
    parser.add_argument(
        "--start", type=Path, metavar="FOLDER", help="of trained drafters to go on from, by name"
    )
    parser.add_argument("--kind", choices=("text", "answers"), help="with --prepare: only these units")
    parser.add_argument("--only-generalist", action="store_true", help="train no experts")
    parser.add_argument("--prepare", action="store_true", help="only compute answers and hidden states")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="of the target; default: bfloat16 with --bfloat16, else float32")
    parser.add_argument(
        "--bfloat16",
        action="store_true",
        help="products in it; training on CUDA has them so anyway, and some CPUs are faster in it",
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cache", type=Path, help="of the target's part; default: OUT/units")
    options = parser.parse_args()
    if options.kind and not options.prepare:
        parser.error("--kind goes with --prepare")
    return options


def changed(plan: Plan, changes: list[str]) -> Plan:
    """`plan` with other numbers, as `field=number`."""
    numbers = {field.name: type(value) for field in fields(plan)
               if isinstance(value := getattr(plan, field.name), int | float)}  # fmt: skip
    for change in changes:
        name, _, number = change.partition("=")
        try:
            plan = replace(plan, **{name: numbers[name](number)})
        except (KeyError, ValueError):
            raise ValueError(
                f"--set {change}: expected FIELD=NUMBER, FIELD one of {', '.join(numbers)}"
            ) from None
    return plan


def main() -> None:
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)

    dtype = options.dtype or ("bfloat16" if options.bfloat16 else "float32")
    target = load(options.target, dtype=dtype, device=options.device)
    last = target.model.config.get_text_config().num_hidden_layers
    layers = tuple(last if k == -1 else k for k in LAYERS[options.plan])
    plan = changed(PLANS[options.plan], options.set)
    plan = replace(plan, recipe=replace(plan.recipe, bfloat16=options.bfloat16 or None))
    teacher = Teacher(target, options.corpora, options.cache or options.out / "units", layers)
    if options.start and not options.start.is_dir():
        raise NotADirectoryError(f"--start {options.start}: expected a folder of trained drafters")
    left_out = options.leave_out.split(",")
    domains = [domain for domain in teacher.domains if domain not in left_out]
    wanted = options.domain or domains
    if unknown := set(wanted) - set(domains):
        raise SystemExit(f"no such domain: {', '.join(sorted(unknown))}; there are {', '.join(domains)}")
    options.out.mkdir(parents=True, exist_ok=True)

    with steps_bar() as bar:
        if options.prepare:
            wished = [name for name in plan.names() if options.kind in (None, name[0])]
            names = [(domain, *name) for name in wished for domain in wanted]
            task = bar.add_task("units", total=len(names), state="")
            for name in names:
                teacher.unit(*name)
                bar.advance(task)
            return

        def one(name: str, on: list[str], start: Path | None) -> Path:
            file = options.out / f"{name}.safetensors"
            if file.exists():
                return file
            if options.start and (trained := options.start / file.name).exists():
                start = trained
            task, began = bar.add_task(name, total=plan.steps(len(on)), state=""), time.time()
            weights, metadata = train(
                teacher,
                on,
                plan,
                folder=options.out / "training" / name,
                start=start,
                progress=lambda step, loss: bar.update(task, completed=step, state=f"loss {loss:.3f}"),
            )
            folders = {domain: teacher.corpora / domain / teacher.part for domain in on}
            facts = provenance(folders, device=options.device, began=began)
            run = {"plan": repr(plan), "target": target.name, "start": str(start or ""), **facts}
            flat = {key: value if isinstance(value, str) else json.dumps(value) for key, value in run.items()}
            int8.save(weights, file, metadata | flat)
            (options.out / f"{name}.json").write_text(json.dumps(metadata | run, indent=2) + "\n")
            return file

        generalist = one("generalist", domains, None)
        if options.only_generalist:
            return
        for domain in wanted:
            one(domain, [domain], generalist)


if __name__ == "__main__":
    guarded(main)
