"""What hypergradient methods refuse, and what their failed solves advise."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

import bilevel as bl
from bilevel.hypergrad.advice import adjoint_advice
from bilevel.problems import Ridge
from bilevel.solution import Result


@pytest.mark.parametrize(
    ("method", "setting", "bad"),
    [
        (bl.FiniteDifference, "lr", 0.0),
        (bl.FiniteDifference, "epsilon", 0.0),
        (bl.ForwardMode, "max_hparams", 0),
        (bl.Implicit, "damping", -1.0),
        (bl.Implicit, "operator", "hessian"),
        (bl.Penalty, "strength", 0.0),
    ],
)
def test_bad_settings_name_the_argument(method, setting, bad):
    with pytest.raises(ValueError, match=f"{setting} is {bad!r}"):
        method(**{setting: bad})


def test_an_operator_that_is_a_class_is_refused():
    with pytest.raises(TypeError, match=r"operator is the class GaussNewton: write GaussNewton\(\.\.\.\)"):
        bl.Implicit(operator=bl.GaussNewton)


def solved(hypergrad, problem=None, **settings):
    problem = problem or Ridge(per_feature=True, num_features=4)
    x = problem.hparams.clone().requires_grad_()
    solver = bl.Steps(bl.SGD(0.1), max_steps=5)
    return bl.argmin(problem.inner, problem.init, x, solver=solver, hypergrad=hypergrad, **settings), x


def test_forward_mode_counts_its_hyperparameters_and_has_first_derivatives():
    fit, x = solved(bl.ForwardMode(max_hparams=4))
    with pytest.raises(NotImplementedError, match="A second derivative was asked for through hypergrad=ForwardMode"):
        torch.autograd.grad(fit.value.sum(), x, create_graph=True)
    with pytest.raises(ValueError, match="ForwardMode would carry 4 derivatives along; its max_hparams is 3"):
        solved(bl.ForwardMode(max_hparams=3))
    with torch.no_grad():
        found, _ = solved(bl.ForwardMode(max_hparams=3))  # nothing is carried along
    assert torch.equal(found.value, fit.value)
    assert not found.value.requires_grad


@pytest.mark.parametrize("method", [bl.FiniteDifference(), bl.OneStep(), bl.Penalty()])
def test_first_derivatives_only(method):
    fit, x = solved(method, throw="ignore")
    with pytest.raises(NotImplementedError, match=f"hypergrad={type(method).__name__}.*first derivatives"):
        torch.autograd.grad(torch.autograd.grad(fit.value.sum(), x, create_graph=True)[0].sum(), x)


@pytest.mark.parametrize(
    ("solver", "words"),
    [
        (bl.SGD(0.1), "needs a fixed number of steps: leave gtol and safeguard away"),
        (bl.SGD(0.1), "which no callback sees: leave callback away"),
    ],
)
def test_forward_mode_needs_a_fixed_number_of_steps_that_nobody_watches(solver, words):
    settings = {"callback": lambda step: None} if "callback" in words else {"gtol": 1e-3}
    with pytest.raises(TypeError, match=words):
        bl.argmin(
            lambda y: (y - 1).square().sum(),
            torch.zeros(2),
            solver=bl.Steps(solver, max_steps=3, **settings),
            hypergrad=bl.ForwardMode(),
        )


METHODS = [bl.Implicit(), bl.OneStep(), bl.FiniteDifference(), bl.Penalty(), bl.SAMA(), bl.EvolutionStrategies(2)]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_no_gradient_flows_to_the_start(method):
    """The solution does not depend on it, or the method does not say how."""
    assert not method.reaches_init
    x, start = (torch.full((2,), value, dtype=torch.float64, requires_grad=True) for value in (1.0, 0.0))
    solver = bl.Steps(bl.SGD(0.1), max_steps=3)
    fit = bl.argmin(lambda y: (y - x).square().sum(), start, solver=solver, hypergrad=method, throw="ignore")
    to_x, to_start = torch.autograd.grad(fit.value.sum(), (x, start), allow_unused=True)
    assert to_x.abs().sum() > 0
    assert to_start is None
    fit = bl.argmin(lambda y: (y - 1).square().sum(), start, solver=solver, hypergrad=method, throw="ignore")
    assert not fit.value.requires_grad


def test_methods_that_need_an_objective_refuse_a_root():
    x = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    fit = bl.root(lambda y: y - x, torch.zeros(2, dtype=torch.float64), hypergrad=bl.FiniteDifference())
    with pytest.raises(TypeError, match="FiniteDifference needs the objective of an argmin"):
        fit.value.sum().backward()


@pytest.mark.parametrize(
    ("result", "linear", "symmetric", "words"),
    [
        (Result.NONFINITE, None, True, "look for functions whose slope is infinite"),
        (Result.INACCURATE, None, True, "a tolerance of your own"),
        (Result.DAMPED, None, True, "biased by the damping"),
        (Result.DIVERGED, bl.CG(max_steps=7), True, r"Raise max_steps \(now 7\), or take MINRES\(\)"),
        (Result.DIVERGED, bl.MINRES(), True, r"or take another linear solver, or Implicit\(damping=...\)"),
        (Result.DIVERGED, bl.GMRES(), False, r"or take another linear solver, or Implicit\(damping=...\)"),
        (Result.MAX_STEPS, bl.Neumann(), True, r"take CG\(\)"),
        (Result.MAX_STEPS, bl.Neumann(), False, r"take GMRES\(\)"),
        (Result.MAX_STEPS, None, True, "give CG a preconditioner"),
        (Result.MAX_STEPS, bl.CG(preconditioner=bl.Jacobi()), True, "give CG another preconditioner"),
        (Result.MAX_STEPS, None, False, "add a penalty on the params"),
    ],
)
def test_each_failure_has_its_advice(result, linear, symmetric, words):
    """And the words of no other failure."""
    statement = SimpleNamespace(symmetric=symmetric, definite=symmetric, has_objective=True)
    solved = bl.Solution(None, {"result": torch.tensor(int(result), dtype=torch.int8)})
    said = adjoint_advice(bl.Implicit(linear), statement, None, solved)
    assert re.search(words, said)
    assert ("worse than none" in said) == (result is Result.DIVERGED)
    assert ("raise max_steps" in said) == (result is Result.MAX_STEPS)


def speech(y):
    """A loss whose gradient has no derivative in PyTorch."""
    scores = (torch.arange(50.0).view(10, 1, 5).sin() * y).log_softmax(-1)
    return torch.nn.functional.ctc_loss(scores, torch.tensor([[1, 2]]), torch.tensor([10]), torch.tensor([2]))


def test_operations_without_second_derivatives_are_named():
    """What only looks closer sees nothing then: a solve without a hypergradient was an error of PyTorch."""
    decay = torch.tensor(0.1, requires_grad=True)

    def inner(y):
        return speech(y) + decay * y.square().sum()

    for solver in (None, bl.LBFGS(), bl.GradientDescent(0.1, 200)):
        assert bl.argmin(inner, torch.zeros(5), solver=solver, hypergrad=None, throw="raise").result.ok
        fit = bl.argmin(inner, torch.zeros(5), solver=solver, throw="raise")
        with pytest.raises(NotImplementedError, match=r"none of aten::_ctc_loss_backward.*FiniteDifference"):
            fit.value.sum().backward()
    fit = bl.argmin(inner, torch.zeros(5), hypergrad=bl.FiniteDifference(lr=0.1))
    fit.value.sum().backward()
    assert decay.grad is not None
    with pytest.raises(NotImplementedError, match=r"LBFGS\(\) in place of NewtonCG"):
        bl.argmin(inner, torch.zeros(5), solver=bl.NewtonCG())
    bag = torch.nn.EmbeddingBag(20, 4, mode="mean")
    words = torch.randint(0, 20, (12, 5), generator=torch.Generator().manual_seed(0))

    def averaged(p):
        return (torch.func.functional_call(bag, p, (words,)) - 1).square().sum() + decay * p["weight"].square().sum()

    start = dict(bag.named_parameters())
    assert bl.argmin(averaged, start, hypergrad=None, throw="raise").result.ok
    with pytest.raises(NotImplementedError, match=r"_embedding_bag_backward.*nn\.Embedding"):
        bl.argmin(averaged, start).value["weight"].sum().backward()
