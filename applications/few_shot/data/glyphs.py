"""The data set that needs no download: characters of many scripts from the fonts inside matplotlib.

Every character of a script is a class. Its 20 instances are the character in the faces that have it,
distorted as by a hand (see `drawing`). Train, validation and test are different scripts. Characters that
look like one already taken (Latin A, Greek Alpha, Cyrillic A) are left out, so that no class has a twin.

The drawings depend on the seed alone; another version of matplotlib's fonts, Pillow or PyTorch may move
a pixel, so a paper should state results on `omniglot`.
"""

from __future__ import annotations

import unicodedata
import warnings
from itertools import chain
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from applications.few_shot.data.classes import ImageClasses, Splits
from applications.few_shot.data.drawing import SIDE, Face, draw
from applications.frame.data.files import read_npz
from applications.frame.errors import UserError
from bilevel import files

SEED = 2024
INSTANCES = 20

# The first word of the Unicode names of each script ("OLD" is Old Italic). The scripts to test on come
# first: of two characters that look alike the earlier one stays.
SCRIPTS = {
    "test": ("GEORGIAN", "TIFINAGH", "NKO"),
    "validation": ("ARMENIAN", "HEBREW"),
    "train": ("LATIN", "GREEK", "CYRILLIC", "CANADIAN", "ARABIC", "LAO", "OLD", "LISU", "COPTIC"),
}

_FACES = (
    *(f"DejaVuSans{mono}{style}" for mono in ("", "Mono") for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmr10", "cmb10", "cmss10", "cmti10", "cmtt10"),
)
_LEAST_HEIGHT = 0.35  # ems; smaller ones are dots and dashes
_LEAST_INK = 0.035  # of the outline's square; below are patterns of dots
_ALIKE = 0.85  # cosine of two blurred outlines, set by looking at the pairs on both sides of it
_LAYOUT = {"images": ("uint8", (None, INSTANCES, SIDE, SIDE)), "names": ("U", (None,))}


def load(root: Path) -> Splits:
    """Read the cached drawings, or make and cache them (some seconds).

    Args:
        root: The cache is `<root>/glyphs/glyphs28-v1.npz`. A damaged one is made again; where it can't be
            written, a warning is given and the drawings are made each time.

    Returns:
        Splits of images [classes, 20, 1, 28, 28], ink 255 and paper 0, named as Unicode names them.
    """
    path = root / "glyphs" / "glyphs28-v1.npz"
    try:
        arrays = read_npz(path, _LAYOUT)
        return _splits(arrays["images"], arrays["names"])
    except (UserError, IndexError):  # there is none yet, or it is damaged
        images, names = build()
    try:
        files.write_atomically(path, lambda file: np.savez_compressed(file, images=images, names=names))
    except OSError as error:
        warnings.warn(f"the glyphs can't be cached in {path} ({error}); they are drawn anew each time")
    return _splits(images, names)


def build() -> tuple[np.ndarray, np.ndarray]:
    """Draw the whole data set.

    Returns:
        Images uint8 [classes, 20, 28, 28] and the classes' Unicode names, text [classes].
    """
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    faces = [Face(folder / f"{name}.ttf") for name in _FACES]
    characters = _distinct(_candidates(faces[0]), faces[0])
    images = torch.stack([_drawings(character, faces) for character in characters])
    return images.numpy(), np.array([unicodedata.name(character) for character in characters])


def _candidates(face: Face) -> list[str]:
    """The letters and digits of all scripts that have no accents and a size to be read."""
    by_script: dict[str, list[str]] = {script: [] for script in chain(*SCRIPTS.values())}
    for character in sorted(face.characters):
        script = unicodedata.name(character, "").split(" ")[0]
        plain = unicodedata.category(character)[0] in "LN" and not unicodedata.decomposition(character)
        if script in by_script and plain and face.height(character) >= _LEAST_HEIGHT:
            by_script[script].append(character)
    return list(chain(*by_script.values()))


def _distinct(characters: list[str], face: Face) -> list[str]:
    """Leave out every near blank and every character that looks like an earlier one that stays."""
    outlines = torch.stack([face.outline(character) for character in characters])
    inked = outlines.mean((1, 2)) >= _LEAST_INK
    blurred = F.normalize(F.avg_pool2d(outlines[:, None], 5, stride=2, padding=2).flatten(1))
    alike = blurred @ blurred.T > _ALIKE
    kept: list[int] = []
    for index in range(len(characters)):
        if inked[index] and not alike[index, kept].any():
            kept.append(index)
    return [characters[index] for index in kept]


def _drawings(character: str, faces: list[Face]) -> Tensor:
    # A generator for each character: the drawings of one don't depend on which others there are.
    random = np.random.default_rng([SEED, ord(character)])
    outlines = [face.outline(character) for face in faces if character in face.characters]
    return draw(outlines, INSTANCES, random)


def _splits(images: np.ndarray, names: np.ndarray) -> Splits:
    scripts = np.array([str(name).split(" ")[0] for name in names])

    def part(split: str) -> ImageClasses:
        rows = np.isin(scripts, SCRIPTS[split])
        return ImageClasses(torch.from_numpy(images[rows][:, :, None]), tuple(map(str, names[rows])))

    return Splits(part("train"), part("validation"), part("test"))
