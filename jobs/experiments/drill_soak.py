"""soak: thousands of short rounds with deaths now and then; memory, threads and descriptors of every process must stay
flat.

After each round that is seen, the resident memory, threads, open descriptors and mappings of all ranks, the launcher
and the supervisor are read from /proc. A process is judged by two medians: of its first tenth after a warm-up, and of
its last tenth. Deaths leave two ranks of a job. When no more may die, all are killed, and the supervisor starts again.
"""

import contextlib
import json
import math
import os
import random
import shutil
import signal
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from drill_job import POLL_S, Job, TooLong, mpirun, read_events

RANKS = 6
LEFT = 2  # ranks that deaths leave
GRACE_S = 15.0
EVERY = 250  # rounds from a death to the next, on average; fewer in a short run
NAME_S = 1.0  # from one search for new processes to the next
WARM_UP = 100  # rounds of a process that are not judged
LEAST = 300  # rounds of a process that is judged
QUICK = 400
LIMIT_S = 3600.0
# What a process may gain from its first tenth to its last, apart from the steps at deaths: adopted silos take memory.
MOST = {"rss_kib": 4096.0, "threads": 1.0, "descriptors": 2.0, "mappings": 40.0}
SETTINGS = (
    f"data={{name: digits, silos: {RANKS}}}",
    "model={name: mlp, hidden: [128]}",
    "local={name: sgd, lr: 0.01, steps: 1, batch_size: 8}",
    "exchange.plan=shared_memory",
    "evaluate.every=50",
    "device.name=cpu",
    "on_failure=adopt",
    "checkpoint.every=25",
)


@dataclass
class Process:
    """What was read of one process, by round."""

    name: str
    rows: dict[int, dict[str, float]] = field(default_factory=dict)

    def judged(self) -> list[int]:
        """The rounds that count, without the warm-up."""
        rounds = sorted(self.rows)
        return [r for r in rounds if r >= rounds[0] + WARM_UP]

    @property
    def span(self) -> int:
        """From the first round that counts to the last."""
        rounds = self.judged()
        return rounds[-1] - rounds[0] if rounds else 0

    def medians(self, what: str) -> tuple[float, float]:
        """Of the first tenth and of the last tenth."""
        rounds = self.judged()
        few = max(1, len(rounds) // 10)
        first, last = (statistics.median(self.rows[r][what] for r in some) for some in (rounds[:few], rounds[-few:]))
        return first, last

    def steps(self, what: str, deaths: Sequence[int], around: int = 20) -> list[float]:
        """What each death brought: the median of the rounds after it less that of the rounds before."""
        found = []
        for at in deaths:
            before = [row[what] for r, row in self.rows.items() if at - around <= r < at]
            after = [row[what] for r, row in self.rows.items() if at + 5 < r <= at + 5 + around]
            if before and after and at >= self.judged()[0]:
                found.append(statistics.median(after) - statistics.median(before))
        return found

    def gain(self, what: str, deaths: Sequence[int]) -> float:
        """From the first tenth to the last, without the steps up at deaths."""
        first, last = self.medians(what)
        return last - first - sum(step for step in self.steps(what, deaths) if step > 0)


def sample(pid: int) -> dict[str, float]:
    """Of a process. OSError where it is gone."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    if "VmRSS" not in status:
        raise ProcessLookupError(pid)
    return {
        "rss_kib": float(status["VmRSS"].split()[0]),
        "threads": float(status["Threads"]),
        "descriptors": float(len(os.listdir(f"/proc/{pid}/fd"))),
        "mappings": float(Path(f"/proc/{pid}/maps").read_bytes().count(b"\n")),
    }


def named(job: Job) -> dict[int, str]:
    """The ranks, the launcher and the supervisor of the job."""
    found = {pid: f"rank {rank}" for rank, pid in job.ranks().items()}
    for pid in job.processes():
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
            if words[0].endswith(("mpirun", "prterun")):
                found[pid] = "launcher"
            elif pid == job.process.pid:
                found[pid] = "supervisor"
    return found


def watch(job: Job, rounds: int, rng: random.Random) -> dict[int, Process]:
    """Sample all processes until the last round, and kill ranks now and then; the processes by pid."""
    seen: dict[int, Process] = {}
    every = min(EVERY, rounds / 8)
    due, starts, names, named_s = math.inf, 0, {}, -math.inf
    while job.process.poll() is None:
        time.sleep(POLL_S)
        job.look()
        if time.monotonic() - job.begun_s > LIMIT_S:
            raise TooLong(f"not over within {LIMIT_S:.0f} s")
        if time.monotonic() > named_s + NAME_S:
            names, named_s = named(job), time.monotonic()
        for pid, name in names.items():
            with contextlib.suppress(OSError):
                seen.setdefault(pid, Process(name)).rows.setdefault(job.newest, sample(pid))
        if len(job.starts) > starts:
            starts, due = len(job.starts), job.newest + rng.expovariate(1 / every)
        if due < job.newest < rounds - every / 2:
            due, there = job.newest + rng.expovariate(1 / every), sorted(job.ranks())
            dying = there if len(there) <= LEFT else [there[0] if rng.random() < 0.3 else rng.choice(there)]
            if dying:
                job.signal(signal.SIGKILL, *dying)
    job.look()
    return seen


def soak(folder: Path, rounds: int, seed: int) -> int:
    """The run, and what its processes gained. The exit code."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with Job(folder / "run", (f"rounds={rounds}", *SETTINGS), mpirun(RANKS), GRACE_S) as job:
        try:
            seen = watch(job, rounds, random.Random(seed))
        except TooLong as why:
            print(f"FAIL soak: {why}")
            return 1
    (folder / "samples.json").write_text(json.dumps({pid: vars(process) for pid, process in seen.items()}))
    losses = [*read_events(job.out)]
    return report(job, [*seen.values()], [loss["round"] for loss in losses], rounds)


def report(job: Job, seen: Sequence[Process], deaths: Sequence[int], rounds: int) -> int:
    """What the processes gained; 0 where all is flat."""
    kills = sum("SIGKILL" in text for _, text in job.moments)
    print(
        f"  {'rounds':<14}{len(job.records)} of {rounds}, {(time.monotonic() - job.begun_s) / 60:.1f} minutes; {kills} "
        f"faults, {len(deaths)} healed in the job, {len(job.starts) - 1} restarts; exit code {job.process.returncode}"
    )
    judged = [process for process in seen if process.span >= min(LEAST, rounds // 4)]
    bad = int(job.process.returncode != 0 or len(job.records) < rounds or not judged)
    for what, most in MOST.items():
        for name in ("rank", "launcher", "supervisor"):
            if some := [process for process in judged if process.name.startswith(name)]:
                worst = max(some, key=lambda process: process.gain(what, deaths))
                first, last = worst.medians(what)
                steps, gain = worst.steps(what, deaths), worst.gain(what, deaths)
                bad += gain > most
                num = max(worst.rows) - min(worst.rows)
                print(
                    f"  {what:<14}{name:<11}{first:,.0f} to {last:,.0f} over {num} rounds (worst of {len(some)}): "
                    f"{len(steps)} deaths {sum(steps):+,.0f}, else {gain:+,.0f}{'   GROWS' if gain > most else ''}"
                )
    print(f"{'FAIL' if bad else 'PASS'} soak")
    return int(bad > 0)
