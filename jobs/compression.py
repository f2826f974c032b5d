"""What compression costs in accuracy: one federation, several codecs and seeds; a table and, to a file, JSON lines.

    mpirun -n 2 python jobs/compression.py [ROUNDS] [SEEDS] [FILE]

Fashion-MNIST, 8 silos, Dirichlet(0.3), a perceptron, one epoch a round. Every silo's delta is encoded by itself
(`scope: silo`); where a codec goes both ways, the server's step comes back through it too.
"""

import json
import statistics
import sys
import tempfile

import fedmpi
from fedmpi.comm import connect
from fedmpi.components import build

INT8, INT4, TOPK = "int8", "int4", {"name": "topk", "ratio": 0.01}
VARIANTS = {
    "float32": {},
    "int8 + feedback, both ways": {w: {"codec": INT8, "feedback": True} for w in ("up", "down")},
    "int4 + feedback, both ways": {w: {"codec": INT4, "feedback": True} for w in ("up", "down")},
    "top-k 1 % + feedback, up": {"up": {"codec": TOPK, "feedback": True}},
    "top-k 1 %, no feedback, up": {"up": {"codec": TOPK}},
}


def config(variant: str, seed: int, rounds: int, out: str) -> dict:
    return {
        "rounds": rounds,
        "seed": seed,
        "out": out,
        "data": {"name": "fashion_mnist", "silos": 8, "partition": {"name": "dirichlet", "alpha": 0.3}},
        "model": {"name": "mlp", "hidden": [128]},
        "local": {
            "name": "sgd",
            "lr": 0.02,
            "epochs": 1,
            "batch_size": 64,
            "optimizer": {"name": "SGD", "momentum": 0.9},
        },
        "exchange": {"plan": "sharded", "scope": "silo", **VARIANTS[variant]},
        "evaluate": {"every": 5},
        "checkpoint": {"every": rounds, "keep": 1},
    }


def main() -> None:
    rounds, seeds = (int(text) for text in (sys.argv[1:3] + ["100", "3"][len(sys.argv[1:3]) :]))
    comm = connect()
    found: dict[str, list[float]] = {name: [] for name in VARIANTS}
    sent: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = comm.say(folder, 0)
        for seed in range(seeds):
            for number, name in enumerate(VARIANTS):
                built = build(fedmpi.Config, config(name, seed, rounds, f"{folder}/{seed}-{number}"))
                with fedmpi.Run(built, comm_=comm) as run:
                    records = list(run)
                curve = [r["accuracy"] for r in records if "accuracy" in r]
                found[name].append(curve[-1])
                sent[name] = records[-1]["bytes_up"] + records[-1]["bytes_down"]
                if comm.rank == 0:
                    row = {"codec": name, "seed": seed, "accuracy": curve, "bytes": sent[name]}
                    print(json.dumps(row), file=sys.stderr, flush=True)
                    if len(sys.argv) > 3:
                        with open(sys.argv[3], "a") as file:
                            print(json.dumps(row), file=file)
        comm.meet()
    if comm.rank == 0:
        print(f"accuracy after {rounds} rounds, {seeds} seeds: mean (least to most), MB a round")
        for name, last in found.items():
            mean, megabytes = statistics.mean(last), sent[name] / 1e6
            print(f"  {name:28} {mean:.4f}  ({min(last):.4f} to {max(last):.4f})  {megabytes:8.2f}")


main()
