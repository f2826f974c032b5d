"""Codecs that send every value; sparse codecs encode their selected values with one of them."""

from __future__ import annotations

from typing import Annotated

import pydantic

from fedmpi.codecs.base import Codec
from fedmpi.codecs.blocks import QSGD, Int4, Int8, Sign
from fedmpi.codecs.casts import BFloat16, Float16
from fedmpi.codecs.identity import Identity
from fedmpi.codecs.uniform import Uniform
from fedmpi.components import Family, called

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
        raise ValueError(f"values are chosen once: takes one of {', '.join(DENSE)}, not '{called(codec)}'")
    return codec


Values = Annotated[Codec, VALUES, pydantic.AfterValidator(_dense)]
