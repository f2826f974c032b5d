"""Write data/alder.npz, birch.npz, cedar.npz and doyle.npz: one function; each plant samples another part of it."""

from pathlib import Path

import numpy as np

PLANTS = {"alder": -1.5, "birch": -0.5, "cedar": 0.5, "doyle": 1.5}  # mean of a plant's first input

Path("data").mkdir(exist_ok=True)
rng = np.random.default_rng(0)
slopes = rng.normal(size=6)
for plant, centre in PLANTS.items():
    x = rng.normal(size=(300, 6))
    x[:, 0] += centre
    y = x @ slopes + 2 * np.abs(x[:, 0]) + rng.normal(0, 0.3, size=300)
    np.savez(Path("data", f"{plant}.npz"), x=x.astype(np.float32), y=y.astype(np.float32))
print("wrote", *(f"data/{name}.npz" for name in PLANTS))
