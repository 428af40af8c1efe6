"""Tokens a second by batch size, against `nab.decode` for one query after the other.

    python benchmarks/batch.py

A target of 8 layers of width 256 over 8192 tokens, float32, greedy, one thread; its drafters are its first
layer, that of a target that was changed a little, and that of another one. What the target's later layers add
is scaled by the number shown, which sets how many tokens a round emits. Medians over repetitions in which all
cases take turns.
"""

import argparse
import platform
from collections.abc import Callable
from functools import partial
from time import perf_counter

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import nab
from nab.backends.batch import decode_batch
from nab.backends.torch import CausalLM, Warper, early_exit
from nab.sim.trace import processor

QUERIES = 16
ENDS = {"max_new_tokens": 32}


def models(scale: float) -> tuple[CausalLM, list[CausalLM]]:
    """The target and its drafters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=256, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=4, initializer_range=0.05, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for layer in model.model.layers[1:]:
        for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
            part.weight.data *= scale
    drafters = [CausalLM(early_exit(model, 1), Warper(0))]
    for noise in (0.1, 0.3):
        other = LlamaForCausalLM(config)
        for name, weight in other.named_parameters():
            own = model.state_dict()[name]
            weight.data = own + noise * own.std() * torch.randn_like(own)
        drafters.append(CausalLM(early_exit(other, 1), Warper(0)))
    return CausalLM(model, Warper(0)), drafters


def selectors(n: int) -> list[nab.Selector]:
    return [nab.Selector(nab.NormalHedge(), n, rng=k) for k in range(QUERIES)]


def one_by_one(target: CausalLM, drafters: list[CausalLM], prompts: list[list[int]]) -> list[nab.Round]:
    return [
        round_
        for k, (selector, prompt) in enumerate(zip(selectors(len(drafters)), prompts, strict=True))
        for round_ in nab.until(nab.decode(target, drafters, selector, prompt, draft_len=5, rng=k), **ENDS)
    ]


def batched(
    target: CausalLM, drafters: list[CausalLM], prompts: list[list[int]], batch: int
) -> list[nab.Round]:
    rounds = decode_batch(
        target, drafters, selectors(len(drafters)), prompts, batch=batch, draft_len=5, rngs=range(QUERIES),
        **ENDS,
    )  # fmt: skip
    return [round_ for found in rounds for round_ in found.values()]


def speed(decoded: Callable[[], list[nab.Round]]) -> tuple[float, float]:
    """Tokens a second and tokens a round."""
    started = perf_counter()
    rounds = decoded()
    tokens = sum(len(round_.emitted) for round_ in rounds)
    return tokens / (perf_counter() - started), tokens / len(rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    repetitions = parser.parse_args().repetitions
    torch.set_num_threads(1)
    prompts = [np.random.default_rng(k).integers(0, 8192, 64).tolist() for k in range(QUERIES)]
    print(f"{processor()}, Python {platform.python_version()}, torch {torch.__version__}, one thread")
    for scale in (0.0, 0.05, 0.15):
        given = *models(scale), prompts
        cases = {"one by one": partial(one_by_one, *given)}
        cases |= {f"batch {size}": partial(batched, *given, size) for size in (1, 2, 4, 8, 16)}
        found = {name: [] for name in cases}
        for _ in range(repetitions):
            for name, case in cases.items():
                found[name].append(speed(case))
        base = np.array([speed for speed, _ in found["one by one"]])
        for name, values in found.items():
            speeds = np.array([speed for speed, _ in values])
            low, ratio, high = np.percentile(speeds / base, [25, 50, 75])
            print(
                f"{scale:4}: {name:10} {np.median(speeds):7.0f} tokens/s, "
                f"{ratio:.2f} ({low:.2f} to {high:.2f}) of one by one, {values[0][1]:.2f} tokens a round"
            )


if __name__ == "__main__":
    main()
