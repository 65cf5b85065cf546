"""
An equilibrium layer
====================

You will build a layer whose output is the solution of an equation, ``z = tanh(W z + U x + b)``, and train it without
storing an iteration (Bai, Kolter, Koltun 2019). What backpropagation through the iterations gets right only after
many of them, the implicit gradient has at once.
"""

# %%
# The layer. Each example of the batch is an equation of its own (``batched=True``), with its own stopping; ``W`` is
# scaled so that the map contracts, which makes the equilibrium exist and be unique.
import matplotlib.pyplot as plt
import torch
from torch import nn

import bilevel as bl


class Equilibrium(nn.Module):
    def __init__(self, inputs, hidden):
        super().__init__()
        self.inputs = nn.Linear(inputs, hidden)
        self.weight = nn.Parameter(torch.randn(hidden, hidden) / hidden**0.5)

    def map(self, z, x):
        contracting = 0.9 * self.weight / torch.linalg.matrix_norm(self.weight, 2).clamp_min(1)
        return torch.tanh(z @ contracting.T + self.inputs(x))

    def forward(self, x):
        z = torch.zeros(len(x), len(self.weight), dtype=x.dtype)
        hypergrad = bl.Implicit(bl.Neumann(alpha=1.0))
        self.solution = bl.fixed_point(self.map, z, x, solver=bl.Anderson(), hypergrad=hypergrad, batched=True)
        return self.solution.value


# %%
# Its gradient beside backpropagation through 1, 2, 4, ... iterations from zero. The more iterations, the closer they
# come to the gradient that the layer had from one linear solve.
torch.manual_seed(0)
layer, x = Equilibrium(2, 16).double(), torch.randn(8, 2, dtype=torch.float64)


def gradient_of(output):
    return torch.cat([g.flatten() for g in torch.autograd.grad(output.square().sum(), list(layer.parameters()))])


implicit = gradient_of(layer(x))
counts, errors = [1, 2, 4, 8, 16, 32, 64, 128], []
for count in counts:
    z = torch.zeros(8, 16, dtype=torch.float64)
    for _ in range(count):
        z = layer.map(z, x)
    errors.append(((gradient_of(z) - implicit).norm() / implicit.norm()).item())
assert errors[-1] < 1e-5 < errors[3]

# %%
# Trained: two spirals, which no linear classifier can tell apart.
angle = torch.linspace(0.5, 3 * torch.pi, 150)
spiral = torch.stack([angle * angle.cos(), angle * angle.sin()], 1) / 8
points = torch.cat([spiral, -spiral]) + 0.02 * torch.randn(300, 2)
classes = torch.arange(300) // 150
layer, head = Equilibrium(2, 32), nn.Linear(32, 2)
with torch.no_grad():
    layer.inputs.weight *= 4
optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=2e-2)
losses, iterations = [], []
for _ in range(150):
    loss = nn.functional.cross_entropy(head(layer(points)), classes)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
    iterations.append(layer.solution.stats["num_steps"].float().mean().item())
accuracy = (head(layer(points)).argmax(1) == classes).float().mean().item()
print(f"{accuracy:.1%} of the points, {iterations[-1]:.0f} iterations a point")
assert accuracy > 0.95

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
left.loglog(counts, errors, "o-")
left.set(xlabel="iterations that are backpropagated through", ylabel="distance to the implicit gradient")
across = torch.linspace(-1.4, 1.4, 80)
mesh = torch.cartesian_prod(across, across)
with torch.no_grad():
    surface = head(layer(mesh)).softmax(1)[:, 1].reshape(80, 80).T
right.contourf(across, across, surface, levels=10, cmap="coolwarm", alpha=0.6)
right.scatter(*points.T, c=classes, cmap="coolwarm", s=6)
right.set(xticks=[], yticks=[], title="what the layer learned")
plt.show()
