"""The family of sinks, and the sinks of a run."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from fedmpi.components import Family
from fedmpi.errors import CheckpointError, in_one_line
from fedmpi.records.callbacks import Callback
from fedmpi.records.metrics import Metrics
from fedmpi.records.mlflow import MLflow
from fedmpi.records.record import TIME, Record, now
from fedmpi.records.sink import RunInfo, Sink
from fedmpi.records.tensorboard import TensorBoard
from fedmpi.records.trace import Trace
from fedmpi.records.wandb import WandB

log = logging.getLogger("fedmpi")

SINKS = Family(
    "sink", {"trace": Trace, "tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB}, Sink, deferred=True
)


class Sinks:
    """The sinks of a run, on rank 0. A failed write does not end training: lines of metrics.jsonl wait for the next
    checkpoint, which fails if they still cannot be written; other sinks are dropped."""

    def __init__(self, run: RunInfo, others: Sequence[Sink] = ()) -> None:
        self._run = run
        self._metrics = Metrics()
        self._metrics.open(run)
        self._others: list[Sink] = []
        try:
            for sink in others:
                self.add(sink)
        except BaseException:
            self.close()
            raise

    def add(self, sink: Sink) -> None:
        """Add a sink, which gets records from now on. Raises what its `open` raises."""
        sink.open(self._run)
        self._others.append(sink)

    def write(self, record: Record) -> None:
        """Give a round's record to all sinks, with its `time`, which no other rank knows. Raises nothing."""
        record = {**record, TIME: now()}
        self._metrics.write(record)
        for sink in list(self._others):
            try:
                sink.write(record)
            except (Exception, SystemExit) as error:
                name = type(sink).__name__
                if isinstance(sink, Callback):
                    told = f"callback '{sink.name}' raised {in_one_line(error)}"
                    log.warning("%s in round %d; it is called no more, and training goes on", told, record["round"])
                elif isinstance(error, OSError):
                    log.warning("%s cannot be written (%s); it gets no more records", name, error.strerror or error)
                else:
                    log.warning("%s raised %s: %s; it gets no more records", name, type(error).__name__, error)
                self._end(sink)

    def sync(self) -> None:
        """Write the records so far to disk. Raises CheckpointError if that fails."""
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
            log.warning("%s raised %s: %s when it was closed", type(sink).__name__, type(error).__name__, error)
