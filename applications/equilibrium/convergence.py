"""How fast the equilibrium is found: the residual against the iteration, by the plain one and by Anderson's."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

import bilevel as bl
from applications.equilibrium.methods import equilibrium
from applications.equilibrium.network import Network
from applications.frame.run import Row

COUNTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 18, 22, 26, 30, 35, 40, 50, 60)
"""Iterations at which the residual is looked at."""
QUANTILES = (0.1, 0.5, 0.9)
TOLERANCES = (1e-3, 1e-6)


def solvers(history: int, max_steps: int, tol: float) -> dict[str, bl.Anderson | bl.Picard]:
    return {
        "Picard": bl.Picard(max_steps=max_steps, tol=tol),
        "Anderson": bl.Anderson(history=history, max_steps=max_steps, tol=tol),
    }


@torch.no_grad()
def residual_curves(network: Network, x: Tensor, history: int) -> dict[str, list[list[float]]]:
    """Quantiles over the examples of ``||z - map(z)|| / ||z||``, a list for each of `COUNTS`, by solver; in float64."""
    network = copy.deepcopy(network).double()
    injected = network.inject(x.double())
    curves: dict[str, list[list[float]]] = {}
    for k in COUNTS:
        for name, solver in solvers(history, k, 0.0).items():
            found = equilibrium(network, injected, solver, None)
            relative = found.stats["residual_norm"] / found.value.flatten(1).norm(dim=1)
            curves.setdefault(name, []).append(relative.quantile(relative.new_tensor(QUANTILES)).tolist())
    return curves


@torch.no_grad()
def iterations_needed(network: Network, x: Tensor, history: int) -> Row:
    """Iterations to each of `TOLERANCES` (root mean square over the hidden units), mean over the examples; float64."""
    network = copy.deepcopy(network).double()
    injected = network.inject(x.double())
    row: Row = {}
    for tol in TOLERANCES:
        for name, solver in solvers(history, 5000, tol * injected[0].numel() ** 0.5).items():
            found = equilibrium(network, injected, solver, None, throw="warn")
            row[f"{name} to {tol:g}"] = float(found.stats["num_steps"].double().mean())
    return row
