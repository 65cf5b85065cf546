"""Images that a user has at hand, brought to what a network was trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from applications.few_shot.data import folder, mini_imagenet, omniglot
from applications.frame.errors import UserError

FROM_FILES: dict[str, Callable[[Image.Image], np.ndarray]] = {
    "omniglot": lambda image: 255 * omniglot.ink(image)[None].astype(np.uint8),
    "glyphs": lambda image: 255 - folder.prepare(image, 28, grey=True),  # they are drawn white on black
    "mini-imagenet": mini_imagenet.resized,
}
"""How the files of a data set become uint8 ``[channels, size, size]``; those of others as `folder.prepare` says."""


DRAWN = ("omniglot", "glyphs")
"""Data sets of drawings, ink on paper."""


def as_bytes(images: Any, data: str, channels: int, size: int) -> Tensor:
    """Prepare images as those of a data set: PIL images and files like its files, arrays like its tensors.

    Args:
        images: PIL images, paths, arrays or tensors, in a sequence; or one array or tensor ``[n, ...]``; or one PIL
            image. An array is ``[height, width]``, ``[channels, height, width]`` or ``[height, width, channels]``, of
            integers in [0, 255] or floating point numbers in [0, 1]. A whole of three dimensions that may be one image
            in colour, and not many grey ones, is refused.
        data: name of the data set, or path of its folder.
        channels, size: of the result; others are converted and resized.

    Returns:
        uint8 ``[n, channels, size, size]``.

    Raises:
        UserError: there are no images, or they are of another kind or outside of those numbers.
    """
    if isinstance(images, Image.Image | str | Path):
        images = [images]
    if isinstance(images, np.ndarray) and images.ndim == 1 and images.dtype.kind in "OU":  # images, or paths
        images = images.tolist()
    if not isinstance(images, Iterable) or isinstance(images, Mapping | AbstractSet):
        raise UserError(f"The images are {type(images).__name__}: give a sequence of them, or one array [n, ...].")
    if isinstance(images, np.ndarray | Tensor):
        shape = tuple(images.shape)
        if len(shape) == 3 and _may_be_one(shape, channels):
            raise UserError(
                f"The images are one array of shape {shape}, which may be one image or several grey ones. "
                "Put a single image into a list, and give grey ones as [n, 1, height, width]."
            )
        if len(shape) not in (3, 4):
            raise UserError(
                f"The images are one array of shape {shape}. Many images are [n, height, width], "
                "[n, channels, height, width] or [n, height, width, channels]; put a single one into a list."
            )
    rows = [_one(image, data, channels, size) for image in images]
    if not rows:
        raise UserError("There are no images: at least one is needed.")
    return torch.from_numpy(np.stack(rows))


def _may_be_one(shape: tuple[int, ...], channels: int) -> bool:
    """Whether three dimensions may be those of one image in colour, and not of many grey ones."""
    return shape[-1] in (1, 3, 4) or (channels == 3 and shape[0] in (3, 4))


def _one(image: Any, data: str, channels: int, size: int) -> np.ndarray:
    if isinstance(image, str | Path):
        image = _opened(Path(image))
    if isinstance(image, Image.Image):
        read = FROM_FILES.get(data)
        if read is None:
            return folder.prepare(image, size, grey=channels == 1)
        return _drawn(read(folder.as_shown(image)), data, "an image or a file is dark ink on light paper")
    if isinstance(image, np.ndarray | Tensor):
        return _drawn(_array(_numbers(image), channels, size), data, "in an array ink is 255, or 1, and paper 0")
    raise UserError(f"An image is a {type(image).__name__}: give PIL images, paths, NumPy arrays or tensors.")


def _drawn(pixels: np.ndarray, data: str, usual: str) -> np.ndarray:
    """A drawing of one of the sets of drawings, whose ink covers a third of the paper at most.

    Raises:
        UserError: more than half of it is ink.
    """
    if data in DRAWN and pixels.mean() > 255 / 2:
        raise UserError(
            f"More than half of an image is ink, as this network reads it; it was trained on drawings ({data}), where "
            f"{usual}. Invert the image: 255 - array, or PIL.ImageOps.invert."
        )
    return pixels


def _opened(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image: {error}.") from error


def _numbers(image: np.ndarray | Tensor) -> np.ndarray:
    """
    Raises:
        UserError: it holds none, or some of them are masked.
    """
    if isinstance(image, Tensor):
        if image.is_meta:
            raise UserError("An image is a tensor on the meta device, which holds no numbers.")
        image = image.detach().to_dense().cpu()
        image = image.float().numpy() if image.is_floating_point() else image.numpy()
    if np.ma.is_masked(image):
        raise UserError("An image is a masked array, and some pixels are masked: say what they are, by .filled().")
    if not image.size:
        raise UserError(f"An image is an array of shape {image.shape}: it has no pixels.")
    return np.asarray(image)


def _array(array: np.ndarray, channels: int, size: int) -> np.ndarray:
    if array.ndim == 3 and array.shape[0] not in (1, 3) and array.shape[-1] in (1, 3):
        array = array.transpose(2, 0, 1)
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3 or array.shape[0] not in (1, 3):
        raise UserError(
            f"An image is an array of shape {array.shape}: [height, width], [channels, height, width] or "
            "[height, width, channels] is needed, with 1 or 3 channels."
        )
    pixels = _bytes(array)
    if pixels.shape == (channels, size, size):
        return pixels
    flat = pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0))
    return folder.prepare(Image.fromarray(flat), size, grey=channels == 1)


def _bytes(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind in "iu" and array.max() == 1:
        raise UserError(
            f"An image is an array of {array.dtype} with no number above 1: integers go to 255, so that it would be "
            "black. Of zeros and ones make a bool array (array.astype(bool)), or 255 * array."
        )
    if array.dtype == np.uint8:
        return array
    largest = 1 if array.dtype.kind in "fb" else 255
    if array.dtype.kind not in "fbiu" or not (array.min() >= 0 and array.max() <= largest):
        raise UserError(
            f"An image is an array of {array.dtype} from {array.min()} to {array.max()}: integers in [0, 255] or "
            "floating point numbers in [0, 1] are needed. Undo a normalisation, the network has its own."
        )
    return np.round(array.astype(np.float64) * (255 / largest)).astype(np.uint8)
