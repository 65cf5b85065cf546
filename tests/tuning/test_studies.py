"""Studies that are interrupted, killed, repaired and resumed, on real files and a real PostgreSQL server."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
from optuna.trial import TrialState

import bilevel as bl
from bilevel.tuning import best_trial, create_study, guard, limit, open_storage
from bilevel.tuning.studies import repair_journal, sweep

optuna.logging.set_verbosity(optuna.logging.WARNING)
ROOT = Path(__file__).parents[2]


def bowl(trial: optuna.Trial) -> float:
    return (trial.suggest_float("x", -10, 10) - 2) ** 2


def addresses(folder: Path) -> list[str]:
    return [f"sqlite:///{folder / 'study.db'}", str(folder / "study.log")]


@pytest.mark.parametrize("kind", [0, 1], ids=["sqlite", "journal"])
@pytest.mark.parametrize("sampler", ["tpe", "gp", "random"])
def test_five_and_five_are_ten_distinct_points(tmp_path, kind, sampler):
    address = addresses(tmp_path)[kind]
    for _ in range(2):
        study = create_study("bowl", address, sampler=sampler, defaults={"x": 0.5})
        study.optimize(guard(bowl), n_trials=5)
    found = create_study("bowl", address).trials
    assert len({trial.params["x"] for trial in found}) == len(found) == 10
    assert found[0].params == {"x": 0.5}  # the default came first, and once


@pytest.mark.parametrize(
    "address", ["sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite:///file::memory:?uri=true"]
)
def test_a_database_in_memory_is_refused(address):
    """The thread of its heartbeat would have another one, without tables."""
    with pytest.raises(ValueError, match="a database in memory"):
        create_study("bowl", address)


@pytest.mark.slow
def test_processes_that_make_one_database_at_once_share_it(tmp_path):
    code = """
import sys, time
import bilevel as bl
import optuna
time.sleep(max(0, float(sys.argv[2]) - time.time()))
study = bl.tuning.create_study("bowl", f"sqlite:///{sys.argv[1]}", sampler="random")
study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
"""
    begin = str(time.time() + 8)
    words = [sys.executable, "-c", code, str(tmp_path / "st.db"), begin]
    processes = [subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], errors
    assert len(create_study("bowl", f"sqlite:///{tmp_path / 'st.db'}").trials) == 3


def test_a_database_that_another_process_is_making_is_waited_for(monkeypatch, tmp_path):
    import sqlalchemy

    monkeypatch.setattr("bilevel.tuning.studies.time.sleep", lambda seconds: None)
    make, tried = optuna.storages.RDBStorage, []

    def storage(*args, **settings):
        tried.append(args)
        if len(tried) == 1:
            raise sqlalchemy.exc.IntegrityError("insert", {}, Exception("UNIQUE constraint failed: alembic_version"))
        return make(*args, **settings)

    monkeypatch.setattr(optuna.storages, "RDBStorage", storage)
    open_storage(f"sqlite:///{tmp_path / 'st.db'}")
    assert len(tried) == 2


def test_workers_do_not_repeat_each_other():
    points = []
    for worker in range(3):
        study = create_study("bowl", sampler="random", worker=worker)
        study.optimize(bowl, n_trials=3)
        points += [trial.params["x"] for trial in study.trials]
    assert len(set(points)) == 9


def test_five_of_twenty_diverge_and_fifteen_complete(tmp_path):
    def objective(trial):
        value = bowl(trial)
        if trial.number % 4 == 1:
            if trial.number == 1:
                return math.inf
            if trial.number == 5:
                return math.nan
            if trial.number == 9:
                bl.tuning.report(trial, 0, math.inf)
            steep = bl.GradientDescent(lr=1e3, max_steps=50)
            start = torch.ones(2) if trial.number == 13 else torch.tensor([1.0, math.nan])  # where a warm start led
            bl.argmin(lambda y: (y**4).sum(), start, solver=steep, hypergrad=None)
        return value

    study = create_study("bowl", addresses(tmp_path)[0])
    study.optimize(guard(objective), n_trials=20)
    states = [trial.state for trial in study.trials]
    assert states.count(TrialState.COMPLETE) == 15
    assert states.count(TrialState.PRUNED) == 5
    again = create_study("bowl", addresses(tmp_path)[0])
    assert [trial.state for trial in again.trials] == states
    assert again.trials[1].user_attrs["failure"] == "the value is inf"
    assert "SolveError" in again.trials[13].user_attrs["failure"]
    assert "NonFiniteError" in again.trials[17].user_attrs["failure"]


@pytest.mark.parametrize("kind", [0, 1], ids=["sqlite", "journal"])
def test_limits_survive_a_reload_and_bind_the_winner(tmp_path, kind):
    def objective(trial):
        x = trial.suggest_float("x", 0, 1)
        limit(trial, "seconds", 10 * x, at_most=5.0)
        return -x  # the best keep to no limit

    address = addresses(tmp_path)[kind]
    create_study("limited", address).optimize(guard(objective), n_trials=20)
    study = create_study("limited", address)
    for trial in study.trials:
        assert trial.constraints == {"seconds": pytest.approx(2 * trial.params["x"] - 1)}
        assert trial.user_attrs["seconds"] == 10 * trial.params["x"]
    within = [trial.params["x"] for trial in study.trials if trial.params["x"] <= 0.5]
    assert best_trial(study).params["x"] == max(within)
    with pytest.raises(ValueError, match="a positive limit"):
        limit(study.trials[0], "seconds", 1.0, at_most=0.0)


def test_no_trial_within_its_limits():
    def objective(trial):
        limit(trial, "seconds", 2.0, at_most=1.0)
        return 1.0

    study = create_study("limited")
    study.optimize(objective, n_trials=2)
    with pytest.raises(ValueError, match=r"None of the 2 trials .* \(2 are complete\)"):
        best_trial(study)


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_journal_that_was_cut_is_read_and_goes_on(tmp_path, cut):
    path = tmp_path / "study.log"
    create_study("bowl", path).optimize(guard(bowl), n_trials=6)
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    lines = content[:-cut].count(b"\n")
    study = create_study("bowl", path)
    assert path.read_bytes().count(b"\n") >= lines
    assert sum(trial.state == TrialState.COMPLETE for trial in study.trials) >= 5
    study.optimize(guard(bowl), n_trials=2)
    again = create_study("bowl", path)
    assert sum(trial.state == TrialState.COMPLETE for trial in again.trials) >= 7
    for line in path.read_text().splitlines():
        json.loads(line)


def test_repair_says_what_it_cut(tmp_path):
    path = tmp_path / "x.log"
    assert repair_journal(path) == 0
    path.write_bytes(b'{"a": 1}\n{"b"')
    assert repair_journal(path) == 4
    assert repair_journal(path) == 0
    assert path.read_bytes() == b'{"a": 1}\n'


def test_bad_addresses_samplers_and_directions(tmp_path):
    with pytest.raises(ValueError, match="the path of a journal that ends with"):
        open_storage("study")
    with pytest.raises(ValueError, match="sampler is 'grid'"):
        create_study("bowl", sampler="grid")
    create_study("bowl", addresses(tmp_path)[0])
    with pytest.raises(ValueError, match=r"exists with the directions \['minimize'\]"):
        create_study("bowl", addresses(tmp_path)[0], direction=["minimize", "maximize"])


WORKER = """
import sys, time
import optuna
from bilevel.tuning import create_study, guard

optuna.logging.set_verbosity(optuna.logging.WARNING)
address, worker, trials, pause = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])

def objective(trial):
    x = trial.suggest_float("x", -10, 10)
    if trial.user_attrs.get("slow") or pause:
        print("in", trial.number, flush=True)
        time.sleep(pause)
    return (x - 2) ** 2

study = create_study("bowl", address, sampler="random", worker=worker, grace_seconds=6)
study.optimize(guard(objective), n_trials=trials)
"""


def worker(address: str, number: int, trials: int, pause: float = 0.0) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, address, str(number), str(trials), str(pause)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_trial_whose_process_was_killed_is_swept_from_a_journal(tmp_path):
    path = tmp_path / "study.log"
    victim = worker(str(path), 0, 1, pause=600)
    assert victim.stdout.readline().startswith("in")
    study = create_study("bowl", path)
    assert [trial.state for trial in study.trials] == [TrialState.RUNNING]  # it lives: nobody takes its trial
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    study = create_study("bowl", path)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.WAITING]  # it is tried again
    study.optimize(guard(bowl), n_trials=2)
    trials = create_study("bowl", path).trials
    assert [trial.state.name for trial in trials] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert trials[1].user_attrs["retry of"] == 0
    assert trials[1].params == {**trials[1].params, **trials[0].params}


def test_a_running_trial_of_this_process_is_not_swept():
    study = create_study("bowl")
    swept = []

    def objective(trial):
        swept.append(sweep(study))
        return 1.0

    study.optimize(guard(objective), n_trials=1)
    assert swept == [0]
    assert study.trials[0].user_attrs["process"].split()[1] == str(os.getpid())


def test_a_trial_that_nobody_vouches_for_is_swept_after_its_grace():
    study = create_study("bowl")
    study.ask()
    assert sweep(study) == 0
    assert sweep(study, grace_seconds=-1) == 1


@pytest.fixture(scope="module")
def postgres(tmp_path_factory):
    """The address of an empty database on a server of its own, on loopback."""
    found = [shutil.which("pg_ctl"), *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl")))]
    programs = next((Path(path).resolve().parent for path in found if path), None)
    if programs is None or not (programs / "initdb").exists():
        pytest.skip("PostgreSQL's initdb and pg_ctl are not installed")
    pytest.importorskip("psycopg2", reason="psycopg2 is not installed")
    folder = tmp_path_factory.mktemp("postgres")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    prefix: list[str] = []
    if os.geteuid() == 0:  # the server refuses to run as root
        import pwd

        try:
            owner = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
        for parent in (folder, *folder.parents):
            if parent == Path(parent.anchor):
                break
            parent.chmod(parent.stat().st_mode | 0o011)
        os.chown(folder, owner.pw_uid, owner.pw_gid)
        prefix = ["runuser", "-u", "postgres", "--"]

    def run(program: str, *arguments: str) -> None:
        done = subprocess.run(
            [*prefix, str(programs / program), *arguments], cwd=folder, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr

    data = str(folder / "data")
    run("initdb", "-D", data, "-A", "trust", "-U", "optuna")
    options = f"-h 127.0.0.1 -p {port} -k {folder} -c fsync=off"
    run("pg_ctl", "-D", data, "-l", str(folder / "log"), "-o", options, "-w", "start")
    try:
        yield f"postgresql+psycopg2://optuna@127.0.0.1:{port}/postgres"
    finally:
        run("pg_ctl", "-D", data, "-m", "immediate", "stop")


@pytest.mark.slow
def test_four_workers_on_postgresql_one_killed(postgres):
    create_study("bowl", postgres, grace_seconds=6)
    victim = worker(postgres, 3, 1, pause=600)
    assert victim.stdout.readline().startswith("in")
    others = [worker(postgres, number, 6, pause=0.05) for number in range(3)]
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    killed_at = time.monotonic()
    for other in others:
        other.communicate(timeout=120)
        assert other.returncode == 0
    study = create_study("bowl", postgres, grace_seconds=6)
    (lost,) = [trial for trial in study.trials if trial.number == 0]
    # The next worker that comes by after the grace fails the trial and tries it again.
    while lost.state == TrialState.RUNNING and time.monotonic() - killed_at < 30:
        late = worker(postgres, 4, 1)
        late.wait()
        lost = create_study("bowl", postgres, grace_seconds=6).trials[0]
    assert lost.state == TrialState.FAIL
    late = worker(postgres, 5, 1)
    late.wait()
    trials = create_study("bowl", postgres, grace_seconds=6).trials
    retried = [trial for trial in trials if trial.system_attrs.get("failed_trial") == 0]
    assert [trial.params for trial in retried] == [lost.params]
    assert retried[0].state == TrialState.COMPLETE
    assert sorted(trial.number for trial in trials) == list(range(len(trials)))
    assert sum(trial.state == TrialState.COMPLETE for trial in trials) == len(trials) - 1 >= 18
    assert not [trial for trial in trials if trial.state == TrialState.RUNNING]


@pytest.mark.parametrize("kind", [0, 1], ids=["sqlite", "journal"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_defaults_that_were_interrupted_are_tried_again(tmp_path, kind, error):
    """Once they are measured, or pruned, they are not."""
    address = addresses(tmp_path)[kind]

    def broken(trial: optuna.Trial) -> float:
        trial.suggest_float("x", -10, 10)
        raise error

    study = create_study("s", address, defaults={"x": 2.0})
    with pytest.raises(error):
        study.optimize(guard(broken), n_trials=3)
    study = create_study("s", address, defaults={"x": 2.0})
    study.optimize(guard(bowl), n_trials=3)
    assert study.best_value == 0
    assert study.best_trial.user_attrs["default"]
    study = create_study("s", address, defaults={"x": 2.0})
    study.optimize(guard(bowl), n_trials=2)
    assert [trial.params["x"] for trial in study.trials].count(2.0) == 2


def test_a_sqlite_file_gets_its_folder(tmp_path):
    create_study("s", f"sqlite:///{tmp_path / 'a' / 'b.db'}").optimize(guard(bowl), n_trials=1)
    assert (tmp_path / "a" / "b.db").exists()


def test_a_damaged_storage_is_named(tmp_path):
    garbage = tmp_path / "garbage.db"
    garbage.write_bytes(b"no database at all" * 100)
    with pytest.raises(ValueError, match=r"garbage\.db is damaged, is none of Optuna, or cannot be reached"):
        create_study("s", f"sqlite:///{garbage}")
    with pytest.raises(ValueError, match="cannot be reached") as caught:
        create_study("s", "postgresql+psycopg2://someone:secret@127.0.0.1:1/none")
    assert "secret" not in str(caught.value)
    path = tmp_path / "study.log"
    create_study("s", path).optimize(guard(bowl), n_trials=2)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], "{damaged\n", *lines[2:]]))
    with pytest.raises(ValueError, match=r"Line 3 of the journal .*study\.log is damaged"):
        create_study("s", path)


@pytest.mark.parametrize("value", [None, np.ones(2), "1.0x", torch.ones(3)])
def test_what_is_no_number_is_named(value):
    with pytest.raises(TypeError, match=f"The objective returned {type(value).__name__}: a number is needed"):
        create_study("s").optimize(guard(lambda trial: value), n_trials=1)


def test_other_ranges_are_told_whenever_they_come(tmp_path):
    """Also of a parameter that the first trial of the resumed study does not ask for."""

    def objective(high: float):
        def run(trial: optuna.Trial) -> float:
            kind = trial.suggest_categorical("kind", ["a", "b"])
            return trial.suggest_float(kind, 0, high)

        return run

    address = addresses(tmp_path)[1]
    study = create_study("s", address)
    for kind in "ab":
        study.enqueue_trial({"kind": kind})
    study.optimize(guard(objective(1.0)), n_trials=2)
    study = create_study("s", address)
    for kind in "aabb":
        study.enqueue_trial({"kind": kind})
    with pytest.warns(UserWarning, match="The study was begun with") as caught:
        study.optimize(guard(objective(2.0)), n_trials=4)
    told = [str(warning.message) for warning in caught if "was begun with" in str(warning.message)]
    assert len(told) == 2
    assert "'a'" in told[0]
    assert "'b'" in told[1]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("3", "The objective returned str: a number is needed"),
        (None, "Is its return missing"),
        ((1.0, 2.0), "returned 2 numbers, and the directions of the study are minimize"),
        ([], "returned 0 numbers"),
    ],
)
def test_an_objective_that_returns_something_else_ends_the_study(value, message):
    study = create_study("study")
    with pytest.raises(TypeError, match=message):
        study.optimize(guard(lambda trial: value), n_trials=3)
    assert len(study.trials) == 1


@pytest.mark.parametrize("seed", [None, -1, 2**32, 1.5, True])
def test_seeds_that_are_none(seed):
    with pytest.raises(ValueError, match="a whole number from 0 to 2"):
        create_study("study", seed=seed)


def test_the_last_seeds_can_be_resumed(tmp_path):
    for _ in range(3):
        study = create_study("study", f"sqlite:///{tmp_path / 'study.db'}", seed=2**32 - 2, worker=1)
        study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    assert len({trial.value for trial in study.trials}) == 3


def test_defaults_are_numbers_of_numpy_too(tmp_path):
    for storage in (f"sqlite:///{tmp_path / 'study.db'}", tmp_path / "study.log"):
        study = create_study("study", storage, defaults={"n": np.int64(3), "x": np.float32(0.5)})
        study.optimize(guard(lambda trial: trial.suggest_int("n", 1, 9) * trial.suggest_float("x", 0, 1)), n_trials=1)
        assert study.trials[0].params == {"n": 3, "x": 0.5}
