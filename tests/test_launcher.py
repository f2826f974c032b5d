"""A rank ends with its launcher, and only then."""

import os
import signal
import subprocess
import sys

import pytest
from support.mpi import until

PARENT = """
import ctypes, os, subprocess, sys, threading
ctypes.CDLL(None).prctl(15, sys.argv[1].encode())  # the name that /proc shows

def start():
    child = subprocess.Popen([sys.executable, "-c", "import fedmpi.launcher as l, time; print(l.follow(), flush=True); "
                              "time.sleep(60)"], stdout=subprocess.PIPE, text=True)
    print(child.pid, child.stdout.readline().strip(), flush=True)

thread = threading.Thread(target=start)
if sys.argv[2] == "thread":
    thread.start()
    thread.join()
else:
    start()
threading.Event().wait(60)
"""


def gone(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


@pytest.mark.parametrize(
    ("name", "how", "follows"), [("mpirun", "main", True), ("mpirun", "thread", False), ("bash", "main", False)]
)
def test_a_rank_ends_with_its_launcher(name, how, follows):
    """A rank that was started by a launcher's thread must outlive that thread."""
    with subprocess.Popen([sys.executable, "-c", PARENT, name, how], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid, said = parent.stdout.readline().split()
        try:
            assert said == str(follows) and not gone(int(pid))
            parent.kill()
            parent.wait()
            if follows:
                until(lambda: gone(int(pid)), 3)
            else:
                assert not gone(int(pid))
        finally:
            if not gone(int(pid)):
                os.kill(int(pid), signal.SIGKILL)


LOST = """
import ctypes, subprocess, sys, time
ctypes.CDLL(None).prctl(15, sys.argv[1].encode())
subprocess.run([sys.executable, "-c", "import fedmpi.launcher as l; l.end_later(0.5)"] if sys.argv[2] == "rank" else
               ["sh", "-c", f"{sys.executable} -c 'import fedmpi.launcher as l; l.end_later(0.5)'; true"])
print("its rank is gone", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("name", "started", "ends"),
    [("mpirun", "rank", True), ("mpirun", "script", True), ("prted", "rank", False), ("bash", "rank", False)],
)
def test_a_launcher_that_does_not_end_an_aborted_job_is_ended(name, started, ends):
    with subprocess.Popen([sys.executable, "-c", LOST, name, started], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == "its rank is gone\n"
        try:
            assert parent.wait(3) == -signal.SIGKILL and ends
        except subprocess.TimeoutExpired:
            assert not ends
            parent.kill()


STARTS = """
import ctypes, os, subprocess, sys, time
ctypes.CDLL(None).prctl(15, b"prterun")
env = {**os.environ, "PMIX_NAMESPACE": "job", "OMPI_COMM_WORLD_LOCAL_SIZE": "3"}
spawns = sys.argv[1] == "spawns"
block = f"with launcher.watched({spawns}): print('in', flush=True); time.sleep(60)"
line = "import time; from fedmpi import launcher\\n" + block
ranks = [subprocess.Popen(["sleep", "60"], env=env), subprocess.Popen(["sleep", "60"], env=env)]
ranks.append(subprocess.Popen([sys.executable, "-c", line], env=env))
print(*(rank.pid for rank in ranks), flush=True)
if spawns:
    sys.stdin.readline()
    print(subprocess.Popen(["sleep", "60"], env={**env, "PMIX_NAMESPACE": "fresh"}).pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("what", ["starts", "spawns"])
def test_a_launcher_is_ended_whose_ranks_wait_for_one_that_died_before_mpi_had_started(what):
    """The others of a start, or a fresh rank; while that one starts, another rank's death does not matter."""
    command, pipe = [sys.executable, "-c", STARTS, what], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as parent:
        assert parent.stdout is not None
        lines = [parent.stdout.readline() for _ in range(2)]
        pids = next(list(map(int, line.split())) for line in lines if line != "in\n")
        try:
            with pytest.raises(subprocess.TimeoutExpired):
                parent.wait(2)  # all are there
            os.kill(pids[0], signal.SIGKILL)
            if what == "spawns":
                assert parent.stdin is not None
                print(file=parent.stdin, flush=True)
                pids.append(int(parent.stdout.readline()))
                with pytest.raises(subprocess.TimeoutExpired):
                    parent.wait(3)
                os.kill(pids[-1], signal.SIGKILL)
            assert parent.wait(15) == -signal.SIGTERM
        finally:
            parent.kill()
            for pid in pids:
                if not gone(pid):
                    os.kill(pid, signal.SIGKILL)
