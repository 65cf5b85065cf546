"""Every hypergradient method in several threads at once: the gradients are those of one thread, to the last bit."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import bilevel as bl
from bilevel.diagnostics.methods import DEFINITE, all_methods
from tests.conformance import randn

ADAM = bl.Steps(bl.Adam(0.1), max_steps=4)
SLOW = (bl.EvolutionStrategies,)
LISTED = [m for m in all_methods(max_steps=8) if DEFINITE in m.solves and not isinstance(m.hypergrad, SLOW)]
METHODS = [(m.name, m.hypergrad, m.solver) for m in LISTED] + [
    ("evolution strategies", bl.EvolutionStrategies(num_samples=1), None),
    ("unrolled Adam, checkpoints", bl.Unroll(checkpoint=True), ADAM),
    ("truncated Adam", bl.Truncated(2), ADAM),
    ("forward mode, Adam", bl.ForwardMode(), ADAM),
    ("implicit by torch.func, MINRES, Newton", bl.Implicit(bl.MINRES(), operator="func"), bl.NewtonCG()),
    ("SAMA, Adam", bl.SAMA(), ADAM),
]
DATA = randn(12, 3, seed=0)


@pytest.fixture(autouse=True)
def _frequent_switches():
    """Threads that take turns often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def loss(y, lam):
    return (DATA @ y - DATA.sum(-1)).square().mean() + lam.exp() * y.square().sum()


def hypergradient(index, solve):
    """The gradient and the solution of ``solve(lam)``, for one of 8 hyperparameters."""
    lam = torch.tensor(-2 + 0.1 * (index % 8), dtype=torch.float64, requires_grad=True)
    y = solve(lam)
    (grad,) = torch.autograd.grad(y.sum() * lam, lam)
    return [grad.item(), *y.tolist()]


def check_in_threads(solve, count):
    alone = [hypergradient(index, solve) for index in range(8)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda index: hypergradient(index, solve), range(count)))
    assert all(one == alone[index % 8] for index, one in enumerate(found))


@pytest.mark.parametrize(("method", "solver"), [m[1:] for m in METHODS], ids=[m[0] for m in METHODS])
def test_argmin(method, solver):
    start = torch.full((3,), 0.1, dtype=torch.float64)

    def solve(lam):
        return bl.argmin(lambda y: loss(y, lam), start, solver=solver, hypergrad=method, throw="ignore").value

    check_in_threads(solve, count=100 if isinstance(method, bl.ForwardMode) else 40)


@pytest.mark.parametrize("kind", ["root", "fixed point", "prox", "quadratic program"])
def test_other_solves(kind):
    start, eye = torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    prox = bl.ProximalGradient(bl.prox.L1(0.1))
    solve = {
        "root": lambda lam: bl.root(lambda y: y.exp() + lam.exp() * y - DATA[0], start).value,
        "fixed point": lambda lam: bl.fixed_point(lambda y: 0.3 * torch.tanh(y.flip(0) * lam + DATA[0]), start).value,
        "prox": lambda lam: bl.argmin(lambda y: loss(y, lam), start, solver=prox).value,
        "quadratic program": lambda lam: (
            bl.quadratic_program(eye * lam.exp(), DATA[0], eye[:1], start[:1] + 1, -eye, start).value.primal
        ),
    }[kind]
    check_in_threads(solve, count=40)


def test_forward_mode_beside_dual_numbers_of_another_thread():
    """Dual levels belong to the process: a `torch.func.jvp` of the user's is not seen by solves elsewhere."""
    start = torch.zeros(3, dtype=torch.float64)

    def ours(index):
        solver = bl.GradientDescent(0.1, max_steps=4)
        return hypergradient(
            index,
            lambda lam: bl.argmin(lambda y: loss(y, lam), start, solver=solver, hypergrad=bl.ForwardMode()).value,
        )

    def theirs():
        x = torch.tensor(0.3, dtype=torch.float64)
        return torch.func.jvp(lambda x: (x.exp() * x).sin(), (x,), (torch.ones_like(x),))[1].item()

    alone, expected = ours(0), theirs()
    with ThreadPoolExecutor(1) as pool:
        futures = [pool.submit(ours, 0) for _ in range(40)]
        assert {theirs() for _ in range(400)} == {expected}
        assert all(future.result() == alone for future in futures)
