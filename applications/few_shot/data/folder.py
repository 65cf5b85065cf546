"""One's own images: a folder for each class, images of any size."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from applications.few_shot.data.classes import ImageClasses, Splits
from applications.frame.data.files import cached, torchvision_datasets
from applications.frame.errors import UserError
from applications.frame.names import portable

PARTS = {"train": ("train",), "validation": ("validation", "val", "valid"), "test": ("test",)}
"""Names of the folders that a split may be given by."""


@dataclass(frozen=True)
class Reading:
    """How images become tensors, and classes a split.

    Attributes:
        size: side in pixels.
        grey: one channel instead of three.
        held_out: fractions of the classes for validation and for the test.
        seed: of the order of the classes before they are split.
    """

    size: int
    grey: bool
    held_out: tuple[float, float]
    seed: int


def load(folder: Path, reading: Reading, cache: Path) -> Splits:
    """Read the images below ``folder``.

    Args:
        folder: holds a folder of images for each class; or ``train``, ``validation`` and ``test`` with those. Otherwise
            the classes are split by fractions of their number.
        reading: how.
        cache: folder for the images as tensors, made again where a file is added, changed or gone.

    Returns:
        Splits of images uint8 ``[classes, instances, channels, size, size]``; a class with fewer images than others
        has blank ones at its end, and says how many count.

    Raises:
        UserError: no images, an image that cannot be read, or too few classes for three parts.
    """
    parts = _given_parts(folder)
    if parts is None:
        parts = _split(_classes(folder), reading, folder)
    return Splits(**{part: _read(folder, classes, reading, cache) for part, classes in parts.items()})


def prepare(image: Image.Image, size: int, grey: bool) -> np.ndarray:
    """An image as the network sees it: its middle square, upright and resized, uint8 ``[channels, size, size]``."""
    shown = as_shown(image).convert("L" if grey else "RGB")
    square = np.asarray(ImageOps.fit(shown, (size, size), Image.Resampling.BILINEAR))
    return square[None] if grey else np.ascontiguousarray(square.transpose(2, 0, 1))


def as_shown(image: Image.Image) -> Image.Image:
    """An image as a viewer shows it on white paper: upright, without transparency, with 8 bits a channel.

    Raises:
        UserError: its pixels have no largest value that everybody means: they are 32 bits long.
    """
    wide = image.mode == "I" and image.format == "PPM"  # 16 bits of a PGM file, which Pillow brings to [0, 65535]
    upright = _in_eight_bits(ImageOps.exif_transpose(image), wide)
    if not upright.has_transparency_data:
        return upright
    layer = upright.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _in_eight_bits(image: Image.Image, wide: bool) -> Image.Image:
    """An image whose pixels Pillow would cut off at 255, brought to 8 bits; others as they are."""
    if image.mode.startswith("I;16") or wide:
        pixels = np.asarray(image)
        grey = Image.fromarray(np.round(pixels.astype(np.float64) / 257).astype(np.uint8))
        clear = image.info.get("transparency")
        if clear is None:
            return grey
        return Image.merge("LA", (grey, Image.fromarray(np.where(pixels == clear, 0, 255).astype(np.uint8))))
    if image.mode in ("La", "RGBa"):  # multiplied by their transparency, which only these conversions undo
        return image.convert(image.mode.upper())
    if image.mode in ("I", "F"):
        raise UserError(
            f"An image has pixels of 32 bits (Pillow's mode {image.mode}), which have no white that everybody means. "
            "Save it with 8 or 16 bits a channel."
        )
    return image


WAY = 3
"""Goes up where images are prepared in another way, so that what was cached before is made again."""

Classes = dict[str, list[Path]]
"""Name of a class -> its images."""


def _given_parts(folder: Path) -> dict[str, Classes] | None:
    found = {}
    for part, names in PARTS.items():
        below = [folder / name for name in names if (folder / name).is_dir()]
        if below:
            found[part] = below[0]
    if set(found) == {"train", "validation", "test"}:
        return {part: _classes(path) for part, path in found.items()}
    if set(found) >= {"train", "test"}:
        raise UserError(
            f"{folder} has the folders train and test and no validation: classes to choose settings by. Move some "
            "classes from train to validation, or put all classes into one folder, to be split by --held-out."
        )
    return None


def _classes(folder: Path) -> Classes:
    try:
        kinds, loader = _extensions(), torchvision_datasets().folder.default_loader
        found = torchvision_datasets().DatasetFolder(folder, loader, kinds, allow_empty=True)
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} has no folders of classes. --data takes a folder that holds a folder of images for each class, "
            "or train, validation and test with those."
        ) from error
    classes: Classes = {name: [] for name in found.classes}
    for path, index in found.samples:
        classes[found.classes[index]].append(Path(path))
    for name, paths in classes.items():
        if paths and not any(path.parent == folder / name for path in paths):
            raise UserError(
                f"{folder / name} holds folders and no images of its own ({paths[0].relative_to(folder / name)}). A "
                "class is a folder of images: give --data the folder above the classes, or move the images up."
            )
    empty = [name for name, paths in classes.items() if not paths]
    if empty:
        raise UserError(
            f"{folder / empty[0]} has no images ({len(empty)} such folders of {len(classes)}). A class is a folder of "
            f"images: {', '.join(kinds)}. Fill it or take it away."
        )
    return {portable(name): paths for name, paths in classes.items()}


def _extensions() -> tuple[str, ...]:
    return tuple(sorted((*torchvision_datasets().folder.IMG_EXTENSIONS, ".gif")))


def _split(classes: Classes, reading: Reading, folder: Path) -> dict[str, Classes]:
    names = sorted(classes)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(reading.seed)).tolist()
    validation, test = (round(fraction * len(names)) for fraction in reading.held_out)
    if min(validation, test, len(names) - validation - test) < 1:
        raise UserError(
            f"{folder} has {len(names)} classes: by --held-out {' '.join(map(str, reading.held_out))}, that is "
            f"{validation} for validation, {test} for the test and {len(names) - validation - test} to train on. Each "
            "part needs some."
        )
    shuffled = [names[index] for index in order]
    parts = {
        "train": shuffled[validation + test :],
        "validation": shuffled[:validation],
        "test": shuffled[validation : validation + test],
    }
    return {part: {name: classes[name] for name in sorted(own)} for part, own in parts.items()}


def _read(folder: Path, classes: Classes, reading: Reading, cache: Path) -> ImageClasses:
    names, counts = tuple(classes), [len(paths) for paths in classes.values()]
    channels = 1 if reading.grey else 3
    shape = (len(names), max(counts), channels, reading.size, reading.size)
    path = cache / f"{_key(folder, classes, reading)}.npz"

    def make() -> dict[str, np.ndarray]:
        images = np.zeros(shape, np.uint8)
        for row, paths in enumerate(classes.values()):
            for column, file in enumerate(paths):
                images[row, column] = _image(file, reading)
        return {"images": images}

    images = cached(path, {"images": ("uint8", shape)}, make)["images"]
    return ImageClasses(torch.from_numpy(images), names, tuple(counts))


def _image(path: Path, reading: Reading) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return prepare(image, reading.size, reading.grey)
    except UserError as error:
        raise UserError(f"{path} cannot be used: {error}") from error
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image: {error}. Mend it or take it away.") from error


def _key(folder: Path, classes: Mapping[str, Sequence[Path]], reading: Reading) -> str:
    """Changes with the way of reading and with every file that is added, changed or gone."""
    listed = defaultdict(list)
    for name, paths in classes.items():
        for path in paths:
            try:
                about = path.stat()
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error}. Mend it or take it away.") from error
            listed[name].append((str(path.relative_to(folder)), about.st_size, about.st_mtime_ns))
    told = json.dumps([str(folder.resolve()), reading.size, reading.grey, listed, WAY])
    return hashlib.sha256(told.encode()).hexdigest()[:20]
