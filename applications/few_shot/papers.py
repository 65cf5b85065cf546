"""``papers``: the commands of the settings that papers report, and what each needs."""

from __future__ import annotations

import dataclasses

from applications.few_shot.config import PRESETS, Config
from applications.few_shot.trained import options

NEEDS = {
    "omniglot": "Omniglot, which torchvision downloads (12 MB).",
    "cifar-fs": "CIFAR-100, which torchvision downloads (170 MB); its 100 classes are split into 64, 16 and 20.",
    "mini-imagenet": (
        "60,000 images of 100 ImageNet classes: folders named by synset, 600 images each, below mini-imagenet in "
        "--data-root. ImageNet asks for an account, so you place them yourself."
    ),
}
"""Name of a data set -> what has to be there."""

CIFAR = dataclasses.replace(Config(), data="cifar-fs", width=64, halve="pool", inner_steps=10, steps=60_000, tasks=8)
"""CIFAR-FS is not in the paper: Conv4-64 with pooling, as others have it, as many steps as for mini-ImageNet."""


def lines() -> list[str]:
    """The text that `command` prints."""
    told = []
    for name, config in PRESETS.items():
        if name.startswith("paper-"):
            told += _entry(config, [f"--preset {name}"])
            if name == "paper-miniimagenet-5way-1shot":
                told += _entry(dataclasses.replace(config, shots=5), [f"--preset {name}", "--shots 5"])
    for config in (CIFAR, dataclasses.replace(CIFAR, shots=5)):
        told += _entry(config, options(config))
    return told


def _entry(config: Config, words: list[str]) -> list[str]:
    images = config.tasks * config.ways * (config.inner_steps * config.shots + config.queries)
    return [
        f"{config.data}, {config.ways}-way {config.shots}-shot",
        f"  python -m applications.few_shot train {' '.join(words)} --data-root FOLDER",
        f"  needs: {NEEDS[config.data]}",
        f"  makes: {config.steps:,} meta-steps of {config.tasks} tasks; about {images:,} images through Conv4-"
        f"{config.width} ({config.image_shape[1]} pixels) each. Time one by --steps 10.",
        "",
    ]


def command(arguments: list[str]) -> int:
    """Print them."""
    if arguments:
        print("usage: python -m applications.few_shot papers")
        return 0 if arguments[0] in ("-h", "--help") else 2
    print("\n".join(lines()))
    return 0
