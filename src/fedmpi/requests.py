"""Requests to change the members of a running job: `fedmpi retire` and `fedmpi admit`.

    DIR/requests/TOKEN.json        one request per file, written atomically; handled oldest first
    DIR/requests/done/TOKEN.json   applied, and in a checkpoint

Rank 0 looks for requests at the end of every round, and all ranks learn of them in the round's last collective. The
file of an applied request stays, with the round (`after`) and the epoch of the new membership, until every checkpoint
on disk contains the change; once one does, it lies in `done`. So a job that is killed before that checkpoint, or finds
it damaged and resumes from an older one, repeats the change after the same round. The answer to a request is in
silos.json.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from fedmpi import disk
from fedmpi.errors import ConfigError

log = logging.getLogger("fedmpi")

FOLDER = "requests"
DONE = f"{FOLDER}/done"
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


def read(root: Path, folder: str = FOLDER) -> Iterator[tuple[str, Request | str]]:
    """Yields (token, request), oldest first; for an unreadable or damaged file, a message replaces the request."""
    try:
        names = sorted(name for name in os.listdir(root / folder) if name.endswith(".json"))
    except OSError:
        names = []
    for name in names:
        token = name.removesuffix(".json")
        try:
            yield token, _parsed(token, json.loads(disk.read_bytes(root / folder / name, MOST_BYTES)))
        except FileNotFoundError:  # withdrawn meanwhile
            continue
        except OSError as error:
            yield token, f"the request {folder}/{name} cannot be read: {error.strerror or error}"
        except (ValueError, TypeError, RecursionError):
            yield token, f"the request {folder}/{name} is damaged; ask again"


def _parsed(token: str, values: Any) -> Request:
    request = Request(**{**values, "token": token})
    fine = request.what in get_args(What) and isinstance(request.silo, str) and type(request.after) is int
    if not fine or not isinstance(request.path, str | None) or type(request.epoch) not in (int, type(None)):
        raise ValueError
    return request


def _file(root: Path, token: str, folder: str = FOLDER) -> Path:
    return root / folder / f"{token}.json"


def _write(root: Path, request: Request) -> None:
    disk.replace_text(_file(root, request.token), json.dumps(asdict(request)))


class Desk:
    """Handles the requests of a run directory, on rank 0."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._answered: set[str] = set()  # tokens; also of files that cannot be deleted

    def begin(self, epoch: int, left: Collection[str] = ()) -> list[Request]:
        """Prepare a start from a checkpoint of this epoch (-1: from none). Requests that were applied later wait again,
        and are returned; those about silos that `left` for good are deleted. Raises OSError if a file cannot be
        written."""
        for folder in (FOLDER, DONE):
            if (self._root / folder).is_dir():
                disk.remove_parts(self._root / folder)
        again = []
        for folder in (FOLDER, DONE):
            for token, request in [*read(self._root, folder)]:
                if not isinstance(request, Request) or request.epoch is None:
                    continue
                if request.epoch <= epoch:
                    if folder == FOLDER:
                        self._set_aside(token)
                elif request.silo in left:
                    self.close(token, folder)
                else:
                    again.append(replace(request, epoch=None))
                    _write(self._root, again[-1])
                    self._delete(token, DONE)
        return again

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
        """Set aside the requests applied up to round `done`: a checkpoint contains them."""
        for token, one in [*read(self._root)]:
            if isinstance(one, Request) and one.epoch is not None and one.after <= done:
                self._set_aside(token)

    def forget(self, oldest: Callable[[], int]) -> None:
        """Delete the requests that every checkpoint contains; `oldest` returns the lowest epoch of a checkpoint."""
        done = [one for _, one in read(self._root, DONE) if isinstance(one, Request) and one.epoch is not None]
        epoch = oldest() if done else -1
        for one in done:
            if one.epoch is not None and one.epoch <= epoch:
                self.close(one.token, DONE)

    def close(self, token: str, folder: str = FOLDER) -> None:
        """Delete the request: it has its final answer."""
        self._answered.add(token)
        self._delete(token, folder)

    def _set_aside(self, token: str) -> None:
        self._answered.add(token)
        with contextlib.suppress(OSError):  # it stays where it is, and is tried again
            disk.make_folder(self._root / DONE)
            _file(self._root, token).replace(_file(self._root, token, DONE))

    def _delete(self, token: str, folder: str) -> None:
        with contextlib.suppress(OSError):  # a folder, or no permission: `due` skips it from now on
            _file(self._root, token, folder).unlink(missing_ok=True)
