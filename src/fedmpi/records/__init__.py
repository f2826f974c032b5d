"""What a run says of itself.

record        a record: what a round says of itself, the same on every rank
table         numbers that every rank fills in its part of, shared in one small collective
timer         phases of a round
measurements  what is made of an outcome for the record alone: diversity, dissimilarity
sink          what a sink is: where records go, on rank 0
metrics       metrics.jsonl, which is always written
trace         trace.json, for Perfetto
tensorboard   events
terminal      progress and the last table
sinks         the family, and all sinks of a run
"""

from fedmpi.records.measurements import MEASUREMENTS, Measurement
from fedmpi.records.metrics import read_metrics
from fedmpi.records.record import SCHEMA, Record, plain
from fedmpi.records.sink import RunInfo, Sink
from fedmpi.records.sinks import SINKS, Sinks
from fedmpi.records.table import StatusTable
from fedmpi.records.timer import PHASES, Timer, peak_rss_bytes

__all__ = [
    "MEASUREMENTS",
    "PHASES",
    "SCHEMA",
    "SINKS",
    "Measurement",
    "Record",
    "RunInfo",
    "Sink",
    "Sinks",
    "StatusTable",
    "Timer",
    "peak_rss_bytes",
    "plain",
    "read_metrics",
]
