import torch

import bilevel as bl

# %% LBFGS NewtonCG GradientDescent InnerSolver:
x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
for solver in (bl.LBFGS(), bl.NewtonCG(), bl.GradientDescent(lr=0.1, max_steps=200)):
    fit = bl.argmin(lambda y: (y - x).square().sum() + (y**4).sum(), torch.zeros(2, dtype=torch.float64), solver=solver)
    torch.testing.assert_close(2 * (fit.value - x) + 4 * fit.value**3, torch.zeros(2, dtype=torch.float64))

# %% Steps SGD Adam AdamW RMSprop Rule:
x = torch.ones(2, dtype=torch.float64, requires_grad=True)
rules = (bl.SGD(0.1, momentum=0.9), bl.Adam(0.05), bl.RMSprop(0.05))
for rule in rules:
    fit = bl.argmin(lambda y: (y - x).square().sum(), torch.zeros(2, dtype=torch.float64), solver=bl.Steps(rule, 200))
    assert (fit.value - x).norm() < 0.1
rate = torch.tensor(0.1, requires_grad=True)  # a step size that is learned, through the steps
fit = bl.argmin(
    lambda y: (y - 1).square().sum(), torch.zeros(2), solver=bl.Steps(bl.SGD(rate), 3), hypergrad=bl.Unroll()
)
fit.value.sum().backward()
torch.testing.assert_close(rate.grad, torch.tensor(2 * 6 * 0.8**2))  # y = 1 - (1 - 2 rate)^3, twice

# %% TorchOptim:
x = torch.ones(2, requires_grad=True)
solver = bl.TorchOptim(torch.optim.Adagrad, max_steps=300, lr=0.5)
fit = bl.argmin(lambda y: (y - x).square().sum(), torch.zeros(2), solver=solver)
assert (fit.value - x).norm() < 1e-2

# %% ScipyMinimize:
x = torch.ones(2, dtype=torch.float64, requires_grad=True)
solver = bl.ScipyMinimize("BFGS", gtol=1e-8)
fit = bl.argmin(lambda y: (y - x).square().sum(), torch.zeros(2, dtype=torch.float64), solver=solver)
torch.testing.assert_close(fit.value, x)


# %% External:
def best_of_grid(loss, start):
    return min(torch.linspace(-2, 2, 401).unsqueeze(1), key=loss)


x = torch.tensor(0.7, requires_grad=True)
fit = bl.argmin(lambda y: (y - x).square().sum(), torch.zeros(1), solver=bl.External(best_of_grid), throw="ignore")
fit.value.sum().backward()
torch.testing.assert_close(x.grad, torch.tensor(1.0))

# %% ProximalGradient prox prox.L1:
strength = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
target = torch.tensor([2.0, -1.0, 0.1], dtype=torch.float64)
solver = bl.ProximalGradient(bl.prox.L1(strength))
fit = bl.argmin(lambda y: (y - target).square().sum() / 2, torch.zeros(3, dtype=torch.float64), solver=solver)
torch.testing.assert_close(fit.value, torch.tensor([1.5, -0.5, 0.0], dtype=torch.float64))
(gradient,) = torch.autograd.grad(fit.value[0], strength)
torch.testing.assert_close(gradient, torch.tensor(-1.0, dtype=torch.float64))

# %% prox.ElasticNet prox.GroupLasso prox.Box prox.NonNegative prox.Simplex prox.L2Ball Prox:
target = torch.tensor([2.0, -1.0, 0.1], dtype=torch.float64)


def nearest(prox):
    start, solver = torch.zeros(3, dtype=torch.float64), bl.ProximalGradient(prox)
    return bl.argmin(lambda y: (y - target).square().sum() / 2, start, solver=solver).value


assert nearest(bl.prox.ElasticNet(l1=0.5, l2=1.0))[2] == 0
assert (nearest(bl.prox.GroupLasso(torch.tensor([0, 1, 1]), strength=2.0))[1:] == 0).all()
assert nearest(bl.prox.Box(-0.5, 0.5)).abs().max() <= 0.5
assert (nearest(bl.prox.NonNegative()) >= 0).all()
torch.testing.assert_close(nearest(bl.prox.Simplex()).sum(), torch.tensor(1.0, dtype=torch.float64))
torch.testing.assert_close(nearest(bl.prox.L2Ball(1.0)).norm(), torch.tensor(1.0, dtype=torch.float64))

# %% Newton ScipyRoot RootSolver:
x = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True)
for solver in (bl.Newton(), bl.ScipyRoot("hybr")):
    fit = bl.root(lambda y: y**3 - x, torch.ones(2, dtype=torch.float64), solver=solver)
    torch.testing.assert_close(fit.value, x ** (1 / 3))

# %% Anderson Picard:
x = torch.tensor([0.3, 0.9], dtype=torch.float64, requires_grad=True)
counts = {}
for solver in (bl.Anderson(), bl.Picard()):
    fit = bl.fixed_point(lambda y: x * torch.cos(y), torch.zeros(2, dtype=torch.float64), solver=solver)
    torch.testing.assert_close(fit.value, x * torch.cos(fit.value))
    counts[type(solver).__name__] = int(fit.stats["num_steps"])
assert counts["Anderson"] < counts["Picard"]

# %% InnerStep History ProgressBar:
history = bl.History()
solver = bl.GradientDescent(
    0.1, max_steps=200, callback=[history, bl.ProgressBar(disable=True), lambda s: s.step == 20]
)
fit = bl.argmin(lambda y: (y - 3).square().sum(), torch.zeros(2), solver=solver)
assert len(history.loss) == 21  # the start, and twenty steps
assert history.loss[-1] < 1e-3 * history.loss[0]

# %% prox.L1Ball prox.Affine prox.HalfSpace prox.Rows:
target = torch.tensor([[2.0, -1.0], [0.3, 0.1]], dtype=torch.float64)
start = torch.zeros(2, 2, dtype=torch.float64)
rows = bl.ProximalGradient(bl.prox.Rows(bl.prox.Simplex(), length=2))
fit = bl.argmin(lambda y: (y - target).square().sum() / 2, start, solver=rows)
torch.testing.assert_close(fit.value, torch.tensor([[1.0, 0.0], [0.6, 0.4]], dtype=torch.float64))
ones = torch.ones(4, dtype=torch.float64)
for prox in (bl.prox.L1Ball(1.0), bl.prox.HalfSpace(ones, 1.0), bl.prox.Affine(ones[None], ones[:1])):
    fit = bl.argmin(lambda y: (y - target).square().sum() / 2, start, solver=bl.ProximalGradient(prox))
    assert fit.value.sum() < 1 + 1e-9

# %% LevenbergMarquardt GaussNewtonCG least_squares:
times = torch.linspace(0, 2, 20, dtype=torch.float64)
values = (2.0 * torch.exp(-0.7 * times)).requires_grad_()
for solver in (bl.LevenbergMarquardt(), bl.GaussNewtonCG()):
    fit = bl.least_squares(lambda p: p[0] * torch.exp(-p[1] * times) - values, torch.ones(2).double(), solver=solver)
    torch.testing.assert_close(fit.value, torch.tensor([2.0, 0.7], dtype=torch.float64))
(by_values,) = torch.autograd.grad(fit.value[1], values)  # what a change of each value does to the rate
assert by_values[0] > 0 > by_values[-1]
