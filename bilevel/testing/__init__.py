"""Tests that operators, solvers and methods inherit: write one factory, and pytest finds the rest.

    from bilevel.testing import LinearSolverTests

    class TestMySolver(LinearSolverTests):
        def make(self):
            return MySolver(rtol=1e-10)

Each suite holds its object to what the protocol says, and to float64 truth: problems with closed forms, dense linear
algebra. ``tolerance`` is the relative error that is right for it. `run` runs a suite without a test runner.
It is imported by its own name, since it needs pytest: ``import bilevel.testing``.
"""

from __future__ import annotations

from ..extras import require

require("pytest", "test")

import pytest  # noqa: E402

pytest.register_assert_rewrite(*(f"{__name__}.{part}" for part in ("hypergrads", "inner", "linear", "parts")))

from .data import nonsymmetric, randn, relative_error, spd  # noqa: E402
from .hypergrads import HypergradTests  # noqa: E402
from .inner import InnerSolverTests, RootSolverTests  # noqa: E402
from .linear import LinearSolverTests, NonsymmetricSolverTests, OperatorTests  # noqa: E402
from .parts import ProxTests, RuleTests  # noqa: E402
from .suite import Suite, run  # noqa: E402

__all__ = [
    "HypergradTests",
    "InnerSolverTests",
    "LinearSolverTests",
    "NonsymmetricSolverTests",
    "OperatorTests",
    "ProxTests",
    "RootSolverTests",
    "RuleTests",
    "Suite",
    "nonsymmetric",
    "randn",
    "relative_error",
    "run",
    "spd",
]
