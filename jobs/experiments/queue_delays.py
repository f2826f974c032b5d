"""Silos whose jobs wait in a queue: asynchronous against synchronous rounds, in wall time.

    python jobs/experiments/queue_delays.py [--quick] [--sigma 0.4 1.0]

Four silos in separate jobs (docs/silos-in-jobs.md), here threads of one process with a scheduler of their own: a job
waits in the queue for a lognormal time (median 1.5 s), runs for 1.5 s at most, is stopped as by a time limit, and waits
again. A training takes a tenth of a second. Both engines meet the same draws. The time of `engine: buffered` is that
until its parameters reach the accuracy of those of the last synchronous round, on the test samples of all silos.
Prints one line of JSON for each sigma.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from fedmpi.components import build
from fedmpi.config import Config
from fedmpi.errors import Stopped
from fedmpi.files.line import Commit
from fedmpi.jobs.messages import Call
from fedmpi.jobs.serve import Serving
from fedmpi.jobs.silo import SiloJob
from fedmpi.stopping import STOP

MEDIAN_S, LENGTH_S, TRAINING_S = 1.5, 1.5, 0.1
SILOS = tuple(f"silo-{i}" for i in range(4))
ALONE = threading.RLock()  # jobs share the process's random generators


class Paced(SiloJob):
    """A silo's job whose trainings take a while."""

    def _open(self) -> None:
        with ALONE:
            super()._open()

    def _train(self, commit: Commit, call: Call) -> None:
        time.sleep(TRAINING_S)
        with ALONE:
            super()._train(commit, call)

    def _train_at_once(self, commit: Commit) -> None:
        if not self._sent:
            time.sleep(TRAINING_S)
        with ALONE:
            super()._train_at_once(commit)

    def _score(self, commit: Commit) -> None:
        with ALONE:
            super()._score(commit)

    def limit(self) -> None:
        """The time limit is over."""
        self._spec.watch.tell(STOP, "time limit")


def scheduled(config: Config, silo: str, sigma: float, over: threading.Event) -> None:
    """Run the jobs of one silo, one after the other, until the run is over."""
    draw = random.Random(f"{silo} {sigma}")
    while not over.wait(MEDIAN_S * math.exp(sigma * draw.gauss(0.0, 1.0))):
        job = Paced(config, silo)

        def work(job: Paced = job) -> None:
            with contextlib.suppress(Stopped):
                job.run()
                over.set()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(LENGTH_S)
        if thread.is_alive():
            job.limit()
            thread.join()


def trained(folder: Path, engine: dict[str, Any], rounds: int, sigma: float, target: float) -> tuple[float, float, int]:
    """Seconds until the target accuracy, or until all rounds are done; the accuracy then; and the round."""
    (folder / "shared").mkdir(parents=True)
    how = {
        **{"rounds": rounds, "out": str(folder / "run"), "data": {"name": "digits", "silos": 4}, "engine": engine},
        **{"transport": {"name": "files", "root": str(folder / "shared"), "poll_s": 0.03, "lease_s": 30}},
        **{"local": {"name": "sgd", "lr": 0.05, "epochs": 1}, "device": {"name": "cpu"}, "checkpoint": {"every": 50}},
    }
    config: Config = build(Config, how)
    over = threading.Event()
    threads = [threading.Thread(target=scheduled, args=(config, silo, sigma, over), daemon=True) for silo in SILOS]
    began_s = time.monotonic()
    for thread in threads:
        thread.start()
    accuracy, seconds, number = 0.0, 0.0, 0
    run = Serving(config)
    try:
        for record in run:
            number, seconds = record["round"], time.monotonic() - began_s
            with ALONE:
                accuracy = accuracy_of(run, config)
            if accuracy >= target:
                break
    finally:
        over.set()
        run._release()
        for thread in threads:
            thread.join(20)
    return seconds, accuracy, number


def accuracy_of(run: Serving, config: Config) -> float:
    """The accuracy of the newest parameters on the test samples of all silos."""
    source, model = config.data.source(config.seed), run.federation.model
    model.load(run.parameters)
    parts = [source.open(silo) for silo in SILOS]
    x, y = torch.cat([part.x_test for part in parts]), torch.cat([part.y_test for part in parts])
    with torch.no_grad():
        return float((model.module(x).argmax(1) == y).float().mean())


def compared(folder: Path, rounds: int, sigma: float) -> dict[str, Any]:
    """Both engines under the same queue."""
    sync_s, accuracy, _ = trained(folder / "sync", {"name": "synchronous"}, rounds, sigma, 2.0)
    engine = {"name": "buffered", "size": 2, "max_staleness": 20}
    async_s, reached, steps = trained(folder / "async", engine, 40 * rounds, sigma, accuracy)
    return {
        **{"sigma": sigma, "accuracy": round(accuracy, 4), "synchronous_s": round(sync_s, 1), "rounds": rounds},
        **{"buffered_s": round(async_s, 1), "reached": round(reached, 4), "steps": steps},
        "ratio": round(async_s / sync_s, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three rounds with the first sigma")
    parser.add_argument("--sigma", type=float, nargs="+", default=[0.4, 1.0])
    options = parser.parse_args()
    for sigma in options.sigma[:1] if options.quick else options.sigma:
        with tempfile.TemporaryDirectory(prefix="fedmpi-queue-") as folder:
            print(json.dumps(compared(Path(folder), 3 if options.quick else 12, sigma)), flush=True)


if __name__ == "__main__":
    main()
