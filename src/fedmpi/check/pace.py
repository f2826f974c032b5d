"""How long a round will take, from a few timed batches, and how much memory a rank will need.

The timed batches are those of the local rule itself, on a copy of the model: a rule that computes two gradients a step
takes twice as long here as well.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fedmpi.assembly import build_module
from fedmpi.check.findings import Findings
from fedmpi.check.trying import batch_of
from fedmpi.comm import Comm
from fedmpi.config import Config
from fedmpi.errors import FedmpiError, in_one_line
from fedmpi.flat import Entry, FlatModel, layout_of
from fedmpi.local import GradientRule, LocalRule, LocalSilo, Round
from fedmpi.objectives import LossAndMetrics
from fedmpi.types import SiloData, Source

ENOUGH_S, BATCHES = 0.5, 20  # timed training ends after so many seconds and batches; the first batch warms up
LIMIT_S = 3.0  # or after so many seconds
SENT = 4 << 20  # most elements of the timed sum over ranks


class _Enough(Exception):
    """Ends the timed training."""


@dataclass(frozen=True)
class Pace:
    """Seconds of work on this rank."""

    batch_s: float  # a training batch
    test_s: float  # the evaluation of one test sample
    timed: int  # batches that were timed


def measure(
    config: Config, source: Source, objective: LossAndMetrics, module: torch.nn.Module, entries: Sequence[Entry],
    data: Mapping[str, SiloData], device: torch.device, found: Findings,
) -> Pace | None:  # fmt: skip
    """Times a few batches of the largest silo of this rank; None if it has none. Notes a training that explodes."""
    if not data:
        return None
    silo = max(data, key=lambda name: len(data[name].x_train))
    samples = data[silo]
    try:
        own = copy.deepcopy(module)
    except Exception:  # modules may hold things that cannot be copied
        own = build_module(config, source)
    try:
        model = FlatModel(own, config.exchange.parameters, device, None, layout_of(entries, config.local.auxiliaries))
        stamps, loss = _train(config, objective, model, LocalSilo(silo, samples, 1.0))
    except FedmpiError as error:
        found.fault(str(error))
        return None
    except Exception as error:
        found.fault(f"local: training of silo '{silo}' raises {in_one_line(error)}")
        return None
    if loss is not None and not math.isfinite(loss):
        found.warn(f"local: after {len(stamps) - 1} batches the loss of silo '{silo}' is {loss}; lower local.lr")
    gaps = [after - before for before, after in itertools.pairwise(stamps)]
    batch_s = statistics.fmean(gaps[1:] or gaps)  # not the median: on a busy machine the slow ones count
    x, y = samples.x_test[: config.evaluate.batch_size], samples.y_test[: config.evaluate.batch_size]
    began_s = time.perf_counter()
    objective.score(model.module, x, y, config.evaluate.batch_size, device)
    test_s = (time.perf_counter() - began_s) / len(x) if len(x) else 0.0
    return Pace(batch_s, test_s, len(gaps))


def _train(
    config: Config, objective: LossAndMetrics, model: FlatModel, silo: LocalSilo
) -> tuple[list[float], float | None]:
    """When each of the first batches began, and the end of the last one; the mean loss if the training came to its
    end."""
    stamps: list[float] = []

    def check() -> None:
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        stamps.append(time.perf_counter())
        took_s = stamps[-1] - stamps[0]
        if (len(stamps) > BATCHES and took_s > ENOUGH_S) or took_s > LIMIT_S:
            raise _Enough

    params_P = model.params().clone()
    zeros = {one.name: torch.zeros_like(params_P) for one in config.local.auxiliaries}
    criterion = objective.criterion(silo.data.y_train)
    round = Round(1, config.rounds, config.seed, criterion.loss, check, zeros, criterion.count)
    loss: float | None = None
    began_s = time.perf_counter()
    try:
        loss = config.rule.train(silo, model, params_P, round).loss
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        stamps.append(time.perf_counter())
    except _Enough:
        finite = bool(torch.isfinite(model.params()).all())
        loss = None if finite else math.nan
    if len(stamps) == 1:  # a rule that never calls `check`
        stamps.insert(0, began_s)
    return stamps, loss


def num_batches(rule: LocalRule, num_samples: int) -> int:
    """Batches of a silo's round."""
    if isinstance(rule, GradientRule):
        return rule.num_batches(0, num_samples) * (2 if rule.is_personal else 1)
    return math.ceil(num_samples / max(batch_of(rule, num_samples), 1))


def exchange_s(comm: Comm, num_elements: int) -> float:
    """Seconds of a plain sum of so many float32 over all ranks, scaled up from at most SENT of them. Collective."""
    if comm.size == 1 or num_elements == 0:
        return 0.0
    num = min(num_elements, SENT)
    send, recv = (comm.allocate(num, torch.float32) for _ in range(2))
    taken = []
    for _ in range(3):
        comm.barrier()
        began_s = time.perf_counter()
        comm.allreduce(send, recv)
        taken.append(time.perf_counter() - began_s)
    slowest = float(comm.gather_number(min(taken)).max())
    return slowest * num_elements / num


def memory_limit() -> int:
    """Bytes of memory that the processes of this host may use: its memory, or less under a cgroup; 0 if unknown."""
    limits = []
    with contextlib.suppress(ValueError, OSError):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no such cgroup, or "max"
            limits.append(int((Path("/sys/fs/cgroup") / name).read_text()))
    return min(limits, default=0)


def duration(seconds: float) -> str:
    """Seconds as text.

    >>> duration(0.0123), duration(75), duration(7300), duration(200_000)
    ('0.012 s', '1 min 15 s', '2 h 1 min', '2 d 7 h')
    """
    if seconds < 60:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    for unit, below, name, lower in ((86400, 3600, "d", "h"), (3600, 60, "h", "min"), (60, 1, "min", "s")):
        if whole >= unit:
            return f"{whole // unit} {name} {whole % unit // below} {lower}"
    return ""
