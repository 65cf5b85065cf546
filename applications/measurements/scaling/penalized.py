"""A network on digits with penalties of its parameters: as many of either as one likes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy

import bilevel as bl
from applications.frame import memory

EXAMPLES, CLASSES = 500, 10
LR, CG_STEPS = 0.1, 5
FIRST_PENALTY = 1e-2


@dataclass(frozen=True)
class Size:
    """The size of one measurement.

    Args:
        width: units of both hidden layers. penalties: groups of parameters with a penalty each; None: one for each.
        inner_steps: of gradient descent. method: of the hypergradient.
    """

    width: int
    penalties: int | None = 1
    inner_steps: int = 10
    method: Literal["implicit", "unrolled"] = "implicit"

    @property
    def num_params(self) -> int:
        return sum(a * b for a, b in self.shapes)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return [(64, self.width), (self.width, self.width), (self.width, CLASSES)]


def measure(size: Size, threads: int, repeats: int) -> tuple[float, float]:
    """Peak MiB above the start and median seconds of a hypergradient; meant for a fresh process."""
    torch.set_num_threads(threads)
    hypergradient = problem(size)
    hypergradient()  # libraries allocate on their first use
    peak, seconds = 0.0, []
    for _ in range(repeats):
        begin = time.perf_counter()
        peak = max(peak, memory.peak_of(torch.device("cpu"), hypergradient)[1])
        seconds.append(time.perf_counter() - begin)
    return peak, statistics.median(seconds)


def problem(size: Size, cg_steps: int = CG_STEPS) -> Callable[[], Tensor]:
    """Makes the hypergradient of the validation loss towards the log-penalties, ``[penalties]``."""
    features, targets = load_digits(return_X_y=True)
    x, y = torch.as_tensor(features / 16, dtype=torch.float32), torch.as_tensor(targets)
    generator = torch.Generator().manual_seed(0)
    init = [torch.randn(shape, generator=generator) * (2 / shape[0]) ** 0.5 for shape in size.shapes]
    groups = size.penalties or size.num_params
    log_penalties = torch.full((groups,), FIRST_PENALTY).log().requires_grad_()
    group_of = torch.arange(size.num_params) % groups

    def outputs(params: list[Tensor], x: Tensor) -> Tensor:
        first, second, last = params
        return torch.relu(torch.relu(x @ first) @ second) @ last

    def inner(params: list[Tensor], log_penalties: Tensor) -> Tensor:
        each = log_penalties.exp().expand(size.num_params) if groups == 1 else log_penalties.exp()[group_of]
        sizes = [param.numel() for param in params]
        decay = sum(
            ((part.view_as(p) * p.square()).sum() for part, p in zip(each.split(sizes), params, strict=True)),
            start=torch.zeros(()),
        )
        return cross_entropy(outputs(params, x[:EXAMPLES]), y[:EXAMPLES]) + decay / 2

    hypergrad = bl.Unroll() if size.method == "unrolled" else bl.Implicit(bl.CG(max_steps=cg_steps))

    def hypergradient() -> Tensor:
        solver = bl.GradientDescent(LR, max_steps=size.inner_steps)
        fit = bl.argmin(inner, init, log_penalties, solver=solver, hypergrad=hypergrad, throw="ignore")
        loss = cross_entropy(outputs(fit.value, x[EXAMPLES : 2 * EXAMPLES]), y[EXAMPLES : 2 * EXAMPLES])
        (grad,) = torch.autograd.grad(loss, log_penalties)
        return grad

    return hypergradient
