"""Properties of all codecs, and of single ones."""

import itertools
import os
import subprocess
import sys

import numpy as np
import pydantic
import pytest
import torch
from support.codecs import LENGTHS, buffer, codecs_that, every_codec, vector

from fedmpi.codecs import CODECS, QSGD, Identity, Int8, RandK, TopK
from fedmpi.errors import ConfigError, ExchangeError


def decoded(codec, payload, num, key):
    out = torch.full((num,), float("nan"))
    codec.decode(payload, out, key)
    return out


def exact(codec):
    """Whether it rounds to nearest, or selects, or both."""
    values = getattr(codec, "values", codec)
    return not (values.unbiased and values != Identity() and type(codec) is not RandK) and CODECS.name_of(
        codec
    ) not in (
        "sign",
        "chunk_topk",
    )


@every_codec
@pytest.mark.parametrize("num", LENGTHS)
def test_the_payload_is_as_long_as_declared_and_a_function_of_the_key(codec, num):
    x = vector(num)
    payloads = []
    for fill in (0, 0xAA):  # old buffer content must not be sent
        guarded = torch.full((codec.max_bytes(num) + 8,), fill, dtype=torch.uint8)
        num_bytes = codec.encode(x, guarded, key=2**64 - 5)
        assert num_bytes <= codec.max_bytes(num) and (num_bytes == codec.max_bytes(num) or not codec.fixed)
        assert (guarded[num_bytes:] == fill).all()
        payloads.append(guarded[:num_bytes].clone())
    assert torch.equal(*payloads)
    out, total = decoded(codec, payloads[0], num, 2**64 - 5), torch.ones(num)
    assert out.isfinite().all()
    codec.add(payloads[0], total, 2**64 - 5, weight=0.3)
    assert torch.equal(total, torch.ones(num) + out * torch.tensor(0.3))


@every_codec
def test_another_key_gives_other_bytes_where_chance_has_a_part(codec):
    x = vector(1000)
    first, second = buffer(codec, 1000), buffer(codec, 1000)
    codec.encode(x, first, key=1)
    codec.encode(x, second, key=2**40 + 1)
    by_chance = codec.unbiased or getattr(codec, "values", codec).unbiased
    values = getattr(codec, "values", codec)
    assert torch.equal(first, second) == (not by_chance or values == Identity())


@every_codec
@pytest.mark.parametrize("num", [1, 257, 4097])
def test_zeros_come_back_as_zeros(codec, num):
    payload, residual = buffer(codec, num), torch.zeros(num)
    codec.encode(torch.zeros(num), payload, key=3, residual_N=residual)
    assert not residual.any()
    assert not decoded(codec, payload, num, 3).any()


@pytest.mark.parametrize("num", [5, 700])
@codecs_that(lambda codec: codec.unbiased)
def test_unbiased_ones_average_to_x(codec, num):
    x, payload, num_keys = vector(num, wide=False), buffer(codec, num), 600
    draws = torch.empty(num_keys, num, dtype=torch.float64)
    for key in range(num_keys):
        codec.encode(x, payload, key=key * 7919)
        draws[key] = decoded(codec, payload, num, key * 7919)
    errors = draws - x
    for direction in (x, x.sign(), torch.ones(num), x.sign() * (x.abs() < 0.3)):
        along = errors @ direction.double()
        assert abs(along.mean()) <= 4.5 * along.std() / num_keys**0.5 + 1e-6
    expected = (errors**2).mean() / num_keys
    assert (errors.mean(0) ** 2).mean() <= expected * (2.5 if num < 10 else 1.2) + 1e-12


@every_codec
@pytest.mark.parametrize("num", LENGTHS)
def test_residual_and_decoded_are_what_was_encoded(codec, num):
    x, old = vector(num, 1), vector(num, 2) * 0.1
    if num > 2:
        x[0], old[0] = 0.0, 1e-42  # a subnormal
        x[1], old[1] = -1e-30, 0.0
    v = x * 0.7 + old
    if CODECS.name_of(codec) == "uniform":
        room = codec.step * (2 ** (codec.max_bits - 1) - 1)
        x, old = x.clamp(-room, room) * 0.5, old.clamp(-room, room) * 0.5
        v = x * 0.7 + old
    payload, residual, new = buffer(codec, num), old.clone(), torch.empty(num)
    codec.encode(x, payload, 9, 0.7, residual, new)
    assert torch.equal(residual, old)
    codec.encode(x, payload, 9, 0.7, residual)
    assert torch.equal(residual, new)
    back = decoded(codec, payload, num, 9)
    if exact(codec):
        assert torch.equal(new + back, v)
    largest = np.maximum(abs(v.numpy()), abs(back.numpy()))
    assert (abs(new.double() + back.double() - v.double()).numpy() <= np.spacing(largest)).all()


@every_codec
def test_scale_residual_and_slices_give_the_bytes_of_their_sum(codec):
    num = 5000
    x, residual = vector(num + 7, 3)[3:-4], vector(num, 4)
    first, second = buffer(codec, num), buffer(codec, num)
    new = torch.empty(num)
    codec.encode(x, first, 5, 0.25, residual, new)
    kept = torch.zeros(num)
    codec.encode(x * 0.25 + residual, second, 5, into_N=kept)
    assert torch.equal(first, second) and torch.equal(new, kept)
    codec.encode(x, first, 5, 0.25)
    codec.encode(x * 0.25, second, 5)
    assert torch.equal(first, second)


@every_codec
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("feedback", [False, True])
def test_what_is_not_finite_is_refused_by_name(codec, value, feedback):
    for num, at in itertools.product((1, 300, 4100), (0, -1)):
        x = torch.ones(num)
        x[at] = value
        residual = torch.zeros(num) if feedback else None
        with pytest.raises(ExchangeError, match=f"'{CODECS.name_of(codec)}'.*infinite"):
            codec.encode(x, buffer(codec, num), 0, 10.0, residual)


@every_codec
def test_feedback_loses_less_than_everything(codec):
    num, num_keys = 1500, 40
    x, lost = vector(num, 5, wide=False), []
    for key in range(num_keys):
        new = torch.empty(num)
        codec.encode(x, buffer(codec, num), key, into_N=new)
        lost.append(float((new.double() ** 2).sum() / (x.double() ** 2).sum()))
    assert np.mean(lost) < 1
    if codec.unbiased:
        assert np.mean(lost) < 1.05 - codec.damping(num) or codec.damping(num) == 1


@every_codec
def test_damping_is_in_the_payload(codec):
    num = 1024
    x, plain, damped = vector(num, 6, wide=False), buffer(codec, num), buffer(codec, num)
    codec.encode(x, plain, 11)
    codec.encode(x, damped, 11, into_N=torch.empty(num))
    factor = codec.damping(num)
    assert 0 < factor <= 1
    if type(codec) is RandK:
        factor = torch.where(decoded(codec, damped, num, 11) != 0, x / decoded(codec, plain, num, 11), 1)
        assert factor.min() >= codec.damping(num) * 0.999
    torch.testing.assert_close(decoded(codec, damped, num, 11), decoded(codec, plain, num, 11) * factor)


@codecs_that(lambda codec: codec.linear)
def test_sums_of_linear_payloads_decode_to_the_sum(codec):
    num = 3000
    payloads = [buffer(codec, num) for _ in range(2)]
    for seed, payload in enumerate(payloads):
        codec.encode(vector(num, seed), payload, key=21, scale=0.5)
    total = (payloads[0].view(torch.float32) + payloads[1].view(torch.float32)).view(torch.uint8)
    parts = [decoded(codec, payload, num, 21) for payload in payloads]
    assert torch.equal(decoded(codec, total, num, 21), parts[0] + parts[1])


def local_steps(codec, feedback, num_steps=3500, num=100):
    """Distance to the optimum of |w - b|^2 / 2, relative to the start, after steps of 0.002 encoded gradients."""
    b, w, residual = vector(num, 8, wide=False), torch.zeros(num), torch.zeros(num)
    payload = buffer(codec, num)
    for step in range(num_steps):
        codec.encode(b - w, payload, step, 0.002, residual if feedback else None)
        codec.add(payload, w, step)
        if step % 50 == 0 and (not w.isfinite().all() or w.abs().max() > 1e6):
            return float("inf")
    return float(torch.norm(w - b) / torch.norm(b))


@pytest.mark.slow
@every_codec
def test_feedback_reaches_the_optimum(codec):
    limit = 0.01
    if CODECS.name_of(codec) in ("threshold", "uniform"):  # these stop once all values are below their step
        limit = 0.3 if getattr(codec, "step", 0) == 0.25 or getattr(codec, "threshold", 0) == 0.2 else 0.02
    assert local_steps(codec, feedback=True) < limit


def test_silos_that_pull_apart_need_feedback():
    """The largest values of (4, 1) and (-4, 1) cancel: without feedback the second coordinate never moves."""
    codec, pulls, optimum = TopK(ratio=0.5), torch.tensor([[4.0, 0.0], [-4.0, 0.0]]), torch.tensor([0.0, 1.0])
    reached = {}
    for feedback in (False, True):
        w, residuals_KN = torch.zeros(2), torch.zeros(2, 2)
        for step in range(1500):
            sum_N = torch.zeros(2)
            for pull, residual in zip(pulls, residuals_KN, strict=True):
                payload = buffer(codec, 2)
                codec.encode(optimum - w + pull, payload, step, 0.5 * 0.02, residual if feedback else None)
                codec.add(payload, sum_N)
            w += sum_N
        reached[feedback] = float(w[1])
    assert reached[False] == 0.0
    assert abs(reached[True] - 1.0) < 0.05


def test_qsgd_without_its_damping_would_diverge():
    codec, num = QSGD(levels=1), 256
    x, payload = vector(num, 9, wide=False), buffer(QSGD(levels=1), num)
    undamped, damped = torch.zeros(num), torch.zeros(num)
    for key in range(120):
        v = x + undamped
        codec.encode(v, payload, key)
        undamped = v - decoded(codec, payload, num, key)
        codec.encode(x, payload, key, residual_N=damped)
        if undamped.norm() > 1e9:
            break
    assert undamped.norm() > 1e9
    assert damped.norm() < 2 * x.norm() / codec.damping(num)


@pytest.mark.parametrize(
    ("variant", "most"),
    [
        ("identity", 4.0),
        ("bf16", 2.0),
        ("int8", 1.02),
        ("int4", 0.52),
        ({"name": "topk", "ratio": 0.01}, 0.06),
        ({"name": "topk", "ratio": 0.01, "indices": "int32"}, 0.08),
        ({"name": "topk", "ratio": 0.01, "values": "int8"}, 0.022),
        ({"name": "chunk_topk", "bits": 4}, 0.034),
        ({"name": "chunk_topk", "bits": 2}, 0.03),
        ("sign", 0.127),
        ({"name": "randk", "ratio": 0.01}, 0.04),
        ({"name": "threshold", "threshold": 2.6, "max_ratio": 0.01}, 0.06),
    ],
    ids=str,
)
def test_bytes_per_value(variant, most):
    codec, num = CODECS.build(variant, "codec"), 1_000_000
    assert codec.encode(vector(num, wide=False), buffer(codec, num), 0) <= most * num


def test_uniform_takes_the_bits_that_a_block_needs_and_cuts_what_is_beyond():
    codec = CODECS.build({"name": "uniform", "step": 0.5, "max_bits": 4}, "codec")
    x = torch.zeros(768)
    x[256:512] = torch.tensor([0.25, -0.74]).repeat(128)
    x[512:] = 100.0
    payload, residual = buffer(codec, 768), torch.zeros(768)
    assert codec.encode(x, payload, 0, residual_N=residual) == 3 + 0 + 64 + 128
    assert payload[:3].tolist() == [0, 2, 4]
    back = decoded(codec, payload, 768, 0)
    assert back.unique().tolist() == [-0.5, 0.0, 0.5, 3.5]
    assert torch.equal(back + residual, x)


def test_values_are_chosen_once():
    with pytest.raises(ConfigError, match="no codec of chosen values 'topk'"):
        CODECS.build({"name": "topk", "values": "topk"}, "codec")
    with pytest.raises(pydantic.ValidationError, match="chosen once"):
        TopK(values=TopK())


def test_a_user_may_refuse_feedback():
    class Wild(Int8):
        def damping(self, num_values):
            raise ConfigError("codec 'wild': its error is not bounded by its input")

    with pytest.raises(ConfigError, match="not bounded"):
        TopK(values=Int8()).damping(3), Wild().damping(3)


def test_buffers_that_do_not_fit_are_refused():
    codec, x = Int8(), torch.ones(10)
    good = torch.zeros(64, dtype=torch.uint8)
    for arguments, what in [
        ((x.double(), good, 0), "float64"),
        ((x[::2], good, 0), "contiguous"),
        ((x, good[:13], 0), "13 bytes"),
        ((x, good[1:], 0), "multiple of 4"),
        ((x, good.view(torch.int8), 0), "uint8"),
        ((x, good, 0, 1.0, torch.ones(9)), "contiguous"),
    ]:
        with pytest.raises(ExchangeError, match=f"'int8'.*{what}"):
            codec.encode(*arguments)
    with pytest.raises(ExchangeError, match="13 bytes"):
        codec.decode(good[:13], x)


@pytest.mark.parametrize(
    ("variant", "byte"),
    [("uniform", 255), ("threshold", 255), ("threshold", 1), ("topk", 0), ({"name": "topk", "indices": "int32"}, 255)],
    ids=str,
)
def test_damaged_payloads_are_refused(variant, byte):
    codec, num = CODECS.build(variant, "codec"), 3000
    payload = buffer(codec, num)
    num_bytes = codec.encode(vector(num), payload, 0)
    with pytest.raises(ExchangeError):
        codec.decode(payload[: num_bytes // 2], torch.zeros(num))
    with pytest.raises(ExchangeError, match="damaged"):
        codec.decode(torch.full_like(payload, byte), torch.zeros(num))


@pytest.mark.slow
def test_numba_is_loaded_when_a_codec_first_needs_it():
    code = """
import sys, torch
from fedmpi.codecs import Identity, Int8, warm
warm(Identity())
assert "numba" not in sys.modules
warm(Int8())
assert "numba" in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=240)


@pytest.mark.slow
@codecs_that(lambda codec: max(getattr(codec, "ratio", 0), getattr(codec, "max_ratio", 0)) <= 0.01)
def test_nothing_of_the_vectors_size_is_allocated(codec):
    num = 4_000_000
    x, residual, payload = vector(num, wide=False), torch.ones(num) * 1e-3, buffer(codec, num, 1)
    codec.encode(x, payload, 0, residual_N=residual)
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets the high-water mark
    except OSError:
        pytest.skip("this system does not say how much memory was used at most")
    before = status("VmRSS")
    codec.encode(x, payload, 1, residual_N=residual)
    codec.add(payload, residual, 1)
    assert status("VmHWM") - before < num  # a quarter of the vector, in bytes


def status(field):
    with open(f"/proc/{os.getpid()}/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))
