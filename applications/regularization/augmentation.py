"""How strongly to augment, learned: angles, shifts and noise by a differentiable transformation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import affine_grid, cross_entropy, grid_sample

import bilevel as bl
from applications.frame.data import Examples
from applications.frame.run import Row
from applications.regularization.search import Params, Search, accuracy

Part = tuple[Tensor, Tensor]
STRENGTHS = ("rotation", "shift", "scale", "noise")
"""The largest angle (radians); the largest shift, in half widths of the image; the largest logarithm of the factor of
size; the standard deviation of the noise. The first three are drawn evenly from both sides of zero."""
IN_USE = {"rotation": math.radians(35), "shift": 0.2, "scale": 0.0, "noise": 0.0}
"""What happens to images in use, validation and test set: they are turned and moved, training images are not."""
START = {"rotation": 0.2, "shift": 0.1, "scale": 0.1, "noise": 0.1}
"""Where the search starts."""


@dataclass(frozen=True)
class Draws:
    """Random numbers of a transformation, before any strength: of n images ``[n, c, h, w]``."""

    angle: Tensor
    shift: Tensor
    scale: Tensor
    noise: Tensor

    @classmethod
    def of(cls, images: Tensor, seed: int) -> Draws:
        generator = torch.Generator().manual_seed(seed)

        def even(*shape: int) -> Tensor:
            return 2 * torch.rand(*shape, generator=generator) - 1

        count = len(images)
        noise = torch.randn(images.shape, generator=generator)
        return cls(angle=even(count), shift=even(count, 2), scale=even(count), noise=noise)


def transform(images: Tensor, strengths: Params, draws: Draws) -> Tensor:
    """Turn, move, resize and add noise, each by its strength times its draw; differentiable in the strengths.

    A strength is a scale of a fixed random number (reparameterisation), so the gradient of the expected loss passes
    through `grid_sample`.
    """
    angle = strengths["rotation"] * draws.angle
    size = (strengths["scale"] * draws.scale).exp()
    shift = strengths["shift"] * draws.shift
    cos, sin = size * angle.cos(), size * angle.sin()
    affine = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    moved = grid_sample(images, affine_grid(affine, list(images.shape), align_corners=False), align_corners=False)
    return moved + strengths["noise"] * draws.noise


@dataclass(frozen=True)
class Augmented:
    """A small network trained on augmented images, ``copies`` of each; draws are new at every outer step.

    ``g(w, x) = mean over copies of cross-entropy(net(transform(image, exp(x)))) + decay / 2 |w|^2``; learned are the
    log-strengths x, on validation images as they come in use.
    """

    train: Part
    validation: Part
    test: Part
    num_classes: int
    seed: int
    hidden: int = 64
    copies: int = 4
    decay: float = 1e-3

    @classmethod
    def of(cls, train: Part, validation: Part, test: Part, num_classes: int, seed: int) -> Augmented:
        """From images as they are; validation and test images are then transformed as in use, once."""
        in_use = [
            (transform(images, constant(IN_USE), Draws.of(images, 10 * seed + index)), targets)
            for index, (images, targets) in enumerate((validation, test))
        ]
        return cls(train, in_use[0], in_use[1], num_classes, seed)

    @cached_property
    def net(self) -> torch.nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return torch.nn.Sequential(
                torch.nn.Flatten(),
                torch.nn.Linear(self.train[0][0].numel(), self.hidden),
                torch.nn.Tanh(),
                torch.nn.Linear(self.hidden, self.num_classes),
            )

    @property
    def start(self) -> Params:
        return {name: p.detach().clone() for name, p in self.net.named_parameters()}

    def training_loss(self, params: Params, log_strengths: Params, images: Tensor, draws: Draws) -> Tensor:
        """``g``, for these draws."""
        strengths = {name: x.exp() for name, x in log_strengths.items()}
        targets = self.train[1].repeat(self.copies)
        fit = cross_entropy(functional_call(self.net, params, (transform(images, strengths, draws),)), targets)
        return fit + self.decay / 2 * sum((p.square().sum() for p in params.values()), torch.zeros(()))

    def solve(
        self, params: Params, log_strengths: Params, step: int, settings: Mapping[str, Any] | None = None
    ) -> bl.Solution:
        """Some steps on new draws; by ``settings`` in place of `SETTINGS`."""
        images = self.train[0].repeat(self.copies, 1, 1, 1)
        draws = Draws.of(images, 1_000_000 * (self.seed + 1) + step)
        return bl.argmin(
            lambda params: self.training_loss(params, log_strengths, images, draws),
            params,
            **{**SETTINGS, **(settings or {})},
            throw="ignore",
        )

    def loss(self, params: Params, part: Part) -> Tensor:
        return cross_entropy(functional_call(self.net, params, (part[0],)), part[1])

    def measure(self, params: Params) -> Row:
        with torch.no_grad():
            accuracies = [accuracy(functional_call(self.net, params, (x,)), y) for x, y in (self.validation, self.test)]
        return {"validation_accuracy": accuracies[0], "test_accuracy": accuracies[1]}

    def search(self, steps: int, lr: float, settings: Mapping[str, Any] | None = None) -> Search:
        """Learn the strengths; the records have them."""
        x = {name: torch.tensor(math.log(START[name]), requires_grad=True) for name in STRENGTHS}
        return Search(
            x,
            self.start,
            solve=lambda params, step: self.solve(params, x, step, settings),
            validation_loss=lambda params: self.loss(params, self.validation),
            measure=lambda params: {**self.measure(params), **{name: s.exp().item() for name, s in x.items()}},
            steps=steps,
            lr=lr,
        )

    def train_with(self, strengths: dict[str, float], rounds: int) -> Row:
        """A training from the start with fixed strengths; a round is a solve on new draws."""
        fixed = {name: torch.tensor(value).log() for name, value in strengths.items()}
        params = self.start
        for step in range(rounds):
            params = {name: p.detach() for name, p in self.solve(params, fixed, step).value.items()}
        return {"validation_loss": self.loss(params, self.validation).item(), **self.measure(params)}

    def grid(self, rounds: int) -> Row:
        """Rotation and shift by hand: the best of a grid on the validation loss; the other strengths are zero."""
        tried = [
            {"rotation": rotation, "shift": shift, "scale": 0.0, "noise": 0.0}
            for rotation in GRID["rotation"]
            for shift in GRID["shift"]
        ]
        found = [{**strengths, **self.train_with(strengths, rounds)} for strengths in tried]
        return min(found, key=lambda row: row["validation_loss"])


DAMPING = 0.01
"""Added to the Hessian in the adjoint: without it, ten steps of CG leave a residual as large as the right-hand side."""
ROUNDS = 12
"""Rounds of training with fixed strengths."""
STRENGTH_LR = 0.2
"""Step size of Adam on their logarithms."""
SETTINGS: dict[str, Any] = {
    "solver": bl.LBFGS(max_steps=10),
    "hypergrad": bl.Implicit(bl.CG(max_steps=10), damping=DAMPING),
}
"""L-BFGS ends near a minimum, not at it, so the adjoint's system is damped."""
GRID = {"rotation": tuple(math.radians(degrees) for degrees in (15, 30, 45)), "shift": (0.1, 0.2, 0.3)}


def images(parts: list[Examples]) -> list[Part]:
    """Each part's images ``[n, c, h, w]`` and classes."""
    shape = parts[0].image
    assert shape is not None
    return [(x.view(-1, *shape), y) for x, y in (part.tensors() for part in parts)]


def constant(strengths: dict[str, float]) -> Params:
    return {name: torch.tensor(value) for name, value in strengths.items()}
