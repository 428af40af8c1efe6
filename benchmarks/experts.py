"""How much drafters differ: acceptance by depth and mean acceptance length, for every drafter and domain.

    python scripts/corpora.py out/corpora
    python benchmarks/experts.py out/corpora --target tiny --out out/experts-tiny

Acceptance of the neural drafters, teacher-forced, on held-out text and on the target's own answers to
held-out prompts: `sum min(p, q)` at temperature 1 and equality of the likeliest tokens (greedy), at depth
1 to 5 (the deeper laws of heads read their own features). Mean acceptance length by real decoding of held-out
prompts, each drafter alone; and, of the answers above at temperature 1, in hindsight: from the rounds that a
drafter alone would have taken for these very texts, exactly in expectation. Intervals: 95 %, bootstrap over
windows and answers.

Every cell goes to OUT.jsonl when it is known, and cells that are there are not made again: a run that was
stopped goes on, and several processes (say, one per --domain) may share OUT. Writes OUT.md and OUT.png.
"""

import argparse
import json
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure

import nab
from nab.backends import pool
from nab.backends.distill import Feature, Standalone, teacher_laws
from nab.backends.heads import Head
from nab.backends.pretrained import load
from nab.backends.teacher import PAD, TOGETHER, Teacher, Unit
from nab.backends.torch import CausalLM, Warper
from nab.decode import until
from nab.losses import expected_rounds

DEPTHS = 5
DRAFT_LEN = 4
HINDSIGHT = "mean acceptance length, answers, in hindsight"


def student(drafter: Any) -> Any:
    """The trainable form of a neural drafter; None for the others."""
    if isinstance(drafter, Head):
        return Feature(drafter.model)
    if isinstance(drafter, CausalLM) and drafter.name != "early-exit":
        return Standalone(drafter.model)
    return None


class Read(NamedTuple):
    """A unit; the target's likeliest token at each position, `(rows, length)`; where its answers start."""

    unit: Unit
    likeliest: torch.Tensor
    starts: list[int]


@torch.inference_mode()
def read(unit: Unit, output: torch.Tensor, starts: list[int]) -> Read:
    """With the target's output matrix, `(vocab, width)`."""
    return Read(unit, (unit.hidden[:, :, -1].to(output.dtype) @ output.T).argmax(-1), starts)


@torch.inference_mode()
def scores(learned: Any, output: torch.Tensor, text: Read) -> tuple[np.ndarray, list[int], list[float]]:
    """What follows from a text, row by row.

    Mean acceptance `(rows, 2, depths)` at temperature 1 and greedy, of one depth where all are alike; tokens
    of each answer; the rounds that the drafter alone would have taken for it at temperature 1, in
    expectation, each depth of a draft with its own acceptance.
    """
    unit = text.unit
    p = teacher_laws(unit, output[learned.tokens])
    laws = [logits.float().softmax(-1) for logits in learned.laws(unit, DEPTHS)]
    columns = []
    for depth, q in enumerate(laws):
        real = (unit.tokens != PAD)[:, depth:].float()
        both = torch.minimum(p, q).sum(-1), (learned.tokens[q.argmax(-1)] == text.likeliest).float()
        columns.append([((x[:, depth:] * real).sum(1) / real.sum(1)).tolist() for x in both])

    column = torch.full((len(output),), -1, device=output.device)
    column[learned.tokens.long()] = torch.arange(len(learned.tokens), device=output.device)
    emitted, rounds = [], []
    for row, (tokens, start) in enumerate(zip(unit.tokens.long(), text.starts, strict=True)):
        end = int((tokens != PAD).sum())
        answer, before = tokens[start:end], torch.arange(start - 1, end - 1, device=p.device)
        place, masses = column[answer], p[row, before]
        carried = [q[row, before].clamp(max=masses) / masses for q in laws]
        accepted = [
            torch.where(place < 0, 0, c.gather(1, place.clamp_min(0)[:, None])[:, 0]) for c in carried
        ]
        by_depth = torch.stack((accepted * DRAFT_LEN)[:DRAFT_LEN]).double().cpu().numpy()[..., None]
        emitted.append(len(answer))
        rounds.append(float(expected_rounds(by_depth, DRAFT_LEN)[0]) if len(answer) else 0.0)
    return np.array(columns).transpose(2, 1, 0), emitted, rounds


def interval(values: Any, weights: Any = None) -> list[float]:
    """Mean, and the 95 % bootstrap interval over axis 0; ratios of sums where `weights` are given."""
    values = np.asarray(values, dtype=float)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=float)
    picks = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
    means = values[picks].sum(1) / weights[picks].sum(1)
    found = (values.sum() / weights.sum(), *np.quantile(means, [0.025, 0.975]))
    return [round(float(x), 4) for x in found]


def decoded(model: CausalLM, drafter: Any, ids: list[int], stopping: dict[str, Any], seed: int) -> list[int]:
    """Tokens and rounds of one answer with one drafter alone, draft length 4."""
    for cached in (model, drafter):
        if hasattr(cached, "reset"):
            cached.reset()
    rounds = nab.decode(model, [drafter], nab.Constant([1.0]), ids, draft_len=DRAFT_LEN, rng=seed)
    lengths = [len(r.emitted) for r in until(rounds, **stopping)]
    return [sum(lengths), len(lengths)]


class Cells:
    """Results in a file of JSON lines: `{"table": ..., "drafter": ..., "domain": ..., ...}`."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def read(self) -> dict[tuple[str, str, str], dict[str, Any]]:
        """By table, drafter and domain, in the order in which they were made."""
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        cells = [json.loads(line) for line in lines if line.endswith("}")]  # the last may be cut
        return {(cell["table"], cell["drafter"], cell["domain"]): cell for cell in cells}

    def add(self, table: str, drafter: str, domain: str, **values: Any) -> None:
        """One line, written at once."""
        cell = {"table": table, "drafter": drafter, "domain": domain, **values}
        cut = self.file.exists() and not self.file.read_bytes().endswith(b"\n")
        with self.file.open("a") as stream:
            stream.write("\n" * cut + json.dumps(cell) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("corpora", type=Path)
    parser.add_argument("--target", type=Path)
    parser.add_argument("--drafters", help="names or files, comma-separated; default: all that fit")
    parser.add_argument("--out", type=Path, required=True, help="results go to OUT.jsonl, OUT.md and OUT.png")
    parser.add_argument("--units", type=int, default=2, help="units of 16 windows per domain and kind")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer")
    parser.add_argument("--domain", action="append", help="only this one; may be repeated")
    parser.add_argument("--leave-out", default="german", metavar="DOMAINS", help="comma-separated; german")
    parser.add_argument("--limit", type=int, default=5, help="prompts per domain; 0: no decoding")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    target = load(options.target, dtype=options.dtype, device=options.device)
    names = pool.split(options.drafters) if options.drafters else pool.default(target)
    model = CausalLM(target.model, Warper(), name=target.name)
    drafters = pool.build(names, target, model)
    layers = {layer for d in drafters.values() if isinstance(d, Head) for layer in d.model.shape.layers}
    last = target.model.config.get_text_config().num_hidden_layers
    teacher = Teacher(target, options.corpora, options.out.parent / f"{options.out.name}-units",
                      tuple(sorted(layers | {last})), part="heldout")  # fmt: skip
    domains = options.domain or [d for d in teacher.domains if d not in options.leave_out.split(",")]
    output = target.model.get_output_embeddings().weight
    stopping = {"max_new_tokens": options.tokens, "stop_tokens": target.stop_tokens}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    cells = Cells(options.out.parent / f"{options.out.name}.jsonl")

    given_text(cells, drafters, teacher, domains=domains, output=output, units=options.units)
    if options.limit:
        prompts = {domain: teacher.prompts(domain, options.limit) for domain in domains}
        for temperature, mode in ((1.0, "sampled"), (0.0, "greedy")):
            model.warper = Warper(temperature)
            pooled = pool.build(names, target, model)
            by_decoding(
                cells, f"mean acceptance length, {mode}", model, pooled, prompts=prompts, stopping=stopping
            )
    show(cells, options.out, f"{target.name}, {options.dtype}")


def given_text(
    cells: Cells, drafters: dict[str, Any], teacher: Teacher, *, domains: list[str], output: Any, units: int
) -> None:
    """Everything that follows from texts alone, of the neural drafters."""
    known = cells.read()
    learned = {name: student(drafter) for name, drafter in drafters.items() if student(drafter)}
    for kind in ("text", "answers"):
        tables = [f"acceptance, {kind}, {mode}" for mode in ("sampled", "greedy")]
        for domain in domains:
            left = [name for name in learned if (tables[1], name, domain) not in known]
            texts = []
            for k in range(units if left else 0):
                unit = teacher.unit(domain, kind, k)
                prompts = teacher.prompts(domain, (k + 1) * teacher.rows)[k * teacher.rows :]
                texts.append(read(unit, output, list(map(len, prompts))))
            for name in left:
                found = [scores(learned[name], output, text) for text in texts]
                rows, emitted, rounds = zip(*found, strict=True)
                if kind == "answers":  # those after the first TOGETHER units are at another temperature
                    of_law = [list(chain(*of_units[:TOGETHER])) for of_units in (emitted, rounds)]
                    cells.add(HINDSIGHT, name, domain, emitted=of_law[0], rounds=of_law[1])
                for table, values in zip(tables, np.concatenate(rows).transpose(1, 0, 2), strict=True):
                    cells.add(table, name, domain, rows=values.round(4).tolist())
            print(kind, domain, flush=True)


def by_decoding(
    cells: Cells, table: str, model: CausalLM, drafters: dict[str, Any], *, prompts: Any, stopping: Any
) -> None:
    """Tokens and rounds of real answers with each drafter alone."""
    known = cells.read()
    for domain, asked in prompts.items():
        for name, drafter in drafters.items():
            if (table, name, domain) not in known:
                counts = [decoded(model, drafter, ids, stopping, k) for k, ids in enumerate(asked)]
                emitted, rounds = zip(*counts, strict=True)
                cells.add(table, name, domain, emitted=emitted, rounds=rounds)
        print(table, domain, flush=True)


def show(cells: Cells, out: Path, title: str) -> None:
    """Tables and heat maps of all cells."""
    lengths: dict[str, dict[str, dict[str, list[float]]]] = {}
    accepted: dict[str, dict[str, dict[str, list[list[float]]]]] = {}
    for (table, name, domain), cell in sorted(cells.read().items(), key=lambda item: item[0][2]):
        if "emitted" in cell:
            mean = interval(cell["emitted"], cell["rounds"])
            lengths.setdefault(table, {}).setdefault(name, {})[domain] = mean
        else:
            by_depth = [interval(column) for column in zip(*cell["rows"], strict=True)]
            accepted.setdefault(table, {}).setdefault(name, {})[domain] = by_depth
    tables = list(lengths.items())
    for key, rows in accepted.items():
        first = {name: {d: cell[0] for d, cell in row.items()} for name, row in rows.items()}
        tables.append((f"{key}, depth 1", first))
    text = headline(cells) + "".join(markdown(*table) for table in tables) + depths(accepted)
    out.with_suffix(".md").write_text(text)
    draw(tables, out.with_suffix(".png"), title)


def headline(cells: Cells) -> str:
    """MAT of own experts over the generalist's and the best other expert's, by domain and in the mean.

    95 % bootstrap intervals over the prompts of each domain, the same prompts for all drafters.
    """
    found, rng = cells.read(), np.random.default_rng(0)
    text = "\n| MAT | domain | own expert | generalist | own / generalist | own / best other expert |\n"
    text += "|---" * 6 + "|\n"
    for table in dict.fromkeys(key[0] for key in found if "emitted" in found[key]):
        of_table = {key[1:]: np.array([cell["emitted"], cell["rounds"]]) for key, cell in found.items()
                    if key[0] == table}  # fmt: skip
        experts = sorted({domain for name, domain in of_table if name == domain})
        names = ["generalist", *experts]
        whole = [domain for domain in experts if all((name, domain) in of_table for name in names)]
        if not whole:
            continue
        lengths = []  # own, generalist, best other: of each domain, as measured and 2000 times resampled
        for domain in whole:
            count = of_table[domain, domain].shape[1]
            picks = [np.arange(count), *rng.integers(count, size=(2000, count))]
            mat = {name: np.array([np.divide(*of_table[name, domain][:, pick].sum(1)) for pick in picks])
                   for name in names}  # fmt: skip
            other = np.max([mat[name] for name in experts if name != domain], axis=0)
            lengths.append((mat[domain], mat["generalist"], other))
        for domain, (own, generalist, other) in zip(
            ["mean", *whole], [np.mean(lengths, axis=0), *lengths], strict=True
        ):
            shown = []
            for values in (own, generalist, own / generalist, own / other):
                low, high = np.quantile(values[1:], [0.025, 0.975])
                shown.append(f"{values[0]:.3f} ({low:.3f} to {high:.3f})")
            text += f"| {table.removeprefix('mean acceptance length, ')} | {domain} | {' | '.join(shown)} |\n"
    return text


def markdown(title: str, table: dict[str, dict[str, list[float]]]) -> str:
    """A drafter a row, a domain a column; half-widths of the intervals behind the means."""
    domains = sorted(set().union(*table.values()))
    lines = [f"\n{title}\n", f"| drafter | {' | '.join(domains)} |", "|---" * (len(domains) + 1) + "|"]
    best = {d: max(row[d][0] for row in table.values() if d in row) for d in domains}
    for name, row in table.items():
        cells = []
        for d in domains:
            if d not in row:
                cells.append("-")
                continue
            mean, low, high = row[d]
            shown = f"**{mean:.2f}**" if mean == best[d] else f"{mean:.2f}"
            cells.append(f"{shown} ±{(high - low) / 2:.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def depths(accepted: dict[str, dict[str, dict[str, list[list[float]]]]]) -> str:
    """Acceptance by depth, of the generalist and of each expert, on the expert's domain."""
    text = ""
    for key, table in accepted.items():
        if all(len(cell) == 1 for row in table.values() for cell in row.values()):
            continue
        text += f"\n{key}, by depth\n\n| domain | drafter | 1 | 2 | 3 | 4 | 5 |\n{'|---' * 7}|\n"
        for domain in sorted(set().union(*table.values())):
            for name in ("generalist", domain):
                if domain in table.get(name, {}):
                    cells = " | ".join(
                        f"{mean:.2f} ±{(high - low) / 2:.2f}" for mean, low, high in table[name][domain]
                    )
                    text += f"| {domain} | {name} | {cells} |\n"
    return text


def draw(tables: list[tuple[str, dict[str, dict[str, list[float]]]]], path: Path, title: str) -> None:
    """A heat map per table."""
    figure = Figure(figsize=(13, 4.2 * ((len(tables) + 1) // 2)), layout="constrained")
    panels = figure.subplots(-(-len(tables) // 2), 2).flat
    for axes in panels[len(tables) :]:
        axes.set_axis_off()
    for axes, (name, table) in zip(panels, tables, strict=False):
        drafters = list(table)
        domains = sorted(set().union(*table.values()))
        values = np.array([[table[i].get(d, [np.nan])[0] for d in domains] for i in drafters])
        picture = axes.imshow(values, cmap="viridis", aspect="auto")
        axes.set_xticks(range(len(domains)), domains, rotation=30, ha="right")
        axes.set_yticks(range(len(drafters)), drafters)
        middle = (np.nanmin(values) + np.nanmax(values)) / 2
        for (i, k), value in np.ndenumerate(values):
            if np.isnan(value):
                continue
            axes.text(
                k, i, f"{value:.2f}", ha="center", va="center", color="black" if value > middle else "white"
            )
        axes.set_title(name, fontsize="medium")
        figure.colorbar(picture, ax=axes)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
