"""Ends a rank when its launcher dies; ends a launcher whose job a rank aborted, or whose ranks wait in MPI_Init for a
rank that died.

A rank ends in whatever state it is. So this module imports nothing heavy: a launcher may be killed while its ranks
still import modules or are in MPI_Init, where no Python thread runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

WAITS_S = 10.0  # seconds that a launcher has to end a job after a rank aborted it
LATE_S = 10.0  # seconds for all ranks of a host to start, after one of them calls MPI_Init
GRACE_S = 2.0  # seconds that a launcher has to end a job after a rank exited
STARTERS = ("mpirun", "mpiexec", "prterun")  # started by a user or script; the others run on each host
LAUNCHERS = (*STARTERS, "prted", "orted", "hydra_pmi_proxy", "slurmstepd")
PR_SET_PDEATHSIG = 1


def follow() -> bool:
    """Ask the kernel to kill this process when its parent, the launcher, dies. Returns False if there is no launcher.

    The kernel sends the signal when the THREAD that started this process ends. A launcher may start ranks from
    short-lived threads, so this asks only if the launcher's main thread started us: it ends with the process.
    """
    parent = os.getppid()
    try:
        name = Path(f"/proc/{parent}/comm").read_text().strip()
        started = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    except OSError:
        return False  # not Linux, or no access to /proc
    if not name.startswith(LAUNCHERS) or str(os.getpid()) not in started:
        return False
    if ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        return False
    if os.getppid() != parent:  # it died before the request
        os._exit(1)
    return True


def pid_space() -> str:
    """Equal for processes that see each other under the same process ids: boot and namespace. Empty if unknown."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def born(pid: int) -> int:
    """When the process started, in clock ticks since boot; 0 if unknown. Together with `pid` it identifies a process
    even after the id is reused."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError):
        return 0


def _above(names: tuple[str, ...]) -> tuple[int, str]:
    """Id and name of the nearest ancestor with one of these names; (0, "") if none. Raises OSError without /proc."""
    pid, name = os.getppid(), ""
    while pid > 1 and not (name := Path(f"/proc/{pid}/comm").read_text().strip()).startswith(names):
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])  # a script may be in between
    return (pid, name) if pid > 1 else (0, "")


def end_later(seconds: float = WAITS_S) -> None:
    """Kill the launcher of this process if it still runs after `seconds`.

    If a host is lost, Open MPI's launcher waits for it for ever, although all ranks have ended.
    """
    try:
        pid, name = _above(STARTERS)
        if pid:
            # In its own process, because the launcher ends its ranks first.
            line = f'sleep {seconds}; [ "$(cat /proc/{pid}/comm)" = "{name}" ] && kill -KILL {pid}'
            nothing = subprocess.DEVNULL
            shell = ["/bin/sh", "-c", line]
            subprocess.Popen(shell, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True)
    except OSError:
        pass  # not Linux, or no process can be started


def end_now() -> None:
    """Let the launcher of this process end all ranks."""
    with contextlib.suppress(OSError):
        pid, _ = _above(LAUNCHERS)
        if pid:
            os.kill(pid, signal.SIGTERM)


def ranks_of_others() -> list[int]:
    """Process ids of the ranks on this host that the launcher of this process started in another job than this one."""
    job = f"PMIX_NAMESPACE={os.environ.get('PMIX_NAMESPACE', '')}\0".encode()
    found = []
    with contextlib.suppress(OSError):
        pid, _ = _above(LAUNCHERS)
        for child in children(pid):
            environment = _environment(child)
            if b"PMIX_NAMESPACE=" in environment and job not in environment:
                found.append(int(child))
    return found


@contextlib.contextmanager
def watched(spawns: bool = False) -> Iterator[None]:
    """End the job if a rank of this host dies inside the block, which calls MPI_Init; or, if it `spawns`, a fresh rank
    that is started inside it.

    A fault-tolerant MPI would wait there for ever. MPI_Init holds the interpreter lock, so a separate process watches.
    """
    watcher = None
    with contextlib.suppress(OSError):
        pid, _ = _above(LAUNCHERS)
        job, num = (os.environ.get(name, "") for name in ("PMIX_NAMESPACE", "OMPI_COMM_WORLD_LOCAL_SIZE"))
        if pid and job and num.isdigit():
            if spawns:
                job, num = ",".join(children(pid)), "0"
            words = [sys.executable, "-I", "-S", __file__, str(pid), job, num]
            watcher = subprocess.Popen(words, stdin=subprocess.DEVNULL)
    try:
        yield
    finally:
        if watcher is not None:
            watcher.kill()
            watcher.wait()


def _watch(pid: int, job: str, num: int) -> None:
    """Send SIGTERM to the launcher when one of the job's `num` ranks here has died or has not started within LATE_S.
    `num` 0: when a process has died that started after those in `job`."""
    rank, late_s = os.getppid(), time.monotonic() + LATE_S
    mark, before = (f"PMIX_NAMESPACE={job}\0" if num else "PMIX_NAMESPACE=").encode(), {*job.split(",")}
    known: set[str] = set()

    def there() -> set[str]:
        return {child for child in children(pid) if mark in _environment(child)} - before

    def one_is_gone() -> bool:
        now = there()
        return bool(known - now) or (len(known | now) < num and time.monotonic() > late_s)

    while os.getppid() == rank:
        if one_is_gone():
            # The launcher may end the job itself after an exit code. Delays differ by rank, so that one rank signals
            # first: at a second signal Open MPI leaves processes behind.
            left = sorted(there(), key=int)
            time.sleep(GRACE_S * (1 + 3 * (left.index(str(rank)) if str(rank) in left else 0)))
            if os.getppid() == rank and one_is_gone():  # look twice: during exec a process has no environment
                who = "a rank" if num else "a fresh rank"
                sys.stderr.write(f"fedmpi: {who} died before MPI had started; the job ends\n")
                os.kill(pid, signal.SIGTERM)
                return
        known |= there()
        time.sleep(0.5)


def children(pid: int) -> list[str]:
    """Process ids of a process's children; empty if it has died."""
    found: list[str] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += (task / "children").read_text().split()
    return found


def _environment(pid: str) -> bytes:
    """The environment of a process; empty if it has died."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
        return file.read()
    return b""


if __name__ == "__main__":
    _watch(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
