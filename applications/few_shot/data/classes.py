"""What every loader returns: images by class, in three splits with no class in common."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageClasses:
    """The images of some classes.

    Args:
        images: uint8 [classes, instances, channels, height, width]; or their features, float32
            [classes, instances, size, 1, 1].
        names: One name for each class.
        counts: How many instances of each class there are, the others being blank; None: all.

    Raises:
        ValueError: If the images are not uint8 or float32 of five dimensions, or the names or counts don't match them.
    """

    images: Tensor
    names: tuple[str, ...]
    counts: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        features = self.images.dtype == torch.float32 and self.images.shape[3:] == (1, 1)
        if self.images.dim() != 5 or not (self.images.dtype == torch.uint8 or features):
            kind = f"{self.images.dtype} {self.images.shape}"
            raise ValueError(f"images must be uint8, or float32 features, of 5 dimensions, not {kind}")
        if self.counts is not None and len(self.counts) != len(self.images):
            raise ValueError(f"{len(self.counts)} counts for {len(self.images)} classes")
        if len(self.names) != len(self.images):
            raise ValueError(f"{len(self.names)} names for {len(self.images)} classes")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def num_instances(self) -> int:
        """The number of images of each class; of the smallest, where they differ."""
        return self.images.shape[1] if self.counts is None else min(self.counts)


@dataclass(frozen=True)
class Splits:
    """Classes to train on, to choose settings with and to report; no class is in two of them."""

    train: ImageClasses
    validation: ImageClasses
    test: ImageClasses


def with_rotations(classes: ImageClasses) -> ImageClasses:
    """Make every turn by 0, 90, 180 and 270 degrees (counter-clockwise) a class of its own.

    The Omniglot protocol since Santoro et al. (ICML 2016). It doesn't suit a set with characters that
    are turns of each other, such as the syllabics in `glyphs`.

    Args:
        classes: `n` classes of square images.

    Returns:
        `4 n` classes, all of one angle before those of the next; a name such as `Greek/character03@90`.

    Raises:
        ValueError: If the images are not square.
    """
    height, width = classes.images.shape[-2:]
    if height != width:
        raise ValueError(f"only square images can be turned into classes of one size, not {height} x {width}")
    turned = [torch.rot90(classes.images, quarter, dims=(-2, -1)) for quarter in range(4)]
    names = tuple(f"{name}@{90 * quarter}" for quarter in range(4) for name in classes.names)
    return ImageClasses(torch.cat(turned), names)
