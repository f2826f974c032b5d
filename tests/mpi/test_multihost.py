"""jobs/multihost.sh on hosts of one machine (network namespaces), with a stand-in for ssh."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.mpi import TESTS, absent
from support.slurm import inspect, reference

TOP = TESTS.parent
TESTBED = TESTS / "support/testbed.sh"
TRAINING = ("rounds=3", "data.silos=6", "exchange.reduction=reproducible")


def on_hosts(num: int, tmp_path: Path, lines: str, *more: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "hosts").write_text(lines)
    train = ["bash", "jobs/multihost.sh", tmp_path / "hosts", "configs/digits.yaml", f"out={tmp_path}/run", *TRAINING]
    ssh = 'FEDMPI_SSH=/proc/1/root/dev/shm/enter FEDMPI_VENV="$0" exec "$@"'
    words = [
        TESTBED,
        "--hosts",
        str(num),
        "--rate",
        "1gbit",
        "--once",
        "--",
        "sh",
        "-c",
        ssh,
        sys.prefix,
        *train,
        *more,
    ]
    done = subprocess.run(list(map(str, words)), cwd=TOP, capture_output=True, text=True, timeout=240)
    if done.returncode == 77:
        absent("netns", done.stderr.strip())
    return done


def test_four_hosts_give_the_bits_of_one(tmp_path: Path) -> None:
    done = on_hosts(4, tmp_path, "h1 slots=1\nh2 slots=1\nh3 slots=2\nh4  # one\n")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "5 ranks on h1 h2 h3 h4 by: mpirun" in done.stderr
    rows = (tmp_path / "run/ranks.json").read_text()
    assert all(f'"host": "h{number}"' in rows for number in (1, 2, 3, 4)), rows
    assert inspect(tmp_path / "run")["params_sha256"] == reference(tmp_path / "whole", *TRAINING)


@pytest.mark.parametrize(
    ("lines", "says"),
    [("h1\nh7 slots=2\n", "multihost: h7: no answer by "), ("# none\n", "names no hosts")],
)
def test_a_host_that_does_not_answer_is_named_before_anything_starts(tmp_path: Path, lines: str, says: str) -> None:
    done = on_hosts(1, tmp_path, lines)
    assert done.returncode == 2 and says in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()
