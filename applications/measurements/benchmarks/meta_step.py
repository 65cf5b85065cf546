"""Workload A: one meta-gradient of implicit MAML, the paper's network on Omniglot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from applications.measurements.benchmarks.contest import Contestant
from applications.measurements.benchmarks.meta_step_task import CHECKED_TASKS, FewShot, flat
from applications.measurements.benchmarks.peers_meta_step import contestants

BLOCKS = 4


@dataclass(frozen=True)
class MetaStep(FewShot):
    """Conv4-64 with batch-statistics norm and max-pool, lambda 2, gradient steps of 0.01, then 5 CG steps.

    The gradient of each task towards the meta-parameters is an answer of its own, ``[tasks, n]``: ReLU and max-pool
    have kinks, and where rounding sends a task to the other side of one, its gradient is another one. So the error is
    the lower quartile over the tasks: an algorithm that is wrong is wrong in all of them.

    Where the Hessian of a task is indefinite, as in many 20-way tasks of an untrained network, ours stops CG at the
    negative curvature and the peers go on: there are two references, and either will do. An indefinite system
    amplifies rounding: right programs in float32 differ by up to some 1e-4 there, wrong ones by 0.1 and more.
    """

    letter: ClassVar[str] = "A"
    tolerance: ClassVar[float | None] = 1e-3

    def title(self) -> str:
        """See `Workload`."""
        name = "glyphs" if self.root is None else "Omniglot"
        where = "" if self.device == "cpu" else ", on a GPU"
        return f"A: one meta-step of implicit MAML, {name} {self.ways}-way 1-shot, {self.tasks} tasks{where}"

    def contestants(self) -> dict[str, Callable[[], Contestant]]:
        """See `Workload`."""
        if self.device == "cuda":
            own = {"bilevel": lambda: self.ours(capture=True), "bilevel, no CUDA graph": lambda: self.ours()}
        else:
            own = {
                "bilevel": lambda: self.ours(),
                "bilevel, one thread": lambda: self.ours(threads=1),
                "bilevel, all tasks at once": lambda: self.ours(chunk_size=self.tasks, threads=1),
                "bilevel, four tasks at once": lambda: self.ours(chunk_size=4, threads=1),
                "bilevel, four on each thread": lambda: self.ours(chunk_size=4),
                "bilevel, task by task": lambda: self.ours(chunk_size=1, threads=1),
            }
        return {**own, **contestants(self)}

    def reference(self) -> np.ndarray | None:
        """``[2, tasks, n]``; plain PyTorch in float64, task by task, double backward and a textbook CG."""
        learner, episodes = self.problem()
        meta = [param.detach().cpu().double() for param in learner.meta.values()]
        tasks = zip(*(tensor[:CHECKED_TASKS].cpu() for tensor in episodes.tensors()), strict=True)
        return torch.stack([_reference(self, meta, task) for task in tasks], 1).numpy()

    def flops(self) -> float | None:
        """Floating-point operations of one meta-step: the convolutions and the head, two for a multiply-add.

        A gradient is three forward passes, a Hessian product six; gradients towards the images are not needed.
        """
        size, total, first, last = 28, 0.0, 0.0, 64
        for block in range(BLOCKS):
            size = (size + 1) // 2 if self.halve == "stride" else size
            work = 2.0 * size**2 * 9 * 64 * (1 if block == 0 else 64)
            first = work if block == 0 else first
            total += work
            size = size // 2 if self.halve == "pool" else size
        total += 2.0 * last * size**2 * self.ways
        support, query = self.ways, self.ways * self.queries
        gradient, product = 3 * total - first, 6 * total - 3 * first
        steps = self.inner_steps + 1  # one more where the graph is built
        return self.tasks * (steps * support * gradient + query * gradient + self.cg_steps * support * product)


def network(params: list[Tensor], x: Tensor, halve: str) -> Tensor:
    """Conv4 from PyTorch's own parts."""
    stride = 2 if halve == "stride" else 1
    for block in range(BLOCKS):
        weight, bias, scale, shift = params[4 * block : 4 * block + 4]
        x = F.conv2d(x, weight, bias, stride, padding=1)
        x = F.batch_norm(x, None, None, scale, shift, training=True).relu()
        x = F.max_pool2d(x, 2) if halve == "pool" else x
    return F.linear(x.flatten(1), *params[4 * BLOCKS :])


def _reference(workload: FewShot, meta: list[Tensor], task: tuple[Tensor, ...]) -> Tensor:
    def task_loss(params: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(network(params, x, workload.halve), y)

    sx, sy, qx, qy = (tensor.double() if tensor.is_floating_point() else tensor for tensor in task)
    phi = [param.clone().requires_grad_() for param in meta]
    for _ in range(workload.inner_steps):
        grads = torch.autograd.grad(task_loss(phi, sx, sy), phi)
        phi = [
            (p - workload.inner_lr * (g + workload.strength * (p - m))).detach().requires_grad_()
            for p, g, m in zip(phi, grads, meta, strict=True)
        ]
    b = flat(torch.autograd.grad(task_loss(phi, qx, qy), phi))
    inner = torch.autograd.grad(task_loss(phi, sx, sy), phi, create_graph=True)

    def product(v: Tensor) -> Tensor:
        parts = [part.view_as(p) for part, p in zip(v.split([p.numel() for p in phi]), phi, strict=True)]
        products = torch.autograd.grad(inner, phi, parts, retain_graph=True)
        return v + flat(products) / workload.strength

    x, r, p = torch.zeros_like(b), b, b
    stopped = None
    for _ in range(workload.cg_steps):
        ap = product(p)
        if p @ ap <= 0 and stopped is None:
            stopped = x
        alpha = (r @ r) / (p @ ap)
        x, new = x + alpha * p, r - alpha * ap
        p, r = new + (new @ new) / (r @ r) * p, new
    return torch.stack([x if stopped is None else stopped, x])
