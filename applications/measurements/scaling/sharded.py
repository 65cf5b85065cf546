"""Run by every rank under torchrun: one hypergradient over data in shards, and all-reduces alone.

``torchrun ... -m applications.measurements.scaling.sharded EXAMPLES FEATURES REPEATS FLOATS ...`` prints JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

import bilevel as bl
from applications.frame import ranks

CLASSES = 10


def main(examples: int, features: int, repeats: int, floats: list[int]) -> None:
    torch.set_num_threads(1)
    with ranks.process_group():
        hypergradient = problem(examples, features)
        grad = hypergradient()
        found = {
            "hypergradient": timed(hypergradient, repeats),
            "all_reduce": {str(n): timed(all_reduce_of(n), 4 * repeats) for n in floats},
            "norm": float(grad.norm()),
        }
        if ranks.leads():
            print(json.dumps(found), flush=True)


def problem(examples: int, features: int) -> Callable[[], Tensor]:
    """Softmax regression on random data ``[examples, features]``, each rank with its own rows; a penalty a feature."""
    own = bl.distributed.shard(examples)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, examples, features, generator=generator)
    truth = torch.randn(features, CLASSES, generator=generator)
    y = (x @ truth).argmax(-1)
    (x_train, x_val), (y_train, y_val) = x[:, own].clone(), y[:, own].clone()
    log_penalties = torch.full((features,), -4.0, requires_grad=True)

    def mean_loss(weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(linear(x, weights), y, reduction="sum") / examples

    def inner(weights: Tensor, log_penalties: Tensor) -> Tensor:
        decay = (log_penalties.exp() * weights.square()).sum()
        return mean_loss(weights, x_train, y_train) + decay / 2 / bl.distributed.world_size()

    def hypergradient() -> Tensor:
        solver = bl.GradientDescent(1.0, max_steps=20)
        hypergrad = bl.Implicit(bl.CG(max_steps=20))
        fit = bl.argmin(
            bl.distributed.sharded(inner),
            torch.zeros(CLASSES, features),  # the layout whose products are fastest
            log_penalties,
            solver=solver,
            hypergrad=hypergrad,
            throw="ignore",
        )
        loss = bl.distributed.sharded(lambda weights: mean_loss(weights, x_val, y_val))(fit.value)
        (grad,) = torch.autograd.grad(loss, log_penalties)
        return grad

    return hypergradient


def all_reduce_of(floats: int) -> Callable[[], Tensor]:
    vector = torch.zeros(floats)
    return lambda: bl.distributed.all_reduce(vector)


def timed(run: Callable[[], object], repeats: int) -> float:
    """Median seconds; all ranks begin together, after an all-reduce."""
    seconds = []
    for _ in range(repeats):
        bl.distributed.all_reduce(torch.zeros(1))
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[1:]]
    main(numbers[0], numbers[1], numbers[2], numbers[3:])
