"""Codecs: how a vector becomes bytes.

    num_bytes = codec.encode(x_N, payload_B, key, scale=w, residual_N=e_N)    e = (w x + e) - decoded
    codec.decode(payload_B, out_N, key)                                        out = decoded
    codec.add(payload_B, sum_N, key, weight=w)                                 sum = sum + w decoded

N values, any slice of a vector; B bytes of payload. Codecs keep nothing: vectors and payloads are the caller's, random
bits come from the key and an element's place in the vector, so the same key gives the same bytes on any machine. Two
slices of one vector want two keys. Sums are float32, element by element, in the order in which payloads are added.

A payload says neither its codec nor N: both sides know them. Payloads start at a multiple of 4 bytes. Vectors are
checked. Where they are many and short, as in the exchange, they may be what `bare` makes of them, which is not.

Feedback. With a residual the payload decodes to damping * C(v), v = scale * x + e: `damping(n)` is 1 where C loses less
than all of v (rounding, selection) and 1 / (1 + omega) where C is unbiased with E|C(v) - v|^2 <= omega |v|^2, which
alone would diverge (Beznosikov et al. 2020, Lemma 8). The factor sits in the payload, so the receiver needs no word of
it. What was rounded to nearest or selected satisfies residual + decoded = v exactly, the rest within one ulp.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
import torch

from fedmpi.components import Family, PositiveFloat, PositiveFraction, component
from fedmpi.errors import ExchangeError

Tensor = torch.Tensor
Bare = Any  # an array, of a CPU tensor's memory; elsewhere the tensor itself
Rounding = Literal["nearest", "stochastic"]

BLOCK = 256  # values that share a scale
CHUNK = 4096
_PIECE_CPU, _PIECE_DEVICE = 1 << 16, 1 << 24  # values combined at a time
_LARGEST, _NORM, _MEAN = 0, 1, 2  # what a block's scale is made of


class Codec:
    """What the exchange asks of a codec; members write `max_bytes`, `_encode` and `_decode`."""

    @property
    def fixed(self) -> bool:
        """Is every payload `max_bytes` long? Else it is at most that, and lengths have to travel."""
        return True

    @property
    def linear(self) -> bool:
        """Are payloads float32 vectors whose sum decodes to the sum, if all have one key?"""
        return False

    @property
    def chooses(self) -> bool:
        """Do all values of a piece compete for room in the payload? They then have to be of one unit."""
        return False

    @property
    def unbiased(self) -> bool:
        """Is what decodes x on average over keys (without feedback)?"""
        return False

    @property
    def largest(self) -> float:
        """What is encoded has to be smaller, in magnitude."""
        return math.inf

    def damping(self, num_values: int) -> float:
        """What feedback multiplies the decoded vector with. ConfigError with the reason where feedback diverges,
        which one of your own may have to say; all that come along converge."""
        return 1.0

    def max_bytes(self, num_values: int) -> int:
        """The longest payload."""
        raise NotImplementedError

    def encode(
        self,
        x_N: Tensor | Bare,
        payload_B: Tensor | Bare,
        key: int,
        scale: float = 1.0,
        residual_N: Tensor | Bare | None = None,
        into_N: Tensor | Bare | None = None,
    ) -> int:
        """Bytes written. `into_N` takes the new residual: in place of the old one if it is left out.

        A residual left out with an `into_N` given counts as zero. ExchangeError for NaN, infinity or what the format
        cannot hold, and for buffers that do not fit; what then stands in payload and `into_N` is of no use.
        """
        into_N = residual_N if into_N is None else into_N
        if isinstance(x_N, Tensor):
            self._check(payload_B, x_N, *(v for v in (residual_N, into_N) if v is not None))
            if x_N.device.type == "cpu":
                x_N, payload_B = bare(x_N), bare(payload_B)
                residual_N, into_N = (None if v is None else bare(v) for v in (residual_N, into_N))
        none_N = x_N[:0]
        if not len(x_N):
            return 0
        residual_N = none_N if residual_N is None else residual_N
        into_N = none_N if into_N is None else into_N
        word = np.uint64(key & 0xFFFFFFFFFFFFFFFF)
        num_bytes = self._encode(x_N, payload_B, word, float(np.float32(scale)), residual_N, into_N)
        if num_bytes < 0:
            raise ExchangeError(f"codec {_name(self)}: a value is NaN, infinite or beyond what the format holds")
        return num_bytes

    def decode(self, payload_B: Tensor | Bare, out_N: Tensor | Bare, key: int = 0) -> None:
        """Writes every element of `out_N`. Only codecs without indices or signs in the payload read the key."""
        self._open(payload_B, out_N, 1.0, False, key)

    def add(self, payload_B: Tensor | Bare, sum_N: Tensor | Bare, key: int = 0, weight: float = 1.0) -> None:
        """Adds weight times what decodes to `sum_N`; the product and the sum are each rounded to float32."""
        self._open(payload_B, sum_N, weight, True, key)

    def _open(self, payload_B: Bare, out_N: Bare, weight: float, accumulate: bool, key: int) -> None:
        if isinstance(out_N, Tensor):
            self._check(payload_B, out_N, whole=self.fixed)
            if out_N.device.type == "cpu":
                payload_B, out_N = bare(payload_B), bare(out_N)
        if len(out_N):
            word = np.uint64(key & 0xFFFFFFFFFFFFFFFF)
            read = self._decode(payload_B, out_N, float(np.float32(weight)), accumulate, word)
            if read is not None and read < 0:
                raise ExchangeError(f"codec {_name(self)}: the payload is damaged or cut short")

    def _check(self, payload_B: Tensor, *vectors_N: Tensor, whole: bool = True) -> None:
        n = vectors_N[0].numel()
        for vector in vectors_N:
            if vector.dtype != torch.float32 or vector.shape != (n,) or not vector.is_contiguous():
                raise ExchangeError(
                    f"codec {_name(self)}: needs {n} contiguous float32, got {tuple(vector.shape)} {vector.dtype}"
                )
        if payload_B.dtype != torch.uint8 or not payload_B.is_contiguous() or payload_B.data_ptr() % 4:
            raise ExchangeError(f"codec {_name(self)}: payloads are contiguous uint8 that start at a multiple of 4")
        if whole and payload_B.numel() < self.max_bytes(n):
            raise ExchangeError(
                f"codec {_name(self)}: {payload_B.numel()} bytes for a payload of up to {self.max_bytes(n)}"
            )

    def _encode(self, x: Bare, payload: Bare, key: Any, scale: float, residual: Bare, into: Bare) -> int:
        raise NotImplementedError

    def _decode(self, payload: Bare, out: Bare, weight: float, accumulate: bool, key: Any) -> int | None:
        raise NotImplementedError


def warm(codec: Codec, device: torch.device | str = "cpu") -> None:
    """Compiles (or loads from disk) what the codec will run, so that no round pays for it."""
    x_N, sum_N = torch.ones(5, device=device), torch.zeros(5, device=device)
    payload_B = torch.zeros(codec.max_bytes(5), dtype=torch.uint8, device=device)
    codec.encode(x_N, payload_B, 0, residual_N=sum_N)
    codec.decode(payload_B, x_N)
    codec.add(payload_B, sum_N)


def _name(codec: Codec) -> str:
    return f"'{CODECS.name_of(codec)}'"


def bare(vector: Tensor) -> Bare:
    """What kernels work on. Slices of an array cost a tenth of a tensor's, and pieces are many."""
    return vector.detach().numpy() if vector.device.type == "cpu" else vector


@functools.cache
def _kernels(device: str) -> tuple[Any, Callable[[Any], Any]]:
    """The kernels for a kind of device, and what turns an argument into what they take."""
    if device == "cpu":
        from fedmpi.kernels import cpu  # here, as numba takes a second to load

        return cpu, _array
    from fedmpi.kernels import cuda

    return cuda, _tensor


def _array(argument: Any) -> Any:
    if type(argument) is np.ndarray:
        return argument
    if type(argument) is float:
        return np.float32(argument)
    return bare(argument) if isinstance(argument, Tensor) else argument


def _tensor(argument: Any) -> Any:
    return torch.from_numpy(argument) if type(argument) is np.ndarray else argument


def _run(name: str, *arguments: Any) -> Any:
    """The kernel of that name, where the vectors among its arguments live."""
    arrays = np.ndarray in map(type, arguments)  # pieces are many, and most come as arrays
    on = "cpu" if arrays else next(a.device.type for a in arguments if isinstance(a, Tensor))
    kernels, taken = _kernels(on)
    return getattr(kernels, name)(*map(taken, arguments))


def _floats(payload: Tensor, num: int) -> Tensor:
    return payload[: 4 * num].view(torch.float32)


def _combine(x: Tensor, scale: float, residual: Tensor, out: Tensor) -> bool:
    """out = x * scale + residual, unless out is empty; is it finite? `out` may be the residual."""
    piece = _PIECE_CPU if x.device.type == "cpu" else _PIECE_DEVICE
    scratch = torch.empty_like(x[:piece])
    for start in range(0, x.numel(), piece):
        part = x[start : start + piece]
        v = torch.mul(part, scale, out=scratch[: part.numel()])
        if residual.numel():
            v.add_(residual[start : start + piece])
        if not math.isfinite(float(v.sum())) and not bool(v.isfinite().all()):  # a sum may overflow by itself
            return False
        if out.numel():
            out[start : start + piece].copy_(v)
    return True


def _blocks(num_values: int, block: int, bits: int) -> int:
    return 4 * -(-num_values // block) + -(-num_values * bits // 8)


def _count(ratio: float, num_values: int) -> int:
    return min(num_values, max(1, round(ratio * num_values)))


@component
class Identity(Codec):
    """The float32 values themselves."""

    @property
    def linear(self) -> bool:
        return True

    @property
    def unbiased(self) -> bool:
        return True

    def max_bytes(self, num_values: int) -> int:
        return 4 * num_values

    def _encode(self, x: Bare, payload: Bare, key: Any, scale: float, residual: Bare, into: Bare) -> int:
        x, payload, residual, into = (_tensor(vector) for vector in (x, payload, residual, into))
        finite = _combine(x, scale, residual, _floats(payload, x.numel()))
        into.zero_()
        return 4 * x.numel() if finite else -1

    def _decode(self, payload: Bare, out: Bare, weight: float, accumulate: bool, key: Any) -> None:
        payload, out = _tensor(payload), _tensor(out)
        values = _floats(payload, out.numel())
        if not accumulate:
            out.copy_(values)
            return
        piece = _PIECE_CPU if out.device.type == "cpu" else _PIECE_DEVICE
        scratch = torch.empty_like(out[:piece])
        for start in range(0, out.numel(), piece):
            part = out[start : start + piece]
            part.add_(torch.mul(values[start : start + piece], weight, out=scratch[: part.numel()]))


@component
class BFloat16(Codec):
    """bfloat16: 8 bits of mantissa, the range of float32; nearest, ties to even."""

    @property
    def largest(self) -> float:
        return float((1 - 2**-9) * 2.0**128)

    def max_bytes(self, num_values: int) -> int:
        return 2 * num_values

    def _encode(self, x: Bare, payload: Bare, key: Any, scale: float, residual: Bare, into: Bare) -> int:
        return int(_run("encode_half", x, scale, residual, into, payload, True))

    def _decode(self, payload: Bare, out: Bare, weight: float, accumulate: bool, key: Any) -> None:
        _run("decode_half", payload, out, weight, accumulate, True)


@component
class Float16(Codec):
    """float16: 11 bits of mantissa, nearest, ties to even; refuses what would round to more than 65504."""

    @property
    def largest(self) -> float:
        return 65520.0

    def max_bytes(self, num_values: int) -> int:
        return 2 * num_values

    def _encode(self, x: Bare, payload: Bare, key: Any, scale: float, residual: Bare, into: Bare) -> int:
        return int(_run("encode_half", x, scale, residual, into, payload, False))

    def _decode(self, payload: Bare, out: Bare, weight: float, accumulate: bool, key: Any) -> None:
        _run("decode_half", payload, out, weight, accumulate, False)


@component
class Int8(Codec):
    """Integers of 8 bits, -127 to 127, in blocks of 256 with one float32 scale each, the largest magnitude / 127.

    Steps below 2**-126 are zero. Stochastic rounding needs no damping: omega is 0.004.

    >>> x, payload = torch.tensor([1.0, -0.5, 0.1]), torch.zeros(7, dtype=torch.uint8)
    >>> Int8().encode(x, payload, key=0), payload[4:].view(torch.int8).tolist()
    (7, [127, -64, 13])
    """

    rounding: Rounding = "nearest"
    """stochastic: unbiased, up or down by chance"""

    @property
    def unbiased(self) -> bool:
        return self.rounding == "stochastic"

    def max_bytes(self, num_values: int) -> int:
        return _blocks(num_values, BLOCK, 8)

    def _encode(self, x: Bare, payload: Bare, key: Any, scale: float, residual: Bare, into: Bare) -> int:
        by_chance = self.rounding == "stochastic"
        facts = (key, BLOCK, 8, 127, _LARGEST, by_chance, 1.0)
        return int(_run("encode_blocks", x, scale, residual, into, payload, *facts))

    def _decode(self, payload: Bare, out: Bare, weight: float, accumulate: bool, key: Any) -> None:
        _run("decode_blocks", payload, out, weight, accumulate, BLOCK, 8)


@component
class Int4(Codec):
    """Integers of 4 bits, -7 to 7, in blocks of 256 with one float32 scale each, the largest magnitude / 7.

    Stochastic rounding needs no damping: its error is at most 0.75 of a block's square norm on average.
    """

    rounding: Rounding = "nearest"
    """stochastic: unbiased, up or down by chance"""

    @property
    def unbiased(self) -> bool:
        return self.rounding == "stochastic"

    def max_bytes(self, num_values: int) -> int:
        return _blocks(num_values, BLOCK, 4)

    def _encode(self, x: Bare, payload: Bare, key: Any, scale: float, residual: Bare, into: Bare) -> int:
        by_chance = self.rounding == "stochastic"
        facts = (key, BLOCK, 4, 7, _LARGEST, by_chance, 1.0)
        return int(_run("encode_blocks", x, scale, residual, into, payload, *facts))

    def _decode(self, payload: Bare, out: Bare, weight: float, accumulate: bool, key: Any) -> None:
        _run("decode_blocks", payload, out, weight, accumulate, BLOCK, 4)


@component
class QSGD(Codec):
    """QSGD (Alistarh et al. 2017, Section 3.1): l / levels of a bucket's Euclidean norm, l by stochastic rounding.

    Buckets of 256. omega = min(256 / levels**2, 16 / levels) (Lemma 3.1). Levels go in 2, 4 or 8 bits, the narrowest
    that holds them; the paper's Elias code is left out. A signed value is rounded down or up, which has the law of the
    paper's magnitude and sign.
    """

    levels: Annotated[int, pydantic.Field(ge=1, le=127)] = 7
    """s of the paper: steps from 0 to the norm"""

    @property
    def unbiased(self) -> bool:
        return True

    @property
    def _bits(self) -> int:
        return 2 if self.levels == 1 else 4 if self.levels <= 7 else 8

    def damping(self, num_values: int) -> float:
        d = min(num_values, BLOCK)
        return 1 / (1 + min(d / self.levels**2, math.sqrt(d) / self.levels))

    def max_bytes(self, num_values: int) -> int:
        return _blocks(num_values, BLOCK, self._bits)

    def _encode(self, x: Bare, payload: Bare, key: Any, scale: float, residual: Bare, into: Bare) -> int:
        damping = self.damping(len(x)) if len(into) else 1.0
        facts = (key, BLOCK, self._bits, self.levels, _NORM, True, damping)
        return int(_run("encode_blocks", x, scale, residual, into, payload, *facts))

    def _decode(self, payload: Bare, out: Bare, weight: float, accumulate: bool, key: Any) -> None:
        _run("decode_blocks", payload, out, weight, accumulate, BLOCK, self._bits)


@component
class Sign(Codec):
    """Signs times the mean magnitude (Karimireddy et al. 2019, Algorithm 1), one scale per 4096; the sign of 0 is +."""

    def max_bytes(self, num_values: int) -> int:
        return _blocks(num_values, CHUNK, 1)

    def _encode(self, x: Bare, payload: Bare, key: Any, scale: float, residual: Bare, into: Bare) -> int:
        facts = (key, CHUNK, 1, 1, _MEAN, False, 1.0)
        return int(_run("encode_blocks", x, scale, residual, into, payload, *facts))

    def _decode(self, payload: Bare, out: Bare, weight: float, accumulate: bool, key: Any) -> None:
        _run("decode_blocks", payload, out, weight, accumulate, CHUNK, 1)


@component
class Uniform(Codec):
    """The grid sign(w) step floor(|w| / step + 0.5), bit-packed.

    Every 256 values take as many bits as their largest needs (a byte says how many): none where all are below half a
    step. Values beyond `max_bits`, that is beyond (2**(max_bits - 1) - 1) steps, are cut to that, and only feedback
    brings the rest across.
    """

    step: PositiveFloat = 1e-4
    """s, in units of what is encoded: of weighted deltas, where weights are folded in"""
    max_bits: Annotated[int, pydantic.Field(ge=2, le=16)] = 16
    """sign included"""

    @property
    def fixed(self) -> bool:
        return False

    def max_bytes(self, num_values: int) -> int:
        return -(-num_values // BLOCK) + -(-num_values * self.max_bits // 8)

    def _encode(self, x: Bare, payload: Bare, key: Any, scale: float, residual: Bare, into: Bare) -> int:
        return int(_run("encode_uniform", x, scale, residual, into, payload, self.step, self.max_bits))

    def _decode(self, payload: Bare, out: Bare, weight: float, accumulate: bool, key: Any) -> int:
        return int(_run("decode_uniform", payload, out, weight, accumulate, self.step))


DENSE = {
    "identity": Identity,
    "bf16": BFloat16,
    "fp16": Float16,
    "int8": Int8,
    "int4": Int4,
    "uniform": Uniform,
    "qsgd": QSGD,
    "sign": Sign,
}
VALUES = Family("codec of chosen values", DENSE, outside=False)


def _dense(codec: Codec) -> Codec:
    if type(codec) not in DENSE.values():
        raise ValueError(f"values are chosen once: takes one of {', '.join(DENSE)}, not {_name(codec)}")
    return codec


Values = Annotated[Codec, VALUES, pydantic.AfterValidator(_dense)]


def _index_bytes(num_chosen: int, num_values: int, packed: bool) -> int:
    """Of int32, or of Elias-Fano form (`kernels.plain`), to a multiple of 4."""
    if not packed or not num_chosen:
        return 4 * num_chosen
    low = (num_values // num_chosen).bit_length() - 1
    upper = ((num_values - 1) >> low) + num_chosen
    return -(-(-(-num_chosen * low // 8) + -(-upper // 8)) // 4) * 4


def _write_chosen(
    index_K: Tensor, packed: bool, values: Codec, x: Tensor, scale: float, into: Tensor, payload: Tensor, key: Any
) -> int:
    """The payload of chosen coordinates; what their codec loses goes to `into`, which holds v."""
    n, k = x.numel(), index_K.numel()
    at = _index_bytes(k, n, packed)
    if packed:
        end = _run("pack_sorted", index_K, n, payload)
        payload[end:at] = 0
    else:
        payload[:at].view(torch.int32).copy_(index_K)
    if isinstance(values, Identity) and into.numel():  # nothing is lost of what was chosen
        _floats(payload[at:], k).copy_(into.index_select(0, index_K))
        into.index_fill_(0, index_K, 0.0)
        at += 4 * k
    elif into.numel():
        lost_K = torch.empty_like(index_K, dtype=torch.float32)
        at += values.encode(into.index_select(0, index_K), payload[at:], int(key), into_N=lost_K)
        into.index_copy_(0, index_K, lost_K)
    else:
        at += values.encode(x.index_select(0, index_K), payload[at:], int(key), scale)
    return at


def _read_chosen(
    num_chosen: int,
    packed: bool,
    values: Codec,
    payload: Tensor,
    out: Tensor,
    weight: float,
    accumulate: bool,
    key: Any,
) -> int:
    payload, out = _tensor(payload), _tensor(out)
    n = out.numel()
    at = _index_bytes(num_chosen, n, packed)
    index_K = torch.empty(num_chosen, dtype=torch.int64, device=out.device)
    if payload.numel() < at:
        return -1
    if packed:
        if _run("unpack_sorted", payload, n, index_K) < 0:
            return -1
    else:
        index_K.copy_(payload[:at].view(torch.int32))
        if num_chosen and not bool(((index_K >= 0) & (index_K < n)).all()):
            return -1
    values_K = torch.empty_like(index_K, dtype=torch.float32)
    values.decode(payload[at:], values_K, int(key))
    _place(index_K, values_K, out, weight, accumulate)
    return at


def _place(index_K: Tensor, values_K: Tensor, out: Tensor, weight: float, accumulate: bool) -> None:
    if accumulate:
        out.index_add_(0, index_K, values_K.mul_(weight))
    else:
        out.zero_().index_copy_(0, index_K, values_K)


@component
class TopK(Codec):
    """The largest magnitudes, exactly (Stich et al. 2018, Section 2.1: top_k); of equals the first.

    Packed indices take about 2 + log2(1 / ratio) bits each (Elias 1974; Fano 1971).
    """

    chooses = True

    ratio: PositiveFraction = 0.01
    """of the values that travel, at least one"""
    indices: Literal["packed", "int32"] = "packed"
    """int32: 4 bytes each"""
    values: Values = Identity()
    """how the chosen values travel: identity, bf16, int8, ..."""

    @property
    def _plain(self) -> bool:
        """What has kernels of its own."""
        return self.indices == "packed" and type(self.values) is Identity

    @property
    def fixed(self) -> bool:
        return self.values.fixed

    @property
    def largest(self) -> float:
        return self.values.largest

    def damping(self, num_values: int) -> float:
        return self.values.damping(_count(self.ratio, num_values))

    def max_bytes(self, num_values: int) -> int:
        k = _count(self.ratio, num_values)
        return _index_bytes(k, num_values, self.indices == "packed") + self.values.max_bytes(k)

    def _encode(self, x: Bare, payload: Bare, key: Any, scale: float, residual: Bare, into: Bare) -> int:
        k = _count(self.ratio, len(x))
        if self._plain:
            return int(_run("encode_top", x, scale, residual, into, payload, k))
        x, payload, residual, into = (_tensor(vector) for vector in (x, payload, residual, into))
        index_K = torch.empty(k, dtype=torch.int64, device=x.device)
        if _run("select", x, scale, residual, into, k, 0, index_K) < 0:
            return -1
        return _write_chosen(index_K, self.indices == "packed", self.values, x, scale, into, payload, key)

    def _decode(self, payload: Bare, out: Bare, weight: float, accumulate: bool, key: Any) -> int:
        k = _count(self.ratio, len(out))
        if self._plain:
            return int(_run("decode_top", payload, out, weight, accumulate, k))
        return _read_chosen(k, self.indices == "packed", self.values, payload, out, weight, accumulate, key)


@component
class Threshold(Codec):
    """Magnitudes of at least `threshold` (Strom 2015; Sahu et al. 2021, hard threshold), the largest where many are.

    The values travel, not Strom's fixed +-threshold. The size is bounded by `max_ratio`, beyond which it is `topk`.
    """

    chooses = True

    threshold: PositiveFloat = 1e-3
    """in units of what is encoded: of weighted deltas, where weights are folded in"""
    max_ratio: PositiveFraction = 0.01
    """of the values that may travel, at least one"""
    values: Values = Identity()
    """how the chosen values travel: identity, bf16, int8, ..."""

    @property
    def fixed(self) -> bool:
        return False

    @property
    def largest(self) -> float:
        return self.values.largest

    def damping(self, num_values: int) -> float:
        return self.values.damping(_count(self.max_ratio, num_values))

    def max_bytes(self, num_values: int) -> int:
        k = _count(self.max_ratio, num_values)
        return 4 + _index_bytes(k, num_values, True) + 8 + self.values.max_bytes(k)  # 8: fewer may pack worse

    def _encode(self, x: Bare, payload: Bare, key: Any, scale: float, residual: Bare, into: Bare) -> int:
        x, payload, residual, into = (_tensor(vector) for vector in (x, payload, residual, into))
        k = _count(self.max_ratio, x.numel())
        floor = int(np.float32(self.threshold).view(np.int32))
        index_K = torch.empty(k, dtype=torch.int64, device=x.device)
        found = _run("select", x, scale, residual, into, k, floor, index_K)
        if found < 0:
            return -1
        payload[:4].view(torch.int32).fill_(found)
        return 4 + _write_chosen(index_K[:found], True, self.values, x, scale, into, payload[4:], key)

    def _decode(self, payload: Bare, out: Bare, weight: float, accumulate: bool, key: Any) -> int:
        payload, out = _tensor(payload), _tensor(out)
        k = int(payload[:4].view(torch.int32)) if payload.numel() >= 4 else -1
        if not 0 <= k <= _count(self.max_ratio, out.numel()):
            return -1
        return _read_chosen(k, True, self.values, payload[4:], out, weight, accumulate, key)


@component
class ChunkTopK(Codec):
    """The `keep` largest magnitudes of every 4096, with 12-bit indices and values of 4 or 2 bits, for ever as long.

    As in SparseLoCo (Sarfi et al. 2025). Values are a sign and the nearest of 8 or 2 magnitudes, evenly spaced from the
    chunk's least chosen one to its largest: two float32 a chunk. None loses more than its own value.
    """

    keep: Annotated[int, pydantic.Field(ge=1, le=CHUNK)] = 64
    """of 4096; in proportion, rounded up, in the last chunk"""
    bits: Literal[4, 2] = 4
    """a value, its sign included"""

    def max_bytes(self, num_values: int) -> int:
        whole, rest = divmod(num_values, CHUNK)
        chosen = -(-rest * self.keep // CHUNK)
        width = 12 + self.bits
        return whole * (8 + -(-self.keep * width // 8)) + (8 + -(-chosen * width // 8) if rest else 0)

    def _encode(self, x: Bare, payload: Bare, key: Any, scale: float, residual: Bare, into: Bare) -> int:
        return int(_run("encode_chunks", x, scale, residual, into, payload, self.keep, self.bits))

    def _decode(self, payload: Bare, out: Bare, weight: float, accumulate: bool, key: Any) -> None:
        _run("decode_chunks", payload, out, weight, accumulate, self.keep, self.bits)


@component
class RandK(Codec):
    """Values at places drawn from the key, which both sides have: float32, no indices, and MPI may sum the payloads.

    Random-k sparsification (Konecny et al. 2016, random mask; Stich et al. 2018, rand_k), but stratified: one place of
    each of k equal runs of the vector, so every value has the same chance up to the rounding of n / k. Times n / k,
    unbiased with omega = n / k - 1; feedback sends the values as they are.
    """

    ratio: PositiveFraction = 0.01
    """of the values that travel, at least one"""

    @property
    def linear(self) -> bool:
        return True

    @property
    def unbiased(self) -> bool:
        return True

    def damping(self, num_values: int) -> float:
        return 1 / max(1, -(-num_values // max(1, _count(self.ratio, num_values))))

    def max_bytes(self, num_values: int) -> int:
        return 4 * _count(self.ratio, num_values)

    def _places(self, n: int, key: Any, like: Tensor) -> Tensor:
        index_K = torch.empty(_count(self.ratio, n), dtype=torch.int64, device=like.device)
        _run("draw", key, n, index_K)
        return index_K

    def _encode(self, x: Bare, payload: Bare, key: Any, scale: float, residual: Bare, into: Bare) -> int:
        x, payload, residual, into = (_tensor(vector) for vector in (x, payload, residual, into))
        n, index_K = x.numel(), self._places(x.numel(), key, x)
        k = index_K.numel()
        if not _combine(x, scale, residual, into):
            return -1
        values_K = _floats(payload, k)
        if into.numel():
            values_K.copy_(into.index_select(0, index_K))
            into.index_fill_(0, index_K, 0.0)
        else:
            j = torch.arange(k, device=x.device)
            values_K.copy_(x.index_select(0, index_K)).mul_(scale).mul_((j + 1) * n // k - j * n // k)
            if not bool(values_K.isfinite().all()):
                return -1
        return 4 * k

    def _decode(self, payload: Bare, out: Bare, weight: float, accumulate: bool, key: Any) -> None:
        payload, out = _tensor(payload), _tensor(out)
        index_K = self._places(out.numel(), key, out)
        _place(index_K, _floats(payload, index_K.numel()).clone(), out, weight, accumulate)


CODECS = Family(
    "codec",
    DENSE | {"topk": TopK, "chunk_topk": ChunkTopK, "randk": RandK, "threshold": Threshold},
    Codec,
)
