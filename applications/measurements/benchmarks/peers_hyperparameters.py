"""Workload B, contestant by contestant: the same objective, the same W, conjugate gradients at the same tolerance."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from torch.utils._python_dispatch import TorchDispatchMode

import bilevel as bl
from applications.measurements.benchmarks.contest import HYPERTORCH, Contestant, Round, checkout, needs, timed
from applications.measurements.benchmarks.hyperparameters_task import MAX_STEPS, RTOL, Data, Linear, objective

Hypergradient = Callable[["Tensors"], tuple[Any, dict[str, Any]]]
"""One hypergradient from the solved W, with facts about it."""


def contestants(data: Callable[[], Data]) -> dict[str, Callable[[], Contestant]]:
    """The peers stand twice where they take a preconditioner: as they come, and with the one that ours is given."""

    def in_torch(build: Callable[[Tensors], Hypergradient], layer: Linear = linear) -> Callable[[], Contestant]:
        return lambda: InTorch(Tensors(data(), layer), build)

    def with_diagonal(build: Callable[..., Hypergradient], layer: Linear = linear) -> Callable[[], Contestant]:
        return in_torch(functools.partial(build, preconditioned=True), layer)

    return {
        "bilevel": with_diagonal(ours, bl.nn.linear),
        "bilevel, plain CG": in_torch(ours, bl.nn.linear),
        "bilevel, plain CG, PyTorch's linear": in_torch(ours),
        "hypertorch": in_torch(hypertorch),
        "TorchOpt": in_torch(torchopt),
        "TorchOpt, same preconditioner": with_diagonal(torchopt),
        "JAXopt": lambda: InJAX(data(), preconditioned=False),
        "JAXopt, same preconditioner": lambda: InJAX(data(), preconditioned=True),
        "scipy": in_torch(scipy),
        "scipy, same preconditioner": with_diagonal(scipy),
    }


class Tensors:
    """`Data` as tensors, without a copy, and the layer that multiplies with them."""

    def __init__(self, data: Data, layer: Linear = linear):
        self.linear = layer
        self.x_train, self.y_train = torch.from_numpy(data.x_train), torch.from_numpy(data.y_train)
        self.x_val, self.y_val = torch.from_numpy(data.x_val), torch.from_numpy(data.y_val)
        self.solution = torch.from_numpy(data.solution)
        self.log_penalties = torch.from_numpy(data.log_penalties).requires_grad_()
        self.inverse_diagonal = 1 / torch.from_numpy(data.diagonal())

    def inner(self, params: Tensor, log_penalties: Tensor) -> Tensor:
        return objective(params, log_penalties, self.x_train, self.y_train, self.linear)

    def outer(self, params: Tensor) -> Tensor:
        return cross_entropy(self.linear(self.x_val, params), self.y_val)


class InTorch:
    """A contestant in PyTorch. What it reads of X, in passes over the training set, is counted in a first call."""

    def __init__(self, tensors: Tensors, build: Callable[[Tensors], Hypergradient]):
        self.tensors, self.hypergradient = tensors, build(tensors)
        self.facts: dict[str, Any] = {}
        with Passes(tensors.x_train) as passes:
            self.hypergradient(tensors)
        self.facts["passes"] = passes.count
        self.facts["product_in_gradients"] = product_in_gradients(tensors)

    def __call__(self) -> Round:
        seconds, (found, facts) = timed(lambda: self.hypergradient(self.tensors))
        return Round(seconds, found.detach().double().numpy().ravel(), {**facts, **self.facts})


PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, getattr(torch.ops.mkldnn, "_linear_pointwise", None))


class Passes(TorchDispatchMode):
    """Counts the matrix products with X as an operand, in either orientation."""

    def __init__(self, x: Tensor):
        super().__init__()
        self.x, self.count = x, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads_x = any(isinstance(arg, Tensor) and arg.data_ptr() == self.x.data_ptr() for arg in args)
        self.count += reads_x and func.overloadpacket in PRODUCTS
        return func(*args, **(kwargs or {}))


def product_in_gradients(tensors: Tensors, repeats: int = 3) -> float:
    """The time of one Hessian product over the retained graph, in gradients of the inner loss."""
    params = tensors.solution.clone().requires_grad_()
    log_penalties = tensors.log_penalties.detach()
    (slope,) = torch.autograd.grad(tensors.inner(params, log_penalties), params, create_graph=True)
    direction = torch.ones_like(params)

    def gradient() -> None:
        torch.autograd.grad(tensors.inner(params, log_penalties), params)

    def product() -> None:
        torch.autograd.grad(slope, params, direction, retain_graph=True)

    medians = [statistics.median(timed(work)[0] for _ in range(repeats)) for work in (product, gradient)]
    return medians[0] / medians[1]


def ours(tensors: Tensors, preconditioned: bool = False) -> Hypergradient:
    """`argmin` with W as the answer of its solver: what it evaluates at W on the way is timed with the rest."""
    inverse = tensors.inverse_diagonal.expand_as(tensors.solution).reshape(-1)
    preconditioner = (lambda operator: lambda r: r * inverse) if preconditioned else None
    hypergrad = bl.Implicit(bl.CG(rtol=RTOL, max_steps=MAX_STEPS, preconditioner=preconditioner))
    solved = bl.External(lambda loss, start: start)

    def hypergradient(tensors: Tensors) -> tuple[Tensor, dict[str, Any]]:
        fit = bl.argmin(tensors.inner, tensors.solution, tensors.log_penalties, solver=solved, hypergrad=hypergrad)
        (grad,) = torch.autograd.grad(tensors.outer(fit.value), tensors.log_penalties)
        assert fit.adjoint is not None
        return grad, {"iterations": int(fit.adjoint.stats["num_steps"])}

    return hypergradient


def hypertorch(tensors: Tensors) -> Hypergradient:
    """The CG of hypertorch, on the map of one gradient step; its tolerance is absolute."""
    hypergrad = checkout("hypergrad", *HYPERTORCH)
    params = tensors.solution.clone().requires_grad_()
    (right,) = torch.autograd.grad(tensors.outer(params), params)
    tolerance = RTOL * right.norm().item()

    def step(params: list[Tensor], hparams: list[Tensor]) -> list[Tensor]:
        loss = tensors.inner(params[0], hparams[0])
        return [params[0] - torch.autograd.grad(loss, params, create_graph=True)[0]]

    def outer(params: list[Tensor], hparams: list[Tensor]) -> Tensor:
        return tensors.outer(params[0])

    def hypergradient(tensors: Tensors) -> tuple[Tensor, dict[str, Any]]:
        (grad,) = hypergrad.CG(
            [tensors.solution], [tensors.log_penalties], MAX_STEPS, step, outer, tol=tolerance, set_grad=False
        )
        return grad, {}

    return hypergradient


def torchopt(tensors: Tensors, preconditioned: bool = False) -> Hypergradient:
    """``custom_root`` on the gradient, in the functional style."""
    torchopt = needs("torchopt")
    inverse = tensors.inverse_diagonal
    settings: dict[str, Any] = {"M": lambda r: tuple(leaf * inverse for leaf in r)} if preconditioned else {}
    solve = torchopt.linear_solve.solve_cg(rtol=RTOL, maxiter=MAX_STEPS, **settings)

    @torchopt.diff.implicit.custom_root(torch.func.grad(tensors.inner, argnums=0), argnums=1, solve=solve)
    def solver(params: Tensor, log_penalties: Tensor) -> Tensor:
        return params

    def hypergradient(tensors: Tensors) -> tuple[Tensor, dict[str, Any]]:
        solution = solver(tensors.solution, tensors.log_penalties)
        return torch.autograd.grad(tensors.outer(solution), tensors.log_penalties)[0], {}

    return hypergradient


def scipy(tensors: Tensors, preconditioned: bool = False) -> Hypergradient:
    """``scipy.sparse.linalg.cg`` with products over the retained graph of the gradient."""
    from scipy.sparse.linalg import LinearOperator, cg

    shape, size = tensors.solution.shape, tensors.solution.numel()
    inverse = tensors.inverse_diagonal.expand(shape).reshape(-1).numpy()

    def hypergradient(tensors: Tensors) -> tuple[Tensor, dict[str, Any]]:
        params = tensors.solution.clone().requires_grad_()
        (slope,) = torch.autograd.grad(tensors.inner(params, tensors.log_penalties), params, create_graph=True)
        (right,) = torch.autograd.grad(tensors.outer(params), params)
        products = 0

        def product(v: np.ndarray) -> np.ndarray:
            nonlocal products
            products += 1
            direction = torch.from_numpy(v.reshape(shape))
            return torch.autograd.grad(slope, params, direction, retain_graph=True)[0].numpy().ravel()

        operator = LinearOperator((size, size), matvec=product, dtype=np.float32)
        m = LinearOperator((size, size), matvec=lambda r: r * inverse, dtype=np.float32) if preconditioned else None
        u, _ = cg(operator, right.numpy().ravel(), rtol=RTOL, maxiter=MAX_STEPS, M=m)
        cotangent = -torch.from_numpy(u.astype(np.float32).reshape(shape))
        (grad,) = torch.autograd.grad(slope, tensors.log_penalties, cotangent)
        return grad, {"iterations": products}

    return hypergradient


class InJAX:
    """JAXopt's ``custom_root``, compiled as a whole; the compilation is in the first call, which is not timed."""

    def __init__(self, data: Data, preconditioned: bool):
        jax, jnp, jaxopt = (needs(name) for name in ("jax", "jax.numpy", "jaxopt"))

        def mean_cross_entropy(params: Any, x: Any, y: Any) -> Any:
            return -jnp.take_along_axis(jax.nn.log_softmax(x @ params.T), y[:, None], 1).mean()

        def inner(params: Any, log_penalties: Any, x: Any, y: Any) -> Any:
            return mean_cross_entropy(params, x, y) + (jnp.exp(log_penalties) * params**2).sum() / 2

        inverse = jnp.asarray(1 / data.diagonal())
        settings: dict[str, Any] = {"M": lambda r: r * inverse} if preconditioned else {}
        solve = functools.partial(jaxopt.linear_solve.solve_cg, tol=RTOL, maxiter=MAX_STEPS, **settings)

        @jaxopt.implicit_diff.custom_root(jax.grad(inner), solve=solve)
        def solver(init: Any, log_penalties: Any, x: Any, y: Any) -> Any:
            return init

        def outer(log_penalties: Any, init: Any, x: Any, y: Any, x_val: Any, y_val: Any) -> Any:
            return mean_cross_entropy(solver(init, log_penalties, x, y), x_val, y_val)

        self.hypergradient = jax.jit(jax.grad(outer))
        kept = (data.log_penalties, data.solution, data.x_train, data.y_train, data.x_val, data.y_val)
        self.args = [jnp.asarray(array.astype(np.int32) if array.dtype == np.int64 else array) for array in kept]
        self.hypergradient(*self.args).block_until_ready()

    def __call__(self) -> Round:
        seconds, found = timed(lambda: self.hypergradient(*self.args).block_until_ready())
        return Round(seconds, np.asarray(found, np.float64).ravel())
