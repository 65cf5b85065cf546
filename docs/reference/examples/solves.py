import torch

import bilevel as bl

# %% argmin Solution Result:
x = torch.tensor(2.0, requires_grad=True)
fit = bl.argmin(lambda y: (y - 3).square().sum() + x * y.square().sum(), torch.zeros(2))
torch.testing.assert_close(fit.value, torch.ones(2))  # 3 / (1 + x)
fit.value.sum().backward()
torch.testing.assert_close(x.grad, torch.tensor(-2 / 3))
assert fit.result is bl.Result.CONVERGED
print(fit.stats["num_steps"], fit.adjoint.stats["relative_residual"])

# %% root:
x = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
fit = bl.root(lambda y: y**2 - x, torch.ones(1, dtype=torch.float64))
fit.value.sum().backward()
torch.testing.assert_close(x.grad, 0.5 / x.detach().sqrt())  # of the square root

# %% fixed_point:
x = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
fit = bl.fixed_point(lambda y: x * y + 1, torch.zeros(1, dtype=torch.float64))
fit.value.sum().backward()
torch.testing.assert_close(fit.value, torch.full((1,), 2.0, dtype=torch.float64))  # 1 / (1 - x)
torch.testing.assert_close(x.grad, torch.tensor(4.0, dtype=torch.float64))

# %% quadratic_program QPSolution:
c = torch.tensor([-1.0, 1.0], dtype=torch.float64, requires_grad=True)
eye = torch.eye(2, dtype=torch.float64)
fit = bl.quadratic_program(eye, c, G=-eye, h=torch.zeros(2, dtype=torch.float64))  # not negative
torch.testing.assert_close(fit.value.primal, torch.tensor([1.0, 0.0], dtype=torch.float64), rtol=0, atol=1e-6)
torch.testing.assert_close(fit.value.inequality, torch.tensor([0.0, 1.0], dtype=torch.float64), rtol=0, atol=1e-6)
fit.value.primal.sum().backward()
torch.testing.assert_close(c.grad, torch.tensor([-1.0, 0.0], dtype=torch.float64), rtol=0, atol=1e-5)


# %% custom_root compat.custom_root compat:
@bl.custom_root(lambda y, x: y**2 - x)
def square_root(init, x):  # any code that finds the root
    return x.sqrt()


x = torch.tensor([4.0], dtype=torch.float64, requires_grad=True)
square_root(None, x).sum().backward()
torch.testing.assert_close(x.grad, torch.tensor([0.25], dtype=torch.float64))


# %% custom_fixed_point compat.custom_fixed_point:
@bl.custom_fixed_point(lambda y, x: (y + x / y) / 2)  # Heron's iteration
def square_root(init, x):
    return x.sqrt()


x = torch.tensor([4.0], dtype=torch.float64, requires_grad=True)
square_root(None, x).sum().backward()
torch.testing.assert_close(x.grad, torch.tensor([0.25], dtype=torch.float64))

# %% Adaptive:
x = torch.tensor(0.0, requires_grad=True)
outer, params, tolerance = torch.optim.SGD([x], lr=1.0), torch.zeros(3), bl.Adaptive()
for _ in range(10):
    fit = bl.argmin(lambda y: (y - 1).square().sum() + x.exp() * y.square().sum(), params, **tolerance.settings())
    loss = (fit.value - 0.9).square().sum()
    outer.zero_grad()
    loss.backward()
    outer.step()
    params, tolerance = fit.value.detach(), tolerance.after(loss)
assert tolerance.value < 0.1

# %% SolveError SolveWarning:
x = torch.tensor(1.0, requires_grad=True)
try:
    bl.argmin(
        lambda y: (y**4).sum() + x * y.sum(), torch.ones(2), solver=bl.LBFGS(gtol=1e-6, max_steps=1), throw="raise"
    )
except bl.SolveError as error:
    assert error.solution.result is not bl.Result.CONVERGED
    print(error)

# %% NonFiniteError:
try:
    bl.argmin(lambda y: (y / 0).sum(), torch.ones(2))
except bl.NonFiniteError as error:
    print(error)

# %% ObjectiveChangedError:
scale = [1.0]
x = torch.tensor(1.0, requires_grad=True)
fit = bl.argmin(lambda y: scale[0] * (y - x).square().sum(), torch.ones(2), hypergrad=bl.Implicit(operator="func"))
scale[0] = 2.0  # what was solved is not what the backward pass would differentiate
try:
    fit.value.sum().backward()
except bl.ObjectiveChangedError as error:
    print(error)

# %% constrained ConstrainedSolution AugmentedLagrangian:
axes = torch.tensor([2.0, 1.0], dtype=torch.float64, requires_grad=True)
start = torch.tensor([-1.0, 0.5], dtype=torch.float64)
fit = bl.constrained(lambda y: y[0], lambda y: ((y / axes) ** 2).sum(-1, keepdim=True) - 1, start)
torch.testing.assert_close(fit.value.params[0], -axes[0])  # the leftmost point of an ellipse
(slope,) = torch.autograd.grad(fit.value.params[0], axes)
torch.testing.assert_close(slope, torch.tensor([-1.0, 0.0], dtype=torch.float64))

# %% Bisection:
x = torch.tensor([2.0, 9.0], dtype=torch.float64, requires_grad=True)
fit = bl.root(lambda y: y**2 - x, torch.zeros(2, dtype=torch.float64), solver=bl.Bisection(0.0, 10.0))
torch.testing.assert_close(fit.value, x.sqrt())
(slope,) = torch.autograd.grad(fit.value.sum(), x)
torch.testing.assert_close(slope, 0.5 / x.detach().sqrt())
