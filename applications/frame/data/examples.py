"""Examples with a class or a number each: embedded sets, MNIST, CIFAR-10, 20 newsgroups, files of the user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import scipy
import torch
from torch import Tensor

from applications.frame.data import newsgroups
from applications.frame.data.files import data_root, torchvision_datasets, unusable
from applications.frame.errors import UserError

Task = Literal["classification", "regression"]

EMBEDDED: dict[Task, tuple[str, ...]] = {
    "classification": ("digits", "breast_cancer", "wine", "iris"),
    "regression": ("diabetes",),
}
"""Sets that ship with scikit-learn."""
IN_FOLDERS = ("mnist", "cifar10", "20newsgroups")
"""Sets of classes that are files in the folder of data sets."""
SPARSE_SUFFIXES = (".svm", ".svmlight", ".libsvm")


@dataclass(frozen=True)
class Examples:
    """Features and targets of the same examples.

    Attributes:
        features: float64 ``[n, d]``, dense or a SciPy CSR array.
        targets: int64 classes ``[n]``, or float64.
        num_classes: 0 for regression.
        image: channels, height and width where a row is an image with values in [0, 1].
        num_test: how many of the last examples are the official test set; 0 where there is none.
    """

    name: str
    features: np.ndarray | scipy.sparse.csr_array
    targets: np.ndarray
    num_classes: int
    image: tuple[int, int, int] | None = None
    num_test: int = 0

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def sparse(self) -> bool:
        return bool(scipy.sparse.issparse(self.features))

    def subset(self, chosen: np.ndarray) -> Examples:
        return replace(self, features=self.features[chosen], targets=self.targets[chosen], num_test=0)

    def official(self) -> tuple[Examples, Examples]:
        """What comes before the official test set, and that."""
        rows = np.arange(len(self))
        return self.subset(rows[: len(self) - self.num_test]), self.subset(rows[len(self) - self.num_test :])

    def tensors(self, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Features (dense) and targets; classes stay int64."""
        targets = torch.from_numpy(self.targets)
        features = torch.from_numpy(self.features).to(device, dtype)
        return features, targets.to(device, dtype if targets.is_floating_point() else None)


def standardised(*parts: Examples) -> list[Examples]:
    """Features of mean zero and deviation one in the first part; images are of one scale already, and stay."""
    from sklearn.preprocessing import StandardScaler

    if parts[0].image is not None or parts[0].sparse:
        return list(parts)
    scaler = StandardScaler().fit(parts[0].features)
    return [replace(part, features=scaler.transform(part.features)) for part in parts]


def load(name: str, root: str | Path | None = None, *, task: Task = "classification", sparse: bool = False) -> Examples:
    """A data set by name, or the file at a path.

    Args:
        name: one of `EMBEDDED`, ``"mnist"`` or ``"cifar10"`` (training images, then test images, of torchvision's
            files), ``"20newsgroups"`` (its text archive, sparse); or a path: ``.npz`` with ``features`` [n, d] and
            ``targets`` [n], or ``.svm``, ``.svmlight``, ``.libsvm`` in that sparse format.
        root: the folder of data sets, for the three that are not embedded; by default $BILEVEL_DATA, else
            ``~/.cache/bilevel``.
        task: what the targets are: classes 0, 1, ... of which each has an example, or numbers.
        sparse: whether sparse features will do.

    Raises:
        UserError: an unknown name, missing or damaged files, NaN features, labels out of range, an empty class,
            sparse features where dense ones are needed.
    """
    suffix = Path(name).suffix
    if name in EMBEDDED[task]:
        examples = _embedded(name, task)
    elif name == "mnist" and task == "classification":
        examples = _mnist(data_root(root))
    elif name == "cifar10" and task == "classification":
        examples = _cifar10(data_root(root))
    elif name == "20newsgroups" and task == "classification":
        examples = _newsgroups(data_root(root))
    elif suffix == ".npz" or suffix in SPARSE_SUFFIXES:
        examples = _file(Path(name), task)
    else:
        known = (*EMBEDDED[task], *(IN_FOLDERS if task == "classification" else ()))
        raise UserError(
            f"There is no data set {name!r} for {task}. There are {', '.join(known)}, and files: .npz with 'features' "
            f"and 'targets', or {', '.join(SPARSE_SUFFIXES)}."
        )
    check(examples, sparse)
    return examples


def split(examples: Examples, sizes: Sequence[int | float], seed: int) -> list[Examples]:
    """Disjoint random parts: a float is a part of all, an int a number of examples; for classes, stratified.

    Raises:
        UserError: there are too few examples, or a class would be missing in a part.
    """
    from sklearn.model_selection import train_test_split

    counts = [round(size * len(examples)) if isinstance(size, float) else size for size in sizes]
    if all(isinstance(size, float) for size in sizes) and abs(sum(sizes) - 1) < 1e-9:
        counts[-1] = len(examples) - sum(counts[:-1])  # rounding leaves none over
    if sum(counts) > len(examples) or min(counts) < 1:
        raise UserError(
            f"{examples.name} has {len(examples)} examples, and parts of {', '.join(map(str, counts))} are asked for. "
            "Take smaller parts, each of at least one."
        )
    left, parts = np.arange(len(examples)), []
    for count in counts:
        if count == len(left):
            parts.append(examples.subset(np.random.default_rng(seed).permutation(left)))
            break
        classes = examples.targets[left] if examples.num_classes else None
        try:
            chosen, left = train_test_split(left, train_size=count, random_state=seed, stratify=classes)
        except ValueError as error:
            raise UserError(
                f"{examples.name} cannot be split into parts of {', '.join(map(str, counts))}: {error} "
                "Every class needs examples in every part: take larger parts, or leave out the rare class."
            ) from error
        parts.append(examples.subset(chosen))
    for part in parts:
        _check_classes(part)
    return parts


def check(examples: Examples, sparse: bool) -> None:
    """What `load` promises."""
    name, features = examples.name, examples.features
    if examples.sparse and not sparse:
        raise UserError(
            f"{name} is sparse, {features.shape[0]} x {features.shape[1]}; this application needs dense features. "
            "Convert it by .toarray() and save it as .npz, if it fits into memory."
        )
    if features.ndim != 2 or examples.targets.ndim != 1 or features.shape[0] != len(examples):
        raise UserError(
            f"{name}: features are {features.shape} and targets {examples.targets.shape}; [n, d] and [n] are needed."
        )
    if features.shape[0] < 2 or features.shape[1] < 1:
        raise UserError(
            f"{name}: {features.shape[0]} examples of {features.shape[1]} features are nothing to learn on."
        )
    values = features.data if examples.sparse else features
    if not np.isfinite(values).all():
        where = "" if examples.sparse else f" (the first in row {int(np.argwhere(~np.isfinite(values))[0][0])})"
        raise UserError(
            f"{name}: {int((~np.isfinite(values)).sum())} features are NaN or infinite{where}. "
            "Impute them, or leave those examples out."
        )
    if not np.isfinite(examples.targets).all():
        raise UserError(f"{name}: some targets are NaN or infinite. Leave those examples out.")
    _check_classes(examples)


def _check_classes(examples: Examples) -> None:
    if not examples.num_classes:
        return
    counts = np.bincount(examples.targets, minlength=examples.num_classes)
    if (counts == 0).any():
        missing = ", ".join(map(str, np.flatnonzero(counts == 0)[:10]))
        raise UserError(
            f"{examples.name}: class {missing} has no example, of {examples.num_classes} classes. Labels are 0, 1, ... "
            "without a gap: number them anew, or take more examples."
        )


def _embedded(name: str, task: Task) -> Examples:
    from sklearn import datasets

    found = getattr(datasets, f"load_{name}")()
    features, targets = np.asarray(found.data, float), np.asarray(found.target)
    if name == "digits":
        return Examples(name, features / 16, targets.astype(np.int64), 10, (1, 8, 8))
    return _examples(name, features, targets, task)


def _mnist(root: Path) -> Examples:
    datasets = torchvision_datasets()
    try:
        parts = [datasets.MNIST(str(root), train=train, download=False) for train in (True, False)]
        images = torch.cat([part.data for part in parts]).flatten(1).numpy() / 255.0
        labels = torch.cat([part.targets for part in parts]).numpy()
    except RuntimeError as error:  # torchvision's word for files that are not there
        raise UserError(
            f"MNIST is not in {root} ({error}). Its folder MNIST/raw with the four files of "
            "torchvision.datasets.MNIST is looked up there: set --data-root or $BILEVEL_DATA, or let torchvision fetch "
            f"it: python -c \"from torchvision.datasets import MNIST; MNIST('{root}', download=True)\""
        ) from error
    except Exception as error:  # struct, zlib, ValueError and others, by where the damage is
        raise unusable(root / "MNIST" / "raw", error) from error
    if len(images) != len(labels):
        raise unusable(root / "MNIST" / "raw", f"{len(images)} images and {len(labels)} labels")
    return Examples("mnist", images, labels.astype(np.int64), 10, (1, 28, 28), len(parts[1].targets))


def _cifar10(root: Path) -> Examples:
    datasets = torchvision_datasets()
    try:  # torchvision checks the checksum of each file before it reads it
        parts = [datasets.CIFAR10(str(root), train=train, download=False) for train in (True, False)]
    except RuntimeError as error:
        raise UserError(
            f"CIFAR-10 is not in {root} ({error}). Its folder cifar-10-batches-py is looked up there: set --data-root "
            "or $BILEVEL_DATA, or let torchvision fetch it: "
            f"python -c \"from torchvision.datasets import CIFAR10; CIFAR10('{root}', download=True)\""
        ) from error
    except Exception as error:  # pickle's and NumPy's, by where the damage is
        raise unusable(root / "cifar-10-batches-py", error) from error
    images = np.concatenate([part.data for part in parts]).transpose(0, 3, 1, 2).reshape(-1, 3 * 32 * 32) / 255.0
    labels = np.concatenate([np.asarray(part.targets, np.int64) for part in parts])
    if len(images) != len(labels):
        raise unusable(root / "cifar-10-batches-py", f"{len(images)} images and {len(labels)} labels")
    return Examples("cifar10", images, labels, 10, (3, 32, 32), len(parts[1].targets))


def _newsgroups(root: Path) -> Examples:
    features, targets = newsgroups.load(root)
    return Examples("20newsgroups", features, targets, newsgroups.NUM_CLASSES)


def _file(path: Path, task: Task) -> Examples:
    if not path.is_file():
        raise UserError(f"There is no file {path}. Is the path right?")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                missing = {"features", "targets"} - set(archive.files)
                if missing:
                    raise UserError(
                        f"{path} has no {' and no '.join(sorted(missing))}; it has {', '.join(archive.files)}. "
                        "Save it by numpy.savez(path, features=..., targets=...)."
                    )
                return _examples(str(path), archive["features"], archive["targets"], task)
        from sklearn.datasets import load_svmlight_file

        features, targets = load_svmlight_file(str(path))
        return _examples(str(path), scipy.sparse.csr_array(features), targets, task)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # numpy, zipfile, zlib and scikit-learn raise a dozen types, by where the damage is
        raise unusable(path, error) from error


def _examples(name: str, features: Any, targets: Any, task: Task) -> Examples:
    if features.dtype.kind not in NUMBERS or targets.dtype.kind not in NUMBERS:
        raise UserError(f"{name}: features and targets must be numbers, not {features.dtype} and {targets.dtype}.")
    features, targets = features.astype(np.float64), targets.astype(np.float64)
    if task == "regression":
        return Examples(name, features, targets, 0)
    if not np.isfinite(targets).all() or (targets != np.floor(targets)).any():
        raise UserError(f"{name}: labels must be whole numbers 0, 1, ...; some are not. Is this a regression set?")
    if set(np.unique(targets)) == {-1.0, 1.0}:  # the convention of svmlight files
        targets = (targets + 1) / 2
    if (targets < 0).any() or targets.max(initial=0) > MOST_CLASSES:
        raise UserError(
            f"{name}: labels go from {targets.min():.0f} to {targets.max():.0f}, out of range: classes are numbered "
            f"0, 1, ... up to {MOST_CLASSES}."
        )
    return Examples(name, features, targets.astype(np.int64), int(targets.max(initial=0)) + 1)


NUMBERS = "biuf"
"""Kinds of NumPy's dtypes: truth values, whole numbers and real ones."""
MOST_CLASSES = 10_000
"""A label above it is an identifier, not a class."""
