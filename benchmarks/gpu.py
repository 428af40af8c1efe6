"""What a round costs on a CUDA device, beside what it could do: ceilings, forwards, scoring, rounds.

    python benchmarks/gpu.py [--out out/gpu.json]
    python benchmarks/gpu.py --device cpu          # the same program on a small model, in under a minute

Models are random Llamas, made on the device, as many sizes as its memory holds; a drafter is the target's
first layer with noise, under the target's embedding and output matrix. Times: CUDA events after a warm-up,
medians with quartiles. *floor*: the bytes of the weights that a forward reads over the measured bandwidth of
a copy (read and write counted). *reads*: times a round waits for the device, counted by the operators that do
so; on CUDA also by its own debug mode. Weights of the layers behind the first are scaled by .05, so that
drafts are accepted sometimes.
"""

import argparse
import resource
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from peers import POLICIES, Scene, decoding, perturbed, random_llama, random_prompt
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from timing import Cells, machine, quartiles
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import nab
from nab.acceptance import Chain
from nab.backends.pretrained import available
from nab.backends.torch import CausalLM, Warper, early_exit
from nab.decode import Evaluation
from nab.schemes import Levels

DRAFT_LEN = 4
EPS = 0.05
NOISE = 0.05
WIDTHS = (1, 2, 5, 9, 17)
POOLS = (1, 2, 4, 8, 16, 32)
LLAMA3 = {"vocab_size": 128_256, "num_key_value_heads": 8, "tie_word_embeddings": True}
SHAPES: dict[str, dict[str, Any]] = {
    "0.1B": {"vocab_size": 32_000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
             "num_attention_heads": 12},
    "1B": {**LLAMA3, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32},
    "3B": {**LLAMA3, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
           "num_attention_heads": 24},
    "8B": {**LLAMA3, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "tie_word_embeddings": False},
}  # fmt: skip
SMOKE: dict[str, dict[str, Any]] = {
    "smoke": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
              "num_attention_heads": 4},
}  # fmt: skip


class Row(NamedTuple):
    """A line of the table: a model, what was measured, values and their unit, what to see them beside."""

    model: str
    what: str
    values: list[float]
    unit: str
    beside: str = ""


def wait(device: torch.device) -> None:
    """Until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], Any], device: torch.device, repetitions: int, warmup: int = 3) -> list[float]:
    """Milliseconds of ``work``, each time on its own."""
    for _ in range(warmup):
        work()
    wait(device)
    found = []
    for _ in range(repetitions):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end))
        else:
            started = perf_counter()
            work()
            found.append((perf_counter() - started) * 1e3)
    return found


def ceilings(device: torch.device, scale: int) -> Iterator[Row]:
    """Bandwidth of a copy, matrix products, the launch of a kernel; ``scale`` 1 is for a large device."""
    size = 2**30 // scale
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    sink = torch.empty_like(source)
    ms = np.array(timed(lambda: sink.copy_(source), device, 20))
    yield Row("device", "copy", (2 * size / ms / 1e6).tolist(), "GB/s", "read and write counted")
    for dtype in (torch.bfloat16, torch.float32):
        n = int(8192 / scale**0.5)
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        ms = np.array(timed(lambda a=a, b=b: a @ b, device, 10))
        kind = str(dtype).removeprefix("torch.")
        yield Row("device", f"matmul {kind}", (2 * n**3 / ms / 1e9).tolist(), "TFLOP/s", f"{n} x {n}")
    one, many = torch.zeros(1, device=device), 200

    def launches() -> None:
        for _ in range(many):
            one.add_(1)

    yield Row(
        "device", "launch", [t / many * 1e3 for t in timed(launches, device, 10)], "us", "add to 1 number"
    )


def read_bytes(model: Any) -> int:
    """Bytes of the weights that a forward reads: all, but an embedding that is no output matrix too."""
    ends = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    unread = ends[0].numel() if ends[0] is not ends[1] else 0
    return (sum(weight.numel() for weight in model.parameters()) - unread) * model.dtype.itemsize


def needed(shape: dict[str, Any], dtype: torch.dtype) -> int:
    """Bytes of a target and the most drafters, without their embedding and output matrix."""
    model = random_llama(shape, EPS, dtype, "meta")
    layer = sum(w.numel() for w in model.model.layers[0].parameters())
    return (sum(w.numel() for w in model.parameters()) + max(POOLS) * layer) * dtype.itemsize


def fitting(device: torch.device, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Shapes that take at most 70 % of the free memory."""
    if device.type != "cuda":
        return SMOKE
    free, _ = torch.cuda.mem_get_info(device)
    return {name: shape for name, shape in SHAPES.items() if needed(shape, dtype) < 0.7 * free}


def models(
    shape: dict[str, Any], dtype: torch.dtype, device: torch.device, draft_len: int, new_tokens: int
) -> Scene:
    """A target with the largest pool, greedy."""
    target = random_llama(shape, EPS, dtype, str(device))
    first = early_exit(target, 1)
    shared = (target.get_input_embeddings().weight, target.get_output_embeddings().weight)
    drafters = [first, *(perturbed(first, NOISE, seed, shared) for seed in range(1, max(POOLS)))]
    return Scene(target, drafters, random_prompt(shape["vocab_size"]), new_tokens, draft_len, 0.0)


def forwards(name: str, scene: Scene, bandwidth: float, repetitions: int) -> Iterator[Row]:
    """The target at several widths behind the prompt and a drafter at one token, each beside its floor."""
    device = scene.target.device
    ids = torch.tensor([scene.prompt * (1 + max(WIDTHS) // len(scene.prompt))], device=device)
    for who, model, widths in (("target", scene.target, WIDTHS), ("drafter", scene.drafters[0], (1,))):
        size = read_bytes(model)
        floor = f"floor {size / bandwidth / 1e6:.3f} ms, {size / 1e9:.2f} GB"
        for width in widths:
            cache = DynamicCache()

            @torch.inference_mode()
            def read(model: Any = model, cache: Any = cache, width: int = width) -> None:
                model(input_ids=ids[:, :width], past_key_values=cache, use_cache=True, logits_to_keep=width)
                cache.crop(-width)

            with torch.inference_mode():
                model(input_ids=ids[:, : len(scene.prompt)], past_key_values=cache, use_cache=True)
            yield Row(name, f"{who} forward, {width} tokens", timed(read, device, repetitions), "ms", floor)


def evaluations(name: str, scene: Scene, repetitions: int) -> Iterator[Row]:
    """Scoring of n drafters on the tokens of a fully accepted round, as a selector has it done."""
    warper = Warper(scene.temperature)
    target, *drafters = (CausalLM(model, warper) for model in (scene.target, *scene.drafters))
    own = decoding(target, [], POLICIES["constant"], scene._replace(draft_len=0, new_tokens=DRAFT_LEN + 1))
    tokens, start = (*scene.prompt, *own(0).tokens), len(scene.prompt)
    p = target.score(tokens[:-1], start)
    scheme = Levels([Chain()] * scene.draft_len)
    for n in POOLS:
        work = Evaluation(nab.Pool(drafters[:n]), scheme, tokens, start, (p,), start)
        ms = timed(work, scene.target.device, repetitions)
        yield Row(name, f"evaluation, n = {n}", ms, "ms", f"{np.median(ms) / n:.3f} ms a drafter")


class Reads(TorchDispatchMode):
    """Counts operators that make the host wait for a device: scalars read, nonzero, copies to the host."""

    counted = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and look at what it was."""
        kind, kwargs = func.overloadpacket, kwargs or {}
        if kind not in self.counted:
            with self:  # in inference mode, composite operators arrive whole
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if kind in self.counted:
            self.count += 1
        elif kind is torch.ops.aten._to_copy:
            self.count += args[0].device.type != "cpu" and result.device.type == "cpu"
        elif kind is torch.ops.aten.copy_:
            self.count += args[1].device.type != "cpu" and args[0].device.type == "cpu"
        return result


def reads(work: Callable[[], Any], device: torch.device) -> tuple[int, int | None]:
    """How often ``work`` waits for the device: by its operators, and by CUDA's debug mode."""
    with Reads() as counter:
        work()
    if device.type != "cuda":
        return counter.count, None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return counter.count, sum("synchroniz" in str(warning.message) for warning in said)


def peak(device: torch.device) -> int:
    """Bytes: most ever allocated on the device since it was last reset; of a CPU, the process's most."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def rounds(name: str, scene: Scene, repetitions: int) -> Iterator[Row]:
    """Time of a round, tokens a second, reads and memory, of plain decoding and policies, in turn."""
    device, warper = scene.target.device, Warper(scene.temperature)
    target, *drafters = (CausalLM(model, warper) for model in (scene.target, *scene.drafters))
    runs = {
        "plain": decoding(target, [], POLICIES["constant"], scene._replace(draft_len=0)),
        "fixed": decoding(target, drafters[:1], POLICIES["constant"], scene),
        **{
            f"normal-hedge, n = {n}": decoding(target, drafters[:n], POLICIES["normal-hedge"], scene)
            for n in POOLS
        },
    }
    times: dict[str, list[float]] = {what: [] for what in runs}
    answers = {what: run(0) for what, run in runs.items()}  # also the warm-up
    for _ in range(repetitions):
        for what, run in runs.items():
            times[what] += timed(lambda run=run: run(0), device, 1, warmup=0)
    for what, run in runs.items():
        count, seen = answers[what].rounds, times[what]
        yield Row(name, f"{what}, round", [ms / count for ms in seen], "ms", f"{count} rounds")
        speed = [len(answers[what].tokens) / ms * 1e3 for ms in seen]
        yield Row(
            name, f"{what}, speed", speed, "tok/s", f"{len(answers[what].tokens) / count:.2f} tokens a round"
        )
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        by_operator, by_device = reads(lambda run=run: run(0), device)
        said = "" if by_device is None else f"{by_device / count:.1f} by CUDA's debug mode"
        yield Row(name, f"{what}, reads", [by_operator / count], "a round", said)
        yield Row(name, f"{what}, memory", [peak(device) / 1e9], "GB", "at most")


def table(rows: list[Row]) -> Table:
    """All that was measured."""
    made = Table(title="median (quartiles)", title_justify="left")
    for head in ("model", "what", "measured", "unit", "beside"):
        made.add_column(head, justify="right" if head == "measured" else "left")
    for row in rows:
        shown = quartiles(row.values, 3) if len(row.values) > 1 else f"{row.values[0]:.2f}"
        made.add_row(row.model, row.what, shown, row.unit, row.beside)
    return made


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="bfloat16 on CUDA, else float32")
    parser.add_argument("--repetitions", type=int)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("out/gpu.json"))
    options = parser.parse_args(words)
    for name in ("repetitions", "new_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    try:
        available(options.device)
    except ValueError as problem:
        parser.error(str(problem))
    return options


def main() -> None:
    options = parsed()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("error", nab.DrafterWarning)  # times of a pool without it mean nothing
    device = torch.device(options.device)
    on_cuda = device.type == "cuda"
    dtype = getattr(torch, options.dtype or ("bfloat16" if on_cuda else "float32"))
    repetitions = options.repetitions or (20 if on_cuda else 3)
    about = {
        **machine(str(device)), "dtype": str(dtype), "draft_len": DRAFT_LEN, "seed": 0,
        "new_tokens": options.new_tokens, "temperature": 0, "repetitions": repetitions,
    }  # fmt: skip
    cells, rows = Cells(options.out, about), list[Row]()

    def section(label: str, make: Callable[[], Iterator[Row]]) -> None:
        if label not in cells.cells:
            cells.add({label: [row._asdict() for row in make()]})
        rows.extend(Row(**row) for row in cells.cells[label])

    with Progress(console=Console(stderr=True)) as progress:
        shapes = fitting(device, dtype)
        task = progress.add_task("ceilings", total=1 + 3 * len(shapes))
        section("device", lambda: ceilings(device, 1 if on_cuda else 256))
        progress.advance(task)
        bandwidth = float(np.median(rows[0].values))
        for name, shape in shapes.items():
            scene = models(shape, dtype, device, DRAFT_LEN, options.new_tokens)
            for label, make in (
                ("forwards", lambda n=name, s=scene: forwards(n, s, bandwidth, repetitions)),
                ("evaluation", lambda n=name, s=scene: evaluations(n, s, repetitions)),
                ("rounds", lambda n=name, s=scene: rounds(n, s, min(repetitions, 5))),
            ):
                progress.update(task, description=f"{name}, {label}")
                section(f"{name}, {label}", make)
                progress.advance(task)
            del scene, make
            if on_cuda:
                torch.cuda.empty_cache()
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print(", ".join(f"{name} {value}" for name, value in about.items()))
    console.print(table(rows))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as problem:
        raise SystemExit(f"error: {' '.join(str(problem).split())}") from None
