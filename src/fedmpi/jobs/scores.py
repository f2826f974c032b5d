"""The silos' scores, as the server's job keeps them.

OUT/scores/ROUND.json    of rounds that no checkpoint holds yet: a start that computes them again takes these
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedmpi import disk
from fedmpi.errors import CheckpointError
from fedmpi.files.server import Server
from fedmpi.jobs.messages import read_row
from fedmpi.records import StatusTable, plain
from fedmpi.rounds import Federation


class Scores:
    """The scores of a run, in this folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._last: dict[str, tuple[int, dict[str, Any]]] = {}  # by silo: version, and what it told

    def read(self, number: int) -> dict[str, Any] | None:
        """What the silos told of a round; None if it is not here."""
        with contextlib.suppress(OSError, ValueError):
            found: dict[str, Any] = json.loads((self._folder / f"{number}.json").read_text())
            return found
        return None

    def write(self, number: int, told: Mapping[str, Any]) -> None:
        """Keep what the silos told of a round. Raises CheckpointError."""
        path = self._folder / f"{number}.json"
        try:
            disk.replace_text(path, json.dumps(told))
        except OSError as error:
            why = error.strerror or error
            raise CheckpointError(f"cannot write {path}: {why}; make room and start all jobs again") from None

    def forget(self, written: int) -> None:
        """Remove the scores of rounds that a checkpoint holds."""
        for path in self._folder.glob("*.json") if self._folder.is_dir() else ():
            if int(path.stem) <= written:
                path.unlink(missing_ok=True)

    def last(self, fed: Federation, files: Server) -> dict[str, Any]:
        """The pooled figures of the silos' last scores, with their versions."""
        board = StatusTable(1, (), len(fed.ids), fed.scores.columns, fed.scores.num_counts)
        versions: dict[str, int] = {}
        for silo, version, by in sorted(files.silo_files("score"), key=lambda one: one[1]):
            if silo in fed.index and (content := files.read_silo("score", silo, version, by)) is not None:
                self._last[silo] = (version, content.head)
        for silo, (version, head) in self._last.items():
            versions[silo] = version
            board.set_silo(fed.index[silo], **read_row(head["row"]))
            board.counts[:] += np.array(head["counts"])
        figures = fed.scores.figures(board, fed.ids)[1]
        shown = {name: plain(figures[name]) for name in ("loss", fed.objective.metric_name) if name in figures}
        return {"scored": {"versions": versions, **shown}} if versions else {}
