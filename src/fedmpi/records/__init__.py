"""Records of rounds and where they are written.

record        the record of a round, equal on every rank
table         a table of small numbers, filled in by every rank and shared in one small collective
clock         one clock for the times of all ranks
timer         the phases of a round
measurements  extra figures of a round for its record: diversity, dissimilarity
sink          the base class of sinks, which write records on rank 0
metrics       metrics.jsonl, always written
trace         trace.json, for Perfetto
tensorboard   TensorBoard events
mlflow        metrics of an MLflow run
wandb         a Weights & Biases run
pace          how long the remaining rounds take
terminal      progress for people and programs, and the final table
callbacks     users' functions that are called with every record
sinks         the family, and the sinks of a run
"""

from fedmpi.records.callbacks import CALLBACKS, Callback
from fedmpi.records.measurements import MEASUREMENTS, Measurement
from fedmpi.records.metrics import read_metrics
from fedmpi.records.record import SCHEMA, Record, plain
from fedmpi.records.sink import RunInfo, Sink
from fedmpi.records.sinks import SINKS, Sinks
from fedmpi.records.table import StatusTable
from fedmpi.records.timer import PHASES, Timer, peak_rss_bytes

__all__ = [
    "CALLBACKS",
    "MEASUREMENTS",
    "PHASES",
    "SCHEMA",
    "SINKS",
    "Callback",
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
