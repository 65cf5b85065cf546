"""Suites of the parts of solvers: step rules and proximal operators."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..inner.steps import Rule
from ..prox import Prox
from ..tree import on_host
from .data import randn
from .suite import Suite


def right_derivative(function: Callable[..., Tensor], *inputs: Tensor) -> bool:
    """Whether differences agree."""
    free = [part.detach().clone().requires_grad_() for part in inputs]
    return torch.autograd.gradcheck(function, free, raise_exception=False)


def check_settings(part: Any, apply: Callable[[Any], Tensor]) -> None:
    """Hold ``apply(part)`` to its derivative towards each setting of ``part`` that may be a tensor.

    Those are the fields of a dataclass whose annotation names `Tensor`, where they are a positive number, and not one
    that only rounding needs (an epsilon).
    """
    hints = typing.get_type_hints(type(part))
    for field in dataclasses.fields(part) if dataclasses.is_dataclass(part) else ():
        name, value = field.name, getattr(part, field.name)
        places = range(len(value)) if isinstance(value, tuple) else [None]  # of a pair, such as betas
        hint = typing.get_args(hints[name])
        hint = typing.get_args(hint[0]) if isinstance(value, tuple) and hint else hint
        for place in places:
            one = value if place is None else value[place]
            if Tensor not in hint or not float(on_host(one).min()) > 1e-6:
                continue

            def formula(setting: Tensor, name: str = name, value: Any = value, place: int | None = place) -> Tensor:
                new = setting if place is None else (*value[:place], setting, *value[place + 1 :])
                found: Tensor = apply(dataclasses.replace(part, **{name: new}))
                return found + 0 * setting.sum()

            setting = on_host(one).detach().double()
            assert right_derivative(formula, setting), f"the derivative towards {name} is not that of the formula"


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

    def test_each_problem_is_stepped_by_itself(self) -> None:
        rule, y = self.make(), randn(3, 4)
        together, _ = rule.step(y, y, rule.init(y), 0)
        alone = torch.cat([rule.step(row, row, rule.init(row), 0)[0] for row in y.split(1)])
        torch.testing.assert_close(together, alone)

    def test_float32_stays_float32(self) -> None:
        rule, y = self.make(), randn(3, 4).float()
        moved, state = rule.step(y, y, rule.init(y), 0)
        assert {moved.dtype, *(value.dtype for value in state.values())} == {torch.float32}

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

    def test_the_derivative_goes_through_the_state(self) -> None:
        """The point after three steps, by the gradients of each."""
        gradients = [randn(1, 3, seed=seed) for seed in (2, 3, 4)]
        assert right_derivative(lambda *g: self._steps(self.make(), g), *gradients), "is the state detached?"

    def test_the_derivative_reaches_the_settings(self) -> None:
        gradients = [randn(1, 3, seed=seed) for seed in (2, 3, 4)]
        check_settings(self.make(), lambda rule: self._steps(rule, gradients))

    @staticmethod
    def _steps(rule: Rule, gradients: Sequence[Tensor]) -> Tensor:
        y = randn(1, 3)
        state = rule.init(y)
        for index, g in enumerate(gradients):
            y, state = rule.step(y, g, state, index)
        return y

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
                move = length * randn(3, self.size, seed=seed)
                # Where the prox itself brings them, and where it does not: it may be the prox of another set.
                others = prox.prox(found + move, 1e-9), found + move, found + move - move.mean(-1, keepdim=True)
                for other in others:
                    loss = (other - y).square().sum(-1) / 2 + step * prox.value(other)
                    assert (loss >= least - self.tolerance * (1 + least.abs())).all()

    def test_it_does_not_expand(self) -> None:
        prox, a, b = self.make(), 2 * randn(3, self.size), 2 * randn(3, self.size, seed=2)
        apart = (prox.prox(a, 0.3) - prox.prox(b, 0.3)).norm(dim=-1)
        assert (apart <= (a - b).norm(dim=-1) * (1 + self.tolerance)).all()

    def test_a_step_for_each_problem(self) -> None:
        prox, y = self.make(), 2 * randn(3, self.size)
        steps = torch.tensor([0.1, 0.5, 1.0], dtype=y.dtype, device=y.device)
        each = torch.stack([prox.prox(y[t : t + 1], float(steps[t]))[0] for t in range(3)])
        torch.testing.assert_close(prox.prox(y, steps), each)

    def test_it_is_differentiable(self) -> None:
        prox, y = self.make(), (2 * randn(1, self.size)).requires_grad_()
        assert torch.autograd.gradcheck(lambda y: prox.prox(y, 0.3), (y,))

    def test_the_derivative_reaches_the_settings_and_the_step(self) -> None:
        y, step = 2 * randn(1, self.size), torch.tensor(0.3, dtype=torch.float64, device="cpu")
        check_settings(self.make(), lambda prox: prox.prox(y, 0.3))
        assert right_derivative(lambda step: self.make().prox(y, step) + 0 * step, step)

    def test_its_jacobian_is_that_of_a_convex_function(self) -> None:
        """Symmetric with eigenvalues in [0, 1], and diagonal where the prox says that it is separable."""
        prox, point = self.make(), 2 * randn(self.size)
        jacobian = torch.autograd.functional.jacobian(lambda y: prox.prox(y.unsqueeze(0), 0.3)[0], point)
        torch.testing.assert_close(jacobian, jacobian.mT)
        values = torch.linalg.eigvalsh(jacobian)
        assert float(values.min()) >= -1e-8
        assert float(values.max()) <= 1 + 1e-8
        if prox.separable:
            torch.testing.assert_close(jacobian, torch.diag(jacobian.diagonal()), msg="it is not separable")

    def test_equality_is_by_settings(self) -> None:
        assert self.make() == self.make() or self.make().tensors
        assert self.make().prox(randn(1, self.size), 0.3).dtype is torch.float64
