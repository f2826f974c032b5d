"""cut-loop: one of two hosts is cut off in mid-exchange, and joined again after a while, or once the job goes on
without it. After every try the committed history must be one line.

A campaign is a row of supervised runs in one folder, ten tries each. Every process trains bits of its own
(drill_rule.Traced), so that two halves cannot both commit unseen. In turn the cut host has one or two of the three
ranks, and lost hosts are looked for by Open MPI too, or by the supervisor alone. A try is one line of `tries.jsonl`: a
campaign that is called again goes on.
"""

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drill_job import CANNOT, DATA, FEDMPI, SETTINGS, Cannot, Job, TooLong, mpirun, read_events, testbed

RANKS = 3
TRIES_A_RUN = 10
GRACE_S = 4.0  # without progress, and the supervisor takes the job for hung
WITHIN_S = 10.0  # beyond its bounded wait
LIMIT_S = 90.0  # of a try
FOR_GOOD = 0.25  # share of cuts that are joined only when the job goes on without the host
CUT_S = 0.5, 12.0
LATE_S = 0.5  # a commit that has begun may end so long after a newer start was announced
ROUNDS = 100_000
LOCAL = "local={name: drill_rule:Traced, lr: 0.02, epochs: 2, batch_size: 32, pause_s: 0.004, trace: %s}"
# Open MPI's own search for lost hosts.
DETECTOR = "mpi_ft_detector true mpi_ft_detector_period 0.5 mpi_ft_detector_timeout 2 mpi_ft_detector_thread true"


@dataclass(frozen=True)
class Sealed:
    """What is known of a whole checkpoint."""

    sha256: str  # of its parameters
    epoch: int  # of the start that trained it
    pids: frozenset[int]  # that trained it
    at_s: float  # when its manifest was written


@dataclass
class History:
    """The checkpoints of a run, read as they come, and what is wrong with them."""

    out: Path
    trace: Path
    sealed: dict[int, Sealed] = field(default_factory=dict)  # by round
    wrong: list[str] = field(default_factory=list)
    _files: dict[int, tuple[int, int]] = field(default_factory=dict)  # inode and time of manifests

    def look(self) -> None:
        """Read new checkpoints. A round that is written again must have the same bits."""
        with contextlib.suppress(OSError):
            for name in sorted(os.listdir(self.out / "checkpoints")):
                if name.startswith("round-"):
                    with contextlib.suppress(OSError):
                        self._see(int(name[-6:]))

    def _see(self, round: int) -> None:
        from fedmpi import checkpoint, sealed
        from fedmpi.flat import sha256

        path = sealed.folder_of(self.out, round) / sealed.MANIFEST
        about = path.stat()
        if self._files.get(round) == (about.st_ino, about.st_mtime_ns) or round == 0:
            return
        record = checkpoint.manifest(self.out, round).record or {}
        tokens = {int(row["train_loss"] + 0.5) for row in record["silos"].values()}
        epochs = {token // 10**7 for token in tokens}
        params_P = checkpoint.read_server(self.out, round)[checkpoint.PARAMS]
        pids = frozenset(token % 10**7 for token in tokens)
        found = Sealed(sha256(params_P), max(epochs), pids, about.st_mtime)
        if len(epochs) > 1:
            self.wrong.append(f"round {round} is of epochs {sorted(epochs)}")
        before = self.sealed.setdefault(round, found)
        if before.sha256 != found.sha256:
            self.wrong.append(f"round {round} was committed twice: {before} and {found}")
        self._files[round] = about.st_ino, about.st_mtime_ns

    def judge(self) -> None:
        """Are the checkpoints of one line, each trained from the one before, and no start's after a newer one's?"""
        self.look()
        rounds = sorted(self.sealed)
        parents = self._parents()
        for one, two in itertools.pairwise(rounds):
            old, new = self.sealed[one], self.sealed[two]
            # Rounds between them were committed in memory only, by the same start: each has one parent.
            between = [parents.get((r, new.epoch), set()) for r in range(one + 2, two + 1)]
            follows = old.sha256 in parents.get((one + 1, new.epoch), set()) and all(len(some) == 1 for some in between)
            if not follows or (between and new.epoch != old.epoch):
                self.wrong.append(f"round {two} of epoch {new.epoch} does not follow round {one} as it is on disk")
            if new.epoch < old.epoch:
                self.wrong.append(f"round {two} is of epoch {new.epoch}, the one before of epoch {old.epoch}")
            if new.epoch == old.epoch and not new.pids <= old.pids:
                self.wrong.append(
                    f"round {two} was trained by {sorted(new.pids)}, the one before by {sorted(old.pids)}"
                )
        begun_s = {int(path.name): path.stat().st_mtime for path in (self.out / "epochs").glob("0*")}
        for round, whole in self.sealed.items():
            if whole.at_s > begun_s.get(whole.epoch + 1, whole.at_s) + LATE_S:
                self.wrong.append(f"round {round} of epoch {whole.epoch} was committed after the next epoch had begun")
        self.wrong = list(dict.fromkeys(self.wrong))

    def _parents(self) -> dict[tuple[int, int], set[str]]:
        """SHA-256 of the parameters that a round was trained from, by round and epoch."""
        found: dict[tuple[int, int], set[str]] = {}
        for path in self.trace.glob("*.jsonl"):
            for line in path.read_bytes().split(b"\n")[:-1]:
                row = json.loads(line)
                found.setdefault((row["round"], row["epoch"]), set()).add(row["parent"])
        return found


class Cutting:
    """A supervised run on two hosts, one of which is cut off and joined again."""

    def __init__(self, folder: Path, number: int, seed: int) -> None:
        self.rng = random.Random(f"{seed} {number}")
        self.number = number
        self.slots = {"h1": 1 + number % 2, "h2": 2 - number % 2}
        self.detects = number // 2 % 2 == 1
        self.out, self.trace = folder / f"run-{number:03d}", folder / f"run-{number:03d}.trace"
        for path in (self.out, self.trace):
            shutil.rmtree(path, ignore_errors=True)
        self.trace.mkdir(parents=True)
        self.settings = (LOCAL % self.trace, DATA % RANKS, *SETTINGS, "checkpoint.keep=100000")
        inside, line = testbed(2, 2 * max(self.slots.values()))
        where = ",".join(f"{host}:{slots}" for host, slots in self.slots.items())
        line = [*mpirun(RANKS), "--host", where, *line[line.index("--map-by") :]]
        if self.detects:
            words = iter(DETECTOR.split())
            line[1:1] = [word for name in words for word in ("--mca", name, next(words))]
        self.job = Job(self.out, (f"rounds={ROUNDS}", *self.settings), line, GRACE_S, inside)
        self.history = History(self.out, self.trace)
        self.space: int | None = None

    def host_space(self) -> int:
        """A descriptor of the network namespace of h2."""
        if self.space is None:
            holders = [pid for pid in sorted(self.job.processes()) if _words(pid) == ["sleep", "infinity"]]
            self.space = os.open(f"/proc/{holders[1]}/ns/net", os.O_RDONLY)
        return self.space

    def link(self, state: str) -> float:
        """Set the link of h2 up or down; when that was."""
        space = self.host_space()
        words = ["nsenter", f"--net=/proc/self/fd/{space}", "ip", "link", "set", "eth0", state]
        done = subprocess.run(words, capture_output=True, text=True, pass_fds=[space], timeout=20)
        if done.returncode:
            raise Cannot(f"{' '.join(words)}: {done.stderr.strip()}")
        return self.job.say(f"the link of h2 is {state}, after round {self.job.newest}")

    def until(self, what: Any, limit_s: float, why: str) -> None:
        def looked() -> bool:
            self.history.look()
            return bool(what())

        self.job.until(looked, limit_s, why)

    def new_rounds(self, since_s: float) -> int:
        return sum(at_s > since_s for at_s in self.job.commits.values())

    def hosts(self) -> set[str]:
        with contextlib.suppress(OSError, ValueError):
            return {row["host"] for row in json.loads((self.out / "ranks.json").read_text())}
        return set()

    def trains_on(self, hosts: set[str]) -> bool:
        """Has the newest start trained a round, on these hosts?"""
        started_s = max(self.job.starts, default=0.0)
        return self.hosts() == hosts and self.job.last_commit_s > started_s + 0.1

    def on_both(self) -> str:
        """Wait until both hosts train; if one does not, the job's ranks or its launcher are killed before."""
        both, killed = {"h1", "h2"}, ""
        if self.hosts() == {"h1"}:
            killed = self.rng.choice(["all ranks", "the launcher"])
            newest = max(int(environment.get("FEDMPI_EPOCH", "0")) for environment in self.job.processes().values())
            for pid, environment in self.job.processes().items():
                words = _words(pid)
                is_rank = "train" in words and "OMPI_COMM_WORLD_RANK" in environment
                is_launcher = bool(words) and Path(words[0]).name in ("mpirun", "prterun")
                if (is_rank and environment.get("FEDMPI_EPOCH") == str(newest) and killed == "all ranks") or (
                    is_launcher and killed == "the launcher"
                ):
                    with contextlib.suppress(OSError):
                        os.kill(pid, signal.SIGKILL)
            self.job.say(f"SIGKILL to {killed}, after round {self.job.newest}")
        self.until(lambda: self.trains_on(both), LIMIT_S, "a round was trained on both hosts")
        return killed

    def one_try(self) -> dict[str, Any]:
        """Cut h2 off, and join it again; what came of it."""
        row: dict[str, Any] = {"run": self.number, "slots": self.slots, "detector": self.detects, "why": ""}
        for_good, cut_s = self.rng.random() < FOR_GOOD, self.rng.uniform(*CUT_S)
        try:
            row["before"] = self.on_both()
            now_s = time.monotonic() - self.job.begun_s
            self.until(lambda: self.new_rounds(now_s) > 1, LIMIT_S, "two rounds were committed")
            time.sleep(self.rng.uniform(0.0, 0.6))
            self.job.look()
            starts, losses = len(self.job.starts), len([*read_events(self.out)])
            begun_s = self.link("down")
            row["for_good"], row["cut_s"] = for_good, None if for_good else round(cut_s, 2)
            if for_good:
                self.until(lambda: self.new_rounds(begun_s + 0.2) > 1, LIMIT_S, "two rounds came without h2")
            else:
                self.until(lambda: time.monotonic() - self.job.begun_s > begun_s + cut_s, LIMIT_S, "it was time")
            joined_s = self.link("up")
            self.until(lambda: self.new_rounds(joined_s + 0.2) > 2, LIMIT_S, "three rounds came after the join")
            row["next_s"] = self.job.next_round_s(begun_s + 0.2)
            row["restart_s"] = next((at_s - begun_s for at_s in self.job.starts[starts:]), None)
            row["restarts"] = len(self.job.starts) - starts
            row["healed"] = len([*read_events(self.out)]) - losses
            row["wait_s"] = GRACE_S + 2 * max(record["seconds"]["round"] for record in self.job.records.values())
        except TooLong as why:
            row["why"] = str(why)
        self.history.judge()
        row["wrong"] = self.history.wrong
        row["rounds"] = max(self.history.sealed, default=0)
        self.history.wrong = []
        return row

    def finish(self) -> str:
        """Stop the run, and take it to its end on one host; what is wrong with its exit codes."""
        self.job.look()
        for pid in self.job.processes():
            if _words(pid)[1:4] == [*FEDMPI[1:], "run"]:
                os.kill(pid, signal.SIGTERM)
        if (code := self.job.wait(LIMIT_S)) != 3:
            return f"exit code {code} after a stop request"
        last = max(self.job.sealed, self.job.newest)
        with Job(self.out, (f"rounds={last + 2}", *self.settings), mpirun(2), fresh=False) as rest:
            if code := rest.wait(LIMIT_S):
                return f"exit code {code} of the resumed run"
        return "" if rest.newest == last + 2 else f"the resumed run ended after round {rest.newest}, not {last + 2}"


def _words(pid: int) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")[:-1]
    return []


def held(row: Mapping[str, Any]) -> bool:
    """Was the history one line, and did the job go on?"""
    return not row["wrong"] and not row["why"]


def cut_loop(folder: Path, tries: int, minutes: float, seed: int, tries_a_run: int = TRIES_A_RUN) -> int:
    """Tries until the campaign has so many, or the time is up; then its report. The exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    until_s, rows = time.monotonic() + 60 * minutes, folder / "tries.jsonl"
    while (done := len([*read_events(folder, rows.name)])) < tries and time.monotonic() < until_s:
        number = max((row["run"] for row in read_events(folder, rows.name)), default=0) + 1
        try:
            cutting = Cutting(folder, number, seed)
        except Cannot as why:
            print(f"CANNOT cut-loop: {why}")
            return CANNOT
        with cutting.job:
            fine = True
            for _ in range(min(tries_a_run, tries - done)):
                row = cutting.one_try()
                fine = fine and held(row)
                _write(rows, row)
                if not fine or time.monotonic() > until_s:
                    break
            if fine and (why := _finished(cutting)):
                fine = False
                _write(rows, {**row, "why": why, "wrong": []})
            cutting.out.with_suffix(".moments").write_text(
                "".join(f"+{at_s:.2f} s {text}\n" for at_s, text in cutting.job.moments)
            )
        if cutting.space is not None:
            os.close(cutting.space)
        if fine:
            shutil.rmtree(cutting.out)
            shutil.rmtree(cutting.trace)
    return report([*read_events(folder, rows.name)], tries)


def _finished(cutting: Cutting) -> str:
    try:
        return cutting.finish()
    except TooLong as why:
        return f"at its end: {why}"


def _write(rows: Path, row: Mapping[str, Any]) -> None:
    with rows.open("a") as file:
        file.write(json.dumps(row) + "\n")
    how = "good" if row.get("for_good") else f"{row.get('cut_s')} s"
    said = "ok" if held(row) else f"NOT: {'; '.join([row['why'], *row['wrong']])[:300]}"
    print(
        f"  run {row['run']}: cut for {how}, {row.get('restarts')} restarts, {row.get('healed')} healed, next round "
        f"after {row.get('next_s') or 0:.1f} s: {said}",
        flush=True,
    )


def report(rows: list[dict[str, Any]], wanted: int) -> int:
    """What the tries so far came to; 0 where all is well."""
    good = [row for row in rows if held(row)]
    again = [row for row in good if row["restarts"]]
    print(f"  {'tries':<14}{len(rows)}, {sum(bool(row.get('for_good')) for row in rows)} of them for good")
    print(
        f"  {'after it':<14}{sum(not row['restarts'] and not row['healed'] for row in good)} went on, "
        f"{sum(not row['restarts'] and row['healed'] > 0 for row in good)} healed in the job, {len(again)} restarted"
    )
    print(f"  {'history':<14}{sum(bool(row['wrong']) for row in rows)} tries with two lines; 0 are allowed")
    for name, key in (("restarted", "restart_s"), ("next round", "next_s")):
        if took := [row[key] for row in again]:
            late = sum(row[key] > row["wait_s"] + WITHIN_S for row in again)
            print(
                f"  {name:<14}median {statistics.median(took):.1f} s, at most {max(took):.1f} s after the cut; {late} "
                f"later than the bounded wait + {WITHIN_S:.0f} s"
            )
    if len(rows) < wanted:
        print(f"  {'to do':<14}{len(rows)} of {wanted} tries so far: the same command goes on")
    failed = len(rows) - len(good)
    print(f"{'FAIL' if failed or not rows else 'PASS'} cut-loop" + (f": {failed} tries failed" if failed else ""))
    return int(failed > 0 or not rows)
