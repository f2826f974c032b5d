"""Cases that run on all ranks of one launch; each rank prints one JSON line per case.

    @case
    def sums(comm): ...              one line {"case": "sums", "rank": 0, "ok": true, "why": "", "value": ...} per rank

Every rank runs the same cases in the same order. If a case fails on one rank while others wait for it in a collective,
it would never end: so a rank that has finished a case waits LIMIT_S for the others, then ends the job.
"""

import atexit
import gc
import json
import sys
import time
import traceback

LIMIT_S = 40.0


class Skip(Exception):
    """Raised on all ranks by a case that this machine cannot run."""


def require_equal(what, found, wanted):
    """Raise AssertionError with both values unless they are equal."""
    assert found == wanted, f"{what}: {found!r} instead of {wanted!r}"


def run(cases, *arguments):
    """Run all cases; exit code 1 if any failed on any rank. A case may return a value that JSON can hold."""
    from mpi4py import MPI

    atexit.register(gc.freeze)  # as the command does: else Python ends with a search among torch's objects
    world = MPI.COMM_WORLD.Dup()
    failures = 0
    for name, work in cases.items():
        row = {"case": name, "rank": world.rank, "ok": True, "why": ""}
        began_s = time.monotonic()
        try:
            row["value"] = work(*arguments)
        except Skip as reason:
            row["skip"] = str(reason)
        except Exception:
            row |= {"ok": False, "why": traceback.format_exc()[-2500:]}
        row["seconds"] = round(time.monotonic() - began_s, 3)
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()
        failures += not _all_ok(world, row["ok"], name)
    sys.exit(1 if failures else 0)


def _all_ok(world, ok, name):
    """Whether the case passed on all ranks. All ranks learn it, or the job ends."""
    import numpy as np
    from mpi4py import MPI

    worst = np.zeros(1, np.int64)
    request = world.Iallreduce(np.array([not ok], np.int64), worst, op=MPI.MAX)
    deadline = time.monotonic() + LIMIT_S
    while not request.Test():
        if time.monotonic() > deadline:
            print(f"rank {world.rank}: others do not come out of case '{name}'", file=sys.stderr, flush=True)
            MPI.COMM_WORLD.Abort(1)
        time.sleep(1e-3)
    return not worst[0]
