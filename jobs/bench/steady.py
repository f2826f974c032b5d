"""Measures rounds of `train` without the training, and whether memory stays constant.

    mpirun -n 2 python jobs/bench/steady.py [--params 25e6] [--rounds 30] [--secure] [--neighbours N] [--quick]
        [EXCHANGE ...]

EXCHANGE is the content of `exchange:` in a configuration, such as '{plan: sharded, up: {codec: int8}}'; default: all
plans and the usual codecs. Figures are those of the slowest rank, per round after the first three:

    round_s        median of a whole round: load the model, take the delta and its norm, exchange, step, evaluate,
                   record; without the work of the silos, which only move their parameters a little
    exchange_s     median of exchange and step alone
    allreduce_s    median of one MPI_Allreduce of the vector after each round; memcpy: of a copy of it
    fresh_memory   memory touched for the first time during the exchange (page faults; malloc is set to return large
                   blocks at once), as a share of the vector
    secure_x       with --secure, which clips deltas and measures each exchange plain and under masks in turns: whole
                   rounds under masks, divided by plain ones
    growth_bytes   growth of a rank from a tenth of the rounds to the last but one (the last writes a checkpoint)
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

if os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "131072") != "131072" or "MALLOC_TRIM_THRESHOLD_" not in os.environ:
    os.environ["MALLOC_TRIM_THRESHOLD_"] = "131072"
    os.execv(sys.executable, [sys.executable, *sys.argv])  # before MPI is loaded

import numpy as np
import torch
import yaml

import fedmpi
from fedmpi.comm import connect
from fedmpi.components import build
from fedmpi.flat import FlatModel
from fedmpi.local import LocalRule, LocalSilo, Round
from fedmpi.secure.secagg import SecAgg
from fedmpi.transforms import Clip
from fedmpi.types import Contribution, Silo, SiloData, Source

FED = "feedback: true"
EXCHANGES = (
    "{plan: shared_memory}",
    "{plan: replicated}",
    "{plan: root}",
    "{plan: sharded}",
    f"{{plan: sharded, up: {{codec: int8, {FED}}}, down: {{codec: int8, {FED}}}}}",
    f"{{plan: sharded, up: {{codec: topk, {FED}}}, down: {{codec: topk, {FED}}}}}",
    f"{{plan: sharded, regions: {{}}, up: {{codec: int8, {FED}}}}}",
)


@dataclass(frozen=True)
class Nothing:
    """One silo per rank, with one sample each."""

    ranks: int

    def source(self, seed: int) -> Source:
        silos = tuple(Silo(f"silo-{i}", 1) for i in range(self.ranks))
        x, y = torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64)
        return Source("classification", (1,), 2, silos, lambda silo: SiloData(x, y, x, y))


class Vector(torch.nn.Module):
    """A module of parameters only."""

    def __init__(self, num_params: int) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(num_params))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.w[:2]


COMM: list[Any] = []  # of this process
TRAINED_S: list[float] = []  # time of the silo's work, round by round


@dataclass(frozen=True)
class Drift(LocalRule):
    """Local training that only moves parameters, by different amounts in every silo and round."""

    def train(self, silo: LocalSilo, model: FlatModel, params_P: torch.Tensor, round: Round) -> Contribution:
        model.load(params_P)
        begun_s = time.perf_counter()
        rng = np.random.default_rng([round.number, int(silo.id[-1])])
        bump = torch.from_numpy(rng.standard_normal(1 << 16).astype(np.float32) * 1e-3)  # a millisecond
        own = model.module.w.detach()  # type: ignore[operator, union-attr]
        for start in range(0, len(own), len(bump)):
            own[start : start + len(bump)] += bump[: len(own) - start]
        COMM[0].barrier()  # nobody waits for another's work afterwards
        TRAINED_S.append(time.perf_counter() - begun_s)
        return model.give(Contribution(silo.id, round.number, silo.weight, torch.empty(0), 0.0, 1, 1), params_P)


def memory_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def measured(
    comm: Any, exchange: str, num_params: int, rounds: int, out: str, masks: SecAgg | None = None, clip: bool = False
) -> dict[str, Any]:
    """The figures of a run, under `masks` if there are any; `clip`: with clipped deltas."""
    COMM[:] = [comm]
    config = fedmpi.Config(
        rounds=rounds,
        out=out,
        data=Nothing(comm.size),
        model=fedmpi.components.Deferred("vector", lambda: Vector(num_params), {}),
        local=Drift(),
        updates=(Clip(norm=1.0),) if clip else (),
        secure=masks,
        exchange=build(fedmpi.exchange.config.ExchangeSection, yaml.safe_load(exchange)),
        checkpoint=fedmpi.config.CheckpointSection(every=rounds),
        device=fedmpi.config.DeviceSection(name="cpu"),
    )
    one_P, other_P = torch.zeros(num_params), torch.zeros(num_params)
    # Allocated and touched before the first round: lists that grow per round would count as growth.
    spent = {n: np.full(rounds, np.nan) for n in ("round", "exchange", "memcpy", "allreduce", "faults", "memory")}
    with fedmpi.Run(config, comm=comm) as run:
        made = run.federation.exchange
        finish = made.finish

        def watched(*arguments: Any) -> Any:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            result = finish(*arguments)
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
            spent["faults"][made.round - 1] = faults * resource.getpagesize()
            return result

        made.finish = watched  # type: ignore[assignment, method-assign]
        begun_s = time.perf_counter()
        for record in run:
            at = record["round"] - 1
            spent["round"][at] = time.perf_counter() - begun_s - TRAINED_S[-1]
            spent["exchange"][at] = record["seconds"]["exchange"] + record["seconds"]["step"]
            spent["memory"][at] = memory_bytes()
            for name, work in (
                ("memcpy", lambda: other_P.copy_(one_P)),
                ("allreduce", lambda: comm.plain_allreduce(one_P, other_P)),
            ):
                comm.barrier()
                start_s = time.perf_counter()
                work()
                spent[name][at] = time.perf_counter() - start_s
            comm.barrier()
            begun_s = time.perf_counter()
    mine = np.zeros((comm.size, 6))
    steady = slice(min(3, rounds - 1), None)
    timed = ("round", "exchange", "memcpy", "allreduce")
    mine[comm.rank, :4] = [statistics.median(spent[n][steady]) for n in timed]
    mine[comm.rank, 4] = max(spent["faults"][steady]) / (4 * num_params)
    mine[comm.rank, 5] = spent["memory"][-2] - spent["memory"][rounds // 10]
    round_s, seconds, memcpy, allreduce, fresh, growth = (
        comm.share(mine.reshape(-1)).reshape(mine.shape).max(0).tolist()
    )
    return {
        "exchange": exchange,
        "ranks": comm.size,
        "params": num_params,
        "rounds": rounds,
        "round_s": round_s,
        "exchange_s": seconds,
        "allreduce_s": allreduce,
        "round_x_memcpy": round_s / memcpy,
        "round_x_allreduce": round_s / allreduce,
        "exchange_x_allreduce": seconds / allreduce,
        "fresh_memory": fresh,
        "growth_bytes": int(growth),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=float, default=25e6)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--secure", action="store_true", help="each exchange also under masks, in three turns")
    parser.add_argument("--neighbours", type=int, help="of a silo under masks; default: as in a run")
    parser.add_argument("--quick", action="store_true", help="smoke test: a short vector, 5 rounds")
    parser.add_argument("exchange", nargs="*", default=EXCHANGES)
    given = parser.parse_args(arguments)
    if given.quick:
        given.params, given.rounds = 1e5, 5
    masks = SecAgg(neighbours=given.neighbours)
    comm = connect()
    with tempfile.TemporaryDirectory() as folder:
        folder = comm.broadcast_text(folder, 0)
        for number, exchange in enumerate(given.exchange):
            rows = []
            for turn in range((2 if given.quick else 6) if given.secure else 1):
                under = masks if turn % 2 else None
                out = f"{folder}/{number}.{turn}"
                rows.append(measured(comm, exchange, int(given.params), given.rounds, out, under, given.secure))
            if given.secure:
                plain, masked = ([row["round_s"] for row in rows[first::2]] for first in (0, 1))
                rows[-1] |= {"plain_round_s": statistics.median(plain), "round_s": statistics.median(masked)}
                rows[-1]["secure_x"] = rows[-1]["round_s"] / rows[-1]["plain_round_s"]
            if comm.rank == 0:
                rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}
                print(json.dumps(rounded), flush=True)
        comm.barrier()


if __name__ == "__main__":
    main()
