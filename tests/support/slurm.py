"""A real SLURM on this host while a test needs it: virtual nodes on loopback, all files in one directory.

Needs slurmctld, slurmd, slurm-client, munge and libpmix2 (Debian's names), but no systemd and no cgroups. Needs root
once, for a link that Debian's packages lack.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

T = TypeVar("T")
TOP = Path(__file__).parents[2]

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}

# Open MPI mistakes nodes on one host for a single node; real nodes need none of this.
OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_pml": "ob1",
    "OMPI_MCA_btl": "self,sm,tcp",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}


# Tests that take minutes: only with FEDMPI_TEST_SLURM=all.
EVERYTHING = pytest.mark.skipif(os.environ.get("FEDMPI_TEST_SLURM") != "all", reason="only with FEDMPI_TEST_SLURM=all")


class CannotStart(Exception):
    """Why SLURM cannot start on this host."""


@dataclass(frozen=True)
class Cluster:
    """A running SLURM; ``env`` is the environment of its commands and jobs."""

    env: dict[str, str]

    def run(self, *command: str, **env: str) -> str:
        """The command's standard output; raises with its error output if it failed."""
        done = subprocess.run(command, env={**self.env, **env}, capture_output=True, text=True, timeout=90)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        """SLURM's properties of a job, such as ``JobState``, ``Restarts`` and ``ExitCode``."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "--oneliner", "job", job)))

    def ended(self, job: str, timeout_s: float = 200) -> dict[str, str]:
        """The same, once the job is over."""
        until(lambda: self.job(job)["JobState"] in ENDED, timeout_s, lambda: f"{self.job(job)}\n{self.log(job)}")
        return self.job(job)

    def kill_node(self, name: str) -> None:
        """Kill a node's daemon and all that it started."""
        mark = f"-N\0{name}\0".encode()
        pids = [int(path.name) for path in Path("/proc").glob("[0-9]*") if mark in _read(path / "cmdline")]
        ours = f"SLURM_CONF={self.env['SLURM_CONF']}\0".encode()
        node = f"SLURMD_NODENAME={name}\0".encode()
        for path in Path("/proc").glob("[0-9]*"):
            environ = _read(path / "environ")
            if ours in environ and (int(path.name) in pids or node in environ):
                with suppress(OSError):
                    os.kill(int(path.name), signal.SIGKILL)

    def log(self, job: str) -> str:
        """What the job has printed; nothing before it starts."""
        return _read(Path(self.job(job)["StdOut"])).decode(errors="replace")


def until(condition: Callable[[], T], timeout_s: float, explain: Callable[[], object] = str) -> T:
    """Wait for the first truthy result of ``condition``; the error after ``timeout_s`` includes ``explain()``."""
    deadline = time.monotonic() + timeout_s
    while not (answer := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout_s:g} s: {explain()}")
        time.sleep(0.1)
    return answer


def wait_for_checkpoint(running: Cluster, job: str, out: Path) -> None:
    """Wait until the job's run has a checkpoint."""
    until(lambda: list(out.glob("checkpoints/round-*/manifest.json")), 240, lambda: running.log(job))


def inspect(out: Path) -> dict[str, Any]:
    """What `fedmpi inspect` says of a run."""
    command = [f"{sys.prefix}/bin/fedmpi", "inspect", str(out), "--json"]
    return json.loads(subprocess.run(command, capture_output=True, check=True, timeout=240).stdout)


def reference(out: Path, *overrides: str) -> str:
    """SHA-256 of the same run in one process, undisturbed. The overrides must make sums reproducible."""
    assert "exchange.reduction=reproducible" in overrides
    command = [f"{sys.prefix}/bin/fedmpi", "train", "configs/digits.yaml", f"out={out}", *overrides]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "PMI", "OMPI_COMM"))}
    subprocess.run(command, cwd=TOP, env=clean, capture_output=True, check=True, timeout=240)
    return str(inspect(out)["params_sha256"])


@contextmanager
def slurm_or_skip(num_nodes: int = 2) -> Iterator[Cluster]:
    """A cluster; the test is skipped if there can be none, or fails if FEDMPI_REQUIRE has ``slurm``."""
    with ExitStack() as stack:
        try:
            running = stack.enter_context(cluster(num_nodes))
        except CannotStart as error:
            required = "slurm" in os.environ.get("FEDMPI_REQUIRE", "").split(",")
            (pytest.fail if required else pytest.skip)(f"no SLURM: {error}")
        yield running


@contextmanager
def cluster(num_nodes: int = 2, num_cpus: int = 2) -> Iterator[Cluster]:
    """Start SLURM with nodes n1, n2, ... of ``num_cpus`` each; end everything that ran in it afterwards."""
    # With a mapping policy, such as that of jobs/setup.sh for few cores, mpirun starts all ranks on a job's first node.
    others = ("SLURM", "SBATCH", "PMI", "PRTE_MCA_rmaps", "OMPI_MCA_rmaps")
    env = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    env = {**env, **OPEN_MPI, "PATH": f"{env['PATH']}:/usr/sbin:/sbin"}
    if missing := [program for program in PROGRAMS if not shutil.which(program, path=env["PATH"])]:
        raise CannotStart(f"{', '.join(missing)} not installed")
    _link_pmix()
    # Not below TMPDIR: the path of munge's socket must stay under 108 bytes.
    with tempfile.TemporaryDirectory(prefix="fedmpi-slurm-", dir="/tmp", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        env["SLURM_CONF"] = f"{directory}/slurm.conf"
        _configure(directory, num_nodes, num_cpus)
        running, daemons = Cluster(env), []
        try:
            try:
                munge = f"munged --foreground --force --key-file={name}/munge.key --socket={name}/munge.socket"
                munge += f" --pid-file={name}/munge.pid --seed-file={name}/munge.seed"
                commands = [munge, "slurmctld -D", *(f"slurmd -D -N n{i}" for i in range(1, num_nodes + 1))]
                for command in commands:
                    daemons.append(_start(command, directory, env))
                    if command == munge:
                        until((directory / "munge.socket").exists, 10)
                until(lambda: _num_idle(running) == num_nodes, 20)
            except (OSError, TimeoutError) as error:
                raise CannotStart(f"{error}\n{_logs(directory)}") from error
            yield running
        finally:
            _stop(running, daemons)


def _read(path: Path) -> bytes:
    with suppress(OSError):
        return path.read_bytes()
    return b""


def _link_pmix() -> None:
    """SLURM's plugin opens libpmix.so by its full path, a name that only Debian's development package has."""
    for library in Path("/usr/lib").glob("*-linux-gnu/pmix2/lib/libpmix.so.2"):
        link = library.with_name("libpmix.so")
        if not link.exists():
            try:
                link.symlink_to(library.name)
            except PermissionError:
                raise CannotStart(f"no {link}; as root: ln -s {library.name} {link}") from None


def _configure(directory: Path, num_nodes: int, num_cpus: int) -> None:
    """Write slurm.conf, cgroup.conf and munge's key."""
    with ExitStack() as stack:  # held until all are taken, so that no two are the same
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(num_nodes + 1)]
        control_port, *ports = [each.getsockname()[1] for each in sockets]
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    # cred_expire is how long a requeued job waits (120 s if not set). Job ids are never used again, because MPICH names
    # its shared memory after them. TmpFS has %n because mpi/pmix keeps a directory per step there.
    conf = f"""\
ClusterName=fedmpi
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={control_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool.%n
TmpFS={directory}/tmp.%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PropagateResourceLimits=NONE
ReturnToService=2
KillWait=3
SlurmdTimeout=10
FirstJobId={int(time.time()) % 60_000_000 + 1}
PartitionName=all Nodes=ALL Default=YES DefaultTime=10 State=UP
"""
    for i, port in enumerate(ports, start=1):
        (directory / f"tmp.n{i}").mkdir()
        conf += f"NodeName=n{i} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs={num_cpus} RealMemory=4096\n"
    (directory / "slurm.conf").write_text(conf)
    # slurmd loads a cgroup plugin even if nothing uses it; this one starts with any cgroup mount or none.
    (directory / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    (directory / "munge.key").write_bytes(os.urandom(128))
    (directory / "munge.key").chmod(0o600)


def _start(command: str, directory: Path, env: dict[str, str]) -> subprocess.Popen[bytes]:
    """A daemon in the foreground, in its own session, because Ctrl-C would otherwise end it before its jobs."""
    with open(directory / f"{command.replace(' ', '')[:20]}.log", "wb") as log:
        return subprocess.Popen(
            command.split(), env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


def _num_idle(running: Cluster) -> int:
    with suppress(RuntimeError):  # until slurmctld listens
        return len(set(running.run("sinfo", "-hN", "--responding", "--states=idle", "--format=%N").split()))
    return 0


def _logs(directory: Path) -> str:
    return "\n".join(f"{log.name}: {log.read_text()[-1500:]}" for log in sorted(directory.glob("*.log")))


def _stop(running: Cluster, daemons: list[subprocess.Popen[bytes]]) -> None:
    """End jobs, then daemons, then everything else that was started with this cluster's configuration."""
    with suppress(RuntimeError, TimeoutError, subprocess.TimeoutExpired):
        jobs = running.run("squeue", "--noheader", "--format=%A").split()
        if jobs:
            running.run("scancel", *set(jobs))
        until(lambda: not running.run("squeue", "--noheader"), 10)
    for daemon in reversed(daemons):
        daemon.terminate()
    for daemon in reversed(daemons):
        with suppress(subprocess.TimeoutExpired):
            daemon.wait(5)
    ours = f"SLURM_CONF={running.env['SLURM_CONF']}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if ours in (process / "environ").read_bytes().split(b"\0"):
                os.kill(int(process.name), signal.SIGKILL)
    for daemon in daemons:
        daemon.wait(5)
