"""What `train` looks at when a run is set up, besides data and model: the metric that ends it, masks, the account of
privacy, outputs, the shared folder of silos in jobs of their own."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fedmpi import checkpoint, evaluate
from fedmpi.assembly import can_mask, weights_of
from fedmpi.check.findings import Findings, at_first
from fedmpi.comm import Comm, SoloComm
from fedmpi.config import Config
from fedmpi.errors import CheckpointError, ConfigError
from fedmpi.files.folder import Disk
from fedmpi.files.names import EPOCHS, LINE, RUN, quoted
from fedmpi.files.root import compare, probe
from fedmpi.health import Progress
from fedmpi.jobs.post import about_run
from fedmpi.objectives import LossAndMetrics
from fedmpi.plan import budget
from fedmpi.privacy import Spending, prepare
from fedmpi.transports import ByFiles
from fedmpi.types import Source


def stops(config: Config, objective: LossAndMetrics, layers: bool, tested: bool, found: Findings) -> None:
    """Notes a metric of `stop.early` that no record has. `layers`: whether silos have some of their own; `tested`:
    whether one has test data."""
    scores = evaluate.Scores.of(objective, config.local, config.evaluate.finetune, layers)
    found.attempt(lambda: Progress.of(config, objective.metric_name, scores.better, tested), "stop.early")


def masks(config: Config, ids: Sequence[str], num_tested: int, device: torch.device, found: Findings) -> None:
    """Notes why masks cannot be made, or what they would not hide."""
    if config.secure is not None:
        found.attempt(lambda: can_mask(config, ids, num_tested, device), "secure")


def account(
    config: Config, source: Source, num_train: Mapping[str, int], comm: Comm, found: Findings
) -> dict[str, Any] | None:
    """What the run would spend; None without `privacy`, or if it is not known. Notes an account that does not hold for
    the data, has no noise for its target, or has lost something. Collective. `num_train`: of the silos that were
    opened."""
    section, root = config.privacy, Path(config.out)
    if section is None:
        return None
    spending = Spending.of(section, root, config.seed)
    at_first(comm, found, lambda first: first.attempt(lambda: _reads(spending, root), "privacy"))
    takes = Findings()
    takes.attempt(lambda: section.takes(source), "privacy")
    for text in takes.faults:
        found.fault(text)
    if takes.faults:
        return None
    if left := [silo.id for silo in source.silos if silo.id not in num_train]:
        found.skip(f"the account of privacy: the size of silo '{left[0]}' is not known here")
        return None
    sizes = {silo.id: num_train[silo.id] for silo in source.silos}

    def fitted() -> dict[str, Any]:
        weights = weights_of(config, list(sizes), list(sizes.values()))
        prepare(config, Spending.of(section, root, config.seed), sizes, weights, SoloComm())
        return budget(config, section, source, sizes)

    return found.attempt(fitted, "privacy")


def _reads(spending: Spending, root: Path) -> None:
    """Reads what earlier starts have spent, as `train` does. Raises ConfigError."""
    spending.open(SoloComm())
    with contextlib.suppress(CheckpointError):  # a damaged checkpoint is noted elsewhere
        for round in checkpoint.sealed_rounds(root)[-1:]:
            spending.restore(
                [one for one in checkpoint.read_state(root, round) if one.key[-2:] == ("privacy", "count")]
            )


def outputs(config: Config, comm: Comm, found: Findings) -> None:
    """Notes sinks of records that cannot be made or lack a package. Collective; rank 0 has them."""

    def look(first: Findings) -> None:
        for sink in first.attempt(config.records.open_sinks, "records.sinks") or ():
            first.attempt(sink.require, "records.sinks")

    at_first(comm, found, look)


def shared_folder(config: Config, ids: Sequence[str], comm: Comm, found: Findings) -> None:
    """Notes what is wrong with the folder of `transport: files`: another run's, no hard links, no rights. Collective;
    rank 0 looks, and leaves nothing there."""
    transport = config.transport
    if not isinstance(transport, ByFiles):
        return
    for silo in ids:
        found.attempt(lambda: quoted(silo), "transport")  # noqa: B023
    found.attempt(lambda: transport.suits(len(ids)), "transport")

    def look(first: Findings) -> None:
        first.attempt(lambda: _looked_into(config, Path(transport.root)), "transport.root")

    at_first(comm, found, look)


def _looked_into(config: Config, root: Path) -> None:
    """Raises ConfigError if the folder cannot hold this run."""
    compare(Disk(root, 1.0), about_run(config))
    inside = root / f"{RUN}.check-{os.getpid()}"  # a name that a starting server does not mind
    try:
        for name in (EPOCHS, LINE):
            (inside / name).mkdir(parents=True)
        probe(Disk(inside, 1.0))
    except OSError as error:
        raise ConfigError(f"transport.root: cannot write into {root}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(inside, ignore_errors=True)
