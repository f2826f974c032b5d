"""A replica group of torchft for goodput.py, one process that trains one silo. It imports nothing of fedmpi."""

import importlib
import json
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed import TCPStore


def main(lighthouse: str, folder: str, silo: str, steps: str, batch_size: str, pause_s: str) -> None:
    torchft, local_sgd = (importlib.import_module(name) for name in ("torchft", "torchft.local_sgd"))
    torch.manual_seed(0)
    data = torch.load(Path(folder) / f"silo-{silo}.pt")
    x, y = data["x"].flatten(1), data["y"]
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def load(state):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    manager = torchft.Manager(
        pg=torchft.ProcessGroupGloo(timeout=timedelta(seconds=5)),
        load_state_dict=load,
        state_dict=lambda: {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
        min_replica_size=1,
        use_async_quorum=False,
        timeout=timedelta(seconds=5),
        quorum_timeout=timedelta(seconds=30),
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=store.port,
        lighthouse_addr=lighthouse,
        replica_id=f"silo-{silo}",
        hostname="127.0.0.1",
    )
    averages = local_sgd.LocalSGD(manager, model, optimizer, sync_every=int(steps))
    with averages, open(f"{folder}/silo-{silo}.jsonl", "a") as file:
        while True:
            before = manager.current_step()
            for _ in range(int(steps)):
                time.sleep(float(pause_s))
                rows = torch.randint(len(x), (int(batch_size),))
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
            after = manager.current_step()
            if after == before + 1:  # a replica that has caught up by a copy has trained nothing
                row = {"time": time.time(), "step": after, "samples": int(steps) * int(batch_size)}
                file.write(json.dumps({**row, "replicas": manager.num_participants()}) + "\n")
                file.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
