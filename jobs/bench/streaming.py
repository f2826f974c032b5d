"""Compares a silo that is streamed from its file (`data.stream`) with the same silo in memory: seconds of an epoch, by
turns, peak memory of each process, and the SHA-256 of the parameters, which must be equal.

python jobs/bench/streaming.py [--quick] [--gib 4] [--epochs 4] [--format npz|h5|h5-chunked] [--folder DIR] [--batch 32]

The file is made in a temporary folder and deleted. Memory is VmHWM, the peak of everything resident in a process:
Python, torch and their libraries too, which need about 300 MiB without any data. The page cache is no part of it: it
holds the file as far as memory is free, and the kernel drops it when memory is needed. An epoch is training on all
training samples and evaluation on all test samples; the first, which fills the page cache, does not count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

SHAPE = (3, 32, 32)


def write(path: Path, num: int, layout: str) -> None:
    """A file of `num` samples, made block by block; a tenth of them for testing."""
    parts = {"train": num - num // 10, "test": num // 10}
    draw = np.random.default_rng(0)

    def block(size: int) -> Any:
        return draw.standard_normal((size, *SHAPE), dtype=np.float32)

    if layout == "npz":
        arrays: dict[str, Any] = {}
        for part, size in parts.items():
            whole = np.lib.format.open_memmap(path.with_suffix(f".{part}.npy"), "w+", np.float32, (size, *SHAPE))  # type: ignore[no-untyped-call]
            for start in range(0, size, 1024):
                whole[start : start + 1024] = block(min(1024, size - start))
            arrays |= {f"x_{part}": whole, f"y_{part}": draw.integers(0, 10, size)}
        np.savez(path, **arrays)
        for part in parts:
            path.with_suffix(f".{part}.npy").unlink()
        return
    import h5py

    with h5py.File(path, "w") as file:
        for part, size in parts.items():
            chunks = (16, *SHAPE) if layout == "h5-chunked" else None
            whole = file.create_dataset(f"x_{part}", (size, *SHAPE), np.float32, chunks=chunks)
            for start in range(0, size, 1024):
                whole[start : start + 1024] = block(min(1024, size - start))
            file[f"y_{part}"] = draw.integers(0, 10, size)


def work(root: Path, path: str, stream: bool, epochs: int, batch: int) -> None:
    """One process: after each line on stdin it trains an epoch, and says how long that took; at the end its memory."""
    from fedmpi import Run
    from fedmpi.comm import SoloComm
    from fedmpi.components import build
    from fedmpi.config import Config
    from fedmpi.results import inspect

    out = root / ("streamed" if stream else "memory")
    data = {"name": "files", "root": str(root), "task": "classification", "num_classes": 10, "shape": SHAPE}
    data |= {"stream": stream, "silos": [{"id": "a", "path": path}]}
    local = {"name": "sgd", "lr": 0.01, "epochs": 1, "batch_size": batch}
    values = {"rounds": epochs, "out": str(out), "data": data, "local": local, "checkpoint": {"every": epochs}}
    with Run(build(Config, values | {"model": {"name": "mlp", "hidden": [64]}}), comm=SoloComm()) as run:
        rounds = iter(run)
        print("ready", flush=True)
        for _ in sys.stdin:
            began_s = time.perf_counter()
            next(rounds)
            print(time.perf_counter() - began_s, flush=True)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = {name: int(status[name].split()[0]) / 1024 for name in ("VmHWM", "RssAnon", "RssFile")}
    print(json.dumps({"sha256": inspect(out)["params_sha256"], **peak}), flush=True)


def compare(root: Path, path: str, epochs: int, batch: int) -> dict[str, Any]:
    """Both processes, an epoch each by turns."""
    workers, seconds = {}, {True: list[float](), False: list[float]()}
    for stream in (True, False):
        command = [sys.executable, __file__, "--worker", str(root), path, str(int(stream)), str(epochs), str(batch)]
        workers[stream] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        _answer(workers[stream])
    for epoch in range(epochs):
        for stream in (True, False) if epoch % 2 else (False, True):
            to = workers[stream].stdin
            assert to is not None
            print(file=to, flush=True)
            seconds[stream].append(float(_answer(workers[stream])))
    told = {}
    for stream, worker in workers.items():
        assert worker.stdin is not None
        worker.stdin.close()
        told[stream] = json.loads(_answer(worker))
        worker.wait(60)
    streamed, memory = (statistics.median(seconds[stream][1:]) for stream in (True, False))
    return {
        "speed": round(memory / streamed, 3),
        "epoch_s": {"streamed": seconds[True], "memory": seconds[False]},
        "peak_mib": {"streamed": round(told[True]["VmHWM"]), "memory": round(told[False]["VmHWM"])},
        "end_mib": {name: round(told[True][name]) for name in ("RssAnon", "RssFile")},
        "same_sha256": told[True]["sha256"] == told[False]["sha256"],
    }


def _answer(worker: subprocess.Popen[str]) -> str:
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        raise SystemExit(f"a process ended with {worker.wait(60)}")
    return line


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        folder, name, stream, *numbers = sys.argv[2:]
        work(Path(folder), name, stream == "1", *map(int, numbers))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4.0)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--format", choices=("npz", "h5", "h5-chunked"), default="npz")
    parser.add_argument("--folder", type=Path, help="where to make the temporary folder")
    parser.add_argument("--quick", action="store_true", help="8 MiB, two epochs")
    given = parser.parse_args()
    gib, epochs = (1 / 128, 2) if given.quick else (given.gib, max(given.epochs, 2))
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        path = "silo.npz" if given.format == "npz" else "silo.h5"
        num = int(gib * 2**30 / (4 * np.prod(SHAPE)))
        write(Path(folder) / path, num, given.format)
        result = {"format": given.format, "gib": gib, "samples": num, "batch_size": given.batch}
        print(json.dumps(result | compare(Path(folder), path, epochs, given.batch)))


if __name__ == "__main__":
    main()
