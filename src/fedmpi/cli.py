"""The command line. Only `train`, `eval`, `bench` and a grid of `compare` start MPI; the rest works on a login node."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedmpi.errors import ConfigError, FedmpiError
from fedmpi.output import say

if TYPE_CHECKING:
    from fedmpi.comm import Comm
    from fedmpi.exchange.config import Channel
    from fedmpi.train import Run

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


def _answer(work: Callable[[], None]) -> None:
    """Runs `work`. A FedmpiError, or output that cannot be written, becomes one line on stderr and an exit code."""
    try:
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


@app.command(epilog=EXIT_CODES)
def train(config: ConfigPath, overrides: Overrides = None, allow: Allow = None) -> None:
    """Train. Under mpirun or srun every rank hosts one or more silos; without a launcher, one process hosts all.

    If OUT holds a checkpoint, the run resumes from it, on any number of ranks, with the same bits as without the stop.
    SIGUSR1, SIGTERM and `fedmpi stop OUT` stop it at the next batch, with the last whole round on disk.
    """
    _on_ranks(lambda comm: _train(comm, config, overrides or [], allow or []))


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
        _answer(alone)
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

    _answer(work)


def _on_ranks(work: Callable[[Comm], None]) -> None:
    """Runs `work` on every launched rank; on any error no rank is left behind."""
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
    where += f", {idle}" if (idle := _idle(run.comm.size, run.membership.ranks, run.config.server.dedicated)) else ""
    reads = " (one central set: every rank reads all of it)" if run.central else ""
    since = f", resumed after round {run.resumed}" if run.resumed else ""
    plan = f"plan {run.plan.section.plan}" + (f" ({run.plan.why})" if run.plan.why else "")
    return (
        f"fedmpi: {where}{reads}, {fed.model.num_shared:,} shared parameters, {plan}, "
        f"{run.device}, {run.threads} thread{'s' if run.threads > 1 else ''} per rank, out {run.out}{since}"
    )


def _idle(num_ranks: int, hosts: Collection[int], dedicated: bool) -> str:
    """How many ranks host no silo, as text; empty if all host one. A dedicated server is not counted. `hosts` are the
    ranks that host silos."""
    num = len(set(range(1 if dedicated else 0, num_ranks)).difference(hosts))
    return f"{num} rank{'s host' if num > 1 else ' hosts'} no silo" if num else ""


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option("--ranks", min=1, help="how many ranks will be launched")] = 1,
    as_json: Json = False,
    allow: Allow = None,
    privacy: Annotated[bool, typer.Option("--privacy", help="show only who would see what of a silo")] = False,
    speeds: Annotated[
        Path | None,
        typer.Option("--speeds", help="seconds of the silos: lines SILO,SECONDS, or an earlier asynchronous run's DIR"),
    ] = None,
) -> None:
    """Show what `train` would need and do: silos, bytes, memory, disk, collectives, and the source of every value."""

    def work() -> None:
        from fedmpi.config import load, run_directory
        from fedmpi.plan import plan as compute
        from fedmpi.trust import confined

        with confined(run_directory(Path(config)), allow or []):
            loaded, origins = load(config, overrides or [])
            result = compute(loaded, origins, ranks, speeds)
        print(json.dumps(result)) if as_json else (_print_privacy if privacy else _print_plan)(result)

    _answer(work)


def _print_privacy(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    table = Table("of a silo", "server (rank 0)", "other silos", "network", "run directory", title="who sees what")
    for row in result["privacy"]:
        table.add_row(*row.values())
    console.print(table)
    _print_secure(console, result)
    for sentence in result["trust"]:
        console.print(sentence)


def _print_secure(console: Any, result: dict[str, Any]) -> None:
    if (secure := result["secure"]) is not None:
        console.print(
            f"secure: sums of {secure['threshold']} silos or more, modulo 2^{secure['bits']}, in steps of "
            f"{1 / secure['unit']:.2g}; a coordinate of the mean is off by at most {secure['error']:.2g}, sums up to "
            f"{secure['largest_sum']:g} fit (updates are bounded by {secure['clip']:g}); each silo shares masks with "
            f"{secure['neighbours']}"
        )


@app.command("check")
def check_run(
    config: ConfigPath,
    overrides: Overrides = None,
    ranks: Annotated[
        int, typer.Option("--ranks", min=1, help="without a launcher: how many ranks the estimates are for")
    ] = 1,
    no_timing: Annotated[bool, typer.Option("--no-timing", help="time no batches, so estimate no seconds")] = False,
    as_json: Json = False,
    allow: Allow = None,
) -> None:
    """Look at a run before it waits in a queue: open the data, try model, loss and metrics, write into OUT, estimate
    time and memory, and name all faults at once. Nothing is trained, and nothing is left on disk.

    Without a launcher one process opens all silos, as on a login node. Under mpirun or srun every rank opens its own.
    Exits with 2 if there is a fault.
    """

    def work(comm: Comm) -> None:
        from fedmpi.check import check, lines
        from fedmpi.errors import agreed

        result = check(config, overrides or [], comm, ranks, not no_timing, allow or [])
        if comm.rank == 0:
            say(json.dumps(result) if as_json else "\n".join(lines(result)))
        if result["faults"]:
            raise agreed(ConfigError("the check found faults; correct them, and check again"))
        comm.finish()

    from fedmpi.comm import SoloComm, launched

    _on_ranks(work) if launched() > 1 else _answer(lambda: work(SoloComm()))


def _print_engines(console: Any, result: dict[str, Any]) -> None:
    from rich.table import Table

    if result["engines"] is None:
        return
    table = Table("engine", "rounds/h", "updates/h", "staleness", "most", "dropped", "waiting", title="engines")
    for row in result["engines"]:
        rates = (f"{row[name]:.4g}" for name in ("rounds_per_hour", "updates_per_hour"))
        shares = (f"{row[name]:.0%}" for name in ("dropped", "waiting"))
        table.add_row(row["engine"], *rates, f"{row['mean_staleness']:.2g}", str(row["max_staleness"]), *shares)
    console.print(table)


@app.command()
def doctor(
    out: Annotated[Path, typer.Option("--out", help="folder that runs will write into")] = Path("runs"),
    no_network: Annotated[bool, typer.Option("--no-network", help="measure no links between ranks")] = False,
    as_json: Json = False,
) -> None:
    """Look at this machine, or at all ranks of a job: MPI library, devices, cores and binding, limits, file system,
    clocks, versions, and the links between hosts. Each problem is a line with its remedy.

    Without a launcher MPI is not initialised: another process asks the library for its name. Run it under mpirun or
    srun to see the rest; the links take about two seconds. Exits with 2 if there is a fault that ends every run.
    """

    def work(comm: Comm) -> None:
        from fedmpi.doctor import examine, lines
        from fedmpi.errors import agreed

        result = examine(comm, out, not no_network)
        if comm.rank == 0:
            say(json.dumps(result) if as_json else "\n".join(lines(result)))
        if result["faults"]:
            raise agreed(ConfigError("the doctor found faults; mend them first"))
        comm.finish()

    from fedmpi.comm import SoloComm, launched

    _on_ranks(work) if launched() > 1 else _answer(lambda: work(SoloComm()))


def _print_plan(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    table = Table("rank", "silos", "train samples", "data", "vectors", "memory", title="ranks")
    for row in result["ranks"]:
        silos = ", ".join(row["silos"][:6]) + (f" and {len(row['silos']) - 6} more" if len(row["silos"]) > 6 else "")
        known = row["train_samples"] is not None
        samples, data = (str(row["train_samples"]), _size(row["data_bytes"])) if known else ("?", "?")
        memory = _size(row["memory_bytes"]) + ("" if known else " + data")
        table.add_row(str(row["rank"]), silos or "-", samples, data, _size(row["vector_bytes"]), memory)
    console.print(table)
    hosts = [row["rank"] for row in result["ranks"] if row["silos"]]
    if idle := _idle(len(result["ranks"]), hosts, result["config"]["server.dedicated"]["value"]):
        console.print(idle)
    if result["central"]:
        console.print("data: one central set; every rank reads all of it and keeps its silos' parts")
    if result["undeclared"]:
        ids = result["undeclared"]
        silos = ", ".join(ids[:6]) + (f" and {len(ids) - 6} more" if len(ids) > 6 else "")
        console.print(f"num_samples is not declared, so the size of their data is not known: {silos}")
    for silo, host in result["pinned"].items():
        console.print(f"silo {silo}: only on host {host} (placed above as if it were free)")
    console.print(f"parameters: {result['parameters']:,}, of which shared {result['shared_parameters']:,}")
    console.print(f"collectives on vectors: {result['collectives']}")
    if result["plan_why"]:
        console.print(f"plan {result['plan_asked']}: {result['plan_why']}")
    if result["bytes_up"] is None:
        console.print("bytes of a round: they depend on which host each rank is on, which is known only at launch")
    else:
        console.print(
            f"a round, all ranks: {_size(result['bytes_up'])} up, {_size(result['bytes_down'])} down "
            f"({result['bytes_up']} and {result['bytes_down']} bytes), {_size(result['bytes_control'])} control traffic"
        )
    _print_secure(console, result)
    if (private := result["budget"]) is not None:
        limit = "" if private["budget"] is None else f", budget {private['budget']:g}"
        console.print(f"privacy: {private['sentence']}")
        console.print(
            f"privacy: all rounds spend epsilon {private['epsilon']:.4g} at delta {private['delta']:g}{limit}, noise "
            f"multiplier {private['sigma']:.4g}; rounds that are repeated after a failure spend again"
        )
        for silo, row in private["silos"].items():
            console.print(f"privacy: silo {silo}: epsilon {row['epsilon']:.4g}, noise multiplier {row['sigma']:.4g}")
    kept = result["checkpoints_kept"]
    console.print(f"a checkpoint: {_size(result['checkpoint_bytes'])}; up to {kept} are kept in {result['out']}")
    if result["mirror_bytes"]:
        console.print(f"under mpirun --with-ft ulfm: up to {_size(result['mirror_bytes'])} more memory a rank")
    console.print("not looked at: files, samples, model and loss on them, speed, out; `fedmpi check` does")
    _print_engines(console, result)
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
def audit(
    config: ConfigPath,
    overrides: Overrides = None,
    canaries: Annotated[int, typer.Option("--canaries", min=8, help="samples that may be in the training data")] = 200,
    silo: Annotated[str | None, typer.Option("--silo", metavar="ID", help="who gets them (the largest)")] = None,
    scale: Annotated[float, typer.Option("--scale", help="their spread / that of the silo's samples")] = 1.0,
    confidence: Annotated[float, typer.Option("--confidence", help="of the bound")] = 0.95,
    as_json: Json = False,
    allow: Allow = None,
) -> None:
    """Train once with canaries in the data, in a temporary folder, and say how much epsilon is at least, judged by the
    canaries that can be told apart afterwards, beside the account (Steinke et al. 2023). Also without `privacy`."""

    def work() -> None:
        from fedmpi.audit import audit as examine
        from fedmpi.config import load, run_directory
        from fedmpi.trust import confined

        with confined(run_directory(Path(config)), allow or []):
            told = examine(load(config, overrides or [])[0], silo, canaries, scale, confidence)
        if as_json:
            print(json.dumps(told))
            return
        least, most = f"{told['epsilon_at_least']:.4g}", told["epsilon_at_most"]
        print(f"silo {told['silo']}: {told['correct']} of {told['guesses']} guesses are right, of {canaries} canaries")
        print(f"epsilon is at least {least} at delta {told['delta']:g} ({confidence:.0%} confidence)")
        print("without privacy there is no bound above" if most is None else f"epsilon is at most {most:.4g} (account)")

    _answer(work)


@app.command()
def inspect(
    directory: RunDir,
    as_json: Json = False,
    done: Annotated[
        bool, typer.Option("--done", help="exit 1 unless all rounds are on disk (some launchers exit 0 anyway)")
    ] = False,
) -> None:
    """Show a run's results: rounds, metrics, SHA-256 of the global parameters, configuration. Only reads files."""

    def work() -> None:
        from fedmpi.results import inspect as read

        found = read(directory)
        if done and found["rounds"] < (goal := found["config"]["rounds"]):
            raise FedmpiError(f"{directory} has {found['rounds']} of {goal} rounds; the same command resumes it")
        if as_json:
            print(json.dumps(found))
            return
        record, best = found["metrics"] or {}, found["best"] or {}
        print(f"rounds         {found['rounds']} of {found['config']['rounds']}")
        print(f"params_sha256  {found['params_sha256']}")
        for name, value in record.items():
            if isinstance(value, (int, float)) and name != "round":
                print(f"{name:<18}{value:.6g}" if isinstance(value, float) else f"{name:<18}{value}")
        if best:
            print("best           " + ", ".join(f"{k} {v:.6g}" for k, v in best.items()))
        rounds = (f"{r['round']}{'' if r['resumable'] else ' (the best: to evaluate)'}" for r in found["on_disk"])
        print("on disk        " + ", ".join(rounds))
        print("versions       " + ", ".join(f"{k} {v}" for k, v in found["versions"].items()))
        print(f"configuration  {directory / 'config.yaml'}")

    _answer(work)


@app.command()
def compare(
    what: Annotated[list[Path], typer.Argument(metavar="GRID|RUN...", help="a grid's YAML file, or run directories")],
    out: Annotated[str | None, typer.Option("--out", help="folder of a grid's runs, table and figure")] = None,
    only: Annotated[
        str, typer.Option("--only", metavar="NAME,NAME", help="algorithms, partitions or seeds of a grid")
    ] = "",
    quick: Annotated[bool, typer.Option("--quick", help="two rounds of each cell with the first seed")] = False,
    as_json: Json = False,
) -> None:
    """Train a grid of runs (algorithm x partition x seed) and print one table, or print run directories side by side.

    Under mpirun or srun all ranks train each run of a grid. Finished runs are not trained again.
    """
    if len(what) == 1 and what[0].suffix in (".yaml", ".yml"):
        from fedmpi.compare import compare_grid

        names = [name for name in only.split(",") if name]
        _on_ranks(lambda comm: compare_grid(what[0], out, names, quick, as_json, comm))
    else:
        options = {"--out": out is not None, "--only": bool(only), "--quick": quick}
        _answer(lambda: _compare_runs(what, [name for name, given in options.items() if given], as_json))


def _compare_runs(roots: list[Path], grid_only: list[str], as_json: bool) -> None:
    from fedmpi.compare.runs import compare_runs, lines

    if grid_only:
        raise ConfigError(f"{grid_only[0]} goes with a grid: one YAML file, no run directories")
    rows = compare_runs(roots)
    print(json.dumps(rows) if as_json else "\n".join(lines(rows)))


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

    _answer(work)


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

    _answer(work)


SiloId = Annotated[str, typer.Argument(metavar="ID", help="a silo of the run")]
Wait = Annotated[float, typer.Option("--wait", min=0.0, metavar="S", help="seconds to wait for what becomes of it")]
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
        typer.Option("--path", metavar="FILE", help="of a silo that the configuration does not name (admit: any)"),
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

    _answer(work)


def _which(text: str) -> Any:
    if text in ("best", "newest"):
        return text
    if not text.isdigit():
        raise ConfigError(f"--round {text}: give a number, best or newest")
    return int(text)


Which = Annotated[str, typer.Option("--round", help="a checkpoint: its number, `newest` or `best` (of all evaluated)")]


@app.command("eval")
def evaluate(directory: RunDir, round: Which = "newest", as_json: Json = False, allow: Allow = None) -> None:
    """Evaluate a checkpoint on all silos' test data. Under mpirun or srun every rank evaluates the silos that it would
    train; without a launcher, one process opens the data of all.
    """

    def work(comm: Comm) -> None:
        from fedmpi.results import evaluate as score

        record = score(directory, _which(round), allow or [], comm)
        comm.finish()
        if comm.rank:
            return
        if as_json:
            print(json.dumps(record))
            return
        for silo, row in record["silos"].items():
            print(f"{silo:<16}" + "  ".join(_pair(k, v) for k, v in row.items()))
        figures = {k: v for k, v in record.items() if isinstance(v, float)}
        print(f"{'all':<16}" + "  ".join(_pair(k, v) for k, v in figures.items()) + f"  (round {record['round']})")

    from fedmpi.comm import SoloComm, launched

    _on_ranks(work) if launched() > 1 else _answer(lambda: work(SoloComm()))


def _pair(key: str, value: Any) -> str:
    return f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}"


@app.command()
def export(
    directory: RunDir,
    to: Annotated[Path, typer.Option("--to", help="model.safetensors or model.pt")],
    round: Which = "newest",
    silo: Annotated[
        str | None,
        typer.Option("--silo", metavar="ID", help="the model of this silo, with its personal tensors"),
    ] = None,
    shared: Annotated[
        bool, typer.Option("--shared", help="only the shared tensors; the file's metadata say so")
    ] = False,
    allow: Allow = None,
) -> None:
    """Write a checkpoint's model as a state_dict. If silos have personal layers, give --silo or --shared."""

    def work() -> None:
        from fedmpi.results import export as write

        done = write(directory, to, _which(round), allow or [], silo, shared)
        of_silo = "" if silo is None else f" of silo '{silo}'"
        print(f"round {done}{of_silo} written to {to}")

    _answer(work)


@app.command("list")
def catalogue(
    family: Annotated[str | None, typer.Argument(help="one family, or a section such as exchange")] = None,
) -> None:
    """List everything a configuration can name: families, their members, fields, defaults."""

    def work() -> None:
        from fedmpi.catalogue import lines

        print("\n".join(lines(family)))

    _answer(work)


bench = typer.Typer(help="Benchmarks on this machine, interleaved in one run.", no_args_is_help=True)
app.add_typer(bench, name="bench")

Params = Annotated[str, typer.Option("--params", help="length of the vector, such as 25e6")]
Repeats = Annotated[int, typer.Option("--repeats", min=1, help="how many times each candidate is timed")]


@bench.command("exchange")
def bench_exchange(
    params: Params = "25e6",
    repeats: Repeats = 15,
    link_gbit: Annotated[
        float | None, typer.Option("--link-gbit", metavar="G", help="rate of a rank's link in Gbit/s, for link_share")
    ] = None,
    codec: Annotated[
        list[str] | None,
        typer.Option(
            help="codec of plan sharded, both ways, with feedback if it is lossy and supports it; a name or a mapping "
            "such as '{name: topk, ratio: 0.02}'; may be repeated. Default: bf16 without feedback, int8, int4, topk"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Time every plan and codec from a delta to new parameters on all ranks, interleaved with baselines: MPI_Allreduce
    and gloo, which only sum, and raw TCP, which only moves the bytes of plan sharded. Run it under mpirun.

    x_RIVAL is a row's time / the baseline's; smaller is better. Wire bytes are counted during timing, over all ranks,
    per parameter and per vector sent: n ranks send n - 1 vectors each way (none sends to itself), n in plan replicated.
    link_share is the bits that the busiest rank sends or receives / (seconds x G); for MPI and gloo, the fewest
    bits that a sum needs.
    """

    def work(comm: Comm) -> None:
        from fedmpi.bench import exchange, timing

        def checked() -> tuple[int, Sequence[Channel]]:
            if link_gbit is not None and not 0 < link_gbit < float("inf"):
                raise ConfigError(f"--link-gbit {link_gbit:g}: give a positive number, such as 1 or 0.1")
            channels = [exchange.channel(text) for text in codec] if codec else exchange.CHANNELS
            return timing.check_params(params), channels

        num_params, channels = comm.collectively(checked)
        rows = exchange.exchange(comm, num_params, repeats, channels, link_gbit)
        if comm.rank == 0:
            print(json.dumps(rows) if as_json else timing.table(rows, exchange.COLUMNS), flush=True)
        comm.finish()

    # Otherwise torch warns for each connection whose peer name it cannot resolve. It reads this when it is loaded.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    _on_ranks(work)


@bench.command("codecs")
def bench_codecs(params: Params = "25e6", repeats: Repeats = 7, as_json: Json = False) -> None:
    """Time every codec on one core: encode with feedback, decode and weighted add, bytes per parameter."""

    def work() -> None:
        from fedmpi.bench import codecs, timing

        rows = codecs.codecs(timing.check_params(params), repeats)
        print(json.dumps(rows) if as_json else timing.table(rows, codecs.COLUMNS))

    _answer(work)


@bench.command("checkpoint")
def bench_checkpoint(
    params: Params = "25e6",
    rounds: Annotated[int, typer.Option("--rounds", min=11, help="rounds to run; every 10th writes a checkpoint")] = 30,
    as_json: Json = False,
) -> None:
    """Measure what checkpoints cost a run, on the ranks that mpirun started. They go to TMPDIR and are removed.

    waited is the share of the rounds' time spent waiting for checkpoints; ratio is the time of rounds during which one
    is written / the time of other rounds.
    """

    def work(comm: Comm) -> None:
        from fedmpi.bench import checkpoint, timing

        row = checkpoint.checkpoint(comm, timing.check_params(params), rounds)
        if comm.rank == 0:
            print(json.dumps(row) if as_json else timing.table([row], list(row)), flush=True)

    _on_ranks(work)


data = typer.Typer(help="Datasets: download official files, check local ones.", no_args_is_help=True)
app.add_typer(data, name="data")

DataName = Annotated[str, typer.Argument(metavar="NAME", help="a dataset, see `fedmpi list datasets`")]
Root = Annotated[Path | None, typer.Option("--root", help="folder of datasets; default: FEDMPI_DATA, else ./data")]


@data.command()
def fetch(name: DataName, root: Root = None) -> None:
    """Download a dataset's official files and verify checksums; without a network, say which file to put where."""

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
