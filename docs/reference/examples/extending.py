import torch

import bilevel as bl

# %% extending extending.norm extending.dot extending.axpy extending.scale extending.normalise extending.leaves:
from bilevel.extending import axpy, dot, leaves, norm, normalise, scale

a, b = torch.ones(2, 3, dtype=torch.float64), torch.full((2, 3), 2.0, dtype=torch.float64)  # two problems
torch.testing.assert_close(dot(a, b), torch.full((2,), 6.0, dtype=torch.float64))
factors = torch.tensor([1.0, -1.0], dtype=torch.float64)  # one for each problem
torch.testing.assert_close(axpy(factors, a, b)[1], torch.ones(3, dtype=torch.float64))
torch.testing.assert_close(scale(factors, a)[1], -torch.ones(3, dtype=torch.float64))
unit, length = normalise(b)
torch.testing.assert_close(norm(unit), torch.ones(2, dtype=torch.float64))
torch.testing.assert_close(scale(length, unit), b)
assert len(leaves({"weight": a, "bias": b})) == 2

# %% extending.Damped extending.Transposed:
matrix = torch.tensor([[1.0, 2.0], [0.0, 1.0]], dtype=torch.float64)
operator = bl.extending.Dense(matrix, symmetric=False)
v = torch.ones(2, dtype=torch.float64)
torch.testing.assert_close(bl.extending.Damped(operator, 0.5).matvec(v), matrix @ v + 0.5 * v)
torch.testing.assert_close(bl.extending.Transposed(operator).matvec(v), matrix.T @ v)


# %% extending.IterativeSolver extending.Outcome extending.Stopping extending.LinearState extending.Precondition:
# %% extending.Preconditioner extending.report:
from dataclasses import dataclass

from bilevel.extending import IterativeSolver, Outcome, axpy, norm


@dataclass(frozen=True)
class Richardson(IterativeSolver):  # x <- x + (b - A x), for matrices near the identity
    def iterate(self, operator, unit, length, stopping, precondition):
        x, steps = torch.zeros_like(unit), torch.zeros_like(length, dtype=torch.int64)
        for _ in range(stopping.max_steps):
            active = norm(unit - operator.matvec(x)) > stopping.target
            if not bool(active.any()):
                break
            x, steps = axpy(active.to(x.dtype), unit - operator.matvec(x), x), steps + active
        relative = norm(unit - operator.matvec(x))
        codes = torch.where(relative <= stopping.target, int(bl.Result.CONVERGED), stopping.initial_codes())
        return Outcome(x, codes.to(torch.int8), steps, relative)


matrix = torch.tensor([[1.0, 0.2], [0.2, 1.0]], dtype=torch.float64)
solved = Richardson(rtol=1e-8).solve(bl.extending.Dense(matrix), torch.ones(2, dtype=torch.float64))
torch.testing.assert_close(solved.value, torch.linalg.solve(matrix, torch.ones(2, dtype=torch.float64)))


# %% extending.Problem extending.Evaluation extending.Progress extending.choose extending.descend:
# %% extending.LineSearch extending.Raveler:
from dataclasses import dataclass

from bilevel.extending import Problem, Progress, axpy


@dataclass(frozen=True)
class Descent:  # an inner solver of your own: gradient descent with one step size
    lr: float
    gtol: float = 1e-6

    def minimize(self, problem: Problem) -> bl.Solution:
        at = problem.start
        progress = Progress.begin(at, self.gtol)
        for index in range(1000):
            if progress.done(index):
                break
            at = problem.evaluate(axpy(-self.lr * progress.active.to(at.y.dtype), at.g, at.y))
            progress.count()
            progress.look(at)
        return progress.solution(at.y)


x = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
fit = bl.argmin(lambda y: (y - x).square().sum(), torch.zeros(2, dtype=torch.float64), solver=Descent(0.2))
torch.testing.assert_close(fit.value, x.expand(2), rtol=1e-5, atol=1e-5)


# %% extending.GraphJacobian extending.RootProblem extending.RootProgress:
from dataclasses import dataclass

from bilevel.extending import GraphJacobian, RootProblem, RootProgress, norm


@dataclass(frozen=True)
class PlainNewton:  # a solver of systems of your own: whole steps with the dense Jacobian
    tol: float = 1e-10

    def find(self, problem: RootProblem) -> bl.Solution:
        y, r = problem.y, problem.r
        progress = RootProgress.begin(r, self.tol)
        for index in range(50):
            if progress.done(index):
                break
            jacobian = GraphJacobian(problem.raveler, problem.linearize(y)).to_dense()
            y = y - torch.linalg.solve(jacobian, r.unsqueeze(-1)).squeeze(-1)
            r = problem.evaluate(y)
            progress.count()
            progress.look(norm(r))
        return progress.solution(y)


fit = bl.root(lambda y: y**2 - 2, torch.ones(2, dtype=torch.float64), solver=PlainNewton())
torch.testing.assert_close(fit.value, torch.full((2,), 2.0, dtype=torch.float64).sqrt())


# %% extending.Point extending.Pulled extending.Linearization:
from dataclasses import dataclass
from typing import ClassVar

from bilevel.extending import Point, Pulled


@dataclass(frozen=True)
class Unit:  # a method of your own: the identity in place of the inverse Hessian
    reaches_init: ClassVar[bool] = False

    def pull(self, point: Point, cotangent: torch.Tensor) -> Pulled:
        return Pulled(point.linearization().pull(point.raveler.unravel(cotangent)))


x = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
fit = bl.argmin(lambda y: (y - x).square().sum() / 2, torch.zeros(2, dtype=torch.float64), hypergrad=Unit())
fit.value.sum().backward()
torch.testing.assert_close(x.grad, torch.tensor(2.0, dtype=torch.float64))  # the Hessian is the identity here


# %% extending.Objective extending.Throw extending.Tree:
from dataclasses import dataclass

from bilevel.extending import Objective, Throw, Tree


@dataclass(frozen=True)
class LastSteps:  # a method of the path of your own, made of one that is there
    last: int = 50

    def run(
        self, objective: Objective, init: Tree, args: tuple[Tree, ...], solver: bl.InnerSolver, throw: Throw
    ) -> bl.Solution:
        return bl.Truncated(self.last).run(objective, init, args, solver, throw)


x = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
steps = bl.GradientDescent(lr=0.3, max_steps=100)
fit = bl.argmin(
    lambda y: (y - x).square().sum(), torch.zeros(2, dtype=torch.float64), solver=steps, hypergrad=LastSteps()
)
(grad,) = torch.autograd.grad(fit.value.sum(), x)
torch.testing.assert_close(grad, torch.tensor(2.0, dtype=torch.float64))
