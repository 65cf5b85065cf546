"""Suites of inner solvers: minimisers, and solvers of systems."""

from __future__ import annotations

from abc import abstractmethod
from typing import TypeVar

import torch
from torch import Tensor

from ..argmin import argmin, root
from ..inner.minimize import InnerSolver
from ..inner.roots import RootSolver
from ..problem import Problem, RootProblem
from ..problems import Quadratics
from ..solution import Result, Solution
from .data import nonsymmetric, randn, relative_error
from .suite import Suite

S = TypeVar("S", InnerSolver, RootSolver)


class BatchTests(Suite[S]):
    """Tests of what both kinds make of a batch of three problems."""

    @property
    @abstractmethod
    def truth(self) -> Tensor:
        """The three solutions."""

    @abstractmethod
    def solve(self) -> Solution[Tensor]:
        """The answer of a new solver."""

    def test_each_problem_of_a_batch_is_solved(self) -> None:
        found = self.solve()
        assert found.result is Result.CONVERGED
        assert relative_error(found.value, self.truth) <= self.tolerance
        assert found.stats["num_steps"].shape == (3,)
        assert bool((found.stats["num_steps"] >= 0).all())

    def check_honest(self, found: Solution[Tensor], exact: Tensor) -> None:
        """The second of three problems has no solution: it is not called solved; what is, has been."""
        solved = found.stats["result"] == int(Result.CONVERGED)
        assert not solved[1], "a problem without a solution is not CONVERGED"
        assert not solved.any() or relative_error(found.value[solved], exact[solved]) <= self.tolerance

    def test_the_same_settings_give_the_same_answer(self) -> None:
        assert torch.equal(self.solve().value, self.solve().value)


class InnerSolverTests(BatchTests[InnerSolver]):
    """Tests of a minimiser: three quadratics of condition 1, 10 and 100 at once, each to its own tolerance."""

    tolerance = 1e-6
    quadratics = Quadratics(conditions=(1.0, 10.0, 100.0), size=6)

    @property
    def problem(self) -> Problem:
        return Problem(self.quadratics.inner, self.quadratics.init, (self.quadratics.hparams,))

    @property
    def truth(self) -> Tensor:
        return self.quadratics.solution(self.quadratics.hparams)

    def solve(self) -> Solution[Tensor]:
        return self.make().minimize(self.problem)

    def test_a_loss_without_a_minimum_is_not_converged(self) -> None:
        """``2 (y - 1)^2 / 2`` beside a loss that is linear."""
        bends, slope = (
            torch.tensor([2.0, 0.0, 2.0], device="cpu").double(),
            torch.tensor([2.0, 1.0, 2.0], device="cpu").double(),
        )
        start = torch.zeros(3, 4, dtype=torch.float64, device="cpu")
        problem = Problem(lambda y: (bends * y.square().sum(-1)) / 2 - slope * y.sum(-1), start)
        self.check_honest(self.make().minimize(problem), torch.ones_like(start))

    def test_argmin_takes_it(self) -> None:
        """The solve, its report and its hypergradient."""
        x = self.quadratics.hparams.clone().requires_grad_()
        fit = argmin(self.quadratics.inner, self.quadratics.init, x, solver=self.make(), throw="ignore")
        assert fit.result is Result.CONVERGED
        assert {"num_steps", "residual_norm", "result"} <= set(fit.stats)
        (grad,) = torch.autograd.grad(self.quadratics.outer(fit.value, x), x)
        assert relative_error(grad, self.quadratics.hypergradient(x)) <= 100 * self.tolerance


class RootSolverTests(BatchTests[RootSolver]):
    """Tests of a solver of systems: three contractions ``y = W y + b`` with ``||W|| = 1/2`` at once, not symmetric."""

    tolerance = 1e-7
    matrix, bias = nonsymmetric(6, batch=(3,)), randn(3, 6)

    @property
    def problem(self) -> RootProblem:
        return RootProblem(self._residual, torch.zeros_like(self.bias), batch_dims=1)

    @property
    def truth(self) -> Tensor:
        y: Tensor = torch.linalg.solve(self.matrix, self.bias)
        return y

    def solve(self) -> Solution[Tensor]:
        return self.make().find(self.problem)

    def test_a_system_without_a_solution_is_not_converged(self) -> None:
        """``(y - 1) / 2`` beside ``y^2 + 1``."""
        empty = torch.tensor([[False], [True], [False]], device="cpu")
        start = torch.full((3, 4), 0.3, dtype=torch.float64, device="cpu")
        problem = RootProblem(lambda y: torch.where(empty, y.square() + 1, (y - 1) / 2), start, batch_dims=1)
        self.check_honest(self.make().find(problem), torch.ones_like(start))

    def test_root_takes_it(self) -> None:
        bias = self.bias[0].clone().requires_grad_()
        fit = root(lambda y: self.matrix[0] @ y - bias, torch.zeros_like(bias), solver=self.make(), throw="ignore")
        assert fit.result is Result.CONVERGED
        (grad,) = torch.autograd.grad(fit.value.sum(), bias)
        assert relative_error(grad, torch.linalg.solve(self.matrix[0].mT, torch.ones_like(grad))) <= 1e-4

    def _residual(self, y: Tensor) -> Tensor:
        return (self.matrix @ y.unsqueeze(-1)).squeeze(-1) - self.bias
