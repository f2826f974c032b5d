"""The command line. Only `train`, `eval`, `bench`, a grid of `compare`, and `check` and `doctor` under a launcher start
MPI; the rest works on a login node."""

from fedmpi.cli import training, planning, batch, members, results, bench, data  # noqa: F401, I001 - the order of --help
from fedmpi.cli.command import app

__all__ = ["app"]
