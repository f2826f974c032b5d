"""Times two commits on this machine by turns: A B, B A, A B, ... Started by jobs/bench/compare_commits.sh.

    python jobs/bench/compare_commits.py [--quick] [--turns 5] [--ranks 2] [--params 25e6] [--json FILE] A [B]

Each commit is checked out into its own folder and runs in this environment, with its own configurations and jobs. A row
is a plan and codec of `fedmpi bench exchange`, or a round of jobs/bench/federation_cost.py: the median over turns of
each commit's seconds, and B's seconds over A's with the smallest and largest ratio of a turn.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TOP = Path(__file__).parents[2]
PLANS = {name: name for name in ("root", "replicated", "sharded", "shared_memory")} | {"window": "shared_memory"}
Seconds = dict[str, float]


def checked_out(commit: str, folder: Path) -> str:
    """Checks the commit out into the folder; returns its short name."""
    name = _said(["git", "rev-parse", "--short", f"{commit}^{{commit}}"], TOP)
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(folder), name], cwd=TOP, check=True)
    return name


def measured(folder: Path, given: argparse.Namespace) -> Seconds:
    """Measures one commit once; seconds by row name."""
    env = {**os.environ, "PYTHONPATH": str(folder / "src")}
    where = _said([sys.executable, "-c", "import fedmpi; print(fedmpi.__file__)"], folder, env)
    if not Path(where).is_relative_to(folder):
        raise SystemExit(f"compare_commits: python imports {where}, not what lies in {folder}")
    short = ["--codec", "identity"] if given.quick else []  # no kernel to compile
    launch = ["mpirun", "-n", str(given.ranks)]
    exchange = [
        "fedmpi",
        "bench",
        "exchange",
        "--params",
        given.params,
        "--repeats",
        str(given.repeats),
        "--json",
        *short,
    ]
    found = {}
    told = json.loads(_said([*launch, *exchange], folder, env))
    for row in told["rows"] if isinstance(told, dict) else told:  # older commits print only the rows
        if row["plan"] in PLANS:
            found[f"exchange {PLANS[row['plan']]} {row['codec']}"] = row["seconds"]["median"]
    job = next(folder.glob("jobs/**/federation_cost.py"))  # older commits have it in jobs/
    cost = [
        sys.executable,
        str(job),
        *(["--quick"] if given.quick else [str(given.rounds)]),
    ]
    config = folder / "configs" / ("digits.yaml" if given.quick else "fashion.yaml")
    row = json.loads(_said([*launch, *cost, "--config", str(config)], folder, env))
    return found | {"federation: a round": row["fedmpi_s"], "federation: the plain loop": row["plain_s"]}


def _said(command: list[str], folder: Path, env: dict[str, str] | None = None) -> str:
    """Runs a command; returns the last line that it prints, without the codes by which mpirun resets a terminal."""
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=1800)
    if done.returncode or not done.stdout.strip():
        raise SystemExit(f"compare_commits: {' '.join(command[:6])} ... -> {done.returncode}\n{done.stderr[-2000:]}")
    return [line for line in done.stdout.replace("\x1b[0m", "").splitlines() if line.strip()][-1]


def compared(turns: list[tuple[Seconds, Seconds]]) -> list[dict[str, Any]]:
    """One row for each figure that both commits measure."""
    rows = []
    for name in turns[0][0]:
        if all(name in seconds for turn in turns for seconds in turn):
            a, b = ([turn[side][name] for turn in turns] for side in (0, 1))
            ratios = [after / before for before, after in zip(a, b, strict=True)]
            a_s, b_s = statistics.median(a), statistics.median(b)
            spread = {"least": min(ratios), "most": max(ratios)}
            rows.append({"what": name, "a_s": a_s, "b_s": b_s, "ratio": b_s / a_s, **spread})
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smoke test: one turn, short vectors, digits")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--params", default="25e6", help="vector length for bench exchange")
    parser.add_argument("--repeats", type=int, default=5, help="repeats of bench exchange per turn")
    parser.add_argument("--rounds", type=int, default=6, help="rounds of federation_cost.py per turn")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("a", metavar="A")
    parser.add_argument("b", metavar="B", nargs="?", default="HEAD")
    given = parser.parse_args(arguments)
    if given.quick:
        given.turns, given.params, given.repeats = 1, "1e5", 1
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch).resolve() / side for side in "ab"]
        try:
            names = [checked_out(c, folder) for c, folder in zip((given.a, given.b), folders, strict=True)]
            turns = []
            for turn in range(given.turns):
                found = {}
                for side in (0, 1) if turn % 2 == 0 else (1, 0):
                    print(
                        f"compare_commits: turn {turn + 1} of {given.turns}: {names[side]}", file=sys.stderr, flush=True
                    )
                    found[side] = measured(folders[side], given)
                turns.append((found[0], found[1]))
        finally:
            for folder in folders:
                if folder.exists():
                    subprocess.run(["git", "worktree", "remove", "--force", str(folder)], cwd=TOP, check=False)
    rows = compared(turns)
    print(f"{'seconds':32} {names[0]:>10} {names[1]:>10}  ratio  (least to most of a turn)")
    for row in rows:
        spread = f"({row['least']:.3f} to {row['most']:.3f})"
        print(f"{row['what']:32} {row['a_s']:10.5f} {row['b_s']:10.5f}  {row['ratio']:.3f}  {spread}")
    if given.json is not None:
        given.json.write_text(json.dumps({"a": names[0], "b": names[1], "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
