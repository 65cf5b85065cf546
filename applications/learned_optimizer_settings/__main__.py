"""``python -m applications.learned_optimizer_settings``: a learning-rate schedule and a momentum by hypergradients."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import torch

import bilevel as bl
from applications.frame.command import main
from applications.frame.run import Run
from applications.learned_optimizer_settings import baselines, compare, plots
from applications.learned_optimizer_settings.knobs import Config
from applications.learned_optimizer_settings.learn import Learning, Method, ways
from applications.learned_optimizer_settings.networks import Data, Networks
from applications.learned_optimizer_settings.settings import Settings
from applications.learned_optimizer_settings.tuning import tunable


def story(knobs: Config, run: Run) -> None:
    """Learn, search, compare on fresh networks."""
    data = Data.read(knobs.data, knobs.data_root, knobs.seed)
    hypergrad, outer_lr = ways(knobs.hypergrad, knobs.outer_lr, run.settings)
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
    learned: dict[str, Method] = {f"window of {steps}": bl.Truncated(steps) for steps in knobs.windows}
    learned["learned"] = hypergrad
    for name, method in learned.items():
        settings = start()
        learning = Learning(networks, settings, knobs.steps, knobs.outer_steps, outer_lr, knobs.seed, method)
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
    truncated = isinstance(hypergrad, bl.Truncated)
    titles = {
        "start": f"start: constant {knobs.start_lr:g}",
        "constant": "constant, best of a grid",
        "cosine": "cosine, best of a grid",
        "TPE": f"schedule of {knobs.points} points by TPE",
        "learned": "learned as --solver says" if truncated else "learned through whole runs",
        **{f"window of {steps}": f"learned through windows of {steps}" for steps in knobs.windows},
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
    sys.exit(main("learned_optimizer_settings", sys.argv[1:], Config, story, tunable))
