"""Hyper-cleaning: hypergradient and fits against truth, what is found, resuming, bad input, the number to expect."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import bilevel as bl
from applications.data_cleaning import curves, stochastic
from applications.data_cleaning.__main__ import Config, story
from applications.data_cleaning.cleaning import Cleaning
from applications.data_cleaning.model import Model
from applications.data_cleaning.scores import agreement, detection, kept
from applications.data_cleaning.stochastic import Judge, MiniBatches
from applications.data_cleaning.task import Labelled, Task, make_task
from applications.frame.command import main
from applications.frame.data import Examples, load
from applications.frame.mini_batches import STOCHASTIC
from applications.frame.run_folder import RunFolder
from tests.applications.refusals import NO_DATA, refusals


def clean(*arguments: str) -> int:
    return main("data_cleaning", list(arguments), Config, story)


def double(data: Labelled) -> Labelled:
    return Labelled(data.features.double(), data.labels)


@pytest.fixture
def task() -> Task:
    """Thirty training examples of three classes in four dimensions, in float64."""
    random = np.random.default_rng(0)
    targets = np.arange(90) % 3
    features = random.normal(size=(90, 4)) + 2 * np.eye(4)[targets]
    found = make_task(Examples("blobs", features, targets, 3), 30, 30, 0.4, seed=0)
    return replace(
        found, train=double(found.train), val=double(found.val), test=double(found.test), clean=double(found.clean)
    )


def make_cleaning(task: Task, name: str = "softmax", ridge: float = 0.1) -> Cleaning:
    model = Model.make(name, task, hidden=5, ridge=ridge, seed=0)
    model.net.double()
    cleaning = Cleaning(model, task, steps=3, lr=0.3)
    cleaning.solver = bl.LBFGS(gtol=1e-10)
    return cleaning


def hypergradient(cleaning: Cleaning) -> torch.Tensor:
    loss = cleaning.val_loss(cleaning.solve().value)
    return torch.autograd.grad(loss, cleaning.logits)[0]


def test_the_hypergradient_is_the_slope_of_the_validation_loss(task):
    cleaning = make_cleaning(task)
    cleaning.hypergrad = replace(cleaning.hypergrad, linear_solver=bl.CG(rtol=1e-10))
    with torch.no_grad():
        cleaning.logits.copy_(torch.linspace(-2, 2, 30, dtype=torch.float64))
    found, random = hypergradient(cleaning), torch.Generator().manual_seed(0)
    for _ in range(3):
        direction, losses = torch.randn(30, generator=random, dtype=torch.float64), []
        for shift in (1e-4, -2e-4):  # to there, then to the other side
            with torch.no_grad():
                cleaning.logits += shift * direction
            losses.append(cleaning.val_loss(cleaning.solve().value).item())
        with torch.no_grad():
            cleaning.logits += 1e-4 * direction
        # Central differences: 1e-8 from the step, 1e-7 from inner solutions to 1e-10.
        assert (found @ direction).item() == pytest.approx((losses[0] - losses[1]) / 2e-4, rel=1e-5, abs=1e-7)


def test_the_settings_of_the_command_give_the_hypergradient_to_some_percent(task):
    exact, coarse = make_cleaning(task), make_cleaning(task)
    exact.hypergrad = replace(exact.hypergrad, linear_solver=bl.CG(rtol=1e-10))
    coarse.solver = bl.LBFGS(gtol=1e-3)
    truth = hypergradient(exact)
    assert (hypergradient(coarse) - truth).norm() < 0.05 * truth.norm()


def test_gauss_newton_is_the_hessian_of_softmax_regression_and_keeps_networks_convex(task):
    cleaning = make_cleaning(task)
    hessian = bl.Implicit(bl.CG(rtol=1e-10))
    cleaning.hypergrad = replace(cleaning.hypergrad, linear_solver=bl.CG(rtol=1e-10))
    found = hypergradient(cleaning)
    cleaning.hypergrad = hessian
    torch.testing.assert_close(found, hypergradient(cleaning), rtol=1e-6, atol=1e-9)

    network = make_cleaning(task, "mlp", ridge=1e-3)
    network.solver = bl.LBFGS(max_steps=20)
    fit = network.solve()
    network.val_loss(fit.value).backward()
    assert fit.adjoint.curvature[0] > 0
    assert network.logits.grad.norm() > 0


def test_a_fit_is_that_of_scikit_learn(task):
    """Which leaves the bias out of the penalty, so it is given as a feature."""
    model = make_cleaning(task, ridge=0.01).model
    params, weights = model.start(), torch.rand(30, dtype=torch.float64)
    for given in (None, weights):
        fit = bl.argmin(model.loss, params, task.train, given, solver=bl.LBFGS(gtol=1e-10), hypergrad=None)
        ones = np.concatenate([task.train.features.numpy(), np.ones((30, 1))], 1)
        peer = LogisticRegression(C=1 / (30 * 0.01), fit_intercept=False, tol=1e-10, max_iter=10_000)
        peer.fit(ones, task.train.labels.numpy(), None if given is None else given.numpy())
        found = torch.cat([fit.value["weight"], fit.value["bias"][:, None]], 1).numpy()
        np.testing.assert_allclose(found, peer.coef_, atol=1e-6)


def test_scores_by_hand():
    wrong = torch.tensor([True, True, True, False, False])
    found = detection(torch.tensor([0.1, 0.2, 0.9, 0.3, 0.5]), wrong)  # 1/2 is trusted: three are reported
    assert found["precision"] == pytest.approx(2 / 3)
    assert found["recall"] == pytest.approx(2 / 3)
    assert found["F1"] == pytest.approx(2 / 3)
    assert found["AUC"] == pytest.approx(4 / 6)
    assert detection(torch.full((5,), 0.9), wrong)["F1"] == 0.0
    assert np.isnan(detection(torch.full((5,), 0.1), torch.zeros(5, dtype=torch.bool))["AUC"])


def test_a_classifier_trusts_the_labels_that_it_would_give(task):
    model = make_cleaning(task).model
    params = model.fit(task.val)
    trust = agreement(model, params, task.train)
    same = model.logits(params, task.train.features).argmax(1) == task.train.labels
    assert torch.equal(trust > 0.5, same)
    assert len(kept(task, trust)) == int(same.sum()) + 30


def test_tasks_are_disjoint_and_only_training_labels_are_spoilt():
    task = make_task(load("digits"), 500, 300, 0.5, seed=1)
    assert (len(task.train), len(task.val), len(task.test)) == (500, 300, 997)
    assert task.wrong.double().mean().item() == pytest.approx(0.5, abs=0.07)  # three standard deviations
    rows = torch.cat([task.train.features, task.val.features, task.test.features])
    assert len(rows.unique(dim=0)) == len(rows)
    again, other = (make_task(load("digits"), 500, 300, 0.5, seed=seed) for seed in (1, 2))
    assert torch.equal(again.train.labels, task.train.labels)
    assert not torch.equal(other.train.labels, task.train.labels)


def test_mnist_keeps_its_test_set(mnist_root, tmp_path):
    mnist = load("mnist", mnist_root)
    first, second = (make_task(mnist, 200, 100, 0.5, seed) for seed in (0, 1))
    assert torch.equal(first.test.features, second.test.features)
    assert len(first.test) == 10_000
    assert first.test.labels[:5].tolist() == [7, 2, 1, 0, 4]  # as everywhere
    sizes = ("--num-train", "300", "--num-val", "300", "--repeats", "1", "--steps", "10")
    out = tmp_path / "run"
    assert clean("--data", "mnist", "--data-root", str(mnist_root), *sizes, "--out", str(out)) == 0
    found = scores(json.loads((out / "results.json").read_text())["tables"])
    assert found["hyper-cleaning"]["F1"] > 0.8
    assert found["hyper-cleaning: dropped, and validation data"]["accuracy"] > found["noisy labels"]["accuracy"] + 10


def scores(tables: dict) -> dict[str, dict]:
    """Rows by their first column."""
    return {next(iter(row.values())): row for rows in tables.values() for row in rows}


SMALL = ("--num-train", "60", "--num-val", "60", "--repeats", "2", "--steps", "3", "--fit-ridge", "0.03")


def comparable(folder) -> tuple:
    records = [{k: v for k, v in record.items() if k != "seconds"} for record in RunFolder(folder).metrics()]
    return records, json.loads((folder / "results.json").read_text())["tables"]


def test_interrupted_and_resumed_is_bit_for_bit_the_whole_run(tmp_path, monkeypatch):
    assert clean(*SMALL, "--out", str(tmp_path / "whole")) == 0
    records = Cleaning.rows

    def stopped(self):
        for record in records(self):
            if record["step"] == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield record

    with monkeypatch.context() as patch:
        patch.setattr(Cleaning, "rows", stopped)
        assert clean(*SMALL, "--out", str(tmp_path / "halves")) == 128 + signal.SIGTERM
    assert len(RunFolder(tmp_path / "halves").metrics()) == 2
    assert clean("--resume", str(tmp_path / "halves")) == 0
    assert comparable(tmp_path / "halves") == comparable(tmp_path / "whole")
    for name in ("found_wrong.png", "progress.png"):
        assert (tmp_path / "halves" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_network_is_cleaned_too(tmp_path):
    assert clean(*SMALL, "--repeats", "1", "--model", "mlp", "--hidden", "4", "--out", str(tmp_path / "run")) == 0
    records, tables = comparable(tmp_path / "run")
    assert records[-1]["val_loss"] < records[0]["val_loss"]
    assert scores(tables)["hyper-cleaning"]["AUC"] > 0.6


@refusals(
    *("--noise 1", "--steps 0", "--ridge 0", "--fit-ridge -1", "--lr 0", "--num-val 0"),
    (("--setting", "stochastic", "--seconds", "0"), "--seconds is 0"),
    (("--setting", "stochastic", "--model", "mlp"), "of softmax regression"),
    (("--num-train", "1700", "--num-val", "200"), "parts of 1700, 200"),
    (("--num-train", "5"), "digits cannot be split"),
    *NO_DATA,
)
def test_bad_options_are_told_and_nothing_is_written(arguments, message, refused):
    assert message in refused(clean, *arguments)


def test_bad_files_are_told_and_nothing_is_written(bad_file, refused):
    assert str(bad_file) in refused(clean, "--data", bad_file)


def test_batches_average_to_the_losses_of_the_other_setting(task):
    cleaning = make_cleaning(task)
    problem = MiniBatches(cleaning.model, task)
    with torch.no_grad():
        cleaning.logits.copy_(torch.linspace(-2, 2, 30, dtype=torch.float64))
        params = {name: torch.randn_like(value) for name, value in cleaning.params.items()}
        batches = torch.randperm(30).view(5, 6)
        for whole, loss in (
            (cleaning.train_loss(params), problem.train_loss),
            (cleaning.val_loss(params), problem.val_loss),
        ):
            parts = torch.stack([loss(params, cleaning.logits, batch) for batch in batches])
            torch.testing.assert_close(parts.mean(), whole)
            torch.testing.assert_close(loss(params, cleaning.logits), whole)


def test_the_judge_is_at_the_exact_solution(task):
    cleaning = make_cleaning(task)
    problem = MiniBatches(cleaning.model, task)
    judge = Judge(problem)
    cleaning.solver = bl.LBFGS(gtol=1e-3)
    for logit in (0.0, 1.0):
        with torch.no_grad():
            cleaning.logits[:10] = logit
        exact = cleaning.val_loss(cleaning.solve().value).item()
        assert judge(cleaning.logits)["validation loss"] == pytest.approx(exact, rel=1e-2)


def test_tuning_takes_the_step_sizes_of_the_least_validation_loss(task, monkeypatch):
    problem = MiniBatches(make_cleaning(task).model, task)
    monkeypatch.setattr(stochastic, "OUTER_FACTORS", (1e-6, 1.0))
    assert stochastic.tune(problem, "SOBA", 0.05).outer == 1.0  # the other stays where it begins
    monkeypatch.setattr(stochastic, "INNER_FACTORS", (1.0, 1e30))
    assert stochastic.tune(problem, "SOBA", 0.05).inner == 1.0  # the other diverges


def test_every_method_has_its_curve_and_interrupted_goes_on(tmp_path, monkeypatch):
    for module, name in product((curves, stochastic), ("INNER_FACTORS", "OUTER_FACTORS")):
        monkeypatch.setattr(module, name, (1.0,))
    arguments = ("--setting", "stochastic", "--data", "iris", "--seconds", "0.03", "--out", str(tmp_path / "run"))
    tuned = curves.tuned_curve

    def interrupted(problem, name, seconds):
        if name == "FSLA":
            raise KeyboardInterrupt
        return tuned(problem, name, seconds)

    with monkeypatch.context() as patch:
        patch.setattr(curves, "tuned_curve", interrupted)
        assert clean(*arguments) == 130
    first = json.loads((tmp_path / "run" / "results.json").read_text())["parts"]
    assert clean("--resume", str(tmp_path / "run")) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {name: results["parts"][name] for name in first} == first
    methods = {row["method"]: row for rows in results["tables"].values() for row in rows if "method" in row}
    assert set(methods) == {"implicit", *STOCHASTIC}
    start = results["parts"]["implicit"]["value"][0]["validation loss"]
    assert methods["SOBA"]["validation loss"] < start
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.applications
def test_the_number_to_expect(readme_run):
    folder, tables, printed = readme_run("data_cleaning")
    found = scores(tables)
    accuracy = {name: row["accuracy"] for name, row in found.items() if "accuracy" in row}
    assert accuracy["noisy labels"] < 78
    assert accuracy["hyper-cleaning: weighted"] > accuracy["noisy labels"] + 15
    assert accuracy["hyper-cleaning: dropped, and validation data"] > 95
    assert accuracy["hyper-cleaning: dropped, and validation data"] > accuracy["noisy labels and validation data"] + 2
    assert accuracy["oracle: right labels and validation data"] < 98.5  # the test is not in the training data
    assert found["hyper-cleaning"]["F1"] > 0.95
    assert found["hyper-cleaning"]["lowest F1"] > 0.93
    assert found["hyper-cleaning"]["precision"] > 0.96
    assert found["validation model disagrees"]["F1"] > 0.96
    assert "hyper-cleaning: weighted" in printed
    for name in ("found_wrong.png", "progress.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
