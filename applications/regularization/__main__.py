"""``python -m applications.regularization``: hyperparameters by the thousand and the million, and what they overfit."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from applications.command import Knobs, main, require, require_at_least_one
from applications.data import Examples, load, split
from applications.errors import UserError
from applications.regularization import augmentation, corpus, features, plots, weights
from applications.regularization.augmentation import Augmented, Draws
from applications.regularization.features import Regression
from applications.regularization.weights import Network
from applications.run import Row, Run


@dataclass(frozen=True)
class Config(Knobs):
    """Learn a penalty for each feature, a weight decay for each weight, or the strength of data augmentation."""

    problem: Literal["all", "features", "weights", "augmentation"] = "all"
    """Which of the three; all one after the other."""
    data: str = "embedded"
    """Documentation texts for features, scikit-learn's digits for the others; or digits, mnist, 20newsgroups (features
    only), another name, or a file of examples (see applications/data)."""
    data_root: Path | None = None
    """The folder of the data sets; by default $BILEVEL_DATA, else ~/.cache/bilevel."""
    train: int = 0
    """Training examples; 0: a quarter of all for features, at most 5,000; 50 for weights; 200 for augmentation."""
    validation: int = 0
    """Validation examples; 0: a quarter of all for features, at most 5,000; 50 for weights; 500 for augmentation."""
    steps: int = 0
    """Outer steps; 0: 12 for features and weights, 60 for augmentation."""
    hidden: int = 1000
    """Units of each hidden layer, for weights: 1,000 are a million weights."""

    def check(self) -> None:
        for name in ("train", "validation", "steps"):
            value = getattr(self, name)
            require(value >= 0, f"--{name} is {value}: it is a number of them, or 0 for the default.")
        require_at_least_one(self, "hidden")
        require(
            not (self.data == "20newsgroups" and self.problem != "features"),
            "--data 20newsgroups is text, for penalties of features: add --problem features.",
        )


def story(knobs: Config, run: Run) -> None:
    chosen = tuple(STORIES) if knobs.problem == "all" else (knobs.problem,)
    parts = {problem: read(problem, knobs) for problem in chosen}
    for problem in chosen:
        STORIES[problem](parts[problem], knobs, run)


def read(problem: str, knobs: Config) -> list[Examples]:
    """Training, validation and test examples, for weights a larger validation set besides: all disjoint.

    Raises:
        UserError: bad data.
    """
    embedded = knobs.data == "embedded"
    if embedded and problem == "features":
        examples = corpus.docstrings()
    else:
        examples = load("digits" if embedded else knobs.data, knobs.data_root, sparse=problem == "features")
    if problem == "augmentation" and examples.image is None:
        raise UserError(f"{examples.name} is no set of images, and --problem augmentation turns images.")
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
    return split(examples, [*sizes, min(len(examples) - sum(sizes), 10_000)], knobs.seed)


def learn_penalties(parts: list[Examples], knobs: Config, run: Run) -> None:
    train, validation, test = parts
    regression = Regression.of(train, validation, test)
    run.say(f"A penalty for each of {regression.num_features:,} features of {train.name}, {size(parts)} examples.")
    none, grid, all_labels = run.part(
        "one penalty by scikit-learn", lambda: features.shared_penalties(train, validation, test)
    )
    counts = [count for count in GROUPS if count < regression.num_features] + [regression.num_features]
    found: list[list[Row]] = []
    for count in counts:
        name = f"{count:,} penalties"
        start = FIRST_LOG_PENALTY if count == 1 else found[0][-1]["log_penalty"]
        search = regression.search(count, start, knobs.steps or 12, lr=1.3 if count == 1 else 0.6)
        run.train(name, search, show=("validation_loss", "test_loss"))
        found.append(run.metrics(name))
    rows = [
        none,
        grid,
        *({"penalties": f"{c:,}, learned", **f[-1]} for c, f in zip(counts, found, strict=True)),
        all_labels,
    ]
    columns = ("penalties", "training_loss", "validation_loss", "test_loss", "validation_accuracy", "test_accuracy")
    run.table(f"Features: {train.name}", [{c.replace("_", " "): row[c] for c in columns} for row in rows])
    run.picture(
        "penalties.png",
        plots.penalties(counts, found, f"{train.name}: penalties learned on {len(validation):,} examples"),
    )


GROUPS = (1, 8, 64)
FIRST_LOG_PENALTY = -10.0


def learn_decays(parts: list[Examples], knobs: Config, run: Run) -> None:
    train, validation, more, test = (part.tensors() for part in parts)
    larger = both(validation, more)
    steps = knobs.steps or 12
    network = Network(train, knobs.hidden, parts[0].num_classes, knobs.seed)
    count = sum(p.numel() for p in network.start.values())
    run.say(f"\nA weight decay for each of {count:,} weights on {parts[0].name}, {size(parts)} examples.")
    arms: dict[str, tuple[weights.Sharing, weights.Part]] = {
        f"each weight, {len(validation[1])} validation examples": ("weight", validation),
        f"each layer, {len(validation[1])} validation examples": ("layer", validation),
        f"each weight, {len(larger[1])} validation examples": ("weight", larger),
    }
    rows: list[Row] = []
    for name, (sharing, held_out) in arms.items():
        run.train(name, network.search(sharing, held_out, test, steps), show=("validation_accuracy", "test_accuracy"))
        last = run.metrics(name)[-1]
        decays = sum(x.numel() for x in network.decays(sharing).values())
        rows.append({"a decay for": name, "decays": decays, **accuracies(last)})
    for held_out in (validation, larger):
        name = f"one fixed; the {len(held_out[1])} trained on too"
        last = run.part(name, lambda: network.train_on(both(train, held_out), test, steps))  # noqa: B023
        rows.append({"a decay for": name, "decays": 0, **accuracies(last)})
    run.table(f"Weights: {parts[0].name}", rows)
    title = f"{parts[0].name}: {len(validation[1])} validation examples, learned by heart"
    records = {name.replace(", ", ",\n"): run.metrics(name) for name in arms}
    name = f"trained on all\n{len(train[1]) + len(validation[1])} examples"
    run.picture("decays.png", plots.memorised(records, rows[-2]["test accuracy"], name, title))


def learn_strengths(parts: list[Examples], knobs: Config, run: Run) -> None:
    shape = parts[0].image
    assert shape is not None
    train, validation, test = ((x.view(-1, *shape), y) for x, y in (part.tensors() for part in parts))
    problem = Augmented.of(train, validation, test, parts[0].num_classes, knobs.seed)
    run.say(f"\nHow strongly to augment {parts[0].name}, {size(parts)} examples; the last two are turned and moved.")
    search = problem.search(knobs.steps or 60, lr=0.2)
    run.train("strengths", search, show=("validation_loss", *augmentation.STRENGTHS[:2]))
    records = run.metrics("strengths")
    tail = records[-len(records) // 4 :]
    learned = {name: math.exp(sum(math.log(row[name]) for row in tail) / len(tail)) for name in augmentation.STRENGTHS}
    nothing = dict.fromkeys(augmentation.STRENGTHS, 0.0)
    by_hand = run.part("by hand", lambda: problem.grid(ROUNDS))
    kinds = {
        "none": nothing,
        f"the best of {math.prod(map(len, augmentation.GRID.values()))} by hand": {
            name: by_hand[name] for name in nothing
        },
        "learned": learned,
        "as in use": augmentation.IN_USE,
    }
    rows = []
    for name, strengths in kinds.items():
        found = run.part(name, lambda: problem.train_with(strengths, ROUNDS))  # noqa: B023
        row = {"augmentation": name, "rotation in degrees": math.degrees(strengths["rotation"]), **strengths, **found}
        del row["rotation"]
        rows.append({key.replace("_", " "): value for key, value in row.items()})
    run.table(f"Augmentation: {parts[0].name}", rows)
    run.picture("strengths.png", plots.strengths(records, augmentation.IN_USE, f"{parts[0].name}: strengths learned"))
    images = train[0][:10]
    changed = augmentation.transform(images, augmentation.constant(learned), Draws.of(images, knobs.seed))
    run.picture("augmented.png", plots.augmented_images(images, changed, problem.test[0]))


ROUNDS = 12
"""Of training with fixed strengths."""


def both(a: weights.Part, b: weights.Part) -> weights.Part:
    return torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]])


def size(parts: list[Examples]) -> str:
    return " / ".join(f"{len(part):,}" for part in parts)


def accuracies(row: Row) -> Row:
    return {f"{name} accuracy": row.get(f"{name}_accuracy") for name in ("training", "validation", "test")}


STORIES = {"features": learn_penalties, "weights": learn_decays, "augmentation": learn_strengths}


if __name__ == "__main__":
    sys.exit(main("regularization", sys.argv[1:], Config, story))
