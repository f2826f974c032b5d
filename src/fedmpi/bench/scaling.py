"""How the exchange and whole rounds scale with ranks, silos, parameters and codecs.

    exchange   seconds from a delta to new parameters on n ranks, for each vector length and codec; plan sharded
    strong     seconds of a round with as many silos as the job has ranks, on n of them
    weak       seconds of a round with one silo on each of n ranks
    efficiency strong: seconds on the fewest ranks x fewest / (seconds on n x n); weak, exchange: the fewest's / n's

n is 1, 2, 4 ... up to all ranks of the job. The other ranks wait. Exchanges are timed in turns.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fedmpi.bench import exchange
from fedmpi.bench.figures import Figure, word
from fedmpi.bench.noise import Noise, width
from fedmpi.bench.timing import Candidates, Row, in_turns
from fedmpi.comm import Comm
from fedmpi.config import CheckpointSection, Config
from fedmpi.device import set_threads
from fedmpi.errors import ConfigError
from fedmpi.exchange.config import Channel, ExchangeSection
from fedmpi.local import Sgd
from fedmpi.models import MLP
from fedmpi.train import Run

COLUMNS = ["kind", "ranks", "silos", "params", "codec", "efficiency", "median_s", "min_s", "max_s"]


def counts(num_ranks: int) -> list[int]:
    """Powers of two up to all ranks, and all ranks.

    >>> counts(6), counts(1)
    ([1, 2, 4, 6], [1])
    """
    return sorted({2**i for i in range(num_ranks.bit_length()) if 2**i <= num_ranks} | {num_ranks})


def scaling(
    comm: Comm,
    lengths: Sequence[int],
    channels: Sequence[Channel],
    repeats: int = 7,
    rounds: int = 6,
    limit_s: float = math.inf,
) -> list[Row]:
    """Rows, equal on every rank. `lengths`: parameters of the exchanged vectors; rounds train the first. `limit_s`:
    for the exchanges. Collective."""
    set_threads(comm, reproducible=False)
    groups = {n: comm.split(0 if comm.rank < n else -1) for n in counts(comm.size)}
    rows = [
        _row("exchange", n, n, *about, seconds)
        for n, about, seconds in _exchanges(comm, groups, lengths, channels, repeats, limit_s)
    ]
    for kind in ("strong", "weak"):
        for n, group in groups.items():
            num_silos = comm.size if kind == "strong" else n
            work = functools.partial(_rounds, group, lengths[0], num_silos, rounds)
            rows.append(_row(kind, n, num_silos, lengths[0], None, _told(comm, comm.collectively(work))))
    return _rated(rows)


def _exchanges(
    comm: Comm,
    groups: dict[int, Comm | None],
    lengths: Sequence[int],
    channels: Sequence[Channel],
    repeats: int,
    limit_s: float,
) -> Iterator[tuple[int, tuple[int, str], list[float]]]:
    """Ranks, (parameters, codec) and seconds of every exchange. Collective."""
    candidates: Candidates = {}
    cells = {}
    for num_params, channel, n in itertools.product(lengths, channels, groups):
        name = f"{num_params} {exchange.label(channel.codec)} {n}"
        cells[name] = n, (num_params, exchange.label(channel.codec))
        section = ExchangeSection(plan="sharded", up=channel, down=channel)
        candidates[name] = comm.collectively(functools.partial(_entrant, groups[n], section, num_params))
    for name, seconds in in_turns(comm, candidates, repeats, limit_s).items():
        yield *cells[name], seconds


def _entrant(group: Comm | None, section: ExchangeSection, num_params: int) -> Callable[[], object]:
    """One exchange on the ranks of a group; nothing on others."""
    if group is None:
        return lambda: None
    params_P = group.allocate(num_params, torch.float32)
    return exchange.of_plan(section, group, exchange.noise(group.rank, num_params), params_P).run


def _rounds(group: Comm | None, num_params: int, num_silos: int, rounds: int) -> list[float]:
    """Seconds of every round but the first, on the ranks of a group; nothing on others."""
    if group is None:
        return []
    out = group.broadcast_text(tempfile.mkdtemp(prefix="fedmpi-bench-") if group.rank == 0 else "", 0)
    config = Config(
        rounds=rounds + 1,
        out=out,
        data=Noise(num_silos),
        model=MLP(hidden=(width(num_params),) * 2),
        local=Sgd(lr=0.01, steps=10, batch_size=64),
        checkpoint=CheckpointSection(every=rounds + 1),
    )
    try:
        with Run(config, comm=group) as run:
            seconds = [record["seconds"]["round"] for record in run]
        group.barrier()
    finally:
        if group.local_rank == 0:
            shutil.rmtree(out, ignore_errors=True)
    return seconds[1:]


def _told(comm: Comm, seconds: list[float]) -> list[float]:
    """Rank 0's list, on every rank. Collective."""
    told: list[float] = json.loads(comm.broadcast_text(json.dumps(seconds) if comm.rank == 0 else "", 0))
    return told


def _row(kind: str, ranks: int, silos: int, params: int, codec: str | None, seconds: Sequence[float]) -> Row:
    summary = {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}
    return {"kind": kind, "ranks": ranks, "silos": silos, "params": params, "codec": codec, "seconds": summary}


def _rated(rows: list[Row]) -> list[Row]:
    """The rows with their efficiency: the ideal seconds, from the row with the fewest ranks, / the row's."""
    fewest: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        first = fewest.setdefault((row["kind"], row["params"], row["codec"]), row)
        ideal = first["seconds"]["median"]
        if row["kind"] == "strong":
            ideal *= first["ranks"] / row["ranks"]
        row["efficiency"] = ideal / row["seconds"]["median"]
    return rows


def figures(rows: Sequence[Row]) -> list[Figure]:
    """Seconds and efficiency of every row."""
    found = []
    for row in rows:
        what = [f"{row['params']}", word(row["codec"])] if row["codec"] else []
        name = ".".join(["scaling", row["kind"], *what, f"ranks{row['ranks']}"])
        found.append(Figure(f"{name}.seconds", row["seconds"]["median"], "s"))
        found.append(Figure(f"{name}.efficiency", row["efficiency"], "ratio"))
    return found


def draw(rows: Sequence[Row], path: Path) -> None:
    """The rows as a figure: seconds and efficiency over ranks. Raises ConfigError without matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ConfigError("--figure needs matplotlib: pip install 'fedmpi[report]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    lines: dict[str, list[Row]] = {}
    for row in rows:
        codec = "" if row["codec"] is None else f", {row['params']:.3g} values, {row['codec']}"
        lines.setdefault(row["kind"] + codec, []).append(row)
    marks = itertools.cycle("os^Dv<>P")
    for (name, line), mark in zip(lines.items(), marks, strict=False):
        ranks = [row["ranks"] for row in line]
        axes[0].plot(ranks, [row["seconds"]["median"] for row in line], marker=mark, label=name)
        axes[1].plot(ranks, [row["efficiency"] for row in line], marker=mark)
    for one, label in zip(axes, ("seconds", "efficiency"), strict=True):
        one.set_xscale("log", base=2)
        one.set_xlabel("ranks")
        one.set_ylabel(label)
        one.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[1].set_ylim(bottom=0)
    figure.legend(loc="outside right center", fontsize="small")
    figure.savefig(path)
    pyplot.close(figure)
