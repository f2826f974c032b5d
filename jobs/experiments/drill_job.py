"""A training job of the drills (drill.py): started, watched through its run directory, disturbed, and judged."""

import contextlib
import ctypes
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TOP = HERE.parents[1]
FEDMPI = (sys.executable, "-m", "fedmpi")
RANKS = 4
# Pauses make a round long enough to be disturbed; of silos on one rank they add up, as computing would.
LOCAL = "local={name: drill_rule:Drilled, lr: 0.1, epochs: 5, batch_size: 32, pause_s: 0.004%s}"
DATA = "data={name: digits, silos: %d, partition: {name: dirichlet, alpha: 0.5}}"
SETTINGS = (
    "model={name: mlp, hidden: [64]}",
    "device.name=cpu",
    "exchange.reduction=reproducible",
    "on_failure=adopt",
    "checkpoint.every=1",
)
POLL_S = 0.02
CANNOT = 77  # exit code of what the machine cannot do
TESTBED = TOP / "tests/support/testbed.sh"
OTHERS = ("OMPI_", "PMIX_", "PMI_", "SLURM_", "FEDMPI_")  # what an outer launcher would tell ours
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}


class TooLong(Exception):
    """Something did not come about in time."""


class Cannot(Exception):
    """This machine cannot do the drill."""


def settings(rounds: int, more: str = "", silos: int = RANKS) -> tuple[str, ...]:
    """Of a run of so many rounds; `more` fields of its local rule, such as `, slow: silo-1`."""
    return (f"rounds={rounds}", LOCAL % more, DATA % silos, *SETTINGS)


def mpirun(ranks: int = RANKS) -> list[str]:
    """A launcher line whose ranks outlive each other."""
    return ["mpirun", "--with-ft", "ulfm", "-n", str(ranks)]


def testbed(hosts: int, ranks: int = RANKS) -> tuple[list[str], list[str]]:
    """Words that make hosts of a machine (h1, h2, ...), and a launcher line inside; rank r is on host r % hosts. Cannot
    where this machine has no namespaces."""
    each = -(-ranks // hosts)
    inside = [str(TESTBED), "--hosts", str(hosts), "--ranks-per-host", str(each), "--rate", "1gbit", "--once", "--"]
    tried = subprocess.run([*inside, "true"], capture_output=True, text=True)
    if tried.returncode:
        raise Cannot(tried.stderr.strip())
    names = ",".join(f"h{number}:{each}" for number in range(1, hosts + 1))
    return inside, [*mpirun(ranks), "--host", names, "--map-by", "node:oversubscribe", "--bind-to", "none"]


class Job:
    """`fedmpi train` under a launcher, or `fedmpi run` above it where `grace_s` is given; with `inside`, words that
    come before all that. Leaving the `with` block kills what is left."""

    def __init__(
        self,
        out: Path,
        overrides: Sequence[str],
        line: Sequence[str],
        grace_s: float | None = None,
        inside: Sequence[str] = (),
        fresh: bool = True,
    ) -> None:
        if fresh:
            shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.mark = out, uuid.uuid4().hex
        self.rounds = next(int(word[7:]) for word in overrides if word.startswith("rounds="))
        self.last_commit_s = -math.inf  # when a record came last, of whatever round
        self.starts: list[float] = []  # of the ranks, by the supervisor
        self.commits: dict[int, float] = {}  # when each round was first seen to be committed
        self.records: dict[int, dict[str, Any]] = {}  # the newest of each round
        self.again = 0  # records of rounds that were written before
        self.sealed = 0  # the newest round whose checkpoint was ever whole
        self.undone = 0  # such rounds that were trained again
        self.moments: list[tuple[float, str]] = []  # what happened, and when
        self._told: dict[str, int] = {}  # lines of each file that were read
        self._metrics: tuple[int, int] = (0, 0)  # inode and size of metrics.jsonl as it was read
        config = out.parent / f"{out.name}.yaml"
        config.write_text("{}\n")
        trains = [str(config), f"out={out}", *overrides]
        supervises = [] if grace_s is None else [*FEDMPI, "run", "--grace", str(grace_s), *trains, "--", *line]
        self.command = [*inside, *(supervises or [*line, *FEDMPI, "train", *trains])]
        # Open MPI refuses to start over the contact file of a killed mpirun that had the same process id.
        self._tmp = tempfile.mkdtemp(prefix="drill-")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(OTHERS)}
        path = os.pathsep.join(filter(None, [str(TOP / "src"), str(HERE), os.environ.get("PYTHONPATH")]))
        self.environment = {**clean, **ENVIRONMENT, "PYTHONPATH": path, "TMPDIR": self._tmp, "DRILL": self.mark}
        self.begun_s = time.monotonic()
        with open(out.parent / f"{out.name}.log", "w" if fresh else "a") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=out.parent,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=follow_parent,
            )

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *error: object) -> None:
        while left := self.processes():
            for pid in left:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(POLL_S)
        self.process.wait()
        shutil.rmtree(self._tmp, ignore_errors=True)

    # ------------------------------------------------------------ what is there

    def processes(self) -> dict[int, dict[str, str]]:
        """Every process of the job, with its environment."""
        found = {}
        for name in os.listdir("/proc"):
            with contextlib.suppress(OSError, ValueError):
                content = Path(f"/proc/{int(name)}/environ").read_bytes()
                if self.mark.encode() in content and _state(int(name)) not in "ZX":
                    pairs = (pair.partition("=") for pair in content.decode(errors="replace").split("\0"))
                    found[int(name)] = {key: value for key, _, value in pairs}
        return found

    def ranks(self) -> dict[int, int]:
        """Process ids by the rank that the launcher gave, also of ranks that are still being set up."""
        found: dict[int, int] = {}
        for pid, environment in sorted(self.processes().items()):
            with contextlib.suppress(OSError, KeyError):
                if b"train" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                    found.setdefault(int(environment["OMPI_COMM_WORLD_RANK"]), pid)
        return found

    def look(self) -> None:
        """Read what has come into the run directory."""
        now_s = time.monotonic() - self.begun_s
        self.sealed = max([self.sealed, *sealed_rounds(self.out)])
        with contextlib.suppress(OSError):
            about = (self.out / "metrics.jsonl").stat()
            if (about.st_ino, about.st_size) != self._metrics:
                for line in (self.out / "metrics.jsonl").read_bytes().split(b"\n")[:-1]:
                    self._see(line, now_s)
                self._metrics = about.st_ino, about.st_size
        for name, words in (("events.jsonl", told_of_event), ("supervisor.jsonl", told_by_supervisor)):
            with contextlib.suppress(OSError):
                lines = (self.out / name).read_bytes().split(b"\n")[:-1]
                for event in map(json.loads, lines[self._told.get(name, 0) :]):
                    self.moments.append((now_s, words(event)))
                    if event["event"] in ("started", "restarted"):
                        self.starts.append(now_s)
                self._told[name] = len(lines)

    def _see(self, line: bytes, now_s: float) -> None:
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            before = self.records.get(record["round"])
            is_again = before is not None and before != record
            self.again += is_again
            self.undone += is_again and record["round"] <= self.sealed
            if before != record:
                self.last_commit_s = now_s
            self.records[record["round"]] = record
            self.commits.setdefault(record["round"], now_s)

    @property
    def newest(self) -> int:
        return max(self.records, default=0)

    # ------------------------------------------------------------ what is done

    def say(self, text: str) -> float:
        """Note what was done; when that was."""
        self.moments.append((at_s := time.monotonic() - self.begun_s, text))
        return at_s

    def until(self, what: Callable[[], Any], limit_s: float, why: str) -> None:
        """Watch until so and so. TooLong after the limit, and where the job ends before."""
        until_s = time.monotonic() + limit_s
        while not what():
            ended = self.process.poll() is not None
            self.look()
            if ended and not what():
                raise TooLong(f"the job ended (exit code {self.process.returncode}) before {why}")
            if time.monotonic() > until_s:
                raise TooLong(f"not {why} within {limit_s:.0f} s")
            time.sleep(POLL_S)

    def until_round(self, number: int, limit_s: float) -> None:
        self.until(lambda: self.newest >= number, limit_s, f"round {number} was committed")

    def watch(self, seconds: float) -> None:
        """Watch for so long, or until the job ends."""
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s and self.process.poll() is None:
            self.look()
            time.sleep(POLL_S)

    def signal(self, number: signal.Signals, *ranks: int) -> float:
        """Send ranks a signal, at once; when that was. KeyError where one is not there."""
        pids = self.ranks()
        chosen = [pids[rank] for rank in ranks]
        for pid in chosen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        self.look()
        many = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
        return self.say(f"{number.name} to {many}, after round {self.newest}")

    def wait(self, limit_s: float) -> int:
        """The exit code; below 0 that of a signal. TooLong after the limit."""
        until_s = time.monotonic() + limit_s
        while (code := self.process.poll()) is None:
            self.look()
            if time.monotonic() > until_s:
                raise TooLong(f"not over within {limit_s:.0f} s")
            time.sleep(POLL_S)
        self.look()
        self.say(f"the job ended, exit code {code}")
        return code

    def follow(self, later: "Job") -> None:
        """Take in what a later job in the same run directory has done."""
        offset_s = later.begun_s - self.begun_s
        self.moments += [(at_s + offset_s, text) for at_s, text in later.moments]
        for number, record in later.records.items():
            self.commits.setdefault(number, later.commits[number] + offset_s)
            self.again += number in self.records and self.records[number] != record
            self.records[number] = record

    # ------------------------------------------------------------ figures

    @property
    def samples_per_s(self) -> float:
        """Useful ones: of updates that were taken, in rounds that count, from the first commit to the last."""
        if len(self.records) < 2:
            return 0.0
        counts = (
            useful(record, "num_samples") for number, record in self.records.items() if number > min(self.records)
        )
        return sum(counts) / (max(self.commits.values()) - min(self.commits.values()))

    def next_round_s(self, after_s: float) -> float | None:
        """From then to the next round that was committed for the first time."""
        return min((at_s - after_s for at_s in self.commits.values() if at_s > after_s), default=None)


def sealed_rounds(out: Path) -> list[int]:
    """Rounds that have a whole checkpoint, oldest first."""
    return sorted(int(path.parent.name[-6:]) for path in (out / "checkpoints").glob("round-*/manifest.json"))


def useful(record: Mapping[str, Any], what: str) -> int:
    """Samples or batches (num_samples, num_steps) of the silos whose updates were taken."""
    return sum(row[what] for silo, row in record["silos"].items() if silo not in record["rejected"] and what in row)


def told_of_event(event: Mapping[str, Any]) -> str:
    """A line of events.jsonl for people."""
    if event["event"] != "lost":
        return ", ".join(f"{name} {value}" for name, value in event.items())
    silos = ", ".join(
        f"{silo} to {'nobody' if rank is None else f'rank {rank}'}" for silo, rank in event["silos"].items()
    )
    return (
        f"lost {event['ranks']}, healed in {event['seconds']:.2f} s: {event['num_ranks']} ranks go on after round "
        f"{event['round']} ({silos or 'no silo was there'})"
    )


def told_by_supervisor(event: Mapping[str, Any]) -> str:
    """A line of supervisor.jsonl for people."""
    return f"supervisor: {event['text'].partition(': mpirun')[0][:150]}"


def read_events(out: Path, name: str = "events.jsonl") -> Iterator[dict[str, Any]]:
    """The lines of a file; without a name the losses that were made up for in the job."""
    with contextlib.suppress(OSError):
        rows = [*map(json.loads, (out / name).read_text().splitlines())]
        yield from (row for row in rows if name != "events.jsonl" or row["event"] == "lost")


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def follow_parent() -> None:
    """In the job's first process: SIGTERM should the drill be killed."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)
