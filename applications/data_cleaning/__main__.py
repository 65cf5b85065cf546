"""``python -m applications.data_cleaning``: find wrong labels, drop them, and see what that was worth."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from typing import TypedDict

import torch
from torch import Tensor

from applications.data_cleaning import curves, pictures
from applications.data_cleaning.cleaning import Cleaning
from applications.data_cleaning.knobs import Config
from applications.data_cleaning.model import Model
from applications.data_cleaning.scores import agreement, detection, kept
from applications.data_cleaning.task import Task, make_task
from applications.data_cleaning.tuning import tunable
from applications.frame.command import main
from applications.frame.data import load
from applications.frame.run import Row, Run

Scores = dict[str, dict[str, float]]


class Found(TypedDict):
    """By name: test accuracies in percent, and how well wrong labels were found."""

    accuracy: dict[str, float]
    found: Scores


def story(knobs: Config, run: Run) -> None:
    """The cleaning of each seed beside its baselines, and the two tables over all seeds."""
    examples = load(knobs.data, knobs.data_root)
    if knobs.setting == "stochastic":
        num_train = 20_000 if knobs.data == "mnist" and knobs.num_train is None else knobs.num_train
        task = make_task(examples, num_train, knobs.num_val, knobs.noise, knobs.seed)
        curves.compare(run, Model.make("softmax", task, 0, knobs.ridge, knobs.seed), task, knobs.lr, knobs.seconds)
        return
    tasks = {
        seed: make_task(examples, knobs.num_train, knobs.num_val, knobs.noise, seed)
        for seed in range(knobs.seed, knobs.seed + knobs.repeats)
    }
    first = tasks[knobs.seed]
    run.say(
        f"{examples.name}: {len(first.train)} training examples, {int(first.wrong.sum())} of their labels wrong; "
        f"{len(first.val)} clean ones to validate on, {len(first.test)} for the test."
    )
    accuracies: list[dict[str, float]] = []
    detections: list[Scores] = []
    for seed, task in tasks.items():
        model = Model.make(knobs.model, task, knobs.hidden, knobs.fit_ridge, seed)
        baselines = run.part(f"baselines, seed {seed}", partial(baseline_scores, model, task))
        cleaning = Cleaning(replace(model, ridge=knobs.ridge), task, knobs.steps, knobs.lr, run.settings)
        run.train(f"cleaning, seed {seed}", cleaning, show=("val_loss", "f1"))
        cleaned = run.part(f"cleaned, seed {seed}", partial(cleaned_scores, model, task, cleaning.weights.detach()))
        accuracies.append(baselines["accuracy"] | cleaned["accuracy"])
        detections.append(baselines["found"] | cleaned["found"])
        if seed == knobs.seed:
            draw(run, cleaning, run.metrics(f"cleaning, seed {seed}"), accuracies[0])
    report(run, accuracies, detections)


def baseline_scores(model: Model, task: Task) -> Found:
    """What is had without a hypergradient, and what could be had at best."""
    by_val = model.fit(task.val)
    trust = agreement(model, by_val, task.train)
    fits = {
        "noisy labels": model.fit(task.train),
        "noisy labels and validation data": model.fit(task.train + task.val),
        "validation data only": by_val,
        "oracle: right labels and validation data": model.fit(task.train[~task.wrong] + task.val),
        "dropped: validation model disagrees": model.fit(kept(task, trust)),
    }
    return {
        "accuracy": {name: model.accuracy(params, task.test) for name, params in fits.items()},
        "found": {"validation model disagrees": detection(trust, task.wrong)},
    }


def cleaned_scores(model: Model, task: Task, weights: Tensor) -> Found:
    """Fits to the weighted training examples, and to those that were not found wrong."""
    fits = {
        "hyper-cleaning: weighted": model.fit(task.train, weights),
        "hyper-cleaning: weighted, and validation data": model.fit(
            task.train + task.val, torch.cat([weights, torch.ones(len(task.val))])
        ),
        "hyper-cleaning: dropped, and validation data": model.fit(kept(task, weights)),
    }
    return {
        "accuracy": {name: model.accuracy(params, task.test) for name, params in fits.items()},
        "found": {"hyper-cleaning": detection(weights, task.wrong)},
    }


def draw(run: Run, cleaning: Cleaning, records: list[Row], accuracy: dict[str, float]) -> None:
    weights = cleaning.weights.detach()
    grid = pictures.found_wrong(cleaning.task, weights)
    if grid is not None:
        run.picture("found_wrong.png", grid)
    run.picture("progress.png", pictures.progress(records, weights, cleaning.task.wrong, accuracy))


def report(run: Run, accuracies: list[dict[str, float]], detections: list[Scores]) -> None:
    """Means over the seeds, with the lowest and the highest."""
    seeds = "" if len(accuracies) == 1 else f", mean of {len(accuracies)} seeds"
    rows: list[Row] = []
    for name in accuracies[0]:
        found = [accuracy[name] for accuracy in accuracies]
        rows.append({"fitted to": name, "accuracy": mean(found), "lowest": min(found), "highest": max(found)})
    run.table(f"Test accuracy (%){seeds}", rows)
    rows = []
    for name in detections[0]:
        scores = {key: mean([detected[name][key] for detected in detections]) for key in detections[0][name]}
        rows.append({"method": name, **scores, "lowest F1": min(detected[name]["F1"] for detected in detections)})
    run.table(f"Wrong labels found{seeds}", rows)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    sys.exit(main("data_cleaning", sys.argv[1:], Config, story, tunable))
