"""Keys and masks. All cryptography is from the package `cryptography`; here are only names, labels and sizes.

    X25519 (RFC 7748)            two public keys -> a secret that both owners compute
    HKDF-SHA256 (RFC 5869)       a secret and a label -> a key for one use
    AES-128-CTR (SP 800-38A)     a key -> a stream of uniform words; any piece of it by itself
    AES-128-GCM (SP 800-38D)     shares that pass through the server's hands

Every key encrypts one stream. It consists of lanes of 4 MiB, and the nonce of a lane is its number, so no block is ever
used twice. The counter starts at 2 in each lane, as in GCM with a nonce of 96 bits: the ciphertext of zeros under GCM
is this stream. OpenSSL makes it with wider instructions in GCM than in CTR (12 against 7 GB/s on a core with VAES), so
a lane that is read from its start is made by GCM, and any other piece by CTR. Mask words are unsigned integers of 16,
32 or 64 bits, which sums wrap around. Secrets live in memory only.
"""

from __future__ import annotations

import resource
import secrets
import struct
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedmpi.errors import ConfigError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

KEY_BYTES = 16  # of AES-128
PUBLIC_BYTES = 32  # of X25519
BLOCK_BYTES = 16  # of AES; the counter counts these
CHUNK = 1 << 15  # words per step, so that streams and sum stay in the cache
LANE_BYTES = 1 << 22  # of a stream under one nonce
_FIRST = 2  # counter of a lane's first block

_ZEROS = np.zeros(CHUNK, dtype=np.uint64)


def require() -> None:
    """Raise ConfigError if `cryptography` is not installed."""
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise ConfigError("secure: needs the package cryptography; pip install 'fedmpi[secure]'") from None


def keep_out_of_core_dumps() -> None:
    """Let this process leave no core file, which would hold its keys: the soft limit becomes 0."""
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))


class KeyPair:
    """A key pair of X25519. `repr` and pickling do not show the private key."""

    def __init__(self, private: bytes | None = None) -> None:
        from cryptography.hazmat.primitives.asymmetric import x25519

        key = x25519.X25519PrivateKey
        self._private: X25519PrivateKey = key.generate() if private is None else key.from_private_bytes(private)
        self.public: bytes = self._private.public_key().public_bytes_raw()

    def private_bytes(self) -> bytes:
        """The private key, 32 bytes."""
        return self._private.private_bytes_raw()

    def agree(self, public: bytes) -> bytes:
        """The secret shared with the owner of a public key. Raises ValueError for a public key of low order."""
        from cryptography.hazmat.primitives.asymmetric import x25519

        return self._private.exchange(x25519.X25519PublicKey.from_public_bytes(public))

    def __reduce__(self) -> Any:
        raise TypeError("keys stay in memory")


def derive(secret: bytes, label: str, *numbers: int, num_bytes: int = KEY_BYTES, salt: bytes = b"") -> bytes:
    """A key for one use, named by a label and numbers. HKDF-SHA256."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    info = b"fedmpi " + label.encode() + b"\0" + struct.pack(f">{len(numbers)}q", *numbers)
    return HKDF(algorithm=hashes.SHA256(), length=num_bytes, salt=salt or None, info=info).derive(secret)


def stream_into(key: bytes, words: np.ndarray, start: int = 0) -> None:
    """Fill `words` (contiguous unsigned integers) with a key's stream from word `start` on. Any piece of a stream can
    be made by itself."""
    zeros, out = _ZEROS.view(np.uint8).data, words.view(np.uint8).data
    done = 0
    while done < len(out):
        lane, offset = divmod(start * words.itemsize + done, LANE_BYTES)
        stop = min(len(out), done + LANE_BYTES - offset)
        encryptor = _encryptor(key, lane, offset)
        for begin in range(done, stop, _ZEROS.nbytes):
            part = out[begin : min(begin + _ZEROS.nbytes, stop)]
            encryptor.update_into(zeros[: len(part)], part)
        done = stop


def add_stream(key: bytes, sign: int, words: np.ndarray, start: int = 0) -> None:
    """Add (`sign` 1) or subtract (-1) a key's stream from word `start` on, in place. Sums wrap around."""
    if words.dtype.kind != "u":
        raise TypeError(f"masks are sums of unsigned integers, not {words.dtype}")
    Masks([(key, sign)], 8 * words.itemsize).add(words, start)


class Masks:
    """The masks of one vector: streams of keys, each added (sign 1) or subtracted (-1). The pieces of a lane cost the
    least in their order; lanes may take turns.

    Attributes: signs (of the streams, [K]).
    """

    def __init__(self, keys: Sequence[tuple[bytes, int]], bits: int) -> None:
        self._keys = [key for key, _ in keys]
        self.signs = np.array([sign for _, sign in keys], dtype=np.int64)
        self._words = np.empty((len(keys), CHUNK), dtype=f"u{bits // 8}")
        self._views = [row.view(np.uint8).data for row in self._words]
        self._zeros = _ZEROS.view(np.uint8).data
        self._begun: dict[int, tuple[int, list[Any]]] = {}  # by lane: the byte at which its encryptors stand

    def streams(self, start: int, num: int) -> np.ndarray:
        """The words of all streams from `start` on, [K, CHUNK], of which `num` are new; valid until the next call."""
        itemsize, done = self._words.itemsize, 0
        while done < num * itemsize:
            lane, offset = divmod(start * itemsize + done, LANE_BYTES)
            stop = min(num * itemsize, done + LANE_BYTES - offset)
            at, encryptors = self._begun.pop(lane, (-1, []))
            if at != offset:
                encryptors = [_encryptor(key, lane, offset) for key in self._keys]
            for encryptor, view in zip(encryptors, self._views, strict=True):
                encryptor.update_into(self._zeros[: stop - done], view[done:stop])
            if offset + stop - done < LANE_BYTES:
                self._begun[lane] = (offset + stop - done, encryptors)
            done = stop
        return self._words

    def number(self, start: int, num: int) -> int:
        """The mask of a whole number in place of `num` words from `start` on: the streams' words there as numbers, the
        lowest first, added and subtracted."""
        rows = zip(self.signs.tolist(), self.streams(start, num), strict=True)
        return sum(sign * int.from_bytes(row[:num].tobytes(), sys.byteorder) for sign, row in rows)

    def add(self, words: np.ndarray, start: int = 0) -> None:
        """Mask the words of the vector from `start` on, in place."""
        if words.dtype != self._words.dtype:
            raise TypeError(f"this mask is of {self._words.dtype}, not {words.dtype}")
        for begin in range(0, len(words), CHUNK):
            part = words[begin : begin + CHUNK]
            for sign, stream in zip(self.signs, self.streams(start + begin, len(part)), strict=True):
                (np.add if sign > 0 else np.subtract)(part, stream[: len(part)], out=part)


def _encryptor(key: bytes, lane: int, offset: int) -> Any:
    """What makes a lane of a key's stream from byte `offset` of the lane on."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    nonce = lane.to_bytes(12, "big")
    if offset == 0:
        return Cipher(algorithms.AES(key), modes.GCM(nonce)).encryptor()
    block, skipped = divmod(offset, BLOCK_BYTES)
    counter = (_FIRST + block).to_bytes(4, "big")
    encryptor = Cipher(algorithms.AES(key), modes.CTR(nonce + counter)).encryptor()
    if skipped:
        encryptor.update(bytes(skipped))
    return encryptor


def seal(key: bytes, text: bytes, about: bytes) -> bytes:
    """The text, encrypted and authenticated together with `about`, under a key that seals one text only."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(key).encrypt(bytes(12), text, about)


def unseal(key: bytes, sealed: bytes, about: bytes) -> bytes:
    """The text of `seal`. Raises ValueError if it was changed, or sealed with other keys."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    try:
        return AESGCM(key).decrypt(bytes(12), sealed, about)
    except InvalidTag:
        raise ValueError("a sealed message was changed, or is not for this silo") from None


def fresh_secret() -> bytes:
    """32 random bytes of the operating system."""
    return secrets.token_bytes(32)
