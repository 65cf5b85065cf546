"""Learned images: hypergradients against differences, runs that resume exactly, numbers beside baselines."""

from __future__ import annotations

import json
import os
import signal

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot

import bilevel as bl
from applications.distillation import __main__ as application
from applications.distillation import evaluate
from applications.distillation.data import HELD_OUT, class_means, labels, read, real_images
from applications.distillation.distill import FIRST_NETWORK, Distillation, Schedule
from applications.distillation.inner import CUT_OFF, Inner
from applications.distillation.knobs import Config
from applications.distillation.networks import ConvNet, Linear, accuracy, initial, outputs
from applications.frame.command import main
from applications.frame.run import Run
from applications.frame.run_folder import RunFolder
from tests.applications.refusals import refusals

SHAPE = (1, 4, 4)


def command(*arguments: str) -> int:
    return main("distillation", list(arguments), Config, application.story)


@pytest.fixture
def toy():
    """Three images to train on and twelve to judge, of three classes, in float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(15, *SHAPE, generator=generator, dtype=torch.float64)
    y = torch.arange(15) % 3
    return x[:3], y[:3], x[3:], y[3:]


def inner_of(network: torch.nn.Module, **settings: object) -> Inner:
    return Inner(network.double(), **{"l2": 0.05, **settings})


def outer_loss(inner: Inner, images, targets, x, y):
    start = {name: value.double() for name, value in initial(inner.network, 0).items()}
    fit = inner.train(start, images, targets)
    return cross_entropy(outputs(inner.network, fit.value, x), y), fit


def gradient(inner: Inner, images, *others):
    images = images.clone().requires_grad_()
    (found,) = torch.autograd.grad(outer_loss(inner, images, *others)[0], images)
    return found


def slope(inner: Inner, images, direction, *others):
    """A central difference, whose error is of the order of the inner tolerance divided by the step."""
    with torch.no_grad():
        ends = [outer_loss(inner, images + step * direction, *others)[0] for step in (1e-4, -1e-4)]
    return (ends[0] - ends[1]) / 2e-4


@pytest.mark.parametrize("gauss_newton", [False, True])
def test_the_hypergradient_of_the_linear_classifier(toy, gauss_newton):
    """Exact but for the 0.001 of conjugate gradients; the Gauss-Newton matrix is then the Hessian."""
    inner = inner_of(Linear(SHAPE, 3), gauss_newton=gauss_newton)
    found = gradient(inner, *toy)
    for seed in range(2):
        direction = torch.randn(toy[0].shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        truth = slope(inner, toy[0], direction, *toy[1:])
        assert abs((found * direction).sum() - truth) < 5e-3 * found.norm() * direction.norm()


def test_the_hypergradient_of_the_convnet_points_the_right_way(toy):
    """Where the images are fitted, what Gauss-Newton leaves out is small."""
    inner = inner_of(ConvNet(SHAPE, 3, 4), gauss_newton=True)
    found = gradient(inner, *toy)
    along = found / found.norm()
    assert slope(inner, toy[0], along, *toy[1:]).item() == pytest.approx(found.norm().item(), rel=0.15)


def test_the_linear_minimum_in_closed_form(toy):
    """Where the gradient vanishes, ``l2 W = (classes - probabilities)^T images / n``."""
    images, targets, *_ = toy
    inner = inner_of(Linear(SHAPE, 3))
    start = {name: value.double() for name, value in initial(inner.network, 0).items()}
    value = inner.train(start, images, targets, follow=False).value
    missing = one_hot(targets, 3) - outputs(inner.network, value, images).softmax(1)
    torch.testing.assert_close(value["head.weight"], missing.T @ images.flatten(1) / (3 * 0.05), rtol=1e-6, atol=1e-7)


def test_training_cut_off_is_recorded_and_warns_not(toy):
    settings = {"solver": bl.LBFGS(max_steps=3, gtol=0.0), "hypergrad": bl.Implicit(bl.CG(max_steps=2))}
    inner = inner_of(ConvNet(SHAPE, 3, 4), settings=settings, gauss_newton=True, throw="ignore")
    loss, fit = outer_loss(inner, toy[0].clone().requires_grad_(), *toy[1:])
    loss.backward()
    assert fit.stats["num_steps"] == 3
    assert fit.adjoint.stats["num_steps"] == 2
    assert fit.stats["residual_norm"] > 0


def test_initialisations_are_of_their_seed_alone():
    network = ConvNet((1, 8, 8), 10, 4)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, again, other = (initial(network, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["blocks.0.weight"], other["blocks.0.weight"])
    assert outputs(network, first, torch.rand(2, 1, 8, 8)).abs().max() == 0  # no class is preferred at the start
    assert ConvNet((1, 28, 28), 10, 4)(torch.rand(2, 1, 28, 28)).shape == (2, 10)
    assert 10 * Config().repeats < FIRST_NETWORK  # networks of the evaluation were not distilled on


def test_parts_and_sets_of_images():
    parts = read("digits", None, 2)
    everything = torch.cat([part.x.flatten(1) for part in parts])
    assert len(torch.unique(everything, dim=0)) == len(everything) == 1797
    assert len(parts.validation.y) / (len(parts.train.y) + len(parts.validation.y)) == pytest.approx(HELD_OUT, abs=0.01)
    means, drawn = class_means(parts.train, 10, 2), real_images(parts.train, 10, 2, seed=0)
    assert means.shape == drawn.shape == (20, 1, 8, 8)
    assert labels(10, 2).tolist() == sorted([*range(10)] * 2)
    torch.testing.assert_close(class_means(parts.train, 10, 1)[3], parts.train.of_class(3).mean(0))
    assert all((parts.train.of_class(i // 2) == drawn[i]).flatten(1).all(1).any() for i in range(20))


@refusals(
    *("--images-per-class 0", "--convnet-lr nan", "--l2 0", "--repeats 1", "--seed -1"),
    (["--data", "iris"], "has 4 features a row and no word of height and width"),
    (["--data", "nonsense"], "no data set 'nonsense'"),
    (["--images-per-class", "500"], "the smallest class of digits has"),
)
def test_bad_input(refused, arguments, message):
    assert message in refused(command, *arguments)


def test_bad_files(bad_file, refused):
    refused(command, "--data", bad_file)


def test_missing_files(tmp_path, refused):
    assert "MNIST is not in" in refused(command, "--data", "mnist", "--data-root", tmp_path)


SMALL = "--steps 3 --l2 0.3 --convnet-steps 4 --width 4 --batch 32 --repeats 2 --full-steps 3".split()  # noqa: SIM905


def test_interrupted_and_resumed_is_bit_for_bit_the_whole_run(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "ADAM_STEPS", 3)
    monkeypatch.setitem(CUT_OFF, "solver", bl.LBFGS(max_steps=3, gtol=1e-6))
    assert command(*SMALL, "--out", str(tmp_path / "whole")) == 0

    stop_in = {False, True}  # once in the linear training, once in a ConvNet's
    real_batch = Distillation.real_batch

    def interrupting(self):
        linear = isinstance(self.inner.network, Linear)
        if self.step == 1 and linear in stop_in:
            stop_in.remove(linear)
            os.kill(os.getpid(), signal.SIGTERM)
        return real_batch(self)

    monkeypatch.setattr(Distillation, "real_batch", interrupting)
    halves = str(tmp_path / "halves")
    assert command(*SMALL, "--out", halves) == 128 + signal.SIGTERM
    assert command("--resume", halves) == 128 + signal.SIGTERM
    assert command("--resume", halves) == 0

    def comparable(name: str) -> tuple[list, dict]:
        records = [{k: v for k, v in r.items() if k != "seconds"} for r in RunFolder(tmp_path / name).metrics()]
        return records, json.loads((tmp_path / name / "results.json").read_text())["tables"]

    assert comparable("halves") == comparable("whole")
    assert (tmp_path / "halves" / "images.png").read_bytes()[:4] == b"\x89PNG"


def test_several_images_of_a_class(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "ADAM_STEPS", 3)
    arguments = [*SMALL, "--network", "linear", "--images-per-class", "2", "--out", str(tmp_path / "run")]
    assert command(*arguments) == 0
    (table,) = json.loads((tmp_path / "run" / "results.json").read_text())["tables"].items()
    assert table[0].endswith("digits, 20 images")


def test_mnist_in_ten_outer_steps(mnist_root, tmp_path):
    """Ten learned images, after ten steps, are far better than the means that they started as."""
    parts = read("mnist", mnist_root, 1)
    assert len(parts.test.y) == 10_000
    assert parts.test.y[:5].tolist() == [7, 2, 1, 0, 4]  # as everywhere
    small = parts._replace(train=type(parts.train)(*(t[:4000] for t in parts.train)))
    inner, means = Inner(Linear((1, 28, 28), 10), 1e-3), class_means(small.train, 10, 1)
    training = Distillation(inner, means, labels(10, 1), small, Schedule(10, 0.03, 4000, seed=0))
    Run(RunFolder.new(tmp_path / "run"), {}, "", quiet=True).train("linear", training)
    before = evaluate.test_accuracy(inner, means, labels(10, 1), [0], parts.validation)[0]
    after = accuracy(inner.network, training.trained(), *parts.validation)
    assert after > before + 5
    assert after > 84


@pytest.mark.applications
def test_readme(readme_run):
    folder, tables, printed = readme_run("distillation")
    (linear,) = (rows for title, rows in tables.items() if "linear" in title)
    found = {row["images"].split(",")[0].split(" 1")[0]: row["accuracy"] for row in linear}
    assert found["learned"] >= 95
    assert found["learned"] > found["class means"] + 4
    assert found["learned"] > found["real"] + 20
    assert abs(found["learned"] - found["all"]) < 2
    (convnet,) = (rows for title, rows in tables.items() if "ConvNet" in title)
    one, any_, means, real, whole = convnet
    assert one["its initialisation"] >= 92
    assert any_["fresh ones"] >= 90.5
    assert any_["fresh ones"] > means["fresh ones"] + 2
    assert any_["fresh ones"] > real["fresh ones"] + 20
    assert one["its initialisation"] > one["fresh ones"] + 1  # what was learned for one initialisation is of it
    assert whole["by Adam"] > 94
    assert np.isfinite([row["by Adam"] for row in convnet]).all()
    for name in ("images.png", "curves.png"):
        assert (folder / name).stat().st_size > 5000
    assert "Figures and pictures are in" in printed
