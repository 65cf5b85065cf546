"""Settings of the inner solvers that make no sense name the argument; those at the edge are taken."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import scipy.optimize
import torch

import bilevel as bl

BAD = [
    (bl.GradientDescent, {"lr": -0.1}),
    (bl.GradientDescent, {"momentum": -0.5, "lr": 0.1}),
    (bl.GradientDescent, {"momentum": 1.0, "lr": 0.1}),
    (bl.LBFGS, {"history": 0}),
    (bl.LBFGS, {"max_steps": -1}),
    (bl.NewtonCG, {"gtol": -1.0}),
    (bl.Anderson, {"history": -1}),
    (bl.Anderson, {"damping": 0.0}),
    (bl.Picard, {"max_steps": -1}),
]
EDGES = [
    bl.GradientDescent(lr=0.1, momentum=0.0),
    bl.LBFGS(history=1),
    bl.NewtonCG(gtol=1e-12),
    bl.ProximalGradient(bl.prox.L1(0.0)),
]


L1 = bl.prox.L1(0.1)
STEPPED = {
    "gtol": [
        *(bl.GradientDescent, bl.LBFGS, bl.NewtonCG, bl.ScipyMinimize, bl.LevenbergMarquardt, bl.GaussNewtonCG),
        *(functools.partial(bl.Steps, bl.SGD()), functools.partial(bl.TorchOptim, torch.optim.SGD, lr=0.1)),
    ],
    "tol": [bl.Newton, bl.Picard, bl.Anderson, bl.ScipyRoot, functools.partial(bl.ProximalGradient, L1)],
}


@pytest.mark.parametrize(("name", "make"), [(name, make) for name, makes in STEPPED.items() for make in makes])
def test_limits_and_tolerances_of_every_solver(name, make):
    """One step and a tolerance of zero are the least that can be asked for."""
    with pytest.raises(ValueError, match="max_steps is 0: at least one"):
        make(max_steps=0)
    for bad in (-1e-9, float("nan")):
        with pytest.raises(ValueError, match=rf"^{name} is {bad}: .* cannot be negative"):
            make(**{name: bad})
    assert make(max_steps=1, **{name: 0.0}).max_steps == 1


@pytest.mark.parametrize(
    ("make", "good", "bad"),
    [
        (lambda value: bl.NewtonCG(cg_steps=value), [1], [0]),
        (lambda value: bl.GaussNewtonCG(cg_steps=value), [1], [0]),
        (lambda value: bl.LBFGS(history=value), [1], [0]),
        (lambda value: bl.Anderson(history=value), [0, 1], [-1]),
        (lambda value: bl.Anderson(damping=value), [1.0, 0.01], [0.0, 1.01, float("nan")]),
        (lambda value: bl.Picard(damping=value), [1.0, 0.01], [0.0, 1.01, float("nan")]),
        (lambda value: bl.Anderson(ridge=value), [0.0, 2.0], [-1e-9, float("nan")]),
        (lambda value: bl.LevenbergMarquardt(radius=value), [1e-9, 2.0], [0.0, -1.0, float("nan")]),
        (lambda value: bl.GradientDescent(lr=value), [1e-9, 2.0, (0.1, 2.0)], [0.0, -1.0, (0.1, 0.0), float("nan")]),
        (lambda value: bl.GradientDescent(momentum=value), [0.0, 0.99], [-0.01, 1.0, float("nan")]),
        (lambda value: bl.ProximalGradient(L1, step_size=value), [1e-9, 2.0], [0.0, -1.0, float("nan")]),
        (lambda value: bl.Bisection(0.0, value), [1e-9], [0.0, -1.0]),
        (lambda value: bl.Bisection(0.0, 1.0, max_steps=value), [1], [0]),
    ],
)
def test_the_edges_of_each_setting(make, good, bad):
    for value in good:
        make(value)
    for value in bad:
        with pytest.raises(ValueError, match=r" is .*: "):
            make(value)


@pytest.mark.parametrize("momentum", [torch.tensor(0.5), torch.tensor(0.5, requires_grad=True), "0.5", None], ids=repr)
def test_a_momentum_that_is_no_number_is_told_what_takes_one(momentum):
    with pytest.raises(TypeError, match=r"momentum is .*: a number is needed.*take Steps\(SGD\(lr=..., momentum=...\)"):
        bl.GradientDescent(lr=0.1, momentum=momentum)


@pytest.mark.parametrize("settings", [{"momentum": 0.5}, {"safeguard": True}], ids=repr)
def test_a_line_search_excludes_what_finds_steps_otherwise(settings):
    with pytest.raises(ValueError, match="line_search excludes momentum and safeguard"):
        bl.GradientDescent(line_search=True, **settings)


@pytest.mark.parametrize("method", ["L-BFGS-B", "BFGS", "CG", "trust-ncg"])
def test_a_loose_tolerance_ends_scipy_sooner(method):
    def solved(gtol):
        curvature = torch.logspace(0, 3, 10, dtype=torch.float64)
        start = torch.zeros(10, dtype=torch.float64)
        solver = bl.ScipyMinimize(method, gtol=gtol)
        return bl.argmin(lambda y: (curvature * (y - 1).square() + y.pow(4)).sum(), start, solver=solver).stats

    loose, tight = solved(10.0), solved(1e-4)
    assert loose["residual_norm"] <= 10.0
    assert tight["residual_norm"] <= 1e-4
    assert loose["num_steps"] < tight["num_steps"]


@pytest.mark.parametrize(("settings", "result"), [({"max_steps": 2}, "MAX_STEPS"), ({"gtol": 1e-30}, "STAGNATED")])
def test_what_ended_scipy_is_told(settings, result):
    """Its limit of steps; or rounding, where the tolerance cannot be met."""
    curvature = torch.logspace(0, 3, 10, dtype=torch.float64)
    start = torch.zeros(10, dtype=torch.float64)
    solver = bl.ScipyMinimize("BFGS", **settings)
    fit = bl.argmin(lambda y: (curvature * (y - 1).square() + y.pow(4)).sum(), start, solver=solver, throw="ignore")
    assert fit.result is bl.Result[result]


@pytest.mark.parametrize("error", [ValueError, FloatingPointError, np.linalg.LinAlgError])
def test_what_breaks_scipy_down_is_told_in_words(error, monkeypatch):
    def broken(*args, **settings):
        raise error("no inverse")

    monkeypatch.setattr(scipy.optimize, "root", broken)
    with pytest.raises(ValueError, match=r"ScipyRoot\('hybr'\) broke down: no inverse. Try Newton\(\)"):
        bl.root(lambda y: y - 1, torch.zeros(2, dtype=torch.float64), solver=bl.ScipyRoot())


@pytest.mark.parametrize(("solver", "settings"), BAD)
def test_bad_settings_name_the_argument(solver, settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} is"):
        solver(**settings)


@pytest.mark.parametrize("solver", EDGES, ids=repr)
def test_settings_at_the_edge_are_taken(solver):
    target = torch.arange(4, dtype=torch.float64)
    fit = bl.argmin(lambda y: (y - target).square().sum(), torch.zeros_like(target), solver=solver, throw="ignore")
    assert (fit.value - target).abs().max() <= 1e-6


@pytest.mark.parametrize("solver", [bl.Picard(max_steps=7, tol=1e-30), bl.Anderson(max_steps=7, tol=1e-30)], ids=repr)
def test_the_limit_of_steps_of_a_fixed_point_holds(solver):
    calls = []

    def map_(y):
        calls.append(y)
        return torch.cos(y)

    fit = bl.fixed_point(map_, torch.ones(3, dtype=torch.float64), solver=solver, hypergrad=None, throw="ignore")
    assert fit.stats["num_steps"] == 7
    assert len(calls) <= 7 + 3  # to check it, to begin, and to look at the solution


def test_a_fixed_point_that_is_reached_ends_the_iteration():
    calls = []

    def map_(y):
        calls.append(y)
        return 0.1 * y + 1

    fit = bl.fixed_point(
        map_, torch.ones(3, dtype=torch.float64), solver=bl.Picard(max_steps=500, tol=1e-12), hypergrad=None
    )
    assert fit.result.ok
    assert len(calls) <= 20
    assert (fit.value - 1 / 0.9).abs().max() <= 1e-12


def test_unknowns_are_one_system_unless_told_otherwise():
    matrix = torch.tensor([[3.0, 1.0, 0.0], [-1.0, 2.0, 0.5], [0.0, 0.3, 1.0]], dtype=torch.float64)
    fit = bl.root(lambda y: matrix @ y - 1, torch.zeros(3, dtype=torch.float64), hypergrad=None)
    assert fit.stats["num_steps"].shape == ()
    assert (matrix @ fit.value - 1).abs().max() <= 1e-12


RULES = [bl.SGD, bl.Adam, bl.AdamW, bl.RMSprop]


def solved(solver, batch=()):
    target = torch.arange(5.0)
    return bl.argmin(
        lambda y: (y - target).square().sum(-1), torch.zeros(*batch, 5), solver=solver, hypergrad=None
    ).value


class TestSchedules:
    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("length", [1, 5, 6, 8, 10])
    def test_one_of_another_length_than_the_steps_is_refused(self, rule, length):
        with pytest.raises(ValueError, match=f"lr has {length} step sizes for max_steps = 7: give one for each step"):
            bl.Steps(rule(lr=torch.full((length,), 0.1)), max_steps=7)

    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("lr", [[0.1] * 7, (0.1,) * 7, {"weight": 0.1}, "0.1", lambda step: 0.1])
    def test_one_that_is_no_tensor_says_what_to_write(self, rule, lr):
        with pytest.raises(TypeError, match=r"lr is of type .*write torch.tensor"):
            rule(lr=lr)

    @pytest.mark.parametrize(
        ("rule", "name"),
        [
            *((bl.SGD, "momentum"), (bl.SGD, "dampening"), (bl.SGD, "weight_decay"), (bl.Adam, "eps")),
            *((bl.Adam, "weight_decay"), (bl.RMSprop, "alpha"), (bl.RMSprop, "momentum")),
        ],
    )
    def test_other_settings_have_none(self, rule, name):
        with pytest.raises(ValueError, match=rf"{name} has shape \(5,\).*taken for lr only"):
            rule(**{name: torch.full((5,), 0.5)})
        with pytest.raises(TypeError, match=f"{name} is of type list"):
            rule(**{name: [0.5] * 5})

    def test_betas_are_two_numbers(self):
        for betas in (0.9, (0.9,), (0.9, 0.99, 0.999)):
            with pytest.raises(ValueError, match="a pair is needed"):
                bl.Adam(betas=betas)
        with pytest.raises(ValueError, match="betas has shape"):
            bl.Adam(betas=(torch.full((7,), 0.9), 0.99))

    def test_alpha_averages(self):
        with pytest.raises(ValueError, match=r"alpha is 1\.5"):
            bl.RMSprop(alpha=1.5)

    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize(("shape", "batch"), [((3, 1), (2,)), ((7, 5), ()), ((1, 5), ()), ((2, 4), (2,))])
    def test_settings_for_another_number_of_problems_are_refused(self, rule, shape, batch):
        with pytest.raises(ValueError, match=r"has shape .*or of T problems \[T, 1\]"):
            solved(bl.Steps(rule(lr=torch.full(shape, 0.1)), max_steps=7), batch)

    def test_those_of_each_problem_are_taken(self):
        each = solved(bl.Steps(bl.SGD(lr=torch.tensor([[0.1], [0.2]]), momentum=torch.tensor([[0.0], [0.5]])), 7), (2,))
        for row, (lr, momentum) in zip(each, ((0.1, 0.0), (0.2, 0.5)), strict=True):
            torch.testing.assert_close(row, solved(bl.Steps(bl.SGD(lr=lr, momentum=momentum), 7)))

    def test_a_truncated_path_takes_its_part_of_a_schedule(self):
        rates = torch.linspace(0.05, 0.3, 7)
        x = torch.tensor(2.0, requires_grad=True)
        fit = bl.argmin(
            lambda y: (y - x).square().sum(),
            torch.zeros(3),
            solver=bl.Steps(bl.SGD(lr=rates), max_steps=7),
            hypergrad=bl.Truncated(last=3),
        )
        torch.testing.assert_close(fit.value, x.detach() * (1 - (1 - 2 * rates).prod()).expand(3))
        fit.value.sum().backward()
        torch.testing.assert_close(x.grad, 3 * (1 - (1 - 2 * rates[-3:]).prod()))

    @pytest.mark.parametrize(
        "bad", [torch.full((7,), 0.1), [0.1] * 7, {"y": 0.1}, torch.tensor(0.1, requires_grad=True)]
    )
    @pytest.mark.parametrize(
        "make", [bl.GradientDescent, lambda lr: bl.TorchOptim(torch.optim.SGD, lr=lr), bl.FiniteDifference]
    )
    def test_solvers_of_one_step_size_say_who_takes_a_schedule(self, make, bad):
        with pytest.raises(TypeError, match=r"lr is .*: a number is needed"):
            make(lr=bad)

    def test_step_sizes_of_one_step_are_numbers(self):
        with pytest.raises(TypeError, match="step_size is a tensor of shape"):
            bl.OneStep(torch.full((7,), 0.1))
        with pytest.raises(TypeError, match="momentum is of type list"):
            bl.GradientDescent(momentum=[0.5] * 7)
        with pytest.raises(ValueError, match="lr is inf"):
            bl.GradientDescent(lr=float("inf"))
