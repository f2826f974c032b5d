"""Updates that a codec cannot represent: rejected by name, and the round continues."""

import numpy as np
import pytest
import torch
from support.runs import config, put_back, run  # noqa: F401

from fedmpi.codecs import CODECS
from fedmpi.components import build, component, to_dict
from fedmpi.config import Config
from fedmpi.errors import Diverged, ExchangeError
from fedmpi.exchange.config import ExchangeSection
from fedmpi.local import Sgd

HERE = "exchange.test_range:"  # how configurations name this module's components


@component
class Far:
    """SGD, but silo s1 goes very far in one coordinate, or all silos do."""

    by: float = 70_000.0
    all: bool = False
    lr: float = 0.1
    epochs: int = 1
    batch_size: int = 8

    def train(self, silo, model, params_P, round):
        done = Sgd(lr=self.lr, epochs=self.epochs, batch_size=self.batch_size).train(silo, model, params_P, round)
        if silo.id == "s1" or self.all:
            done.vector_Q[1] = self.by
        return done


def far(out, rounds, exchange, **local):
    """A run with that rule and these fields."""
    values = to_dict(config(out, rounds, exchange=exchange))
    return build(Config, {**values, "local": {"name": HERE + "Far", **local}})


FP16 = {
    "up": {"plan": "sharded", "up": {"codec": "fp16"}},
    "up, fed back": {"plan": "sharded", "up": {"codec": "fp16", "feedback": True}},
    "up, of silos": {"plan": "sharded", "scope": "silo", "up": {"codec": "fp16"}},
    "down": {"plan": "sharded", "down": {"codec": "fp16"}},
    "both": {"plan": "sharded", "up": {"codec": "fp16"}, "down": {"codec": "fp16"}},
    "top-k's values": {"plan": "sharded", "up": {"codec": {"name": "topk", "ratio": 0.5, "values": "fp16"}}},
    "threshold's values": {
        "plan": "sharded", "up": {"codec": {"name": "threshold", "max_ratio": 0.5, "values": "fp16"}},
    },
    "behind training": {"plan": "sharded", "overlap": True, "up": {"codec": "fp16"}},
    "in a region": {"plan": "sharded", "regions": {"levels": [{"up": {"codec": "fp16"}}]}},
}  # fmt: skip


@pytest.mark.parametrize("way", FP16)
def test_a_delta_beyond_the_range_of_fp16_is_rejected_by_name_and_the_round_goes_on(tmp_path, way):
    records, done = run(far(tmp_path, 2, FP16[way]))
    assert [record["rejected"] for record in records] == [["s1"]] * 2
    assert bool(done.parameters.isfinite().all()) and records[-1]["train_loss"] is not None


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4", "qsgd", "sign", "topk", "chunk_topk", "uniform"])
def test_codecs_of_float32_s_range_take_it(tmp_path, codec):
    both = {"plan": "sharded", "up": {"codec": codec}, "down": {"codec": codec}}
    records, done = run(far(tmp_path, 1, both))
    assert records[0]["rejected"] == [] and bool(done.parameters.isfinite().all())


def test_where_all_are_beyond_it_the_run_ends_and_says_why(tmp_path):
    with pytest.raises(Diverged, match=r"round 1: every update was rejected .* or a value beyond the 65520 that"):
        run(far(tmp_path, 2, FP16["up"], all=True))


def test_statistics_that_no_codec_sees_may_be_as_large_as_they_are(tmp_path):
    records, _ = run(far(tmp_path, 1, {**FP16["up"], "exact": ["*"]}))
    assert records[0]["rejected"] == []


@pytest.mark.parametrize("name", list(CODECS.members))
def test_a_codec_encodes_all_that_is_smaller_than_it_says_and_refuses_the_rest(name):
    codec = CODECS.build({"name": name, **({"values": "fp16"} if name in ("topk", "threshold") else {})}, "")
    payload_B = torch.zeros(codec.max_bytes(4), dtype=torch.uint8)
    most = np.float32(min(codec.largest, 2.0**127))
    inside = torch.from_numpy(np.array([np.nextafter(most, np.float32(0)), 0, 0, 0], dtype=np.float32))
    decoded_N = torch.zeros(4)
    num_bytes = codec.encode(inside, payload_B, key=0)
    codec.decode(payload_B[:num_bytes], decoded_N, key=0)
    assert bool(decoded_N.isfinite().all())
    if codec.largest < 2.0**127:
        with pytest.raises(ExchangeError, match="beyond what the format holds"):
            codec.encode(torch.tensor([float(most), 0, 0, 0]), payload_B, key=0)


def test_the_narrowest_of_all_channels_counts():
    level = {"up": {"codec": {"name": "topk", "values": "fp16"}, "feedback": True}}
    how = build(ExchangeSection, {"plan": "sharded", "up": {"codec": "bf16"}, "regions": {"levels": [level]}})
    assert 65_400 < how.largest < 65_500
