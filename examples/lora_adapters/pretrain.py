"""Train a network on mirrored digits and write base.pt. It stands for a published pretrained model."""

import torch
from torch import nn

from fedmpi.data.digits import load

torch.manual_seed(0)
pixels, labels = load()  # [1797, 64] from 0 to 16, [1797]
images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8).flip(3) / 16  # mirrored left to right
classes = torch.from_numpy(labels)

network = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
for _ in range(50):  # full batches
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(network(images), classes)
    loss.backward()
    optimizer.step()
torch.save(network.state_dict(), "base.pt")
print(f"wrote base.pt, loss on mirrored digits {loss.item():.3f}")
