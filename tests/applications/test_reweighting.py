"""The weight net's hypergradient against finite differences, what is drawn, what the command says and writes."""

from __future__ import annotations

import json
import os
import signal
from functools import partial

import numpy as np
import pytest
import torch

import bilevel as bl
from applications.frame.command import main
from applications.frame.data import Examples, load
from applications.frame.errors import UserError
from applications.reweighting.__main__ import Config, story
from applications.reweighting.drawing import draw
from applications.reweighting.measure import loss_grid, measure
from applications.reweighting.networks import Mlp, ResNet32, stacked
from applications.reweighting.train import ClassifierTraining, Settings
from applications.reweighting.weighting import (
    METHODS,
    BatchLoss,
    WeightNet,
    focal_loss,
    look_ahead,
    losses_of,
    weighted_mean,
)
from tests.applications.refusals import refusals
from tests.applications.runs import comparable

SIZES = {"imbalance": 10.0, "noise": 0.4, "meta_per_class": 5, "validation_per_class": 5, "test_per_class": 20}
SETTINGS = Settings(
    steps=12, batch=32, lr=0.05, momentum=0.9, weight_decay=5e-4, meta_lr=3e-3, warm_up=2, focal_gamma=1.0, seed=0
)
CPU = torch.device("cpu")


def drawn_digits(problem="noise", repeats=2, seed=0):
    return draw(load("digits"), problem, repeats=repeats, seed=seed, **SIZES)


# --- what is drawn ---


def test_long_tail_has_the_exponential_profile():
    drawn = drawn_digits("long-tail", repeats=3)
    largest = 174 - 30  # the smallest class of digits, less what is held out
    profile = [round(largest * 10 ** (-i / 9)) for i in range(10)]
    for counts in drawn.counts:
        assert sorted(counts.tolist(), reverse=True) == profile
    assert len({tuple(counts.tolist()) for counts in drawn.counts}) == 3  # another class is rare each time
    assert drawn.clean.all()
    for name, size in (("meta", 5), ("validation", 5), ("test", 20)):
        for chosen in getattr(drawn, name):
            assert drawn.classes[chosen].bincount().tolist() == [size] * 10


def test_no_example_is_in_two_sets():
    drawn = drawn_digits()
    for parts in zip(drawn.train, drawn.meta, drawn.validation, drawn.test, strict=True):
        together = torch.cat(parts)
        assert len(together.unique()) == len(together)
    joint = drawn.with_meta()
    assert joint.clean[:, -50:].all()  # the meta set keeps its true labels
    assert (joint.train[:, -50:] == drawn.meta).all()


def test_uniform_noise_may_draw_the_true_class():
    drawn = drawn_digits(repeats=10)
    wrong = 1 - drawn.clean.float().mean().item()
    assert wrong == pytest.approx(0.4 * 0.9, abs=0.02)  # 14,400 labels: five standard deviations


def test_the_published_test_set_is_kept():
    random, labels = np.random.default_rng(0), np.arange(10_200) % 10
    mnist = Examples("mnist", random.random((10_200, 4)), labels, 10, num_test=10_000)
    drawn = draw(mnist, "noise", repeats=2, seed=0, **SIZES)
    assert drawn.test.tolist() == [list(range(200, 10_200))] * 2
    assert drawn.train.max() < 200


# --- weights and hypergradients ---


def test_losses_and_weights():
    outputs = torch.randn(2, 5, 3, dtype=torch.float64)
    labels = torch.randint(3, (2, 5))
    losses = losses_of(outputs, labels)
    right = outputs.softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(losses, -right.log())
    torch.testing.assert_close(focal_loss(losses, 2.0), ((1 - right) ** 2 * losses).mean(1))
    weights = torch.rand(2, 5, dtype=torch.float64) + 0.5
    plain = (weights * losses).sum(1) / weights.sum(1)
    torch.testing.assert_close(weighted_mean(weights, losses), plain, rtol=0.02, atol=0)  # up to the floor of 0.01
    assert (weighted_mean(torch.zeros(2, 5), losses) == 0).all()


class Case:
    """Two small classifiers, their weight nets with random last layers, one batch and one meta set; float64."""

    def __init__(self, inputs="loss-and-class"):
        torch.manual_seed(0)
        module, params = stacked(lambda: Mlp(4, 6, 3), 2, 0, CPU)
        self.params = {name: value.detach().double() for name, value in params.items()}
        self.net = WeightNet(2, inputs, 1, CPU)
        assert (self.net.params["layers.1.weight"] == 0).all()  # all weights are equal at first
        random = {name: 0.3 * torch.randn(value.shape).double() for name, value in self.net.params.items()}
        self.net.params = {name: value.requires_grad_() for name, value in random.items()}
        x, self.x_meta = torch.randn(2, 20, 4).double(), torch.randn(2, 9, 4).double()
        y, self.y_meta = torch.randint(3, (2, 20)), torch.randint(3, (2, 9))
        self.predict = partial(self.call, module)
        self.batch = BatchLoss(lambda p: self.predict(p, x), y, torch.rand(2, 20).double(), self.net)

    @staticmethod
    def call(module, params, x):
        return bl.nn.functional_call(module, params, (x,))

    def meta_losses(self, method="unroll", lr=0.3):
        ahead = look_ahead(self.params, self.batch, METHODS[method], lr)
        return losses_of(self.predict(ahead.value, self.x_meta), self.y_meta).mean(-1)

    def hypergradient(self, method, repeat=None, lr=0.3):
        losses = self.meta_losses(method, lr)
        loss = losses.sum() if repeat is None else losses[repeat]
        return torch.autograd.grad(loss, list(self.net.params.values()))


@pytest.mark.parametrize("inputs", ["loss", "loss-and-class"])
def test_the_hypergradient_is_the_derivative_of_the_look_ahead(inputs):
    case = Case(inputs)
    for (name, value), grad in zip(case.net.params.items(), case.hypergradient("unroll"), strict=True):
        direction, step = torch.randn_like(value), 1e-5
        ends = []
        for sign in (1, -1):
            case.net.params[name] = (value + sign * step * direction).detach().requires_grad_()
            ends.append(case.meta_losses().sum().item())
        case.net.params[name] = value
        difference = (ends[0] - ends[1]) / (2 * step)
        assert difference == pytest.approx((grad * direction).sum().item(), rel=1e-6, abs=1e-11)


def test_the_derivative_of_one_more_step_by_hand():
    case = Case()
    ahead = look_ahead(case.params, case.batch, METHODS["one-step"], 0.3)
    names, point = list(case.params), [value.detach().requires_grad_() for value in ahead.value.values()]
    params = dict(zip(names, point, strict=True))
    meta = losses_of(case.predict(params, case.x_meta), case.y_meta).mean(-1).sum()
    pulled = torch.autograd.grad(meta, point)
    slope = torch.autograd.grad(case.batch(params).sum(), point, create_graph=True)
    weights = list(case.net.params.values())
    product = sum((s * p).sum() for s, p in zip(slope, pulled, strict=True))
    truth = [-0.3 * grad for grad in torch.autograd.grad(product, weights)]
    for mine, other in zip(case.hypergradient("one-step"), truth, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(("method", "least"), [("one-step", 0.99), ("sama", 0.95), ("neumann", 0.99), ("cg", 0.3)])
def test_after_a_short_step_the_methods_point_the_same_way(method, least):
    case = Case()
    truth, mine = (torch.cat([g.flatten() for g in case.hypergradient(m, lr=0.01)]) for m in ("unroll", method))
    assert torch.nn.functional.cosine_similarity(truth, mine, dim=0) > least


@pytest.mark.parametrize("method", ["unroll", "cg"])
def test_no_repeat_reaches_another(method):
    for grad in Case().hypergradient(method, repeat=0):
        assert grad[0].abs().max() > 0
        assert (grad[1] == 0).all()


def test_resnet32():
    module, params = stacked(lambda: ResNet32(10), 2, 0, CPU)
    sizes = [value[0].numel() for value in params.values()]
    assert sum(sizes) == 464_154  # He et al. 2016: 0.46 million
    images = torch.rand(2, 3, 3 * 32 * 32)
    outputs = bl.nn.functional_call(module, params, (images,))
    assert outputs.shape == (2, 3, 10)
    alone = bl.nn.functional_call(module, {k: v[1:] for k, v in params.items()}, (images[1:],))
    torch.testing.assert_close(outputs[1:], alone, rtol=1e-4, atol=1e-4)


# --- training ---


def test_resnet32_learns_with_a_weight_net():
    random, labels = np.random.default_rng(0), np.arange(24) % 2
    images = Examples("squares", random.random((24, 3072)) + labels[:, None], labels, 2, (3, 32, 32))
    sizes = {"meta_per_class": 2, "validation_per_class": 2, "test_per_class": 2}
    drawn = draw(images, "long-tail", repeats=1, seed=0, **{**SIZES, **sizes})
    settings = Settings(**{**vars(SETTINGS), "steps": 1, "batch": 2, "warm_up": 0})
    training = ClassifierTraining(partial(ResNet32, 2), drawn, "unroll", settings, "loss-and-class")
    losses = [record["loss"] for record in training.rows()]
    assert np.isfinite(losses).all()
    assert training.net is not None
    assert training.net.params["layers.1.weight"].abs().max() > 0


def test_weights_fall_with_the_loss_under_noise():
    drawn = draw(load("digits"), "noise", repeats=2, seed=0, **{**SIZES, "meta_per_class": 10})
    settings = Settings(**{**vars(SETTINGS), "steps": 250, "batch": 100, "warm_up": 100})
    training = ClassifierTraining(lambda: Mlp(64, 50, 10), drawn, "unroll", settings)
    for record in training.rows():
        assert np.isfinite(record["loss"])
    row = measure(training, drawn)
    assert min(row["auc"]) > 0.97
    curves = np.array(row["curves"]["every class"])
    assert (curves[:, loss_grid().index(3.0)] < 0.5 * curves[:, 0]).all()


def test_validation_alone_chooses_where_to_stop():
    drawn = drawn_digits()
    training = ClassifierTraining(lambda: Mlp(64, 20, 10), drawn, "unweighted", SETTINGS)
    seen = [record["validation"] for record in training.rows() if "validation" in record]
    assert torch.tensor(seen).amax(0).tolist() == training.best_validation.tolist()
    row = measure(training, drawn)
    assert row["validation_stopped"] == pytest.approx((100 * training.best_validation).tolist())
    assert row["validation_last"] == pytest.approx([100 * value for value in seen[-1]])


TINY = ["--repeats", "2", "--steps", "8", "--warm-up", "2", "--hidden", "8", "--test-per-class", "10"]


def reweighting(*arguments):
    return main("reweighting", [*TINY, *map(str, arguments)], Config, story)


def test_interrupted_and_resumed_is_bit_for_bit_the_whole_run(tmp_path, monkeypatch):
    assert reweighting("--problems", "noise", "--out", tmp_path / "whole") == 0
    step = ClassifierTraining.classifier_step

    def interrupted(self, *batch):
        if self.net is not None and self.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(ClassifierTraining, "classifier_step", interrupted)
        assert reweighting("--problems", "noise", "--out", tmp_path / "halves") == 128 + signal.SIGTERM
    assert main("reweighting", ["--resume", str(tmp_path / "halves")], Config, story) == 0
    assert comparable(tmp_path / "halves") == comparable(tmp_path / "whole")
    tables = [json.loads((tmp_path / name / "results.json").read_text())["tables"] for name in ("halves", "whole")]
    assert tables[0] == tables[1]


def test_every_method_from_the_command_line(tmp_path):
    methods = ("unroll", "one-step", "sama", "neumann", "cg")
    assert reweighting("--problems", "noise", "--methods", *methods, "--out", tmp_path / "run") == 0
    ((_, rows),) = json.loads((tmp_path / "run" / "results.json").read_text())["tables"].items()
    assert {f"weight net, {method}" for method in methods} <= {row["rule"] for row in rows}
    assert (tmp_path / "run" / "weights.png").stat().st_size > 10_000
    assert not (tmp_path / "run" / "classes.png").exists()  # of the long tail


def test_bad_files(bad_file, refused):
    refused(reweighting, "--data", bad_file)


@refusals(
    *("--steps 0", "--lr 0", "--noise 1", "--imbalance 0.5"),
    (["--steps", "20", "--warm-up", "20"], "or no weight is ever learned"),
    (["--meta-per-class", "200"], "The smallest class of digits has 174 examples"),
    (["--methods", "cg", "cg"], "--methods cg cg: one at least, each once"),
    (["--model", "resnet32"], "--model resnet32 takes"),
    (["--data", "mnist", "--data-root", "nowhere"], "MNIST is not in nowhere"),
    (["--data", "cifar10", "--data-root", "nowhere"], "CIFAR-10 is not in nowhere"),
    (["--data", "wine", "--test-per-class", "40"], "The smallest class of wine"),
)
def test_bad_settings(arguments, message, refused):
    assert message in refused(reweighting, *arguments)


def test_a_class_without_a_training_example():
    with pytest.raises(UserError, match="none is left to train on"):
        draw(load("iris"), "long-tail", repeats=1, seed=0, **{**SIZES, "test_per_class": 45})


def test_real_mnist(mnist_root, tmp_path):
    arguments = ["--data", "mnist", "--data-root", mnist_root, "--problems", "long-tail", "--out", tmp_path / "run"]
    assert reweighting(*arguments, "--imbalance", "100", "--repeats", "1", "--steps", "30") == 0
    ((_, rows),) = json.loads((tmp_path / "run" / "results.json").read_text())["tables"].items()
    accuracies = {row["rule"]: row["test"] for row in rows}
    assert 10 < accuracies["unweighted"] < accuracies["class frequency"]


@pytest.mark.applications
def test_the_command_of_the_readme(readme_run):
    folder, tables, _ = readme_run("reweighting")
    tail, noise = (
        {row["rule"]: row for row in tables[f"{problem} digits, accuracy (%) over 5 training sets"]}
        for problem in ("long-tail", "noise")
    )
    test = {name: row["test"] for name, row in noise.items()}
    assert test["weight net"] > 94
    assert test["weight net"] > max(test["unweighted"], test["focal loss"], test["meta set alone"]) + 2
    assert test["weight net, + meta set"] > test["unweighted, + meta set"] + 1
    assert noise["weight net"]["AUC of true labels"] > 0.99
    test = {name: row["test"] for name, row in tail.items()}
    assert test["weight net"] > test["unweighted"] + 4
    assert test["weight net"] > test["class frequency"] - 1
    assert test["weight net, + meta set"] > max(test["unweighted, + meta set"], test["meta set alone"], 92.5)
    for picture in ("weights.png", "validation.png", "classes.png"):
        assert (folder / picture).stat().st_size > 20_000
