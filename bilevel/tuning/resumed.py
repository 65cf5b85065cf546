"""What a trial was given beforehand, and what a study had before: told where it does not fit what is asked for now."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from ..notices import tell

if TYPE_CHECKING:
    import optuna

FIXED = "fixed_params"
"""Optuna's own: the system attribute of the parameters of an enqueued trial."""


def given(trial: optuna.trial.BaseTrial) -> dict[str, Any]:
    """The parameters that it was enqueued with; none for a trial of no study."""
    study = getattr(trial, "study", None)
    if study is None:
        return {}
    found: dict[str, Any] = study.get_trials(deepcopy=False)[trial.number].system_attrs.get(FIXED, {})
    return found


def refuse_unused(trial: optuna.trial.BaseTrial) -> None:
    """Refuse parameters that a trial was enqueued with and never asked for: Optuna would ignore them.

    Raises:
        ValueError: it names them, and the nearest that was asked for.
    """
    fixed, asked = given(trial), trial.params
    unused = [name for name in fixed if name not in asked]
    if not unused:
        return
    told = []
    for name in unused:
        near = difflib.get_close_matches(name, [other for other in asked if other not in fixed], n=1)
        told.append(f"{name!r} (did you mean {near[0]!r}?)" if near else repr(name))
    raise ValueError(
        f"The trial was given {', '.join(told)}, but never asks for it: misspelt, or of another choice. It asks for "
        f"{', '.join(sorted(asked)) or 'nothing'}."
    )


def refuse_misspelt(trial: optuna.trial.BaseTrial, name: str) -> None:
    """The same at once, for settings under ``name.`` that are nearly one of those asked for; the rest may come yet.

    Raises:
        ValueError: it names the two.
    """
    fixed, prefix = given(trial), f"{name}."
    asked = [other.removeprefix(prefix) for other in trial.params if other.startswith(prefix) and other not in fixed]
    for other in fixed:
        if other.startswith(prefix) and other not in trial.params:
            near = difflib.get_close_matches(other.removeprefix(prefix), asked, n=1, cutoff=0.75)
            if near:
                raise ValueError(
                    f"The trial was given {other!r} (did you mean {prefix + near[0]!r}?), but never asks for it."
                )


def earlier(trial: optuna.trial.BaseTrial, name: str) -> optuna.distributions.BaseDistribution | None:
    """The distribution of a parameter in the first trial of the study that had it, but for this one."""
    study = getattr(trial, "study", None)  # a FixedTrial has none
    number = getattr(trial, "number", None)
    others = study.get_trials(deepcopy=False) if study is not None else []
    return next((o.distributions[name] for o in others if o.number != number and name in o.distributions), None)


def suggest_choice(trial: optuna.trial.BaseTrial, name: str, choices: list[str]) -> str:
    """`suggest_categorical`, with an error in words where the study was begun with other choices.

    Raises:
        ValueError: they differ, or a value that the trial was enqueued with is none of them.
    """
    try:
        chosen: str = trial.suggest_categorical(name, choices)
        return chosen
    except ValueError as error:
        before = getattr(earlier(trial, name), "choices", None)
        value = given(trial).get(name)
        if before is not None and list(before) != choices:
            raise ValueError(
                f"The study {trial.study.study_name!r} was begun with the choices {', '.join(map(str, before))} for "  # type: ignore[attr-defined]
                f"{name!r}, and this run has {', '.join(choices)}: ask for the same, in this order, or take another "
                "name for the study."
            ) from error
        if value is not None and value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(
                f"The trial was given {name!r} = {value!r}{hint}: the choices are {', '.join(choices)}."
            ) from error
        raise


def tell_other_ranges(trial: optuna.trial.BaseTrial, compared: set[str]) -> None:
    """Warn where a range differs from that of the trials before: Optuna takes it in silence, its samplers mix both.

    Args:
        compared: the parameters that this run has compared already; those of the trial are added.
    """
    for name, now in trial.distributions.items():
        if name in compared:
            continue
        compared.add(name)
        before = earlier(trial, name)
        if before is not None and before != now:
            tell(
                f"The study was begun with {before} for {name!r}, and this run has {now}: its sampler learns from "
                "both. Take another name for a study of its own.",
                UserWarning,
            )
