"""Train the tiny target from scratch: a tokenizer and a small Llama that writes all domains.

    python scripts/corpora.py out/corpora
    python scripts/tiny.py out/corpora out/tiny-target

Needs about 40 minutes on two quiet cores; may be killed and started again at any moment. The folder is an
ordinary transformers folder afterwards. German is left out: the tiny set has seven domains.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from console import guarded, steps_bar
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from nab.backends import int8
from nab.backends.distill import small_llama
from nab.backends.pretrained import llama_file
from nab.backends.training import Recipe, Windows, fit, provenance

END = "<end>"


def texts(folder: Path) -> list[str]:
    """The documents of a folder, in the order of their names."""
    return [file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.txt"))]


def make_tokenizer(corpora: dict[str, list[str]], vocab_size: int, sample: int = 2_000_000) -> Tokenizer:
    """Byte-level BPE of `vocab_size` entries, `sample` characters of each domain counting alike."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def sampled():
        for documents in corpora.values():
            left = sample
            for text in documents:
                yield text[:left]
                left -= len(text)
                if left <= 0:
                    break

    tokenizer.train_from_iterator(sampled(), trainer)
    return tokenizer


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """A transformers folder, and the same weights as int8."""
    model.save_pretrained(out)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(out)
    weights, config = llama_file(model)
    int8.save(weights, out / "target.int8.safetensors", {"kind": "target", **config})


def quality(
    model: LlamaForCausalLM, cut: Callable[[list[str]], Windows], documents: list[str], count: int = 64
) -> dict[str, float]:
    """Bits per byte, from `count` windows of held-out documents, and how many bytes a token stands for."""
    windows = cut(documents)
    bytes_per_token = sum(len(text.encode()) for text in documents) / len(windows.tokens)
    ids = torch.tensor(np.stack([windows[k] for k in windows.draw(0, min(count, len(windows)))]))
    with torch.inference_mode():
        nats = float(model(input_ids=ids, labels=ids).loss)
    bits = nats / math.log(2) / bytes_per_token
    return {"bits_per_byte": round(bits, 3), "bytes_per_token": round(bytes_per_token, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("corpora", type=Path, help="folder with one folder per domain")
    parser.add_argument("out", type=Path, help="the transformers folder to write")
    parser.add_argument("--leave-out", default="german", metavar="DOMAINS", help="comma-separated; german")
    parser.add_argument("--tokens", type=int, default=6_000_000)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--batch", type=int, default=28, help="windows a step")
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bfloat16", action="store_true", help="products in it; on CUDA they are anyway")
    parser.add_argument("--threads", type=int)
    options, began = parser.parse_args(), time.time()
    if options.threads:
        torch.set_num_threads(options.threads)

    domains = sorted(path.parent.name for path in options.corpora.glob("*/train"))
    domains = [domain for domain in domains if domain not in options.leave_out.split(",")]
    if not domains:
        raise SystemExit(f"no domains in {options.corpora}: run scripts/corpora.py first")
    train = {domain: texts(options.corpora / domain / "train") for domain in domains}
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "tokenizer.raw.json"
    if not file.exists():
        make_tokenizer(train, options.vocab_size).save(str(file))
    tokenizer = Tokenizer.from_file(str(file))
    end = tokenizer.token_to_id(END)

    def windows(documents: list[str]) -> Windows:
        encoded = tokenizer.encode_batch_fast(documents)
        joined = np.concatenate([np.array([*e.ids, end], dtype=np.int64) for e in encoded])
        return Windows(joined, options.window, options.seed)

    data = {domain: windows(documents) for domain, documents in train.items()}
    torch.manual_seed(options.seed)
    model = small_llama(
        tokenizer.get_vocab_size(), 256, 704, layers=8, head_width=64, context=2048, end=end
    ).to(options.device)  # 6.8 million parameters
    share = options.batch // len(domains)
    steps = options.tokens // (share * len(domains) * options.window)

    def loss(step: int) -> torch.Tensor:
        rows = [w[k] for w in data.values() for k in w.draw(step * share, share)]
        ids = torch.tensor(np.stack(rows), device=options.device)
        return model(input_ids=ids, labels=ids).loss

    with steps_bar() as bar:
        task = bar.add_task("target", total=steps, state="")
        fit(
            model,
            loss,
            steps=steps,
            folder=options.out / "training",
            recipe=Recipe(rate=options.rate, bfloat16=options.bfloat16 or None),
            progress=lambda step, value: bar.update(task, completed=step, state=f"loss {value:.3f}"),
        )

    save(model.float().cpu(), tokenizer, options.out)
    report = {
        domain: quality(model, windows, texts(options.corpora / domain / "heldout")) for domain in domains
    }
    for domain, figures in report.items():
        print(domain, figures)
    manifest = {
        "tokens": steps * share * len(domains) * options.window,
        "seed": options.seed,
        "heldout": report,
        **provenance({d: options.corpora / d / "train" for d in domains}, device=options.device, began=began),
    }
    (options.out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


if __name__ == "__main__":
    guarded(main)
