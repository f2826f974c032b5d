"""A job that writes until it is killed; the tests of the folder start it.

python files_writer.py ROOT silo NAME      publishes updates as fast as it can, and prints each number once it is there
python files_writer.py ROOT server         commits every update that it reads, and prints each version
python files_writer.py ROOT server --late 2 a name that was opened too early is not seen for 2 seconds
"""

import argparse
from pathlib import Path

from support.late_disk import LateDisk

from fedmpi.files import names
from fedmpi.files.folder import Pace
from fedmpi.files.server import Server
from fedmpi.files.silo import Silo

RUN = {"seed": 1}


def server(folder: LateDisk, versions: int) -> None:
    jobs = Server.start(folder, RUN, {}, lease_s=0.3)
    total, pace = 0, Pace(folder, 0.001, 0.05)
    if jobs.head is None:
        jobs.commit([], [jobs.put("model", 0, {}, [b"0"])], {})
    else:
        total = int(bytes(jobs.fetch(jobs.head.files["model"]).payload))
    while jobs.head.version < versions:
        arrived = jobs.poll()
        if not arrived:
            jobs.beat({})
            pace.wait()
            continue
        pace.reset()
        total += sum(int(bytes(one.content.payload)) for one in arrived)
        version = jobs.head.version + 1
        jobs.commit([one.entry() for one in arrived], [jobs.put("model", version, {}, [b"%d" % total])], {})
        print(version, flush=True)
    jobs.commit([], [jobs.put("model", versions + 1, {}, [b"%d" % total])], {}, ended=True)


def silo(folder: LateDisk, name: str) -> None:
    job = Silo.start(folder, RUN, name, {}, lease_s=0.3)
    pace = Pace(folder, 0.001, 0.05)
    waiting = [number for number, _ in job.position().pending]
    while True:
        commit = job.look()
        if commit is not None and commit.ended:  # also while an update has no answer
            break
        if commit is None or [n for n in waiting if job.answer(n) is None]:
            pace.wait()
            continue
        commit, waiting = job.line.head, []
        pace.reset()
        if job.fetch(commit.files["model"]) is None:
            continue
        number = job.position().upcoming
        job.publish(names.STATE, number, {}, [b"%d" % number])
        job.publish(names.UPDATE, number, {}, [b"%d" % (number + 1), b" " * 10_000])
        job.tidy()
        waiting = [number]
        print(number, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("role")
    parser.add_argument("name", nargs="?", default="")
    parser.add_argument("--late", type=float, default=0.0)
    parser.add_argument("--versions", type=int, default=10**6)
    args = parser.parse_args()
    folder = LateDisk(args.root, late_s=args.late)
    if args.role == "server":
        server(folder, args.versions)
    else:
        silo(folder, args.name)


if __name__ == "__main__":
    main()
