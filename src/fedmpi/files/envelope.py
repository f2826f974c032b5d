"""What is in a file of the transport: a JSON head, payload bytes, their lengths and their SHA-256.

    8 bytes    magic
    4 + 8      length of the head, length of the payload, little endian
    32         SHA-256 of head and payload
    head       JSON: run, kind, who, number, by, and what the kind adds; then spaces, so that
    payload    starts at a multiple of 64 bytes

A file that is not whole is not there yet: file systems of several hosts show files before all of their content.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAGIC = b"fedmpi-1"
_ALIGN = 64  # bytes
_FIXED = struct.Struct("<8sIQ32s")

Buffer = bytes | bytearray | memoryview


class Torn(ValueError):
    """A file is not whole, or not what it should be."""


@dataclass(frozen=True)
class Envelope:
    """A file's content: a head, a payload, and the SHA-256 of both."""

    head: dict[str, Any]
    payload: memoryview
    digest: str


def packed(head: Mapping[str, Any], payload: Sequence[Buffer] = ()) -> tuple[list[Buffer], str]:
    """The buffers of a file, and the SHA-256 of its head and payload. The payload is not copied.

    >>> parts, digest = packed({"kind": "beat"}, [b"abc"])
    >>> content = unpacked(b"".join(parts))
    >>> content.head, bytes(content.payload), content.digest == digest
    ({'kind': 'beat'}, b'abc', True)
    """
    text = json.dumps(head, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-(_FIXED.size + len(text)) % _ALIGN)
    payload = [memoryview(part).cast("B") for part in payload]
    digest = hashlib.sha256(text)
    for part in payload:
        digest.update(part)
    fixed = _FIXED.pack(MAGIC, len(text), sum(len(part) for part in payload), digest.digest())
    return [fixed, text, *payload], digest.hexdigest()


def digest_of(parts: Sequence[Buffer]) -> str:
    """The digest in what `packed` returned."""
    return bytes(_FIXED.unpack(parts[0])[3]).hex()


def unpacked(content: Buffer, **expected: Any) -> Envelope:
    """The head and payload in a file's content. Raises Torn if it is not whole, or if its head differs from what is
    expected.

    >>> unpacked(b"fedmpi")
    Traceback (most recent call last):
    fedmpi.files.envelope.Torn: 6 bytes are no file of the transport
    """
    view = memoryview(content)
    if len(view) < _FIXED.size or view[: len(MAGIC)] != MAGIC:
        raise Torn(f"{len(view)} bytes are no file of the transport")
    _, head_bytes, payload_bytes, digest = _FIXED.unpack(view[: _FIXED.size])
    if len(view) != (length := _FIXED.size + head_bytes + payload_bytes):
        raise Torn(f"{len(view)} of {length} bytes")
    body = view[_FIXED.size :]
    if hashlib.sha256(body).digest() != digest:
        raise Torn("the digest is wrong")
    head = json.loads(bytes(body[:head_bytes]))
    for key, value in expected.items():
        if key not in head or head[key] != value:
            raise Torn(f"{key} is {head.get(key)!r}, not {value!r}")
    return Envelope(head, body[head_bytes:], digest.hex())
