"""Train the tiny target from scratch: a tokenizer and a small Llama that writes all domains.

    python scripts/corpora.py out/corpora
    python scripts/tiny.py out/corpora out/tiny-target

Needs about 40 minutes on two quiet cores; may be killed and started again at any moment. The folder is an
ordinary transformers folder afterwards. German is left out: the tiny set has seven domains.
"""

import argparse
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from console import Parser, device, domains_in, folder, guarded, rate, steps_bar, whole
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from nab.backends import int8
from nab.backends.distill import small_llama
from nab.backends.pretrained import llama_file
from nab.backends.training import Recipe, Windows, check_origin, corpus, documents, fit, provenance

END = "<end>"


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
        for texts in corpora.values():
            left = sample
            for text in texts:
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
    model: LlamaForCausalLM, cut: Callable[[list[str]], Windows], texts: list[str], count: int = 64
) -> dict[str, float]:
    """Bits per byte, from `count` windows of held-out documents, and how many bytes a token stands for."""
    windows = cut(texts)
    bytes_per_token = sum(len(text.encode()) for text in texts) / len(windows.tokens)
    ids = torch.tensor(np.stack([windows[k] for k in windows.draw(0, min(count, len(windows)))]))
    with torch.inference_mode():
        nats = float(model(input_ids=ids, labels=ids).loss)
    bits = nats / math.log(2) / bytes_per_token
    return {"bits_per_byte": round(bits, 3), "bytes_per_token": round(bytes_per_token, 3)}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("corpora", type=folder, help="folder with one folder per domain")
    parser.add_argument("out", type=folder, help="the transformers folder to write")
    parser.add_argument("--leave-out", default="german", metavar="DOMAINS", help="comma-separated; german")
    parser.add_argument("--tokens", type=whole(1), default=6_000_000)
    parser.add_argument("--window", type=whole(2), default=256)
    parser.add_argument("--batch", type=whole(1), default=28, help="windows a step")
    parser.add_argument("--rate", type=rate, default=4e-3)
    parser.add_argument("--vocab-size", type=whole(257), default=2048)
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bfloat16", action="store_true", help="products in it; on CUDA they are anyway")
    parser.add_argument("--threads", type=whole(1))
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)

    domains = domains_in(options.corpora, "train", options.leave_out)
    share = options.batch // len(domains)
    if not share:
        raise ValueError(f"--batch must be at least {len(domains)}, one window a domain, got {options.batch}")
    per_step = share * len(domains) * options.window
    if not (steps := options.tokens // per_step):
        raise ValueError(f"--tokens must be at least {per_step}, those of a step, got {options.tokens}")
    train = {domain: documents(options.corpora / domain / "train") for domain in domains}
    heldout = {domain: documents(options.corpora / domain / "heldout") for domain in domains}
    data = {domain: corpus(options.corpora / domain / "train") for domain in domains}
    sizes = ("tokens", "window", "batch", "rate", "vocab_size", "seed", "bfloat16")
    origin = {**{name: getattr(options, name) for name in sizes}, "data": data}
    training = options.out / "training"
    training.mkdir(parents=True, exist_ok=True)
    check_origin(training / "checkpoint.safetensors", origin)
    source = json.dumps([options.vocab_size, data]).encode()
    file = training / f"tokenizer-{hashlib.sha256(source).hexdigest()[:16]}.json"
    if not file.exists():
        make_tokenizer(train, options.vocab_size).save(str(file))
    tokenizer = Tokenizer.from_file(str(file))
    end = tokenizer.token_to_id(END)

    def windows(documents: list[str]) -> Windows:
        encoded = tokenizer.encode_batch_fast(documents)
        joined = [token for e in encoded for token in (*e.ids, end)]
        return Windows(np.array(joined, dtype=np.int64), options.window, options.seed)

    cut = {domain: windows(texts) for domain, texts in train.items()}
    for part, parts in (("train", cut), ("heldout", {d: windows(texts) for d, texts in heldout.items()})):
        for domain, found in parts.items():
            if not len(found):
                place = options.corpora / domain / part
                raise ValueError(
                    f"{place} has {len(found.tokens)} tokens, fewer than --window {options.window}"
                )
    torch.manual_seed(options.seed)
    model = small_llama(
        tokenizer.get_vocab_size(), 256, 704, layers=8, head_width=64, context=2048, end=end
    ).to(options.device)  # 7.0 million parameters

    def loss(step: int) -> torch.Tensor:
        rows = [w[k] for w in cut.values() for k in w.draw(step * share, share)]
        ids = torch.tensor(np.stack(rows), device=options.device)
        return model(input_ids=ids, labels=ids).loss

    with steps_bar() as bar:
        task = bar.add_task("target", total=steps, state="")
        seconds = fit(
            model,
            loss,
            steps=steps,
            folder=training,
            origin=origin,
            recipe=Recipe(rate=options.rate, bfloat16=options.bfloat16 or None),
            progress=lambda step, value: bar.update(task, completed=step, state=f"loss {value:.3f}"),
        )

    save(model.float().cpu(), tokenizer, options.out)
    report = {domain: quality(model, windows, texts) for domain, texts in heldout.items()}
    for domain, figures in report.items():
        print(domain, figures)
    manifest = {
        "tokens": steps * per_step,
        "seed": options.seed,
        "seconds": round(seconds),
        "heldout": report,
        "origin": origin,
        **provenance(options.device),
    }
    (options.out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


if __name__ == "__main__":
    guarded(main)
