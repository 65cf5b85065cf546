"""The suite of hypergradient methods."""

from __future__ import annotations

import torch
from torch import Tensor

from ..argmin import argmin
from ..hypergrad.base import Hypergrad, PathMethod
from ..inner.gradient_descent import GradientDescent
from ..inner.minimize import InnerSolver
from ..inner.newton_cg import NewtonCG
from ..problems import BilevelTestProblem, Quadratics, Ridge, WeightedRidge
from .data import relative_error
from .suite import Suite


class HypergradTests(Suite[Hypergrad | PathMethod]):
    """Tests of a method on `argmin`, against closed forms.

    ``tolerance``: the relative error that it states, bias included.
    ``solver``: the inner solver; one that goes to the minimum, as fits the method, by default.
    """

    tolerance = 1e-6
    solver: InnerSolver | None = None

    def test_ridge(self) -> None:
        for problem in (Ridge(), Ridge(per_feature=True), WeightedRidge()):
            assert relative_error(self.gradient(problem), problem.hypergradient(problem.hparams)) <= self.tolerance

    def test_two_problems_at_once(self) -> None:
        problem = Quadratics(conditions=(2.0, 5.0), size=6)
        assert relative_error(self.gradient(problem), problem.hypergradient(problem.hparams)) <= self.tolerance

    def test_float32_stays_float32(self) -> None:
        problem = Ridge(per_feature=True, dtype=torch.float32)
        grad = self.gradient(problem)
        assert grad.dtype is torch.float32
        assert relative_error(grad, problem.hypergradient(problem.hparams)) <= max(self.tolerance, 1e-2)

    def gradient(self, problem: BilevelTestProblem) -> Tensor:
        """The hypergradient by this method."""
        method, x = self.make(), problem.hparams.clone().requires_grad_()
        descent = isinstance(method, PathMethod)
        solver = self.solver or (GradientDescent(lr=0.15, max_steps=400) if descent else NewtonCG())
        fit = argmin(problem.inner, problem.init, x, solver=solver, hypergrad=method, throw="ignore")
        (grad,) = torch.autograd.grad(problem.outer(fit.value, x), x)
        return grad
