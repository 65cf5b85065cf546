"""Labels made wrong on purpose: what data cleaning has to find, and the benchmarks too."""

from __future__ import annotations

import torch
from torch import Tensor

from applications.frame.errors import UserError


def mislabel(labels: Tensor, num_classes: int, part: float, random: torch.Generator) -> Tensor:
    """Symmetric label noise: each label is, with probability ``part``, replaced by another class, uniformly drawn.

    A replaced label is always wrong, so ``labels != mislabel(labels, ...)`` is the truth about what is wrong. (Where
    papers draw from all classes instead, a part 1/num_classes of what they call corrupted stays right.)

    Args:
        labels: int64 ``[n]`` on the CPU; left as they are.
        num_classes: at least 2.
        random: two draws are made from it, whatever ``part`` is: a larger part adds wrong labels to those of a smaller.

    Raises:
        UserError: there is no other class, or ``part`` is not a probability.
    """
    if num_classes < 2:
        raise UserError(f"Labels of {num_classes} class cannot be made wrong: at least two classes are needed.")
    if not 0 <= part <= 1:
        raise UserError(f"A part of {part} of the labels cannot be made wrong: it lies between 0 and 1.")
    wrong = torch.rand(len(labels), generator=random) < part
    shift = torch.randint(1, num_classes, (len(labels),), generator=random)
    return torch.where(wrong, (labels + shift) % num_classes, labels)
