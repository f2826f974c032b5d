"""How silos and the server reach each other: MPI, or files in a shared folder (docs/silos-in-jobs.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import pydantic

from fedmpi.components import Family, PositiveFloat, PositiveInt, called, component
from fedmpi.errors import ConfigError
from fedmpi.rounds.policies import Deadline

if TYPE_CHECKING:
    from fedmpi.config import Config


class Transport:
    """How silos and the server reach each other."""

    apart: ClassVar[bool] = False  # whether every silo is a job of its own

    def conflicts(self, config: Config) -> str | None:
        """Why it does not work with the rest of the configuration, in one line; None if it does."""
        return None

    def suits(self, num_silos: int) -> None:
        """Raises ConfigError if it does not work with this number of silos."""


@component
class ByMpi(Transport):
    """The ranks that mpirun or srun starts; one process without a launcher."""


@component
class ByFiles(Transport):
    """Files in a folder that all jobs see. `fedmpi serve` is the server's job, `fedmpi silo` the job of one silo; no
    message passes between them, and no port is open."""

    apart: ClassVar[bool] = True

    root: str
    """the shared folder; each job may see it under a path of its own"""
    lease_s: Annotated[float, pydantic.Field(ge=1, allow_inf_nan=False)] = 60.0
    """seconds without a heart beat after which a job counts as gone; the same for all jobs"""
    poll_s: PositiveFloat = 0.2
    """seconds between two looks into the folder; pauses grow with the wait, up to 10 s"""
    min_silos: PositiveInt | None = None
    """silos that must have registered before the first round; later ones join at the next round. null: all silos"""
    keep: Literal["needed", "all"] = "needed"
    """updates that stay in the folder: those that no checkpoint of the server holds yet, or all"""

    def suits(self, num_silos: int) -> None:
        """Raises ConfigError if more silos have to register than there are."""
        if self.min_silos is not None and self.min_silos > num_silos:
            raise ConfigError(f"transport.min_silos: {self.min_silos}, and there are {num_silos} silos")

    def conflicts(self, config: Config) -> str | None:
        """Refuses what needs all silos at one place or at one time."""
        section, policy, who = config.exchange, config.policy, "transport: files"
        if config.disclosed != "silo" and config.secure is None:
            return f"{who} sends each silo's update by itself, and disclose: {config.disclosed} lets only sums leave"
        for name, there in (
            ("overlap", section.overlap),
            ("regions", section.regions is not None),
            ("fragments", section.fragments > 1),
            ("down.codec", not section.down.plain),
        ):
            if there:
                return f"{who} does not go with exchange.{name}"
        if not section.up.plain and section.reduction == "reproducible" and section.scope == "rank":
            return f"{who} with a codec needs exchange.scope: silo if sums are reproducible"
        if isinstance(policy, Deadline) and policy.late != "drop":
            return (
                f"{who} does not go with engine.policy deadline and late: {policy.late}: a silo in a job of its own "
                "does not hear of a deadline between two batches; take late: drop"
            )
        if config.select.asks:
            return f"{who} does not go with select: {called(config.select)}, which asks silos for losses before a round"
        if config.engine.clock.is_virtual:
            return f"{who} runs in real time, and engine.clock does not"
        if self.min_silos is not None and config.engine.arrivals and config.local.auxiliaries:
            return (
                f"transport.min_silos does not go with engine: {called(config.engine)} and local: "
                f"{called(config.local)}: an update that is under way when a silo joins counts the silos before"
            )
        if config.secure is not None and (why := self._not_under_masks(config)):
            return f"{who} and secure: {why}"
        if config.privacy is not None:
            return f"{who} does not go with privacy: its accounts are of runs whose silos are ranks"
        if config.attack is not None:
            return f"{who} does not go with attack: experiments run in one process or under mpirun"
        if config.admit == "any":
            return f"{who} does not go with admit: any; name all silos in data"
        if config.on_failure not in (None, "stop"):
            return f"{who} has no ranks to lose; leave on_failure out"
        return None

    def _not_under_masks(self, config: Config) -> str:
        """Why sums under masks do not work with the rest of the configuration; empty if they do."""
        assert config.secure is not None
        if config.secure.neighbours is not None:
            return "shares of secrets go to all silos of a sum; leave secure.neighbours out"
        if self.min_silos is not None:
            return "transport.min_silos changes the members, and a run under masks keeps its silos; leave it out"
        if config.local.by_delay is not None:
            return "local.amount: by_delay goes by the times of single silos; take a fixed amount"
        return ""


TRANSPORTS = Family("transport", {"mpi": ByMpi, "files": ByFiles}, Transport, outside=False, defaults=True)
