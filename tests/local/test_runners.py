"""Silo runners: one that trains several silos at once fits in, and nothing else notices."""

from dataclasses import replace

import pytest
from support.runs import config, figures

import fedmpi
from fedmpi.comm import SoloComm
from fedmpi.components import component
from fedmpi.errors import SiloError
from fedmpi.flat import sha256
from fedmpi.local import RUNNERS

RUNS = {
    "sums of vectors that silos keep": {"local": {"name": "scaffold"}},
    "a loss before training": {"aggregate": {"name": "qffl", "lr": 0.1}},
    "layers and statistics of their own": {
        "model": {"name": "support.runs:Normed"}, "local": {"name": "ditto"},
        "exchange": {"parameters": ["*", "!head.*"]},
    },
    "residuals of silos": {
        "exchange": {"plan": "sharded", "scope": "silo", "up": {"codec": "int8", "feedback": True}},
    },
    "overlap": {"exchange": {"plan": "replicated", "overlap": True}},
}  # fmt: skip


@component
class AllAtOnce:
    """Every silo has trained before the first contribution is handed out, as with batched models."""

    def run(self, rule, model, silos, begin):
        found = []
        for silo in silos:
            params_P, round = begin(silo)
            model.thaw()
            contribution = rule.train(silo, model, params_P, round)
            found.append(replace(contribution, vector_Q=contribution.vector_Q.clone()))
        yield from found


@component
class Lazy:
    """Leaves a silo out."""

    def run(self, rule, model, silos, begin):
        yield from RUNNERS.members["sequential"]().run(rule, model, list(silos)[:-1], begin)


def trained(out, name, runner):
    with fedmpi.Run(config(out, 3, **RUNS[name], runner=runner), comm=SoloComm()) as run:
        return [figures(record) for record in run], sha256(run.parameters)


@pytest.mark.parametrize("runner", [*RUNNERS.members, "local.test_runners:AllAtOnce"])
@pytest.mark.parametrize("name", RUNS)
def test_every_runner_gives_the_bits_of_one_silo_after_the_other(tmp_path, name, runner):
    assert trained(tmp_path / "a", name, runner) == trained(tmp_path / "b", name, "sequential")


def test_a_runner_that_leaves_a_silo_out_is_an_error_and_not_a_smaller_round(tmp_path):
    with pytest.raises(SiloError, match=r"zip\(\) argument 3 is shorter"):
        trained(tmp_path, "overlap", "local.test_runners:Lazy")
