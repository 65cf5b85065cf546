"""How good a gradient is: implicit, unrolled and of one step, beside that of the exact equilibrium in float64."""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import bilevel as bl
from applications.equilibrium.methods import equilibrium, iterate
from applications.equilibrium.network import Network
from applications.frame.run import Row

EXACT = bl.Anderson(max_steps=5000, tol=1e-12)
COUNTS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 50)
"""Iterations at which errors are measured."""
CURVES = (
    "unrolled: k iterations",
    "implicit: k iterations, k Neumann terms",
    "implicit: k Anderson steps, k Neumann terms",
    "implicit: k Anderson steps, k GMRES steps",
    "one step: k Anderson steps",
)


class Loss:
    """The training loss of a few examples in float64, on a copy of the network.

    Args:
        x, y: examples ``[n, ...]`` and classes ``[n]``.
    """

    def __init__(self, network: Network, x: Tensor, y: Tensor):
        self.network, self.x, self.y = copy.deepcopy(network).double(), x.double(), y
        self.truth = self.gradient(EXACT, bl.Implicit(bl.Neumann(alpha=1.0, rtol=1e-13)))

    def solve(self, solver: bl.Anderson | bl.Picard, hypergrad: bl.Implicit | bl.OneStep) -> bl.Solution:
        return equilibrium(self.network, self.network.inject(self.x), solver, hypergrad)

    def of(self, z: Tensor) -> Tensor:
        return cross_entropy(self.network.head(z), self.y)

    def gradient(self, solver: bl.Anderson | bl.Picard, hypergrad: bl.Implicit | bl.OneStep) -> Tensor:
        """That of the loss at the equilibrium, towards all parameters, flat."""
        return self._flat(self.of(self.solve(solver, hypergrad).value))

    def unrolled(self, steps: int) -> Tensor:
        """That of the loss after so many plain iterations."""
        return self._flat(self.of(iterate(self.network, self.network.inject(self.x), steps)))

    def error(self, gradient: Tensor) -> float:
        """Relative to the truth."""
        return float((gradient - self.truth).norm() / self.truth.norm())

    def _flat(self, loss: Tensor) -> Tensor:
        return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(self.network.parameters()))])


def error_curves(network: Network, x: Tensor, y: Tensor) -> dict[str, list[float]]:
    """Relative errors of the gradient at each of `COUNTS`, by the names of `CURVES`."""
    loss = Loss(network, x, y)
    curves: dict[str, list[float]] = {name: [] for name in CURVES}
    for k in COUNTS:
        plain, fast = bl.Picard(max_steps=k, tol=0.0), bl.Anderson(max_steps=k, tol=0.0)
        series, krylov = bl.Neumann(alpha=1.0, max_steps=k), bl.GMRES(max_steps=k)
        gradients = (
            loss.unrolled(k),
            loss.gradient(plain, bl.Implicit(series)),
            loss.gradient(fast, bl.Implicit(series)),
            loss.gradient(fast, bl.Implicit(krylov)),
            loss.gradient(fast, bl.OneStep(1.0)),
        )
        for name, gradient in zip(CURVES, gradients, strict=True):
            curves[name].append(loss.error(gradient))
    return curves


ADJOINTS: dict[str, bl.Implicit | bl.OneStep] = {
    "one step": bl.OneStep(1.0),
    "Neumann, rtol 1e-2": bl.Implicit(bl.Neumann(alpha=1.0, rtol=1e-2)),
    "Neumann, rtol 1e-6": bl.Implicit(bl.Neumann(alpha=1.0, rtol=1e-6)),
    "GMRES, rtol 1e-2": bl.Implicit(bl.GMRES(rtol=1e-2)),
    "GMRES, rtol 1e-6": bl.Implicit(bl.GMRES(rtol=1e-6)),
    "BiCGSTAB, rtol 1e-6": bl.Implicit(bl.BiCGSTAB(rtol=1e-6)),
    "NormalCG, rtol 1e-6": bl.Implicit(bl.NormalCG(rtol=1e-6)),
}


def adjoint_solvers(network: Network, x: Tensor, y: Tensor, repeats: int = 3) -> list[Row]:
    """Each solver of ``(I - J)^T u = df/dz`` at the exact equilibrium: steps, residual, gradient error, time."""
    loss = Loss(network, x, y)
    rows: list[Row] = []
    for name, hypergrad in ADJOINTS.items():
        seconds = []
        for _ in range(repeats):
            solution = loss.solve(EXACT, hypergrad)
            value = loss.of(solution.value)
            begin = time.perf_counter()
            gradient = loss._flat(value)
            seconds.append(time.perf_counter() - begin)
        stats: dict[str, Any] = solution.adjoint.stats if solution.adjoint is not None else {}
        rows.append(
            {
                "adjoint solver": name,
                "steps": int(stats["num_steps"].max()) if stats else 0,
                "relative residual": float(stats["relative_residual"].max()) if stats else None,
                "gradient error": loss.error(gradient),
                "ms": 1000 * statistics.median(seconds),
            }
        )
    return rows
