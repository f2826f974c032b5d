"""A server and silos that make secure sums over a faulty folder, and what must hold of every one of them."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

from fedmpi.errors import ConfigError, FolderError, Superseded
from fedmpi.files import names
from fedmpi.files.envelope import unpacked
from fedmpi.files.folder import Pace
from fedmpi.files.server import Server
from fedmpi.files.silo import Silo
from fedmpi.jobs.masking import Member, Parts
from fedmpi.jobs.sums import Sums
from fedmpi.secure import numbers as figures
from fedmpi.secure.protocol import Party
from support.faulty_folder import SharedFolder, World
from support.job_queue import LEASE_S, JobQueue

RUN = {"seed": 7}
BEAT_S = 10.0
LENGTH, THRESHOLD = 9, 3


class Post:
    """What sums need of the server's post, in virtual time."""

    def __init__(self, files: Server) -> None:
        self.files, self._pace, self._beat_s = files, Pace(files.folder, 0.2, 5.0), -BEAT_S

    def news(self) -> None:
        self._pace.reset()

    def waits(self, what: str) -> None:
        """Says nothing."""

    def pause(self) -> None:
        if self.files.folder.now() - self._beat_s >= BEAT_S:
            self.files.beat({})
            self._beat_s = self.files.folder.now()
        self._pace.wait(BEAT_S)


class Truth:
    """What silos brought, what the server decided, what silos told of others, and what came of it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.words: dict[tuple[str, int, int], tuple[np.ndarray, float]] = {}  # by silo, incarnation, serial number
        self.decided: dict[str, str] = {}  # digests by path
        self.told: dict[tuple[int, bytes, int], set[str]] = defaultdict(set)  # by sum, what it is bound to, and silo
        self.came: dict[int, list[str]] = {}  # silos in a sum
        self.given_up: dict[int, str] = {}
        self.last_at = 0  # operations at the last sum
        world.watchers.append(self.named)

    def named(self, path: str, inode: Any) -> None:
        folder, _, name = path.partition("/")
        if folder != names.SECURE or names.parsed(name) is None:
            return
        digest = unpacked(inode.content).digest
        assert self.decided.setdefault(path, digest) == digest, f"{path} is decided twice"

    def answered(self, party: Party, survivors: list[int], answer: Any) -> None:
        for kind, shares in (("self", answer.selves), ("key", answer.keys)):
            for other in shares:
                self.told[0, party._about, other].add(kind)

    def summed(self, serial: int, members: list[Member], silos: list[str], words: Any, numbers: list[int]) -> None:
        by = {one.silo: one.by for one in members}
        brought = [self.words[silo, by[silo], serial] for silo in silos]
        assert (words == np.sum([one for one, _ in brought], axis=0, dtype=np.uint32)).all(), "a sum is wrong"
        weight, num, *told = numbers
        assert num == len(silos) >= THRESHOLD and weight == sum(by[silo] for silo in silos)
        assert figures.heard(told).tolist() == [sum(value for _, value in brought)]
        assert self.came.setdefault(serial, silos) == silos, "two sums of one number"
        self.last_at = self.world.num_operations

    def check(self) -> None:
        both = [key for key, kinds in self.told.items() if len(kinds) > 1]
        assert not both, f"silos told the self mask and the key of {both}"


class Jobs(JobQueue):
    """The server and the silos."""

    soon_s = 60.0

    def __init__(self, world: World, num_silos: int) -> None:
        super().__init__(world)
        self.truth = Truth(world)
        self.submit("server", self.server)
        for k in range(num_silos):
            self.submit(f"silo {k}", lambda folder, k=k: self.silo(folder, f"s{k}"))

    def ended(self, role: str, error: Superseded | FolderError | ConfigError | None) -> None:
        assert not isinstance(error, ConfigError) or "is alive" in str(error) or "cannot write" in str(error)

    def server(self, folder: SharedFolder) -> None:
        files = Server.start(folder, RUN, {}, lease_s=LEASE_S)
        post = Post(files)
        sums = Sums(post, THRESHOLD)  # type: ignore[arg-type]
        if files.head is None:
            files.commit([], [], {})
        while True:
            serial = 2 * (files.head.version + 1)
            if (begun := sums.decided(names.MEMBERS, serial)) is None:
                begun = sums.begin(serial, self.members(post, serial))
            done = sums.finish(serial, begun, np.zeros(LENGTH, np.uint32), 4, lambda: None)
            if not done.why:
                members = [Member(*row) for row in begun.head["members"]]
                self.truth.summed(serial, members, [*done.silos], done.words, [*done.numbers])
            files.commit([], [], {"why": done.why})
            if done.why:
                self.truth.given_up[serial] = done.why
            files.forget_sums(serial)
            self.truth.check()

    def members(self, post: Post, serial: int) -> list[Member]:
        """All silos, or enough after a while."""
        files, until_s = post.files, post.files.folder.now() + 40.0
        while True:
            newest = {silo: by for silo, (by, _) in files.registrations().items()}
            found = []
            for silo, number, by in files.silo_files(names.SCORE):
                if number == serial and by == newest.get(silo):
                    content = files.read_silo(names.SCORE, silo, number, by)
                    if content is not None:
                        found.append(Member(silo, number, by, content.digest, *content.head["keys"]))
            if len(found) == len(self.living) - 1 or (len(found) >= THRESHOLD and files.folder.now() > until_s):
                return found
            post.pause()

    def silo(self, folder: SharedFolder, name: str) -> None:
        truth, rng = self.truth, self.world.rng
        silo = Silo.start(folder, RUN, name, {}, lease_s=LEASE_S)
        parts = Parts(silo, THRESHOLD)
        beat_s, pace, began = -BEAT_S, Pace(folder, 0.2, 5.0), -1
        while True:
            if folder.now() - beat_s >= BEAT_S:
                silo.beat({})
                beat_s = folder.now()
            if (commit := silo.look()) is None:
                pace.wait(BEAT_S)
                continue
            serial = 2 * (commit.version + 1)
            if parts.turn(serial - 2):
                pace.reset()
            if began != serial and not parts.decided(names.MEMBERS, serial):
                folder.wait(rng.uniform(0, 5))  # training
                words = np.array([rng.getrandbits(32) for _ in range(LENGTH)], np.uint32)
                value = rng.randrange(1000) / 8
                truth.words[name, silo.by, serial] = words.copy(), value
                keys = parts.begin(serial, words, [silo.by, 1, *figures.told([value])])
                silo.publish(names.SCORE, serial, {"keys": keys})
                began = serial
                for number, by in silo.mine(names.SCORE):
                    if number < serial:
                        folder.remove(names.path("scores", name, number, by))
            pace.wait(BEAT_S)


def survive(world: World, num_silos: int = 5) -> Truth:
    """Run until the world is over; what must hold holds."""
    jobs = Jobs(world, num_silos)
    world.run()
    jobs.truth.check()
    return jobs.truth
