"""Suites of the parts of solvers: step rules and proximal operators."""

from __future__ import annotations

import torch

from ..inner.steps import Rule
from ..prox import Prox
from .data import randn
from .suite import Suite


class RuleTests(Suite[Rule]):
    """Tests of a step rule: a pure function whose derivative is that of its formula, and which descends.

    `make` returns it with a step size that lowers ``||y||^2 / 2`` from a random point within 200 steps.
    """

    def test_state_has_the_shape_of_the_params(self) -> None:
        rule, y = self.make(), randn(3, 4)
        moved, state = rule.step(y, y, rule.init(y), 0)
        assert moved.shape == y.shape
        assert set(state) == set(rule.init(y))
        assert all(value.shape == y.shape for value in state.values())

    def test_a_step_changes_nothing_in_place(self) -> None:
        rule, y, g = self.make(), randn(3, 4), randn(3, 4, seed=2)
        state = rule.init(y)
        kept = [y.clone(), g.clone(), *(value.clone() for value in state.values())]
        first, _ = rule.step(y, g, state, 0)
        assert all(torch.equal(a, b) for a, b in zip(kept, (y, g, *state.values()), strict=True))
        assert torch.equal(first, rule.step(y, g, state, 0)[0])

    def test_its_derivative_is_that_of_the_formula(self) -> None:
        rule, y, g = self.make(), randn(1, 3), randn(1, 3, seed=2)
        _, state = rule.step(y, g, rule.init(y), 0)
        free = [part.clone().requires_grad_() for part in (y, g)]
        assert torch.autograd.gradcheck(lambda y, g: rule.step(y, g, state, 1)[0], free)

    def test_it_descends(self) -> None:
        rule, y = self.make(), randn(3, 4)
        start, state = y.norm(), rule.init(y)
        for index in range(200):
            y, state = rule.step(y, y, state, index)
        assert float(y.norm()) < float(start)


class ProxTests(Suite[Prox]):
    """Tests of a prox on vectors of ``size`` coordinates."""

    tolerance = 1e-9
    size: int = 6

    def test_it_minimises(self) -> None:
        """``||z - y||^2 / 2 + step value(z)`` is no smaller anywhere near ``z = prox(y, step)``."""
        prox, y, step = self.make(), 2 * randn(3, self.size), 0.3
        found = prox.prox(y, step)
        least = (found - y).square().sum(-1) / 2 + step * prox.value(found)
        assert torch.isfinite(least).all()
        for seed in range(20):
            for length in (1e-1, 1e-3):
                other = prox.prox(found + length * randn(3, self.size, seed=seed), 1e-9)
                loss = (other - y).square().sum(-1) / 2 + step * prox.value(other)
                assert (loss >= least - self.tolerance * (1 + least.abs())).all()

    def test_it_does_not_expand(self) -> None:
        prox, a, b = self.make(), 2 * randn(3, self.size), 2 * randn(3, self.size, seed=2)
        apart = (prox.prox(a, 0.3) - prox.prox(b, 0.3)).norm(dim=-1)
        assert (apart <= (a - b).norm(dim=-1) * (1 + self.tolerance)).all()

    def test_a_step_for_each_problem(self) -> None:
        prox, y = self.make(), 2 * randn(3, self.size)
        steps = torch.tensor([0.1, 0.5, 1.0], dtype=y.dtype)
        each = torch.stack([prox.prox(y[t : t + 1], float(steps[t]))[0] for t in range(3)])
        torch.testing.assert_close(prox.prox(y, steps), each)

    def test_it_is_differentiable(self) -> None:
        prox, y = self.make(), (2 * randn(1, self.size)).requires_grad_()
        assert torch.autograd.gradcheck(lambda y: prox.prox(y, 0.3), (y,))

    def test_equality_is_by_settings(self) -> None:
        assert self.make() == self.make() or self.make().tensors
        assert self.make().prox(randn(1, self.size), 0.3).dtype is torch.float64
