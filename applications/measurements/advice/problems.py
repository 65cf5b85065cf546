"""The five problems: data cleaning, penalties, a network, a ridge regression, an equilibrium."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import bilevel as bl
from applications.measurements.benchmarks.solutions import Solutions

Problem = bl.diagnostics.BilevelProblem


def cleaning() -> Problem:
    """Digits of which half of the training labels are wrong, a weight for each of 800 examples."""
    return Solutions("cleaning").task.bilevel()


def penalties() -> Problem:
    """20 of 500 features tell the class, a penalty for each."""
    return Solutions("penalties").task.bilevel()


def ridge() -> Problem:
    """A penalty for each of 100 features, in float64."""
    found = bl.problems.Ridge(200, 100, per_feature=True)
    return Problem(found.inner, found.outer, found.init, found.hparams)


def equilibrium() -> Problem:
    """The input of a linear equilibrium model of 200 unknowns."""
    found = bl.problems.LinearFixedPoint(200, rate=0.9)
    return Problem(found.inner, found.outer, found.init, found.hparams, kind="fixed_point")


def network() -> Problem:
    """Class weights and a weight decay of a convolutional network with 1,898 params, on digits."""
    from sklearn.datasets import load_digits

    random = torch.Generator().manual_seed(0)
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(images), generator=random)[:1200]
    x, y = images[order].float().view(-1, 1, 8, 8) / 16, labels[order].long()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            nn.Flatten(),
            nn.Linear(64, 10),
        )
    log_weights, log_decay = torch.zeros(10, requires_grad=True), torch.tensor(-6.0, requires_grad=True)

    def train_loss(params: dict[str, Tensor]) -> Tensor:
        losses = cross_entropy(functional_call(model, params, (x[:600],)), y[:600], reduction="none")
        penalty = torch.stack([param.square().sum() for param in params.values()]).sum()
        return (log_weights.exp()[y[:600]] * losses).mean() + log_decay.exp() * penalty

    def val_loss(params: dict[str, Tensor]) -> Tensor:
        return cross_entropy(functional_call(model, params, (x[600:],)), y[600:])

    return Problem(train_loss, val_loss, dict(model.named_parameters()))


PROBLEMS: dict[str, tuple[Callable[[], Problem], float, float]] = {
    "cleaning": (cleaning, 1.0, 1.5),
    "penalties": (penalties, 1.0, 1.5),
    "network": (network, 0.1, 8.0),
    "ridge": (ridge, 0.3, 1.5),
    "equilibrium": (equilibrium, 0.1, 1.5),
}
"""With the step size of Adam on the hyperparameters, and the seconds that a contestant has."""
