"""`mpirun -n N fedmpi train` as a user runs it: exit codes, bad input, failures."""

import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
import yaml
from support.mpi import FEDMPI, mpirun, until
from support.programs.place import CONFIG, SILOS, STEPS, TEN_MINUTES, Place, own_lines

from fedmpi.results import inspect


def test_done(place: Place, undisturbed: str) -> None:
    """Trained, evaluated by the ranks with one record for all, and trained again."""
    done = place.train(3, "done")
    assert (done.rc, own_lines(done)) == (0, []), done.tails
    assert "after round 4" in done.out and done.out.count("round 4/4") == 1, done.out
    assert place.sha("done") == undisturbed
    assert (place.folder / "done" / "model.safetensors").exists()
    told = mpirun(2, FEDMPI, "eval", "done", "--json", cwd=place.folder, timeout_s=60)
    assert told.rc == 0 and told.out.count("\n") == 1, told.tails
    record, last = json.loads(told.out), inspect(place.folder / "done")["metrics"]
    for silo, row in record.pop("silos").items():
        assert row.items() <= last["silos"][silo].items()
    assert record.items() <= last.items() and record["round"] == 4
    again = place.train(2, "done")
    assert again.rc == 0, again.tails
    assert place.sha("done") == undisturbed


def test_more_rounds_go_on_from_a_finished_run(place: Place, undisturbed: str) -> None:
    assert place.train(1, "longer", "rounds=2").rc == 0
    assert place.train(2, "longer").rc == 0
    assert place.sha("longer") == undisturbed


TELL = """
def tell(record, run):
    with open(run.root / "told", "a") as file:
        print(record["round"], file=file)
    if record["round"] == run.rounds:
        raise ValueError("enough")
"""


def test_a_grid_trains_on_all_ranks_and_one_of_them_prints_it(place: Place) -> None:
    """Rows equal those of `fedmpi train`; once all runs are done, another number of ranks only prints. A callback that
    raises on rank 0 leaves no rank behind."""
    base = CONFIG | {"rounds": 2, "local": CONFIG["local"] | {"steps": 5}}
    base["data"] = CONFIG["data"] | {"root": str(place.data)}
    (place.folder / "tell.py").write_text(TELL)
    base["callbacks"] = ["tell:tell"]
    grid = {"base": base, "algorithms": {"slow": {"local.lr": 0.01}, "given": {}}, "out": "grid"}
    (place.folder / "grid.yaml").write_text(yaml.safe_dump(grid))
    command = (FEDMPI, "compare", "grid.yaml", "--json")
    done = mpirun(2, *command, cwd=place.folder, timeout_s=120)
    assert done.rc == 0 and done.out.count("\n") == 1 and done.err.count("compare: 2 of 2: ") == 1, done.tails
    rows = json.loads(done.out)
    assert [(row["algorithm"], row["ranks"]) for row in rows] == [("given", "2"), ("slow", "2")]
    assert all(row["megabytes"] > 0 for row in rows)
    assert done.err.count("callback 'tell:tell' raised ValueError: enough (") == 2, done.tails
    for algorithm in ("slow", "given"):
        assert (place.folder / f"grid/as_given/{algorithm}/0/told").read_text() == "1\n2\n"
    assert place.train(1, "by_itself", "rounds=2", "local.steps=5").rc == 0
    shas = [inspect(place.folder / out)["params_sha256"] for out in ("grid/as_given/given/0", "by_itself")]
    assert shas[0] == shas[1]
    again = mpirun(3, *command, cwd=place.folder, timeout_s=60)
    assert again.rc == 0 and json.loads(again.out) == rows and " of 2" not in again.err, again.tails
    grid["algorithms"]["wrong"] = {"local.lrr": 1}
    (place.folder / "grid.yaml").write_text(yaml.safe_dump(grid))
    refused = mpirun(2, *command, cwd=place.folder, timeout_s=120)
    assert refused.rc == 2 and len(own_lines(refused)) == 1 and "did you mean 'lr'?" in refused.err, refused.tails


# ---------------------------------------------------------------- bad input: one line, exit 2

BAD = {
    "unknown key": (["local.steps=2", "local.lrr=1"], ["local", "'lrr'", "did you mean 'lr'?"]),
    "out cannot be written": (["out=config.yaml/run"], ["out: cannot write into config.yaml/run"]),
    "data are missing": (['data={name: fashion_mnist, root: "empty"}'], ["fashion_mnist", "empty"]),
    "another model": (["model={name: mlp, hidden: [5]}", "out=undisturbed"], ["checkpoints of another run", "model"]),
    "a file is missing on each rank": (["data.root=two"], ["rank 0: silo 'c': no file", "; rank 1: silo 'd': no file"]),
    "shapes disagree on one rank": (["data.root=wide"], ["rank 1", "silo 'b'", "[7]"]),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input(place: Place, undisturbed: str, what: str) -> None:
    overrides, says = BAD[what]
    for name in ("empty", "two", "wide"):
        (place.folder / name).mkdir(exist_ok=True)
    for silo in SILOS:
        shutil.copy(place.data / f"{silo}.npz", place.folder / ("two" if silo in "ab" else "wide"))
        shutil.copy(place.data / f"{silo}.npz", place.folder / "wide")
    np.savez(place.folder / "wide" / "b.npz", x=np.zeros((9, 7), np.float32), y=np.zeros(9, np.int64))
    done = place.train(2, "bad", *overrides)
    assert done.rc == 2, done.tails
    lines = own_lines(done)
    assert len(lines) == 1 and lines[0].startswith("fedmpi: "), done.tails
    for text in says:
        assert text in lines[0], (text, lines[0])
    assert "round" not in done.out, done.out
    assert place.sha("undisturbed") == undisturbed


# ---------------------------------------------------------------- failures: exit 1, and no process is left


def test_diverged(place: Place) -> None:
    done = place.train(2, "diverged", "local.lr=1e30", "local.steps=20")
    assert done.rc == 1, done.tails
    assert len(own_lines(done)) == 1 and "every update was rejected" in done.err, done.tails


def test_a_silo_raises(place: Place) -> None:
    """In round 2, while the other ranks are inside a ten-minute round."""
    with place.start(4, "raises", **TEN_MINUTES, RAISE="d", AFTER=str(STEPS)) as job:
        until(lambda: any(place.folder.glob("raised-*")) or job.process.poll() is not None, 60)
        raised_s = time.monotonic()
        done = job.wait(20)
    assert time.monotonic() - raised_s < 15, done.tails
    assert done.rc == 1, done.tails
    assert done.err.count("Traceback") == 1 and done.err.count("boom in d") == 1, done.tails
    assert "rank 3, silo 'd', round 2" in done.err, done.tails


def test_two_silos_raise_at_once(place: Place) -> None:
    done = place.train(3, "both", RAISE="ab", AFTER=str(STEPS), limit_s=30)
    assert done.rc == 1, done.tails
    assert done.err.count("Traceback") == 1 and done.err.count("RuntimeError: boom in ") == 1, done.tails


def test_a_rank_raises_outside_of_its_silos(place: Place) -> None:
    done = place.train(3, "odd", 'select={name: "mine:Odd"}', ODD="2", limit_s=30)
    assert done.rc == 1, done.tails
    assert done.err.count("Traceback") == 1 and "rank 2 failed" in done.err and "LookupError" in done.err, done.tails


def test_what_one_rank_alone_says_no_to_is_said(place: Place) -> None:
    """Such errors are meant for all ranks alike, so that rank 0 reports them for all."""
    done = place.train(3, "no", 'select={name: "mine:Odd"}', SAYS_NO="2", limit_s=90)
    assert done.rc == 1, done.tails
    said = ["fedmpi: rank 2: no silo suits me", "no round is on disk in no yet; the same command starts again"]
    assert own_lines(done) == said, done.tails


def test_one_rank_alone_raises_while_a_checkpoint_is_pending(place: Place) -> None:
    """After an error on one rank only, no collective follows, because the others are in another one."""
    server = ("exchange.plan=replicated", "checkpoint.every=1", 'server.optimizer={name: "mine:Late"}')
    done = place.train(2, "alone", *server, SLOW_S="2", STEP_NO="1", limit_s=60)
    assert done.rc == 1, done.tails
    assert own_lines(done) == ["fedmpi: rank 1: no such step"], done.tails


def test_one_rank_alone_has_no_memory(place: Place) -> None:
    """It cannot agree with other ranks; the traceback says where."""
    done = place.train(2, "no-room", 'select={name: "mine:Odd"}', NO_ROOM="1", limit_s=60)
    assert done.rc == 1, done.tails
    assert "rank 1 failed" in done.err and "MemoryError: no room" in done.err, done.tails


@pytest.mark.parametrize("how", ("exit", "kill"))
def test_a_rank_is_gone(place: Place, undisturbed: str, how: str) -> None:
    """In round 3: the job ends, and a checkpoint was on disk before."""
    trouble = {"EXIT": "b"} if how == "exit" else TEN_MINUTES
    with place.start(2, how, "checkpoint.every=1", **trouble, AFTER=str(2 * STEPS)) as job:
        if how == "kill":
            os.kill(place.busy(job, how)[1], signal.SIGKILL)
        done = job.wait(60 if how == "exit" else 20)
    assert done.rc not in (0, 2, 3), done.tails
    assert {1} <= set(place.rounds(how)) <= {1, 2}, place.rounds(how)
    done = place.train(2, how)
    assert (done.rc, place.sha(how)) == (0, undisturbed), done.tails


def test_a_checkpoint_that_cannot_be_written(place: Place) -> None:
    """Training does not silently continue without checkpoints; every rank ends."""
    with place.start(2, "full", "checkpoint.every=1", "checkpoint.max_failures=1", SLEEP_S="0.002") as job:
        until((place.folder / "full" / "ranks.json").exists, 60)
        (place.folder / "full" / "checkpoints" / "round-000001").touch()  # a file in the place of the folder
        done = job.wait(30)
    assert done.rc == 1, done.tails
    assert "cannot write a checkpoint into full" in done.err and "round 4/4" not in done.out, done.tails


def test_launcher_and_library_that_do_not_belong_together(place: Place) -> None:
    """Each rank would be a world of its own, so the launcher's number of ranks is compared with MPI's."""
    done = place.train(2, "worlds", FEDMPI_RANKS="3")
    assert done.rc == 2 and "started 3 ranks but MPI sees 2" in done.err, done.tails
    assert not (place.folder / "worlds").exists()
