"""All commands of the applications, their options, and the smallest size in which each does its work."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

RUN, OUT, DATA = "RUN", "OUT", "DATA"
"""Stand for the folder of a finished run of few-shot learning, one to write into, and one of data."""


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


HERE = ("--data-root", DATA)
FEW = "--steps 12 --ways 2 --queries 2 --eval-tasks 2 --eval-queries 2 --validate-every 6 --threads 1"
SMALL = {
    "few_shot": words(f"--width 8 --tasks 2 --inner-steps 2 {FEW}"),
    "data_cleaning": words("--repeats 1 --steps 6"),
    "search": words("--data iris --candidates 2"),
    "distillation": words("--network linear --steps 2 --batch 32 --repeats 1 --full-steps 2"),
    "reweighting": words("--problems noise --repeats 1 --steps 8 --warm-up 2 --hidden 8 --test-per-class 10"),
    "equilibrium": words("--data wine --width 8 --epochs 1 --runs 1 --batch-size 40 --depths 2"),
    "learned_optimizer_settings": words(
        "--data iris --steps 6 --hidden 4 --outer-steps 4 --networks 2 --points 3 --windows 2 --fresh 3"
    ),
    "regularization": words("--problem features --data iris --train 40 --validation 40 --steps 2"),
    "sparse_regression": words("--data diabetes --noise-features 0 --folds 1 --draws 1 --evaluations 4 --block-size 4"),
    "domain_weights": words(
        "--methods implicit --steps 4 --learn-steps 6 --warm-up 2 --every 2 --mixtures 1 --short-steps 2 --context 8 "
        "--width 8 --heads 2 --layers 1 --batch 4 --outer-batch 2"
    ),
    "influence": words("--num-train 60 --num-queries 10 --subsets 3 --hidden 3 --decay 0.05"),
    "measurements.attribution": words("--num-train 60 --num-queries 10 --subsets 3 --hidden 3 --decay 0.05"),
    "measurements.advice": words("--problems ridge --limit 0.01"),
    "measurements.benchmarks": words("--workloads D-penalties --only bilevel --rounds 1 --runs 1 --timeout 5"),
    "measurements.compare": words("--sizes 1 --seconds 0.05"),
    "measurements.gpu": words("--device cpu --parts linear --minutes 0.05"),
    "measurements.hypergradients": words("--problems 1 --size 2 --python python"),
    "measurements.method_table": words("--precision float64"),
    "measurements.scaling": words(
        "--tasks 1 --widths 16 --inner-steps 2 --penalties 1 --ranks 1 --floats 10 --examples 60 --features 5 "
        "--repeats 1"
    ),
    "measurements.stochastic_curves": words("--seconds 0.01"),
    "measurements.tolerances": words("--precision float64"),
}
"""A command, and options with which it takes a second or a few."""

SUBCOMMANDS = {
    "few_shot evaluate": ("few_shot.evaluation", "EvaluationConfig", (RUN, *HERE)),
    "few_shot compare": (
        *("few_shot.compare", "ComparisonConfig"),
        (*SMALL["few_shot"], *words("--minutes None --methods fomaml --seeds 1"), *HERE),
    ),
    "few_shot gradients": ("few_shot.gradients", "Config", words("--size 2 --tasks 1 --steps 1")),
    "few_shot benchmark": (
        *("few_shot.benchmark", "Benchmark"),
        words(f"--repeats 1 --inner-steps 1 --methods fomaml --config.width 8 --config.data-root {DATA}"),
    ),
    "data_cleaning tune": ("frame.tune.command", "Config", words("--repeats 1 --trials 1 --seconds 0.01")),
}
"""Their module, what the dataclass of their options is called, and options as in `SMALL`."""
COMMANDS = (*SMALL, *SUBCOMMANDS)
WORDS = ("evaluate", f"evaluate {RUN}", "evaluate --trained", "export", "hours", f"hours {RUN}", "papers")
"""Commands of few-shot learning that take a name or a folder as their next word, and some a second one."""


@dataclass(frozen=True)
class Tried:
    """A command line but for one value: ``option=value`` at its end, or the value alone where ``option`` is empty."""

    before: tuple[str, ...]
    option: str
    after: tuple[str, ...] = ()

    def line(self, value: str) -> list[str]:
        return [*self.before, f"{self.option}={value}" if self.option else value, *self.after]


def all_tried(command: str) -> Iterator[Tried]:
    """Every option of one of the `COMMANDS`; with those of ``few_shot`` the words that its other commands take."""
    application, _, word = command.partition(" ")
    place, name, small = SUBCOMMANDS.get(command) or (
        f"{application}.__main__",
        "Config",
        (*SMALL[application], *(HERE if application == "few_shot" else ())),
    )
    for option in _options(getattr(importlib.import_module(f"applications.{place}"), name)):
        yield Tried(_placed((*([word] if word else []), *small), option), option)
    for before in WORDS if command == "few_shot" else ():
        yield Tried(words(before), "", words("a.png") if before in ("export", "hours") else ())


def _placed(line: tuple[str, ...], option: str) -> tuple[str, ...]:
    return line if option == "--out" or "--python" in line else (*line, "--out", OUT)


def _options(kind: Any, prefix: str = "") -> Iterator[str]:
    for field in fields(kind):
        name = f"{prefix}{field.name.replace('_', '-')}"
        if is_dataclass(field.default):
            yield from _options(type(field.default), f"{name}.")
        else:
            yield f"--{name}"
