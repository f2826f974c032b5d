"""Federated training on high-performance machines.

    import fedmpi

    with fedmpi.Run("configs/digits.yaml", "rounds=5") as run:  # under mpirun, srun or alone
        for record in run:
            print(record["round"], record["accuracy"])

Importing fedmpi starts no MPI and loads nothing heavy: names are looked up when they are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_HOMES = {
    "Config": "config",
    "load": "config",
    "Run": "train",
    "FedmpiError": "errors",
    "ConfigError": "errors",
    "Stopped": "errors",
}

__all__ = ["Config", "ConfigError", "FedmpiError", "Run", "Stopped", "__version__", "load"]

if TYPE_CHECKING:
    from fedmpi.config import Config, load
    from fedmpi.errors import ConfigError, FedmpiError, Stopped
    from fedmpi.train import Run


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from fedmpi.loading import uncollected

        with uncollected():
            return getattr(importlib.import_module(f"fedmpi.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'fedmpi' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
