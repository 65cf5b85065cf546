"""mini-ImageNet: 100 classes of ImageNet with 600 images each, at 84 x 84 pixels.

The set is that of Vinyals et al., "Matching networks for one shot learning" (NeurIPS 2016), the split is that
of Ravi & Larochelle, "Optimization as a model for few-shot learning" (ICLR 2017). ImageNet's licence
forbids passing the images on, so there is no download.
"""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from applications.few_shot.data.classes import ImageClasses, Splits
from applications.frame.errors import UserError
from bilevel import files

SIDE = 84
LEAST = 20  # images of a class

_TRAIN = """
    n01532829 n01558993 n01704323 n01749939 n01770081 n01843383 n01910747 n02074367 n02089867 n02091831
    n02101006 n02105505 n02108089 n02108551 n02108915 n02111277 n02113712 n02120079 n02165456 n02457408
    n02606052 n02687172 n02747177 n02795169 n02823428 n02966193 n03017168 n03047690 n03062245 n03207743
    n03220513 n03337140 n03347037 n03400231 n03476684 n03527444 n03676483 n03838899 n03854065 n03888605
    n03908618 n03924679 n03998194 n04067472 n04243546 n04251144 n04258138 n04275548 n04296562 n04389033
    n04435653 n04443257 n04509417 n04515003 n04596742 n04604644 n04612504 n06794110 n07584110 n07697537
    n07747607 n09246464 n13054560 n13133613
"""
_VALIDATION = """
    n01855672 n02091244 n02114548 n02138441 n02174001 n02950826 n02971356 n02981792 n03075370 n03417042
    n03535780 n03584254 n03770439 n03773504 n03980874 n09256479
"""
_TEST = """
    n01930112 n01981276 n02099601 n02110063 n02110341 n02116738 n02129165 n02219486 n02443484 n02871525
    n03127925 n03146219 n03272010 n03544143 n03775546 n04146614 n04149813 n04418357 n04522168 n07613480
"""
TRAIN, VALIDATION, TEST = (tuple(names.split()) for names in (_TRAIN, _VALIDATION, _TEST))
CLASSES = TRAIN + VALIDATION + TEST


def load(root: Path) -> Splits:
    """Read the folders of the 100 classes.

    Args:
        root: The images are `<root>/mini-imagenet/<synset>/*.jpg` (or .jpeg, .png), or the same below
            folders `train`, `val` and `test`. The pixels are cached in `<root>/mini-imagenet84-v1.npy` if it
            can be written; delete it after you exchange images.

    Returns:
        Splits of RGB images [classes, instances, 3, 84, 84], the instances in the order of their file names.
        All classes are cut to the length of the shortest, with a warning.

    Raises:
        UserError: If a class is missing or has under 20 images, or an image can't be read.
    """
    files = _files(root / "mini-imagenet")
    cache = root / "mini-imagenet84-v1.npy"
    shape = (len(CLASSES), len(files[0]), 3, SIDE, SIDE)
    pixels = _cached(cache, shape)
    if pixels is None:
        pixels = np.empty(shape, np.uint8)
        for index in np.ndindex(shape[:2]):
            pixels[index] = _pixels(files[index[0]][index[1]])
        _write(cache, pixels)
    images = torch.from_numpy(pixels)
    train, validation, test = images.split([len(TRAIN), len(VALIDATION), len(TEST)])
    return Splits(ImageClasses(train, TRAIN), ImageClasses(validation, VALIDATION), ImageClasses(test, TEST))


def _files(folder: Path) -> list[list[Path]]:
    """The images' files of all classes, equally many of each."""
    homes = [folder / part for part in ("", "train", "val", "test")]
    found = {name: next((home / name for home in homes if (home / name).is_dir()), None) for name in CLASSES}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(CLASSES)} classes of mini-ImageNet are not in {folder}, for example "
            f"{', '.join(missing[:3])}. Each is a folder of images named by its ImageNet synset. "
            "Try to place the folders there yourself (ImageNet can't be downloaded freely)."
        )
    files = [_images(path) for path in found.values() if path is not None]
    counts = [len(of_class) for of_class in files]
    shortest = min(counts)
    if shortest < LEAST:
        raise UserError(
            f"Class {CLASSES[counts.index(shortest)]} in {folder} has {shortest} images (.jpg, .jpeg, .png). "
            f"Tasks need {LEAST} of each class. Try to unpack the data set again."
        )
    if max(counts) != shortest:
        warnings.warn(f"the classes in {folder} have {shortest} to {max(counts)} images; {shortest} of each are used")
    return [of_class[:shortest] for of_class in files]


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))


def resized(image: Image.Image) -> np.ndarray:
    """uint8 [3, 84, 84], resized as by MAML's script for mini-ImageNet."""
    return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)).transpose(2, 0, 1)


def _pixels(file: Path) -> np.ndarray:
    try:
        with Image.open(file) as image:
            return resized(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # as Pillow has it
        raise UserError(
            f"{file} can't be read as an image: {error}. It may be cut short. Try to unpack it again, or to delete it."
        ) from error


def _cached(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The cached pixels, unless there are none, they are damaged or the folders now hold another number."""
    try:
        pixels = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    return pixels if isinstance(pixels, np.ndarray) and (pixels.dtype, pixels.shape) == (np.uint8, shape) else None


def _write(path: Path, pixels: np.ndarray) -> None:
    try:
        files.write_atomically(path, lambda file: np.save(file, pixels))
    except OSError as error:
        warnings.warn(f"the pixels can't be cached in {path} ({error}); the images are read anew each time")
