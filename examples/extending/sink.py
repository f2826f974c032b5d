"""A sink: a CSV file with a line per round.

The base is `Sink` in fedmpi/records/sink.py; sinks run on rank 0 only. Options are the constructor's arguments. If a
sink raises, it is dropped with a warning and training goes on.

    records: {sinks: [{name: "examples.extending.sink:Csv", fields: [round, train_loss, accuracy]}]}
"""

import csv

from fedmpi.records import Sink


class Csv(Sink):
    """Figures of all silos, in OUT/`file`."""

    def __init__(self, fields=("round", "train_loss", "loss"), file="figures.csv"):
        self.fields, self.file = list(fields), file

    def open(self, run):
        new = run.resumed == 0
        self._stream = (run.root / self.file).open("w" if new else "a", newline="")
        self._writer = csv.DictWriter(self._stream, self.fields, extrasaction="ignore")
        if new:
            self._writer.writeheader()

    def write(self, record):
        self._writer.writerow(record)
        self._stream.flush()

    def close(self):
        self._stream.close()
