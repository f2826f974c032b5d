"""Official data files: where they are stored, where to download them, and their checksums.

A dataset's files are stored in ROOT/NAME/. ROOT is the dataset's field `root`, else $FEDMPI_DATA, else ./data.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.client
import os
import urllib.request
import zlib
from pathlib import Path
from typing import NamedTuple

from fedmpi.components import did_you_mean
from fedmpi.errors import ConfigError, DataMissing


class Official(NamedTuple):
    """A file as published."""

    md5: str
    urls: tuple[str, ...]  # tried in this order
    unpacked: bool = False  # whether `md5` is of the unpacked .gz content, which mirrors compress differently

    @property
    def sum(self) -> str:
        """The checksum, for messages."""
        return f"MD5 {self.md5}{' unpacked' if self.unpacked else ''}"


def _fashion(file: str) -> tuple[str, ...]:
    return (
        f"https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/{file}",
        f"http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/{file}",
    )


def _mnist(file: str) -> tuple[str, ...]:
    return (
        f"https://ossci-datasets.s3.amazonaws.com/mnist/{file}",
        f"https://storage.googleapis.com/cvdf-datasets/mnist/{file}",
    )


def _heart(file: str) -> tuple[str, ...]:
    return (f"https://archive.ics.uci.edu/ml/machine-learning-databases/heart-disease/{file}",)


FILES: dict[str, dict[str, Official]] = {
    "fashion_mnist": {
        file: Official(md5, _fashion(file))
        for file, md5 in (
            ("train-images-idx3-ubyte.gz", "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
            ("train-labels-idx1-ubyte.gz", "25c81989df183df01b3e8a0aad5dffbe"),
            ("t10k-images-idx3-ubyte.gz", "bef4ecab320f06d8554ea6380940ec79"),
            ("t10k-labels-idx1-ubyte.gz", "bb300cfdad3c16e7a12a480ee83cd310"),
        )
    },
    "mnist": {
        file: Official(md5, _mnist(file), unpacked=True)
        for file, md5 in (
            ("train-images-idx3-ubyte.gz", "6bbc9ace898e44ae57da46a324031adb"),
            ("train-labels-idx1-ubyte.gz", "a25bea736e30d166cdddb491f175f624"),
            ("t10k-images-idx3-ubyte.gz", "2646ac647ad5339dbf082846283269ea"),
            ("t10k-labels-idx1-ubyte.gz", "27ae3e4e09519cfbb04c329615203637"),
        )
    },
    "heart_disease": {
        file: Official(md5, _heart(file))
        for file, md5 in (
            ("processed.cleveland.data", "2d91a8ff69cfd9616aa47b59d6f843db"),
            ("processed.hungarian.data", "22e96bee155b5973568101c93b3705f6"),
            ("processed.switzerland.data", "9a87f7577310b3917730d06ba9349e20"),
            ("processed.va.data", "4249d03ca7711e84f4444768c9426170"),
        )
    },
    "shakespeare": {
        "input.txt": Official(
            "6fb458f1232090904fb40fe944165e91",
            ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",),
        )
    },
}
FOLDERS = {"shakespeare": "tinyshakespeare"}  # datasets whose folder has another name


def root_of(root: Path | None) -> Path:
    """The folder that contains the datasets' folders."""
    return Path(root or os.environ.get("FEDMPI_DATA") or "data").expanduser()


def folder_of(root: Path | None, name: str) -> Path:
    """The folder of one dataset."""
    return root_of(root) / FOLDERS.get(name, name)


def locate(root: Path | None, name: str, file: str) -> Path:
    """The path of a dataset's file. Raises DataMissing, with instructions, if it is not there."""
    path = folder_of(root, name) / file
    if path.is_file():
        return path
    raise DataMissing(
        f"{name}: no {file} in {path.parent.absolute()}; run `fedmpi data fetch {name}` or put it there "
        f"(official: {FILES[name][file].urls[0]}, {FILES[name][file].sum})"
    )


def verify(name: str, root: Path | None = None) -> None:
    """Raises ConfigError if a file of the dataset has a wrong checksum. Missing files are accepted: other silos' files
    may be elsewhere."""
    for file, official in FILES.get(name, {}).items():
        path = folder_of(root, name) / file
        if path.is_file() and (found := md5_of(path, official.unpacked)) != official.md5:
            raise ConfigError(
                f"{name}: {path} has MD5 {found}, the official one {official.sum}; run `fedmpi data fetch {name}`"
            )


def fetch(name: str, root: Path | None = None, timeout_s: float = 30) -> list[Path]:
    """Downloads files that are missing or wrong, and returns the paths of all the dataset's files.

    A file gets its name only after its MD5 was verified. Raises DataMissing (no network, or another file at the source)
    with the place of every file that could not be downloaded.
    """
    if name not in FILES:
        raise ConfigError(f"nothing to fetch for '{name}'{did_you_mean(name, FILES)}")
    paths = {folder_of(root, name) / file: official for file, official in FILES[name].items()}
    missing = {
        path: official
        for path, official in paths.items()
        if not (path.is_file() and md5_of(path, official.unpacked) == official.md5)
    }
    reasons = {path: reason for path, official in missing.items() if (reason := _download(path, official, timeout_s))}
    if reasons:
        places = "; ".join(f"{p.absolute()} (official: {' or '.join(paths[p].urls)}, {paths[p].sum})" for p in reasons)
        why = ", ".join(dict.fromkeys(reasons.values()))
        raise DataMissing(f"{name}: could not fetch {len(reasons)} files ({why}); put them there: {places}")
    return list(paths)


def md5_of(path: Path, unpacked: bool = False) -> str:
    """MD5 of a file, or of a .gz file's content as far as it can be unpacked, as hexadecimal digits."""
    md5 = hashlib.md5(usedforsecurity=False)
    with (
        gzip.open(path) if unpacked else path.open("rb") as file,
        contextlib.suppress(EOFError, zlib.error, gzip.BadGzipFile),
    ):
        while block := file.read(1 << 20):
            md5.update(block)
    return md5.hexdigest()


def _download(path: Path, official: Official, timeout_s: float) -> str:
    """Downloads and verifies a file; returns why that failed, empty if it did not."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    reasons = []
    for url in official.urls:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with urllib.request.urlopen(url, timeout=timeout_s) as reply, beside.open("wb") as file:
                while block := reply.read(1 << 20):
                    file.write(block)
            if (found := md5_of(beside, official.unpacked)) == official.md5:
                os.replace(beside, path)
                return ""
            reasons.append(f"MD5 {found} at {url}")
        except (OSError, http.client.HTTPException) as error:
            reasons.append(str(error))
        finally:
            with contextlib.suppress(OSError):
                beside.unlink()
    return ", ".join(dict.fromkeys(reasons))
