"""A frozen backbone: features once, a head that is meta-learned behind them, and predictions on images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from applications.few_shot import FewShot, backbone, data, evaluate
from applications.few_shot.__main__ import main
from applications.few_shot.config import Config
from applications.few_shot.models import Factors, FeatureHead
from applications.few_shot.train import create_learner, create_sampler
from applications.few_shot.trained import Trained
from applications.frame.errors import UserError
from tests.applications.few_shot.test_folder import drawing, photographs  # noqa: F401 (a fixture)

HERE = "tests.applications.few_shot.test_backbone"
SIZE = ["--image-size", "16", "--backbone", f"{HERE}:pooled", "--ways", "3", "--queries", "3", "--eval-queries", "5"]
CALLS: list[int] = []


class Counted(nn.Module):
    def forward(self, x):
        CALLS.append(len(x))
        return x


def pooled(channels, image_size):
    """Means over squares, normed by running statistics, which an eval mode leaves alone."""
    norm = nn.BatchNorm2d(channels)
    return nn.Sequential(Counted(), norm, nn.AvgPool2d(image_size // 4), nn.Flatten())


def maps(channels, image_size):
    return nn.Conv2d(channels, 2, 3)


@pytest.fixture(scope="module")
def run(photographs, tmp_path_factory):  # noqa: F811
    place = tmp_path_factory.mktemp("backbone")
    few = ["--tasks", "4", "--steps", "30", "--learn-strength", "scalar", "--validate-every", "0", "--eval-tasks", "40"]
    arguments = ["--data", str(photographs), *SIZE, *few, "--data-root", str(place), "--out", str(place / "run")]
    assert main(arguments) == 0
    return place / "run"


def config_of(folder, **changes):
    return replace(Trained.load(folder).config, **changes)


def test_features_are_computed_once_and_are_those_of_the_images(run):
    config = config_of(run)
    CALLS.clear()
    found = backbone.splits(config)
    assert CALLS == []
    images = data.load(config.data, config.data_root, reading=config.reading).train
    net = pooled(3, 16).eval()
    expected = net(images.images[1].float() / 255)
    torch.testing.assert_close(found.train.images[1].flatten(1), expected)
    assert found.train.images.shape[2:] == (48, 1, 1)
    assert (found.train.names, found.train.counts) == (images.names, images.counts)


def test_other_weights_are_computed_again(run, monkeypatch):
    config = config_of(run)
    before = backbone._key(config, data.load(config.data, config.data_root, reading=config.reading).test)
    with torch.no_grad():
        norm = backbone._frozen(config.backbone, 3, 16)[1]
        norm.running_mean += 1
    try:
        after = backbone._key(config, data.load(config.data, config.data_root, reading=config.reading).test)
    finally:
        norm.running_mean -= 1
    assert after != before


def test_what_is_learned_is_small_and_helps(run):
    trained = Trained.load(run)
    assert set(trained.meta) == {"features.factor"}
    assert trained.meta["features.factor"].shape == (48,)
    assert (trained.meta["features.factor"] - Factors.START).abs().max() > 0.05
    assert trained.log_strength["all"] != 0
    report = (run / "report.md").read_text()
    assert "linear classifier on features" in report
    assert (run / "test_episode.png").read_bytes().startswith(b"\x89PNG")


def test_before_training_it_is_a_softmax_regression_on_unit_features(run):
    """With as many steps as it takes: scikit-learn's, with the penalty that lambda is."""
    from sklearn.linear_model import LogisticRegression

    config = config_of(run, inner_steps=4000, eval_steps=None, learn_strength="no", precision="float64", shots=2)
    classes = backbone.splits(config).test
    learner = create_learner(config, classes, torch.device("cpu"))
    fixed = replace(learner, net=Frozen(learner.net))
    episodes = create_sampler(config, classes, "test", 5, torch.device("cpu")).episodes(2, 0)
    found = next(iter(evaluate.settings(fixed)))[1](episodes)
    for task in range(2):
        x, q = (4 * nn.functional.normalize(t[task].flatten(1)).numpy() for t in (episodes.support_x, episodes.query_x))
        y = episodes.support_y[task].numpy()
        x, q = (np.pad(part, ((0, 0), (0, 1)), constant_values=1.0) for part in (x, q))  # the bias is penalised too
        reference = LogisticRegression(C=1 / len(y), fit_intercept=False, tol=1e-8, max_iter=5000).fit(x, y)
        assert (reference.predict(q) == found[task].numpy()).all()


class Frozen(nn.Module):
    """Factors that adaptation does not move: the regression alone."""

    takes_tasks = True

    def __init__(self, net: FeatureHead):
        super().__init__()
        self.features, self.head = net.features, net.head

    def forward(self, x):
        with torch.no_grad():
            fixed = nn.functional.normalize(x.flatten(-3), dim=-1) * Factors.START
        return fixed @ self.head.weight.mT + self.head.bias.unsqueeze(-2)


def test_it_predicts_from_images_as_an_evaluation_does(run):
    config = config_of(run)
    model = FewShot.load(run, device="cpu", backbone=f"{HERE}:pooled")
    images = data.load(config.data, config.data_root, reading=config.reading).test
    shown = create_sampler(config, images, "test", 5, torch.device("cpu")).episodes(1, 0)
    seen = create_sampler(config, backbone.splits(config).test, "test", 5, torch.device("cpu")).episodes(1, 0)
    expected = next(iter(evaluate.settings(model.trained.learner())))[1](seen)[0]
    found = model.adapt(shown.support_x[0], shown.support_y[0])(shown.query_x[0])
    assert torch.equal(found, expected)


def test_it_learns_drawings(run):
    generator = np.random.default_rng(3)
    labels = [0, 3, 6]
    classifier = FewShot.load(run, backbone=f"{HERE}:pooled").adapt(
        [drawing(i, generator) for i in labels for _ in range(5)], np.repeat(labels, 5)
    )
    expected = np.repeat(labels, 20)
    found = classifier([drawing(int(index), generator) for index in expected])
    assert np.mean(found == expected) > 0.7


@pytest.mark.parametrize("method", ["prototypical", "maml"])
def test_other_methods(method, run):
    config = config_of(run)
    arguments = ["--data", config.data, *SIZE, "--method", method, "--steps", "3", "--tasks", "2", "--eval-tasks", "4"]
    assert main([*arguments, "--data-root", str(config.data_root), "--out", str(run.parent / method)]) == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("maps", r"gives \[1, 2, 14, 14\] for 1 images: finite features"),
        ("nothing", "cannot be imported"),
    ],
)
def test_a_backbone_that_does_not_fit(name, message):
    with pytest.raises(UserError, match=message):
        backbone.features(Config(data="own", image_size=16, backbone=f"{HERE}:{name}"), torch.zeros(1, 3, 16, 16))


def test_sizes_that_do_not_fit():
    with pytest.raises(UserError, match=r"fails on images \[1, 16, 16\]"):
        backbone.features(Config(data="own", image_size=16, backbone=f"{HERE}:pooled"), torch.zeros(1, 1, 16, 16))
    with pytest.raises(UserError, match="--model fc takes images"):
        Config(backbone="some:factory", model="fc").check()


def test_resnet18_without_its_download(monkeypatch):
    from torchvision import models

    make = models.resnet18
    monkeypatch.setattr(models, "resnet18", lambda weights: make(weights=None))
    with torch.no_grad():
        assert backbone.resnet18(3, 224).eval()(torch.rand(1, 3, 64, 64)).shape == (1, 512)
