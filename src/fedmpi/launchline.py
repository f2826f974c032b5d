"""The launcher line of a supervised run: its hosts and number of ranks, and the same line for fewer hosts."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedmpi import disk
from fedmpi.errors import ConfigError

HOSTS = ("--host", "-host", "-H", "--hosts", "-hosts")
HOSTFILES = ("--hostfile", "-hostfile", "--machinefile", "-machinefile", "-f")
RANKS = ("-n", "-np", "--n", "--np", "--ntasks")
NODES = ("-N", "--nodes")  # of srun; of mpirun -N is the number of ranks per node


@dataclass(frozen=True)
class LaunchLine:
    """A launcher and its options, without the command that it starts.

    >>> line = LaunchLine.of(["mpirun", "-n", "6", "--host", "a:4,b:2"])
    >>> line.slots, line.num_ranks
    ({'a': 4, 'b': 2}, 6)
    >>> line.without({"b"}, Path("unused"))
    (['mpirun', '-n', '4', '--host', 'a:4'], 4)
    """

    words: tuple[str, ...]
    slots: Mapping[str, int]  # by host, in the line's order; empty if the line names no hosts
    num_ranks: int | None  # None if the line does not say
    of_job: bool = False  # whether the hosts are those of this SLURM job, and not in the line

    @classmethod
    def of(cls, words: Sequence[str]) -> LaunchLine:
        """Parse the words. Raises ConfigError for a hostfile that cannot be read."""
        slots: dict[str, int] = {}
        num_ranks = None
        for name, value in _options(words):
            found: list[tuple[str, int]] = []
            if name in HOSTS:
                found = [_host(text) for text in value.split(",") if text]
            elif name in HOSTFILES:
                found = [_host(text) for text in _lines(value)]
            elif name in RANKS and value.isdigit():
                num_ranks = int(value)
            for host, num in found:
                slots[host] = slots.get(host, 0) + num
        if not slots and words and os.path.basename(words[0]) in WHERE and (job := _job()):
            return cls(tuple(words), job, num_ranks or sum(job.values()), of_job=True)
        return cls(tuple(words), slots, num_ranks)

    def without(self, lost: Collection[str], hostfile: Path) -> tuple[list[str], int | None]:
        """The words and the number of ranks without the lost hosts; the remaining hosts go into `hostfile`, if one is
        used.

        There is at most one rank per slot; or, if the line has more ranks than slots, as many per slot as before.
        """
        left = sum(num for host, num in self.slots.items() if host not in lost)
        total = sum(self.slots.values())
        num_ranks = self.num_ranks
        if lost and num_ranks is not None:
            num_ranks = min(num_ranks, left) if num_ranks <= total else num_ranks * left // total
        words = list(self.words)
        for index, name, value in _places(self.words) if lost else ():
            if name in HOSTS:
                new = ",".join(text for text in value.split(",") if _host(text)[0] not in lost)
            elif name in HOSTFILES:
                kept = [text for text in _lines(value) if _host(text)[0] not in lost]
                disk.replace_text(hostfile, "".join(f"{text}\n" for text in kept))
                new = str(hostfile)
            elif name in RANKS and value.isdigit():
                new = str(num_ranks)
            elif name in NODES and self.of_job and _is_srun(self.words):
                new = str(len({*self.slots} - {*lost}))
            else:
                continue
            words[index] = words[index][: len(words[index]) - len(value)] + new  # also for --host=a,b
        if lost and self.of_job:
            some = {host: num for host, num in self.slots.items() if host not in lost}
            words[1:1] = WHERE[os.path.basename(words[0])](some, num_ranks or 0, hostfile)
        return words, num_ranks


def _on_nodes(slots: Mapping[str, int], num_ranks: int, hostfile: Path) -> list[str]:
    return [f"--nodelist={','.join(slots)}", f"--nodes={len(slots)}", f"--ntasks={num_ranks}"]


def _by_mpirun(slots: Mapping[str, int], num_ranks: int, hostfile: Path) -> list[str]:
    return ["--host", ",".join(f"{host}:{num}" for host, num in slots.items())]


def _by_hydra(slots: Mapping[str, int], num_ranks: int, hostfile: Path) -> list[str]:
    """For MPICH and Intel MPI. With -hosts and -f Intel MPI ignores the numbers and fills the cores of each host."""
    disk.replace_text(hostfile, "".join(f"{host}:{num}\n" for host, num in slots.items()))
    return ["-machinefile", str(hostfile)]


# Options of a launcher for some of the hosts of a SLURM job.
WHERE: dict[str, Callable[[Mapping[str, int], int, Path], list[str]]] = {
    "srun": _on_nodes,
    "mpirun": _by_mpirun,
    "mpiexec": _by_hydra,
}


def _job() -> dict[str, int]:
    """Tasks by node of the SLURM job that this process is in; none outside a job, or for a heterogeneous one."""
    nodes, tasks = (os.environ.get(name, "") for name in ("SLURM_JOB_NODELIST", "SLURM_TASKS_PER_NODE"))
    if not nodes or not tasks or "SLURM_HET_SIZE" in os.environ:
        return {}
    try:
        command = ["scontrol", "show", "hostnames", nodes]
        names = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return {}
    each = tasks_of(tasks)
    return dict(zip(names, each, strict=True)) if len(names) == len(each) else {}


def tasks_of(text: str) -> list[int]:
    """Tasks of each node, as SLURM writes them.

    >>> tasks_of("2(x3),1")
    [2, 2, 2, 1]
    """
    found: list[int] = []
    for part in text.split(","):
        num, _, times = part.partition("(x")
        found += [int(num)] * int(times.rstrip(")") or 1)
    return found


def _options(words: Sequence[str]) -> list[tuple[str, str]]:
    return [(name, value) for _, name, value in _places(words)]


def _is_srun(words: Sequence[str]) -> bool:
    return bool(words) and os.path.basename(words[0]) == "srun"


def _places(words: Sequence[str]) -> list[tuple[int, str, str]]:
    """Index of the word with the value, option name and value, for each option about hosts, nodes or ranks."""
    found = []
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if _is_srun(words) and (glued := re.fullmatch(r"(-[nN])(\d+)", word)):
            found.append((index, glued[1], glued[2]))
        elif name in (*HOSTS, *HOSTFILES, *RANKS, *NODES):
            if equals:
                found.append((index, name, value))
            elif index + 1 < len(words):
                found.append((index + 1, name, words[index + 1]))
    return found


def _lines(path: str) -> list[str]:
    try:
        lines = [line.partition("#")[0].strip() for line in Path(path).read_text().splitlines()]
    except OSError as error:
        raise ConfigError(f"hostfile {path}: {error.strerror or error}") from None
    return [line for line in lines if line]


def _host(text: str) -> tuple[str, int]:
    """Host and slots of an entry.

    >>> _host("node7 slots=4 max_slots=8"), _host("node7\\tslots = 2"), _host("node7:2"), _host("node7")
    (('node7', 4), ('node7', 2), ('node7', 2), ('node7', 1))
    """
    name, rest = [*text.split(None, 1), "", ""][:2]  # by a blank or a tab
    host, _, num = name.partition(":")
    said = re.search(r"\bslots\s*=\s*(\d+)", rest)
    return host, int(said[1]) if said else int(num) if num.isdigit() else 1


def own_command(words: Sequence[str]) -> tuple[str, ...] | None:
    """The arguments of `fedmpi train` in the line; None if the line has no such command.

    >>> own_command(["mpirun", "-n", "2", "/opt/bin/fedmpi", "train", "a.yaml", "rounds=3"])
    ('a.yaml', 'rounds=3')
    """
    for index, word in enumerate(words[:-1]):
        if os.path.basename(word) == "fedmpi" and words[index + 1] == "train":
            return tuple(words[index + 2 :])
    return None
