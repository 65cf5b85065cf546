"""The suites that ship: the library's own parts pass them, wrong ones do not, and a user's file works as written."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import bilevel as bl
from bilevel import testing
from bilevel.extending import Pulled
from bilevel.linalg.operator import Dense
from tests.test_docs import blocks

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


class TestNewton(testing.RootSolverTests):
    def make(self):
        return bl.Newton()


class TestAdam(testing.RuleTests):
    def make(self):
        return bl.Adam(lr=0.01)


class TestRMSprop(testing.RuleTests):
    def make(self):
        return bl.RMSprop(lr=0.01, momentum=0.5, centered=True)


class TestMomentum(testing.RuleTests):
    def make(self):
        return bl.SGD(lr=torch.tensor(0.01, dtype=torch.float64), momentum=0.9, nesterov=True)


@pytest.mark.parametrize(
    "prox",
    [
        bl.prox.L1(0.5),
        bl.prox.ElasticNet(0.5, 0.2),
        bl.prox.GroupLasso(torch.tensor([0, 0, 1, 1, 2, 2]), 0.5),
        bl.prox.Box(-0.5, 1.5),
        bl.prox.NonNegative(),
        bl.prox.Simplex(2.0),
        bl.prox.L2Ball(1.5),
        bl.prox.L1Ball(1.5),
    ],
    ids=lambda prox: type(prox).__name__,
)
def test_the_penalties_conform(prox):
    testing.run(type("Suite", (testing.ProxTests,), {"make": lambda self: prox}))


@pytest.mark.parametrize(
    ("method", "tolerance"),
    [(bl.Implicit(bl.LU()), 1e-8), (bl.Unroll(), 1e-6), (bl.ForwardMode(), 1e-6), (bl.Penalty(1e3), 1e-3)],
    ids=lambda value: type(value).__name__,
)
def test_the_methods_conform(method, tolerance):
    testing.run(type("Suite", (testing.HypergradTests,), {"make": lambda self: method, "tolerance": tolerance}))


class Half(Dense):
    """Wrong: the transposed product is of another matrix."""

    def rmatvec(self, v):
        return super().rmatvec(v) / 2


@dataclass(frozen=True)
class Forgetful(bl.SGD):
    """Wrong: the state of the step before is a constant."""

    def step(self, y, g, state, index):
        return super().step(y, g, {name: value.detach() for name, value in state.items()}, index)


@dataclass(frozen=True)
class Deaf(bl.SGD):
    """Wrong: the step size is taken as a number."""

    def step(self, y, g, state, index):
        return y - float(self.lr) * g, state


@dataclass(frozen=True, eq=False)
class Mixed(bl.prox.GroupLasso):
    """Wrong: groups act on several coordinates."""

    separable: ClassVar[bool] = True


@dataclass(frozen=True, eq=False)
class Numb(bl.prox.L1):
    """Wrong: the strength is taken as a number."""

    def prox(self, y, step):
        return bl.prox.L1(float(self.strength)).prox(y, step)


@dataclass(frozen=True, eq=False)
class HalfBall(bl.prox.L2Ball):
    """Wrong: it projects on a smaller ball."""

    def prox(self, y, step):
        return bl.prox.L2Ball(self.radius / 2).prox(y, step)


@dataclass(frozen=True, eq=False)
class Softmax(bl.prox.Simplex):
    """Wrong: on the simplex, and not the nearest point."""

    def prox(self, y, step):
        return self.total * y.softmax(-1)


@dataclass(frozen=True)
class Joint(bl.SGD):
    """Wrong: one norm for all problems of a batch."""

    def step(self, y, g, state, index):
        return y - self.lr * g / g.norm(), state


@dataclass(frozen=True)
class FixedBetas(bl.Adam):
    """Wrong: the betas are taken as numbers."""

    def step(self, y, g, state, index):
        return bl.Adam(self.lr, tuple(float(beta) for beta in self.betas)).step(y, g, state, index)


@dataclass(frozen=True)
class FirstOnly:
    """Wrong: the gradient of the first tensor alone."""

    reaches_init: ClassVar[bool] = False

    def pull(self, point, cotangent):
        first, *others = bl.Implicit(bl.LU()).pull(point, cotangent).hparams
        return Pulled([first, *(None if grad is None else 0 * grad for grad in others)])


@dataclass(frozen=True)
class Untransposed:
    """Wrong: the adjoint is that of J, not of its transpose."""

    reaches_init: ClassVar[bool] = False

    def pull(self, point, cotangent):
        u = bl.LU().solve(bl.Implicit().operator_at(point), cotangent).value
        return Pulled(point.linearization().pull(point.raveler.unravel(u)))


class Sure:
    """Wrong: whatever comes of it is converged."""

    def __init__(self, solver):
        self.solver = solver

    def minimize(self, problem):
        return self._sure(self.solver.minimize(problem))

    def find(self, problem):
        return self._sure(self.solver.find(problem))

    def _sure(self, found):
        return found.with_stats(result=torch.zeros_like(found.stats["result"]))


class Backwards(Sure):
    """Wrong: its steps count down."""

    def _sure(self, found):
        return found.with_stats(num_steps=-1 - found.stats["num_steps"])


def wrong(suite, made):
    return type("Suite", (suite,), {"make": lambda self: made})


@pytest.mark.parametrize(
    "suite",
    [
        wrong(testing.OperatorTests, (Half(testing.nonsymmetric(4), symmetric=False), testing.nonsymmetric(4))),
        wrong(testing.LinearSolverTests, bl.CG(max_steps=3)),
        wrong(testing.NonsymmetricSolverTests, bl.Neumann(max_steps=2)),
        wrong(testing.InnerSolverTests, bl.LBFGS(max_steps=2)),
        wrong(testing.RootSolverTests, bl.Picard(max_steps=2)),
        wrong(testing.InnerSolverTests, Sure(bl.LBFGS())),
        wrong(testing.InnerSolverTests, Backwards(bl.LBFGS())),
        wrong(testing.RootSolverTests, Sure(bl.Newton())),
        wrong(testing.HypergradTests, bl.Implicit(bl.Identity())),
        wrong(testing.HypergradTests, Untransposed()),
        wrong(testing.RuleTests, bl.SGD(lr=3.0)),
        wrong(testing.RuleTests, Forgetful(lr=0.01, momentum=0.5)),
        wrong(testing.RuleTests, Deaf(lr=0.01)),
        wrong(testing.ProxTests, Mixed(torch.tensor([0, 0, 1, 1, 2, 2]), 0.5)),
        wrong(testing.ProxTests, Numb(0.5)),
        wrong(testing.ProxTests, HalfBall(1.0)),
        wrong(testing.ProxTests, Softmax(1.0)),
        wrong(testing.RuleTests, Joint(lr=0.01)),
        wrong(testing.RuleTests, FixedBetas(lr=0.01)),
        wrong(testing.HypergradTests, FirstOnly()),
    ],
    ids=lambda suite: f"{suite.__base__.__name__} {type(suite.make(None)).__name__}",
)
@pytest.mark.filterwarnings("ignore::bilevel.SolveWarning")
def test_what_is_wrong_does_not_pass(suite):
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        testing.run(suite)


def test_a_users_file_passes_and_is_typed(tmp_path):
    """The solver of the page in a file of its own, its tests in another, as a user would write them."""
    solver, tests, *_ = blocks(PAGE, "python")
    (tmp_path / "conjugate_residuals.py").write_text(solver)
    imports = "import bilevel as bl\nfrom conjugate_residuals import ConjugateResiduals\n"
    (tmp_path / "test_mine.py").write_text(imports + tests)
    root = str(PAGE.parents[1])
    environment = {"PYTHONPATH": root, "MYPYPATH": root, "PATH": "", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py"]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
    assert "8 passed" in ran.stdout
    typed = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "conjugate_residuals.py"]
    checked = subprocess.run(typed, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_without_pytest_a_sentence_says_what_to_install():
    program = "import sys; sys.modules['pytest'] = None; import bilevel; import bilevel.testing"
    ran = subprocess.run([sys.executable, "-c", program], cwd=PAGE.parents[1], capture_output=True, text=True)
    assert 'pytest is not installed: this part of bilevel needs it. Run: pip install "bilevel[test]"' in ran.stderr
