"""`fedmpi serve` and three `fedmpi silo` under masks, of which one is killed in the middle of a sum."""

import json
import os
import signal
import subprocess

import pytest
import yaml
from support.mpi import FEDMPI
from support.slurm import until

STUDY = {
    "rounds": 4,
    "data": {"name": "digits", "silos": 3},
    "local": {"name": "sgd", "lr": 0.1, "epochs": 1, "batch_size": 64},
    "transport": {"name": "files", "root": "shared", "poll_s": 0.3, "lease_s": 20},
    "secure": {"name": "secagg", "threshold": 2},
    "updates": [{"name": "clip", "norm": 1.0}],
    "device": {"name": "cpu"},
    "out": "run",
}


@pytest.mark.slow
def test_a_silo_that_is_killed_in_a_sum_comes_back(tmp_path):
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY))
    (tmp_path / "shared").mkdir()
    running = []

    def start(*words):
        with open(tmp_path / f"{'-'.join(words)}.{len(running)}.log", "wb") as log:
            process = subprocess.Popen([FEDMPI, *words], cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT)
        running.append(process)
        return process

    def silo(number):
        return start("silo", "study.yaml", "--id", f"silo-{number}")

    try:
        killed, *others = (silo(number) for number in (1, 0, 2))
        server = start("serve", "study.yaml")
        shares = tmp_path / "shared" / "shares"
        until(lambda: shares.exists() and any(name.startswith("silo-1.00000004.") for name in os.listdir(shares)), 120)
        killed.send_signal(signal.SIGKILL)
        others.append(silo(1))
        assert [process.wait(120) for process in (*others, server)] == [0, 0, 0, 0]
    finally:
        for process in running:
            process.kill()
            process.wait()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    three = ["silo-0", "silo-1", "silo-2"]
    assert [record["summed"] for record in records] == [three, ["silo-0", "silo-2"], three, three]
    assert records[1]["late"] == {"silo-1": "dropped"} and records[3]["accuracy"] > 0.5
    assert not [path for where in ("shares", "masked", "answers") for path in (tmp_path / "shared" / where).iterdir()]
