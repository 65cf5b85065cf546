"""``python -m applications.few_shot``: few-shot classification by implicit MAML and its relatives."""

from __future__ import annotations

import sys

import bilevel as bl
from applications.few_shot import benchmark, compare, evaluation, gradients, guard, hours, papers, plots, train
from applications.few_shot.config import PRESETS, Config
from applications.few_shot.methods import fixed_at_zero
from applications.few_shot.train import TRAINING, Session
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
    strength = run.settings.get("strength", config.strength)
    require(strength > 0, f"--solver has a strength of {strength}: a positive number is needed.")
    session = Session.create(config, run.settings)
    title, many = train.describe(config), f", {ranks} ranks" if ranks > 1 else ""
    run.say(f"{title}: {config.tasks} tasks a step on {session.device}{many}; run folder {run.folder.path}")
    if config.head == "zero" and not fixed_at_zero(config, session.learner.meta):
        run.say(train.NO_HEAD.format(model=config.model))
    show = ("loss", "accuracy")
    file = train.checkpoint_file(run.folder)
    run.train(TRAINING, session, show, lambda: train.validation(session), config.validate_every, file)
    if run.leads:
        rows = run.metrics(TRAINING)
        run.picture("learning_curve.png", plots.learning_curve(rows, title))
        if told := guard.told(rows):
            run.say(told)
        train.report(session, run, run.part("evaluation", lambda: train.evaluation(session)))


SUBCOMMANDS = {
    "evaluate": Subcommand("RUN | --trained NAME [options]", "accuracy on held-out tasks", evaluation.command),
    "export": Subcommand("RUN NAME", "the network of a run as one small file", evaluation.export),
    "hours": Subcommand("RUN [RUN ...] PICTURE.png", "validation accuracy against hours of training", hours.command),
    "compare": Subcommand("[options]", "the methods at one equal budget", lambda words: compare.command(words, main)),
    "papers": Subcommand("", "the commands of the papers' settings, and what they need", papers.command),
    "gradients": Subcommand("[options]", "error of the meta-gradient against inner steps", gradients.command),
    "benchmark": Subcommand("[options]", "memory and time of a meta-gradient against inner steps", benchmark.main),
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
