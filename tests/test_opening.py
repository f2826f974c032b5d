"""Opening silos: all errors are reported at once, and so is that nothing will be evaluated."""

import pytest
import torch
from support.runs import config, refused, run
from torch import nn

from fedmpi.comm import SoloComm
from fedmpi.comm.threads import on_ranks
from fedmpi.components import component
from fedmpi.errors import ConfigError
from fedmpi.membership import Membership
from fedmpi.opening import CHECKSUMS, checksum, facts_of, is_of, open_silos
from fedmpi.types import Silo, SiloData, Source

OWN = "test_opening:"


def source(names, **columns):
    """Silos of three samples; one whose name is not in `columns` cannot be opened."""

    def opened(silo):
        if silo not in columns:
            raise ConfigError(f"silo '{silo}': no file")
        return SiloData(torch.zeros(3, 1), torch.zeros(3), torch.zeros(1, 1), torch.zeros(1))

    silos = tuple(Silo(name) for name in names)
    return Source("binary", (1,), 1, silos, opened, columns=columns)


def refusal(found):
    with pytest.raises(ConfigError) as caught:
        open_silos(found, Membership(0, {silo.id: (0,) for silo in found.silos}), SoloComm())
    return str(caught.value)


def test_every_silo_that_cannot_be_opened_is_named():
    assert refusal(source("abc", b=())) == "silo 'a': no file; silo 'c': no file"
    assert refusal(source("abcdefgh")).endswith("silo 'e': no file; and 3 more silos of this rank")


def test_the_silos_with_other_columns_are_those_that_are_fewer():
    said = refusal(source("abc", a=("age", "blood"), b=("age", "bp"), c=("age", "bp")))
    assert said.startswith("silo 'a' has 'blood' where silo 'b' has 'bp'; rename them, or name those to use, in order,")
    said = refusal(source("abcd", a=("u", "v"), b=("age", "bp"), c=("age", "bp"), d=("age", "x")))
    assert said.startswith(
        "silo 'a' has 'u', 'v' where silo 'b' has 'age', 'bp'; silo 'd' has 'x' where silo 'b' has 'bp'"
    )


def coins(*flipped):
    """A silo's data: 64 targets of 0 and 1, of which some are the other way."""
    y = torch.arange(64) % 3 % 2
    for place in flipped:
        y[place] = 1 - y[place]
    return SiloData(torch.zeros(60, 1), y[:60], torch.zeros(4, 1), y[60:])


def test_a_checksum_is_no_linear_equation_of_the_targets():
    """A CRC of 32 binary targets, or of fewer, determines them all."""
    base, one, two, both = (
        int(facts_of("a", coins(*flipped), source("a"), {})[3]) for flipped in ((), (5,), (9,), (5, 9))
    )
    assert len({base, one, two, both}) == 4 and base ^ one ^ two ^ both != 0
    other = coins()._replace(x_train=torch.ones(60, 1))  # nor of the targets alone
    assert facts_of("a", other, source("a"), {})[3] != base


@pytest.mark.parametrize("hides", [False, True])
def test_checksums_stay_on_their_rank_where_they_are_hidden(hides):
    found = source("abc", **{silo: () for silo in "abc"})
    members = Membership(0, {silo: (rank,) for rank, silo in enumerate("abc")})
    for rank, opened in enumerate(on_ranks(3, lambda comm: open_silos(found, members, comm, hides=hides))):
        told = opened.facts_KF[:, CHECKSUMS].any(axis=1).tolist()
        assert told == [not hides or other == rank for other in range(3)]
        assert opened.facts_KF[:, :2].tolist() == [[3, 1]] * 3


def test_a_checkpoint_of_fedmpi_0_2_0_knows_its_data():
    data = coins()
    facts_F = facts_of("a", data, source("a"), {})
    assert is_of(checksum(facts_F), facts_F, data)
    assert is_of(2830690707, facts_F, data) and not is_of(
        2830690707, facts_of("a", coins(1), source("a"), {}), coins(1)
    )


@component
class Untested:
    """Silos without a test part."""

    num_tests: tuple[int, ...] = (0, 0)

    def source(self, seed):
        def opened(silo):
            x, y = torch.ones(8, 4), torch.arange(8) % 2
            tests = self.num_tests[int(silo)]
            return SiloData(x, y, x[:tests], y[:tests])

        silos = tuple(Silo(str(i)) for i in range(len(self.num_tests)))
        return Source("classification", (4,), 2, silos, opened)


def test_no_test_sample_anywhere_is_said_once(tmp_path, caplog):
    records, _ = run(config(tmp_path / "a", 2, {"name": OWN + "Untested"}))
    assert [r.getMessage() for r in caplog.records] == [
        "no silo has test samples, so nothing is evaluated: give the data a test part"
    ]
    assert len(records) == 2 and records[-1].get("accuracy") is None and records[-1]["train_loss"] > 0
    caplog.clear()
    records, _ = run(config(tmp_path / "b", 2, {"name": OWN + "Untested", "num_tests": [0, 3]}))
    assert not caplog.records and records[-1]["accuracy"] in (1 / 3, 2 / 3)


def test_a_renamed_and_a_missing_file_are_both_in_the_line(tmp_path):
    for silo, second in (("a", "bp"), ("b", "bp")):
        lines = [f"age,{second},target", *(f"{i},{i % 7},{i % 2}" for i in range(20))]
        (tmp_path / f"{silo}.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "b.csv").write_text("age,bp,target\n1,,0\n")
    silos = [{"id": silo, "path": f"{silo}.csv"} for silo in "abc"]
    data = {"name": "files", "root": str(tmp_path), "task": "binary", "shape": [2], "silos": silos}
    said = refused(config(tmp_path / "run", 1, data))
    assert "silo 'b': " in said and "column 'bp': line 2 is empty" in said and "silo 'c': no file" in said


class Returns(nn.Module):
    """A model that returns more than its outputs."""

    def __init__(self, what="tuple"):
        super().__init__()
        self.linear, self.what = nn.Linear(4, 2), what

    def forward(self, x):
        y = self.linear(x)
        return {"tuple": (y, x), "list": [y], "dict": {"logits": y, "features": x}, "None": None}[self.what]


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("tuple", "model: it returns a tuple of 2 (Tensor, Tensor); return the outputs alone, one tensor"),
        ("list", "model: it returns a list of 1 (Tensor); return the outputs alone, one tensor"),
        ("dict", "model: it returns a dict with logits, features; return the outputs alone, one tensor"),
        ("None", "model: it returns nothing; return the outputs alone, one tensor"),
    ],
)
@pytest.mark.parametrize("loss", [None, OWN + "any_loss"])
def test_a_model_that_returns_more_than_outputs_is_told_to_return_them(tmp_path, what, says, loss):
    model = {"name": OWN + "Returns", "what": what}
    assert refused(config(tmp_path, 1, model=model, objective={"loss": loss} if loss else {})) == says


def any_loss(outputs, targets):
    return 0.0 * outputs[0].sum()
