"""A codec: 16-bit integers with one scale per vector, the largest magnitude / 32767.

The base is `Codec` in fedmpi/codecs/base.py; a codec has no state. `_encode` gets x, a buffer for the payload, the
residual of error feedback (empty without feedback) and a buffer for the new residual (empty if not needed). It returns
the number of bytes, or -1 for values that it cannot encode. On CPUs the vectors are numpy arrays.

    exchange:
      plan: sharded
      up: {codec: "examples.extending.codec:Int16", feedback: true}
"""

import numpy as np
import torch

from fedmpi.codecs import Codec
from fedmpi.components import component


@component
class Int16(Codec):
    """Integers of 16 bits, rounded to nearest."""

    def max_bytes(self, num_values):
        return 4 + 2 * num_values  # a float32 scale, then the integers

    def _encode(self, x, payload, key, scale, residual, into):
        values = _numpy(x) * np.float32(scale)
        if len(residual):
            values += _numpy(residual)
        if not np.isfinite(values).all():
            return -1
        unit = max(np.float32(np.abs(values).max() / 32767), np.float32(1e-30))
        whole = np.rint(values / unit).astype(np.int16)
        bytes_B = np.concatenate([np.array([unit]).view(np.uint8), whole.view(np.uint8)])
        _put(payload[: len(bytes_B)], bytes_B)
        if len(into):
            _put(into, values - whole * unit)
        return len(bytes_B)

    def _decode(self, payload, out, weight, accumulate, key):
        bytes_B = _numpy(payload)[: self.max_bytes(len(out))]
        unit = bytes_B[:4].view(np.float32)[0]
        values = bytes_B[4:].view(np.int16) * unit
        _put(out, _numpy(out) + values * np.float32(weight) if accumulate else values)


def _numpy(vector):
    return vector.cpu().numpy() if isinstance(vector, torch.Tensor) else vector


def _put(place, values):
    if isinstance(place, torch.Tensor):
        place.copy_(torch.from_numpy(values))
    else:
        place[:] = values
