"""CIFAR-FS: the 100 classes of CIFAR-100, split for few-shot learning.

The images are Krizhevsky's ("Learning multiple layers of features from tiny images", 2009), the split is
that of Bertinetto, Henriques, Torr & Vedaldi, "Meta-learning with differentiable closed-form solvers",
ICLR 2019.
"""

from __future__ import annotations

from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch

from applications.few_shot.data.classes import ImageClasses, Splits
from applications.frame.data.files import torchvision_datasets
from applications.frame.errors import UserError

_TRAIN = """
    apple aquarium_fish bear bee bottle bowl boy bridge bus can castle caterpillar chair clock cloud
    cockroach couch cup dinosaur dolphin elephant forest girl hamster house kangaroo keyboard lawn_mower
    lion lizard lobster mountain mouse mushroom oak_tree orange orchid palm_tree pear pine_tree plate
    porcupine possum rabbit raccoon ray road seal shrew skunk skyscraper snake spider squirrel streetcar
    sunflower tank tiger train trout tulip turtle willow_tree wolf
"""
_VALIDATION = """
    beaver beetle butterfly camel cattle crab crocodile flatfish lamp maple_tree motorcycle otter sea
    shark television tractor
"""
_TEST = """
    baby bed bicycle chimpanzee fox leopard man pickup_truck plain poppy rocket rose snail sweet_pepper
    table telephone wardrobe whale woman worm
"""
TRAIN, VALIDATION, TEST = (tuple(names.split()) for names in (_TRAIN, _VALIDATION, _TEST))


def load(root: Path, download: bool = True) -> Splits:
    """Read CIFAR-100 through torchvision and split its classes 64 / 16 / 20.

    Args:
        root: The folder of `cifar-100-python`, as torchvision lays it out.
        download: Whether to fetch CIFAR-100 (169 MB) where it is missing.

    Returns:
        Splits of images [classes, 600, 3, 32, 32]; CIFAR-100's training images come before its test images.

    Raises:
        UserError: If CIFAR-100 is missing, can't be fetched, or has other classes or counts than it should.
    """
    images, targets, names = _read(root, download)
    counts = np.bincount(targets, minlength=len(names))
    if sorted(names) != sorted(TRAIN + VALIDATION + TEST) or len(set(counts)) != 1:
        raise UserError(
            f"The CIFAR-100 in {root} doesn't hold its 100 classes with equally many images each. "
            "CIFAR-FS can't be made of it. Try to delete 'cifar-100-python' and to download it again."
        )
    by_class = images[np.argsort(targets, kind="stable")].reshape(len(names), -1, 32, 32, 3)
    pixels = torch.from_numpy(by_class).permute(0, 1, 4, 2, 3)

    def part(classes: tuple[str, ...]) -> ImageClasses:
        return ImageClasses(pixels[[names.index(name) for name in classes]].contiguous(), classes)

    return Splits(part(TRAIN), part(VALIDATION), part(TEST))


def _read(root: Path, download: bool) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images uint8 [n, 32, 32, 3], targets int [n] and the name of each target."""
    cifar100 = torchvision_datasets().CIFAR100
    try:
        parts: list[Any] = [cifar100(root, train=train, download=download) for train in (True, False)]
    # The network's errors are OSErrors too; torchvision raises RuntimeError for a wrong checksum.
    except (OSError, RuntimeError, HTTPException) as error:
        raise UserError(
            f"CIFAR-100 can't be read in {root}: {error}. CIFAR-FS is made of its images. Try to unpack "
            "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz in that folder."
        ) from error
    images = np.concatenate([part.data for part in parts])
    targets = np.concatenate([np.asarray(part.targets) for part in parts])
    return images, targets, parts[0].classes
