"""``python -m applications.few_shot``: few-shot classification by implicit MAML and its relatives."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

import bilevel as bl
from applications.few_shot import data, guard, train
from applications.few_shot.config import PRESETS, Config
from applications.few_shot.data.folder import PARTS
from applications.few_shot.methods import fixed_at_zero, rehearse
from applications.few_shot.train import TRAINING, Session
from applications.few_shot.trained import seen_in_training, start_of
from applications.few_shot.tuning import tunable
from applications.frame import command
from applications.frame.command import Subcommand, require
from applications.frame.run import Run

NAME = "few_shot"


def main(arguments: list[str]) -> int:
    """Run the command; ``train`` may be said, and is what it does."""
    rest = arguments[1:] if arguments[:1] == ["train"] else arguments
    return command.main(NAME, rest, Config, story, tunable, PRESETS, SUBCOMMANDS)


def story(config: Config, run: Run) -> None:
    """Train, draw how it went, and evaluate on held-out tasks."""
    ranks = bl.distributed.world_size()
    require(config.tasks >= ranks, f"--tasks is {config.tasks} for {ranks} ranks: each needs a task. Start fewer.")
    if run.settings:
        rehearse(config, run.settings)
    file = train.checkpoint_file(run.folder)
    start = None if run.folder.has_checkpoint(file) else start_of(config)
    session = Session.create(config, run.settings, start.put_into if start else None)
    run.restored(session, file)
    if config.data not in data.NAMES:
        run.part("classes", lambda: {part: list(getattr(session.splits, part).names) for part in PARTS})
    title, many = train.describe(config), f", {ranks} ranks" if ranks > 1 else ""
    run.say(f"{title}: {config.tasks} tasks a step on {session.device}{many}; run folder {run.folder.path}")
    if config.head == "zero" and not fixed_at_zero(config, session.learner.meta):
        run.say(train.NO_HEAD.format(model=config.model))
    if start and (seen := seen_in_training(start, config, session.splits.test)):
        run.say(f"{seen} of the test classes were training classes of {config.start}: the accuracy will be too good.")
    show = ("loss", "accuracy")
    run.train(TRAINING, session, show, lambda: train.validation(session), config.validate_every, file, config.clock)
    if run.leads:
        from applications.few_shot import plots

        rows = run.metrics(TRAINING)
        run.picture("learning_curve.png", plots.learning_curve(rows, title))
        if told := guard.told(rows):
            run.say(told)
        train.report(session, run, run.part("evaluation", lambda: train.evaluation(session)))


def part(module: str, function: str = "command") -> Callable[[list[str]], int]:
    """A function of a module that is imported when it is called: the help waits for no library that draws."""

    def run(words: list[str]) -> int:
        code: int = getattr(importlib.import_module(f"applications.few_shot.{module}"), function)(words)
        return code

    return run


def compare(words: list[str]) -> int:
    """The methods at one equal budget, each by this command."""
    from applications.few_shot import compare

    return compare.command(words, main)


SUBCOMMANDS = {
    "evaluate": Subcommand("RUN | --trained NAME [options]", "accuracy on held-out tasks", part("evaluation")),
    "export": Subcommand(
        "RUN [RUN ...] NAME", "the network of a run, or the mean of several, as one file", part("evaluation", "export")
    ),
    "hours": Subcommand("RUN [RUN ...] PICTURE.png", "validation accuracy against hours of training", part("hours")),
    "compare": Subcommand("[options]", "the methods at one equal budget", compare),
    "papers": Subcommand("", "the commands of the papers' settings, and what they need", part("papers")),
    "gradients": Subcommand("[options]", "error of the meta-gradient against inner steps", part("gradients")),
    "benchmark": Subcommand(
        "[options]", "memory and time of a meta-gradient against inner steps", part("benchmark", "main")
    ),
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
