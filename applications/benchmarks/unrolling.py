"""Workload C: memory of a meta-gradient against the number of inner steps, beside a library that unrolls them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from applications.benchmarks.contest import Contestant, Round, needs, timed
from applications.benchmarks.meta_step import INNER_LR, STRENGTH, MetaStep
from applications.benchmarks.peers_meta_step import build, flat


@dataclass(frozen=True)
class Unrolling(MetaStep):
    """Two tasks of workload A. `higher` differentiates the steps: its gradient is another one, and none is compared.

    The clock and the gradient of the implicit method are those of workload A.
    """

    tasks: int = 2
    inner_steps: int = 10

    letter: ClassVar[str] = "C"
    tolerance: ClassVar[float | None] = None
    repeats: ClassVar[bool] = False

    def title(self) -> str:
        """See `Workload`."""
        return f"C: memory of a meta-gradient through {self.inner_steps} inner steps, {self.tasks} tasks"

    def contestants(self) -> dict[str, Callable[[], Contestant]]:
        """See `Workload`."""
        return {"bilevel": lambda: self.ours(), "higher": lambda: self.higher()}

    def reference(self) -> None:  # type: ignore[override]
        """See `Workload`."""

    def higher(self) -> Contestant:
        """MAML as higher's own example writes it, with the proximal term."""
        higher = needs("higher")
        learner, episodes = self.problem()
        net = build(self.ways)
        with torch.no_grad():
            for param, value in zip(net.parameters(), learner.meta.values(), strict=True):
                param.copy_(value)
        params = list(net.parameters())
        optimizer = torch.optim.SGD(params, lr=INNER_LR)

        def gradient(sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
            with higher.innerloop_ctx(net, optimizer, copy_initial_weights=False) as (inner, steps):
                for _ in range(self.inner_steps):
                    pairs = zip(inner.parameters(), params, strict=True)
                    distance = torch.stack([(p - m).square().sum() for p, m in pairs]).sum()
                    steps.step(cross_entropy(inner(sx), sy) + STRENGTH / 2 * distance)
                return flat(torch.autograd.grad(cross_entropy(inner(qx), qy), params))

        tasks = list(zip(*episodes.tensors(), strict=True))

        def run() -> Round:
            seconds, _ = timed(lambda: torch.stack([gradient(*task) for task in tasks]).mean(0))
            return Round(seconds)

        return run
