"""The benches, on small vectors: what their rows say. Times must exist, but their values are not checked."""

import functools
import itertools
import json
import threading
from socket import socketpair
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.mpi import FEDMPI, Done, mpirun
from support.programs.place import own_lines

from fedmpi.bench import arrivals, exchange
from fedmpi.bench.baselines import Tcp
from fedmpi.comm import SoloComm
from fedmpi.errors import ConfigError
from fedmpi.exchange import choose
from fedmpi.exchange.dense import Replicated, Root
from fedmpi.exchange.sharded import Sharded

PARAMS = 200_000
GBIT = 10
FIELDS = (
    *("plan", "codec", "feedback", "ranks", "params", "seconds", "x_memcpy", "x_allreduce", "x_gloo", "x_tcp"),
    *("wire_bytes_per_param_up", "wire_bytes_per_param_down", "link_share"),
)
PLANS = [(plan, "identity", False) for plan in ("replicated", "shared_memory", "sharded", "root")]
CODECS = [("sharded", codec, codec != "bf16") for codec in ("bf16", "int8", "int4", "topk")]
ALONE = [("memcpy", None, None), *PLANS, *CODECS, ("allreduce", None, None)]
ROWS = {1: ALONE, 2: [*ALONE, ("gloo", None, None), ("tcp", None, None)]}
WIRE = {
    ("root", "identity"): 4.0002,  # the vector and its weight
    ("replicated", "identity"): 4.0002,
    ("sharded", "identity"): 4.0,
    ("sharded", "bf16"): 2.0,
    ("sharded", "int8"): 1.02,
    ("sharded", "int4"): 0.52,
    ("sharded", "topk"): 0.06,
    ("tcp", None): 4.0,
}  # at most so many bytes per parameter, and at least 4/5 of that

Row = dict[str, Any]


def bench(n: int, *arguments: str, **env: str) -> Done:
    return mpirun(n, FEDMPI, "bench", *arguments, env=env, timeout_s=120)


@functools.cache
def run(n: int) -> Done:
    return bench(n, "exchange", "--params", "2e5", "--repeats", "2", "--link-gbit", str(GBIT), "--json")


def rows(n: int) -> dict[tuple[str, str | None], Row]:
    done = run(n)
    assert done.rc == 0, done.tails
    return {(row["plan"], row["codec"]): row for row in json.loads(done.out)["rows"]}


@pytest.mark.parametrize("n", (1, 2))
@pytest.mark.mpi
def test_rows_and_their_fields(n: int) -> None:
    found = rows(n)
    assert [(row["plan"], row["codec"], row["feedback"]) for row in found.values()] == ROWS[n]
    rivals = [rival for rival in ("memcpy", "allreduce", "gloo", "tcp") if (rival, None) in found]
    for row in found.values():
        assert tuple(row) == FIELDS
        assert (row["ranks"], row["params"]) == (n, PARAMS)
        assert list(row["seconds"]) == ["median", "min", "max"]
        assert 0 < row["seconds"]["min"] <= row["seconds"]["median"] <= row["seconds"]["max"]
        for rival in ("memcpy", "allreduce", "gloo", "tcp"):
            ratio = row["seconds"]["median"] / found[rival, None]["seconds"]["median"] if rival in rivals else None
            assert row[f"x_{rival}"] == (None if ratio is None else pytest.approx(ratio)), rival
    said = own_lines(run(n))
    assert len(said) == (n == 1), said
    assert n > 1 or "no row for gloo and tcp: one rank has nobody to send to" in said[0]


@pytest.mark.mpi
def test_wire_bytes_are_those_that_were_sent() -> None:
    for key, row in rows(2).items():
        for way in ("up", "down"):
            figure = row[f"wire_bytes_per_param_{way}"]
            if key in WIRE:
                assert 0.8 * WIRE[key] < figure <= WIRE[key], (key, way)
            else:
                assert figure is None, (key, way)
    for key, row in rows(1).items():
        assert row["wire_bytes_per_param_up"] is row["wire_bytes_per_param_down"] is row["link_share"] is None, key


@pytest.mark.mpi
def test_link_share_is_that_of_the_busiest_rank() -> None:
    found = rows(2)
    for key, row in found.items():
        if key[0] in ("memcpy", "shared_memory"):
            assert row["link_share"] is None
            continue
        # With two ranks, each sends a whole vector under any plan: half of it or all of it up.
        wire = sum(row[f"wire_bytes_per_param_{way}"] or 4.0 for way in ("up", "down")) / 2
        least = wire * PARAMS * 8 / (row["seconds"]["median"] * GBIT * 1e9)
        assert row["link_share"] == pytest.approx(least, rel=0.05), key


def test_link_bytes_of_unequal_owners() -> None:
    """Three ranks that own 5, 3 and 2 of 10: each sends others their parts, and its own to both others."""
    owned = np.array([5.0, 3.0, 2.0])
    up_R = down_R = 10 - owned
    assert Sharded.link_bytes(up_R, down_R, 10) == 15.0  # rank 0: 5 up and 10 down
    assert Sharded.link_bytes(np.zeros(3), down_R, 10) == 10.0  # rank 0 sends 5 twice; rank 2 receives 8
    assert Replicated.link_bytes(up_R, down_R, 12) == 16.0
    assert Root.link_bytes(up_R, down_R, 12) == 12.0


@pytest.mark.mpi
def test_without_a_link_rate_there_is_no_share_and_the_table_begins_with_ratios() -> None:
    done = bench(2, "exchange", "--params", "2e4", "--repeats", "1", "--codec", "{name: topk, ratio: 0.02}")
    assert done.rc == 0, done.tails
    head, *lines = done.out.partition("\n\n")[0].splitlines()  # lines with figures of merit follow
    columns = head.split()[1:]
    ratios = [columns.index(f"x_{rival}") for rival in ("allreduce", "tcp", "gloo", "memcpy")]
    assert max(ratios) < columns.index("median_s")
    assert columns[:4] == ["plan", "codec", "feedback", "ranks"]
    cells = {line.split()[0]: line.split() for line in lines}
    assert [cells["tcp"][i] for i in (1, 2, columns.index("x_tcp"), columns.index("link_share"))] == [
        *("-", "-", "1.0000", "-")
    ]
    chosen = [line for line in lines if "{name: topk, ratio: 0.02}" in line]
    assert len(chosen) == 1 and " yes " in chosen[0]
    assert not any("int8" in line for line in lines)


@pytest.mark.mpi
def test_a_rival_that_cannot_be_had_is_left_out_aloud() -> None:
    done = bench(
        2, "exchange", "--params", "2e4", "--repeats", "1", "--codec", "identity", "--json", GLOO_SOCKET_IFNAME="none0"
    )
    assert done.rc == 0, done.tails
    found = json.loads(done.out)["rows"]
    assert [row["plan"] for row in found] == ["memcpy", *(plan for plan, *_ in PLANS), "allreduce", "tcp"]
    assert all(row["x_gloo"] is None for row in found)
    said = own_lines(done)
    assert len(said) == 1 and said[0].startswith("fedmpi: no row for gloo: ") and "none0" in said[0], said


REFUSED = {
    "int9": "--codec: no codec 'int9'; did you mean 'int8'?",
    "{name: topk, ration: 0.1}": "--codec: codec 'topk' has no 'ration'; did you mean 'ratio'?",
    "{name: topk, ratio: 2}": "--codec.ratio: input should be less than or equal to 1",
    "{name: topk": "--codec {name: topk: give a name, or a mapping",
    "{}": "--codec: needs a 'name'",
    "3": "--codec: 3 is not a valid codec",
}


@pytest.mark.parametrize("text", REFUSED)
def test_refused_codecs(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        exchange.channel(text)
    assert str(error.value).startswith(REFUSED[text]) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [("--codec", "int9", REFUSED["int9"]), ("--link-gbit", "0", "--link-gbit 0: give a positive number")],
    ids=("codec", "link"),
)
@pytest.mark.mpi
def test_what_is_refused_is_one_line_from_all_ranks(option: str, value: str, says: str) -> None:
    done = bench(2, "exchange", option, value)
    assert (done.rc, done.out) == (2, ""), done.tails
    said = own_lines(done)
    assert len(said) == 1 and said[0].startswith(f"fedmpi: {says}"), said


def test_feedback_goes_with_every_codec_that_loses_something(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [exchange.channel(name).feedback for name in ("identity", "bf16", "int8", "randk")] == [
        *(False, True, True, True)
    ]
    made, make = [], choose.make

    def noted(*about: Any) -> Any:
        made.append(make(*about))
        return made[-1]

    monkeypatch.setattr(choose, "make", noted)
    found = exchange.exchange(SoloComm(), 5000, 1, [exchange.channel("int8")])
    assert [row["codec"] for row in found if row["feedback"]] == ["int8"]
    lost = {one.key: one.tensor for one in made[-1].holders.state()}
    assert lost["up", "rank", "feedback"].any() and lost["down", "feedback"].any()
    assert made[-1].round == 2  # each round has its own number


def test_raw_tcp_moves_what_plan_sharded_moves() -> None:
    ranks, num_params = 3, 100_001
    peers: list[dict[int, Any]] = [{} for _ in range(ranks)]
    for a, b in itertools.combinations(range(ranks), 2):
        peers[a][b], peers[b][a] = socketpair()
    for sockets in peers:
        for each in sockets.values():
            each.setblocking(False)
    comms = [SimpleNamespace(rank=rank, size=ranks, bytes_up=0, bytes_down=0) for rank in range(ranks)]
    tcp = [Tcp(comm, num_params, peers[comm.rank]) for comm in comms]  # type: ignore[arg-type]
    drawn = [np.random.default_rng(rank).integers(0, 256, 4 * num_params, np.uint8).tobytes() for rank in range(ranks)]
    for each, values in zip(tcp, drawn, strict=True):
        each.delta[:] = values
        each.params[:] = values[::-1]
    for _ in range(2):
        threads = [threading.Thread(target=each, daemon=True) for each in tcp]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in threads)
    cuts = [4 * (num_params * rank // ranks) for rank in range(ranks + 1)]
    pieces = [drawn[rank][::-1][cuts[rank] : cuts[rank + 1]] for rank in range(ranks)]
    for rank, each in enumerate(tcp):
        assert bytes(each.params) == b"".join(pieces)
        for other, came in each.came.items():
            assert bytes(came) == drawn[other][cuts[rank] : cuts[rank + 1]]
    for way in ("bytes_up", "bytes_down"):
        assert sum(getattr(comm, way) for comm in comms) == 2 * 4 * num_params * (ranks - 1)
    for sockets in peers:
        for each in sockets.values():
            each.close()


def test_deltas_are_no_constant_and_differ_by_rank() -> None:
    first, second = (exchange.noise(rank, 10_000) for rank in range(2))
    assert not torch.equal(first, second)
    assert float(first.std()) == pytest.approx(1e-3, rel=0.05)


def test_an_update_costs_the_server_about_a_pass() -> None:
    rows = arrivals.arrivals(20_000, 2)
    assert [row["size"] for row in rows] == [1, 2, 10]
    for row in rows:
        assert row["updates_per_s"] == pytest.approx(1 / row["seconds"]["median"]) and row["x_memcpy"] > 0


@pytest.mark.parametrize("size", arrivals.SIZES)
def test_a_timed_round_is_a_round_of_fedbuff(size: int) -> None:
    first, other = torch.ones(100), torch.full((100,), 3.0)
    run = arrivals._round(size, first, other)
    run()
    run()
    cells = dict(zip(run.__code__.co_freevars, (cell.cell_contents for cell in run.__closure__), strict=True))
    less = [(1 + i) ** -0.5 for i in range(size)]
    wanted = 2 * sum(s * (3.0 if i else 1.0) for i, s in enumerate(less)) / sum(less)
    assert torch.allclose(cells["params_P"], torch.full((100,), wanted))


@pytest.mark.mpi
def test_checkpoint() -> None:
    done = bench(2, "checkpoint", "--params", "2e5", "--rounds", "12", "--json")
    assert done.rc == 0, done.tails
    (row,) = json.loads(done.out)["rows"]
    assert list(row) == ["waited", "ratio", "params", "round_s", "rounds", "write_s", "resume_s"]
    assert row["write_s"] > 0 and 0 < row["resume_s"] < 60
    assert 0 <= row["waited"] < 1 and row["ratio"] > 0 and row["round_s"] > 0
    assert row["rounds"] == 12 and abs(row["params"] / PARAMS - 1) < 0.02
    assert bench(1, "checkpoint", "--rounds", "10").rc == 2  # no round would overlap with a write
