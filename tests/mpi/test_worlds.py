"""Ranks that do not belong together: a launcher and a library of different MPIs, other versions on one rank."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.mpi import FEDMPI, OTHER_MPIS, OTHERS, mpirun, other_mpi

from fedmpi.alike import mixed
from fedmpi.comm.started import RANKS, SIZES, is_first, launched
from fedmpi.comm.threads import on_ranks

TRAIN = (FEDMPI, "train", "a.yaml", "rounds=1", "device.name=cpu")
CONFIG = "data: {name: digits, silos: 2}\nlocal: {name: sgd, lr: 0.1, steps: 1}\nout: run\n"


def clean() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(OTHERS)}


def alone_folder(tmp_path: Path) -> Path:
    (tmp_path / "a.yaml").write_text(CONFIG)
    return tmp_path


def alone(tmp_path: Path, words: tuple[str, ...], **env: str) -> subprocess.CompletedProcess[str]:
    everything = {**clean(), **env}
    return subprocess.run(words, cwd=alone_folder(tmp_path), env=everything, capture_output=True, text=True, timeout=90)


@pytest.mark.parametrize("name", SIZES)
def test_every_launcher_says_how_many_ranks_it_started(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for other in (*SIZES, *RANKS):
        monkeypatch.delenv(other, raising=False)
    assert launched() == 0 and is_first()
    monkeypatch.setenv(name, "4")
    assert launched() == 4


@pytest.mark.parametrize("name", RANKS)
def test_every_launcher_says_which_rank_is_first(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for other in (*SIZES, *RANKS):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "2")
    assert not is_first()
    monkeypatch.setenv(name, "0")
    assert is_first()


@pytest.mark.parametrize("name", ["FLUX_JOB_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_a_world_of_one_is_refused_with_the_launch_line_that_is_right(tmp_path: Path, name: str) -> None:
    slurm = {"SLURM_JOB_ID": "1"} if name.startswith("SLURM") else {}
    done = alone(tmp_path, TRAIN, **{name: "4"}, **slurm)
    assert done.returncode == 2 and "the launcher started 4 ranks but MPI sees 1: " in done.stderr, done.stderr
    library = done.stderr.split("the library is ")[1]
    right = "`mpirun -n 4` of the same MPI" if library.startswith("Open MPI") else "`mpiexec -n 4` of the same MPI"
    pmi = "pmix" if library.startswith("Open MPI") else "pmi2"
    assert library.split(": start it by ")[1].strip() == (f"`srun --mpi={pmi}` or {right}" if slurm else right)
    assert not (tmp_path / "run").exists()


def test_worlds_of_one_by_a_launcher_that_gives_only_ranks_are_refused(tmp_path: Path) -> None:
    """prterun sets no variable for the number of ranks."""
    done = alone(tmp_path, TRAIN, PMIX_RANK="1")
    assert done.returncode == 2 and "the launcher started at least 2 ranks but MPI sees 1: " in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mpi", OTHER_MPIS)
def test_the_launcher_of_another_mpi_is_refused_in_one_line(tmp_path: Path, mpi: str) -> None:
    other_mpi(mpi)  # or skip
    done = alone(tmp_path, (f"{sys.prefix}/{mpi}/bin/mpiexec", "-n", "2", *TRAIN))
    assert done.returncode == 2 and done.stderr.count("fedmpi: ") == 1, done.stderr
    assert "the launcher started 2 ranks but MPI sees 1: " in done.stderr
    assert "the library is Open MPI v" in done.stderr and "start it by `mpirun -n 2` of the same MPI" in done.stderr


def test_open_mpis_launcher_with_intels_library_is_refused_in_one_line(tmp_path: Path) -> None:
    """MPICH under Open MPI's mpirun ends by itself, with an error of its own."""
    done = mpirun(2, *TRAIN, cwd=alone_folder(tmp_path), env={"MPI4PY_LIBMPI": other_mpi("impi")["MPI4PY_LIBMPI"]})
    assert done.rc == 2 and done.err.count("fedmpi: ") == 1, done.tails
    assert "the launcher started 2 ranks but MPI sees 1: " in done.err
    assert "the library is Intel(R) MPI Library 20" in done.err and "start it by `mpiexec -n 2` of the same" in done.err


def test_versions_are_compared_without_the_kind_of_build() -> None:
    one = {"fedmpi": "1", "torch": "2.8.0", "numpy": "2.1", "python": "3.11.7"}
    same = [one, one | {"torch": "2.8.0+cu128"}, one | {"python": "3.12.0"}]
    assert on_ranks(3, lambda comm: mixed(comm, same[comm.rank])) == [""] * 3
    other = [one, one, one | {"torch": "2.7.1+cpu", "numpy": "2.0"}]
    told = on_ranks(3, lambda comm: mixed(comm, other[comm.rank]))
    assert len(set(told)) == 1 and told[0].startswith(
        "versions differ: rank 0 against rank 2: torch is 2.8.0 on rank 0 "
    )
    assert "and 2.7.1 on rank 2 (" in told[0] and "numpy is 2.1 on rank 0 and 2.0 on rank 2 (" in told[0]


def test_another_version_on_one_rank_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(CONFIG)
    folder = tmp_path / "other/torch-9.8.7.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.8.7\n")
    line = f'[ $OMPI_COMM_WORLD_RANK = 0 ] || export PYTHONPATH="{tmp_path}/other:$PYTHONPATH"; exec "$@"'
    done = mpirun(2, "sh", "-c", line, "sh", *TRAIN, cwd=tmp_path)
    assert done.rc == 2 and "versions differ: rank 0 against rank 1: torch is " in done.err, done.tails
    assert " and 9.8.7 on rank 1 (" in done.err and not (tmp_path / "run/checkpoints").exists()
