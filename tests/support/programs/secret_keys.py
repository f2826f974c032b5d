"""A run under masks on 4 ranks that tells a test which secrets it has. Argument: FOLDER, shared by all ranks.

Each rank writes FOLDER/rank-R.json: its process id, its public keys, and its secrets in hexadecimal with the ranks that
may know them. Then it stays as it is, with the run open, until FOLDER/searched exists.
"""

import ctypes
import json
import os
import sys
import time
from pathlib import Path

import fedmpi
from fedmpi.components import build
from fedmpi.secure import masks, session
from fedmpi.secure.masks import KeyPair

LIMIT_S = 60.0
HOW = {
    "rounds": 2,
    "data": {"name": "digits", "silos": 4},
    "model": {"name": "mlp", "hidden": [16]},
    "local": {"name": "sgd", "lr": 0.1, "epochs": 1, "batch_size": 64},
    "updates": [{"name": "clip", "norm": 1.0}],
    "secure": {"name": "secagg"},
    "checkpoint": {"every": 1},
    "device": {"name": "cpu"},
}


def main(folder):
    secrets, publics = {}, []  # secrets by hexadecimal form, with the ranks that may know them
    made, derived = KeyPair.__init__, masks.derive

    def noted(pair, private=None):
        made(pair, private)
        publics.append(pair.public.hex())
        secrets[pair.private_bytes().hex()] = None

    def kept(secret, label, *numbers, **named):
        key = derived(secret, label, *numbers, **named)
        if label == "silos":
            secrets[secret.hex()] = secrets[key.hex()] = numbers  # indices of two silos
        else:
            secrets[key.hex()] = secrets[secret.hex()]
        return key

    KeyPair.__init__, vars(session)["derive"] = noted, kept
    ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)  # PR_SET_PTRACER: any process may read this one
    with fedmpi.Run(build(fedmpi.Config, HOW | {"out": str(folder / "run")})) as run:
        list(run)
        fed = run.federation
        owners = {
            text: [fed.comm.rank] if silos is None else [fed.secure._ranks[silo] for silo in silos]
            for text, silos in secrets.items()
        }
        row = {"pid": os.getpid(), "publics": publics, "secrets": owners}
        written = folder / f"rank-{fed.comm.rank}.json"
        written.with_suffix(".part").write_text(json.dumps(row))
        written.with_suffix(".part").rename(written)
        deadline = time.monotonic() + LIMIT_S
        while not (folder / "searched").exists():
            assert time.monotonic() < deadline, "nobody has searched"
            time.sleep(0.02)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
