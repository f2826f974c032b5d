"""What masks cost: key streams of AES-128-CTR and ChaCha20, and a million parameters masked for one peer.

    python jobs/bench/masks.py [--words N] [--quick]

Times are the least of many repeats, on one core. `mask` is what a silo does per neighbour and round: make the stream
and add it to the vector, piece by piece; `pieces` is the same if every piece starts the stream anew, as when pieces
travel out of order. Masks as Python code often makes them (one draw per element) are beside it, for a tenth of them.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedmpi.secure.masks import Masks, stream_into

PIECE = 1 << 16  # words


REPEATS, QUICK = 60, 2


def least(work: Callable[[], object], repeats: int) -> float:
    """The shortest time of a call, in seconds."""
    times = []
    for _ in range(repeats):
        start_s = time.perf_counter()
        work()
        times.append(time.perf_counter() - start_s)
    return min(times)


def cipher(name: str, num_bytes: int, repeats: int) -> float:
    """Seconds for a key stream of so many bytes, in pieces that stay in the cache."""
    piece = 1 << 17
    zeros, out = bytearray(piece), bytearray(piece)
    aes = Cipher(algorithms.AES(bytes(16)), modes.CTR(bytes(16)))
    chosen = aes if name == "AES-128-CTR" else Cipher(algorithms.ChaCha20(bytes(32), bytes(16)), None)

    def work() -> None:
        encryptor = chosen.encryptor()
        for _ in range(num_bytes // piece):
            encryptor.update_into(zeros, out)

    return least(work, repeats)


def main(num: int, repeats: int) -> None:
    """Print the table."""
    for name in ("AES-128-CTR", "ChaCha20"):
        seconds = cipher(name, 1 << 25, repeats)
        print(f"{name:<24}{(1 << 25) / seconds / 1e9:8.1f} GB/s")
    for bits, dtype in ((32, np.uint32), (64, np.uint64)):
        words = np.zeros(num, dtype=dtype)

        def pieces(bits: int = bits, words: np.ndarray = words) -> None:
            masks = Masks([(bytes(16), 1)], bits)
            for start in range(0, num, 2 * PIECE):  # every other piece, then the rest
                masks.add(words[start : start + PIECE], start)
            for start in range(PIECE, num, 2 * PIECE):
                masks.add(words[start : start + PIECE], start)

        alone = least(lambda words=words: stream_into(bytes(16), words), repeats)  # type: ignore[misc]
        mask = least(lambda bits=bits, words=words: Masks([(bytes(16), 1)], bits).add(words), repeats)  # type: ignore[misc]
        apart = least(pieces, repeats)
        print(
            f"{num} words of {bits} bits: stream {1e3 * alone:.3f} ms, mask {1e3 * mask:.3f} ms ({mask / alone:.2f}x), "
            f"pieces {1e3 * apart:.3f} ms ({apart / alone:.2f}x)"
        )
    tenth = num // 10
    slow = least(lambda: [random.getrandbits(32) for _ in range(tenth)], 3)
    print(f"{tenth} draws in Python: {1e3 * slow:.0f} ms")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--words", type=int, default=1_000_000, help="length of the masked vector")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} repeats of each")
    options = parser.parse_args()
    main(options.words, QUICK if options.quick else REPEATS)
