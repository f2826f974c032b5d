"""What a run survives: faults made on purpose, what came of them, PASS or FAIL.

    python jobs/experiments/drill.py NAME ... | all [--out runs/drills] [--limit-s 60] [--quick]

Every drill trains the digits on four ranks under `mpirun --with-ft ulfm`, undisturbed and then with the fault; under
`fedmpi run` where a job cannot heal itself. It prints what was done, what happened, what was lost, how long it took to
the next committed round, and goodput: useful samples per second from the first commit to the last, against the
undisturbed run. Exit code 0: all drills passed; 1: one failed; 77: none failed, and this machine cannot do one.
"""

import argparse
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from drill_job import RANKS, Job, TooLong, mpirun, read_events, settings, useful

QUICK = 6  # rounds with --quick
ROUNDS = 12
FAULT = 3  # disturbed after this round
GRACE_S = 4.0  # of supervised drills
CANNOT = 77  # exit code of what the machine cannot do


class Cannot(Exception):
    """This machine cannot do the drill."""


@dataclass
class Drill:
    """One drill: its folder, its time, and what it has found."""

    name: str
    folder: Path
    limit_s: float
    rounds: int = ROUNDS
    begun_s: float = field(default_factory=time.monotonic)
    checks: list[tuple[bool, str]] = field(default_factory=list)
    figures: dict[str, float | None] = field(default_factory=dict)

    @property
    def left_s(self) -> float:
        return max(1.0, self.limit_s - (time.monotonic() - self.begun_s))

    def check(self, holds: bool, text: str) -> None:
        self.checks.append((bool(holds), text))

    def undisturbed(self, more: str = "") -> Job:
        """The run of the same configuration that nothing happens to."""
        with Job(self.folder / "undisturbed", settings(self.rounds, more), mpirun()) as job:
            code = job.wait(self.left_s)
        if code:
            raise TooLong(f"the undisturbed run ended with exit code {code}: see {job.out}.log")
        print(
            f"  {'undisturbed':<14}{self.rounds} rounds on {RANKS} ranks, {job.samples_per_s:,.0f} samples/s; with its "
            f"start {time.monotonic() - job.begun_s:.1f} s",
            flush=True,
        )
        return job

    def told(self, job: Job, whole: Job, fault_s: float) -> None:
        """Print what happened to the job, and what it cost."""
        for at_s, text in sorted(job.moments):
            print(f"  +{at_s:<7.2f} s    {text}")
        lost = [sum(useful(r, "num_steps") for r in some.records.values()) for some in (whole, job)]
        more = f"; {job.again} committed rounds were trained again" if job.again else ""
        print(f"  {'lost':<14}{self.rounds - len(job.records)} rounds, {lost[0] - lost[1]} of {lost[0]} batches{more}")
        next_s, healed = job.next_round_s(fault_s), [event["seconds"] for event in read_events(job.out)]
        took = f"; healing itself {', '.join(f'{s:.2f} s' for s in healed)}" if healed else ""
        print(f"  {'next round':<14}{'none' if next_s is None else f'{next_s:.2f} s after the fault'}{took}")
        goodput = job.samples_per_s / whole.samples_per_s if whole.samples_per_s else 0.0
        print(f"  {'goodput':<14}{goodput:.0%} of the undisturbed run ({job.samples_per_s:,.0f} samples/s)", flush=True)
        self.figures |= {"next_round_s": next_s, "goodput": goodput, "batches": lost[0] - lost[1]}

    def require_same(self, job: Job, whole: Job, code: int) -> None:
        """All rounds, all batches and the bits of the undisturbed run."""
        self.check(code == 0, f"exit code {code}")
        self.check(sorted(job.records) == sorted(whole.records), f"{len(job.records)} of {self.rounds} rounds recorded")
        self.check(self.figures.get("batches") == 0, "no batch is lost")
        self.check((ours := sha(job.out)) == sha(whole.out), f"SHA-256 {ours[:12]} is the undisturbed run's")


def sha(out: Path) -> str:
    """Of the newest checkpoint's parameters."""
    from fedmpi.results import inspect

    return str(inspect(out)["params_sha256"])


# ---------------------------------------------------------------- ranks that die


def killed(drill: Drill, ranks: tuple[int, ...]) -> None:
    """Kill ranks in the midst of a round; the others go on."""
    whole = drill.undisturbed()
    with Job(drill.folder / "run", settings(drill.rounds), mpirun()) as job:
        job.until_round(FAULT, drill.left_s)
        time.sleep(0.1)
        fault_s = job.signal(signal.SIGKILL, *ranks)
        code = job.wait(drill.left_s)
    drill.told(job, whole, fault_s)
    drill.require_same(job, whole, code)
    lost = sorted(rank for event in read_events(job.out) for rank in event["ranks"])
    drill.check(len(lost) == len(ranks), f"{len(lost)} lost ranks are in events.jsonl")
    drill.check(job.again == 0, "no committed round was trained again")


def kill_silo(drill: Drill) -> None:
    """a rank that hosts a silo is killed: the others take its silo over"""
    killed(drill, (2,))


def kill_server(drill: Drill) -> None:
    """rank 0, the server, is killed: another rank becomes the server"""
    killed(drill, (0,))


def two_deaths(drill: Drill) -> None:
    """two ranks are killed at once, rank 0 among them"""
    killed(drill, (0, 3))


# ---------------------------------------------------------------- silos that are slow, silent or hostile


def slow_silo(drill: Drill) -> None:
    """a silo becomes ten times slower: the others wait, and nobody is taken for dead"""
    drill.rounds = FAULT + 3
    whole = drill.undisturbed()
    # Shorter than a slow round: ranks that train say so at every batch.
    slow = (*settings(drill.rounds, f", slow: silo-1, factor: 10, first: {FAULT + 1}"), "comm.timeout_s=2")
    with Job(drill.folder / "run", slow, mpirun()) as job:
        job.until_round(FAULT, drill.left_s)
        fault_s = job.say(f"silo-1 is ten times slower, after round {FAULT}")
        code = job.wait(drill.left_s)
    drill.told(job, whole, fault_s)
    drill.require_same(job, whole, code)
    slowest = max(record["seconds"]["round"] for record in job.records.values())
    drill.check(slowest > 2.0, f"a round of {slowest:.1f} s outlived comm.timeout_s of 2 s")


def hang_silo(drill: Drill) -> None:
    """a rank stops for ever (SIGSTOP): the supervisor ends all and starts again from the last checkpoint"""
    whole = drill.undisturbed()
    with Job(drill.folder / "run", settings(drill.rounds), mpirun(), GRACE_S) as job:
        job.until_round(FAULT, drill.left_s)
        fault_s = job.signal(signal.SIGSTOP, 2)
        code = job.wait(drill.left_s)
    drill.told(job, whole, fault_s)
    drill.require_same(job, whole, code)
    drill.check(any("hung" in text for _, text in job.moments), "the supervisor saw that it hung")


def poison(drill: Drill) -> None:
    """one silo sends NaN and another 1e30: both are rejected by name, and the run goes on"""
    whole = drill.undisturbed()
    hostile = settings(drill.rounds, f", nan: silo-1, huge: silo-3, first: {FAULT + 1}")
    with Job(drill.folder / "run", hostile, mpirun()) as job:
        job.until_round(FAULT, drill.left_s)
        fault_s = job.say(f"silo-1 sends NaN and silo-3 sends 1e30, after round {FAULT}")
        code = job.wait(drill.left_s)
    drill.told(job, whole, fault_s)
    drill.check(code == 0, f"exit code {code}")
    drill.check(len(job.records) == drill.rounds, f"{len(job.records)} of {drill.rounds} rounds recorded")
    for number, record in job.records.items():
        wanted = ["silo-1", "silo-3"] if number > FAULT else []
        if sorted(record["rejected"]) != wanted:
            drill.check(False, f"round {number} rejected {record['rejected']}")
    drill.check(True, f"silo-1 and silo-3 are rejected by name from round {FAULT + 1} on")
    before, after = (job.records[number]["accuracy"] for number in (FAULT, drill.rounds))
    drill.check(after > before, f"accuracy goes on from {before:.2f} to {after:.2f}")


DRILLS: dict[str, Callable[[Drill], None]] = {
    "kill-silo": kill_silo,
    "kill-server": kill_server,
    "two-deaths": two_deaths,
    "slow-silo": slow_silo,
    "hang-silo": hang_silo,
    "poison": poison,
}


# ---------------------------------------------------------------- the command


def run(name: str, folder: Path, limit_s: float, rounds: int) -> int:
    """One drill, told on standard output; 0, 1, or 77 where the machine cannot do it."""
    print(f"drill {name}: {DRILLS[name].__doc__}", flush=True)
    shutil.rmtree(folder / name, ignore_errors=True)
    (folder / name).mkdir(parents=True)
    drill = Drill(name, folder / name, limit_s, rounds)
    try:
        DRILLS[name](drill)
    except Cannot as why:
        print(f"CANNOT {name}: {why}", flush=True)
        return CANNOT
    except TooLong as why:
        drill.check(False, str(why))
        for log in sorted(drill.folder.glob("*.log")):
            print(f"  --- the end of {log}\n" + "".join(log.read_text(errors="replace").splitlines(True)[-12:]), end="")
    bad = [text for holds, text in drill.checks if not holds]
    print("\n".join(f"  {'ok' if holds else 'NOT':<14}{text}" for holds, text in drill.checks))
    print(f"{'FAIL' if bad else 'PASS'} {name}, {time.monotonic() - drill.begun_s:.0f} s", flush=True)
    return int(bool(bad))


def main(arguments: list[str] | None = None) -> int:
    lines = "\n".join(f"  {name:<12} {drill.__doc__}" for name, drill in DRILLS.items())
    parser = argparse.ArgumentParser(
        prog="drill.sh",
        description=f"{(__doc__ or '').splitlines()[0]}\n\n{lines}\n  {'all':<12} all of these, one after the other",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("drills", nargs="+", metavar="DRILL", choices=[*DRILLS, "all"])
    parser.add_argument("--out", type=Path, default=Path("runs/drills"), help="folder of runs and results")
    parser.add_argument("--limit-s", type=float, default=60.0, help="of a drill")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} rounds in place of {ROUNDS}")
    options = parser.parse_args(arguments)
    if shutil.which("mpirun") is None:
        raise SystemExit("drill: no mpirun on PATH")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    names = list(DRILLS) if "all" in options.drills else options.drills
    codes = [
        run(name, options.out.absolute(), options.limit_s, QUICK if options.quick else ROUNDS)
        for name in dict.fromkeys(names)
    ]
    return 1 if 1 in codes else max(codes)


if __name__ == "__main__":
    sys.exit(main())
