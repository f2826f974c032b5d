"""A round's exchange under masks against the plain one, of the same plan, in turns in one job.

    mpirun -n 4 python jobs/bench/secure.py [--params 25e6] [--plans replicated ...] [--bits 16] [--neighbours K]

One silo per rank, random float32 updates. Prints for each plan the median seconds of the slowest rank, plain and under
masks, and their ratio; the same of the ranks' processor seconds, which include waiting in MPI; and
the bytes that all ranks sent.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from statistics import median

import torch

from fedmpi.comm import Comm, connect
from fedmpi.exchange.base import Exchange, ExchangeContext
from fedmpi.exchange.choose import make
from fedmpi.exchange.config import ExchangeSection
from fedmpi.secure.ring import Ring
from fedmpi.secure.session import Session
from fedmpi.server import FedAvg, NoState, Server
from fedmpi.types import Contribution


def made(plan: str, comm: Comm, num: int, bits: int, neighbours: int | None) -> Exchange:
    """An exchange of vectors of `num` elements; 0 bits: without masks."""
    ids = [f"s{rank}" for rank in range(comm.size)]
    ring = Ring.of(bits or 32, 1.0, comm.size, span=10 / num**0.5)
    secure = Session(comm, ids, range(comm.size), ring, 2, neighbours) if bits else None
    facts = ExchangeContext(float(comm.size), ids, [ids[comm.rank]], secure=secure)
    return make(ExchangeSection(plan=plan), comm, torch.zeros(num), facts)


def measured(exchange: Exchange, delta_P: torch.Tensor, params_P: torch.Tensor, number: int) -> tuple[float, ...]:
    """Seconds of one round on the slowest rank, processor seconds of all ranks, and the bytes that they sent."""
    comm, ids = exchange.comm, exchange.facts.ids
    comm.barrier()
    before = sum(comm.counted()[:2])
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    exchange.begin(number, 1)
    exchange.add(Contribution(ids[comm.rank], number, 1.0, delta_P, 0.0, 1, 1))
    exchange.meet(ids)
    exchange.finish(params_P, Server(FedAvg()), NoState())
    took_s, cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
    sent = sum(comm.counted()[:2]) - before
    rows = [comm.gather_number(value) for value in (took_s, cpu_s, sent)]
    return float(rows[0].max()), float(rows[1].sum()), float(rows[2].sum())


def main(num: int, turns: int, plans: Sequence[str], bits: int, neighbours: int | None) -> None:
    """Print a line for each plan."""
    comm = connect()
    delta_P = torch.randn(num)
    delta_P /= delta_P.norm()
    for plan in plans:
        plain, masked = (made(plan, comm, num, some, neighbours) for some in (0, bits))
        params_P = torch.zeros(num)
        rows: tuple[list[tuple[float, ...]], list[tuple[float, ...]]] = ([], [])
        for number in range(1, turns + 2):
            for exchange, row in zip((plain, masked), rows, strict=True):
                row.append(measured(exchange, delta_P, params_P, number))
        one, two = ([median(column) for column in zip(*row[1:], strict=True)] for row in rows)
        if comm.rank == 0:
            print(
                f"{plan:<12}{num} parameters, {comm.size} ranks: "
                f"plain {one[0]:.3f} s, masked {two[0]:.3f} s, {two[0] / one[0]:.2f}x; "
                f"processor {one[1]:.2f} and {two[1]:.2f} s, {two[1] / one[1]:.2f}x; "
                f"{one[2] / 1e6:.0f} and {two[2] / 1e6:.0f} MB",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--params", type=float, default=25e6, help="length of the vector")
    parser.add_argument("--turns", type=int, default=7, help="timed rounds of each")
    parser.add_argument("--plans", nargs="+", default=["replicated", "root", "sharded"])
    parser.add_argument("--bits", type=int, choices=(16, 32, 64), default=32, help="of the masked words")
    parser.add_argument("--neighbours", type=int, help="silos with which each shares masks; else all")
    parser.add_argument("--quick", action="store_true", help="a short vector, one turn")
    options = parser.parse_args()
    if options.quick:
        options.params, options.turns = 1e4, 1
    main(int(options.params), options.turns, options.plans, options.bits, options.neighbours)
