"""What a study found: the winner as a file and as Python, measured again beside the defaults, and pictures."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import optuna
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter
from scipy import stats

import bilevel as bl
from applications.frame.figures import png
from applications.frame.run import Run
from applications.frame.tune.tunable import Settings, Tunable, best_or_none, score_within

CONFIRMED_FROM = 1_000
"""The first of the fresh seeds: no trial trained with it."""


def write(run: Run, study: optuna.Study, tunable: Tunable, seconds: float, seeds: int, seed: int) -> None:
    """Everything into the run folder; a part that was measured in an earlier call is kept."""
    if len(study.directions) > 1:
        front(run, study, tunable)
    elif (best := best_or_none(study)) is not None:
        winner(run, study, tunable, best, seconds, seeds, seed)
    else:
        run.say("No trial is complete and within its limits: there is no winner. Make more trials, or loosen limits.")
    pictures(run, study, tunable)
    counts = {state: sum(t.state.name == state for t in study.trials) for state in ("COMPLETE", "PRUNED", "FAIL")}
    run.say(f"{', '.join(f'{n} {state.lower()}' for state, n in counts.items())}; files are in {run.folder.path}")


def winner(
    run: Run,
    study: optuna.Study,
    tunable: Tunable,
    best: optuna.trial.FrozenTrial,
    seconds: float,
    seeds: int,
    seed: int,
) -> None:
    """Measure the best trial's settings and the defaults on the same fresh seeds, in turn; print, write, paste."""
    settings = tunable.settings(best.params)
    run.folder.write_settings("best.json", settings)
    run.say(f"\nBest: trial {best.number}, {tunable.score} {best.value:.4g}. As Python, or by --solver best.json:")
    for name, setting in settings.items():
        run.say(f"  {name} = {bl.tuning.expression(setting)}")
    default = tunable.settings(tunable.default)
    if best.params == dict(tunable.default):
        run.say("The settings in use today are the best of the study: there is nothing to change.")
        return

    def measure(which: Settings, number: int) -> float | None:
        try:
            fresh, trial = CONFIRMED_FROM + seed + number, optuna.trial.FixedTrial({})
            value = score_within(tunable, trial, which, fresh, seconds, points=1)
        except (optuna.TrialPruned, bl.SolveError, ArithmeticError):
            return None
        return value if math.isfinite(value) else None

    def measured(name: str, which: Settings, number: int) -> float | None:
        return run.part(f"{name}, {seconds:g} s, fresh seed {number}", lambda: measure(which, number))

    pairs = []
    for number in range(seeds):
        before = measured("defaults", default, number)
        after = measured(f"trial {best.number}", settings, number)
        pairs.append((before, after))
        run.say(f"  seed {number}: defaults {shown(before)}, winner {shown(after)}")
    run.table(
        f"{tunable.score} after {seconds:g} s of training, {seeds} fresh seeds",
        [interval_row("defaults", [b for b, _ in pairs]), interval_row(f"trial {best.number}", [a for _, a in pairs])],
    )
    whole = [(b, a) for b, a in pairs if b is not None and a is not None]
    if len(whole) < seeds or len(whole) < 2:
        run.say("Some trainings diverged: the two are not compared.")
        return
    sign = 1 if tunable.direction == "maximize" else -1
    gain, half = interval([sign * (a - b) for b, a in whole])
    verdict = "better" if gain > half else "worse" if gain < -half else "no different, as far as these seeds tell"
    run.table(
        "The winner against the defaults, seed by seed",
        [{"": "gain", "mean": gain, "95 % interval +-": half, "verdict": verdict}],
    )


def shown(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.4g}"


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval by Student's t."""
    array = np.asarray(values)
    spread = array.std(ddof=1) / math.sqrt(len(array))
    return float(array.mean()), float(stats.t.ppf(0.975, len(array) - 1) * spread)


def interval_row(name: str, values: list[float | None]) -> dict[str, Any]:
    kept = [value for value in values if value is not None]
    mean, half = interval(kept) if len(kept) > 1 else (None, None)
    return {"settings": name, "mean": mean, "95 % interval +-": half, "diverged": len(values) - len(kept)}


def front(run: Run, study: optuna.Study, tunable: Tunable) -> None:
    """The Pareto front, best score first, each settings as a file."""
    rows = []
    sign = -1 if tunable.direction == "maximize" else 1
    within = filter(bl.tuning.within_limits, study.best_trials)
    for trial in sorted(within, key=lambda trial: sign * trial.values[0]):
        settings = tunable.settings(trial.params)
        run.folder.write_settings(f"front-{trial.number}.json", settings)
        texts = ", ".join(f"{name}={bl.tuning.expression(setting)}" for name, setting in settings.items())
        score, seconds, mib = trial.values
        row = {"trial": str(trial.number), tunable.score: score, "seconds": seconds, "MiB": mib, "settings": texts}
        rows.append(row)
    if rows:
        run.table("The Pareto front", rows)


def pictures(run: Run, study: optuna.Study, tunable: Tunable) -> None:
    """PNGs, and all of them in one page with its own script, ``study.html``."""
    import optuna.visualization as interactive
    import optuna.visualization.matplotlib as drawn

    complete = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]
    if len(complete) < 2:
        return
    names = [tunable.score, "seconds", "peak MiB"]
    if len(study.directions) > 1:
        pair: dict[str, Any] = {"target_names": names[:2], "targets": lambda trial: trial.values[:2]}
        first: dict[str, Any] = {"target": lambda trial: trial.values[0], "target_name": names[0]}
        kinds = {"pareto_front": pair, "param_importances": first, "slice": first, "timeline": {}}
    else:
        one = {"target_name": tunable.score}
        kinds = {"optimization_history": one, "intermediate_values": {}, "param_importances": one, "slice": one}
        kinds["timeline"] = {}
    page: list[str] = []
    for kind, settings in kinds.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # experimental; tight layouts; importances of few trials
            if kind == "slice":
                settings = {**settings, "params": most_important(study)}
            content = attempt(partial(picture, getattr(drawn, f"plot_{kind}"), study, settings))
            figure = attempt(partial(getattr(interactive, f"plot_{kind}"), study, **settings))
        if content is not None:
            run.picture(f"{kind.replace('_', '-')}.png", content)
        if figure is not None:
            page.append(figure.to_html(full_html=False, include_plotlyjs=not page))
    html = f"<!doctype html><meta charset=utf-8><title>{study.study_name}</title><body>{''.join(page)}</body>"
    run.folder.write_text("study.html", html)


def most_important(study: optuna.Study, count: int = 6) -> list[str] | None:
    """Parameters by their importance for the first objective; None where it cannot be told: all of them."""
    several = len(study.directions) > 1
    target = (lambda trial: trial.values[0]) if several else None
    found = attempt(partial(optuna.importance.get_param_importances, study, target=target))
    return list(found)[:count] if found else None


def picture(plot: Callable[..., Any], study: optuna.Study, settings: dict[str, Any]) -> bytes:
    """A figure of Optuna's as a PNG, large enough for its labels."""
    axes = plot(study, **settings)
    first = axes if hasattr(axes, "figure") else np.ravel(axes)[0]
    figure: Figure = first.figure
    many = isinstance(axes, np.ndarray)
    for panel in np.ravel(axes):
        if panel.get_xscale() == "log":
            panel.xaxis.set_minor_formatter(NullFormatter())  # less than two decades have labels on top of each other
    if plot.__name__ == "plot_intermediate_values":
        first.get_legend().remove()  # of every trial: longer than the picture
        first.xaxis.set_major_locator(MaxNLocator(integer=True))
        first.set_xlabel("Part of the time")
    figure.set_size_inches(3.2 * len(np.ravel(axes)) + 1 if many else 9, 4.2)
    figure.set_layout_engine("constrained")
    content = png(figure)
    plt.close("all")
    return content


def attempt(draw: Callable[[], Any]) -> Any:
    """None where there is nothing to draw yet: one value only, no parameter in common."""
    try:
        return draw()
    except (ValueError, RuntimeError, IndexError, ZeroDivisionError):
        return None
