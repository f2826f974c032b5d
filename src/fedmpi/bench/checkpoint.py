"""The cost of checkpoints: the share of time that rounds wait for them.

    waited   seconds that rounds waited for checkpoints / seconds that rounds took
    ratio    median time of rounds while a checkpoint is being written / median of the others
    write_s  rank 0 writes the parameters once more, with fsync, and nothing else runs
    resume_s from the run directory to a run that is ready for its next round: data, model, checkpoint

Two silos train an MLP on random images, ten batches of 64 per round, with a checkpoint every ten rounds. Checkpoints go
to TMPDIR, which all ranks should see, and are removed afterwards.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from fedmpi.bench.figures import Figure
from fedmpi.bench.noise import Noise, width
from fedmpi.bench.timing import Row
from fedmpi.checkpoint import Writer
from fedmpi.comm import Comm
from fedmpi.config import CheckpointSection, Config
from fedmpi.local import Sgd
from fedmpi.models import MLP
from fedmpi.state import StateTensor
from fedmpi.train import Run

EVERY = 10  # rounds between checkpoints
_BUSY = 3  # of EVERY: rounds in which a checkpoint may still be being written


def checkpoint(comm: Comm, num_params: int, rounds: int = 30) -> Row:
    """Figures of one run with about `num_params` parameters. Collective."""
    out = comm.broadcast_text(tempfile.mkdtemp(prefix="fedmpi-bench-") if comm.rank == 0 else "", 0)
    config = Config(
        rounds=rounds,
        out=out,
        data=Noise(),
        model=MLP(hidden=(width(num_params),) * 2),
        local=Sgd(lr=0.01, steps=10, batch_size=64),
        checkpoint=CheckpointSection(every=EVERY),
    )
    try:
        with Run(config, comm=comm) as run:
            seconds = {record["round"]: record["seconds"] for record in run}
            found = run.parameters.numel()
            write_s = _write(comm, Path(out) / "again", run.parameters)
        comm.barrier()
        start_s = time.perf_counter()
        with Run(replace(config, rounds=rounds + 1), comm=comm):
            resume_s = float(comm.gather_number(time.perf_counter() - start_s).max())
        comm.barrier()
    finally:
        if comm.local_rank == 0:
            shutil.rmtree(out, ignore_errors=True)
    behind = [s["round"] for round, s in seconds.items() if round % EVERY == 1 and round > EVERY]
    without = [s["round"] for round, s in seconds.items() if round % EVERY > _BUSY]
    return {
        "waited": sum(s["checkpoint"] for s in seconds.values()) / sum(s["round"] for s in seconds.values()),
        "ratio": statistics.median(behind) / statistics.median(without),
        "params": found,
        "round_s": statistics.median(without),
        "rounds": rounds,
        "write_s": write_s,
        "resume_s": resume_s,
    }


def _write(comm: Comm, folder: Path, params_P: torch.Tensor) -> float:
    """Seconds in which rank 0 writes a checkpoint with these parameters. Collective."""

    def write() -> float:
        writer = Writer(folder, 0)
        start_s = time.perf_counter()
        writer.start(0, [StateTensor(("params",), params_P)])
        writer.join()
        seconds = time.perf_counter() - start_s
        writer.close(1.0)
        return seconds

    return float(comm.gather_number(comm.collectively(lambda: write() if comm.rank == 0 else 0.0)).max())


def figures(row: Row) -> list[Figure]:
    """Waiting, the ratio of rounds, write bandwidth, and the time to resume."""
    return [
        Figure("checkpoint.waited", row["waited"], "share"),
        Figure("checkpoint.ratio", row["ratio"], "ratio"),
        Figure("checkpoint.write", 4 * row["params"] / row["write_s"] / 1e9, "GB/s"),
        Figure("checkpoint.resume", row["resume_s"], "s"),
    ]
