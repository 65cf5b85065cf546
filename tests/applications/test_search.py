"""The comparison of searches, its tuning, and its command."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.datasets import make_regression
from sklearn.kernel_ridge import KernelRidge

from applications.frame.command import main
from applications.frame.data import Examples
from applications.frame.interruption import Interruption, Stopped
from applications.search import comparison
from applications.search.__main__ import Config, story
from applications.search.comparison import Comparison
from applications.search.contests import of_file
from applications.search.methods import METHODS, Task
from applications.search.one_by_one import one_by_one
from applications.search.tuning import Watched, tunable
from bilevel.sklearn import BilevelSearchCV
from tests.sklearn.data import data


def test_a_loop_that_calls_can_be_asked():
    seen = []

    def count(give):
        try:
            for number in range(4):
                seen.append(number)
                give(number)
        finally:
            seen.append("ended")

    assert list(one_by_one(count)) == [0, 1, 2, 3]
    seen.clear()
    asked = one_by_one(count)
    assert [next(asked), next(asked), seen] == [0, 1, [0, 1]]  # it waits
    asked.close()
    assert seen == [0, 1, "ended"]

    def fail(give):
        give(0)
        raise ValueError("bad")

    asked = one_by_one(fail)
    next(asked)
    with pytest.raises(ValueError, match="bad"):
        next(asked)


def test_a_search_evaluation_by_evaluation_is_the_whole_search():
    x, y = data("regression")
    arguments = (KernelRidge(kernel="rbf", gamma=90.0), {"alpha": (1e-4, 1e2), "gamma": (1e-4, 1e2)})
    whole = BilevelSearchCV(*arguments, n_starts=2, random_state=0).fit(x, y)
    watched = Watched(*arguments, n_starts=2, random_state=0)
    assert list(watched.losses(x, y)) == whole.cv_results_["mean_test_loss"].tolist()
    assert watched.best_score_ == whole.best_score_
    begun = Watched(*arguments).losses(x, y)
    assert next(begun) == whole.cv_results_["mean_test_loss"][0]
    begun.close()


def test_a_tuned_search_is_the_comparison_s(tmp_path):
    """By default the study's first trial reaches the loss that the comparison tells, in as many evaluations."""
    x, y = make_regression(60, 5, noise=5.0, random_state=0)
    np.savez(tmp_path / "own.npz", features=x, targets=y)
    study = tunable(Config(data=str(tmp_path / "own.npz"), task="regression"))
    records = list(study.train(study.settings(study.default), 3))
    plan = Comparison(of_file(Examples("own", x, y, 0)), 1, 3, seed=3)
    (told,) = [r for r in plan.rows() if r["method"] == "hypergradient" and "feature" in r["contest"]]
    assert [step for step, _, _ in records] == list(range(1, told["candidates"] + 1))
    assert records[-1][1] == told["cv_loss"] < records[0][1]
    short = list(study.train({"tol": 1e-4, "max_iter": 1, "n_starts": 1}, 3))
    assert 1 < len(short) < len(records)


def test_bad_settings_end_with_2(tmp_path, capsys):
    (tmp_path / "bad.json").write_text('{"tol": -1.0}')
    settings = ("--data", "diabetes", "--task", "regression", "--solver", str(tmp_path / "bad.json"))
    assert search_command(*settings, "--out", str(tmp_path / "run")) == 2
    assert "'tol' is -1.0, and a positive number" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_comparison_resumes_where_it_stood(tmp_path, monkeypatch):
    """Only the seconds differ."""
    monkeypatch.setattr(comparison, "METHODS", {name: METHODS[name] for name in ("untuned", "hypergradient")})
    x, y = make_regression(60, 5, noise=5.0, random_state=0)
    contests = of_file(Examples("drawn", x, y, 0))

    def plain(records):
        return [{k: v for k, v in r.items() if k not in ("search_seconds", "curve")} for r in records]

    whole = plain(Comparison(contests, 2, 3, seed=0).rows())
    assert len(whole) == 2 * 2 * 2
    first = Comparison(contests, 2, 3, seed=0)
    begun = first.rows()
    halves = plain([next(begun) for _ in range(3)])
    second = Comparison(contests, 2, 3, seed=0)
    second.restore(first.state())
    assert halves + plain(second.rows()) == whole


@pytest.mark.parametrize("method", ["untuned", "grid", "random", "Optuna"])
def test_a_signal_ends_a_method_between_two_fits(method):
    """scikit-learn takes a fit that raises for a bad candidate, and goes on with the next."""
    x, y = make_regression(60, 5, noise=5.0, random_state=0)
    task = Task(of_file(Examples("drawn", x, y, 0))[0], x, y, candidates=3, seed=0)
    with Interruption() as asked:
        asked.exit_code = 143
        with pytest.raises(Stopped):
            METHODS[method](task)
    assert len(METHODS[method](task).params) >= 1


def search_command(*arguments: str) -> int:
    return main("search", list(arguments), Config, story, tunable)


def test_a_file_of_the_user_is_searched(tmp_path, capsys):
    x, y = make_regression(50, 4, noise=5.0, random_state=0)
    np.savez(tmp_path / "own.npz", features=x, targets=y)
    settings = ("--data", str(tmp_path / "own.npz"), "--task", "regression", "--candidates", "3")
    assert search_command(*settings, "--out", str(tmp_path / "run")) == 0
    tables = json.loads((tmp_path / "run" / "results.json").read_text())["tables"]
    assert {row["hyperparameters"] for row in tables["All methods"]} == {1, 4}
    shown = capsys.readouterr().out
    assert search_command("--resume", str(tmp_path / "run")) == 0
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize("wrong", ["nan", "range", "empty", "halves", "shapes", "sparse", "damaged", "missing"])
def test_bad_files_end_with_2_and_write_nothing(wrong, bad_files, tmp_path, capsys):
    assert search_command("--data", str(bad_files[wrong]), "--out", str(tmp_path / "run")) == 2
    assert "error: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_bad_knobs_end_with_2(tmp_path, capsys):
    for knob in ("--repeats", "--candidates"):
        assert search_command(knob, "0", "--out", str(tmp_path / "run")) == 2
        assert f"{knob} is 0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.applications
def test_the_command_of_the_readme(readme_run):
    folder, tables, _ = readme_run("search")
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    rows = {row["contest"]: row for row in tables["Hypergradient beside the best of the others"]}
    assert len(rows) == 8
    for row in rows.values():  # what it minimises is as small as theirs, or smaller
        assert row["our CV loss"] < 1.01 * row["its CV loss"]
    for name in ("diabetes, ridge", "breast cancer, logistic", "digits, logistic"):
        assert rows[name]["our held-out"] < 1.05 * rows[name]["its held-out"]
    widths, wide = rows["friedman1, width a feature"], rows["1,000 features, penalty a feature"]
    assert widths["our held-out"] < 2.3
    assert widths["our held-out"] < 0.85 * widths["its held-out"]
    assert wide["hyperparameters"] == 1000
    assert wide["our held-out"] < 300 < 30_000 < wide["its held-out"]
