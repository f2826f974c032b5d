"""Train the body on digits 0 to 4 and write body.pt, and the silos' digits 5 to 9 into data/."""

from pathlib import Path

import numpy as np
import torch
from body import body
from torch import nn

from fedmpi.data.digits import load

SILOS, TRAIN, TEST = ("ann", "bob", "cleo", "dirk"), 25, 75  # images of a silo for training and for testing

pixels, labels = load()  # [1797, 64] from 0 to 16, [1797]
images = pixels.reshape(-1, 1, 8, 8).astype(np.float32) / 16
early = labels < 5

torch.manual_seed(0)
network = nn.Sequential(body(), nn.Linear(128, 5))
x, y = torch.from_numpy(images[early]), torch.from_numpy(labels[early])
optimizer = torch.optim.Adam(network.parameters(), lr=0.003)
for _ in range(60):  # full batches
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(network(x), y)
    loss.backward()
    optimizer.step()
torch.save(network[0].state_dict(), "body.pt")

Path("data").mkdir(exist_ok=True)
order = np.random.default_rng(0).permutation(np.flatnonzero(~early))
for i, silo in enumerate(SILOS):
    train, test = np.split(order[i * (TRAIN + TEST) :][: TRAIN + TEST], [TRAIN])
    arrays = {"x_train": images[train], "y_train": labels[train]}
    arrays |= {"x_test": images[test], "y_test": labels[test]}
    np.savez(Path("data", f"{silo}.npz"), **arrays)
print(f"wrote body.pt, loss on digits 0 to 4 {loss.item():.3f};", *(f"data/{silo}.npz" for silo in SILOS))
