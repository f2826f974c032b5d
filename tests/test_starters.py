"""The ways to start ranks under SLURM: which one fits an MPI library."""

import pytest

from fedmpi.errors import ConfigError
from fedmpi.starters import STARTERS, choose, family, right

OPEN_MPI = "Open MPI v5.0.11, package: Open MPI root@host Distribution, ident: 5.0.11, repo rev: v5.0.11\0"
MPICH = "MPICH Version:      5.0.2\nMPICH Release date: ...\n"
INTEL = "Intel(R) MPI Library 2021.17 for Linux* OS\n"
CRAY = "MPI VERSION    : CRAY MPICH version 8.1.29.10 (ANL base 3.4a2)\n"
ALL, BOTH = ("none", "pmi2", "pmix", "cray_shasta"), ("mpirun", "mpiexec")


@pytest.mark.parametrize(
    ("library", "plugins", "commands", "expected"),
    [
        (OPEN_MPI, ALL, BOTH, "pmix"),
        (OPEN_MPI, ("none", "pmi2"), BOTH, "mpirun"),
        (MPICH, ALL, BOTH, "pmi2"),
        (MPICH, ("none", "pmix"), BOTH, "mpiexec"),
        (INTEL, ("pmix",), BOTH, "mpiexec"),
        (CRAY, ALL, (), "cray_shasta"),
        (CRAY, ("none", "pmi2"), (), "pmi2"),
    ],
)
def test_the_first_way_that_fits_the_library_is_taken(library, plugins, commands, expected):
    assert choose("", library, plugins, commands)[0].name == expected


@pytest.mark.parametrize(
    ("name", "library", "plugins", "commands", "says"),
    [
        ("pmi2", OPEN_MPI, ALL, BOTH, "launcher 'pmi2' does not start ranks of Open MPI; take 'pmix' or 'mpirun'"),
        ("mpirun", MPICH, ALL, BOTH, "launcher 'mpirun' does not start ranks of MPICH; take 'pmi2' or 'mpiexec'"),
        ("pmix", OPEN_MPI, ("none",), BOTH, "launcher 'pmix': srun has no --mpi=pmix"),
        ("mpirun", OPEN_MPI, ALL, (), "launcher 'mpirun': there is no mpirun on PATH"),
        ("", OPEN_MPI, ("none",), (), "no launcher for Open MPI: it takes srun --mpi=pmix or mpirun; srun has none"),
        ("", "Other MPI", ALL, BOTH, "no launcher for the MPI library: it takes one of your site"),
    ],
)
def test_a_way_that_would_start_worlds_of_one_is_refused(name, library, plugins, commands, says):
    with pytest.raises(ConfigError) as caught:
        choose(name, library, plugins, commands)
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


def test_a_message_names_the_right_launch_line():
    assert right(OPEN_MPI, 4, slurm=True) == "`srun --mpi=pmix` or `mpirun -n 4` of the same MPI"
    assert right(INTEL, 3, slurm=False) == "`mpiexec -n 3` of the same MPI"
    assert right("Other", 3, slurm=False) == "the launcher that belongs to it"
    assert [one.line(2).split()[0] for one in STARTERS.values()] == ["srun", "srun", "srun", "mpirun", "mpiexec"]
    assert [family(text) for text in (OPEN_MPI, MPICH, INTEL, CRAY)] == ["Open MPI", "MPICH", "Intel MPI", "Cray MPICH"]
