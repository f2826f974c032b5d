"""The jobs that train: experiments and measurements, on very little data, in this process."""

import copy
import functools
import importlib.util
import itertools
import json
import os
import random
import re
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.mpi import absent

import fedmpi
from fedmpi.comm import SoloComm
from fedmpi.components import build
from fedmpi.data.digits import Digits

TOP = Path(__file__).parents[1]


@pytest.fixture
def job(monkeypatch, tmp_path):
    """A job's module by name; it uses no launcher and writes into a folder of the test."""
    monkeypatch.chdir(tmp_path)

    def opened(name, connects=True):
        spec = importlib.util.spec_from_file_location(f"jobs_{name}", next((TOP / "jobs").rglob(f"{name}.py")))
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        if connects:
            monkeypatch.setattr(module, "connect", SoloComm)
        return module

    return opened


def test_the_servers_adamw_of_deltas_is_torchs_of_gradients(job):
    arguments = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    optimizer = job("diloco").AdamW(**arguments)
    draw = torch.Generator().manual_seed(0)
    params_P = torch.randn(50, dtype=torch.float64, generator=draw)
    state, weight = optimizer.init(params_P), torch.nn.Parameter(params_P.clone())
    wanted = torch.optim.AdamW([weight], **arguments)
    for number in range(1, 6):
        weight.grad = torch.randn(50, dtype=torch.float64, generator=draw)
        wanted.step()
        params_P, state = optimizer.at(number, 5, 1.0).step(params_P, -weight.grad, state)
    torch.testing.assert_close(params_P, weight.detach(), rtol=1e-12, atol=1e-12)


def test_forty_silos_are_summed_up_and_drawn(job, tmp_path):
    pytest.importorskip("matplotlib")
    forty = job("async_40", connects=False)
    rising = [(10.0 * i, 2.0 * i, 0.5 + 0.05 * i) for i in range(1, 7)]
    results = {"synchronous": [rising, rising], "FedBuff": [[], rising]}
    told = forty.summary(results)
    assert told["synchronous"] == {  # the mean of three evaluations counts
        "accuracy": 0.75,
        **{"seconds to 0.6": 30.0, "megabytes to 0.6": 6.0, "seconds to 0.7": 50.0, "megabytes to 0.7": 10.0},
        **{"seconds to 0.75": 60.0, "megabytes to 0.75": 12.0},
    }
    assert told["FedBuff"]["seconds to 0.6"] is None
    forty.draw({"synchronous": [rising, rising]}, tmp_path / "assets" / "a.svg")
    assert "virtual seconds" in (tmp_path / "assets" / "a.svg").read_text()


def test_forty_silos_train_quickly(job, capsys, monkeypatch, tmp_path):
    folder = Path(os.environ.get("FEDMPI_DATA", TOP.parent / "shared" / "data"))
    if not (folder / "fashion_mnist").exists():
        absent("data", "no fashion_mnist/ in FEDMPI_DATA nor in ../shared/data")
    monkeypatch.setenv("FEDMPI_DATA", str(folder))
    forty = job("async_40", connects=False)
    monkeypatch.setattr(sys, "argv", ["async_40", "--quick", "--out", str(tmp_path)])
    forty.main()
    told = json.loads(capsys.readouterr().out)
    assert told.keys() == forty.ENGINES.keys() and told["FedBuff"]["accuracy"] > 0.2
    assert json.loads((tmp_path / "results.json").read_text()).keys() == told.keys()


def test_the_experiment_in_real_time_runs_on_one_rank(job, capsys, monkeypatch):
    real = job("async_real")
    monkeypatch.setattr(sys, "argv", ["async_real", "--quick"])
    real.main()
    told = json.loads(capsys.readouterr().out)
    assert told["same_bits"] == told["replays"] == 2 and told["buffered"]["server_steps"] == 4


@pytest.fixture
def text_at_hand(monkeypatch):
    folder = Path(os.environ.get("FEDMPI_DATA", TOP.parent / "shared" / "data"))
    if not (folder / "tinyshakespeare").exists():
        absent("data", "no tinyshakespeare/ in FEDMPI_DATA nor in ../shared/data")
    monkeypatch.setenv("FEDMPI_DATA", str(folder))


SMALL = ["data.silos=2", "data.length=16", "data.stride=64", "model.layers=1", "model.width=16", "device.name=cpu"]


def test_diloco_and_synchronous_adamw_visit_the_same_tokens(job, capsys, text_at_hand):
    diloco = job("diloco")
    one, other = diloco.both(2, 3, SMALL, "out")
    assert (one.local.steps, other.local.steps, one.rounds, other.rounds) == (3, 1, 2, 6)
    assert one.local.keep_optimizer and one.server.optimizer.nesterov
    assert (other.server.optimizer.lr, other.server.optimizer.weight_decay) == (one.local.lr, 0.1)
    diloco.main(["--quick", *SMALL])
    figures = json.loads(capsys.readouterr().out)
    assert figures["samples"][0] == figures["samples"][1] == 2 * 2 * 2 * 16 and figures["exchanges"] == [2, 4]
    assert 0.5 < figures["ratio"] < 2 and figures["diloco_loss"] < 5


def test_diloco_in_fragments_sees_the_same_tokens_and_sends_a_part_of_the_bytes(job, capsys, text_at_hand):
    diloco = job("diloco")
    whole, _ = diloco.both(2, 4, SMALL, "out")
    often, rarely = (diloco.in_fragments(whole, 2)[name] for name in ("often", "rarely_late"))
    assert (often.rounds, often.local.steps, often.exchange.fragments, often.exchange.overlap) == (4, 2, 2, False)
    assert (rarely.rounds, rarely.local.steps, rarely.exchange.fragments, rarely.exchange.overlap) == (2, 4, 2, True)
    diloco.main(["--quick", "--fragments", "2", *SMALL])
    figures = json.loads(capsys.readouterr().out)
    assert set(figures["samples"].values()) == {2 * 2 * 2 * 16}
    assert figures["ratios"]["whole"] == 1 and all(0.5 < ratio < 2 for ratio in figures["ratios"].values())


def test_synchronous_adamw_is_torchs_on_the_pooled_batches(job, tmp_path, text_at_hand):
    given = [*SMALL, "local.sampler=in_order", "local.batch_size=5", "local.lr=1e-2"]
    given.append("local.schedule={name: linear, floor: 0.25}")
    _, config = job("diloco").both(2, 2, given, str(tmp_path))
    with fedmpi.Run(config, comm=SoloComm()) as run:
        weight = torch.nn.Parameter(run.parameters.clone())
        model = copy.deepcopy(run.model)
        list(run)
    optimizer = torch.optim.AdamW([weight], weight_decay=0.1)
    source = config.data.source(config.seed)
    data = [source.open(silo.id) for silo in source.silos]
    for at in range(0, 20, 5):
        optimizer.param_groups[0]["lr"] = 1e-2 * (0.5 if at < 10 else 0.25)
        x, y = (torch.cat([getattr(d, part)[at : at + 5] for d in data]) for part in ("x_train", "y_train"))
        torch.nn.utils.vector_to_parameters(weight.detach().clone(), model.parameters())
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        weight.grad = torch.cat([p.grad.flatten() for p in model.parameters()])
        optimizer.step()
    torch.testing.assert_close(run.parameters, weight.detach(), rtol=0, atol=1e-4)


def test_the_cost_of_a_rule_is_told_beside_sgds(job, capsys, monkeypatch):
    cost = job("rule_cost")
    monkeypatch.setattr(cost, "Fashion", lambda silos: Digits(silos=silos))  # a dataset that is always there
    cost.main(["--quick", "--only", "scaffold,fedprox", "device.name=cpu"])
    said = capsys.readouterr()
    rows = {row["rule"]: row for row in map(json.loads, said.out.splitlines())}
    assert set(rows) == {"sgd", "scaffold", "fedprox"} and rows["sgd"]["ratio"] == rows["sgd"]["ratio_train"] == 1.0
    assert all(row["ratio"] > 0 and row["turns"] == 2 for row in rows.values()) and not said.err


def test_the_cost_of_federation_is_a_ratio_of_seconds(job, capsys):
    job("federation_cost").main(["--quick", "device.name=cpu"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["rounds"] == 2 and figures["fedmpi_s"] > 0 < figures["plain_s"]
    assert figures["ratio"] == pytest.approx(figures["fedmpi_s"] / figures["plain_s"], rel=0.05)
    assert 0 < figures["last_round_s"]["exchange"] < figures["last_round_s"]["round"]


def test_what_overlap_hides_is_told_for_both_kinds_of_training(job, capsys):
    threads = torch.get_num_threads()
    job("overlap").main(["--quick"])
    torch.set_num_threads(threads)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["training"] for row in rows] == ["sleeps", "computes"]
    assert all(row["rounds"] == 2 and row["exchange_s"] > 0 < row["thread_s"] for row in rows)


def test_damage_on_disk_is_noticed_wherever_it_is(job, capsys):
    threads = torch.get_num_threads()
    job("drill_flips", connects=False).main(["--quick"])  # exits with 1 at an undetected flip or a traceback
    torch.set_num_threads(threads)
    names, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert names[2:] == ["same", "skipped", "refused", "SILENT", "TRACEBACK"]
    same, skipped, refused, *bad = (int(text) for text in rows[-1][1:])
    assert same + skipped + refused == 24 and same and skipped and refused and bad == [0, 0]


def test_drills_are_listed_and_judged(job, capsys, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(TOP / "jobs/experiments")
    drill = job("drill", connects=False)
    with pytest.raises(SystemExit) as ended:
        drill.main(["--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    for name in drill.DRILLS:
        assert re.search(rf"^  {name} +\w.*\S$", said, re.MULTILINE), name

    def cannot(drilled):
        raise drill.Cannot("no such thing here")

    def slow(drilled):
        raise drill.TooLong("not over within 1 s")

    monkeypatch.setattr(drill.shutil, "which", lambda name: name)
    good, bad = (lambda drilled: drilled.check(True, "fine")), (lambda drilled: drilled.check(False, "odd"))
    monkeypatch.setattr(drill, "DRILLS", {"good": good, "unable": cannot, "bad": bad, "slow": slow})
    out = ["--out", str(tmp_path)]
    assert drill.main(["good", *out]) == 0 and drill.main(["good", "unable", *out]) == 77
    assert drill.main(["all", *out]) == 1 and drill.main(["slow", *out]) == 1
    said = capsys.readouterr().out
    assert "CANNOT unable: no such thing here\n" in said and "NOT           not over within 1 s\nFAIL slow" in said
    assert "ok            fine\nPASS good" in said and "NOT           odd\nFAIL bad" in said


def test_a_campaign_of_deaths_goes_on_and_tells_what_was_lost(job, capsys, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(TOP / "jobs/experiments")
    loop = job("drill_loop", connects=False)
    monkeypatch.setattr(loop, "undisturbed", lambda folder, campaign, sha: {"sha256": "a", "samples_per_s": 2.0})

    def one_run(folder, campaign, number, whole, sha):
        tally = loop.Tally(number, 3, 2, restarts=1, next_round_s=[1.0, number], goodput=0.5, code=0, seconds=60.0)
        tally.faults["server"] += 3
        tally.same_bits = number < 3
        return tally

    monkeypatch.setattr(loop, "one_run", one_run)
    campaign = loop.Campaign(rounds=9, mtbf_s=6.0)
    assert loop.kill_loop(tmp_path, campaign, 10.0, 4, str) == 0
    said = capsys.readouterr().out
    assert "deaths        6: 4 healed in the job, the others by 2 restarts" in said and "PASS kill-loop\n" in said
    assert (
        "lost          0 committed rounds" in said
        and "goodput       50%" in said
        and "median 1.00 s, at most 2.00" in said
    )
    assert loop.kill_loop(tmp_path, campaign, 0.0, 9, str) == 0  # no time: what there is so far
    assert "6 of 9 deaths so far: the same command goes on" in capsys.readouterr().out
    assert loop.kill_loop(tmp_path, campaign, 10.0, 9, str) == 1  # the third run has other bits
    said = capsys.readouterr().out
    assert "run 3: 3 deaths" in said and "same bits     2 of 3 runs" in said and "FAIL kill-loop: 1 runs failed" in said
    assert loop.kill_loop(tmp_path, loop.Campaign(rounds=8, mtbf_s=6.0), 10.0, 9, str) == 1
    assert "other settings" in capsys.readouterr().out


def test_events_of_other_kinds_are_told_and_are_no_losses(job, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(TOP / "jobs/experiments")
    made = job("drill_job", connects=False)
    lost = {"event": "lost", "round": 4, "ranks": [1], "silos": {"a": 0, "b": None}, "num_ranks": 2, "seconds": 0.5}
    joined = {"event": "joined", "round": 5, "num_ranks": 3}
    (tmp_path / "events.jsonl").write_text(f"{json.dumps(lost)}\n{json.dumps(joined)}\n")
    assert [*made.read_events(tmp_path)] == [lost]
    assert "2 ranks go on after round 4 (a to rank 0, b to nobody)" in made.told_of_event(lost)
    assert made.told_of_event(joined) == "event joined, round 5, num_ranks 3"


@pytest.fixture
def cuts(job, monkeypatch):
    monkeypatch.syspath_prepend(TOP / "jobs/experiments")
    return job("drill_cut", connects=False)


def committed(cuts, folder, *starts):
    """A history of rounds of these starts: (rounds, trained from), each with a process of its own."""
    history = cuts.History(folder / "run", folder / "trace")
    history.trace.mkdir(parents=True)
    (history.out / "epochs").mkdir(parents=True)
    for epoch, rounds in enumerate(starts, start=1):
        (begun := history.out / "epochs" / f"{epoch:06d}").touch()
        os.utime(begun, (100.0 * epoch, 100.0 * epoch))
        rows = [{"round": r, "epoch": epoch, "parent": f"sha {parent}"} for r, parent in rounds]
        (history.trace / f"{epoch}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for number, (r, _) in enumerate(rounds):
            history.sealed[r] = cuts.Sealed(f"sha {r}", epoch, frozenset({epoch}), 100.0 * epoch + 10 * number)
    return history


@pytest.mark.parametrize(
    ("starts", "wrong"),
    [
        ([[(1, 0), (2, 1)], [(3, 2)]], []),
        ([[(1, 0), (3, 2)]], ["round 3 of epoch 1 does not follow round 1 as it is on disk"]),
        ([[(1, 0), (2, 1)], [(3, 1)]], ["round 3 of epoch 2 does not follow round 2 as it is on disk"]),
        ([[(1, 0), (3, 2)], [(2, 1)]], ["round 3 is of epoch 1, the one before of epoch 2"]),
        ([[(r, r - 1) for r in range(1, 13)], []], ["round 12 of epoch 1 was committed after the next epoch"]),
    ],
    ids=["one_line", "gap", "other_parent", "two_starts", "late"],
)
def test_a_history_of_two_lines_is_told(cuts, tmp_path, starts, wrong):
    history = committed(cuts, tmp_path, *starts)
    history.judge()
    assert len(history.wrong) == len(wrong) and all(map(str.startswith, history.wrong, wrong)), history.wrong


def test_a_round_that_was_committed_in_memory_only_is_no_gap(cuts, tmp_path):
    history = committed(cuts, tmp_path, [(1, 0), (2, 1), (3, 2), (4, 3)])
    del history.sealed[2], history.sealed[3]
    history.judge()
    assert history.wrong == []
    with open(history.trace / "1.jsonl", "a") as file:  # another half trained round 4 from another round 3
        file.write('{"round": 4, "epoch": 1, "parent": "sha other"}\n')
    history.judge()
    assert history.wrong == ["round 4 of epoch 1 does not follow round 1 as it is on disk"]


def test_halves_that_both_commit_are_told(cuts, tmp_path):
    history = committed(cuts, tmp_path, [(1, 0), (2, 1), (3, 2)])
    history.sealed[2] = replace(history.sealed[2], pids=frozenset({1, 7}))
    history.judge()
    assert history.wrong == ["round 2 was trained by [1, 7], the one before by [1]"]


def test_a_round_that_is_committed_twice_must_have_the_same_bits(cuts, monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "drill_rule", raising=False)
    monkeypatch.setenv("FEDMPI_EPOCH", "1")
    history = cuts.History(tmp_path / "run", tmp_path)

    def trained(lr):
        shutil.rmtree(history.out, ignore_errors=True)
        (history.out / "epochs").mkdir(parents=True)
        (history.out / "epochs" / "000001").touch()
        rule = {"name": "drill_rule:Traced", "trace": str(tmp_path), "lr": lr, "epochs": 1, "batch_size": 64}
        about = {"rounds": 2, "out": str(history.out), "local": rule, "checkpoint": {"every": 1}}
        with fedmpi.Run(build(fedmpi.Config, about), comm=SoloComm()) as run:
            assert len([*run]) == 2
        history.judge()

    trained(0.1)
    assert history.wrong == [] and history.sealed[2].pids == {os.getpid()} and history.sealed[1].epoch == 1
    trained(0.1)
    assert history.wrong == []
    trained(0.2)
    assert [text[:28] for text in history.wrong][:2] == [f"round {r} was committed twice:"[:28] for r in (1, 2)]


def test_a_soak_fails_where_a_process_grows_apart_from_deaths(job, capsys, monkeypatch):
    monkeypatch.syspath_prepend(TOP / "jobs/experiments")
    soak = job("drill_soak", connects=False)

    def process(name, leak, at_death):
        rows = {
            r: {"rss_kib": 1e5 + leak * r + at_death * (r > 500), "threads": 4, "descriptors": 20} for r in range(1000)
        }
        return soak.Process(name, {r: {**row, "mappings": 700} for r, row in rows.items()})

    over = SimpleNamespace(returncode=0)
    done = SimpleNamespace(moments=[(1.0, "SIGKILL")], records=range(1000), starts=[1.0], begun_s=0.0, process=over)
    assert soak.sample(os.getpid())["descriptors"] > 2
    assert soak.report(done, [process("rank 0", 0, 9e3), process("rank 1", 1, 0)], [500], 1000) == 0
    said = capsys.readouterr().out
    assert "1 deaths +26, else +784" in said and "PASS soak" in said
    assert soak.report(done, [process("rank 0", 10, 9e3)], [500], 1000) == 1
    said = capsys.readouterr().out
    assert "else +7,840   GROWS" in said and said.count("GROWS") == 1


def test_goodput_is_counted_from_commit_to_commit(job, monkeypatch):
    monkeypatch.syspath_prepend(TOP / "jobs/experiments")
    goodput = job("goodput", connects=False)
    now = [0.0]
    passing = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + 0.25))
    monkeypatch.setattr(goodput, "time", passing)
    killed = []

    def commits():  # 100 samples every 2 s from 4 s on, and nothing for 6 s after a death
        lost_s = 6 * len(killed)
        return 100 * max(0, int((now[0] - 2 - lost_s) // 2))

    def kill():
        killed.append(now[0])
        return "SIGKILL"

    assert goodput.measured(20.0, False, commits, kill) == (50.0, 0) and killed == []
    now[0] = 0.0
    rate, num = goodput.measured(100.0, True, commits, kill)
    assert num == 2 and killed == pytest.approx([34, 94], abs=0.5) and rate == pytest.approx(50 * 0.88, rel=0.04)
    now[0] = 0.0
    with pytest.raises(goodput.TooLong, match="no commit within"):
        goodput.measured(9.0, False, lambda: 0, kill)


class Dying:
    """A job of five ranks whose processes die as they are killed."""

    def __init__(self, over):
        self.begun_s = self.last_commit_s = 0.0
        self.newest, self.rounds = 5, 24
        self.left, self.starts, self.over = {rank: 100 + rank for rank in range(5)}, [], over
        self.process = SimpleNamespace(poll=lambda: 0 if self.over(self) else None)

    def ranks(self):
        return self.left

    def look(self):
        self.last_commit_s += 0.02

    def signal(self, number, *ranks):
        for rank in ranks:
            del self.left[rank]


def test_faults_spare_ranks_and_are_told_by_host(job, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(TOP / "jobs/experiments")
    loop = job("drill_loop", connects=False)
    deaths = []
    for seed in range(24):
        clock = itertools.count(0.0, 0.01)
        passing = SimpleNamespace(sleep=lambda s: None, monotonic=functools.partial(next, clock))
        monkeypatch.setattr(loop, "time", passing)
        dying, tally = Dying(lambda job: job.last_commit_s > 5), loop.Tally(1)
        campaign = loop.Campaign(24, 0.1, ranks=5, hosts=2, spare=2, in_set_up=0.0)
        faults = loop.disturb(dying, random.Random(seed), tally, campaign, 1e9)
        assert tally.deaths == 3 and len(dying.left) == 2 and 1 <= len(faults) == sum(tally.faults.values())
        assert tally.on_host == Counter(f"h{rank % 2 + 1}" for rank in {*range(5)} - {*dying.left})
        deaths += tally.faults
    assert "three in a row" in deaths and len({*deaths}) > 2
    made = sys.modules["drill_job"]
    monkeypatch.setattr(made.subprocess, "run", lambda words, **_: SimpleNamespace(returncode=0))
    inside, line = campaign.launch()
    assert inside[1:5] == ["--hosts", "2", "--ranks-per-host", "3"]
    assert line[:8] == ["mpirun", "--with-ft", "ulfm", "-n", "5", "--host", "h1:3,h2:3", "--map-by"]
    monkeypatch.setattr(made.subprocess, "run", lambda words, **_: SimpleNamespace(returncode=77, stderr="no root"))
    monkeypatch.setattr(loop, "undisturbed", lambda *_: {})
    assert loop.kill_loop(tmp_path, campaign, 10.0, 9, str) == 77


def test_the_exchange_inside_training_is_told_beside_a_copy(job, capsys, monkeypatch):
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.setenv(name, "131072")  # or it would restart itself
    job("steady").main(["--quick", "{plan: window}", "{plan: sharded, up: {codec: int8, feedback: true}}"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["exchange"][:6] for row in rows] == ["{plan:"] * 2
    assert all(
        row["params"] == 100_000 and row["rounds"] == 5 and row["round_s"] > row["exchange_s"] > 0 for row in rows
    )


def test_a_rule_that_needs_more_than_a_rate_and_steps_is_named(job):
    found = job("rule_cost").configs(["sgd", "fedprox"], 2, 1, ["local.bogus=1"], "out")
    assert all(isinstance(why, str) and "bogus" in why for why in found.values())


def test_the_ratio_of_two_commits_is_that_of_their_medians(job):
    turns = [({"x": 1.0, "only a": 1.0}, {"x": 2.0}), ({"x": 3.0}, {"x": 3.0}), ({"x": 2.0}, {"x": 5.0})]
    (row,) = job("compare_commits", connects=False).compared(turns)
    assert row == {"what": "x", "a_s": 2.0, "b_s": 3.0, "ratio": 1.5, "least": 1.0, "most": 2.5}
