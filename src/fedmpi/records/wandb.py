"""The Weights & Biases sink."""

from __future__ import annotations

import secrets
from typing import Any, Literal

from fedmpi.errors import ConfigError
from fedmpi.records.record import Record
from fedmpi.records.sink import RunInfo, Tracker, scalars


class WandB(Tracker):
    """Numbers of every record in one Weights & Biases run (package wandb, extra `wandb`).

    `mode`: offline, the default, writes below OUT/wandb, for `wandb sync` at a time of your choice; online sends at
    once. Neither code nor output is sent. `project`, and `name` of the run; the default is that of the run directory.
    """

    file = "wandb.json"

    def __init__(self, project: str = "fedmpi", name: str = "", mode: Literal["offline", "online"] = "offline") -> None:
        if mode not in ("offline", "online"):
            raise ConfigError(f"records.sinks: wandb: mode '{mode}' is neither offline nor online")
        self._project, self._name, self._mode = project, name, mode

    def require(self) -> None:
        try:
            import wandb  # noqa: F401
        except ImportError as error:
            raise ConfigError(f"records.sinks: wandb needs the package wandb (fedmpi[wandb]): {error}") from None

    def begin(self, run: RunInfo, before: str) -> str:
        import wandb

        id = before or secrets.token_hex(8)
        settings: Any = wandb.Settings(console="off", disable_git=True, disable_code=True)
        self._run: Any = wandb.init(
            project=self._project,
            name=self._name or run.root.name,
            id=id,
            resume="allow",
            mode=self._mode,
            dir=str(run.root),
            settings=settings,
        )
        return id

    def tell(self, record: Record) -> None:
        self._run.log(scalars(record), step=record["round"])

    def end(self) -> None:
        self._run.finish()
