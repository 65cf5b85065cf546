"""The tune command on a bilevel problem that trains in milliseconds; and, with its real search, few-shot's."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
import torch

import bilevel as bl
from applications.few_shot.__main__ import main as few_shot
from applications.frame import tune
from applications.frame.run_folder import RunFolder
from applications.frame.tune.report import interval
from bilevel.problems import Ridge
from tests.applications.refusals import refusals

ROOT = Path(__file__).parents[3]


def ridge(arguments: list[str]) -> tune.Tunable:
    """Gradient steps on the penalties of a ridge problem; the default solver is a bad one on purpose."""

    def suggest(trial):
        hypergrad = bl.tuning.suggest_hypergrad(trial, choices=("Implicit",), linear=("CG", "Identity"))
        return {"solver": bl.LBFGS(), "hypergrad": hypergrad}

    def train(settings, seed):
        problem = Ridge(per_feature=True)
        x = problem.hparams + 0.1 * torch.randn(
            problem.hparams.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        x.requires_grad_()
        optimizer, step = torch.optim.SGD([x], lr=0.1), 0  # Adam would hide that the default is bad
        while True:
            fit = bl.argmin(problem.inner, problem.init, x, **settings, throw="ignore")
            loss = problem.outer(fit.value, x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            yield step, loss.detach(), fit

    default = {"hypergrad": "Implicit", "hypergrad.damped": True, "hypergrad.damping": 100.0}
    default |= {"linear": "Identity", "linear.factor": 1e-3}
    return tune.Tunable("validation loss", "minimize", default, suggest, train, seconds=0.3, steps=5, trials=6)


def run(folder: Path, *arguments: str) -> int:
    return tune.main("ridge", ["--out", str(folder), "--confirm", "2", *arguments], ridge)


def trials(folder: Path, name: str = "ridge score") -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name=name, storage=f"sqlite:///{folder / 'study.db'}").trials


def test_a_study_its_winner_and_its_pictures(tmp_path, capsys):
    assert run(tmp_path) == 0
    printed = capsys.readouterr().out
    found = trials(tmp_path)
    assert sum(trial.state.name in ("COMPLETE", "PRUNED") for trial in found) == 6
    assert found[0].user_attrs["default"]
    assert found[0].params["linear"] == "Identity"
    best = min((t for t in found if t.state.name == "COMPLETE"), key=lambda trial: trial.value)
    settings = bl.tuning.load(tmp_path / "best.json")
    assert settings["hypergrad"] == bl.tuning.solver_from_trial(best)
    assert f"hypergrad = {bl.tuning.expression(settings['hypergrad'])}" in printed
    tables = json.loads((tmp_path / "results.json").read_text())["tables"]
    (measured,) = [rows for title, rows in tables.items() if "2 fresh seeds" in title]
    (verdict,) = tables["The winner against the defaults, seed by seed"]
    assert verdict["mean"] == pytest.approx(measured[0]["mean"] - measured[1]["mean"])
    for name in ("optimization-history.png", "intermediate-values.png", "param-importances.png", "slice.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "study.html").read_text().count("Plotly.newPlot") >= 4


def test_the_same_command_resumes_and_more_trials_are_added(tmp_path, capsys):
    assert run(tmp_path, "--trials", "4") == 0
    assert run(tmp_path, "--trials", "4") == 0
    assert len(trials(tmp_path)) == 4
    assert run(tmp_path, "--trials", "7") == 0
    found = trials(tmp_path)
    assert len(found) == 7
    assert sum("default" in trial.user_attrs for trial in found) == 1
    points = {json.dumps(trial.params, sort_keys=True) for trial in found}
    assert len(points) == 7
    assert run(tmp_path, "--trials", "7", "--seconds", "0.5") == 2
    assert "its trials cannot be compared" in capsys.readouterr().err


def test_the_first_trial_does_not_pay_for_what_loads_at_first_use(tmp_path):
    begun = []

    def slow_at_first(arguments: list[str]) -> tune.Tunable:
        usual = ridge(arguments)

        def train(settings, seed):
            begun.append(seed)
            if len(begun) == 1:
                time.sleep(1.0)
            yield from usual.train(settings, seed)

        return dataclasses.replace(usual, train=train)

    assert tune.main("ridge", ["--out", str(tmp_path), "--confirm", "2", "--trials", "1"], slow_at_first) == 0
    (first,) = trials(tmp_path)
    assert first.user_attrs["seconds"] < 1.0
    assert first.user_attrs["steps"] > 1


def test_several_objectives_have_a_front(tmp_path):
    assert run(tmp_path, "--objective", "pareto", "--trials", "5") == 0
    study = optuna.load_study(study_name="ridge pareto", storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert study.metric_names == ["validation loss", "seconds", "peak MiB"]
    found = study.trials
    assert all(len(trial.values) == 3 and trial.values[1] > 0 for trial in found if trial.state.name == "COMPLETE")
    rows = json.loads((tmp_path / "results.json").read_text())["tables"]["The Pareto front"]
    scores = [row["validation loss"] for row in rows]
    assert scores == sorted(scores)
    for row in rows:
        assert "hypergrad" in bl.tuning.load(tmp_path / f"front-{row['trial']}.json")
    assert (tmp_path / "pareto-front.png").exists()


def test_limits_become_constraints_and_a_study_without_a_winner_says_so(tmp_path, capsys):
    assert run(tmp_path, "--limit-step-seconds", "1e-9", "--trials", "2") == 0
    assert "there is no winner" in capsys.readouterr().out
    for trial in trials(tmp_path):
        assert trial.state.name != "COMPLETE" or trial.constraints["step_seconds"] > 0
        assert "peak_mib" in trial.user_attrs or trial.state.name == "PRUNED"
    assert not (tmp_path / "best.json").exists()


@refusals(
    *("--trials 0", "--confirm 1"),
    (["--workers", "2", "--storage", "sqlite:///x.db"], "SQLite is not for several processes"),
    (["--storage", "nothing"], "ends with .log or .journal. Is the address right"),
    (["--storage", "sqlite://"], "a database in memory"),
    (["--storage", "postgresql+psycopg2://nobody@127.0.0.1:1/none"], "cannot be used"),
)
def test_bad_options(tmp_path, capsys, arguments, message):
    code = tune.main("ridge", ["--out", str(tmp_path / "out"), *arguments], ridge)
    assert code == 2
    assert message in capsys.readouterr().err


def test_the_password_of_a_storage_is_nowhere(tmp_path, capsys, monkeypatch):
    """Neither where it cannot be opened, nor in what a study writes."""
    address = "postgresql+psycopg2://nobody:s3cret@127.0.0.1:1/none"
    arguments = ["--out", str(tmp_path), "--confirm", "2", "--trials", "2", "--storage", address]
    assert tune.main("ridge", arguments, ridge) == 2
    said = capsys.readouterr()
    assert "nobody:***@127.0.0.1" in said.err
    create = bl.tuning.create_study
    monkeypatch.setattr(bl.tuning, "create_study", lambda name, storage, **rest: create(name, None, **rest))
    assert tune.main("ridge", arguments, ridge) == 0
    said = said.out + said.err + "".join(capsys.readouterr())
    assert "s3cret" not in said
    for path in tmp_path.iterdir():
        assert b"s3cret" not in path.read_bytes(), path
    assert "***" in (tmp_path / "config.json").read_text()


def test_of_two_studies_in_one_folder_one_is_refused(tmp_path, capsys):
    folder = RunFolder(tmp_path)
    folder.hold()
    assert run(tmp_path) == 2
    assert "is in use by process" in capsys.readouterr().err
    folder.release()


@pytest.mark.slow
def test_a_killed_worker_is_told_and_its_trial_tried_again(tmp_path, glyph_root):
    command = [sys.executable, "-m", "applications.few_shot", "tune", "--workers", "2", "--seconds", "1.5"]
    command += ["--trials", "4", "--confirm", "2", "--out", str(tmp_path), "--data-root", str(glyph_root), *QUICK]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    storage, deadline, running = str(tmp_path / "study.log"), time.monotonic() + 180, []
    while not running:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.3)
        if (tmp_path / "study.log").exists():
            opened = bl.tuning.open_storage(storage)
            with contextlib.suppress(KeyError):  # the study is not there yet
                found = optuna.load_study(study_name="few_shot score", storage=opened).trials
                running = [t for t in found if t.state.name == "RUNNING" and t.params and "process" in t.user_attrs]
    victim = running[0]
    os.kill(int(victim.user_attrs["process"].split()[1]), signal.SIGKILL)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    assert "was killed (SIGKILL); another goes on with its trial" in printed
    study = optuna.load_study(study_name="few_shot score", storage=bl.tuning.open_storage(storage))
    (again,) = [trial for trial in study.trials if "retry of" in trial.user_attrs]
    assert again.user_attrs["retry of"] == victim.number
    assert again.params.items() >= victim.params.items()


def test_interval_is_students():
    mean, half = interval([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5
    assert half == pytest.approx(3.182446 * 1.290994 / 2, rel=1e-6)


QUICK = ["--width", "8", "--tasks", "2", "--eval-tasks", "4", "--eval-steps", "2"]


@pytest.fixture
def quick_validation(monkeypatch):
    monkeypatch.setattr("applications.few_shot.tuning.VALIDATION_TASKS", 10)


def test_few_shot_tunes_and_trains_with_the_winner(tmp_path, glyph_root, quick_validation, capsys):
    common = ["--data-root", str(glyph_root), *QUICK]
    study = ["tune", "--trials", "3", "--seconds", "0.3", "--confirm", "2", "--out", str(tmp_path / "study"), *common]
    assert few_shot(study) == 0
    best = tmp_path / "study" / "best.json"
    settings = bl.tuning.load(best)
    assert set(settings) == {"solver", "hypergrad", "strength"}
    train = ["--steps", "2", "--validate-every", "0", "--solver", str(best), "--out", str(tmp_path / "run"), *common]
    assert few_shot(train) == 0
    assert bl.tuning.load(tmp_path / "run" / "solver.json") == settings
    best.unlink()  # the run is whole without it
    assert few_shot(["--resume", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    best.write_text('{"solver": {"type": "System"}}')
    assert few_shot(["--solver", str(best), "--out", str(tmp_path / "other"), *common]) == 2
    assert "'System' is no type of setting" in capsys.readouterr().err
    assert few_shot(["tune", "--method", "maml", "--out", str(tmp_path / "maml"), *common]) == 2


@pytest.mark.slow
def test_workers_share_a_journal_and_ctrl_c_keeps_the_study(tmp_path, glyph_root):
    """Two processes; interrupted, what is done is kept, nobody is left running, and the same command goes on."""
    command = [sys.executable, "-m", "applications.few_shot", "tune", "--workers", "2", "--seconds", "0.3"]
    command += ["--confirm", "2", "--out", str(tmp_path), "--data-root", str(glyph_root), *QUICK]
    storage = str(tmp_path / "study.log")

    def states():
        study = bl.tuning.create_study("few_shot score", storage, direction="maximize")
        return [trial.state.name for trial in study.trials]

    first = subprocess.Popen(
        [*command, "--trials", "400"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "study.log").exists() or states().count("COMPLETE") < 2:
        assert first.poll() is None, first.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.5)
    first.send_signal(signal.SIGINT)
    printed, _ = first.communicate(timeout=180)
    assert first.returncode == 130
    assert "the study is kept" in printed
    kept = states()
    assert kept.count("RUNNING") == 0  # swept: their processes are gone
    more = kept.count("COMPLETE") + kept.count("PRUNED") + 2
    done = subprocess.run([*command, "--trials", str(more)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    after = states()
    pairs = list(zip(after, kept, strict=False))
    assert all(now == before for now, before in pairs if before != "WAITING")  # those are the swept ones' second tries
    assert after.count("COMPLETE") + after.count("PRUNED") >= more
    processes = {
        trial.user_attrs["process"]
        for trial in optuna.load_study(study_name="few_shot score", storage=bl.tuning.open_storage(storage)).trials
    }
    assert str(os.getpid()) not in {process.split()[1] for process in processes}
    assert len(processes) >= 3
    assert (tmp_path / "best.json").exists()


def noted(study, trial):
    """A callback as a user writes one."""
    study.set_user_attr("seen", [*study.user_attrs.get("seen", []), trial.number])


def test_callbacks_and_artifacts_pass_through(tmp_path, capsys):
    path, store = f"{__name__}:noted", tmp_path / "store"
    assert run(tmp_path / "study", "--callback", path, "--artifacts", str(store)) == 0
    study = optuna.load_study(study_name="ridge score", storage=f"sqlite:///{tmp_path / 'study' / 'study.db'}")
    assert study.user_attrs["seen"] == [trial.number for trial in study.trials]
    kept = {meta.filename: meta for meta in optuna.artifacts.get_all_artifact_meta(study)}
    assert {"best.json", "study.html", "optimization-history.png", "slice.png"} <= set(kept)
    assert kept["slice.png"].mimetype == "image/png"
    optuna.artifacts.download_artifact(
        artifact_store=optuna.artifacts.FileSystemArtifactStore(store),
        file_path=str(tmp_path / "winner.json"),
        artifact_id=kept["best.json"].artifact_id,
    )
    assert set(bl.tuning.load(tmp_path / "winner.json")) == {"solver", "hypergrad"}
    before = len(optuna.artifacts.get_all_artifact_meta(study))
    assert run(tmp_path / "study", "--callback", path, "--artifacts", str(store)) == 0  # nothing new but dates
    assert (
        len(optuna.artifacts.get_all_artifact_meta(study)) - before <= 2
    )  # the page and the timeline have ids of theirs


def failing(study, trial):
    raise KeyError("the dashboard")


def leaving(study, trial):
    sys.exit(3)


@pytest.mark.parametrize(("name", "told"), [("failing", "KeyError: 'the dashboard'"), ("leaving", "SystemExit: 3")])
def test_a_callback_that_fails_is_named_and_the_trials_are_kept(tmp_path, capsys, name, told):
    assert run(tmp_path, "--callback", f"{__name__}:{name}") == 2
    assert f"error: --callback {__name__}:{name} failed after trial 0 ({told})" in capsys.readouterr().err
    study = optuna.load_study(study_name="ridge score", storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"]


@pytest.mark.parametrize(
    "path", ["nowhere.module:f", "math:no_such_function", "math:pi", "no path at all", "os:getcwd", "os.path:exists"]
)
def test_a_callback_that_cannot_be_called_is_told_before_anything_runs(tmp_path, capsys, path):
    assert run(tmp_path / "study", "--callback", path) == 2
    assert "--callback" in capsys.readouterr().err
    assert not (tmp_path / "study").exists()
