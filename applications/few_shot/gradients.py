"""``gradients``: the error of the meta-gradient against inner steps, where the exact one is known.

Part (a) of figure 2 of Rajeswaran et al. 2019, on linear regression, for implicit MAML and the unrolled one; part (b),
memory and time, is ``benchmark``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from torch import Tensor

import bilevel as bl
from applications.frame import measurement
from applications.frame.command import require, require_at_least_one, require_positive
from applications.frame.figures import png
from applications.frame.run_folder import RunFolder


@dataclass(frozen=True)
class Config:
    """Error of the meta-gradient against inner steps, on linear regression."""

    size: int = 50
    """Parameters of a task."""
    tasks: int = 10
    """Tasks; the error is that of the mean of their meta-gradients."""
    condition: float = 100.0
    """Condition number of the Hessian of a task's loss, whose largest eigenvalue is 1."""
    strength: float = 0.02
    """lambda, the strength of the proximal term."""
    steps: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
    """Inner steps of gradient descent."""
    seed: int = 0
    """The seed of the tasks."""
    out: Path = Path("gradients.png")
    """Where the picture goes."""


@dataclass(frozen=True)
class Tasks:
    """T regressions: ``||features w - targets||^2 / 2n`` on a support and a query set each, float64.

    Attributes:
        support, query: features ``[T, n, size]`` and targets ``[T, n]``.
        meta: the start of all tasks, ``[size]``.
    """

    support: tuple[Tensor, Tensor]
    query: tuple[Tensor, Tensor]
    meta: Tensor

    @classmethod
    def draw(cls, options: Config) -> Tasks:
        """Tasks whose Hessians on the support have eigenvalues spaced evenly in their logarithm."""
        generator = torch.Generator().manual_seed(options.seed)
        shape = (options.tasks, 2 * options.size, options.size)

        def features() -> Tensor:
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
            u, _, v = torch.linalg.svd(drawn, full_matrices=False)
            values = torch.logspace(0, -math.log10(options.condition), options.size, dtype=torch.float64)
            return u * (shape[1] * values).sqrt() @ v

        true = torch.randn(options.tasks, options.size, generator=generator, dtype=torch.float64)
        sets = [(x, (x @ true.unsqueeze(-1)).squeeze(-1)) for x in (features(), features())]
        return cls(sets[0], sets[1], torch.zeros(options.size, dtype=torch.float64))

    def exact(self, strength: float) -> Tensor:
        """The meta-gradient ``mean_t strength (H_t + strength I)^{-1} grad L_t(w_t)`` in closed form, ``[size]``."""
        (x, y), (qx, qy), n = self.support, self.query, self.support[0].shape[1]
        system = x.mT @ x / n + strength * torch.eye(x.shape[-1], dtype=x.dtype)
        w = torch.linalg.solve(system, (x.mT @ y.unsqueeze(-1)).squeeze(-1) / n + strength * self.meta)
        residual = (qx @ w.unsqueeze(-1)).squeeze(-1) - qy
        gradient = (qx.mT @ residual.unsqueeze(-1)).squeeze(-1) / n
        return strength * torch.linalg.solve(system, gradient).mean(0)


def methods(options: Config) -> dict[str, Any]:
    """Name -> how the inner solution is differentiated."""
    implicit = {f"implicit, {k} CG steps": bl.Implicit(bl.CG(max_steps=k)) for k in (2, 5, options.size)}
    return {**implicit, "unrolled": bl.Unroll()}


def errors(options: Config) -> Iterator[tuple[str, int, float]]:
    """Name of a method, inner steps, and the relative error of its meta-gradient."""
    tasks = Tasks.draw(options)
    exact = tasks.exact(options.strength)
    for name, hypergrad in methods(options).items():
        for steps in options.steps:
            found = meta_gradient(tasks, options.strength, steps, hypergrad)
            yield name, steps, ((found - exact).norm() / exact.norm()).item()


def meta_gradient(tasks: Tasks, strength: float, steps: int, hypergrad: Any) -> Tensor:
    """That of a method after so many steps of gradient descent on the proximal problem, ``[size]``."""
    meta = tasks.meta.clone().requires_grad_()

    def proximal(w: Tensor, meta: Tensor) -> Tensor:
        return _loss(w, *tasks.support) + strength / 2 * (w - meta).square().sum(-1)

    start = bl.stack(meta, len(tasks.support[0]))
    solver = bl.GradientDescent(1 / (1 + strength), steps)
    solution = bl.argmin(proximal, start, meta, solver=solver, hypergrad=hypergrad, throw="ignore")
    return torch.autograd.grad(_loss(solution.value, *tasks.query).mean(), meta)[0]


def command(arguments: list[str]) -> int:
    """Run the command."""
    return measurement.main("few_shot gradients", arguments, Config, run, check, folder=None)


def check(options: Config) -> None:
    """Refuse what cannot be run, before anything is."""
    require_at_least_one(options, "size", "tasks")
    require_positive(options, "condition", "strength")
    require(options.condition >= 1, f"--condition is {options.condition}: that of a matrix is at least 1.")
    require(min(options.steps, default=0) > 0, f"--steps is {options.steps}: numbers of at least 1 are needed.")
    require(not options.out.is_dir(), f"--out is {options.out}, a folder: the name of a file is needed.")


def run(options: Config) -> None:
    """Compute, print the errors and draw them."""
    found: dict[str, list[float]] = {}
    for name, _, error in errors(options):
        found.setdefault(name, []).append(error)
    print(f"| inner steps | {' | '.join(found)} |\n| ---: |{' ---: |' * len(found)}")
    for row, steps in enumerate(options.steps):
        print(f"| {steps} | {' | '.join(f'{errors[row]:.1e}' for errors in found.values())} |")
    RunFolder(options.out.parent).write_bytes(options.out.name, draw(options, found))


def draw(options: Config, found: dict[str, list[float]]) -> bytes:
    """A curve for each method: a PNG."""
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, values in found.items():
        axis.loglog(options.steps, values, "o--" if name == "unrolled" else "o-", label=name)
    axis.set(xlabel="inner steps", ylabel="relative error of the meta-gradient")
    axis.legend(frameon=False)
    axis.set_title(f"{options.tasks} regressions, condition number {options.condition:g}, lambda {options.strength:g}")
    return png(figure)


def _loss(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """``[T]`` for ``w [T, size]``."""
    return ((x @ w.unsqueeze(-1)).squeeze(-1) - y).square().mean(-1) / 2
