"""The data sets of few-shot classification: every one as images by class, in three disjoint splits."""

from __future__ import annotations

from pathlib import Path

from applications.few_shot.data import cifar_fs, glyphs, mini_imagenet, omniglot
from applications.few_shot.data.classes import ImageClasses, Splits, with_rotations
from applications.frame.data.files import data_root
from applications.frame.errors import UserError

__all__ = ["NAMES", "ImageClasses", "Splits", "data_root", "load", "with_rotations"]

NAMES = ("glyphs", "omniglot", "cifar-fs", "mini-imagenet")


def load(name: str, root: str | Path | None = None, *, split: str = "characters", download: bool = True) -> Splits:
    """Load a data set by its name.

    Args:
        name: One of `NAMES`. "glyphs" is made on this machine; "omniglot" and "cifar-fs" are downloaded where
            they are missing; "mini-imagenet" is read from folders that the user places.
        root: The folder of all data sets; by default $BILEVEL_DATA, else `~/.cache/bilevel`.
        split: "characters" or, for Omniglot alone, "alphabets"; the other sets have one split.
        download: Whether a missing data set may be fetched from the network.

    Returns:
        The images uint8 [classes, instances, channels, height, width] of the three splits: 1 x 28 x 28 for
        "glyphs" and "omniglot" (ink 255, paper 0), 3 x 32 x 32 and 3 x 84 x 84 RGB for the other two.

    Raises:
        UserError: For an unknown name or split, a root that is no folder, missing and damaged files.
    """
    if name not in NAMES:
        raise UserError(f"There is no data set '{name}'. Tasks are made of one of these. Try {', '.join(NAMES)}.")
    if name != "omniglot" and split != "characters":
        raise UserError(
            f"There is no split '{split}' of {name}. Only Omniglot has several. Try to leave the split out."
        )
    folder = data_root(root)
    if name == "omniglot":
        return omniglot.load(folder, split, download)
    if name == "cifar-fs":
        return cifar_fs.load(folder, download)
    return glyphs.load(folder) if name == "glyphs" else mini_imagenet.load(folder)
