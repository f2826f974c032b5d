"""Gradient steps corrected by vectors that travel with the delta."""

from __future__ import annotations

from typing import ClassVar

import torch

from fedmpi.components import component
from fedmpi.flat import FlatModel
from fedmpi.local.base import LocalSilo, Round, Work, descend
from fedmpi.types import Auxiliary, Contribution


@component
class Scaffold(Work):
    """Steps along g - c_k + c, c_k being the silo's control variate and c their mean over all silos (Karimireddy et
    al. 2020, Algorithm 1, Option II).

    c_k becomes c_k - c + (w_t - w_k) / (steps * lr), and c moves by 1/K of the sum of what the c_k changed.
    """

    auxiliaries: ClassVar[tuple[Auxiliary, ...]] = (Auxiliary("control", "population"),)

    def train(self, silo: LocalSilo, model: FlatModel, params_P: torch.Tensor, round: Round) -> Contribution:
        c_P = round.auxiliary["control"]
        before_P = silo.kept.get("control")
        correction_P = c_P if before_P is None else c_P - before_P
        pairs = model.pairs(correction_P)

        def correct() -> None:
            for param, part in pairs:
                if param.grad is not None:
                    param.grad.add_(part)

        contribution = descend(self, silo, model, params_P, round, correct)
        scale = -1 / (contribution.num_steps * self.rate(round))
        change_P = model.auxiliary(0)
        torch.mul(contribution.delta_P[: model.num_shared], scale, out=change_P).sub_(c_P)
        silo.kept["control"] = change_P.clone() if before_P is None else before_P + change_P
        return contribution


RULES = {"scaffold": Scaffold}
