"""Samples that stay in their file. Rows are read at their place in the file (pread), a batch ahead by a thread, so a
silo's memory does not grow with its file; the kernel's page cache makes later epochs as fast as memory.

No mapping: a file that shrinks, or a network file system that fails, is an error and not the end of the process.
"""

from __future__ import annotations

import functools
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedmpi.errors import FedmpiError
from fedmpi.types import Streamed

BLOCK_BYTES = 8 << 20  # of a block that goes through the whole file
CHUNKS_BYTES = 64 << 20  # of decoded chunks that are kept for the next batch

Rows = npt.NDArray[np.int64]
_READER = ThreadPoolExecutor(1, "fedmpi-read")  # one thread for all files; it starts with the first task


class Raw(ABC):
    """An array in a file, as stored."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __init__(self) -> None:
        self._lock = threading.Lock()  # rows are read by one thread at a time
        self._coming: tuple[Rows, Future[npt.NDArray[Any]]] | None = None

    def ahead(self, rows: Rows) -> None:
        """Begin to read rows that will be asked for next."""
        with self._lock:
            self._settle()
            self._coming = rows, _READER.submit(self._read, rows)

    def read(self, rows: Rows) -> npt.NDArray[Any]:
        """These rows, as a new array. Raises FedmpiError if they cannot be read, or if the file has changed."""
        with self._lock:
            if self._coming is not None and np.array_equal(self._coming[0], rows):
                (_, found), self._coming = self._coming, None
                return found.result()
            self._settle()
            return self._read(rows)

    def _settle(self) -> None:
        """Drop what was read ahead, and not asked for."""
        if self._coming is not None:
            (_, unwanted), self._coming = self._coming, None
            wait([unwanted])

    @abstractmethod
    def _read(self, rows: Rows) -> npt.NDArray[Any]:
        """`read`, in any thread."""

    @functools.cached_property
    def row_bytes(self) -> int:
        """Size of a row as stored."""
        return int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize


class _Unchanged:
    """An open file that must stay as it was."""

    def __init__(self, path: Path, where: str) -> None:
        self.where = where
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self.fd)
        self._was = self._state()

    def _state(self) -> tuple[int, int]:
        now = os.fstat(self.fd)
        return now.st_size, now.st_mtime_ns

    def check(self) -> None:
        """Raise FedmpiError if somebody has written to the file."""
        if self._state() != self._was:
            raise FedmpiError(f"{self.where} has changed since it was opened; data.stream needs it as it was")


class PlacedRows(Raw):
    """An array whose rows lie as they are at known places: row i is in part i // rows_per_part."""

    def __init__(
        self,
        path: Path,
        where: str,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        starts: npt.NDArray[np.int64],
        rows_per_part: int,
    ) -> None:
        super().__init__()
        self.shape, self.dtype = shape, dtype
        self._file = _Unchanged(path, where)
        self._starts, self._per = starts.astype(np.int64), max(rows_per_part, 1)
        from fedmpi.kernels.rows import read_rows  # imported here, because numba takes a second to load

        self._read_rows = read_rows

    def _read(self, rows: Rows) -> npt.NDArray[Any]:
        size = self.row_bytes
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        if not len(rows):
            return out
        self._file.check()
        places = self._starts[rows // self._per] + rows % self._per * size
        memory = out.reshape(-1).view(np.uint8)
        for row in range(self._read_rows(self._file.fd, places, size, memory), len(places)):  # what one call left
            self._fill(memoryview(memory[row * size : (row + 1) * size].data), int(places[row]))
        return out

    def _fill(self, memory: memoryview, place: int) -> None:
        while True:
            try:
                num = os.preadv(self._file.fd, (memory,), place)
            except OSError as error:
                raise FedmpiError(f"{self._file.where} cannot be read: {error.strerror}") from None
            if num == len(memory):
                return
            if num == 0:
                raise FedmpiError(f"{self._file.where} has become shorter since it was opened")
            memory, place = memory[num:], place + num  # a signal, or more than 2 GiB


class ChunkedRows(Raw):
    """An array whose chunks must be decoded: each is read whole, and the last ones are kept."""

    def __init__(
        self,
        path: Path,
        where: str,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        rows_per_chunk: int,
        decode: Callable[[int, int], npt.NDArray[Any]],
    ) -> None:
        super().__init__()
        self.shape, self.dtype = shape, dtype
        self._file = _Unchanged(path, where)
        self._per, self._decode = rows_per_chunk, decode
        self._chunks: OrderedDict[int, npt.NDArray[Any]] = OrderedDict()
        self._most = max(1, CHUNKS_BYTES // max(self.row_bytes * rows_per_chunk, 1))

    def _read(self, rows: Rows) -> npt.NDArray[Any]:
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        self._file.check()
        chunks = rows // self._per
        for chunk in np.unique(chunks).tolist():
            here = np.flatnonzero(chunks == chunk)
            out[here] = self._chunk(chunk)[rows[here] - chunk * self._per]
        return out

    def _chunk(self, chunk: int) -> npt.NDArray[Any]:
        if chunk in self._chunks:
            self._chunks.move_to_end(chunk)
            return self._chunks[chunk]
        first = chunk * self._per
        try:
            found = self._decode(first, min(first + self._per, self.shape[0]))
        except (OSError, RuntimeError) as error:  # h5py raises both
            raise FedmpiError(f"{self._file.where} cannot be read: {' '.join(str(error).split())[:200]}") from None
        self._chunks[chunk] = found
        if len(self._chunks) > self._most:
            self._chunks.popitem(last=False)
        return found


class FileSamples(Streamed):
    """Rows of an array in a file, converted to `dtype` as they are read."""

    dtype = torch.float32

    def __init__(
        self,
        raw: Raw,
        rows: Rows | None = None,
        prepared: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self._raw, self._rows, self._prepared = raw, rows, prepared
        self.shape = torch.Size((raw.shape[0] if rows is None else len(rows), *raw.shape[1:]))

    def part(self, rows: Rows) -> FileSamples:
        """These of its rows, in this order."""
        return FileSamples(self._raw, rows if self._rows is None else self._rows[rows], self._prepared)

    def through(self, prepared: Callable[[torch.Tensor], torch.Tensor]) -> FileSamples:
        """The same rows, prepared as they are read."""
        return FileSamples(self._raw, self._rows, prepared)

    def _places(self, rows: slice | torch.Tensor) -> Rows:
        wanted = np.arange(*rows.indices(len(self)), dtype=np.int64) if isinstance(rows, slice) else rows.cpu().numpy()
        return wanted if self._rows is None else self._rows[wanted]

    def ahead(self, rows: slice | torch.Tensor) -> None:
        self._raw.ahead(self._places(rows))

    def __getitem__(self, rows: slice | torch.Tensor) -> torch.Tensor:
        values = self._raw.read(self._places(rows))
        if values.dtype != np.float32:
            with np.errstate(over="ignore"):  # refused when the file was opened
                values = np.ascontiguousarray(values, np.float32)
        found = torch.from_numpy(values)
        return found if self._prepared is None else self._prepared(found)

    def blocks(self) -> Iterator[torch.Tensor]:
        step = max(1, BLOCK_BYTES // max(self._raw.row_bytes, 1))
        for start in range(0, len(self), step):
            found = self[start : start + step]
            if start + step < len(self):
                self.ahead(slice(start + step, start + 2 * step))
            yield found
