"""Draw one round as a picture: who hands what to whom.

    python scripts/dataflow.py [FILE]

FILE is `docs/images/dataflow.png` unless given.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

WIDTH, HEIGHT, STEP, UPPER = 2.7, 1.3, 4.0, 3.0
CHOOSES, DRAFTS, TARGET = "#dbe7f6", "#e3f1da", "#fbe3cf"
"""Colours: what chooses, what drafters do, what needs the target."""

BOXES = {  # name: left and lower edge, colour, title, what it does
    "selector": (0 * STEP, UPPER, CHOOSES, "Selector", "draws a drafter\nfrom the learner's law"),
    "drafter": (1 * STEP, UPPER, DRAFTS, "Drafter i", "drafts K tokens,\nalone"),
    "target": (2 * STEP, UPPER, TARGET, "Target", "scores text and draft\nin one forward"),
    "verify": (3 * STEP, UPPER, TARGET, "verify", "accepts the beginning,\nadds the next token"),
    "learner": (0 * STEP, 0.0, CHOOSES, "Learner", "moves all weights,\nnot the chosen one's"),
    "objective": (1 * STEP, 0.0, CHOOSES, "Objective", "losses of positions\nthat are complete"),
    "evaluation": (2 * STEP, 0.0, DRAFTS, "Evaluation", "every drafter scores\nthe emitted tokens"),
    "text": (3 * STEP, 0.0, "white", "Text", "grows by these tokens;\nthe next round begins"),
}

ARROWS = [  # from, to, what is handed over
    ("selector", "drafter", "choice i"),
    ("drafter", "target", "draft,\nlaws q"),
    ("target", "verify", "laws p"),
    ("verify", "text", "emitted\ntokens"),
    ("text", "evaluation", "tokens,\nlaws p"),
    ("evaluation", "objective", "gamma,\nrealised"),
    ("objective", "learner", "losses\n(n,)"),
    ("learner", "selector", "probs\n(n,)"),
]


def box(axes: Axes, name: str) -> None:
    left, low, colour, title, does = BOXES[name]
    shape = FancyBboxPatch((left, low), WIDTH, HEIGHT, boxstyle="round,pad=0.05", fc=colour, ec="#404040")
    axes.add_patch(shape)
    axes.text(left + WIDTH / 2, low + HEIGHT - 0.12, title, ha="center", va="top", weight="bold", size=12)
    axes.text(left + WIDTH / 2, low + 0.42, does, ha="center", va="center", size=9.5)


def arrow(axes: Axes, start: str, end: str, what: str) -> None:
    (x, y), (u, v) = BOXES[start][:2], BOXES[end][:2]
    if y == v:  # side by side
        right, row = max(x, u), y + HEIGHT / 2
        tips = (right - STEP + WIDTH + 0.1, row), (right - 0.1, row)
        axes.text(right - (STEP - WIDTH) / 2, row + 0.12, what, ha="center", va="bottom", size=9)
    else:
        middle = x + WIDTH / 2
        tips = (middle, HEIGHT + 0.1), (middle, UPPER - 0.1)
        axes.text(middle + 0.15, (UPPER + HEIGHT) / 2, what, ha="left", va="center", size=9)
    first, last = tips if (u > x or v > y) else tips[::-1]
    axes.annotate("", last, first, arrowprops={"arrowstyle": "-|>", "color": "#404040", "lw": 1.4})


def main() -> None:
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images/dataflow.png")
    figure, axes = plt.subplots(figsize=(11, 4))
    for name in BOXES:
        box(axes, name)
    for each in ARROWS:
        arrow(axes, *each)
    note = "no further target call: the laws p of the emitted tokens are there already"
    axes.text(
        1.5 * STEP + WIDTH / 2,
        (UPPER + HEIGHT) / 2,
        note,
        ha="center",
        va="center",
        size=9.5,
        style="italic",
        color="#404040",
    )
    axes.set(xlim=(-0.2, 3 * STEP + WIDTH + 0.2), ylim=(-0.2, UPPER + HEIGHT + 0.2))
    axes.set_aspect("equal")
    axes.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight")


if __name__ == "__main__":
    main()
