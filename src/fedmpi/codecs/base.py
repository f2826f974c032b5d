"""Interface of a codec, and what codecs share: kernels by device, v = scale x + residual."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch

from fedmpi.components import called
from fedmpi.errors import ExchangeError

Tensor = torch.Tensor
Bare = Any  # a NumPy array that shares a CPU tensor's memory; on other devices the tensor itself
Rounding = Literal["nearest", "stochastic"]

PIECE_CPU, PIECE_DEVICE = 1 << 16, 1 << 24  # values combined at a time


class Codec:
    """Interface of a codec; members implement `max_bytes`, `_encode` and `_decode`."""

    @property
    def fixed(self) -> bool:
        """Whether every payload has exactly `max_bytes`. Otherwise lengths must be sent too."""
        return True

    @property
    def linear(self) -> bool:
        """Whether payloads are float32 vectors whose sum decodes to the sum, given the same key."""
        return False

    @property
    def chooses(self) -> bool:
        """Whether values compete for space in the payload. All values of a piece must then have the same unit."""
        return False

    @property
    def unbiased(self) -> bool:
        """Whether the decoded vector equals x on average over keys (without feedback)."""
        return False

    @property
    def largest(self) -> float:
        """Upper bound (exclusive) on the magnitude of encoded values."""
        return math.inf

    def damping(self, num_values: int) -> float:
        """Factor of the decoded vector under feedback. Raises ConfigError, with the reason, if feedback diverges; the
        built-in codecs all converge, a user's codec may not."""
        return 1.0

    def max_bytes(self, num_values: int) -> int:
        """Length of the longest payload for so many values, in bytes."""
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
        """Writes the payload of `scale` * x + residual and returns the number of bytes written.

        The new residual goes to `into_N`, or replaces `residual_N` if `into_N` is None. With `into_N` alone, the old
        residual is zero. Raises ExchangeError for NaN, infinity, values beyond the format's range, and buffers that do
        not fit; payload and `into_N` are then undefined.
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
            raise ExchangeError(f"codec '{called(self)}': a value is NaN, infinite or beyond what the format holds")
        return num_bytes

    def decode(self, payload_B: Tensor | Bare, out_N: Tensor | Bare, key: int = 0) -> None:
        """Decodes into `out_N`, every element. The key is read only by codecs that need it, such as randk."""
        self._open(payload_B, out_N, 1.0, False, key)

    def add(self, payload_B: Tensor | Bare, sum_N: Tensor | Bare, key: int = 0, weight: float = 1.0) -> None:
        """Adds weight * decoded to `sum_N`; product and sum are each rounded to float32."""
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
                raise ExchangeError(f"codec '{called(self)}': the payload is damaged or cut short")

    def _check(self, payload_B: Tensor, *vectors_N: Tensor, whole: bool = True) -> None:
        n = vectors_N[0].numel()
        for vector in vectors_N:
            if vector.dtype != torch.float32 or vector.shape != (n,) or not vector.is_contiguous():
                raise ExchangeError(
                    f"codec '{called(self)}': needs {n} contiguous float32, got {tuple(vector.shape)} {vector.dtype}"
                )
        if payload_B.dtype != torch.uint8 or not payload_B.is_contiguous() or payload_B.data_ptr() % 4:
            raise ExchangeError(f"codec '{called(self)}': payloads are contiguous uint8 that start at a multiple of 4")
        if whole and payload_B.numel() < self.max_bytes(n):
            raise ExchangeError(
                f"codec '{called(self)}': {payload_B.numel()} bytes for a payload of up to {self.max_bytes(n)}"
            )

    def _encode(self, x: Bare, payload: Bare, key: Any, scale: float, residual: Bare, into: Bare) -> int:
        raise NotImplementedError

    def _decode(self, payload: Bare, out: Bare, weight: float, accumulate: bool, key: Any) -> int | None:
        raise NotImplementedError


def warm(codec: Codec, device: torch.device | str = "cpu") -> None:
    """Compiles (or loads from disk) the codec's kernels, so that no round pays for it."""
    x_N, sum_N = torch.ones(5, device=device), torch.zeros(5, device=device)
    payload_B = torch.zeros(codec.max_bytes(5), dtype=torch.uint8, device=device)
    codec.encode(x_N, payload_B, 0, residual_N=sum_N)
    codec.decode(payload_B, x_N)
    codec.add(payload_B, sum_N)


def bare(vector: Tensor) -> Bare:
    """The form that kernels take. Slicing an array costs a tenth of slicing a tensor, and there are many pieces."""
    return vector.detach().numpy() if vector.device.type == "cpu" else vector


@functools.cache
def _kernels(device: str) -> tuple[Any, Callable[[Any], Any]]:
    """The kernels for a device type, and the function that converts their arguments."""
    if device == "cpu":
        from fedmpi.kernels import cpu  # imported here, because numba takes a second to load

        return cpu, to_array
    from fedmpi.kernels import cuda

    return cuda, to_tensor


def to_array(argument: Any) -> Any:
    if type(argument) is np.ndarray:
        return argument
    if type(argument) is float:
        return np.float32(argument)
    return bare(argument) if isinstance(argument, Tensor) else argument


def to_tensor(argument: Any) -> Any:
    return torch.from_numpy(argument) if type(argument) is np.ndarray else argument


def run_kernel(name: str, *arguments: Any) -> Any:
    """Runs the kernel of that name on the device of its vectors."""
    arrays = np.ndarray in map(type, arguments)  # the common case comes first: there are many pieces
    on = "cpu" if arrays else next(a.device.type for a in arguments if isinstance(a, Tensor))
    kernels, taken = _kernels(on)
    return getattr(kernels, name)(*map(taken, arguments))


def floats(payload: Tensor, num: int) -> Tensor:
    return payload[: 4 * num].view(torch.float32)


def combine(x: Tensor, scale: float, residual: Tensor, out: Tensor) -> bool:
    """out = x * scale + residual, unless `out` is empty; returns whether all is finite. `out` may be the residual."""
    piece = PIECE_CPU if x.device.type == "cpu" else PIECE_DEVICE
    scratch = torch.empty_like(x[:piece])
    for start in range(0, x.numel(), piece):
        part = x[start : start + piece]
        v = torch.mul(part, scale, out=scratch[: part.numel()])
        if residual.numel():
            v.add_(residual[start : start + piece])
        if not math.isfinite(float(v.sum())) and not bool(v.isfinite().all()):  # the sum alone may overflow
            return False
        if out.numel():
            out[start : start + piece].copy_(v)
    return True


def num_chosen(ratio: float, num_values: int) -> int:
    return min(num_values, max(1, round(ratio * num_values)))


def place(index_K: Tensor, values_K: Tensor, out: Tensor, weight: float, accumulate: bool) -> None:
    if accumulate:
        out.index_add_(0, index_K, values_K.mul_(weight))
    else:
        out.zero_().index_copy_(0, index_K, values_K)
