"""Runs under masks on several ranks: one launch each of programs/secure.py; and ranks that die."""

import json
from collections import Counter
from pathlib import Path

import pytest
from support.mpi import PROGRAMS, PYTHON, Report, launch, launcher, mpirun
from support.programs.secure import CASES
from support.runs import run

from fedmpi.config import load
from fedmpi.flat import sha256
from fedmpi.privacy import Use, epsilon

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return launch("secure", 4, str(tmp_path_factory.mktemp("secure")), timeout_s=240)


@pytest.mark.parametrize("case", CASES)
def test_under_masks(report: Report, case: str) -> None:
    report.check(case)


def test_a_round_in_which_a_rank_dies_is_repeated_with_new_keys_and_the_same_bits(tmp_path: Path) -> None:
    if "--oversubscribe" not in launcher():
        pytest.skip("asks Open MPI's mpirun for --with-ft ulfm")
    how = ["rounds=4", "local.epochs=1", "device.name=cpu", "secure=secagg", "updates=[{name: clip, norm: 1.0}]"]
    how += ["on_failure=adopt", "exchange.plan=sharded", "server.optimizer=fedadam"]
    command = (PYTHON, str(PROGRAMS / "heal.py"), str(tmp_path / "died"), "0:2:exchange", *how)
    done = mpirun(3, "--with-ft", "ulfm", *command, cwd=ROOT, timeout_s=120)
    (row,) = [json.loads(line) for line in done.out.splitlines() if line[:1] == "{"]
    config = load(str(ROOT / "configs" / "digits.yaml"), [f"out={tmp_path / 'whole'}", *how])[0]
    assert row["ranks"] == 2 and row["seen"] == [1, 2, 3, 4], done.tails
    assert row["sha256"] == sha256(run(config)[1].parameters), done.tails


NOISE = ("rounds=4", "local.epochs=1", "device.name=cpu", "secure={name: secagg, threshold: 3}", "checkpoint.every=2")
NOISE += ("aggregate={name: mean, weights: uniform}", "exchange.plan=sharded", "server.optimizer=fedadam")


@pytest.mark.parametrize(
    ("death", "repeats"),
    [("2:3:evaluate", False), ("0:3:exchange", True)],  # after the round was counted, and before
    ids=["counted", "repeats"],
)
def test_a_killed_run_with_noise_under_masks_spends_no_less_than_it_released(
    tmp_path: Path, death: str, repeats: bool
) -> None:
    private = {"name": "silo", "clip": 0.5, "sigma": 2.0, "delta": 1e-3, "reproducible": repeats}
    how = [*NOISE, f"privacy={json.dumps(private)}"]
    program, account = (PYTHON, str(PROGRAMS / "heal.py"), str(tmp_path / "died")), tmp_path / "died" / "privacy.json"

    def counted() -> int:
        (row,) = json.loads(account.read_text())["uses"]
        assert row["discrete"] and row["sigma"] == 2.0
        return int(row["count"])

    died = mpirun(4, *program, death, *how, cwd=ROOT, timeout_s=200)
    assert died.rc and "{" not in died.out, died.tails
    before = counted()
    done = mpirun(4, *program, "", *how, cwd=ROOT, timeout_s=200)
    (row,) = [json.loads(line) for line in done.out.splitlines() if line[:1] == "{"]
    again = row["seen"]  # from the newest checkpoint, which may not have been written yet
    assert again == list(range(again[0], 5)), done.tails
    assert before == (2 if repeats else 3) and counted() == before + len(again)

    last = json.loads((tmp_path / "died" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["epsilon"] == pytest.approx(epsilon({Use(2.0, discrete=True): counted()}, 1e-3))
    assert last["epsilon"] >= epsilon({Use(2.0, discrete=True): 4}, 1e-3)

    told = [line.split() for line in Path(f"{tmp_path / 'died'}.shares").read_text().splitlines()]
    keys: dict[tuple[int, str], set[str]] = {}
    for number, silo, key in told:
        keys.setdefault((int(number), silo), set()).add(key)
    sums = Counter((int(number), silo) for number, silo, _ in told)
    assert sums == {(t, f"silo-{k}"): (t <= before) + (t in again) for t in range(1, 5) for k in range(4)}
    assert all(len(keys[one]) == (1 if repeats else num) for one, num in sums.items())
    assert len(set().union(*keys.values())) == sum(map(len, keys.values()))  # no key serves two rounds or silos
    if repeats:  # the same noise of the same sums: the same bits
        whole = load(str(ROOT / "configs" / "digits.yaml"), [f"out={tmp_path / 'whole'}", *how])[0]
        assert row["sha256"] == sha256(run(whole)[1].parameters)
    else:
        assert max(sums.values()) == 2
