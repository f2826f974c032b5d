"""What federation costs: rounds of `fedmpi.Run` against a plain loop that does the same local work and no exchange.

    mpirun -n 2 python jobs/federation_cost.py [ROUNDS] [KEY=VALUE ...]

Both do, on every rank, in turns: every silo of the rank from the global parameters through its local epochs, then the
evaluation of its test data. The plain loop is what one would write in torch without fedmpi. Medians over rounds of the
slowest rank's wall time; the ratio comes first.
"""

import copy
import json
import statistics
import sys
import tempfile
import time

import numpy as np
import torch

import fedmpi
from fedmpi.comm import connect


def plain_round(module, silos, work, batch, device):
    """The same epochs over the same silos, as a torch user writes them."""
    for silo in silos.values():
        local = copy.deepcopy(module)
        local.train()
        optimizer = torch.optim.SGD(local.parameters(), lr=work.lr, **work.optimizer.arguments)
        x, y = silo.data.x_train, silo.data.y_train
        for _ in range(work.epochs):
            order = torch.randperm(len(x))
            for start in range(0, len(x), work.batch_size):
                rows = order[start : start + work.batch_size]
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(local(x[rows]), y[rows]).backward()
                optimizer.step()
        local.eval()
        with torch.no_grad():
            for start in range(0, len(silo.data.x_test), batch):
                outputs = local(silo.data.x_test[start : start + batch])
                (outputs.argmax(1) == silo.data.y_test[start : start + batch]).sum().item()


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 8
    comm = connect()
    out = comm.say(tempfile.mkdtemp() if comm.rank == 0 else "", 0)
    overrides = [f"rounds={rounds}", f"out={out}", "local.epochs=1", *sys.argv[2:]]
    seconds = {"fedmpi": [], "plain": []}
    with fedmpi.Run("configs/fashion.yaml", *overrides, comm_=comm) as run:
        config, silos = run.config, run._federation.silos
        plain = copy.deepcopy(run.model)
        records = iter(run)
        work = {
            "fedmpi": lambda: next(records),
            "plain": lambda: plain_round(plain, silos, config.local, config.evaluate.batch_size, run.device),
        }
        for number in range(rounds):
            for name in sorted(work, reverse=bool(number % 2)):
                comm.share(np.zeros(1))
                start = time.perf_counter()
                work[name]()
                mine = np.zeros(comm.size)
                mine[comm.rank] = time.perf_counter() - start
                seconds[name].append(float(comm.share(mine).max()))
        exchange = run.record["seconds"]
    if comm.rank == 0:
        median = {name: statistics.median(values[1:]) for name, values in seconds.items()}
        figures = {
            "ratio": round(median["fedmpi"] / median["plain"], 4),
            "fedmpi_s": round(median["fedmpi"], 4),
            "plain_s": round(median["plain"], 4),
            "rounds": rounds - 1,
            "ranks": comm.size,
            "last_round_s": {k: round(v, 5) for k, v in exchange.items()},
        }
        print(json.dumps(figures))


main()
