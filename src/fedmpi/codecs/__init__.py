"""Codecs: encode a vector as bytes, with or without loss.

    base        interface of a codec, kernels by device, shared functions
    identity    float32 unchanged
    casts       bfloat16, float16
    blocks      one scale per block: int8, int4, QSGD, signs
    uniform     one grid for all values
    dense       the codecs above, which send every value
    topk        selected values and their indices: the largest, those above a threshold
    chunk_topk  the largest of every chunk
    randk       values at random indices, drawn from the key

    num_bytes = codec.encode(x_N, payload_B, key, scale=w, residual_N=e_N)    e = (w x + e) - decoded
    codec.decode(payload_B, out_N, key)                                        out = decoded
    codec.add(payload_B, sum_N, key, weight=w)                                 sum = sum + w decoded

N values, any slice of a vector; B bytes of payload. Codecs are stateless: the caller owns vectors and payloads. Random
bits depend on the key and on an element's position in the vector, so the same key gives the same bytes on any machine;
use different keys for two slices of a vector. Sums are float32, element by element, in the order of the `add` calls.

A payload contains neither its codec nor N; both sides know them. Payloads are aligned to 4 bytes. Tensors are checked;
arrays from `bare` are not checked and are faster for many short vectors, as in the exchange.

Error feedback. With a residual, the payload decodes to damping * C(v), v = scale * x + e. `damping(n)` is 1 if C loses
less than all of v (rounding, selection). It is 1 / (1 + omega) if C is unbiased, E|C(v) - v|^2 <= omega |v|^2; without
the factor feedback would diverge (Beznosikov et al. 2020, Lemma 8). The payload includes it, so the receiver need not
know it. After rounding to nearest or selection residual + decoded = v exactly, otherwise within one ulp.
"""

from fedmpi.codecs.base import Bare, Codec, bare, warm
from fedmpi.codecs.blocks import QSGD, Int4, Int8, Sign
from fedmpi.codecs.casts import BFloat16, Float16
from fedmpi.codecs.chunk_topk import ChunkTopK
from fedmpi.codecs.dense import DENSE
from fedmpi.codecs.identity import Identity
from fedmpi.codecs.randk import RandK
from fedmpi.codecs.topk import Threshold, TopK
from fedmpi.codecs.uniform import Uniform
from fedmpi.components import Family

CODECS = Family(
    "codec",
    DENSE | {"topk": TopK, "chunk_topk": ChunkTopK, "randk": RandK, "threshold": Threshold},
    Codec,
)

__all__ = [
    "CODECS",
    "QSGD",
    "BFloat16",
    "Bare",
    "ChunkTopK",
    "Codec",
    "Float16",
    "Identity",
    "Int4",
    "Int8",
    "RandK",
    "Sign",
    "Threshold",
    "TopK",
    "Uniform",
    "bare",
    "warm",
]
