"""
Hyperparameters of a small CNN
==============================

You will learn eleven hyperparameters of a convolutional network on the digits of scikit-learn: a weight for each class
and a weight decay. Some classes have few training images, so an unweighted network neglects them; the validation
images, of which every class has as many, tell what the weights should be.
"""

# %%
# A network with 1,898 parameters. Five of the ten classes keep a tenth of their training images.
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import bilevel as bl

torch.manual_seed(0)
digits = load_digits()
order = torch.randperm(len(digits.target))
images = torch.tensor(digits.images[order] / 16, dtype=torch.float32).unsqueeze(1)
labels = torch.tensor(digits.target[order])
rare = labels < 5
keep = ~rare | (torch.rand(len(labels)) < 0.1)
train = torch.arange(len(labels)) < 700
val = torch.arange(len(labels)) >= 1200
x_train, y_train, x_val, y_val = images[train & keep], labels[train & keep], images[val], labels[val]

network = nn.Sequential(
    nn.Conv2d(1, 8, 3, stride=2, padding=1),
    nn.SiLU(),
    nn.Conv2d(8, 16, 3, stride=2, padding=1),
    nn.SiLU(),
    nn.Flatten(),
    nn.Linear(64, 10),
)
assert sum(p.numel() for p in network.parameters()) == 1898


# %%
# The inner problem: the weighted training loss. It is written with ``functional_call``, because the parameters are what
# is solved for; the hyperparameters are simply used.
def outputs(params):
    return functional_call(network, params, (x_train,))


def loss_of_outputs(logits):
    return (class_weights.exp()[y_train] * cross_entropy(logits, y_train, reduction="none")).mean()


def decay(params):
    return log_decay.exp() * sum(p.square().sum() for p in params.values())


def train_loss(params):
    return loss_of_outputs(outputs(params)) + decay(params)


class_weights = torch.zeros(10, requires_grad=True)
log_decay = torch.tensor(-6.0, requires_grad=True)

# %%
# How a network is solved. The loss of a network is not convex, and no solver brings its gradient to zero; a fixed
# number of Adam's steps from the last solution is what you would do anyway. Its Hessian has negative curvature, on
# which conjugate gradients end; the Gauss-Newton matrix has none. The damping bounds what the adjoint solve makes of
# directions in which the loss hardly changes.
solver = bl.Steps(bl.Adam(lr=1e-2), max_steps=60)
hypergrad = bl.Implicit(
    bl.CG(max_steps=20), operator=bl.GaussNewton(outputs, loss_of_outputs, rest=decay), damping=1e-2
)

# %%
# The outer loop.
optimizer = torch.optim.Adam([class_weights, log_decay], lr=0.15)
params = dict(network.named_parameters())
history = []
for _ in range(20):
    fit = bl.argmin(train_loss, params, solver=solver, hypergrad=hypergrad)
    logits = functional_call(network, fit.value, (x_val,))
    loss = cross_entropy(logits, y_val)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    params = {name: p.detach() for name, p in fit.value.items()}
    history.append((loss.item(), (logits.argmax(1) == y_val).float().mean().item()))

# %%
# The comparison that counts: the same number of training steps with the hyperparameters left where they were.
learned = class_weights.detach().clone()
with torch.no_grad():
    class_weights.zero_()
    log_decay.fill_(-6.0)
plain, baseline = dict(network.named_parameters()), []
for _ in range(20):
    plain = bl.argmin(train_loss, plain, solver=solver, hypergrad=None).value
    with torch.no_grad():
        baseline.append(cross_entropy(functional_call(network, plain, (x_val,)), y_val).item())

assert history[-1][0] < min(baseline)
assert learned[:5].mean() > learned[5:].mean()  # the rare classes count more

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
left.plot([loss for loss, _ in history], label="hyperparameters learned")
left.plot(baseline, label="left where they were")
left.set(xlabel="outer step (60 steps of Adam each)", ylabel="validation loss", yscale="log")
left.legend()
right.bar(range(10), learned.exp(), color=["tab:green"] * 5 + ["tab:gray"] * 5)
right.set(xlabel="class (green: few images)", ylabel="learned weight")
plt.show()
