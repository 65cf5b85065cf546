"""The knobs of the application, and its data and network."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

import bilevel as bl
from applications.equilibrium.network import Convolutional, Dense, Network
from applications.frame.command import DataKnobs, SolverKnobs, require, require_at_least_one, require_positive
from applications.frame.data import Examples, load, split, standardised
from applications.frame.device import select_device
from applications.frame.errors import UserError
from applications.frame.tune import rehearse


@dataclass(frozen=True)
class Config(DataKnobs, SolverKnobs):
    """A classifier whose hidden layer is a fixed point, trained by its implicit gradient, beside an unrolled one."""

    max_train: int | None = None
    """Training examples at most."""
    net: Literal["dense", "convolutional"] = "dense"
    """What mixes the hidden units; convolutional needs images."""
    width: int = 64
    """Hidden units, or channels."""
    contraction: float = 0.95
    """Bound of the norm of the recurrent weight, below 1."""
    runs: int = 3
    """Trainings of each method, from seeds seed, seed + 1, ...: another split and another start each."""
    epochs: int = 12
    """Passes over the training examples."""
    batch_size: int = 100
    """Examples in a step."""
    lr: float = 0.01
    """Step size of Adam at the start; it falls linearly to zero."""
    history: int = 5
    """Differences that Anderson's acceleration keeps."""
    tol: float = 1e-3
    """An example's equilibrium is found at this root mean square of z - map(z) over its hidden units."""
    max_iterations: int = 200
    """Most iterations of the forward solve."""
    adjoint_rtol: float = 1e-2
    """Relative residual of the adjoint solve."""
    unrolled: int = 30
    """Iterations of the unrolled network."""
    depths: tuple[int, ...] = (10, 30, 100, 300)
    """Iterations at which the memory of a step is measured."""
    device: Literal["cpu", "cuda", "auto"] = "cpu"
    """Where to compute."""

    length = "epochs"

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """See `SolverKnobs`."""
        chosen = {**settings_of(self), **settings}
        rehearse(lambda x: bl.fixed_point(lambda z: z / 2 + x, torch.zeros_like(x), **chosen, throw="ignore"))

    def replaced(self) -> Mapping[str, Collection[str]]:
        """See `SolverKnobs`; the gradient of one step keeps the knobs' solver."""
        return {"hypergrad": ("adjoint_rtol",)}

    def untuned(self) -> Collection[str]:
        """See `SolverKnobs`."""
        return "epochs", "runs", "unrolled", "depths"

    def check(self) -> None:
        require_at_least_one(self, "width", "runs", "epochs", "batch_size", "max_iterations", "unrolled", "max_train")
        require(self.history >= 0, f"--history is {self.history}: it cannot be negative; 0 is the plain iteration.")
        require(len(self.depths) > 0 and min(self.depths, default=0) >= 1, "--depths: give numbers of at least 1.")
        require(
            0 < self.contraction < 1,
            f"--contraction is {self.contraction}: it lies between 0 and 1. From 1 on, an equilibrium need not exist.",
        )
        require_positive(self, "lr", "tol", "adjoint_rtol")
        told = f"--adjoint-rtol is {self.adjoint_rtol}: from 1 on, the adjoint would not be solved at all."
        require(self.adjoint_rtol < 1, told)
        select_device(self.device)


def settings_of(config: Config) -> dict[str, Any]:
    """Solvers of the implicit method, by the knobs: Anderson's acceleration, and the map's own iteration, transposed.

    That iteration converges wherever the map contracts. The solver's ``tol`` is a root mean square over the hidden
    units, so that it does not depend on their number.
    """
    solver = bl.Anderson(history=config.history, max_steps=config.max_iterations, tol=config.tol)
    adjoint = bl.Neumann(alpha=1.0, rtol=config.adjoint_rtol, max_steps=ADJOINT_STEPS)
    return {"solver": solver, "hypergrad": bl.Implicit(adjoint)}


ADJOINT_STEPS = 1000
"""At most."""


@dataclass(frozen=True)
class Parts:
    """Examples ``[n, ...]`` with classes ``[n]``: to train on, to watch, and to report on once, at the end."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def read(config: Config) -> Examples:
    """The data, checked against the network.

    Raises:
        UserError: the files cannot be used, or the network needs images.
    """
    examples = load(config.data, config.data_root)
    if config.net == "convolutional" and examples.image is None:
        raise UserError(
            f"--net convolutional needs images, and {config.data} has {examples.features.shape[1]} features that are "
            "none. Take --net dense, or --data digits or mnist."
        )
    parts_of(config, examples, config.seed)  # too few examples are told now
    return examples


def parts_of(config: Config, examples: Examples, seed: int) -> Parts:
    """Split the examples.

    Of MNIST nine in ten training images, the rest and the official test images; of other sets
    60, 15 and 25 % at random.
    """
    if config.data == "mnist":
        rest, test = examples.official()
        train, validation = split(rest, [len(rest) - len(rest) // 10, len(rest) // 10], seed)
    else:
        train, validation, test = split(examples, [0.6, 0.15, 0.25], seed)
    if config.max_train is not None and config.max_train < len(train):
        (train,) = split(train, [config.max_train], seed)
    device = select_device(config.device)

    def tensors(part: Examples) -> tuple[Tensor, Tensor]:
        x, y = part.tensors(device=device)
        if config.net == "convolutional" and part.image is not None:
            return x.unflatten(1, part.image), y
        return x, y

    return Parts(*(tensors(part) for part in standardised(train, validation, test)))


def create_network(config: Config, examples: Examples, seed: int) -> Network:
    """The network at its start, which depends on the seed alone: the same for every method."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.net == "convolutional" and examples.image is not None:
            network: Network = Convolutional(examples.image, config.width, examples.num_classes, config.contraction)
        else:
            width = examples.features.shape[1]
            network = Dense(width, config.width, examples.num_classes, config.contraction)
    return network.to(select_device(config.device))
