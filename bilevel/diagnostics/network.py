"""What `advise` names for networks: first-order inner steps, and a matrix that is never indefinite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode

from ..closure import Tracer
from ..context import EVALUATING
from ..hypergrad.base import Point
from ..hypergrad.implicit import Implicit
from ..inner.steps import Adam, Steps
from ..linalg.cg import CG
from ..linalg.gauss_newton import GaussNewton, OfModule
from ..linalg.minres import MINRES
from ..tree import Tree, leaves, tree_map
from .checked import distance
from .problem import Bilevel, solve

LOSSES = frozenset(
    {"cross_entropy", "nll_loss", "mse_loss", "binary_cross_entropy_with_logits", "binary_cross_entropy"}
    | {"l1_loss", "smooth_l1_loss", "huber_loss", "kl_div", "poisson_nll_loss", "gaussian_nll_loss"}
)
"""Functions of `torch.nn.functional` that are losses of their first argument."""
INNER_STEPS, PRODUCTS, DAMPING = 30, 10, 1e-2
"""Inner steps, products and damping of one outer step of a network; the next one goes on from there."""
STEP_SIZES = (3e-3, 1e-2, 3e-2)
"""Step sizes of Adam, tried on the problem."""


@dataclass(frozen=True)
class Network:
    """A module that the inner loss calls, and the function of PyTorch that it calls on the outputs, if any."""

    module: nn.Module
    loss: Callable[..., Any] | None

    @property
    def operator(self) -> OfModule:
        return GaussNewton.of(self.module, self.loss)


class _Losses(TorchFunctionMode):
    """Notes the losses of PyTorch that are called on something that depends on the params."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Callable[..., Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = args[0] if args else (kwargs or {}).get("input")
        own = getattr(func, "__name__", "") in LOSSES and getattr(func, "__module__", "") == "torch.nn.functional"
        if own and isinstance(first, Tensor) and first.requires_grad:
            self.found.append(func)
        return func(*args, **(kwargs or {}))


def find_network(problem: Bilevel, hparams: Tree) -> Network | None:
    """The outermost module that the inner loss calls with params; None: it calls none."""
    modules: list[nn.Module] = []

    def note(module: nn.Module, args: tuple[Tree, ...], found: Tree) -> None:
        own = any(id(tensor) in given or not isinstance(tensor, nn.Parameter) for tensor in module.parameters())
        if own and any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves(found)):
            modules.append(module)  # the outermost one returns last

    params = tree_map(lambda leaf: leaf.detach().requires_grad_(), problem.init)
    given = {id(leaf) for leaf in leaves(params)}
    losses, handle = _Losses(), register_module_forward_hook(note)
    try:
        with torch.enable_grad(), EVALUATING, Tracer(differentiable=False), losses:
            problem.inner(params, hparams)
    finally:
        handle.remove()
    return Network(modules[-1], losses.found[-1] if losses.found else None) if modules else None


def first_order_solver(problem: Bilevel, hparams: Tree) -> Steps:
    """A few steps of Adam, with the step size that lowers the inner loss most from the start."""
    tried = []
    for lr in STEP_SIZES:
        solver = Steps(Adam(lr=lr), max_steps=INNER_STEPS)
        with torch.no_grad():
            fit = solve(problem, hparams, solver=solver, throw="ignore")
        loss = float(fit.stats["loss"].sum())
        tried.append((loss if loss == loss else torch.inf, lr, solver))
    return min(tried, key=lambda one: one[0])[2]


def network_hypergrad(network: Network) -> Implicit:
    """Products with the Gauss-Newton matrix of a network, which is damped.

    Of so few products MINRES never leaves more than there was, which CG at times does, and is warned about.
    """
    return Implicit(MINRES(max_steps=PRODUCTS), operator=network.operator, damping=DAMPING)


def fresh(point: Point) -> Point:
    """The same with a new graph: a pull uses it up."""
    point.release()
    return point


def left_by_few_products(hypergrad: Implicit, point: Point, cotangent: Tensor) -> float:
    """The relative difference that many more products make."""
    many_steps = replace(hypergrad, linear_solver=CG(rtol=1e-4, max_steps=20 * PRODUCTS))
    few, many = (method.pull(fresh(point), cotangent).hparams for method in (hypergrad, many_steps))
    pairs = [(one, other) for one, other in zip(few, many, strict=True) if one is not None and other is not None]
    if not pairs:
        return 0.0
    size = float(distance([other for _, other in pairs], [torch.zeros_like(other) for _, other in pairs]))
    return float(distance([one for one, _ in pairs], [other for _, other in pairs])) / size if size else 0.0
