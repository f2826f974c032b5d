"""The cost of codecs on one core."""

from __future__ import annotations

import math
import statistics

import torch

from fedmpi.bench.figures import Figure
from fedmpi.bench.timing import Candidates, Row, in_turns
from fedmpi.codecs import CODECS, warm
from fedmpi.comm import SoloComm

COLUMNS = ["codec", "x_memcpy_encode", "x_memcpy_add", "wire_bytes_per_param", "median_s"]


def codecs(num_params: int, repeats: int = 7, seed: int = 0, limit_s: float = math.inf) -> list[Row]:
    """One row per codec with default settings, on one thread: encode with feedback, decode and weighted add, bytes.

    Ratios are relative to one copy of the vector. `limit_s`: for all codecs together.
    """
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(seed)
    x_N = 1e-3 * torch.randn(num_params, generator=draw)
    other_N, residual_N, sum_N = torch.zeros_like(x_N), torch.zeros_like(x_N), torch.zeros_like(x_N)
    rows = []
    for name, member in CODECS.members.items():
        codec = member()
        warm(codec)
        payload_B = torch.zeros(codec.max_bytes(num_params), dtype=torch.uint8)
        sent: list[int] = []
        candidates: Candidates = {
            "memcpy": lambda: other_N.copy_(x_N),
            "encode": lambda codec=codec, payload_B=payload_B, sent=sent: sent.append(  # type: ignore[misc]
                codec.encode(x_N, payload_B, 1, 0.5, residual_N)
            ),
            "add": lambda codec=codec, payload_B=payload_B, sent=sent: codec.add(  # type: ignore[misc]
                payload_B[: sent[-1]], sum_N, 1, 0.5
            ),
        }
        residual_N.zero_()
        median = {
            k: statistics.median(v)
            for k, v in in_turns(SoloComm(), candidates, repeats, limit_s / len(CODECS.members)).items()
        }
        rows.append(
            {
                "codec": name,
                "params": num_params,
                "seconds": {"median": median["encode"]},
                "add_s": median["add"],
                "x_memcpy_encode": median["encode"] / median["memcpy"],
                "x_memcpy_add": median["add"] / median["memcpy"],
                "wire_bytes_per_param": sent[-1] / num_params,
            }
        )
    return rows


def figures(rows: list[Row]) -> list[Figure]:
    """Throughput of encoding and of decoding with adding, in bytes of the float32 vector, and bytes as sent."""
    found = []
    for row in rows:
        name, num_bytes = f"codecs.{row['codec']}", 4 * row["params"]
        found.append(Figure(f"{name}.encode", num_bytes / row["seconds"]["median"] / 1e9, "GB/s"))
        found.append(Figure(f"{name}.add", num_bytes / row["add_s"] / 1e9, "GB/s"))
        found.append(Figure(f"{name}.wire", row["wire_bytes_per_param"], "bytes/param"))
    return found
