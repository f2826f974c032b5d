"""Commands that train: train, serve, silo, run."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedmpi.cli.command import EXIT_CODES, Allow, ConfigPath, Overrides, answer, app, on_ranks
from fedmpi.errors import ConfigError
from fedmpi.output import say

if TYPE_CHECKING:
    from fedmpi.comm import Comm
    from fedmpi.train import Run


@app.command(epilog=EXIT_CODES)
def train(config: ConfigPath, overrides: Overrides = None, allow: Allow = None) -> None:
    """Train. Under mpirun or srun every rank hosts one or more silos; without a launcher, one process hosts all.

    If OUT holds a checkpoint, the run resumes from it, on any number of ranks, with the same bits as without the stop.
    SIGUSR1, SIGTERM and `fedmpi stop OUT` stop it at the next batch, with the last whole round on disk.
    """
    on_ranks(lambda comm: _train(comm, config, overrides or [], allow or []))


@app.command(epilog=EXIT_CODES)
def serve(config: ConfigPath, overrides: Overrides = None, allow: Allow = None) -> None:
    """The server's job of a federation whose silos are jobs of their own (transport: files). It opens no silo's data.

    It waits for silos, collects their updates, steps, and commits new parameters, until all rounds are done. It may end
    at any time and be started again: it goes on from its last commit.
    """
    _on_one(lambda: _serve(config, overrides or [], allow or []))


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


def _serve(config: str, overrides: list[str], allow: list[str]) -> None:
    from fedmpi.jobs.serve import Serving

    with Serving(config, *overrides, allow=allow) as run:
        _trained(run)
    _told(run)


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
            raise ConfigError("--id: say which silo this job is")
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
    allow: Allow = None,
) -> None:
    """Train under a supervisor, which restarts the ranks from the newest checkpoint when they die or hang:
    `fedmpi run CONFIG rounds=50 -- mpirun -n 4`

    `fedmpi train CONFIG [KEY=VALUE]...` is appended to the launcher line, unless it contains `fedmpi train` already.
    Exit code 0 means that all rounds are on disk. SIGUSR1, SIGTERM and Ctrl-C are passed on to the ranks; a second one
    kills them at once.
    """

    def work() -> None:
        from fedmpi.supervisor import Options, supervise

        given = words or []
        first = next((index for index, word in enumerate(given) if "=" not in word), len(given))
        options = Options(starts, grace, min_ranks, as_is)
        supervise(config, given[:first], given[first:], options, allow or [])

    answer(work)


def _train(comm: Comm, config: str, overrides: list[str], allow: list[str]) -> None:
    from fedmpi import Run

    with Run(config, *overrides, allow=allow, comm=comm) as run:
        _trained(run)
    _told(run)


def _trained(run: Run) -> None:
    """Train all rounds, with progress on the terminal."""
    from fedmpi.records.terminal import Progress

    progress = Progress()
    if run.comm.rank == 0:
        say(_headline(run))
        if told := _unencrypted(run.comm.machines, run.config.secure is not None):
            say(told)
        done, rounds = run.resumed, run.config.rounds
        if run.ended:
            say(f"nothing to do: the run has ended after round {done} of {rounds}: {run.ended}")
        if done == rounds:
            say(f"nothing to do: {done} rounds are done; set rounds=N to train more")
        if done > rounds:
            say(f"rounds={rounds} is below the {done} rounds that are done; set rounds above {done} to train more")
    run.add_sink(progress)
    try:
        for _ in run:
            pass
    finally:
        progress.close()
    if run.comm.rank == 0 and run.ended and run.state.round > run.resumed:
        say(f"fedmpi: ended after round {run.state.round} of {run.config.rounds}: {run.ended}")


def _told(run: Run) -> None:
    """Print the last round's figures of all silos."""
    from fedmpi.records.terminal import on_terminal, silo_table

    if run.comm.rank == 0 and run.record is not None:
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
    where = f"{len(fed.ids)} silos on {run.comm.size} rank{'s' if run.comm.size > 1 else ''}"
    where += (
        f", {idle}" if (idle := idle_ranks(run.comm.size, run.membership.ranks, run.config.server.dedicated)) else ""
    )
    reads = " (one central set: every rank reads all of it)" if run.central else ""
    since = f", resumed after round {run.resumed}" if run.resumed else ""
    plan = f"plan {run.plan.section.plan}" + (f" ({run.plan.why})" if run.plan.why else "")
    return (
        f"fedmpi: {where}{reads}, {fed.model.num_shared:,} shared parameters, {plan}, "
        f"{run.device}, {run.threads} thread{'s' if run.threads > 1 else ''} per rank, out {run.out}{since}"
    )


def idle_ranks(num_ranks: int, hosts: Collection[int], dedicated: bool) -> str:
    """How many ranks host no silo, as text; empty if all host one. A dedicated server is not counted. `hosts` are the
    ranks that host silos."""
    num = len(set(range(1 if dedicated else 0, num_ranks)).difference(hosts))
    return f"{num} rank{'s host' if num > 1 else ' hosts'} no silo" if num else ""
