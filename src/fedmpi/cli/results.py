"""Commands that read results: inspect, compare, report, watch, eval, export, list."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedmpi.cli.command import Allow, Json, RunDir, answer, app, on_ranks
from fedmpi.errors import ConfigError, FedmpiError

if TYPE_CHECKING:
    from fedmpi.comm import Comm


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
        if done and not found["ended"] and found["rounds"] < (goal := found["config"]["rounds"]):
            raise FedmpiError(f"{directory} has {found['rounds']} of {goal} rounds; the same command resumes it")
        if as_json:
            print(json.dumps(found))
            return
        record, best = found["metrics"] or {}, found["best"] or {}
        print(f"rounds         {found['rounds']} of {found['config']['rounds']}")
        if found["ended"]:
            print(f"ended early    {found['ended']}")
        if (early := found["early"]) is not None:
            wants = [f"{name} {early[name]:g}" for name in ("target", "patience") if early.get(name) is not None]
            print(f"stop.early     {early['metric']}: {', '.join(wants)}")
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

    answer(work)


@app.command()
def compare(
    what: Annotated[list[Path], typer.Argument(metavar="GRID|RUN...", help="a grid's YAML file, or run directories")],
    out: Annotated[str | None, typer.Option("--out", help="folder of a grid's runs, table and figure")] = None,
    only: Annotated[
        str, typer.Option("--only", metavar="NAME,NAME", help="algorithms, partitions or seeds of a grid")
    ] = "",
    quick: Annotated[bool, typer.Option("--quick", help="two rounds of each cell with the first seed")] = False,
    task: Annotated[
        int | None, typer.Option("--task", metavar="K", help="train only line K of a grid, from 1, and print no table")
    ] = None,
    tasks: Annotated[bool, typer.Option("--tasks", help="list the lines of a grid, and whether they are done")] = False,
    gather: Annotated[
        bool, typer.Option("--gather", help="print a grid's table and train nothing; exit 1 if a line is not done")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a grid of runs (algorithm x partition x seed) and print one table, or print run directories side by side.

    Under mpirun or srun all ranks train each run of a grid. Finished runs are not trained again. For an array of jobs,
    one per line: --tasks, --task, --gather (slurm/sweep.sbatch).
    """
    if len(what) == 1 and what[0].suffix in (".yaml", ".yml"):
        _compare_grid(what[0], out, [name for name in only.split(",") if name], quick, task, tasks, gather, as_json)
    else:
        options = {"--out": out is not None, "--only": bool(only), "--quick": quick}
        options |= {"--task": task is not None, "--tasks": tasks, "--gather": gather}
        answer(lambda: _compare_runs(what, [name for name, given in options.items() if given], as_json))


def _compare_grid(
    file: Path,
    out: str | None,
    only: list[str],
    quick: bool,
    task: int | None,
    tasks: bool,
    gather: bool,
    as_json: bool,
) -> None:
    from fedmpi import compare as grids

    def refuse() -> None:
        chosen = [
            name for name, given in (("--task", task is not None), ("--tasks", tasks), ("--gather", gather)) if given
        ]
        if len(chosen) > 1 or (chosen and only):
            other = chosen[1] if len(chosen) > 1 else "--only"
            raise ConfigError(f"{chosen[0]} and {other} do not go together")

    if task is None and not tasks and not gather:
        on_ranks(lambda comm: grids.compare_grid(file, out, only, quick, as_json, comm))
        return
    answer(refuse)
    if task is not None:
        line = task
        on_ranks(lambda comm: grids.train_line(file, out, quick, line, comm))
    elif tasks:
        answer(lambda: grids.list_lines(file, out, quick))
    else:
        answer(lambda: grids.gather(file, out, quick, as_json))


def _compare_runs(roots: list[Path], grid_only: list[str], as_json: bool) -> None:
    from fedmpi.compare.runs import compare_runs, lines

    if grid_only:
        raise ConfigError(f"{grid_only[0]} goes with a grid: one YAML file, no run directories")
    rows = compare_runs(roots)
    print(json.dumps(rows) if as_json else "\n".join(lines(rows)))


@app.command()
def report(
    what: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="run directories, a folder of runs, or a grid's YAML file")
    ],
    out: Annotated[Path | None, typer.Option("--out", help="file of the page; default: report.html in DIR")] = None,
    title: Annotated[str, typer.Option("--title", help="title of the page; default: the names of the runs")] = "",
) -> None:
    """Write one HTML page about runs: what ran, figures, silos, time, traffic, participation, differences.

    The page is one file that loads nothing from a network. Only reads the runs' files, also while a job trains.
    """

    def work() -> None:
        from fedmpi.report import write

        path = write(what, out, title)
        print(f"report: {path} ({path.stat().st_size / 1e6:.1f} MB)")

    answer(work)


@app.command()
def watch(
    directory: RunDir,
    once: Annotated[bool, typer.Option("--once", help="print one frame and end")] = False,
    every: Annotated[float, typer.Option("--every", min=0.1, metavar="S", help="seconds between two looks")] = 2.0,
) -> None:
    """Show how the run of DIR goes on: rounds, ETA, figures, phases of each rank, silos that are late, events.

    Reads files only, so it works from any machine that sees DIR. Ends when all rounds are done, or with Ctrl-C.
    """

    def work() -> None:
        from fedmpi.watch import watch as show

        show(directory, every, once)

    answer(work)


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

    on_ranks(work) if launched() > 1 else answer(lambda: work(SoloComm()))


def _pair(key: str, value: Any) -> str:
    return f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}"


@app.command()
def predict(
    directory: RunDir,
    to: Annotated[Path, typer.Option("--to", metavar="FOLDER", help="gets a file per silo, on the silo's machine")],
    round: Which = "newest",
    part: Annotated[str, typer.Option("--part", help="samples: test, train or all")] = "test",
    silo: Annotated[list[str] | None, typer.Option("--silo", metavar="ID", help="only this silo; repeatable")] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="FILE", help="other samples, with or without targets, taken as those of --silo"),
    ] = None,
    ending: Annotated[str, typer.Option("--format", help="csv, npz or h5")] = "csv",
    allow: Allow = None,
) -> None:
    """Write a checkpoint's predictions, a file per silo. A silo with a personal model uses its own. An older file of
    the same name is replaced.

    Under mpirun or srun every rank writes those of the silos that it would train: they stay where the samples are.
    """

    def work(comm: Comm) -> None:
        from fedmpi.predictions import predict as write

        done = write(directory, to, _which(round), allow or [], comm, part, silo or (), data, ending)  # type: ignore[arg-type]
        comm.finish()
        for name, one in done.items():
            what = "test samples" if part == "test" else "training samples" if part == "train" else "samples"
            of = f"{what} of silo {name}" if data is None else f"samples of {data}"
            whose = "the global model" if not one.own else "its own model" if data is None else f"silo {name}'s model"
            old = ", in place of an older file" if one.replaced else ""
            print(f"{one.path}: {one.rows} {of}, predicted by {whose} of round {one.round}{old}", flush=True)

    from fedmpi.comm import SoloComm, launched

    on_ranks(work) if launched() > 1 else answer(lambda: work(SoloComm()))


@app.command()
def export(
    directory: RunDir,
    to: Annotated[Path, typer.Option("--to", help="model.safetensors, .pt, .torchscript or .onnx")],
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
    """Write a checkpoint's model: a state_dict, or a graph. If silos have personal layers, give --silo or --shared."""

    def work() -> None:
        from fedmpi.results import export as write

        done = write(directory, to, _which(round), allow or [], silo, shared)
        of_silo = "" if silo is None else f" of silo '{silo}'"
        print(f"round {done}{of_silo} written to {to}")

    answer(work)


@app.command("list")
def catalogue(
    family: Annotated[str | None, typer.Argument(help="one family, or a section such as exchange")] = None,
) -> None:
    """List everything a configuration can name: families, their members, fields, defaults."""

    def work() -> None:
        from fedmpi.catalogue import lines

        print("\n".join(lines(family)))

    answer(work)
