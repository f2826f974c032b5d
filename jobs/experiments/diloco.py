"""DiLoCo against synchronous AdamW on the same tokens: losses, their ratio, and bytes sent.

    mpirun -n 2 python jobs/experiments/diloco.py [--rounds 60] [--steps 50] [--fragments 4] [--quick] [KEY=VALUE ...]

DiLoCo is configs/diloco_shakespeare.yaml. Synchronous AdamW is derived from it: the same silos visit the same batches
in the same order, but exchange after each one. The mean of their gradients is one step of a single AdamW with the inner
optimizer's arguments and learning rates, which equals training on the pooled batches. Both start with the same
parameters.

With `--fragments 4`, DiLoCo is compared with DiLoCo in fragments instead, a quarter of the parameters per exchange, on
the same tokens, without and with overlap (`late`). Either there are four times as many exchanges, a quarter of the
steps apart, so that each parameter is exchanged as often as before (`often`); or as many as before, so that all bytes
are a quarter (`rarely`).

The last line is JSON: `ratio` is DiLoCo's test loss over the other's, pooled over the silos, after the same tokens;
with `--fragments`, the loss over that of unfragmented DiLoCo. Bytes are counted up and down over all ranks. KEY=VALUE
are overrides of the configuration, such as model.width=128.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import fedmpi
from fedmpi.comm import connect
from fedmpi.components import (
    Decay,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    build,
    component,
    to_dict,
)
from fedmpi.server import Moments, Scheduled

CONFIG = Path(__file__).parents[2] / "configs" / "diloco_shakespeare.yaml"
QUICK = ["data.length=16", "data.stride=64", "model.layers=1", "model.width=16"]


@component
class AdamW(Scheduled):
    """AdamW on the server (Loshchilov & Hutter 2019, Algorithm 2), for gradients that arrive as deltas of one SGD step
    with lr 1; with bias correction, as in torch.optim.AdamW."""

    lr: NonNegativeFloat = 1e-3
    """step size"""
    steps: PositiveInt = 1
    """server steps per round of the schedule"""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """decay rates of the mean of gradients and of their squares"""
    eps: PositiveFloat = 1e-8
    """added to the square root"""
    weight_decay: NonNegativeFloat = 1e-2
    """weight decay of the parameters, times lr"""
    number: NonNegativeInt = 0
    """number of the round; `at` sets it"""

    def init(self, params_P: torch.Tensor) -> Moments:
        return Moments(torch.zeros_like(params_P), torch.zeros_like(params_P))

    def at(self, number: int, rounds: int, fraction: float) -> "AdamW":
        there = super().at(-(-number // self.steps), rounds // self.steps, fraction)
        return dataclasses.replace(there, number=number)

    def step(self, params_P: torch.Tensor, mean_P: torch.Tensor, state: Moments) -> tuple[torch.Tensor, Moments]:
        (beta1, beta2), gradient_P = self.betas, -mean_P
        state.m_P.mul_(beta1).add_(gradient_P, alpha=1 - beta1)
        state.v_P.mul_(beta2).addcmul_(gradient_P, gradient_P, value=1 - beta2)
        m_P = state.m_P / (1 - beta1**self.number)
        v_P = state.v_P / (1 - beta2**self.number)
        decayed_P = params_P * (1 - self.lr * self.weight_decay)
        return decayed_P - self.lr * m_P / (v_P.sqrt() + self.eps), state


def both(rounds: int, steps: int, overrides: list[str], out: str) -> tuple[fedmpi.Config, fedmpi.Config]:
    """The configurations of DiLoCo and of synchronous AdamW on the same tokens."""
    quiet = [f"checkpoint.every={rounds * steps}", "checkpoint.keep=1", "records.trace=false"]
    given = [f"rounds={rounds}", f"local.steps={steps}", *quiet, *overrides, f"out={out}/diloco"]
    diloco, _ = fedmpi.load(CONFIG, given)
    values: dict[str, Any] = to_dict(diloco)
    local: Any = diloco.local
    inner = local.optimizer.arguments
    values["local"] |= {"lr": 1.0, "steps": 1, "optimizer": "SGD", "schedule": "constant", "keep_optimizer": False}
    values |= {"rounds": rounds * steps, "evaluate": {"every": steps}, "out": f"{out}/synchronous"}
    synchronous = build(fedmpi.Config, values)
    adamw = AdamW(lr=local.lr, schedule=local.schedule, steps=steps, **inner)
    return diloco, dataclasses.replace(synchronous, server=dataclasses.replace(synchronous.server, optimizer=adamw))


def in_fragments(whole: fedmpi.Config, fragments: int) -> dict[str, fedmpi.Config]:
    """Configurations on the same tokens with fragments, by how often they are exchanged and whether with overlap."""
    found: dict[str, fedmpi.Config] = {}
    local: Any = whole.local
    for name, times in (("often", fragments), ("rarely", 1)):
        if local.steps % times:
            raise SystemExit(f"--steps {local.steps} is no multiple of --fragments {fragments}")
        for late in (False, True):
            key = name + "_late" * late
            found[key] = dataclasses.replace(
                whole,
                rounds=whole.rounds * times,
                out=f"{whole.out}-{key}",
                local=dataclasses.replace(local, steps=local.steps // times),
                exchange=dataclasses.replace(whole.exchange, fragments=fragments, overlap=late),
                evaluate=dataclasses.replace(whole.evaluate, every=times),
                checkpoint=dataclasses.replace(whole.checkpoint, every=whole.rounds * times),
            )
    return found


def compare_fragments(whole: fedmpi.Config, fragments: int, comm: Any) -> dict[str, Any]:
    """Losses after the same tokens, and bytes per exchange, by name; `whole` has no fragments."""
    runs = {"whole": whole, **in_fragments(whole, fragments)}
    found = {name: trained(config, comm) for name, config in runs.items()}
    if comm.rank == 0:
        for name, run in found.items():
            print(f"{name:12} test loss: {run['losses']}", file=sys.stderr, flush=True)
    return {
        "ratios": {name: round(run["losses"][-1] / found["whole"]["losses"][-1], 4) for name, run in found.items()},
        "losses": {name: run["losses"][-1] for name, run in found.items()},
        "bytes_an_exchange": {name: run["bytes"] // run["exchanges"] for name, run in found.items()},
        "bytes": {name: run["bytes"] for name, run in found.items()},
        "samples": {name: run["samples"] for name, run in found.items()},
        "fragments": fragments,
        "ranks": comm.size,
    }


def trained(config: fedmpi.Config, comm: Any) -> dict[str, Any]:
    """Trains; returns the test losses during training, samples visited, and bytes sent."""
    found: dict[str, Any] = {"losses": [], "bytes": 0, "exchanges": 0, "samples": 0}
    with fedmpi.Run(config, comm=comm) as run:
        for record in run:
            found["bytes"] += record["bytes_up"] + record["bytes_down"]
            found["exchanges"] += 1
            found["samples"] += sum(row.get("num_samples", 0) for row in record["silos"].values())
            if record.get("loss") is not None:
                found["losses"].append(round(record["loss"], 4))
    return found


def compare_synchronous(one: fedmpi.Config, other: fedmpi.Config, steps: int, comm: Any) -> dict[str, Any]:
    """Losses after the same tokens, and total bytes."""
    diloco, synchronous = (trained(config, comm) for config in (one, other))
    sent, without = synchronous["bytes"], diloco["bytes"]
    if comm.rank == 0:
        for name, found in (("DiLoCo", diloco), ("synchronous AdamW", synchronous)):
            print(f"{name:18} test loss every {steps} steps: {found['losses']}", file=sys.stderr, flush=True)
    return {
        "ratio": round(diloco["losses"][-1] / synchronous["losses"][-1], 4),
        "diloco_loss": diloco["losses"][-1],
        "synchronous_loss": synchronous["losses"][-1],
        "bytes_ratio": round(without / sent, 5) if sent else None,
        "diloco_bytes": without,
        "synchronous_bytes": sent,
        "samples": [diloco["samples"], synchronous["samples"]],
        "exchanges": [diloco["exchanges"], synchronous["exchanges"]],
        "ranks": comm.size,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="number of DiLoCo's exchanges")
    parser.add_argument("--steps", type=int, default=50, help="inner steps between exchanges")
    parser.add_argument("--fragments", type=int, default=0, help="compare with this many fragments")
    parser.add_argument("--quick", action="store_true", help="smoke test: 2 exchanges of 2 steps of a tiny model")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_args(arguments)
    if given.quick:
        given.rounds, given.steps, given.overrides = 2, 2, [*QUICK, *given.overrides]
    comm = connect()
    with tempfile.TemporaryDirectory() as folder:
        configs = both(given.rounds, given.steps, given.overrides, comm.broadcast_text(folder, 0))
        if given.fragments:
            figures = compare_fragments(configs[0], given.fragments, comm)
        else:
            figures = compare_synchronous(*configs, given.steps, comm)
        comm.barrier()
    if comm.rank == 0:
        print(json.dumps(figures), flush=True)
    comm.finish()


if __name__ == "__main__":
    main()
