"""Commands below `fedmpi bench`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from fedmpi.cli.command import Json, answer, app, on_ranks
from fedmpi.errors import ConfigError

if TYPE_CHECKING:
    from fedmpi.comm import Comm
    from fedmpi.exchange.config import Channel

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
    on_ranks(work)


@bench.command("codecs")
def bench_codecs(params: Params = "25e6", repeats: Repeats = 7, as_json: Json = False) -> None:
    """Time every codec on one core: encode with feedback, decode and weighted add, bytes per parameter."""

    def work() -> None:
        from fedmpi.bench import codecs, timing

        rows = codecs.codecs(timing.check_params(params), repeats)
        print(json.dumps(rows) if as_json else timing.table(rows, codecs.COLUMNS))

    answer(work)


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

    on_ranks(work)
