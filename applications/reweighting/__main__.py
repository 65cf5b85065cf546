"""``python -m applications.reweighting``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from statistics import mean, pstdev
from typing import Any

from applications.frame.command import main
from applications.frame.data import Examples, load
from applications.frame.device import select_device
from applications.frame.run import Row, Run
from applications.reweighting.drawing import Drawn, Problem
from applications.reweighting.knobs import Config, check_model, draw_for, training
from applications.reweighting.measure import measure
from applications.reweighting.pictures import class_bars, validation_curves, weight_functions
from applications.reweighting.train import ClassifierTraining, Rule
from applications.reweighting.tuning import tunable


def story(knobs: Config, run: Run) -> None:
    """Each problem: every rule of weighting on the same training sets, one table; then the pictures."""
    device, examples = select_device(knobs.device), load(knobs.data, knobs.data_root)
    check_model(knobs, examples)
    sets = {problem: draw_for(knobs, examples, problem).to(device) for problem in knobs.problems}
    found: dict[Problem, dict[str, Row]] = {}
    for problem, drawn in sets.items():
        run.say(f"\n{problem}: {describe(drawn)}")
        found[problem] = {}
        for name, candidate in candidates(knobs, examples, problem, drawn, run.settings).items():
            part = f"{problem}, {name}"
            run.train(part, candidate, show=("loss", "meta_loss"))
            found[problem][name] = run.part(part, partial(measure, candidate, drawn))
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


def candidates(
    knobs: Config, examples: Examples, problem: Problem, drawn: Drawn, settings: Mapping[str, Any]
) -> dict[str, ClassifierTraining]:
    """Baselines, then the weight nets; all start from the same classifiers and make the same number of steps.

    The weight net sees the meta set. What that set is worth by itself, the baselines on it and with it tell.

    Args:
        settings: see `training`.
    """
    joint = drawn.with_meta()

    def train(rule: Rule, sets: Drawn) -> ClassifierTraining:
        return training(knobs, examples, problem, sets, rule, settings)

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
    """The name of the weight net that the pictures show."""
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
    sys.exit(main("reweighting", sys.argv[1:], Config, story, tunable))
