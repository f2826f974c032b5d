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
