import torch

import bilevel as bl

# %% influence Influence InfluenceScores ProjectedInfluence:
torch.manual_seed(0)
inputs = torch.randn(50, 3, dtype=torch.float64)
targets = inputs @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + 0.1 * torch.randn(50, dtype=torch.float64)
params = torch.linalg.lstsq(inputs, targets).solution  # a model that was trained


def outputs(params, example):
    return example[0] @ params


def losses(prediction, example):
    return (prediction - example[1]).square()


queries = (inputs[:2], targets[:2])
scores = bl.influence(outputs, losses, params, (inputs, targets), queries)
assert scores.values.shape == (2, 50)
rest = torch.arange(50) != 7
without = torch.linalg.lstsq(inputs[rest], targets[rest]).solution  # trained again without an example
changed = (queries[0] @ without - queries[1]).square() - (queries[0] @ params - queries[1]).square()
predicted = scores.left_out(~rest[None])[0]
assert ((predicted - changed).abs() < 0.2 * changed.abs() + 1e-5).all()

stored = bl.ProjectedInfluence(bl.Influence(outputs, losses, params, (inputs, targets)), dimension=500)
assert stored.features.shape == (50, 500)  # what a file would keep
found = stored.of(queries)
assert torch.corrcoef(torch.stack([found.values.flatten(), scores.values.flatten()]))[0, 1] > 0.95
