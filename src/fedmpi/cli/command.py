"""The command `fedmpi` itself: its options, the types of arguments, and how a command ends."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmpi.errors import FedmpiError
from fedmpi.loading import uncollected
from fedmpi.output import say

if TYPE_CHECKING:
    from fedmpi.comm import Comm

EXIT_CODES = (
    "Exit codes: 0 done, 1 failed, 2 bad configuration or data, 3 stopped on request with a checkpoint written."
)
app = typer.Typer(
    name="fedmpi",
    help="Federated training under mpirun or srun: one model, trained on data that stay where they are. " + EXIT_CODES,
    add_completion=False,
    rich_markup_mode="markdown",  # re-flows paragraphs; otherwise lines break as in the source
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # the entry point must see errors, to abort the other ranks
)
ConfigPath = Annotated[
    str, typer.Argument(metavar="CONFIG", help="YAML file, `fedmpi list` shows its keys; or a run directory")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="such as rounds=50 local.lr=0.1 out=runs/a")
]
RunDir = Annotated[Path, typer.Argument(metavar="DIR", help="a run directory (a configuration's `out`)")]
Allow = Annotated[
    list[str] | None,
    typer.Option(
        "--allow",
        metavar="MODULE",
        help="module whose code may run if a run directory's configuration names it; modules below the current folder "
        "always may; may be repeated",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="one line of JSON instead of text")]


def _version(wanted: bool) -> None:
    if wanted:
        import fedmpi

        typer.echo(f"fedmpi {fedmpi.__version__}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and exit")
]


@app.callback()
def _command(version: Version = False) -> None:
    pass


def answer(work: Callable[[], None], *, light: bool = False) -> None:
    """Runs `work`. A FedmpiError, or output that cannot be written, becomes one line on stderr and an exit code.

    `light`: it needs neither torch nor the configuration.
    """
    try:
        if not light:
            with uncollected():
                import fedmpi.config  # noqa: F401 - `work` imports it too
        work()
        sys.stdout.flush()
    except FedmpiError as error:
        say(f"fedmpi: {error}", error=True)
        raise typer.Exit(error.exit_code) from None
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EBADF) or error.filename is not None:
            raise
        if error.errno != errno.EPIPE:  # as in `| head -1`
            say(f"fedmpi: cannot write the answer: {error.strerror}", error=True)
        raise typer.Exit(1) from None


def on_ranks(work: Callable[[Comm], None]) -> None:
    """Runs `work` on every launched rank; on any error no rank is left behind."""
    with uncollected():
        from fedmpi import comm as ranks

    comm: Comm | None = None
    try:
        comm = ranks.connect()
        work(comm)
    except FedmpiError as error:
        # Every rank raises this kind of error; rank 0 reports it and all leave together.
        comm = ranks.connect() if comm is not None else None  # the ranks that are left
        if comm.rank == 0 if comm is not None else ranks.is_first():
            say(ranks.told(error), error=True)
        if comm is not None:
            ranks.leave(comm, error)
        raise typer.Exit(error.exit_code) from None
    except BaseException as error:
        # Raised on one rank only. An exception aborts the other ranks by itself; SystemExit and Ctrl-C do not.
        if comm is not None and comm.size > 1:
            sys.excepthook(type(error), error, error.__traceback__)
        raise
