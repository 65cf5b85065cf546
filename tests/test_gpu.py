"""What only a GPU can show; elsewhere skipped, and rehearsed on the CPU with ``BILEVEL_TEST_DEVICE=cpu``."""

from __future__ import annotations

import os

import pytest
import torch

import bilevel as bl
from bilevel.linalg.noise import normal, signs, uniform
from bilevel.linalg.operator import Dense
from tests.conformance import nonsymmetric, randn, relative_error, spd
from tests.test_recording import data, gradient, losses_of, start

DEVICE = torch.device(os.environ.get("BILEVEL_TEST_DEVICE", "cuda"))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="there is no GPU"),
]


def moved(tree):
    return torch.utils._pytree.tree_map(lambda t: t.detach().to(DEVICE).requires_grad_(t.requires_grad), tree)


@pytest.mark.parametrize(
    "linear", [bl.CG(max_steps=3), bl.CG(max_steps=3, preconditioner=bl.Jacobi(2)), bl.GMRES(max_steps=3)], ids=repr
)
def test_a_recorded_step_is_the_eager_one_and_that_of_the_host(linear):
    fn = losses_of(linear=linear)

    def on_device(params, x, y):
        with DEVICE:
            return fn(params, x, y)

    captured = bl.capture(on_device)
    for seed in range(3):
        params, tensors = start(seed), data(seed)
        expected = gradient(fn, params, *tensors)[1]
        own = moved(params), *moved(tensors)
        for program in (on_device, captured):
            torch.testing.assert_close(gradient(program, *own)[1].cpu(), expected, rtol=1e-9, atol=1e-12)


def test_threads_of_tasks_work_on_the_stream_of_the_caller():
    if DEVICE.type != "cuda":
        assert bl.map_tasks(lambda x: 2 * x, torch.arange(4.0), chunk_size=1, num_threads=2).tolist() == [0, 2, 4, 6]
        return
    stream, seen = torch.cuda.Stream(DEVICE), []
    with torch.cuda.stream(stream):
        x = torch.arange(4.0, device=DEVICE)
        bl.map_tasks(lambda x: seen.append(torch.cuda.current_stream()) or x, x, chunk_size=1, num_threads=2)
    assert seen == [stream] * 4


def test_a_meta_step_does_not_wait():
    """PyTorch's own watch on synchronisations."""
    fn, own = losses_of(linear=bl.CG(max_steps=3)), (moved(start()), *moved(data(0)))
    with DEVICE:
        gradient_ignored(fn, *own)
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            gradient_ignored(fn, *own)
        finally:
            if DEVICE.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")


def gradient_ignored(fn, params, x, y):
    def inner(u):
        return (torch.einsum("tnd,td->tn", x, u) - y).square().mean(-1) + (u - params["w"]).square().sum(-1)

    solver, hypergrad = bl.GradientDescent(0.1, max_steps=4, safeguard=True), bl.Implicit(bl.CG(max_steps=3))
    fit = bl.argmin(inner, torch.zeros_like(x[:, 0]), solver=solver, hypergrad=hypergrad, throw="ignore")
    return torch.autograd.grad(fit.value.pow(4).sum(), params["w"])


@pytest.mark.parametrize("solver", [bl.CG(), bl.MINRES(), bl.GMRES(), bl.BiCGSTAB(), bl.NormalCG(), bl.LU()], ids=repr)
def test_linear_solvers_give_what_they_give_on_the_host(solver):
    matrix, b = spd(20, batch=(3,)), randn(3, 20)
    found = solver.solve(Dense(matrix.to(DEVICE)), b.to(DEVICE))
    assert found.result is bl.Result.CONVERGED
    assert relative_error(found.value.cpu(), torch.linalg.solve(matrix, b.unsqueeze(-1)).squeeze(-1)) <= 1e-7


@pytest.mark.parametrize("solver", [bl.LBFGS(), bl.NewtonCG()], ids=repr)
def test_hypergradients_are_those_of_the_host(solver):
    def hypergradient(device):
        strength = torch.tensor(0.1, dtype=torch.float64, device=device, requires_grad=True)
        x, y = randn(30, 5, seed=1).to(device), randn(30, seed=2).to(device)
        begin = torch.zeros(5, dtype=torch.float64, device=device)
        fit = bl.argmin(lambda w: (x @ w - y).pow(2).mean() + strength * w.square().sum(), begin, solver=solver)
        return torch.autograd.grad(fit.value.square().sum(), strength)[0].cpu()

    torch.testing.assert_close(hypergradient(DEVICE), hypergradient("cpu"), rtol=1e-7, atol=0)


def test_a_fixed_point_is_that_of_the_host():
    matrix = torch.eye(10, dtype=torch.float64) - nonsymmetric(10)

    def solved(device):
        own = matrix.to(device).requires_grad_()
        fit = bl.fixed_point(lambda y: own @ y + 1.0, torch.zeros(10, dtype=torch.float64, device=device))
        return torch.autograd.grad(fit.value.sum(), own)[0].cpu()

    torch.testing.assert_close(solved(DEVICE), solved("cpu"), rtol=1e-7, atol=1e-9)


def test_random_numbers_are_those_of_the_host():
    host = torch.device("cpu")
    assert torch.equal(uniform((100,), 3, DEVICE).cpu(), uniform((100,), 3, host))
    assert torch.equal(signs((100,), 3, DEVICE).cpu(), signs((100,), 3, host))
    torch.testing.assert_close(normal((100,), 3, DEVICE).cpu(), normal((100,), 3, host), rtol=1e-12, atol=1e-14)


def test_layers_of_many_networks_are_those_of_the_host():
    x, weight = randn(3, 4, 2, 8, 8), randn(3, 5, 2, 3, 3)
    found = bl.nn.conv2d(x.to(DEVICE), weight.to(DEVICE), padding=1).cpu()
    torch.testing.assert_close(found, bl.nn.conv2d(x, weight, padding=1), rtol=1e-10, atol=1e-12)
