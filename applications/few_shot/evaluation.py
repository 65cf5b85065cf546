"""``evaluate`` and ``export``: the accuracy of a network on held-out tasks of any setting, and its file."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from applications.few_shot import backbone, data, evaluate
from applications.few_shot.config import Config
from applications.few_shot.methods import rehearse
from applications.few_shot.train import METHOD_NAMES, create_learner, create_sampler, describe, set_up_device
from applications.few_shot.trained import NETWORK, SHIPPED, Trained, seen_in_training
from applications.frame.command import Purposes, parse, require, tell_replaced
from applications.frame.errors import UserError
from applications.frame.options import check_folder, check_values, settings_told
from applications.frame.output import forgiving
from applications.frame.run import SOLVER
from applications.frame.run_folder import RunFolder, as_json
from applications.frame.tune import read_settings

NUM_TASKS = 1000
"""That a trained network is evaluated on where nothing is said."""

USAGE = """\
usage: python -m applications.few_shot evaluate RUN [options]              the last checkpoint of a run
       python -m applications.few_shot evaluate --trained NAME [options]   a shipped network, or a file of `export`

Accuracy on held-out tasks, transductive and not. Options are those of train, such as --ways 20 --shots 5
--split alphabets --eval-tasks 1000, and
  --classes {test,validation,train}   the classes that tasks are made of (default: test)
  --out DIR                     where the figures go, in place of the run's folder; --solver FILE, other solvers
  --baselines                   the untrained network and classifiers of pixels too
"""


TRAINING_ONLY = (
    *("head", "learn_strength", "cg_steps", "steps", "late_from", "late_inner_steps", "late_cg_steps"),
    *("distort", "tasks", "lr", "schedule", "clip", "average", "minutes", "clock", "capture", "validate_every"),
)
"""Knobs that change nothing of an evaluation, beside the queries."""


@dataclass(frozen=True)
class What:
    """What is evaluated, beside the configuration."""

    trained: str | None = None
    """Name of a shipped network, or a file that `export` wrote."""
    classes: Literal["test", "validation", "train"] = "test"
    """The classes that the tasks are made of."""
    baselines: bool = False
    """Evaluate the untrained network and classifiers of pixels too."""


@dataclass(frozen=True)
class _Said:
    """Code that may be run, since the command names it."""

    model: str | None = None
    backbone: str | None = None


@dataclass(frozen=True)
class EvaluationConfig(Config, What):
    """Evaluate a network on held-out tasks.

    The defaults are those of its training, which --help shows behind RUN or --trained NAME; without a network, it shows
    those of train.
    """

    def only_for(self) -> Purposes:
        """See `Knobs`."""
        queries = "training; of an evaluation, it is --eval-queries"
        products = () if self.method == "imaml-hf" else ("hessian",)
        training = (False, (*TRAINING_ONLY, *products))
        return {**super().only_for(), "training": training, queries: (False, ("queries",))}


def command(arguments: list[str]) -> int:
    """``evaluate``; of a run, the figures are written beside it under a name of their own."""
    call = "python -m applications.few_shot evaluate"
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE)
        parse(EvaluationConfig, ["--help"], f"{call} RUN | --trained NAME")
    require(bool(arguments), f"{call} needs the folder of a run as its first word, or --trained NAME.")
    run, rest = (None, arguments) if arguments[0].startswith("-") else (Path(arguments[0]), arguments[1:])
    what, _ = tyro.cli(What, args=rest, return_unknown_args=True, add_help=False)
    check_values(what)
    said, _ = tyro.cli(_Said, args=rest, return_unknown_args=True, add_help=False)
    if (run is None) == (what.trained is None):
        raise UserError(f"{call} takes the folder of a run or --trained NAME: one of them.")
    trained = Trained.from_run(run) if run is not None else Trained.load(what.trained or "")
    trained = replace(trained, trusted=(said.model, said.backbone))
    trained.refuse_code()
    strength = trained.chosen.get("strength", trained.config.strength)
    start = replace(trained.config, threads=None, strength=strength)
    if run is None:
        queries = Config().eval_queries if start.data in data.NAMES else start.eval_queries
        start = replace(start, eval_tasks=NUM_TASKS, eval_queries=queries)
    parsed = parse(
        EvaluationConfig, rest, f"{call} {run or '--trained'}", start=EvaluationConfig(**{**vars(start), **vars(what)})
    )
    config = Config(**{field.name: getattr(parsed, field.name) for field in fields(Config)})
    same = config.preset == start.preset and config.resume is None and config.start == start.start
    why = "evaluate has no --preset, no --resume and no --start: give the settings that are to change by themselves."
    require(same, why)
    other = [name for name in NETWORK if getattr(config, name) != getattr(start, name)]
    require(not other, f"--{' and --'.join(other)}: evaluate takes the network as it was trained. Leave it out.")
    shapes = [f"[{channels}, {size}, {size}]" for channels, size in (config.image_shape, start.image_shape)]
    require(
        config.image_shape == start.image_shape,
        f"The images of {config.data} are {shapes[0]}, and the network was trained on {shapes[1]}: give it images of "
        "that shape (of a folder: --grey, --image-size), or train one on these.",
    )
    check_values(config)
    config.check()
    check_folder(config.out, "out")
    asked = {} if config.strength == start.strength else {"strength": config.strength}
    if config.solver:
        trained = replace(trained, chosen=read_settings(config.solver, config.solver_settings, "few_shot"))
        asked |= trained.chosen
        rehearse(config, {name: setting for name, setting in trained.chosen.items() if name != "hypergrad"})
        tell_replaced(parsed, start, trained.chosen)
    else:
        kept = {name: setting for name, setting in trained.chosen.items() if name != "strength"}  # which can be changed
        tell_replaced(parsed, start, kept, "of its training's --solver stands in its place; give another --solver")
    if "strength" in asked:
        trained = trained.at_strength(asked["strength"])
    with settings_told(config), forgiving():
        found = figures(trained, config, what)
        tell(found, config)
        place = config.out or run
        if place is not None:
            print(f"The figures are in {write(RunFolder(place), found, 'evaluation' if config.out else None)}")
        if config.out and trained.chosen:
            RunFolder(config.out).write_settings(SOLVER, trained.chosen)
    return 0


def figures(trained: Trained, config: Config, what: What) -> dict[str, Any]:
    """Accuracy of a trained network in the setting of ``config``, with what a reader needs to trust it.

    Returns:
        Plain values for a JSON file: the setting, ``accuracy`` (name -> mean, interval and tasks, percent), ``seconds``
        and ``seen_in_training``, how many of the classes were training classes of the network: 0 on its own split.
    """
    begin, device = time.perf_counter(), set_up_device(config)
    splits = backbone.splits(config)
    classes = getattr(splits, what.classes)
    learner = replace(trained.learner(config.ways, device, config.precision), config=config)
    method = METHOD_NAMES[config.method]
    classifiers = {f"{method}, {name}": classify for name, classify in evaluate.settings(learner)}
    if what.baselines:
        name, classify = next(iter(evaluate.settings(create_learner(config, splits.train, device))))
        classifiers |= {f"the same before training, {name.split(':')[0]}": classify, **evaluate.baselines(config)}
    sampler = create_sampler(config, classes, what.classes, config.eval_queries, device)
    found = evaluate.measure(classifiers, sampler, config.eval_tasks, progress=True)
    return {
        "data": config.data,
        "split": config.split,
        "classes": what.classes,
        "ways": config.ways,
        "shots": config.shots,
        "queries": config.eval_queries,
        "inner_steps": learner.for_evaluation().inner_solver().max_steps,
        "seen_in_training": seen_in_training(trained, config, classes),
        "num_classes": len(classes),
        "trained": trained.origin,
        "seconds": round(time.perf_counter() - begin, 1),
        "accuracy": {name: vars(accuracy) for name, accuracy in found.items()},
    }


def tell(found: dict[str, Any], config: Config) -> None:
    """Print the figures."""
    origin, accuracy = found["trained"], found["accuracy"]
    print(f"Trained for {origin['steps']} meta-steps, {origin['hours']:.2f} hours: {origin['command']}")
    if "solver" in origin:
        print(f"Its --solver: {', '.join(f'{name} = {setting}' for name, setting in origin['solver'].items())}")
    setting = f"{config.eval_tasks} held-out tasks, {describe(config)}, {found['classes']} classes"
    print(f"Accuracy on {setting} (mean +- 95 % interval):")
    for name, row in accuracy.items():
        print(f"  {name:{max(map(len, accuracy))}}  {evaluate.Accuracy(**row)}")
    if found["seen_in_training"]:
        print(
            f"{found['seen_in_training']} of the {found['num_classes']} classes were training classes of this network: "
            "these figures are too good. Its own test has the same --split, --seed and --held-out, and the same "
            "folders of images."
        )
    print(f"{found['seconds']:.0f} seconds")


def write(folder: RunFolder, found: dict[str, Any], stem: str | None = None) -> Path:
    """Write the figures into a folder and return their file: a new one, whatever is there already."""
    split = f"{found['split']}-" if found["data"] == "omniglot" else ""
    setting = f"{found['ways']}way-{found['shots']}shot-{split}{found['classes']}"
    stem = stem or f"evaluation-step-{found['trained']['steps']}-{setting}"
    names = (f"{stem}{number}.json" for number in itertools.chain([""], (f"-{count}" for count in itertools.count(2))))
    return folder.write_new(names, as_json(found))


def export(arguments: list[str]) -> int:
    """``export RUN [RUN ...] FILE.pt``: the network that a run evaluates, or the mean of several, as one file."""
    if len(arguments) < 2 or arguments[0].startswith("-"):
        print(
            "usage: python -m applications.few_shot export RUN [RUN ...] FILE.pt   (or a NAME, to ship it with this "
            "checkout). Of several runs, or files of networks, the mean."
        )
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    *sources, name = arguments
    path = Path(name)
    there = "is there already and no network" if path.exists() and path.suffix != ".pt" else ""
    odd = "is neither" if path.suffix not in ("", ".pt") or (len(path.parts) != 1 and path.suffix != ".pt") else ""
    require(
        not (there or odd),
        f"export ends with the file to write, FILE.pt, or with a NAME to ship it by, and {name} {there or odd}. Is it "
        "missing?",
    )
    if len(sources) == 1:
        trained = Trained.from_run(Path(sources[0]))
    else:
        trained = Trained.mean([Trained.load(source) for source in sources])
    if path.suffix != ".pt":
        path = SHIPPED / f"{name}.pt"
    trained.save(path)
    with forgiving():  # the name may have bytes that cannot be printed
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB, {trained.origin['steps']} meta-steps")
    return 0
