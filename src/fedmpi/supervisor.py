"""`fedmpi run CONFIG -- mpirun ...`: starts the ranks, and restarts them from the last commit when they die or hang.

Progress is read from the run directory only, because mpirun may exit 0 when all ranks have died, and may wait forever
for a lost host. Progress is a newer checkpoint or a newer record; a start without progress for too long counts as hung
and is ended. Every start has its own epoch (fencing.py), so that processes that could not be ended cannot commit.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from fedmpi import checkpoint, disk, fencing, launcher, remains, stopping
from fedmpi.comm.vigil import SET_UP
from fedmpi.config import Config
from fedmpi.errors import ConfigError, FedmpiError, Stopped
from fedmpi.launchline import LaunchLine, own_command
from fedmpi.output import note, say
from fedmpi.records.metrics import METRICS
from fedmpi.sealed import newest_first

EVENTS = "supervisor.jsonl"  # in the run directory
LOCK_FILE = ".supervisor"  # in the run directory
HOSTFILE = "hosts"  # in the run directory: the hosts that answered at the last start, if some did not
POLL_S = 0.2  # interval between checks of the run directory
LEAVE_S = 60.0  # limit for the launcher to end once all rounds and the model are on disk
BACK_OFF_S = 60.0  # longest wait before a restart without progress
ONCE_S = 2.0  # signals within this time count as one
FREE_S = 5.0  # limit for an ending job to leave the run directory
ROUTINE = {"started", "restarted", "trains", "asked", "ended", "done", "goodput"}  # events that are no warnings
FRESH_S = 3.0  # a start takes the answers of hosts that are no older


@dataclass(frozen=True)
class Options:
    """Options of `fedmpi run`."""

    starts: int = 10  # give up after this many starts in a row without a newer checkpoint
    grace_s: float | None = None  # seconds without progress beyond twice the longest round; None: comm.timeout_s
    min_ranks: int = 1  # do not start with fewer ranks
    as_is: bool = False  # the launcher line contains its own command
    shown: tuple[str, ...] = ()  # options of `fedmpi train` about what it prints

    @property
    def quiet(self) -> bool:
        """Whether only warnings and errors are printed."""
        return "--quiet" in self.shown


@dataclass
class Progress:
    """Progress of a run, read from its directory. Names are found by listing folders, because an NFS client caches for
    half a minute that a name does not exist."""

    root: Path
    commit: int = -1  # newest round with a manifest; -1 for none
    record: int = 0  # newest round in metrics.jsonl
    longest_s: float = 0.0  # longest round so far
    file: int = 0  # inode of metrics.jsonl; every start writes a new file
    _offset: int = 0  # bytes of it already read

    def look(self) -> bool:
        """Update the figures. True if anything changed since the last call."""
        before = (self.commit, self.record, self.file)
        self.commit = next(newest_first(self.root), -1)
        with contextlib.suppress(OSError):
            if METRICS in os.listdir(self.root):
                self._follow(self.root / METRICS)
        return before != (self.commit, self.record, self.file)

    def _follow(self, path: Path) -> None:
        """Read new records, or all of them if a start has replaced the file."""
        with open(path, "rb") as file:
            about = os.fstat(file.fileno())
            if about.st_ino != self.file or about.st_size < self._offset:
                self.file, self._offset, self.record = about.st_ino, 0, 0
            file.seek(self._offset)
            lines = file.read().rpartition(b"\n")[0]
        for line in lines.splitlines():
            with contextlib.suppress(ValueError, LookupError, TypeError):
                record = json.loads(line)
                self.record = int(record["round"])
                self.longest_s = max(self.longest_s, float(record["seconds"]["round"]))
        self._offset += len(lines) + bool(lines)

    def useful_s(self, after: int) -> float:
        """Seconds of the committed rounds beyond `after`."""
        total = 0.0
        with contextlib.suppress(OSError):
            for line in (self.root / METRICS).read_bytes().splitlines():
                with contextlib.suppress(ValueError, LookupError, TypeError):
                    record = json.loads(line)
                    total += record["seconds"]["round"] if after < record["round"] <= self.commit else 0.0
        return total


class Supervisor:
    """One supervised run; `run` returns once it is over. Raises FedmpiError with the command's exit code."""

    def __init__(self, config: Config, command: Sequence[str], line: Sequence[str], options: Options) -> None:
        """`command` trains; it is appended to the launcher line, unless that has its own command."""
        if line and shutil.which(line[0]) is None:
            raise ConfigError(f"'{line[0]}' is no command here; write fedmpi run CONFIG [key=value ...] -- mpirun -n 4")
        self.root, self.rounds = Path(config.out), config.rounds
        self._command = [] if options.as_is else list(command)
        self._line, self._options = LaunchLine.of(line), options
        self._grace_s = config.comm.timeout_s if options.grace_s is None else options.grace_s
        self._progress = Progress(self.root)
        self._starts, self._epoch = 0, 0
        self._idle = 0  # starts in a row without a newer checkpoint
        self._asked, self._asked_s = 0, -math.inf  # number of stop requests, time of the last
        self._asked_by = ""  # the first signal
        self._begun_s = time.monotonic()
        self._silent: tuple[float, set[str]] = (-math.inf, set())  # hosts without answer, and when they were asked

    # ------------------------------------------------------------ events

    def _tell(self, event: str, text: str, *, aloud: bool = True, **more: Any) -> None:
        """Write a line to supervisor.jsonl and print it, unless `aloud` is False because an error says the same."""
        if aloud and self._options.quiet and event in ROUTINE:
            note(f"fedmpi run: {text}")
        elif aloud:
            say(f"fedmpi run: {text}", error=True)
        row = {"time": round(time.time(), 3), "event": event, "start": self._starts, "epoch": self._epoch}
        row |= {"round": self._progress.commit, **more, "text": text}
        disk.append_line(self.root / EVENTS, json.dumps(row))

    # ------------------------------------------------------------ the whole run

    def run(self) -> None:
        """Train to the last round. Raises Stopped on a stop request, ConfigError if the ranks refuse the configuration,
        FedmpiError if it gives up."""
        with self._locked(), self._listening():
            self._progress.look()
            before = max(0, self._progress.commit)
            self._wait_until_free()
            try:
                self._until_done()
            finally:
                self._tell_goodput(before)

    def _until_done(self) -> None:
        """Start the ranks again and again until all rounds are done."""
        best = self._progress.commit
        while True:
            self._rest(min(BACK_OFF_S, 2.0 ** (self._idle - 1)) if self._idle else 0.0)
            if self._asked:
                raise self._stopped()
            code = self._one_start()
            done = self._done()
            progress = self._progress.commit > best
            if code == ConfigError.exit_code and not progress:
                why = f"{self.root}: the ranks refuse the configuration (exit 2, see above): not started again"
                self._tell("refused", why, aloud=False, code=code)
                raise ConfigError(why)
            if done:
                why = "" if self._progress.commit >= self.rounds else stopping.ended(self.root)[1]
                all_of_it = f"the run ended early ({why}), its rounds" if why else f"all {self.rounds} rounds"
                self._tell("done", f"{all_of_it} are on disk in {self.root}", code=code)
                if "model.safetensors" not in os.listdir(self.root):
                    how = f"fedmpi export {self.root} --to model.safetensors"
                    self._tell("no model", f"model.safetensors is missing: {how}")
                return
            if self._asked or code == Stopped.exit_code:
                raise self._stopped()
            best, self._idle = max(best, self._progress.commit), 0 if progress else self._idle + 1
            if self._idle >= self._options.starts:
                why = f"{self.root}: {self._idle} starts in a row brought no newer checkpoint; {self._saved()}"
                self._tell("gave up", why, aloud=False)
                raise FedmpiError(why)

    def _done(self) -> bool:
        """Whether all rounds are on disk, as in `fedmpi inspect --done`."""
        self._progress.look()
        return self._all_there and checkpoint.newest(self.root, silos=()) >= min(self.rounds, self._progress.commit)

    @property
    def _all_there(self) -> bool:
        """Whether the last round's checkpoint is sealed: that of `rounds`, or the one after which a metric ended it."""
        return self._progress.commit >= self.rounds or 0 < stopping.ended(self.root)[0] <= self._progress.commit

    def _saved(self) -> str:
        commit = self._progress.commit
        return f"round {commit} is on disk; the same command resumes" if commit >= 0 else "no round is on disk"

    def _stopped(self) -> FedmpiError:
        """The error to raise after a stop request."""
        why = f"stopped on request{f' ({self._asked_by})' if self._asked_by else ''}; {self._saved()}"
        self._tell("stopped", why, aloud=False)
        return (Stopped if self._progress.commit >= 0 else FedmpiError)(why)

    def _tell_goodput(self, before: int) -> None:
        wall_s = time.monotonic() - self._begun_s
        useful_s, rounds = self._progress.useful_s(before), max(0, self._progress.commit) - before
        share, starts = (
            useful_s / wall_s if wall_s else 0.0,
            "1 start" if self._starts == 1 else f"{self._starts} starts",
        )
        self._tell(
            "goodput",
            f"{rounds} rounds in {wall_s:.1f} s and {starts}; goodput {share:.0%}: {useful_s:.1f} s of "
            "committed rounds",
            seconds=round(wall_s, 3),
            useful_s=round(useful_s, 3),
            goodput=round(share, 4),
        )

    # ------------------------------------------------------------ one start

    def _one_start(self) -> int | None:
        """Start the ranks, wait until they end or hang, end what is left. Returns the launcher's exit code, or None if
        the supervisor ended it or there are too few hosts."""
        asked_s, lost = self._silent
        if self._line.of_job or time.monotonic() - asked_s > FRESH_S:
            lost = self._lost_hosts()
        words, num_ranks = self._line.without(lost, self.root / HOSTFILE)
        if lost:
            names = ", ".join(sorted(lost))
            self._tell("hosts", f"no answer from {names}; their silos move to the others", hosts=sorted(lost))
            left = sum(num for host, num in self._line.slots.items() if host not in lost)
            if left == 0 or (left if num_ranks is None else num_ranks) < self._options.min_ranks:
                self._tell("too few", f"too few ranks are left (--min-ranks {self._options.min_ranks}): waiting")
                return None
        self._starts += 1
        self._raise_epoch()
        command = [*words, *(["env", f"{fencing.VARIABLE}={self._epoch}", *self._command] if self._command else [])]
        self._progress.look()
        resumed, begun = self._progress.commit, time.monotonic()
        since = f"from round {resumed}" if resumed >= 0 else "from the beginning"
        kind = "started" if self._starts == 1 else "restarted"
        self._tell(kind, f"{kind} {since} (start {self._starts}): {' '.join(command)}", ranks=num_ranks)
        environment = {**os.environ, fencing.VARIABLE: str(self._epoch)}
        if lost and "FEDMPI_RANKS" in environment:
            environment["FEDMPI_RANKS"] = str(num_ranks)
        told = _length(self.root / stopping.EVENTS_FILE)
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # identifies all its processes on this host
            preexec_fn=_follow_parent,
        )
        model = _inode(self.root / "model.safetensors")
        code, silent_s = self._watch(child, resumed, model)
        ranks = remains.ranks_of(self.root)
        behind = remains.left_here(child, ranks)
        with ThreadPoolExecutor(1) as pool:  # a host that is gone takes as long to ask as the launcher to end
            silent = pool.submit(self._lost_hosts)
            unreached = remains.end(child, [] if code == 0 and self._all_there else ranks)
            self._silent = (time.monotonic(), silent.result())
        self._progress.look()
        if code and self._was_stopped(told):
            code = Stopped.exit_code  # Open MPI's mpirun has another if fresh ranks were started
        self._tell_end(code, silent_s, time.monotonic() - begun, behind)
        if unreached:
            names = ", ".join(f"rank {rank.rank} on {rank.host}" for rank in unreached)
            self._tell("left", f"could not reach {names}: the next start's epoch keeps them from writing")
        return code

    def _was_stopped(self, told: int) -> bool:
        """Whether the events after the first `told` bytes end with a stop on request."""
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            lines = (self.root / stopping.EVENTS_FILE).read_bytes()[told:].splitlines()
            return bool(json.loads(lines[-1])["event"] == stopping.STOPPED)
        return False

    def _watch(self, child: subprocess.Popen[bytes], resumed: int, model: int) -> tuple[int | None, float]:
        """Wait for the launcher. Returns its exit code, None if it hangs, and the seconds without progress."""
        silent_s, asked, trains, old_file = 0.0, 0, False, self._progress.file
        begun_s = before_s = time.monotonic()
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return child.wait(POLL_S), silent_s
            now_s = time.monotonic()
            silent_s += min(now_s - before_s, 5.0)  # at most 5: the supervisor itself may have been suspended
            before_s = now_s
            if self._progress.look():
                silent_s = 0.0
            if self._progress.file != old_file and not trains:
                trains = True
                self._tell("trains", f"the ranks train, {now_s - begun_s:.1f} s after the start")
            recorded = trains and self._progress.record > max(0, resumed)
            if self._asked > asked:
                asked, silent_s = self._asked, 0.0
                if asked > 1:
                    return None, 0.0
                self._pass_on(child)
            if silent_s > self._limit_s(recorded, model):
                return None, silent_s

    def _limit_s(self, recorded: bool, model: int) -> float:
        """Seconds allowed without progress. More before the first round of a start, which reads data."""
        if self._all_there and _inode(self.root / "model.safetensors") != model:
            return LEAVE_S
        return self._grace_s * (1 if recorded or self._asked else SET_UP) + 2 * self._progress.longest_s

    def _tell_end(self, code: int | None, silent_s: float, seconds: float, behind: int) -> None:
        progress = self._progress
        undone = max(0, progress.record - max(0, progress.commit))
        what, event = f"the launcher ended with exit code {code}", "ended"
        if code is None:
            what = "ended at once" if self._asked > 1 else f"hung: no progress for {silent_s:.0f} s, all ranks ended"
            event = "ended" if self._asked > 1 else "hung"
        elif behind:
            what += f", {behind} process{'es' if behind > 1 else ''} left behind ended"
        if not self._all_there and code != Stopped.exit_code:
            what += f"; lost {undone} round{'s' if undone != 1 else ''} and the one under way"
            event = "died" if event == "ended" and code is not None else event
        self._tell(event, f"{what} ({seconds:.1f} s after it began)", code=code, lost=undone, behind=behind)

    def _lost_hosts(self) -> set[str]:
        """The hosts of the launcher line that do not answer. Nodes of a SLURM job are asked after a start without
        progress only, because SLURM itself ends a job whose node is down."""
        if self._line.of_job:
            return {*self._line.slots} - remains.answering(self._line.slots) if self._idle else set()
        return {*self._line.slots} - remains.reachable(self._line.slots)

    def _raise_epoch(self) -> None:
        if self._epoch and fencing.highest(self.root) != self._epoch:
            raise ConfigError(f"out: another supervisor has taken over {self.root}")
        try:
            self._epoch = fencing.raise_epoch(self.root, {"start": self._starts, "round": self._progress.commit})
        except OSError as error:
            why = error.strerror or error
            raise FedmpiError(f"cannot raise the epoch of {self.root}: {why}; {self._saved()}") from None

    # ------------------------------------------------------------ stops

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if now_s - self._asked_s > ONCE_S:  # SLURM signals every process of a job, and the batch script forwards it
            self._asked, self._asked_s = self._asked + 1, now_s
            self._asked_by = self._asked_by or stopping.cause(signal.Signals(number).name)

    def _pass_on(self, child: subprocess.Popen[bytes]) -> None:
        """Ask the ranks to stop: by SIGUSR1, because SIGTERM makes mpirun kill them; and by the file of `fedmpi stop`,
        for launchers that forward no signals."""
        why = self._asked_by
        self._tell("asked", f"{why}: the ranks stop at the next batch; a second signal ends them at once", why=why)
        stop_file = self.root / stopping.STOP_FILE
        with contextlib.suppress(OSError):
            try:
                disk.replace_text(stop_file, f"fedmpi run received {why}")
            except OSError:  # an empty file may still fit
                stop_file.touch()
        for pid in remains.takers(child.pid) if child.poll() is None else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        if (name := stopping.received()) is not None:  # a signal during imports
            self._asked, self._asked_by = self._asked + 1, stopping.cause(name)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _rest(self, seconds: float) -> None:
        until_s = time.monotonic() + seconds
        if seconds:
            self._tell("waits", f"waiting {seconds:.0f} s: the last start made no progress")
        while not self._asked and (left_s := until_s - time.monotonic()) > 0:
            time.sleep(min(left_s, POLL_S))

    # ------------------------------------------------------------ the directory

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the run directory's lock: only one supervisor at a time. Raises ConfigError."""
        try:
            disk.make_folder(self.root)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(self.root / LOCK_FILE, flags, disk.FILE_MODE)
        except OSError as error:
            raise ConfigError(f"out: cannot write into {self.root}: {error.strerror}") from None
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"out: another supervisor runs {self.root}") from None
            except OSError:
                pass  # no locks on this file system: the epoch detects another supervisor
            yield
        finally:
            os.close(descriptor)

    def _wait_until_free(self) -> None:
        """Wait until a job left behind has ended. Raises ConfigError if another job keeps training here."""
        until_s = time.monotonic() + FREE_S
        while stopping.is_training(self.root):
            if time.monotonic() > until_s:
                raise ConfigError(f"out: another job is training in {self.root}")
            time.sleep(POLL_S)


def _length(path: Path) -> int:
    """The file's size in bytes, 0 if it does not exist."""
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def _inode(path: Path) -> int:
    """The file's inode, 0 if it does not exist."""
    with contextlib.suppress(OSError):
        if path.name in os.listdir(path.parent):
            return path.stat().st_ino
    return 0


def _follow_parent() -> None:
    """Runs in the launcher's process before exec: the launcher gets SIGTERM if the supervisor is killed (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(launcher.PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def train_command(config: str, overrides: Sequence[str], allow: Sequence[str], shown: Sequence[str] = ()) -> list[str]:
    """The command for the launcher, with further options `shown`. It has a full path, because mpirun puts its own
    folder first in PATH."""
    script = Path(sys.executable).parent / "fedmpi"
    program = [str(script)] if script.exists() else [sys.executable, "-m", "fedmpi"]
    allowed = [word for module in allow for word in ("--allow", module)]
    return [*program, "train", *shown, *allowed, config, *overrides]


def supervise(
    config_file: str, overrides: Sequence[str], line: Sequence[str], options: Options, allow: Sequence[str] = ()
) -> None:
    """Run the configuration under the launcher line to its end. Raises FedmpiError with the command's exit code."""
    from fedmpi.config import load, run_directory
    from fedmpi.trust import confined

    own = own_command(line)
    if own is not None:
        options = replace(options, as_is=True)
        values = {index + 1 for index, word in enumerate(own) if word in ("--allow", "--progress", "--log-file")}
        trains = [word for index, word in enumerate(own) if index not in values and not word.startswith("--")]
        if trains != [config_file, *overrides]:
            raise ConfigError(
                f"the launcher line trains '{' '.join(trains)}', but fedmpi run was given "
                f"'{' '.join((config_file, *overrides))}'; leave `fedmpi train ...` out of the line"
            )
    if options.shown and options.as_is:
        raise ConfigError(f"{options.shown[0]}: the launcher line has its own command; give the option to that")
    with confined(run_directory(Path(config_file)), allow):
        config = load(config_file, overrides)[0]
    Supervisor(config, train_command(config_file, overrides, allow, options.shown), line, options).run()
