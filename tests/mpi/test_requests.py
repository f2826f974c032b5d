"""Members that change on request under mpirun: the bits of a run that is stopped in between are those of one that is
not."""

import json
import subprocess

from support.mpi import FEDMPI
from support.programs.place import TEN_MINUTES, Place, own_lines

from fedmpi import checkpoint, requests, results, roster

STEPS = 50  # batches of a silo's round


def at(place: Place, out: str, round: int, what: requests.What, silo: str) -> None:
    """A request that is carried out after this round."""
    request = requests.Request(f"{round:020d}-{what}", what, silo, after=round)
    requests._write(place.folder / out, request)


def members(place: Place, out: str) -> list[list[str]]:
    lines = (place.folder / out / "metrics.jsonl").read_text().splitlines()
    return [list(json.loads(line)["silos"]) for line in lines]


def test_a_run_that_is_stopped_after_a_silo_was_retired_ends_with_the_same_bits(place: Place) -> None:
    """Silo a leaves after round 2 and is back after round 3; b leaves then. The second request comes in the midst of
    round 4, which is then stopped: the start that follows carries it out."""
    out, more = "retired", ("rounds=5", f"local.steps={STEPS}")
    for name in ("whole-retired", out):
        at(place, name, 2, "retire", "a")
    at(place, "whole-retired", 3, "admit", "a")
    at(place, "whole-retired", 3, "retire", "b")
    whole = place.train(2, "whole-retired", *more)
    assert whole.rc == 0, whole.tails
    assert "fedmpi: after round 2: retire a" in own_lines(whole), whole.tails
    with place.start(2, out, *more, **TEN_MINUTES, AFTER=str(3 * STEPS + STEPS // 2)) as job:
        place.busy(job, out)
        for words in (("admit", out, "a", "--no-wait"), ("retire", out, "b", "--no-wait"), ("stop", out)):
            subprocess.run([FEDMPI, *words], cwd=place.folder, check=True, timeout=30, capture_output=True)
        done = job.wait(30)
    assert done.rc == 3, done.tails
    last = checkpoint.sealed_rounds(place.folder / out)[-1]
    assert checkpoint.manifest(place.folder / out, last).epoch == 1
    again = place.train(2, out, *more)
    assert again.rc == 0, again.tails
    assert members(place, out) == [list("abcd")] * 2 + [list("bcd")] + [list("acd")] * 2
    assert members(place, "whole-retired") == members(place, out)
    first, second = (results.inspect(place.folder / name) for name in (out, "whole-retired"))
    assert first["rounds"] == 5 and first["params_sha256"] == second["params_sha256"]
    rows = {row["id"]: row for row in roster.read(place.folder / out)["silos"]}
    assert {silo: (row["state"], row["since"]) for silo, row in rows.items()} == {
        "a": ("active", 4), "b": ("retired", 1), "c": ("active", 1), "d": ("active", 1),
    }  # fmt: skip
