"""Real images in three disjoint parts, and the sets of ten that the learned images are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from applications.frame import data
from applications.frame.command import require

HELD_OUT = 0.2
"""The part of the training images that curves and settings are judged on."""


class Images(NamedTuple):
    """Images ``[n, c, h, w]`` with values in [0, 1], and their classes ``[n]``."""

    x: Tensor
    y: Tensor

    def of_class(self, label: int) -> Tensor:
        return self.x[self.y == label]


class Parts(NamedTuple):
    """Images are distilled from ``train``; nothing is chosen by ``test``."""

    train: Images
    validation: Images
    test: Images

    @property
    def num_classes(self) -> int:
        return int(self.train.y.max()) + 1


def read(name: str, root: Path | None, images_per_class: int) -> Parts:
    """The parts of a data set; which image falls into which does not depend on the seed of the run.

    Raises:
        UserError: as `applications.frame.data.load`; the examples are no images; a class has too few of them.
    """
    examples = data.load(name, root)
    require(
        examples.image is not None,
        f"--data {name} has {examples.features.shape[1]} features a row and no word of height and width: images are "
        "distilled here. Take digits or mnist.",
    )
    if name == "mnist" and len(examples) > 2 * examples.num_test:
        rest, test = examples.official()
    else:
        rest, test = data.split(examples, (0.75, 0.25), seed=0)
    parts = data.split(rest, (1 - HELD_OUT, HELD_OUT), seed=0)
    fewest = int(np.bincount(parts[0].targets).min())
    require(
        images_per_class <= fewest,
        f"--images-per-class is {images_per_class}: the smallest class of {name} has {fewest} training images, and "
        "that many real ones are the most there is to compare with.",
    )
    assert examples.image is not None
    shape = examples.image
    return Parts(*(Images(x.unflatten(1, shape), y) for x, y in (part.tensors() for part in (*parts, test))))


def labels(num_classes: int, images_per_class: int) -> Tensor:
    """Classes of the synthetic images: all of class 0 first."""
    return torch.arange(num_classes).repeat_interleave(images_per_class)


def real_images(train: Images, num_classes: int, images_per_class: int, seed: int) -> Tensor:
    """As many real images of each class, drawn without replacement."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for label in range(num_classes):
        images = train.of_class(label)
        drawn.append(images[torch.randperm(len(images), generator=generator)[:images_per_class]])
    return torch.cat(drawn)


def class_means(train: Images, num_classes: int, images_per_class: int) -> Tensor:
    """The mean image of each class; of several random parts of the class where several are asked for."""
    means = []
    for label in range(num_classes):
        images = train.of_class(label)
        means += [images[part::images_per_class].mean(0) for part in range(images_per_class)]
    return torch.stack(means)
