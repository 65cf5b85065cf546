"""Long-tailed and noisy training sets, drawn several times from one data set, with clean balanced sets beside them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from applications.frame.data import Examples, mislabel
from applications.frame.errors import UserError

Problem = Literal["long-tail", "noise"]


@dataclass(frozen=True)
class Drawn:
    """R training sets, each with a meta, a validation and a test set; indices into the same images.

    Attributes:
        images: ``[N, d]``. classes: their true classes ``[N]``.
        train, meta, validation, test: indices, ``[R, n]`` each; disjoint in each row.
        labels: of ``train`` as they are given to the learner, some of them wrong, ``[R, n]``.
    """

    images: Tensor
    classes: Tensor
    train: Tensor
    meta: Tensor
    validation: Tensor
    test: Tensor
    labels: Tensor
    num_classes: int

    @property
    def clean(self) -> Tensor:
        """Which of the given labels are true, ``[R, n]``."""
        return self.labels == self.classes[self.train]

    @property
    def counts(self) -> Tensor:
        """Training examples that are labelled as each class, ``[R, C]``."""
        return one_hot(self.labels, self.num_classes).sum(1)

    def with_meta(self) -> Drawn:
        """The meta set behind the training set too."""
        return replace(
            self,
            train=torch.cat([self.train, self.meta], 1),
            labels=torch.cat([self.labels, self.classes[self.meta]], 1),
        )

    def meta_alone(self) -> Drawn:
        """The meta set in the place of the training set."""
        return replace(self, train=self.meta, labels=self.classes[self.meta])

    def to(self, device: torch.device) -> Drawn:
        moved: dict[str, Any] = {
            name: value.to(device) if isinstance(value, Tensor) else value for name, value in vars(self).items()
        }
        return Drawn(**moved)


def draw(
    examples: Examples,
    problem: Problem,
    *,
    repeats: int,
    imbalance: float,
    noise: float,
    meta_per_class: int,
    validation_per_class: int,
    test_per_class: int,
    seed: int,
) -> Drawn:
    """Balanced meta, validation and test sets first; the training set from what is left.

    ``"long-tail"``: class number i by size keeps ``n_max imbalance^(-i / (C - 1))`` examples (Cui et al. 2019), with
    ``n_max`` what the smallest class has left; which class is which is drawn for each repeat. ``"noise"``: ``n_max`` of
    each class, and a label is drawn anew from all classes with probability ``noise`` (the uniform noise of Shu et al.
    2019: of ten classes, a tenth of the labels that are drawn are right again).

    Raises:
        UserError: a class is too small.
    """
    number, num_classes = len(examples), examples.num_classes
    held_out = examples.num_test
    needed = (meta_per_class, validation_per_class, 0 if held_out else test_per_class)
    smallest = int(np.bincount(examples.targets[: number - held_out], minlength=num_classes).min())
    most = smallest - sum(needed)
    if most < 1:
        raise UserError(
            f"The smallest class of {examples.name} has {smallest} examples; {sum(needed)} are taken for the meta, "
            "validation and test sets, and none is left to train on. Lower --meta-per-class, --validation-per-class or "
            "--test-per-class, or leave out the rare class."
        )
    ratio = imbalance if problem == "long-tail" else 1.0
    profile = [max(1, round(most * ratio ** (-i / max(1, num_classes - 1)))) for i in range(num_classes)]
    rows = [_row(examples, profile, needed, noise if problem == "noise" else 0.0, held_out, [seed, r])
            for r in range(repeats)]  # fmt: skip
    images, classes = examples.tensors()
    train, meta, validation, test, labels = (torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True))
    return Drawn(images, classes, train, meta, validation, test, labels, num_classes)


def _row(
    examples: Examples, profile: list[int], needed: tuple[int, ...], noise: float, held_out: int, seed: list[int]
) -> tuple[np.ndarray, ...]:
    """The parts of one repeat: train, meta, validation, test, labels."""
    random, last = np.random.default_rng(seed), len(examples) - held_out
    counts = random.permutation(profile) if len(set(profile)) > 1 else np.array(profile)
    parts: list[list[np.ndarray]] = [[], [], [], []]
    for label in range(examples.num_classes):
        own = random.permutation(np.flatnonzero(examples.targets[:last] == label))
        for part, chosen in zip(parts, np.split(own, np.cumsum([*needed, counts[label]])), strict=False):
            part.append(chosen)
    meta, validation, test, train = (np.concatenate(part) for part in parts)
    flips = torch.Generator().manual_seed(int(random.integers(2**31)))
    wrong = noise * (1 - 1 / examples.num_classes)  # a label that is drawn anew may be right again
    labels = mislabel(torch.from_numpy(examples.targets[train]), examples.num_classes, wrong, flips).numpy()
    return train, meta, validation, np.arange(last, len(examples)) if held_out else test, labels
