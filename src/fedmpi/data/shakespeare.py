"""Tiny Shakespeare: predicts the next character; each speaker of the plays is a silo."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch

from fedmpi.components import Fraction, PositiveInt, component
from fedmpi.data.official import locate
from fedmpi.errors import ConfigError
from fedmpi.types import Silo, SiloData, Source

# All 65 symbols of the file, as a constant: learning the vocabulary from the text would need every speaker's lines.
VOCABULARY = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


@component
class Shakespeare:
    """Next-character prediction, by speaker (text of Karpathy's char-rnn; task of McMahan et al. 2017, section 3).

    A silo's text is the speaker's speeches, joined by line breaks. Its last part is for testing; no window crosses the
    border. x and y are int64 [windows, length], y one character ahead. One file holds all speakers (central).
    """

    length: PositiveInt = 80
    """characters per window"""
    stride: PositiveInt = 80
    """characters from one training window to the next; test windows do not overlap"""
    min_chars: PositiveInt = 10_000
    """speakers with fewer characters become no silo"""
    silos: PositiveInt | None = None
    """maximum number of speakers, the longest texts first; null: all"""
    test_fraction: Fraction = 0.1
    """share of each speaker's text, at its end, used for testing"""
    root: Path | None = None
    """folder that contains tinyshakespeare/; null: $FEDMPI_DATA, else ./data"""

    def source(self, seed: int) -> Source:
        """Silos by size, ids from the speakers' names ("KING-RICHARD-III"); every rank reads the file (central)."""
        spoken = speeches(locate(self.root, "shakespeare", "input.txt").read_text("utf-8"))
        num_chars = {silo: sum(map(len, texts)) for silo, texts in spoken.items()}
        large = [silo for silo in spoken if num_chars[silo] >= self.min_chars]
        ids = sorted(large, key=lambda silo: (-num_chars[silo], silo))[: self.silos]
        if not ids:
            raise ConfigError(f"shakespeare: no speaker has {self.min_chars} characters; lower min_chars")
        texts = {silo: "\n".join(spoken[silo]) for silo in ids}
        silos = tuple(Silo(id=silo, num_samples=self._num_windows(silo, texts[silo])) for silo in ids)

        def open_silo(silo: str) -> SiloData:
            return self._open(texts[silo])

        return Source("next_token", (self.length,), len(VOCABULARY), silos, open_silo, central=True)

    def _num_train(self, text: str) -> int:
        return len(text) - int(self.test_fraction * len(text))

    def _num_windows(self, silo: str, text: str) -> int:
        if (num := self._num_train(text)) <= self.length:
            raise ConfigError(f"silo {silo} has no samples: {num} characters make no window of {self.length} + 1")
        return (num - self.length - 1) // self.stride + 1

    def _open(self, text: str) -> SiloData:
        symbols, num = encode(text), self._num_train(text)
        return SiloData(*self._windows(symbols[:num], self.stride), *self._windows(symbols[num:], self.length))

    def _windows(self, symbols: torch.Tensor, stride: int) -> tuple[torch.Tensor, torch.Tensor]:
        if len(symbols) <= self.length:
            return torch.empty(0, self.length, dtype=torch.int64), torch.empty(0, self.length, dtype=torch.int64)
        windows = symbols.unfold(0, self.length + 1, stride)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def speeches(text: str) -> dict[str, list[str]]:
    """Each speaker's speeches, by silo id, in order of appearance.

    >>> speeches("First Citizen:\\nSpeak, speak.\\n\\nAll:\\nResolved.\\n\\nFirst Citizen:\\nWe know't.\\n")
    {'First-Citizen': ['Speak, speak.', "We know't."], 'All': ['Resolved.']}
    """
    spoken: dict[str, list[str]] = {}
    for block in text.split("\n\n"):
        name, found, said = block.strip("\n").partition(":\n")
        if found and "\n" not in name:
            spoken.setdefault(re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-"), []).append(said)
    return spoken


def encode(text: str) -> torch.Tensor:
    """The text as symbol numbers, int64 [characters]. Raises ConfigError for a character outside the vocabulary."""
    table = np.full(129, -1, np.int64)  # by code point; the last entry is for all characters beyond ASCII
    table[np.frombuffer(VOCABULARY.encode("ascii"), np.uint8)] = np.arange(len(VOCABULARY))
    symbols = table[np.minimum(np.frombuffer(text.encode("utf-32-le"), np.uint32), 128)]
    if (symbols < 0).any():
        raise ConfigError(f"shakespeare: {text[int(symbols.argmin())]!r} is not one of the {len(VOCABULARY)} symbols")
    return torch.from_numpy(symbols)
