"""The command. Only `train` starts MPI; everything else reads files and works on a login node."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedmpi.errors import ConfigError, FedmpiError, Stopped

if TYPE_CHECKING:
    from fedmpi.comm import Solo

EXIT_CODES = (
    "Exit codes: 0 done, 1 failed, 2 bad configuration or data, 3 stopped on request with a checkpoint written."
)

app = typer.Typer(
    name="fedmpi",
    help="Federated training under mpirun or srun: one model over data that stay where they are. " + EXIT_CODES,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # the entry point must see errors, to end the other ranks
)

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file; see `fedmpi list` for what goes into it")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="such as rounds=50 local.lr=0.1 out=runs/a")
]
RunDir = Annotated[Path, typer.Argument(metavar="DIR", help="a run directory (a configuration's `out`)")]
Json = Annotated[bool, typer.Option("--json", help="one line of JSON instead of text")]


def _answer(work: Callable[[], None]) -> None:
    """Run it; what fedmpi says no to is one line and an exit code."""
    try:
        work()
    except FedmpiError as error:
        typer.echo(f"fedmpi: {error}", err=True)
        raise typer.Exit(error.exit_code) from None


@app.command(epilog=EXIT_CODES)
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train. Under mpirun or srun every rank is one or more silos; alone, one process is all of them.

    OUT holding a checkpoint is resumed, with the same bits as if it had never stopped; on another number of ranks too.
    SIGUSR1, SIGTERM and `fedmpi stop OUT` end it at the next batch with the last whole round on disk.
    """
    from fedmpi import comm as ranks

    comm: Solo | None = None
    try:
        comm = ranks.connect()
        _train(comm, config, overrides or [])
    except FedmpiError as error:
        # Errors of this kind are raised on every rank alike; one speaks, all leave together.
        if comm.rank == 0 if comm is not None else ranks.is_first():
            print(f"fedmpi: {error}", file=sys.stderr, flush=True)
        if comm is not None:
            _leave(comm, error.exit_code)
        raise typer.Exit(error.exit_code) from None
    except BaseException as error:
        # One rank's own: an exception would abort the others by itself, but not an exit or Ctrl-C, which are none.
        if (
            comm is not None
            and comm.size > 1
            and not (isinstance(error, SystemExit) and error.code == Stopped.exit_code)
        ):
            sys.excepthook(type(error), error, error.__traceback__)
        raise


def _leave(comm: Solo, code: int) -> None:
    """Meet the other ranks and let MPI end; should one not come, end it."""
    late = threading.Timer(10.0, comm.abort, [code])
    late.daemon = True
    late.start()
    comm.finish()
    late.cancel()


def _train(comm: Solo, config: str, overrides: list[str]) -> None:
    from fedmpi.records import Progress, on_terminal, silo_table
    from fedmpi.train import Run

    with Run(config, *overrides, comm_=comm) as run:
        progress = None
        if comm.rank == 0:
            print(_headline(run), flush=True)
            if run.resumed >= run.config.rounds:
                print(f"nothing to do: {run.resumed} rounds are done; rounds=N goes on", flush=True)
            progress = Progress(run.config.rounds, run.resumed, run.metric)
        try:
            for record in run:
                if progress is not None:
                    progress.write(record)
        finally:
            if progress is not None:
                progress.close()
    if comm.rank == 0 and run.record is not None:
        from rich.console import Console

        live = on_terminal()
        console = Console(width=None if live else 100, force_terminal=live)
        console.print(silo_table(run.record, run.metric))
        console.print(f"results in {run.out}: fedmpi inspect {run.out}", highlight=False, soft_wrap=True)


def _headline(run: Any) -> str:
    fed = run._federation
    where = f"{len(fed.ids)} silos on {run.comm.size} rank{'s' if run.comm.size > 1 else ''}"
    reads = " (one central set: every rank reads all of it)" if run.central else ""
    since = f", resumed after round {run.resumed}" if run.resumed else ""
    plan = f"plan {fed.exchange.section.plan}{_measured(run)}"
    return (
        f"fedmpi: {where}{reads}, {fed.model.num_shared:,} shared parameters, {plan}, "
        f"{run.device}, {run.threads} thread{'s' if run.threads > 1 else ''} per rank, out {run.out}{since}"
    )


def _measured(run: Any) -> str:
    """What `plan: auto` has found."""
    found = ", ".join(f"{plan} {1e3 * seconds:.2f} ms" for plan, seconds in run.plan_seconds.items())
    return f" (measured: {found})" if found else ""


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option("--ranks", min=1, help="how many ranks will be launched")] = 1,
    as_json: Json = False,
) -> None:
    """What `train` would need and do: silos, bytes, memory, disk, collectives, and where every value comes from."""

    def work() -> None:
        from fedmpi.config import load
        from fedmpi.plan import plan as compute

        loaded, origins = load(config, overrides or [])
        result = compute(loaded, origins, ranks)
        print(json.dumps(result)) if as_json else _print_plan(result)

    _answer(work)


def _print_plan(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    table = Table("rank", "silos", "train samples", "data", "vectors", "memory", title="ranks")
    for row in result["ranks"]:
        silos = ", ".join(row["silos"][:6]) + (f" and {len(row['silos']) - 6} more" if len(row["silos"]) > 6 else "")
        sizes = (_size(row[key]) for key in ("data_bytes", "vector_bytes", "memory_bytes"))
        table.add_row(str(row["rank"]), silos or "-", str(row["train_samples"]), *sizes)
    console.print(table)
    if result["central"]:
        console.print("data: one central set; every rank reads all of it and keeps its silos' parts")
    for silo, host in result["pinned"].items():
        console.print(f"silo {silo}: only on host {host} (placed above as if it were free)")
    console.print(f"parameters: {result['parameters']:,}, of which shared {result['shared_parameters']:,}")
    console.print(f"collectives on vectors: {result['collectives']}")
    if result["plan_asked"] == "auto":
        console.print(f"plan auto: measured when the run starts; the figures here are those of {result['plan']}")
    if result["bytes_up"] is None:
        console.print("bytes of a round: they depend on where regions lie, which is known when ranks have hosts")
    else:
        console.print(
            f"a round, all ranks: {_size(result['bytes_up'])} up, {_size(result['bytes_down'])} down "
            f"({result['bytes_up']} and {result['bytes_down']} bytes), {_size(result['bytes_control'])} of small things"
        )
    kept = result["checkpoints_kept"]
    console.print(f"a checkpoint: {_size(result['checkpoint_bytes'])}; up to {kept} are kept in {result['out']}")
    values = Table("key", "value", "from", title="configuration")
    for key, entry in result["config"].items():
        values.add_row(key, str(entry["value"]), entry["from"])
    console.print(values)


def _size(num_bytes: int) -> str:
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return ""


@app.command()
def inspect(directory: RunDir, as_json: Json = False) -> None:
    """What a run has come to: rounds, metrics, SHA-256 of the global parameters, configuration. Reads files only."""

    def work() -> None:
        from fedmpi.results import inspect as read

        found = read(directory)
        if as_json:
            print(json.dumps(found))
            return
        record, best = found["metrics"] or {}, found["best"] or {}
        print(f"rounds         {found['rounds']} of {found['config']['rounds']}")
        print(f"params_sha256  {found['params_sha256']}")
        for name, value in record.items():
            if isinstance(value, (int, float)) and name != "round":
                print(f"{name:<15}{value:.6g}" if isinstance(value, float) else f"{name:<15}{value}")
        if best:
            print("best           " + ", ".join(f"{k} {v:.6g}" for k, v in best.items()))
        print("versions       " + ", ".join(f"{k} {v}" for k, v in found["versions"].items()))
        print(f"configuration  {directory / 'config.yaml'}")

    _answer(work)


@app.command()
def stop(directory: RunDir) -> None:
    """Ask the job that trains in DIR to stop: it ends with exit code 3 and its last whole round on disk."""

    def work() -> None:
        from fedmpi.stopping import STOP_FILE

        if not (directory / "config.yaml").exists():
            raise ConfigError(f"{directory} is no run directory")
        (directory / STOP_FILE).touch()
        print(f"asked the job in {directory} to stop")

    _answer(work)


def _which(text: str) -> Any:
    if text in ("best", "newest"):
        return text
    if not text.isdigit():
        raise ConfigError(f"--round {text}: give a number, best or newest")
    return int(text)


Which = Annotated[str, typer.Option("--round", help="a checkpoint: its number, newest, or best of those on disk")]


@app.command("eval")
def evaluate(directory: RunDir, round: Which = "newest", as_json: Json = False) -> None:
    """Evaluate a checkpoint on all silos' test data, in this process."""

    def work() -> None:
        from fedmpi.results import evaluate as score

        record = score(directory, _which(round))
        if as_json:
            print(json.dumps(record))
            return
        for silo, row in record["silos"].items():
            print(f"{silo:<16}" + "  ".join(_pair(k, v) for k, v in row.items()))
        figures = {k: v for k, v in record.items() if isinstance(v, float)}
        print(f"{'all':<16}" + "  ".join(_pair(k, v) for k, v in figures.items()) + f"  (round {record['round']})")

    _answer(work)


def _pair(key: str, value: Any) -> str:
    return f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}"


@app.command()
def export(
    directory: RunDir,
    to: Annotated[Path, typer.Option("--to", help="model.safetensors or model.pt")],
    round: Which = "newest",
) -> None:
    """Write a checkpoint's model as a state_dict."""

    def work() -> None:
        from fedmpi.results import export as write

        print(f"round {write(directory, to, _which(round))} written to {to}")

    _answer(work)


@app.command("list")
def catalogue(family: Annotated[str | None, typer.Argument(help="one family only")] = None) -> None:
    """Everything a configuration can name: families, their members, fields, defaults."""

    def work() -> None:
        from fedmpi.catalogue import lines

        print("\n".join(lines(family)))

    _answer(work)


bench = typer.Typer(help="Measure on this machine, everything in turns within one run.", no_args_is_help=True)
app.add_typer(bench, name="bench")

Params = Annotated[str, typer.Option("--params", help="length of the vector, such as 25e6")]
Repeats = Annotated[int, typer.Option("--repeats", min=1, help="how often each is timed")]


@bench.command("exchange")
def bench_exchange(params: Params = "25e6", repeats: Repeats = 15, as_json: Json = False) -> None:
    """Every plan, from a delta to new parameters on all ranks, next to MPI_Allreduce and gloo. Run it under mpirun."""

    def work() -> None:
        from fedmpi import bench as benches
        from fedmpi.comm import connect

        num_params = benches.check_params(params)
        comm = connect()
        rows = benches.exchange(comm, num_params, repeats)
        if comm.rank == 0:
            columns = ["plan", "ranks", "median_s", "min_s", "max_s", "x_memcpy", "x_allreduce", "x_gloo"]
            print(json.dumps(rows) if as_json else benches.table(rows, columns))
        comm.finish()

    _answer(work)


@bench.command("codecs")
def bench_codecs(params: Params = "25e6", repeats: Repeats = 7, as_json: Json = False) -> None:
    """Every codec on one core: encode with feedback, decode and weighted add, bytes per parameter."""

    def work() -> None:
        from fedmpi import bench as benches

        rows = benches.codecs(benches.check_params(params), repeats)
        columns = ["codec", "x_memcpy_encode", "x_memcpy_add", "wire_bytes_per_param", "median_s"]
        print(json.dumps(rows) if as_json else benches.table(rows, columns))

    _answer(work)


data = typer.Typer(help="Datasets: fetch official files, check what is there.", no_args_is_help=True)
app.add_typer(data, name="data")

DataName = Annotated[str, typer.Argument(metavar="NAME", help="a dataset, see `fedmpi list datasets`")]
Root = Annotated[Path | None, typer.Option("--root", help="folder of datasets; else FEDMPI_DATA, else ./data")]


@data.command()
def fetch(name: DataName, root: Root = None) -> None:
    """Download a dataset's official files, checksummed; without a network, say which file to put where."""

    def work() -> None:
        from fedmpi.data import fetch as download

        for path in download(name, root):
            print(path)

    _answer(work)


@data.command()
def check(name: DataName, root: Root = None) -> None:
    """Verify a dataset's files and show its silos."""

    def work() -> None:
        from fedmpi.data import DATASETS
        from fedmpi.data import check as look

        options = {"name": name} | ({"root": str(root)} if root is not None else {})
        for row in look(DATASETS.build(options, "data")):
            print(f"{row.silo:<16} train {row.num_train:<7} test {row.num_test:<7} {row.targets}")

    _answer(work)
