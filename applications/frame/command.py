"""The command line that the applications share: knobs, run folder, resuming, exit codes."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import math
import shlex
import sys
import time
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import tyro
from typing_extensions import Self

import bilevel as bl
from applications.frame import ranks, schema, tune
from applications.frame.data.examples import IN_FOLDERS
from applications.frame.errors import UserError, exit_code, note
from applications.frame.names import local, portable
from applications.frame.options import check_folder, check_values, check_words, is_file, option, settings_told
from applications.frame.output import forgiving
from applications.frame.run import LENGTHS, SOLVER, Interrupted, Run
from applications.frame.run_folder import RunFolder, understood

PLACE = ("out", "resume", "solver")
"""What config.json does not hold; the settings of the solver's file are kept beside it."""


Purposes = Mapping[str, tuple[bool, Collection[str]]]


@dataclass(frozen=True)
class Knobs:
    """What every application has; a subclass adds its own, and checks them in `check`."""

    out: Path | None = None
    """Run folder; by default a new one under runs/."""
    resume: Path | None = None
    """Go on with this run folder, with its settings."""
    seed: int = 0
    """Seed of everything random."""
    threads: int | None = 1
    """Threads of PyTorch on a CPU; None: all cores. One is fastest for small data, with the same numbers everywhere."""

    length: ClassVar[str] = "steps"
    """The knob that a resumed run may raise, where there is one: the run becomes longer, and no other."""
    names_code: ClassVar[Collection[str]] = ()
    """Knobs that may name code of the user's, as ``package.module:name``; a run folder alone never makes it run."""
    own_code: ClassVar[Collection[str]] = ()
    """Names of the project's own that they may have all the same."""

    def check(self) -> None:
        """Refuse what cannot be run, before anything is.

        Raises:
            UserError: naming the option.
        """

    def only_for(self) -> Purposes:
        """What some knobs are only for, whether the others ask for it, and their names."""
        return {}

    def without_effect(self) -> dict[str, str]:
        """Knobs that change nothing beside the others as they are -> what they are for.

        A command that gives one of them is told so: who gives it believes that it does something.
        """
        return {name: what for what, (asked, names) in self.only_for().items() if not asked for name in names}

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file, without the place of the run."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in PLACE}
        return {name: _plain(value) for name, value in values.items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_json`.

        Raises:
            UserError: the values are not those of this application.
        """
        hints = typing.get_type_hints(cls)
        plain = [f.name for f in dataclasses.fields(cls) if f.name not in PLACE]
        wrong = (
            "" if isinstance(values, dict) else f"it is {type(values).__name__}, where names and values are expected"
        )
        if wrong or (wrong := schema.unknown_and_missing(list(values), plain)):
            raise UserError(f"The run's config.json is of another application or version: {wrong}. Start a new run.")

        def typed(name: str, value: Any) -> Any:
            if isinstance(value, list):
                value = tuple(local(one) if isinstance(one, str) else one for one in value)
            elif isinstance(value, str):
                value = local(value)
                if Path in (hints[name], *typing.get_args(hints[name])):
                    value = Path(value)
            reason = schema.fits(value, hints[name])
            if reason is not None:
                raise UserError(f"The run's config.json is damaged: {name!r} is {value!r}: {reason}.")
            return value

        return cls(**{name: typed(name, value) for name, value in values.items()})


@dataclass(frozen=True)
class SolverKnobs(Knobs):
    """Those of an application whose solvers can be tuned.

    Attributes:
        solver_settings: the names of the settings that the file may have.
    """

    solver: Path | None = None
    """File of solver settings, as `tune` writes it, in place of the application's own."""

    solver_settings: ClassVar[Collection[str]] = ("solver", "hypergrad")

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse settings of the file that cannot be used here, before any data are read.

        Raises:
            UserError: naming ``--solver``.
        """

    def replaced(self) -> Mapping[str, Collection[str]]:
        """Settings that the file may have -> the knobs in whose place each of them stands."""
        return {}

    def untuned(self) -> Collection[str]:
        """Knobs that change nothing of a study, whose trainings go on until their time is over and are not reported."""
        return ()

    def replaced_by(self, settings: Mapping[str, Any]) -> dict[str, str]:
        """Knobs that change nothing beside these settings -> the setting that stands in their place."""
        return {knob: name for name, knobs in self.replaced().items() if name in settings for knob in knobs}


@dataclass(frozen=True)
class DataKnobs(Knobs):
    """Those of an application that reads a data set by `frame.data.load`."""

    data: str = "digits"
    """digits, breast_cancer, wine, iris, mnist, or a file of features and targets: .npz, .svm."""
    data_root: Path | None = None
    """Folder of data sets that are files; by default $BILEVEL_DATA, else ~/.cache/bilevel."""

    def without_effect(self) -> dict[str, str]:
        """See `Knobs`."""
        own = {} if self.data in IN_FOLDERS else {"data_root": f"--data {', '.join(IN_FOLDERS)}"}
        return {**own, **super().without_effect()}


def _plain(value: Any) -> Any:
    """A knob as JSON has it, names as they are in every locale."""
    if isinstance(value, str | Path):
        return portable(str(value))
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value


K = TypeVar("K", bound=Knobs)


@dataclass(frozen=True)
class Subcommand:
    """Another word after the application's name; what it takes and what it is about make a line of the help."""

    takes: str
    about: str
    run: Callable[[list[str]], int]


def main(
    name: str,
    arguments: list[str],
    kind: type[K],
    story: Callable[[K, Run], None],
    tunable: Callable[[K], tune.Tunable] | None = None,
    presets: Mapping[str, K] | None = None,
    subcommands: Mapping[str, Subcommand] | None = None,
) -> int:
    """Parse the knobs, make or open the run folder, tell the story.

    Args:
        name: of the package under applications, such as ``"distillation"`` or ``"measurements.scaling"``.
        kind: the knobs; its docstring is the help.
        story: does the work through the `Run`; it reads its data before it writes anything.
        tunable: what the subcommand ``tune`` searches with these knobs, `SolverKnobs` then; it reads its data when it
            is called. The story finds the settings of ``--solver`` in the `Run`.
        presets: knobs to start from, by what the knob ``preset`` says.

    Returns:
        0; 2 for bad input, which is told in one message; 128 and the number of the signal that interrupted it.
    """
    command = f"python -m applications.{name}"
    word, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if tunable is not None and word == "tune":
        return tune.main(
            name,
            rest,
            lambda rest: tunable(
                _to_tune(parse(kind, rest, f"{command} tune", presets=presets), _start(kind, rest, presets))
            ),
        )
    if subcommands is not None and word in subcommands:

        def other() -> int:
            check_words(rest)
            return subcommands[word].run(rest)

        return exit_code(other)
    others = {f"{other} {one.takes}": one.about for other, one in (subcommands or {}).items()}
    if tunable is not None:
        others["tune [options]"] = "an Optuna study over its solver settings"
    help = _help(kind, command, others)
    call = f"{command} {shlex.join(arguments)}".strip()

    def given(start: K | None) -> K:
        check_words(arguments)
        return parse(kind, arguments, command, help, presets, start)

    return exit_code(lambda: _run(given, story, call, name, lambda: _start(kind, arguments, presets)))


def _help(kind: type[Knobs], command: str, others: Mapping[str, str]) -> str:
    """What the command does, and a line for each of its other words."""
    about = inspect.getdoc(kind) or ""
    if not others:
        return about
    width = max(map(len, others))
    lines = [f"  {command} {other:{width}}  {does}" for other, does in others.items()]
    return "\n".join([f"{about}\n\nBeside it, each with --help:", *lines])


def parse(
    kind: type[K],
    arguments: list[str],
    command: str,
    help: str | None = None,
    presets: Mapping[str, K] | None = None,
    start: K | None = None,
) -> K:
    """The knobs ``start``, or those of the preset that is asked for, changed by the options.

    Options that change nothing beside the others are told.

    Raises:
        UserError: there is no such preset.
        SystemExit: ``--help``, or options that cannot be parsed.
    """
    if presets is not None and start is None:
        help = f"{help or inspect.getdoc(kind)}\n\nPresets: {', '.join(presets)}."
    start = _start(kind, arguments, presets) if start is None else start
    found = tyro.cli(kind, default=start, args=arguments, prog=command, description=help)
    if found.resume is None and ranks.leads():  # a resumed run has its own settings, and others are refused
        for name, what in found.without_effect().items():
            if getattr(found, name) != getattr(start, name):
                print(f"note: {option(name)} changes nothing here: it is for {what}.", file=sys.stderr)
    return found


def _start(kind: type[K], arguments: list[str], presets: Mapping[str, K] | None) -> K:
    """The knobs before the options change them.

    Raises:
        UserError: there is no such preset.
    """
    if presets is None:
        return kind()
    asked, _ = tyro.cli(_Preset, args=arguments, return_unknown_args=True, add_help=False)
    if asked.preset not in presets:
        raise UserError(f"There is no preset {asked.preset!r}. There are {', '.join(presets)}.")
    return presets[asked.preset]


def tell_replaced(
    knobs: SolverKnobs, start: Knobs, settings: Mapping[str, Any], whose: str = "of --solver stands in its place"
) -> None:
    """Say which of the options, given as changes of ``start``, change nothing beside these settings of solvers."""
    for name, setting in knobs.replaced_by(settings).items():
        if getattr(knobs, name) != getattr(start, name) and name not in knobs.without_effect():
            note(f"{option(name)} changes nothing here: the {setting!r} {whose}.")


@dataclass(frozen=True)
class _Preset:
    preset: str = "default"


def _run(
    given: Callable[[K | None], K], story: Callable[[K, Run], None], call: str, name: str, start: Callable[[], K]
) -> int:
    """``given``: the knobs as the options change those that they start from, by default ``start``."""
    knobs = given(None)
    check_values(knobs)
    solver: Path | None = getattr(knobs, "solver", None)
    folder = _new_folder(knobs, name) if knobs.resume is None else RunFolder.open(knobs.resume)
    lengths: list[int] = []
    try:
        if knobs.resume is not None:
            knobs, solver, lengths = _resumed(given, folder, name)
        return _told(knobs, folder, solver, lengths, story, call, name, start)
    finally:
        folder.release()


def _told(
    knobs: K,
    folder: RunFolder,
    solver: Path | None,
    lengths: Sequence[int],
    story: Callable[[K, Run], None],
    call: str,
    name: str,
    start: Callable[[], K],
) -> int:
    _prepare(knobs)
    with ranks.process_group(), forgiving(), settings_told(knobs):
        run = Run(folder, knobs.to_json(), call, data=_digest(knobs), lengths=lengths)
        if told := _lengthened(lengths or lengths_of(folder, knobs)):
            run.say(told)
        if solver is not None and isinstance(knobs, SolverKnobs):
            run.settings = tune.read_settings(solver, knobs.solver_settings, name)
            knobs.check_settings(run.settings)
            if folder.fresh and run.leads:
                tell_replaced(knobs, start(), run.settings)
        try:
            with nullcontext() if folder.fresh else understood(f"The run folder {folder.path}"):
                story(knobs, run)
        except (Interrupted, KeyboardInterrupt) as interruption:
            if run.leads:
                begun = (folder.path / "config.json").exists()
                saved = f"what was done is saved. Go on with: --resume {folder.path}" if begun else "nothing had begun."
                print(f"\nInterrupted; {saved}", file=sys.stderr)
            return interruption.exit_code if isinstance(interruption, Interrupted) else 130
        run.say(f"\nFigures and pictures are in {folder.path}")
    return 0


def _digest(knobs: Knobs) -> str | None:
    """Of the files that ``--data`` names; None: it names none."""
    named = getattr(knobs, "data", None) or ()
    paths = [Path(str(name)) for name in ((named,) if isinstance(named, str | Path) else named)]
    found = [path for path in paths if is_file(path)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in found)).hexdigest() if found else None


def lengths_of(folder: RunFolder, knobs: Knobs) -> list[int]:
    """The lengths that a run was planned for, one after another; empty where it was never made longer.

    One beyond its present length was asked for and refused, as earlier versions wrote it.
    """
    found = folder.read_json(LENGTHS) if (folder.path / LENGTHS).is_file() else []
    schema.check(found, list[int], folder.path / LENGTHS, "list of lengths")
    kept = [length for length in found if length <= getattr(knobs, knobs.length, 0)]
    return kept if len(kept) > 1 else []


def _lengthened(lengths: Sequence[int]) -> str:
    """What a run that was made longer is told."""
    if not lengths:
        return ""
    first, *later = map(str, lengths)
    return (
        f"This run was planned for {first} and made longer ({', then '.join(later)}): where a schedule follows its "
        "length, its first steps are not those of a run that was planned so long from the start."
    )


def _new_folder(knobs: Knobs, name: str) -> RunFolder:
    """That of a new run, which the first rank begins; after a rank had died, of the run that all go on with."""
    check_folder(knobs.out, "out")
    path = knobs.out or Path("runs") / name.rpartition(".")[2] / (ranks.launch_name() or time.strftime("%Y%m%d-%H%M%S"))
    folder = RunFolder(path)
    if ranks.restarted() and (path / "config.json").is_file():
        if folder.read_json("config.json") != json.loads(json.dumps(knobs.to_json())):
            raise UserError(f"{path} holds a run with other settings. Take another --out.")
        return folder
    return RunFolder.new(path) if ranks.leads() else folder


def _resumed(given: Callable[[K | None], K], folder: RunFolder, name: str) -> tuple[K, Path | None, list[int]]:
    """The knobs of the run, the file of its solver settings, and all lengths where it becomes longer now.

    A run keeps its settings: half a run of each would be neither. It may become longer; what was computed from the
    shorter one is computed again. Nothing is written yet: its data may still be refused.
    """
    if ranks.leads():
        folder.hold()
    kind = type(given(None))
    saved = kind.from_json(folder.read_json("config.json"))
    unsaid: dict[str, Any] = {code: "" for code in saved.names_code if names_code(saved, code)}
    asked = given(dataclasses.replace(saved, **unsaid))
    refuse_changes(asked, saved)
    lengths: list[int] = []
    if longer(asked, saved):
        _prepare(asked)
        lengths = [*(lengths_of(folder, saved) or [getattr(saved, kind.length)]), getattr(asked, kind.length)]
        saved = dataclasses.replace(saved, **{kind.length: getattr(asked, kind.length)})
    kept = folder.path / SOLVER if (folder.path / SOLVER).is_file() else None
    if isinstance(asked, SolverKnobs) and asked.solver is not None:
        settings = tune.read_settings(asked.solver, asked.solver_settings, name)
        if kept is None or settings != bl.tuning.load(kept):
            raise UserError("--solver has other settings than the run to resume. Leave it out, or start a new run.")
    return saved, kept, lengths


def _to_tune(knobs: K, start: K) -> K:
    """Knobs of a study, changed from ``start``: what the search does not choose stays as they say."""
    given = [name for name in ("resume", "solver") if getattr(knobs, name, None) is not None]
    require(not given, f"tune has no --{' and no --'.join(given)}: the same command goes on, from the same settings.")
    _prepare(knobs)
    for name in knobs.untuned() if isinstance(knobs, SolverKnobs) else ():
        if getattr(knobs, name) != getattr(start, name) and name not in knobs.without_effect():
            note(f"{option(name)} changes nothing here: it is for a run, and not for the trials of tune.")
    return knobs


def _prepare(knobs: Knobs) -> None:
    check_values(knobs)
    require_at_least_one(knobs, "threads")
    knobs.check()
    if knobs.threads is not None:
        torch.set_num_threads(knobs.threads)


def names_code(knobs: Knobs, name: str) -> bool:
    """Whether a knob names code that is not the project's own."""
    value = str(getattr(knobs, name))
    return name in knobs.names_code and ":" in value and value not in knobs.own_code


def refuse_code(value: str, name: str, place: object) -> None:
    """Code that a folder or a file names is not imported because of that.

    Raises:
        UserError: with what to say for it to be.
    """
    raise UserError(
        f"{place} names code of its own, {value!r}, which would be run. Nothing of it was. Where you trust it, say so "
        f"by giving the option again: {option(name)} {value}"
    )


def refuse_changes(asked: Knobs, saved: Knobs) -> None:
    """What is asked for, from the settings of the run on, must be these settings; steps may be more."""
    kept = saved.to_json()
    for name, value in asked.to_json().items():
        if value == kept[name] or (name == saved.length and longer(asked, saved)):
            continue
        if value == "" and names_code(saved, name):
            refuse_code(kept[name], name, "The run to resume")
        raise UserError(
            f"{option(name)} is {value}, but the run to resume has {kept[name]}. Leave it out, or start a new run with "
            f"--out.{' It may only be raised.' if name == saved.length else ''}"
        )


def longer(asked: Knobs, saved: Knobs) -> bool:
    """Whether a longer run is asked for; a length of 0 is the application's own."""
    return 0 < getattr(saved, saved.length, 0) < getattr(asked, saved.length, 0)


def require_at_least_one(knobs: Any, *names: str) -> None:
    """Options that count something; one that may be left out is None then.

    Raises:
        UserError: naming the option.
    """
    for name in names:
        value = getattr(knobs, name)
        require(value is None or value >= 1, f"{option(name)} is {value}: at least 1 is needed.")


def require_positive(knobs: Any, *names: str) -> None:
    """Options that are step sizes, tolerances and penalties: positive and finite, or None where they may be left out.

    Raises:
        UserError: naming the option.
    """
    for name in names:
        value = getattr(knobs, name)
        require(value is None or 0 < value < math.inf, f"{option(name)} is {value}: a positive number is needed.")


def require_each_once(knobs: Any, *names: str) -> None:
    """Options that name what is to be done: one thing at least, and none twice.

    Raises:
        UserError: naming the option.
    """
    for name in names:
        values = getattr(knobs, name)
        told = f"{option(name)} {' '.join(map(str, values))}".strip()
        require(0 < len(set(values)) == len(values), f"{told}: one at least, each once, is needed.")


def require(condition: bool, message: str) -> None:
    """For `Knobs.check`.

    Raises:
        UserError: the condition does not hold.
    """
    if not condition:
        raise UserError(message)
