"""How kernels are compiled: at first use, without the interpreter lock, cached on disk where a place is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba  # type: ignore[import-untyped,unused-ignore]

F = TypeVar("F", bound=Callable[..., Any])


def jit_with(**options: Any) -> Callable[[F], F]:
    """A decorator: numba.njit with these options. Nothing is cached if numba finds no folder that it may write."""

    def compiled(function: F) -> F:
        try:
            return cast(F, numba.njit(cache=True, nogil=True, **options)(function))
        except RuntimeError:
            return cast(F, numba.njit(nogil=True, **options)(function))

    return compiled


jit = jit_with()
