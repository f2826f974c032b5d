"""Reads rows of a file by one call, without the interpreter lock: Python needs as long for a row as the kernel does."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types  # type: ignore[import-untyped,unused-ignore]

from fedmpi.kernels.jit import jit

_pread: Any = types.ExternalFunction("pread", types.intp(types.intc, types.uintp, types.uintp, types.int64))


@jit
def read_rows(fd: int, places: Any, size: int, out: Any) -> int:
    """Fill `out` (bytes) with rows of `size` bytes from these places of the file. Rows that lie behind one another are
    read at once. Returns the number of rows read: all, or those before the first that was not read whole."""
    row, num = 0, len(places)
    while row < num:
        stop = row + 1
        while stop < num and places[stop] == places[stop - 1] + size:
            stop += 1
        wanted = (stop - row) * size
        if _pread(fd, np.uintp(out.ctypes.data + row * size), np.uintp(wanted), places[row]) != wanted:
            return row
        row = stop
    return num
