"""What a run survives: faults made on purpose, what came of them, PASS or FAIL.

    python jobs/experiments/drill.py NAME ... | all [--out runs/drills] [--limit-s 60] [--quick]
    python jobs/experiments/drill.py kill-loop [--mtbf 60] [--minutes 10] [--deaths 200]

Every drill trains the digits on four ranks under `mpirun --with-ft ulfm`, undisturbed and then with the fault; under
`fedmpi run` where a job cannot heal itself. It prints what was done, what happened, what was lost, how long it took to
the next committed round, and goodput: useful samples per second from the first commit to the last, against the
undisturbed run. Exit code 0: all drills passed; 1: one failed; 77: none failed, and this machine cannot do one.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import drill_cut
import drill_loop
import drill_soak
from drill_job import (
    CANNOT,
    RANKS,
    Cannot,
    Job,
    TooLong,
    follow_parent,
    mpirun,
    read_events,
    sealed_rounds,
    settings,
    testbed,
    useful,
)

QUICK = 6  # rounds with --quick
ROUNDS = 12
LOOP, LOOP_ROUNDS = "kill-loop", 60
CUTS = "cut-loop"
SOAK, SOAK_ROUNDS = "soak", 5000
FAULT = 3  # disturbed after this round
STOPPED_S = 10.0
GRACE_S = 4.0  # of supervised drills
NAMESPACE = "DRILL_MOUNTS"  # set in the mount namespace of a drill


@dataclass
class Drill:
    """One drill: its folder, its time, and what it has found."""

    name: str
    folder: Path
    limit_s: float
    rounds: int = ROUNDS
    seconds: float = STOPPED_S  # that a rank is stopped
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
        for at_s, text in sorted(job.moments, key=lambda moment: moment[0]):
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
    slow = (*settings(drill.rounds, f", slow: silo-2, factor: 10, first: {FAULT + 1}"), "comm.timeout_s=2")
    with Job(drill.folder / "run", slow, mpirun()) as job:
        job.until_round(FAULT, drill.left_s)
        fault_s = job.say(f"silo-2 is ten times slower, after round {FAULT}")
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


def stop_silo(drill: Drill) -> None:
    """a rank stops for --seconds s (SIGSTOP, SIGCONT): it is back, or replaced where the supervisor waits for less"""
    drill.limit_s += 5 * (100 + drill.seconds)  # a loaded machine starts a job in half a minute
    whole = drill.undisturbed()
    policy = "{name: deadline, deadline_s: 2, min_silos: 3, late: drop}"
    deadline = (f"engine={{name: synchronous, policy: {policy}}}", "exchange.reduction=fast")
    for name, rank, more, grace_s in (
        ("mpirun", 2, (), None),
        ("mpirun, rank 0", 0, (), None),
        ("mpirun, deadline", 2, deadline, None),
        ("fedmpi run, longer --grace", 2, (), drill.seconds + 60),
        ("fedmpi run, shorter --grace", 2, (), drill.seconds / 4),
    ):
        with Job(drill.folder / name.replace(" ", "-"), (*settings(drill.rounds), *more), mpirun(), grace_s) as job:
            job.until_round(FAULT, drill.left_s)
            pid = job.ranks()[rank]
            fault_s = job.signal(signal.SIGSTOP, rank)
            job.watch(drill.seconds)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
                job.say("SIGCONT")
            code = job.wait(drill.left_s)
        print(f"  {name}")
        drill.told(job, whole, fault_s)
        drill.check(code == 0, f"{name}: exit code {code}")
        drill.check(len(job.records) == drill.rounds, f"{name}: {len(job.records)} of {drill.rounds} rounds recorded")
        replaced = any("hung" in text for _, text in job.moments)
        drill.check(replaced == (grace_s == drill.seconds / 4), f"{name}: {'replaced' if replaced else 'back'}")
        if not more:
            drill.check(sha(job.out) == sha(whole.out), f"{name}: the undisturbed run's SHA-256")


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


# ---------------------------------------------------------------- disks and hosts


def unwritable(drill: Drill, spoil: Callable[[Path], str], mend: Callable[[Path], str]) -> None:
    """The folder of checkpoints, a small file system of its own, cannot be written from some moment on; it is mended
    once the run has ended."""
    whole = drill.undisturbed()
    checkpoints = drill.folder / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    shell("mount", "-t", "tmpfs", "-o", "size=600k", "drill", str(checkpoints))
    try:
        with Job(drill.folder / "run", settings(drill.rounds), mpirun(), fresh=False) as job:
            job.until_round(FAULT, drill.left_s)
            fault_s = job.say(f"{spoil(checkpoints)}, after round {job.newest}")
            code = job.wait(drill.left_s)
        sealed = sealed_rounds(job.out)
        why = damage(job.out, sealed[-1])
        job.say(mend(checkpoints))
        with Job(drill.folder / "run", settings(drill.rounds), mpirun(), fresh=False) as rest:
            resumed_code = rest.wait(drill.left_s)
        job.follow(rest)
        drill.told(job, whole, fault_s)
        drill.check(code == 1, f"exit code {code} once checkpoints failed")
        log = (drill.folder / "run.log").read_text()
        for text in ("failure 1 of 3 in a row", "failure 2 of 3 in a row", "3 checkpoints in a row failed"):
            drill.check(text in log, f"it says: {text}")
        drill.check(not why, f"the checkpoint of round {sealed[-1]} is whole {why}")
        drill.require_same(job, whole, resumed_code)
    finally:
        shell("umount", "-l", str(checkpoints))


def damage(out: Path, round: int) -> str:
    """What is wrong with a checkpoint; empty where it is whole."""
    from fedmpi import checkpoint
    from fedmpi.errors import CheckpointError

    try:
        checkpoint.check(out, round)
    except CheckpointError as error:
        return str(error)
    return ""


def fill_disk(drill: Drill) -> None:
    """the disk of checkpoints fills up: training goes on for a while and ends with exit code 1; with room it resumes"""

    def fill(folder: Path) -> str:
        with open(folder / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(512))
        return "the disk of checkpoints is full"

    def empty(folder: Path) -> str:
        (folder / "filler").unlink()
        return "there is room again; the same command once more"

    unwritable(drill, fill, empty)


def read_only(drill: Drill) -> None:
    """the disk of checkpoints becomes read-only: as with a full one"""

    def remounted(how: str) -> Callable[[Path], str]:
        def remount(folder: Path) -> str:
            until_s = time.monotonic() + 10.0
            while True:  # while a checkpoint is being written the kernel refuses
                try:
                    shell("mount", "-o", f"remount,{how}", str(folder))
                    return f"the disk of checkpoints is mounted {how}"
                except Cannot:
                    if time.monotonic() > until_s:
                        raise
                    time.sleep(0.01)

        return remount

    unwritable(drill, remounted("ro"), remounted("rw"))


def cut_host(drill: Drill) -> None:
    """the network of one of two hosts is cut: the supervisor starts again on the other, and the rest may not write"""
    inside, line = testbed(2)
    whole = drill.undisturbed()
    with Job(drill.folder / "run", settings(drill.rounds), line, GRACE_S, inside=inside) as job:
        job.until_round(FAULT, drill.left_s)
        rows = json.loads((job.out / "ranks.json").read_text())
        cut = [row["rank"] for row in rows if row["host"] == "h2"]
        shell("nsenter", "--target", str(job.ranks()[cut[0]]), "--net", "ip", "link", "set", "eth0", "down")
        fault_s = job.say(f"the link of h2 with ranks {cut} is down, after round {job.newest}")
        code = job.wait(drill.left_s)
    drill.told(job, whole, fault_s)
    drill.require_same(job, whole, code)
    left = {row["host"] for row in json.loads((job.out / "ranks.json").read_text())}
    drill.check(left == {"h1"}, f"it ended on {', '.join(sorted(left))}")


def shell(*words: str) -> None:
    """Run a command. Cannot where it fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Cannot(f"{words[0]}: {error}") from None
    if done.returncode:
        raise Cannot(f"{' '.join(words)}: {done.stderr.strip()}")


DRILLS: dict[str, Callable[[Drill], None]] = {
    "kill-silo": kill_silo,
    "kill-server": kill_server,
    "two-deaths": two_deaths,
    "slow-silo": slow_silo,
    "hang-silo": hang_silo,
    "stop-silo": stop_silo,
    "cut-host": cut_host,
    "fill-disk": fill_disk,
    "read-only": read_only,
    "poison": poison,
}
MOUNTS = ("fill-disk", "read-only")  # run in a mount namespace of their own


# ---------------------------------------------------------------- the command


def run(name: str, folder: Path, limit_s: float, rounds: int, seconds: float = STOPPED_S) -> int:
    """One drill, told on standard output; 0, 1, or 77 where the machine cannot do it."""
    if name in MOUNTS and not os.environ.get(NAMESPACE):
        return in_namespace(name, folder, limit_s, rounds)
    print(f"drill {name}: {DRILLS[name].__doc__}", flush=True)
    shutil.rmtree(folder / name, ignore_errors=True)
    (folder / name).mkdir(parents=True)
    drill = Drill(name, folder / name, limit_s, rounds, seconds)
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


def in_namespace(name: str, folder: Path, limit_s: float, rounds: int) -> int:
    """The drill where it may mount, and nobody else sees it."""
    apart = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
    try:
        shell(*apart, "mount", "-t", "tmpfs", "drill", "/mnt")
    except Cannot as why:
        print(f"CANNOT {name}: {why}", flush=True)
        return CANNOT
    options = ["--out", str(folder), "--limit-s", str(limit_s), "--rounds", str(rounds)]
    words = [*apart, sys.executable, str(Path(__file__).resolve()), name, *options]
    with subprocess.Popen(words, env={**os.environ, NAMESPACE: "1"}, preexec_fn=follow_parent) as inside:
        return inside.wait()


def main(arguments: list[str] | None = None) -> int:
    lines = "\n".join(f"  {name:<12} {drill.__doc__}" for name, drill in DRILLS.items())
    parser = argparse.ArgumentParser(
        prog="drill.sh",
        description=f"{(__doc__ or '').splitlines()[0]}\n\n{lines}\n  {'all':<12} all of these, one after the other\n"
        f"  {LOOP:<12} random deaths every --mtbf s for --minutes m, or until --deaths; called again it goes on\n"
        f"  {CUTS:<12} one of two hosts is cut off and joined again, --tries times; called again it goes on\n"
        f"  {SOAK:<12} short rounds with deaths now and then: memory, threads and descriptors stay flat",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("drills", nargs="+", metavar="DRILL", choices=[*DRILLS, "all", LOOP, CUTS, SOAK])
    parser.add_argument("--out", type=Path, default=Path("runs/drills"), help="folder of runs and results")
    parser.add_argument("--limit-s", type=float, default=60.0, help="of a drill")
    parser.add_argument("--seconds", type=float, default=STOPPED_S, help="that stop-silo stops a rank")
    parser.add_argument("--rounds", type=int, help=f"{ROUNDS}; of kill-loop {LOOP_ROUNDS}, of soak {SOAK_ROUNDS}")
    parser.add_argument("--mtbf", type=float, default=60.0, help="seconds between faults of kill-loop, on average")
    parser.add_argument("--minutes", type=float, default=10.0, help="of this call of a loop")
    parser.add_argument("--deaths", type=int, help="after so many a campaign of kill-loop is over")
    parser.add_argument("--seed", type=int, default=0, help="of the faults of a loop")
    parser.add_argument("--tries", type=int, default=100, help="after so many a campaign of cut-loop is over")
    parser.add_argument("--ranks", type=int, default=RANKS, help="of kill-loop")
    parser.add_argument("--hosts", type=int, default=1, help="of kill-loop, on this machine: needs root and namespaces")
    parser.add_argument("--spare", type=int, default=0, help="ranks of a job that no fault of kill-loop takes")
    parser.add_argument(
        "--in-set-up", type=float, default=0.25, help="share of kill-loop's starts in which a rank dies"
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} rounds")
    options = parser.parse_args(arguments)
    if shutil.which("mpirun") is None:
        raise SystemExit("drill: no mpirun on PATH")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder, rounds = options.out.absolute(), QUICK if options.quick else options.rounds
    if LOOP in options.drills:
        if options.quick:
            options.mtbf, options.deaths, options.in_set_up = 0.5, 1, 0.0
        faults = options.mtbf, options.seed, options.ranks, options.hosts, options.spare, options.in_set_up
        campaign = drill_loop.Campaign(rounds or LOOP_ROUNDS, *faults)
        return drill_loop.kill_loop(folder / LOOP, campaign, options.minutes, options.deaths, sha)
    if SOAK in options.drills:
        rounds = drill_soak.QUICK if options.quick else options.rounds or SOAK_ROUNDS
        return drill_soak.soak(folder / SOAK, rounds, options.seed)
    if CUTS in options.drills:
        tries = 2 if options.quick else options.tries
        return drill_cut.cut_loop(folder / CUTS, tries, options.minutes, options.seed)
    names = list(DRILLS) if "all" in options.drills else options.drills
    codes = [run(name, folder, options.limit_s, rounds or ROUNDS, options.seconds) for name in dict.fromkeys(names)]
    return 1 if 1 in codes else max(codes)


if __name__ == "__main__":
    sys.exit(main())
