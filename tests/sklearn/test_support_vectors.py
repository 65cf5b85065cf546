"""Which examples are support vectors: libsvm's float32 kernel and tolerance confuse some, the twin does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.svm import SVR

import bilevel as bl
from bilevel.sklearn import BilevelSearchCV
from bilevel.sklearn.support_vectors import Fold

C, EPSILON, GAMMA = 88.66302, 0.16853, 0.001  # a kernel of almost no curvature, and a bound that lets b be large


def regression(n=80, seed=0):
    rng = np.random.RandomState(seed)
    x = rng.randn(n, 6)
    return x, x @ np.array([1, -2, 0, 0, 0.5, 0]) + 0.5 * rng.randn(n)


def by_quadratic_program(x, y, C, epsilon, gamma):
    """b = positive part - negative part, by an interior point; and the intercept, the multiplier of sum b = 0."""
    n = len(y)
    kernel, targets = torch.from_numpy(rbf_kernel(x, gamma=gamma)), torch.from_numpy(y)
    Q = torch.cat([torch.cat([kernel, -kernel], 1), torch.cat([-kernel, kernel], 1)])
    c = torch.cat([epsilon - targets, epsilon + targets])
    sums = torch.cat([torch.ones(1, n), -torch.ones(1, n)], 1).double()
    box = torch.cat([torch.eye(2 * n), -torch.eye(2 * n)]).double()
    bounds = torch.cat([torch.full((2 * n,), C), torch.zeros(2 * n)]).double()
    found = bl.quadratic_program(Q, c, sums, torch.zeros(1).double(), box, bounds, tol=1e-12, throw="ignore").value
    return (found.primal[:n] - found.primal[n:]).numpy(), found.equality.item()


def test_the_loss_is_that_of_the_minimum_where_libsvm_confuses_the_sets():
    x, y = regression()
    train, held_out = np.arange(16, 80), np.arange(16)
    search = BilevelSearchCV(
        SVR(epsilon=EPSILON, gamma=GAMMA), {"C": (C * (1 - 1e-9), C * (1 + 1e-9))}, cv=[(train, held_out)], max_iter=1
    ).fit(x, y)
    b, intercept = by_quadratic_program(x[train], y[train], C, EPSILON, GAMMA)
    exact = np.mean((y[held_out] - rbf_kernel(x[held_out], x[train], GAMMA) @ b - intercept) ** 2)
    assert -search.best_score_ == pytest.approx(exact, rel=1e-8)
    fold = Fold(rbf_kernel(x[train], gamma=GAMMA), y[train], np.full(64, C), EPSILON)
    free = [(np.abs(b) > 0) & (np.abs(b) < C * (1 - 1e-9)) for b in (fold.by_libsvm(C, np.ones(64)), b_of(fold))]
    assert (free[0] != free[1]).any()  # without it this would test nothing


def b_of(fold):
    b, violation = fold.corrected(fold.by_libsvm(fold.bounds.max(), fold.bounds / fold.bounds.max()))
    assert violation < 1e-9
    return b


@pytest.mark.parametrize("doubled", [False, True], ids=["", "equal examples"])
@pytest.mark.parametrize("C", [1e-4, 0.1, 10.0, 1e3])
@pytest.mark.parametrize("gamma", [1e-5, 1e-3, 0.1, 10.0])
def test_the_conditions_of_optimality_hold(C, gamma, doubled):
    x, y = regression(50)
    if doubled:
        x, y = np.concatenate([x, x[:10]]), np.concatenate([y, y[:5], y[5:10] + 0.2])
    for epsilon, weights in ((1e-4, np.ones(len(y))), (0.1, np.linspace(0.2, 2, len(y)))):
        kernel = rbf_kernel(x, gamma=gamma)
        bounds = C * weights
        b = b_of(Fold(kernel, y, bounds, epsilon))
        assert abs(b.sum()) < 1e-9
        assert (np.abs(b) <= bounds * (1 + 1e-9)).all()
        error = y - kernel @ b
        # Each example allows an interval of intercepts: b = 0 within the tube, free on its edge, at its bound beyond.
        edge = error - epsilon * np.sign(b)
        lowest = np.where(b == 0, error - epsilon, np.where(b >= bounds * (1 - 1e-9), -np.inf, edge))
        highest = np.where(b == 0, error + epsilon, np.where(b <= -bounds * (1 - 1e-9), np.inf, edge))
        assert lowest.max() <= highest.min() + 1e-8


def test_an_inexact_fit_is_told(monkeypatch):
    monkeypatch.setattr(Fold, "by_libsvm", lambda fold, C, weights: np.zeros(len(fold.y)))  # too far from the minimum
    x, y = regression(400)
    with pytest.warns(ConvergenceWarning, match=r"off by more than 1e-6.*StandardScaler"):
        BilevelSearchCV(SVR(), {"C": (1.0, 2.0)}, cv=3, max_iter=1).fit(x, y)
