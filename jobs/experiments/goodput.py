"""Goodput with one death a minute: fedmpi heals, restarts from checkpoints, and torchft beside them.

    python jobs/experiments/goodput.py [--minutes 2] [--torchft PYTHON] [--only heal,restart] [--out DIR] [--quick]

Four silos train the digits (MLP, 50 steps with pauses: rounds of 2 s). A process that hosts a silo is killed 30 s after
the first commit, and every minute from then on. Prints for each way the useful samples per second (of committed rounds)
and their share of the same job without deaths. PYTHON is an interpreter with torch and torchft (pip install torchft).
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from drill_job import ENVIRONMENT, HERE, POLL_S, Job, TooLong, mpirun, read_events, useful

SILOS = 4
STEPS, BATCH, PAUSE_S = 50, 32, 0.04
FIRST_S, EVERY_S = 30.0, 60.0  # deaths
LIMIT_S = 120.0  # until the first commit
SETTINGS = (
    f"rounds={10**6}",
    f"data={{name: digits, silos: {SILOS}}}",
    "model={name: mlp, hidden: [64]}",
    f"local={{name: drill_rule:Drilled, lr: 0.1, steps: {STEPS}, batch_size: {BATCH}, pause_s: {PAUSE_S}}}",
    "device.name=cpu",
    "checkpoint.every=1",
)
PLAIN = ["mpirun", "-n", str(SILOS)]
# Launcher line, settings.
WAYS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "adopt": (mpirun(SILOS), ("on_failure=adopt",)),
    "spare": (mpirun(SILOS + 3), ("on_failure=adopt",)),
    "respawn": (mpirun(SILOS), ("on_failure=respawn",)),
    "restart": (PLAIN, ("on_failure=stop",)),
}
TOLD = {
    "adopt": "`adopt`, 4 ranks: fewer after each death",
    "spare": "`adopt`, 3 more ranks without silos",
    "respawn": "`respawn`, a fresh rank for each death",
    "restart": "`fedmpi run`, checkpoint and restart",
    "torchft": "torchft, `LocalSGD`, processes started again",
}


def deaths(seconds: float, disturbed: bool) -> Iterator[float]:
    """When processes are killed, from the first commit on; then infinity."""
    at_s = FIRST_S
    while disturbed and at_s < seconds - 5:
        yield at_s
        at_s += EVERY_S
    while True:
        yield float("inf")


def measured(seconds: float, disturbed: bool, commits: Callable[[], int], kill: Callable[[], str]) -> tuple[float, int]:
    """Samples per second from the first commit to the last, and the number of deaths. Until all silos take part,
    `commits` is 0."""
    begun_s = time.monotonic()
    while not commits():
        if time.monotonic() - begun_s > LIMIT_S:
            raise TooLong(f"no commit within {LIMIT_S:.0f} s")
        time.sleep(POLL_S)
    before, begun_s, num, plan = commits(), time.monotonic(), 0, deaths(seconds, disturbed)
    due_s, last, last_s = next(plan), before, 0.0
    while (so_far_s := time.monotonic() - begun_s) < seconds:
        time.sleep(POLL_S)
        if (now := commits()) > last:
            last, last_s = now, time.monotonic() - begun_s
        if so_far_s > due_s:
            print(f"    +{so_far_s:.1f} s {kill()}", flush=True)
            num, due_s = num + 1, next(plan)
    return ((last - before) / last_s if last_s else 0.0), num


def of_fedmpi(way: str, folder: Path, seconds: float, disturbed: bool) -> tuple[float, int]:
    line, settings = WAYS[way]
    rng = random.Random(0)
    with Job(folder / way, (*SETTINGS, *settings), line, 15.0) as job:

        def commits() -> int:
            job.look()
            if job.process.poll() is not None:
                raise TooLong(f"the job ended: see {job.out}.log")
            return int(sum(useful(record, "num_samples") for record in job.records.values()))

        def kill() -> str:
            """A process that hosts a silo."""
            hosts = {row["rank"] for row in job.records[job.newest]["silos"].values()}
            rank = rng.choice(sorted(hosts))
            pids = {row["rank"]: row["pid"] for row in json.loads((job.out / "ranks.json").read_text())}
            os.kill(pids[rank], signal.SIGKILL)
            return f"SIGKILL to rank {rank}, after round {job.newest}"

        return measured(seconds, disturbed, commits, kill)


def of_torchft(python: str, folder: Path, seconds: float, disturbed: bool) -> tuple[float, int]:
    """Four replica groups of one process under a lighthouse; a dead process is started again at once."""
    rng, out = random.Random(0), folder / "torchft"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    export(out)
    clean = {**os.environ, **ENVIRONMENT, "PYTHONPATH": ""}
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(open(out / "log", "w"))

        def start(*words: str) -> subprocess.Popen[bytes]:
            process = subprocess.Popen(words, env=clean, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        port = 20000 + os.getpid() % 20000
        lighthouse = str(Path(python).parent / "torchft_lighthouse")
        quick = ["--heartbeat_timeout_ms", "1000", "--join_timeout_ms", "1000"]
        start(lighthouse, "--min_replicas", "1", "--bind", f"127.0.0.1:{port}", *quick)
        worker = [python, str(HERE / "goodput_torchft.py"), f"http://127.0.0.1:{port}", str(out)]
        more = [str(number) for number in (STEPS, BATCH, PAUSE_S)]
        replicas = {silo: start(*worker, str(silo), *more) for silo in range(SILOS)}

        def commits() -> int:
            for silo, process in replicas.items():
                if process.poll() is not None:
                    replicas[silo] = start(*worker, str(silo), *more)
            rows = [row for silo in range(SILOS) for row in read_events(out, f"silo-{silo}.jsonl")]
            return sum(row["samples"] for row in rows) * any(row["replicas"] == SILOS for row in rows)

        def kill() -> str:
            silo = rng.randrange(SILOS)
            replicas[silo].kill()
            return f"SIGKILL to replica {silo}"

        return measured(seconds, disturbed, commits, kill)


def export(out: Path) -> None:
    """The silos' training data as files, for processes without fedmpi."""
    import torch

    from fedmpi.data.digits import Digits

    source = Digits(silos=SILOS).source(0)
    for number, silo in enumerate(source.silos):
        data = source.open(silo.id)
        torch.save({"x": data.x_train, "y": data.y_train}, out / f"silo-{number}.pt")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=2.0, help="of each way")
    parser.add_argument("--whole-s", type=float, default=40.0, help="of each way without deaths, in seconds")
    parser.add_argument("--torchft", metavar="PYTHON", help="an interpreter with torch and torchft")
    parser.add_argument("--only", default="adopt,spare,respawn,restart,torchft")
    parser.add_argument("--out", type=Path, default=Path("runs/goodput"))
    parser.add_argument("--quick", action="store_true", help="smoke test: `restart` for 12 s, without deaths")
    options = parser.parse_args(arguments)
    folder, found = options.out.absolute(), {}
    if options.quick:
        options.minutes, options.whole_s, options.only = 0.2, 6.0, "restart"
    wholes: dict[str, float] = {}  # samples per second without deaths
    for way in options.only.split(","):
        if way == "torchft" and not options.torchft:
            continue

        def run(seconds: float, disturbed: bool, way: str = way) -> tuple[float, int]:
            if way == "torchft":
                return of_torchft(options.torchft, folder, seconds, disturbed)
            return of_fedmpi(way, folder, seconds, disturbed)

        with_what = "torchft" if way == "torchft" else "fedmpi"
        if with_what not in wholes:
            wholes[with_what] = run(options.whole_s, False)[0]
        (rate, num), whole = run(60 * options.minutes, True), wholes[with_what]
        found[way] = {"undisturbed": whole, "samples_per_s": rate, "deaths": num, "goodput": rate / whole}
        print(f"| {TOLD[way]} | {whole:,.0f} | {rate:,.0f} | {num} | {rate / whole:.0%} |", flush=True)
    print(json.dumps(found))
    return found


if __name__ == "__main__":
    sys.exit(not main())
