"""The data sets of few-shot classification: every one as images by class, in three disjoint splits."""

from __future__ import annotations

from pathlib import Path

from applications.few_shot.data import cifar_fs, folder, glyphs, mini_imagenet, omniglot
from applications.few_shot.data.classes import ImageClasses, Splits, with_rotations
from applications.few_shot.data.folder import Reading
from applications.frame.data.files import data_root
from applications.frame.errors import UserError

__all__ = ["NAMES", "SHAPES", "ImageClasses", "Reading", "Splits", "data_root", "load", "with_rotations"]

SHAPES = {"glyphs": (1, 28), "omniglot": (1, 28), "cifar-fs": (3, 32), "mini-imagenet": (3, 84)}
"""Name of a data set -> channels and side of its images."""

NAMES = tuple(SHAPES)


def load(
    name: str,
    root: str | Path | None = None,
    *,
    split: str = "characters",
    download: bool = True,
    reading: Reading | None = None,
) -> Splits:
    """Load a data set by its name, or the images in a folder.

    Args:
        name: One of `NAMES`, or the path of a folder with a folder of images for each class. "glyphs" is made on
            this machine; "omniglot" and "cifar-fs" are downloaded where they are missing; "mini-imagenet" is read from
            folders that the user places.
        root: The folder of all data sets; by default $BILEVEL_DATA, else `~/.cache/bilevel`.
        split: "characters" or, for Omniglot alone, "alphabets"; the other sets have one split.
        download: Whether a missing data set may be fetched from the network.
        reading: How the images of a folder are read and split.

    Returns:
        The images uint8 [classes, instances, channels, height, width] of the three splits: 1 x 28 x 28 for
        "glyphs" and "omniglot" (ink 255, paper 0), 3 x 32 x 32 and 3 x 84 x 84 RGB for the other two.

    Raises:
        UserError: For an unknown name or split, a root that is no folder, missing and damaged files.
    """
    if name not in NAMES and not (reading is not None and Path(name).is_dir()):
        raise UserError(
            f"There is no data set '{name}', and no folder {Path(name).absolute()}. Tasks are made of one of these. "
            f"Try {', '.join(NAMES)}, or a folder that holds a folder of images for each class."
        )
    if name != "omniglot" and split != "characters":
        raise UserError(
            f"There is no split '{split}' of {name}. Only Omniglot has several. Try to leave the split out."
        )
    place = data_root(root)
    if name not in NAMES:
        assert reading is not None
        return folder.load(Path(name), reading, place / "folders")
    if name == "omniglot":
        return omniglot.load(place, split, download)
    if name == "cifar-fs":
        return cifar_fs.load(place, download)
    return glyphs.load(place) if name == "glyphs" else mini_imagenet.load(place)
