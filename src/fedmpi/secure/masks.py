"""Keys and masks. All cryptography is from the package `cryptography`; here are only names, labels and sizes.

    X25519 (RFC 7748)            two public keys -> a secret that both owners compute
    HKDF-SHA256 (RFC 5869)       a secret and a label -> a key for one use
    AES-128-CTR (SP 800-38A)     a key -> a stream of uniform words; any piece of it by itself
    AES-128-GCM (SP 800-38D)     shares that pass through the server's hands

Every key encrypts one stream, so the nonce is always 0. The counter starts at 2, as in GCM with a nonce of 96 bits: the
ciphertext of zeros under GCM is this stream. OpenSSL makes it with wider instructions in GCM than in CTR (12 against
9 GB/s on a core with VAES), so a stream that is read from its start is made by GCM, and any other piece by CTR. Mask
words are unsigned integers of 16, 32 or 64 bits, which sums wrap around. Secrets live in memory only.
"""

from __future__ import annotations

import secrets
import struct
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
GCM_BYTES = (1 << 36) - 32  # of one stream that GCM makes
_FIRST = 2  # counter of a stream's first block

_ZEROS = np.zeros(CHUNK, dtype=np.uint64)


def require() -> None:
    """Raise ConfigError if `cryptography` is not installed."""
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise ConfigError("secure: needs the package cryptography; pip install 'fedmpi[secure]'") from None


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
    """Fill `words` (contiguous unsigned integers) with a key's stream from word `start` on. AES-128-CTR.

    Any piece of a stream can be made by itself: the counter starts at the piece.
    """
    encryptor = _encryptor(key, start, words.itemsize, len(words))
    zeros, out = _ZEROS.view(np.uint8).data, words.view(np.uint8).data
    for begin in range(0, len(out), _ZEROS.nbytes):
        part = out[begin : begin + _ZEROS.nbytes]
        encryptor.update_into(zeros[: len(part)], part)


def add_stream(key: bytes, sign: int, words: np.ndarray, start: int = 0) -> None:
    """Add (`sign` 1) or subtract (-1) a key's stream from word `start` on, in place. Sums wrap around."""
    if words.dtype.kind != "u":
        raise TypeError(f"masks are sums of unsigned integers, not {words.dtype}")
    Masks([(key, sign)], 8 * words.itemsize).add(words, start)


class Masks:
    """The masks of one vector: streams of keys, each added (sign 1) or subtracted (-1). Adjacent pieces in turn cost
    the least.

    Attributes: signs (of the streams, [K]).
    """

    def __init__(self, keys: Sequence[tuple[bytes, int]], bits: int) -> None:
        self._keys = [key for key, _ in keys]
        self.signs = np.array([sign for _, sign in keys], dtype=np.int64)
        self._words = np.empty((len(keys), CHUNK), dtype=f"u{bits // 8}")
        self._views = [row.view(np.uint8).data for row in self._words]
        self._zeros = _ZEROS.view(np.uint8).data[: CHUNK * self._words.itemsize]
        self._encryptors: list[Any] = []
        self._next, self._end = -1, 0  # words at which the encryptors stand, and up to which they go

    def streams(self, start: int, num: int) -> np.ndarray:
        """The words of all streams from `start` on, [K, CHUNK], of which `num` are new; valid until the next call."""
        itemsize, stop = self._words.itemsize, start + num
        if start != self._next or stop > self._end:
            self._encryptors = [_encryptor(key, start, itemsize, num) for key in self._keys]
            by_gcm = start == 0 and stop * itemsize <= GCM_BYTES
            self._end = GCM_BYTES // itemsize if by_gcm else 1 << 62
        self._next = stop
        zeros, views = self._zeros, self._views
        if num != CHUNK:
            zeros, views = zeros[: num * itemsize], [view[: num * itemsize] for view in views]
        for encryptor, view in zip(self._encryptors, views, strict=True):
            encryptor.update_into(zeros, view)
        return self._words

    def add(self, words: np.ndarray, start: int = 0) -> None:
        """Mask the words of the vector from `start` on, in place."""
        if words.dtype != self._words.dtype:
            raise TypeError(f"this mask is of {self._words.dtype}, not {words.dtype}")
        for begin in range(0, len(words), CHUNK):
            part = words[begin : begin + CHUNK]
            for sign, stream in zip(self.signs, self.streams(start + begin, len(part)), strict=True):
                (np.add if sign > 0 else np.subtract)(part, stream[: len(part)], out=part)


def _encryptor(key: bytes, start: int, itemsize: int, num: int) -> Any:
    """What makes `num` words or more of a key's stream from word `start` on."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    if start == 0 and num * itemsize <= GCM_BYTES:
        return Cipher(algorithms.AES(key), modes.GCM(bytes(12))).encryptor()
    block, skipped = divmod(start * itemsize, BLOCK_BYTES)
    counter = (_FIRST + block) % (1 << 128)
    encryptor = Cipher(algorithms.AES(key), modes.CTR(counter.to_bytes(BLOCK_BYTES, "big"))).encryptor()
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
