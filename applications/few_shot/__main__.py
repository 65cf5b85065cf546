"""``python -m applications.few_shot``: few-shot classification by implicit MAML and its relatives."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import bilevel as bl
from applications.few_shot import benchmark, plots, train
from applications.few_shot.config import PRESETS, Config
from applications.few_shot.train import Session
from applications.few_shot.tuning import tunable
from applications.frame import command
from applications.frame.command import Subcommand, parse, require
from applications.frame.run import SOLVER, Run, restore, slug
from applications.frame.run_folder import RunFolder
from applications.frame.tune import read_settings

NAME = "few_shot"
TRAINING = "meta-training"
"""The part of the run whose checkpoint is the network."""


def main(arguments: list[str]) -> int:
    """Run the command; ``train`` may be said, and is what it does."""
    rest = arguments[1:] if arguments[:1] == ["train"] else arguments
    return command.main(NAME, rest, Config, story, tunable, PRESETS, SUBCOMMANDS)


def story(config: Config, run: Run) -> None:
    """Train, draw how it went, and evaluate on held-out tasks."""
    ranks = bl.distributed.world_size()
    require(config.tasks >= ranks, f"--tasks is {config.tasks} for {ranks} ranks: each needs a task. Start fewer.")
    session = Session.create(config, run.settings)
    title, many = train.describe(config), f", {ranks} ranks" if ranks > 1 else ""
    run.say(f"{title}: {config.tasks} tasks a step on {session.device}{many}; run folder {run.folder.path}")
    show = ("loss", "accuracy")
    run.train(TRAINING, session, show, lambda: train.validation(session), config.validate_every)
    if run.leads:
        run.picture("learning_curve.png", plots.learning_curve(run.metrics(TRAINING), title))
        train.report(session, run, run.part("evaluation", lambda: train.evaluation(session)))


def evaluate(arguments: list[str]) -> int:
    """Held-out accuracy of a run's network, with its settings or changed ones, in a folder of its own in the run's."""
    call = f"python -m applications.{NAME} evaluate"
    if arguments[:1] in (["-h"], ["--help"]):
        about = "Held-out accuracy of a run's network, by its settings or changed ones, kept below the run or in --out."
        parse(Config, ["--help"], f"{call} RUN", about)
    named = bool(arguments) and not arguments[0].startswith("-")
    require(named, f"{call} needs the folder of a run as its first word.")
    folder, changes = RunFolder.open(Path(arguments[0])), arguments[1:]
    kept = Config.from_json(folder.read_json("config.json"))
    config = parse(Config, changes, f"{call} RUN", start=kept)
    same = config.preset == kept.preset and config.resume is None
    require(same, "evaluate has no --preset and no --resume: give the settings that are to change by themselves.")
    config.check()
    solver = config.solver or folder.path / SOLVER
    settings = read_settings(solver, config.solver_settings, NAME) if config.solver or solver.is_file() else {}
    session = Session.create(config, settings)
    restore(folder, TRAINING, session)
    place = RunFolder(config.out or folder.path / "evaluations" / (slug(" ".join(changes)) or "as-trained"))
    run = Run(place, config.to_json(), f"{call} {shlex.join(arguments)}")
    run.settings = settings
    train.report(session, run, train.evaluation(session))
    return 0


SUBCOMMANDS = {
    "evaluate": Subcommand("RUN [options]", "held-out accuracy of a finished run", evaluate),
    "benchmark": Subcommand("[options]", "memory and time of a meta-gradient against inner steps", benchmark.main),
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
