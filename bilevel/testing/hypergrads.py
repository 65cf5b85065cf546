"""The suite of hypergradient methods."""

from __future__ import annotations

import torch
from torch import Tensor

from ..argmin import argmin, root
from ..hypergrad.base import Hypergrad, PathMethod
from ..inner.gradient_descent import GradientDescent
from ..inner.minimize import InnerSolver
from ..inner.newton_cg import NewtonCG
from ..problems import BilevelTestProblem, Quadratics, Ridge, WeightedRidge
from ..solution import SolveError
from .data import nonsymmetric, randn, relative_error
from .suite import Suite


class HypergradTests(Suite[Hypergrad | PathMethod]):
    """Tests of a method on `argmin`, against closed forms; and on `root`, unless it refuses that.

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

    def test_several_hyperparameters(self) -> None:
        """Each its own gradient: the closed form of one ridge regression by penalty and targets."""
        x, b, weights = randn(8, 3), randn(8, seed=2), randn(3, seed=3)
        penalty, method = torch.tensor(0.7, dtype=torch.float64, requires_grad=True, device="cpu"), self.make()
        targets = b.clone().requires_grad_()

        def objective(w: Tensor, penalty: Tensor, targets: Tensor) -> Tensor:
            return (x @ w - targets).square().sum() / 2 + penalty * w.square().sum() / 2

        solver = self._solver(method, lr=0.03)
        fit = argmin(objective, 0 * weights, penalty, targets, solver=solver, hypergrad=method, throw="ignore")
        exact = torch.linalg.solve(x.mT @ x + penalty * torch.eye(3, dtype=torch.float64, device="cpu"), x.mT @ targets)
        grads, truth = (torch.autograd.grad(w @ weights, (penalty, targets)) for w in (fit.value, exact))
        assert relative_error(fit.value, exact) <= max(self.tolerance, 1e-5)
        for grad, want in zip(grads, truth, strict=True):
            assert relative_error(grad, want) <= self.tolerance

    def test_float32_stays_float32(self) -> None:
        problem = Ridge(per_feature=True, dtype=torch.float32)
        grad = self.gradient(problem)
        assert grad.dtype is torch.float32
        assert relative_error(grad, problem.hypergradient(problem.hparams)) <= max(self.tolerance, 1e-2)

    def test_equations_whose_jacobian_is_not_symmetric(self) -> None:
        """The adjoint is that of the transpose; a method that says it is not for these passes as well."""
        matrix, b = nonsymmetric(6), randn(6).requires_grad_()
        method, weights = self.make(), randn(6, seed=3)
        if isinstance(method, PathMethod):
            return
        try:
            fit = root(lambda y: matrix @ y + 0.1 * y**3 - b, torch.zeros_like(b), hypergrad=method, throw="raise")
            (grad,) = torch.autograd.grad(fit.value @ weights, b)
        except (TypeError, ValueError, SolveError):
            return
        jacobian = matrix + torch.diag(0.3 * fit.value.detach() ** 2)
        assert relative_error(grad, torch.linalg.solve(jacobian.mT, weights)) <= self.tolerance

    def gradient(self, problem: BilevelTestProblem) -> Tensor:
        """The hypergradient by this method."""
        method, x = self.make(), problem.hparams.clone().requires_grad_()
        solver = self._solver(method, lr=0.15)
        fit = argmin(problem.inner, problem.init, x, solver=solver, hypergrad=method, throw="ignore")
        (grad,) = torch.autograd.grad(problem.outer(fit.value, x), x)
        return grad

    def _solver(self, method: Hypergrad | PathMethod, lr: float) -> InnerSolver:
        """Steps for a path, and what goes to the minimum for others."""
        return self.solver or (GradientDescent(lr, max_steps=400) if isinstance(method, PathMethod) else NewtonCG())
