"""The hidden layer, and how its gradient is found: from the solution, by the path to it, or from its last step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import bilevel as bl
from applications.equilibrium.knobs import Config, settings_of
from applications.equilibrium.network import Network

Method = Literal["implicit", "one step", "unrolled", "explicit"]
METHODS: dict[Method, str] = {
    "implicit": "equilibrium, implicit gradient",
    "one step": "equilibrium, gradient of one step",
    "unrolled": "unrolled, backpropagation",
    "explicit": "two explicit layers",
}


class Hidden(NamedTuple):
    """States ``[n, ...]`` and, where they are equilibria, how the solve went."""

    z: Tensor
    solution: bl.Solution | None


def hidden(
    network: Network, x: Tensor, method: Method, config: Config, settings: Mapping[str, Any] | None = None
) -> Hidden:
    """The hidden states of examples ``[n, ...]``, differentiable towards every parameter.

    ``"implicit"``: Anderson's acceleration finds the equilibrium of each example, and the adjoint series
    ``u <- J^T u + df/dz`` of the same map its gradient; nothing on the way is kept. ``"one step"``: the same
    equilibrium, with the first term of that series alone, which is backpropagation through one application of the map
    (Fung et al. 2022, Bolte et al. 2023). ``"unrolled"``: ``config.unrolled`` plain iterations, each of them kept.
    ``"explicit"``: two layers with the same parameters, of which none is bounded.

    Args:
        settings: of ``"implicit"``, in place of `settings_of`.
    """
    injected = network.inject(x)
    if method == "explicit":
        return Hidden(torch.relu(network.mix(torch.relu(injected), network.weight)), None)
    if method == "unrolled":
        return Hidden(iterate(network, injected, config.unrolled), None)
    chosen = settings_of(config)
    if method == "one step":
        chosen["hypergrad"] = bl.OneStep(1.0)
    else:
        chosen |= settings or {}
    solver = chosen["solver"]
    if getattr(solver, "tol", None) is not None:
        solver = replace(solver, tol=solver.tol * injected[0].numel() ** 0.5)
    solution = equilibrium(network, injected, solver, chosen["hypergrad"], throw="ignore" if settings else "warn")
    return Hidden(solution.value, solution)


def iterate(network: Network, injected: Tensor, steps: int) -> Tensor:
    """The unrolled network: so many layers that share their weight."""
    weight, z = network.bounded_weight(), torch.zeros_like(injected)
    for _ in range(steps):
        z = network.layer(z, weight, injected)
    return z


def equilibrium(
    network: Network,
    injected: Tensor,
    solver: bl.Anderson | bl.Picard,
    hypergrad: bl.Implicit | bl.OneStep | None,
    throw: Literal["warn", "ignore"] = "ignore",
) -> bl.Solution:
    """Each example is a problem of its own: its own weights in Anderson's mixing, its own stopping."""
    weight = network.bounded_weight()
    return bl.fixed_point(
        lambda z: network.layer(z, weight, injected),
        torch.zeros_like(injected),
        solver=solver,
        hypergrad=hypergrad,
        batched=True,
        throw=throw,
    )
