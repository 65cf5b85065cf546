"""
Implicit MAML on sinusoids
==========================

You will meta-learn an initialisation from which a network fits a new sinusoid from ten points. Each task has its own
inner problem, ``loss(params) + strength / 2 ||params - meta||^2``, and sixteen of them are solved as one (Rajeswaran,
Finn, Kakade, Levine 2019). The meta-gradient needs the adapted parameters only, not the path to them.
"""

# %%
# Tasks are sinusoids of random amplitude and phase.
import math

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.func import functional_call

import bilevel as bl

torch.manual_seed(0)
TASKS, SHOTS = 16, 10


def draw_tasks(number):
    return 1 + 4 * torch.rand(number, 1, 1), math.pi * torch.rand(number, 1, 1)


def draw_points(amplitude, phase, number):
    x = 10 * torch.rand(len(amplitude), number, 1) - 5
    return x, amplitude * torch.sin(x + phase)


network = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
meta = dict(network.named_parameters())
strength = 1.0


# %%
# The inner problem of one task; ``torch.vmap`` makes it many, and ``bl.stack`` gives each its own copy of the start.
# ``meta`` is captured, so the meta-gradient reaches it through the quadratic term.
def predict(params, x):
    return functional_call(network, params, (x,))


def distance(params, x, y):
    return strength / 2 * sum((p - meta[name]).square().sum() for name, p in params.items())


def adapt_loss(params, x, y):
    return (predict(params, x) - y).square().mean() + distance(params, x, y)


# %%
# After a few steps of adaptation the Hessian of a network may still have negative curvature, where conjugate gradients
# end. Its Gauss-Newton part has none, and with the quadratic term it is positive definite.
gauss_newton = bl.GaussNewton(
    outputs=torch.vmap(lambda params, x, y: predict(params, x)),
    loss=torch.vmap(lambda outputs, x, y: (outputs - y).square().mean()),
    rest=torch.vmap(distance),
)
implicit = bl.Implicit(bl.CG(max_steps=10), operator=gauss_newton)


def adapt(x, y, hypergrad):
    # An order of 16 steps: steps that would raise a task's loss are taken back, and its step size halved.
    solver = bl.GradientDescent(lr=0.05, max_steps=16, safeguard=True)
    return bl.argmin(torch.vmap(adapt_loss), bl.stack(meta, len(x)), x, y, solver=solver, hypergrad=hypergrad)


# %%
# The meta-training: adapt to ten points of each task, judge by others, and follow the gradient.
optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
test = draw_tasks(100)
test_support, test_query = draw_points(*test, SHOTS), draw_points(*test, 50)


def test_error():
    fit = adapt(*test_support, hypergrad=None)
    with torch.no_grad():
        return (torch.vmap(predict)(fit.value, test_query[0]) - test_query[1]).square().mean().item()


before, history = test_error(), []
for _ in range(150):
    tasks = draw_tasks(TASKS)
    support, query = draw_points(*tasks, SHOTS), draw_points(*tasks, SHOTS)
    fit = adapt(*support, hypergrad=implicit)
    loss = (torch.vmap(predict)(fit.value, query[0]) - query[1]).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    history.append(loss.item())
after = test_error()
print(f"squared error on 100 new tasks after ten points: {before:.2f} before meta-training, {after:.2f} after")
assert after < before / 2

# %%
# A new sinusoid: the meta-learned start, and the network after it saw ten points.
x = torch.linspace(-5, 5, 200).reshape(1, -1, 1)
amplitude, phase = test[0][:1], test[1][:1]
own = tuple(part[:1] for part in test_support)
with torch.no_grad():
    start = predict({name: p.detach() for name, p in meta.items()}, x[0])
    adapted = torch.vmap(predict)(adapt(*own, hypergrad=None).value, x)[0]
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
left.plot(history)
left.set(xlabel="meta-step", ylabel="loss on query points", yscale="log")
right.plot(x.flatten(), (amplitude * torch.sin(x + phase)).flatten(), color="tab:gray", label="the task")
right.plot(x.flatten(), start.flatten(), linestyle=":", label="before adaptation")
right.plot(x.flatten(), adapted.flatten(), label="after")
right.plot(own[0].flatten(), own[1].flatten(), "k.", label="its ten points")
right.legend()
plt.show()
