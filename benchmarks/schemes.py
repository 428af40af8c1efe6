"""What verification schemes accept with one drafter, and how far acceptance at depth is off the first token.

    python benchmarks/schemes.py [--target tiny] [--out out/schemes]

One answer to each prompt is written under a chain, then every scheme decodes the prompt, in turn, one thread.
*MAT* is what it had. *In hindsight*: the rounds that it needs in expectation for the answers of the chain,
exactly (``nab.losses.expected_rounds``), so schemes are compared on the same texts. Intervals: 95 %,
bootstrap over answers. *round*: its time over the chain's; *speed*: tokens a second over plain decoding's;
medians over prompts.

The second table: MAT in hindsight of drafters in chains, as told by acceptance at the first depth, corrected
by what was accepted on the answers before (``nab.Corrected``), and exactly; what was accepted over
what the first depth lets expect, at depths 2 to 4; what exact scoring costs over that of the first depth.

Cells are appended to OUT.jsonl as they are made; a run that was stopped goes on.
"""

import argparse
import json
import platform
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

import nab
from nab import prompts
from nab.backends import pool, pretrained
from nab.backends.torch import CausalLM, Warper
from nab.decode import Evaluation
from nab.losses import by_depth, expected_rounds
from nab.schemes import named
from nab.sim.replay import replay
from nab.sim.trace import processor
from nab.wrappers import Corrected

DRAFT_LEN = 4
PLAIN = "plain"
SCHEMES = [
    "chain",
    "multi-draft:3x2x1",
    "without-replacement:3x2x1",
    "top:3x2x1",
    "static:0,1,2,0.0,0.1,1.0,0.0.0,0.0.1,0.1.0,1.0.0,0.0.0.0,0.0.0.1",
    "dynamic:4x12",
]


class Bench:
    """A target, its drafters and the file of cells."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.file = options, options.out.with_suffix(".jsonl")
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.target = pretrained.load(options.target, dtype=options.dtype)
        tiny = options.target == Path("tiny")
        found = prompts.limited(prompts.read(prompts.OPENINGS if tiny else prompts.SHIPPED), options.limit)
        self.prompts = [self.target.encode(prompt.text) for prompt in found]
        self.cells = {}
        if self.file.exists():
            for line in self.file.read_text().splitlines():
                key, cell = json.loads(line)
                self.cells[tuple(key)] = cell

    def cell(self, key, make):
        """A cell that is known, or made and kept."""
        settings = self.options.dtype, self.options.tokens, self.target.name
        key = (*settings, *key)
        if key not in self.cells:
            self.cells[key] = make()
            with self.file.open("a") as file:
                file.write(json.dumps([key, self.cells[key]]) + "\n")
        return self.cells[key]

    def models(self, temperature, drafter, scheme):
        """Target and one drafter under a scheme."""
        warper = Warper(temperature)
        model = CausalLM(self.target.model, warper)
        own = Warper() if scheme is not None and scheme.ranks else warper
        return model, [*pool.build([drafter], self.target, model, own).values()]

    def answer(self, temperature, drafter, scheme, number):
        """Tokens, rounds and seconds of one answer."""
        model, drafters = self.models(temperature, drafter, scheme)
        decoding = {"draft_len": scheme.draft_len if scheme else 0, "scheme": scheme, "rng": number}
        rounds = nab.decode(model, drafters, nab.Constant([1.0]), self.prompts[number], **decoding)
        stops = {"max_new_tokens": self.options.tokens, "stop_tokens": self.target.stop_tokens}
        kept = list(nab.until(rounds, **stops))
        tokens = [token for round_ in kept for token in round_.emitted]
        return {"tokens": tokens, "rounds": len(kept), "seconds": sum(sum(r.seconds) for r in kept)}

    def acceptance(self, temperature, drafter, scheme, number, tokens):
        """``realised`` of an answer at the first depth and exactly, and the seconds it took to score it."""
        model, (drafter,) = self.models(temperature, drafter, scheme)
        prompt = self.prompts[number]
        text, begin = (*prompt, *tokens), len(prompt)
        p = model.score(text[:-1], begin)
        found, seconds = [], []
        for exact in (False, True):
            if hasattr(drafter, "reset"):
                drafter.reset()
            drafter.score(prompt, begin)  # the prompt is not what is measured
            started = perf_counter()
            score = Evaluation(nab.Pool([drafter]), scheme, text, begin, (p,), begin, exact)
            found.append(by_depth(score()[1], scheme.draft_len)[..., 0].tolist())
            seconds.append(perf_counter() - started)
        return {"first": found[0], "exact": found[1], "seconds": seconds}


def interval(tokens, rounds):
    """MAT and its 95 % bootstrap interval over answers."""
    tokens, rounds = np.array(tokens), np.array(rounds)
    drawn = np.random.default_rng(0).integers(0, len(tokens), (2000, len(tokens)))
    low, high = np.percentile(tokens[drawn].sum(1) / rounds[drawn].sum(1), [2.5, 97.5])
    return f"{tokens.sum() / rounds.sum():.2f} ({low:.2f} to {high:.2f})"


def compare(bench, temperature):
    """The first table."""
    drafter, numbers = bench.options.drafters.split(",")[0], range(len(bench.prompts))
    schemes = {PLAIN: None, **{name: named(name, DRAFT_LEN, rng=0) for name in SCHEMES}}
    answers = {name: [] for name in schemes}
    for number in numbers:
        for name, scheme in schemes.items():
            made = bench.cell(
                ("answer", temperature, drafter, name, number),
                lambda s=scheme, n=number: bench.answer(temperature, drafter, s, n),
            )
            answers[name].append(made)
    chains = [answer["tokens"] for answer in answers["chain"]]
    print(
        f"\ntemperature {temperature:g}, drafter {drafter}, {len(numbers)} answers of {bench.options.tokens}"
    )
    print("| scheme | nodes | MAT | in hindsight, same texts | round | speed |\n|---|---|---|---|---|---|")
    speed = {n: [len(a["tokens"]) / a["seconds"] for a in of] for n, of in answers.items()}
    round_ = {n: [a["seconds"] / a["rounds"] for a in of] for n, of in answers.items()}
    for name, scheme in schemes.items():
        if scheme is None:
            continue
        rounds = []
        for number, tokens in enumerate(chains):
            scores = bench.cell(
                ("acceptance", temperature, drafter, name, number),
                lambda s=scheme, n=number, t=tokens: bench.acceptance(temperature, drafter, s, n, t),
            )
            rounds.append(float(expected_rounds(np.array(scores["exact"])[..., None], DRAFT_LEN)[0]))
        mat = interval([len(a["tokens"]) for a in answers[name]], [a["rounds"] for a in answers[name]])
        hindsight = interval(list(map(len, chains)), rounds)
        ratios = [
            np.median(np.divide(of[name], of[other])) for of, other in ((round_, "chain"), (speed, PLAIN))
        ]
        print(
            f"| `{name}` | {scheme.nodes} | {mat} | {hindsight} | {ratios[0]:.2f} | {ratios[1]:.2f} |",
            flush=True,
        )


def depth(bench, temperature):
    """The second table."""
    chain, first = named("chain", DRAFT_LEN), bench.options.drafters.split(",")[0]
    print(f"\ntemperature {temperature:g}, MAT in hindsight of chains")
    print("| drafter | first depth | corrected | exact | accepted / expected | cost of exact |")
    print("|---|---|---|---|---|---|")
    for drafter in bench.options.drafters.split(","):
        counts, length, rounds, seconds = None, [], [], []
        for number in range(len(bench.prompts)):
            answer = bench.cell(("answer", temperature, first, "chain", number), dict)
            scores = bench.cell(
                ("acceptance", temperature, drafter, "chain", number),
                lambda d=drafter, n=number, t=answer["tokens"]: bench.acceptance(temperature, d, chain, n, t),
            )
            told, exact = (np.array(scores[kind])[..., None] for kind in ("first", "exact"))
            selector = Corrected(nab.Selector(nab.Hedge(), 1), DRAFT_LEN, counts=counts)
            corrected = (told * selector.factors).clip(max=1)  # from the answers before
            of = [float(expected_rounds(each, DRAFT_LEN)[0]) for each in (told, corrected, exact)]
            for each in replay(nab.Constant([1.0]), exact, exact, draft_len=DRAFT_LEN, rng=number):
                rows = slice(each.start, each.start + each.emitted)
                if rows.stop == len(exact):  # the end of the text cuts it
                    break
                selector.observe(each.emitted, lambda r=rows, t=told: (t[r, 0], t[r, 0]))
            counts = selector.counts
            length.append(len(answer["tokens"]))
            rounds.append(of)
            seconds.append(scores["seconds"])
        told, corrected, exact = (interval(length, each) for each in np.array(rounds).T)
        factors = " ".join(f"{a / e:.2f}" for a, e in counts[:, 1:, 0].T)
        cost = np.median(np.divide(*np.array(seconds).T[::-1]))
        print(f"| {drafter} | {told} | {corrected} | {exact} | {factors} | {cost:.1f} x |", flush=True)


def main():
    """Both tables at each temperature."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", type=Path)
    parser.add_argument(
        "--drafters", default="generalist,python,json,legal", help="the first one is compared"
    )
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--limit", type=int, default=2, help="prompts a domain")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("out/schemes"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(options)
    print(f"{processor()}, Python {platform.python_version()}, torch {torch.__version__}, one thread,")
    print(f"{bench.target.name}, {options.dtype}, draft length {DRAFT_LEN}, rng = number of the prompt")
    for temperature in (1.0, 0.0):
        compare(bench, temperature)
        depth(bench, temperature)


if __name__ == "__main__":
    main()
