"""Test markers, the order of test files, and fixtures that several files share."""

import gc
import importlib.util
import os
import signal
import sys
import types
from collections.abc import Callable, Collection, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import mpi
from support.mpi import ENVIRONMENT, FAST, absent
from support.programs.place import Place

# Programs that MPI tests launch on ranks; pytest does not collect them.
collect_ignore_glob = ["support/programs/*"]
# Processes that start MPI without mpirun, this one too.
os.environ.setdefault("OMPI_MCA_btl", ENVIRONMENT["OMPI_MCA_btl"])


# Files that keep the cores busy with ranks for minutes.
LAUNCHES = (
    *("mpi/test_command.py", "mpi/test_overlap.py", "mpi/test_training.py", "mpi/test_regions.py"),
    "examples/test_examples.py",
)
# Files that mostly wait.
SLEEPS = ("mpi/test_slurm.py", "mpi/test_stop.py")
# What a test needs, by its fixtures and by its file.
FIXTURES = {"place": "mpi", "undisturbed": "mpi", "slurm": "slurm", "root": "data", "text_at_hand": "data"}
FILES = {"mpi/test_testbed.py": "netns", "mpi/test_multihost.py": "netns"}
# Files of whole runs and processes: a tenth of the tests, but half of the time.
RUNS = tuple(
    f"/test_{name}.py"
    for name in (
        *(
            "buffered_jobs",
            "delayed_jobs",
            "ends",
            "experiments",
            "gpu",
            "jobs",
            "launcher",
            "run",
            "run_ends",
            "silo_jobs",
            "silo_models",
            "trust",
        ),
    )
)
NOT_FAST = {"slow", "mpi", "slurm", "netns", "data", "long"}
# Tests that take minutes and repeat others with other inputs: by file, the cases that stay in the normal run.
LONG = {
    "docs/test_docs.py::test_the_blocks_of_a_page_run": ("README", "quickstart", "own-data", "failures"),
    "docs/test_extending.py::test_a_recipe_trains": ("local_rule", "robust_rule", "codec", "selector"),
    "examples/test_examples.py::test_an_example_reaches": ("hospitals-2", "python_rounds-1", "fedsam-2"),
    "files/test_buffered_jobs.py": ("fedbuff", "goes_on", "refused", "jobs[median]"),
    "files/test_joining.py::test_a_silo_that_registers": ("topk",),
    "files/test_joining.py::test_a_replay": ("codec",),
    "files/test_joining.py::test_a_server_that_dies": ("50-scaffold",),
    "files/test_joining.py::test_a_late_silo": ("task", "weight"),
    "files/test_joining.py::test_of_two": (),
    "files/test_secure_jobs.py::test_sums_have": ("clipped",),
    "files/test_secure_jobs.py::test_a_silo_that": ("masked-before",),
    "files/test_secure_jobs.py::test_with_too_few": ("answer",),
    "files/test_secure_jobs.py::test_a_server": (),
    "files/test_secure_jobs.py::test_a_late": (),
    "files/test_secure_jobs.py::test_two_silos": (),
    "files/test_secure_jobs.py::test_a_silo_with_a_changed": ("flipped",),
    "files/test_secure_sums.py::test_sums_are": ("1-harsh",),
    "files/test_server_ended.py::test_silos_end": ("diverged-engine1", "other-synchronous"),
    "files/test_server_ended.py::test_a_job_that": ("error0",),
    "files/test_silo_jobs.py::test_jobs_train": ("plain", "scaffold", "topk", "kept", "median"),
    "files/test_silo_jobs.py::test_a_server_that_dies": ("3-scaffold",),
    "files/test_silo_jobs.py::test_a_silo_that_dies": ("between-int8",),
    "mpi/test_heal.py::test_a_run_whose_ranks_die": ("sharded", "at_once"),
    "mpi/test_lost.py::test_a_rank_that_dies_before": ("2",),
    "mpi/test_respawn.py": ("[one]",),
    "mpi/test_supervisor.py": ("rank",),
    "mpi/test_overlap.py": ("signal",),
    "mpi/test_multihost.py::test_four": (),
    "mpi/test_multihost.py::test_mpiexec": (),
    "test_wheelhouse.py": (),
    "mpi/test_fragments.py": (),
    "mpi/test_arrivals.py::test_other_arrivals": (),
    "mpi/test_heart_published.py": ("4-",),
    "comm/test_vigil.py::test_a_stopped_rank": ("[0]",),
    "test_equations.py::test_the_same_numbers_on_several_ranks": ("-2]",),
    "mpi/test_stop.py::test_signal_in_a_ten_minute_round": ("SIGUSR1-1-1",),
    "mpi/test_jobs.py": ("quick_form", "startup", "killed_run"),
    "mpi/test_federation.py": (),
    "mpi/test_other_mpis.py": ("doctor",),
    "mpi/test_suite.py": (),
    "mpi/test_secure.py::test_a_round_in_which": (),
    "mpi/test_secure.py::test_a_killed_run": (),
    "exchange/test_secure.py::test_ten_million": ("100000.0",),
    "mpi/test_heal.py::test_a_request": (),
    "mpi/test_heal.py::test_the_account": (),
    "mpi/test_heal.py::test_a_silo_that_hangs_ends": (),
    "rounds/test_late.py::test_too_few": (),
    "rounds/test_late.py::test_an_automatic": (),
    "secure/test_protocol.py::test_every_drop_out_of_each": ("phase[3]",),
    "privacy/test_audit.py::test_with_silo_privacy": ("masked",),
    "rounds/test_fused.py::test_rules": ("sgd", "ditto", "scaffold"),
}


def needs(path: str, fixtures: Collection[str]) -> set[str]:
    """The markers `mpi`, `slurm`, `netns` and `data` of a test, from its file and its fixtures.

    Outside tests/mpi, a test that starts ranks sets the marker `mpi` itself.
    """
    marks = {mark for fixture, mark in FIXTURES.items() if fixture in fixtures}
    marks |= {mark for file, mark in FILES.items() if path.endswith(file)}
    return marks | ({"mpi"} if Path(path).parent.name == "mpi" else set())


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """No search for garbage in what is collected, all of which stays: it takes two thirds of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)  # before -m selects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Set markers, and sort files: launches first, then those that mostly wait. FEDMPI_FAST keeps only `fast`."""
    for item in items:
        for mark in needs(str(item.path), item.fixturenames if isinstance(item, pytest.Function) else ()):
            item.add_marker(mark)
        if any(test in item.nodeid and not any(kept in item.name for kept in short) for test, short in LONG.items()):
            item.add_marker("long")
        if not str(item.path).endswith(RUNS) and not NOT_FAST & {mark.name for mark in item.iter_markers()}:
            item.add_marker("fast")
    if FAST:
        items[:] = [item for item in items if item.get_closest_marker("fast")]
    items.sort(key=lambda item: (not str(item.path).endswith(LAUNCHES), not str(item.path).endswith(SLEEPS)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    mpi.may_start = item.get_closest_marker("mpi") is not None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give all files that launch ranks for minutes to one worker, since two at once would slow each other down.

    Other files are distributed whole, because tests of a file share launches; those of mpi/test_stop.py one by one.
    """
    if FAST:
        return None  # use xdist's own scheduler
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            if file.endswith("mpi/test_stop.py"):
                return nodeid
            return "ranks" if file.endswith(LAUNCHES) else file

    return Files(config, log)


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Restores the handlers of stop signals: a command that fails ignores them, and so would all later processes."""
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    yield
    for number, handler in before:
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A folder in which `mpirun fedmpi train config.yaml` works."""
    return Place(tmp_path_factory.mktemp("command"))


@pytest.fixture(scope="session")
def undisturbed(place: Place) -> str:
    """SHA-256 of the undisturbed run's result; the run is in `undisturbed`, with checkpoints of its last rounds."""
    done = place.train(2, "undisturbed", "checkpoint.every=1")
    assert done.rc == 0, done.tails
    return place.sha("undisturbed")


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the real data; without it the test is skipped, or fails if data is required."""
    folder = Path(os.environ.get("FEDMPI_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not (folder / "heart_disease").is_dir():
        absent("data", f"no datasets in {folder}; FEDMPI_DATA names their folder")
    return folder


@pytest.fixture(scope="session")
def byzfl() -> Iterator[Callable[[str], Any]]:
    """Imports byzfl's "attacks" or "aggregators" without the package itself, which imports plots and data loaders."""
    found = importlib.util.find_spec("byzfl")
    if found is None:
        absent("byzfl", "byzfl is not installed: pip install --no-deps byzfl==0.0.11")
    package = types.ModuleType("byzfl")
    package.__path__ = list(found.submodule_search_locations or [])
    sys.modules["byzfl"] = package
    yield lambda part: importlib.import_module(f"byzfl.{part}")
    for name in [name for name in sys.modules if name.partition(".")[0] == "byzfl"]:
        del sys.modules[name]
