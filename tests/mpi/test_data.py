"""Silos with pooled statistics on several ranks: the bits of one rank, and an error on one rank for all."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from support.mpi import FEDMPI, mpirun

from fedmpi.results import inspect

SILOS = {"a": 30, "b": 17, "c": 8}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    for i, (silo, num) in enumerate(SILOS.items()):
        x = draw.standard_normal((num, 3)) * 7 + 100 * i
        x[draw.random(x.shape) < 0.2] = np.nan
        np.savez(tmp_path / f"{silo}.npz", x=x, y=np.arange(num) % 2)
    silos = [{"id": silo, "path": f"{silo}.npz"} for silo in SILOS]
    data = {"name": "files", "root": ".", "task": "binary", "shape": [3], "silos": silos, "stream": True}
    data |= {"scale": "standard", "missing": "mean", "statistics": "pooled"}
    local = {"name": "sgd", "lr": 0.1, "epochs": 1, "batch_size": 4}
    how = {"rounds": 2, "data": data, "model": "logistic", "local": local, "exchange": {"reduction": "reproducible"}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(how))
    return tmp_path


def test_pooled_statistics_do_not_depend_on_placement(study: Path) -> None:
    shas, known = set(), set()
    for ranks, out in ((1, "one"), (3, "three")):
        done = mpirun(ranks, FEDMPI, "train", "study.yaml", f"out={out}", cwd=study)
        assert done.rc == 0, done.tails
        shas.add(inspect(study / out)["params_sha256"])
        known.add(json.dumps(yaml.safe_load((study / out / "config.yaml").read_text())["about"]["statistics"]))
    assert len(shas) == len(known) == 1
    told = mpirun(2, FEDMPI, "eval", "three", "--json", cwd=study)
    assert told.rc == 0, told.tails
    assert json.loads(told.out)["loss"] == pytest.approx(inspect(study / "one")["metrics"]["loss"])


def test_a_file_that_one_rank_cannot_read_is_one_line_for_all(study: Path) -> None:
    (study / "c.npz").write_bytes(b"nothing")
    for command in ("train", "check"):
        done = mpirun(3, FEDMPI, command, "study.yaml", cwd=study)
        lines = [line for line in (done.err + done.out).splitlines() if "silo 'c': c.npz" in line]
        assert done.rc != 0 and lines, done.tails
        assert all("cannot be read as .npz: it is not in that format" in line for line in lines)


def test_predictions_stay_with_their_ranks(study: Path) -> None:
    """Those of three ranks are those of one process."""
    assert mpirun(3, FEDMPI, "train", "study.yaml", "out=run", cwd=study).rc == 0
    for ranks, to in ((1, "one"), (3, "three")):
        done = mpirun(ranks, FEDMPI, "predict", "run", "--to", to, "--part", "all", cwd=study)
        assert done.rc == 0, done.tails
        assert sorted(done.out.splitlines()) == [
            f"{to}/{silo}.csv: {num} samples of silo {silo}, predicted by the global model of round 2"
            for silo, num in SILOS.items()
        ]
    for silo in SILOS:
        assert (study / "one" / f"{silo}.csv").read_text() == (study / "three" / f"{silo}.csv").read_text()
