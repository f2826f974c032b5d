"""Commands below `fedmpi bench`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmpi.cli.command import Allow, ConfigPath, Overrides, answer, app, on_ranks
from fedmpi.errors import ConfigError

if TYPE_CHECKING:
    from fedmpi.comm import Comm
    from fedmpi.exchange.config import Channel

bench = typer.Typer(help="Benchmarks on this machine, interleaved in one run.", no_args_is_help=True)
app.add_typer(bench, name="bench")
Params = Annotated[str, typer.Option("--params", help="length of the vector, such as 25e6")]
Json = Annotated[bool, typer.Option("--json", help="one line of JSON; the same keys for every benchmark")]
Mllog = Annotated[bool, typer.Option("--mllog", help="lines in the format of MLPerf's logging")]
Codecs = Annotated[
    list[str] | None,
    typer.Option(
        "--codec",
        help="codec of plan sharded, both ways, with feedback if it is lossy and supports it; a name or a mapping "
        "such as '{name: topk, ratio: 0.02}'; may be repeated. Default: bf16 without feedback, int8, int4, topk",
    ),
]
Repeats = Annotated[int, typer.Option("--repeats", min=1, help="how many times each candidate is timed")]


@bench.command("exchange")
def bench_exchange(
    params: Params = "25e6",
    repeats: Repeats = 15,
    link_gbit: Annotated[
        float | None, typer.Option("--link-gbit", metavar="G", help="rate of a rank's link in Gbit/s, for link_share")
    ] = None,
    codec: Codecs = None,
    save: Annotated[
        Path | None, typer.Option("--save", metavar="FILE", help="write the result as JSON, for `fedmpi plan --costs`")
    ] = None,
    as_json: Json = False,
    as_mllog: Mllog = False,
) -> None:
    """Time every plan and codec from a delta to new parameters on all ranks, interleaved with baselines: MPI_Allreduce
    and gloo, which only sum, and raw TCP, which only moves the bytes of plan sharded. Run it under mpirun.

    x_RIVAL is a row's time / the baseline's; smaller is better. Wire bytes are counted during timing, over all ranks,
    per parameter and per vector sent: n ranks send n - 1 vectors each way (none sends to itself), n in plan replicated.
    link_share is the bits that the busiest rank sends or receives / (seconds x G); for MPI and gloo, the fewest
    bits that a sum needs.
    """

    def work(comm: Comm) -> None:
        from fedmpi.bench import exchange, figures, timing

        def checked() -> tuple[int, Sequence[Channel], figures.Style]:
            if link_gbit is not None and not 0 < link_gbit < float("inf"):
                raise ConfigError(f"--link-gbit {link_gbit:g}: give a positive number, such as 1 or 0.1")
            channels = [exchange.channel(text) for text in codec] if codec else exchange.CHANNELS
            if comm.rank == 0 and save is not None:
                writable(save)
            return timing.check_params(params), channels, figures.Style.of(as_json, as_mllog)

        num_params, channels, style = comm.collectively(checked)
        started_s = time.time()
        rows = exchange.exchange(comm, num_params, repeats, channels, link_gbit)
        settings = {"params": num_params, "repeats": repeats, "link_gbit": link_gbit}
        found = figures.result(comm, "exchange", settings, rows, exchange.figures(rows), started_s)
        if comm.rank == 0:
            print(figures.text(found, exchange.COLUMNS, style), flush=True)
            if save is not None:
                save.write_text(json.dumps(found, indent=1) + "\n")
        comm.finish()

    quiet_gloo()
    on_ranks(work)


def quiet_gloo() -> None:
    """Otherwise torch warns for each connection whose peer name it cannot resolve. It reads this when it is loaded."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def writable(path: Path) -> None:
    """Raises ConfigError unless a file can be written there, whose folder is made; an old file keeps its content."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a"):
            pass
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


@bench.command("codecs")
def bench_codecs(params: Params = "25e6", repeats: Repeats = 7, as_json: Json = False, as_mllog: Mllog = False) -> None:
    """Time every codec on one core: encode with feedback, decode and weighted add, bytes per parameter."""

    def work() -> None:
        from fedmpi.bench import codecs, figures, timing
        from fedmpi.comm import SoloComm

        num_params, style, started_s = timing.check_params(params), figures.Style.of(as_json, as_mllog), time.time()
        rows = codecs.codecs(num_params, repeats)
        settings = {"params": num_params, "repeats": repeats}
        found = figures.result(SoloComm(), "codecs", settings, rows, codecs.figures(rows), started_s)
        print(figures.text(found, codecs.COLUMNS, style))

    answer(work)


@bench.command("arrivals")
def bench_arrivals(params: Params = "25e6", repeats: Repeats = 15, as_json: Json = False) -> None:
    """Time what an update costs the server of `engine: buffered` on one core, beside one copy of the vector.

    It is added to the buffer, and the server steps once `size` updates have arrived. x_memcpy is an update's time / a
    copy's.
    """

    def work() -> None:
        from fedmpi.bench import arrivals, timing

        rows = arrivals.arrivals(timing.check_params(params), repeats)
        print(json.dumps(rows) if as_json else timing.table(rows, arrivals.COLUMNS))

    answer(work)


@bench.command("checkpoint")
def bench_checkpoint(
    params: Params = "25e6",
    rounds: Annotated[int, typer.Option("--rounds", min=11, help="rounds to run; every 10th writes a checkpoint")] = 30,
    as_json: Json = False,
    as_mllog: Mllog = False,
) -> None:
    """Measure what checkpoints cost a run, on the ranks that mpirun started. They go to TMPDIR and are removed.

    waited is the share of the rounds' time spent waiting for checkpoints; ratio is the time of rounds during which one
    is written / the time of other rounds; write_s is the time in which rank 0 writes the parameters, with fsync;
    resume_s is the time from the run directory to a run that is ready to train.
    """

    def work(comm: Comm) -> None:
        from fedmpi.bench import checkpoint, figures, timing

        num_params, style = comm.collectively(
            lambda: (timing.check_params(params), figures.Style.of(as_json, as_mllog))
        )
        started_s = time.time()
        row = checkpoint.checkpoint(comm, num_params, rounds)
        settings = {"params": num_params, "rounds": rounds}
        found = figures.result(comm, "checkpoint", settings, [row], checkpoint.figures(row), started_s)
        if comm.rank == 0:
            print(figures.text(found, list(row), style), flush=True)

    on_ranks(work)


@bench.command("quality")
def bench_quality(
    config: ConfigPath,
    overrides: Overrides = None,
    target: Annotated[float, typer.Option("--target", help="value of the run's metric that a run has to reach")] = 0.9,
    runs: Annotated[int, typer.Option("--runs", min=3, help="how many runs, with seeds that follow `seed`")] = 5,
    as_json: Json = False,
    as_mllog: Mllog = False,
    allow: Allow = None,
) -> None:
    """Measure the time to quality as MLPerf HPC defines it: from before the data are opened until a round that reaches
    the target is committed; the fastest and the slowest run are dropped, the others averaged. Also models per minute.

    The metric is the first of `objective.metrics`, or the task's. Each run has its own seed and ends at the target, or
    after `rounds`. Exits with 1 if a run did not reach it: then there is no time to quality.
    """

    def work(comm: Comm) -> None:
        from fedmpi.bench import figures, quality
        from fedmpi.config import load, run_directory
        from fedmpi.errors import FedmpiError, agreed
        from fedmpi.trust import confined

        style = comm.collectively(lambda: figures.Style.of(as_json, as_mllog))
        with confined(run_directory(Path(config)), allow or []):
            loaded = comm.collectively(lambda: load(config, overrides or [])[0])
            started_s, start_s = time.time(), time.perf_counter()
            rows, events = quality.quality(comm, loaded, target, runs)
        seconds = time.perf_counter() - start_s
        settings = {"config": config, "overrides": overrides or [], "target": target, "runs": runs}
        found = figures.result(comm, "quality", settings, rows, quality.figures(rows, seconds), started_s)
        if comm.rank == 0:
            print(figures.text(found, quality.COLUMNS, style, events), flush=True)
        if missed := [str(row["seed"]) for row in rows if not row["reached"]]:
            seeds = ", ".join(missed)
            raise agreed(
                FedmpiError(f"no time to quality: seeds {seeds} did not reach {target:g} in {loaded.rounds} rounds")
            )
        comm.finish()

    on_ranks(work)


@bench.command("scaling")
def bench_scaling(
    params: Annotated[
        list[str] | None,
        typer.Option("--params", help="length of the vector, such as 25e6; may be repeated. Default: 1e6 and 25e6"),
    ] = None,
    codec: Codecs = None,
    repeats: Repeats = 7,
    rounds: Annotated[int, typer.Option("--rounds", min=2, help="rounds that are timed")] = 6,
    figure: Annotated[
        Path | None, typer.Option("--figure", metavar="FILE", help="draw seconds and efficiency: .svg, .pdf or .png")
    ] = None,
    as_json: Json = False,
    as_mllog: Mllog = False,
) -> None:
    """Measure how the exchange and whole rounds scale over ranks: 1, 2, 4 ... of those that mpirun started.

    exchange: plan sharded with each codec; strong: as many silos as ranks in the job; weak: one silo a rank.
    efficiency is the ideal time, from the smallest number of ranks, / the measured one. Ranks that take no part wait.
    """

    def work(comm: Comm) -> None:
        from fedmpi.bench import exchange, figures, scaling, timing

        def checked() -> tuple[list[int], list[Channel], figures.Style]:
            if comm.rank == 0 and figure is not None:
                writable(figure)
            lengths = [timing.check_params(text) for text in params or ("1e6", "25e6")]
            channels = [exchange.channel(text) for text in codec or ("identity", "int8")]
            return lengths, channels, figures.Style.of(as_json, as_mllog)

        lengths, channels, style = comm.collectively(checked)
        started_s = time.time()
        rows = scaling.scaling(comm, lengths, channels, repeats, rounds)
        settings = {"params": lengths, "repeats": repeats, "rounds": rounds}
        found = figures.result(comm, "scaling", settings, rows, scaling.figures(rows), started_s)
        if comm.rank == 0:
            print(figures.text(found, scaling.COLUMNS, style), flush=True)
        comm.collectively(lambda: scaling.draw(rows, figure) if comm.rank == 0 and figure is not None else None)
        comm.finish()

    on_ranks(work)


@bench.command("all")
def bench_all(
    minutes: Annotated[float, typer.Option("--minutes", min=0.1, help="about how long to measure")] = 5.0,
    params: Params = "25e6",
    save: Annotated[Path, typer.Option("--save", metavar="FILE", help="the file with all results")] = Path(
        "fedmpi-bench.json"
    ),
    as_json: Json = False,
    as_mllog: Mllog = False,
) -> None:
    """Run all benchmarks on the ranks that mpirun started, print one page about the system, and write one file with
    everything: what `fedmpi doctor` sees, tables, figures of merit.

    The time is shared out over the benchmarks; short vectors or more minutes give more repeats.
    """

    def work(comm: Comm) -> None:
        import tempfile

        from fedmpi.bench import everything, figures, timing

        def checked() -> tuple[int, figures.Style]:
            if comm.rank == 0:
                writable(save)
            return timing.check_params(params), figures.Style.of(as_json, as_mllog)

        num_params, style = comm.collectively(checked)
        out = Path(comm.broadcast_text(tempfile.gettempdir() if comm.rank == 0 else "", 0))
        result = everything.everything(comm, num_params, minutes, out)
        if comm.rank == 0:
            save.write_text(json.dumps(result, indent=1) + "\n")
            text = figures.text(result, [], style) if style is not figures.Style.TEXT else everything.page(result)
            print(text, flush=True)
        comm.finish()

    quiet_gloo()
    on_ranks(work)
