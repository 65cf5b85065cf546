"""
Finding wrong labels
====================

You will find the wrong labels of a training set, without looking at them. Every training example gets a weight, which
is a hyperparameter like any other; a small set of examples with right labels says how good the weights are. One linear
system gives the hypergradient of all of them (Franceschi et al. 2017).
"""

# %%
# Four hundred digits with half of their labels replaced by another class, and three hundred digits to trust.
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

import bilevel as bl

torch.manual_seed(0)
digits = load_digits()
order = torch.randperm(len(digits.target))
features = torch.tensor(digits.data[order] / 16, dtype=torch.float64)
labels = torch.tensor(digits.target[order])
x_train, y_true, x_val, y_val, x_test, y_test = (
    *(t[:400] for t in (features, labels)),
    *(t[400:700] for t in (features, labels)),
    *(t[700:] for t in (features, labels)),
)
wrong = torch.rand(400) < 0.5
y_train = torch.where(wrong, (y_true + torch.randint(1, 10, (400,))) % 10, y_true)


# %%
# The inner problem is a softmax regression in which each example counts by its weight.
def train_loss(weights, scores):
    losses = cross_entropy(x_train @ weights, y_train, reduction="none")
    return (scores.sigmoid() * losses).mean() + 5e-3 * weights.square().sum()


scores = torch.zeros(400, dtype=torch.float64, requires_grad=True)
optimizer = torch.optim.Adam([scores], lr=0.3)
weights, history = torch.zeros(64, 10, dtype=torch.float64), []
for _ in range(40):
    fit = bl.argmin(train_loss, weights, scores, solver=bl.LBFGS(gtol=1e-5), hypergrad=bl.Implicit(bl.CG(rtol=1e-3)))
    loss = cross_entropy(x_val @ fit.value, y_val)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    weights = fit.value.detach()
    history.append(loss.item())

# %%
# A weight that fell below where it began says that the label is wrong. How often is that so?
found = scores.detach() < 0
correct = (found == wrong).float().mean()
print(f"{correct:.1%} of the labels are judged rightly")
assert correct > 0.85


# %%
# And what is it worth? A regression on what is left, beside one on everything, by test images that nothing has seen.
def test_accuracy(mask):
    uniform = torch.where(mask, 40.0, -40.0).double()
    fit = bl.argmin(train_loss, torch.zeros_like(weights), uniform, solver=bl.LBFGS(gtol=1e-5), hypergrad=None)
    return ((x_test @ fit.value).argmax(1) == y_test).float().mean().item()


accuracies = {
    "all labels": test_accuracy(torch.ones(400, dtype=torch.bool)),
    "labels kept": test_accuracy(~found),
    "right labels (an oracle)": test_accuracy(~wrong),
}
assert accuracies["labels kept"] > accuracies["all labels"] + 0.02

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
left.hist([scores[~wrong].detach().sigmoid(), scores[wrong].detach().sigmoid()], bins=20, label=["right", "wrong"])
left.set(xlabel="learned weight of an example", ylabel="examples")
left.legend(title="its label is")
right.barh(
    list(accuracies), [100 * value for value in accuracies.values()], color=["tab:gray", "tab:green", "tab:gray"]
)
right.set(xlabel="test accuracy (%)", xlim=(50, 100))
plt.show()
