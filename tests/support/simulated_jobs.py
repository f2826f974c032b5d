"""Server and silo jobs on a faulty folder, a queue that starts them again and again, and what must hold of the result.

A silo's update is a number, and the model is the sum of those that counted. So a model that is wrong shows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from fedmpi.errors import ConfigError, FolderError, Superseded
from fedmpi.files import names
from fedmpi.files.envelope import Torn, unpacked
from fedmpi.files.folder import Pace
from fedmpi.files.line import NEVER, Commit, Last
from fedmpi.files.server import Arrived, Server
from fedmpi.files.silo import Silo
from support.faulty_folder import Inode, SharedFolder, World
from support.job_queue import LEASE_S, JobQueue

RUN = {"seed": 7}
BEAT_S = 15.0
MOST_GAP_S = 5 * 3600.0  # between commits, while jobs are suspended for up to half an hour again and again
OLDEST = 6  # versions; older updates are dropped


def coded(value: int) -> bytes:
    """A model or an update as bytes."""
    return value.to_bytes(8, "little")


def number(payload: memoryview) -> int:
    """The number that `coded` made these bytes of."""
    return int.from_bytes(payload, "little")


class Broken(AssertionError):
    """What must hold does not."""


class Truth:
    """Sees every name that a file gets, and every commit that a job believes in."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.line: list[Commit] = []
        self.times_s: list[float] = []
        self.at_operation: list[int] = []
        self.answered: dict[tuple[str, int], str] = {}
        self.answered_at: dict[str, int] = {}  # by silo: number of operations at its last answer
        self.sums: list[int] = []  # the model of each version
        self.published: dict[str, dict[str, Any]] = {}  # updates by digest
        self.notes: dict[str, dict[str, Any]] = {}
        self.serving = 0  # the highest epoch that has read the line
        self.most_files = 0
        self.readers = 0
        world.watchers.append(self.named)

    def named(self, path: str, inode: Inode) -> None:
        """A file got a name."""
        folder, _, name = path.partition("/")
        if folder in ("updates", "notes") and names.parsed(name):
            try:
                content = unpacked(inode.content)
            except ValueError:
                return
            values = {**content.head, "value": number(content.payload)}
            (self.published if folder == "updates" else self.notes)[content.digest] = values
        elif folder == "line" and name.isdigit():
            self.committed(name, inode)
        elif folder == "beats" and name.startswith(names.SERVER) and (parsed := names.parsed(name)):
            require(parsed[1][0] >= self.serving, f"epoch {parsed[1][0]} beats after {self.serving} has read the line")

    def committed(self, name: str, inode: Inode) -> None:
        """A commit is on the line."""
        version = int(name)
        self.are_whole()
        for where in ("updates", "notes"):
            for other, file in self.world.folders[where].items():
                self.named(f"{where}/{other}", file)
        content = unpacked(inode.content)
        commit = Commit.of(content.head, content.digest)
        require(version == len(self.line), f"version {version} is committed after {len(self.line) - 1}")
        require(commit.version == version, "a commit has the name of another")
        parent = self.line[-1] if self.line else None
        require(commit.parent == (parent.digest if parent else ""), f"version {version} has another parent")
        require(commit.epoch >= self.serving, f"epoch {commit.epoch} commits after {self.serving} has read the line")
        total = self.sums[-1] if self.sums else 0
        for entry in commit.entries:
            key = (entry.silo, entry.number)
            require(key not in self.answered, f"update {key} is answered twice")
            require(entry.number == 0 or (entry.silo, entry.number - 1) in self.answered, f"{key} leaves one out")
            require(entry.digest in self.published, f"update {key} has a digest that nobody published")
            self.answered[key] = entry.digest
            self.answered_at[entry.silo] = self.world.num_operations
            if entry.counts:
                total += self.published[entry.digest]["value"]
        model = self.notes.get(commit.files["model"].digest)
        require(model is not None, f"the model of version {version} was not published before the commit")
        require(model["value"] == total, f"the model of version {version} is wrong")
        for silo, last in parent.last.items() if parent else ():
            require(commit.last[silo].number >= last.number, f"silo {silo} goes back")
        self.line.append(commit)
        self.times_s.append(self.world.now_s)
        self.at_operation.append(self.world.num_operations)
        self.sums.append(total)
        self.most_files = max(self.most_files, sum(len(folder) for folder in self.world.folders.values()))

    def are_whole(self) -> None:
        """The commits on the line are whole, on every disk."""
        for name, inode in self.world.folders["line"].items():
            try:
                unpacked(inode.content)
            except Torn:
                require(not name.isdigit(), f"commit {name} is lost")

    def are_kept(self) -> None:
        """All updates that count are there, so that the models can be computed again."""
        files = {**self.world.folders["kept"], **self.world.folders["updates"]}
        there = {unpacked(inode.content).digest for name, inode in files.items() if names.parsed(name)}
        counted = {entry.digest for commit in self.line for entry in commit.entries if entry.counts}
        require(counted <= there, f"{len(counted - there)} updates that count are not kept")
        num = sum(name.startswith("@") for name in self.world.folders["kept"]) + len(self.world.folders["line"])
        require(num >= len(self.line), "a commit is not kept")

    def believes(self, commit: Commit | None, before: Commit | None) -> None:
        """A job goes by this commit, after that one."""
        self.readers += 1
        if commit is not None:
            known = commit.version < len(self.line) and self.line[commit.version].digest == commit.digest
            require(known, f"a job believes in a commit {commit.version} that is not on the line")
            require(before is None or before.version <= commit.version, "a reader goes back")


def require(holds: bool, what: str) -> None:
    if not holds:
        raise Broken(what)


class Jobs(JobQueue):
    """The server and the silos."""

    def __init__(self, world: World, num_silos: int) -> None:
        super().__init__(world)
        self.truth = Truth(world)
        self.ends: dict[str, int] = defaultdict(int)
        self.course: list[tuple[SharedFolder, str, float, float]] = []  # job, what, from when, until when
        self.servers: dict[int, SharedFolder] = {}  # by epoch
        self.keep_updates = False
        self.state_first = True  # a silo writes its state before its update
        self.submit("server", self.server)
        for k in range(num_silos):
            self.submit(f"silo {k}", lambda folder, k=k: self.silo(folder, f"clinic.{k}", k))

    def ended(self, role: str, error: Superseded | FolderError | ConfigError | None) -> None:
        self.ends[f"{role.split()[0]} ended" if error is None else f"{role.split()[0]}: {type(error).__name__}"] += 1
        if isinstance(error, ConfigError):
            expected = ("is alive", "cannot write in")  # a disk that is full, then errors
            require(any(text in str(error) for text in expected), str(error))
        if isinstance(error, Superseded):
            folder_name = names.EPOCHS if role == "server" else names.SILOS
            require(len(self.world.folders[folder_name]) > 1, f"{role} was superseded by nobody")

    def passed(self, folder: SharedFolder, what: str, begun_s: float, until_s: float) -> None:
        self.course.append((folder, what, begun_s, until_s))

    # ------------------------------------------------------------ the jobs

    def server(self, folder: SharedFolder) -> None:
        """Commit a version when three updates have arrived."""
        truth, about = self.truth, {"host": folder.host.number}
        server = Server.start(folder, RUN, about, lease_s=LEASE_S, keep_updates=self.keep_updates)
        self.servers[server.epoch] = folder
        truth.serving = max(truth.serving, server.epoch)
        truth.believes(server.head, None)
        total, pool, beat_s, pace = 0, [], -BEAT_S, Pace(folder, 0.5, 5.0)
        if server.head is None:
            server.commit([], [server.put("model", 0, {}, [coded(0)])], {})
        else:
            model = server.fetch(server.head.files["model"])
            require(model is not None, "the model of the newest commit is gone")
            total = number(model.payload)
        while True:
            if folder.now() - beat_s >= BEAT_S:
                server.beat({})
                server.leases.look()
                beat_s = folder.now()
            new: list[Arrived] = server.poll()
            pool += new
            if len(pool) < 3:
                pace.wait(BEAT_S)
                continue
            version = server.head.version
            entries = [one.entry(version - one.content.head["version"] <= OLDEST) for one in pool]
            total += sum(number(p.content.payload) for p, e in zip(pool, entries, strict=True) if e.counts)
            file = server.put("model", version + 1, {}, [coded(total)])
            commit = server.commit(entries, [file], {"num": len(pool)})
            truth.believes(commit, None)
            pool = []
            pace.reset()

    def silo(self, folder: SharedFolder, name: str, speed: int) -> None:
        """Train again and again; every other silo goes on once the server has read its update."""
        truth, rng = self.truth, self.world.rng
        silo = Silo.start(folder, RUN, name, {"num_train": 10 * speed}, lease_s=LEASE_S)
        position, head = silo.position(), None
        self.has_state(silo, position.last)
        unanswered: dict[int, tuple[int, bytes] | None] = {row[0]: None for row in position.pending}  # what was sent
        beat_s, pace = -BEAT_S, Pace(folder, 0.5, 10.0)
        while True:
            if folder.now() - beat_s >= BEAT_S:
                silo.beat({})
                beat_s = folder.now()
            commit = silo.look()
            truth.believes(commit, head)
            head = commit
            if commit is None:
                pace.wait()
                continue
            unanswered = {n: sent for n, sent in unanswered.items() if silo.answer(n) is None}
            commit = silo.line.head  # to ask for answers is to look
            again = min(unanswered, default=-1) if rng.random() < 0.2 else -1
            if again >= 0 and silo.lost(again):
                sent = unanswered[again]
            elif unanswered and (speed % 2 == 0 or not silo.taken(max(unanswered))):
                pace.wait(BEAT_S)
                continue
            else:
                again, sent = -1, None
            pace.reset()
            model = silo.fetch(commit.files["model"])
            if model is None:
                continue
            require(number(model.payload) == truth.sums[commit.version], "a silo reads another model")
            if sent is None:
                folder.wait(rng.uniform(2, 6) * (1 + speed % 5))  # training
                sent = commit.version, coded(rng.randrange(1 << 32))
            upcoming = max([*unanswered, commit.last.get(name, NEVER).number]) + 1 if again < 0 else again
            for kind in (names.STATE, names.UPDATE)[:: 1 if self.state_first else -1]:
                silo.publish(kind, upcoming, {"version": sent[0]}, [sent[1]])
            unanswered[upcoming] = sent
            if rng.random() < 0.1:
                silo.tidy()

    def has_state(self, silo: Silo, last: Last) -> None:
        """A silo that starts finds the state that the line says it is in."""
        if last.counted >= 0 and silo.read(names.STATE, last.counted, last.counted_by) is None:
            silo.beat({})  # it may be superseded
            path = names.path("states", silo.silo, last.counted, last.counted_by)
            require(truth_has(self.world, path), f"the state of {path} is gone")


def truth_has(world: World, path: str) -> bool:
    """Whether a file is there, for whoever looks without faults."""
    world_names, name = world.names(path)
    return name in world_names


def survive(world: World, num_silos: int = 8, prepare: Callable[[Jobs], None] = lambda jobs: None) -> Truth:
    """Run a server and silos until the world is over; what must hold holds. Raises Broken."""
    jobs = Jobs(world, num_silos)
    prepare(jobs)
    world.run()
    truth = jobs.truth
    truth.are_whole()
    require(len(truth.line) > 0, "nothing was committed")
    require(truth.at_operation[-1] > (world.calm_at + world.most) // 2, "no commit although all faults have ended")
    if jobs.keep_updates:
        truth.are_kept()
    if world.most - world.calm_at >= 10_000:  # long enough for a damaged update to be given up and sent again
        starved = [silo for silo, at in truth.answered_at.items() if at < world.calm_at]
        require(len(truth.answered_at) == num_silos and not starved, f"silos {starved} are not answered")
    require(jobs.keep_updates or truth.most_files < 64 + 16 + 60 * num_silos, f"{truth.most_files} files")
    gaps = [b - a for a, b in zip([0.0, *truth.times_s], [*truth.times_s, world.now_s], strict=True)]
    require(max(gaps) < MOST_GAP_S, f"no commit for {max(gaps):.0f} s")
    world.counts.update(jobs.ends)
    return truth
