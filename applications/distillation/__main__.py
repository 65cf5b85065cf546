"""Ten images in place of a data set: ``python -m applications.distillation``."""

from __future__ import annotations

import sys
from typing import Literal

from torch import Tensor

from applications.distillation import plots
from applications.distillation.data import Parts, class_means, read, real_images
from applications.distillation.distill import Distillation
from applications.distillation.evaluate import by_adam, on_all_images, summary, test_accuracy
from applications.distillation.knobs import Config, build, distillation
from applications.distillation.tuning import tunable
from applications.frame.command import main
from applications.frame.run import Row, Run

LINEAR, FIXED, FRESH = "linear", "ConvNet, one initialisation", "ConvNet, any initialisation"
"""The three trainings of images."""
LINEAR_APART = "the same"
"""Softmax regression sees little but the differences of its ten images."""


def story(config: Config, run: Run) -> None:
    """Learn images for a linear classifier, then for a ConvNet; measure them beside real ones; draw them."""
    parts = read(config.data, config.data_root, config.images_per_class)
    count = parts.num_classes * config.images_per_class
    learned: dict[str, Distillation] = {}
    captions: dict[str, list[str]] = {}
    real = real_images(parts.train, parts.num_classes, config.images_per_class, config.seed)
    means = class_means(parts.train, parts.num_classes, config.images_per_class)
    rows = {"real images": real, "class means": means}

    if config.network in ("both", "linear"):
        learned[LINEAR] = learn(config, parts, "linear", False, LINEAR, run)
        table = run.part("accuracy, linear", lambda: linear_table(config, parts, learned[LINEAR]))
        run.table(f"Test accuracy of the linear classifier (%), {config.data}, {count} images", table)
        linear_names = {LINEAR: "learned", "class means": "class means", "real images": table[2]["images"]}
        caption(captions, table, "linear", "accuracy", linear_names)
    if config.network in ("both", "convnet"):
        for name, fresh in ((FIXED, False), (FRESH, True)):
            learned[name] = learn(config, parts, "convnet", fresh, name, run)
        table = run.part("accuracy, ConvNet", lambda: convnet_table(config, parts, learned[FIXED], learned[FRESH]))
        run.table(f"Test accuracy of the ConvNet (%), {config.data}, {count} images", table)
        names = {FRESH: table[1]["images"], "class means": table[2]["images"], "real images": table[3]["images"]}
        caption(captions, table, "ConvNet", "fresh ones", names)
        caption(captions, table, "ConvNet", "its initialisation", {FIXED: table[0]["images"]})

    for name, training in learned.items():
        rows[name] = training.images.detach()
        if name == LINEAR:
            rows[LINEAR_APART], captions[LINEAR_APART] = rows[LINEAR] - rows[LINEAR].mean(0), ["less their mean"]
    first = {name: images[:: config.images_per_class] for name, images in rows.items()}
    title = f"{config.data}: {count} images to train on, and the test accuracy that they give"
    run.picture("images.png", plots.image_rows(first, captions, title))
    curves = {name: run.metrics(name) for name in learned}
    run.picture("curves.png", plots.curves(curves, f"{config.data}: a network trained on {count} learned images"))


def learn(
    config: Config, parts: Parts, kind: Literal["linear", "convnet"], fresh: bool, name: str, run: Run
) -> Distillation:
    training = distillation(config, build(config, kind, parts, run.settings), parts, fresh)
    run.train(name, training, show=("loss", "validation"))
    return training


def linear_table(config: Config, parts: Parts, learned: Distillation) -> list[Row]:
    """One minimum, so one number, but for the draws of real images."""
    inner, seeds = learned.inner, [config.seed]

    def measure(images: Tensor, targets: Tensor) -> float:
        return test_accuracy(inner, images, targets, seeds, parts.test)[0]

    draws = [measure(images, learned.labels) for images in drawn(config, parts)]
    mean, deviation = summary(draws)
    means = class_means(parts.train, parts.num_classes, config.images_per_class)
    return [
        {"images": "learned", "accuracy": measure(learned.images.detach(), learned.labels), "sd": None},
        {"images": "class means", "accuracy": measure(means, learned.labels), "sd": None},
        {"images": f"real, mean of {config.repeats} draws", "accuracy": mean, "sd": deviation},
        {"images": f"all {len(parts.train.y)}", "accuracy": measure(*parts.train), "sd": None},
    ]


def convnet_table(config: Config, parts: Parts, fixed: Distillation, fresh: Distillation) -> list[Row]:
    """From the initialisation of the seed, and from fresh ones."""
    own, others = [config.seed], [config.seed + 1 + index for index in range(config.repeats)]

    def row(name: str, images: Tensor) -> Row:
        from_own = test_accuracy(fixed.inner, images, fixed.labels, own, parts.test)[0]
        mean, deviation = summary(test_accuracy(fixed.inner, images, fixed.labels, others, parts.test))
        adam, _ = summary(by_adam(fixed.inner, images, fixed.labels, others, parts.test))
        return {"images": name, "its initialisation": from_own, "fresh ones": mean, "sd": deviation, "by Adam": adam}

    draws = list(zip(drawn(config, parts), others, strict=True))
    pulled = [test_accuracy(fixed.inner, images, fixed.labels, [seed], parts.test)[0] for images, seed in draws]
    adam = [by_adam(fixed.inner, images, fixed.labels, [seed], parts.test)[0] for images, seed in draws]
    mean, deviation = summary(pulled)
    real = {"images": f"real, mean of {config.repeats} draws", "fresh ones": mean, "sd": deviation}
    ceiling = on_all_images(fixed.inner.network, parts, config.seed, config.full_steps)
    return [
        row("learned for one initialisation", fixed.images.detach()),
        row("learned for any initialisation", fresh.images.detach()),
        row("class means", class_means(parts.train, parts.num_classes, config.images_per_class)),
        {**real, "by Adam": summary(adam)[0]},
        {"images": f"all {len(parts.train.y)}", "by Adam": ceiling},
    ]


def drawn(config: Config, parts: Parts) -> list[Tensor]:
    seeds = range(config.seed, config.seed + config.repeats)
    return [real_images(parts.train, parts.num_classes, config.images_per_class, seed) for seed in seeds]


def caption(captions: dict[str, list[str]], table: list[Row], network: str, column: str, names: dict[str, str]) -> None:
    """Add the accuracies of a table to the lines beside the rows of the picture."""
    found = {row["images"]: row for row in table}
    for name, label in names.items():
        captions.setdefault(name, []).append(f"{network}: {found[label][column]:.1f} %")


if __name__ == "__main__":
    sys.exit(main("distillation", sys.argv[1:], Config, story, tunable))
