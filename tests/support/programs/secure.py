"""What a run under masks must do on several ranks: see cases.py. Argument: FOLDER, shared by all ranks."""

import base64
import itertools
from pathlib import Path

import numpy as np
import torch
from support.programs.cases import require_equal, run

import fedmpi
from fedmpi import comm as ranks
from fedmpi.comm.mpi import MpiComm
from fedmpi.components import build
from fedmpi.plan import plan as promise
from fedmpi.secure import masks, session
from fedmpi.secure.masks import KeyPair

CASES = {}
BASE = {
    "rounds": 1,
    "model": {"name": "mlp", "hidden": [16]},
    "local": {"name": "sgd", "lr": 0.1, "epochs": 1, "batch_size": 64},
    "updates": [{"name": "clip", "norm": 1.0}],
    "checkpoint": {"every": 1},
    "device": {"name": "cpu"},
}
PLANS = ("replicated", "root", "sharded")


def case(work):
    CASES[work.__name__] = work
    return work


def trained(out, silos, secure, **other):
    data = {"name": "digits", "silos": silos, "partition": {"name": "dirichlet", "alpha": 0.5}}
    how = {"secure": secure} if secure else {"disclose": "pooled"}
    config = build(fedmpi.Config, BASE | {"out": str(out), "data": data} | how | other)
    with fedmpi.Run(config) as one:
        records = list(one)
        fed = one.federation
    size = ranks.connect().size
    if not other.get("exchange", {}).get("overlap"):
        said = promise(config, {}, size)
        if config.select.least(fed.ids, 1) == silos:
            for name in ("bytes_up", "bytes_down", "bytes_control"):
                require_equal(name, records[-1][name], said[name])
    return one.parameters, records, fed


def compare(out, silos, secure, **other):
    """A run with masks against the same one without: parameters to the quantisation, figures, who took part."""
    plain_P, plain, _ = trained(out / "plain", silos, None, **other)
    masked_P, masked, fed = trained(out / "masked", silos, secure, **other)
    bound = other.get("rounds", 1) * (2 * fed.secure.ring.error(silos, 0.5) + 5e-7 * float(plain_P.abs().max()))
    off = float((plain_P - masked_P).abs().max())
    assert off <= bound, f"{out.name}: {off:.2e} beyond {bound:.2e}"
    for one, two in zip(plain, masked, strict=True):
        require_equal("fields", two.keys(), one.keys())
        for name in ("train_loss", "loss", "accuracy"):
            assert abs(one[name] - two[name]) <= 1e-4 * abs(one[name]), (out.name, name, one[name], two[name])
        require_equal("cohort", (two["cohort"], two["num_rejected"]), (one["cohort"], one["num_rejected"]))
    return off


@case
def masked_is_plain_for_weights_1_to_a_million(folder):
    plans = itertools.cycle(PLANS)
    worst = 0.0
    for silos in (2, 3, 4, 8):
        for heavy in (1.0, 1e6):
            weights = {f"s{i}": heavy if i % 2 else 1.0 for i in range(silos)}
            ids = [
                silo.id
                for silo in build(fedmpi.Config, {"data": {"name": "digits", "silos": silos}}).data.source(0).silos
            ]
            by = dict(zip(ids, weights.values(), strict=True))
            plan, out = next(plans), Path(folder) / f"{silos}-{heavy:g}"
            how = {"aggregate": {"name": "mean", "weights": by}, "exchange": {"plan": plan}}
            worst = max(worst, compare(out, silos, {"name": "secagg", "threshold": 2}, **how))
    return worst


SCAFFOLD = {"name": "scaffold", "lr": 0.05, "epochs": 1, "batch_size": 64}
OTHERS = {
    "auxiliary": {"local": SCAFFOLD, "updates": [{"name": "clip", "norm": 5.0, "vectors": ["delta", "control"]}]},
    "without_clip": {"updates": []},
    "a_third": {"select": {"name": "uniform", "fraction": 0.5}, "rounds": 3},
    "overlap": {"exchange": {"overlap": True, "plan": "sharded"}, "rounds": 3},
    "fragments": {"exchange": {"fragments": 2}, "rounds": 4},
    "steps": {"aggregate": "fednova", "updates": [{"name": "clip", "norm": 3.0}]},
}


@case
def masked_is_plain_with_other_parts(folder):
    return {name: compare(Path(folder) / name, 6, {"name": "secagg"}, **how) for name, how in OTHERS.items()}


@case
def masked_is_plain_with_16_bits(folder):
    worst = 0.0
    for plan in PLANS:
        out, how = Path(folder) / f"few-{plan}", {"exchange": {"plan": plan}}
        plain_P, _, _ = trained(out / "plain", 4, None, **how)
        secure = {"name": "secagg", "bits": 16, "largest": 0.5}
        masked_P, _, fed = trained(out / "masked", 4, secure, **how)
        off, bound = float((plain_P - masked_P).abs().max()), fed.secure.ring.error(4, 0.5)
        assert 1e-6 < off <= bound < 2e-3, (plan, off, bound)
        worst = max(worst, off)
    return worst


@case
def no_secret_is_in_the_run_directory(folder):
    secrets, out = [], Path(folder) / "grepped"
    made, derived = KeyPair.__init__, masks.derive

    def noted(pair, private=None):
        made(pair, private)
        secrets.append(pair.private_bytes())

    def kept(*arguments, **named):
        secrets.append(derived(*arguments, **named))
        return secrets[-1]

    KeyPair.__init__, vars(session)["derive"] = noted, kept
    try:
        trained(out, 4, {"name": "secagg"}, rounds=3)
    finally:
        KeyPair.__init__, vars(session)["derive"] = made, derived
    ranks.connect().barrier()
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) > 8, files
    require_equal("secrets: own key, pairs, and for each of three sums a round", len(secrets), 1 + 3 + 3 * 3 * 3)
    for path in files:
        text = path.read_bytes()
        for secret in secrets:
            for form in (secret, secret[::-1], secret.hex().encode(), base64.b64encode(secret)[:-4]):
                assert form not in text, path


@case
def no_figure_of_a_rank_is_in_its_tables(folder):
    """What a rank with one silo passes to collectives of small tables, without masks and with them."""
    passed, share = {}, MpiComm.share

    def listening(comm, values, meanwhile=None):
        kept.extend(np.asarray(values, dtype=np.float64).ravel().tolist())
        return share(comm, values, meanwhile)

    MpiComm.share = listening
    try:
        for name, secure in (("plain", None), ("masked", {"name": "secagg"})):
            kept: list[float] = []
            trained(Path(folder) / f"tables-{name}", 4, secure, rounds=2)
            passed[name] = {value for value in kept if not value.is_integer()}
    finally:
        MpiComm.share = share
    assert len(passed["plain"]) > 20, passed["plain"]
    require_equal("in both", passed["plain"] & passed["masked"], set())
    figures = {value for value in passed["plain"] if value < 1e4}  # seconds differ anyway
    assert len(figures) > 10, figures


@case
def a_resumed_run_has_new_keys_and_the_same_bits(folder):
    publics, ways = [], {}
    made = KeyPair.__init__

    def noted(pair, private=None):
        made(pair, private)
        publics.append(pair.public)

    KeyPair.__init__ = noted
    try:
        for name, steps in {"whole": (4,), "resumed": (2, 4)}.items():
            for rounds in steps:
                ways[name] = trained(Path(folder) / name, 4, {"name": "secagg"}, rounds=rounds)[0]
    finally:
        KeyPair.__init__ = made
    require_equal("bits", torch.equal(ways["whole"], ways["resumed"]), True)
    require_equal("different keys", len(set(publics)), len(publics))


if __name__ == "__main__":
    import sys

    run(CASES, sys.argv[1])
