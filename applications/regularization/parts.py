"""The examples of each problem, and how they are split."""

from __future__ import annotations

from applications.frame.data import Examples, load, split
from applications.frame.errors import UserError
from applications.regularization import corpus
from applications.regularization.knobs import Config


def read(problem: str, knobs: Config) -> list[Examples]:
    """`split_for` the problem, by the seed of the knobs.

    Raises:
        UserError: bad data.
    """
    return split_for(problem, read_whole(problem, knobs), knobs, knobs.seed)


def read_whole(problem: str, knobs: Config) -> Examples:
    """All examples.

    Raises:
        UserError: bad data.
    """
    embedded = knobs.data == "embedded"
    if embedded and problem == "features":
        return corpus.docstrings()
    examples = load("digits" if embedded else knobs.data, knobs.data_root, sparse=problem == "features")
    if problem == "augmentation" and examples.image is None:
        raise UserError(f"{examples.name} is no set of images, and --problem augmentation turns images.")
    return examples


def split_for(problem: str, examples: Examples, knobs: Config, seed: int) -> list[Examples]:
    """Training, validation and test examples, for weights a larger validation set besides: all disjoint.

    Raises:
        UserError: too few of them.
    """
    quarter = min(len(examples) // 4, 5000)
    train, validation = {"features": (quarter, quarter), "weights": (50, 50), "augmentation": (200, 500)}[problem]
    sizes = [knobs.train or train, knobs.validation or validation]
    if problem == "weights":
        sizes.append(9 * sizes[1])
    if sum(sizes) >= len(examples):
        raise UserError(
            f"{examples.name} has {len(examples)} examples; {', '.join(map(str, sizes))} for training and validation "
            "leave none to test on. Take smaller --train and --validation."
        )
    return split(examples, [*sizes, min(len(examples) - sum(sizes), 10_000)], seed)
