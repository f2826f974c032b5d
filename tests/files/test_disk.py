"""The folder on a real disk: processes that are killed, two clients with caches, disks that are full or forbidden."""

import errno
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedmpi.errors import ConfigError, FolderError
from fedmpi.files import names
from fedmpi.files.envelope import Torn, packed, unpacked
from fedmpi.files.folder import Disk
from fedmpi.files.line import Line
from fedmpi.files.root import open_run
from fedmpi.files.server import Server
from fedmpi.files.silo import Silo

TESTS = Path(__file__).parents[1]
PROGRAM = TESTS / "support/programs/files_writer.py"
RUN = {"seed": 1}


def start(root, *args):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent / "src")])}
    command = [sys.executable, str(PROGRAM), str(root), *args]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(jobs):
    for job in jobs:
        job.kill()
        job.communicate()


def line_of(root):
    """The commits of a run and its name; each follows from the one before."""
    run = unpacked((root / names.RUN).read_bytes()).head["run"]
    line = Line(Disk(root), run)
    return line.retained()


def the_model_is_right(root):
    """Silos send 1, 2, 3, ...; the model is the sum of what counted."""
    commits = line_of(root)
    assert commits
    file = commits[-1].files["model"]
    model = unpacked((root / names.path(names.NOTES, file.kind, file.number, file.epoch)).read_bytes())
    assert model.digest == file.digest
    answered = [last.number + 1 for last in commits[-1].last.values()]
    assert int(bytes(model.payload)) == sum(n * (n + 1) // 2 for n in answered)
    return sum(answered)


@pytest.mark.slow
def test_jobs_that_are_killed_while_they_write(tmp_path):
    """SIGKILL at random times, again and again; what is on the disk afterwards is whole, and the sum is right."""
    rng, kills, until_s = random.Random(0), 0, time.monotonic() + 7.0
    roles = [("server",), ("silo", "a"), ("silo", "b")]
    jobs = [start(tmp_path, *role) for role in roles]
    time.sleep(1.0)
    while time.monotonic() < until_s:
        time.sleep(rng.uniform(0.0, 0.4))
        k = rng.randrange(len(jobs))
        jobs[k].kill()
        jobs[k].communicate()
        jobs[k], kills = start(tmp_path, *roles[k]), kills + 1
    end(jobs)
    assert kills > 8 and the_model_is_right(tmp_path) > 5
    finals = [path for path in tmp_path.rglob("*") if path.is_file() and names.PART not in path.name]
    for path in finals:
        unpacked(path.read_bytes())  # what has its name is whole
    assert len(finals) < 64 + 16 + 60


@pytest.mark.slow
def test_two_clients_that_see_files_late(tmp_path):
    """Server and silo each go by caches of their own, as two NFS clients do."""
    jobs = [start(tmp_path, "server", "--late", "2", "--versions", "12")]
    jobs += [start(tmp_path, "silo", name, "--late", "2") for name in "ab"]
    try:
        for job in jobs:
            _, err = job.communicate(timeout=60)
            assert job.returncode == 0, err
    finally:
        end(jobs)
    assert line_of(tmp_path)[-1].ended and the_model_is_right(tmp_path) >= 12


def test_a_full_disk(tmp_path):
    """A file that does not fit is not published and leaves nothing behind; the next that fits is."""
    root = tmp_path / "small"
    root.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", root], capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root")
    try:
        silo = Silo.start(Disk(root, patience_s=0.2), RUN, "a", {})
        with pytest.raises(FolderError, match=r"cannot write updates/a.* No space left on device for 0.2 s"):
            silo.publish(names.UPDATE, 0, {}, [bytes(1 << 20)])
        assert os.listdir(root / "updates") == []
        silo.publish(names.UPDATE, 0, {}, [b"fits"])
        assert silo.mine(names.UPDATE) == [(0, 1)]
    finally:
        subprocess.run(["umount", root], check=True)


def test_the_root_must_exist(tmp_path):
    with pytest.raises(
        ConfigError, match=r"transport.root: .*/none does not exist; create it on a file system that all"
    ):
        open_run(Disk(tmp_path / "none"), RUN)


def test_the_root_must_be_empty_or_a_run(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=re.escape("is not empty and holds no run ('thesis.tex')")):
        open_run(Disk(tmp_path), RUN)
    assert os.listdir(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize(
    ("operation", "code", "why"),
    [
        ("link", errno.EOPNOTSUPP, r"hard links fail \(.*\) in .*: use a file system with hard links"),
        ("link", errno.EPERM, r"hard links fail \(Operation not permitted\)"),
        ("create", errno.EACCES, "cannot write in .*: Permission denied"),
        ("make", errno.EROFS, "cannot make epochs in .*: Read-only file system"),
        ("listing", errno.EACCES, "cannot list in .*: Permission denied"),
        ("rename", errno.EIO, "cannot write in .*: Input/output error"),
    ],
)
def test_a_file_system_that_will_not_do(tmp_path, operation, code, why):
    folder = Disk(tmp_path, patience_s=0.1)

    def fail(*_):
        raise OSError(code, os.strerror(code))

    setattr(folder, operation, fail)
    with pytest.raises(ConfigError, match=f"transport.root: {why}") as refused:
        open_run(folder, RUN)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("operation", "why"),
    [("link", "a hard link replaces a file"), ("rename", "a rename does not replace a file")],
)
def test_a_file_system_that_does_something_else(tmp_path, operation, why):
    folder = Disk(tmp_path, patience_s=0.1)
    real = folder.rename

    def link(old, new):
        (tmp_path / new).write_bytes((tmp_path / old).read_bytes())

    def rename(old, new):
        if not (tmp_path / new).exists():
            real(old, new)

    setattr(folder, operation, {"link": link, "rename": rename}[operation])
    with pytest.raises(ConfigError, match=f"{why} in .*: use a file system with hard links and atomic renames"):
        open_run(folder, RUN)
    assert not list(tmp_path.rglob("*probe*"))


def test_a_file_whose_bytes_are_cut_or_changed_is_not_there(tmp_path):
    content = b"".join(packed({"kind": "update", "who": "a"}, [b"some", b"bytes"])[0])
    assert unpacked(content, kind="update").head["who"] == "a"
    for cut in range(len(content)):
        with pytest.raises(Torn):
            unpacked(content[:cut])
    for at in range(len(content)):
        with pytest.raises(Torn):
            unpacked(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(Torn, match="kind is 'update', not 'state'"):
        unpacked(content, kind="state")


def test_updates_after_a_lost_one_are_withdrawn(tmp_path):
    server, silo = Server.start(Disk(tmp_path), RUN, {}), Silo.start(Disk(tmp_path), RUN, "s0", {})
    for number in range(3):
        silo.publish(names.UPDATE, number, {"of": "first"})
    Disk(tmp_path).unlink(names.path("updates", "s0", 1, silo.by))
    server.commit([one.entry() for one in server.poll()], [], {})  # answers 0
    assert server.poll() == [] and silo.lost(1) and not silo.lost(2)
    silo.withdraw(1)
    assert silo.mine(names.UPDATE) == []
    silo.publish(names.UPDATE, 1, {"of": "second"})
    assert [one.content.head["of"] for one in server.poll()] == ["second"] and not silo.lost(1)
