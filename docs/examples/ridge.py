"""
A weight decay for every feature
================================

You will learn twenty hyperparameters at once by gradient descent on the validation loss: a penalty for each feature
of a linear regression, of which only five features matter. Grid search would need 10^20 fits for ten values of each;
a hypergradient costs one linear solve for all of them. The problem has a closed form, so we can also check the
hypergradient that we used.
"""

# %%
# The data: thirty examples to train on and thirty to validate on, with twenty features. The target depends on the
# first five.
import matplotlib.pyplot as plt
import torch

import bilevel as bl

torch.manual_seed(0)
useful = torch.tensor([1.0] * 5 + [0.0] * 15, dtype=torch.float64)
x_train, x_val = torch.randn(30, 20, dtype=torch.float64), torch.randn(30, 20, dtype=torch.float64)
y_train, y_val = (x @ useful + torch.randn(30, dtype=torch.float64) for x in (x_train, x_val))


# %%
# Two losses state the problem. The inner one is what is trained, and depends on the hyperparameters ``log_decay``; the
# outer one is what we are really after.
def train_loss(weights, log_decay):
    return (x_train @ weights - y_train).square().mean() + (log_decay.exp() * weights.square()).sum()


def val_loss(weights):
    return (x_val @ weights - y_val).square().mean()


# %%
# One call solves the inner problem. The value of its solution is differentiable, so ``backward`` brings the gradient
# to the hyperparameters, whatever the solver did on its way. The last solution is where the next solve starts.
log_decay = torch.full((20,), -2.0, dtype=torch.float64, requires_grad=True)
optimizer = torch.optim.Adam([log_decay], lr=0.2)
weights = torch.zeros(20, dtype=torch.float64)
history = []
for _ in range(60):
    fit = bl.argmin(train_loss, weights, log_decay, solver=bl.LBFGS(), hypergrad=bl.Implicit(bl.CG()))
    loss = val_loss(fit.value)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    weights = fit.value.detach()
    history.append(loss.item())

# %%
# Is the hypergradient right? The minimum of a ridge regression solves a linear system, and autograd can differentiate
# that: the two gradients agree to the accuracy of the solves.
at = log_decay.detach().requires_grad_()
closed_form = torch.linalg.solve(x_train.T @ x_train / 30 + torch.diag(at.exp()), x_train.T @ y_train / 30)
(truth,) = torch.autograd.grad(val_loss(closed_form), at)
(found,) = torch.autograd.grad(val_loss(bl.argmin(train_loss, weights, at).value), at)
torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-8)
assert history[-1] < 0.8 * history[0]
assert log_decay[5:].mean() > log_decay[:5].mean() + 1

# %%
# The penalties of the useless features have risen, and those of the useful ones have fallen.
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
left.plot(history)
left.set(xlabel="outer step", ylabel="validation loss")
right.bar(range(20), log_decay.detach().exp(), color=["tab:green"] * 5 + ["tab:gray"] * 15)
right.set(xlabel="feature (green: it matters)", ylabel="penalty", yscale="log")
plt.show()
