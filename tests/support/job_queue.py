"""A queue of a simulated cluster: jobs that end are started again, sometimes while an old one still runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from fedmpi.errors import ConfigError, FolderError, Superseded
from support.faulty_folder import SharedFolder, World

LEASE_S = 60.0


class JobQueue:
    """Roles, each with one job at least, on any of the hosts."""

    soon_s = 100.0  # the longest wait of a job

    def __init__(self, world: World) -> None:
        self.world = world
        self.living: dict[str, set[SharedFolder]] = defaultdict(set)

    def ended(self, role: str, error: Superseded | FolderError | ConfigError | None) -> None:
        """A job of the role has ended. Raises if it must not have."""

    def passed(self, folder: SharedFolder, what: str, begun_s: float, until_s: float) -> None:
        """A job has run, or will be suspended, in this time."""

    def submit(self, role: str, main: Callable[[SharedFolder], None], soon_s: float | None = None) -> None:
        """Start a job of the role after some time in the queue."""

        def run(folder: SharedFolder) -> None:
            begun_s = self.world.now_s
            try:
                main(folder)
                self.ended(role, None)
            except (Superseded, FolderError, ConfigError) as error:
                self.ended(role, error)
            finally:
                self.passed(folder, "runs", begun_s, self.world.now_s)
                self.living[role].discard(folder)
                if not self.living[role] and not self.world.over:
                    self.submit(role, main)

        def suspended(seconds: float) -> None:
            self.passed(folder, "suspended", self.world.now_s, self.world.now_s + seconds)
            # The queue believes that it is dead and starts another one, which may run beside it later.
            if seconds > 2 * LEASE_S and len(self.living[role]) < 2 and self.world.rng.random() < 0.7:
                self.world.counts["zombies"] += 1
                self.submit(role, main, 2 * LEASE_S)

        folder = self.world.spawn(role, run, self.world.rng.uniform(0, self.soon_s if soon_s is None else soon_s))
        folder.suspended = suspended
        self.living[role].add(folder)
