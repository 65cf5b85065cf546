"""Where data sets lie, and how their files are read and written."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import numpy as np

from applications.frame.errors import UserError
from applications.frame.options import is_file
from bilevel import files

Shape = tuple[int | None, ...]  # None stands for any size
Arrays = dict[str, np.ndarray]


def data_root(root: str | Path | None = None) -> Path:
    """The folder of the data sets: `root`, else $BILEVEL_DATA, else `bilevel` in the user's cache folder.

    Raises:
        UserError: If the path exists and is not a folder.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(root or os.environ.get("BILEVEL_DATA") or Path(cache, "bilevel")).expanduser()
    if path.exists() and not path.is_dir():
        raise UserError(
            f"The data root {path} is a file. Data sets are looked up in a folder. "
            "Try the folder that contains 'MNIST', 'omniglot', 'mini-imagenet' and so on, or leave the root out."
        )
    return path


def read_npz(path: Path, layout: Mapping[str, tuple[str, Shape]]) -> Arrays:
    """Read the arrays of an npz file and check them.

    Args:
        path: The file.
        layout: For every key the kind or dtype ("U" for text, "uint8") and the shape.

    Raises:
        UserError: If the file can't be read, lacks a key or holds another dtype or shape.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in layout}
        for key, (dtype, shape) in layout.items():
            _check(key, arrays[key], dtype, shape)
    except Exception as error:  # numpy, zipfile and zlib raise a dozen types, by where the damage is
        raise unusable(path, error) from error
    return arrays


def cached(path: Path, layout: Mapping[str, tuple[str, Shape]], make: Callable[[], Arrays]) -> Arrays:
    """Arrays that are made once and kept in an npz file.

    A damaged file is made again; where it can't be written, a warning is given and the arrays are made each time.
    """
    if is_file(path):
        with suppress(UserError):
            return read_npz(path, layout)
    arrays = make()
    try:
        files.write_atomically(path, lambda file: np.savez_compressed(file, allow_pickle=False, **arrays))
    except OSError as error:
        warnings.warn(f"{path} can't be cached ({error}): what it holds is made anew each time")
    return arrays


def unusable(path: Path, reason: object) -> UserError:
    """The error for a file that is there and can't be used."""
    return UserError(
        f"{path} can't be used: {reason}. The file is damaged or is another data set's. "
        "Try to delete it, so that it is made again, or to replace it with a good copy."
    )


def _check(key: str, array: np.ndarray, dtype: str, shape: Shape) -> None:
    sizes = len(array.shape) == len(shape) and all(b in (None, a) for a, b in zip(array.shape, shape, strict=True))
    if dtype not in (array.dtype.kind, array.dtype.name) or not sizes:
        expected = tuple("any" if size is None else size for size in shape)
        raise ValueError(f"'{key}' is {array.dtype} {array.shape}, not {dtype} {expected}")


def torchvision_datasets() -> ModuleType:
    """The module `torchvision.datasets`, imported only where a data set needs it.

    Raises:
        UserError: If torchvision is missing or doesn't fit the installed torch.
    """
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError, OSError) as error:  # a RuntimeError: built for another torch
        raise UserError(
            f"torchvision can't be imported: {error}. The data set is downloaded or read with it. "
            "Try `pip install --upgrade torch torchvision`, or the data set 'glyphs', which needs neither."
        ) from error
    return datasets
