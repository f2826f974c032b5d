"""Codecs: how a vector becomes bytes.

    base        what the exchange asks of a codec, kernels by device, what several share
    identity    float32 as it is
    casts       bfloat16, float16
    blocks      a scale per block: int8, int4, QSGD, signs
    uniform     one grid for all values
    dense       those above, which send every value
    topk        chosen values and their indices: the largest, those above a threshold
    chunk_topk  the largest of every chunk
    randk       values at places drawn from the key

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
