"""Write data/north.h5, south.h5 and west.h5: noisy images of bars, discs and rings, in different shares per clinic."""

from pathlib import Path

import h5py
import numpy as np

SIDE = 16  # pixels
SHARES = {"north": (0.7, 0.2, 0.1), "south": (0.1, 0.7, 0.2), "west": (0.2, 0.1, 0.7)}  # of bars, discs, rings


def image(shape: int, rng: np.random.Generator) -> np.ndarray:
    """One image [1, 16, 16], values about 0 to 1."""
    y, x = np.mgrid[:SIDE, :SIDE]
    centre_y, centre_x = rng.uniform(6, 10, size=2)
    distance = np.hypot(y - centre_y, x - centre_x)
    drawn = (abs(x - centre_x) < 1.5, distance < 4.5, abs(distance - 4.5) < 1.2)[shape]
    return (drawn + rng.normal(0, 0.4, drawn.shape)).astype(np.float32)[None]


Path("data").mkdir(exist_ok=True)
rng = np.random.default_rng(0)
for clinic, shares in SHARES.items():
    with h5py.File(Path("data", f"{clinic}.h5"), "w") as file:
        for part, num_images in (("train", 150), ("test", 60)):
            labels = rng.choice(3, size=num_images, p=shares)
            file[f"x_{part}"] = np.stack([image(label, rng) for label in labels])
            file[f"y_{part}"] = labels
print("wrote", *(f"data/{name}.h5" for name in SHARES))
