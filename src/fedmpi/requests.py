"""Requests to change the members of a running job: `fedmpi retire` and `fedmpi admit`.

    DIR/requests/TOKEN.json   one request per file, written atomically; handled oldest first

Rank 0 looks for requests at the end of every round, and all ranks learn of them in the round's last collective. The
file of an applied request stays, with the round (`after`) and the epoch of the new membership, until a checkpoint
contains the change. So a job that is killed before that checkpoint repeats the change after the same round. The answer
to a request is in silos.json.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from fedmpi import disk
from fedmpi.errors import ConfigError

log = logging.getLogger("fedmpi")

FOLDER = "requests"
MOST_BYTES = 1 << 16
What = Literal["retire", "admit"]


@dataclass(frozen=True)
class Request:
    """A request to retire or admit one silo."""

    token: str  # the file's name without its suffix; tokens sort by time
    what: What
    silo: str
    path: str | None = None  # data file of a silo that the configuration does not name
    after: int = 0  # apply it once this many rounds are done
    epoch: int | None = None  # of the membership that it led to; None: still waiting


def put(root: Path, what: What, silo: str, path: Path | None = None) -> Request:
    """Write a request for the job that trains in `root`, and return it. Raises ConfigError if the write fails."""
    file = None if path is None else str(path.absolute())
    request = Request(f"{time.time_ns():020d}-{secrets.token_hex(4)}", what, silo, file)
    try:
        _write(root, request)
    except OSError as error:
        raise ConfigError(f"{root}: cannot ask there: {error.strerror or error}") from None
    return request


def withdraw(root: Path, request: Request) -> bool:
    """Delete a request. False if its file is gone or cannot be deleted."""
    try:
        _file(root, request.token).unlink()
    except OSError:
        return False
    return True


def there(root: Path) -> bool:
    """Whether `root` holds any request."""
    try:
        with os.scandir(root / FOLDER) as entries:
            return any(entry.name.endswith(".json") for entry in entries)
    except OSError:
        return False


def read(root: Path) -> Iterator[tuple[str, Request | str]]:
    """Yields (token, request), oldest first; for an unreadable or damaged file, a message replaces the request."""
    try:
        names = sorted(name for name in os.listdir(root / FOLDER) if name.endswith(".json"))
    except OSError:
        names = []
    for name in names:
        token = name.removesuffix(".json")
        try:
            yield token, _parsed(token, json.loads(disk.read_bytes(root / FOLDER / name, MOST_BYTES)))
        except FileNotFoundError:  # withdrawn meanwhile
            continue
        except OSError as error:
            yield token, f"the request {FOLDER}/{name} cannot be read: {error.strerror or error}"
        except (ValueError, TypeError, RecursionError):
            yield token, f"the request {FOLDER}/{name} is damaged; ask again"


def _parsed(token: str, values: Any) -> Request:
    request = Request(**{**values, "token": token})
    fine = request.what in get_args(What) and isinstance(request.silo, str) and type(request.after) is int
    if not fine or not isinstance(request.path, str | None) or type(request.epoch) not in (int, type(None)):
        raise ValueError
    return request


def _file(root: Path, token: str) -> Path:
    return root / FOLDER / f"{token}.json"


def _write(root: Path, request: Request) -> None:
    disk.replace_text(_file(root, request.token), json.dumps(asdict(request)))


class Desk:
    """Handles the requests of a run directory, on rank 0."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._answered: set[str] = set()  # tokens; also of files that cannot be deleted

    def begin(self, epoch: int) -> None:
        """Prepare a start whose checkpoint has the membership of this epoch. Deletes requests that the checkpoint
        contains; requests that were applied later wait again. Raises OSError if a file cannot be written."""
        if (self._root / FOLDER).is_dir():
            disk.remove_parts(self._root / FOLDER)
        for token, request in read(self._root):
            if isinstance(request, Request) and request.epoch is not None:
                if request.epoch <= epoch:
                    self.close(token)
                else:
                    _write(self._root, replace(request, epoch=None))

    def due(self, done: int) -> Iterator[tuple[str, Request | str]]:
        """Yields (token, request) for every request to apply after round `done`; for an unreadable or damaged file, a
        message replaces the request."""
        for token, one in read(self._root):
            waits = isinstance(one, str) or (one.epoch is None and one.after <= done)
            if waits and token not in self._answered:
                yield token, one

    def carried_out(self, request: Request, done: int, epoch: int) -> None:
        """Record that the request was applied after round `done` and led to the membership of this epoch."""
        self._answered.add(request.token)
        try:
            _write(self._root, replace(request, after=done, epoch=epoch))
        except OSError as error:
            log.warning("%s/%s cannot be written: %s", self._root, FOLDER, error.strerror or error)

    def sealed(self, done: int) -> None:
        """Delete the requests applied up to round `done`: a checkpoint contains them."""
        for token, one in read(self._root):
            if isinstance(one, Request) and one.epoch is not None and one.after <= done:
                self.close(token)

    def close(self, token: str) -> None:
        """Delete the request: it has its final answer."""
        self._answered.add(token)
        with contextlib.suppress(OSError):  # a folder, or no permission: `due` skips it from now on
            _file(self._root, token).unlink(missing_ok=True)
