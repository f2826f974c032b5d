"""Partial cohorts under every plan, with models that may hold the parameters of the round before, and without.

mpirun -n 3 python held.py FOLDER
"""

import json
import sys
from typing import Any

from fedmpi import Config, Run, flat
from fedmpi.comm import connect
from fedmpi.components import build
from fedmpi.flat import sha256

PLANS: dict[str, dict[str, Any]] = {
    "shared_memory": {"plan": "shared_memory"},
    "root": {"plan": "root"},
    "sharded": {"plan": "sharded"},
    "fragments": {"plan": "sharded", "fragments": 2},
    "replicated": {"plan": "replicated"},
}
ALWAYS, NEVER = 1, 1 << 62  # elements from which on a model is a large one

comm = connect()
for name, exchange in PLANS.items():
    outcomes = []
    for large in (NEVER, ALWAYS):
        flat.COMPILED = large
        values = {
            "rounds": 5,
            "out": f"{sys.argv[1]}/{name}-{large}",
            "data": {"name": "digits", "silos": comm.size, "partition": "dirichlet"},
            "model": "logistic",
            "local": {"name": "sgd", "lr": 0.3, "epochs": 1},
            "select": {"name": "uniform", "fraction": 0.3},
            "exchange": exchange,
            "device": {"name": "cpu"},
        }
        with Run(build(Config, values), comm=comm) as run:
            records = list(run)
        figures = [(r["cohort"], {silo: figures["accuracy"] for silo, figures in r["silos"].items()}) for r in records]
        outcomes.append((sha256(run.parameters), figures))
    if comm.rank == 0:
        print(json.dumps({"plan": name, "same": outcomes[0] == outcomes[1], "rounds": len(outcomes[1][1])}), flush=True)
comm.finish()
