"""Everything on a device that nobody has: no tensor is left on the host, and the looks at values are counted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError

import bilevel as bl
import bilevel.stochastic
from applications.few_shot.config import Config
from applications.few_shot.episodes import Episodes
from applications.few_shot.methods import METHODS, Learner, meta_step
from applications.few_shot.models import build
from bilevel.diagnostics.methods import all_methods
from bilevel.hypergrad.call import rounding_hint
from bilevel.linalg.operator import Dense
from tests.fake_device import DEVICE, KIND, fake_device
from tests.stochastic.cases import CASES

MANY = 10**6
"""Looks of what lives on the host by its nature, or makes as many steps as it needs."""


def on_device(*shape, **settings):
    return torch.randn(*shape, device=DEVICE, **settings)


def least_squares(tasks):
    """An objective, its start, and a hyperparameter."""
    x, y = on_device(6, 4), on_device(6)
    strength = torch.ones((), device=DEVICE, requires_grad=True)

    def objective(w):
        return (w @ x.T - y).square().mean(-1) + strength * w.square().sum(-1)

    return objective, torch.zeros(*tasks, 4, device=DEVICE), strength


def hypergradient(solver, hypergrad, tasks=(), throw="warn", going=False):
    with fake_device(going) as answers:
        objective, start, strength = least_squares(tasks)
        fit = bl.argmin(objective, start, solver=solver, hypergrad=hypergrad, throw=throw)
        assert fit.value.device.type == KIND
        loss = fit.value.square().sum() + strength
        (grad,) = torch.autograd.grad(loss, strength)
        assert grad.device.type == KIND
        assert all(stat.device.type == KIND for stat in fit.stats.values())
    return answers


FEW = bl.GradientDescent(0.1, max_steps=2)
SOLVERS = [
    (bl.LBFGS(max_steps=3), 6),
    (bl.NewtonCG(max_steps=2, cg_steps=3), MANY),
    (FEW, 1),
    (bl.GradientDescent(0.1, max_steps=4, safeguard=True, momentum=0.0), 1),
    (bl.GradientDescent(0.1, max_steps=16, gtol=1e-3), 5),
    (bl.GradientDescent(max_steps=3, line_search=True), 6),
    (bl.Steps(bl.SGD(0.1, momentum=0.9), max_steps=3), 1),
    (bl.Steps(bl.Adam(0.1), max_steps=3), 1),
    (bl.Steps(bl.AdamW(0.1, weight_decay=0.0), max_steps=3), 1),
    (bl.Steps(bl.RMSprop(0.1), max_steps=3), 1),
    (bl.TorchOptim(torch.optim.Adam, lr=0.1, max_steps=3), MANY),
    (bl.TorchOptim(torch.optim.Adam, lr=0.1, max_steps=3, gtol=1e-3), MANY),
    (bl.ScipyMinimize(max_steps=2), MANY),
]


@pytest.mark.parametrize("tasks", [(), (3,)], ids=["one", "three"])
@pytest.mark.parametrize(("solver", "looks"), SOLVERS, ids=lambda part: type(part).__name__)
def test_inner_solvers(solver, looks, tasks):
    """The adjoint makes three steps, and one look is that of both solves."""
    assert hypergradient(solver, bl.Implicit(bl.CG(max_steps=3)), tasks, going=looks == MANY).looks <= looks


def shortened(hypergrad):
    """The same with few steps: what fake tensors do takes long."""
    linear = getattr(hypergrad, "linear_solver", None)
    if linear is not None and hasattr(linear, "max_steps"):
        return replace(hypergrad, linear_solver=replace(linear, max_steps=3))
    return hypergrad


ON_THE_HOST = ("SciPy", "LSMR", "unrolled, checkpoints")
"""Solvers of the host; and what asks the device for the state of its random generator, which this one has not."""

METHODS_THAT_RUN = {m.name: m for m in all_methods(max_steps=4) if not any(name in m.name for name in ON_THE_HOST)}


@pytest.mark.parametrize("name", METHODS_THAT_RUN)
def test_hypergradient_methods(name):
    method = METHODS_THAT_RUN[name]
    answers = hypergradient(method.solver or bl.GradientDescent(0.1, max_steps=4), shortened(method.hypergrad), (3,))
    assert not answers.copies


LINEAR = [
    *(bl.CG(max_steps=3), bl.MINRES(max_steps=3), bl.NormalCG(max_steps=3), bl.GMRES(max_steps=3)),
    *(bl.BiCGSTAB(max_steps=3), bl.Neumann(max_steps=3), bl.Neumann(max_steps=3, alpha=0.1), bl.Identity(0.1)),
    *(bl.Nystrom(2), bl.CG(max_steps=3, preconditioner=bl.Jacobi(2)), bl.Cholesky(), bl.LU(), bl.LeastNorm()),
    *(bl.CG(max_steps=3, preconditioner=bl.NystromPreconditioner(2)), bl.Equilibrated(bl.LU())),
]


@pytest.mark.parametrize("linear", LINEAR, ids=repr)
def test_a_meta_step_looks_at_nothing_and_copies_nothing(linear):
    answers = hypergradient(FEW, bl.Implicit(linear), (3,), throw="ignore")
    assert answers.looks <= (2 if isinstance(linear, bl.LeastNorm) else 1 if isinstance(linear, bl.MINRES) else 0)
    assert not answers.copies


OPERATORS = ["graph", "func", bl.GaussNewton, bl.EmpiricalFisher]


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_operators(operator):
    with fake_device():
        x, y = on_device(6, 4), on_device(6)
        strength = torch.ones((), device=DEVICE, requires_grad=True)
        if operator is bl.GaussNewton:
            operator = bl.GaussNewton(lambda w: x @ w, lambda z: (z - y).square().mean())
        elif operator is bl.EmpiricalFisher:
            operator = bl.EmpiricalFisher(lambda w: (x @ w - y).square())

        def objective(w):
            return (x @ w - y).square().mean() + strength * w.square().sum()

        implicit = bl.Implicit(bl.CG(max_steps=2), operator=operator)
        fit = bl.argmin(objective, torch.zeros(4, device=DEVICE), solver=FEW, hypergrad=implicit)
        (grad,) = torch.autograd.grad(fit.value.sum(), strength)
        assert grad.device.type == KIND


PROX = {
    "L1": lambda: bl.prox.L1(0.1),
    "ElasticNet": lambda: bl.prox.ElasticNet(0.1, 0.1),
    "Box": lambda: bl.prox.Box(-1.0, 1.0),
    "NonNegative": bl.prox.NonNegative,
    "Simplex": bl.prox.Simplex,
    "L1Ball": bl.prox.L1Ball,
    "L2Ball": bl.prox.L2Ball,
    "GroupLasso": lambda: bl.prox.GroupLasso(torch.zeros(4, dtype=torch.int64, device=DEVICE), 0.1),
    "HalfSpace": lambda: bl.prox.HalfSpace(on_device(4), 1.0),
    "Affine": lambda: bl.prox.Affine(on_device(1, 4), on_device(1)),
    "Rows": lambda: bl.prox.Rows(bl.prox.Simplex(), 2),
}


@pytest.mark.parametrize("name", bl.prox.__all__)
def test_composite_problems(name):
    with fake_device() as answers:
        objective, start, strength = least_squares(())
        prox, answers.going = PROX[name](), True
        solver, hypergrad = bl.ProximalGradient(prox, max_steps=2), bl.Implicit(bl.GMRES(max_steps=3))
        fit = bl.argmin(objective, start, solver=solver, hypergrad=hypergrad, throw="ignore")
        (grad,) = torch.autograd.grad(fit.value.square().sum(), strength)
        assert grad.device.type == KIND


SYSTEMS = [
    (bl.root, bl.Newton(max_steps=2)),
    (bl.root, bl.Newton(bl.GMRES(max_steps=3), max_steps=2)),
    (bl.root, bl.ScipyRoot(max_steps=2)),
    (bl.root, bl.Bisection(-1.0, 1.0, max_steps=3)),
    (bl.fixed_point, bl.Anderson(max_steps=4)),
    (bl.fixed_point, bl.Picard(max_steps=4)),
]


@pytest.mark.parametrize(("solve", "solver"), SYSTEMS, ids=lambda value: getattr(value, "__name__", repr(value)))
def test_systems(solve, solver):
    with fake_device(going=True):
        matrix = on_device(4, 4).requires_grad_()
        fit = solve(
            lambda y: torch.tanh(y @ matrix.T) + 1.0,
            torch.zeros(3, 4, device=DEVICE),
            solver=solver,
            hypergrad=bl.Implicit(bl.GMRES(max_steps=3)),
            batched=True,
        )
        (grad,) = torch.autograd.grad(fit.value.sum(), matrix)
        assert grad.device.type == KIND


def test_quadratic_programs():
    with fake_device():
        c = on_device(2, 3).requires_grad_()
        Q = torch.eye(3, device=DEVICE).expand(2, 3, 3)
        G, h = -torch.eye(3, device=DEVICE).expand(2, 3, 3), torch.ones(2, 3, device=DEVICE)
        fit = bl.quadratic_program(Q, c, G=G, h=h, max_steps=2, throw="ignore")
        (grad,) = torch.autograd.grad(bl.tree.leaves(fit.value)[0].sum(), c)
        assert grad.device.type == KIND


@pytest.mark.parametrize("name", CASES)
def test_stochastic_methods(name):
    with fake_device():
        matrix, y = on_device(3, 3), on_device(3).requires_grad_()
        x = on_device(3).requires_grad_()

        def inner(y, x, batch):
            return (y @ matrix - x).square().mean() + y.square().sum()

        def outer(y, x, batch):
            return (y - 1).square().sum() + x.square().sum()

        method = CASES[name].method(y, x, inner, outer, **CASES[name].settings)
        for _ in range(2):
            estimate = method.step(torch.zeros((), device=DEVICE), torch.zeros((), device=DEVICE))
        assert estimate.outer_norm.device.type == KIND


@pytest.mark.parametrize("tasks", [None, 2])
def test_layers(tasks):
    lead = [] if tasks is None else [tasks]
    with fake_device() as answers:
        x, weight = on_device(*lead, 5, 3, 8, 8), on_device(*lead, 4, 3, 3, 3).requires_grad_()
        ones = torch.ones(*lead, 4, device=DEVICE)
        maps = bl.nn.conv2d(x, weight, padding=1)
        loss = bl.nn.batch_norm(maps, ones, 0 * ones, pool=2).square().sum()
        loss = loss + bl.nn.linear(maps.flatten(-3), on_device(*lead, 7, 256), on_device(*lead, 7)).square().sum()
        (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), weight)
        assert second.device.type == KIND
    assert answers.looks == 0
    assert not answers.copies


@pytest.mark.parametrize("method", METHODS)
def test_a_meta_step_of_few_shot(method):
    """Ours has no look at a value, as its recording wants it."""
    config = Config(method=method, width=4, tasks=2, inner_steps=2, newton_cg_steps=2, learn_strength="layer")
    with fake_device() as answers:
        with torch.device(DEVICE):
            net = build("conv4", 1, 16, config.ways, width=4)
        learner = Learner.create(config, net)
        support, query = on_device(2, 5, 1, 16, 16), on_device(2, 10, 1, 16, 16)
        labels = [torch.zeros(2, count, dtype=torch.int64, device=DEVICE) for count in (5, 10)]
        answers.looks = 0
        answers.copies.clear()
        outcome = meta_step(learner, Episodes(support, labels[0], query, labels[1]))
        grads = torch.autograd.grad(outcome.objective, learner.parameters(), allow_unused=True)
        assert all(grad is None or grad.device.type == KIND for grad in grads)
    if method != "imaml-hf":
        assert answers.looks == 0
        assert not answers.copies


@pytest.mark.parametrize(
    "solve",
    [
        lambda start: bl.argmin(lambda w: w.square().sum(), start),
        lambda start: bl.root(lambda w: w, start),
        lambda start: bl.fixed_point(lambda w: w / 2, start),
        lambda start: bl.least_squares(lambda w: w, start),
        lambda start: bl.constrained(lambda w: w.square().sum(), lambda w: w[:1], start),
        lambda start: bl.quadratic_program(start.expand(3, 3), start),
        lambda start: bl.CG().solve(Dense(start.expand(3, 3)), start),
        lambda start: bilevel.stochastic.SOBA(
            start.requires_grad_(), start, lambda *_: start, lambda *_: start, inner_lr=0.1, outer_lr=0.1
        ),
    ],
)
def test_mps_is_refused_in_a_sentence(solve):
    with fake_device():
        start = torch.zeros(3, device="mps")
        with pytest.raises(NotImplementedError, match="MPS device, which has no float64"):
            solve(start)


def test_tf32_is_told_where_a_solve_fails_by_it(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert "torch.backends.cudnn.allow_tf32" in rounding_hint("cuda", torch.float32)
    assert not rounding_hint("cuda", torch.float64)
    assert not rounding_hint("cpu", torch.float32)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert not rounding_hint("cuda", torch.float32)


def test_mixed_devices_are_errors():
    """That the device of these tests can fail: one tensor that stays on the host is found."""
    with fake_device():
        host, start = torch.ones(4), torch.zeros(4, device=DEVICE)
        with pytest.raises(FakeTensorDeviceMismatchError):
            bl.argmin(lambda w: (w - host).square().sum(), start, solver=FEW)
