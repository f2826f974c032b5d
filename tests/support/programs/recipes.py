"""Trains recipes of examples/extending on all ranks of one launch: OUT NAME... ; rank 0 prints their last losses.

The working folder is the repository's.
"""

import json
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import yaml

TOP = Path(__file__).parents[3]
RECIPES = {path.stem: path for path in sorted((TOP / "examples/extending").glob("*.py"))}
BASE = {
    "rounds": 2,
    "data": {"name": "digits", "silos": 3},
    "model": {"name": "logistic"},
    "local": {"name": "sgd", "lr": 0.1, "epochs": 1},
}


def values_of(name: str) -> dict[str, Any]:
    """The configuration in a recipe's docstring, over a small one."""
    text = re.search(r'"""(.*?)"""', RECIPES[name].read_text(), re.DOTALL)[1]
    told = yaml.safe_load(textwrap.dedent("\n".join(line for line in text.splitlines() if line.startswith("    "))))
    return {**BASE, **told}


def main(out: Path, names: list[str]) -> None:
    from fedmpi.components import build
    from fedmpi.config import Config
    from fedmpi.train import Run

    losses = {}
    for name in names:
        with Run(build(Config, {**values_of(name), "out": str(out / name)})) as run:
            losses[name] = list(run)[-1]["loss"]
    if run.comm.rank == 0:
        print(json.dumps(losses))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
