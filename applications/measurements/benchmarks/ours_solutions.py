"""Ours on workload D: what is advised, every method that suits, and the stochastic ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from applications.frame.mini_batches import BATCHES, STOCHASTIC, Batches
from applications.measurements.benchmarks.solutions_task import DESCENT_STEPS, GTOL, RTOL, Begin, Step, Task


def ours(task: Task) -> dict[str, Callable[[], Begin]]:
    """What `advise` recommends, `Adaptive`, every method that suits, and the stochastic ones."""
    task = replace(task, multiply=bl.nn.matmul)
    problem = task.bilevel()
    builders: dict[str, Callable[[], Begin]] = {
        "bilevel: advised": lambda: partial(advised, task, bl.diagnostics.advise(problem, accuracy=RTOL)),
        "bilevel: adaptive": lambda: partial(adaptive, task),
    }
    for method in bl.diagnostics.all_methods(rtol=RTOL):
        if method.suits(problem) and fits(method, problem):
            builders[f"bilevel: {method.name}"] = partial(partial, two_loops, task, method)
    for name in STOCHASTIC:
        builders[f"bilevel: stochastic, {name}"] = partial(partial, stochastic, task, name)
    return builders


def fits(method: bl.diagnostics.Method, problem: bl.diagnostics.BilevelProblem) -> bool:
    """Dense factors and forward mode are for small problems only."""
    if isinstance(method.hypergrad, bl.ForwardMode):
        return bool(problem.hparams.numel() <= method.hypergrad.max_hparams)
    dense = isinstance(method.hypergrad, bl.Implicit) and isinstance(
        method.hypergrad.linear_solver, bl.Cholesky | bl.LU
    )
    return not dense or problem.init.numel() <= 2500


def outer_loop(
    task: Task, settings: Callable[[Tensor], dict[str, Any]], seen: Callable[[Tensor], None] | None = None
) -> Step:
    """Adam on the hyperparameters; params and adjoint start from the last ones."""
    params, x = task.start()
    x.requires_grad_()
    outer, fit = torch.optim.Adam([x], lr=task.outer_lr), None

    def step() -> Tensor:
        nonlocal params, fit
        fit = bl.argmin(task.inner, params, x, **settings(x), throw="ignore", warm_start=fit)
        loss = task.outer(fit.value, x)
        outer.zero_grad()
        loss.backward()
        outer.step()
        params = fit.value.detach()
        if seen:
            seen(loss)
        return x.detach()

    return step


def two_loops(task: Task, method: bl.diagnostics.Method) -> Step:
    """L-BFGS, or as many steps of gradient descent as are unrolled; step sizes 1/L."""
    hypergrad, solver = method.hypergrad, bl.LBFGS(gtol=GTOL)

    def settings(x: Tensor) -> dict[str, Any]:
        lr = task.inner_lr(x)
        if isinstance(hypergrad, bl.OneStep):
            return {"solver": solver, "hypergrad": bl.OneStep(lr)}
        if isinstance(hypergrad, bl.FiniteDifference):
            return {"solver": solver, "hypergrad": bl.FiniteDifference(lr)}
        if isinstance(hypergrad, bl.SAMA):
            return {"solver": bl.Steps(bl.SGD(lr), max_steps=DESCENT_STEPS), "hypergrad": bl.SAMA()}
        if method.solver is None:
            return {"solver": solver, "hypergrad": hypergrad}
        short = bl.Truncated(DESCENT_STEPS // 2) if isinstance(hypergrad, bl.Truncated) else hypergrad
        return {"solver": bl.GradientDescent(lr, max_steps=DESCENT_STEPS), "hypergrad": short}

    return outer_loop(task, settings)


def advised(task: Task, advice: bl.diagnostics.Advice) -> Step:
    """What `advise` names at the start, followed as it says."""
    if advice.tolerance is not None:
        return adaptive(task, advice.tolerance)
    return outer_loop(task, lambda x: {"solver": advice.solver, "hypergrad": advice.hypergrad})


def adaptive(task: Task, tolerance: bl.Adaptive = bl.Adaptive()) -> Step:  # noqa: B008 (frozen)

    def seen(loss: Tensor) -> None:
        nonlocal tolerance
        tolerance = tolerance.after(loss)

    return outer_loop(task, lambda x: tolerance.settings(), seen)


def stochastic(task: Task, name: str) -> Step:
    """Gradient steps on mini-batches, both levels side by side; BOME has one step size for the two."""
    kind, multiple, settings = STOCHASTIC[name]
    params, x = (tensor.requires_grad_() for tensor in task.start())
    lr = task.inner_lr(x)
    sizes = {"inner_lr": lr, "outer_lr": multiple * task.sgd_lr or lr}
    method = kind(params, x, task.inner, task.outer, **sizes, **settings)
    batches = Batches(len(task.train[0]), BATCHES)

    def step() -> Tensor:
        batches.step(method)
        return x.detach()

    return step
