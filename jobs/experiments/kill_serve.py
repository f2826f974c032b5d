"""Kills the server's job of a federation of silos in separate jobs, again and again at random times.

    python jobs/experiments/kill_serve.py [--kills 20] [--quick] [--engine buffered]

Three silos and the server are processes that share a folder (docs/silos-in-jobs.md). The server gets SIGKILL at a
random time after its start, and is started again. At the end: no update counts twice and none is lost after its commit,
and the final parameters have the bits of the same arrivals in one process. Prints one line of JSON; exit code 1 if not
so.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FEDMPI = [sys.executable, "-m", "fedmpi"]
KILL_S = 300.0  # most seconds from one kill to the next
END_S = 600.0  # and from the last kill to the end
SILOS = ("silo-0", "silo-1", "silo-2")
CONFIG = """
rounds: {rounds}
data: {{name: digits, silos: 3}}
local: {{name: sgd, lr: 0.05, epochs: 20}}
engine: {engine}
transport: {{name: files, root: {root}/shared, lease_s: 4, poll_s: 0.05}}
checkpoint: {{every: 5}}
device: {{name: cpu}}
"""
ENGINES = {"buffered": "{name: buffered, size: 2}", "synchronous": "synchronous"}


def digest(out: Path) -> str:
    """SHA-256 of a run's parameters."""
    told = subprocess.run([*FEDMPI, "inspect", str(out), "--json"], capture_output=True, check=True, text=True).stdout
    return str(json.loads(told)["params_sha256"])


def experiment(folder: Path, kills: int, rounds: int, engine: str, seed: int = 0) -> dict[str, Any]:
    """Figures of one run."""
    draw, config = random.Random(seed), folder / "study.yaml"
    (folder / "shared").mkdir()
    config.write_text(CONFIG.format(rounds=rounds, root=folder, engine=ENGINES[engine]))
    serve = [*FEDMPI, "serve", str(config), f"out={folder / 'run'}"]
    log = open(folder / "log.txt", "w")  # noqa: SIM115
    silos = [
        subprocess.Popen([*FEDMPI, "silo", str(config), "--id", silo, f"out={folder / 'run'}"], stdout=log, stderr=log)
        for silo in SILOS
    ]
    metrics, killed, began_s = folder / "run" / "metrics.jsonl", 0, time.monotonic()
    try:
        while True:
            before = num_lines(metrics)
            server = subprocess.Popen(serve, stdout=log, stderr=log)
            if killed < kills:
                until_s = time.monotonic() + KILL_S
                while server.poll() is None and num_lines(metrics) <= before and killed:
                    if time.monotonic() > until_s:
                        raise TimeoutError(f"no round within {KILL_S:g} s of start {killed + 1}")
                    time.sleep(0.02)  # it has come as far as its last start
                time.sleep(draw.uniform(0.0, 2.0))
            else:
                server.wait(timeout=END_S)
            if server.poll() is not None:
                break
            server.kill()
            server.wait()
            killed += 1
        codes = [server.returncode, *(silo.wait(timeout=END_S) for silo in silos)]
    finally:
        for process in silos:
            process.kill()
        log.close()
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    once = [(one["silo"], one["training"]) for row in rows for one in row.get("arrivals", ())]
    clock = ["engine.clock={name: replay, run: %s}" % (folder / "run")] if engine == "buffered" else []
    again = [*FEDMPI, "train", str(config), "transport=mpi", f"out={folder / 'again'}", *clock]
    subprocess.run(again, check=True, capture_output=True)
    return {
        "engine": engine,
        "kills": killed,
        "rounds": len(rows),
        "exit_codes": codes,
        "arrivals": len(once),
        "counted_twice": len(once) - len(set(once)),
        "same_bits": digest(folder / "run") == digest(folder / "again"),
        "seconds": round(time.monotonic() - began_s, 1),
    }


def num_lines(path: Path) -> int:
    """Lines of a file; 0 if there is none."""
    return len(path.read_text().splitlines()) if path.exists() else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--engine", choices=ENGINES, default="buffered")
    parser.add_argument("--quick", action="store_true", help="two kills")
    options = parser.parse_args()
    kills = 2 if options.quick else options.kills
    with tempfile.TemporaryDirectory(prefix="fedmpi-kill-") as folder:
        told = experiment(Path(folder), kills, 6 * kills + 4, options.engine)
    print(json.dumps(told))
    if any(told["exit_codes"]) or told["counted_twice"] or not told["same_bits"] or told["kills"] < kills:
        sys.exit(1)


if __name__ == "__main__":
    main()
