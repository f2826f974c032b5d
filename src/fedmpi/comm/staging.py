"""Page-locked host memory for vectors on a GPU, where MPI reads host memory only."""

from __future__ import annotations

import torch


class Staging:
    """One page-locked vector per role and dtype, as long as the longest so far; none for vectors in host memory."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def host(self, vector: torch.Tensor, role: str) -> torch.Tensor:
        """Host memory for the vector: its own, or page-locked memory that the next vector of this role reuses."""
        if vector.device.type == "cpu":
            return vector
        kept = self._kept.get((role, vector.dtype))
        if kept is None or len(kept) < len(vector):
            kept = self._kept[role, vector.dtype] = torch.zeros(len(vector), dtype=vector.dtype, pin_memory=True)
        return kept[: len(vector)]

    def loaded(self, vector: torch.Tensor, role: str) -> torch.Tensor:
        """As `host`, with the vector's values copied in."""
        host = self.host(vector, role)
        return host if host is vector else host.copy_(vector)
