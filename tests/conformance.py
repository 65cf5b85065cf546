"""The suites of `bilevel.testing` as functions, for tests that are parametrized over solvers; what tests share."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import torch
from torch import Tensor

from bilevel import InnerSolver, LinearSolver, Operator, RootSolver
from bilevel.testing import (
    InnerSolverTests,
    LinearSolverTests,
    NonsymmetricSolverTests,
    OperatorTests,
    RootSolverTests,
    nonsymmetric,
    randn,
    relative_error,
    run,
    spd,
)

__all__ = ["nonsymmetric", "randn", "relative_error", "spd"]


def check_operator(operator: Operator, truth: Tensor, tolerance: float = 1e-12) -> None:
    """An operator against its dense float64 matrices."""
    _check(OperatorTests, (operator, truth), tolerance)


def check_linear_solver(solver: LinearSolver, tolerance: float = 1e-8) -> None:
    """A solver of symmetric positive definite systems."""
    _check(LinearSolverTests, solver, tolerance)


def check_nonsymmetric_solver(solver: LinearSolver, tolerance: float = 1e-8) -> None:
    """A solver of systems that are not symmetric."""
    _check(NonsymmetricSolverTests, solver, tolerance)


def check_inner_solver(solver: InnerSolver, tolerance: float = 1e-6) -> None:
    """A minimiser."""
    _check(InnerSolverTests, solver, tolerance)


def check_root_solver(solver: RootSolver, tolerance: float = 1e-7) -> None:
    """A solver of systems."""
    _check(RootSolverTests, solver, tolerance)


def _check(suite, made, tolerance):
    run(type("Suite", (suite,), {"make": lambda self: made, "tolerance": tolerance}))


def live_tensors() -> int:
    """How many tensors there are."""
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


@contextlib.contextmanager
def no_tensors_left(most: int = 0) -> Iterator[None]:
    """What runs inside leaves no more tensors than that, with the garbage collector off: no cycle through a graph."""
    gc.collect()
    gc.disable()
    try:
        before = live_tensors()
        yield
        assert live_tensors() <= before + most
    finally:
        gc.enable()


class Triple(torch.autograd.Function):
    """Three times its operand, which closure conversion cannot see."""

    @staticmethod
    def forward(ctx, x):
        return 3 * x

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad
