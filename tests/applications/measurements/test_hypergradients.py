"""The comparison with JAXopt and optimistix: the problems are those that it says, and a missing peer is told."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest

from applications.frame.errors import UserError
from applications.measurements.hypergradients.__main__ import KINDS, Config, data, ours, run


@pytest.mark.parametrize("kind", KINDS)
def test_ours_by_its_closed_form(kind):
    """``-(d_x r)^T J^-T grad f`` in NumPy, at a solution of Newton's."""
    values = data(kind, 5, 3)
    A, b, C, d, x, y = (values[name] for name in ("A", "b", "C", "d", "x", "y"))

    def sigmoid(z):
        return 1 / (1 + np.exp(-z))

    for _ in range(50):
        if kind == "ridge":
            r, J = A.T @ (A @ y - b) / len(b) + np.exp(x) * y, A.T @ A / len(b) + np.diag(np.exp(x))
        elif kind == "logistic":
            s = sigmoid(-b * (A @ y))
            r = A.T @ (-b * s) / len(b) + np.exp(x) * y
            J = A.T @ ((s * (1 - s))[:, None] * A) / len(b) + np.diag(np.exp(x))
        else:
            t = np.tanh(A @ y + x)
            r, J = y - t, np.eye(5) - (1 - t**2)[:, None] * A
        y = y - np.linalg.solve(J, r)
    by_x = np.diag(np.exp(x) * y) if kind != "fixed-point" else np.diag(np.tanh(A @ y + x) ** 2 - 1)
    grad = C.T @ (-d * sigmoid(-d * (C @ y))) / len(d) if kind == "logistic" else C.T @ (C @ y - d) / len(d)
    np.testing.assert_allclose(ours(kind, values), -by_x.T @ np.linalg.solve(J.T, grad), rtol=1e-9)


@pytest.mark.skipif(importlib.util.find_spec("jaxopt") is not None, reason="the peers are here")
def test_where_there_are_no_peers_it_says_what_to_install():
    with pytest.raises(UserError, match="install jaxopt optimistix"):
        run(Config(sys.executable, problems=1, size=2))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("optimistix") is None, reason="needs the extra bench")
def test_all_within_the_tolerance(capsys):
    assert run(Config(problems=3)) == 0
    assert "All within 1e-08" in capsys.readouterr().out
