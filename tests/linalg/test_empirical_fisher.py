"""Empirical Fisher products against the gradients of single examples."""

from __future__ import annotations

import pytest
import torch

from bilevel.linalg.empirical_fisher import EmpiricalFisher
from bilevel.problem import Problem
from tests.conformance import check_operator, randn

TASKS, EXAMPLES, SIZE = 3, 7, 4
X, Y = randn(TASKS, EXAMPLES, SIZE), randn(TASKS, EXAMPLES, seed=2)


def losses(params, x, y):
    return (torch.tanh(x @ params) - y).square()


def penalty(params, x, y):
    return 0.1 * params.square().sum() + 0.01 * (params**4).sum()


def objective(params, x, y):
    return losses(params, x, y).mean() + penalty(params, x, y)


def dense_truth(params, x, y, with_rest=True):
    gradients = torch.func.jacrev(losses)(params, x, y)
    product = gradients.mT @ gradients / EXAMPLES
    return product + torch.func.hessian(penalty)(params, x, y) if with_rest else product


@pytest.mark.parametrize("with_rest", [True, False])
def test_one_problem_conforms_to_the_dense_matrix(with_rest):
    params, args = randn(SIZE, seed=3), (X[0], Y[0])
    problem = Problem(objective, params, args)
    operator = EmpiricalFisher(losses, penalty if with_rest else None)(problem, problem.linearize(problem.start.y))
    check_operator(operator, dense_truth(params, *args, with_rest))


def test_many_problems_conform_to_their_own_dense_matrices():
    params = randn(TASKS, SIZE, seed=3)
    problem = Problem(torch.vmap(objective), params, (X, Y))
    operator = EmpiricalFisher(torch.vmap(losses), torch.vmap(penalty))(problem, problem.linearize(problem.start.y))
    check_operator(operator, torch.stack([dense_truth(*task) for task in zip(params, X, Y, strict=True)]))


def test_it_is_the_fisher_matrix_of_a_well_specified_gaussian():
    """With y ~ N(x w, 1) and loss (x w - y)^2 / 2 its mean is x^T x / n: within five standard errors."""
    x, noise, w = randn(20_000, 2, seed=5), randn(20_000, seed=6), randn(2)

    def half_squares(params):
        return (x @ params - (x @ w + noise)).square() / 2

    problem = Problem(lambda p: half_squares(p).mean(), w)
    found = EmpiricalFisher(half_squares)(problem, problem.linearize(problem.start.y)).to_dense()
    # The variance of an entry x_i x_j noise^2 is at most E[x^4] E[noise^4] = 9.
    assert (found - x.mT @ x / len(x)).abs().max() <= 5 * 3 / len(x) ** 0.5


def test_reduced_losses_are_refused():
    problem = Problem(objective, randn(SIZE), (X[0], Y[0]))
    with pytest.raises(ValueError, match=r"one loss for each example .* reduction='none'"):
        EmpiricalFisher(lambda p, x, y: losses(p, x, y).mean())(problem, problem.linearize(problem.start.y))
