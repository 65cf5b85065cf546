"""Gauss-Newton products against dense Jacobians and Hessians."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

import bilevel as bl
from bilevel.linalg.gauss_newton import GaussNewton
from bilevel.linalg.jacobian import GraphJacobian
from bilevel.problem import Problem
from bilevel.tree import Raveler
from tests.conformance import check_operator, randn, relative_error

TASKS, EXAMPLES = 3, 7
DATA, LABELS = randn(TASKS, EXAMPLES, 4, seed=1), torch.arange(TASKS * EXAMPLES).reshape(TASKS, EXAMPLES) % 3


def one_task():
    return {"w": randn(4, 5, seed=4), "v": randn(5, 3, seed=5)}


def predict(params, x, y):
    return torch.tanh(x @ params["w"]) @ params["v"]


def mean_loss(outputs, x, y):
    return cross_entropy(outputs, y)


def penalty(params, x, y):
    return sum((0.1 * p.square() + 0.01 * p**4).sum() for p in params.values())


def objective(params, x, y):
    return mean_loss(predict(params, x, y), x, y) + penalty(params, x, y)


def dense_truth(params, x, y, with_rest=True):
    """``J^T H J + H_rest`` of one task, formed by `torch.func`."""
    raveler = Raveler(params)
    flat = raveler.ravel(list(params.values()))

    def unflatten(v):
        return raveler.unflatten(raveler.unravel(v))

    jacobian = torch.func.jacrev(lambda v: predict(unflatten(v), x, y).reshape(-1))(flat)
    outputs = predict(params, x, y)
    middle = torch.func.hessian(lambda z: mean_loss(z.view_as(outputs), x, y))(outputs.reshape(-1))
    product = jacobian.mT @ middle @ jacobian
    return product + torch.func.hessian(lambda v: penalty(unflatten(v), x, y))(flat) if with_rest else product


def batched():
    params = {name: torch.stack([leaf, 2 * leaf, -leaf]) for name, leaf in one_task().items()}
    problem = Problem(torch.vmap(objective), params, (DATA, LABELS))
    return problem, problem.linearize(problem.start.y), params


@pytest.mark.parametrize("with_rest", [True, False])
def test_one_problem_conforms_to_the_dense_matrix(with_rest):
    params, args = one_task(), (DATA[0], LABELS[0])
    problem = Problem(objective, params, args)
    operator = GaussNewton(predict, mean_loss, penalty if with_rest else None)(
        problem, problem.linearize(problem.start.y)
    )
    check_operator(operator, dense_truth(params, *args, with_rest))


def test_many_problems_conform_to_their_own_dense_matrices():
    problem, at, params = batched()
    operator = GaussNewton(torch.vmap(predict), torch.vmap(mean_loss), torch.vmap(penalty))(problem, at)
    truth = torch.stack([dense_truth({k: p[t] for k, p in params.items()}, DATA[t], LABELS[t]) for t in range(TASKS)])
    check_operator(operator, truth)


def test_it_is_semi_definite_where_the_hessian_is_not():
    problem, at, _ = batched()
    operator = GaussNewton(torch.vmap(predict), torch.vmap(mean_loss))(problem, at)
    assert torch.linalg.eigvalsh(operator.to_dense()).min() >= -1e-12
    assert torch.linalg.eigvalsh(GraphJacobian(problem.raveler, at, symmetric=True).to_dense()).min() < -1e-3


def test_it_is_the_hessian_of_a_model_that_is_linear_in_its_params():
    x, y = randn(9, 4), randn(9)

    def linear(params, x, y):
        return x @ params

    def squares(outputs, x, y):
        return (outputs - y).square().mean()

    problem = Problem(lambda p, x, y: squares(linear(p, x, y), x, y), randn(4), (x, y))
    at = problem.linearize(problem.start.y)
    assert relative_error(GaussNewton(linear, squares)(problem, at).to_dense(), 2 * x.mT @ x / 9) <= 1e-12


def test_linear_parts_have_no_curvature():
    problem = Problem(lambda p: p.square().sum(), randn(4))
    at = problem.linearize(problem.start.y)
    operator = GaussNewton(lambda p: 2 * p, lambda z: z.sum(), rest=lambda p: p.sum())(problem, at)
    assert not (operator @ randn(4)).any()


def test_a_hypergradient_through_it_is_exact_where_the_model_fits():
    """With residual zero at the solution the term that Gauss-Newton leaves out vanishes."""
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    x = randn(12, 3)
    target = torch.tanh(x @ randn(3, seed=8))

    def outputs(params):
        return torch.tanh(x @ params)

    def loss(z):
        return (z - scale * target / 1.3).square().sum()

    def solve(operator):
        method = bl.Implicit(bl.CG(rtol=1e-12), operator=operator)
        fit = bl.argmin(
            lambda p: loss(outputs(p)), randn(3, seed=8), solver=bl.LBFGS(gtol=1e-12), hypergrad=method, throw="ignore"
        )
        return torch.autograd.grad(fit.value.sum(), scale)[0]

    assert relative_error(solve(GaussNewton(outputs, loss)), solve("graph")) <= 1e-9


def test_wrong_shapes_name_the_argument():
    problem, at, _ = batched()
    with pytest.raises(ValueError, match=r"outputs returned .* 3 problems"):
        GaussNewton(lambda p, x, y: p["w"].sum(0), torch.vmap(mean_loss))(problem, at)
    with pytest.raises(ValueError, match="loss returned"):
        GaussNewton(torch.vmap(predict), lambda z, x, y: z.sum())(problem, at)
    with pytest.raises(ValueError, match="outputs does not depend on the params"):
        GaussNewton(lambda p, x, y: x, torch.vmap(mean_loss))(problem, at)


class TestOfAModule:
    """`GaussNewton.of` against the matrix of outputs, loss and rest that are written out."""

    net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    x, y, weights = DATA[0], LABELS[0], torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)

    def logits(self, params):
        return torch.func.functional_call(self.net, params, (self.x,))

    def penalty(self, params):
        return sum((0.1 * p.square() + 0.01 * p**4).sum() for p in params.values())

    def weighted(self, logits):
        return (self.weights[self.y] * cross_entropy(logits, self.y, reduction="none")).mean()

    def objective(self, params):
        return self.weighted(self.logits(params)) + self.penalty(params)

    def dense(self, operator, objective) -> torch.Tensor:
        problem = Problem(objective, dict(self.net.named_parameters()))
        return operator(problem, problem.linearize(problem.start.y)).to_dense()

    @pytest.mark.parametrize("loss", [cross_entropy, None, lambda z: z], ids=["functional", "none", "own"])
    def test_weights_and_a_penalty_are_found_in_the_objective(self, loss):
        truth = self.dense(GaussNewton(self.logits, self.weighted, self.penalty), self.objective)
        found = self.dense(GaussNewton.of(self.net, loss), self.objective)
        assert relative_error(found, truth) <= 1e-13
        assert torch.linalg.eigvalsh(found)[0] > 0

    def test_a_loss_that_is_a_module(self):
        criterion = torch.nn.CrossEntropyLoss()
        truth = self.dense(
            GaussNewton(self.logits, lambda z: criterion(z, self.y)), lambda p: criterion(self.logits(p), self.y)
        )
        found = self.dense(GaussNewton.of(self.net, criterion), lambda p: criterion(self.logits(p), self.y))
        assert relative_error(found, truth) <= 1e-13
        assert not criterion._forward_pre_hooks

    def test_what_stands_between_module_and_loss_belongs_to_the_model(self):
        """Cut at the loss, the matrix stays positive semi-definite where the module's outputs are bent before it."""

        def bent(params):
            return torch.sin(3 * self.logits(params))

        def objective(params):
            return cross_entropy(input=bent(params), target=self.y)

        truth = self.dense(GaussNewton(bent, lambda z: cross_entropy(z, self.y)), objective)
        at_loss, at_module = (self.dense(GaussNewton.of(self.net, loss), objective) for loss in (cross_entropy, None))
        assert relative_error(at_loss, truth) <= 1e-13
        assert torch.linalg.eigvalsh(at_loss)[0] > -1e-12
        assert torch.linalg.eigvalsh(at_module)[0] < -1e-3

    def test_a_module_that_is_called_twice(self):
        def objective(params):
            other = torch.func.functional_call(self.net, params, (2 * self.x,))
            return self.objective(params) + cross_entropy(other, self.y)

        def both(params):
            return torch.cat([self.logits(params), torch.func.functional_call(self.net, params, (2 * self.x,))])

        def loss(z):
            first, second = z.chunk(2)
            return self.weighted(first) + cross_entropy(second, self.y)

        truth = self.dense(GaussNewton(both, loss, self.penalty), objective)
        assert relative_error(self.dense(GaussNewton.of(self.net, cross_entropy), objective), truth) <= 1e-13

    def test_hypergradients_are_those_of_the_written_out_operator_and_the_module_is_left_as_it_was(self):
        w = self.weights.log().requires_grad_()

        def inner(params):
            fit = (w.exp()[self.y] * cross_entropy(self.logits(params), self.y, reduction="none")).mean()
            return fit + self.penalty(params)

        def slope(operator):
            hypergrad = bl.Implicit(bl.CG(rtol=1e-12), operator=operator)
            fit = bl.argmin(inner, dict(self.net.named_parameters()), hypergrad=hypergrad, throw="ignore")
            (grad,) = torch.autograd.grad(self.logits(fit.value).square().mean(), w)
            return grad

        truth = slope(GaussNewton(self.logits, self.weighted, self.penalty))
        assert relative_error(slope(GaussNewton.of(self.net, cross_entropy)), truth) <= 1e-8
        assert not self.net._forward_hooks

    def test_a_module_that_returns_several_tensors_and_is_given_none_by_position(self):
        class Both(torch.nn.Module):
            def __init__(self, net):
                super().__init__()
                self.net = net

            def forward(self, x):
                logits = self.net(x)
                return logits, logits.square().sum(-1), None

        module = Both(self.net)

        def objective(params):
            logits, sizes, _ = torch.func.functional_call(module, params, (), {"x": self.x})
            return self.weighted(logits) + sizes.mean()

        def outputs(params):
            logits = torch.func.functional_call(module, params, (self.x,))[0]
            return torch.cat([logits, logits.square().sum(-1, keepdim=True)], -1)

        def dense(operator):
            problem = Problem(objective, dict(module.named_parameters()))
            return operator(problem, problem.linearize(problem.start.y)).to_dense()

        truth = dense(GaussNewton(outputs, lambda z: self.weighted(z[:, :-1]) + z[:, -1].mean()))
        assert relative_error(dense(GaussNewton.of(module)), truth) <= 1e-13

    def test_what_cannot_be_cut_is_refused(self):
        other = torch.nn.Linear(4, 3)
        with pytest.raises(ValueError, match="calls neither this module nor this loss"):
            self.dense(GaussNewton.of(other), self.objective)
        with pytest.raises(TypeError, match="module is a dict"):
            GaussNewton.of(dict(self.net.named_parameters()))
        params = bl.stack(dict(self.net.named_parameters()), 2)
        problem = Problem(torch.vmap(self.objective), params)
        at = problem.linearize(problem.start.y)
        with pytest.raises(NotImplementedError, match=r"cannot look into torch\.vmap"):
            GaussNewton.of(self.net)(problem, at)

    def test_it_is_written_in_one_line(self):
        assert repr(GaussNewton.of(self.net, cross_entropy)) == "GaussNewton.of(Sequential(...), cross_entropy)"
        assert GaussNewton.of(self.net) == GaussNewton.of(self.net)


class TestMisstated:
    """The matrix of another objective than the one that was solved gives a wrong hypergradient, and is told."""

    X, Y = randn(30, 4, seed=6), torch.arange(30) % 3

    def solved(self, operator, dtype, **settings):
        x, y = self.X.to(dtype), self.Y
        strength = torch.tensor(0.3, dtype=dtype, requires_grad=True)
        fit = bl.argmin(
            lambda w, x, y: cross_entropy(x @ w, y) + strength * w.square().sum(),
            torch.zeros(4, 3, dtype=dtype),
            x,
            y,
            hypergrad=bl.Implicit(bl.CG(), operator=operator, **settings),
        )
        return torch.autograd.grad(fit.value.square().sum(), strength)[0]

    @staticmethod
    def outputs(w, x, y):
        return x @ w

    @staticmethod
    def ridge(w, x, y):
        return 0.3 * w.square().sum()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_right_ones_are_not_told(self, dtype):
        right = self.solved(GaussNewton(self.outputs, mean_loss, rest=self.ridge), dtype)  # a SolveWarning is an error
        exact = self.solved(lambda problem, at: GraphJacobian(problem.raveler, at, symmetric=True), dtype)
        assert relative_error(right, exact) < (1e-6 if dtype is torch.float64 else 1e-2)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize(
        "operator",
        [
            GaussNewton(outputs, mean_loss),
            GaussNewton(outputs, lambda z, x, y: cross_entropy(z, y, reduction="sum"), rest=ridge),
            GaussNewton(outputs, mean_loss, rest=lambda w, x, y: w.square().sum()),
            bl.EmpiricalFisher(lambda w, x, y: cross_entropy(x @ w, y, reduction="none")),
        ],
    )
    def test_others_are(self, operator, dtype):
        with pytest.warns(bl.SolveWarning, match="belongs to another objective"):
            self.solved(operator, dtype)

    def test_damping_may_stand_for_the_penalty(self):
        right = self.solved(GaussNewton(self.outputs, mean_loss, rest=self.ridge), torch.float64)
        damped = self.solved(GaussNewton(self.outputs, mean_loss), torch.float64, damping=0.6)
        assert relative_error(damped, right) < 1e-10
