"""States as flat dictionaries of arrays: plain enough for JSON and for ``numpy.savez``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import numpy as np

State = TypeVar("State")


def flat(state: Any) -> dict[str, Any]:
    """A state's numbers by name; names of nested states are joined by dots, ``instances.0.regret``.

    ``json.dumps({k: v.tolist() for k, v in flat(state).items()})`` and ``numpy.savez(file, **flat(state))``
    both keep every bit.

    >>> from nab import Hedge
    >>> {name: value.tolist() for name, value in flat(Hedge().init(2)).items()}
    {'losses': [0.0, 0.0], 'rounds': 0.0, 'prior': [0.5, 0.5]}
    """
    return dict(_items("", state))


def restored(like: State, values: Mapping[str, Any]) -> State:
    """The state that ``flat`` took apart.

    Args:
        like: a state of the same learner, such as its ``init``, over as many drafters.
        values: arrays or nested lists by name.

    Raises:
        ValueError: on a name that is missing or not known, another number of drafters, or a value that is no
            finite number, or not whole where it must be.
    """
    names = flat(like).keys()
    if names != values.keys():
        raise ValueError(f"saved state has {sorted(values)}, this learner's has {sorted(names)}")
    return _rebuilt("", like, values)  # type: ignore[no-any-return]


def _items(name: str, part: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(part, tuple):
        for place, value in _parts(name, part):
            yield from _items(place, value)
    else:
        yield name, np.asarray(part)


def _parts(name: str, part: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    """Full names and values of a state's fields, or of a tuple's places."""
    for key, value in zip(getattr(part, "_fields", range(len(part))), part, strict=True):
        yield f"{name}.{key}" if name else f"{key}", value


def _rebuilt(name: str, like: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(like, tuple):
        parts = [_rebuilt(place, value, values) for place, value in _parts(name, like)]
        return type(like)(*parts) if hasattr(like, "_fields") else tuple(parts)
    array = np.array(values[name], dtype=np.asarray(like).dtype if np.ndim(like) else np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"saved {name} must be finite, got {array[~np.isfinite(array)].flat[0]}")
    if isinstance(like, int | float):
        if array.ndim or array != type(like)(array):
            raise ValueError(f"saved {name} must be a number like {like}, got {values[name]}")
        return type(like)(array)
    # sums by level grow with the rounds, and a batch may be split or joined: one axis at least is drafters
    if array.ndim != like.ndim or (
        like.ndim and all(a != b for a, b in zip(array.shape, like.shape, strict=True))
    ):
        raise ValueError(f"saved {name} must have shape {like.shape}, got {array.shape}")
    return array.astype(like.dtype)
