"""Checks whether ten configurations (rules, plans, codecs) end with the same bits in two commits, on this machine.

    python jobs/bench/compare_bits.py [--quick] A [B]      with .venv/bin on PATH; B: default HEAD

Each commit trains them with its own code. A row is a configuration with the SHA-256 of its parameters in both commits,
or the message with which a commit refuses it. The exit code is 1 if any row differs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TOP = Path(__file__).parents[2]
DIGITS = {
    "rounds": 4,
    "seed": 3,
    "data": {"name": "digits", "silos": 6, "partition": {"name": "dirichlet", "alpha": 0.5}},
    "model": {"name": "mlp", "hidden": [32]},
    "local": {"name": "sgd", "lr": 0.1, "epochs": 1, "batch_size": 32},
    "evaluate": {"every": 2},
}
FED_BACK = {"codec": {"name": "int8"}, "feedback": True}
# Name: (ranks, changes to DIGITS).
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "sgd, replicated": (2, {"exchange": {"plan": "replicated"}}),
    "momentum, fedadam, root": (
        3,
        {
            "local": {"optimizer": {"name": "SGD", "momentum": 0.9}, "keep_optimizer": True},
            "server": {"optimizer": {"name": "fedadam", "lr": 0.01}},
            "exchange": {"plan": "root"},
        },
    ),
    "fedprox, window, uniform": (
        2,
        {
            "local": {"name": "fedprox", "mu": 0.1},
            "exchange": {"plan": "window"},
            "select": {"name": "uniform", "fraction": 0.5},
        },
    ),
    "scaffold, sharded": (2, {"local": {"name": "scaffold"}, "exchange": {"plan": "sharded"}}),
    "fednova, int8 both ways": (
        2,
        {
            "aggregate": "fednova",
            "local": {"amount": {"name": "drawn"}, "epochs": 3},
            "exchange": {"plan": "sharded", "up": FED_BACK, "down": FED_BACK},
        },
    ),
    "topk, silo by silo": (
        2,
        {
            "exchange": {
                "plan": "sharded",
                "scope": "silo",
                "up": {"codec": {"name": "topk", "ratio": 0.05}, "feedback": True},
            }
        },
    ),
    "median, sharded": (3, {"aggregate": "median", "exchange": {"plan": "sharded", "scope": "silo"}}),
    "feddyn, reproducible": (
        2,
        {
            "local": {"name": "feddyn", "alpha": 0.05},
            "server": {"optimizer": {"name": "feddyn", "alpha": 0.05}},
            "exchange": {"plan": "replicated", "reduction": "reproducible"},
        },
    ),
    "ditto, randk summed by MPI": (
        2,
        {
            "local": {"name": "ditto", "lam": 0.1},
            "exchange": {"plan": "replicated", "up": {"codec": {"name": "randk", "ratio": 0.2}, "feedback": True}},
        },
    ),
    "regions, power of choice": (
        4,
        {
            "select": {"name": "power_of_choice", "count": 3},
            "exchange": {"plan": "sharded", "regions": {"levels": [{}]}},
        },
    ),
}


def bits(folder: Path, scratch: Path, name: str) -> str:
    """Trains a configuration with one commit; returns the SHA-256 of the parameters, or the error message."""
    num_ranks, other = CASES[name]
    values = {**DIGITS, **other, "out": str(scratch / "run")}
    values["local"] = {**DIGITS["local"], **other.get("local", {})}  # type: ignore[dict-item]
    (scratch / "config.yaml").write_text(json.dumps(values))
    env = {**os.environ, "PYTHONPATH": str(folder / "src")}
    train = ["mpirun", "-n", str(num_ranks), "fedmpi", "train", str(scratch / "config.yaml")]
    done = subprocess.run(train, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("fedmpi: ")] or [done.stderr[-300:]]
        return f"exit {done.returncode}: {lines[0][:120]}"
    look = ["fedmpi", "inspect", str(scratch / "run"), "--json"]
    said = subprocess.run(look, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=True).stdout
    return str(json.loads(said)["params_sha256"])


def compared(folders: list[Path], names: list[str], scratch: Path, quick: bool) -> int:
    """Prints a row for each configuration; returns the number of rows that differ."""
    differ = 0
    print(f"{'configuration':44} {names[0]:16} {names[1]:16}")
    for number, case in enumerate(list(CASES)[: 2 if quick else None]):
        found = []
        for side, folder in enumerate(folders):
            place = scratch / f"bits-{number}-{side}"
            place.mkdir()
            found.append(bits(folder, place, case))
        same = found[0] == found[1]
        differ += not same
        shown = [text if text.startswith("exit") else text[:16] for text in found]
        print(f"{case:44} {shown[0]:16} {shown[1]:16} {'same' if same else 'DIFFERENT'}", flush=True)
    print(f"compare_bits: {differ} differ", file=sys.stderr)
    return differ


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two configurations")
    parser.add_argument("a", metavar="A")
    parser.add_argument("b", metavar="B", nargs="?", default="HEAD")
    given = parser.parse_args(arguments)
    git = ["git", "-C", str(TOP)]
    with tempfile.TemporaryDirectory() as found:
        scratch = Path(found).resolve()
        folders = [scratch / side for side in "ab"]
        try:
            for commit, folder in zip((given.a, given.b), folders, strict=True):
                subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(folder), commit], check=True)
            differ = compared(folders, [given.a, given.b], scratch, given.quick)
        finally:
            for folder in folders:
                if folder.exists():
                    subprocess.run([*git, "worktree", "remove", "--force", str(folder)], check=False)
    raise SystemExit(differ > 0)


if __name__ == "__main__":
    main()
