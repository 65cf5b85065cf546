"""``python -m applications.learned_optimizer_settings``: a learning-rate schedule and a momentum by hypergradients."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from applications.command import Knobs, main, require, require_at_least_one, require_positive
from applications.learned_optimizer_settings import baselines, compare, plots
from applications.learned_optimizer_settings.learn import MOST_POINTS, Learning
from applications.learned_optimizer_settings.networks import Data, Networks
from applications.learned_optimizer_settings.settings import Settings
from applications.run import Run


@dataclass(frozen=True)
class Config(Knobs):
    """Learn the learning rate at a few points of a run, and the momentum, by the validation loss at its end."""

    data: str = "digits"
    """Embedded: digits, breast_cancer, wine, iris. With files: mnist, or a path of an .npz of features and targets."""
    data_root: Path | None = None
    """Folder of MNIST; by default $BILEVEL_DATA, else ~/.cache/bilevel."""
    steps: int = 200
    """Of SGD in a training run."""
    hidden: int = 32
    """Units of the network's hidden layer."""
    batch: int = 32
    """Examples of a mini-batch."""
    points: int = 6
    """Control points of the schedule; it is piecewise linear in the logarithm."""
    start_lr: float = 0.05
    """Learning rate that the schedule starts from."""
    start_momentum: float = 0.9
    """Momentum to start from."""
    hypergrad: Literal["unroll", "checkpoint", "forward"] = "unroll"
    """The same derivative: fastest; with memory of 2 sqrt(steps) steps; with memory of one step."""
    outer_steps: int = 40
    """Steps of Adam on the settings, and trials of each baseline."""
    outer_lr: float = 0.2
    """Learning rate of Adam on the settings, which are logarithms; it falls to 0 like a cosine."""
    networks: int = 4
    """Training runs in each outer step and in each trial; they run side by side."""
    windows: tuple[int, ...] = (20,)
    """Truncated hypergradients to compare with: steps that each one looks ahead."""
    fresh: int = 32
    """Networks, with starts and mini-batches of their own, on which all settings are compared at the end."""

    def check(self) -> None:
        """See `Knobs`."""
        require_at_least_one(self, "hidden", "batch", "outer_steps", "networks")
        require(self.steps >= 2, f"--steps is {self.steps}: at least 2 are needed.")
        require(self.fresh >= 2, f"--fresh is {self.fresh}: at least 2 are needed for a standard error.")
        most = min(self.steps, MOST_POINTS)
        require(1 <= self.points <= most, f"--points is {self.points}: a schedule has 1 to {most} of them here.")
        require_positive(self, "start_lr", "outer_lr")
        require(0 < self.start_momentum < 1, f"--start-momentum is {self.start_momentum}: it lies between 0 and 1.")
        for window in self.windows:
            require(
                1 <= window < self.steps,
                f"--windows has {window}: from 1 to less than the {self.steps} steps of a run make a window.",
            )
        require(len(set(self.windows)) == len(self.windows), "--windows has a number twice: leave one out.")


def story(knobs: Config, run: Run) -> None:
    """Learn, search, compare on fresh networks."""
    data = Data.read(knobs.data, knobs.data_root, knobs.seed)
    networks = Networks(data, knobs.networks, knobs.hidden, knobs.batch)
    run.say(
        f"{knobs.data}: {len(data.train[1])} training, {len(data.validation[1])} validation, {len(data.test[1])} test "
        f"examples. A run is {knobs.steps} steps on mini-batches of {knobs.batch}; each way of choosing the settings "
        f"has {knobs.outer_steps * knobs.networks} runs."
    )

    def start() -> Settings:
        return Settings.constant(knobs.start_lr, knobs.start_momentum, knobs.points)

    # 1. What a hypergradient costs, by methods that give the same one, and by one that does not.
    window = knobs.windows[0] if knobs.windows else max(1, compare.COST_STEPS // 5)
    costs = run.part("costs", lambda: compare.costs(networks, start(), min(window, compare.COST_STEPS), knobs.seed))
    run.table(f"One hypergradient through {compare.COST_STEPS} full-batch steps of {knobs.networks} networks", costs)

    # 2. Learn: through whole runs, and through windows.
    found: dict[str, dict[str, Any]] = {"start": numbers(start(), knobs.steps)}
    seconds: dict[str, float | None] = {"start": None}
    learned = {f"window of {steps}": steps for steps in knobs.windows} | {"learned": None}
    for name, steps in learned.items():
        settings = start()
        learning = Learning(
            networks, settings, knobs.steps, knobs.outer_steps, knobs.outer_lr, knobs.seed, knobs.hypergrad, steps
        )
        seconds[name] = run.train(name, learning)
        found[name] = numbers(settings, knobs.steps)

    # 3. Search, with as many training runs.
    trials = knobs.outer_steps
    searches = {
        "constant": lambda: baselines.grid(networks, "constant", knobs.steps, trials, knobs.seed),
        "cosine": lambda: baselines.grid(networks, "cosine", knobs.steps, trials, knobs.seed),
        "TPE": lambda: baselines.tpe(networks, knobs.points, knobs.steps, trials, knobs.seed),
    }
    for name, look_for in searches.items():
        found[name] = run.part(name, look_for)
        seconds[name] = run.seconds(name)

    # 4. Compare on networks that none of them has seen.
    found = {name: found[name] for name in ["start", *searches, *learned]}
    results = {
        name: run.part(
            f"fresh {name}",
            lambda one=one: compare.on_fresh_networks(  # type: ignore[misc]
                networks, one["lr"], one["momentum"], knobs.fresh, knobs.seed
            ),
        )
        for name, one in found.items()
    }
    titles = {
        "start": f"start: constant {knobs.start_lr:g}",
        "constant": "constant, best of a grid",
        "cosine": "cosine, best of a grid",
        "TPE": f"schedule of {knobs.points} points by TPE",
        "learned": "learned through whole runs",
        **{name: f"learned through windows of {steps}" for name, steps in learned.items() if steps},
    }
    rows = [row(titles[name], found[name], results[name], results["learned"], seconds[name]) for name in found]
    run.table(f"{knobs.data}: settings on {knobs.fresh} fresh networks", rows)

    # 5. Pictures.
    title = f"{knobs.data}: {knobs.steps} steps of SGD"
    records = run.metrics("learned")
    run.picture("schedules.png", plots.schedules(found, history(records, start(), knobs.steps), title))
    seen = {name: found[name]["losses"] for name in searches}
    seen["learned"] = [record.get("loss", math.nan) for record in records]
    run.picture("search.png", plots.search(seen, knobs.networks, title))
    curves = {name: one["curve"] for name, one in results.items()}
    run.picture("training.png", plots.training(curves, f"{title}, mean of {knobs.fresh} fresh networks"))


def numbers(settings: Settings, steps: int) -> dict[str, Any]:
    """As the baselines give theirs."""
    lr, momentum = settings.numbers(steps)
    return {"lr": lr, "momentum": momentum, "peak": max(lr)}


def row(
    title: str, one: dict[str, Any], result: dict[str, Any], ours: dict[str, Any], seconds: float | None
) -> dict[str, Any]:
    """Means over the fresh networks, with the standard error of the mean of the test loss."""
    loss, other = np.array(ours["test_loss"]), np.array(result["test_loss"])
    wins = None if result is ours else f"{int((loss < other).sum())} of {len(loss)}"
    return {
        "settings": title,
        "peak lr": one["peak"],
        "momentum": one["momentum"],
        "validation loss": float(np.mean(result["validation_loss"])),
        "test loss": float(other.mean()),
        "+-": float(other.std(ddof=1) / len(other) ** 0.5),
        "test accuracy (%)": float(np.mean(result["test_accuracy"])),
        "learned has the lower test loss": wins,
        "seconds to find": seconds,
    }


def history(records: list[dict[str, Any]], settings: Settings, steps: int) -> list[dict[str, Any]]:
    """The schedule at the start and at five outer steps."""
    shown = [{"step": 0, **numbers(settings, steps)}]
    for place in sorted({round(len(records) * part) for part in (0.06, 0.12, 0.25, 0.5, 1.0)} - {0}):
        record = records[place - 1]
        lr, _ = Settings(torch.tensor(record["log_lr"]), torch.zeros(())).numbers(steps)
        shown.append({"step": record["step"], "lr": lr, "momentum": record["momentum"]})
    return shown


if __name__ == "__main__":
    sys.exit(main("learned_optimizer_settings", sys.argv[1:], Config, story))
