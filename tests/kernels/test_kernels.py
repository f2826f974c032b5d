"""The kernels equal their plain version, bit for bit."""

import numpy as np
import pytest
import torch
from support.codecs import LENGTHS, buffer, every_codec, vector

from fedmpi.codecs import CODECS, base
from fedmpi.codecs.topk import index_bytes
from fedmpi.errors import ExchangeError
from fedmpi.kernels import cpu, cuda, plain

ROOMS = {"cpu": (cpu, base.to_array), "plain": (plain, base.to_array), "cuda": (cuda, base.to_tensor)}


def special(num):
    """Ties, zeros of both signs, runs of equal values, subnormals, the largest numbers, halves of a step."""
    x = torch.zeros(num)
    pool = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-40, 1.2e-38, 0.5, 63.5 / 127, 2.5 / 7, 1e-4, 1.5e-4, 60000.0])
    places = torch.from_numpy(np.random.default_rng(num).integers(0, len(pool), num))
    x[:] = pool[places]
    x[num // 2 :] = x[num // 2 :].clamp(-1e-38, 1e-38)
    return x


def everything(codec, room, monkeypatch, x, feedback):
    monkeypatch.setattr(base, "_kernels", lambda device: ROOMS[room])
    num = len(x)
    payload, residual, out, total = buffer(codec, num), x.flip(0) * 0.1, torch.ones(num), x * 0.3
    num_bytes = codec.encode(x, payload, 2**63 + 77, 0.7, residual if feedback else None)
    codec.decode(payload, out, 2**63 + 77)
    codec.add(payload, total, 2**63 + 77, 0.3)
    return payload[:num_bytes], residual, out, total


@pytest.mark.parametrize("room", ["cpu", "cuda"])
@pytest.mark.parametrize("make", [vector, special])
@every_codec
def test_kernels_have_the_bits_of_their_twin(codec, room, make, monkeypatch):
    for num in LENGTHS[1:]:
        for feedback in (False, True):
            found = everything(codec, room, monkeypatch, make(num), feedback)
            wanted = everything(codec, "plain", monkeypatch, make(num), feedback)
            for what, mine, theirs in zip(("payload", "residual", "out", "sum"), found, wanted, strict=True):
                assert mine.shape == theirs.shape, (num, what)
                # compare bits: a zero's sign counts too
                assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8)), (num, feedback, what)


@pytest.mark.parametrize("room", ["cpu", "plain", "cuda"])
@pytest.mark.parametrize("at", [0, 5, -1])
@every_codec
def test_kernels_refuse_alike(codec, room, at, monkeypatch):
    x = torch.ones(5000)
    x[at] = float("nan")
    with pytest.raises(ExchangeError, match="NaN"):
        everything(codec, room, monkeypatch, x, False)


def test_splitmix_and_murmur_are_what_they_are_called():
    assert plain.hashed(0, np.arange(2)).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]  # Vigna's splitmix64.c
    h = plain.uniforms(5, 300)
    seed = int(plain.hashed(5, np.arange(1))[0]) >> 32
    word = (seed + 3 * 0x9E3779B9) % 2**32
    word = (word ^ word >> 16) * 0x85EBCA6B % 2**32
    word = (word ^ word >> 13) * 0xC2B2AE35 % 2**32
    assert h[3] == ((word ^ word >> 16) >> 8) / 2**24
    many = plain.uniforms(6, 200_000)
    assert many.min() >= 0 and many.max() < 1
    assert abs(many.mean() - 0.5) < 0.003 and abs(many.var() - 1 / 12) < 0.001
    assert abs(np.corrcoef(many[1:], many[:-1])[0, 1]) < 0.01


def test_every_half_comes_back_as_itself():
    for bfloat, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        patterns = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
        halves = patterns.view(dtype)[patterns.view(dtype).isfinite()]
        out, payload = np.empty(len(halves), np.float32), np.empty(2 * len(halves), np.uint8)
        cpu.decode_half(halves.view(torch.uint8).numpy(), out, np.float32(1), False, bfloat)
        assert np.array_equal(out.view(np.int32), halves.float().numpy().view(np.int32))
        none = np.empty(0, np.float32)
        assert cpu.encode_half(out, np.float32(1), none, none, payload, bfloat) == payload.size
        assert np.array_equal(payload, halves.view(torch.uint8).numpy())


def test_halves_round_as_torch_does():
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 2**32, 400_000, dtype=np.uint32)
    patterns[:100_000] = (patterns[:100_000] & 0x8FFFFFFF) | 0x30000000  # around float16's subnormals
    x = patterns.view(np.float32)
    none = np.empty(0, np.float32)
    for bfloat, limit, dtype in ((True, 3.38e38, torch.bfloat16), (False, 65519.0, torch.float16)):
        fits = x[np.abs(x) < limit]
        payload = np.empty(2 * len(fits), np.uint8)
        cpu.encode_half(fits, np.float32(1), none, none, payload, bfloat)
        assert np.array_equal(payload, torch.from_numpy(fits).to(dtype).view(torch.uint8).numpy())


@pytest.mark.parametrize("room", ["cpu", "cuda"])
def test_selection_is_exact_whatever_the_values(room):
    rng = np.random.default_rng(1)
    num = 20_000
    spiky = np.zeros(num, np.float32)
    spiky[rng.choice(num, 300, replace=False)] = 1.0
    periodic = np.where(np.arange(num) % 4 == 0, 100.0, 1.0).astype(np.float32)  # a strided sample misses some values
    normal = rng.standard_normal(num).astype(np.float32)
    rounded = np.round(normal * 4).astype(np.float32)
    uneven = np.full(num, 0.5, np.float32)  # here it sees only the few large ones, not those at the floor
    uneven[0:6400:2], uneven[1:2000:2] = 100.0, 1.0
    for x in (normal, spiky, periodic, rounded, uneven, np.ones(num, np.float32), normal[:100], -np.abs(normal)):
        for k in {1, 3, len(x) // 100 or 1, len(x) // 4, len(x)}:
            for floor in (0, int(np.float32(1.0).view(np.int32))):
                wanted, found = np.zeros(k, np.int64), np.zeros(k, np.int64)
                none = np.empty(0, np.float32)
                count = plain.select(x, 1.0, none, none, k, floor, wanted)
                if room == "cpu":
                    assert cpu.select(x, np.float32(1), none, none, k, floor, found) == count
                    kept = np.empty_like(x)
                    assert cpu.select(x, np.float32(1), none, kept, k, floor, found) == count
                    assert np.array_equal(kept, x)
                else:
                    tensors = [torch.from_numpy(a) for a in (x, none, none, found)]
                    on_device, empty, nothing, into = tensors
                    assert cuda.select(on_device, 1.0, empty, nothing, k, floor, into) == count
                assert np.array_equal(found, wanted)


@pytest.mark.parametrize("num", [1, 2, 9, 64, 1000])
def test_packed_indices_come_back(num):
    rng = np.random.default_rng(num)
    for k in range(0, num + 1, max(1, num // 50)):
        indices = np.sort(rng.choice(num, k, replace=False)).astype(np.int64)
        bound = index_bytes(k, num, True)
        bytes_, back = {}, {}
        for name, room in (("cpu", cpu), ("plain", plain), ("cuda", cuda)):
            payload, found = np.zeros(bound + 8, np.uint8), np.zeros(k, np.int64)
            turn = torch.from_numpy if room is cuda else np.asarray
            end = room.pack_sorted(turn(indices), num, turn(payload))
            assert end <= bound < end + 4
            assert room.unpack_sorted(turn(payload), num, turn(found)) == end
            bytes_[name], back[name] = payload, found
            assert np.array_equal(found, indices)
        assert np.array_equal(bytes_["cpu"], bytes_["plain"]) and np.array_equal(bytes_["cuda"], bytes_["plain"])


def test_what_is_damaged_writes_nowhere_else():
    for name, room in (("cpu", cpu), ("plain", plain), ("cuda", cuda)):
        turn = torch.from_numpy if room is cuda else np.asarray
        payload, found = np.zeros(64, np.uint8), np.zeros(30, np.int64)
        indices = np.append(np.arange(2900, 2929), 3005)
        room.pack_sorted(turn(indices), 3008, turn(payload))
        assert room.unpack_sorted(turn(payload), 3000, turn(found)) == -1, name
    codec, out = CODECS.build("chunk_topk", "codec"), torch.zeros(5000)
    damaged = torch.full((codec.max_bytes(10),), 255, dtype=torch.uint8)
    cuda.decode_chunks(damaged, out[:10], 1.0, True, codec.keep, codec.bits)
    assert not out[10:].any()
    codec.decode(torch.full((codec.max_bytes(10),), 255, dtype=torch.uint8), out[:10])
    assert not out[10:].any()


def test_draws_cover_every_run_once():
    for n, k in ((10, 3), (1000, 10), (7, 7), (10**10, 5)):
        drawn = {}
        for name, room in (("cpu", cpu), ("plain", plain), ("cuda", cuda)):
            indices = np.zeros(k, np.int64)
            room.draw(np.uint64(2**63 + 9), n, torch.from_numpy(indices) if room is cuda else indices)
            drawn[name] = indices.tolist()
            assert all(j * n // k <= i < (j + 1) * n // k for j, i in enumerate(indices.tolist()))
        assert drawn["cpu"] == drawn["plain"] == drawn["cuda"]


def test_the_bound_of_a_threshold_holds_for_any_number():
    codec = CODECS.build({"name": "threshold", "max_ratio": 0.5}, "codec")
    for num in (1, 2, 5, 64, 1000, 4096):
        most = base.num_chosen(0.5, num)
        bound = codec.max_bytes(num)
        assert all(4 + index_bytes(k, num, True) + 4 * k <= bound for k in range(most + 1))
