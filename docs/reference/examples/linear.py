import torch

import bilevel as bl

# %% CG MINRES Cholesky Nystrom LinearSolver:
problem = bl.problems.Ridge(per_feature=True)
x = problem.hparams.clone().requires_grad_()
for linear in (bl.CG(rtol=1e-10), bl.MINRES(rtol=1e-10), bl.Cholesky(), bl.Nystrom(rank=10, damping=1e-8)):
    fit = bl.argmin(problem.inner, problem.init, x, hypergrad=bl.Implicit(linear))
    (found,) = torch.autograd.grad(problem.outer(fit.value, x), x)
    torch.testing.assert_close(found, problem.hypergradient(x), rtol=1e-5, atol=1e-8)

# %% GMRES BiCGSTAB LSMR NormalCG LU:
problem = bl.problems.NonSymmetricRoot()
x = problem.hparams.clone().requires_grad_()
for linear in (bl.GMRES(), bl.BiCGSTAB(), bl.LSMR(), bl.NormalCG(), bl.LU()):
    fit = bl.root(problem.inner, problem.init, x, hypergrad=bl.Implicit(linear))
    (found,) = torch.autograd.grad(problem.outer(fit.value, x), x)
    torch.testing.assert_close(found, problem.hypergradient(x), rtol=1e-4, atol=1e-7)

# %% Neumann:
problem = bl.problems.LinearFixedPoint()
x = problem.hparams.clone().requires_grad_()
fit = bl.fixed_point(problem.inner, problem.init, x, hypergrad=bl.Implicit(bl.Neumann(alpha=1.0, rtol=1e-9)))
(found,) = torch.autograd.grad(problem.outer(fit.value, x), x)
torch.testing.assert_close(found, problem.hypergradient(x), rtol=1e-5, atol=1e-8)

# %% LeastNorm:
matrix = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)  # singular
solved = bl.LeastNorm().solve(bl.extending.Dense(matrix), torch.tensor([2.0, 2.0], dtype=torch.float64))
torch.testing.assert_close(solved.value, torch.ones(2, dtype=torch.float64))  # of all solutions the shortest

# %% Jacobi NystromPreconditioner InversePreconditioner extending.Dense:
torch.manual_seed(0)
diagonal = torch.logspace(0, 4, 50, dtype=torch.float64)  # curvatures that lie far apart
operator, b = bl.extending.Dense(torch.diag(diagonal)), torch.ones(50, dtype=torch.float64)
plain = bl.CG(rtol=1e-8).solve(operator, b)
for preconditioner in (
    bl.Jacobi(),
    bl.NystromPreconditioner(rank=30),
    bl.InversePreconditioner(torch.diag(1 / diagonal)),
):
    solved = bl.CG(rtol=1e-8, preconditioner=preconditioner).solve(operator, b)
    torch.testing.assert_close(solved.value, 1 / diagonal, rtol=1e-5, atol=1e-8)
    assert solved.stats["num_steps"] < plain.stats["num_steps"]

# %% AdamPreconditioner:
scales = torch.logspace(0, 2, 10, dtype=torch.float64)
x = torch.ones(10, dtype=torch.float64, requires_grad=True)
second_moment = scales.square()  # such as fit.state.rule["exp_avg_sq"] of a fit by Adam
linear = bl.CG(rtol=1e-9, preconditioner=bl.AdamPreconditioner(second_moment))
fit = bl.argmin(lambda y: (scales * (y - x).square()).sum(), x.detach(), hypergrad=bl.Implicit(linear))
fit.value.sum().backward()
torch.testing.assert_close(x.grad, torch.ones(10, dtype=torch.float64))
assert fit.adjoint.stats["num_steps"] <= 2

# %% GaussNewton EmpiricalFisher:
torch.manual_seed(0)
features, labels = torch.randn(50, 4, dtype=torch.float64), torch.randint(0, 3, (50,))
x = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)


def outputs(weights):
    return features @ weights


def loss(logits):
    return torch.nn.functional.cross_entropy(logits, labels)


def penalty(weights):
    return x * weights.square().sum()


start, found = torch.zeros(4, 3, dtype=torch.float64), {}
for name, operator in {
    "Hessian": "graph",
    "Gauss-Newton": bl.GaussNewton(outputs, loss, rest=penalty),
    "Fisher": bl.EmpiricalFisher(
        lambda weights: torch.nn.functional.cross_entropy(outputs(weights), labels, reduction="none"), rest=penalty
    ),
}.items():
    fit = bl.argmin(lambda w: loss(outputs(w)) + penalty(w), start, hypergrad=bl.Implicit(operator=operator))
    (found[name],) = torch.autograd.grad(loss(outputs(fit.value)), x)
torch.testing.assert_close(found["Gauss-Newton"], found["Hessian"])  # logits that are linear in the params: the same
assert 0.5 < found["Fisher"] / found["Hessian"] < 2

# %% ScipyOperator:
import scipy.sparse

operator = bl.ScipyOperator(scipy.sparse.diags([1.0, 2.0, 4.0]), symmetric=True)
solved = bl.CG().solve(operator, torch.ones(3, dtype=torch.float64))
torch.testing.assert_close(solved.value, torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64))


# %% CurvlinopsOperator:
class Linear:  # what curvlinops gives: a linear operator of PyTorch with a shape and ``@``
    shape, dtype, device, SELF_ADJOINT = (2, 2), torch.float64, torch.device("cpu"), True

    def __matmul__(self, v):
        return torch.tensor([1.0, 4.0], dtype=v.dtype) * v


solved = bl.CG().solve(bl.CurvlinopsOperator(Linear()), torch.ones(2, dtype=torch.float64))
torch.testing.assert_close(solved.value, torch.tensor([1.0, 0.25], dtype=torch.float64))


# %% Operator:
class Diagonal(bl.Operator):
    def __init__(self, diagonal):
        super().__init__(diagonal.shape[:-1], diagonal.shape[-1], diagonal.dtype, diagonal.device, symmetric=True)
        self.diagonal = diagonal

    def matvec(self, v):
        return self.diagonal * v


operator = Diagonal(torch.tensor([[1.0, 2.0], [4.0, 8.0]], dtype=torch.float64))  # two problems
solved = bl.CG(rtol=1e-10).solve(operator, torch.ones(2, 2, dtype=torch.float64))
torch.testing.assert_close(solved.value, 1 / operator.diagonal)

# %% compat.solve_cg compat.solve_normal_cg compat.solve_gmres compat.solve_bicgstab compat.solve_lu:
# %% compat.solve_cholesky:
matrix, b = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64), torch.ones(2, dtype=torch.float64)
for solve in (
    *(bl.compat.solve_cg, bl.compat.solve_normal_cg, bl.compat.solve_gmres, bl.compat.solve_bicgstab),
    *(bl.compat.solve_lu, bl.compat.solve_cholesky),
):
    torch.testing.assert_close(solve(lambda v: matrix @ v, b), torch.linalg.solve(matrix, b), rtol=1e-4, atol=1e-6)

# %% ScipyGMRES ScipyBiCGSTAB:
x = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
for solver in (bl.ScipyGMRES(), bl.ScipyBiCGSTAB()):
    fit = bl.root(lambda y: y**3 - x, torch.ones(2, dtype=torch.float64), hypergrad=bl.Implicit(solver))
    (slope,) = torch.autograd.grad(fit.value[0], x)
    torch.testing.assert_close(slope, x.detach() ** (-2 / 3) / 3)

# %% Equilibrated:
scales = torch.tensor([1e-6, 1.0, 1e6], dtype=torch.float64)
x = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
hypergrad = bl.Implicit(bl.Equilibrated(bl.Cholesky()))
start = torch.zeros(3, dtype=torch.float64)
fit = bl.argmin(lambda y: (scales * y - x).square().sum(), start, solver=bl.NewtonCG(), hypergrad=hypergrad)
(slope,) = torch.autograd.grad((scales * fit.value).sum(), x)
torch.testing.assert_close(slope, torch.tensor(3.0, dtype=torch.float64))
