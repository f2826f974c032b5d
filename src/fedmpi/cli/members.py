"""Commands that speak with a running job: stop, silos, retire, admit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fedmpi.cli.command import Json, RunDir, answer, app
from fedmpi.errors import ConfigError


@app.command()
def stop(directory: RunDir) -> None:
    """Ask the job that trains in DIR to stop. It exits with code 3, with its last whole round on disk.

    Exits with 2 if no job trains there."""

    def work() -> None:
        from fedmpi.stopping import STOP_FILE, is_training

        if not (directory / "config.yaml").exists():
            raise ConfigError(f"{directory} is not a run directory")
        training = is_training(directory)
        if training is False:
            raise ConfigError(f"no job is training in {directory}")
        try:
            (directory / STOP_FILE).touch()
        except OSError as error:
            raise ConfigError(f"{directory}: cannot write the stop request: {error.strerror}") from None
        sure = "" if training else ", if there is one: that cannot be seen from this host"
        print(f"asked the job in {directory} to stop{sure}")

    answer(work, light=True)


@app.command()
def silos(directory: RunDir, as_json: Json = False) -> None:
    """Show who takes part in the run of DIR: for every silo its state, rounds, last contribution, samples, rank, host,
    device, and fingerprints of its data and code. Reads one file only: the run may be finished, running or dead."""

    def work() -> None:
        from fedmpi import roster

        found = roster.tell(directory)
        if as_json:
            print(json.dumps(found))
            return
        from rich.console import Console

        Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(roster.table(found))

    answer(work, light=True)


SiloId = Annotated[str, typer.Argument(metavar="ID", help="a silo of the run")]
Wait = Annotated[float, typer.Option("--wait", min=0.0, metavar="S", help="seconds to wait for the job's answer")]
NoWait = Annotated[bool, typer.Option("--no-wait", help="ask, and do not wait")]


@app.command()
def retire(directory: RunDir, silo: SiloId, wait: Wait = 60.0, no_wait: NoWait = False) -> None:
    """Ask the job that trains in DIR to let a silo leave after the current round. The silo's state is discarded; a
    resumed run goes on without it. Prints the round after which the silo has left.

    Exits with 2 if the request is refused, and the run goes on unchanged; with 1 if no answer comes in time."""
    _ask("retire", directory, silo, None, 0.0 if no_wait else wait)


@app.command()
def admit(
    directory: RunDir,
    silo: SiloId,
    path: Annotated[
        Path | None,
        typer.Option("--path", metavar="FILE", help="data of a silo that the configuration does not name (admit: any)"),
    ] = None,
    wait: Wait = 60.0,
    no_wait: NoWait = False,
) -> None:
    """Ask the job that trains in DIR to let a silo take part from the next round on: a retired, lost or absent silo,
    or, with `admit: any` in the configuration, a new one with its file. It starts as every silo of the run started.

    Exits with 2 if the request is refused, and the run goes on unchanged; with 1 if no answer comes in time."""
    _ask("admit", directory, silo, path, 0.0 if no_wait else wait)


def _ask(what: Any, directory: Path, silo: str, path: Path | None, wait_s: float) -> None:
    def work() -> None:
        from fedmpi.asking import ask

        print(ask(directory, what, silo, path, wait_s))

    answer(work, light=True)
