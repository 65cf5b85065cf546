"""What trusted libraries promise of a hypergradient: the numbers that no other file of the suite holds."""

from __future__ import annotations

import gc

import hypothesis.strategies as st
import psutil
import pytest
import torch
from hypothesis import given, settings
from torch.nn.functional import cross_entropy

import bilevel as bl
from bilevel.diagnostics.cost import peak_mib
from bilevel.problems import Quadratics, Ridge
from tests.conformance import live_tensors, no_tensors_left, randn, relative_error

EXACT = bl.NewtonCG(gtol=1e-13)


def meta_problem(dtype, chunk_size=None, shared=True):
    """Three tasks of a small network around shared meta-parameters: together by vmap, or task by task."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).to(dtype)
    meta = dict(net.named_parameters())
    x, y = randn(3, 6, 4).to(dtype), torch.arange(18).view(3, 6) % 3

    def adapt_loss(params, x, y):
        prox = sum((p - meta[name]).square().sum() for name, p in params.items())
        return cross_entropy(torch.func.functional_call(net, params, (x,)), y) + prox

    def gradient(objective, init, *args):
        solver, hypergrad = bl.GradientDescent(0.1, 20), bl.Implicit(bl.CG(max_steps=12))
        fit = bl.argmin(objective, init, *args, solver=solver, hypergrad=hypergrad)
        loss = sum(p.square().sum() for p in fit.value.values())
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(meta.values()))])

    if shared:
        return gradient(torch.vmap(adapt_loss, chunk_size=chunk_size), bl.stack(meta, 3), x, y)
    return sum(gradient(adapt_loss, meta, x[t], y[t]) for t in range(3))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_vmap_equals_the_loop(dtype, tolerance):
    """20: the hypergradient of a vmapped objective is the sum of those of its tasks."""
    assert relative_error(meta_problem(dtype), meta_problem(dtype, shared=False)) <= tolerance


@pytest.mark.parametrize("chunk_size", [1, 2, 3])
def test_chunks_do_not_matter(chunk_size):
    """21: of the vmap inside the objective."""
    assert relative_error(meta_problem(torch.float64, chunk_size), meta_problem(torch.float64)) <= 1e-12


def test_memory_does_not_grow_with_the_inner_steps():
    """24: 128 steps against 16: at most 1.05 times the memory; unrolled at least 6 times."""
    problem = Ridge(200, 60, per_feature=True)
    x = problem.hparams.clone().requires_grad_()

    def peak(steps, method):
        def run():
            solver = bl.GradientDescent(0.01, steps)
            fit = bl.argmin(problem.inner, problem.init, x, solver=solver, hypergrad=method)
            torch.autograd.grad(problem.outer(fit.value, x), x)

        run()
        return peak_mib(run)

    implicit = bl.Implicit(bl.CG(max_steps=5))
    assert peak(128, implicit) <= 1.05 * peak(16, implicit)
    assert peak(128, bl.Unroll()) >= 6 * peak(16, bl.Unroll())


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
def test_float32_against_float64(condition):
    """25: up to a condition number of 1e4."""
    grads = []
    for dtype, gtol in ((torch.float32, 1e-7), (torch.float64, 1e-13)):
        problem = Quadratics(conditions=(condition,), dtype=dtype)
        x = problem.hparams.clone().requires_grad_()
        hypergrad = bl.Implicit(bl.CG(rtol=1e-6 if dtype is torch.float32 else 1e-12))
        fit = bl.argmin(
            problem.inner, problem.init, x, solver=bl.NewtonCG(gtol=gtol), hypergrad=hypergrad, throw="ignore"
        )
        grads.append(torch.autograd.grad(problem.outer(fit.value, x), x)[0].double())
    assert relative_error(*grads) <= 1e-4


TREES = st.recursive(
    st.lists(st.integers(1, 3), min_size=0, max_size=2).map(tuple),
    lambda inner: st.lists(inner, min_size=1, max_size=3) | st.dictionaries(st.sampled_from("abcd"), inner, min_size=1),
    max_leaves=5,
)


@settings(max_examples=50, deadline=None)
@given(shapes=TREES, frozen=st.booleans(), tied=st.booleans())
def test_any_tree_with_unused_tied_and_frozen_params(shapes, frozen, tied):
    """26: 50 random nested trees; what is unused gets zeros, what is frozen nothing, what is tied its sum."""
    x = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    still = torch.tensor(2.0, dtype=torch.float64, requires_grad=not frozen)
    is_shape = lambda node: isinstance(node, tuple)  # noqa: E731
    init = {
        "tree": torch.utils._pytree.tree_map(lambda s: torch.zeros(s, dtype=torch.float64), shapes, is_leaf=is_shape),
        "unused": torch.full((2,), 7.0, dtype=torch.float64),
    }
    scale = x if tied else still

    def inner(params):
        return sum((p - x * scale).square().sum() for p in bl.tree.leaves(params["tree"]))

    fit = bl.argmin(inner, init, solver=bl.LBFGS(gtol=1e-12))
    assert torch.equal(fit.value["unused"], init["unused"])
    total = sum(p.sum() for p in bl.tree.leaves(fit.value))
    numel = sum(p.numel() for p in bl.tree.leaves(init["tree"]))
    wanted = [x] if frozen else [x, still]
    grads = torch.autograd.grad(total, wanted, allow_unused=True)
    assert grads[0].item() == pytest.approx(numel * (2 * 1.5 if tied else 2.0))
    if not frozen:
        assert (grads[1] or torch.zeros(())).item() == pytest.approx(0.0 if tied else numel * 1.5)


def test_a_thousand_hypergradients_leave_nothing_behind():
    """44: live tensors constant, resident memory growing by less than 1 MB in a hundred."""
    problem = Ridge(num_examples=40, num_features=30, per_feature=True)
    process = psutil.Process()

    def hundred(method):
        for _ in range(100):
            x = problem.hparams.clone().requires_grad_()
            fit = bl.argmin(problem.inner, problem.init, x, solver=bl.GradientDescent(0.1, 3), hypergrad=method)
            problem.outer(fit.value, x).backward()

    method = bl.Implicit(bl.CG(max_steps=3))
    hundred(method)
    gc.collect()
    before, resident = live_tensors(), process.memory_info().rss
    for _ in range(10):
        hundred(method)
    assert live_tensors() <= before + 5
    assert process.memory_info().rss - resident < 10 * 2**20


@pytest.mark.parametrize(
    "method", [bl.Implicit(), bl.Unroll(), bl.Unroll(checkpoint=True), bl.ForwardMode(), bl.OneStep(), bl.Penalty()]
)
def test_methods_leave_nothing_behind(method):
    """The same with second derivatives where there are any, without the garbage collector."""
    problem = Ridge(num_examples=5, num_features=3)
    twice = isinstance(method, (bl.Implicit, bl.Unroll))

    def once():
        x = problem.hparams.clone().requires_grad_()
        fit = bl.argmin(
            problem.inner, problem.init, x, solver=bl.GradientDescent(0.1, 4), hypergrad=method, throw="ignore"
        )
        (grad,) = torch.autograd.grad(problem.outer(fit.value, x), x, create_graph=twice)
        if twice:
            torch.autograd.grad(grad, x)

    once()
    with no_tensors_left(most=5):
        for _ in range(20):
            once()


def test_warm_starts_and_carried_preconditioners_across_outer_steps():
    """Explicit state from solve to solve: fewer products, the same hypergradient."""
    from bilevel.diagnostics.compare import _CountingSolver

    problem = Quadratics(conditions=(1e3,), size=30)

    def outer_loop(warm):
        x, fit, total = problem.hparams.clone().requires_grad_(), None, 0
        for _ in range(5):
            counting = _CountingSolver(bl.CG(rtol=1e-8, preconditioner=bl.Jacobi(20)))
            fit = bl.argmin(
                problem.inner,
                problem.init,
                x,
                solver=EXACT,
                hypergrad=bl.Implicit(counting),
                throw="ignore",
                warm_start=fit if warm else None,
            )
            (grad,) = torch.autograd.grad(problem.outer(fit.value, x), x)
            x = (x - 1e-5 * grad).detach().requires_grad_()
            total += counting.products
        return grad, total

    (warm, few), (cold, many) = outer_loop(True), outer_loop(False)
    assert relative_error(warm, cold) <= 1e-6
    assert few < 0.7 * many


def test_curvature_that_cg_and_minres_saw():
    problem = Quadratics(conditions=(10.0, 100.0))
    x = problem.hparams.clone().requires_grad_()
    for linear in (bl.CG(rtol=1e-10), bl.MINRES(rtol=1e-10)):
        fit = bl.argmin(problem.inner, problem.init, x, solver=EXACT, hypergrad=bl.Implicit(linear), throw="ignore")
        problem.outer(fit.value, x).backward()
        smallest, largest = fit.adjoint.curvature
        torch.testing.assert_close(smallest, torch.ones(2, dtype=torch.float64), rtol=1e-2, atol=0)
        torch.testing.assert_close(largest, torch.tensor([10.0, 100.0], dtype=torch.float64), rtol=1e-6, atol=0)
        assert fit.curvature is None
    saddle = bl.root(
        lambda y: torch.stack([y[0] - x.sum(), -2 * y[1] - x.sum()]),
        torch.zeros(2, dtype=torch.float64),
        symmetric=True,
        hypergrad=bl.Implicit(bl.MINRES()),
    )
    saddle.value.sum().backward()
    assert saddle.adjoint.curvature[0] < -1.9


def test_gauss_newton_where_the_hessian_is_indefinite():
    """A network away from its minimum: CG on the Hessian meets negative curvature, on Gauss-Newton never."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
    data, target = randn(20, 3, seed=1), 3 * randn(20, 1, seed=2)
    decay = torch.tensor(-6.0, dtype=torch.float64, requires_grad=True)

    def outputs(params):
        return torch.func.functional_call(net, params, (data,))

    def loss(z):
        return (z - target).square().mean()

    def rest(params):
        return decay.exp() * sum(p.square().sum() for p in params.values())

    def solve(operator):
        fit = bl.argmin(
            lambda params: loss(outputs(params)) + rest(params),
            dict(net.named_parameters()),
            solver=bl.GradientDescent(0.05, 5),
            hypergrad=bl.Implicit(bl.CG(rtol=1e-6, max_steps=500), operator=operator),
            throw="ignore",
        )
        sum(p.square().sum() for p in fit.value.values()).backward()
        return fit.adjoint

    assert solve("graph").result is bl.Result.NEGATIVE_CURVATURE
    definite = solve(bl.GaussNewton(outputs, loss, rest))
    assert definite.result is bl.Result.CONVERGED
    assert definite.curvature[0] > 0


@pytest.mark.parametrize(
    "solve",
    [
        lambda x, zero: bl.argmin(lambda y: (y - x).square().sum(), zero).value,
        lambda x, zero: bl.root(lambda y: y - x, zero).value,
        lambda x, zero: bl.fixed_point(lambda y: 0.5 * y + x, zero).value,
        lambda x, zero: bl.least_squares(lambda y: torch.cat([y - x, y**2]), zero + 1).value,
        lambda x, zero: (
            bl.constrained(lambda y: (y - x).square().sum(), lambda y: (y.sum() - 1)[None], zero).value.params
        ),
        lambda x, zero: (
            bl.quadratic_program(
                torch.eye(len(zero)).to(zero), -x, G=-torch.eye(len(zero)).to(zero), h=zero
            ).value.primal
        ),
    ],
    ids=["argmin", "root", "fixed_point", "least_squares", "constrained", "quadratic_program"],
)
def test_a_solve_and_its_backward_pass_leave_no_tensors(solve):
    def run():
        x = torch.randn(8, dtype=torch.float64, requires_grad=True)
        solve(x, torch.zeros(8, dtype=torch.float64)).sum().backward()

    run()  # the first solve is looked at
    with no_tensors_left():
        for _ in range(3):
            run()
