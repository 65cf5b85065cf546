"""
The slope of a lasso path
=========================

You will differentiate a problem that is not smooth. The validation loss of a lasso is a curve over its penalty, which
is usually searched on a grid. Each point of that grid can tell its slope as well, at the price of a linear system as
large as the support, and then a few steps find the minimum that a hundred points of the grid only surround.
"""

# %%
# Sixty examples with thirty features, of which four matter.
import matplotlib.pyplot as plt
import torch

import bilevel as bl

torch.manual_seed(1)
true_weights = torch.zeros(30, dtype=torch.float64)
true_weights[:4] = torch.tensor([2.0, -1.5, 1.0, -1.0])
x_train, x_val = torch.randn(60, 30, dtype=torch.float64), torch.randn(60, 30, dtype=torch.float64)
y_train, y_val = (x @ true_weights + 1.5 * torch.randn(60, dtype=torch.float64) for x in (x_train, x_val))


# %%
# The smooth part of the loss is written as usual; the penalty is a *proximal operator* and belongs to the solver. It
# may hold a tensor that requires grad.
def squared_error(weights):
    return (x_train @ weights - y_train).square().mean() / 2


def lasso(log_penalty, start):
    solver = bl.ProximalGradient(bl.prox.L1(log_penalty.exp()))
    return bl.argmin(squared_error, start, solver=solver)


def validation(log_penalty, start):
    fit = lasso(log_penalty, start)
    return (x_val @ fit.value - y_val).square().mean(), fit


# %%
# The path: a loss and a slope at each of forty penalties, each fit started from the last one.
grid = torch.linspace(-4.5, 0.5, 40, dtype=torch.float64)
weights, losses, slopes, supports = torch.zeros(30, dtype=torch.float64), [], [], []
for value in grid:
    log_penalty = value.clone().requires_grad_()
    loss, fit = validation(log_penalty, weights)
    (slope,) = torch.autograd.grad(loss, log_penalty)
    weights = fit.value.detach()
    losses.append(loss.item())
    slopes.append(slope.item())
    supports.append(int((weights != 0).sum()))

# %%
# The slopes are those of the curve: a central difference in the middle of the path says the same.
middle, h = grid[20], 1e-5
above, below = (validation(middle + sign * h, weights)[0].item() for sign in (1, -1))
assert abs((above - below) / (2 * h) - slopes[20]) < 1e-4 * abs(slopes[20])

# %%
# A dozen steps along the slope find a penalty that is as good as the best of the grid, or better.
log_penalty = torch.tensor(-0.2, dtype=torch.float64, requires_grad=True)
optimizer = torch.optim.SGD([log_penalty], lr=0.15)
steps = []
for _ in range(12):
    loss, fit = validation(log_penalty, weights)
    steps.append((log_penalty.item(), loss.item()))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    weights = fit.value.detach()
assert min(loss for _, loss in steps) <= min(losses) * 1.001

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
left.plot(grid, losses)
for value, loss, slope in list(zip(grid.tolist(), losses, slopes, strict=True))[::4]:
    left.plot([value - 0.25, value + 0.25], [loss - 0.25 * slope, loss + 0.25 * slope], "tab:orange")
left.plot(*zip(*steps, strict=True), "k.", label="steps along the hypergradient")
left.set(xlabel="log penalty", ylabel="validation loss (orange: slopes)", ylim=(min(losses) - 0.5, max(losses) + 0.5))
left.legend()
right.step(grid, supports)
right.axhline(4, color="tab:gray", linestyle=":")
right.set(xlabel="log penalty", ylabel="features with a weight")
plt.show()
