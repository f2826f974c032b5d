"""The jobs of a federation with `transport: files`, from their heart beats in the shared folder. Only reads there.

A job is alive if its beat changes. At the first look nothing has changed yet: then the age of its file decides.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedmpi.errors import FolderError
from fedmpi.files import names
from fedmpi.files.beats import Leases, Pulse
from fedmpi.files.folder import Disk
from fedmpi.files.line import NEVER, newest
from fedmpi.records.pace import span

SERVER = "server"
PATIENCE_S = 1.0  # of reading a folder that is away


class Jobs:
    """What the jobs of a run do; call `look` every now and then."""

    def __init__(self, root: str, lease_s: float) -> None:
        self._folder = Disk(Path(root), patience_s=PATIENCE_S)
        self._leases = Leases(self._folder, lease_s)
        self._first: dict[str, tuple[int, int]] = {}  # by silo: the beat that was seen first

    def look(self, silos: Sequence[str]) -> dict[str, str]:
        """In words what the server's job and the job of each silo do, those first that may need somebody. Empty if the
        folder cannot be read from here."""
        try:
            self._leases.look()
            updates = [names.parsed(name) for name in self._folder.listing(names.OF_SILOS[names.UPDATE])]
            commit = newest(self._folder)
        except (OSError, FolderError):
            return {}
        last = {} if commit is None else commit.last
        told = {SERVER: self._state(names.SERVER), **{silo: self._state(silo) for silo in silos}}
        for silo, (number, *_) in dict(filter(None, updates)).items():  # sorted: the last one of each silo
            if silo in told and number > last.get(silo, NEVER).number:
                told[silo] += f", update {number:,} waits for the server"
        return dict(sorted(told.items(), key=lambda one: (one[0] != SERVER, _needs(one[1]))))

    def _state(self, who: str) -> str:
        pulse = self._leases.pulses.get(who)
        if pulse is None:
            return "not started"
        if pulse.ended:
            return "ended"
        moved = self._first.setdefault(who, (pulse.by, pulse.count)) != (pulse.by, pulse.count)
        silent_s = self._folder.now() - pulse.changed_s
        if not moved:
            silent_s = max(silent_s, self._age_s(who, pulse))
        return "alive" if silent_s <= self._leases.lease_s else f"silent for {span(silent_s)}"

    def _age_s(self, who: str, pulse: Pulse) -> float:
        """Seconds since the beat's file was written, by the clock of the file's server."""
        try:
            return time.time() - os.stat(self._folder.path / names.path(names.BEATS, who, pulse.by)).st_mtime
        except OSError:  # a newer one has replaced it
            return 0.0


def _needs(state: str) -> int:
    """The order in which states are shown."""
    return next((i for i, word in enumerate(("silent", "not started", "ended")) if state.startswith(word)), 3)


def jobs_of(config: dict[str, Any]) -> Jobs | None:
    """The jobs that a configuration's shared folder tells of; None if silos are ranks."""
    transport = config.get("transport")
    if not isinstance(transport, dict) or transport.get("name") != "files":
        return None
    return Jobs(str(transport.get("root")), float(transport.get("lease_s") or 60.0))
