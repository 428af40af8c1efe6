"""Studies: one module per figure, a table and a picture of it each.

``measure(scale=, seed=, jobs=, ...)`` gives tidy rows, a pandas data frame; ``summary(table)`` what one wants
to read of it, ``figure(table)`` the picture. They need the extra ``sim``.
"""

from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

NAMES = sorted(module.name for module in iter_modules(__path__))
"""Of all studies."""


def load(name: str) -> ModuleType:
    """A study's module.

    Raises:
        ValueError: on a name that is none of ``NAMES``.
    """
    if name not in NAMES:
        raise ValueError(f"unknown study {name!r}: choose from {', '.join(NAMES)}")
    return import_module(f"{__name__}.{name}")


def headline(name: str) -> str:
    """What a study shows, in one line."""
    return (load(name).__doc__ or "").splitlines()[0]
