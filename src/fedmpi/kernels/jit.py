"""Compiles kernels with numba: at first use, to run without the interpreter lock, cached if a folder is writable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba  # type: ignore[import-untyped,unused-ignore]

F = TypeVar("F", bound=Callable[..., Any])


def jit_with(**options: Any) -> Callable[[F], F]:
    """A decorator: numba.njit with these options. Caches nothing if numba finds no writable folder."""

    def compiled(function: F) -> F:
        try:
            return cast(F, numba.njit(cache=True, nogil=True, **options)(function))
        except RuntimeError:
            return cast(F, numba.njit(nogil=True, **options)(function))

    return compiled


jit = jit_with()
