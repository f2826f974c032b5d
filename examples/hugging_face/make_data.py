"""Write data/a.npz, b.npz and c.npz: texts of ten symbols; a symbol determines the next one nine times out of ten."""

from pathlib import Path

import numpy as np

SYMBOLS, LENGTH = 10, 16

Path("data").mkdir(exist_ok=True)
rng = np.random.default_rng(0)
following = rng.integers(SYMBOLS, size=SYMBOLS)  # the language: the usual next symbol after each symbol
for silo, num_texts in {"a": 200, "b": 150, "c": 100}.items():
    texts = rng.integers(SYMBOLS, size=(num_texts, LENGTH + 1))
    for i in range(1, LENGTH + 1):
        texts[:, i] = np.where(rng.random(num_texts) < 0.9, following[texts[:, i - 1]], texts[:, i])
    np.savez(Path("data", f"{silo}.npz"), x=texts[:, :-1], y=texts[:, 1:])
print("wrote data/{a,b,c}.npz")
