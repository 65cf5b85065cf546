"""
Which sources should a transformer learn from?
==============================================

You will learn how much of each data source a small transformer should train on. Three sources have sequences of the
same kind, but a quarter of the labels of one are wrong, and those of another are drawn at random; a few trusted
sequences tell which. Before each training step, the mixture follows the hypergradient of the trusted loss through
that step, the way that data mixtures are learned on the fly (Ren et al. 2018; Shu et al. 2019).
The application ``domain_weights`` does so with texts, beside other methods and Optuna.
"""

# %%
# Sequences of nine symbols out of six; the label is whether there are more 0 than 1 among them.
import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import bilevel as bl

torch.manual_seed(0)
SOURCES = ("right", "a quarter of the labels wrong", "labels drawn at random")


def draw(number):
    tokens = torch.randint(0, 6, (number, 9))
    return tokens, ((tokens == 0).sum(1) > (tokens == 1).sum(1)).long()


def spoil(labels, fraction):
    return torch.where(torch.rand(len(labels)) < fraction, 1 - labels, labels)


def source(fraction):
    tokens, labels = draw(400)
    return tokens, spoil(labels, fraction)


sources = [source(fraction) for fraction in (0.0, 0.25, 0.5)]
trusted, test = draw(100), draw(1000)


class Transformer(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.embed = nn.Embedding(6, width)
        self.place = nn.Parameter(0.02 * torch.randn(9, width))
        self.block = nn.TransformerEncoderLayer(width, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(width, 2)

    def forward(self, tokens):
        return self.head(self.block(self.embed(tokens) + self.place).mean(1))


# %%
# One training: each step sees a batch of every source, and the loss of a source counts by its share. Where shares are
# learned, the step is also a lookahead, ``argmin`` with one step of SGD, whose derivative is that of the step itself.
def train(learn):
    torch.manual_seed(1)
    network = Transformer()
    scores = torch.zeros(3, requires_grad=True)
    outer = torch.optim.Adam([scores], lr=0.1)
    inner = torch.optim.Adam(network.parameters(), lr=5e-3)
    shares, accuracies = [], []
    for _ in range(200):
        batch = torch.randint(0, 400, (3, 32))
        tokens = torch.cat([tokens[rows] for (tokens, _), rows in zip(sources, batch, strict=True)])
        labels = torch.cat([labels[rows] for (_, labels), rows in zip(sources, batch, strict=True)])

        def mixture(params, tokens=tokens, labels=labels):
            losses = cross_entropy(functional_call(network, params, (tokens,)), labels, reduction="none")
            return scores.softmax(0) @ losses.reshape(3, -1).mean(1)

        params = dict(network.named_parameters())
        if learn:
            ahead = bl.argmin(mixture, params, solver=bl.Steps(bl.SGD(0.5), max_steps=1), hypergrad=bl.Unroll())
            outer.zero_grad()
            cross_entropy(functional_call(network, ahead.value, (trusted[0],)), trusted[1]).backward()
            outer.step()
        inner.zero_grad()
        mixture(params).backward()
        inner.step()
        shares.append(scores.softmax(0).tolist())
        with torch.no_grad():
            accuracies.append((network(test[0]).argmax(1) == test[1]).float().mean().item())
    return shares, accuracies


shares, accuracies = train(learn=True)
_, baseline = train(learn=False)
print(f"test accuracy: {accuracies[-1]:.1%} with learned shares, {baseline[-1]:.1%} with equal shares")
assert shares[-1][0] > 0.8  # nearly all of the mixture is the source whose labels are right
assert sum(accuracies[-20:]) > sum(baseline[-20:])

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
for name, share in zip(SOURCES, zip(*shares, strict=True), strict=True):
    left.plot(share, label=name)
left.set(xlabel="step", ylabel="share of the source", ylim=(0, 1))
left.legend()
right.plot(accuracies, label="shares learned")
right.plot(baseline, label="equal shares")
right.set(xlabel="step", ylabel="test accuracy")
right.legend()
plt.show()
