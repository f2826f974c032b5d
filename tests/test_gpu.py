"""Vectors on a simulated GPU (stand_in.py): exchanges, codecs and whole runs give the same results as on the CPU."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support import stand_in
from support.codecs import every_codec, vector

from fedmpi.aggregate import AGGREGATORS, Aggregator
from fedmpi.codecs import CODECS
from fedmpi.comm import SoloComm
from fedmpi.comm.threads import on_ranks
from fedmpi.components import build
from fedmpi.exchange import choose, chunks
from fedmpi.exchange.base import ExchangeContext
from fedmpi.exchange.config import ExchangeSection
from fedmpi.flat import sha256
from fedmpi.kernels import cuda
from fedmpi.local import RULES
from fedmpi.server import OPTIMIZERS, Server
from fedmpi.types import Contribution

P = 10_000
WEIGHTS = {"a": 3.0, "b": 1.0, "c": 2.0}
OWNERS = {1: (0, 0, 0), 2: (0, 1, 0)}
LINEAR = [name for name in CODECS.members if CODECS.build(name, "codec").linear and name != "identity"]
LOSSY = [name for name in CODECS.members if name != "identity"]


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    monkeypatch.setattr(chunks, "SHORTEST", 4096)


def fed_back(name):
    return {"codec": name, "feedback": True}


SECTIONS = {
    **{plan: {"plan": plan} for plan in ("root", "replicated", "sharded")},
    **{
        f"{plan} in the ring": {"plan": plan, "reduction": "reproducible"} for plan in ("root", "replicated", "sharded")
    },
    **{f"replicated {name}": {"plan": "replicated", "up": fed_back(name)} for name in LINEAR},
    **{f"sharded {name}": {"plan": "sharded", "up": fed_back(name), "down": fed_back(name)} for name in LOSSY},
    **{
        f"by silo {name}": {"plan": "sharded", "scope": "silo", "reduction": "reproducible", "up": fed_back(name)}
        for name in LOSSY
    },
    "by silo": {"plan": "sharded", "scope": "silo"},
    "decay": {"plan": "sharded", "up": {**fed_back("int8"), "decay": 0.5}},
}


def exchanged(section, num_ranks, device, aggregator=None, optimizer="fedadam", rounds=3):
    """The parameters after some rounds, as bytes, by rank."""
    how, server = build(ExchangeSection, section), OPTIMIZERS.build(optimizer, "")
    owners, draw = OWNERS[num_ranks], torch.Generator().manual_seed(0)
    start_P, deltas = torch.randn(P, generator=draw), 1e-2 * torch.randn(rounds, 3, P, generator=draw)

    def work(comm):
        hosted = [silo for silo, owner in zip(WEIGHTS, owners, strict=True) if owner == comm.rank]
        params_P = start_P.to(device, copy=True)
        facts = ExchangeContext(sum(WEIGHTS.values()), list(WEIGHTS), hosted, 7, aggregator, rounds, 5000)
        exchange = choose.make(how, comm, params_P, facts)
        params_P, state = exchange.home(params_P, server.init(exchange.shard(params_P)))
        for number in range(1, rounds + 1):
            exchange.begin(number, len(hosted))
            for k, silo in enumerate(WEIGHTS):
                if silo in hosted:
                    delta_P = deltas[number - 1, k].to(device, copy=True)
                    exchange.add(Contribution(silo, number, WEIGHTS[silo], delta_P, 0.0, 1, 1))
            params_P, state = exchange.finish(params_P, Server(server), state)
        exchange.settle()
        kept = sorted((one.key, one.silo) for one in exchange.state(params_P))
        assert params_P.device.type == device and all(part.device.type == device for part in state)
        whole = [exchange.gather(part) for part in state]
        return sha256(params_P), kept, [len(part) for part in whole]

    return on_ranks(num_ranks, work)


@pytest.mark.parametrize("num_ranks", OWNERS)
@pytest.mark.parametrize("name", SECTIONS)
def test_an_exchange_of_vectors_on_a_device_has_the_bits_of_one_on_the_cpu(name, num_ranks):
    wanted = exchanged(SECTIONS[name], num_ranks, "cpu")
    with stand_in.gpu():
        assert exchanged(SECTIONS[name], num_ranks, "cuda") == wanted


@pytest.mark.parametrize("num_ranks", (1, 3))
def test_collectives_take_vectors_on_a_device(num_ranks):
    def work(comm):
        for length in (5, 9, 3):  # memory is reused
            send = (torch.arange(float(length)) + comm.rank).to("cuda")
            sums, at_0, sent = (torch.full((length,), -1.0).to("cuda") for _ in range(3))
            comm.allreduce(send, sums)
            comm.reduce(send, at_0)
            comm.bcast(send if comm.rank == comm.size - 1 else sent, comm.size - 1)
            total = sum(torch.arange(float(length)) + rank for rank in range(comm.size)).tolist()
            assert sums.cpu().tolist() == total
            assert at_0.cpu().tolist() == (total if comm.rank == 0 else [-1.0] * length)
            last = send if comm.rank == comm.size - 1 else sent
            assert last.cpu().tolist() == (torch.arange(float(length)) + comm.size - 1).tolist()

    with stand_in.gpu():
        on_ranks(num_ranks, work)


class Weighed(Aggregator):
    """A user's aggregator that weights silos by their position in the cohort."""

    needs = "rows"

    def row_weights(self, gram_KK, cohort, state):
        order_K = 1.0 + np.arange(len(cohort.silos))
        return order_K / order_K.sum(), state


TAKES = {
    **{name: {"hostile": 0} for name in ("krum", "multi_krum", "bulyan")},
    "qffl": {"lr": 0.1},
    "bucketing": {"inner": "centered_clipping"},
    "nearest_neighbour_mixing": {"hostile": 1, "inner": "median"},
}
AGGREGATING = {name: AGGREGATORS.build({"name": name, **TAKES.get(name, {})}, "") for name in AGGREGATORS.members}
EACH = {name: one for name, one in AGGREGATING.items() if one.needs != "sum"} | {"own": Weighed()}


@pytest.mark.parametrize("name", EACH)
def test_an_aggregator_that_reads_each_delta_finds_rows_and_weights_on_the_device(name):
    section = {"plan": "sharded", "scope": "silo"}
    wanted = exchanged(section, 2, "cpu", EACH[name])
    with stand_in.gpu():
        assert exchanged(section, 2, "cuda", EACH[name]) == wanted


@pytest.mark.parametrize("name", OPTIMIZERS.members)
def test_a_server_steps_on_the_device_as_on_the_cpu(name):
    for plan in ("root", "sharded"):
        wanted = exchanged({"plan": plan}, 2, "cpu", optimizer=name)
        with stand_in.gpu():
            assert exchanged({"plan": plan}, 2, "cuda", optimizer=name) == wanted


def test_plans_are_measured_on_the_device():
    how, facts = build(ExchangeSection, {"plan": "measure"}), ExchangeContext(1.0, ["a", "b"], ["a"], 7)
    with stand_in.gpu():
        choice = choose.choose(how, SoloComm(), torch.zeros(P, device="cuda"), facts)
    assert sorted(choice.seconds) == ["replicated", "root", "sharded"]


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@every_codec
def test_kernels_have_a_deterministic_form_on_a_device(codec, deterministic):
    x, key = vector(5000), 3
    payload, out = torch.zeros(codec.max_bytes(5000), dtype=torch.uint8), torch.zeros(5000)
    codec.encode(x, payload, key, residual_N=0.1 * x)
    codec.decode(payload, out, key)
    with stand_in.gpu():
        payload_there, out_there = (torch.zeros_like(t).to("cuda") for t in (payload, out))
        num_bytes = codec.encode(x.to("cuda"), payload_there, key, residual_N=0.1 * x.to("cuda"))
        codec.decode(payload_there[:num_bytes] if not codec.fixed else payload_there, out_there, key)
    assert torch.equal(out_there.cpu(), out) and torch.equal(payload_there.cpu()[:num_bytes], payload[:num_bytes])


# ---------------------------------------------------------------- jobs/bench/gpu.py


@pytest.fixture
def gpu(monkeypatch):
    """The job's module, for one rank, with short vectors."""
    spec = importlib.util.spec_from_file_location("jobs_gpu", Path(__file__).parents[1] / "jobs" / "bench" / "gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    for name, value in {"connect": SoloComm, "PARAMS": 5000, "KERNEL_PARAMS": 9000}.items():
        monkeypatch.setattr(module, name, value)
    return module


def told(gpu, path, *arguments):
    """The job's output and exit code."""
    with stand_in.gpu():
        try:
            gpu.main(["--quick", "--json", str(path), *arguments])
            code = 0
        except SystemExit as ended:
            code = ended.code
    return json.loads(path.read_text()), code


@pytest.mark.slow
@pytest.mark.parametrize("part", ["kernels", "rules", "overlap", "memory"])
def test_whole_runs_on_a_device_end_where_those_on_the_cpu_do(gpu, tmp_path, capsys, part):
    found, code = told(gpu, tmp_path / "gpu.json", "--only", part)
    assert code == 0 and found["failed"] == [], capsys.readouterr().out
    rows = {row["case"]: row for row in found["rows"]}
    wanted = {"kernels": {*CODECS.members}, "rules": {*RULES.members, "precision bf16"}}.get(part, set())
    assert wanted <= rows.keys() and all(row["part"] == part and row["said"] for row in rows.values())
    if part == "rules":
        assert all(rows[name]["figure"] == 0 and "same bits" in rows[name]["said"] for name in RULES.members)
    if part == "memory":
        assert rows["samples beside it"]["said"].endswith("cpu pinned")
        assert rows["samples on the device"]["said"].endswith("on cuda")


def test_the_exchanges_that_are_compared_cover_every_member(gpu):
    cases = dict(gpu.exchanges(SoloComm()))
    assert {f"sharded, {name} both ways" for name in LOSSY} | {f"replicated, {name}" for name in LINEAR} <= cases.keys()
    assert {f"aggregate {name}" for name in AGGREGATORS.members} <= cases.keys()
    assert {f"server {name}" for name in OPTIMIZERS.members if name != "feddyn"} <= cases.keys()
    with stand_in.gpu():
        for name in ("measured", "regions", "aggregate trimmed_mean", "sharded, topk both ways"):
            assert cases[name]()[:2] == (True, 0.0), name


def test_what_differs_on_the_device_is_a_row_that_failed_and_the_exit_code(gpu, tmp_path, monkeypatch, capsys):
    decode, rest = cuda.decode_half, cuda._rest
    monkeypatch.setattr(cuda, "decode_half", lambda *a: (decode(*a), a[1].mul_(1.0000002))[0])
    found, code = told(gpu, tmp_path / "gpu.json", "--only", "kernels")
    assert code == 1 and found["failed"] == ["kernels: bf16", "kernels: fp16"]
    assert "FAIL  kernels   bf16" in capsys.readouterr().out
    monkeypatch.setattr(cuda, "decode_half", decode)
    monkeypatch.setattr(cuda, "_rest", lambda v, decoded, into: rest(v, decoded * 0.999, into))
    with stand_in.gpu():
        ok, apart, _ = dict(gpu.exchanges(SoloComm()))["sharded, int8 both ways"]()
    assert not ok and apart > 1e-4


def test_what_no_time_is_left_for_failed(gpu, tmp_path):
    found, code = told(gpu, tmp_path / "gpu.json", "--only", "memory", "--seconds", "-1")
    assert code == 1 and {row["said"] for row in found["rows"]} == {"no time was left"}


def test_without_a_gpu_there_is_nothing_to_do_unless_one_is_required(gpu, capsys):
    gpu.main(["--quick"])
    assert capsys.readouterr().out == "gpu: no GPU\n"
    with pytest.raises(SystemExit, match=r"gpu: there is a GPU, and torch .* does not find it"):
        gpu.main(["--quick", "--required"])


def test_overlap_has_one_stream_for_the_whole_run(gpu):
    """torch caches memory per stream: one stream per round would hold thirty-two times as much."""
    with stand_in.gpu():
        before = stand_in.Stream.made
        gpu._steady(SoloComm())
    assert stand_in.Stream.made == before + 1
