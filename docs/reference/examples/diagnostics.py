import torch

import bilevel as bl

# %% diagnostics diagnostics.BilevelProblem diagnostics.Bilevel diagnostics.solve:
problem = bl.diagnostics.BilevelProblem(
    inner=lambda y, x: (y - 3).square().sum() + x.exp() * y.square().sum(),
    outer=lambda y, x: (y - 1).square().sum(),
    init=torch.zeros(2, dtype=torch.float64),
    hparams=torch.tensor(0.0, dtype=torch.float64),
)
fit = bl.diagnostics.solve(problem)
torch.testing.assert_close(fit.value, torch.full((2,), 1.5, dtype=torch.float64))

# %% diagnostics.hypergradient diagnostics.Constants:
problem = bl.problems.Ridge(per_feature=True)
checked = bl.diagnostics.hypergradient(problem, solver=bl.LBFGS(gtol=1e-2), throw="ignore")
true_error = (checked.value - problem.hypergradient(problem.hparams)).norm()
assert true_error / 3 < checked.stats["error"] < 3 * true_error

# %% diagnostics.check_hypergradient diagnostics.HypergradientCheck diagnostics.HypergradientError:
problem = bl.problems.Ridge(per_feature=True)
check = bl.diagnostics.check_hypergradient(problem)
assert check.ok
try:
    bl.diagnostics.check_hypergradient(problem, hypergrad=bl.OneStep(0.1))
except bl.diagnostics.HypergradientError as error:
    print(error)

# %% diagnostics.advise diagnostics.Advice diagnostics.Spectrum:
advice = bl.diagnostics.advise(bl.problems.Ridge(per_feature=True))
print(advice)  # with what was measured, and why
assert isinstance(advice.hypergrad, bl.Implicit)

# %% diagnostics.compare_methods diagnostics.Comparison:
problem = bl.problems.Ridge(per_feature=True)
methods = {"CG": bl.Implicit(bl.CG(rtol=1e-8)), "one step": bl.OneStep(0.3)}
comparison = bl.diagnostics.compare_methods(problem, methods, repeats=1)
print(comparison)
assert comparison.rows[0].error < 1e-6

# %% diagnostics.methods_for diagnostics.all_methods diagnostics.Method diagnostics.accurate_solver:
problem = bl.problems.Saddle()
names = [method.name for method in bl.diagnostics.methods_for(problem)]
assert "implicit, MINRES" in names
assert "implicit, CG" not in names  # not for indefinite systems
assert len(names) < len(bl.diagnostics.all_methods())
solver = bl.diagnostics.accurate_solver(problem)  # None: the default will do

# %% problems problems.Ridge problems.WeightedRidge problems.KernelRidge problems.Logistic problems.Quadratics:
for problem in (
    bl.problems.Ridge(per_feature=True),
    bl.problems.WeightedRidge(),
    bl.problems.KernelRidge(),
    bl.problems.Logistic(),
    bl.problems.Quadratics(conditions=(1.0, 10.0)),
):
    x = problem.hparams.clone().requires_grad_()
    fit = bl.argmin(problem.inner, problem.init, x)
    (found,) = torch.autograd.grad(problem.outer(fit.value, x), x)
    torch.testing.assert_close(found, problem.hypergradient(x), rtol=1e-5, atol=1e-8)

# %% problems.BilevelTestProblem problems.ClosedFormProblem problems.NewtonProblem problems.collection:
for name, problem in bl.problems.collection().items():
    residual = problem.residual(problem.solution(problem.hparams), problem.hparams)
    if problem.kind in ("argmin", "root", "fixed_point"):
        assert residual.abs().max() < 1e-8, name

# %% problems.Saddle problems.Singular:
saddle, singular = bl.problems.Saddle(), bl.problems.Singular()  # one is no minimum, the other not the only one
hypergrad = bl.Implicit(bl.MINRES())
for problem in (saddle, singular):
    x = problem.hparams.clone().requires_grad_()
    if problem is saddle:
        fit = bl.root(problem.inner, problem.init, x, symmetric=True, hypergrad=hypergrad)
    else:
        fit = bl.argmin(problem.inner, problem.init, x, hypergrad=hypergrad)
    (found,) = torch.autograd.grad(problem.outer(fit.value, x), x)
    torch.testing.assert_close(found, problem.hypergradient(x), rtol=1e-5, atol=1e-8)

# %% problems.LinearFixedPoint problems.NonSymmetricRoot:
for solve, problem in (
    (bl.fixed_point, bl.problems.LinearFixedPoint()),
    (bl.root, bl.problems.NonSymmetricRoot()),
):
    x = problem.hparams.clone().requires_grad_()
    fit = solve(problem.inner, problem.init, x)
    (found,) = torch.autograd.grad(problem.outer(fit.value, x), x)
    torch.testing.assert_close(found, problem.hypergradient(x), rtol=1e-5, atol=1e-8)

# %% problems.LassoPath problems.Portfolio:
for problem in (bl.problems.LassoPath(), bl.problems.Portfolio()):
    x = problem.hparams.clone().requires_grad_()
    fit = problem.solve_inner(x)
    torch.testing.assert_close(fit.value, problem.solution(problem.hparams), rtol=1e-5, atol=1e-6)

# %% problems.hard problems.Known problems.Scaled problems.in_double:
for name, problem in bl.problems.hard(torch.float64).items():
    residual = problem.residual(problem.solution(problem.hparams), problem.hparams)
    print(name, residual.norm().item())

# %% problems.finite_sums:
print(bl.problems.finite_sums.__doc__)

# %% nn nn.linear nn.matmul:
x, weight = torch.randn(20, 8), torch.randn(3, 8)
torch.testing.assert_close(bl.nn.linear(x, weight), torch.nn.functional.linear(x, weight))
torch.testing.assert_close(bl.nn.matmul(x, weight.T), x @ weight.T)

# %% nn.conv2d nn.Conv2d nn.KernelName nn.choose_kernels:
x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
layer = bl.nn.Conv2d(3, 5, 3, padding=1).double()
expected = torch.nn.functional.conv2d(x, layer.weight, layer.bias, padding=1)
torch.testing.assert_close(layer(x), expected)
torch.testing.assert_close(bl.nn.conv2d(x, layer.weight, layer.bias, padding=1), expected)

# %% nn.batch_norm nn.convolution_statistics:
x, weight, bias = torch.randn(4, 5, 6, 6, dtype=torch.float64), torch.ones(5).double(), torch.zeros(5).double()
expected = torch.nn.functional.batch_norm(x, None, None, weight, bias, training=True)
torch.testing.assert_close(bl.nn.batch_norm(x, weight, bias), expected)

# %% nn.functional_call:
network, x = torch.nn.Linear(3, 1), torch.randn(5, 3)
params = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
assert (bl.nn.functional_call(network, params, (x,)) == 0).all()  # safe in threads
