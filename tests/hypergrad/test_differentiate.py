"""Derivatives of a solution: every order, both modes, under every transform, towards arguments and captured tensors."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import bilevel as bl
from tests.conformance import Triple, randn, relative_error

EXACT = bl.NewtonCG(gtol=1e-13)
func = torch.func


def quartic(w, h):
    """Stationary where w^3 + h w = 1: the case where TorchOpt's second derivative is 0.0227 for 0.1173."""
    return w.pow(4) / 4 + h * w.square() / 2 - w


def by_argument(h):
    return bl.argmin(quartic, torch.ones((), dtype=h.dtype), h, solver=EXACT, throw="ignore").value


def by_capture(h):
    start = torch.ones((), dtype=h.dtype)
    return bl.argmin(lambda w: quartic(w, h), start, solver=EXACT, throw="ignore").value


def by_root(h):
    return bl.root(lambda w, h: w**3 + h * w - 1, torch.ones((), dtype=h.dtype), h, throw="ignore").value


def exact_derivatives(h):
    """w, w', w'' of w^3 + h w = 1, by the cubic formula and differentiation of the equation."""
    w = max(torch.tensor([x.real for x in torch.linalg.eigvals(companion(h)) if abs(x.imag) < 1e-9]))
    first = -w / (3 * w**2 + h)
    second = -first * (6 * w * first + 2) / (3 * w**2 + h)
    return w.item(), first.item(), second.item()


def companion(h):
    return torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, -h], [0.0, 1.0, 0.0]], dtype=torch.float64)


WAYS = [by_argument, by_capture, by_root]


@pytest.mark.parametrize("solve", WAYS)
@pytest.mark.parametrize("leaf", [True, False])
def test_second_derivative_by_autograd(solve, leaf):
    h = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    used = h if leaf else h * 1.0
    w, first, second = exact_derivatives(1.0)
    value = solve(used)
    (found,) = torch.autograd.grad(value, used, create_graph=True)
    (again,) = torch.autograd.grad(found, used, create_graph=True)
    assert (value.item(), found.item(), again.item()) == pytest.approx((w, first, second), rel=1e-8)
    (third,) = torch.autograd.grad(again, used)
    step = 1e-5
    above, below = (exact_derivatives(1.0 + d)[2] for d in (step, -step))
    assert third.item() == pytest.approx((above - below) / (2 * step), rel=1e-6)


@pytest.mark.parametrize("solve", WAYS)
@pytest.mark.parametrize(
    ("transform", "order"),
    [
        (func.grad, 1),
        (func.jacrev, 1),
        (func.jacfwd, 1),
        (lambda f: lambda h: func.jvp(f, (h,), (torch.ones_like(h),))[1], 1),
        (func.hessian, 2),
        (lambda f: func.jacrev(func.jacrev(f)), 2),
        (lambda f: func.jacrev(func.jacfwd(f)), 2),
        (lambda f: func.grad(func.grad(f)), 2),
    ],
)
def test_transforms(solve, transform, order):
    h = torch.tensor(1.0, dtype=torch.float64)
    assert transform(solve)(h).item() == pytest.approx(exact_derivatives(1.0)[order], rel=1e-8)
    many = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    truth = [exact_derivatives(x.item())[order] for x in many]
    assert torch.vmap(transform(solve))(many).tolist() == pytest.approx(truth, rel=1e-8)


@pytest.mark.parametrize("solve", WAYS)
def test_derivatives_of_a_vmapped_solve(solve):
    h = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, requires_grad=True)

    def total(h):
        return torch.vmap(solve)(h).square().sum()

    truth = [2 * w * first for w, first, _ in map(exact_derivatives, h.tolist())]
    assert func.grad(total)(h.detach()).tolist() == pytest.approx(truth, rel=1e-8)
    assert torch.autograd.grad(total(h), h)[0].tolist() == pytest.approx(truth, rel=1e-8)


def test_vmap_solves_each_problem_to_its_own_tolerance():
    conditions = torch.logspace(0, 4, 5, dtype=torch.float64)

    def solve(condition):
        scales = condition ** torch.linspace(0, 1, 6, dtype=torch.float64)
        fit = bl.argmin(
            lambda y: (scales * (y - 1).square()).sum(), torch.zeros(6, dtype=torch.float64), solver=bl.LBFGS()
        )
        return fit.value, fit.stats["num_steps"], fit.stats["residual_norm"]

    value, steps, residual = torch.vmap(solve)(conditions)
    torch.testing.assert_close(value, torch.ones_like(value))
    assert len(set(steps.tolist())) >= 3
    assert residual.shape == (5,)


def test_nested_vmap_over_batched_problems():
    """vmap over vmap over an objective that is a vector of problems."""
    targets = randn(2, 3, 4, 5)

    def solve(target):
        fit = bl.argmin(lambda y: (y - target).square().sum(-1), torch.zeros(4, 5, dtype=torch.float64))
        return fit.value

    jacobian = torch.vmap(torch.vmap(func.jacrev(lambda t: solve(t).sum(-1))))(targets)
    expected = torch.eye(4, dtype=torch.float64)[:, :, None].expand(2, 3, 4, 4, 5)
    torch.testing.assert_close(jacobian, expected)


def tree_problem(x, decay, hypergrad):
    def inner(params, x, decay):
        fit = (x @ params["w"]).square().mean() + params["w"].exp().sum() + params["c"].pow(4)
        return fit + (decay.exp() * params["w"].square()).sum() + (params["c"] - decay[0]).square()

    init = {"w": torch.zeros(3, dtype=torch.float64), "c": torch.zeros((), dtype=torch.float64)}
    fit = bl.argmin(inner, init, x, decay, solver=EXACT, hypergrad=hypergrad, throw="ignore")
    return fit.value["w"], fit.value["c"]


@pytest.mark.parametrize(
    ("linear", "operator"),
    [
        (bl.CG(rtol=1e-13), "graph"),
        (bl.Cholesky(), "graph"),
        (bl.MINRES(rtol=1e-13), "graph"),
        (bl.CG(rtol=1e-13), "func"),
    ],
    ids=repr,
)
def test_gradgradcheck(linear, operator):
    inputs = (randn(2, 3, seed=1).requires_grad_(), randn(3, seed=2).requires_grad_())

    def solve(x, decay):
        return tree_problem(x, decay, bl.Implicit(linear, operator=operator))

    assert gradcheck(solve, inputs, check_forward_ad=True, rtol=1e-6, atol=1e-8)
    assert gradgradcheck(solve, inputs, check_fwd_over_rev=True, rtol=1e-5, atol=1e-7)


def test_gradgradcheck_batched_non_symmetric_root():
    weight, bias = 0.3 * randn(4, 4, seed=1), randn(3, 4, seed=2)

    def solve(weight, bias):
        residual = lambda z, w, b: z - torch.tanh(z @ w.T + b) + 0.1 * z.pow(3)  # noqa: E731
        start = torch.zeros(3, 4, dtype=torch.float64)
        return bl.root(residual, start, weight, bias, solver=bl.Newton(tol=1e-13), batched=True, throw="ignore").value

    inputs = (weight.requires_grad_(), bias.requires_grad_())
    assert gradcheck(solve, inputs, check_forward_ad=True, rtol=1e-6, atol=1e-8)
    assert gradgradcheck(solve, inputs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("captured", [False, True])
def test_three_levels(captured):
    """z*(y, x) inside the objective of y*(x) inside the outer loss: right to the outermost gradient, and beyond."""

    def outer(x):
        def lowest(z, y, x):
            return (z - y).square().sum() + (x.exp() * z.square()).sum() + z.pow(4).sum()

        def middle(y, x):
            start = torch.zeros(2, dtype=torch.float64)
            if captured:
                z = bl.argmin(lambda z: lowest(z, y, x), start, solver=EXACT, throw="ignore").value
            else:
                z = bl.argmin(lowest, start, y, x, solver=EXACT, throw="ignore").value
            return (y - 1).square().sum() + (z * x).sum().square() + (z * y).sum()

        start = torch.zeros(2, dtype=torch.float64)
        solver = bl.NewtonCG(gtol=1e-12)
        if captured:
            fit = bl.argmin(lambda y: middle(y, x), start, solver=solver, throw="ignore")
        else:
            fit = bl.argmin(middle, start, x, solver=solver, throw="ignore")
        return fit.value.square().sum()

    x = torch.tensor([-0.7, 0.4], dtype=torch.float64, requires_grad=True)
    assert gradcheck(outer, (x,), rtol=1e-6, atol=1e-8)
    (by_autograd,) = torch.autograd.grad(outer(x), x)
    assert relative_error(func.grad(outer)(x.detach()), by_autograd) <= 1e-9


@pytest.mark.parametrize("solve", WAYS)
def test_a_pull_called_without_grad(solve):
    h = torch.tensor(1.0, dtype=torch.float64)
    _, pull = func.vjp(solve, h)
    with torch.no_grad():
        (slope,) = pull(torch.ones((), dtype=torch.float64))
    assert slope.item() == pytest.approx(exact_derivatives(1.0)[1], rel=1e-8)


@pytest.mark.parametrize("solve", WAYS)
def test_a_forward_product_by_two_reverse_passes(solve):
    """The pull of a transform that is left, inside of another one at its level: PyTorch's error was "escaped?"."""
    h = torch.tensor(0.5, dtype=torch.float64)
    one = torch.ones_like(h)

    def push(fn):
        _, pushed = func.vjp(lambda cotangent: func.vjp(fn, h)[1](cotangent)[0], torch.zeros_like(h))
        return [pushed(one)[0], func.vmap(lambda v: pushed(v)[0])(one.expand(2))[1]]

    _, first, second = exact_derivatives(h)
    for fn, exact in ((solve, first), (lambda h: func.vjp(solve, h)[1](one)[0], second)):
        for found in push(fn):
            assert abs(found.item() - exact) <= 1e-9


def test_a_captured_tensor_and_its_ancestor_are_not_counted_twice():
    a = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    b = a * 3
    fit = bl.argmin(lambda y: (y - a * b).square() / 2, torch.zeros((), dtype=torch.float64))
    assert [g.item() for g in torch.autograd.grad(fit.value, (a, b))] == pytest.approx([3 * 0.7 * 2, 0.7])


def test_custom_functions_inside_the_objective():
    """Operands that are arguments, or behind an operation, can be followed; a captured one is an error, never None."""
    x = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    start = torch.zeros(2, dtype=torch.float64)
    for objective, args in (
        (lambda y: (Triple.apply(y) / 3 - Triple.apply(x * 1.0)).square().sum(), ()),
        (lambda y, x: (y - Triple.apply(x)).square().sum(), (x,)),
    ):
        fit = bl.argmin(objective, start, *args)
        assert torch.autograd.grad(fit.value.sum(), x)[0].tolist() == pytest.approx([3.0, 3.0])
    with pytest.raises(ValueError, match=r"depends on a tensor of shape .* cannot be followed"):
        bl.argmin(lambda y: (y - Triple.apply(x)).square().sum(), start)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_tensor_that_cannot_be_reached_is_an_error():
    """Compiled code hides its operands; a silent None would be a wrong hypergradient."""
    hidden = torch.nn.Linear(2, 2, dtype=torch.float64)
    compiled = torch.jit.trace(hidden, torch.zeros(2, dtype=torch.float64))
    start = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"depends on a tensor of shape .* cannot be followed"):
        bl.argmin(lambda y: (compiled(y) - 1).square().sum(), start)
    hidden.requires_grad_(False)
    assert not bl.argmin(lambda y: (compiled(y) - 1).square().sum(), start, throw="ignore").value.requires_grad


def test_forward_mode_through_a_transform_inside_of_the_problem():
    """Its tangents were zero: inside of the transform PyTorch shows no tangent of a captured tensor."""
    start, one = torch.zeros(2, dtype=torch.float64), torch.ones((), dtype=torch.float64)
    centre = torch.tensor([1.0, 2.0], dtype=torch.float64)

    def by_gradient(a):
        return bl.root(func.grad(lambda p: (p - a).square().sum()), start).value

    def of_slopes(a):
        return bl.argmin(lambda y: func.grad(lambda p: (p - a).square().sum())(y).square().sum(), start).value

    def held(a):
        return bl.constrained(lambda p: (p - centre).square().sum(), lambda p: p.sum()[None] - a, start).value.params

    for solve, exact in ((by_gradient, 1.0), (of_slopes, 1.0), (held, 0.5)):
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(solve(forward_ad.make_dual(one, one))).tangent
        assert relative_error(tangent, torch.full_like(start, exact)) <= 1e-8


def test_forward_over_forward_is_refused():
    """PyTorch itself gives 0 for the second derivative of any custom function there."""
    h = torch.tensor(1.0, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match=r"jacfwd of jacfwd.*hessian"):
        func.jacfwd(func.jacfwd(by_argument))(h)


def test_batched_backward_is_refused():
    h = torch.ones(2, dtype=torch.float64, requires_grad=True)
    fit = bl.argmin(lambda y: (y - h).square().sum(), torch.zeros(2, dtype=torch.float64))
    basis = torch.eye(2, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="jacrev"):
        torch.autograd.grad(fit.value, h, basis, is_grads_batched=True)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_a_vectorized_jacobian_is_refused_and_what_serves_is_named(strategy):
    def fitted(h):
        return bl.argmin(lambda y: (y - 3 * h).square().sum(), torch.zeros(2, dtype=torch.float64)).value

    h = torch.ones(2, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match=r"vectorize=True.*torch\.func\.jacrev, torch\.func\.jacfwd"):
        torch.autograd.functional.jacobian(fitted, h, vectorize=True, strategy=strategy)
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(jacobian(fitted)(h), 3 * torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize("name", ["batch_norm", "layer_norm", "group_norm", "decomposed"])
def test_norms_whose_higher_derivatives_are_wrong_in_pytorch_are_refused(name):
    x = randn(8, 4, seed=1)

    def norm(z):
        if name == "batch_norm":
            return torch.nn.functional.batch_norm(z, None, None, training=True)
        if name == "layer_norm":
            return torch.nn.functional.layer_norm(z, (4,))
        if name == "group_norm":
            return torch.nn.functional.group_norm(z, 2)
        var, mean = torch.var_mean(z, 0, correction=0)
        return (z - mean) * (var + 1e-5).rsqrt()

    def solve(h):
        def inner(w, h):
            return (norm(x @ w).tanh().square().mean(0) * torch.arange(4)).sum() + h.exp() * (w - start).square().sum()

        start = 0.5 * randn(4, 4, seed=2)
        return bl.argmin(inner, start, h, solver=bl.NewtonCG(gtol=1e-9), throw="ignore").value.square().sum()

    h = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    step = 1e-4
    if name == "batch_norm":
        for ask in (lambda: func.grad(solve)(h.detach()), lambda: torch.autograd.grad(solve(h), h, create_graph=True)):
            with pytest.raises(NotImplementedError, match="fused NativeBatchNorm"):
                ask()
        return
    (first,) = torch.autograd.grad(solve(h), h, create_graph=True)
    assert func.grad(solve)(h.detach()).item() == pytest.approx(first.item(), rel=1e-6)
    if name == "layer_norm":
        with pytest.raises(NotImplementedError, match="layer_norm"):
            torch.autograd.grad(first, h)
        return
    (second,) = torch.autograd.grad(first, h)
    above, below = (
        torch.autograd.grad(solve(p), p)[0]
        for p in (torch.tensor(3.0 + d, dtype=torch.float64, requires_grad=True) for d in (step, -step))
    )
    assert second.item() == pytest.approx(((above - below) / (2 * step)).item(), rel=1e-4)


def test_a_layer_in_a_module_trains():
    """A differentiable least-squares layer between two linear ones: gradcheck towards all parameters."""

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = torch.nn.Linear(3, 4).double(), torch.nn.Linear(4, 2).double()
            self.log_decay = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))

        def forward(self, x):
            z = self.first(x)
            fit = bl.argmin(
                lambda y: (y - z).square().sum(-1) + (self.log_decay.exp() * y.square()).sum(-1),
                torch.zeros_like(z),
                solver=bl.LBFGS(gtol=1e-12),
                hypergrad=bl.Implicit(bl.CG(rtol=1e-13)),
                throw="ignore",
            )
            return self.last(fit.value)

    torch.manual_seed(0)
    layer, x = Layer(), randn(5, 3)
    names, params = zip(*layer.named_parameters(), strict=True)

    def run(*params):
        return func.functional_call(layer, dict(zip(names, params, strict=True)), (x,))

    assert gradcheck(run, params, rtol=1e-6, atol=1e-8)
    layer(x).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in params)
    clone = torch.nn.ModuleList([layer]).state_dict()
    assert len(clone) == 5


@pytest.mark.parametrize("operator", ["graph", "func"])
def test_autocast(operator):
    """Products that are recomputed outside of the autocast region are those of the function inside it."""
    torch.manual_seed(0)
    net, x = torch.nn.Linear(4, 4), torch.randn(64, 4)
    log_decay = torch.tensor(-1.0, requires_grad=True)

    def inner(params):
        out = func.functional_call(net, params, (x,))
        return out.float().square().mean() + log_decay.exp() * sum((p - 1).square().sum() for p in params.values())

    def hypergradient(dtype, create_graph=False):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            solver, hypergrad = bl.GradientDescent(0.3, 200), bl.Implicit(bl.CG(rtol=1e-2), operator=operator)
            fit = bl.argmin(inner, dict(net.named_parameters()), solver=solver, hypergrad=hypergrad, throw="ignore")
            loss = sum(p.square().sum() for p in fit.value.values())
        assert all(p.dtype is torch.float32 for p in fit.value.values())
        (grad,) = torch.autograd.grad(loss, log_decay, create_graph=create_graph)
        return grad.item()

    # bfloat16 has eight bits: products are right to about a percent.
    assert hypergradient(torch.bfloat16) == pytest.approx(hypergradient(torch.float32), rel=0.05)
    assert hypergradient(torch.bfloat16, create_graph=True) == pytest.approx(hypergradient(torch.float32), rel=0.05)


def test_stats_under_grad_and_the_adjoint():
    record = {}

    def loss(h):
        fit = bl.argmin(quartic, torch.ones((), dtype=torch.float64), h, solver=EXACT, throw="ignore")
        record["fit"] = fit
        return fit.value

    func.grad(loss)(torch.tensor(1.0, dtype=torch.float64))
    assert record["fit"].stats["num_steps"] > 0
    assert record["fit"].adjoint.result is bl.Result.CONVERGED


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu():
    problem = bl.problems.Ridge(per_feature=True)
    a_train, b_train = problem.a_train.cuda(), problem.b_train.cuda()
    x = problem.hparams.cuda().requires_grad_()

    def inner(w):
        return (a_train @ w - b_train).square().mean() / 2 + (x.exp() * w.square()).sum() / 2

    fit = bl.argmin(inner, problem.init.cuda(), solver=EXACT, throw="ignore")
    loss = (problem.a_val.cuda() @ fit.value - problem.b_val.cuda()).square().mean() / 2
    (grad,) = torch.autograd.grad(loss, x)
    assert relative_error(grad.cpu(), problem.hypergradient(problem.hparams)) <= 1e-9


@pytest.mark.parametrize("solve", [bl.argmin, bl.root], ids=lambda solve: solve.__name__)
def test_a_vmap_over_starts_without_hyperparameters_says_nothing(solve, recwarn):
    def function(y):
        return (y - 1) ** 2 if solve is bl.argmin else (y - 1) ** 3 + y - 1

    starts = torch.tensor([0.5, -0.5], dtype=torch.float64)
    found = torch.vmap(lambda start: solve(function, start).value)(starts)
    torch.testing.assert_close(found, torch.ones_like(starts))
    assert not recwarn.list
