"""Silos whose jobs wait in the queue of a real SLURM: asynchronous against synchronous rounds, in wall time.

    python jobs/experiments/queue_slurm.py [--quick] [--sigma 1.0]        where sbatch works

Three silos and the server are jobs of their own (docs/silos-in-jobs.md). A silo's job begins a lognormal time (median
6 s) after it was submitted, runs for 20 s with its start, is stopped as by a time limit, and is submitted again. A
training takes half a second. Both engines meet the same draws. The time of `engine: buffered` is that until the pooled
scores of the silos reach the accuracy of the last synchronous round. Prints one line of JSON for each sigma.
queue_delays.py is the same without SLURM.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from fedmpi.components import component
from fedmpi.flat import FlatModel
from fedmpi.local import LocalSilo, Round, Sgd
from fedmpi.types import Contribution

MEDIAN_S, LENGTH_S, TRAINING_S = 6.0, 20.0, 0.5
SILOS = tuple(f"silo-{i}" for i in range(3))
FEDMPI = f"{sys.executable} -m fedmpi"
CONFIG = """
rounds: {rounds}
data: {{name: digits, silos: 3}}
local: {{name: "queue_slurm:Slow", lr: 0.02, epochs: 1}}
engine: {engine}
transport: {{name: files, root: {folder}/shared, lease_s: 20, poll_s: 0.05}}
checkpoint: {{every: 50}}
device: {{name: cpu}}
out: {folder}/run
"""


@component
class Slow(Sgd):
    """A training that takes a while."""

    def train(self, silo: LocalSilo, model: FlatModel, params_P: torch.Tensor, round: Round) -> Contribution:
        time.sleep(TRAINING_S)
        return super().train(silo, model, params_P, round)


def slurm(*command: str) -> str:
    """The output of a command of SLURM, whose jobs find this module."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


def submit(name: str, folder: Path, command: str, delay_s: float = 0.0) -> str:
    """The id of a job that begins so much later; SLURM counts in whole seconds."""
    options = ["--parsable", f"--job-name={name}", "--ntasks=1", "--open-mode=append", f"--output={folder}/{name}.log"]
    return slurm("sbatch", *options, f"--begin=now+{math.ceil(delay_s)}", f"--wrap={command}")


class Queue:
    """The silos' jobs: each is submitted again when it has ended."""

    def __init__(self, folder: Path, sigma: float) -> None:
        self._folder = folder
        self._draw = {silo: random.Random(f"{silo} {sigma}") for silo in SILOS}
        self._sigma, self._jobs = sigma, dict.fromkeys(SILOS, "")
        self.ids = [submit("server", folder, f"exec {FEDMPI} serve {folder}/study.yaml")]  # of all jobs
        self.waited_s = 0.0

    def look(self) -> None:
        """Submit the jobs that are not there."""
        there = set(slurm("squeue", "--noheader", "--format=%A").split())
        for silo, job in self._jobs.items():
            if job not in there:
                delay_s = MEDIAN_S * math.exp(self._sigma * self._draw[silo].gauss(0.0, 1.0))
                command = f"exec timeout -s USR1 {LENGTH_S} {FEDMPI} silo {self._folder}/study.yaml --id {silo}"
                self._jobs[silo] = submit(silo, self._folder, command, delay_s)
                self.ids.append(self._jobs[silo])
                self.waited_s += delay_s


def trained(folder: Path, engine: str, rounds: int, sigma: float, target: float, limit_s: float) -> dict[str, Any]:
    """Seconds until the silos' pooled accuracy reaches the target, or until all rounds are done."""
    (folder / "shared").mkdir(parents=True)
    (folder / "study.yaml").write_text(CONFIG.format(rounds=rounds, engine=engine, folder=folder))
    queue, began_s = Queue(folder, sigma), time.monotonic()
    number, accuracy = 0, 0.0
    try:
        while number < rounds and accuracy < target:
            if time.monotonic() - began_s > limit_s:
                raise TimeoutError(f"round {number} of {rounds}, accuracy {accuracy} of {target} after {limit_s:g} s")
            queue.look()
            time.sleep(0.3)
            metrics = folder / "run" / "metrics.jsonl"
            for line in metrics.read_text().splitlines()[number:] if metrics.exists() else ():
                record = json.loads(line)
                number = record["round"]
                accuracy = record.get("scored", record).get("accuracy", accuracy)
                if accuracy >= target:
                    break
        seconds = time.monotonic() - began_s
    finally:
        slurm("scancel", *queue.ids)
        while set(slurm("squeue", "--noheader", "--format=%A").split()).intersection(queue.ids):
            time.sleep(0.2)
    told = {"seconds": round(seconds, 1), "rounds": number, "accuracy": round(accuracy, 4)}
    return told | {"jobs": len(queue.ids), "mean_wait_s": round(queue.waited_s / (len(queue.ids) - 1), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds")
    parser.add_argument("--rounds", type=int, default=6, help="synchronous rounds")
    parser.add_argument("--limit", type=float, default=240.0, metavar="S", help="most seconds of one run")
    parser.add_argument("--sigma", type=float, nargs="+", default=[1.0])
    options = parser.parse_args()
    rounds = 2 if options.quick else options.rounds
    for sigma in options.sigma:
        with tempfile.TemporaryDirectory(prefix="fedmpi-queue-") as name:
            sync = trained(Path(name) / "sync", "synchronous", rounds, sigma, math.inf, options.limit)
            engine = "{name: buffered, size: 2, max_staleness: 20}"
            again = (40 * rounds, sigma, sync["accuracy"], options.limit)
            print(
                json.dumps(
                    {"sigma": sigma, "synchronous": sync, "buffered": trained(Path(name) / "async", engine, *again)}
                )
            )


if __name__ == "__main__":
    main()
