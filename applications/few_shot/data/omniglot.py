"""Omniglot: 1623 handwritten characters of 50 alphabets, 20 drawings of each.

Lake, Salakhutdinov & Tenenbaum, "Human-level concept learning through probabilistic program induction",
Science 350 (2015); the drawings are under the MIT licence.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from applications.few_shot.data.classes import ImageClasses, Splits, with_rotations
from applications.frame.data.files import read_npz, torchvision_datasets, unusable
from applications.frame.errors import UserError
from bilevel import files

SEED = 0  # of both splits
CHARACTERS, BACKGROUND, INSTANCES, SIDE = 1623, 964, 20, 28
TRAIN, VALIDATION = 1100, 100  # characters; MAML's 1200 to train on, less 100 to choose settings with
HELD_OUT = 5  # background alphabets for validation

_LAYOUT = {
    "images": ("uint8", (CHARACTERS, INSTANCES, SIDE * SIDE // 8)),
    "alphabet": ("int16", (CHARACTERS,)),
    "alphabet_names": ("U", (50,)),
    "character": ("int16", (CHARACTERS,)),
    "background": ("bool", (CHARACTERS,)),
    "omniglot_id": ("int16", (CHARACTERS,)),
}


def load(root: Path, split: str = "characters", download: bool = True) -> Splits:
    """Read Omniglot at 28 x 28, every quarter turn of a character a class of its own.

    Args:
        root: The file is `<root>/omniglot/omniglot28.npz`.
        split: "characters": the 1623 characters in an order drawn with `SEED`, the first 1100 to train,
            100 to validate and 423 to test, as in MAML (Finn et al., ICML 2017). "alphabets": Lake's 20
            evaluation alphabets (659 characters) to test, 5 background alphabets drawn with `SEED` to
            validate and the other 25 to train.
        download: Whether to fetch the drawings (11 MB) where the file is missing.

    Returns:
        Splits of images [classes, 20, 1, 28, 28], ink 255 and paper 0, named like `Greek/character03@90`.

    Raises:
        UserError: For an unknown split, or a file that is missing or can't be used.
    """
    if split not in ("characters", "alphabets"):
        raise UserError(
            f"There is no split '{split}' of Omniglot. A split says which characters are kept for the test. "
            "Try 'characters' or 'alphabets'."
        )
    path = root / "omniglot" / "omniglot28.npz"
    if not path.exists():
        _make(path, root, download)
    arrays = read_npz(path, _LAYOUT)
    if arrays["background"].sum() != BACKGROUND or not set(arrays["alphabet"]) <= set(range(50)):
        raise unusable(path, f"it doesn't mark {BACKGROUND} characters of 50 alphabets as background")
    rows = _by_character() if split == "characters" else _by_alphabet(arrays)
    return Splits(*(with_rotations(_classes(arrays, part)) for part in rows))


def _by_character() -> tuple[list[int], list[int], list[int]]:
    order = list(range(CHARACTERS))
    random.Random(SEED).shuffle(order)  # Python keeps this order from version to version
    return order[:TRAIN], order[TRAIN : TRAIN + VALIDATION], order[TRAIN + VALIDATION :]


def _by_alphabet(arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    alphabet, background = arrays["alphabet"], arrays["background"]
    choices = sorted(set(alphabet[background].tolist()))
    held_out = np.isin(alphabet, random.Random(SEED).sample(choices, HELD_OUT))
    return np.flatnonzero(background & ~held_out), np.flatnonzero(held_out), np.flatnonzero(~background)


def _classes(arrays: dict[str, np.ndarray], rows: list[int] | np.ndarray) -> ImageClasses:
    ink = np.unpackbits(arrays["images"][rows], axis=-1) * np.uint8(255)
    alphabets = arrays["alphabet_names"][arrays["alphabet"][rows]]
    characters = arrays["character"][rows]
    names = tuple(f"{a}/character{c:02d}" for a, c in zip(alphabets, characters, strict=True))
    return ImageClasses(torch.from_numpy(ink).reshape(-1, INSTANCES, 1, SIDE, SIDE), names)


def _make(path: Path, root: Path, download: bool) -> None:
    missing = f"{path} is missing. It holds all drawings of Omniglot at 28 x 28 pixels. "
    if not download:
        raise UserError(missing + "Try again with the download allowed, or give the folder that contains 'omniglot'.")
    datasets = torchvision_datasets()
    try:
        arrays = convert(
            {b: Path(datasets.Omniglot(root, background=b, download=True).target_folder) for b in (True, False)}
        )
        files.write_atomically(path, lambda file: np.savez_compressed(file, allow_pickle=False, **arrays))
    # The network's errors are OSErrors too; torchvision raises RuntimeError for a wrong checksum.
    except (OSError, RuntimeError, ValueError, HTTPException) as error:
        raise UserError(
            f"{missing}The download failed: {error}. Try to put images_background.zip and "
            "images_evaluation.zip from https://github.com/brendenlake/omniglot/tree/master/python into "
            f"{root / 'omniglot-py'}, each with its folder unpacked beside it, or to copy omniglot28.npz "
            "from another machine."
        ) from error


def convert(folders: dict[bool, Path]) -> dict[str, np.ndarray]:
    """Bring the drawings of the two original folders into the arrays of `omniglot28.npz`.

    Every 105 x 105 drawing is resized as a picture of 1 bit, as in MAML's and implicit MAML's scripts.

    Args:
        folders: The folder of the background set under True and of the evaluation set under False, each
            with drawings `<Alphabet>/character<number>/<id>_<drawer>.png`, black on white.

    Returns:
        `images` uint8 [characters, drawers, 98], 8 pixels a byte, 1 is ink; for each character `alphabet`
        (a row of `alphabet_names`), `character` (number in its alphabet), `background` and `omniglot_id`.

    Raises:
        OSError: If a drawing can't be read.
        ValueError: If there are none, or their number or names are not as above.
    """
    alphabets = sorted((path.name, background) for background in folders for path in _folders(folders[background]))
    found = [
        (index, background, path)
        for index, (name, background) in enumerate(alphabets)
        for path in _folders(folders[background] / name)
    ]
    drawings = [sorted(path.glob("*.png")) for _, _, path in found]
    return {
        "images": np.stack([np.stack([_packed(drawing) for drawing in drawers]) for drawers in drawings]),
        "alphabet": np.array([index for index, _, _ in found], np.int16),
        "alphabet_names": np.array([name for name, _ in alphabets]),
        "character": np.array([int(path.name.removeprefix("character")) for _, _, path in found], np.int16),
        "background": np.array([background for _, background, _ in found]),
        "omniglot_id": np.array([int(drawers[0].name.split("_")[0]) for drawers in drawings], np.int16),
    }


def _folders(parent: Path) -> Iterator[Path]:
    return (path for path in sorted(parent.iterdir()) if path.is_dir())


def ink(drawing: Image.Image) -> np.ndarray:
    """Where the ink of a drawing is, dark on light: bool [28, 28]; of grey levels, what is nearer to the darkest."""
    if drawing.mode != "1":
        grey = np.asarray(ImageOps.autocontrast(drawing.convert("L")))
        drawing = Image.fromarray(grey >= 128)
    return ~np.asarray(drawing.resize((SIDE, SIDE)))


def _packed(drawing: Path) -> np.ndarray:
    with Image.open(drawing) as image:
        return np.packbits(ink(image).ravel())
