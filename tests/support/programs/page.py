"""Runs the fenced blocks of one Markdown page, in order, in an empty folder with links to the repository's files.

    python tests/support/programs/page.py docs/quickstart.md

bash            run by bash, which stops at the first command that fails; `mpirun` may start more ranks than cores
python          executed; the blocks of a page share their names. A block that begins with `# NAME.py` is that file
yaml            a configuration, planned for two ranks. A block that begins with `# NAME.yaml` is also that file. A
                block without `data` or `model` is a fragment: it replaces top-level keys of configs/digits.yaml
text, mermaid   not run, nor are json and ini

A block after the line `<!-- not run: REASON -->` is not run. Prints one line per block; exit code 1 at the first block
that fails, with its place in the page.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOP = Path(__file__).parents[3]
RUN = ("bash", "python", "yaml")
SHOWN = ("text", "mermaid", "json", "ini")  # languages of blocks that are not run
LINKED = ("configs", "docs", "examples", "jobs", "slurm", "src", "tests", "README.md", "setup.cfg", "pyproject.toml")
LIMIT_S = 100.0
NOT_RUN = re.compile(r"<!-- not run: *(.*?) *-->$")
FENCE = re.compile(r"^( *)```(\S*)")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    line: int  # of its fence, from 1
    language: str
    text: str
    reason: str | None  # why it is not run; None: it is


def blocks(path: Path) -> list[Block]:
    """The fenced blocks of a Markdown file. Raises ValueError for a fence that is not closed."""
    found: list[Block] = []
    reason: str | None = None
    opened: tuple[int, str, str] | None = None  # line, indent, language
    body: list[str] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        fence = FENCE.match(line)
        if opened is None and fence:
            opened, body = (number, fence[1], fence[2]), []
        elif opened is not None and line.strip() == "```":
            found.append(Block(opened[0], opened[2], "\n".join(body) + "\n", reason))
            opened = reason = None
        elif opened is not None:
            body.append(line.removeprefix(opened[1]))
        elif line.strip():
            skipped = NOT_RUN.search(line.strip())
            reason = skipped[1] if skipped else None
    if opened is not None:
        raise ValueError(f"{path}:{opened[0]}: the fence is not closed")
    return found


def named_file(block: Block) -> str | None:
    """The file that a block's first line names."""
    found = re.match(r"# (\w[\w./-]*\.(?:py|yaml))\b", block.text)
    return found[1] if found else None


def run_bash(text: str) -> None:
    script = f"set -euo pipefail\n{text}"
    done = subprocess.run(["bash", "-c", script], stdin=subprocess.DEVNULL, timeout=LIMIT_S, env=environment())
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}")


def environment() -> dict[str, str]:
    """An environment with this Python's commands first on PATH, in which root and few cores are allowed."""
    others = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "SLURM_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', os.defpath)}"
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    few_cores = {
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "PRTE_MCA_hwloc_default_binding_policy": "none",
        "OMP_NUM_THREADS": "1",
        "PIP_NO_INDEX": "1",  # a page installs nothing
    }
    return {**kept, "PATH": path, **as_root, **few_cores}


def run_yaml(text: str) -> None:
    """Build the configuration and plan it for two ranks."""
    import yaml

    from fedmpi.config import load
    from fedmpi.plan import plan

    file = Path("block.yaml")
    file.write_text(text)
    values = yaml.safe_load(text)
    if not isinstance(values, dict):
        raise ValueError("no configuration: expected keys and values")
    if not {"data", "model"} <= values.keys():
        whole = yaml.safe_load((TOP / "configs/digits.yaml").read_text())
        file.write_text(yaml.safe_dump({**whole, **values}))
    config, origins = load(file)
    plan(config, origins, 2)


def run(block: Block, names: dict[str, Any]) -> None:
    file = named_file(block)
    if file is not None:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text(block.text)
    if block.language == "bash":
        run_bash(block.text)
    elif block.language == "yaml":
        run_yaml(block.text)
    elif file is None:
        exec(compile(block.text, "<block>", "exec"), names)
    else:
        # Registered under its name while it runs, because dataclasses look up their module.
        module = sys.modules[Path(file).stem] = types.ModuleType(Path(file).stem)
        exec(compile(block.text, file, "exec"), module.__dict__)


def main(page: Path) -> int:
    """Run a page's blocks; returns the exit code."""
    names: dict[str, Any] = {"__name__": "page"}
    page = page.resolve()
    with tempfile.TemporaryDirectory(prefix="page-", ignore_cleanup_errors=True) as folder:
        os.chdir(folder)
        for name in LINKED:
            if (TOP / name).exists():
                Path(name).symlink_to(TOP / name)
        activate = Path(".venv/bin/activate")
        activate.parent.mkdir(parents=True)
        activate.write_text("")
        sys.path.insert(0, "")
        for block in blocks(page):
            if block.language not in RUN or block.reason is not None:
                continue
            start = time.monotonic()
            try:
                run(block, names)
            except BaseException:
                traceback.print_exc()
                print(f"{page}:{block.line}: the {block.language} block fails", file=sys.stderr, flush=True)
                return 1
            print(f"{page}:{block.line}: {block.language}, {time.monotonic() - start:.1f} s", flush=True)
        os.chdir("/")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
