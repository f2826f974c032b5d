"""The ways to start ranks under SLURM: which one fits an MPI library."""

import sys

import pytest

from fedmpi import starters
from fedmpi.errors import ConfigError
from fedmpi.starters import STARTERS, belongs, choose, commands, family, here, right

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
        (INTEL, ALL, BOTH, "mpiexec"),
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
        ("mpirun", OPEN_MPI, ALL, (), "launcher 'mpirun': there is no mpirun of Open MPI on PATH"),
        ("", OPEN_MPI, ("none",), (), "no launcher for Open MPI: it takes srun --mpi=pmix or mpirun; srun has none"),
        ("", "Other MPI", ALL, BOTH, "no launcher for the MPI library: it takes one of your site"),
    ],
)
def test_a_way_that_would_start_worlds_of_one_is_refused(name, library, plugins, commands, says):
    with pytest.raises(ConfigError) as caught:
        choose(name, library, plugins, commands)
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


def test_intel_mpi_joins_ranks_of_srun_by_slurms_library(monkeypatch):
    monkeypatch.delenv("I_MPI_PMI_LIBRARY", raising=False)
    with pytest.raises(ConfigError, match="launcher 'pmi2': Intel MPI needs I_MPI_PMI_LIBRARY"):
        choose("pmi2", INTEL, ALL, BOTH)
    monkeypatch.setenv("I_MPI_PMI_LIBRARY", "/usr/lib/libpmi2.so")
    assert choose("", INTEL, ALL, BOTH)[0].name == choose("pmi2", INTEL, ALL, BOTH)[0].name == "pmi2"


def test_a_message_names_the_right_launch_line():
    assert right(OPEN_MPI, 4, slurm=True) == "`srun --mpi=pmix` or `mpirun -n 4` of the same MPI"
    assert right(INTEL, 3, slurm=False) == "`mpiexec -n 3` of the same MPI"
    assert right("Other", 3, slurm=False) == "the launcher that belongs to it"
    assert [one.line(2).split()[0] for one in STARTERS.values()] == ["srun", "srun", "srun", "mpirun", "mpiexec"]
    assert [family(text) for text in (OPEN_MPI, MPICH, INTEL, CRAY)] == ["Open MPI", "MPICH", "Intel MPI", "Cray MPICH"]


@pytest.mark.parametrize(
    ("version", "library", "fits"),
    [
        ("mpirun (Open MPI) 5.0.11", OPEN_MPI, True),
        ("mpiexec (Open MPI) 5.0.11", MPICH, False),
        ("prterun (PRRTE) 3.0.13", INTEL, False),
        ("HYDRA build details:\n    Version: 5.0.2", MPICH, True),
        ("HYDRA build details:\n    Version: 5.0.2", INTEL, True),
        ("HYDRA build details:\n    Version: 5.0.2", OPEN_MPI, False),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.19.0 Build 20260929", INTEL, True),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.19.0 Build 20260929", OPEN_MPI, False),
        ("mpiexec version 1.2.12 of a site", CRAY, True),
        ("", MPICH, True),
    ],
)
def test_a_command_says_of_which_mpi_it_is(version, library, fits):
    assert belongs(version, library) is fits


def put(path, version):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{version}'\n")
    path.chmod(0o755)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A virtual environment with Open MPI's commands, and a module with MPICH's."""
    for name in ("mpirun", "mpiexec"):
        put(tmp_path / "venv/bin" / name, f"{name} (Open MPI) 5.0.11")
        put(tmp_path / "my module/bin" / name, "HYDRA build details:")
        put(tmp_path / "module/bin" / name, "HYDRA build details:")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    monkeypatch.setattr(starters, "plugins", list)
    monkeypatch.setenv("PATH", f"{tmp_path}/venv/bin:{tmp_path}/module/bin")
    commands.cache_clear()
    yield tmp_path
    commands.cache_clear()


def test_the_command_of_another_mpi_that_is_first_on_path_is_passed_over(place, monkeypatch, capsys):
    assert commands(OPEN_MPI) == {"mpirun": "mpirun", "mpiexec": "mpiexec"}
    assert commands(MPICH) == {name: f"{place}/module/bin/{name}" for name in ("mpirun", "mpiexec")}
    monkeypatch.setattr(starters, "library", lambda: MPICH)
    for words in (["4"], ["4", "mpiexec"], ["4", "no-srun"]):
        starters.main(words)
        assert capsys.readouterr().out.splitlines()[0] == f"{place}/module/bin/mpiexec -n 4"
    assert here("mpiexec").line(2) == f"{place}/module/bin/mpiexec -n 2"


def test_a_path_that_scripts_would_split_is_refused(place, monkeypatch):
    monkeypatch.setenv("PATH", f"{place}/my module/bin")
    monkeypatch.setattr(starters, "library", lambda: MPICH)
    with pytest.raises(ConfigError, match="launcher 'mpiexec': a blank is in its path"):
        here("mpiexec")


def test_without_a_command_of_the_library_none_is_taken(place, monkeypatch, capsys):
    monkeypatch.setenv("PATH", f"{place}/venv/bin")
    monkeypatch.setattr(starters, "library", lambda: MPICH)
    with pytest.raises(SystemExit) as refused:
        starters.main(["4", "mpiexec"])
    assert refused.value.code == 2 and "there is no mpiexec of MPICH on PATH" in capsys.readouterr().err
