"""Sweeps: one measurement for every cell of a grid, side by side, to a tidy table that survives a crash."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nab.checks import whole
from nab.losses import length_loss, plug_in_length
from nab.sim import environments
from nab.sim.play import is_bandit, lazily, play, play_bandit
from nab.sim.regret import regret, switches
from nab.types import Floats

if TYPE_CHECKING:
    import pandas as pd

Row = Mapping[str, Any]
"""A row of the table: plain numbers and strings by column."""

Measure = Callable[..., "Row | Iterable[Row]"]
"""Called with a cell's values by keyword, and ``seed``; gives its row, or several."""


def sweep(
    measure: Measure,
    grid: Mapping[str, Sequence[Any]] | Iterable[Mapping[str, Any]],
    *,
    seed: int = 0,
    jobs: int = 1,
    keep: Path | str | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Measure every cell of a grid: every combination of learner, environment, n, T, delay, ...

    Cells run side by side under joblib, on whatever backend is active: ``with
    joblib.parallel_config(backend="dask"):`` around the call is all it takes to leave one machine. All cells
    have the same seed, so that what differs between them only in the learner has the same losses.

    Args:
        measure: called with a cell's values by keyword and ``seed``; its rows are put behind the cell's
            values. Other processes must be able to import it.
        grid: values by name, of which every combination is a cell; or the cells themselves, mappings.
        seed: at least 0.
        jobs: cells side by side; -1 is one per processor.
        keep: file of JSON lines to which each cell's rows are appended once measured. Cells that it already
            holds, of the same measure (as ``label`` names it) and seed, are not measured again; what was cut
            off in its last line is. Remove it when the code behind the measure has changed.
        progress: whether to show a bar on standard error.

    Returns:
        One row per row of ``measure``, in the order of the cells; objects as ``label`` names them.

    Raises:
        ValueError: if two cells have the same labels, a row has a column of its cell, or ``keep`` is damaged
            before its last line.

    >>> def cube(x, seed):
    ...     return {"cube": x**3}
    >>> sweep(cube, {"x": [1, 2, 3]})["cube"].tolist()
    [1, 8, 27]
    """
    import pandas as pd

    cells = list(_cells(grid))
    names = [json.dumps({"measure": label(measure), **_labels(cell), "seed": seed}) for cell in cells]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the grid has the cell {twice} twice")
    keep = Path(keep) if keep else None
    done = _kept(keep) if keep else {}
    missing = [(name, cell) for name, cell in zip(names, cells, strict=True) if name not in done]
    for name, rows in _measured(partial(_rows, measure, seed), missing, jobs, progress):
        done[name] = rows
        if keep:
            _append(keep, name, rows)
    return pd.DataFrame(
        [{**_labels(cell), **row} for name, cell in zip(names, cells, strict=True) for row in done[name]]
    )


def play_row(
    player: Any,
    path: Callable[[int, int], Floats],
    *,
    rounds: int,
    n: int,
    noise: Callable[..., Floats] = environments.bernoulli,
    draft_len: int = 1,
    delay: int = 0,
    period: int = 1,
    batch: int = 100,
    seed: int = 0,
) -> Row:
    """What most sweeps measure: a learner or a bandit in a stochastic environment, over a batch of queries.

    Args:
        player: a learner, or a bandit, which its ``update`` tells.
        path: mean path, from rounds and n, such as ``environments.gapped`` or a ``partial`` of one.
        rounds: of each query, at least ``draft_len``.
        n: drafters.
        noise: ``environments.bernoulli`` or ``beta``.
        draft_len: 1 plays the environment's losses as token losses; above, the length losses of rounds of so
            many tokens, with ``1 - loss`` for gamma, which come that much later.
        delay: rounds that feedback is late besides; learners only.
        period: of lazy evaluation, at least 1; learners only.
        batch: queries.
        seed: of losses and draws.

    Returns:
        ``regret``, mean over the queries of that against each one's best drafter; its standard ``error``;
        ``switches``, mean number of changes of the choice, for learners the least a draw can make do with
        (``nab.selector.coupled``); ``evaluations``, the share of rounds behind which all drafters are scored.

    Raises:
        ValueError: where a bandit is to have late or lazy feedback, or a number is out of its range.

    >>> from nab import Hedge
    >>> row = play_row(Hedge(), environments.gapped, rounds=100, n=4, period=5)
    >>> row["evaluations"]
    0.2
    """
    whole("draft_len", draft_len, 1)
    whole("delay", delay, 0)
    whole("rounds", rounds, draft_len)
    losses = noise(path(rounds, n), batch=batch, rng=seed)
    if draft_len > 1:
        gamma = (1 - losses).reshape(len(losses), -1)
        length = plug_in_length(gamma, draft_len)
        losses = length_loss(length, draft_len).reshape(-1, *losses.shape[1:])
    if bandit := is_bandit(player):
        if (draft_len, delay, period) != (1, 0, 1):
            raise ValueError(
                f"a bandit needs draft_len 1, delay 0, period 1, got {draft_len}, {delay}, {period}"
            )
        played: Any = play_bandit(player, losses, rng=(seed, 1))[0]
        moves = switches(played)
    else:
        late = delay + draft_len - 1 + lazily(len(losses), period)
        played, _ = play(player, losses, delay=late)
        moves = np.abs(np.diff(played, axis=0)).sum((0, 1)) / 2
    found = regret(played, losses)[-1].max(0)
    return {
        "regret": float(found.mean()),
        "error": float(found.std(ddof=1) / batch**0.5) if batch > 1 else float("nan"),
        "switches": float(moves.mean()),
        "evaluations": 0.0 if bandit else 1 / period,
    }


def label(value: Any) -> Any:
    """What stands for a value in a table: numbers and strings as they are, functions by name, others by repr.

    >>> from functools import partial
    >>> label(partial(max, default=0)), label(0.5)
    ('max(default=0)', 0.5)
    """
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, partial):
        words = [*map(repr, value.args), *(f"{name}={each!r}" for name, each in value.keywords.items())]
        return f"{value.func.__name__}({', '.join(words)})"
    return getattr(value, "__name__", None) or repr(value)


def _labels(cell: Mapping[str, Any]) -> dict[str, Any]:
    return {name: label(value) for name, value in cell.items()}


def _cells(grid: Mapping[str, Sequence[Any]] | Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    if not isinstance(grid, Mapping):
        yield from grid
        return
    for values in product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def _rows(
    measure: Measure, seed: int, named: tuple[str, Mapping[str, Any]]
) -> tuple[str, list[dict[str, Any]]]:
    name, cell = named
    found = measure(**cell, seed=seed)
    rows = [dict(row) for row in ([found] if isinstance(found, Mapping) else found)]
    if both := {column for row in rows for column in row} & set(cell):
        raise ValueError(f"rows must not have the columns {sorted(both)} of their cell {name}")
    return name, rows


def _measured(run: Callable[[Any], Any], missing: list[Any], jobs: int, progress: bool) -> Iterator[Any]:
    """Results as they come, under a bar where it is wanted."""
    from joblib import Parallel, delayed
    from rich.console import Console
    from rich.progress import track

    found = Parallel(n_jobs=jobs, return_as="generator_unordered")(delayed(run)(each) for each in missing)
    return iter(track(found, "cells", total=len(missing), console=Console(stderr=True), disable=not progress))


def _append(keep: Path, name: str, rows: list[dict[str, Any]]) -> None:
    keep.parent.mkdir(parents=True, exist_ok=True)
    with keep.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"cell": name, "rows": rows}, default=lambda value: value.item()) + "\n")


def _kept(keep: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows by cell; a line that was cut off at the end is removed from the file."""
    if not keep.exists():
        return {}
    whole, end, cut = keep.read_bytes().rpartition(b"\n")
    if cut:
        keep.write_bytes(whole + end)
    found = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            entry = json.loads(line)
            found[entry["cell"]] = [dict(row) for row in entry["rows"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{keep}, line {number} is no kept cell: {error}") from error
    return found
