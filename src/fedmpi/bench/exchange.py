"""Time from a delta to new parameters on every rank: plans, codecs and baselines, interleaved in one run.

    seconds        from a rank's delta in memory to the new parameters on every rank, including FedAvg's step. The
                   baselines do less: `memcpy` copies the vector on every rank, `allreduce` and `gloo` only sum,
                   `tcp` only moves bytes.
    x_RIVAL        this row's median / the baseline's; smaller is better
    wire bytes     counted during timing: bytes over all ranks / (parameters x vectors sent). n ranks send n - 1
                   vectors each way, since none sends to itself; n in plan replicated, where every rank passes one to
                   MPI and gets one back. So float32 gives 4 and int8 1.0156 for any number of ranks. None where
                   nothing is sent, and where MPI or gloo send bytes that are not counted.
    link_share     bits that the busiest rank sends or receives in a round / (seconds x link rate). Counted in plan
                   sharded and `tcp`. For MPI and gloo, whose algorithm is internal, the minimum is assumed:
                   2 (n - 1) / n vectors for an Allreduce, one for a Reduce and a Bcast.

Deltas are normal with standard deviation 1e-3, different on each rank.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
import yaml

from fedmpi.bench import baselines
from fedmpi.bench.figures import Figure, word
from fedmpi.bench.timing import Row, in_turns
from fedmpi.codecs import CODECS, BFloat16, Codec, Identity, Int4, Int8, TopK
from fedmpi.comm import Comm
from fedmpi.components import to_dict
from fedmpi.device import set_threads
from fedmpi.errors import ConfigError, FedmpiError
from fedmpi.exchange import choose
from fedmpi.exchange.base import Exchange, ExchangeContext, Machine
from fedmpi.exchange.config import Channel, ExchangeSection
from fedmpi.exchange.dense import Replicated
from fedmpi.exchange.plans import PLANS
from fedmpi.output import say
from fedmpi.server import FedAvg, Server
from fedmpi.types import Contribution

COLUMNS = [
    *("plan", "codec", "feedback", "ranks", "x_allreduce", "x_tcp", "x_gloo", "x_memcpy"),
    *("wire_bytes_per_param_up", "wire_bytes_per_param_down", "link_share", "median_s", "min_s", "max_s"),
]
RIVALS = ("memcpy", "allreduce", "gloo", "tcp")
CHANNELS = (
    Channel(codec=BFloat16()),
    Channel(codec=Int8(), feedback=True),
    Channel(codec=Int4(), feedback=True),
    Channel(codec=TopK(), feedback=True),
)


def channel(text: str) -> Channel:
    """Parses a codec given as YAML; adds feedback if it is lossy and supports it. Raises ConfigError.

    >>> channel("{name: topk, ratio: 0.02}").feedback, channel("identity").feedback
    (True, False)
    """
    try:
        given = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--codec {text}: give a name, or a mapping such as {{name: topk, ratio: 0.02}}") from None
    codec = CODECS.build(given, "--codec")
    try:
        return Channel(codec=codec, feedback=not isinstance(codec, Identity))
    except ValueError:
        return Channel(codec=codec)


class Entrant:
    """A row before it is measured: its name, what it runs, how that moves vectors, and bytes sent per round."""

    def __init__(
        self, plan: str, run: Callable[[], object], up: Channel | None = None, moves: type[Exchange] = Exchange
    ) -> None:
        self.plan, self.run, self.up, self.moves = plan, run, up, moves
        self.name = plan if up is None else f"{plan} {label(up.codec)}"
        self.sent: list[tuple[int, int]] = []  # bytes up and down, for every round

    def counted(self, comm: Comm) -> None:
        """Runs one round and records its bytes."""
        up, down = comm.bytes_up, comm.bytes_down
        self.run()
        self.sent.append((comm.bytes_up - up, comm.bytes_down - down))


def exchange(
    comm: Comm,
    num_params: int,
    repeats: int = 15,
    channels: Sequence[Channel] = CHANNELS,
    link_gbit: float | None = None,
    limit_s: float = math.inf,
) -> list[Row]:
    """Rows, equal on every rank: memcpy, the plans, plan sharded with each channel both ways, allreduce, gloo, tcp.

    `link_gbit`: rate of a rank's link in Gbit/s. `limit_s`: see `in_turns`. Collective. What is unavailable gets a line
    on stderr instead of a row.
    """
    set_threads(comm, reproducible=False)
    delta_P = noise(comm.rank, num_params)
    other_P, params_P, sums_P = (comm.allocate(num_params, torch.float32) for _ in range(3))
    with ExitStack() as stack:
        entrants = [
            Entrant("memcpy", lambda: other_P.copy_(delta_P)),
            *(of_plan(section, comm, delta_P, params_P) for section in _sections(comm, channels, params_P)),
            Entrant("allreduce", lambda: comm.plain_allreduce(delta_P, sums_P), moves=Replicated),
            *_over_sockets(comm, num_params, stack),
        ]
        seconds = in_turns(comm, {each.name: partial(each.counted, comm) for each in entrants}, repeats, limit_s)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rows = []
    for each in entrants:
        median_s = medians[each.name]
        up_R, down_R = _sent(comm, each)
        vectors = num_params * each.moves.vectors_sent(comm.size)
        busiest_bytes = each.moves.link_bytes(up_R, down_R, 4 * num_params)
        row: Row = {
            "plan": each.plan,
            "codec": label(each.up.codec) if each.up else None,
            "feedback": each.up.feedback if each.up else None,
            "ranks": comm.size,
            "params": num_params,
            "seconds": {"median": median_s, "min": min(seconds[each.name]), "max": max(seconds[each.name])},
        }
        for rival in RIVALS:
            row[f"x_{rival}"] = median_s / medians[rival] if rival in medians else None
        row["wire_bytes_per_param_up"] = float(up_R.sum()) / vectors if up_R.any() else None
        row["wire_bytes_per_param_down"] = float(down_R.sum()) / vectors if down_R.any() else None
        row["link_share"] = busiest_bytes * 8 / (median_s * link_gbit * 1e9) if link_gbit and busiest_bytes else None
        rows.append(row)
    return rows


def figures(rows: Sequence[Row]) -> list[Figure]:
    """Seconds, bandwidth (4 bytes a parameter / seconds), ratio to MPI_Allreduce and bytes of every row."""
    found = []
    for row in rows:
        codec = row["codec"]
        name = ".".join(["exchange", row["plan"], *([word(codec)] if codec and codec != label(Identity()) else [])])
        seconds = row["seconds"]["median"]
        found.append(Figure(f"{name}.seconds", seconds, "s"))
        found.append(Figure(f"{name}.bandwidth", 4 * row["params"] / seconds / 1e9, "GB/s"))
        for key, unit in (("x_allreduce", "ratio"), ("link_share", "share")):
            if row[key] is not None:
                found.append(Figure(f"{name}.{key}", row[key], unit))
        for way in ("up", "down"):
            if (wire := row[f"wire_bytes_per_param_{way}"]) is not None:
                found.append(Figure(f"{name}.wire_{way}", wire, "bytes/param"))
    return found


def noise(rank: int, num_params: int) -> torch.Tensor:
    """The delta of a rank [P]."""
    return torch.randn(num_params, generator=torch.Generator().manual_seed(rank)).mul_(1e-3)


def label(codec: Codec) -> str:
    """The text from which `channel` makes this codec: its name, or a mapping with the values that are not defaults.

    >>> label(TopK()), label(TopK(ratio=0.02))
    ('topk', '{name: topk, ratio: 0.02}')
    """
    default = {field.name: field.default for field in dataclasses.fields(codec)}  # type: ignore[arg-type]
    known = to_dict(codec, Annotated[Codec, CODECS])
    given = {key: value for key, value in known.items() if key == "name" or getattr(codec, key) != default[key]}
    if len(given) == 1:
        return str(given["name"])
    return str(yaml.safe_dump(given, default_flow_style=True, sort_keys=False, width=1000)).strip()


def _sections(comm: Comm, channels: Sequence[Channel], params_P: torch.Tensor) -> list[ExchangeSection]:
    """Every plan without compression, then plan sharded with each channel."""
    found, machine = [], Machine.of(comm, params_P.device)
    for name, plan in PLANS.members.items():
        section = ExchangeSection(plan=name)
        why = plan.supports(section, machine) or choose.no_room(plan, section, comm, params_P, ExchangeContext(1.0))
        found += [] if why else [section]
        if why:
            _leave_out(comm, name, why)
    found += [ExchangeSection(plan="sharded", up=channel, down=channel) for channel in channels]
    return list(dict.fromkeys(found))


def of_plan(section: ExchangeSection, comm: Comm, delta_P: torch.Tensor, params_P: torch.Tensor) -> Entrant:
    """A round of a plan with its codecs, with one silo on each rank. Collective."""
    silo = f"silo-{comm.rank}"
    facts = ExchangeContext(float(comm.size), [f"silo-{rank}" for rank in range(comm.size)], [silo])
    made = choose.make(section, comm, params_P, facts)
    if made.in_shared_memory:  # there the delta must lie in the shared window
        delta_P = made.delta().copy_(delta_P)
    params_P, state = made.home(params_P, FedAvg().init(made.shard(params_P)))
    rounds = itertools.count(1)

    def run() -> None:
        round = next(rounds)
        made.begin(round, 1)
        made.add(Contribution(silo, round, 1.0, delta_P, 0.0, 1, 1))
        made.finish(params_P, Server(FedAvg()), state)

    return Entrant(section.plan, run, section.up, section.member)


def _over_sockets(comm: Comm, num_params: int, stack: ExitStack) -> list[Entrant]:
    """gloo and raw TCP, if available; `stack` closes them."""
    found: list[Entrant] = []
    left = ["gloo", "tcp"]
    try:
        if comm.size == 1:
            raise FedmpiError("one rank has nobody to send to")
        peers = stack.enter_context(baselines.connected(comm))
        left.remove("tcp")
        found.append(Entrant("tcp", baselines.Tcp(comm, num_params, peers)))
        found.insert(0, Entrant("gloo", stack.enter_context(baselines.gloo(comm, num_params, peers)), moves=Replicated))
    except FedmpiError as error:
        _leave_out(comm, " and ".join(left), str(error))
    return found


def _leave_out(comm: Comm, names: str, why: str) -> None:
    if comm.rank == 0:
        say(f"fedmpi: no row for {names}: {why}", error=True)


def _sent(comm: Comm, entrant: Entrant) -> tuple[Any, Any]:
    """Bytes up and down per round, by rank [R]: means over the timed rounds. Collective."""
    table = np.zeros((comm.size, 2))
    table[comm.rank] = np.mean(entrant.sent[1:], axis=0)
    up_R, down_R = comm.share(table.reshape(-1)).reshape(table.shape).T
    return up_R, down_R
