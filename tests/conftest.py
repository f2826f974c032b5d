"""What pytest needs to know before it collects, and what test files share."""

import os
from pathlib import Path

import pytest
from mpi import absent
from programs.place import Place

# Programs that the MPI tests launch; they are run on ranks, not collected.
collect_ignore_glob = ["programs/*"]


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of two workers one launches ranks, from the start: two launches at once would only be in each other's way. The
    other one does the rest, file by file, for launches within a file are shared."""

    def launches(item: pytest.Item) -> bool:
        return item.path.name.startswith(("test_mpi_", "test_slurm"))

    for item in items:
        item.add_marker(pytest.mark.xdist_group("ranks" if launches(item) else str(item.path)))
    items.sort(key=lambda item: not launches(item))


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A folder in which `mpirun fedmpi train config.yaml` works."""
    return Place(tmp_path_factory.mktemp("command"))


@pytest.fixture(scope="session")
def undisturbed(place: Place) -> str:
    """SHA-256 of the run that nothing happens to; it lies in `undisturbed`, with checkpoints of its last rounds."""
    done = place.train(2, "undisturbed", "checkpoint.every=1")
    assert done.rc == 0, done.tails
    return place.sha("undisturbed")


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the real data; without it the test is skipped, or fails where data is required."""
    folder = Path(os.environ.get("FEDMPI_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not (folder / "heart_disease").is_dir():
        absent("data", f"no datasets in {folder}; FEDMPI_DATA names their folder")
    return folder
