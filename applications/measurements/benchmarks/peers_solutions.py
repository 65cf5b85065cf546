"""Peers of workload D: the same task in hypertorch, TorchOpt, JAXopt and higher, as their manuals do it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from applications.measurements.benchmarks.contest import HYPERTORCH, checkout, needs
from applications.measurements.benchmarks.solutions_task import DESCENT_STEPS, GTOL, RTOL, Begin, Step, Task, adam

CG_STEPS = 100


def peers(task: Task) -> dict[str, Callable[[], Begin]]:
    """Name -> builder; a builder imports its library."""
    return {
        "hypertorch: CG": partial(hypertorch, task, "CG"),
        "hypertorch: fixed point": partial(hypertorch, task, "fixed_point"),
        "TorchOpt: custom_root, CG": partial(torchopt_root, task),
        "TorchOpt: MetaSGD, unrolled": partial(torchopt_unrolled, task, "MetaSGD"),
        "TorchOpt: MetaAdam, unrolled": partial(torchopt_unrolled, task, "MetaAdam"),
        "JAXopt: L-BFGS, implicit": partial(jaxopt_implicit, task),
        "higher: unrolled": partial(higher_unrolled, task),
    }


class Regression(torch.nn.Module):
    """The weights as a module, for libraries that want one."""

    def __init__(self, start: Tensor):
        super().__init__()
        self.weights = torch.nn.Parameter(start.clone())


def lbfgs(task: Task, start: Tensor, x: Tensor) -> Tensor:
    """The inner solution by torch's own L-BFGS, for libraries that leave the solver to the user."""
    hparams = x.detach()
    return minimised(lambda weights: task.inner(weights, hparams), start, GTOL)


def minimised(inner: Callable[[Tensor], Tensor], start: Tensor, gtol: float) -> Tensor:
    """The minimum by torch's own L-BFGS, to a gradient norm of ``gtol``."""
    weights = start.detach().clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [weights],
        max_iter=500,
        max_eval=1000,
        history_size=10,
        line_search_fn="strong_wolfe",
        tolerance_change=0.0,
        tolerance_grad=gtol / weights.numel() ** 0.5,
    )  # its tolerance is of the largest entry, ours of the norm

    def closure() -> Tensor:
        solver.zero_grad()
        with torch.enable_grad():
            loss = inner(weights)
            loss.backward()
        return loss

    solver.step(closure)
    return weights.detach()


def outer_loop(task: Task, advance: Callable[[Tensor, Tensor], Tensor]) -> Step:
    """Adam; ``advance(params, x)`` leaves the hypergradient in ``x.grad`` and returns the inner solution."""
    params, x = task.start()
    x.requires_grad_()
    outer = torch.optim.Adam([x], lr=task.outer_lr)

    def step() -> Tensor:
        nonlocal params
        outer.zero_grad()
        params = advance(params, x)
        outer.step()
        return x.detach()

    return step


def hypertorch(task: Task, method: str) -> Begin:
    hypergrad = checkout("hypergrad", *HYPERTORCH)

    def advance(params: Tensor, x: Tensor) -> Tensor:
        params, lr = lbfgs(task, params, x), task.inner_lr(x)

        def descend(params: list[Tensor], hparams: list[Tensor]) -> list[Tensor]:
            loss = task.inner(params[0], hparams[0])
            return [params[0] - lr * torch.autograd.grad(loss, params[0], create_graph=True)[0]]

        def outer(params: list[Tensor], hparams: list[Tensor]) -> Tensor:
            return task.outer(params[0], hparams[0]) + 0 * hparams[0].sum()  # it wants a gradient towards both

        # Its tolerance is absolute: make it that of ours at the first outer gradient.
        getattr(hypergrad, method)([params], [x], CG_STEPS, descend, outer, tol=RTOL * scale)
        return params

    start, x = task.start()
    start.requires_grad_()
    (gradient,) = torch.autograd.grad(task.outer(start, x), start)
    scale = float(gradient.norm())
    return partial(outer_loop, task, advance)


def torchopt_root(task: Task) -> Begin:
    torchopt = needs("torchopt")

    def optimality(params: Tensor, x: Tensor) -> Tensor:
        found: Tensor = torch.func.grad(task.inner)(params, x)
        return found

    solve = torchopt.linear_solve.solve_cg(rtol=RTOL, maxiter=CG_STEPS)

    @torchopt.diff.implicit.custom_root(optimality, argnums=1, solve=solve)
    def solution(params: Tensor, x: Tensor) -> Tensor:
        return lbfgs(task, params, x)

    def advance(params: Tensor, x: Tensor) -> Tensor:
        params = solution(params, x)
        task.outer(params, x).backward()
        return params.detach()

    return partial(outer_loop, task, advance)


def torchopt_unrolled(task: Task, optimizer: str) -> Begin:
    torchopt = needs("torchopt")

    def advance(params: Tensor, x: Tensor) -> Tensor:
        model = Regression(params)
        lr = task.inner_lr(x) if optimizer == "MetaSGD" else 0.03
        inner = getattr(torchopt, optimizer)(model, lr=lr)
        for _ in range(DESCENT_STEPS):
            inner.step(task.inner(model.weights, x))
        task.outer(model.weights, x).backward(inputs=[x])
        return model.weights.detach()

    return partial(outer_loop, task, advance)


def higher_unrolled(task: Task) -> Begin:
    higher = needs("higher")

    def advance(params: Tensor, x: Tensor) -> Tensor:
        model = Regression(params)
        inner = torch.optim.SGD(model.parameters(), lr=task.inner_lr(x))
        with higher.innerloop_ctx(model, inner) as (functional, optimizer):
            for _ in range(DESCENT_STEPS):
                optimizer.step(task.inner(functional.weights, x))
            task.outer(functional.weights, x).backward(inputs=[x])
            return functional.weights.detach()

    return partial(outer_loop, task, advance)


def jaxopt_implicit(task: Task) -> Begin:
    """Compiled as a whole, all but Adam; compilation is not on the clock."""
    jaxopt, jax = needs("jaxopt"), needs("jax")

    numpy = jax.numpy
    train, val = ([numpy.asarray(tensor.numpy()) for tensor in data] for data in (task.train, task.val))

    def losses(weights: Any, data: list[Any]) -> Any:
        logs = jax.nn.log_softmax(data[0] @ weights)
        return -numpy.take_along_axis(logs, data[1][:, None], axis=1)[:, 0]

    def inner(weights: Any, x: Any) -> Any:
        if task.kind == "penalties":
            return losses(weights, train).mean() + (numpy.exp(x) * (weights**2).sum(1)).sum() / 2
        return (jax.nn.sigmoid(x) * losses(weights, train)).mean() + task.ridge / 2 * (weights**2).sum()

    linear = partial(jaxopt.linear_solve.solve_cg, tol=RTOL, maxiter=CG_STEPS)
    solver = jaxopt.LBFGS(inner, maxiter=500, tol=GTOL, implicit_diff_solve=linear)

    def outer(x: Any, weights: Any) -> Any:
        weights = solver.run(weights, x).params
        return losses(weights, val).mean(), weights

    hypergradient = jax.jit(jax.grad(outer, has_aux=True))

    def begin() -> Step:
        weights, x = (tensor.numpy().copy() for tensor in task.start())
        move = adam(x, task.outer_lr)

        def step() -> np.ndarray:
            nonlocal weights
            gradient, weights = hypergradient(x, weights)
            move(np.asarray(gradient))
            return x

        return step

    return begin
