"""Trains the digits with `on_failure: respawn` while ranks die, fresh ones too. Rank 0 prints what came of it.

python respawn.py OUT DEATHS WHAT [KEY=VALUE ...]

DEATHS: RANK:ROUND,...: this rank dies after this round, once. WHAT happens besides: nothing; dies: the first fresh rank
dies while it starts; first: it dies after it has joined, before its first round; joins: rank 1 dies while fresh ranks
join; differs: fresh ranks have another configuration; raises: a fresh rank raises.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import fedmpi
from fedmpi.flat import sha256
from fedmpi.fresh import is_fresh


def die_once(mark: Path) -> None:
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    out, deaths, what, overrides = Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:]
    fresh, marks = is_fresh(), out.with_suffix(".marks")
    marks.mkdir(parents=True, exist_ok=True)
    kills = [tuple(map(int, death.split(":"))) for death in deaths.split(",") if death]
    if fresh and what == "dies":
        die_once(marks / "fresh")
    if fresh and what == "differs":
        overrides = [*overrides, "seed=99"]
    describe, sizes = fedmpi.Run._describe, []

    def dying(self: fedmpi.Run) -> None:
        if sizes and self.comm.rank == 1:
            die_once(marks / "joins")
        describe(self)

    if what == "joins":
        fedmpi.Run._describe = dying  # type: ignore[method-assign]
    config = Path(__file__).parents[3] / "configs" / "digits.yaml"
    with fedmpi.Run(config, f"out={out}", "on_failure=respawn", *overrides) as run:
        if fresh and what == "first":
            die_once(marks / "fresh")
        for record in run:
            sizes.append(run.comm.size)
            if (run.comm.rank, record["round"]) in kills:
                die_once(marks / f"{run.comm.rank}-{record['round']}")
            if fresh and what == "raises":
                raise LookupError("odd")
            time.sleep(1.0 if run.comm.size < max(sizes) else 0.05)  # a fresh rank takes seconds to start
        if run.comm.rank == 0:
            print(json.dumps({"sha256": sha256(run.parameters), "size": run.comm.size, "sizes": sizes}), flush=True)


if __name__ == "__main__":
    main()
