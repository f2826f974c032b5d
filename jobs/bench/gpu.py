"""Compares everything that runs on a GPU with the CPU; started by jobs/gpu.sh.

    mpirun -n 2 python jobs/bench/gpu.py [--quick] [--required] [--seconds 400] [--only PART,...] [--json FILE]

    kernels     every codec's kernels against `plain`, bit for bit; times in units of a copy on the device
    exchange    the same deltas through every plan, codec, aggregator and server optimizer, on both
    rules       a few rounds of every local rule, on both; several kinds of models; bf16
    overlap     the exchange in its own stream
    memory      staging through page-locked memory, samples on the device and too many for it, a shared GPU

A row names the case, how far the two are apart, and whether that is close enough. All ranks share the available GPUs.
Cases that do not fit into the time limit get a row that says so. The exit code is 1 if any row failed.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import fedmpi
from fedmpi import device
from fedmpi.aggregate import AGGREGATORS
from fedmpi.codecs import CODECS, base
from fedmpi.comm import connect
from fedmpi.components import Deferred, build, component
from fedmpi.errors import ConfigError
from fedmpi.flat import FlatModel
from fedmpi.kernels import plain
from fedmpi.local import RULES, LocalRule, LocalSilo, Round
from fedmpi.server import OPTIMIZERS, FedAvg
from fedmpi.types import Contribution, Silo, SiloData, Source

KERNEL_PARAMS, PARAMS, ROUNDS = 200_000, 300_000, 3
TAKES: dict[str, dict[str, Any]] = {  # required fields of members
    "qffl": {"lr": 0.1},
    "trimmed_mean": {"fraction": 0.3},
    **{name: {"hostile": 0} for name in ("krum", "multi_krum", "bulyan")},
    "bucketing": {"inner": "centered_clipping"},
    "nearest_neighbour_mixing": {"hostile": 1, "inner": "median"},
    "fedrep": {"head_epochs": 1},
    "per_fedavg": {"inner_lr": 0.05},
}
NEAR = 1e-4  # relative to the distance moved: another order of sums, fused multiply-add
NEAR_TRAINING = 2e-2  # where matrix products differ and errors accumulate over steps
FED = {"feedback": True}
LOSSY = [name for name in CODECS.members if name != "identity"]


class Row(NamedTuple):
    """One comparison."""

    part: str
    case: str
    ok: bool
    figure: float | None  # the difference, in the unit that `said` names
    said: str
    seconds: float


Case = tuple[str, Callable[[], tuple[bool, float | None, str]]]


# ---------------------------------------------------------------- kernels


def kernels(num_timed: int) -> Iterator[Case]:
    """Every codec: the same bits as `plain`, and times relative to a copy."""
    variants: list[dict[str, Any]] = [{"name": name} for name in CODECS.members]
    variants += [{"name": name, "rounding": "stochastic"} for name in ("int8", "int4")]
    for variant in variants:
        codec = CODECS.build(variant, "codec")
        yield " ".join(map(str, variant.values())), partial(_kernel, codec, num_timed)


def _kernel(codec: Any, num_timed: int) -> tuple[bool, float | None, str]:
    draw = torch.Generator().manual_seed(1)
    x, lost = (torch.randn(KERNEL_PARAMS, generator=draw) for _ in range(2))
    x[::7], x[1::7] = 0.0, 1e-40  # ties, and values below a step
    key = 2**63 + 11
    wanted: list[torch.Tensor] = []
    found: list[torch.Tensor] = []
    for where in ("cpu", "cuda"):
        payload = torch.zeros(codec.max_bytes(len(x)), dtype=torch.uint8, device=where)
        residual, total = lost.to(where, copy=True), torch.ones(len(x), device=where)
        with _only_plain() if where == "cpu" else _nothing():
            num_bytes = codec.encode(x.to(where), payload, key, 0.7, residual)
            codec.add(payload[: num_bytes if not codec.fixed else None], total, key, 0.3)
        (wanted if where == "cpu" else found).extend(t.cpu() for t in (payload[:num_bytes], residual, total))
    for what, mine, theirs in zip(("payload", "residual", "sum"), found, wanted, strict=True):
        if mine.shape != theirs.shape or not torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8)):
            return False, None, f"{what}: other bits than plain's"
    x = torch.randn(num_timed, device="cuda")
    payload, out = torch.zeros(codec.max_bytes(num_timed), dtype=torch.uint8, device="cuda"), torch.empty_like(x)
    copy_s = _seconds(lambda: out.copy_(x))
    encode_s = _seconds(lambda: codec.encode(x, payload, key))
    decode_s = _seconds(lambda: codec.decode(payload, out, key))
    return True, (encode_s + decode_s) / copy_s, f"copies to encode and decode {num_timed:,} values; same bits"


class _only_plain:
    """Makes the codecs use the plain kernels."""

    def __enter__(self) -> None:
        self._kernels = base._kernels
        base._kernels = lambda on: (plain, base.to_array)  # type: ignore[assignment]

    def __exit__(self, *error: Any) -> None:
        base._kernels = self._kernels


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *error: Any) -> None: ...


def _seconds(work: Callable[[], object], repeats: int = 3) -> float:
    times = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        start_s = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start_s)
    return max(min(times[1:]), 1e-9)


# ---------------------------------------------------------------- whole runs, on both


@dataclass(frozen=True)
class Nothing:
    """At least four silos, two per rank, with one sample each."""

    ranks: int

    def source(self, seed: int) -> Source:
        silos = tuple(Silo(f"silo-{i}", 1) for i in range(max(4, 2 * self.ranks)))
        x, y = torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64)
        return Source("classification", (1,), 2, silos, lambda silo: SiloData(x, y, x, y))


class Vector(torch.nn.Module):
    """A module of parameters only."""

    def __init__(self, num_params: int) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.linspace(-1, 1, num_params))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.w[:2]


@dataclass(frozen=True)
class Drift(LocalRule):
    """Local training that only moves parameters, by the same amounts on any device.

    `late`: the device executes it long after the host has continued."""

    late: bool = False

    def train(self, silo: LocalSilo, model: FlatModel, params_P: torch.Tensor, round: Round) -> Contribution:
        rng = np.random.default_rng([round.number, int(silo.id.rpartition("-")[2])])
        bump_P = torch.from_numpy(rng.standard_normal(model.num_shared).astype(np.float32) * 1e-2).to(model.device)
        delta_P = model.take_delta(params_P).zero_()
        if self.late:
            _linger(model.device)
        delta_P.copy_(bump_P)
        return Contribution(silo.id, round.number, silo.weight, delta_P, 0.0, 1, 1)


@component
class LateFedAvg(FedAvg):
    """FedAvg whose step the device executes long after the host has continued."""

    def step(self, params_P: torch.Tensor, mean_P: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        _linger(params_P.device)
        return super().step(params_P, mean_P, state)


def _linger(on: torch.device) -> None:
    if on.type == "cuda":
        torch.cuda._sleep(50_000_000)  # type: ignore[no-untyped-call]  # cycles: tens of milliseconds


def exchanges(comm: Any) -> Iterator[Case]:
    """The same deltas through every plan, codec, aggregator and server optimizer."""
    sections: dict[str, dict[str, Any]] = {}
    for plan in ("root", "replicated", "sharded"):
        sections[f"{plan}"] = {"plan": plan, "verify": True}
        sections[f"{plan}, in the ring"] = {"plan": plan, "reduction": "reproducible"}
    sections["measured"] = {"plan": "measure"}
    sections["regions"] = {"plan": "root", "regions": {}}
    for name in LOSSY:
        channel = {"codec": name, **FED}
        if CODECS.build(name, "codec").linear:
            sections[f"replicated, {name}"] = {"plan": "replicated", "up": channel}
        sections[f"sharded, {name} both ways"] = {"plan": "sharded", "up": channel, "down": channel, "verify": True}
        by_silo = {"plan": "sharded", "scope": "silo", "reduction": "reproducible", "up": channel}
        sections[f"sharded by silo, {name}"] = by_silo
    for name, section in sections.items():
        yield name, partial(_both, comm, {"exchange": section}, NEAR)
    for name in AGGREGATORS.members:
        values = {"exchange": {"plan": "sharded", "scope": "silo"}, "aggregate": {"name": name, **TAKES.get(name, {})}}
        yield f"aggregate {name}", partial(_both, comm, values, NEAR)
    for name in OPTIMIZERS.members:
        if name != "feddyn":  # it belongs to a local rule
            values = {"exchange": {"plan": "sharded"}, "server": {"optimizer": name}}
            yield f"server {name}", partial(_both, comm, values, NEAR)


def _both(comm: Any, values: dict[str, Any], near: float) -> tuple[bool, float | None, str]:
    """Runs on the CPU and on the device; the difference at the end, relative to the distance moved."""
    ends = [_end(comm, values, name) for name in ("cpu", "cuda")]
    (start_P, cpu_P, cpu_loss), (_, gpu_P, gpu_loss) = ends
    moved = float((cpu_P - start_P).double().norm())
    apart = float((cpu_P - gpu_P).double().norm()) / max(moved, 1e-12)
    same = "same bits" if torch.equal(cpu_P, gpu_P) else "of the distance moved"
    ok = moved > 0 and apart <= near and bool(gpu_P.isfinite().all())
    return ok, apart, f"{same}; losses {cpu_loss:.4f} and {gpu_loss:.4f}"


def _drifting(given: dict[str, Any], comm: Any, late: bool = False) -> fedmpi.Config:
    """A configuration in which silos drift, with a vector as model."""
    config = build(fedmpi.Config, given)
    server = dataclasses.replace(config.server, optimizer=LateFedAvg()) if late else config.server
    model = Deferred("vector", lambda: Vector(PARAMS), {})
    return dataclasses.replace(config, data=Nothing(comm.size), model=model, local=Drift(late), server=server)


def _end(comm: Any, values: dict[str, Any], where: str, late: bool = False) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Parameters before and after a run of a few rounds, and its last test loss."""
    with tempfile.TemporaryDirectory() as folder:
        given: dict[str, Any] = {
            "rounds": ROUNDS,
            "out": comm.broadcast_text(folder, 0),
            "checkpoint": {"every": ROUNDS},
            "records": {"trace": False},
            "device": {"name": where, "share": True},
            **values,
        }
        config = _drifting(given, comm, late) if "data" not in values else build(fedmpi.Config, given)
        with fedmpi.Run(config, comm=comm) as run:
            start_P = run.parameters.cpu().clone()
            last = list(run)[-1]
            end_P = run.parameters.cpu().clone()
            if run.device.type != where or run.parameters.device.type != where:
                raise AssertionError(f"asked for {where}, trained on {run.device}")
        comm.barrier()
    return start_P, end_P, float(last["loss"])


DIGITS = {
    "data": {"name": "digits", "silos": 4},
    "model": {"name": "mlp", "hidden": [64]},
    "exchange": {"plan": "replicated"},
}
LOCAL = {"name": "sgd", "lr": 0.05, "epochs": 1, "batch_size": 32}


def rules(comm: Any, quick: bool) -> Iterator[Case]:
    """Every local rule that needs no more than lr and epochs or steps, several kinds of models, half precision."""
    for name in RULES.members:
        batches = {} if name == "fedsgd" else {"epochs": 1, "batch_size": 32}
        values = {**DIGITS, "local": {"name": name, "lr": 0.05, **batches, **TAKES.get(name, {})}}
        if name == "fedrep":
            values["exchange"] = {"plan": "replicated", "parameters": ["*", "!linear.*"]}
        if name in OPTIMIZERS.members:
            values["server"] = {"optimizer": name}
        yield name, partial(_both, comm, values, NEAR_TRAINING)
    models: dict[str, dict[str, Any]] = {"cnn": {"name": "cnn", "padding": 2}, "resnet18": {"name": "resnet18"}}
    for name, model in models.items():
        if not (quick and name == "resnet18"):
            local = LOCAL | {"lr": 0.005, "epochs": None, "steps": 3}
            yield f"model {name}", partial(_both, comm, {**DIGITS, "model": model, "local": local}, 10 * NEAR_TRAINING)
    for name in ("Adam", "AdamW", "RMSprop"):
        local = LOCAL | {"lr": 0.001, "optimizer": name, "keep_optimizer": True}
        yield f"optimizer {name}, kept", partial(_both, comm, {**DIGITS, "local": local}, 10 * NEAR_TRAINING)
    yield "precision bf16", partial(_half, comm)
    ring = {"exchange": {"plan": "replicated", "reduction": "reproducible"}}
    yield "reproducible twice", partial(_twice, comm, {**DIGITS, "local": LOCAL, **ring})


def _half(comm: Any) -> tuple[bool, float | None, str]:
    """bf16 against float32, both on the device."""
    whole, half = (
        _end(comm, {**DIGITS, "rounds": 5, "local": LOCAL | {"precision": precision}}, "cuda")
        for precision in ("float32", "bf16")
    )
    apart = abs(half[2] - whole[2]) / whole[2]
    differs = not torch.equal(half[1], whole[1])
    said = f"of the loss in float32, {whole[2]:.4f}" + ("" if differs else "; same bits: bf16 was not in use")
    return apart < 0.05 and differs, apart, said


def _twice(comm: Any, values: dict[str, Any]) -> tuple[bool, float | None, str]:
    one, other = (_end(comm, values, "cuda")[1] for _ in range(2))
    same = torch.equal(one, other)
    return same, 0.0 if same else float((one - other).abs().max()), "two runs on the device"


# ---------------------------------------------------------------- the stream, and memory


def overlaps(comm: Any) -> Iterator[Case]:
    """The exchange in its own stream, repeated often enough to show a race."""
    channel = {"codec": "int8", **FED}
    sections: dict[str, dict[str, Any]] = {
        "replicated": {"plan": "replicated"},
        "root": {"plan": "root"},
        "sharded, int8 both ways": {"plan": "sharded", "up": channel, "down": channel},
    }
    for name, section in sections.items():
        exchange = section | {"overlap": True}
        yield f"{name}, deltas", partial(_both, comm, {"exchange": exchange, "rounds": 6}, NEAR)
        yield f"{name}, late", partial(_late, comm, exchange)
        training = {**DIGITS, "local": LOCAL, "exchange": exchange, "rounds": 6}
        yield f"{name}, digits", partial(_both, comm, training, NEAR_TRAINING)
    yield "memory", partial(_steady, comm)


def _late(comm: Any, exchange: dict[str, Any]) -> tuple[bool, float | None, str]:
    """Deltas and steps that the device computes late: code that does not wait for them would read old values."""
    values = {"exchange": exchange, "rounds": 4}
    one, other = (_end(comm, values, "cuda", late)[1] for late in (False, True))
    same = torch.equal(one, other)
    return same, 0.0 if same else float((one - other).abs().max()), "a hurried device against one that lingers"


def _steady(comm: Any) -> tuple[bool, float | None, str]:
    """Memory reserved on the device must not grow from round to round."""
    reserved = []
    with tempfile.TemporaryDirectory() as folder:
        exchange = {"plan": "replicated", "overlap": True}
        given = {
            "rounds": 12,
            "out": comm.broadcast_text(folder, 0),
            "exchange": exchange,
            "device": {"name": "cuda", "share": True},
        }
        with fedmpi.Run(_drifting(given, comm), comm=comm) as run:
            for _ in run:
                reserved.append(torch.cuda.memory_reserved())
        comm.barrier()
    grown = reserved[-1] - reserved[3]
    return grown <= 0, grown / 2**20, "MiB more reserved after round 12 than after round 4"


def memory(comm: Any, num_timed: int) -> Iterator[Case]:
    """Staging, placement of samples, and a GPU shared by two ranks."""
    yield "staging", partial(_staging, comm, num_timed)
    yield "samples on the device", partial(_samples, comm, False)
    yield "samples beside it", partial(_samples, comm, True)
    yield "a shared GPU", partial(_shared, comm)


def _staging(comm: Any, num: int) -> tuple[bool, float | None, str]:
    locked, there = comm.allocate(num, torch.float32, pinned=True), torch.zeros(num, device="cuda")
    loose = torch.zeros(num)
    up_s, loose_s = _seconds(lambda: locked.copy_(there)), _seconds(lambda: loose.copy_(there))
    down_s = _seconds(lambda: there.copy_(locked))
    said = f"GB/s to the host ({4e-9 * num / loose_s:.1f} without page-locking), {4e-9 * num / down_s:.1f} back"
    return locked.is_pinned() and not loose.is_pinned(), 4e-9 * num / up_s, said


def _samples(comm: Any, full: bool) -> tuple[bool, float | None, str]:
    """The same run with samples on the device and, with its free memory faked as 0, in page-locked host memory."""
    real = torch.cuda.mem_get_info
    places: list[str] = []
    keep_on = device.keep_on

    def noted(chosen: torch.device, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        kept = keep_on(chosen, tensors)
        places.extend(f"{t.device.type}{' pinned' if t.device.type == 'cpu' and t.is_pinned() else ''}" for t in kept)
        return kept

    values = {**DIGITS, "local": LOCAL}
    wanted = _end(comm, values, "cuda")[1]
    device.keep_on = noted  # type: ignore[assignment]
    if full:
        torch.cuda.mem_get_info = lambda device=None: (0, 1)  # type: ignore[assignment]
    try:
        found = _end(comm, values, "cuda")[1]
    finally:
        device.keep_on, torch.cuda.mem_get_info = keep_on, real
    there = set(places) == ({"cpu pinned"} if full else {"cuda"})
    apart = float((found - wanted).abs().max())
    return there and apart <= 1e-6, apart, f"apart at most; samples are on {', '.join(sorted(set(places)))}"


def _shared(comm: Any) -> tuple[bool, float | None, str]:
    """Two ranks on one GPU are refused unless sharing is allowed."""
    oversubscribed = comm.size > torch.cuda.device_count()
    try:
        device.choose("cuda", False, comm)
        refused = ""
    except ConfigError as error:
        refused = str(error)
    return bool(refused) == oversubscribed, None, refused or f"{comm.size} ranks, {torch.cuda.device_count()} GPUs"


# ---------------------------------------------------------------- all of it


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smoke test: time short vectors")
    parser.add_argument("--required", action="store_true", help="fail if there is no GPU")
    parser.add_argument("--seconds", type=float, default=400, help="no case starts later than this")
    parser.add_argument("--only", default="", metavar="PART,PART", help="kernels, exchange, rules, overlap, memory")
    parser.add_argument("--json", type=Path, help="file for all rows and a description of the machine")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        if given.required:
            raise SystemExit(
                f"gpu: there is a GPU, and torch {torch.__version__} does not find it: is it built for CUDA?"
            )
        print("gpu: no GPU", flush=True)
        return
    comm = connect()
    start_s = time.monotonic()
    torch.cuda.set_device(device.choose("cuda", True, comm))
    # TensorFloat-32 products suit training, but are too inexact for a comparison.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    num_timed = 100_000 if given.quick else 25_000_000
    parts: dict[str, Iterator[Case]] = {
        "kernels": kernels(num_timed),
        "exchange": exchanges(comm),
        "rules": rules(comm, given.quick),
        "overlap": overlaps(comm),
        "memory": memory(comm, num_timed),
    }
    wanted = [name for name in given.only.split(",") if name] or list(parts)
    rows = []
    for part in wanted:
        for case, work in parts[part]:
            rows.append(_row(comm, part, case, work, time.monotonic() - start_s > given.seconds))
            if comm.rank == 0:
                print(_line(rows[-1]), flush=True)
    bad = [row for row in rows if not row.ok]
    if comm.rank == 0:
        about = {
            "gpu": torch.cuda.get_device_name(),
            "gpus": torch.cuda.device_count(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "ranks": comm.size,
            "seconds": round(time.monotonic() - start_s, 1),
            "failed": [f"{row.part}: {row.case}" for row in bad],
        }
        print(f"gpu: {len(rows) - len(bad)} of {len(rows)} as on the CPU, {json.dumps(about)}", flush=True)
        if given.json is not None:
            given.json.write_text(json.dumps(about | {"rows": [row._asdict() for row in rows]}, indent=1) + "\n")
    comm.finish()
    if bad:
        raise SystemExit(1)


def _row(comm: Any, part: str, case: str, work: Callable[[], tuple[bool, float | None, str]], late: bool) -> Row:
    """Runs a case; the same row on every rank, not ok if it failed on any."""
    if float(comm.share(np.array([float(late)]))[0]):
        return Row(part, case, False, None, "no time was left", 0.0)
    start_s = time.monotonic()
    try:
        ok, figure, said = work()
    except Exception as error:
        if os.environ.get("FEDMPI_TRACEBACK"):
            traceback.print_exc(file=sys.stderr)
        ok, figure, said = False, None, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    everywhere = not float(comm.share(np.array([float(not ok)]))[0])
    return Row(part, case, everywhere, figure, said, round(time.monotonic() - start_s, 3))


def _line(row: Row) -> str:
    figure = "" if row.figure is None else f"{row.figure:.3g}"
    return f"{'ok  ' if row.ok else 'FAIL'}  {row.part:9} {row.case:34} {figure:>9}  {row.seconds:5.1f} s  {row.said}"


if __name__ == "__main__":
    main()
