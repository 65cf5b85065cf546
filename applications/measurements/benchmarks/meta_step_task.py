"""The network, the episodes and the knobs of workloads A, C and F, and ours on them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from applications.few_shot import data
from applications.few_shot.config import Config
from applications.few_shot.episodes import Episodes
from applications.few_shot.methods import Learner, meta_step
from applications.few_shot.train import create_learner, create_sampler, set_up_device
from applications.measurements.benchmarks.contest import Contestant, Round, Workload, timed

CHECKED_TASKS = 16
"""Tasks whose gradients are compared with the reference; more would only cost time."""


@dataclass(frozen=True)
class FewShot(Workload):
    """Few-shot tasks for a network that is adapted by gradient steps.

    Args:
        root: folder of Omniglot; None: the built-in glyphs.
        inner_steps: gradient steps of the adaptation.
        device: ``"cpu"`` or ``"cuda"``, for everybody; the reference is computed on the CPU.

    Attributes:
        strength, inner_lr, cg_steps: lambda, the size of the gradient steps, steps of CG. queries: images of a class.
        halve: how the network halves its maps: ``"pool"`` or ``"stride"``.
    """

    ways: int = 5
    tasks: int = 16
    root: str | None = None
    inner_steps: int = 16
    seed: int = 0
    device: str = "cpu"

    strength: ClassVar[float] = 2.0
    inner_lr: ClassVar[float] = 0.01
    cg_steps: ClassVar[int] = 5
    queries: ClassVar[int] = 15
    halve: ClassVar[Literal["pool", "stride"]] = "pool"

    @cached_property
    def config(self) -> Config:
        """Settings of the few-shot application."""
        return Config(
            data="glyphs" if self.root is None else "omniglot",
            data_root=None if self.root is None else Path(self.root),
            ways=self.ways,
            queries=self.queries,
            width=64,
            halve=self.halve,
            head="learned",
            inner_steps=self.inner_steps,
            inner_lr=self.inner_lr,
            safeguard=False,
            strength=self.strength,
            cg_steps=self.cg_steps,
            tasks=self.tasks,
            seed=self.seed,
            device=self.device,  # type: ignore[arg-type]
        )

    def problem(self, **changes: Any) -> tuple[Learner, Episodes]:
        """Network and episodes, the same in every process; the head is away from zero, where most gradients vanish."""
        config = replace(self.config, **changes)
        device = set_up_device(config)
        classes = data.load(config.data, config.data_root, split=config.split).train
        learner = create_learner(config, classes, device)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(self.seed)
            head = learner.meta["head.weight"]
            head.copy_(torch.nn.init.kaiming_uniform_(torch.empty(head.shape), a=5**0.5))
        sampler = create_sampler(config, classes, "train", self.queries, device)
        return learner, sampler.episodes(self.tasks, 0)

    def ours(self, **changes: Any) -> Contestant:
        """The few-shot application itself."""
        learner, episodes = self.problem(**changes)

        def run() -> Round:
            seconds, outcome = timed(lambda: self._gradient(learner, episodes))
            assert outcome.solution.adjoint is not None
            adjoint = outcome.solution.adjoint.value
            # The inner objective depends on the meta-parameters by lambda / 2 ||phi - theta||^2.
            adjoints = torch.cat([adjoint[name].reshape(self.tasks, -1) for name in learner.meta], 1)
            answer = self.tasks * self.strength * adjoints
            mean = flat(param.grad for param in learner.meta.values() if param.grad is not None)
            if torch.linalg.vector_norm(answer.mean(0) - mean) > 1e-4 * torch.linalg.vector_norm(mean):
                raise RuntimeError("The adjoints do not add up to the meta-gradient.")
            steps = outcome.solution.adjoint.stats["num_steps"].double().mean().item()
            return Round(seconds, checked(answer), {"iterations": round(steps, 1), "settings": changes})

        return run

    @staticmethod
    def _gradient(learner: Learner, episodes: Episodes):  # type: ignore[no-untyped-def]
        for param in learner.meta.values():
            param.grad = None
        outcome = meta_step(learner, episodes, values=True)
        outcome.objective.backward()
        return outcome


def checked(answer: Tensor) -> np.ndarray:
    """The part of ``[tasks, n]`` that is compared."""
    return answer[:CHECKED_TASKS].detach().double().cpu().numpy()


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """One vector of all."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
