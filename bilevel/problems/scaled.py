"""Problems in other units and from starts far away, and some on which tolerances go wrong: for stopping rules."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from .base import BilevelTestProblem, NewtonProblem


class Known(NewtonProblem):
    """A smooth problem given by its functions; ``near`` is a start from which dense Newton finds the solution."""

    def __init__(
        self, kind: str, inner: Callable[..., Tensor], outer: Callable[..., Tensor], near: Tensor, hparams: Tensor
    ):
        self.kind = kind  # type: ignore[misc, assignment]
        self.functions = inner, outer
        self.init, self.hparams = near, hparams

    def inner(self, params: Tensor, hparams: Tensor) -> Tensor:
        return self.functions[0](params, hparams)

    def outer(self, params: Tensor, hparams: Tensor) -> Tensor:
        return self.functions[1](params, hparams)


def hard(dtype: torch.dtype) -> dict[str, BilevelTestProblem]:
    """Problems on which tolerances go wrong, by name: exponentials, other units, small targets, far starts."""
    generator = torch.Generator().manual_seed(0)

    def data(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    def number(value: float) -> Tensor:
        return torch.tensor([value], dtype=dtype, device="cpu")

    def square(y: Tensor, x: Tensor) -> Tensor:
        return y.square().sum()

    def regression(features: Tensor, targets: Tensor) -> Known:
        a, b = features.to(dtype), targets.to(dtype)

        def inner(y: Tensor, x: Tensor) -> Tensor:
            return (a.to(y.dtype) @ y - b.to(y.dtype)).square().mean() + (x * y.square()).sum()

        def outer(y: Tensor, x: Tensor) -> Tensor:
            return (a.to(y.dtype) @ y - 2 * b.to(y.dtype)).square().mean()

        return Known(
            "argmin", inner, outer, a.new_zeros(a.shape[1]), torch.full((a.shape[1],), 0.1, dtype=dtype, device="cpu")
        )

    units, small = data(100, 2) * torch.tensor([3000.0, 1.0], dtype=torch.float64, device="cpu"), data(30, 4)
    counts = torch.poisson(
        (data(60, 3) @ torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64, device="cpu")).exp(), generator
    )
    poisson = data(60, 3).to(dtype)
    return {
        "exponential": Known(
            "argmin", lambda y, x: (y.exp() - x * y + y.square() / 2).sum(), square, number(0.1), number(1.5)
        ),
        "units": regression(units, units @ torch.tensor([0.01, 1.0], dtype=torch.float64, device="cpu")),
        "small targets": regression(small, 1e-5 * small.sum(1)),
        "poisson": Known(
            "argmin",
            lambda w, x: (
                ((poisson.to(w.dtype) @ w).exp() - counts.to(w.dtype) * (poisson.to(w.dtype) @ w)).mean()
                + x * w.square().sum()
            ),
            square,
            torch.zeros(3, dtype=dtype, device="cpu"),
            torch.tensor(0.1, dtype=dtype, device="cpu"),
        ),
        "square root": Known("root", lambda y, x: y.square() - x, square, number(1.4), number(2.0)),
        "logarithm": Known("root", lambda y, x: y.exp() - x, square, number(0.7), number(2.0)),
        "Heron": Known("fixed_point", lambda y, x: 0.5 * (y + x / y), square, number(1.4), number(2.0)),
    }


class Scaled:
    """A problem in other units: ``loss`` times its inner function, ``params`` times its params, a start far away."""

    def __init__(self, problem: BilevelTestProblem, loss: float, params: float, away: float, seed: int):
        self.problem, self.kind, self.symmetric = problem, problem.kind, problem.symmetric
        self.loss, self.params, self.hparams = loss, params, problem.hparams
        generator = torch.Generator().manual_seed(seed)
        towards = torch.randn(problem.init.shape, generator=generator, dtype=torch.float64, device="cpu")
        towards = towards / towards.norm() * (1 + problem.init.double().norm())
        self.init = (params * (problem.init.double() + away * towards)).to(problem.init.dtype)
        if problem.kind in ("composite", "qp"):
            self.solve_inner, self.residual = problem.solve_inner, problem.residual  # type: ignore[attr-defined]

    def inner(self, params: Tensor, hparams: Tensor) -> Tensor:
        value = self.problem.inner(params / self.params, hparams)
        return (self.params if self.kind == "fixed_point" else self.loss) * value

    def outer(self, params: Tensor, hparams: Tensor) -> Tensor:
        return self.problem.outer(params / self.params, hparams)


def in_double(problem: BilevelTestProblem) -> BilevelTestProblem:
    """The same problem, its data as they are, in float64."""
    twin = copy.copy(problem)
    for name, value in vars(problem).items():
        if isinstance(value, Tensor) and value.is_floating_point():
            setattr(twin, name, value.double())
    return twin
