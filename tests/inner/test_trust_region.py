"""The steps of a trust region against what defines them: minima of the quadratic within the region."""

from __future__ import annotations

import pytest
import torch

from bilevel.inner.trust_region import DenseModel, Loss, ProductModel, Terms, _to_border
from bilevel.problem import Problem
from tests.conformance import randn, relative_error

A, B, START = randn(7, 4, seed=1), randn(7, seed=2), randn(3, 4, seed=3)
RADII = torch.tensor([0.05, 0.5, 1e3], dtype=torch.float64)
LOSSES = {"squares": Loss(), "Cauchy": Loss(lambda z: (1 + z).log(), 30.0)}


def residuals(leaves, used=4):
    return (leaves[0] + leaves[0].sin())[..., :used] @ A[:, :used].mT - B


def quadratics(model, loss, used=4):
    """The gradients ``[3, 4]`` and matrices ``[3, 4, 4]`` at `START` by autograd: ``sum rho'' r'^2``."""
    jacobian = torch.stack([torch.func.jacrev(lambda y: residuals([y], used))(y) for y in START])
    r = residuals([START], used)
    slope = torch.func.grad(lambda r: loss.cost(r).sum())(r)
    curvature = torch.func.hessian(lambda r: loss.cost(r).sum())(r.flatten()).diagonal().reshape(r.shape)
    gradient = (jacobian.mT @ slope.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(model.at.g, gradient)
    torch.testing.assert_close(model.at.f, loss.cost(r))
    return gradient, jacobian.mT @ (curvature.unsqueeze(-1) * jacobian)


def problem_and_terms(loss, used=4):
    terms = Terms(lambda leaves: residuals(leaves, used), loss)
    return Problem(lambda y: loss.cost(residuals([y], used)), START, ()), terms


def times(matrix, p):
    return (matrix @ p.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("used", [4, 3], ids=["full rank", "an unused param"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_dense_step_minimises_the_quadratic_in_its_region(name, used):
    """``(H + lam D^2) p = -g`` with ``lam = 0`` inside, and ``lam > 0``, ``|D p| = radius`` on the border."""
    model = DenseModel(*problem_and_terms(LOSSES[name], used), START, None)
    g, hessian = quadratics(model, LOSSES[name], used)
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(model.size, torch.where(diagonal > 0, diagonal.sqrt(), 1.0))
    p, inside = model.step(RADII)
    assert inside.tolist() == [False, False, True]
    stretched = model.size.square() * p
    left = -g - times(hessian, p)
    lam = (left * stretched).sum(-1) / stretched.square().sum(-1)
    assert relative_error(left, lam.unsqueeze(-1) * stretched) <= 1e-8
    assert left[2].norm() <= 1e-10 * g[2].norm()
    assert bool((lam[:2] > 0).all())
    torch.testing.assert_close(model.length(p)[:2], RADII[:2], rtol=1e-8, atol=0.0)
    assert bool((p[:, used:] == 0).all())
    torch.testing.assert_close(
        torch.linalg.vector_norm(model.push(p), dim=-1).square(), (p * times(hessian, p)).sum(-1)
    )


def test_a_longer_column_is_remembered():
    first = DenseModel(*problem_and_terms(LOSSES["squares"]), START, None)
    first.size = first.size * torch.tensor([0.5, 2.0, 0.5, 2.0])
    second = DenseModel(*problem_and_terms(LOSSES["squares"]), START, first)
    torch.testing.assert_close(second.size, first.size * torch.tensor([2.0, 1.0, 2.0, 1.0]).double())


@pytest.mark.parametrize("name", LOSSES)
def test_conjugate_gradients_end_at_the_minimum_or_on_the_border(name):
    model = ProductModel(*problem_and_terms(LOSSES[name]), START, torch.full((3,), 1e-13).double(), max_steps=10)
    g, hessian = quadratics(model, LOSSES[name])
    p, inside = model.step(RADII)
    assert inside.tolist() == [False, False, True]
    torch.testing.assert_close(p.norm(dim=-1)[:2], RADII[:2])
    assert relative_error(p[2], -torch.linalg.solve(hessian[2], g[2])) <= 1e-10
    cauchy = -g * torch.minimum(RADII / g.norm(dim=-1), g.square().sum(-1) / (g * times(hessian, g)).sum(-1))[:, None]

    def value(p):
        return (g * p).sum(-1) + (p * times(hessian, p)).sum(-1) / 2

    assert bool((value(p) <= value(cauchy) * (1 - 1e-12)).all())
    model.max_steps = 1
    torch.testing.assert_close(model.step(RADII)[0], cauchy)


def test_conjugate_gradients_end_at_their_tolerance():
    model = ProductModel(*problem_and_terms(LOSSES["squares"]), START, torch.full((3,), 0.3).double(), max_steps=10)
    g, hessian = quadratics(model, LOSSES["squares"])
    p, inside = model.step(torch.full((3,), torch.inf, dtype=torch.float64))
    left = (times(hessian, p) + g).norm(dim=-1) / g.norm(dim=-1)
    assert bool(inside.all())
    assert bool((left <= 0.3).all())
    assert bool((left > 1e-6).any())


def test_the_border_is_met_from_wherever_a_step_begins():
    p, direction = randn(50, 4, seed=4), 3 * randn(50, 4, seed=5)
    radius = p.norm(dim=-1) * torch.linspace(1, 3, 50, dtype=torch.float64)
    reach = _to_border(p, direction, radius)
    assert bool((reach >= 0).all())
    torch.testing.assert_close((p + reach.unsqueeze(-1) * direction).norm(dim=-1), radius)
    assert _to_border(p, direction, torch.full_like(radius, torch.inf)).isinf().all()
