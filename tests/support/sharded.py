"""Rounds of the sharded plan on ranks that are threads."""

import torch

from fedmpi.comm.threads import on_ranks
from fedmpi.components import build
from fedmpi.exchange.base import ExchangeContext
from fedmpi.exchange.choose import make
from fedmpi.exchange.config import ExchangeSection
from fedmpi.server import OPTIMIZERS, Server
from fedmpi.types import Contribution

P = 20_000  # five pieces, the last one short
WEIGHTS = (3.0, 1.0, 2.0, 5.0, 4.0)
OWNERS = {1: (0, 0, 0, 0, 0), 2: (0, 1, 0, 1, 1), 3: (2, 0, 2, 1, 0), 4: (3, 0, 0, 2, 0), 5: (4, 3, 1, 0, 2)}


def section(up=None, down=None, **fields):
    return build(ExchangeSection, {"plan": "sharded", "up": up or {}, "down": down or {}, **fields})


def fed_back_of(exchange):
    return {one.silo: one.tensor for one in exchange.holders["up"].state() if one.key[-1] == "feedback"}


def drawn(rounds, silos=5, seed=0):
    """Initial parameters, and each round's deltas by silo."""
    draw = torch.Generator().manual_seed(seed)
    deltas = 1e-2 * torch.randn(rounds, silos, P, generator=draw)
    return torch.randn(P, generator=draw), deltas


def run(how, start_P, deltas_RKP, num_ranks, server="fedavg", cohorts=None, owners=None, aggregator=None):
    """Each rank's result: parameters, counted bytes, residuals, whole server vectors, bytes of one round."""
    optimizer = OPTIMIZERS.build(server, "")
    owners = owners or OWNERS[num_ranks]

    def work(comm):
        ids = list("abcde")
        hosted = [silo for silo, owner in zip(ids, owners, strict=True) if owner == comm.rank]
        params_P = start_P.clone()
        exchange = make(how, comm, params_P, ExchangeContext(sum(WEIGHTS), ids, hosted, 7, aggregator))
        state = optimizer.init(exchange.shard(params_P))
        for number, deltas_KP in enumerate(deltas_RKP, start=1):
            cohort = [k for k in (cohorts or {}).get(number, range(5)) if owners[k] == comm.rank]
            exchange.begin(number, len(cohort))
            for k in cohort:
                delta_P = deltas_KP[k].clone()
                exchange.add(Contribution(ids[k], number, WEIGHTS[k], delta_P, 0.0, 1, 1))
                if len(cohort) > 1 or how.scope == "silo":
                    delta_P.fill_(float("nan"))  # the next silo reuses its memory
            before = (comm.bytes_up, comm.bytes_down, comm.bytes_control)
            params_P, state = exchange.finish(params_P, Server(optimizer), state)
            spent = [b - a for a, b in zip(before, (comm.bytes_up, comm.bytes_down, comm.bytes_control), strict=True)]
        lost = exchange.holders["down"].state() if "down" in exchange.holders else ()
        server_P = [exchange.gather(part) for part in (*state, *(one.tensor for one in lost))]
        residuals = {silo: tensor.clone() for silo, tensor in fed_back_of(exchange).items()}
        return params_P, spent, residuals, server_P

    return on_ranks(num_ranks, work)
