"""`fedmpi slurm`: the batch script, and what it refuses. tests/mpi/test_slurm.py submits one to a real SLURM."""

import re
import shutil
import subprocess
import sys

import pytest

from fedmpi.batch import Request, needed_bytes, no_memory, num_bytes, refuse, script, seconds
from fedmpi.config import load
from fedmpi.errors import ConfigError
from fedmpi.plan import plan
from fedmpi.starters import STARTERS

TEXT = "rounds: 3\ndata: {name: digits, silos: 8}\nout: runs/a b\n"
FILES = """
data:
  {name: files, task: classification, num_classes: 2, shape: [3], silos: [
  {id: a, path: a.h5, num_samples: 10, host: h2}, {id: b, path: b.h5, num_samples: 20, host: h1}]}
"""


@pytest.fixture
def write(tmp_path):
    """The script for a configuration and a request."""

    def made(text, request, launcher="pmix", overrides=()):
        (tmp_path / "a.yaml").write_text(text)
        config, origins = load(tmp_path / "a.yaml", overrides)
        refuse(config, request, len(config.data.source(config.seed).silos))
        planned = plan(config, origins, request.num_ranks)
        command = ["a.yaml", *overrides]
        return script(config, command, planned, request, STARTERS[launcher], "/home/me/my runs", "/home/me/.venv")

    return made


def options(text):
    """Options of sbatch in the script."""
    return dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text, re.MULTILINE))


def test_a_script_asks_for_what_the_plan_needs(write):
    text = write(TEXT, Request(2, "8:00:00", gpus_per_node=4, cpus_per_rank=6, partition="gpu", more=("--exclusive",)))
    told = options(text)
    assert told["nodes"] == "2" and told["ntasks-per-node"] == "4" and told["gpus-per-node"] == "4"
    assert told["time"] == "8:00:00" and told["partition"] == "gpu" and "exclusive" in told
    assert told["signal"] == "B:USR1@121" and told["cpus-per-task"] == "6" and told["job-name"] == "fedmpi-a-b"
    assert "export FEDMPI_RANKS=8\nexport OMP_NUM_THREADS=6 SRUN_CPUS_PER_TASK=6\n" in text
    assert "cd '/home/me/my runs'\n" in text and "fedmpi run a.yaml -- $launcher &" in text
    config, origins = load("configs/digits.yaml", ["data.silos=8"])
    planned = plan(config, origins, 8)
    needs = needed_bytes(planned, 4)
    assert needs > sum(row["memory_bytes"] for row in planned["ranks"][:4])
    assert abs(num_bytes(told["mem"]) - needs) < 0.2 * needs
    subprocess.run(["bash", "-n"], input=text, text=True, check=True, timeout=20)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-"], input=text, text=True, check=True, timeout=60)


@pytest.mark.parametrize(("launcher", "line"), [(name, one.line(4)) for name, one in STARTERS.items()])
def test_each_launcher_can_be_chosen_and_the_others_stand_beside_it(write, launcher, line):
    text = write(TEXT, Request(2, "60", ranks_per_node=2), launcher)
    lines = re.findall(r'^(# )?launcher="(.*)"', text, re.MULTILINE)
    assert [words for hidden, words in lines if not hidden] == [line]
    assert {words for hidden, words in lines if hidden} == {one.line(4) for one in STARTERS.values()} - {line}


def test_words_reach_the_command_as_they_are(write):
    text = write(TEXT, Request(1, "60"), overrides=["local={name: sgd, lr: 0.1, epochs: 1}"])
    assert "fedmpi run a.yaml 'local={name: sgd, lr: 0.1, epochs: 1}' -- $launcher &" in text


def test_options_of_sbatch_stay_whole(write):
    more = ("--comment=two # words", "-C a&b", "--output=/a b/%j.log", '--chdir="/c d"', "--mem=0 --exclusive")
    text = write(TEXT, Request(1, "60", account="a b", more=more))
    for line in (
        "--comment='two # words'",
        "-C 'a&b'",
        "--output='/a b/%j.log'",
        '--chdir="/c d"',
        "--mem=0 --exclusive",
        "--account='a b'",
        "--signal=B:USR1@121",
    ):
        assert f"\n#SBATCH {line}\n" in text
    with pytest.raises(ConfigError, match=r"is not printable: '--comment=a\\nrm b'"):
        write(TEXT, Request(1, "60", more=("--comment=a\nrm b",)))


def test_a_line_break_in_a_name_stays_in_the_comment(write):
    text = write(TEXT, Request(1, "60"), overrides=['out="a\\nrm b"'])
    assert r"into 'a\nrm b'" in text and "\nrm b" not in text


def test_pinned_silos_choose_the_nodes_and_unknown_sizes_no_memory(write):
    text = write(FILES, Request(2, "60"))
    assert options(text)["nodelist"] == "h1,h2"
    undeclared = FILES.replace(", num_samples: 10", "")
    text = write(undeclared, Request(2, "60"))
    assert "mem" not in options(text) and "a node, besides samples of silos that declare no num_samples" in text
    assert re.search(r"disk: 4 checkpoints of \d+\.\d KiB", text)
    assert options(write(undeclared, Request(2, "60", mem="8G")))["mem"] == "8G"
    with pytest.raises(ConfigError, match=r"--mem 100M: the plan needs .* a node \(1 rank\), besides samples of silos"):
        write(undeclared, Request(2, "60", mem="100M"))


def test_a_script_without_memory_is_told(tmp_path):
    request = Request(2, "60")
    (tmp_path / "a.yaml").write_text(FILES.replace(", num_samples: 10", ""))
    planned = plan(*load(tmp_path / "a.yaml"), 2)
    assert no_memory(planned, request).startswith(
        "the script has no --mem, so the site's default holds: silo 'a' declares"
    )
    (tmp_path / "a.yaml").write_text(FILES.replace(", num_samples: 10", "").replace(", num_samples: 20", ""))
    assert "silo 'a' and 1 more declare no num_samples" in no_memory(plan(*load(tmp_path / "a.yaml"), 2), request)
    assert no_memory(planned, Request(2, "60", mem="8G")) == ""
    (tmp_path / "a.yaml").write_text(FILES)
    assert no_memory(plan(*load(tmp_path / "a.yaml"), 2), request) == ""


@pytest.mark.parametrize(
    ("text", "request_", "says"),
    [
        (TEXT, Request(4, "60", gpus_per_node=4), "--nodes 4 with 4 ranks each: 16 ranks for 8 silos, so 8 would have"),
        (TEXT + "server: {dedicated: true}", Request(10, "60"), "10 ranks for 8 silos and a dedicated server, so 1 "),
        (TEXT, Request(1, "4"), "--time 4: the job stops 121 s before its limit"),
        (TEXT, Request(1, "1:2:3:4"), "--time 1:2:3:4: write minutes"),
        (TEXT, Request(1, "soon"), "--time soon: write minutes"),
        (TEXT, Request(1, "60", mem="1M"), "--mem 1M: the plan needs "),
        (TEXT, Request(1, "60", mem="much"), "--mem much: write a number"),
        (TEXT + "device: cpu\n".replace("cpu", "{name: cpu}"), Request(1, "60", gpus_per_node=1), "device.name: cpu"),
        (TEXT + "device: {name: cuda}\n", Request(1, "60"), "give --gpus-per-node"),
        (TEXT, Request(1, "60", gpus_per_node=2, ranks_per_node=4), "more ranks than the 2 GPUs of a node"),
        (
            TEXT,
            Request(1, "60", more=("--signal=USR1@60",)),
            "--sbatch --signal=USR1@60: the script stops on",
        ),
        (TEXT, Request(1, "60", more=("--signal=B:TERM@60",)), "--sbatch --signal=B:TERM@60: the script stops on"),
        (FILES, Request(1, "60"), "--nodes 1: silos are pinned to 2 hosts: h1, h2"),
    ],
)
def test_what_cannot_be_is_one_line(write, text, request_, says):
    with pytest.raises(ConfigError) as caught:
        write(text, request_)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_times_are_slurms():
    assert [seconds(text) for text in ("90", "2:30", "8:00:00", "1-12", "1-00:30", "2-00:00:01")] == [
        5400, 150, 28800, 129600, 88200, 172801,
    ]  # fmt: skip


def test_the_command_prints_or_submits(tmp_path):
    (tmp_path / "a.yaml").write_text(TEXT)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sbatch").write_text("#!/bin/sh\ncat > submitted\necho '42;cluster'\n")
    (tmp_path / "bin/sbatch").chmod(0o755)
    path = f"{tmp_path}/bin:/usr/bin:/bin"

    def call(*words):
        command = [sys.executable, "-m", "fedmpi", "slurm", "a.yaml", "rounds=2", *words]
        env = {"PATH": path, "HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)

    printed = call("--nodes", "2", "--launcher", "mpirun")
    if "no MPI library" in printed.stderr or "does not start ranks of" in printed.stderr:
        pytest.skip(printed.stderr)
    assert printed.returncode == 0, printed.stderr
    submitted = call("--nodes", "2", "--launcher", "mpirun", "--submit", "--to", "job.sh")
    assert submitted.stdout == "42\n", submitted.stderr
    assert (tmp_path / "submitted").read_text() == (tmp_path / "job.sh").read_text() == printed.stdout
    assert "fedmpi run a.yaml rounds=2 -- $launcher &" in printed.stdout
