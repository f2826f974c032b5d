"""Damages run directories: flips bits and bytes and cuts off ends in every file; checks that each is noticed.

    python jobs/experiments/drill_flips.py [--trials 500] [--seed 0] [--quick]

Runs with `ucb`, `power_of_choice` and `fednova` are interrupted after round 6 of 9. Each trial damages a copy once,
reads it with inspect and eval, and resumes it. Prints one line per file and kind of damage, with numbers of trials:

    same      figures and bits of an undamaged run
    skipped   a warning, an earlier round, and from there the same bits again
    refused   one line, exit code 2
    SILENT    any other result; TRACEBACK: an unexpected error. Either gives exit code 1
"""

import argparse
import contextlib
import logging
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fedmpi
from fedmpi import checkpoint, results
from fedmpi.comm import SoloComm
from fedmpi.components import build
from fedmpi.config import Config
from fedmpi.errors import FedmpiError
from fedmpi.records import read_metrics
from fedmpi.types import Silo, SiloData, Source

BEFORE, ROUNDS = 6, 9
OUTCOMES = ("same", "skipped", "refused", "SILENT", "TRACEBACK")
HARMS = ("bit", "byte", "cut")


@dataclass(frozen=True)
class Clouds:
    """Four silos, each with two clouds of points."""

    def source(self, seed: int) -> Source:
        return Source("classification", (6,), 2, tuple(Silo(f"silo-{i}") for i in range(4)), self.open)

    def open(self, silo: str) -> SiloData:
        number = int(silo[-1])
        rng = torch.Generator().manual_seed(number)
        y = torch.arange(30 + 10 * number) % 2
        x = torch.randn(len(y), 6, generator=rng) + y[:, None] * torch.linspace(0, 1, 6)
        return SiloData(x, y, x[:9], y[:9])


RUNS: dict[str, dict[str, Any]] = {
    "ucb": {
        "select": {"name": "ucb", "fraction": 0.5},
        "local": {"name": "scaffold", "lr": 0.1, "epochs": 1, "batch_size": 8},
        "server": {"optimizer": "fedadam"},
    },
    "power_of_choice": {
        "select": {"name": "power_of_choice", "fraction": 0.5, "losses": "last"},
        "local": {"name": "sgd", "lr": 0.1, "epochs": 1, "batch_size": 8, "keep_optimizer": True,
                  "optimizer": {"name": "SGD", "momentum": 0.9}},
        "exchange": {"plan": "sharded", "up": {"codec": "int8", "feedback": True}},
    },
    "fednova": {
        "aggregate": "fednova",
        "local": {"name": "sgd", "lr": 0.1, "epochs": 3, "batch_size": 8, "amount": "drawn"},
        "exchange": {"parameters": ["*", "!*bias"]},
    },
}  # fmt: skip


def config(kind: str, out: Path, rounds: int) -> Config:
    data = {"name": f"{Clouds.__module__}:Clouds"}
    more = {"checkpoint": {"every": 2, "keep": 2}, "device": {"name": "cpu"}}
    return build(Config, {"rounds": rounds, "out": str(out), "data": data, **more, **RUNS[kind]})


def train(kind: str, out: Path) -> None:
    """Trains to the last round, in this process."""
    with fedmpi.Run(config(kind, out, ROUNDS), comm=SoloComm()) as run:
        for _ in run:
            pass


def figures(record: dict[str, Any] | None) -> dict[str, Any]:
    """A record without clock and memory readings."""
    return {k: v for k, v in (record or {}).items() if k not in ("seconds", "time", "peak_rss_bytes", "bytes_control")}


def looked_at(out: Path) -> dict[str, Any]:
    """The results of inspect and eval."""
    told = results.inspect(out)
    told["metrics"] = figures(told["metrics"])
    told["evaluated"] = results.evaluate(out, allow=[Clouds.__module__])
    del told["config"]  # names the folder
    return told


def state(out: Path) -> dict[Any, bytes]:
    """All bits of the newest checkpoint, by silo and key."""
    found: dict[Any, torch.Tensor] = {**checkpoint.read_server(out, ROUNDS)}
    for silo, kept in checkpoint.read_silos(out, ROUNDS, [f"silo-{i}" for i in range(4)]).items():
        found |= {(silo, *key): tensor for key, tensor in kept.items()}
    return {key: t.reshape(-1).view(torch.uint8).numpy().tobytes() for key, t in found.items()}


@dataclass
class Whole:
    """An undamaged run: interrupted, with its results and final state."""

    root: Path
    told: dict[int, dict[str, Any]]  # results by newest remaining checkpoint
    records: dict[int, dict[str, Any]]
    state: dict[Any, bytes]


def whole(kind: str, folder: Path) -> Whole:
    root, rest = folder / kind, folder / f"{kind}-rest"
    with fedmpi.Run(config(kind, root, ROUNDS), comm=SoloComm()) as run:
        for record in run:
            if record["round"] == BEFORE:
                break
    told = {}
    shutil.copytree(root, rest)
    for number in reversed(checkpoint.sealed_rounds(root)):
        told[number] = looked_at(rest)
        checkpoint.remove(rest, number)
    shutil.rmtree(rest)
    shutil.copytree(root, rest)
    train(kind, rest)
    return Whole(root, told, {r["round"]: figures(r) for r in read_metrics(rest)}, state(rest))


def harm(path: Path, how: str, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    at = rng.randrange(len(content))
    if how == "cut":
        del content[at:]
    else:
        content[at] ^= 1 << rng.randrange(8) if how == "bit" else rng.randrange(1, 256)
    path.write_bytes(content)


@contextlib.contextmanager
def warnings() -> Iterator[list[str]]:
    """Collects the warnings logged inside the block."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("fedmpi")
    logger.addHandler(handler)
    propagates, logger.propagate = logger.propagate, False
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


def outcome(kind: str, out: Path, good: Whole) -> tuple[str, str]:
    """The outcome for a damaged copy, and the reason if it is bad."""
    worst = "same"
    with warnings() as said:
        for resumes in (False, True):
            before = len(said)
            try:
                why = resumed(kind, out, good) if resumes else seen(out, good)
            except FedmpiError as error:
                if error.exit_code != 2 or "\n" in str(error):
                    return "TRACEBACK", f"exit code {error.exit_code}: {error}"
                worst = max(worst, "refused", key=OUTCOMES.index)
                continue
            except Exception as error:
                return "TRACEBACK", repr(error)
            if why == "earlier" and len(said) > before:
                worst = max(worst, "skipped", key=OUTCOMES.index)
            elif why:
                return "SILENT", why
    return worst, ""


def seen(out: Path, good: Whole) -> str:
    """What is wrong with the results of inspect and eval; `earlier` if they are right for an earlier round."""
    told = looked_at(out)
    if told == good.told[BEFORE]:
        return ""
    there, best, evaluated = good.told.get(told["rounds"], {}), told["best"] or {}, told["evaluated"]
    # inspect reads the server's file, eval also those of silos, so eval may use an earlier round. Damaged checkpoints
    # are not listed.
    same = all(told[name] == there.get(name) for name in ("params_sha256", "metrics", "versions"))
    same &= not best or best.items() <= good.records[best["round"]].items()
    same &= evaluated == good.told.get(evaluated["round"], {}).get("evaluated")
    return "earlier" if same else "inspect or eval say something else"


def resumed(kind: str, out: Path, good: Whole) -> str:
    """What is wrong with the resumed run; `earlier` if it is right but repeated rounds, or lacks a record."""
    with fedmpi.Run(config(kind, out, ROUNDS), comm=SoloComm()) as run:
        began = run.resumed
        for _ in run:
            pass
    if state(out) != good.state:
        return "other bits"
    records = {record["round"]: figures(record) for record in read_metrics(out)}
    if others := [number for number, record in records.items() if record != good.records[number]]:
        return f"other records of rounds {others}"
    return "" if began == BEFORE and len(records) == ROUNDS else "earlier"


def drill(trials: int, seed: int, folder: Path) -> tuple[dict[tuple[str, str], Counter[str]], list[str]]:
    """Outcomes by file and damage, and descriptions of bad ones."""
    rng = random.Random(seed)
    goods = {kind: whole(kind, folder) for kind in RUNS}
    table: dict[tuple[str, str], Counter[str]] = {}
    bad = []
    for trial in range(trials):
        kind = list(RUNS)[trial % len(RUNS)]
        good = goods[kind]
        files = sorted(p for p in good.root.rglob("*") if p.is_file() and p.stat().st_size)
        path, how = rng.choice(files).relative_to(good.root), rng.choice(HARMS)
        copy = folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(good.root, copy)
        harm(copy / path, how, rng)
        found, why = outcome(kind, copy, good)
        name = (
            path.name
            if path.parent == Path()
            else f"{'newest' if f'{BEFORE:06d}' in path.parts[1] else 'older'} {path.name}"
        )
        table.setdefault((name, how), Counter())[found] += 1
        if why:
            bad.append(f"trial {trial}, {kind}, {path}, {how}: {found}: {why}")
    return table, bad


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="24 trials")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="fedmpi-drill-") as folder:
        table, bad = drill(24 if given.quick else given.trials, given.seed, Path(folder))
    print(f"{'file':<28}{'harm':<6}" + "".join(f"{name:>11}" for name in OUTCOMES))
    for (name, how), counts in sorted(table.items()):
        print(f"{name:<28}{how:<6}" + "".join(f"{counts[outcome] or '-':>11}" for outcome in OUTCOMES))
    total = sum(table.values(), Counter())
    print(f"{'all':<34}" + "".join(f"{total[name]:>11}" for name in OUTCOMES))
    print("\n".join(bad), end="\n" * bool(bad))
    if bad:
        sys.exit(1)


if __name__ == "__main__":
    main()
