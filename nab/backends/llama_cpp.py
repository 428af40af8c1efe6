"""llama-cpp-python: drafters chosen online as its ``draft_model``. The first object made imports it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nab.backends.texts import Proposes, Texts
from nab.decode import Round
from nab.selector import Chooses


class LlamaDraftModel:
    """``Llama(model_path, draft_model=LlamaDraftModel())``.

    llama-cpp-python tells the text so far and compares the draft with the tokens that it samples, so the text
    is the target's at any temperature. It is a ``llama_cpp.llama_speculative.LlamaDraftModel`` where that is
    installed. One object serves one ``Llama``: its texts come one after the other, and one that does not go
    on where the last one stopped starts afresh.

    Args:
        drafters: see ``nab.backends.texts.Texts``.
        draft_len: drafted tokens a round, at least 1; about 10 on a GPU, 2 to 4 on a CPU.
        selector: see ``Texts``.
        seed: likewise.
        watch: likewise.

    Raises:
        ValueError: see ``Texts``.

    >>> model = LlamaDraftModel(draft_len=3)
    >>> model(np.array([5, 6, 7, 8, 5, 6], dtype=np.intc))
    array([7, 8, 5], dtype=int32)
    """

    def __init__(
        self,
        drafters: Mapping[str, Proposes] | None = None,
        *,
        draft_len: int = 4,
        selector: Callable[[Any], Chooses] | None = None,
        seed: int = 0,
        watch: Callable[[int, Round], Any] | None = None,
    ) -> None:
        self.texts = Texts(draft_len, drafters=drafters, selector=selector, seed=seed, watch=watch)
        with suppress(ImportError):
            from llama_cpp.llama_speculative import LlamaDraftModel as Base

            Base.register(type(self))

    def __call__(self, input_ids: NDArray[np.intc], /, **kwargs: Any) -> NDArray[np.intc]:
        """The draft behind ``input_ids``, ``(tokens,)``: at most ``draft_len`` tokens, maybe none."""
        text = self.texts.take(input_ids)
        draft = text.draft()
        self.texts.put(text)
        return np.array(draft, dtype=np.intc)
