import torch

import bilevel as bl

# %% stack:
start = bl.stack({"weight": torch.zeros(3), "bias": torch.zeros(())}, 4)  # of four problems
assert start["weight"].shape == (4, 3)
assert start["bias"].shape == (4,)

# %% mean_over_tasks map_tasks:
torch.manual_seed(0)
meta, targets = torch.zeros(3, dtype=torch.float64, requires_grad=True), torch.randn(10, 3, dtype=torch.float64)


def task_losses(meta, targets):
    def inner(y, target):
        return (y - target).square().sum() + (y - meta).square().sum()

    fit = bl.argmin(torch.vmap(inner), bl.stack(meta, len(targets)), targets)
    return (fit.value - targets).square().sum(1), fit


loss, fits = bl.mean_over_tasks(task_losses, meta, targets, chunk_size=4)
loss.backward()
torch.testing.assert_close(meta.grad, (meta - targets).mean(0) / 2)  # y = (meta + target) / 2
losses = bl.map_tasks(lambda targets: task_losses(meta, targets)[0], targets, chunk_size=4)
torch.testing.assert_close(losses.mean(), loss)


# %% losses_of_tasks:
def outer_losses(params, targets):  # of t tasks, each with params of its own
    return (params - targets).square().sum(1), None


params = torch.zeros(10, 3, requires_grad=True)
losses, _ = bl.losses_of_tasks(outer_losses, params, torch.ones(10, 3), chunk_size=4)
losses.sum().backward()
torch.testing.assert_close(params.grad, torch.full((10, 3), -2.0))

# %% capture Recorded:
recorded = bl.capture(lambda x: {"double": 2 * x})  # a CUDA graph on a GPU; on a CPU the function as it is
assert isinstance(recorded, bl.Recorded)
torch.testing.assert_close(recorded(torch.ones(3))["double"], torch.full((3,), 2.0))

# %% distributed distributed.sharded distributed.shard distributed.rank distributed.world_size:
features, targets = torch.randn(100, 3), torch.randn(100)
own = bl.distributed.shard(len(features))  # with one process, which this example is, all of them


def inner(weights, decay):
    losses = (features[own] @ weights - targets[own]).square().sum() / len(features)
    return losses + decay * weights.square().sum() / bl.distributed.world_size()


decay = torch.tensor(0.1, requires_grad=True)
fit = bl.argmin(bl.distributed.sharded(inner), torch.zeros(3), decay)
fit.value.sum().backward()
assert bl.distributed.rank() == 0
assert decay.grad is not None

# %% distributed.all_reduce distributed.reduce_gradients distributed.from_first distributed.together:
# %% distributed.RankError:
weights = torch.ones(2, requires_grad=True)
weights.square().sum().backward()
with bl.distributed.together():  # an error of one rank is a RankError on all of them
    (loss,) = bl.distributed.reduce_gradients([weights], 1.5)
assert loss == 1.5
assert bl.distributed.from_first("settings") == "settings"
torch.testing.assert_close(bl.distributed.all_reduce(torch.ones(2)), torch.ones(2))

# %% distributed.AllReduce:
operator = bl.distributed.AllReduce(bl.extending.Dense(2 * torch.eye(2)))  # the sum of what the ranks have
torch.testing.assert_close(operator.matvec(torch.ones(2)), torch.full((2,), 2.0))

# %% files files.write_atomically:
import tempfile
from pathlib import Path

with tempfile.TemporaryDirectory() as folder:
    bl.files.write_atomically(Path(folder) / "new" / "note.txt", lambda file: file.write(b"whole, or not at all"))
    assert (Path(folder) / "new" / "note.txt").read_bytes() == b"whole, or not at all"
