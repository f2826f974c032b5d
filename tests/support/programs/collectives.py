"""Cases that every communicator must pass, on ranks (see cases.py) and threads (comm/test_comm.py)."""

import sys
import time

import numpy as np
import torch
from support.programs.cases import Skip, require_equal, run

from fedmpi import comm as ranks
from fedmpi.errors import ConfigError, DataMissing, ExchangeError, FedmpiError

CASES = {}
TYPES = {"float32": torch.float32, "float64": torch.float64, "int64": torch.int64}


def case(work):
    CASES[work.__name__] = work
    return work


def lengths(dtype):
    block = ranks.BLOCK_BYTES // dtype.itemsize
    return 0, 1, block - 1, block, block + 1, 3 * block + 7


def drawn(rank, length, dtype):
    """A rank's numbers, which every rank can compute. Sums of a few of these floats are exact; int64 sums wrap."""
    rng = np.random.default_rng([rank, length])
    if dtype == torch.int64:
        return rng.integers(-(2**63), 2**63, length, dtype=np.int64)
    return rng.integers(-(2**20), 2**20, length).astype(str(dtype).removeprefix("torch."))


def added(comm, length, dtype):
    """The expected sum over ranks."""
    with np.errstate(over="ignore"):
        return sum(drawn(rank, length, dtype) for rank in range(comm.size))


def over_types(name, work):
    for text, dtype in TYPES.items():
        CASES[f"{name}_{text}"] = lambda comm, dtype=dtype: [work(comm, n, dtype) for n in lengths(dtype)] and None


def reduce(comm, length, dtype):
    mine = drawn(comm.rank, length, dtype)
    send, recv = torch.from_numpy(mine.copy()), torch.full((length,), 7, dtype=dtype)
    comm.reduce(send, recv)
    wanted = added(comm, length, dtype) if comm.rank == 0 else np.full(length, 7)
    assert np.array_equal(recv.numpy(), wanted), f"length {length}"
    assert np.array_equal(send.numpy(), mine), f"length {length}: send was written"


def allreduce(comm, length, dtype):
    mine = drawn(comm.rank, length, dtype)
    send, recv = torch.from_numpy(mine.copy()), torch.full((length,), 7, dtype=dtype)
    comm.allreduce(send, recv)
    assert np.array_equal(recv.numpy(), added(comm, length, dtype)), f"length {length}"
    assert np.array_equal(send.numpy(), mine), f"length {length}: send was written"


def bcast(comm, length, dtype):
    vector = torch.from_numpy(drawn(comm.rank, length, dtype))
    comm.bcast(vector)
    assert np.array_equal(vector.numpy(), drawn(0, length, dtype)), f"length {length}"


def between_two(comm, length, dtype):
    """Every rank sends two vectors to rank 0, which receives them in the order sent, the last rank's first."""
    pending = []
    for number in (0, 1) if comm.rank else ():
        pending.append((comm.isend(kept := torch.from_numpy(drawn(comm.rank + number, length, dtype)), 0), kept))
    for rank in range(comm.size - 1, 0, -1) if comm.rank == 0 else ():
        for number in (0, 1):
            recv = torch.full((length,), 7, dtype=dtype)
            comm.wait(comm.irecv(recv, rank))
            assert np.array_equal(recv.numpy(), drawn(rank + number, length, dtype)), f"length {length}"
    for request, _ in pending:
        comm.wait(request)


for part in (reduce, allreduce, bcast, between_two):
    over_types(part.__name__, part)


@case
def bits_of_float_sums_repeat(comm):
    send = torch.from_numpy(np.random.default_rng(comm.rank).standard_normal(2_000_003).astype(np.float32))
    first, second = torch.zeros(len(send)), torch.zeros(len(send))
    comm.allreduce(send, first)
    comm.allreduce(send, second)
    assert torch.equal(first, second)
    wanted = sum(np.random.default_rng(r).standard_normal(len(send)).astype(np.float32) for r in range(comm.size))
    assert np.allclose(first.numpy(), wanted, atol=1e-6)


@case
def refuses_what_mpi_would_sum_wrongly(comm):
    bad = [torch.zeros(8, dtype=dtype) for dtype in (torch.bfloat16, torch.float16, torch.int8, torch.int16)]
    for vector in (*bad, torch.zeros(4, 4).T[:2]):
        copies = [] if vector.dtype == torch.int16 else [lambda send, recv: comm.bcast(send)]  # copies are right
        for call in (comm.reduce, comm.allreduce, *copies):
            text = raised(lambda call=call, vector=vector: call(vector, vector.clone()), ExchangeError)
            assert str(vector.dtype) in text or "contiguous" in text, text


@case
def share_gives_everybodys_entries(comm):
    values = np.zeros(2 * comm.size + 1)
    values[2 * comm.rank : 2 * comm.rank + 2] = comm.rank + 0.5, -np.inf if comm.rank == 0 else comm.rank
    total = comm.share(values)
    wanted = [v for r in range(comm.size) for v in (r + 0.5, -np.inf if r == 0 else r)] + [0.0]
    require_equal("total", total.tolist(), [float(v) for v in wanted])
    require_equal("what was given", values[2 * comm.rank], comm.rank + 0.5)


@case
def share_lets_nan_through(comm):
    values = np.zeros(comm.size + 1)
    values[comm.rank] = np.nan if comm.rank == comm.size - 1 else 1.0
    total = comm.share(values)
    require_equal("nans", np.flatnonzero(np.isnan(total)).tolist(), [comm.size - 1])
    require_equal("the others", total[: comm.size - 1].tolist(), [1.0] * (comm.size - 1))


@case
def sharing_gives_the_same_once_it_is_over(comm):
    values = np.zeros((comm.size, 2))
    values[comm.rank] = comm.rank + 0.5, 1.0
    before = comm.bytes_control
    pending, total = comm.ishare(values)
    comm.wait(pending)
    require_equal("total", total.tolist(), [[r + 0.5, 1.0] for r in range(comm.size)])
    require_equal("counted", comm.bytes_control - before, 32 * comm.size if comm.size > 1 else 0)


@case
def share_calls_meanwhile_while_it_waits(comm):
    calls = []
    if comm.rank == 0:
        time.sleep(0.2)
    comm.share(np.zeros(1), lambda: calls.append(comm.rank))
    assert comm.rank == 0 or len(calls) > 20, len(calls)


@case
def gather_keeps_rank_order(comm):
    require_equal("rows", comm.gather(bytes([comm.rank, 255])), [bytes([r, 255]) for r in range(comm.size)])
    require_equal("empty rows", comm.gather(b""), [b""] * comm.size)


@case
def say_is_heard_from_every_speaker(comm):
    for speaker in range(comm.size):
        for text in ("", f"Größe {speaker}", "no text: \udcff", "x" * 100_000):
            require_equal("heard", comm.broadcast_text(text if comm.rank == speaker else "not me", speaker), text)


def raised(work, kind=FedmpiError):
    """The error that `work` raises, of exactly this class."""
    try:
        work()
    except FedmpiError as error:
        require_equal("class", type(error), kind)
        return str(error)
    raise AssertionError("nothing was raised")


def failing(comm, errors):
    """Work that raises on the ranks that have an error."""

    def work():
        if comm.rank in errors:
            raise errors[comm.rank]
        return comm.rank

    return work


@case
def together_one_fails_all_raise_it(comm):
    for bad in range(comm.size):
        text = raised(lambda bad=bad: comm.collectively(failing(comm, {bad: ConfigError("no file é")})), ConfigError)
        require_equal("message", text, "no file é" if comm.size == 1 else f"rank {bad}: no file é")
        text = raised(lambda bad=bad: comm.collectively(failing(comm, {bad: ValueError("a bug")})))
        assert "Traceback" in text and "ValueError: a bug" in text, text
        require_equal("message of rank 0", comm.broadcast_text(text, 0), text)


@case
def together_all_fail_alike(comm):
    text = raised(lambda: comm.collectively(failing(comm, dict.fromkeys(range(9), ConfigError("same")))), ConfigError)
    require_equal("message", text, "same")
    require_equal("afterwards", comm.collectively(failing(comm, {})), comm.rank)


@case
def together_first_rank_decides_the_class(comm):
    errors = {0: ConfigError("mine"), comm.size - 1: ValueError("yours")} if comm.size > 1 else {0: ConfigError("mine")}
    text = raised(lambda: comm.collectively(failing(comm, errors)), ConfigError)
    assert text.endswith("mine"), text


@case
def together_lists_what_is_wrong_with_each_ranks_input(comm):
    errors = {r: ConfigError(f"silo {r // 2} é") for r in range(comm.size) if r != 1}
    text = raised(lambda: comm.collectively(failing(comm, errors)), ConfigError)
    wanted = {
        1: "silo 0 é",
        2: "rank 0: silo 0 é",
        3: "rank 0: silo 0 é; rank 2: silo 1 é",
        4: "rank 0: silo 0 é; ranks 2, 3: silo 1 é",
    }
    require_equal("message", text, wanted[comm.size])
    errors = {r: DataMissing("x" * 10_000) if r == 0 else ConfigError(f"{r}") for r in range(comm.size)}
    text = raised(lambda: comm.collectively(failing(comm, errors)), ConfigError)
    assert len(text) < 2_500 and text.endswith(f"rank {comm.size - 1}: {comm.size - 1}") == (comm.size > 1), text


@case
def same_names_the_ranks_that_differ(comm):
    comm.require_equal("the seed", b"a")
    if comm.size > 1:
        last = comm.size - 1
        text = raised(
            lambda: comm.require_equal("the seed", b"b" if comm.rank == last else b"a", ConfigError), ConfigError
        )
        require_equal("message", text, f"the seed differs: rank 0 against rank {last}")
        text = raised(lambda: comm.require_equal("it", b"b" if comm.rank == 0 else b"a"), ExchangeError)
        others = ", ".join(str(r) for r in range(1, comm.size))
        require_equal("message", text, f"it differs: rank 0 against rank{'s' if comm.size > 2 else ''} {others}")


def quiet(comm):
    """Assert that no message is in flight on this communicator."""
    comm.barrier()
    left = isinstance(comm, ranks.MpiComm) and comm._control.Iprobe()
    comm.barrier()  # before any rank sends the next
    assert not left, "a notice is left"


@case
def notices_reach_everybody_from_anybody(comm):
    for source in range(comm.size):
        fresh = comm.dup()
        before = fresh.notices()
        fresh.gather(b"-")  # no rank is ahead
        require_equal("before", before, 0)
        if fresh.rank == source:
            fresh.notify(1)
        deadline = time.monotonic() + 10
        while fresh.rank != source and fresh.notices() < 1:
            # Rank 0 relays whenever it polls.
            assert time.monotonic() < deadline, f"rank {fresh.rank} heard nothing of rank {source}"
            time.sleep(1e-3)
        if fresh.rank == 0:
            fresh.notices()
        fresh.finish()
        quiet(fresh)


@case
def the_worst_notice_wins(comm):
    fresh = comm.dup()
    fresh.notify(2 if fresh.rank == fresh.size - 1 else 1)
    deadline = time.monotonic() + 10
    while fresh.size > 1 and fresh.rank not in (fresh.size - 1,) and fresh.notices() < 2:
        assert time.monotonic() < deadline, f"rank {fresh.rank} heard {fresh.notices()}"
        time.sleep(1e-3)
    fresh.finish()
    quiet(fresh)


@case
def posts_arrive_once_in_order_at_one_rank(comm):
    fresh = comm.dup()
    last, arrived, deadline = fresh.size - 1, [], time.monotonic() + 10
    for number in range(3):
        if fresh.rank != last:
            fresh.post(last, (fresh.rank, number))
    while fresh.rank == last and len(arrived) < 3 * last:
        arrived += fresh.posted()
        assert time.monotonic() < deadline, f"only {arrived} arrived"
    for sender in range(last if fresh.rank == last else 0):
        require_equal("of one sender", [n for s, n in arrived if s == sender], [(sender, n, 0) for n in range(3)])
    if fresh.rank == last and last:
        fresh.post(0, (1, 2, 3))  # nobody reads it
    fresh.gather(b"-")
    fresh.finish()
    require_equal("after the run's last call", fresh.posted(), [])
    quiet(fresh)


@case
def finish_drains_what_nobody_read(comm):
    fresh = comm.dup()
    fresh.notify(1)
    fresh.notify(2)
    fresh.finish()
    quiet(fresh)
    require_equal("notices after the run's last call", fresh.notices(), 0)
    fresh.finish()  # belongs to the next run
    quiet(fresh)


@case
def finish_drops_vectors_that_nobody_received(comm):
    fresh = comm.dup()
    for length in (10, 3 << 20) if fresh.rank else ():  # the second one is several messages
        fresh.isend(torch.full((length,), -1.0), 0)  # its memory is given up at once
    fresh.finish()
    if fresh.rank:
        fresh.wait(fresh.isend(torch.full((10,), float(fresh.rank)), 0))
    for rank in range(1, fresh.size) if fresh.rank == 0 else ():
        fresh.wait(fresh.irecv(recv := torch.zeros(10), rank))
        require_equal("the next run's vector", recv.tolist(), [float(rank)] * 10)
    fresh.finish()


@case
def counters_count_what_collectives_were_given(comm):
    fresh = comm.dup()  # its counts start at 0
    vector, out = torch.zeros(1001), torch.zeros(1001)
    before = fresh.bytes_control
    fresh.reduce(vector, out)
    up = 4004 if fresh.rank else 0
    require_equal("after reduce", (fresh.bytes_up, fresh.bytes_down), (up, 0))
    fresh.bcast(vector)
    down = 4004 if fresh.rank else 0
    require_equal("after bcast", (fresh.bytes_up, fresh.bytes_down), (up, down))
    fresh.allreduce(vector, out)
    both = 4004 if fresh.size > 1 else 0
    require_equal("after allreduce", (fresh.bytes_up, fresh.bytes_down), (up + both, down + both))
    fresh.share(np.zeros(10))
    require_equal("control", fresh.bytes_control - before, 160 if fresh.size > 1 else 0)


@case
def places_on_this_host(comm):
    require_equal("local", (comm.local_rank, comm.local_size), (comm.rank, comm.size))
    require_equal("hosts", len(set(comm.hosts)), 1)
    require_equal("number of hosts", len(comm.hosts), comm.size)
    require_equal("machines", (len(set(comm.machines)), len(comm.machines)), (1, comm.size))


def parts(comm, rank):
    """How much a rank sends to each: nothing to the first ones, and some to itself."""
    return [max(0, to + rank - 1) for to in range(comm.size)]


def laid(lengths, gap=2):
    """Parts in sequence, with gaps between them."""
    return [(sum(lengths[:i]) + gap * i, length) for i, length in enumerate(lengths)]


@case
def alltoall_gives_each_rank_its_part(comm):
    sent = laid(parts(comm, comm.rank))
    received = laid([parts(comm, rank)[comm.rank] for rank in range(comm.size)], gap=1)
    send = torch.arange(100.0) + 1000 * comm.rank
    recv, before = torch.full((100,), -1.0), comm.bytes_up
    comm.wait(comm.alltoall(send, sent, recv, received))
    wanted = torch.full((100,), -1.0)
    for rank, (start, length) in enumerate(received):
        there = laid(parts(comm, rank))[comm.rank][0]
        wanted[start : start + length] = torch.arange(there, there + length) + 1000.0 * rank
    require_equal("received", recv.tolist(), wanted.tolist())
    away = sum(length for rank, (_, length) in enumerate(sent) if rank != comm.rank)
    require_equal("counted", comm.bytes_up - before, 4 * away)


@case
def allgather_gives_all_ranks_all_parts(comm):
    spans = laid([3 * rank for rank in range(comm.size)])
    vector, before = torch.full((40,), -1.0), comm.bytes_down
    start, length = spans[comm.rank]
    vector[start : start + length] = comm.rank
    comm.wait(comm.allgather(vector, spans))
    wanted = torch.full((40,), -1.0)
    for rank, (start, length) in enumerate(spans):
        wanted[start : start + length] = rank
    require_equal("vector", vector.tolist(), wanted.tolist())
    away = sum(length for rank, (_, length) in enumerate(spans) if rank != comm.rank)
    require_equal("counted", comm.bytes_down - before, 4 * away)


@case
def several_collectives_are_under_way_at_once(comm):
    size, spans = comm.size, laid([2] * comm.size, gap=0)
    vectors = [torch.full((2 * size,), float(10 * number + comm.rank)) for number in range(4)]
    arrived = [torch.zeros(2 * size) for _ in vectors]
    begun = [comm.alltoall(v, spans, a, spans) for v, a in zip(vectors, arrived, strict=True)]
    values = np.zeros(size)
    values[comm.rank] = comm.rank + 1
    pending, total = comm.ishare(values)
    comm.progress()
    for one in (pending, *reversed(begun)):
        comm.wait(one)
    require_equal("shared", total.tolist(), [rank + 1.0 for rank in range(size)])
    for number, found in enumerate(arrived):
        require_equal("arrived", found.tolist(), [10.0 * number + rank for rank in range(size) for _ in range(2)])


@case
def split_makes_groups_in_rank_order(comm):
    before = comm.counted()
    odd = comm.split(comm.rank % 2, last=comm.rank == 0)
    mine = [rank for rank in range(comm.size) if rank % 2 == comm.rank % 2]
    order = [*mine[1:], 0] if 0 in mine else mine
    require_equal("ranks", odd.gather(bytes([comm.rank])), [bytes([rank]) for rank in order])
    require_equal("mine", order[odd.rank], comm.rank)
    odd.bcast(torch.zeros(5))
    down = comm.counted()[1] - before[1]
    require_equal("counted here too", down, 20 if odd.rank else 0)
    alone = comm.split(0 if comm.rank == comm.size - 1 else -1)
    require_equal("left out", alone is None, comm.rank != comm.size - 1)


@case
def what_ranks_share_is_seen_after_a_barrier(comm):
    kept = comm.free_shared()
    assert comm.one_node() and comm.node() == 0 and comm.room(1 << 20) == ""
    mine = comm.shared(3, torch.float32)
    one = comm.shared(2, torch.int64, owner=comm.size - 1)
    require_equal("first", [v.tolist() for v in mine] + [v.tolist() for v in one], [[0.0] * 3] * comm.size + [[0, 0]])
    comm.barrier()
    mine[comm.rank].fill_(comm.rank + 1)
    if comm.rank == 0:
        one[0].fill_(7)
    comm.barrier()
    require_equal("each", [v.tolist() for v in mine], [[r + 1.0] * 3 for r in range(comm.size)])
    require_equal("the owner's", one[0].tolist(), [7, 7])
    del mine, one
    require_equal("left", comm.free_shared(), kept)


@case
def discarded_memory_goes_back_to_the_system(comm):
    kept = comm.free_shared()
    mine = comm.shared(1 << 16, torch.float32)
    for vector in mine:
        vector[:] = 1.0
    comm.barrier()
    comm.discard_shared()
    if isinstance(comm, ranks.MpiComm) and comm.size > 1 and sys.platform == "linux":
        for vector in mine:  # whole pages only
            require_equal("inside", vector[1024:-1024].count_nonzero().item(), 0)
    comm.barrier()
    del mine
    require_equal("left", comm.free_shared(), kept)


@case
def allocated_vectors_are_zeroed(comm):
    for dtype in TYPES.values():
        vector = comm.allocate(1000, dtype)
        require_equal("vector", (vector.dtype, vector.tolist()), (dtype, [0] * 1000))


@case
def who_is_left_goes_on_where_nobody_is_lost(comm):
    left = comm.shrink()
    require_equal("ranks", (left.rank, left.size), (comm.rank, comm.size))
    require_equal("rows", left.gather(bytes([comm.rank])), [bytes([rank]) for rank in range(comm.size)])


def bcast_beyond_2_to_the_31(comm):
    """More elements than a C int counts, in a dtype of one byte."""
    length = 2**31 + 4097
    with open("/proc/meminfo") as file:
        free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    if comm.share(np.array([free > 2.5 * length]))[0] < comm.size:
        raise Skip(f"needs {2.5 * length / 2**30:.0f} GiB of free memory, there are {free / 2**30:.0f}")
    vector = torch.zeros(length, dtype=torch.uint8)
    blocks = list(ranks.blocks(length, 1))
    ends = torch.tensor([i for part in blocks for i in (part.start, part.stop - 1)])
    marks = torch.arange(len(ends)).remainder(255).add(1).to(torch.uint8)
    if comm.rank == 0:
        vector[ends] = marks
    comm.bcast(vector)
    assert torch.equal(vector[ends], marks)
    assert sum(int(torch.count_nonzero(vector[part])) for part in blocks) == len(ends)


LARGE = {"bcast_beyond_2_to_the_31": bcast_beyond_2_to_the_31}  # at n=2 only

if __name__ == "__main__":
    world = ranks.connect()
    run(CASES | (LARGE if world.size == 2 else {}), world)
