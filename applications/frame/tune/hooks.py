"""What a user hangs onto a study: Optuna callbacks by their import path, and an artifact store for its files."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path

import optuna
from optuna.artifacts import FileSystemArtifactStore, get_all_artifact_meta, upload_artifact

from applications.frame.errors import UserError
from applications.frame.options import imported

Callback = Callable[[optuna.Study, optuna.trial.FrozenTrial], None]
KINDS = {".png": "image/png", ".html": "text/html", ".json": "application/json"}
"""Suffixes of the files that a study keeps, and their media types, by which a dashboard shows them."""


def callbacks_of(paths: Sequence[str]) -> list[Callback]:
    """Callbacks ``(study, trial)`` by their import paths, ``package.module:function``.

    One that fails when it is called ends the study by a `UserError` too.

    Raises:
        UserError: a path leads nowhere, or to what cannot be called so.
    """
    found = []
    for path in paths:
        callback = imported("--callback", path)
        if not callable(callback):
            raise UserError(f"--callback {path} is a {type(callback).__name__}: a function (study, trial) is needed.")
        try:
            inspect.signature(callback).bind(None, None)
        except TypeError as error:
            raise UserError(
                f"--callback {path}: a function of (study, trial) is needed, and it has {error}."
            ) from error
        except ValueError:  # it is written in C, and tells no signature
            pass
        found.append(_told(path, callback))
    return found


def _told(path: str, callback: Callback) -> Callback:
    """The callback, whose failure names it."""

    def called(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        try:
            callback(study, trial)
        except (Exception, SystemExit) as error:
            raise UserError(
                f"--callback {path} failed after trial {trial.number} ({type(error).__name__}: {error}). The trials "
                "are kept: mend it, or leave it out, and the same command goes on."
            ) from error

    return called


def keep(study: optuna.Study, folder: Path, store: Path) -> list[str]:
    """Put pictures, page and solver file of a finished study into an artifact store, where a dashboard finds them.

    A file that the store has already, with the same content, is not put there again.

    Returns:
        The names of the files that were put.
    """
    store.mkdir(parents=True, exist_ok=True)
    artifacts = FileSystemArtifactStore(store)
    kept = set()
    for meta in get_all_artifact_meta(study):
        path = store / meta.artifact_id
        if path.exists():
            kept.add((meta.filename, path.read_bytes()))
    names = []
    for name in ("best.json", "study.html", *sorted(path.name for path in folder.glob("*.png"))):
        path = folder / name
        if path.exists() and (name, path.read_bytes()) not in kept:
            upload_artifact(
                artifact_store=artifacts, file_path=str(path), study_or_trial=study, mimetype=KINDS[path.suffix]
            )
            names.append(name)
    return names
