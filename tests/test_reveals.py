"""What `fedmpi plan --privacy` says of configurations."""

import pytest
from support.runs import OWN, config

from fedmpi.cli import app
from fedmpi.cli.training import _unencrypted
from fedmpi.plan import plan

SECURE = {"secure": "secagg", "updates": [{"name": "clip", "norm": 1.0}]}


def told(tmp_path, ranks=3, **how):
    result = plan(config(tmp_path, **how), {}, ranks)
    return {row["what"]: row for row in result["privacy"]}, result


@pytest.mark.parametrize(
    ("how", "server", "silos", "network"),
    [
        ({"exchange": {"plan": "root"}}, "it", "sums on the way", "it, not encrypted"),
        ({"exchange": {"plan": "sharded"}}, "pieces of it", "pieces of it", "it, not encrypted"),
        ({"exchange": {"plan": "sharded", "scope": "silo"}}, "pieces of it", "pieces of it", "yes, not encrypted"),
        ({"engine": {"name": "buffered", "size": 2}}, "yes", "no", "yes, not encrypted"),
        (
            {"transport": {"name": "files", "root": "shared"}},
            *("yes", "who reads the shared folder", "files of the shared folder"),
        ),
        (SECURE, "a sum of 3 or more", "the same, with their own", "masked words"),
        (
            SECURE | {"transport": {"name": "files", "root": "shared"}},
            *("a sum of 3 or more", "in the model only", "masked words, in the shared folder"),
        ),
    ],
)
def test_who_sees_a_silos_update(tmp_path, how, server, silos, network):
    row = told(tmp_path, ranks=1 if "transport" in how else 3, **how)[0]["a silo's update"]
    assert (row["server"], row["silos"], row["network"]) == (server, silos, network)


def test_figures_follow_what_is_disclosed(tmp_path):
    what = "losses, norms, metrics, samples used"
    seen = [told(tmp_path, **how)[0][what] for how in ({}, {"disclose": "pooled"}, SECURE)]
    assert [row["server"] for row in seen] == ["yes", "sums", "sums"]
    assert [row["network"] for row in seen] == ["yes, not encrypted", "sums of a rank's silos", "masked"]
    table, result = told(tmp_path, ranks=1, transport={"name": "files", "root": "shared"}, **SECURE)
    assert (table[what]["server"], table[what]["network"]) == ("sums", "masked, in the shared folder")
    assert table["samples, targets, outputs"]["network"] == "no" and "All jobs are trusted" in result["trust"][0]
    assert table["a checksum of the data"]["server"] == "no"


def test_figures_that_privacy_does_not_tell_are_not_in_the_table(tmp_path):
    record = {"privacy": {"name": "record", "clip": 1.0, "sigma": 1.0, "delta": 1e-5}}
    silo = {"privacy": record["privacy"] | {"name": "silo"}, "aggregate": {"name": "mean", "weights": "uniform"}}
    masked = silo | {"secure": "secagg"}
    data = {"name": OWN + "Blobs", "sizes": [20] * 4, "declared": 20}
    tables = [told(tmp_path, data=data, **how)[0] for how in (record, silo, masked)]
    shown = [[what for what in table if "metrics" in what] for table in tables]
    assert shown == [
        ["norms of noised updates, metrics on test data"],
        ["losses, norms, metrics, samples used"],
        ["metrics on test data"],
    ]


@pytest.mark.parametrize(
    ("scale", "what", "server", "network"),
    [
        ("standard", "sums of its columns, once", "sums", "sums of a rank's silos"),
        ("minmax", "sums and ends of its columns, once", "of a rank's silos", "yes, not encrypted"),
    ],
)
def test_pooled_statistics_of_columns_are_told(tmp_path, scale, what, server, network):
    data = {"name": "files", "task": "binary", "shape": [2], "silos": [{"id": "a", "path": "a.csv"}], "scale": scale}
    model = {"model": "logistic"}
    assert what not in told(tmp_path, data=data, **model)[0]
    row = told(tmp_path, ranks=1, data=data | {"statistics": "pooled"}, **model)[0][what]
    data["silos"] = [{"id": name, "path": f"{name}.csv", "num_samples": 9} for name in "abc"]
    row = told(tmp_path, data=data | {"statistics": "pooled"}, **model)[0][what]
    assert (row["server"], row["network"], row["files"]) == (server, network, "pooled")


def test_a_checksum_leaves_no_rank_unless_another_may_open_the_data(tmp_path):
    what = "a checksum of the data"
    seen = [told(tmp_path, **how)[0][what]["silos"] for how in ({}, SECURE, SECURE | {"on_failure": "adopt"})]
    assert seen == ["yes", "no", "yes"]


def test_what_one_silo_can_subtract_is_told(tmp_path):
    def sentences(count, **how):
        data = {"sizes": [9] * 4}
        return " ".join(told(tmp_path, 4, data=data, select={"name": "uniform", "count": count}, **how)[1]["trust"])

    assert "Warning: whoever hosts 1 of the 2 silos" in sentences(2, **SECURE)
    assert "Warning" not in sentences(4, **SECURE) and "Cohorts change" not in sentences(4, **SECURE)
    assert "Warning" not in sentences(3, **SECURE) and "Cohorts change" in sentences(3, **SECURE)
    assert "Warning" not in sentences(2) and "Cohorts change" not in sentences(2)


def test_one_rank_sends_nothing(tmp_path):
    assert {row["network"] for row in told(tmp_path, ranks=1)[0].values()} == {"nothing is sent"}


def test_the_ring_is_told(tmp_path):
    found = told(tmp_path, **SECURE)[1]["secure"]
    assert found["bits"] == 32 and found["threshold"] == 3 and found["clip"] == 1.0 and found["neighbours"] == 2
    assert 0 < found["error"] < 1e-8 and found["largest_sum"] == 4.0
    assert told(tmp_path)[1]["secure"] is None


def test_the_command_prints_the_table_alone(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("rounds: 1\nsecure: secagg\nupdates: [{name: clip, norm: 1.0}]\n")
    app(["plan", str(tmp_path / "c.yaml"), "--ranks", "4", "--privacy"], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "masked" in shown and "secure: sums of" in shown and "collectives" not in shown


def test_a_run_on_several_hosts_says_that_mpi_does_not_encrypt():
    assert "does not encrypt" in _unencrypted([b"a", b"b"], secure=False)
    assert not _unencrypted([b"a", b"b"], secure=True) and not _unencrypted([b"a", b"a"], secure=False)
