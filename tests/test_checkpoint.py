"""Checkpoints: whole or absent, and restored bit for bit."""

import _thread
import json
import logging
import os
import shutil
import threading

import pytest
import torch
from support.runs import tensors_of

from fedmpi import checkpoint, disk
from fedmpi.checkpoint import SERVER, Writer, newest, prune, read_server, read_silos, seal
from fedmpi.comm.threads import on_ranks
from fedmpi.directory import Stored, newest_usable, newest_whole
from fedmpi.errors import CheckpointError
from fedmpi.sealed import folder_of

SERVER_STATE = {
    checkpoint.PARAMS: torch.linspace(-1, 1, 5000),
    ("optimizer", "v_P"): torch.randn(5000, dtype=torch.float64),
    ("selector", "counts"): torch.tensor([[1, 2], [3, 4]]),
    ("selector", "none"): torch.empty(0),
}


def state(silo, personal=True, cursor=5):
    kept = {("cursor",): torch.tensor(cursor)}
    if personal:
        kept |= {("kept", "personal_0"): torch.full((7,), float(ord(silo)))}
        kept |= {("kept", "integers"): torch.tensor([ord(silo), 2**40])}
    return kept


def write(root, round, hosted, server=SERVER_STATE, score=None):
    """Write a checkpoint as the ranks do: each its part, then the rows are gathered, and the manifest comes last."""
    writers = [Writer(root, rank) for rank in range(len(hosted))]
    for writer, silos in zip(writers, hosted, strict=True):
        writer.start(round, tensors_of(server if writer.rank == 0 else {}, silos))
    for writer in writers:
        writer.join()
    assert [writer.written for writer in writers] == [round] * len(hosted)
    rows = [writer.digests for writer in writers]
    seal(root, round, rows, [list(silos) for silos in hosted], {"score": score, "record": {"round": round}})


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


HOSTED = [
    [{"a": state("a"), "b": state("b", cursor=2**40)}],
    [{"a": state("a")}, {"b": state("b")}],
    [{}, {"b": state("b"), "a": state("a", personal=False)}, {}],
    [{"a": state("a", personal=False)}, {}, {"b": state("b", personal=False)}],
]


@pytest.mark.parametrize("hosted", HOSTED)
def test_what_was_written_comes_back_bit_for_bit_for_silos_of_any_rank(tmp_path, hosted):
    write(tmp_path, 4, hosted)
    assert newest(tmp_path) == 4
    assert same(read_server(tmp_path, 4), SERVER_STATE)
    silos = {name: kept for some in hosted for name, kept in some.items()}
    for wanted in (["a"], ["b"], ["b", "a"], []):
        found = read_silos(tmp_path, 4, wanted)
        assert set(found) == set(wanted) and all(same(found[name], silos[name]) for name in wanted)
    files = {path.name for path in folder_of(tmp_path, 4).iterdir()}
    assert files == {"manifest.json", SERVER} | {f"rank-{r:04d}.h5" for r, some in enumerate(hosted) if some}
    assert checkpoint.manifest(tmp_path, 4).record == {"round": 4}


def test_a_silo_that_is_in_no_file_is_named(tmp_path):
    write(tmp_path, 1, HOSTED[1])
    with pytest.raises(CheckpointError, match="no state of silo c"):
        read_silos(tmp_path, 1, ["a", "c"])


def test_the_state_may_change_while_it_is_written(tmp_path, monkeypatch):
    go, written = threading.Event(), checkpoint.write_file
    monkeypatch.setattr(checkpoint, "write_file", lambda *args: go.wait(20) and written(*args))
    writer, server, silo = Writer(tmp_path, 0), {("params",): torch.zeros(9)}, {("kept",): torch.zeros(3)}
    writer.start(1, tensors_of(server, {"a": silo}))
    assert writer.written == -1
    server["params",] += 1
    silo["kept",] += 1
    go.set()
    writer.join()
    assert writer.written == 1 and read_server(tmp_path, 1)["params",].abs().max() == 0
    seal(tmp_path, 1, [writer.digests], [["a"]], {})
    assert read_silos(tmp_path, 1, ["a"])["a"]["kept",].tolist() == [0, 0, 0]
    writer.start(2, tensors_of(server, {"a": silo}))  # reuses the last round's buffers
    writer.join()
    assert read_server(tmp_path, 2)["params",].tolist() == [1] * 9


def test_no_thread_is_started_once_the_run_is_under_way(tmp_path, monkeypatch):
    """A thread that is started when no memory is left hangs its starter."""
    writer = Writer(tmp_path, 0)
    monkeypatch.setattr(threading.Thread, "start", lambda thread: pytest.fail("a thread was started"))
    monkeypatch.setattr(_thread, "start_new_thread", lambda *args: pytest.fail("a thread was started"))
    for round in (1, 2):
        writer.start(round, tensors_of({("params",): torch.zeros(9)}, {"a": {("kept",): torch.zeros(3)}}))
        writer.join()
        assert writer.written == round
    writer.close(20)


def path_of(root, name):
    return folder_of(root, 6) / name


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def of_another_round(path):
    shutil.copy(folder_of(path.parents[2], 4) / path.name, path)


def in_its_place(make):
    """Something else replaces the file."""

    def harm(path):
        path.rename(path.with_name("elsewhere"))
        make(path)

    return harm


HARMS = [
    ("server.h5", truncate, "is torn"),
    ("rank-0001.h5", truncate, "is torn"),
    ("server.h5", flip, "is corrupt"),
    ("rank-0000.h5", flip, "is corrupt"),
    ("rank-0001.h5", os.unlink, "No such file"),
    ("server.h5", os.unlink, "No such file"),
    ("manifest.json", truncate, "manifest.json"),
    ("manifest.json", lambda path: path.write_text("[]"), "manifest.json"),
    ("manifest.json", lambda path: path.write_text("{}"), "manifest.json"),
    ("manifest.json", flip, "its checksum does not match"),
    ("manifest.json", of_another_round, "is of another round"),
    ("manifest.json", in_its_place(os.mkdir), "is not a regular file"),
    ("manifest.json", in_its_place(os.mkfifo), "is not a regular file"),
    ("manifest.json", in_its_place(lambda path: path.symlink_to("elsewhere")), "is a link"),
    ("server.h5", in_its_place(lambda path: path.symlink_to("elsewhere")), "is a link"),
    ("rank-0001.h5", in_its_place(os.mkfifo), "is not a regular file"),
]


@pytest.mark.parametrize(("name", "harm", "says"), HARMS)
def test_a_harmed_checkpoint_is_skipped_with_a_warning_and_the_one_before_is_taken(tmp_path, caplog, name, harm, says):
    for round in (2, 4, 6):
        write(tmp_path, round, HOSTED[1])
    with caplog.at_level(logging.WARNING, "fedmpi"):
        assert newest(tmp_path) == 6 and not caplog.records
        harm(path_of(tmp_path, name))
        assert newest(tmp_path) == 4
    (warning,) = caplog.records
    assert warning.levelname == "WARNING"
    assert warning.getMessage().startswith("skipped checkpoint of round 6: ") and says in warning.getMessage()
    assert same(read_server(tmp_path, 4), SERVER_STATE)


def test_a_checkpoint_without_its_manifest_is_unfinished_and_not_looked_at(tmp_path, caplog):
    for round in (2, 4):
        write(tmp_path, round, HOSTED[1])
    (folder_of(tmp_path, 4) / "manifest.json").unlink()
    assert newest(tmp_path) == 2 and checkpoint.sealed_rounds(tmp_path) == [2] and not caplog.records


def test_a_rank_looks_only_at_the_files_that_it_will_read(tmp_path):
    write(tmp_path, 6, HOSTED[1])
    flip(path_of(tmp_path, "rank-0001.h5"))
    assert newest(tmp_path, silos=()) == newest(tmp_path, server=False, silos=["a"]) == 6
    assert newest(tmp_path, server=False, silos=["b"]) == newest(tmp_path) == -1


def test_the_newest_usable_checkpoint_is_whole_with_its_own_members(tmp_path):
    """Only the file of the silo that joined is damaged, on a rank that reads nothing else."""
    write(tmp_path, 1, [{"a": state("a")}, {}])
    write(tmp_path, 2, [{"a": state("a")}, {"b": state("b")}])
    flip(folder_of(tmp_path, 2) / checkpoint.rank_file(1))
    stored = [Stored(2, 1, [["a"], ["b"]], []), Stored(1, 0, [["a"], []], [])]

    def chosen(comm, stored=stored):
        return newest_usable(tmp_path, comm, stored, lambda one: one.hosted[comm.rank])

    assert on_ranks(2, chosen) == [1, 1]
    assert on_ranks(2, lambda comm: chosen(comm, stored[:1])) == [0, 0]  # the keeper says what is wrong with it

    def resumed(comm):  # round 2 is whole for who reads nothing of b
        return newest_whole(tmp_path, comm, stored[1].hosted[comm.rank], below=2)[0]

    assert on_ranks(2, resumed) == [1, 1]


def test_newest_below_a_round_and_of_nothing(tmp_path):
    assert newest(tmp_path) == -1
    for round in (2, 10, 1_000_000):
        write(tmp_path, round, HOSTED[0])
    assert [newest(tmp_path, below=below) for below in (None, 1_000_000, 10, 2)] == [1_000_000, 10, 2, -1]
    (tmp_path / "checkpoints" / "round-new").mkdir()
    assert checkpoint.sealed_rounds(tmp_path) == [2, 10, 1_000_000]
    checkpoint.remove_after(tmp_path, 2)
    assert checkpoint.sealed_rounds(tmp_path) == [2]


def leftovers(root):
    return [path.name for path in root.rglob("*") if ".part" in path.name]


def test_nothing_unfinished_is_left_behind(tmp_path):
    for round in (1, 2):
        write(tmp_path, round, HOSTED[1])
        assert leftovers(tmp_path) == []


@pytest.mark.parametrize("name", ["server.h5", "rank-0000.h5", "manifest.json"])
def test_no_file_has_its_name_before_it_is_whole(tmp_path, monkeypatch, name):
    seen, replaced = {}, os.replace

    def replace(source, target):
        if target.name == name:
            assert source.parent == target.parent and not target.exists()
            seen[name] = source.stat().st_size
        replaced(source, target)

    monkeypatch.setattr(os, "replace", replace)
    write(tmp_path, 1, HOSTED[0])
    assert seen[name] == (folder_of(tmp_path, 1) / name).stat().st_size > 0


def test_a_folder_that_cannot_be_written_is_an_error_that_stays(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    writer = Writer(tmp_path, 0)
    writer.start(3, tensors_of(SERVER_STATE, {}))
    with pytest.raises(CheckpointError, match="cannot write a checkpoint into "):
        writer.join()
    with pytest.raises(CheckpointError, match="cannot write"):
        _ = writer.written
    with pytest.raises(CheckpointError, match="cannot write"):
        writer.start(4, tensors_of(SERVER_STATE, {}))


def test_a_write_that_fails_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch):
    write(tmp_path, 1, HOSTED[0])
    writer = Writer(tmp_path, 0)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    writer.start(2, tensors_of(SERVER_STATE, {}))
    with pytest.raises(CheckpointError, match="No space left on device"):
        writer.join()
    assert newest(tmp_path) == 1


@pytest.mark.parametrize(
    ("keep", "scores", "left"),
    [
        (2, {}, [4, 5]),
        (1, {1: 0.5, 2: 0.9, 3: 0.1, 4: None, 5: 0.2}, [2, 5]),
        (3, {5: 0.9, 1: 0.1}, [3, 4, 5]),
        (9, {}, [1, 2, 3, 4, 5]),
        (1, {1: -0.5, 2: -0.9, 7: 1.0}, [1, 5]),
        (2, {r: None for r in range(6)}, [4, 5]),
    ],
)
def test_prune_keeps_the_newest_and_the_best(tmp_path, keep, scores, left):
    for round in range(1, 6):
        write(tmp_path, round, HOSTED[0])
    unfinished = folder_of(tmp_path, 6)
    unfinished.mkdir()
    prune(tmp_path, keep, scores)
    assert checkpoint.sealed_rounds(tmp_path) == left
    folders = sorted(int(path.name[-6:]) for path in (tmp_path / "checkpoints").iterdir())
    assert folders == [*left, 6]  # a checkpoint in progress is not touched


def test_a_checkpoint_loses_its_manifest_before_anything_else(tmp_path, monkeypatch):
    write(tmp_path, 1, HOSTED[0])
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
    checkpoint.remove(tmp_path, 1)
    assert checkpoint.sealed_rounds(tmp_path) == [] and (folder_of(tmp_path, 1) / SERVER).exists()


def test_text_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "config.yaml"
    disk.replace_text(path, "old")
    disk.replace_text(path, "new")
    assert path.read_text() == "new" and leftovers(tmp_path) == []

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            disk.replace_text(path, "newer")
    assert path.read_text() == "new"


def test_the_manifest_says_who_is_where(tmp_path):
    write(tmp_path, 3, HOSTED[2], score=0.5)
    found = json.loads((folder_of(tmp_path, 3) / "manifest.json").read_text())
    assert found["files"]["rank-0001.h5"]["silos"] == ["b", "a"] and set(found["files"]) == {SERVER, "rank-0001.h5"}
    assert found["files"][SERVER]["bytes"] == (folder_of(tmp_path, 3) / SERVER).stat().st_size
    assert (found["round"], found["score"]) == (3, 0.5)
