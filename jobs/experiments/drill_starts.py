"""Starts runs where a basic resource is missing, and checks that each ends, with a truthful exit code.

    python jobs/experiments/drill_starts.py [--starts 60] [--seed 0] [--only shm,memory,stdout,home,disk] [--quick]

    shm      /dev/shm has 1 MiB                                  (in a mount namespace: needs root or user namespaces)
    memory   RLIMIT_AS of 0.5 to 4 GiB per rank
    stdout   closed, full, or not read beyond its first line
    home     HOME is not set
    disk     the run directory is on a tmpfs of 50 to 900 KiB    (in a mount namespace)

A third of the starts are one process, the others two or three ranks under mpirun. Prints one line per condition, with
numbers of starts:

    done      exit code 0, all rounds on disk
    said      another exit code, with a message
    ended     another exit code, set by the launcher or a signal, without a message from fedmpi
    UNTRUE    exit code 0 but rounds are missing; HANG: not finished after --limit-s. Either gives exit code 1
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

OUTCOMES = ("done", "said", "ended", "UNTRUE", "HANG")
ROUNDS = 3
CONFIG = """
rounds: 3
data: {name: digits, silos: 4}
model: {name: mlp, hidden: [%d]}
local: {name: sgd, lr: 0.1, steps: 2, batch_size: 32}
server: {optimizer: {name: fedadam, lr: 0.01}}
exchange: {plan: %s}
checkpoint: {every: 1}
device: {name: cpu}
"""
PLANS = ("shared_memory", "measure", "replicated", "root", "sharded")
FEDMPI = f"{sys.executable} -m fedmpi"


@dataclass(frozen=True)
class Start:
    """A shell line to run in a folder with config.yaml; its run directory is `out`."""

    line: str
    mounts: str = ""  # command to run first, in a mount namespace
    plan: str = "measure"
    hidden: int = 64


def ranks(number: int) -> int:
    return number % 3 + 1


def launched(number: int, command: str) -> str:
    """The command on one, two or three ranks, by turns."""
    return command if ranks(number) == 1 else f"mpirun -n {ranks(number)} {command}"


def train(number: int) -> str:
    return launched(number, f"{FEDMPI} train config.yaml out=out")


def start(condition: str, number: int, rng: random.Random) -> Start:
    if condition == "shm":
        small = "mount -t tmpfs -o size=1m none /dev/shm"
        return Start(train(number), small, PLANS[number // 3 % len(PLANS)], 4000)
    if condition == "memory":
        kib = int(rng.uniform(0.5, 4.0) * 2**20)
        rank = f"bash -c 'ulimit -v {kib}; exec {FEDMPI} train config.yaml out=out'"
        return Start(launched(number, rank), plan=PLANS[number // 3 % len(PLANS)])
    if condition == "stdout":
        where = (">&-", "> /dev/full", "<&- >&- 2>&-", "| head -1; exit ${PIPESTATUS[0]}")[number // 3 % 4]
        return Start(f"{train(number)} {where}")
    if condition == "home":
        # Open MPI's mpirun does not start without HOME; its ranks do.
        alone = f"env -u HOME {FEDMPI} train config.yaml out=out"
        return Start(launched(number, alone))
    kib = int(rng.uniform(50, 900))
    return Start(train(number), f"mkdir out && mount -t tmpfs -o size={kib}k none out")


def run(condition: str, number: int, rng: random.Random, limit_s: float) -> tuple[str, str]:
    """Outcome of a start, and its output."""
    chosen = start(condition, number, rng)
    folder = Path(tempfile.mkdtemp(prefix="drill-"))
    (folder / "config.yaml").write_text(CONFIG % (chosen.hidden, chosen.plan))
    # Count the rounds inside the namespace: the mount disappears with it.
    count = f"ls -d out/checkpoints/round-*/manifest.json out/model.safetensors 2>/dev/null | wc -l > {folder}/count"
    line = f"{chosen.mounts or 'true'} && {{ ({chosen.line}); code=$?; {count}; exit $code; }}"
    shell = ["unshare", "-m", "bash", "-c", line] if chosen.mounts else ["bash", "-c", line]
    if chosen.mounts and os.geteuid():
        shell.insert(1, "-r")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    with (folder / "said").open("w+b") as said:
        job = subprocess.Popen(
            shell,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
        try:
            code = job.wait(limit_s)
        except BaseException as error:
            code = -1
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
    text = (folder / "said").read_text(errors="replace")
    stored = (folder / "count").read_text().strip() if (folder / "count").exists() else ""
    shutil.rmtree(folder, ignore_errors=True)
    if code == -1:
        return "HANG", text
    if code == 0:
        return ("done" if int(stored or 0) == ROUNDS + 1 else "UNTRUE"), text
    return ("said" if "fedmpi:" in text.replace("fedmpi: 4 silos", "") else "ended"), text


def may_mount() -> bool:
    flags = ["-m"] if os.geteuid() == 0 else ["-rm"]
    line = "mount -t tmpfs none /dev/shm"
    return subprocess.run(["unshare", *flags, "bash", "-c", line], capture_output=True).returncode == 0


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--starts", type=int, default=60, help="starts per condition")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit-s", type=float, default=120.0)
    parser.add_argument("--only", default="shm,memory,stdout,home,disk")
    parser.add_argument("--quick", action="store_true", help="smoke test: one start per condition")
    options = parser.parse_args(arguments)
    if shutil.which("mpirun") is None:
        raise SystemExit("drill_starts: no mpirun on PATH")
    bad = 0
    print(f"{'':<8}" + "".join(f"{outcome:>8}" for outcome in OUTCOMES), flush=True)
    for condition in options.only.split(","):
        if condition in ("shm", "disk") and not may_mount():
            print(f"{condition:<8} left out: this user may not mount", flush=True)
            continue
        rng = random.Random(f"{options.seed} {condition}")
        seen: Counter[str] = Counter()
        try:
            for number in range(1, 2) if options.quick else range(options.starts):
                outcome, text = run(condition, number, rng, options.limit_s)
                seen[outcome] += 1
                if outcome in ("UNTRUE", "HANG"):
                    bad += 1
                    print(
                        f"--- {condition}, start {number}: {outcome}\n{text[-2000:]}\n---", file=sys.stderr, flush=True
                    )
        finally:  # print partial results too
            print(f"{condition:<8}" + "".join(f"{seen[outcome]:>8}" for outcome in OUTCOMES), flush=True)
    if bad:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
