"""The ways to start MPI ranks under SLURM, and which one fits the MPI library that mpi4py loads.

A launcher of one MPI and the library of another start N worlds of one rank. So a launcher is chosen by the library:

    python -m fedmpi.starters RANKS            # prints the launcher line for this allocation, and why
    python -m fedmpi.starters RANKS mpirun     # the named one; refused if it does not fit
    python -m fedmpi.starters RANKS no-srun    # mpirun or mpiexec, also inside a SLURM job
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from fedmpi.errors import ConfigError

# A dead rank ends the others after 30 s. --kill-on-bad-exit=1 would do so at once, but also to ranks that are about to
# exit 3 when the first one has, and srun's exit code would not distinguish a stop from a failure.
SRUN = "srun --kill-on-bad-exit=0 --wait=30"
ASK_S = 60.0  # limit of a question to a command
INTEL_PMI = "I_MPI_PMI_LIBRARY"


@dataclass(frozen=True)
class Starter:
    """One way to start ranks.

    >>> STARTERS["mpirun"].line(8), STARTERS["pmix"].line(8)
    ('mpirun -n 8', 'srun --kill-on-bad-exit=0 --wait=30 --mpi=pmix')
    """

    name: str
    words: str
    families: tuple[str, ...]  # of MPI libraries that join its ranks to one world
    plugin: str = ""  # of srun, that it needs

    def line(self, num_ranks: int) -> str:
        """The launcher line, without the command that it starts."""
        return self.words if self.plugin else f"{self.words} -n {num_ranks}"


STARTERS = {
    one.name: one
    for one in (
        Starter("pmix", f"{SRUN} --mpi=pmix", ("Open MPI",), "pmix"),
        Starter("cray_shasta", f"{SRUN} --mpi=cray_shasta", ("Cray MPICH",), "cray_shasta"),
        Starter("pmi2", f"{SRUN} --mpi=pmi2", ("MPICH", "Intel MPI", "MVAPICH", "Cray MPICH"), "pmi2"),
        Starter("mpirun", "mpirun", ("Open MPI",)),
        Starter("mpiexec", "mpiexec", ("MPICH", "Intel MPI", "MVAPICH", "Cray MPICH")),
    )
}
COMMANDS = tuple(one.name for one in STARTERS.values() if not one.plugin)


def family(library: str) -> str:
    """The family of an MPI library by the text that it gives as its version; empty if it is none of them.

    >>> family("Open MPI v5.0.11, package: x"), family("MPICH Version: 4.3.2"), family("Intel(R) MPI Library 2021.17")
    ('Open MPI', 'MPICH', 'Intel MPI')
    >>> family("MPI VERSION    : CRAY MPICH version 8.1.29.10 (ANL base 3.4a2)"), family("ParaStation")
    ('Cray MPICH', '')
    """
    for pattern, name in (
        (r"Open MPI", "Open MPI"),
        (r"Intel\(R\) MPI", "Intel MPI"),
        (r"CRAY MPICH", "Cray MPICH"),
        (r"MVAPICH", "MVAPICH"),
        (r"MPICH", "MPICH"),
    ):
        if re.search(pattern, library):
            return name
    return ""


def fitting(library: str) -> list[Starter]:
    """The starters for a library, srun's first."""
    return [one for one in STARTERS.values() if family(library) in one.families]


def choose(name: str, library: str, plugins: Collection[str], commands: Collection[str]) -> tuple[Starter, str]:
    """The named starter, or for "" the first that fits, and why. `plugins` are srun's, `commands` those on PATH. Raises
    ConfigError if it does not fit.

    >>> choose("", "Open MPI v5.0.11", ["none", "pmix"], ["mpirun"])[0].name
    'pmix'
    >>> choose("", "MPICH Version: 5.0.2", ["none", "pmix"], ["mpiexec"])[0].name
    'mpiexec'
    """
    able = fitting(library)
    known = family(library) or "the MPI library"
    ready = [one for one in able if (one.plugin in plugins if one.plugin else one.name in commands)]
    if known == "Intel MPI" and not os.environ.get(INTEL_PMI):  # without it, ranks of srun are worlds of one
        if name == "pmi2":
            raise ConfigError(f"launcher 'pmi2': Intel MPI needs {INTEL_PMI}, the path of SLURM's libpmi2.so")
        ready = [one for one in ready if one.name != "pmi2"]
    if name:
        one = STARTERS[name]
        if one not in able:
            right = " or ".join(repr(other.name) for other in able) or "the launcher of your site"
            raise ConfigError(f"launcher '{name}' does not start ranks of {known}; take {right}")
        if one not in ready:
            what = f"srun has no --mpi={one.plugin}" if one.plugin else f"there is no {name} of {known} on PATH"
            raise ConfigError(f"launcher '{name}': {what}")
        return one, f"{known}, as asked"
    if not ready:
        has = ", ".join(sorted(plugins)) or "nothing"
        need = " or ".join(f"srun --mpi={one.plugin}" if one.plugin else one.name for one in able)
        raise ConfigError(f"no launcher for {known}: it takes {need or 'one of your site'}; srun has {has}")
    about = f"srun has {ready[0].plugin}" if ready[0].plugin else "not by srun, which has no plugin for it"
    return ready[0], f"{known}, {about}" if plugins else known


def right(library: str, num_ranks: int, slurm: bool) -> str:
    """The launcher lines for a library, for an error message; under SLURM srun's are among them."""
    some = [one for one in fitting(library) if slurm or not one.plugin]
    lines = [f"`srun --mpi={one.plugin}`" if one.plugin else f"`{one.line(num_ranks)}` of the same MPI" for one in some]
    return " or ".join(lines) or "the launcher that belongs to it"


def here(name: str) -> Starter:
    """The named starter, or for "" the one for the MPI library that mpi4py loads here. Raises ConfigError for a name
    that is none or does not fit. Where this machine has no srun, the batch nodes' plugins are not known, and the first
    that fits is taken."""
    if name and name not in STARTERS:
        raise ConfigError(f"launcher '{name}' is none of {', '.join(STARTERS)}")
    text = library()
    has = plugins() or ["pmix", "pmi2"]
    return at(choose(name, text, has, COMMANDS)[0], commands(text))


def at(one: Starter, commands: Mapping[str, str]) -> Starter:
    """The starter with the path of its command, where it is not the first on PATH. Raises ConfigError for a path that
    scripts cannot split."""
    path = commands.get(one.name, one.words)
    if one.plugin or path == one.words:
        return one
    if len(path.split()) > 1:
        raise ConfigError(f"launcher '{one.name}': a blank is in its path, {path}; put its folder first on PATH")
    return replace(one, words=path)


def library() -> str:
    """The text that the MPI library gives as its version; MPI is not initialised. Raises ConfigError without one."""
    ask = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"
    try:
        done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, timeout=ASK_S)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"mpi4py has not loaded an MPI library within {ASK_S:.0f} s") from None
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise ConfigError(f"no MPI library for mpi4py: {' '.join(last)}")
    return done.stdout


def plugins() -> list[str]:
    """The MPI plugins of this machine's srun; none if there is no srun."""
    if shutil.which("srun") is None:
        return []
    done = subprocess.run(["srun", "--mpi=list"], capture_output=True, text=True, timeout=ASK_S)
    return re.findall(r"\b(?:none|pmi2|pmix|cray_shasta)\b", done.stdout + done.stderr) if not done.returncode else []


def belongs(version: str, library: str) -> bool:
    """Whether an mpirun or mpiexec that says this of its version starts ranks of the library. One that says nothing
    known may.

    >>> belongs("mpiexec (Open MPI) 5.0.11", "MPICH Version: 5"), belongs("HYDRA build details:", "MPICH Version: 5")
    (False, True)
    """
    if re.search(r"Open ?MPI|Open ?RTE|PRRTE", version):
        return family(library) == "Open MPI"
    if re.search(r"HYDRA|Intel\(R\) MPI", version):  # each starts ranks of the other's library, too
        return family(library) in ("MPICH", "Intel MPI", "MVAPICH")
    return True


@functools.cache
def commands(library: str) -> dict[str, str]:
    """The mpirun and mpiexec that start ranks of the library: the name if it is the first on PATH, else the path of a
    later one, as where a virtual environment has the mpiexec of another MPI. Scripts put the environment first."""
    found = {}
    for name in COMMANDS:
        there = (shutil.which(name, path=folder) for folder in (f"{sys.prefix}/bin", *os.get_exec_path()))
        for number, path in enumerate(dict.fromkeys(path for path in there if path)):
            if belongs(_version(path), library):
                found[name] = path if number else name
                break
    return found


@functools.cache
def _version(path: str) -> str:
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=ASK_S)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr


def main(words: list[str]) -> None:
    """Print the launcher line, then why."""
    name = words[1] if len(words) > 1 else ""
    try:
        text = library()
        has = [] if name == "no-srun" else plugins()
        one, why = choose("" if name == "no-srun" else name, text, has, commands(text))
        one = at(one, commands(text))
    except ConfigError as error:
        print(f"fedmpi: {error}; FEDMPI_LAUNCHER may be a command of your own", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    print(one.line(int(words[0])), why, sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
