"""Measures how much of the exchange `exchange.overlap` hides behind local training.

    mpirun -n 2 python jobs/bench/overlap.py [--params 25e6] [--rounds 8] [--plan replicated] [--quick]

Local training is replaced by a stand-in that takes over twice as long as the exchange. One stand-in sleeps, as if a GPU
worked; the other computes on the rank's core, which the exchange also needs. Each runs without and with overlap, by
turns, twice. Medians over rounds of the slowest rank:

    exchange_s   exchange and step in rounds without overlap
    thread_s     duration of the exchange in its thread
    visible_s    time that rounds with overlap wait for it
    hidden       share of the exchange that costs no waiting: 1 - visible_s / exchange_s
    saved        time saved per round, as a share of exchange_s; includes what overlap costs the training
"""

import argparse
import json
import math
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch

import fedmpi
from fedmpi.comm import connect
from fedmpi.components import component
from fedmpi.config import CheckpointSection, EvaluateSection
from fedmpi.exchange.config import ExchangeSection
from fedmpi.flat import FlatModel
from fedmpi.local import LocalRule, LocalSilo, Round
from fedmpi.models import MLP
from fedmpi.types import Contribution, Silo, SiloData, Source

LONGER = 2.5  # length of the stand-in, in exchanges
TURNS = 2


@dataclass(frozen=True)
class Noise:
    """Random images, one silo per rank; only sizes matter here."""

    silos: int

    def source(self, seed: int) -> Source:
        return Source("classification", (784,), 10, tuple(Silo(f"silo-{i}", 8) for i in range(self.silos)), self.open)

    def open(self, silo: str) -> SiloData:
        x, y = torch.zeros(8, 784), torch.zeros(8, dtype=torch.int64)
        return SiloData(x, y, x, y)


@component
class StandIn(LocalRule):
    """Local training that only takes time."""

    naps: int = 0
    """number of sleeps of 0.01 s"""
    products: int = 0
    """number of matrix products"""

    def train(self, silo: LocalSilo, model: FlatModel, params_P: torch.Tensor, round: Round) -> Contribution:
        model.load(params_P)
        for _ in range(self.naps):
            round.check()
            time.sleep(0.01)
        for _ in range(self.products):
            round.check()
            product()
        delta_P = model.take_delta(params_P).add_(1e-3)
        return Contribution(silo.id, round.number, silo.weight, delta_P, 0.0, 8, 1)


MATRIX = torch.full((512, 512), 1e-3)


def product() -> torch.Tensor:
    return MATRIX @ MATRIX


def rounds_of(comm: Any, args: argparse.Namespace, local: StandIn, overlap: bool) -> list[dict[str, float]]:
    """Seconds by phase, for the rounds in the middle of a run."""
    out = comm.broadcast_text(tempfile.mkdtemp() if comm.rank == 0 else "", 0)
    width = round((math.sqrt(794**2 + 4 * args.params) - 794) / 2)
    config = fedmpi.Config(
        rounds=args.rounds,
        out=out,
        data=Noise(comm.size),
        model=MLP(hidden=(width, width)),
        local=local,
        exchange=ExchangeSection(plan=args.plan, overlap=overlap),
        checkpoint=CheckpointSection(every=10**6),
        evaluate=EvaluateSection(every=10**6),
    )
    with fedmpi.Run(config, comm=comm) as run:
        records = list(run)
    if comm.rank == 0:
        shutil.rmtree(out)
    args.num_params = run.parameters.numel()
    return [record["seconds"] for record in records[2:-1]]


def slowest(comm: Any, seconds: float) -> float:
    return float(comm.gather_number(seconds).max())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=float, default=25e6)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--plan", default="replicated")
    parser.add_argument("--quick", action="store_true", help="smoke test: a short vector, 5 rounds, one turn")
    args = parser.parse_args(arguments)
    args.turns = 1 if args.quick else TURNS
    if args.quick:
        args.params, args.rounds = 1e5, 5
    comm = connect()
    alone = statistics.median(s["exchange"] + s["step"] for s in rounds_of(comm, args, StandIn(), False))
    torch.set_num_threads(1)
    comm.barrier()
    start_s = time.perf_counter()
    for _ in range(50):
        product()
    per_product_s = slowest(comm, time.perf_counter() - start_s) / 50
    length_s = LONGER * alone
    stand_ins = {
        "sleeps": StandIn(naps=math.ceil(length_s / 0.01)),
        "computes": StandIn(products=math.ceil(length_s / per_product_s)),
    }
    seconds: dict[tuple[str, bool], list[dict[str, float]]] = {}
    for turn in range(args.turns):
        for name, local in stand_ins.items():
            for overlap in (False, True) if turn % 2 == 0 else (True, False):
                seconds.setdefault((name, overlap), []).extend(rounds_of(comm, args, local, overlap))
    if comm.rank:
        return
    for name in stand_ins:
        off, on = seconds[name, False], seconds[name, True]
        exchange_s = statistics.median(s["exchange"] + s["step"] for s in off)
        visible_s = statistics.median(s["exchange"] for s in on)
        lengths_s = [statistics.median(s["round"] for s in some) for some in (off, on)]
        figures = {
            "training": name,
            "hidden": round(1 - visible_s / exchange_s, 4),
            "saved": round((lengths_s[0] - lengths_s[1]) / exchange_s, 4),
            "exchange_s": round(exchange_s, 4),
            "thread_s": round(statistics.median(s["overlapped"] for s in on), 4),
            "visible_s": round(visible_s, 4),
            "training_s": [round(statistics.median(s["train"] for s in some), 4) for some in (off, on)],
            "round_s": [round(length, 4) for length in lengths_s],
            "params": args.num_params,
            "plan": args.plan,
            "ranks": comm.size,
            "rounds": len(off),
        }
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
