"""Examples in docstrings, as the site shows them: a fence around what begins with `>>>`.

Without it, Markdown takes prompts for quotations and printed lists for links. `mkdocs.yml` names this file.
"""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Puts the fences in when the package has been read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change one docstring."""
        if obj.docstring:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """Text with a fence around each paragraph that begins with a prompt."""
    return re.sub(r"(?m)^>>> .*(?:\n.+)*", "```pycon\n\\g<0>\n```", text)
