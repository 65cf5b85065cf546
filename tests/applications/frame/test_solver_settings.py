"""`tune` and ``--solver`` of every application: real studies of a few trials on the embedded data."""

from __future__ import annotations

import importlib
import json
import math
import sqlite3
from pathlib import Path

import pytest

import bilevel as bl
from applications.data_cleaning.cleaning import SETTINGS as CLEANING
from applications.distillation.inner import CUT_OFF
from applications.domain_weights.learning import METHODS as WEIGHING
from applications.equilibrium.knobs import Config as Equilibrium
from applications.equilibrium.knobs import settings_of
from applications.frame.command import main
from applications.learned_optimizer_settings.learn import SETTINGS as LEARNING
from applications.regularization.features import SETTINGS as PENALTIES
from applications.search.methods import SETTINGS as SEARCH
from applications.sparse_regression.criterion import SETTINGS as CRITERION

TUNED = {
    "data_cleaning": CLEANING,
    "distillation": CUT_OFF,
    "domain_weights": {"hypergrad": WEIGHING["implicit"], "outer_lr": 0.1},
    "equilibrium": settings_of(Equilibrium()),
    "learned_optimizer_settings": LEARNING,
    "regularization": PENALTIES,
    "reweighting": {"hypergrad": bl.Unroll(), "meta_lr": 3e-3},
    "search": SEARCH,
    "sparse_regression": CRITERION,
}
"""The settings that each application has by default."""

QUICK = {
    "data_cleaning": "--num-train 60 --num-val 60 --repeats 1 --steps 2",
    "distillation": "--network convnet --convnet-steps 2 --width 4 --batch 32 --repeats 2 --full-steps 3",
    "domain_weights": (
        "--steps 2 --learn-steps 3 --warm-up 1 --every 1 --mixtures 1 --short-steps 1 --context 8 --width 8"
    ),
    "equilibrium": "--runs 1 --epochs 1 --batch-size 600 --width 8 --depths 2 3",
    "learned_optimizer_settings": "--data iris --steps 6 --outer-steps 2 --networks 2 --points 3 --windows 2 --fresh 3",
    "regularization": "--problem features --data iris --train 40 --validation 40 --steps 2",
    "reweighting": "--repeats 2 --steps 4 --warm-up 1 --hidden 10 --problems noise",
    "search": "--data diabetes --task regression --examples 80 --candidates 2 --no-per-feature",
    "sparse_regression": "--data diabetes --draws 1 --folds 2 --evaluations 3 --noise-features 0",
}
"""Knobs that make a run short."""


def package(name: str):
    return importlib.import_module(f"applications.{name}.__main__")


def run(name: str, *arguments: str) -> int:
    application = package(name)
    return main(name, [*arguments, *QUICK[name].split()], application.Config, application.story, application.tunable)


def unread(config):
    """In the place of what is tuned, which reads the data: ``--solver`` needs the names of the settings alone."""
    raise AssertionError("The data are read again.")


def test_every_application_has_tune():
    """All that `docs/applications.md` lists; few-shot learning has tests of its own."""
    pages = {path.stem for path in (Path(__file__).parents[3] / "docs" / "applications").glob("*.md")}
    assert pages - {"influence"} == set(TUNED) == set(QUICK)  # influence has no inner solve to tune
    assert "applications.few_shot tune" in (Path(__file__).parents[3] / "docs" / "tuning.md").read_text()


@pytest.mark.parametrize("name", TUNED)
def test_the_first_trial_has_the_settings_in_use_today(name):
    config = package(name).Config
    tunable = package(name).tunable(config())
    assert tunable.settings(tunable.default) == TUNED[name]
    assert set(config.solver_settings) == set(TUNED[name])
    knobs = config(problem="features") if name == "regularization" else config()
    knobs.check_settings(TUNED[name])


@pytest.mark.parametrize("name", TUNED)
@pytest.mark.slow
def test_a_study_and_a_run_with_its_winner(name, tmp_path, capsys, monkeypatch):
    study = tmp_path / "study"
    assert run(name, "tune", "--trials", "3", "--seconds", "0.1", "--confirm", "2", "--out", str(study)) == 0
    with sqlite3.connect(study / "study.db") as database:
        (states,) = zip(*database.execute("select state from trials"), strict=True)
    assert set(states) <= {"COMPLETE", "PRUNED"}
    assert states[0] == "COMPLETE"
    best = bl.tuning.load(study / "best.json")
    assert set(best) == set(TUNED[name])
    assert (study / "optimization-history.png").exists()

    monkeypatch.setattr(package(name), "tunable", unread)
    place = tmp_path / "run"
    assert run(name, "--solver", str(study / "best.json"), "--out", str(place)) == 0
    assert bl.tuning.load(place / "solver.json") == best
    assert "solver" not in json.loads((place / "config.json").read_text())
    results = (place / "results.json").read_bytes()
    (study / "best.json").unlink()
    assert run(name, "--resume", str(place)) == 0  # the run is whole without the file
    assert (place / "results.json").read_bytes() == results

    capsys.readouterr()
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"nothing": 1.0}')
    assert run(name, "--solver", str(wrong), "--out", str(tmp_path / "none")) == 2
    assert "--solver" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    assert run(name, "--solver", str(wrong), "--resume", str(place)) == 2


STEPPED, MINIMUM, MAP = bl.Unroll(), bl.LBFGS(max_steps=5), bl.Anderson(max_steps=5)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *(("data_cleaning", one) for one in ({"hypergrad": STEPPED}, {"solver": MAP}, {"hypergrad": bl.SAMA()})),
        *(("regularization", one) for one in ({"solver": MINIMUM, "hypergrad": STEPPED}, {"solver": MAP})),
        *(("distillation", one) for one in ({"solver": MINIMUM, "hypergrad": STEPPED}, {"solver": MAP})),
        *(("equilibrium", one) for one in ({"hypergrad": STEPPED}, {"solver": MINIMUM})),
        ("domain_weights", {"hypergrad": STEPPED}),
        ("learned_optimizer_settings", {"hypergrad": bl.Implicit()}),
        ("sparse_regression", {"hypergrad": STEPPED}),
    ],
)
def test_settings_that_an_application_cannot_use_are_told_before_any_data_are_read(
    name, settings, tmp_path, capsys, monkeypatch
):
    def story(knobs, run):
        raise AssertionError("The run has begun.")

    monkeypatch.setattr(package(name), "story", story)
    bl.tuning.save(tmp_path / "odd.json", settings)
    assert run(name, "--solver", str(tmp_path / "odd.json"), "--out", str(tmp_path / "none")) == 2
    assert capsys.readouterr().err.startswith("error: --solver has ")
    assert not (tmp_path / "none").exists()


def test_settings_that_few_shot_learning_cannot_use(tmp_path, capsys):
    from applications.few_shot.__main__ import main as few_shot

    for settings in ({"solver": MINIMUM, "hypergrad": STEPPED}, {"solver": MAP}, {"strength": 0.0}):
        bl.tuning.save(tmp_path / "odd.json", settings)
        words = ["--solver", str(tmp_path / "odd.json"), "--data-root", "/nowhere", "--out", str(tmp_path / "none")]
        assert few_shot(words) == 2
        told = ("error: --solver has ", f"error: --solver {tmp_path / 'odd.json'}: 'strength' is 0.0, and a positive")
        assert capsys.readouterr().err.startswith(told)
        assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("value", [-1.0, 0, math.inf, math.nan, True, "0.1", None])
@pytest.mark.parametrize(
    ("name", "setting"),
    [("domain_weights", "outer_lr"), ("reweighting", "meta_lr"), ("learned_optimizer_settings", "outer_lr")],
)
def test_step_sizes_of_a_file_are_positive_numbers(name, setting, value, tmp_path, capsys):
    odd = tmp_path / "odd.json"
    odd.write_text(json.dumps({setting: value}))
    assert run(name, "--solver", str(odd), "--out", str(tmp_path / "none")) == 2
    assert f"{setting!r} is {value!r}, and a positive number is expected" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_study_has_no_resume_of_its_own(tmp_path, capsys):
    assert run("data_cleaning", "tune", "--resume", str(tmp_path)) == 2
    assert "the same command goes on" in capsys.readouterr().err
