"""Commands for batch systems: slurm."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from fedmpi.cli.command import Allow, ConfigPath, Overrides, answer, app
from fedmpi.errors import ConfigError, FedmpiError
from fedmpi.output import say


@app.command()
def slurm(
    config: ConfigPath,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="nodes of the job")] = 1,
    time: Annotated[str, typer.Option("--time", help="time limit: minutes, H:MM:SS or D-HH:MM:SS")] = "1:00:00",
    gpus_per_node: Annotated[int, typer.Option("--gpus-per-node", min=0, help="GPUs of a node")] = 0,
    ranks_per_node: Annotated[
        int | None, typer.Option("--ranks-per-node", min=1, help="ranks of a node (one per GPU, or one)")
    ] = None,
    cpus_per_rank: Annotated[int | None, typer.Option("--cpus-per-rank", min=1, help="cores of a rank")] = None,
    mem: Annotated[str, typer.Option("--mem", help="memory of a node, such as 64G (what the plan needs)")] = "",
    partition: Annotated[str, typer.Option("--partition", help="partition")] = "",
    account: Annotated[str, typer.Option("--account", help="account")] = "",
    sbatch: Annotated[
        list[str] | None, typer.Option("--sbatch", metavar="OPTION", help="further option of sbatch; may be repeated")
    ] = None,
    launcher: Annotated[
        str, typer.Option("--launcher", help="pmix, pmi2 (both srun), mpirun or mpiexec (what fits the MPI)")
    ] = "",
    to: Annotated[Path | None, typer.Option("--to", metavar="FILE", help="write the script there")] = None,
    submit: Annotated[bool, typer.Option("--submit", help="submit it, and print the job's id")] = False,
    allow: Allow = None,
) -> None:
    """Print a SLURM batch script for a run, with ranks, memory, time limit and signals from its plan. The job is
    supervised, stops before its limit with a checkpoint, is requeued and resumes. Impossible requests are refused."""

    def work() -> None:
        from fedmpi import batch, starters
        from fedmpi.config import load, run_directory
        from fedmpi.plan import plan
        from fedmpi.trust import confined

        request = batch.Request(
            nodes, time, gpus_per_node, ranks_per_node, cpus_per_rank, mem, partition, account, tuple(sbatch or ())
        )
        with confined(run_directory(Path(config)), allow or []):
            loaded, origins = load(config, overrides or [])
            batch.refuse(loaded, request, len(loaded.data.source(loaded.seed).silos))
            planned = plan(loaded, origins, request.num_ranks)
        command = [word for module in allow or () for word in ("--allow", module)] + [config, *(overrides or [])]
        text = batch.script(loaded, command, planned, request, starters.here(launcher), str(Path.cwd()), sys.prefix)
        if told := batch.no_memory(planned, request):
            say(f"fedmpi: {told}", error=True)
        if to is not None:
            to.write_text(text)
        if submit:
            print(_submitted(text))
        elif to is None:
            print(text, end="")

    answer(work)


def _submitted(text: str) -> str:
    """The id of the submitted job."""
    try:
        done = subprocess.run(["sbatch", "--parsable"], input=text, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        raise FedmpiError("sbatch has not answered for 60 s: squeue tells whether it took the job") from None
    except FileNotFoundError:
        raise ConfigError(
            "--submit: there is no sbatch here; take --to FILE, and submit the script elsewhere"
        ) from None
    if done.returncode:
        raise FedmpiError(f"sbatch refuses the job: {' '.join(done.stderr.split())}")
    return done.stdout.strip().partition(";")[0]  # without the cluster's name
