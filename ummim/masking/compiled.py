"""Compilation of the samplers' inner loops."""

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(function: Callable[..., Any]) -> Any:
    """``function`` as machine code, without the GIL.

    The code is cached beside the source or in the user's cache folder. Where neither can be written (a read-only
    container, say) every process that is not forked from a warm one compiles anew, which takes seconds.
    """
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:  # numba: "no locator available"
        return njit(nogil=True)(function)
