"""Page-locked host memory through which vectors on a GPU travel, where MPI reads host memory only."""

from __future__ import annotations

import torch


class Staging:
    """One vector for each role and dtype, as long as the longest so far; nothing where vectors are in host memory."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def host(self, vector: torch.Tensor, role: str) -> torch.Tensor:
        """Host memory for the vector: its own, or page-locked memory that the next one of this role uses again."""
        if vector.device.type == "cpu":
            return vector
        kept = self._kept.get((role, vector.dtype))
        if kept is None or len(kept) < len(vector):
            kept = self._kept[role, vector.dtype] = torch.zeros(len(vector), dtype=vector.dtype, pin_memory=True)
        return kept[: len(vector)]

    def loaded(self, vector: torch.Tensor, role: str) -> torch.Tensor:
        """The same with the vector's values."""
        host = self.host(vector, role)
        return host if host is vector else host.copy_(vector)
