import torch

import bilevel as bl

# %% Implicit Hypergrad:
problem = bl.problems.Ridge(per_feature=True)
x = problem.hparams.clone().requires_grad_()
fit = bl.argmin(problem.inner, problem.init, x, hypergrad=bl.Implicit(bl.CG(rtol=1e-10)))
(found,) = torch.autograd.grad(problem.outer(fit.value, x), x)
torch.testing.assert_close(found, problem.hypergradient(x), rtol=1e-6, atol=1e-9)

# %% Unroll Truncated PathMethod:
problem = bl.problems.Ridge(per_feature=True)
x = problem.hparams.clone().requires_grad_()
solver = bl.GradientDescent(lr=0.3, max_steps=100)
for hypergrad in (bl.Unroll(), bl.Unroll(checkpoint="tree"), bl.Unroll(mode="mixed"), bl.Truncated(last=50)):
    fit = bl.argmin(problem.inner, problem.init, x, solver=solver, hypergrad=hypergrad)
    (found,) = torch.autograd.grad(problem.outer(fit.value, x), x)
    torch.testing.assert_close(found, problem.hypergradient(x), rtol=1e-4, atol=1e-6)

# %% ForwardMode:
rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
start, solver = torch.zeros(1, dtype=torch.float64), bl.Steps(bl.SGD(rate), max_steps=20)
fit = bl.argmin(lambda y: (y - 1).square().sum(), start, solver=solver, hypergrad=bl.ForwardMode())
fit.value.sum().backward()
torch.testing.assert_close(rate.grad, torch.tensor(2 * 20 * 0.8**19, dtype=torch.float64))  # of 1 - (1 - 2 rate)^20

# %% ForwardGradient:
weights, targets = torch.ones(100, dtype=torch.float64, requires_grad=True), torch.linspace(-1, 1, 100).double()
method, steps = (
    bl.ForwardGradient(num_directions=8, generator=torch.Generator().manual_seed(0)),
    bl.GradientDescent(0.1, max_steps=20),
)
outer = torch.optim.Adam([weights], lr=0.1)
for _ in range(200):  # each estimate is noisy, and their mean is right
    fit = bl.argmin(lambda y: (y - weights).square().sum(), torch.zeros_like(targets), solver=steps, hypergrad=method)
    outer.zero_grad()
    (fit.value - targets).square().sum().backward()
    outer.step()
assert (weights - targets).norm() < 0.2 * (1 - targets).norm()

# %% OneStep FiniteDifference Identity SAMA:
problem = bl.problems.Ridge(per_feature=True)
x = problem.hparams.clone().requires_grad_()
truth = problem.hypergradient(x)
solver = bl.Steps(bl.SGD(0.3), max_steps=200)
for hypergrad in (bl.OneStep(0.3), bl.FiniteDifference(lr=0.3), bl.Implicit(bl.Identity(0.3)), bl.SAMA()):
    fit = bl.argmin(problem.inner, problem.init, x, solver=solver, hypergrad=hypergrad, throw="ignore")
    (found,) = torch.autograd.grad(problem.outer(fit.value, x), x)
    assert torch.cosine_similarity(found, truth, 0) > 0.5  # cheap and biased: a direction that descends

# %% FirstOrder:
start = torch.ones(2, requires_grad=True)  # a meta-learned start
solver = bl.GradientDescent(lr=0.1, max_steps=5)
fit = bl.argmin(lambda y: (y - 3).square().sum(), start, solver=solver, hypergrad=bl.FirstOrder())
fit.value.sum().backward()
torch.testing.assert_close(start.grad, torch.ones(2))  # as if dy / d start were the identity

# %% Penalty:
problem = bl.problems.Ridge()
x = problem.hparams.clone().requires_grad_()
fit = bl.argmin(problem.inner, problem.init, x, hypergrad=bl.Penalty())
(found,) = torch.autograd.grad(problem.outer(fit.value, x), x)
torch.testing.assert_close(found, problem.hypergradient(x), rtol=1e-3, atol=1e-6)  # without a second derivative

# %% EvolutionStrategies:
x = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
start = torch.zeros(1, dtype=torch.float64)
fit = bl.argmin(lambda y: (y - x.exp()).square().sum(), start, hypergrad=bl.EvolutionStrategies(num_samples=64))
fit.value.sum().backward()
assert x.grad > 0  # a random estimate of exp(x): here of one hyperparameter, for which the sign is certain
