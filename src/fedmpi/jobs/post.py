"""The shared folder as the two kinds of jobs use it, with a thread that keeps the job's lease."""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from fedmpi.components import to_dict
from fedmpi.config import Config, flatten
from fedmpi.differences import MAY_CHANGE, OF_A_SITE
from fedmpi.errors import CheckpointError, ConfigError, FedmpiError, FolderError, ServerEnded
from fedmpi.files import names
from fedmpi.files.envelope import Envelope
from fedmpi.files.folder import Disk, Folder, Pace
from fedmpi.files.line import NEVER, Commit, Entry, File, Last
from fedmpi.files.reading import notes
from fedmpi.files.server import Server
from fedmpi.files.silo import Silo
from fedmpi.jobs.masking import Parts
from fedmpi.jobs.messages import NO_CALL, Call, Registration, ends_alike, shown
from fedmpi.jobs.private import Base
from fedmpi.output import say
from fedmpi.stopping import READY, STOP, Watch
from fedmpi.transports import ByFiles

BEATS = 6  # in a lease
LOST_S = 10.0  # between two looks whether an update is lost, or the server's call is damaged
UNREAD = -1  # round of an update that is there and cannot be read yet
MOST_S = 10.0  # between two looks into the folder
GROWTH = 1.1  # of pauses: so they are a tenth of the time since the last news, and news is seen that much later
SAYS_S = 30.0  # seconds after which a job says again what it waits for
QUIET_S = 3.0  # seconds of a wait in the middle of a run of which nothing is said
OVER_S = 600.0  # seconds that a silo's job waits for a server to start again whose end it has found when it started


def about_run(config: Config) -> dict[str, Any]:
    """What all jobs of a run have in common, as values."""
    values = flatten(json.loads(json.dumps(to_dict(config))))
    apart = (*MAY_CHANGE, *OF_A_SITE)
    return {key: v for key, v in values.items() if not any(key == one or key.startswith(f"{one}.") for one in apart)}


def files_of(config: Config) -> ByFiles:
    """The transport. Raises ConfigError if it is another."""
    if not isinstance(config.transport, ByFiles):
        raise ConfigError("transport: this command needs transport: {name: files, root: DIR}; else `fedmpi train`")
    return config.transport


def paced(folder: Folder, poll_s: float) -> Pace:
    """Pauses between looks into the folder."""
    return Pace(folder, poll_s, max(poll_s, MOST_S), GROWTH)


class Beats:
    """A thread that beats for a job until it is left. An error of it ends the job at its next safe point."""

    def __init__(self, lease_s: float, pace: Pace, watch: Watch) -> None:
        self.error: FedmpiError | None = None
        self._pace, self._said_s = pace, -math.inf
        self._lease_s, self._watch = lease_s, watch
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def beat(self, ended: bool = False) -> None:
        """One beat."""
        raise NotImplementedError

    def start(self) -> None:
        """Beat from now on."""
        self.beat()
        self._thread.start()

    def end(self) -> None:
        """Beat for the last time, unless this job is superseded."""
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join(self._lease_s)
        if self.error is None:
            with contextlib.suppress(FedmpiError):
                self.beat(ended=True)

    def _run(self) -> None:
        last_s = time.monotonic()
        while not self._over.wait(self._lease_s / BEATS):
            begun_s = time.monotonic()
            try:
                self.beat()
                silent_s, took_s, last_s = begun_s - last_s, time.monotonic() - begun_s, time.monotonic()
                if took_s > self._lease_s / 2:
                    say(f"fedmpi: a heart beat took {took_s:.0f} s: is the shared folder slow?", error=True)
                elif silent_s > self._lease_s / 2:
                    why = "this job was suspended, or its host is overloaded"
                    say(f"fedmpi: no heart beat for {silent_s:.0f} s: {why}", error=True)
            except FedmpiError as error:
                self.error = error
                self._watch.tell(STOP, str(error))
                return

    def waits(self, what: str) -> None:
        """Say now and then what this job waits for."""
        if time.monotonic() - self._said_s >= SAYS_S:
            say(f"waits {what}")
            self._said_s = time.monotonic()

    def goes_on(self) -> None:
        """The wait is over."""
        self._said_s = time.monotonic() - SAYS_S + QUIET_S

    def news(self) -> None:
        """Something has happened: look often again."""
        self._pace.reset()

    def pause(self, most_s: float = math.inf) -> None:
        """Wait until the next look; at most `most_s` seconds, and no longer once the job has to stop."""
        self._pace.wait_while(lambda: self._watch.look() == READY, most_s)


class SiloPost(Beats):
    """The folder for the job of a silo; a context manager."""

    def __init__(self, config: Config, silo: str, registration: Registration, watch: Watch) -> None:
        transport = files_of(config)
        folder = Disk(Path(transport.root))
        super().__init__(transport.lease_s, paced(folder, transport.poll_s), watch)
        about = json.loads(json.dumps(vars(registration)))
        self._files = Silo.start(folder, about_run(config), silo, about, lease_s=transport.lease_s)
        self.by = self._files.by
        self._call: tuple[File, Call] | None = None
        self._lost_s = self._asked_s = self._begun_s = folder.now()
        self._found: Call | None = None  # at the first look
        self._beats: tuple[int, int] | None = None  # of the server, when it was first asked whether it speaks

    def beat(self, ended: bool = False) -> None:
        self._files.beat({}, ended)

    def look(self) -> tuple[Commit | None, Call | None]:
        """The newest commit, and the server's last word. Operations: two listings, and a read for each that is new."""
        known = None if self._call is None else self._call[0]
        if (found := self._files.newest_note(names.CALL, known)) is not None:
            file, content = found
            self._call = file, Call.read(content.head)
            self.news()
        if self._found is None:
            self._found = NO_CALL if self._call is None else self._call[1]
        before = self._files.line.head
        if (commit := self._files.look()) is not before:
            self.news()
        return commit, None if self._call is None else self._call[1]

    def require(self, call: Call) -> None:
        """Raise ConfigError if the server refuses this job, ServerEnded if the server has ended with an error. Only
        one that ended before this job began may start again: for OVER_S seconds."""
        by, why = call.refused.get(self._files.silo, (0, ""))
        if by == self.by:
            raise ConfigError(f"the server refuses silo '{self._files.silo}': {why}")
        if call.over and (call is not self._found or self._files.folder.now() - self._begun_s > OVER_S):
            raise ServerEnded(f"the server's job has ended: {call.over}")
        if call.over:
            self.waits(f"for the server's job to start again, which has ended: {call.over}")

    def speaks(self) -> bool:
        """Whether the server that has said the last word was heard since this job began; if not, another one may start
        with another configuration. A listing and a read."""
        pulse = self._files.server()
        if pulse is None or self._call is None or pulse.by != self._call[0].epoch or pulse.ended:
            return False
        self._beats = self._beats or (pulse.by, pulse.count)
        return self._call[1] is not self._found or (pulse.by, pulse.count) != self._beats

    def has_ended(self, call: Call | None, version: int, config: Config) -> bool:
        """Whether a metric has ended the run with this version. Not if that was before this job began, and it has
        another `stop.early`: then it goes on with a server that has it, too."""
        if call is None or call.final != version:
            return False
        return call is not self._found or ends_alike(call.config, config)

    def idle(self) -> None:
        """Nothing is to do: say now and then if the server's job is not there. A listing and a read in SAYS_S."""
        if (now_s := self._files.folder.now()) - self._asked_s >= SAYS_S:
            self._asked_s = now_s
            self._files.server()
            if not self._files.leases.alive(names.SERVER):
                say("waits for the server, whose job is not there")

    def last(self) -> Last:
        """What the commits say of this silo."""
        head = self._files.look()
        return NEVER if head is None else head.last.get(self._files.silo, NEVER)

    def sent(self) -> dict[int, int]:
        """Numbers of updates that are published and not answered, and their rounds, or versions; UNREAD if an update
        is listed and cannot be read now."""
        found: dict[int, int] = {}
        for number, by in self._files.position().pending:
            found.setdefault(number, UNREAD)
            if (content := self._files.read(names.UPDATE, number, by)) is not None:
                found[number] = int(content.head.get("round", content.head.get("version", 0)))
        return found

    def lost(self, number: int) -> bool:
        """Whether the oldest update that no commit answers, `number`, was damaged and is gone. Then the later ones are
        removed, too: the server reads a silo's updates without a gap. Looks every LOST_S seconds."""
        now_s = self._files.folder.now()
        if now_s - self._lost_s < LOST_S:
            return False
        self._lost_s = now_s
        decided = self.decided()
        if (decided is not None and decided[0] >= number) or not self._files.lost(number):
            return False
        say(f"update {number} was damaged and is gone; the silo trains again")
        self._files.withdraw(number)
        return True

    def decided(self) -> tuple[int, Base] | None:
        """What the server says of this silo: number of its last update that is decided, number and incarnation of the
        last one in the buffer or before (-1, 0: none of this start of the server)."""
        pulse = self._files.server()
        told = None if pulse is None else pulse.about.get("decided", {}).get(self._files.silo)
        return None if told is None else (int(told[0]), (int(told[1]), int(told[2])))

    def next_number(self, sent: Mapping[int, int]) -> int:
        """Number of the next training."""
        return max([self.last().number, *sent]) + 1

    def fetch(self, commit: Commit, kind: str) -> memoryview | None:
        """A file of a commit; None if a newer commit has replaced it."""
        content = self._files.fetch(file := commit.files[kind])
        if content is None and (file.epoch, file.number) in notes(self._files.folder, kind):
            path = names.path(names.NOTES, kind, file.number, file.epoch)
            say(f"waits for version {commit.version}: {path} in {self._files.folder.root} is damaged; end the server's "
                "job and start it again: it writes the file anew")  # fmt: skip
        return None if content is None else content.payload

    def parts(self, threshold: int) -> Parts:
        """The silo's parts in sums under masks, none so far."""
        return Parts(self._files, threshold)

    def send(self, number: int, head: Mapping[str, Any], payload: bytes) -> None:
        """Publish an update."""
        self._files.publish(names.UPDATE, number, head, [payload])

    def score(self, version: int, head: Mapping[str, Any]) -> None:
        """Publish the scores of a version."""
        self._files.publish(names.SCORE, version, head)
        for number, by in self._files.mine(names.SCORE):
            if number < version:
                self._files.folder.remove(names.path(names.OF_SILOS[names.SCORE], self._files.silo, number, by))

    def __enter__(self) -> SiloPost:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()


class Told(NamedTuple):
    """An update that its silo knows the server's answer to."""

    silo: str
    number: int
    by: int
    counts: bool | None = None  # None: said by an earlier version, which did not keep it


def _last_words(files: Server) -> dict[str, Any]:
    """What the last beat of an earlier server says. Raises FolderError if it cannot be read."""
    pace = Pace.of_errors(files.folder)
    while True:
        beats = [
            row[1][0] for row in map(names.parsed, files.folder.listed(names.BEATS)) if row and row[0] == names.SERVER
        ]
        files.leases.look(names.SERVER)
        pulse = files.leases.pulses.get(names.SERVER)
        if not beats or (pulse is not None and pulse.by >= max(beats)):
            return {} if pulse is None else pulse.about
        if pace.over():
            raise FolderError(f"{files.folder.root}: cannot read the heart beat of the server before this one")
        pace.wait()


def _last_call(files: Server) -> Call:
    """The last word of an earlier server to the silos."""
    for epoch, number in reversed(notes(files.folder, names.CALL)):
        if (content := files.fetch(File(names.CALL, number, epoch, ""))) is not None:
            return Call.read(content.head)
    return NO_CALL


class ServerPost(Beats):
    """The folder for the server's job."""

    def __init__(self, config: Config, about: Mapping[str, Any], watch: Watch) -> None:
        transport = files_of(config)
        folder = Disk(Path(transport.root))
        super().__init__(transport.lease_s, paced(folder, transport.poll_s), watch)
        self._one_beat = threading.Lock()
        self._num_calls, self._refused = 0, dict[str, tuple[int, str]]()
        self._called: File | None = None  # this start's last call
        self._called_s = folder.now()  # when it was seen to be whole
        self.files = Server.start(
            folder, about_run(config), about, lease_s=transport.lease_s, keep=3, keep_updates=True
        )
        self.last = _last_call(self.files)  # with members and round also of an earlier start
        if self.last.over or self.last.final >= 0:
            self.call(replace(self.last, config=shown(config)))
        before = _last_words(self.files)  # of an earlier start; this one stands by them
        self._decided: dict[str, list[Any]] = before.get("decided", {})
        self._version: int = before.get("version", -1)  # that the open round starts from, and what it has taken:
        self._buffer = [Told(*row) for row in before.get("buffer", ())]

    def beat(self, ended: bool = False) -> None:
        with self._one_beat:
            told = {"decided": dict(self._decided), "version": self._version, "buffer": list(self._buffer)}
            self.files.beat(told, ended)

    def open(self, version: int) -> list[Told]:
        """Begin the round that starts from this version. Returns the updates that an earlier start of the server has
        told their silos about, in their order: they come first."""
        if self._version != version:
            self._version, self._buffer = version, []
        return list(self._buffer)

    def decide(self, told: Told, base: Base) -> None:
        """Tell a silo that its update is in the buffer, or does not count; `base` is its last training that does."""
        self._decided = {**self._decided, told.silo: [told.number, *base]}
        before = [row[:3] for row in self._buffer]
        if told[:3] in before:  # as an earlier start has told; it may have been lost since
            self._buffer[before.index(told[:3])] = told
        else:
            self._buffer.append(told)
        self.beat()

    def call(self, call: Call, over: str = "", final: int = -1) -> None:
        """Publish the server's word to all silos. A later start's word replaces it, never an earlier one's."""
        self._num_calls += 1
        self.news()
        self.last = replace(call, refused=self._refused, over=over, final=final)
        self._write_call()

    def _write_call(self) -> None:
        self._called = self.files.put(names.CALL, self._num_calls, json.loads(json.dumps(vars(self.last))))
        self._called_s = self.files.folder.now()

    def pause(self, most_s: float = math.inf) -> None:
        """See Beats. Before it, the last call is written again if it was damaged: else silos would wait for it, and the
        server for them. A read in LOST_S."""
        if self._called is not None and (now_s := self.files.folder.now()) - self._called_s >= LOST_S:
            self._called_s = now_s
            if not self.files.is_whole(self._called):
                path = names.path(names.NOTES, *self._called[:3])
                say(f"fedmpi: {path} in {self.files.folder.root} was damaged: it is written again", error=True)
                self._write_call()
        super().pause(most_s)

    def refuse(self, refused: Mapping[str, tuple[int, str]]) -> None:
        """Tell silos that they are refused: the incarnation of each one's job, and why."""
        self._refused = dict(refused)
        self.call(self.last)

    def final(self, version: int) -> None:
        """Tell all silos that a metric has ended the run with this version."""
        self.call(self.last, final=version)

    def over(self, error: Exception) -> None:
        """Tell all silos that this job ends with an error."""
        line = (str(error).strip().splitlines() or [""])[0]
        self.call(self.last, line if isinstance(error, FedmpiError) and line else f"{type(error).__name__}: {line}")

    def update(self, commit: Commit, entry: Entry) -> Envelope:
        """An update that a commit contains. Raises CheckpointError if it is gone."""
        if (content := self.files.kept(entry)) is None:
            raise CheckpointError(
                f"version {commit.version} contains update {entry.number} of silo '{entry.silo}', which is gone or "
                f"damaged in {self.files.folder.root}: put it back, or begin anew with another out and transport.root"
            )
        return content

    def present(self) -> set[str]:
        """Silos whose jobs are there."""
        self.files.leases.look()
        return self.files.leases.present
