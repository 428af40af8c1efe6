"""Prompts with their domains, from a JSON-lines file or the shipped set."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

SHIPPED = Path(str(files("nab") / "data" / "prompts.jsonl"))
"""Requests for an instruction-tuned target."""

OPENINGS = Path(str(files("nab") / "data" / "tiny" / "prompts.jsonl"))
"""Openings of held-out documents, for the tiny target, which continues them."""


class Prompt(NamedTuple):
    """A user message and the label of its domain, empty where none is given."""

    text: str
    domain: str = ""


def read(path: Path) -> list[Prompt]:
    """Prompts of a file with one JSON object a line: ``prompt``, optionally ``domain``.

    Raises:
        ValueError: naming the first line that is no such object, or if there is none.
    """
    prompts = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            prompt = Prompt(record["prompt"], record.get("domain", ""))
            "".join(prompt).encode()  # half a surrogate pair is no text
        except (ValueError, KeyError, TypeError, AttributeError):
            prompt = None
        if not prompt or not all(isinstance(field, str) for field in prompt):
            raise ValueError(
                f'{path}, line {number}: expected {{"prompt": "...", "domain": "..."}}, got {line!r}'
            )
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return prompts


def limited(prompts: Iterable[Prompt], per_domain: int) -> list[Prompt]:
    """The first ``per_domain`` prompts of each domain, in order."""
    seen: Counter[str] = Counter()
    kept = []
    for prompt in prompts:
        seen[prompt.domain] += 1
        if seen[prompt.domain] <= per_domain:
            kept.append(prompt)
    return kept
