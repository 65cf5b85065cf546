"""
A quadratic program as a layer
==============================

You will learn what somebody values from what they choose. An investor spreads one unit of money over five assets: the
choice minimises ``risk aversion / 2 z^T S z - returns^T z`` over weights that are not negative and sum to one. We see
choices under changing risks and recover the expected returns, which nobody told us, through the solution of the
quadratic program (Amos and Kolter 2017).
"""

# %%
# Forty situations, each with a covariance matrix of its own, and the choices of an investor who knows the returns. All
# forty programs are solved as one batch.
import matplotlib.pyplot as plt
import torch

import bilevel as bl

torch.manual_seed(0)
SITUATIONS, ASSETS = 40, 5
factors = torch.randn(SITUATIONS, ASSETS, ASSETS, dtype=torch.float64)
covariances = factors @ factors.mT / ASSETS + 0.2 * torch.eye(ASSETS, dtype=torch.float64)
budget = torch.ones(1, ASSETS, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
long_only = -torch.eye(ASSETS, dtype=torch.float64), torch.zeros(ASSETS, dtype=torch.float64)


def choose(returns):
    solution = bl.quadratic_program(covariances, -returns, *budget, *long_only)
    return solution.value.primal


true_returns = torch.tensor([0.8, 0.5, 0.2, 0.0, -0.3], dtype=torch.float64)
choices = choose(true_returns).detach()
torch.testing.assert_close(choices.sum(1), torch.ones(SITUATIONS, dtype=torch.float64))
print(f"{(choices < 1e-6).double().mean():.0%} of the weights are at their bound of zero")

# %%
# The gradient passes through the active constraints: a weight at its bound does not move, and the others share what is
# left. Twenty central differences agree.
returns = torch.zeros(ASSETS, dtype=torch.float64, requires_grad=True)
(gradient,) = torch.autograd.grad((choose(returns) - choices).square().sum(), returns)
h = 1e-5
for index in range(ASSETS):
    shift = h * torch.eye(ASSETS, dtype=torch.float64)[index]
    above, below = ((choose(returns.detach() + s * shift) - choices).square().sum() for s in (1, -1))
    assert abs((above - below) / (2 * h) - gradient[index]) < 1e-4 * gradient.norm()

# %%
# Learning. Returns count up to a constant only, which the budget cancels.
optimizer = torch.optim.Adam([returns], lr=0.05)
history, path = [], []
for _ in range(120):
    loss = (choose(returns) - choices).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    history.append(loss.item())
    path.append((returns - returns.mean()).tolist())
centred = true_returns - true_returns.mean()
assert (torch.tensor(path[-1]) - centred).abs().max() < 0.01

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
left.semilogy(history)
left.set(xlabel="step", ylabel="squared distance to the choices")
for index in range(ASSETS):
    (line,) = right.plot([point[index] for point in path])
    right.axhline(centred[index], color=line.get_color(), linestyle=":")
right.set(xlabel="step", ylabel="expected return (dotted: the truth)")
plt.show()
