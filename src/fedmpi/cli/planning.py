"""Commands that come before a run: plan, check, doctor, audit."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedmpi.cli.command import Allow, ConfigPath, Json, Overrides, answer, app, on_ranks
from fedmpi.cli.training import idle_ranks
from fedmpi.errors import ConfigError
from fedmpi.output import at_least, at_most, say, size

if TYPE_CHECKING:
    from fedmpi.comm import Comm
    from fedmpi.config import Config


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option("--ranks", min=1, help="how many ranks will be launched")] = 1,
    as_json: Json = False,
    allow: Allow = None,
    privacy: Annotated[bool, typer.Option("--privacy", help="who would see what of a silo")] = False,
    speeds: Annotated[
        Path | None,
        typer.Option("--speeds", help="seconds of the silos: lines SILO,SECONDS, or an earlier asynchronous run's DIR"),
    ] = None,
    link: Annotated[
        str | None, typer.Option("--link", metavar="RATE", help="a host's link, such as 1gbit: times of exchanges")
    ] = None,
    latency: Annotated[str, typer.Option("--latency", help="of a message over that link")] = "50us",
    costs: Annotated[
        Path | None,
        typer.Option("--costs", metavar="FILE", help="of `fedmpi bench exchange --save`: what computing takes"),
    ] = None,
) -> None:
    """Show what `train` would need and do: silos, bytes, memory, disk, collectives, and the source of every value.

    With `--privacy`, `--link` or `--speeds` it shows only what they ask for."""

    def work() -> None:
        from fedmpi.config import load, run_directory
        from fedmpi.plan import plan as compute
        from fedmpi.trust import confined

        with confined(run_directory(Path(config)), allow or []):
            loaded, origins = load(config, overrides or [])
            result = compute(loaded, origins, ranks, speeds)
            result["links"] = _links(loaded, result, ranks, link, latency, costs)
        if as_json:
            print(json.dumps(result))
        elif privacy or link is not None or speeds is not None:
            _print_asked(result, privacy)
        else:
            _print_plan(result)

    answer(work)


def _print_asked(result: dict[str, Any], privacy: bool) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    if privacy:
        _print_privacy(console, result)
    _print_engines(console, result)
    _print_links(console, result["links"])


def _links(
    config: Config, result: dict[str, Any], ranks: int, link: str | None, latency: str, costs: Path | None
) -> list[dict[str, Any]] | None:
    """Seconds of exchanges over a link; None if no link is given."""
    if link is None:
        if costs is not None:
            raise ConfigError("--costs needs --link, such as --link 1gbit")
        return None
    from fedmpi.bench import forecast

    section = config.exchange
    if section.regions is not None or section.overlap or section.fragments > 1 or section.scope == "silo":
        raise ConfigError("--link: its model knows no regions, overlap, fragments or scope silo")
    if config.transport.apart:
        raise ConfigError("--link: its model knows no transport: files")
    if config.engine.arrivals or config.secure is not None:
        raise ConfigError("--link: its model knows no asynchronous engine and no secure aggregation")
    bits_per_s, latency_s = forecast.rate(link), forecast.latency(latency)
    rows = [] if costs is None else forecast.read(costs)
    section = replace(section, plan=result["plan"])
    if section.member.in_shared_memory:  # which is not there between hosts
        section = replace(section, plan="sharded")
    return forecast.forecast(section, result["vector_elements"], ranks, bits_per_s, latency_s, rows)


def _print_links(console: Any, rows: Sequence[dict[str, Any]] | None) -> None:
    from rich.table import Table

    if rows is None:
        return
    columns = ("at_least_s", "at_most_s", "wire_s", "computing_s", "latency_s")
    longest_s = max(row["at_most_s"] for row in rows)
    unit, factor = ("s", 1.0) if longest_s >= 1 else ("ms", 1e3)
    names = (name.removesuffix("_s").replace("_", " ") for name in columns)
    table = Table("plan", "codec", *names, title=f"an exchange in {unit}")
    for row in rows:
        cells = ("?" if row[name] is None else f"{row[name] * factor:.4g}" for name in columns)
        table.add_row(row["plan"] + " (configured)" * row["configured"], row["codec"] or "-", *cells)
    console.print(table)
    if any(row["computing_s"] is None for row in rows):
        console.print("computing is not known where it says ?, and counts as 0: --costs FILE of bench exchange --save")


def _print_privacy(console: Any, result: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table("of a silo", "server (rank 0)", "other silos", "network", "run directory", title="who sees what")
    for row in result["privacy"]:
        table.add_row(*row.values())
    console.print(table)
    _print_secure(console, result)
    for sentence in result["trust"]:
        console.print(sentence)


def _print_secure(console: Any, result: dict[str, Any]) -> None:
    if (secure := result["secure"]) is not None:
        cut = "" if secure["cut"] is None else f", their coordinates are cut to {secure['cut']:g}"
        console.print(
            f"secure: sums of {secure['threshold']} silos or more, modulo 2^{secure['bits']}, in steps of "
            f"{1 / secure['unit']:.2g}; a coordinate of the mean is off by at most {secure['error']:.2g}, sums up to "
            f"{secure['largest_sum']:g} fit (updates are bounded by {secure['clip']:g}{cut}); each silo shares "
            f"masks with {secure['neighbours']}"
        )
        if secure["noise"] is not None:
            console.print(
                f"secure: each silo adds noise of {secure['noise']:.4g} steps to its words before its masks, or more "
                "if others are missing"
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

    on_ranks(work) if launched() > 1 else answer(lambda: work(SoloComm()))


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
    if (told := result["amounts"]) is not None:
        rows = [f"{silo} {one['amount']} (lr x {one['scale']:.2g})" for silo, one in list(told.items())[:12]]
        more = f", and {len(told) - 12} more silos (--json)" if len(told) > 12 else ""
        console.print(f"local.amount: by_delay, once delays are known: {', '.join(rows)}{more}")


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
            raise agreed(ConfigError("the doctor found faults: fix them first"))
        comm.finish()

    from fedmpi.comm import SoloComm, launched

    on_ranks(work) if launched() > 1 else answer(lambda: work(SoloComm()))


def _print_plan(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from fedmpi.components import written

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    jobs = result["jobs"]
    what = "rank" if jobs is None else "job"
    table = Table(what, "silos", "train samples", "data", "vectors", "memory", title=f"{what}s")
    for row in result["ranks"]:
        silos = ", ".join(row["silos"][:6]) + (f" and {len(row['silos']) - 6} more" if len(row["silos"]) > 6 else "")
        known = row["train_samples"] is not None
        samples, data = (str(row["train_samples"]), size(row["data_bytes"])) if known else ("?", "?")
        memory = size(row["memory_bytes"]) + ("" if known else " + data")
        name = str(row["rank"]) if jobs is None else jobs[row["rank"]]
        table.add_row(name, silos or "-", samples, data, size(row["vector_bytes"]), memory)
    console.print(table)
    hosts = [row["rank"] for row in result["ranks"] if row["silos"]]
    dedicated = jobs is not None or result["config"]["server.dedicated"]["value"]
    if idle := idle_ranks(len(result["ranks"]), hosts, dedicated):
        console.print(idle)
    if result["central"]:
        reader = "rank" if jobs is None else "silo's job"
        console.print(f"data: one central set; every {reader} reads all of it and keeps its silos' parts")
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
            f"a round, all {what}s: {size(result['bytes_up'])} up, {size(result['bytes_down'])} down "
            f"({result['bytes_up']} and {result['bytes_down']} bytes), {size(result['bytes_control'])} control traffic"
        )
    _print_secure(console, result)
    if (private := result["budget"]) is not None:
        limit = "" if private["budget"] is None else f", budget {private['budget']:g}"
        console.print(f"privacy: {private['sentence']}")
        console.print(
            f"privacy: all rounds spend epsilon {at_most(private['epsilon'])} at delta {private['delta']:g}{limit}, "
            f"noise multiplier {private['sigma']:.4g}; rounds that are repeated after a failure spend again"
        )
        for silo, row in private["silos"].items():
            console.print(
                f"privacy: silo {silo}: epsilon {at_most(row['epsilon'])}, noise multiplier {row['sigma']:.4g}"
            )
    kept = result["checkpoints_kept"]
    console.print(f"a checkpoint: {size(result['checkpoint_bytes'])}; up to {kept} are kept in {result['out']}")
    if result["mirror_bytes"]:
        console.print(f"under mpirun --with-ft ulfm: up to {size(result['mirror_bytes'])} more memory a rank")
    console.print("not looked at: files, samples, model and loss on them, speed, out; `fedmpi check` does")
    _print_engines(console, result)
    values = Table("key", "value", "from", title="configuration")
    for key, entry in result["config"].items():
        values.add_row(key, written(entry["value"]), entry["from"])
    console.print(values)


@app.command()
def audit(
    config: ConfigPath,
    overrides: Overrides = None,
    canaries: Annotated[int, typer.Option("--canaries", min=8, help="samples that may be in the training data")] = 200,
    silo: Annotated[str | None, typer.Option("--silo", metavar="ID", help="who gets them (the largest)")] = None,
    scale: Annotated[float, typer.Option("--scale", help="their spread / that of the silo's samples")] = 1.0,
    confidence: Annotated[float, typer.Option("--confidence", help="of the bound")] = 0.95,
    silos: Annotated[bool, typer.Option("--silos", help="canaries are silos, as with privacy: silo")] = False,
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
            say("fedmpi: audit: one whole run on this process, with the data of all silos and canaries", error=True)
            told = examine(load(config, overrides or [])[0], silo, canaries, scale, confidence, silos)
        if as_json:
            print(json.dumps(told))
            return
        least, most = at_least(told["epsilon_at_least"]), told["epsilon_at_most"]
        whose = "silos" if told["silo"] is None else f"silo {told['silo']}"
        print(f"{whose}: {told['correct']} of {told['guesses']} guesses are right, of {canaries} canaries")
        print(
            f"epsilon is at least {least} at delta {told['delta']:g} ({confidence:.0%} confidence); so many canaries "
            f"can show {at_least(told['epsilon_if_all_right'])} at most"
        )
        above = "without privacy there is no bound above"
        print(above if most is None else f"epsilon is at most {at_most(most)} (account)")

    answer(work)
