"""What somebody asks of a run's members while it trains: `fedmpi retire` and `fedmpi admit`.

    DIR/requests/TOKEN.json   one request each, whole or not at all; the oldest first

Rank 0 looks for them at the end of every round, and all ranks learn of it in the round's last collective. A request
that is carried out stays until a checkpoint has what came of it, with the round (`after`) and the epoch of the
membership: a job that is killed before does the same again, after the same round. What became of it stands in
silos.json.
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
    """One request."""

    token: str  # the file's name without its ending; sorts by time
    what: What
    silo: str
    path: str | None = None  # the file of a silo that the configuration does not name
    after: int = 0  # rounds that have to be done
    epoch: int | None = None  # of the membership that came of it; None: it waits


def put(root: Path, what: What, silo: str, path: Path | None = None) -> Request:
    """Ask the job that trains in `root`. ConfigError where nothing can be written there."""
    file = None if path is None else str(path.absolute())
    request = Request(f"{time.time_ns():020d}-{secrets.token_hex(4)}", what, silo, file)
    try:
        _write(root, request)
    except OSError as error:
        raise ConfigError(f"{root}: cannot ask there: {error.strerror or error}") from None
    return request


def withdraw(root: Path, request: Request) -> bool:
    """Take a request back. Was it still there?"""
    try:
        _file(root, request.token).unlink()
    except OSError:
        return False
    return True


def there(root: Path) -> bool:
    """Is there any request?"""
    try:
        with os.scandir(root / FOLDER) as entries:
            return any(entry.name.endswith(".json") for entry in entries)
    except OSError:
        return False


def read(root: Path) -> Iterator[tuple[str, Request | str]]:
    """The token of every request, oldest first, and the request; or what is wrong with its file."""
    try:
        names = sorted(name for name in os.listdir(root / FOLDER) if name.endswith(".json"))
    except OSError:
        names = []
    for name in names:
        token = name.removesuffix(".json")
        try:
            yield token, _parsed(token, json.loads(disk.read_bytes(root / FOLDER / name, MOST_BYTES)))
        except FileNotFoundError:  # it was withdrawn meanwhile
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
    """Rank 0's: the requests of its run directory."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._answered: set[str] = set()  # also those whose file cannot be removed

    def begin(self, epoch: int) -> None:
        """A start goes on with members of this epoch: its checkpoint has what was carried out until then, and what was
        carried out later is done again. OSError where that cannot be written down."""
        if (self._root / FOLDER).is_dir():
            disk.remove_parts(self._root / FOLDER)
        for token, request in read(self._root):
            if isinstance(request, Request) and request.epoch is not None:
                if request.epoch <= epoch:
                    self.close(token)
                else:
                    _write(self._root, replace(request, epoch=None))

    def due(self, done: int) -> Iterator[tuple[str, Request | str]]:
        """The token of every request that is to be carried out after round `done`, and the request; or what is wrong
        with its file."""
        for token, one in read(self._root):
            waits = isinstance(one, str) or (one.epoch is None and one.after <= done)
            if waits and token not in self._answered:
                yield token, one

    def carried_out(self, request: Request, done: int, epoch: int) -> None:
        """After round `done` it came to the members of this epoch."""
        self._answered.add(request.token)
        try:
            _write(self._root, replace(request, after=done, epoch=epoch))
        except OSError as error:
            log.warning("%s/%s cannot be written: %s", self._root, FOLDER, error.strerror or error)

    def sealed(self, done: int) -> None:
        """A checkpoint has what was carried out up to round `done`."""
        for token, one in read(self._root):
            if isinstance(one, Request) and one.epoch is not None and one.after <= done:
                self.close(token)

    def close(self, token: str) -> None:
        """It is answered for good."""
        self._answered.add(token)
        with contextlib.suppress(OSError):  # a folder in its place, or no right to: it is not looked at again
            _file(self._root, token).unlink(missing_ok=True)
