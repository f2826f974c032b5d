"""Commands that train: train, serve, silo, run."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedmpi.cli.command import EXIT_CODES, Allow, ConfigPath, Overrides, answer, app, on_ranks
from fedmpi.errors import ConfigError
from fedmpi.output import keep_log, note, reserve, say

if TYPE_CHECKING:
    from fedmpi.comm import Comm
    from fedmpi.train import Run


class Lines(StrEnum):
    """When progress is printed."""

    rounds = "rounds"
    minute = "minute"


LineChoice = Annotated[
    Lines,
    typer.Option("--progress", help="where no terminal shows a bar: a line per round, or at most one a minute"),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="print warnings, errors and the last table only")]
LogFile = Annotated[
    Path | None, typer.Option("--log-file", metavar="FILE", help="append all messages, with their times, to FILE too")
]
JsonLine = Annotated[
    bool, typer.Option("--json", help="one line of JSON per round and event on standard output; text on standard error")
]


@dataclass(frozen=True)
class Shown:
    """What a command that trains prints."""

    lines: Lines = Lines.rounds
    quiet: bool = False
    log: Path | None = None
    json: bool = False

    def begin(self) -> None:
        """Prepare the output of this process, before MPI starts."""
        if self.json:
            reserve()

    def open_log(self, comm: Comm) -> None:
        """Open the log, on rank 0. Collective, except on a fresh rank, which joins when all others have it."""
        from fedmpi.fresh import is_fresh

        if not is_fresh():
            comm.collectively(self.open_log_here if comm.rank == 0 else lambda: None)

    def open_log_here(self) -> None:
        """Open the log in this process. Raises ConfigError."""
        if self.log is not None:
            try:
                keep_log(self.log)
            except OSError as error:
                raise ConfigError(f"--log-file {self.log}: {error.strerror or error}") from None

    def words(self) -> list[str]:
        """The options of `fedmpi train` that say the same."""
        given = ["--progress", self.lines.value] if self.lines is not Lines.rounds else []
        given += ["--quiet"] * self.quiet + ["--json"] * self.json
        return given + (["--log-file", str(self.log)] if self.log is not None else [])


@app.command(epilog=EXIT_CODES)
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    progress: LineChoice = Lines.rounds,
    quiet: Quiet = False,
    log_file: LogFile = None,
    as_json: JsonLine = False,
    allow: Allow = None,
) -> None:
    """Train. Under mpirun or srun every rank hosts one or more silos; without a launcher, one process hosts all.

    If OUT holds a checkpoint, the run resumes from it, on any number of ranks, with the same bits as without the stop.
    SIGUSR1, SIGTERM and `fedmpi stop OUT` stop it at the next batch, with the last whole round on disk.
    """
    shown = Shown(progress, quiet, log_file, as_json)
    shown.begin()
    on_ranks(lambda comm: _train(comm, config, overrides or [], allow or [], shown))


@app.command(epilog=EXIT_CODES)
def serve(
    config: ConfigPath,
    overrides: Overrides = None,
    progress: LineChoice = Lines.rounds,
    quiet: Quiet = False,
    log_file: LogFile = None,
    as_json: JsonLine = False,
    allow: Allow = None,
) -> None:
    """The server's job of a federation whose silos are jobs of their own (transport: files). It opens no silo's data.

    It waits for silos, collects their updates, steps, and commits new parameters, until all rounds are done. It may end
    at any time and be started again: it goes on from its last commit.
    """
    shown = Shown(progress, quiet, log_file, as_json)
    shown.begin()
    _on_one(lambda: _serve(config, overrides or [], allow or [], shown))


def _on_one(work: Callable[[], None]) -> None:
    """Runs `work` in a process that takes no part in MPI."""
    from fedmpi.comm import launched

    def alone() -> None:
        if launched() > 1:
            raise ConfigError("this command is one process: start it without mpirun")
        work()

    try:
        answer(alone)
    except BaseException as error:
        if isinstance(error, typer.Exit):
            raise
        sys.excepthook(type(error), error, error.__traceback__)
        raise typer.Exit(1) from None


def _serve(config: str, overrides: list[str], allow: list[str], shown: Shown) -> None:
    from fedmpi.comm import SoloComm
    from fedmpi.jobs.serve import Serving

    shown.open_log(SoloComm())
    with Serving(config, *overrides, allow=allow) as run:
        _trained(run, shown)
    _told(run, shown)


@app.command(epilog=EXIT_CODES)
def silo(
    config: ConfigPath,
    overrides: Overrides = None,
    silo: Annotated[str, typer.Option("--id", metavar="ID", help="the silo, as `data` names it")] = "",
    allow: Allow = None,
) -> None:
    """The job of one silo of such a federation. It opens this silo's data only, and keeps its state in OUT/silos/ID.

    It may end at any time and be started again, on any host that sees OUT/silos/ID. A second job of the same silo ends
    the first one. Exit code 0 means that the run is over.
    """

    def work() -> None:
        from fedmpi.config import load, run_directory
        from fedmpi.jobs.silo import SiloJob
        from fedmpi.trust import confined

        if not silo:
            raise ConfigError("--id is missing: name the silo of this job")
        with confined(run_directory(Path(config)), allow or []):
            SiloJob(load(config, overrides or [])[0], silo).run()

    _on_one(work)


@app.command(epilog=EXIT_CODES)
def run(
    config: ConfigPath,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]... -- LAUNCHER...",
            help="overrides, then the launcher that starts the ranks, such as `mpirun -n 4`; none: one process trains",
        ),
    ] = None,
    starts: Annotated[
        int, typer.Option("--starts", min=1, help="give up after this many starts in a row without a newer checkpoint")
    ] = 10,
    grace: Annotated[
        float | None,
        typer.Option(
            "--grace",
            min=0.0,
            metavar="S",
            help="a start counts as hung after this many seconds without a record or checkpoint, beyond twice the "
            "longest round (before its first round: ten times as long), and is ended. Default: comm.timeout_s",
        ),
    ] = None,
    min_ranks: Annotated[
        int, typer.Option("--min-ranks", min=1, help="wait rather than start fewer ranks when hosts do not answer")
    ] = 1,
    as_is: Annotated[
        bool, typer.Option("--as-is", help="the launcher line already has its command: append nothing")
    ] = False,
    progress: LineChoice = Lines.rounds,
    quiet: Quiet = False,
    log_file: LogFile = None,
    as_json: JsonLine = False,
    allow: Allow = None,
) -> None:
    """Train under a supervisor, which restarts the ranks from the newest checkpoint when they die or hang:
    `fedmpi run CONFIG rounds=50 -- mpirun -n 4`

    `fedmpi train CONFIG [KEY=VALUE]...` is appended to the launcher line, unless it contains `fedmpi train` already.
    `--progress`, `--quiet`, `--log-file`, `--json` and `--allow` are passed on to it; the log also has the messages of
    this command, and `--quiet` leaves those out that are no warnings.

    Exit code 0 means that all rounds are on disk. SIGUSR1, SIGTERM and Ctrl-C are passed on to the ranks; a second one
    kills them at once.
    """

    def work() -> None:
        from fedmpi.supervisor import Options, supervise

        given = words or []
        first = next((index for index, word in enumerate(given) if "=" not in word), len(given))
        shown = Shown(progress, quiet, log_file, as_json)
        shown.open_log_here()
        options = Options(starts, grace, min_ranks, as_is, tuple(shown.words()))
        supervise(config, given[:first], given[first:], options, allow or [])

    answer(work)


def _train(comm: Comm, config: str, overrides: list[str], allow: list[str], shown: Shown) -> None:
    from fedmpi import Run

    shown.open_log(comm)
    with Run(config, *overrides, allow=allow, comm=comm) as run:
        _trained(run, shown)
    _told(run, shown)


def _trained(run: Run, shown: Shown) -> None:
    """Train all rounds, with progress on the terminal."""
    from fedmpi.records.terminal import JsonLines, Progress

    progress = Progress("none" if shown.quiet or shown.json else shown.lines.value, shown.log)
    lines = JsonLines(run.out) if shown.json else None
    if run.comm.rank == 0:
        (note if shown.quiet else say)(_headline(run))
        if told := _unencrypted(run.comm.machines, run.config.secure is not None):
            say(told)
        done, rounds = run.resumed, run.config.rounds
        if run.ended:
            say(f"nothing to do: the run has ended after round {done} of {rounds}: {run.ended}")
        if done == rounds:
            say(f"nothing to do: {done} rounds are done; set rounds=N to train more")
        if done > rounds:
            say(f"rounds={rounds} is below the {done} rounds that are done; set rounds above {done} to train more")
        if lines is not None:
            facts = {"ranks": run.comm.size, "silos": len(run.federation.ids), "metric": run.metric}
            lines.begin(out=str(run.out), round=done, rounds=rounds, **facts)
    run.add_sink(progress)
    if lines is not None:
        run.add_sink(lines)
    try:
        for _ in run:
            pass
    finally:
        progress.close()
    if run.comm.rank == 0 and run.ended and run.state.round > run.resumed:
        say(f"fedmpi: ended after round {run.state.round} of {run.config.rounds}: {run.ended}")


def _told(run: Run, shown: Shown) -> None:
    """Print the last round's figures of all silos."""
    from fedmpi.records.terminal import on_terminal, silo_table

    if run.comm.rank == 0 and run.record is not None and not shown.json:
        from rich.console import Console

        live = on_terminal()
        console = Console(file=(table := io.StringIO()), width=None if live else 100, force_terminal=live)
        console.print(silo_table(run.record, run.metric))
        say(f"{table.getvalue()}results in {run.out}: fedmpi inspect {run.out}")


def _unencrypted(machines: Collection[bytes], secure: bool) -> str:
    """What to say if ranks are on several machines and updates are not masked; else empty."""
    if secure or len(set(machines)) < 2:
        return ""
    return (
        "fedmpi: ranks are on several hosts, and MPI does not encrypt: whoever reads the network sees updates. Take a "
        "private network or WireGuard between sites, or secure: secagg (docs/privacy.md)"
    )


def _headline(run: Any) -> str:
    fed = run.federation
    where = f"{len(fed.ids)} silo{'s' * (len(fed.ids) > 1)} on {run.comm.size} rank{'s' * (run.comm.size > 1)}"
    where += (
        f", {idle}" if (idle := idle_ranks(run.comm.size, run.membership.ranks, run.config.server.dedicated)) else ""
    )
    reads = " (one central set: every rank reads all of it)" if run.central else ""
    binding = f" ({run.binding})" if run.binding else ""
    since = f", resumed after round {run.resumed}" if run.resumed else ""
    plan = f"plan {run.plan.section.plan}" + (f" ({run.plan.why})" if run.plan.why else "")
    return (
        f"fedmpi: {where}{reads}, {fed.model.num_shared:,} shared parameters, {plan}, "
        f"{run.device}, {run.threads} thread{'s' if run.threads > 1 else ''} per rank{binding}, out {run.out}{since}"
    )


def idle_ranks(num_ranks: int, hosts: Collection[int], dedicated: bool) -> str:
    """How many ranks host no silo, as text; empty if all host one. A dedicated server is not counted. `hosts` are the
    ranks that host silos."""
    num = len(set(range(1 if dedicated else 0, num_ranks)).difference(hosts))
    return f"{num} rank{'s host' if num > 1 else ' hosts'} no silo" if num else ""
