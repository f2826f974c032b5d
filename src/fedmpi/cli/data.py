"""Commands below `fedmpi data`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedmpi.cli.command import answer, app

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

    answer(work)


@data.command()
def check(name: DataName, root: Root = None) -> None:
    """Verify a dataset's files and show its silos."""

    def work() -> None:
        from fedmpi.data import DATASETS
        from fedmpi.data import check as look

        options = {"name": name} | ({"root": str(root)} if root is not None else {})
        for row in look(DATASETS.build(options, "data")):
            print(f"{row.silo:<16} train {row.num_train:<7} test {row.num_test:<7} {row.targets}")

    answer(work)
