"""The command line that the applications share: knobs, run folder, resuming, exit codes."""

from __future__ import annotations

import dataclasses
import math
import shlex
import sys
import time
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import tyro

import bilevel as bl
from applications.frame import tune
from applications.frame.errors import UserError, exit_code
from applications.frame.run import SOLVER, Interrupted, Run
from applications.frame.run_folder import RunFolder


@dataclass(frozen=True)
class Knobs:
    """What every application has; a subclass adds its own, and checks them in `check`."""

    out: Path | None = None
    """Run folder; by default a new one under runs/."""
    resume: Path | None = None
    """Go on with this run folder, with its settings."""
    seed: int = 0
    """Of everything random."""
    threads: int = 1
    """Of PyTorch on a CPU. One is fastest for small data, and gives the same numbers on every machine."""

    def check(self) -> None:
        """Refuse what cannot be run, before anything is.

        Raises:
            UserError: naming the option.
        """

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file, without the place of the run."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in PLACE}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


@dataclass(frozen=True)
class SolverKnobs(Knobs):
    """Those of an application whose solvers can be tuned."""

    solver: Path | None = None
    """File of solver settings, as `tune` writes it, in place of the application's own."""


K = TypeVar("K", bound=Knobs)
PLACE = ("out", "resume", "solver")
"""What config.json does not hold; the settings of the solver's file are kept beside it."""


def from_json(kind: type[K], values: dict[str, Any]) -> K:
    """The inverse of `Knobs.to_json`.

    Raises:
        UserError: the values are not those of this application.
    """
    hints = typing.get_type_hints(kind)
    plain = {f.name for f in dataclasses.fields(kind)} - set(PLACE)
    if set(values) != plain:
        wrong = ", ".join(sorted(set(values) ^ plain))
        raise UserError(f"The run's config.json is of another application or version: {wrong}. Start a new run.")

    def typed(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return tuple(value)
        return Path(value) if isinstance(value, str) and Path in (hints[name], *typing.get_args(hints[name])) else value

    return kind(**{name: typed(name, value) for name, value in values.items()})


def main(
    name: str,
    arguments: list[str],
    kind: type[K],
    story: Callable[[K, Run], None],
    tunable: Callable[[K], tune.Tunable] | None = None,
) -> int:
    """Parse the knobs, make or open the run folder, tell the story.

    Args:
        name: of the package under applications, such as ``"distillation"`` or ``"measurements.scaling"``.
        kind: the knobs; its docstring is the help.
        story: does the work through the `Run`; it reads its data before it writes anything.
        tunable: what the subcommand ``tune`` searches with these knobs, `SolverKnobs` then; it reads its data when it
            is called. The story finds the settings of ``--solver`` in the `Run`.

    Returns:
        0; 2 for bad input, which is told in one message; 128 and the number of the signal that interrupted it.
    """
    command = f"python -m applications.{name}"
    if tunable is not None and arguments[:1] == ["tune"]:
        return tune.main(
            name, arguments[1:], lambda rest: tunable(_to_tune(tyro.cli(kind, args=rest, prog=f"{command} tune")))
        )
    more = f"\n\nAn Optuna study over its solver settings: {command} tune --help" if tunable is not None else ""
    knobs = tyro.cli(kind, args=arguments, prog=command, description=f"{kind.__doc__}{more}")
    return exit_code(lambda: _run(knobs, kind, story, tunable, f"{command} {shlex.join(arguments)}".strip(), name))


def _run(
    knobs: K,
    kind: type[K],
    story: Callable[[K, Run], None],
    tunable: Callable[[K], tune.Tunable] | None,
    command: str,
    name: str,
) -> int:
    solver: Path | None = getattr(knobs, "solver", None)
    if knobs.resume is None:
        path = knobs.out or Path("runs") / name.rpartition(".")[2] / time.strftime("%Y%m%d-%H%M%S")
        folder = RunFolder.new(path)
    else:
        folder = RunFolder.open(knobs.resume)
        given, knobs = knobs, from_json(kind, folder.read_json("config.json"))
        refuse_changes(given, knobs)
        kept = folder.path / SOLVER if (folder.path / SOLVER).is_file() else None
        if solver is not None and (kept is None or bl.tuning.load(solver) != bl.tuning.load(kept)):
            raise UserError("--solver has other settings than the run to resume. Leave it out, or start a new run.")
        solver = kept
    _prepare(knobs)
    run = Run(folder, knobs.to_json(), command)
    if solver is not None and tunable is not None:
        run.settings = tune.read_settings(solver, tunable(knobs).names, name)
    try:
        story(knobs, run)
    except (Interrupted, KeyboardInterrupt) as interruption:
        print(f"\nInterrupted; what was done is saved. Go on with: --resume {folder.path}", file=sys.stderr)
        return interruption.exit_code if isinstance(interruption, Interrupted) else 130
    run.say(f"\nFigures and pictures are in {folder.path}")
    return 0


def _to_tune(knobs: K) -> K:
    """Knobs of a study: what the search does not choose stays as they say."""
    given = [option for option in ("resume", "solver") if getattr(knobs, option, None) is not None]
    require(not given, f"tune has no --{' and no --'.join(given)}: the same command goes on, from the same settings.")
    _prepare(knobs)
    return knobs


def _prepare(knobs: Knobs) -> None:
    require_at_least_one(knobs, "threads")
    knobs.check()
    torch.set_num_threads(knobs.threads)


def refuse_changes(given: Knobs, saved: Knobs) -> None:
    """A resumed run keeps its settings: half a run of each would be neither."""
    default, kept = type(given)().to_json(), saved.to_json()
    for name, value in given.to_json().items():
        if value not in (default[name], kept[name]):
            raise UserError(
                f"--{name.replace('_', '-')} is {value}, but the run to resume has {kept[name]}. "
                "Leave it out, or start a new run with --out."
            )


def require_at_least_one(knobs: Any, *names: str) -> None:
    """Options that count something; one that may be left out is None then.

    Raises:
        UserError: naming the option.
    """
    for name in names:
        value = getattr(knobs, name)
        require(value is None or value >= 1, f"--{name.replace('_', '-')} is {value}: at least 1 is needed.")


def require_positive(knobs: Any, *names: str) -> None:
    """Options that are step sizes, tolerances and penalties: positive and finite.

    Raises:
        UserError: naming the option.
    """
    for name in names:
        value = getattr(knobs, name)
        require(0 < value < math.inf, f"--{name.replace('_', '-')} is {value}: a positive number is needed.")


def require(condition: bool, message: str) -> None:
    """For `Knobs.check`.

    Raises:
        UserError: the condition does not hold.
    """
    if not condition:
        raise UserError(message)
