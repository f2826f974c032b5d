"""How many updates the server of `engine: buffered` takes in a second, on one core, beside one copy of the vector.

    x_memcpy        time of an update / time of a copy; smaller is better
    updates_per_s   updates in a second

An update's time is from when its vector lies in memory until the server is ready for the next one: it is added to the
buffer, and every `size` updates the server steps (FedAvg). Receiving it is not part of it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from itertools import count

import torch

from fedmpi.bench.timing import Candidates, Row, in_turns
from fedmpi.comm import SoloComm
from fedmpi.exchange.arrivals import Arrivals
from fedmpi.exchange.base import ExchangeContext
from fedmpi.exchange.config import ExchangeSection
from fedmpi.server import FedAvg, Server

COLUMNS = ["size", "x_memcpy", "updates_per_s", "median_s"]
SIZES = (1, 2, 10)  # of the buffer


def arrivals(num_params: int, repeats: int = 15) -> list[Row]:
    """A row for each buffer size, on one thread."""
    torch.set_num_threads(1)
    delta_P, other_P = (torch.randn(num_params).mul_(1e-3) for _ in range(2))
    copied_P = torch.zeros_like(delta_P)
    candidates: Candidates = {"memcpy": lambda: copied_P.copy_(delta_P)}
    candidates |= {str(size): _round(size, delta_P, other_P) for size in SIZES}
    seconds = in_turns(SoloComm(), candidates, repeats)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    rows: list[Row] = []
    for size in SIZES:
        of_update = median[str(size)] / size
        row: Row = {"size": size, "params": num_params, "x_memcpy": of_update / median["memcpy"]}
        rows.append(row | {"updates_per_s": 1 / of_update, "seconds": {"median": of_update}})
    return rows


def _round(size: int, first_P: torch.Tensor, other_P: torch.Tensor) -> Callable[[], object]:
    """A round of so many updates, from the first one's arrival until the new parameters are there."""
    ids = [f"silo-{i}" for i in range(size)]
    params_P = torch.zeros_like(first_P)
    facts = ExchangeContext(float(size), ids, ids, arrivals=True)
    made, rounds = Arrivals(ExchangeSection(plan="root"), SoloComm(), params_P, facts), count(1)
    optimizer = FedAvg()
    state = optimizer.init(params_P)

    def run() -> None:
        made.begin(next(rounds), size)
        for i, silo in enumerate(ids):
            less = (1 + i) ** -0.5
            made.fold_in(silo, other_P if i else first_P, made.factor(1.0, less), less)
        made.finish(params_P, Server(optimizer), state)

    return run
