"""Who is alive: heart beats, and leases that their readers keep.

A beat is a counter in a file that its owner replaces. A lease is the time on the READER's monotonic clock since it last
saw the counter change. Times of different hosts, and times of files, are never compared.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedmpi.files import names
from fedmpi.files.envelope import Torn, packed, unpacked
from fedmpi.files.folder import Folder


class Heart:
    """Beats for one owner of a claim: `who` is a silo's id or names.SERVER. `beside` and `fence` as in
    Folder.publish."""

    def __init__(
        self,
        folder: Folder,
        run: str,
        who: str,
        number: int,
        beside: str = "",
        fence: Callable[[], None] | None = None,
    ) -> None:
        self._folder, self._path = folder, names.path(names.BEATS, who, number)
        self._beside, self._fence = beside, fence
        self._head = {"kind": "beat", "run": run, "who": who, "by": number}
        self._count = 0
        self._lock = threading.Lock()

    def beat(self, about: Mapping[str, Any], ended: bool = False) -> None:
        """One beat; tells `about`, a small JSON object, and whether it is the last. Raises FolderError. Several threads
        may call it; the last call's beat stays."""
        with self._lock:
            self._count += 1
            parts, _ = packed(self._head | {"count": self._count, "ended": ended, "about": dict(about)})
            self._folder.publish(self._path, parts, self._beside, self._fence)


@dataclass
class Pulse:
    """The last beat that was seen of someone."""

    by: int  # number of the owner's claim
    count: int
    changed_s: float  # the reader's clock when the beat was first seen
    ended: bool
    about: dict[str, Any] = field(default_factory=dict)


class Leases:
    """What this process has seen of others' beats. Someone is alive for `lease_s` seconds after its beat changed,
    unless it said that it ended. A name seen for the first time counts as changed."""

    def __init__(self, folder: Folder, lease_s: float) -> None:
        self._folder, self.lease_s = folder, lease_s
        self.pulses: dict[str, Pulse] = {}

    def look(self, *only: str) -> None:
        """Read the beats of all, or of some. Operations: a listing, and a read for each."""
        newest: dict[str, int] = {}
        for name in self._folder.listed(names.BEATS):
            match names.parsed(name):
                case (who, (by,)) if not only or who in only:
                    newest[who] = max(by, newest.get(who, 0))
        for who, by in newest.items():
            try:
                head = unpacked(self._folder.read(names.path(names.BEATS, who, by)), kind="beat", who=who, by=by).head
            except (OSError, Torn):
                continue  # seen at the next look
            last = self.pulses.get(who)
            if last is None or (by, head["count"]) > (last.by, last.count):
                self.pulses[who] = Pulse(by, head["count"], self._folder.now(), head["ended"], head["about"])

    def alive(self, who: str) -> bool:
        """Whether its last beat is younger than the lease, as far as `look` has seen."""
        pulse = self.pulses.get(who)
        return pulse is not None and not pulse.ended and self._folder.now() - pulse.changed_s <= self.lease_s

    @property
    def present(self) -> set[str]:
        """All who are alive, without the server."""
        return {who for who in self.pulses if who != names.SERVER and self.alive(who)}
