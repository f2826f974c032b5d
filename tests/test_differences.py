"""What differs between two configurations, and what may."""

import yaml

from fedmpi.components import build, to_dict
from fedmpi.config import Config, load
from fedmpi.differences import differences, digest


def test_what_may_change_is_no_difference_and_everything_else_is():
    stored = to_dict(Config())
    of_a_site = [
        {"out": "b"},
        {"device": {"name": "cpu"}},
        {"init": "c.safetensors"},
        {"records": {"tensorboard": True}},
    ]
    for change in ({"rounds": 9}, {"checkpoint": {"every": 1}}, *of_a_site):
        config = build(Config, change)
        assert differences(stored, config) == []
        assert (digest(config) == digest(Config())) == (change in of_a_site)
    config = build(Config, {"seed": 1, "local": {"name": "sgd", "lr": 0.1, "epochs": 1}, "select": "uniform"})
    assert differences({**stored, "about": {"ranks": 3}}, config) == [
        "local.lr is 0.05 there and 0.1 here",
        "seed is 0 there and 1 here",
        "select.count is not set there and null here",
        "select.fraction is not set there and 1.0 here",
        "select.name is all there and uniform here",
        "select.weights is not set there and renormalised here",
    ]


def test_keys_of_a_component_that_an_earlier_version_did_not_store_had_their_defaults():
    silos = [{"id": "north", "path": "north.csv"}]
    values = {"data": {"name": "files", "task": "binary", "shape": [3], "silos": silos}}
    stored = to_dict(build(Config, values))
    for key in ("scale", "missing", "indicators", "statistics", "stream"):
        del stored["data"][key]
    assert differences(stored, build(Config, values)) == []
    scaled = build(Config, {"data": {**values["data"], "scale": "standard"}})
    assert differences(stored, scaled) == ["data.scale is null there and standard here"]


def test_an_earlier_version_s_disclosure_is_the_default(tmp_path):
    masked = {"secure": "secagg", "updates": [{"name": "clip", "norm": 1.0}]}
    for values in ({}, masked):
        config = build(Config, values)
        stored = {**to_dict(config), "disclose": "silo"}
        assert differences(stored, config) == []
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({**stored, "about": {"format": 1}}))
        assert load(tmp_path)[0].disclosed == ("pooled" if values else "silo")
    assert differences(to_dict(Config()), build(Config, {"disclose": "pooled"})) == [
        "disclose is null there and pooled here"
    ]


def test_of_lists_and_mappings_only_the_single_values_that_differ_are_named():
    silos = [{"id": name, "path": f"{name}.csv"} for name in ("north", "south")]
    values = {"data": {"name": "files", "task": "binary", "shape": [3], "silos": silos}}
    stored = to_dict(build(Config, values))
    values["data"]["silos"] = [{"id": "north", "path": "north_s.csv"}, silos[1]]
    assert differences(stored, build(Config, values)) == ["data.silos[0].path is north.csv there and north_s.csv here"]
    values["data"]["silos"] = silos[:1]
    told = differences(stored, build(Config, values))
    assert told[:2] == [
        "data.silos[1].id is south there and not set here",
        "data.silos[1].path is south.csv there and not set here",
    ]
    assert all("{" not in text for text in told)
    added = {"updates": [{"name": "clip", "norm": 1.0}]}
    told = differences(to_dict(Config()), build(Config, added))
    assert told[:2] == [
        "updates[0].name is not set there and clip here",
        "updates[0].norm is not set there and 1.0 here",
    ]
    assert differences({**to_dict(Config()), "updates": "clip"}, Config()) == ["updates is clip there and [] here"]
