"""
Parameters of a differential equation
=====================================

You will fit the four rates of a predator-prey model to noisy observations. The trajectory is the solution of a system
of equations, all of its time steps at once, and ``bl.root`` differentiates that system: no adjoint equation needs to be
derived, and an implicit scheme, which stiff equations need, is no harder than an explicit one.
"""

# %%
# The equations of Lotka and Volterra, and the implicit midpoint rule as a residual: it vanishes where the whole
# trajectory ``[steps, 2]`` obeys it.
import matplotlib.pyplot as plt
import torch

import bilevel as bl

STEPS, STEP = 40, 0.15
initial = torch.tensor([1.0, 0.5], dtype=torch.float64)


def velocity(state, rates):
    prey, predators = state.unbind(-1)
    birth, eaten, grown, death = rates
    return torch.stack([birth * prey - eaten * prey * predators, grown * prey * predators - death * predators], -1)


def residual(states, log_rates):
    before = torch.cat([initial.unsqueeze(0), states[:-1]])
    return states - before - STEP * velocity((states + before) / 2, log_rates.exp())


def trajectory(log_rates, start):
    # 80 unknowns: a dense LU factorisation is the fastest way to solve the adjoint system.
    return bl.root(residual, start, log_rates, solver=bl.Newton(bl.LU()), hypergrad=bl.Implicit(bl.LU()))


# %%
# The observations: every second point of a trajectory with the true rates, with noise.
torch.manual_seed(0)
true_rates = torch.tensor([1.1, 0.9, 0.7, 0.8], dtype=torch.float64)
rest = initial.expand(STEPS, 2)
truth = trajectory(true_rates.log(), rest).value
seen = slice(1, None, 2)
observed = truth[seen] + 0.05 * torch.randn(STEPS // 2, 2, dtype=torch.float64)

# %%
# The fit: L-BFGS over the logarithms of the rates, with the gradient through the solved system.
log_rates = torch.full((4,), -0.1, dtype=torch.float64, requires_grad=True)
optimizer = torch.optim.LBFGS([log_rates], max_iter=30, line_search_fn="strong_wolfe")
states, history = rest, []


def closure():
    global states
    optimizer.zero_grad()
    fit = trajectory(log_rates, states)
    loss = (fit.value[seen] - observed).square().mean()
    loss.backward()
    states = fit.value.detach()
    history.append(loss.item())
    return loss


first = trajectory(log_rates, rest).value.detach()
optimizer.step(closure)
found = log_rates.detach().exp()
print("true rates ", [round(rate, 2) for rate in true_rates.tolist()])
print("found rates", [round(rate, 2) for rate in found.tolist()])
assert ((found - true_rates).abs() < 0.1).all()

# %%
# The gradient itself, beside central differences.
at = torch.full((4,), -0.2, dtype=torch.float64, requires_grad=True)
(gradient,) = torch.autograd.grad((trajectory(at, truth).value[seen] - observed).square().mean(), at)
h = 1e-5
for index in range(4):
    shift = h * torch.eye(4, dtype=torch.float64)[index]
    above, below = (
        (trajectory(at.detach() + s * shift, truth).value[seen] - observed).square().mean() for s in (1, -1)
    )
    assert abs((above - below) / (2 * h) - gradient[index]) < 1e-5 * gradient.norm()

# %%
times = STEP * torch.arange(1, STEPS + 1)
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
for index, (name, color) in enumerate((("prey", "tab:green"), ("predators", "tab:red"))):
    left.plot(times, first[:, index], color=color, linestyle=":")
    left.plot(times, states[:, index], color=color, label=name)
    left.plot(times[seen], observed[:, index], ".", color=color)
left.set(xlabel="time (dotted: before the fit)", ylabel="population")
left.legend()
right.semilogy(history)
right.set(xlabel="evaluation", ylabel="mean squared error")
plt.show()
