"""Benches: what an exchange and the codecs cost here, beside what else one could do, in one run and in turns.

Everything is timed in rounds: each round runs every candidate once, all ranks together, so that noise is the same
for all of them. A time is the slowest rank's; medians are compared. Ratios come first, seconds after.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fedmpi.codecs import CODECS, warm
from fedmpi.comm import Solo
from fedmpi.errors import ConfigError
from fedmpi.exchange import choice
from fedmpi.exchange.base import Facts
from fedmpi.exchange.section import ExchangeSection
from fedmpi.exchange.traffic import traffic
from fedmpi.server import FedAvg
from fedmpi.types import Contribution

Row = dict[str, Any]
Candidates = dict[str, Callable[[], object]]


def exchange(comm: Solo, num_params: int, repeats: int = 15) -> list[Row]:
    """One row per plan, then the rivals: a plain Allreduce of the flat vector, and gloo's all_reduce where it is there.

    A plan's time is from a silo's delta to the new parameters on every rank: fold, collectives, server step. The rivals
    only add up. `x_memcpy` compares with one copy of the vector on one rank, all ranks copying at once.
    """
    delta_P = torch.full((num_params,), 1e-3)
    other_P = torch.zeros(num_params)
    candidates: Candidates = {"memcpy": lambda: other_P.copy_(delta_P)}
    sections: dict[str, ExchangeSection] = {}
    for plan in ("root", "replicated", "sharded", "window"):
        if plan == "window" and not comm.one_node():
            continue
        sections[plan] = ExchangeSection(plan=plan)  # type: ignore[arg-type]
        candidates[plan] = _aggregate(sections[plan], comm, delta_P)
    sums = comm.allocate(num_params, torch.float32)
    candidates["allreduce"] = lambda: comm.plain_allreduce(delta_P, sums)
    if (gloo := _gloo(comm, delta_P)) is not None:
        candidates["gloo"] = gloo
    seconds = _in_turns(comm, candidates, repeats)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    rows = []
    for name, values in seconds.items():
        sent = traffic(sections[name], num_params, 4, comm.size) if name in sections else None
        rows.append(
            {
                "plan": name,
                "ranks": comm.size,
                "params": num_params,
                "seconds": {"median": median[name], "min": min(values), "max": max(values)},
                "x_memcpy": median[name] / median["memcpy"],
                "x_allreduce": median[name] / median["allreduce"],
                "x_gloo": median[name] / median["gloo"] if "gloo" in median else None,
                "wire_bytes_per_param_up": sent and sent.up / num_params / comm.size,
                "wire_bytes_per_param_down": sent and sent.down / num_params / comm.size,
            }
        )
    return rows


def codecs(num_params: int, repeats: int = 7, seed: int = 0) -> list[Row]:
    """One row per codec with its defaults, on one thread: encode with feedback, decode and weighted add, bytes counted.

    Ratios are to one copy of the vector.
    """
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(seed)
    x_N = 1e-3 * torch.randn(num_params, generator=draw)
    other_N, residual_N, sum_N = torch.zeros_like(x_N), torch.zeros_like(x_N), torch.zeros_like(x_N)
    rows = []
    for name, member in CODECS.members.items():
        codec = member()
        warm(codec)
        payload_B = torch.zeros(codec.max_bytes(num_params), dtype=torch.uint8)
        sent: list[int] = []
        candidates: Candidates = {
            "memcpy": lambda: other_N.copy_(x_N),
            "encode": lambda codec=codec, payload_B=payload_B, sent=sent: sent.append(  # type: ignore[misc]
                codec.encode(x_N, payload_B, 1, 0.5, residual_N)
            ),
            "add": lambda codec=codec, payload_B=payload_B, sent=sent: codec.add(  # type: ignore[misc]
                payload_B[: sent[-1]], sum_N, 1, 0.5
            ),
        }
        residual_N.zero_()
        median = {k: statistics.median(v) for k, v in _in_turns(Solo(), candidates, repeats).items()}
        rows.append(
            {
                "codec": name,
                "params": num_params,
                "seconds": {"median": median["encode"]},
                "x_memcpy_encode": median["encode"] / median["memcpy"],
                "x_memcpy_add": median["add"] / median["memcpy"],
                "wire_bytes_per_param": sent[-1] / num_params,
            }
        )
    return rows


def _aggregate(section: ExchangeSection, comm: Solo, delta_P: torch.Tensor) -> Callable[[], object]:
    params_P = torch.zeros_like(delta_P)
    made = choice.make(section, comm, params_P, Facts(float(comm.size)))
    delta_P = made.delta().copy_(delta_P)
    params_P, state = made.home(params_P, FedAvg().init(made.mine(params_P)))
    contribution = Contribution("", 1, 1.0, delta_P, 0.0, 1, 1)

    def run() -> None:
        made.begin(1, 1)
        made.add(contribution)
        made.finish(params_P, FedAvg(), state)

    return run


def _gloo(comm: Solo, vector: torch.Tensor) -> Callable[[], object] | None:
    """torch.distributed's all_reduce over gloo, between the same processes; None where it cannot be had."""
    import torch.distributed as dist

    if comm.size == 1 or not dist.is_available() or not dist.is_gloo_available():
        return None
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    address = comm.say(f"tcp://{comm.hosts[0]}:{port}", 0)
    dist.init_process_group("gloo", init_method=address, rank=comm.rank, world_size=comm.size)
    work_P = vector.clone()
    return lambda: dist.all_reduce(work_P)


def _in_turns(comm: Solo, candidates: Candidates, repeats: int) -> dict[str, list[float]]:
    """Seconds of every repeat, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(repeats + 1):
        for name, run in candidates.items():
            comm.meet()
            start = time.perf_counter()
            run()
            comm.meet()
            mine = np.zeros(comm.size)
            mine[comm.rank] = time.perf_counter() - start
            slowest = float(comm.share(mine).max())
            if repeat:
                seconds[name].append(slowest)
    return seconds


def table(rows: list[Row], columns: list[str]) -> str:
    """Rows for people, as the OSU benchmarks print them."""
    lines = ["# " + "  ".join(f"{column:>14}" for column in columns)]
    for row in rows:
        cells = []
        for column in columns:
            value = row["seconds"][column[:-2]] if column.endswith("_s") else row.get(column)
            cells.append(f"{value:>14.4f}" if isinstance(value, float) else f"{'-' if value is None else value:>14}")
        lines.append("  " + "  ".join(cells))
    return "\n".join(lines)


def check_params(text: str) -> int:
    """25e6 or 25000000 as an integer. Raises ConfigError."""
    try:
        value = int(float(text))
    except ValueError:
        value = 0
    if value < 1:
        raise ConfigError(f"--params {text}: give a positive number, such as 25e6")
    return value
