"""Reads one silo's folder of images: a folder per class, and above them optionally train/ and test/."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmpi.errors import ConfigError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
PARTS = ("train", "test")
MODES = {1: "L", 3: "RGB"}  # by number of channels
OF_8_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")  # Pillow clips others to 255

Arrays = dict[str, npt.NDArray[Any]]


def read_folder(path: Path, where: str, shape: tuple[int, ...], classes: Sequence[Any]) -> Arrays:
    """x, y, or x_train, y_train, x_test, y_test. x is float32 from 0 to 1, y the classes' names.

    Classes are those of the configuration, for all silos alike: a silo that lacks one numbers the others the same.
    Images come in the order of classes, then of names. Raises ConfigError.
    """
    if importlib.util.find_spec("PIL") is None:
        raise ConfigError(f"{where}: images need another package: pip install 'fedmpi[images]'")
    if len(shape) != 3 or shape[0] not in MODES:
        raise ConfigError(f"{where}: images have a shape of [1 or 3, height, width], data.shape is {list(shape)}")
    folders = _folders(path)
    parted = {folder.name for folder in folders} == {*PARTS}
    arrays: Arrays = {}
    for part in PARTS if parted else ("",):
        x, y = _part(path / part, f"{where}/{part}" if part else where, shape, list(map(str, classes)))
        end = f"_{part}" if part else ""
        arrays |= {f"x{end}": x, f"y{end}": y}
    return arrays


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _part(
    path: Path, where: str, shape: tuple[int, ...], classes: list[str]
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    if others := [folder.name for folder in _folders(path) if folder.name not in classes]:
        raise ConfigError(f"{where} has a folder '{others[0]}', which is not one of data.classes: {', '.join(classes)}")
    files = [
        (name, file)
        for name in classes
        if (path / name).is_dir()
        for file in sorted((path / name).iterdir())
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
    ]
    x = np.empty((len(files), *shape), np.float32)
    for i, (name, file) in enumerate(files):
        x[i] = _image(file, f"{where}/{name}/{file.name}", shape)
    return x, np.array([name for name, _ in files], str)


def _image(file: Path, where: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    from PIL import Image, ImageSequence

    try:
        with Image.open(file) as opened:
            mode, num = opened.mode, sum(1 for _ in ImageSequence.Iterator(opened))
            opened.seek(0)
            image = opened.convert(MODES[shape[0]])
    except Exception as error:  # Pillow's plugins raise many types for a damaged image
        raise ConfigError(f"{where} is no image that can be read: {' '.join(str(error).split())[:200]}") from None
    if mode not in OF_8_BITS:
        raise ConfigError(f"{where} has more than 8 bits a value (mode {mode}); write arrays, .npz or .h5")
    if num > 1:
        raise ConfigError(f"{where} holds {num} images, and one file is one sample; write a file for each")
    pixels = np.asarray(image, np.float32).reshape(image.height, image.width, shape[0])
    if pixels.shape[:2] != shape[1:]:
        raise ConfigError(
            f"{where} has {image.height} x {image.width} pixels, data.shape is {list(shape)}; resize all images alike"
        )
    scaled: npt.NDArray[np.float32] = pixels.transpose(2, 0, 1) / np.float32(255)
    return scaled
