"""Every codec in several variants, with vectors and buffers for them."""

from typing import Any

import numpy as np
import pytest
import torch

from fedmpi.codecs import CODECS

VARIANTS: list[dict[str, Any]] = [
    *({"name": name} for name in CODECS.members),
    *({"name": name, "rounding": "stochastic"} for name in ("int8", "int4")),
    *({"name": "qsgd", "levels": levels} for levels in (1, 40)),
    *({"name": "topk", "ratio": 0.1, "values": name} for name in ("int8", "bf16", "qsgd", "uniform")),
    {"name": "topk", "ratio": 0.5, "indices": "int32"},
    {"name": "threshold", "threshold": 0.2, "max_ratio": 0.3, "values": "int4"},
    {"name": "chunk_topk", "bits": 2},
    {"name": "chunk_topk", "keep": 4096},
    {"name": "uniform", "step": 0.25, "max_bits": 5},
    {"name": "randk", "ratio": 0.3},
]
NAMES = [" ".join(map(str, variant.values())) for variant in VARIANTS]
LENGTHS = [0, 1, 2, 7, 255, 256, 257, 1000, 4095, 4096, 4097, 12301]


def codecs_that(holds):
    """Parametrize a test over every codec for which `holds` is true."""
    made = [(CODECS.build(variant, "codec"), name) for variant, name in zip(VARIANTS, NAMES, strict=True)]
    return pytest.mark.parametrize("codec", [pytest.param(codec, id=name) for codec, name in made if holds(codec)])


every_codec = codecs_that(lambda codec: True)


def vector(num, seed=0, wide=True):
    """Normal numbers; with `wide`, many of them far smaller than others."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(num)
    return torch.from_numpy((np.clip(x, -3, 3) * 2.0 ** -rng.integers(0, 20 * wide + 1, num)).astype(np.float32))


def buffer(codec, num, fill=0):
    return torch.full((codec.max_bytes(num),), fill, dtype=torch.uint8)
