"""The data of one seed: training labels of which some are wrong, clean ones to validate on and for the test."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from applications.frame.data import Examples, mislabel, split, standardised


@dataclass(frozen=True)
class Labelled:
    """Features ``[n, d]`` float32 and classes ``[n]`` int64."""

    features: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: Tensor) -> Labelled:
        return Labelled(self.features[chosen], self.labels[chosen])

    def __add__(self, other: Labelled) -> Labelled:
        return Labelled(torch.cat([self.features, other.features]), torch.cat([self.labels, other.labels]))


@dataclass(frozen=True)
class Task:
    """What a method sees (``train``, ``val``), and what judges it (``wrong``, ``clean``, ``test``).

    Attributes:
        train: with the labels as they were given, some of them wrong.
        clean: the same examples with the true labels.
        image: channels, height and width, where the features are images.
    """

    train: Labelled
    val: Labelled
    test: Labelled
    clean: Labelled
    num_classes: int
    image: tuple[int, int, int] | None

    @property
    def wrong(self) -> Tensor:
        """Which training labels are wrong, bool ``[n]``: the truth that the methods do not see."""
        return self.train.labels != self.clean.labels


def make_task(examples: Examples, num_train: int | None, num_val: int | None, noise: float, seed: int) -> Task:
    """Split, standardise by the training part what is no image, and spoil.

    MNIST keeps its official test set, whatever the seed. Of other data, the test set is what training and validation
    leave over; by default each of the three is a third.

    Raises:
        UserError: there are too few examples, or a class would be missing in a part.
    """
    if examples.name == "mnist":
        earlier, last = examples.official()
        parts = [*split(earlier, (num_train or 5_000, num_val or 5_000), seed), last]
    else:
        third = len(examples) // 3
        sizes = (num_train or third, num_val or third)
        parts = split(examples, (*sizes, len(examples) - sum(sizes)), seed)
    clean, val, test = (Labelled(*part.tensors(torch.float32)) for part in standardised(*parts))
    noisy = mislabel(clean.labels, examples.num_classes, noise, torch.Generator().manual_seed(seed))
    return Task(Labelled(clean.features, noisy), val, test, clean, examples.num_classes, examples.image)
