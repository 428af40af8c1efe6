"""How much drafters differ: acceptance by depth and mean acceptance length, for every drafter and domain.

    python scripts/corpora.py out/corpora
    python benchmarks/experts.py out/corpora --target tiny --out out/experts-tiny

Acceptance of the neural drafters, teacher-forced, on held-out text and on the target's own answers to
held-out prompts: `sum min(p, q)` at temperature 1 and equality of the likeliest tokens (greedy), at depth
1 to 5 (the deeper laws of heads read their own features). Mean acceptance length by real decoding of held-out
prompts, each drafter alone; and, of the answers above at temperature 1, in hindsight: from the rounds that a
drafter alone would have taken for these very texts, exactly in expectation. Intervals: 95 %, bootstrap over
windows and answers, widened to what t intervals would be: those of four answers are far too narrow.

Every cell goes to OUT.jsonl when it is known, with what it was made with (target, dtype, device, checksums of
text and drafter, sizes). Cells that are there and agree in all of it are not made again: a run that was
stopped goes on, and several processes (say, one per --domain) may share OUT. Other cells are left alone.
Writes OUT.md and OUT.png, of these drafters and all domains that are known.
"""

import argparse
import hashlib
import json
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from safetensors import SafetensorError
from scipy.special import ndtri, stdtrit

import nab
from nab.backends import pool
from nab.backends.distill import Feature, Standalone, teacher_laws
from nab.backends.heads import Head
from nab.backends.pretrained import DTYPES, Pretrained, available, load
from nab.backends.teacher import PAD, TURN, Teacher, Unit
from nab.backends.torch import CausalLM, Warper
from nab.decode import until
from nab.losses import expected_rounds

DEPTHS = 5
DRAFT_LEN = 4
HINDSIGHT = "mean acceptance length, answers, in hindsight"
DECODED = ("mean acceptance length, sampled", "mean acceptance length, greedy")


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
        by_depth = torch.stack((accepted * DRAFT_LEN)[:DRAFT_LEN], 1).double().cpu().numpy()[..., None]
        emitted.append(len(answer))
        rounds.append(float(expected_rounds(by_depth, DRAFT_LEN)[0]) if len(answer) else 0.0)
    return np.array(columns).transpose(2, 1, 0), emitted, rounds


def widened(value: float, resampled: np.ndarray, counts: list[int]) -> list[float]:
    """The 95 % interval of `resampled` around `value`, as wide as a t interval; nan from single ones alone.

    `n` resampled values spread by `sqrt((n - 1) / n)` of a standard error, which few of them know badly: with
    `d` degrees of freedom the distances are stretched by `t(d) / 1.96 * sqrt(n / (n - 1))`, 1.87 for `n = 4`.
    `counts` are those of the strata; `d` is their sum less their number.
    """
    degrees = sum(counts) - len(counts)
    if not degrees:
        return [np.nan, np.nan]
    stretch = stdtrit(degrees, 0.975) / ndtri(0.975) * np.sqrt(sum(counts) / degrees)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return [float(value + stretch * (low - value)), float(value + stretch * (high - value))]


def interval(values: Any, weights: Any = None) -> list[float]:
    """Mean, and its 95 % interval over axis 0; ratios of sums where `weights` are given."""
    values = np.asarray(values, dtype=float)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=float)
    picks = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
    means, mean = values[picks].sum(1) / weights[picks].sum(1), values.sum() / weights.sum()
    return [float(mean), *widened(mean, means, [len(values)])]


def decoded(model: CausalLM, drafter: Any, ids: list[int], stopping: dict[str, Any], seed: int) -> list[int]:
    """Tokens and rounds of one answer with one drafter alone, draft length 4."""
    for cached in (model, drafter):
        if hasattr(cached, "reset"):
            cached.reset()
    rounds = nab.decode(model, [drafter], nab.Constant([1.0]), ids, draft_len=DRAFT_LEN, rng=seed)
    lengths = [len(r.emitted) for r in until(rounds, **stopping)]
    return [sum(lengths), len(lengths)]


def checksum(contents: Iterable[Any]) -> str:
    """SHA-256 of byte strings, the first 16 digits."""
    digest = hashlib.sha256()
    for content in contents:
        digest.update(content)
    return digest.hexdigest()[:16]


def checksums(target: Pretrained, names: list[str], corpora: Path, domains: list[str]) -> dict[str, Any]:
    """Of the target's weights and vocabulary; of each drafter's file and each domain's text, by name."""
    weights = (w.cpu().reshape(-1).view(torch.uint8).numpy() for w in target.model.state_dict().values())
    of_target = chain([target.vocabulary.encode()], weights)
    drafters, shipped = {}, pool.shipped(target)
    for name in names:
        path = shipped.get(name) or Path(name).expanduser()
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) + sorted(path.glob("*.gguf"))
        label = Path(name).name.removesuffix(".safetensors")
        drafters[label] = checksum(file.read_bytes() for file in files) if files else None
    texts = {}
    for domain in domains:
        files = [
            *sorted((corpora / domain / "heldout").glob("*.txt")),
            corpora / domain / "requests/heldout.txt",
        ]
        texts[domain] = checksum(file.read_bytes() for file in files if file.exists())
    return {"target": checksum(of_target), "drafters": drafters, "texts": texts}


class Cells:
    """Results in a file of JSON lines: `{"table": ..., "drafter": ..., "domain": ..., "made": ..., ...}`.

    Args:
        file: that several processes may add to.
        checksums: as above; drafters and domains that are not in it have no cells.
        common: what all cells are made with.
        given: what cells of given texts are made with besides; `decoded` likewise.
    """

    def __init__(
        self, file: Path, checksums: dict[str, Any], *, common: Any, given: Any, decoded: Any
    ) -> None:
        self.file = file
        self.checksums, self.common, self.given, self.decoded = checksums, common, given, decoded

    def made(self, table: str, drafter: str, domain: str) -> dict[str, Any]:
        """All that decides what this cell is.

        Raises:
            KeyError: if drafter or domain are not known here.
        """
        decoded = table in DECODED
        return {
            **self.common,
            "weights": self.checksums["target"],
            "drafter": self.checksums["drafters"][drafter],
            "text": self.checksums["texts"][domain],
            **(self.decoded if decoded else self.given),
        }

    def read(self) -> tuple[dict[tuple[str, str, str], dict[str, Any]], int]:
        """Cells by table, drafter and domain, in the order in which they were made; how many do not agree."""
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        cells = [json.loads(line) for line in lines if line.endswith("}")]  # the last may be cut
        found, others = {}, 0
        for cell in cells:
            key = (cell["table"], cell["drafter"], cell["domain"])
            known = key[1] in self.checksums["drafters"] and key[2] in self.checksums["texts"]
            if known and cell.get("made") == self.made(*key):
                found[key] = cell
            else:
                others += 1
        return found, others

    def add(self, table: str, drafter: str, domain: str, **values: Any) -> None:
        """One line, written at once."""
        cell = {"table": table, "drafter": drafter, "domain": domain}
        cell |= {"made": self.made(table, drafter, domain), **values}
        cut = self.file.exists() and not self.file.read_bytes().endswith(b"\n")
        with self.file.open("a") as stream:
            stream.write("\n" * cut + json.dumps(cell) + "\n")


def arguments() -> argparse.Namespace:
    """The command line."""
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
    for name, least in (("units", 1), ("tokens", 1), ("limit", 0), ("threads", 1)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name} {getattr(options, name)}: expected {least} or more")
    if options.dtype not in DTYPES:
        raise ValueError(f"--dtype {options.dtype}: expected one of {', '.join(DTYPES)}")
    available(options.device)
    return options


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    known = sorted(path.parent.name for path in options.corpora.glob("*/heldout"))
    if not known:
        raise ValueError(f"{options.corpora}: expected a folder with <domain>/heldout/*.txt in it")
    domains = options.domain or [domain for domain in known if domain not in options.leave_out.split(",")]
    if unknown := set(domains) - set(known):
        raise ValueError(f"--domain {', '.join(sorted(unknown))}: expected one of {', '.join(known)}")
    if not domains:
        raise ValueError(f"--leave-out {options.leave_out}: no domain is left of {', '.join(known)}")

    target = load(options.target, dtype=options.dtype, device=options.device)
    names = pool.split(options.drafters) if options.drafters else pool.default(target)
    model = CausalLM(target.model, Warper(), name=target.name)
    drafters = pool.build(names, target, model)
    out = options.out.parent
    out.mkdir(parents=True, exist_ok=True)
    common = {"target": target.name, "dtype": options.dtype, "device": model.model.device.type}
    sums = checksums(target, names, options.corpora, known)
    cells = Cells(out / f"{options.out.name}.jsonl", sums, common=common, given={"units": options.units},
                  decoded={"limit": options.limit, "tokens": options.tokens})  # fmt: skip
    if others := cells.read()[1]:
        print(f"{cells.file}: {others} cells were made with other settings or files and are left alone")

    layers = {layer for d in drafters.values() if isinstance(d, Head) for layer in d.model.layers}
    last = target.model.config.get_text_config().num_hidden_layers
    inputs = checksum([json.dumps([common, sums["target"], sums["texts"]]).encode()])
    teacher = Teacher(target, options.corpora, out / f"{options.out.name}-units" / inputs,
                      tuple(sorted(layers | {last})), part="heldout")  # fmt: skip
    output = target.model.get_output_embeddings().weight
    stopping = {"max_new_tokens": options.tokens, "stop_tokens": target.stop_tokens}

    given_text(cells, drafters, teacher, domains=domains, output=output, units=options.units)
    if options.limit:
        prompts = {domain: teacher.prompts(domain, options.limit) for domain in domains}
        for temperature, table in zip((1.0, 0.0), DECODED, strict=True):
            model.warper = Warper(temperature)
            pooled = pool.build(names, target, model)
            by_decoding(cells, table, model, pooled, prompts=prompts, stopping=stopping)
    show(cells.read()[0], options.out, f"{target.name}, {options.dtype}")


def given_text(
    cells: Cells, drafters: dict[str, Any], teacher: Teacher, *, domains: list[str], output: Any, units: int
) -> None:
    """Everything that follows from texts alone, of the neural drafters."""
    known, _ = cells.read()
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
                if kind == "answers":  # those after the first TURN units are at another temperature
                    of_law = [list(chain(*of_units[:TURN])) for of_units in (emitted, rounds)]
                    cells.add(HINDSIGHT, name, domain, emitted=of_law[0], rounds=of_law[1])
                for table, values in zip(tables, np.concatenate(rows).transpose(1, 0, 2), strict=True):
                    cells.add(table, name, domain, rows=values.round(4).tolist())
            print(kind, domain, flush=True)


def by_decoding(
    cells: Cells, table: str, model: CausalLM, drafters: dict[str, Any], *, prompts: Any, stopping: Any
) -> None:
    """Tokens and rounds of real answers with each drafter alone."""
    known, _ = cells.read()
    for domain, asked in prompts.items():
        for name, drafter in drafters.items():
            if (table, name, domain) not in known:
                counts = [decoded(model, drafter, ids, stopping, k) for k, ids in enumerate(asked)]
                emitted, rounds = zip(*counts, strict=True)
                cells.add(table, name, domain, emitted=emitted, rounds=rounds)
        print(table, domain, flush=True)


Found = dict[tuple[str, str, str], dict[str, Any]]
Table = dict[str, dict[str, list[float]]]  # drafter, domain: mean and interval


def show(found: Found, out: Path, title: str) -> None:
    """Tables and heat maps of all cells."""
    lengths: dict[str, Table] = {}
    accepted: dict[str, dict[str, dict[str, list[list[float]]]]] = {}
    counts: dict[str, set[int]] = {}
    order = {name: k for k, name in enumerate(dict.fromkeys(name for _, name, _ in found))}
    for key, cell in sorted(found.items(), key=lambda item: (order[item[0][1]], item[0][2])):
        table, name, domain = key
        if "emitted" in cell:
            counts.setdefault(table, set()).add(len(cell["emitted"]))
            mean = interval(cell["emitted"], cell["rounds"])
            lengths.setdefault(table, {}).setdefault(name, {})[domain] = mean
        else:
            by_depth = [interval(column) for column in zip(*cell["rows"], strict=True)]
            accepted.setdefault(table, {}).setdefault(name, {})[domain] = by_depth
    kinds = [table for table in (HINDSIGHT, *DECODED) if table in lengths]
    text, panels = headline(found, kinds), []
    for table in kinds:
        cell = f"answers a cell: {', '.join(map(str, sorted(counts[table])))}"
        text += markdown(f"{table}, {cell}", lengths[table])
        panels.append((f"{table},\n{cell}", lengths[table]))
    for table, rows in accepted.items():
        text += markdown(f"{table}, depth 1", at_depth(rows, 1))
        deepest = max(len(cell) for row in rows.values() for cell in row.values())
        panels += [(f"{table}, depth {k}", at_depth(rows, k)) for k in sorted({1, deepest})]
    text += "".join(depths(table, rows) for table, rows in accepted.items())
    (out.parent / f"{out.name}.md").write_text(text)
    draw(panels, len(kinds), out.parent / f"{out.name}.png", title)


def at_depth(rows: dict[str, dict[str, list[list[float]]]], depth: int) -> Table:
    """One depth; the only one of drafters that are alike at all."""
    return {
        name: {d: cell[min(depth, len(cell)) - 1] for d, cell in row.items()} for name, row in rows.items()
    }


def headline(found: Found, tables: list[str]) -> str:
    """MAT of own experts over the generalist's and the best other expert's, by domain and in the mean.

    95 % intervals over the prompts of each domain, the same prompts for all drafters.
    """
    rng = np.random.default_rng(0)
    text = "\n| MAT | domain | own expert | generalist | own / generalist | own / best other expert |\n"
    text += "|---" * 6 + "|\n"
    for table in tables:
        of_table = {key[1:]: np.array([cell["emitted"], cell["rounds"]]) for key, cell in found.items()
                    if key[0] == table}  # fmt: skip
        experts = sorted({domain for name, domain in of_table if name == domain})
        names = ["generalist", *experts]
        whole = [domain for domain in experts if all((name, domain) in of_table for name in names)]
        if not whole or len(experts) == 1:
            continue
        lengths, counts = (
            [],
            [],
        )  # own, generalist, best other: of each domain, as measured and 2000 times resampled
        for domain in whole:
            count = of_table[domain, domain].shape[1]
            picks = [np.arange(count), *rng.integers(count, size=(2000, count))]
            mat = {name: np.array([np.divide(*of_table[name, domain][:, pick].sum(1)) for pick in picks])
                   for name in names}  # fmt: skip
            other = np.max([mat[name] for name in experts if name != domain], axis=0)
            lengths.append((mat[domain], mat["generalist"], other))
            counts.append(count)
        for domain, of_domain, (own, generalist, other) in zip(
            ["mean", *whole],
            [counts, *([n] for n in counts)],
            [np.mean(lengths, axis=0), *lengths],
            strict=True,
        ):
            shown = []
            for values in (own, generalist, own / generalist, own / other):
                low, high = widened(values[0], values[1:], of_domain)
                between = "-" if np.isnan(low) else f"{low:.3f} to {high:.3f}"
                shown.append(f"{values[0]:.3f} ({between})")
            text += f"| {table.removeprefix('mean acceptance length, ')} | {domain} | {' | '.join(shown)} |\n"
    return text


def markdown(title: str, table: Table) -> str:
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
            cells.append(f"{shown} (-)" if np.isnan(low) else f"{shown} ±{(high - low) / 2:.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def depths(title: str, rows: dict[str, dict[str, list[list[float]]]]) -> str:
    """Means at all depths, of every drafter on every domain; empty where all depths are alike."""
    if all(len(cell) == 1 for row in rows.values() for cell in row.values()):
        return ""
    domains = sorted(set().union(*rows.values()))
    text = f"\n{title}, depths 1/2/3/4/5\n\n| drafter | {' | '.join(domains)} |\n"
    text += "|---" * (len(domains) + 1) + "|\n"
    for name, row in rows.items():
        cells = ["/".join(f"{mean:.2f}".removeprefix("0") for mean, _, _ in row.get(d, [])) for d in domains]
        text += f"| {name} | {' | '.join(cell or '-' for cell in cells)} |\n"
    return text


def draw(tables: list[tuple[str, Table]], legend: int, path: Path, title: str) -> None:
    """A heat map per table; colours compare the drafters of one column, by a scale in place `legend`."""
    shown = []
    for name, table in tables:
        drafters, domains = list(table), sorted(set().union(*table.values()))
        values = np.array([[table[i].get(d, [np.nan])[0] for d in domains] for i in drafters])
        shown.append((name, drafters, domains, values, values / np.nanmax(values, axis=0)))
    lowest = min((np.nanmin(relative) for *_, relative in shown), default=0.0)
    norm = PowerNorm(2, vmin=lowest, vmax=1)  # near the best it matters most
    lines = -(-(len(tables) + 1) // 2)
    figure = Figure(figsize=(13, 4.2 * lines), layout="constrained")
    panels = list(figure.subplots(lines, 2).flat)
    scale = panels.pop(legend)
    for axes in [scale, *panels[len(tables) :]]:
        axes.set_axis_off()
    for axes, (name, drafters, domains, values, relative) in zip(panels, shown, strict=False):
        picture = axes.imshow(relative, cmap="viridis", norm=norm, aspect="auto")
        axes.set_xticks(range(len(domains)), domains, rotation=30, ha="right")
        axes.set_yticks(range(len(drafters)), drafters)
        axes.set_xlabel("domain of the text")
        axes.set_ylabel("drafter")
        for (i, k), value in np.ndenumerate(values):
            if not np.isnan(value):
                ink = "black" if norm(relative[i, k]) > 0.5 else "white"
                weight = "bold" if relative[i, k] == 1 else "normal"
                axes.text(k, i, f"{value:.2f}", ha="center", va="center", color=ink, weight=weight)
            if drafters[i] == domains[k]:
                axes.add_patch(Rectangle((k - 0.47, i - 0.44), 0.94, 0.88, fill=False, color="red", lw=2))
        axes.set_title(name, fontsize="medium")
    if tables:
        bar = figure.colorbar(picture, cax=scale.inset_axes((0.1, 0.45, 0.8, 0.1)), orientation="horizontal")
        bar.set_label("value / the best drafter's on this domain (its column)")
        words = "Red frame: the domain's own expert. Bold: the best drafter of the column."
        scale.text(0.5, 0.65, words, ha="center", transform=scale.transAxes)
    figure.suptitle(f"{title}: colours relative to the best drafter of each column")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command goes on with the next cell") from None
    except (OSError, ValueError, SafetensorError) as problem:
        raise SystemExit(f"error: {' '.join(str(problem).split())}") from None
