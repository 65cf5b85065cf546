"""``python -m applications.few_shot [train | evaluate | export | hours | gradients | benchmark | tune]``."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import tyro

from applications import ranks, tune
from applications.errors import UserError, exit_code
from applications.few_shot import benchmark, evaluation, gradients, hours, train
from applications.few_shot.config import PRESETS, Config
from applications.few_shot.tuning import tunable
from applications.run_folder import RunFolder

USAGE = """\
Few-shot classification by implicit MAML and its relatives.

  python -m applications.few_shot [train] [--preset NAME] [options]   train, then evaluate (the default)
  python -m applications.few_shot train --resume RUN                  go on with an interrupted run
  python -m applications.few_shot evaluate RUN [options]              held-out accuracy of a run
  python -m applications.few_shot evaluate --trained NAME [options]   held-out accuracy of a network that is shipped
  python -m applications.few_shot export RUN NAME                     the network of a run as one small file
  python -m applications.few_shot hours RUN [RUN ...] PICTURE.png     validation accuracy against hours of training
  python -m applications.few_shot gradients [options]                 error of the meta-gradient against inner steps
  python -m applications.few_shot benchmark [options]                 memory and time against inner steps
  python -m applications.few_shot tune [options]                      an Optuna study over the solver settings

Each takes --help. Presets: {presets}.
"""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a run lives and what it starts from."""

    preset: str = "default"
    """Settings to start from; the other options change them."""
    out: Path | None = None
    """Run folder; by default a new one under runs/few_shot."""
    resume: Path | None = None
    """Go on with this run folder, with its settings."""


@dataclasses.dataclass(frozen=True)
class TrainOptions(Config, Place):
    """Train, then evaluate. The defaults are those of the preset, or of the run that is resumed."""


def main(arguments: list[str]) -> int:
    """Run a subcommand; the exit code is 2 for bad input, which is told in one message."""
    commands = {
        "train": run_train,
        "evaluate": evaluation.command,
        "export": evaluation.export,
        "hours": hours.command,
        "gradients": gradients.command,
        "benchmark": benchmark.main,
        "tune": run_tune,
    }
    if arguments[:1] and arguments[0] in ("-h", "--help"):
        print(USAGE.format(presets=", ".join(PRESETS)))
        return 0
    name, rest = (arguments[0], arguments[1:]) if arguments[:1] and arguments[0] in commands else ("train", arguments)
    return exit_code(lambda: commands[name](rest))


def run_train(arguments: list[str]) -> int:
    """The default subcommand."""
    place, _ = tyro.cli(Place, args=arguments, return_unknown_args=True, add_help=False)
    if place.preset not in PRESETS:
        raise UserError(f"There is no preset {place.preset!r}. There are {', '.join(PRESETS)}.")
    start, folder = PRESETS[place.preset], None
    if place.resume is not None:
        folder = RunFolder.open(place.resume)
        start = Config.from_json(folder.read_json("config.json"))
    config = parse(arguments, TrainOptions, {**vars(start), **vars(place)}, "train")
    if folder is not None:
        return train.run(config, folder, resume=True)
    path = place.out or train.default_folder(config)
    if ranks.restarted():  # a rank died: all go on from the last checkpoint, or begin again where there is none
        return train.run(config, RunFolder(path), resume=(path / "checkpoint.pt").exists())
    return train.run(config, RunFolder.new(path) if ranks.leads() else RunFolder(path), resume=False)


def run_tune(arguments: list[str]) -> int:
    """The study; options that are not its own are those of train."""
    return tune.main("few_shot", arguments, lambda rest: tunable(parse(rest, Config, vars(Config()), "tune")))


def parse(arguments: list[str], options: type[Config], start: dict[str, Any], command: str) -> Config:
    """The configuration with the values ``start``, changed by the options."""
    parsed = tyro.cli(
        options, default=options(**start), args=arguments, prog=f"python -m applications.few_shot {command}"
    )
    return Config(**{field.name: getattr(parsed, field.name) for field in dataclasses.fields(Config)})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
