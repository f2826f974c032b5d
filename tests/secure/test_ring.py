"""The ring of secure sums holds every sum: what would not fit is rejected, whatever an aggregator's weights are."""

import pytest
import torch
from support.runs import config, put_back, run  # noqa: F401

from fedmpi.aggregate.mean import Mean
from fedmpi.components import component
from fedmpi.errors import Diverged, FedmpiError


@component
class Turned(Mean):
    """The mean, with all weights times a factor."""

    factor: float = 1.0

    def weight(self, contribution):
        return self.factor * super().weight(contribution)


def turned(out, factor, **other):
    updates = [{"name": "clip", "norm": 1.0}]
    aggregate = {"name": "secure.test_ring:Turned", "factor": factor}
    return config(out, 2, local={"lr": 5.0}, updates=updates, aggregate=aggregate, **other)


@pytest.mark.parametrize("factor", [-1.0, -3.0, 3.0])
def test_weights_of_either_sign_fit(tmp_path, factor):
    _, plain = run(turned(tmp_path / "plain", 1.0))
    records, masked = run(turned(tmp_path / "masked", factor, secure="secagg"))
    assert [record["num_rejected"] for record in records] == [0, 0]
    assert torch.allclose(plain.parameters, masked.parameters, atol=1e-5)


@pytest.mark.parametrize("factor", [-100.0, 100.0])
def test_updates_that_weights_make_too_large_are_rejected(tmp_path, factor):
    with pytest.raises(FedmpiError, match="rejected") as caught:
        run(turned(tmp_path, factor, secure="secagg"))
    assert isinstance(caught.value, Diverged)
