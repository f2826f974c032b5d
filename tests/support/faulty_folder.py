"""A shared folder in virtual time: several hosts with caches over one true state, and faults, from a seed.

Processes are threads of which one runs at a time; a heap of times says which is next, so a seed gives the same course.
Every single operation of `Folder` takes its turn, may fail with or without effect, may be done again later, and may be
the last one of its process (`Killed`) or the last for a long while (a suspended process).
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import itertools
import random
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from fedmpi.files.envelope import Buffer
from fedmpi.files.folder import Folder


@dataclass(frozen=True)
class Faults:
    """Probabilities per operation, and times in virtual seconds."""

    late_s: float = 28.0  # a name that was opened before it existed is seen up to so much later
    stale_s: float = 3.0  # a replaced file's old content is read up to so much later
    stale_listing_s: float = 0.0  # a listing lacks what other hosts did in the last seconds
    error: float = 0.01  # EIO and the like, half of them with effect, a fifth done later
    lost_reply: float = 0.01  # the operation is done and reported as if it were a repetition
    torn: float = 0.01  # per file and host: content that is not whole for up to torn_s
    torn_s: float = 20.0
    damaged: float = 0.002  # updates that are never whole
    full: float = 0.0002  # the disk is full for up to full_s
    full_s: float = 60.0
    kill: float = 0.001
    host_crash: float = 0.3  # share of kills that take the host's unflushed data along
    suspend: float = 0.0005
    suspend_link: float = 0.01  # before a link
    suspend_s: float = 2000.0
    drift: float = 0.02  # how much faster or slower monotonic clocks run
    skew_s: float = 3600.0  # of the clocks that stamp files, which also jump


NONE = Faults(*[0.0] * len(fields(Faults)))


HARSH = Faults(kill=0.003, suspend=0.002, suspend_link=0.05, error=0.03, lost_reply=0.03, torn=0.05)


class Killed(BaseException):
    """The process is no more: it does nothing after this."""


@dataclass
class Inode:
    """A file."""

    content: bytes
    host: int
    serial: int
    flushed: bool = False
    links: int = 1
    stamp: float = 0.0  # of its writer's clock
    damaged: bool = False


@dataclass
class Host:
    """What a host remembers of the folder, and its clocks."""

    number: int
    offset_s: float
    rate: float
    wall_s: float  # error of its clock that stamps files
    missing: dict[str, float] = field(default_factory=dict)  # until when a name is not seen
    read: dict[str, tuple[Inode, float]] = field(default_factory=dict)  # what was read of a name, and when
    listings: dict[str, tuple[list[str], float]] = field(default_factory=dict)
    torn: dict[int, float] = field(default_factory=dict)  # by serial number: until when it is not whole


class World:
    """The true state, the time, and all processes."""

    def __init__(self, seed: int, faults: Faults, num_hosts: int = 4, most_operations: int = 10**9) -> None:
        self.rng, self.faults, self.most = random.Random(seed), faults, most_operations
        self.calm_at = most_operations * 4 // 5  # operations; then faults end, and all is well soon
        self.calm = False
        self.folders: dict[str, dict[str, Inode]] = {"": {}}
        self.now_s, self.num_operations, self.over = 0.0, 0, False
        self.full_until_s, self.most_files = 0.0, 0
        self.counts: Counter[str] = Counter()  # of faults
        self.watchers: list[Callable[[str, Inode], None]] = []  # told of each name that a file gets
        self.failure: BaseException | None = None
        self._heap: list[tuple[float, int, Any]] = []
        self._sequence = itertools.count()
        self._done = threading.Semaphore(0)
        self._living = 0
        rng, f = self.rng, faults
        self.hosts = [
            Host(i, rng.uniform(0, 1e5), 1 + rng.uniform(-f.drift, f.drift), rng.uniform(-f.skew_s, f.skew_s))
            for i in range(num_hosts)
        ]

    # ------------------------------------------------------------ processes and time

    def spawn(self, name: str, main: Callable[[SharedFolder], None], after_s: float = 0.0) -> SharedFolder:
        """Start a process that runs `main` with its view of the folder."""
        process = SharedFolder(self, name, self.rng.choice(self.hosts))

        def run() -> None:
            process.wake.acquire()
            try:
                if not self.over:
                    main(process)
            except Killed:
                pass
            except BaseException as error:
                self.failure = self.failure or error
                self.over = True
            process.dead = True
            self._living -= 1
            self._next()

        self._living += 1
        threading.Thread(target=run, daemon=True).start()
        self.at(after_s, process)
        return process

    def at(self, after_s: float, what: SharedFolder | Callable[[], None]) -> None:
        """Wake a process, or call a function, after some time."""
        heapq.heappush(self._heap, (self.now_s + after_s, next(self._sequence), what))

    def run(self) -> None:
        """Let all run until `most_operations` are done or nobody is left. Raises what a process raised."""
        self._next()
        self._done.acquire()
        if self.failure is not None:
            raise self.failure

    def _next(self, me: SharedFolder | None = None) -> bool:
        """Let the next one run; True if that is `me`."""
        while self._heap:
            at_s, _, what = heapq.heappop(self._heap)
            self.now_s = max(self.now_s, at_s)
            if not isinstance(what, SharedFolder):
                if not self.over:
                    what()
                continue
            if what is me:
                return True
            what.wake.release()
            return False
        self._done.release()
        return False

    def turn(self, process: SharedFolder, after_s: float) -> None:
        """The process goes on after some time."""
        self.at(after_s, process)
        if not self._next(process):
            process.wake.acquire()
        if process.dead or self.over:
            process.dead = True
            raise Killed

    def crash(self, host: Host) -> None:
        """The host loses what it has not flushed."""
        for inode in {id(i): i for names in self.folders.values() for i in names.values()}.values():
            if inode.host == host.number and not inode.flushed:
                inode.content = inode.content[: self.rng.randrange(len(inode.content) + 1) // 2]

    # ------------------------------------------------------------ the true state

    def names(self, path: str) -> tuple[dict[str, Inode], str]:
        """The folder of a path and the name in it."""
        folder, _, name = path.rpartition("/")
        return self.folders[folder], name

    def find(self, path: str) -> Inode:
        """The file. Raises FileNotFoundError."""
        names, name = self.names(path)
        if name not in names:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)
        return names[name]

    def place(self, path: str, inode: Inode) -> None:
        """Give a file a name."""
        names, name = self.names(path)
        names[name] = inode
        for watcher in self.watchers:
            watcher(path, inode)

    def rename(self, old: str, new: str) -> None:
        inode = self.find(old)
        names, name = self.names(old)
        del names[name]
        self.place(new, inode)

    def link(self, old: str, new: str) -> None:
        inode = self.find(old)
        names, name = self.names(new)
        if name in names:
            raise FileExistsError(errno.EEXIST, "File exists", new)
        inode.links += 1
        self.place(new, inode)

    def unlink(self, path: str) -> None:
        inode = self.find(path)
        inode.links -= 1
        names, name = self.names(path)
        del names[name]


class SharedFolder(Folder):
    """The folder as a process on one host sees it."""

    def __init__(self, world: World, name: str, host: Host) -> None:
        super().__init__(patience_s=120.0)
        self.world, self.name, self.host = world, name, host
        self.wake = threading.Semaphore(0)
        self.dead = False
        self.suspended: Callable[[float], None] = lambda seconds: None  # told when the process is suspended

    @property
    def root(self) -> str:
        return "/shared"

    def now(self) -> float:
        return self.host.offset_s + self.host.rate * self.world.now_s

    def wall(self) -> float:
        """The host's clock that stamps files. Nobody may rely on it."""
        return self.host.wall_s + self.world.now_s

    def wait(self, seconds: float) -> None:
        self._live()
        self.world.turn(self, seconds)

    def token(self) -> str:
        return f"{self.world.rng.getrandbits(48):012x}"

    # ------------------------------------------------------------ turns and faults

    def _live(self) -> None:
        if self.dead or self.world.over:
            self.dead = True
            raise Killed

    def _turn(self, operation: str) -> None:
        """Wait for a turn; here processes are killed and suspended."""
        self._live()
        world, faults, rng = self.world, self.world.faults, self.world.rng
        self.counts[operation] += 1
        world.num_operations += 1
        if world.num_operations == world.calm_at:
            world.faults, world.calm, world.full_until_s = NONE, True, 0.0
        world.turn(self, rng.expovariate(200.0))
        if world.num_operations >= world.most:
            world.over = True
            raise Killed
        draw = rng.random()
        if draw < faults.kill:
            self._die()
        elif draw < faults.kill + faults.suspend or (operation == "link" and draw > 1 - faults.suspend_link):
            world.counts["suspended"] += 1
            seconds = rng.uniform(0, faults.suspend_s)
            self.suspended(seconds)
            until_s = world.now_s + seconds
            while world.now_s < until_s and not world.calm:
                world.turn(self, min(60.0, until_s - world.now_s))
        elif draw < faults.kill + faults.suspend + 1e-4 and faults.skew_s:
            self.host.wall_s = rng.uniform(-faults.skew_s, faults.skew_s)
            world.counts["clock jumped"] += 1

    def _die(self) -> None:
        self.world.counts["killed"] += 1
        if self.world.rng.random() < self.world.faults.host_crash:
            self.world.counts["host crashed"] += 1
            self.world.crash(self.host)
        self.dead = True
        raise Killed

    def _io(self) -> OSError:
        code = self.world.rng.choice([errno.EIO, errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
        return OSError(code, errno.errorcode[code])

    def _change(self, operation: str, action: Callable[[], None], repeated: type[OSError], *folders: str) -> None:
        """An operation on names: with faults, and with its host's caches of the folders dropped."""
        world, faults, rng = self.world, self.world.faults, self.world.rng
        self._turn(operation)
        draw = rng.random()
        if draw < faults.error * 0.3:
            world.counts[f"{operation} failed without effect"] += 1
            raise self._io()
        if draw < faults.error * 0.5:
            world.counts[f"{operation} failed and was done later"] += 1

            def later() -> None:
                with contextlib.suppress(OSError):
                    action()

            world.at(rng.uniform(0, 20), later)
            raise self._io()
        for folder in folders:
            self.host.listings.pop(folder, None)
        action()
        if draw < faults.error:
            world.counts[f"{operation} failed with effect"] += 1
            raise self._io()
        if draw < faults.error + faults.lost_reply:
            world.counts[f"{operation} done and reported as repeated"] += 1
            raise repeated(errno.EEXIST if repeated is FileExistsError else errno.ENOENT, "repeated")

    # ------------------------------------------------------------ operations

    def make(self, folder: str) -> None:
        self._turn("make")
        self.world.folders.setdefault(folder, {})

    def listing(self, folder: str) -> list[str]:
        self._turn("list")
        world, host = self.world, self.host
        if world.rng.random() < world.faults.error:
            world.counts["list failed"] += 1
            raise self._io()
        if world.faults.stale_listing_s and folder in host.listings:
            names, at_s = host.listings[folder]
            if world.now_s - at_s < world.faults.stale_listing_s * world.rng.random():
                world.counts["stale listing"] += 1
                return list(names)
        if folder not in world.folders:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", folder)
        names = sorted(world.folders[folder]) if folder else sorted({*world.folders[""], *world.folders} - {""})
        host.listings[folder] = names, world.now_s
        if host.missing:
            front = f"{folder}/" if folder else ""
            for name in names:
                host.missing.pop(front + name, None)
        return list(names)

    def read(self, path: str) -> Buffer:
        self._turn("read")
        world, host, faults, rng = self.world, self.host, self.world.faults, self.world.rng
        if rng.random() < faults.error:
            world.counts["read failed"] += 1
            raise self._io()
        if host.missing.get(path, 0.0) > world.now_s:
            world.counts["name not seen yet"] += 1
            raise FileNotFoundError(errno.ENOENT, "not seen yet", path)
        try:
            inode = world.find(path)
        except FileNotFoundError:
            host.missing[path] = world.now_s + rng.uniform(0, faults.late_s)
            raise
        before = host.read.get(path)
        if before is not None and before[0] is not inode and world.now_s - before[1] < faults.stale_s * rng.random():
            world.counts["old content read"] += 1
            return before[0].content
        if path.startswith("beats/"):
            host.read[path] = inode, world.now_s
        if inode.damaged:
            return inode.content[:-1] + bytes([inode.content[-1] ^ 1])
        if inode.host != host.number:
            until_s = host.torn.get(inode.serial)
            if until_s is None:
                torn = rng.random() < faults.torn
                until_s = host.torn[inode.serial] = world.now_s + rng.uniform(0, faults.torn_s) if torn else 0.0
            if until_s > world.now_s:
                world.counts["torn content read"] += 1
                cut = rng.randrange(len(inode.content) + 1)
                return inode.content[:cut] + bytes(rng.choice([0, len(inode.content) - cut]))
        return inode.content

    def create(self, path: str, parts: Sequence[Buffer]) -> None:
        self._turn("create")
        world, faults, rng = self.world, self.world.faults, self.world.rng
        names, name = world.names(path)
        if name in names:
            raise FileExistsError(errno.EEXIST, "File exists", path)
        content = b"".join(bytes(part) for part in parts)
        inode = Inode(b"", self.host.number, world.num_operations, stamp=self.wall())
        self.host.listings.pop(path.rpartition("/")[0], None)
        if rng.random() < faults.full:
            world.full_until_s = world.now_s + rng.uniform(0, faults.full_s)
        inode.content = content[: rng.randrange(len(content) + 1)]
        world.place(path, inode)
        if world.full_until_s > world.now_s:
            world.counts["disk full"] += 1
            raise OSError(errno.ENOSPC, "No space left on device", path)
        if rng.random() < faults.kill:
            self._die()
        if rng.random() < faults.error:
            world.counts["write failed"] += 1
            raise self._io()
        inode.content = content
        self.flush(inode)
        if path.startswith("updates/") and rng.random() < faults.damaged:
            inode.damaged = True
            world.counts["damaged for ever"] += 1
        if rng.random() < faults.error:
            world.counts["write failed with effect"] += 1
            raise self._io()

    def flush(self, inode: Inode) -> None:
        """fsync of a file."""
        inode.flushed = True

    def rename(self, old: str, new: str) -> None:
        folders = (old.rpartition("/")[0], new.rpartition("/")[0])
        self._change("rename", lambda: self.world.rename(old, new), FileNotFoundError, *folders)

    def link(self, old: str, new: str) -> None:
        self._change("link", lambda: self.world.link(old, new), FileExistsError, new.rpartition("/")[0])

    def unlink(self, path: str) -> None:
        self._change("unlink", lambda: self.world.unlink(path), FileNotFoundError, path.rpartition("/")[0])

    def sync(self, folder: str) -> None:
        self._turn("sync")
        if self.world.rng.random() < self.world.faults.error:
            raise self._io()


def without(faults: Faults, *names: str) -> Faults:
    """The faults without some of them."""
    return replace(faults, **dict.fromkeys(names, 0.0))
