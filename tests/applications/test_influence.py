"""The story of influence: its training, its scores, resuming, bad input, the numbers to expect."""

from __future__ import annotations

import json

import pytest
import torch
from sklearn.metrics import roc_auc_score

import bilevel as bl
from applications.frame.command import main
from applications.frame.data import load, mislabel, split
from applications.influence import scores
from applications.influence.__main__ import Config, story, subsets
from applications.influence.model import Model, losses
from tests.conformance import randn

TINY = ("--num-train", "60", "--num-queries", "10", "--subsets", "3", "--hidden", "3", "--decay", "0.05")


def influence(*arguments):
    return main("influence", [*TINY, *map(str, arguments)], Config, story)


def test_the_training_ends_at_a_minimum_and_weights_leave_examples_out():
    train = (randn(30, 4), torch.arange(30) % 3)
    model = Model(4, 3, 2, 0.05, seed=0)
    weights = (torch.arange(30) >= 10).double()
    params = {name: leaf.requires_grad_() for name, leaf in model.fit(train, weights).items()}
    rest = tuple(part[10:] for part in train)
    loss = losses(model.outputs(params, rest), rest).sum() / 30 + model.penalty(params)
    grads = torch.autograd.grad(loss, list(params.values()))
    assert max(grad.abs().max() for grad in grads) <= 1e-5


def test_scores_are_those_of_their_definition():
    wrong, score = torch.rand(50) < 0.3, torch.rand(50)
    assert scores.area_under_curve(score, wrong) == pytest.approx(roc_auc_score(wrong.numpy(), score.numpy()))
    assert scores.found_first(wrong.double(), wrong) == 100
    assert scores.datamodeling_score(randn(9, 2).exp(), randn(9, 2)) == pytest.approx(1)
    out = subsets(Config(subsets=5, left_out=0.2), 40)
    assert out.sum(1).tolist() == [8] * 5


def test_the_story_and_its_pictures_and_a_run_that_is_done(tmp_path):
    assert influence("--out", tmp_path / "run") == 0
    folder = tmp_path / "run"
    assert {"speaking.png", "retraining.png", "influences.pt", "report.md"} <= {path.name for path in folder.iterdir()}
    before = json.loads((folder / "results.json").read_text())
    assert influence("--resume", folder) == 0
    assert json.loads((folder / "results.json").read_text())["tables"] == before["tables"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("--left-out", "1.5"), "--left-out"), (("--decay", "0"), "--decay"), (("--hidden", "-1"), "--hidden")],
)
def test_bad_options(refused, arguments, words):
    assert words in refused(influence, *arguments)


def test_bad_files(refused, bad_file):
    refused(influence, "--data", bad_file)


@pytest.mark.applications
def test_wrong_labels_of_mnist(mnist_root):
    """Softmax regression in float32: ranked by their influence on themselves, beside their losses."""
    (part, _) = split(load("mnist", mnist_root), (400, 20), 0)
    features, labels = part.tensors(torch.float32)
    given = mislabel(labels, 10, 0.1, torch.Generator().manual_seed(0))
    train, wrong, model = (features, given), given != labels, Model(784, 10, 0, 1e-2, seed=0)
    params = model.fit(train, start={name: leaf.float() for name, leaf in model.start().items()})
    settings = {"penalty": model.penalty, "linear_solver": bl.CG(rtol=1e-2), "query_chunk": 100}
    own = bl.Influence(model.outputs, losses, params, train, **settings).of_themselves()
    found = scores.area_under_curve(own, wrong)
    assert found >= 0.97
    assert found >= scores.area_under_curve(losses(model.outputs(params, train), train), wrong) - 0.005


@pytest.mark.applications
def test_the_numbers_of_the_readme(readme_run):
    folder, tables, _ = readme_run("influence")
    (ours, alone) = tables["Subsets left out"]
    assert ours["rank correlation"] >= 0.85
    assert alone["rank correlation"] < 0.6
    assert tables["Wrong labels"][0]["AUC"] >= 0.98
    assert (folder / "speaking.png").stat().st_size > 10_000
