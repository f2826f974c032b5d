"""`fedmpi plan` of silos in jobs of their own says what their records then say."""

import pytest
from support.runs import put_back
from support.silojobs import IDS, apart, trained_apart

from fedmpi.errors import ConfigError
from fedmpi.plan import plan

__all__ = ["put_back"]


@pytest.mark.parametrize(
    "more",
    [
        {"server": {"average": {"decay": 0.5}}},
        {"exchange": {"up": {"codec": "int8"}}},
        {"engine": {"name": "buffered", "size": 2}},
        {"engine": {"name": "buffered", "size": 2}, "exchange": {"up": {"codec": "int8"}}},
        {"secure": {"name": "secagg"}, "updates": [{"name": "clip", "norm": 1.0}]},
    ],
    ids=["average", "int8", "buffered", "buffered int8", "secure"],
)
def test_a_plan_has_the_bytes_of_a_round(tmp_path, more):
    how = apart(tmp_path, 3, **more)
    told = plan(how, {}, 1)
    assert told["jobs"] == ["server", *IDS] and [row["silos"] for row in told["ranks"]] == [[], *([one] for one in IDS)]
    assert told["collectives"] == f"none; updates and parameters are files in {how.transport.root}"
    record = trained_apart(how)[0][1]
    assert (told["bytes_up"], told["bytes_down"]) == (record["bytes_up"], record["bytes_down"])


def test_there_are_no_ranks(tmp_path):
    with pytest.raises(ConfigError, match="transport: files has no ranks"):
        plan(apart(tmp_path), {}, 3)


def test_no_more_silos_than_there_are_can_be_waited_for(tmp_path):
    plan(apart(tmp_path, transport={"min_silos": len(IDS)}), {}, 1)
    with pytest.raises(ConfigError, match=r"^transport\.min_silos: 4, and there are 3 silos$"):
        plan(apart(tmp_path, transport={"min_silos": 4}), {}, 1)
