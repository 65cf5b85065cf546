import torch

import bilevel as bl

# %% stochastic stochastic.SOBA stochastic.Stochastic stochastic.Step stochastic.TTSA stochastic.BSA:
# %% stochastic.StocBiO stochastic.AmIGO stochastic.FSLA stochastic.MRBO stochastic.SUSTAIN stochastic.F2SA:
# %% stochastic.BOME stochastic.MASOBA:
methods = bl.stochastic.SOBA, bl.stochastic.AmIGO, bl.stochastic.StocBiO, bl.stochastic.FSLA, bl.stochastic.MRBO
methods += bl.stochastic.SUSTAIN, bl.stochastic.TTSA, bl.stochastic.BSA, bl.stochastic.F2SA, bl.stochastic.BOME
methods += (bl.stochastic.MASOBA,)
for method in methods:
    torch.manual_seed(0)
    params, hparams = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    stepper = method(
        params,
        hparams,
        lambda y, x, batch: (y - x - batch).square().mean(),  # the solution is x + mean
        lambda y, x, batch: (y - 1 - batch).square().mean(),  # so x should be one
        inner_lr=0.3,
        outer_lr=0.1,
    )
    for _ in range(300):
        record = stepper.step(0.1 * torch.randn(8, 1), 0.1 * torch.randn(8, 1))
    assert (hparams - 1).abs().max() < 0.5, method
    print(method.__name__, hparams.mean().item(), record.outer_loss.item())

# %% stochastic.SABA:
torch.manual_seed(0)
batches = list(0.1 * torch.randn(4, 8, 1))
params, hparams = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
stepper = bl.stochastic.SABA(
    params,
    hparams,
    lambda y, x, index: (y - x - batches[index]).square().mean(),
    lambda y, x, index: (y - 1 - batches[index]).square().mean(),
    inner_lr=0.3,
    outer_lr=0.1,
    inner_batches=4,  # finitely many, of which it remembers the gradients
    outer_batches=4,
)
for _ in range(300):
    inner, outer = torch.randint(4, (2,)).tolist()
    stepper.step(inner, outer, inner_index=inner, outer_index=outer)
assert (hparams - 1).abs().max() < 0.1

# %% stochastic.SRBA stochastic.VRBO stochastic.SPABA stochastic.Draws:
data = 0.1 * torch.randn(64, 1)
for method, often in (
    (bl.stochastic.SRBA, {"period": 10}),  # steps from one pass over all data to the next
    (bl.stochastic.VRBO, {"period": 10}),
    (bl.stochastic.SPABA, {"probability": 0.1}),  # of such a pass
):
    torch.manual_seed(0)
    params, hparams = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    stepper = method(
        params,
        hparams,
        lambda y, x, batch: (y - x - batch).square().mean(),
        lambda y, x, batch: (y - 1 - batch).square().mean(),
        inner_lr=0.3,
        outer_lr=0.1,
        **often,
    )
    for _ in range(300):
        batch = data if stepper.wants_full_batch else data[torch.randint(64, (8,))]
        stepper.step(batch, batch)
    assert (hparams - 1).abs().max() < 0.2

# %% stochastic.Decay stochastic.TorchSchedule:
decay = bl.stochastic.Decay(0.5, power=0.5)
assert decay(0) > decay(10) > decay(100)
schedule = bl.stochastic.TorchSchedule(0.3, torch.optim.lr_scheduler.CosineAnnealingLR, T_max=100)
assert abs(schedule(50) - 0.15) < 1e-6

# %% stochastic.step_sizes:
params, hparams = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)


def train_loss(y, x, batch):
    return (50 * (y - x - batch)).square().mean()  # too steep for a step size of one


sizes = bl.stochastic.step_sizes(params, hparams, train_loss, torch.zeros(8, 1))
stepper = bl.stochastic.SOBA(params, hparams, train_loss, lambda y, x, batch: (y - 1).square().mean(), **sizes)
for _ in range(300):
    record = stepper.step(0.1 * torch.randn(8, 1), 0.1 * torch.randn(8, 1))
assert record.inner_loss.isfinite()
