"""``python -m applications.reweighting``."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, pstdev
from typing import Literal

from torch import nn

from applications.command import Knobs, main, require
from applications.data import Examples, load
from applications.device import select_device
from applications.reweighting.drawing import Drawn, Problem, draw
from applications.reweighting.measure import measure
from applications.reweighting.networks import Mlp, ResNet32
from applications.reweighting.pictures import class_bars, validation_curves, weight_functions
from applications.reweighting.train import ClassifierTraining, Rule, Settings
from applications.reweighting.weighting import Inputs, Method
from applications.run import Row, Run


@dataclass(frozen=True)
class Config(Knobs):
    """Loss weights learned by a small network (Meta-Weight-Net), on long-tailed and on noisy labels."""

    data: str = "digits"
    """digits, mnist, cifar10, another set that ships with scikit-learn, or a .npz file."""
    data_root: Path | None = None
    """Folder of MNIST and CIFAR-10; by default $BILEVEL_DATA, else ~/.cache/bilevel."""
    problems: tuple[Problem, ...] = ("long-tail", "noise")
    """What is wrong with the training set."""
    methods: tuple[Method, ...] = ("unroll",)
    """Hypergradients of the weight net, one row each: unroll, one-step, sama, neumann, cg."""
    imbalance: float = 50.0
    """Long tail: largest class over smallest."""
    long_tail_inputs: Inputs = "loss-and-class"
    """Long tail: what the weight net sees; the loss tells little of how rare a class is, once learned by heart."""
    noise: float = 0.4
    """Noise: part of the labels that are drawn anew."""
    repeats: int = 5
    """Training sets, of which the tables give means."""
    meta_per_class: int = 10
    """Clean examples of each class that the weight net learns on."""
    validation_per_class: int = 15
    """Clean examples of each class that choose the step to stop at."""
    test_per_class: int = 40
    """Where the data set has no published test set."""
    model: Literal["mlp", "resnet32"] = "mlp"
    """The classifier; ResNet-32 takes colour images of 32 x 32."""
    hidden: int = 100
    """Units of the one hidden layer of the mlp."""
    steps: int = 600
    """Of each classifier."""
    batch: int = 100
    """Examples of a step, and of a step of the weight net."""
    lr: float = 0.05
    """Of the classifier."""
    momentum: float = 0.9
    """Of the classifier."""
    weight_decay: float = 5e-4
    """Of the classifier."""
    meta_lr: float = 3e-3
    """Of the weight net."""
    warm_up: int = 100
    """Steps before the weight net learns."""
    focal_gamma: float = 1.0
    """Of the focal loss."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""

    def check(self) -> None:
        """See `Knobs`."""
        for name in ("repeats", "meta_per_class", "validation_per_class", "test_per_class", "hidden", "steps", "batch"):
            require(getattr(self, name) >= 1, f"--{name.replace('_', '-')} is {getattr(self, name)}: at least 1.")
        for name in ("lr", "meta_lr"):
            require(0 < getattr(self, name) < 10, f"--{name.replace('_', '-')} is {getattr(self, name)}: in (0, 10).")
        require(self.imbalance >= 1, f"--imbalance is {self.imbalance}: largest over smallest class, at least 1.")
        require(0 <= self.noise < 1, f"--noise is {self.noise}: the part of the labels drawn anew, in [0, 1).")
        require(self.warm_up >= 0, f"--warm-up is {self.warm_up}: not negative.")
        require(0 <= self.momentum < 1, f"--momentum is {self.momentum}: in [0, 1).")
        require(self.weight_decay >= 0, f"--weight-decay is {self.weight_decay}: not negative.")
        require(self.focal_gamma >= 0, f"--focal-gamma is {self.focal_gamma}: not negative.")
        for name, values in (("problems", self.problems), ("methods", self.methods)):
            require(0 < len(set(values)) == len(values), f"--{name} {' '.join(values)}: one at least, each once.")
        select_device(self.device)

    @property
    def settings(self) -> Settings:
        return Settings(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Settings)})


def story(knobs: Config, run: Run) -> None:
    """Each problem: every rule of weighting on the same training sets, one table; then the pictures."""
    device, examples = select_device(knobs.device), load(knobs.data, knobs.data_root)
    check_model(knobs, examples)
    sets = {problem: draw_for(knobs, examples, problem).to(device) for problem in knobs.problems}
    found: dict[Problem, dict[str, Row]] = {}
    for problem, drawn in sets.items():
        run.say(f"\n{problem}: {describe(drawn)}")
        found[problem] = {}
        for name, training in candidates(knobs, examples, problem, drawn).items():
            part = f"{problem}, {name}"
            run.train(part, training, show=("loss", "meta_loss"))
            found[problem][name] = run.part(part, partial(measure, training, drawn))
        rows = [summary(name, row) for name, row in found[problem].items()]
        run.table(f"{problem} {examples.name}, accuracy (%) over {knobs.repeats} training sets", rows)
    ours = first_name(knobs)
    run.picture("weights.png", weight_functions({problem: rows[ours] for problem, rows in found.items()}))
    names = {problem: {name: run.metrics(f"{problem}, {name}") for name in rows} for problem, rows in found.items()}
    run.picture("validation.png", validation_curves(names))
    if "long-tail" in found:
        counts = sets["long-tail"].counts.cpu().sort(1, descending=True)
        shown = {name: found["long-tail"][name] for name in ("unweighted", "class frequency", ours)}
        run.picture("classes.png", class_bars(shown, counts.values[0].tolist(), counts.indices.tolist()))


def draw_for(knobs: Config, examples: Examples, problem: Problem) -> Drawn:
    return draw(
        examples,
        problem,
        repeats=knobs.repeats,
        imbalance=knobs.imbalance,
        noise=knobs.noise,
        meta_per_class=knobs.meta_per_class,
        validation_per_class=knobs.validation_per_class,
        test_per_class=knobs.test_per_class,
        seed=knobs.seed,
    )


def check_model(knobs: Config, examples: Examples) -> None:
    fits = knobs.model == "mlp" or (examples.image is not None and examples.image[1:] == (32, 32))
    require(fits, f"--model {knobs.model} takes images of 32 x 32; {examples.name} has none. Use --model mlp.")


def classifier(knobs: Config, examples: Examples) -> Callable[[], nn.Module]:
    """Makes one with random parameters."""
    if knobs.model == "resnet32":
        assert examples.image is not None
        return partial(ResNet32, examples.num_classes, examples.image[0])
    return partial(Mlp, examples.features.shape[1], knobs.hidden, examples.num_classes)


def candidates(knobs: Config, examples: Examples, problem: Problem, drawn: Drawn) -> dict[str, ClassifierTraining]:
    """Baselines, then the weight nets; all start from the same classifiers and make the same number of steps.

    The weight net sees the meta set. What that set is worth by itself, the baselines on it and with it tell.
    """
    make, joint = classifier(knobs, examples), drawn.with_meta()
    inputs: Inputs = knobs.long_tail_inputs if problem == "long-tail" else "loss"

    def train(rule: Rule, sets: Drawn) -> ClassifierTraining:
        return ClassifierTraining(make, sets, rule, knobs.settings, inputs)

    rules: dict[str, Rule] = {"unweighted": "unweighted", "focal loss": "focal"}
    if problem == "long-tail":
        rules["class frequency"] = "class-frequency"
    found = {name: train(rule, drawn) for name, rule in rules.items()}
    found["meta set alone"] = train("unweighted", drawn.meta_alone())
    found |= {f"{name}, + meta set": train(rule, joint) for name, rule in rules.items() if name != "focal loss"}
    for method in knobs.methods:
        name = "weight net" if len(knobs.methods) == 1 else f"weight net, {method}"
        found |= {name: train(method, drawn), f"{name}, + meta set": train(method, joint)}
    return found


def describe(drawn: Drawn) -> str:
    """The sizes of the first repeat."""
    counts = sorted(drawn.counts[0].tolist(), reverse=True)
    wrong = 100 * (1 - drawn.clean[0].float().mean().item())
    return (
        f"{drawn.train.shape[1]} training examples ({counts[0]} of the largest class, {counts[-1]} of the smallest, "
        f"{wrong:.0f} % wrong labels), {drawn.meta.shape[1]} meta, {drawn.validation.shape[1]} validation, "
        f"{drawn.test.shape[1]} test"
    )


def first_name(knobs: Config) -> str:
    """Of the weight net that the pictures show."""
    return "weight net" if len(knobs.methods) == 1 else f"weight net, {knobs.methods[0]}"


def summary(name: str, row: Row) -> Row:
    """One line of the table: means over the repeats, and the standard deviation of the test accuracy."""
    line = {
        "rule": name,
        "test": mean(row["test_last"]),
        "+-": pstdev(row["test_last"]),
        "test, stopped": mean(row["test_stopped"]),
        "validation": mean(row["validation_last"]),
    }
    return line if row["auc"] is None else {**line, "AUC of true labels": mean(row["auc"])}


if __name__ == "__main__":
    sys.exit(main("reweighting", sys.argv[1:], Config, story))
