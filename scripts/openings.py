"""Write the tiny target's prompts: openings of held-out documents, two per domain.

python scripts/openings.py out/corpora nab/data/tiny/prompts.jsonl
"""

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("corpora", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--leave-out", default="german", metavar="DOMAINS", help="comma-separated; german")
    parser.add_argument("--per-domain", type=int, default=2)
    parser.add_argument("--characters", type=int, default=300)
    options = parser.parse_args()
    lines = []
    for folder in sorted(options.corpora.glob("*/heldout")):
        domain = folder.parent.name
        if domain in options.leave_out.split(","):
            continue
        files = sorted(folder.glob("*.txt"))
        for k in range(options.per_domain):
            text = files[k * len(files) // options.per_domain].read_text(encoding="utf-8")
            # a third in, at a word's beginning: past the headers that many documents share
            third = len(text) // 3
            start = max(text.rfind("\n", 0, third), text.rfind(" ", 0, third)) + 1
            prompt = text[start : start + options.characters].strip()
            lines.append(json.dumps({"domain": domain, "prompt": prompt}, ensure_ascii=False) + "\n")
    options.out.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
