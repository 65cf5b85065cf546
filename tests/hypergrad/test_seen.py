"""Objectives that are another function when they are evaluated again, and hypergradients that are not finite."""

import pytest
import torch

import bilevel as bl

GENERATOR = torch.Generator().manual_seed(0)
A = torch.randn(6, 3, dtype=torch.float64, generator=GENERATOR)
METHODS = {
    "func": (bl.Implicit(operator="func"), None),
    "finite difference": (bl.FiniteDifference(0.05), None),
    "checkpointed": (bl.Unroll(checkpoint=True), bl.GradientDescent(0.05, 300)),
    "penalty": (bl.Penalty(), None),
    "evolution": (bl.EvolutionStrategies(4), None),
}


def gradient(value, x, **settings):
    return torch.autograd.grad(value, x, **settings)[0]


class TestAnotherObjective:
    def solves(self, x, **settings):
        """Three solves in a loop; the objective reads the loop's variable when it is called."""
        found = []
        for k in range(3):
            b = torch.full((6,), k + 1.0, dtype=torch.float64)

            def inner(p):
                return (A @ p - b).square().mean() + x * p.square().sum()  # noqa: B023

            found.append(bl.argmin(inner, torch.zeros(3, dtype=torch.float64), **settings).value.sum())
        return sum(found)

    @pytest.mark.parametrize("name", [name for name in METHODS if name != "func"])  # whose products do not depend on b
    def test_a_loop_variable_that_moved_on(self, name):
        method, solver = METHODS[name]
        x = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        total = self.solves(x, hypergrad=method, **({"solver": solver} if solver else {}))
        with pytest.raises(bl.ObjectiveChangedError, match=r"loop.*in place.*random"):
            gradient(total, x)

    def test_a_second_backward_pass(self):
        x = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        total = self.solves(x)
        gradient(total, x, retain_graph=True)
        with pytest.raises(bl.ObjectiveChangedError):
            gradient(total, x)

    def test_a_second_derivative(self):
        x = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        with pytest.raises(bl.ObjectiveChangedError):
            gradient(self.solves(x), x, create_graph=True)

    def test_a_map(self):
        x, found = torch.tensor(0.3, dtype=torch.float64, requires_grad=True), []
        for k in range(3):
            u = torch.full((4,), k + 1.0, dtype=torch.float64)
            found.append(bl.fixed_point(lambda q: torch.tanh(0.3 * q.flip(0) * x + u), torch.zeros(4).double()).value)  # noqa: B023
        total = sum(value.sum() for value in found)
        gradient(total, x, retain_graph=True)
        with pytest.raises(bl.ObjectiveChangedError, match="system"):
            gradient(total, x)

    def test_data_that_were_changed_in_place(self):
        a = A.clone()
        x = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        fit = bl.argmin(lambda p: (a @ p - 1).square().mean() + x * p.square().sum(), torch.zeros(3).double())
        gradient(fit.value.sum(), x, retain_graph=True)
        a.mul_(3)
        with pytest.raises(bl.ObjectiveChangedError, match="in place"):
            gradient(fit.value.sum(), x)

    def test_a_random_objective(self):
        x = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

        def inner(p):
            return (A @ p - torch.rand(6, dtype=torch.float64)).square().mean() + x * p.square().sum()

        for method in (bl.Implicit(operator="func"), bl.Penalty(), bl.FiniteDifference()):
            fit = bl.argmin(inner, torch.ones(3).double(), solver=bl.GradientDescent(0.1, 5), hypergrad=method)
            with pytest.raises(bl.ObjectiveChangedError, match="random"):
                gradient(fit.value.sum(), x)

    @pytest.mark.parametrize("name", METHODS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_the_same_objective_passes_twice(self, name, dtype):
        method, solver = METHODS[name]
        x = torch.tensor(0.3, dtype=dtype, requires_grad=True)
        a = A.to(dtype)
        fit = bl.argmin(
            lambda p: (a @ p - 1).square().mean() + x * p.square().sum(),
            torch.full((3,), 100.0, dtype=dtype),
            hypergrad=method,
            **({"solver": solver} if solver else {}),
            throw="raise" if name != "evolution" else "warn",
        )
        first = gradient(fit.value.sum(), x, retain_graph=True)
        assert torch.equal(first, gradient(fit.value.sum(), x)) or name in ("func", "penalty", "finite difference")


DIFFERENTIATED = [bl.Implicit(), bl.OneStep(0.5), bl.FiniteDifference(), bl.Unroll(), bl.Unroll(checkpoint=True)]


class TestNotFinite:
    @pytest.mark.parametrize("method", DIFFERENTIATED, ids=repr)
    @pytest.mark.parametrize("throw", ["raise", "warn"])
    def test_an_infinite_slope_by_a_hyperparameter(self, method, throw):
        x = torch.zeros(2, dtype=torch.float64, requires_grad=True)

        def inner(y):
            return 0.5 * (y - 1).square().sum() + (torch.where(x > 0, x.sqrt(), 0 * x) * y).sum()

        solver = bl.GradientDescent(0.5, 30) if isinstance(method, bl.Unroll) else None
        fit = bl.argmin(inner, torch.zeros(2).double(), hypergrad=method, solver=solver, throw=throw)
        with pytest.raises(bl.SolveError, match="NaN or"):
            gradient(fit.value.square().sum(), x)

    @pytest.mark.parametrize("method", DIFFERENTIATED, ids=repr)
    def test_is_left_to_those_who_ignore(self, method):
        x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        fit = bl.argmin(
            lambda y: 0.5 * (y - 1).square().sum() + (torch.where(x > 0, x.sqrt(), 0 * x) * y).sum(),
            torch.zeros(2).double(),
            hypergrad=method,
            solver=bl.GradientDescent(0.5, 30),
            throw="ignore",
        )
        assert gradient(fit.value.square().sum(), x).isnan().all()
