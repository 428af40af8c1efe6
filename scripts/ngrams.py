"""Fit the n-gram drafters that ship with the package: one file per domain in `nab/data/ngrams`.

    python scripts/corpora.py out/corpora
    python scripts/ngrams.py out/corpora [--domain python ...] [--target DIR]

Reads the folders that `corpora.py` writes (or your own: `<domain>/train/*.txt`), tokenizes them as the target
does and keeps the most frequent n-grams of each order. The file's metadata names the source, its licence and
the vocabulary (SHA-256 of the target's token table) that the ids belong to.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from nab.backends.drafters import NGram
from nab.backends.pool import NGRAMS
from nab.backends.pretrained import Pretrained, load


def token_documents(folder: Path, target: Pretrained, most: int) -> list[np.ndarray]:
    """Token ids of the documents in `folder`, in order of their names, up to `most` tokens in all."""
    documents, left = [], most
    for file in sorted(folder.glob("*.txt")):
        ids = target.tokenizer(file.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
        documents.append(np.array(ids[:left], dtype=np.int64))
        left -= len(documents[-1])
        if left == 0:
            break
    return documents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("corpora", type=Path, help="folder with one folder per domain")
    parser.add_argument("--domain", action="append", help="only this one; may be repeated")
    parser.add_argument("--target", type=Path, help="transformers folder whose vocabulary to use")
    parser.add_argument("--out", type=Path, default=NGRAMS)
    parser.add_argument("--order", type=int, default=4)
    parser.add_argument("--entries-per-order", type=int, default=40_000)
    parser.add_argument("--tokens", type=int, default=4_000_000, help="most training tokens per domain")
    arguments = parser.parse_args()

    target = load(arguments.target)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for domain in arguments.domain or sorted(path.parent.name for path in arguments.corpora.glob("*/train")):
        folder = arguments.corpora / domain
        documents = token_documents(folder / "train", target, arguments.tokens)
        if not documents:
            raise SystemExit(f"no text in {folder / 'train'}: expected files *.txt")
        model = NGram.fit(
            documents,
            target.model.config.vocab_size,
            order=arguments.order,
            entries_per_order=arguments.entries_per_order,
        )
        source = json.loads((folder / "SOURCE.json").read_text()) if (folder / "SOURCE.json").exists() else {}
        metadata = {
            "vocabulary": target.vocabulary,
            "tokens": str(sum(map(len, documents))),
            **{key: str(source[key]) for key in ("package", "version", "sha256", "licence") if key in source},
        }
        file = arguments.out / f"ngram-{domain}.safetensors"
        save_file(model.arrays(), file, metadata)
        print(f"{file}: {file.stat().st_size / 1e6:.2f} MB from {metadata['tokens']} tokens")


if __name__ == "__main__":
    main()
