"""``compare``: the methods side by side at one equal budget, several seeds each, as a table and a picture.

A budget of minutes is turned into meta-steps first: a step of each method is timed, the methods in turn, so that what
else the machine does meets all of them alike. The trainings go by steps, which other programs do not make fewer.

Every training is a run folder of its own below ``--out``. The same command goes on where it was interrupted.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from applications.few_shot.config import Config, Method
from applications.few_shot.hours import validations
from applications.few_shot.train import METHOD_NAMES, Session, one_step
from applications.few_shot.trained import options
from applications.frame.command import PLACE, parse, require, require_at_least_one, require_each_once
from applications.frame.errors import UserError
from applications.frame.figures import png
from applications.frame.measurement import one_writer
from applications.frame.names import from_bytes
from applications.frame.options import check_folder, check_values, settings_told
from applications.frame.output import forgiving
from applications.frame.run import CLOCKS, markdown
from applications.frame.run_folder import RunFolder, understood

START = Config(data="omniglot", width=64, minutes=60.0, clock="cpu", threads=1, eval_tasks=1000)
"""Settings of all methods where nothing is said: an hour of one core, 5-way 1-shot."""

BUDGET = "budget.json"
"""The meta-steps that the minutes were turned into."""

ROUNDS, TIMED = 10, 0.01
"""A step is timed at so many points of the schedule, for this part of the budget in all."""

Row = dict[str, Any]


@dataclass(frozen=True)
class What:
    """What is compared, beside the configuration that all trainings share."""

    methods: tuple[Method, ...] = ("imaml", "imaml-hf", "maml", "fomaml", "reptile", "prototypical")
    """Methods to compare."""
    seeds: int = 3
    """Trainings of each method, with the seeds from --seed on."""
    validations: int = 6
    """Validations of each training, at equal parts of it; 0: none."""


@dataclass(frozen=True)
class ComparisonConfig(Config, What):
    """Train the methods at one equal budget and evaluate them on the same held-out tasks.

    The budget is --minutes of training each, turned into meta-steps by timing those of each method first, in turn; or
    --steps of each, with --minutes None. The other options are those of train.
    """

    def without_effect(self) -> dict[str, str]:
        """What changes nothing for any of the methods."""
        each = [Config.without_effect(replace(self, method=method)) for method in self.methods]
        found = {name: what for name, what in (each or [{}])[0].items() if all(name in one for one in each)}
        found["validate_every"] = "train, and compare has --validations"
        return found if self.minutes is None else {**found, "steps": "--minutes None"}


def command(arguments: list[str], train: Callable[[list[str]], int]) -> int:
    """Run the trainings that are missing, seed by seed; ``train`` is the command that makes one."""
    parsed = parse(
        ComparisonConfig, arguments, "python -m applications.few_shot compare", start=ComparisonConfig(**vars(START))
    )
    given = [name for name in ("preset", *PLACE[1:]) if getattr(parsed, name) != getattr(START, name)]
    require(not given, f"compare has no --{' and no --'.join(given)}: the same command goes on where it stopped.")
    check_values(parsed)
    require_at_least_one(parsed, "seeds")
    require_each_once(parsed, "methods")
    require(parsed.validations >= 0, f"--validations is {parsed.validations}: it cannot be negative.")
    config = Config(**{field.name: getattr(parsed, field.name) for field in fields(Config)})
    for method in parsed.methods:
        replace(config, method=method).check()
    check_folder(parsed.out, "out")
    place = parsed.out or Path("runs/few_shot-compare")
    with settings_told(parsed), forgiving(), one_writer(place):
        each = _by_steps(replace(config, out=None), parsed.methods, RunFolder(place))
        for seed in range(config.seed, config.seed + parsed.seeds):
            for one in each:
                every = math.ceil(one.steps / parsed.validations) if parsed.validations else 0
                one = replace(one, seed=seed, validate_every=every)
                if (code := _train(one, place / f"{one.method}-{seed}", train)) != 0:
                    return code
                write(place, arguments)
        print(from_bytes((place / "comparison.md").read_bytes()))
    return 0


def _by_steps(config: Config, methods: Sequence[Method], folder: RunFolder) -> list[Config]:
    """The configuration of each method, its budget in meta-steps; they are timed once and kept in the folder.

    Raises:
        UserError: the folder has those of other settings.
    """
    each = [replace(config, method=method) for method in methods]
    if config.minutes is None:
        return each
    asked = replace(config, method=START.method, seed=START.seed)
    known = {"settings": asked.to_json(), "methods": {}}
    if (folder.path / BUDGET).is_file():
        known = folder.read_json(BUDGET)
    with understood(folder.path / BUDGET):
        timed = {name: int(row["steps"]) for name, row in known["methods"].items()}
        settings = Config.from_json(known["settings"])
    if settings.to_json() != asked.to_json():
        raise UserError(f"{folder.path} has trainings with other settings. Take another --out.")
    missing = [one for one in each if one.method not in timed]
    for one, seconds in zip(missing, time_steps(missing, 60 * config.minutes), strict=True):
        timed[one.method] = max(1, round(60 * config.minutes / seconds))
        known["methods"][one.method] = {"seconds": seconds, "steps": timed[one.method]}
        print(f"{METHOD_NAMES[one.method]}: {seconds:.3g} s a meta-step, {timed[one.method]} in the budget", flush=True)
    if missing:
        folder.write_json(BUDGET, known)
    return [replace(one, steps=timed[one.method], minutes=None) for one in each]


def time_steps(configs: Sequence[Config], budget: float) -> list[float]:
    """Seconds of a meta-step of each configuration, by its clock.

    They are timed in turn, at points spread over the schedule, since steps may grow late in it.

    Args:
        budget: seconds of a training, of which timing takes `TIMED` for each.
    """
    sessions = [Session.create(replace(config, minutes=None)) for config in configs]
    means: list[list[float]] = [[] for _ in sessions]
    for session in sessions:
        one_step(session, session.sampler("train"), 0.0)  # the first allocates
    for part in range(ROUNDS):
        for session, found in zip(sessions, means, strict=True):
            now, sampler, steps = CLOCKS[session.config.clock], session.sampler("train"), 0
            session.step, begin = round(part / ROUNDS * session.config.steps), now()
            while steps == 0 or now() - begin < TIMED * budget / ROUNDS:
                one_step(session, sampler, session.config.lr)
                steps += 1
            found.append((now() - begin) / steps)
    return [statistics.mean(found) for found in means]


def _train(config: Config, folder: Path, train: Callable[[list[str]], int]) -> int:
    """Make the run, or go on with it; 0 at once where it is done, with these settings."""
    begun = (folder / "config.json").is_file()
    if begun and (folder / "evaluation.json").is_file():
        kept = Config.from_json(RunFolder.open(folder).read_json("config.json"))
        if kept.to_json() != config.to_json():
            raise UserError(f"{folder} is a run with other settings. Take another --out.")
        return 0
    place: list[Any] = ["--threads", config.threads, "--device", config.device]
    place += ["--data-root", config.data_root] if config.data_root is not None else []
    where = ["--resume" if begun else "--out", folder]
    return train([str(word) for word in ["train", *options(config), *place, *where]])


def write(place: Path, arguments: list[str]) -> None:
    """Table, figures and picture of the runs that are done: ``comparison.md``, ``.json`` and ``.png``."""
    runs = []
    for path in sorted(place.glob("*/evaluation.json")):
        with understood(path.parent):
            runs.append(read(path.parent))
    rows = summary(runs)
    folder = RunFolder(place)
    call = " ".join(["python -m applications.few_shot compare", *arguments])
    folder.write_json("comparison.json", {"command": call, "runs": runs, "methods": rows})
    folder.write_text("comparison.md", f"    {call}\n\n{markdown(rows)}")
    folder.write_bytes("comparison.png", draw(runs))


def read(path: Path) -> Row:
    """What the table needs of a run that is done."""
    folder = RunFolder.open(path)
    config = Config.from_json(folder.read_json("config.json"))
    records = [record for record in folder.metrics() if "loss" in record]
    name = METHOD_NAMES[config.method]
    accuracy = {}
    for label, found in folder.read_json("evaluation.json").items():
        if label.startswith(f"{name}, "):
            accuracy[label.removeprefix(f"{name}, ").split(":")[0]] = {key: found[key] for key in ("mean", "interval")}
    return {
        "method": config.method,
        "seed": config.seed,
        "steps": records[-1]["step"],
        "hours": records[-1]["seconds"] / 3600,
        "tasks": config.eval_tasks,
        "left_out": sum(record.get("left_out", 0) for record in records),
        "accuracy": accuracy,
        "validation": validations(records),
    }


def summary(runs: list[Row]) -> list[Row]:
    """A row for each method: the mean over its seeds, and the lowest and highest, in percent."""
    rows = []
    for method in METHOD_NAMES:
        own = [run for run in runs if run["method"] == method]
        if not own:
            continue
        row: Row = {"method": METHOD_NAMES[method], "seeds": len(own)}
        for name in own[0]["accuracy"]:
            means = [run["accuracy"][name]["mean"] for run in own]
            row[f"{name} (%)"] = f"{statistics.mean(means):.2f} ({min(means):.2f} to {max(means):.2f})"
        row["meta-steps"] = round(statistics.mean(run["steps"] for run in own))
        row["hours"] = f"{statistics.mean(run['hours'] for run in own):.2f}"
        rows.append(row)
    return rows


def draw(runs: list[Row]) -> bytes:
    """Validation accuracy against minutes of training, a colour for each method and a line for each seed: a PNG."""
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    colours: dict[str, Any] = {}
    for run in runs:
        method, points = run["method"], run["validation"]
        if not points:
            continue
        label = None if method in colours else METHOD_NAMES[method]
        minutes, accuracy = [60 * hours for hours, _ in points], [value for _, value in points]
        (line,) = axis.plot(minutes, accuracy, ".-", color=colours.get(method), label=label, linewidth=1)
        colours.setdefault(method, line.get_color())
    axis.set(xlabel="minutes of training", ylabel="accuracy on validation classes (%)")
    if colours:
        axis.legend(frameon=False, loc="lower right", fontsize=8)
    return png(figure)
