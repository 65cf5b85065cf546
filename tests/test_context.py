"""PyTorch as people use it: attention, inference mode, compiled objectives and compiled code around a solve."""

from __future__ import annotations

import inspect
import threading

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import bilevel as bl
from bilevel.context import EVALUATING, UNCOMPILED
from tests.conformance import randn, relative_error

F64 = torch.float64
DESCENT = bl.GradientDescent(0.15, 120)


def settings():
    backends = torch.backends.cuda
    return (
        backends.flash_sdp_enabled(),
        backends.mem_efficient_sdp_enabled(),
        backends.cudnn_sdp_enabled(),
        backends.math_sdp_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
        torch.nn.utils.stateless._reparametrize_module,
    )


def test_settings_hold_while_anyone_is_inside_and_are_put_back():
    before, seen = settings(), []
    with EVALUATING:
        inside = settings()
        with pytest.raises(RuntimeError), EVALUATING:
            raise RuntimeError
        seen.append(settings() == inside)
        thread = threading.Thread(target=lambda: EVALUATING.__enter__())
        thread.start()
        thread.join()
    seen.append(settings() == inside)
    EVALUATING.__exit__()
    assert seen == [True, True]
    assert inside[:5] == (False, False, False, True, False)
    assert settings() == before


class Attention(nn.Module):
    """One head, by hand."""

    def __init__(self):
        super().__init__()
        self.query, self.out = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.out(F.scaled_dot_product_attention(self.query(x), self.query(x), x))


class MultiHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.heads(x, x, x, need_weights=False)[0]


def transformer():
    # gelu: a kink of relu would move under the differences
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True, activation="gelu")
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def attention_problem(make, train):
    torch.manual_seed(0)
    net = make().double().train(train)
    start = {name: p.detach() for name, p in net.named_parameters()}
    x = randn(3, 5, 4)

    def inner(params, decay):
        penalty = sum((p - 0.1).square().sum() for p in params.values())
        return 0.3 * functional_call(net, params, (x,)).sin().mean() + decay**2 * penalty

    def outer(decay, hypergrad, solver=DESCENT):
        fit = bl.argmin(inner, start, decay, solver=solver, hypergrad=hypergrad)
        return sum(p.pow(3).sum() for p in fit.value.values())

    at = torch.tensor(1.5, dtype=F64)
    with torch.no_grad():
        difference = (outer(at + 1e-4, None) - outer(at - 1e-4, None)) / 2e-4
    return outer, at, difference


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("make", [Attention, MultiHead, transformer])
def test_attention_is_differentiated_twice(make, train):
    """PyTorch's fused kernels have no second derivative, and the fast path of modules in eval mode has none at all."""
    outer, at, difference = attention_problem(make, train)
    x = at.clone().requires_grad_()
    methods = [bl.Implicit(), bl.Implicit(operator="func"), bl.Unroll()]
    for hypergrad in methods[: 3 if make is not transformer else 2]:
        (grad,) = torch.autograd.grad(outer(x, hypergrad), x)
        assert relative_error(grad, difference) < 1e-5, hypergrad
    assert relative_error(torch.func.grad(lambda d: outer(d, bl.Implicit()))(at), difference) < 1e-5


def test_attention_in_newton_gauss_newton_forward_mode_and_second_derivatives():
    outer, at, difference = attention_problem(Attention, True)
    x = at.clone().requires_grad_()
    few = bl.GradientDescent(0.15, 20)
    for hypergrad, solver, tolerance in (
        (bl.Implicit(), bl.NewtonCG(operator="func"), 1e-5),
        (bl.Unroll(checkpoint=True), few, 1e-3),
        (bl.ForwardMode(), few, 1e-3),
        (bl.Penalty(), bl.NewtonCG(), 1e-3),
    ):
        (grad,) = torch.autograd.grad(outer(x, hypergrad, solver), x)
        assert relative_error(grad, difference) < tolerance, hypergrad
    newton = bl.NewtonCG(gtol=1e-12)
    (grad,) = torch.autograd.grad(outer(x, bl.Implicit(), newton), x, create_graph=True)
    (second,) = torch.autograd.grad(grad, x)
    ahead, behind = (torch.func.grad(lambda d: outer(d, bl.Implicit(), newton))(at + h) for h in (1e-5, -1e-5))
    assert relative_error(second, (ahead - behind) / 2e-5) < 1e-4


def test_a_transformer_learns_the_weights_of_its_examples():
    """A step of the kind of the reweighting application: hyperparameters are the logits of the training examples."""
    torch.manual_seed(0)
    net = transformer().double()
    head = nn.Linear(4, 2).double()
    x, y = randn(6, 5, 4, seed=1), torch.tensor([0, 0, 1, 0, 1, 0])
    x_val, y_val = randn(4, 5, 4, seed=2), torch.arange(4) % 2
    model = nn.Sequential(net, head)
    start = {name: p.detach() for name, p in model.named_parameters()}

    def losses(params, x, y):
        return F.cross_entropy(functional_call(model, params, (x,)).mean(1), y, reduction="none")

    def outer(logits, hypergrad):
        def inner(params):
            decay = sum((p - start[name]).square().sum() for name, p in params.items())
            return logits.softmax(0) @ losses(params, x, y) + 2 * decay

        fit = bl.argmin(inner, start, solver=bl.GradientDescent(0.2, 60), hypergrad=hypergrad)
        return losses(fit.value, x_val, y_val).mean()

    logits = torch.zeros(6, dtype=F64, requires_grad=True)
    (grad,) = torch.autograd.grad(outer(logits, bl.Implicit(bl.CG(rtol=1e-9))), logits)
    along = randn(6, seed=3)
    with torch.no_grad():
        difference = (outer(logits + 1e-4 * along, None) - outer(logits - 1e-4 * along, None)) / 2e-4
    assert relative_error(grad @ along, difference) < 1e-4


# Inference mode.


@pytest.fixture(scope="module")
def frozen():
    """A ridge problem whose data were made under inference mode, and its solution as a function of the penalty."""
    with torch.inference_mode():
        a, b, init = randn(6, 3, seed=1), randn(6, seed=2), torch.zeros(3, dtype=F64)
    x, y = a.clone(), b.clone()
    return a, b, init, lambda decay: torch.linalg.solve(x.T @ x + decay * torch.eye(3, dtype=F64), x.T @ y)


@pytest.mark.parametrize(
    ("hypergrad", "solver"),
    [
        (bl.Implicit(), bl.NewtonCG(gtol=1e-12)),
        (bl.Implicit(operator="func"), bl.LBFGS()),
        (bl.Unroll(), bl.GradientDescent(0.03, 300)),
        (bl.ForwardMode(), bl.GradientDescent(0.03, 300)),
        (bl.Penalty(), bl.LBFGS()),
        (bl.Implicit(), bl.ScipyMinimize("BFGS")),
    ],
    ids=repr,
)
def test_tensors_of_inference_mode_are_data_like_others(frozen, hypergrad, solver):
    a, b, init, exact = frozen
    decay = torch.tensor(0.7, dtype=F64, requires_grad=True)

    def captured(p):
        return (a @ p - b).square().sum() + decay * p.square().sum()

    def passed(p, a, b):
        return (a @ p - b).square().sum() + decay * p.square().sum()

    (truth,) = torch.autograd.grad(exact(decay).square().sum(), decay)
    for objective, args in ((captured, ()), (passed, (a, b))):
        fit = bl.argmin(objective, init, *args, solver=solver, hypergrad=hypergrad)
        (grad,) = torch.autograd.grad(fit.value.square().sum(), decay)
        assert relative_error(grad, truth) < 1e-6
        with torch.inference_mode():
            fit = bl.argmin(objective, init, *args, solver=solver, hypergrad=hypergrad)
            assert torch.is_inference_mode_enabled()
        assert not fit.value.requires_grad
        assert relative_error(fit.value, exact(decay.detach())) < 1e-6


def test_second_derivatives_with_tensors_of_inference_mode(frozen):
    a, b, init, _ = frozen

    def solve(decay):
        def objective(p):
            return (a @ p - b).square().sum() + decay * p.square().sum()

        return bl.argmin(objective, init, solver=bl.NewtonCG(gtol=1e-12)).value

    assert torch.autograd.gradgradcheck(solve, (torch.tensor(0.7, dtype=F64, requires_grad=True),))


def test_all_solves_under_inference_mode(frozen):
    a, b, init, exact = frozen
    with torch.inference_mode():
        net = nn.Linear(3, 1).double()
        roots = bl.root(lambda z: z**3 - a[0].abs(), torch.ones(3, dtype=F64))
        fixed = bl.fixed_point(lambda z: torch.tanh(0.1 * z + 0.1 * net(z)), init)
        program = bl.quadratic_program(torch.eye(3, dtype=F64), a[0], G=torch.eye(3, dtype=F64), h=b[:3].abs())
        lasso = bl.argmin(lambda p: (a @ p - b).square().sum(), init, solver=bl.ProximalGradient(bl.prox.L1(0.1)))
        adam = bl.TorchOptim(torch.optim.Adam, lr=0.1, max_steps=2000)
        ridge = bl.argmin(lambda p: (a @ p - b).square().sum() + p.square().sum(), init, solver=adam)
        many = bl.argmin(
            torch.vmap(lambda p, b: (a @ p - b).square().sum() + p.square().sum()),
            bl.stack(init, 2),
            torch.stack([b, 2 * b]),
        )
    assert all(fit.result.ok for fit in (roots, fixed, program, lasso))
    assert relative_error(roots.value, a[0].clone().abs() ** (1 / 3)) < 1e-8
    assert relative_error(program.value.primal, torch.minimum(-a[0].clone(), b[:3].clone().abs())) < 1e-7
    assert relative_error(ridge.value, exact(1.0)) < 1e-6
    assert relative_error(many.value, torch.stack([exact(1.0), 2 * exact(1.0)])) < 1e-6


# Compiled code.


@pytest.fixture
def compiled_ridge():
    torch.compiler.reset()
    a, b = randn(6, 3, seed=1), randn(6, seed=2)
    x = torch.tensor(0.5, dtype=F64, requires_grad=True)

    def ridge(p, x):
        return (a @ p - b).square().sum() + x * p.square().sum()

    exact = torch.linalg.solve(a.T @ a + x * torch.eye(3, dtype=F64), a.T @ b)
    (truth,) = torch.autograd.grad(exact.square().sum(), x)
    return torch.compile(ridge, backend="aot_eager"), x, truth


@pytest.mark.parametrize(
    ("hypergrad", "solver"),
    [
        (bl.Implicit(), None),
        (bl.Implicit(operator="func"), bl.NewtonCG()),
        (bl.Unroll(), bl.GradientDescent(0.03, 300)),
        (bl.Unroll(checkpoint=True), bl.GradientDescent(0.03, 300)),
        (bl.ForwardMode(), bl.GradientDescent(0.03, 300)),
        (bl.Penalty(), None),
    ],
    ids=repr,
)
def test_compiled_objectives(compiled_ridge, hypergrad, solver):
    objective, x, truth = compiled_ridge
    init = torch.zeros(3, dtype=F64)
    for run in (
        lambda: bl.argmin(objective, init, x, solver=solver, hypergrad=hypergrad),
        lambda: bl.argmin(lambda p: objective(p, x), init, solver=solver, hypergrad=hypergrad),
    ):
        (grad,) = torch.autograd.grad(run().value.square().sum(), x)
        assert relative_error(grad, truth) < 1e-5


def test_compiled_objectives_have_second_derivatives_and_transforms(compiled_ridge):
    objective, x, truth = compiled_ridge

    def outer(x):
        return bl.argmin(objective, torch.zeros(3, dtype=F64), x, solver=bl.NewtonCG(gtol=1e-12)).value.square().sum()

    assert torch.autograd.gradgradcheck(outer, (x,))
    assert relative_error(torch.func.grad(outer)(x.detach()), truth) < 1e-8
    assert relative_error(torch.vmap(torch.func.grad(outer))(x.detach().expand(2)), truth.expand(2)) < 1e-8


def test_a_compiled_module_in_a_functional_call():
    torch.compiler.reset()
    net = nn.Linear(3, 1).double()
    compiled, data = torch.compile(net, backend="aot_eager"), randn(8, 3, seed=1)
    decay = torch.tensor(0.5, dtype=F64, requires_grad=True)

    def run(net):
        def inner(p):
            penalty = sum(v.square().sum() for v in p.values())
            return (functional_call(net, p, (data,)) - 1).square().mean() + decay * penalty

        fit = bl.argmin(inner, {name: torch.zeros_like(p) for name, p in net.named_parameters()})
        return torch.autograd.grad(sum(v.sum() for v in fit.value.values()), decay)[0]

    assert relative_error(run(compiled), run(net)) < 1e-9


def test_compiled_code_around_a_solve():
    torch.compiler.reset()
    weight, data = (0.1 * randn(5, 5, seed=1)).requires_grad_(), randn(4, 5, seed=2)

    def layer(x):
        y = 2 * x
        fit = bl.fixed_point(lambda z: torch.tanh(z @ weight + y), torch.zeros_like(y), batched=True)
        ridge = bl.argmin(
            lambda p: (data @ p - 1).square().sum() + weight.square().sum() * p.square().sum(), data[0] * 0
        )
        program = bl.quadratic_program(torch.eye(5, dtype=F64), x[0], G=torch.eye(5, dtype=F64), h=x[1].abs())
        return 3 * fit.value + ridge.value + program.value.primal

    compiled = torch.compile(layer, backend="eager")
    for _ in range(2):
        (expected,) = torch.autograd.grad(layer(data).square().sum(), weight)
        (grad,) = torch.autograd.grad(compiled(data).square().sum(), weight)
        assert relative_error(grad, expected) < 1e-8


def test_compiled_functions_are_compiled_again_after_a_solve():
    torch.compiler.reset()
    counts = []

    def backend(graph, inputs):
        counts.append(1)
        return graph.forward

    compiled = torch.compile(lambda y: (y - 1).square().sum(), backend=backend)
    with UNCOMPILED:
        compiled(torch.ones(3))
    assert counts == []
    compiled(torch.ones(3))
    assert counts == [1]


@pytest.mark.parametrize("entry", [bl.argmin, bl.root, bl.fixed_point, bl.quadratic_program], ids=lambda f: f.__name__)
def test_entry_points_keep_their_signature_and_docstring(entry):
    parameters = inspect.signature(entry).parameters
    assert {"throw", "hypergrad"} <= set(parameters)
    assert entry.__doc__
    assert entry.__name__ in ("argmin", "root", "fixed_point", "quadratic_program")


def test_compiled_code_around_many_tasks():
    torch.compiler.reset()
    weight = torch.ones((), requires_grad=True)

    def mean(x):
        return 2 * bl.mean_over_tasks(lambda p, x: (x.sum(-1) * p, None), weight, 3 * x)[0]

    compiled = torch.compile(mean, backend="eager")
    assert torch.autograd.grad(compiled(torch.ones(4, 3)), weight)[0].item() == 18.0


def test_the_backward_pass_of_a_solve_inside_of_a_compiled_step_is_not_compiled():
    torch.compiler.reset()
    compiled = []

    def backend(graph, inputs):
        compiled.extend(str(node.meta.get("stack_trace", "")) for node in graph.graph.nodes)
        return graph.forward

    x = torch.ones(3, requires_grad=True)

    def step(x):
        fit = bl.argmin(lambda y: (y - x).square().sum() + y.square().sum(), torch.zeros(3))
        loss = (2 * fit.value).sum()
        loss.backward()
        return loss.detach()

    assert torch.compile(step, backend=backend)(x).item() == pytest.approx(3.0, rel=1e-5)
    torch.testing.assert_close(x.grad, torch.ones(3))
    assert compiled
    assert not any("bilevel/linalg" in trace or "bilevel/hypergrad" in trace for trace in compiled)
