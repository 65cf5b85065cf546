"""What an evaluation shares and batches changes none of its numbers."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn.functional import cross_entropy

import bilevel as bl
from applications.few_shot import evaluate
from applications.few_shot.config import Config
from applications.few_shot.episodes import Sampler
from applications.few_shot.train import create_learner, create_sampler


def test_the_linear_classifier_is_that_of_all_pixels(toy_splits):
    """In the span of the images, also where one is there twice."""
    episodes = Sampler(toy_splits.test, "test", 3, 2, 6, 0, torch.device("cpu"), torch.float64).episodes(3, 0)
    episodes.support_x[:, 1] = episodes.support_x[:, 0]
    x, y, q = (t.double() if t.is_floating_point() else t for t in episodes.tensors()[:3])
    x, q = x.flatten(2), q.flatten(2)

    def loss(params, x, y):
        weight = params["weight"]
        return cross_entropy(x @ weight + params["bias"], y) + weight.square().sum() / 2 / len(x)

    start = {"weight": x.new_zeros(3, 784, 3), "bias": x.new_zeros(3, 3)}
    solver = bl.LBFGS(max_steps=100, gtol=1e-3)
    fit = bl.argmin(torch.vmap(loss), start, x, y, solver=solver, hypergrad=None).value
    expected = (q @ fit["weight"] + fit["bias"].unsqueeze(1)).argmax(-1)
    assert torch.equal(evaluate.linear_on_pixels(episodes), expected)


def test_an_evaluation_is_task_by_task(toy_splits):
    """However the tasks are shared out, and each classifier by itself."""
    config = Config(width=8, inner_steps=3, threads=2, precision="float64")
    learner = create_learner(config, toy_splits.train, torch.device("cpu"))
    sampler = create_sampler(config, toy_splits.test, "test", 6, torch.device("cpu"))
    found = evaluate.measure(dict(evaluate.settings(learner)), sampler, 7, progress=False)
    alone = replace(learner, config=replace(config, chunk_size=1, threads=1))
    for index, (name, accuracy) in enumerate(found.items()):
        _, classify = list(evaluate.settings(alone))[index]
        assert evaluate.measure({name: classify}, sampler, 7, progress=False) == {name: accuracy}
