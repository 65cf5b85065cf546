"""``python -m applications.regularization``: hyperparameters by the thousand and the million, and what they overfit."""

from __future__ import annotations

import math
import sys

import torch

from applications.frame.command import main
from applications.frame.data import Examples
from applications.frame.run import Row, Run
from applications.regularization import augmentation, features, plots, weights
from applications.regularization.augmentation import ROUNDS, Augmented, Draws
from applications.regularization.features import FIRST_LOG_PENALTY, Regression
from applications.regularization.knobs import Config
from applications.regularization.parts import read
from applications.regularization.tuning import tunable
from applications.regularization.weights import Network


def story(knobs: Config, run: Run) -> None:
    chosen = tuple(STORIES) if knobs.problem == "all" else (knobs.problem,)
    parts = {problem: read(problem, knobs) for problem in chosen}
    for problem in chosen:
        STORIES[problem](parts[problem], knobs, run)


def learn_penalties(parts: list[Examples], knobs: Config, run: Run) -> None:
    train, validation, test = parts
    regression = Regression.of(train, validation, test)
    run.say(f"A penalty for each of {regression.num_features:,} features of {train.name}, {size(parts)} examples.")
    none, grid, all_labels = run.part(
        "one penalty by scikit-learn", lambda: features.shared_penalties(train, validation, test)
    )
    counts = [count for count in GROUPS if count < regression.num_features] + [regression.num_features]
    found: list[list[Row]] = []
    learned: list[Row] = []
    for count in counts:
        name = f"{count:,} penalties"
        start = FIRST_LOG_PENALTY if count == 1 else found[0][-1]["log_penalty"]
        search = regression.search(
            count, start, knobs.steps or 12, 1.3 if count == 1 else features.PENALTY_LR, run.settings
        )
        run.train(name, search, show=("validation_loss", "test_loss"))
        found.append(run.metrics(name))
        last = found[-1][-1]
        if run.settings:  # whose fits may be rough: the table has good ones
            penalties = search.hparams["log_penalties"][regression.groups(count)]
            last = run.part(f"{name}, fitted well", lambda: regression.fitted(penalties))  # noqa: B023
        learned.append({"penalties": f"{count:,}, learned", **last})
    rows = [none, grid, *learned, all_labels]
    columns = ("penalties", "training_loss", "validation_loss", "test_loss", "validation_accuracy", "test_accuracy")
    run.table(f"Features: {train.name}", [{c.replace("_", " "): row[c] for c in columns} for row in rows])
    run.picture(
        "penalties.png",
        plots.penalties(counts, found, f"{train.name}: penalties learned on {len(validation):,} examples"),
    )


GROUPS = (1, 8, 64)


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
        search = network.search(sharing, held_out, test, steps, run.settings)
        run.train(name, search, show=("validation_accuracy", "test_accuracy"))
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
    train, validation, test = augmentation.images(parts)
    problem = Augmented.of(train, validation, test, parts[0].num_classes, knobs.seed)
    run.say(f"\nHow strongly to augment {parts[0].name}, {size(parts)} examples; the last two are turned and moved.")
    search = problem.search(knobs.steps or 60, augmentation.STRENGTH_LR, run.settings)
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


def both(a: weights.Part, b: weights.Part) -> weights.Part:
    return torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]])


def size(parts: list[Examples]) -> str:
    return " / ".join(f"{len(part):,}" for part in parts)


def accuracies(row: Row) -> Row:
    return {f"{name} accuracy": row.get(f"{name}_accuracy") for name in ("training", "validation", "test")}


STORIES = {"features": learn_penalties, "weights": learn_decays, "augmentation": learn_strengths}


if __name__ == "__main__":
    sys.exit(main("regularization", sys.argv[1:], Config, story, tunable))
