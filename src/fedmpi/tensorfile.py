"""HDF5 files of tensors. Tensor names are stored as data, so they may be any strings.

    index      JSON, an entry per dataset:
               {"key": [...], "dtype": "bfloat16", "shape": [...], "placement": "replicated", "grows": false}
               {"key": [...], "dtype": "float32", "shape": [...], "silos": [...]}, a row per silo
    0, 1, ...  the tensors, in the index's order; as bytes if HDF5 has no such number type

Reading is safe for files from others: links, external and virtual storage, objects and text are refused, and so are
datasets that the index does not list or that claim to be larger than the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch

from fedmpi import disk
from fedmpi.errors import CheckpointError
from fedmpi.state import PLACEMENTS, Key, Placement, StateTensor

INDEX = "index"
_SLICE = 1 << 20  # elements written at a time; other threads run in between
_PLAIN = {
    **{torch.float16: "<f2", torch.float32: "<f4", torch.float64: "<f8"},
    **{torch.int8: "|i1", torch.int16: "<i2", torch.int32: "<i4", torch.int64: "<i8", torch.uint8: "|u1"},
}
_DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}


@dataclass(frozen=True)
class Entry:
    """An entry of the index, which describes a dataset."""

    key: Key
    dtype: torch.dtype
    shape: tuple[int, ...]
    silos: tuple[str, ...] | None = None  # the silos of the rows; None: not per silo
    placement: Placement = "replicated"  # in the run that wrote it
    grows: bool = False  # as in state.StateTensor

    @property
    def stored(self) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """The dataset's type and shape."""
        if self.dtype in _PLAIN:
            return np.dtype(_PLAIN[self.dtype]), self.shape
        return np.dtype("|u1"), (self.num_bytes,)

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Table(NamedTuple):
    """A dataset to be written."""

    key: Key
    tensor: torch.Tensor
    silos: Sequence[str] | None = None  # the silos of the rows; None: not per silo
    placement: Placement = "replicated"
    grows: bool = False


def write(path: Path, tables: Sequence[Table]) -> tuple[bytes, int]:
    """Write the file atomically: whole or not at all. Returns its SHA-256 and size in bytes. Raises OSError."""
    with disk.replacing(path) as part:
        with _filled(part) as file:
            index = []
            for number, (key, tensor, silos, placement, grows) in enumerate(tables):
                rows = None if silos is None else tuple(silos)
                entry = Entry(tuple(key), tensor.dtype, tuple(tensor.shape), rows, placement, grows)
                index.append(_to_json(entry))
                array = _array(tensor)
                dataset = file.create_dataset(str(number), shape=array.shape, dtype=entry.stored[0])
                if array.ndim == 1:
                    for start in range(0, len(array), _SLICE):
                        dataset[start : start + _SLICE] = array[start : start + _SLICE]
                elif array.size:
                    dataset[...] = array
            file.create_dataset(INDEX, data=np.frombuffer(json.dumps(index).encode(), dtype=np.uint8))
        with open(part, "rb") as raw:
            digest = hashlib.file_digest(raw, "sha256").digest()
            size = raw.tell()
    return digest, size


class _Target(io.RawIOBase):
    """A file for HDF5 whose writes never raise. After a failed write HDF5 neither closes the file nor frees its memory,
    and the process crashes at exit. The first error is kept in `error`; nothing is written after it."""

    def __init__(self, path: Path) -> None:
        self.error: OSError | None = None
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while len(rest) and self.error is None:  # a full disk may accept a part
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self.error = error
        return size

    def truncate(self, size: int | None = None) -> int:
        try:
            return self._file.truncate(size) if self.error is None else size or 0
        except OSError as error:
            self.error = error
            return size or 0

    def readinto(self, buffer: Any) -> int:
        """Read bytes; zeros where a write failed."""
        view = memoryview(buffer).cast("B")
        size = self._file.readinto(view) or 0
        view[size:] = bytes(len(view) - size)
        return len(view)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()


@contextlib.contextmanager
def _filled(path: Path) -> Iterator[h5py.File]:
    """A new HDF5 file in place of an empty one. Raises OSError after HDF5 has closed it, if a write failed."""
    with contextlib.closing(_Target(path)) as target:
        with h5py.File(target, "w") as file:
            yield file
        if target.error is not None:
            raise target.error


def contents(path: Path) -> list[Entry]:
    """The file's entries, after checking every dataset against the index. Raises CheckpointError."""
    with _opened(path) as (_, entries):
        return entries


def read(path: Path) -> list[StateTensor]:
    """All tensors that are not per silo. Raises CheckpointError."""
    with _opened(path) as (file, entries):
        return [
            StateTensor(e.key, _tensor(file[str(i)][()], e.dtype, e.shape), e.placement, grows=e.grows)
            for i, e in enumerate(entries)
            if e.silos is None
        ]


def read_rows(path: Path, silos: Collection[str]) -> dict[str, dict[Key, torch.Tensor]]:
    """The tensors of these silos, by silo and key. Raises CheckpointError."""
    found: dict[str, dict[Key, torch.Tensor]] = {}
    with _opened(path) as (file, entries):
        for number, entry in enumerate(entries):
            size = entry.num_bytes // max(len(entry.silos or ()), 1)
            for row, silo in enumerate(entry.silos or ()):
                if silo in silos:
                    at = row if entry.dtype in _PLAIN else slice(row * size, (row + 1) * size)
                    tensor = _tensor(file[str(number)][at], entry.dtype, entry.shape[1:])
                    found.setdefault(silo, {})[entry.key] = tensor
    return found


def _array(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return (tensor if tensor.dtype in _PLAIN else tensor.reshape(-1).view(torch.uint8)).numpy()


def _tensor(array: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    flat = torch.from_numpy(np.array(array).reshape(-1))
    return flat.view(dtype).reshape(shape)


def _to_json(entry: Entry) -> dict[str, Any]:
    told = {"key": entry.key, "dtype": str(entry.dtype).removeprefix("torch."), "shape": entry.shape}
    about = {"placement": entry.placement, "grows": entry.grows} if entry.silos is None else {"silos": entry.silos}
    return {**told, **about}


def _from_json(told: Any) -> Entry:
    key, shape, silos = tuple(told["key"]), tuple(told["shape"]), told.get("silos")
    texts = [*key, *(silos or ())]
    if not all(isinstance(text, str) for text in texts) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError("its index is not valid")
    if silos is not None and (len(silos) != shape[0] or len(set(silos)) != len(silos)):
        raise ValueError("its index does not name one silo per row")
    if silos is not None:
        return Entry(key, _DTYPES[told["dtype"]], shape, tuple(silos))
    placement, grows = told["placement"], told["grows"]
    if placement not in PLACEMENTS or placement == "per_silo" or not isinstance(grows, bool):
        raise ValueError("its index has an unknown placement")
    return Entry(key, _DTYPES[told["dtype"]], shape, None, placement, grows)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[h5py.File, list[Entry]]]:
    """The open file and its entries. Raises CheckpointError for anything wrong with it."""
    try:
        with open(disk.open_regular(path), "rb") as raw, h5py.File(path, "r") as file:
            yield file, _checked(file, raw.seek(0, 2))
    except Exception as error:  # h5py raises many types
        raise CheckpointError(f"{path}: {error}") from None


def _checked(file: h5py.File, file_bytes: int) -> list[Entry]:
    index = _plain_dataset(file, INDEX, np.dtype("|u1"), None, file_bytes)
    entries = [_from_json(told) for told in json.loads(index[()].tobytes())]
    if len(file) != len(entries) + 1:
        raise ValueError(f"it holds {len(file) - 1} tensors, its index {len(entries)}")
    if len({(e.key, e.dtype, e.shape[1:] if e.silos is not None else ()) for e in entries}) != len(entries):
        raise ValueError("its index names a tensor twice")
    if sum(entry.num_bytes for entry in entries) > file_bytes:
        raise ValueError("its tensors are larger than the file")
    for number, entry in enumerate(entries):
        _plain_dataset(file, str(number), *entry.stored, file_bytes)
    return entries


def _plain_dataset(
    file: h5py.File, name: str, dtype: np.dtype[Any], shape: tuple[int, ...] | None, most: int
) -> h5py.Dataset:
    """The dataset of that name, if it is stored contiguously and completely in this file. Raises ValueError."""
    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        raise ValueError(f"'{name}' is a link, or missing")
    found = file[name]
    if not isinstance(found, h5py.Dataset):
        raise ValueError(f"'{name}' is not a dataset")
    made = found.id.get_create_plist()
    if made.get_layout() not in (h5py.h5d.CONTIGUOUS, h5py.h5d.COMPACT) or made.get_external_count():
        raise ValueError(f"'{name}' is stored in another file, or compressed")
    if found.dtype != dtype or found.dtype.metadata or found.shape is None or shape not in (None, found.shape):
        raise ValueError(f"'{name}' is {found.dtype} of {found.shape}, its index says otherwise")
    if found.nbytes > most or found.id.get_storage_size() != found.nbytes:
        raise ValueError(f"'{name}' claims more than the file holds")
    return found
