"""The TensorBoard sink."""

from __future__ import annotations

from typing import Any

from fedmpi.errors import ConfigError
from fedmpi.records.record import Record
from fedmpi.records.sink import RunInfo, Sink, scalars


class TensorBoard(Sink):
    """Scalars of every record as TensorBoard events under DIR/tensorboard (package tensorboard, extra `report`)."""

    def require(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # noqa: F401
        except ImportError:
            raise ConfigError("records.tensorboard: needs the package tensorboard (fedmpi[report])") from None

    def open(self, run: RunInfo) -> None:
        self.require()
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run.root / "tensorboard"))  # type: ignore[no-untyped-call]

    def write(self, record: Record) -> None:
        """Write every number of the record as a scalar."""
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record["round"])

    def close(self) -> None:
        self._writer.close()
