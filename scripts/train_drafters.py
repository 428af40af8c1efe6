"""Distil a generalist and one expert per domain from a target: standalone drafters or feature-level heads.

    python scripts/corpora.py out/corpora
    python scripts/tiny.py out/corpora out/tiny-target
    python scripts/train_drafters.py tiny out/corpora out/tiny --target out/tiny-target
    python scripts/train_drafters.py smollm2 out/corpora out/heads

The first word picks the sizes; --target may be any transformers folder, the corpora any folder with one
folder per domain (`<domain>/train/*.txt`). May be killed at any moment: run the same command again. Another
plan, target or text is refused in the same folder OUT.
`--prepare` only computes what the target contributes (answers and hidden states), so that several processes
can share that work.
"""

import argparse
import json
from dataclasses import fields, replace
from pathlib import Path

import torch
from console import Parser, device, domains_in, folder, guarded, steps_bar, whole
from rich.progress import Progress

from nab.backends import int8
from nab.backends.distill import Plan, origin, train
from nab.backends.pretrained import load
from nab.backends.teacher import Teacher
from nab.backends.training import Recipe, check_origin, provenance

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
    parser = Parser(__doc__)
    parser.add_argument("plan", choices=PLANS)
    parser.add_argument("corpora", type=folder)
    parser.add_argument("out", type=folder)
    parser.add_argument("--target", type=Path, help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--domain", action="append", help="only this one; may be repeated")
    parser.add_argument("--leave-out", default="german", metavar="DOMAINS", help="comma-separated; german")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=NUMBER", help="change the plan")
    parser.add_argument(
        "--start", type=folder, metavar="FOLDER", help="of trained drafters to go on from, by name"
    )
    parser.add_argument("--kind", choices=("text", "answers"), help="with --prepare: only these units")
    parser.add_argument("--only-generalist", action="store_true", help="train no experts")
    parser.add_argument("--only-experts", action="store_true", help="train no generalist; needs --start")
    parser.add_argument("--prepare", action="store_true", help="only compute answers and hidden states")
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="of the target; default: bfloat16 with --bfloat16, else float32")
    parser.add_argument(
        "--bfloat16",
        action="store_true",
        help="products in it; training on CUDA has them so anyway, and some CPUs are faster in it",
    )
    parser.add_argument("--threads", type=whole(1))
    parser.add_argument(
        "--together",
        type=whole(1),
        default=Teacher.together,
        help="units of answers that a GPU makes at once",
    )
    parser.add_argument("--cache", type=folder, help="of the target's part; default: OUT/units")
    options = parser.parse_args()
    if options.kind and not options.prepare:
        parser.error("--kind goes with --prepare")
    if options.only_experts and (options.only_generalist or not options.start):
        parser.error("--only-experts goes with --start, and not with --only-generalist")
    if options.start and not (options.start / "generalist.safetensors").is_file():
        parser.error(f"--start {options.start} holds no generalist.safetensors")
    return options


def changed(plan: Plan, changes: list[str]) -> Plan:
    """`plan` with other numbers, as `field=number`."""
    numbers = {field.name: type(value) for field in fields(plan)
               if isinstance(value := getattr(plan, field.name), int | float)}  # fmt: skip
    wanted: dict[str, float] = {}
    for change in changes:
        name, _, number = change.partition("=")
        try:
            wanted[name] = numbers[name](number)
        except (KeyError, ValueError):
            raise ValueError(
                f"--set {change}: expected FIELD=NUMBER, FIELD one of {', '.join(numbers)}"
            ) from None
    return replace(plan, **wanted)


class Run:
    """What one command line asks for.

    Raises:
        ValueError: if it asks for the impossible, or for something else than what is in its folder already.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        plan = changed(PLANS[options.plan], options.set)
        self.plan = replace(plan, recipe=replace(plan.recipe, bfloat16=options.bfloat16 or None))
        self.domains = domains_in(options.corpora, "train", options.leave_out)
        self.wanted = options.domain or self.domains
        if unknown := set(self.wanted) - set(self.domains):
            raise ValueError(
                f"no such domain: {', '.join(sorted(unknown))}; there are {', '.join(self.domains)}"
            )
        options.out.mkdir(parents=True, exist_ok=True)
        dtype = options.dtype or ("bfloat16" if options.bfloat16 else "float32")
        target = load(options.target, dtype=dtype, device=options.device)
        last = target.model.config.get_text_config().num_hidden_layers
        layers = tuple(last if k == -1 else k for k in LAYERS[options.plan])
        cache = options.cache or options.out / "units"
        self.teacher = Teacher(target, options.corpora, cache, layers, together=options.together)

    def prepare(self) -> None:
        """Compute units."""
        wished = [name for name in self.plan.names() if self.options.kind in (None, name[0])]
        names = [(domain, *name) for name in wished for domain in self.wanted]
        with steps_bar() as bar:
            task = bar.add_task("units", total=len(names), state="")
            for name in names:
                self.teacher.unit(*name)
                bar.advance(task)

    def train(self) -> None:
        """Train what is not there yet."""
        drafters = {} if self.options.only_experts else {"generalist": self.domains}
        drafters |= {} if self.options.only_generalist else {domain: [domain] for domain in self.wanted}
        for name, domains in drafters.items():
            made_of = origin(self.teacher, domains, self.plan, self.start(name))
            check_origin(self.file(name), made_of)
            check_origin(self.training(name) / "checkpoint.safetensors", made_of)
        with steps_bar() as bar:
            for name, domains in drafters.items():
                if not self.file(name).exists():
                    self.train_one(name, domains, bar)

    def train_one(self, name: str, domains: list[str], bar: Progress) -> None:
        """Write a drafter and its manifest, the drafter last: where it is, all is done."""
        task, start = bar.add_task(name, total=self.plan.steps(len(domains)), state=""), self.start(name)
        weights, metadata = train(
            self.teacher,
            domains,
            self.plan,
            folder=self.training(name),
            start=start,
            progress=lambda step, loss: bar.update(task, completed=step, state=f"loss {loss:.3f}"),
        )
        data = {domain: self.teacher.data(domain) for domain in domains}
        run = {"target": self.teacher.target.name, "start": str(start or ""), "data": data}
        run |= provenance(self.options.device)
        read = {key: json.loads(metadata[key]) for key in ("tokens", "seconds", "origin")}
        self.file(name).with_suffix(".json").write_text(json.dumps(metadata | read | run, indent=2) + "\n")
        flat = {key: value if isinstance(value, str) else json.dumps(value) for key, value in run.items()}
        int8.save(weights, self.file(name), metadata | flat)

    def file(self, name: str) -> Path:
        """Of a drafter."""
        return self.options.out / f"{name}.safetensors"

    def training(self, name: str) -> Path:
        """Folder of checkpoint and learning curve."""
        return self.options.out / "training" / name

    def start(self, name: str) -> Path | None:
        """The drafter to start from: of its name in --start, else, for an expert, the generalist."""
        given, own = self.options.start, self.options.out
        files = [given / f"{name}.safetensors"] if given else []
        if name != "generalist":
            files.append((given if self.options.only_experts else own) / "generalist.safetensors")
        return next((file for file in files if file.exists()), None)


def main() -> None:
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    run = Run(options)
    if options.prepare:
        run.prepare()
    else:
        run.train()


if __name__ == "__main__":
    guarded(main)
