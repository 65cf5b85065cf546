"""Many regularization hyperparameters: against dense, scikit-learn and finite differences; resumed; refused."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import scipy.sparse
import torch

import bilevel as bl
from applications.frame.command import main
from applications.frame.data import Examples, load, split
from applications.frame.run_folder import RunFolder
from applications.regularization import augmentation, corpus, features, weights
from applications.regularization.__main__ import Config, read, story, tunable
from applications.regularization.augmentation import STRENGTHS, Augmented, Draws, constant, transform
from applications.regularization.features import Regression
from applications.regularization.weights import Network, decay_shape
from tests.applications.refusals import refusals


@pytest.fixture(scope="module")
def sparse_parts():
    """Three sets of 40 examples with 12 features, of which most are zero; the classes follow the first three."""
    random = np.random.default_rng(0)
    dense = random.random((120, 12)) * (random.random((120, 12)) < 0.4)
    targets = (dense[:, :3] + 0.1 * random.random((120, 3))).argmax(1)
    examples = Examples("random", scipy.sparse.csr_array(dense), targets, 3)
    return [examples.subset(np.arange(120) % 3 == k) for k in range(3)]


def dense(parts):
    return [replace(part, features=part.features.toarray()) for part in parts]


def validation_loss(regression, x):
    """To rounding, and differentiable."""
    fit = bl.argmin(
        regression.training_loss,
        regression.start(),
        x,
        solver=bl.LBFGS(gtol=1e-11, max_steps=500),
        hypergrad=bl.Implicit(bl.CG(rtol=1e-12, max_steps=500)),
        throw="ignore",
    )
    return features.loss(fit.value, regression.validation)


def test_hypergradient_of_sparse_penalties_is_that_of_dense_ones_and_of_finite_differences(sparse_parts):
    sparse, full = Regression.of(*sparse_parts), Regression.of(*dense(sparse_parts))
    assert sparse.train[0].layout is torch.sparse_csr
    x = torch.linspace(-5, -2, 12, dtype=torch.float64, requires_grad=True)
    (ours,) = torch.autograd.grad(validation_loss(sparse, x), x)
    (theirs,) = torch.autograd.grad(validation_loss(full, x), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)
    for k in (0, 7):
        step = 1e-4 * torch.eye(12, dtype=torch.float64)[k]
        slope = (validation_loss(sparse, x.detach() + step) - validation_loss(sparse, x.detach() - step)) / 2e-4
        assert ours[k].item() == pytest.approx(slope.item(), rel=1e-5)


def test_the_search_takes_hypergradients_good_to_a_few_percent(sparse_parts):
    regression = Regression.of(*sparse_parts)
    search = regression.search(12, -4.0, steps=1, lr=0.1)
    x = search.hparams["log_penalties"]
    truth = x.detach().clone().requires_grad_()
    groups = regression.groups(12)
    (expected,) = torch.autograd.grad(validation_loss(regression, truth[groups]), truth)
    next(search.rows())
    assert (x.grad - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("form", [list, dense])
def test_one_penalty_is_scikit_learns(sparse_parts, form):
    from sklearn.linear_model import LogisticRegression

    parts = form(sparse_parts)
    train = parts[0]
    regression = Regression.of(*parts)
    model = LogisticRegression(C=3.0, fit_intercept=False, tol=1e-10, max_iter=1000).fit(train.features, train.targets)
    x = torch.full((12,), -math.log(3.0 * len(train)), dtype=torch.float64)
    found = regression.solve(regression.start(), x).value["weight"]
    torch.testing.assert_close(found.T, torch.from_numpy(model.coef_), rtol=0, atol=2e-4)
    rows = features.shared_penalties(*parts)
    assert rows[0]["training_loss"] < rows[1]["training_loss"]
    assert rows[1]["validation_loss"] == min(row["validation_loss"] for row in rows[:2])
    x = torch.full((12,), rows[1]["log_penalty"], dtype=torch.float64)
    measured = regression.measure(regression.solve(regression.start(), x).value)
    assert measured["test_loss"] == pytest.approx(rows[1]["test_loss"], abs=1e-3)


@pytest.mark.parametrize("form", [list, dense])
def test_groups_hold_features_of_like_size(sparse_parts, form):
    parts = form(sparse_parts)
    regression = Regression.of(*parts)
    groups = regression.groups(4)
    assert groups.bincount().tolist() == [3, 3, 3, 3]
    square = regression.train[0].to_dense().square().sum(0)
    assert all(square[groups == k].max() <= square[groups == k + 1].min() for k in range(3))
    assert sorted(regression.groups(12).tolist()) == list(range(12))
    assert regression.groups(1).unique().tolist() == [0]


def test_the_corpus_has_twenty_classes_and_no_word_that_names_one():
    examples = corpus.docstrings()
    counts = np.bincount(examples.targets)
    assert examples.sparse
    assert examples.num_classes == len(counts) == 20
    assert counts.min() >= 40
    assert counts.max() == corpus.MOST_TEXTS
    np.testing.assert_allclose((examples.features**2).sum(1), 1, atol=1e-12)
    texts = list(corpus.texts_of("numpy.polynomial"))
    assert all(corpus.FEWEST_WORDS <= len(text.split()) <= corpus.MOST_WORDS for text in texts)
    assert not any(word in corpus.LEAKS for text in texts for word in text.split())


def test_gradient_towards_decays_is_the_closed_form():
    part = (torch.rand(6, 4), torch.arange(6) % 3)
    network = Network(part, hidden=5, num_classes=3, seed=0)
    params = network.start
    for sharing in ("weight", "layer"):
        decays = network.decays(sharing)
        network.training_loss(params, decays).backward()
        for name, x in decays.items():
            expected = (x.detach().exp() * params[name].square() / 2).sum_to_size(x.shape)
            torch.testing.assert_close(x.grad, expected)
    assert decay_shape(torch.zeros(7, 3), "weight") == (7, 3)
    assert decay_shape(torch.zeros(7, 3), "layer") == (1, 1)


def test_transformations_are_what_they_say():
    images = torch.rand(3, 1, 8, 8)
    none = constant(dict.fromkeys(STRENGTHS, 0.0))
    draws = Draws.of(images, 0)
    torch.testing.assert_close(transform(images, none, draws), images, atol=1e-5, rtol=0)
    ones = Draws(torch.ones(3), torch.ones(3, 2), torch.ones(3), draws.noise)
    turned = transform(images, {**none, "rotation": torch.tensor(math.pi / 2)}, ones)
    torch.testing.assert_close(turned, images.rot90(1, (2, 3)), atol=1e-5, rtol=0)
    moved = transform(images, {**none, "shift": torch.tensor(0.25)}, ones)  # a pixel: 2 / 8
    torch.testing.assert_close(moved[..., :-1, :-1], images[..., 1:, 1:], atol=1e-5, rtol=0)
    assert torch.equal(Draws.of(images, 3).shift, Draws.of(images, 3).shift)


def test_hypergradient_of_strengths_is_that_of_finite_differences():
    torch.manual_seed(0)
    images, targets = torch.rand(8, 1, 4, 4), torch.arange(8) % 2
    problem = Augmented.of((images, targets), (images, targets), (images, targets), 2, seed=0)
    problem = replace(problem, hidden=3, copies=1, decay=0.1)
    problem.net.double()
    draws = Draws.of(images, 1)
    draws = Draws(draws.angle.double(), draws.shift.double(), draws.scale.double(), draws.noise.double())
    held_out = (problem.validation[0].double(), targets)

    def loss(x):
        logs = dict(zip(STRENGTHS, x, strict=True))
        fit = bl.argmin(
            lambda params: problem.training_loss(params, logs, images.double(), draws),
            problem.start,
            solver=bl.LBFGS(gtol=1e-11, max_steps=500),
            hypergrad=bl.Implicit(bl.MINRES(rtol=1e-11)),
            throw="ignore",
        )
        return problem.loss(fit.value, held_out)

    x = torch.tensor([-1.5, -2.0, -2.5, -1.0], dtype=torch.float64, requires_grad=True)
    (ours,) = torch.autograd.grad(loss(x), x)
    for k in range(4):
        step = 1e-4 * torch.eye(4, dtype=torch.float64)[k]
        slope = (loss(x.detach() + step) - loss(x.detach() - step)) / 2e-4
        assert ours[k].item() == pytest.approx(slope.item(), rel=1e-3, abs=1e-8)


def searches(steps: int):
    train, validation, test = split(load("iris"), (30, 30, 60), seed=0)
    digits = [(x.view(-1, 1, 8, 8), y) for x, y in (p.tensors() for p in split(load("digits"), (40, 40, 40), seed=0))]
    network = Network(train.tensors(), hidden=8, num_classes=3, seed=0)
    yield Regression.of(train, validation, test).search(4, -3.0, steps, lr=0.3)
    yield network.search("weight", validation.tensors(), test.tensors(), steps)
    yield Augmented.of(*digits, num_classes=10, seed=0).search(steps, lr=0.1)


def test_a_resumed_search_makes_the_same_steps_bit_for_bit():
    for whole, first, second in zip(searches(4), searches(4), searches(4), strict=True):
        expected = list(whole.rows())
        assert len(expected) == 4
        records, buffer = list(islice(first.rows(), 2)), io.BytesIO()
        torch.save(first.state(), buffer)
        buffer.seek(0)
        second.restore(torch.load(buffer, weights_only=True))
        assert records + list(second.rows()) == expected
        for name, x in whole.hparams.items():
            assert torch.equal(x, second.hparams[name])


def test_a_checkpoint_of_another_size_is_refused():
    state = next(searches(2)).state()
    train, validation, test = split(load("wine"), (30, 30, 60), seed=0)
    with pytest.raises((ValueError, RuntimeError)):
        Regression.of(train, validation, test).search(13, -3.0, 2, lr=0.3).restore(state)


def run(*arguments: str) -> int:
    return main("regularization", list(arguments), Config, story)


@pytest.mark.parametrize("problem", ["features", "weights", "augmentation"])
def test_bad_files_are_refused_and_nothing_is_written(bad_files, tmp_path, capsys, problem):
    for name, path in bad_files.items():
        if name != "sparse":
            assert run("--problem", problem, "--data", str(path), "--out", str(tmp_path / "run")) == 2, name
    assert run("--problem", problem, "--data", "mnist", "--data-root", str(tmp_path)) == 2
    assert "MNIST is not in" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@refusals(
    *("--steps -1", "--hidden 0"),
    (("--problem", "weights", "--data", "SPARSE"), "needs dense features"),
    (("--problem", "augmentation", "--data", "wine"), "is no set of images"),
    (("--problem", "weights", "--train", "2000"), "leave none to test on"),
    (("--problem", "features", "--data", "iris", "--train", "2"), "cannot be split"),
    (("--data", "20newsgroups"), "add --problem features"),
    (("--problem", "features", "--data", "20newsgroups", "--data-root", "EMPTY"), "20 newsgroups is not in"),
    (("--solver", "best.json"), "add the --problem that they were tuned on"),
)
def test_what_cannot_be_run_is_refused(bad_files, tmp_path, capsys, arguments, message):
    places = {"SPARSE": str(bad_files["sparse"]), "EMPTY": str(tmp_path)}
    assert run(*(places.get(word, word) for word in arguments), "--out", str(tmp_path / "run")) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_sparse_file_is_taken_for_features(tmp_path):
    random = np.random.default_rng(0)
    lines = (f"{i % 2} {1 + i % 2}:1 {3 + random.integers(5)}:{random.random():.3f}\n" for i in range(80))
    (tmp_path / "data.svm").write_text("".join(lines))
    arguments = ("--problem", "features", "--data", str(tmp_path / "data.svm"), "--steps", "2")
    assert run(*arguments, "--out", str(tmp_path / "run")) == 0
    assert (tmp_path / "run" / "penalties.png").is_file()


@pytest.mark.parametrize(("problem", "module"), [("weights", weights), ("augmentation", augmentation)])
def test_the_other_problems_are_tuned_from_todays_settings(problem, module):
    tuned = tunable(Config(problem=problem, train=40, validation=40, hidden=8, steps=2))
    settings = tuned.settings(tuned.default)
    assert settings == module.SETTINGS
    records = [record for record, _ in zip(tuned.train(settings, 0), range(4), strict=False)]
    assert [step for step, _, _ in records] == [1, 2, 3, 4]
    assert records[-1][2].adjoint.stats["num_steps"] > 0
    first, last = (float(next(islice(tuned.train(settings, 0), n, None))[1]()) for n in (0, 3))
    assert 0 < last < first  # of a fit at the hyperparameters reached, on validation examples


@pytest.mark.parametrize("problem", ["weights", "augmentation"])
def test_settings_reach_a_problem(problem, tmp_path):
    """A method without a linear system leaves no adjoint in the records."""
    bl.tuning.save(tmp_path / "best.json", {"hypergrad": bl.OneStep(0.1)})
    arguments = ["--problem", problem, "--train", "40", "--validation", "40", "--hidden", "8", "--steps", "2"]
    arguments += ["--solver", str(tmp_path / "best.json"), "--out", str(tmp_path / "run")]
    assert main("regularization", arguments, Config, story, tunable) == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records
    assert not any("adjoint" in record for record in records)


def test_the_table_of_features_has_good_fits_of_what_rough_ones_learned(tmp_path):
    bl.tuning.save(tmp_path / "best.json", {"solver": bl.GradientDescent(0.1, max_steps=1)})
    arguments = ["--problem", "features", "--data", "iris", "--train", "40", "--validation", "40", "--steps", "2"]
    arguments += ["--solver", str(tmp_path / "best.json"), "--out", str(tmp_path / "run")]
    assert main("regularization", arguments, Config, story, tunable) == 0
    folder = RunFolder(tmp_path / "run")
    rows = {row["penalties"]: row for row in folder.read_json("results.json")["tables"]["Features: iris"]}
    rough = [record for record in folder.metrics() if record["part"] == "1 penalties"][-1]
    assert rows["1, learned"]["training loss"] < 0.9 * rough["training_loss"]


def test_mnist(mnist_root):
    parts = read("augmentation", Config(data="mnist", data_root=mnist_root, train=100, validation=100))
    train, validation, test = ((x.view(-1, 1, 28, 28), y) for x, y in (part.tensors() for part in parts))
    assert len(test[1]) == 10_000
    problem = Augmented.of(train, validation, (test[0][:100], test[1][:100]), 10, seed=0)
    first, second = problem.search(2, lr=0.1).rows()
    assert second["rotation"] != first["rotation"]
    assert min(first["validation_accuracy"], second["validation_accuracy"]) > 15  # turned and moved; chance is 10


@pytest.mark.applications
def test_the_command_of_the_readme(readme_run):
    folder, tables, printed = readme_run("regularization")

    by_penalties = {row["penalties"]: row for row in tables["Features: docstrings"]}
    names = list(by_penalties)
    grid, one, few, each = (by_penalties[names[k]] for k in (1, 2, 3, -2))
    assert one["validation loss"] < grid["validation loss"] + 0.005  # one learned penalty is the best of the grid
    assert few["validation loss"] <= one["validation loss"]
    assert each["validation loss"] < 0.4 * one["validation loss"]  # a penalty for each feature learns them by heart
    assert each["test loss"] > one["test loss"] + 0.1

    weight, layer, larger, fewer_labels, all_labels = tables["Weights: digits"]
    assert weight["decays"] > 1_000_000
    assert weight["validation accuracy"] >= 98
    assert weight["validation accuracy"] - weight["test accuracy"] > 8
    assert layer["validation accuracy"] - layer["test accuracy"] < 6
    assert larger["test accuracy"] > weight["test accuracy"] + 3
    assert all_labels["test accuracy"] > larger["test accuracy"]
    assert fewer_labels["test accuracy"] > 75

    none, by_hand, learned, in_use = tables["Augmentation: digits"]
    assert learned["test accuracy"] > none["test accuracy"] + 20
    assert learned["test accuracy"] > by_hand["test accuracy"] - 3
    assert learned["test accuracy"] > in_use["test accuracy"] - 3
    assert 25 < learned["rotation in degrees"] < 50
    assert 0.1 < learned["shift"] < 0.3
    assert learned["noise"] < augmentation.START["noise"]
    for name in ("penalties.png", "decays.png", "strengths.png", "augmented.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert "Figures and pictures are in" in printed
