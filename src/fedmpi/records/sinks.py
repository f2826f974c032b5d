"""The sinks that there are, and those of a run."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from fedmpi.components import Family
from fedmpi.errors import CheckpointError
from fedmpi.records.metrics import Metrics
from fedmpi.records.record import Record
from fedmpi.records.sink import RunInfo, Sink
from fedmpi.records.tensorboard import TensorBoard
from fedmpi.records.trace import Trace

log = logging.getLogger("fedmpi")

SINKS = Family("sink", {"trace": Trace, "tensorboard": TensorBoard}, Sink, deferred=True)


class Sinks:
    """What rank 0 writes round by round. None of it ends training where it cannot be written: records wait for the next
    checkpoint, which fails without them; other sinks end there."""

    def __init__(self, run: RunInfo, others: Sequence[Sink] = ()) -> None:
        self._run = run
        self._metrics = Metrics()
        self._metrics.open(run)
        self._others: list[Sink] = []
        for sink in others:
            self.add(sink)

    def add(self, sink: Sink) -> None:
        """One more, which gets the records from now on."""
        sink.open(self._run)
        self._others.append(sink)

    def write(self, record: Record) -> None:
        """A round's."""
        self._metrics.write(record)
        for sink in list(self._others):
            try:
                sink.write(record)
            except Exception as error:
                name = type(sink).__name__
                if isinstance(error, OSError):
                    log.warning("%s cannot be written (%s) and ends here", name, error.strerror or error)
                else:
                    log.warning("%s raised %s: %s, and ends here", name, type(error).__name__, error)
                self._end(sink)

    def sync(self) -> None:
        """The records so far are on disk. Raises CheckpointError where they cannot be."""
        try:
            self._metrics.sync()
        except OSError as error:
            raise CheckpointError(f"cannot write {self._metrics.path}: {error.strerror}") from None

    def close(self) -> None:
        self._metrics.close()
        for sink in list(self._others):
            self._end(sink)

    def _end(self, sink: Sink) -> None:
        self._others.remove(sink)
        try:
            sink.close()
        except OSError:
            pass
        except Exception as error:
            log.warning("%s raised %s: %s, when it was closed", type(sink).__name__, type(error).__name__, error)
