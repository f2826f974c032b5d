"""The testbed: separate hosts, links no faster than requested, and nothing left behind."""

import functools
import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from support.mpi import OTHERS, TESTS, absent, until

TESTBED = TESTS / "support" / "testbed.sh"
LAUNCHERS = {"openmpi": ("mpirun", "(Open MPI) 5"), "mpich": ("mpiexec", "HYDRA")}  # with a text of their --version
LIMIT_S = 90  # limit for what takes a second or two on an idle machine

HELLO = """
import json, os, sys
import numpy as np
from fedmpi.comm.machine import host_identity
from mpi4py import MPI
world = MPI.COMM_WORLD
total = np.empty(1000)
world.Allreduce(np.full(1000, world.rank + 1.0), total)
node = world.Split_type(MPI.COMM_TYPE_SHARED)
mine = {"host": os.uname().nodename, "totals": sorted(set(total)), "node": node.size, "cwd": os.getcwd()}
mine |= {"machine": host_identity().hex(), "said": os.environ["FEDMPI_SAID"], "mpi": MPI.Get_library_version()}
if every := world.gather(mine):
    print(json.dumps(every))
"""

THERE_AND_BACK = """
import time
import numpy as np
from mpi4py import MPI
world, data = MPI.COMM_WORLD, np.ones(4_000_000, np.uint8)
for _ in range(4):
    world.Barrier()
    start_s = time.perf_counter()
    if world.rank == 0:
        world.Send(data, 1)
        world.Recv(data, 1)
        print(2 * 8 * data.size / (time.perf_counter() - start_s), flush=True)  # bits of payload per second
    else:
        world.Recv(data, 0)
        world.Send(data, 0)
"""


@functools.cache
def launcher_folder(kind: str) -> Path | None:
    """The folder of this MPI's launcher: beside Python, or anywhere on PATH."""
    name, says = LAUNCHERS[kind]
    for folder in (Path(sys.executable).parent, *map(Path, os.environ["PATH"].split(os.pathsep))):
        if os.access(folder / name, os.X_OK):
            asked = subprocess.run([folder / name, "--version"], capture_output=True, text=True, timeout=LIMIT_S)
            if says in asked.stdout:
                return folder
    return None


def some_kind() -> str:
    """An installed MPI, for tests that do not depend on which."""
    for kind in LAUNCHERS:
        if launcher_folder(kind):
            return kind
    absent("mpi", "neither Open MPI's mpirun nor MPICH's mpiexec beside Python or on PATH")


@functools.cache
def why_not() -> str:
    """Why there can be no testbed on this machine; empty if there can."""
    command = [TESTBED, "--hosts", "1", "--rate", "1gbit", "--", "true"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    return done.stderr.strip() if done.returncode == 77 else ""


class Started(subprocess.Popen[str]):
    """A running testbed. Leaving the `with` block kills it; the test is skipped if there can be none."""

    def __init__(self, kind: str, *arguments: str, cwd: Path, **env: str) -> None:
        folder = launcher_folder(kind)
        if folder is None:
            absent(kind, f"{kind} has no {LAUNCHERS[kind][0]} beside Python or on PATH")
        if why_not():
            absent("netns", why_not())
        clean = {name: value for name, value in os.environ.items() if not name.startswith(OTHERS)}
        super().__init__(
            ["env", "--default-signal", TESTBED, "--mpi", kind, *arguments],  # a test before may have left one ignored
            env={**clean, "PATH": f"{folder}{os.pathsep}{clean['PATH']}", **env},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __exit__(self, *error: object) -> None:
        self.kill()  # only the script itself
        super().__exit__(*error)

    def output(self) -> str:
        """Its standard output; fails unless it exits with 0."""
        out, err = self.communicate(timeout=LIMIT_S)
        assert self.returncode == 0, err
        return out


@pytest.mark.parametrize("kind", LAUNCHERS)
@pytest.mark.parametrize(("hosts", "per_host"), [(4, 1), (2, 2)])
def test_ranks_go_round_hosts_that_are_apart(kind: str, hosts: int, per_host: int, tmp_path: Path) -> None:
    sizes = ("--hosts", str(hosts), "--ranks-per-host", str(per_host), "--rate", "1gbit")
    with Started(kind, *sizes, "--", sys.executable, "-c", HELLO, cwd=tmp_path, FEDMPI_SAID="it's") as testbed:
        every = json.loads(testbed.output())
    ranks = hosts * per_host
    assert [mine["host"] for mine in every] == [f"h{rank % hosts + 1}" for rank in range(ranks)]
    assert len({mine["machine"] for mine in every}) == hosts
    for mine in every:
        assert mine["totals"] == [ranks * (ranks + 1) / 2]
        assert (mine["node"], mine["cwd"], mine["said"]) == (per_host, str(tmp_path), "it's")
        assert ("Open MPI" in mine["mpi"]) == (kind == "openmpi")


@pytest.mark.parametrize("kind", LAUNCHERS)
def test_mpi_is_as_fast_as_the_link(kind: str, tmp_path: Path) -> None:
    arguments = ("--hosts", "2", "--rate", "100mbit", "--", sys.executable, "-c", THERE_AND_BACK)
    with Started(kind, *arguments, cwd=tmp_path) as testbed:
        fastest = max(map(float, testbed.output().split()))
    assert 0.6 < fastest / 100e6 < 1.05


@pytest.mark.parametrize("kind", LAUNCHERS)
def test_the_exit_code_is_the_commands(kind: str, tmp_path: Path) -> None:
    with Started(kind, "--hosts", "2", "--rate", "1gbit", "--", "sh", "-c", "exit 7", cwd=tmp_path) as testbed:
        _, err = testbed.communicate(timeout=LIMIT_S)
    assert testbed.returncode == 7, err


def test_a_command_may_start_its_ranks_itself(tmp_path: Path) -> None:
    line = "hostname; mpirun --host h1:1,h2:1 --map-by node --bind-to none -n 2 hostname; exit 7"
    arguments = ("--hosts", "2", "--rate", "1gbit", "--once", "--", "sh", "-c", line)
    with Started("openmpi", *arguments, cwd=tmp_path) as testbed:
        out, err = testbed.communicate(timeout=LIMIT_S)
    assert testbed.returncode == 7 and out.splitlines()[0] == "h1", err
    assert sorted(out.split()) == ["h1", "h1", "h2"], err


def on_the_machine() -> set[str]:
    """What a testbed could leave on the machine and is there now."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True, timeout=LIMIT_S)
    found = {f"namespace {line}" for line in listed.stdout.splitlines()}
    found |= {f"link {link.name}" for link in Path("/sys/class/net").iterdir()}
    found |= {f"mount {line.split()[4]}" for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    return found | {str(path) for path in Path("/etc").glob("netns/*")}


def processes(mark: str) -> dict[int, str]:
    """Processes with this mark in their environment, and their network namespaces."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes():
                found[int(process.name)] = os.readlink(process / "ns/net")
        except OSError:  # it has just ended
            continue
    return found


@pytest.mark.parametrize("end", [None, signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_stays_behind(end: signal.Signals | None, tmp_path: Path) -> None:
    kind, mark, temporary = some_kind(), str(uuid.uuid4()), tmp_path / "tmp"
    temporary.mkdir()
    rank = "touch here-$(hostname); until [ -e go ]; do sleep 0.1; done"
    sizes = ("--hosts", "3", "--rate", "1gbit")
    before = on_the_machine() if not why_not() else set()
    with Started(kind, *sizes, "--", "sh", "-c", rank, cwd=tmp_path, MARK=mark, TMPDIR=str(temporary)) as testbed:
        until(lambda: len(list(tmp_path.glob("here-h*"))) == 3, LIMIT_S)
        assert len(set(processes(mark).values())) == 1 + 1 + 3  # the machine's, the bridge's and the hosts'
        if end is None:
            (tmp_path / "go").touch()
        else:
            testbed.send_signal(end)
        until(lambda: testbed.poll() is not None, LIMIT_S, Path(f"/proc/{testbed.pid}/status").read_text)
        assert testbed.returncode == (0 if end is None else -end)
        until(lambda: not processes(mark), 5, lambda: processes(mark))
    assert on_the_machine() <= before
    assert not list(temporary.iterdir())


def test_two_side_by_side(tmp_path: Path) -> None:
    arguments = (some_kind(), "--hosts", "2", "--rate", "1gbit", "--", sys.executable, "-c", HELLO)
    with (
        Started(*arguments, cwd=tmp_path, FEDMPI_SAID="left") as left,
        Started(*arguments, cwd=tmp_path, FEDMPI_SAID="right") as right,
    ):
        for side, testbed in (("left", left), ("right", right)):
            every = json.loads(testbed.output())
            assert [(mine["host"], mine["said"], mine["totals"]) for mine in every] == [
                ("h1", side, [3]),
                ("h2", side, [3]),
            ]


# ---------------------------------------------------------------- refused input


def refusal(*arguments: str, path: str | None = None) -> tuple[int, str]:
    """Exit code and the one line of the message."""
    env = {**os.environ, "PATH": path or os.environ["PATH"]}
    done = subprocess.run([TESTBED, *arguments], env=env, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.stdout == ""
    assert done.stderr.startswith("testbed: ") and done.stderr.count("\n") == 1, done.stderr
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--hosts 0 --rate 1gbit -- true", "--hosts"),
        ("--hosts 17 --rate 1gbit -- true", "--hosts"),
        ("--hosts 2 -- true", "--rate"),
        ("--hosts 2 --rate 1gbit --ranks-per-host 0 -- true", "--ranks-per-host"),
        ("--hosts 2 --rate 1gbit --mpi none -- true", "--mpi"),
        ("--hosts 2 --rate 1gbit --fast -- true", "--fast"),
        ("--hosts 2 --rate 1gbit --mpi mpich --once -- true", "--once"),
        ("--hosts 2 --rate 1gbit", "no command"),
        ("--hosts", "--hosts"),
    ],
)
def test_wrong_arguments_are_refused(arguments: str, said: str) -> None:
    code, line = refusal(*arguments.split())
    assert (code, said in line) == (2, True), line


def test_a_wrong_rate_or_mpi_is_refused(tmp_path: Path) -> None:
    if why_not():
        absent("netns", why_not())
    code, line = refusal("--hosts", "2", "--rate", "1gbyte", "--", "true")
    assert (code, "1gbyte" in line) == (2, True), line
    (tmp_path / "mpirun").write_text("#!/bin/sh\necho mpirun 1.0\n")
    (tmp_path / "mpirun").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    code, line = refusal("--hosts", "2", "--rate", "1gbit", "--", "true", path=path)
    assert (code, str(tmp_path / "mpirun") in line) == (2, True), line


@pytest.mark.parametrize(
    ("programs", "said"),
    [
        ({"id": "echo 1000"}, "root"),
        ({"id": "echo 0"}, "no ip"),
        (
            {
                "id": "echo 0",
                "unshare": "echo 'unshare: unshare failed: Operation not permitted'; exit 1",
                **dict.fromkeys(("ip", "tc", "nsenter", "setpriv"), ""),
            },
            "not permitted",
        ),
    ],
)
def test_a_machine_that_cannot_do_it_is_told_apart(programs: dict[str, str], said: str, tmp_path: Path) -> None:
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "bash").symlink_to("/bin/bash")
    code, line = refusal("--hosts", "2", "--rate", "1gbit", "--", "true", path=str(tmp_path))
    assert (code, said in line) == (77, True), line
