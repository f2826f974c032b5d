"""MPI jobs for tests: a real mpirun with a time limit; no process is left when the test ends.

done = mpirun(2, "fedmpi", "train", "config.yaml", timeout_s=60)     a job from start to end
with Job(2, "fedmpi", "train", "config.yaml") as job:                a job that the test interacts with
    os.kill(job.ranks()[1], signal.SIGUSR1)
    done = job.wait(20)
report = launch("collectives", 4)                                    a program of many cases, see programs/cases.py
"""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, NoReturn, TypeVar

import pytest

T = TypeVar("T")

TESTS = Path(__file__).parents[1]
PROGRAMS = TESTS / "support" / "programs"  # programs that tests launch on ranks
PYTHON = sys.executable
FEDMPI = str(Path(sys.executable).parent / "fedmpi")
OTHERS = (
    "OMPI_",
    "PMIX_",
    "PMI_",
    "PRTE_",
    "SLURM_",
    "MPI_LOCAL",
    "FEDMPI_RANKS",
)  # set by an outer launcher, and hidden from ours

FAST = bool(os.environ.get("FEDMPI_FAST"))  # no test starts ranks, see conftest.py
may_start = True  # whether the running test has the marker `mpi`; conftest.py sets it for each test

# These tests run more ranks than cores, and may run as root in a container.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # ranks of other tests are on the same cores
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    # One-sided communication over libfabric: where it finds no network for that, it sleeps a second in every MPI_Init.
    "OMPI_MCA_btl": "^ofi",
}


def absent(what: str, reason: str) -> NoReturn:
    """Skip the test; fail it if FEDMPI_REQUIRE names `what`."""
    required = what in os.environ.get("FEDMPI_REQUIRE", "").split(",")
    (pytest.fail if required else pytest.skip)(reason)
    raise AssertionError


# MPIs in their own folders of the virtual environment, because all of them have an mpirun: how they get there.
OTHER_MPIS = {
    "mpich": "jobs/test.sh puts it there",
    "impi": "pip install --no-deps --prefix .venv/impi impi-rt (130 MB) does",
}


def other_mpi(name: str) -> dict[str, str]:
    """Environment with another MPI than the virtual environment's, for its mpiexec and for mpi4py. The test is skipped
    if it is not installed, or fails if FEDMPI_REQUIRE has it."""
    folder = Path(sys.prefix) / name
    if not (folder / "bin/mpiexec").exists():
        absent(name, f"no mpiexec in {folder}/bin: {OTHER_MPIS[name]}")
    path = f"{folder}/bin:{os.environ['PATH']}:/usr/sbin:/sbin"
    return {"MPI4PY_LIBMPI": f"{folder}/lib/libmpi.so.12", "PATH": path}


@functools.cache
def launcher() -> tuple[str, ...]:
    """mpirun with the options that it always needs; empty if there is none."""
    beside = Path(PYTHON).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        return ()
    version = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=30).stdout
    return (found, "--oversubscribe") if "Open MPI" in version else (found,)


class Done(NamedTuple):
    """How a job ended."""

    rc: int
    out: str
    err: str
    seconds: float

    @property
    def tails(self) -> str:
        """The last part of its outputs, for assertion messages."""
        return (
            f"exit {self.rc} after {self.seconds:.1f} s\nstdout: ...{self.out[-2000:]}\nstderr: ...{self.err[-4000:]}"
        )


class Job:
    """A running mpirun. Leaving the `with` block kills what is left of it."""

    def __init__(
        self, n: int, *command: str, cwd: Path | None = None, env: dict[str, str] | None = None, mpi: str = ""
    ) -> None:
        """`mpi`: one of OTHER_MPIS instead of the virtual environment's."""
        if FAST:
            pytest.skip("starts ranks, which FEDMPI_FAST leaves out")
        assert may_start, "this test starts ranks: mark it with pytest.mark.mpi"
        if not launcher():
            absent("mpi", "no mpirun beside Python nor on PATH")
        self.n = n
        words = (f"{sys.prefix}/{mpi}/bin/mpiexec",) if mpi else launcher()
        env = {**(other_mpi(mpi) if mpi else {}), **(env or {})}
        clean = {name: value for name, value in os.environ.items() if not name.startswith(OTHERS)}
        self._outputs = [tempfile.TemporaryFile("w+", errors="replace") for _ in range(2)]  # noqa: SIM115
        # Open MPI refuses to start over the contact file of a killed mpirun with the same process id.
        self._tmp = tempfile.TemporaryDirectory(prefix="mpi-", ignore_cleanup_errors=True)
        self.started_s = time.monotonic()
        self.process = subprocess.Popen(
            [*words, "-n", str(n), *command],
            cwd=cwd,
            env={**clean, **ENVIRONMENT, "TMPDIR": self._tmp.name, **env},
            stdin=subprocess.DEVNULL,
            stdout=self._outputs[0],
            stderr=self._outputs[1],
            start_new_session=True,  # identifies all its processes
        )

    def __enter__(self) -> "Job":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        for file in self._outputs:
            file.close()
        self._tmp.cleanup()

    def processes(self) -> list[int]:
        """Every process of the job's session: mpirun, its helpers, the ranks."""
        session = str(self.process.pid)
        return [pid for pid in _pids() if (stat := _stat(pid))[3:4] == [session] and stat[0] != "Z"]

    def ranks(self) -> dict[int, int]:
        """Process ids of the ranks that have started, by rank."""
        found = {}
        for pid in self.processes():
            with suppress(OSError):
                for line in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    name, _, value = line.partition(b"=")
                    if name in (b"OMPI_COMM_WORLD_RANK", b"PMI_RANK") and int(value) not in found:
                        found[int(value)] = pid  # the lowest pid: a rank's children start later
        return found

    def wait(self, limit_s: float) -> Done:
        """How the job ended. A job that exceeds the limit is killed and fails the test."""
        try:
            rc = self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            left = sorted(self.ranks())
            self.kill()
            pytest.fail(f"hung: ranks {left} of {self.n} still ran after {limit_s:g} s; {self.so_far().tails}")
        return self.so_far()._replace(rc=rc)

    def so_far(self) -> Done:
        """The output so far."""
        for file in self._outputs:
            file.seek(0)
        # Open MPI appends a zero byte to its output, and a color reset if it takes the output for a terminal.
        out, err = (file.read().replace("\0", "").replace("\x1b[0m", "") for file in self._outputs)
        rc = self.process.poll()
        return Done(-1 if rc is None else rc, out, err, time.monotonic() - self.started_s)

    def kill(self) -> None:
        """SIGKILL all processes at once, as if a node lost power."""
        while found := self.processes():
            for pid in found:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.poll()
            time.sleep(0.01)
        self.process.wait()


def mpirun(
    n: int,
    *command: str,
    timeout_s: float = 90,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    mpi: str = "",
) -> Done:
    """Run `command` on n ranks to its end; the test fails if that takes longer than `timeout_s`."""
    with Job(n, *command, cwd=cwd, env=env, mpi=mpi) as job:
        return job.wait(timeout_s)


def until(condition: Callable[[], T], limit_s: float, explain: Callable[[], object] = str) -> T:
    """Wait for the first truthy result of `condition` and return it; fail after `limit_s` seconds."""
    deadline = time.monotonic() + limit_s
    while not (answer := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"not within {limit_s:g} s: {explain()}")
        time.sleep(0.02)
    return answer


def _pids() -> Iterator[int]:
    return iter(sorted(int(name) for name in os.listdir("/proc") if name.isdigit()))


def _stat(pid: int) -> list[str]:
    """State, parent, group, session, ... of a process; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return [""]


def cpu_seconds(pid: int) -> float:
    """CPU time of a process, seconds; 0 if it is gone."""
    stat = _stat(pid)
    return sum(map(int, stat[11:13])) / os.sysconf("SC_CLK_TCK") if len(stat) > 12 else 0.0


# ---------------------------------------------------------------- many cases in one launch


@dataclass(frozen=True)
class Report:
    """The results of a program in programs/."""

    n: int
    done: Done
    rows: dict[str, dict[int, dict[str, Any]]]  # by case and rank

    def check(self, case: str) -> Any:
        """Fail unless the case passed on every rank; returns rank 0's value."""
        rows = self.rows.get(case, {})
        bad = [f"rank {rank}: {row['why']}" for rank, row in sorted(rows.items()) if not row["ok"]]
        if bad:
            pytest.fail(f"{case} at n={self.n}\n" + "\n".join(bad))
        if len(rows) != self.n:
            pytest.fail(f"{case} at n={self.n}: heard of ranks {sorted(rows)}, then {self.done.tails}")
        for row in rows.values():
            if "skip" in row:
                pytest.skip(row["skip"])
        return rows[0].get("value")


@functools.cache
def launch(program: str, n: int, *arguments: str, timeout_s: float = 120, mpi: str = "") -> Report:
    """Run programs/PROGRAM.py on n ranks, once per test session, however many tests use it."""
    command = (PYTHON, "-m", f"support.programs.{program}", *arguments)
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    with Job(n, *command, env={"PYTHONPATH": path}, mpi=mpi) as job:
        with suppress(subprocess.TimeoutExpired):
            job.process.wait(timeout_s)
        hung = job.process.poll() is None
        done = job.so_far()
    if hung:
        done = done._replace(err=f"{done.err}\nhung: killed after {timeout_s:g} s")
    rows: dict[str, dict[int, dict[str, Any]]] = {}
    for line in done.out.splitlines():
        with suppress(ValueError, TypeError, KeyError):
            row = json.loads(line)
            rows.setdefault(row["case"], {})[row["rank"]] = row
    return Report(n, done, rows)
