"""`fedmpi slurm`: a batch script for a run, from the numbers of its plan. Written on a login node, without MPI."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedmpi.config import Config
from fedmpi.errors import ConfigError
from fedmpi.output import size
from fedmpi.starters import STARTERS, Starter

STOP_S = 120  # seconds from the signal to the time limit, besides writing a checkpoint
DISK_BYTES_S = 50e6  # of a slow parallel file system
HEADROOM = 1.5  # memory asked for / memory of the plan
RANK_BYTES = 256 << 20  # besides: what MPI takes on a rank


@dataclass(frozen=True)
class Request:
    """What the job asks SLURM for."""

    nodes: int
    time: str  # as SLURM writes it: minutes, H:MM:SS, D-HH:MM:SS
    gpus_per_node: int = 0
    ranks_per_node: int | None = None  # None: one per GPU, or one
    cpus_per_rank: int | None = None
    mem: str = ""  # of a node, such as 64G; empty: from the plan
    partition: str = ""
    account: str = ""
    more: tuple[str, ...] = ()  # further options of sbatch

    @property
    def tasks_per_node(self) -> int:
        """Ranks of a node."""
        return self.ranks_per_node or self.gpus_per_node or 1

    @property
    def num_ranks(self) -> int:
        """Ranks of the job."""
        return self.nodes * self.tasks_per_node


def seconds(time: str) -> int:
    """Seconds of a time limit as SLURM writes it. Raises ConfigError.

    >>> seconds("90"), seconds("8:00:00"), seconds("1-12"), seconds("2:30"), seconds("1-00:00:01")
    (5400, 28800, 129600, 150, 86401)
    """
    days, dash, rest = time.rpartition("-")
    parts = rest.split(":")
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", time):
        raise ConfigError(f"--time {time}: write minutes, H:MM:SS or D-HH:MM:SS")
    numbers = [int(part) for part in parts]
    # D-HH:MM:SS from the left; without days MM, MM:SS or HH:MM:SS
    units = [3600, 60, 1] if dash or len(numbers) == 3 else [60, 1]
    return int(days or 0) * 86400 + sum(n * unit for n, unit in zip(numbers, units, strict=False))


def num_bytes(mem: str) -> int:
    """Bytes of an amount of memory as SLURM writes it: MiB, or with K, M, G, T. Raises ConfigError.

    >>> num_bytes("64G") == 64 << 30, num_bytes("512") == 512 << 20
    (True, True)
    """
    match = re.fullmatch(r"(\d+)([KMGT]?)B?", mem, re.IGNORECASE)
    if match is None:
        raise ConfigError(f"--mem {mem}: write a number with K, M, G or T, such as 64G")
    return int(match[1]) << {"K": 10, "": 20, "M": 20, "G": 30, "T": 40}[match[2].upper()]


def needed_bytes(planned: Mapping[str, Any], tasks_per_node: int) -> int:
    """Memory of the node that needs most, with headroom; without samples of silos that declare no number of them."""
    ranks = planned["ranks"]
    each = [row["memory_bytes"] * HEADROOM + RANK_BYTES for row in ranks]
    return int(max(sum(each[first : first + tasks_per_node]) for first in range(0, len(each), tasks_per_node)))


def no_memory(planned: Mapping[str, Any], request: Request) -> str:
    """Why the script asks for no memory; empty if it does."""
    if request.mem or not planned["undeclared"]:
        return ""
    ids, least = planned["undeclared"], size(needed_bytes(planned, request.tasks_per_node))
    whose = f"silo '{ids[0]}' declares" if len(ids) == 1 else f"silo '{ids[0]}' and {len(ids) - 1} more declare"
    return (
        f"the script has no --mem, so the site's default holds: {whose} no num_samples; "
        f"declare it, or give --mem, {least} a node and room for the samples"
    )


def signal_s(planned: Mapping[str, Any]) -> int:
    """Seconds before the time limit at which the job is told to stop."""
    return STOP_S + math.ceil(float(planned["checkpoint_bytes"]) / DISK_BYTES_S)


def refuse(config: Config, request: Request, num_silos: int) -> None:
    """Raise ConfigError if the run cannot use what the request asks for."""
    ranks, dedicated = request.num_ranks, config.server.dedicated
    if ranks > num_silos + dedicated:
        most = f"{num_silos} silos" + (" and a dedicated server" if dedicated else "")
        raise ConfigError(
            f"--nodes {request.nodes} with {request.tasks_per_node} ranks each: {ranks} ranks for {most}, so "
            f"{ranks - num_silos - dedicated} would have nothing to do; ask for {num_silos + dedicated} ranks or fewer"
        )
    gpus = request.gpus_per_node
    if gpus and config.device.name == "cpu":
        raise ConfigError(f"--gpus-per-node {gpus}: the configuration says device.name: cpu")
    if not gpus and config.device.name == "cuda":
        raise ConfigError("the configuration says device.name: cuda; give --gpus-per-node")
    if gpus and request.tasks_per_node > gpus and not config.device.share:
        raise ConfigError(
            f"--ranks-per-node {request.tasks_per_node}: more ranks than the {gpus} GPUs of a node; "
            "set device.share=true, or start fewer"
        )


def script(
    config: Config,
    command: Sequence[str],
    planned: Mapping[str, Any],
    request: Request,
    starter: Starter,
    folder: str,
    environment: str,
) -> str:
    """The batch script. `command` is the configuration and its overrides; the job runs in `folder`, with the virtual
    environment `environment`. Raises ConfigError for a request that the run cannot use."""
    refuse(config, request, planned["silos"])
    lead_s, limit_s = signal_s(planned), seconds(request.time)
    if limit_s < 2 * lead_s:
        raise ConfigError(
            f"--time {request.time}: the job stops {lead_s} s before its limit, to write a checkpoint; "
            f"ask for {math.ceil(2 * lead_s / 60)} minutes or more"
        )
    needs = needed_bytes(planned, request.tasks_per_node)
    known = not planned["undeclared"]
    if request.mem and num_bytes(request.mem) < needs:
        besides = "" if known else ", besides samples of silos that declare no num_samples"
        ranks = f"{request.tasks_per_node} rank{'s' if request.tasks_per_node > 1 else ''}"
        raise ConfigError(f"--mem {request.mem}: the plan needs {size(needs)} a node ({ranks}){besides}")
    hosts = sorted(set(planned["pinned"].values()))
    for option in request.more:
        if option.startswith("--signal") and not re.match(r"--signal[= ]B:(USR1|SIGUSR1|10)\b", option):
            raise ConfigError(
                f"--sbatch {option}: the script stops on --signal=B:USR1@SECONDS, with B:, and on no other"
            )
    if len(hosts) > request.nodes:
        raise ConfigError(f"--nodes {request.nodes}: silos are pinned to {len(hosts)} hosts: {', '.join(hosts)}")
    options = [
        f"--job-name=fedmpi-{re.sub(r'[^A-Za-z0-9_.-]', '-', config.out.rstrip('/').rpartition('/')[2])}",
        f"--nodes={request.nodes}",
        f"--ntasks-per-node={request.tasks_per_node}",
        *([f"--gpus-per-node={request.gpus_per_node}"] if request.gpus_per_node else []),
        *([f"--cpus-per-task={request.cpus_per_rank}"] if request.cpus_per_rank else []),
        *([f"--mem={request.mem or _mib(needs)}"] if request.mem or known else []),
        f"--time={request.time}",
        *([f"--partition={request.partition}"] if request.partition else []),
        *([f"--account={request.account}"] if request.account else []),
        *([f"--nodelist={','.join(hosts)}"] if hosts else []),
        f"--signal=B:USR1@{lead_s}",
        "--requeue",
        "--open-mode=append",
        "--output=%x-%j.log",
        *request.more,
    ]
    memory = f"{size(needs)} a node" + ("" if known else ", besides samples of silos that declare no num_samples")
    out = config.out if config.out.isprintable() else repr(config.out)  # a line break would end the comment
    about = [
        f"{request.num_ranks} ranks for {planned['silos']} silos, {config.rounds} rounds, into {out}",
        f"memory: {memory}; disk: {planned['checkpoints_kept']} checkpoints of {size(planned['checkpoint_bytes'])}",
        f"{lead_s} s before the time limit all ranks stop with a checkpoint, and the job is requeued and resumes",
    ]
    others = [one for one in STARTERS.values() if one.name != starter.name]
    return _TEXT.format(
        options="\n".join(f"#SBATCH {_directive(option)}" for option in options),
        about="\n".join(f"# {line}" for line in about),
        folder=shlex.quote(folder),
        environment=shlex.quote(environment),
        ranks=request.num_ranks,
        threads=f"export OMP_NUM_THREADS={cores} SRUN_CPUS_PER_TASK={cores}\n"
        if (cores := request.cpus_per_rank)
        else "",
        launcher=_launcher(starter, request.num_ranks),
        others="\n".join(f"# {_launcher(one, request.num_ranks)}" for one in others),
        command=" ".join(shlex.quote(word) for word in command),
    )


def _directive(option: str) -> str:
    """What stands behind #SBATCH for an option, or several. A value is quoted where sbatch would end it at a blank or a
    `#`, unless it is quoted already. Raises ConfigError for a line break.

    >>> _directive("--comment=two words"), _directive("-C a&b"), _directive("--mem=0 --exclusive")
    ("--comment='two words'", "-C 'a&b'", '--mem=0 --exclusive')
    """
    if not option.isprintable():
        raise ConfigError(f"an option of sbatch has a character that is not printable: {option!r}")
    parts = []
    for part in re.split(r"\s+(?=--?[A-Za-z])", option.strip()):
        name = re.match(r"(--?[\w-]+(=|\s+|$))?", part)[0]  # type: ignore[index]
        value = part[len(name) :]
        if value and not re.fullmatch(r"(['\"]).*\1", value):
            value = shlex.quote(value.replace("\\", r"\\"))  # sbatch takes a backslash away, inside of quotes, too
        parts.append(name + value)
    return " ".join(parts)


def _launcher(starter: Starter, num_ranks: int) -> str:
    return f'launcher="{starter.line(num_ranks)}" # {", ".join(starter.families)}'


def _mib(amount: int) -> str:
    return f"{math.ceil(amount / 2**20)}M"


_TEXT = """\
#!/usr/bin/env bash
{about}
{options}
set -eo pipefail

cd {folder}
# Load here the modules of your MPI, before the environment:
# module load openmpi
export PATH={environment}/bin:$PATH

# The launcher has to fit the MPI; fedmpi compares its world with this number of ranks, and refuses worlds of one.
export FEDMPI_RANKS={ranks}
{threads}{launcher}
# The others, for other MPI libraries:
{others}

# USR1 comes before the time limit: the supervisor passes it on, and the ranks stop at the next batch.
pid="" usr1=0 term=0 passed_on=""
stop() {{ # once, because a second signal would kill the ranks
  [ -n "$pid" ] && [ -z "$passed_on" ] || return 0
  passed_on=1
  kill -USR1 "$pid" 2>/dev/null || true
}}
trap 'usr1=1; stop' USR1
trap 'term=1; stop' TERM # scancel

# Where the run is; asked before the ranks start, because after a stop little time is left.
root=$(python -m fedmpi.requeues where {command})
code=138 # as if a signal had killed it
if [ $usr1$term = 00 ]; then
  # shellcheck disable=SC2086 # words
  fedmpi run {command} -- $launcher &
  pid=$!
  [ $usr1$term = 00 ] || stop # a signal arrived before there was a pid
  while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done # each signal interrupts one wait
  code=0
  wait "$pid" || code=$?
fi

# 3: stopped with a checkpoint; 138: the signal came before fedmpi listened, 1: before the first checkpoint.
saved() {{
  [ -n "$(find "$root/checkpoints" -path '*/round-*/manifest.json' -print -quit 2>/dev/null)" ]
}}
too_early() {{
  [ $code = 138 ] || {{ [ $code = 1 ] && ! saved; }}
}}

# At most 3 requeues in a row without a newer checkpoint. None after scancel; SLURM would requeue a cancelled job.
if [ $usr1$term = 10 ] && {{ [ $code = 3 ] || too_early; }} &&
  python -m fedmpi.requeues may 3 "$root" && [ $term = 0 ]; then
  echo "stopped on request, requeueing" >&2
  # The last task of an array has the array's own id; requeueing that would restart all tasks.
  if scontrol requeue "${{SLURM_ARRAY_TASK_ID:+${{SLURM_ARRAY_JOB_ID}}_}}${{SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}}"; then
    exit 0
  fi
  echo "SLURM does not requeue this job; submit it again to resume" >&2
fi
exit $code
"""
