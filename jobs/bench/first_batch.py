"""Prints the time at which each rank takes its first batch; run by jobs/bench/startup.sh.

mpirun -n 4 python jobs/bench/first_batch.py OUT [KEY=VALUE ...]
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fedmpi import Run
from fedmpi.local import GradientRule

taken = GradientRule.batches


def first(self: GradientRule, *arguments: Any, **named: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    print("first batch", time.time(), flush=True)
    return taken(self, *arguments, **named)


def main() -> None:
    GradientRule.batches = first  # type: ignore[method-assign]
    config = Path(__file__).parents[2] / "configs" / "digits.yaml"
    with Run(config, "rounds=1", f"out={sys.argv[1]}", *sys.argv[2:]) as run:
        list(run)


if __name__ == "__main__":
    main()
