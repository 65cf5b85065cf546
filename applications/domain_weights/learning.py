"""How the weights of the domains follow the loss on the target: a look-ahead of the training, and its hypergradient."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

import bilevel as bl
from applications.domain_weights.model import Params, Transformer, logits_of, losses_of
from applications.frame.tune import settings_usable

Method = Literal["implicit", "sama", "penalty"]
State = dict[str, Tensor]

METHODS: dict[Method, Any] = {
    "implicit": bl.Implicit(bl.CG(max_steps=10), damping=1e-2),
    "sama": bl.SAMA(),
    "penalty": bl.Penalty(strength=100.0, symmetric=False),
}
"""``"implicit"``: products with the damped Gauss-Newton matrix of a batch of all domains. ``"sama"``: three gradients,
one of them through the step of Adam that the training makes. ``"penalty"``: gradients alone, of a second network that
is nudged towards the target by `PENALTY_STEPS`."""
PENALTY_STEPS = bl.Steps(bl.SGD(0.1), max_steps=10)
"""What answers the nudge: steps of Adam are as long for a small gradient as for a large one, and would not."""


@dataclass(frozen=True)
class Onward:
    """The next step of a training by Adam, from its moments on: an inner solver of one step.

    Args:
        state: the moments, flat; None before the first step. index: steps made.
    """

    rule: bl.Adam
    state: State | None
    index: int

    def minimize(self, problem: Any) -> bl.Solution:
        """See `bl.extending`."""
        state = self.rule.init(problem.start.y) if self.state is None else self.state
        return bl.Steps(self.rule, max_steps=self.index + 1).resume(problem, problem.start, state, self.index)


class Mixture:
    """The loss of a batch ``[K, n, c + 1]`` of all domains as a function of params and scores, whose softmax weighs it.

    Each rank has some of the n windows; sums over the ranks are those of one process.
    """

    def __init__(self, module: nn.Module, batch: Tensor):
        self.module, self.total = module, batch.shape[1]
        self.own = batch[:, bl.distributed.shard(self.total)]

    def outputs(self, params: Params, scores: Tensor) -> Tensor:
        """Logits ``[K, own, c, characters]``."""
        return logits_of(self.module, params, self.own)

    def of_outputs(self, logits: Tensor, scores: Tensor) -> Tensor:
        losses = losses_of(logits.flatten(0, 1), self.own.flatten(0, 1)).unflatten(0, self.own.shape[:2])
        return scores.softmax(0) @ losses.sum(1) / self.total

    def __call__(self, params: Params, scores: Tensor) -> Tensor:
        """This rank's part of it."""
        return self.of_outputs(self.outputs(params, scores), scores)

    def curvature(self, problem: Any, at: Any) -> Any:
        """Its Gauss-Newton matrix over all ranks."""
        return bl.distributed.AllReduce(bl.GaussNewton(self.outputs, self.of_outputs)(problem, at))


def rehearse(hypergrad: Any) -> None:
    """One look-ahead of a transformer of a few numbers: what cannot differentiate it is told before any text is read.

    Raises:
        UserError: it cannot.
    """
    with torch.random.fork_rng(devices=[]):
        module, scores = Transformer(2, 2, 1, 1, 2), torch.zeros(2, requires_grad=True)
    mixture = Mixture(module, torch.zeros(2, bl.distributed.world_size(), 3, dtype=torch.long))
    with settings_usable():
        ahead = look_ahead(mixture, dict(module.named_parameters()), scores, hypergrad, Onward(bl.Adam(0.1), None, 0))
        torch.autograd.grad(sum((value.sum() for value in ahead.value.values()), torch.zeros(())), scores)


def look_ahead(mixture: Mixture, params: Params, scores: Tensor, hypergrad: Any, step: Onward) -> bl.Solution:
    """The network after the next step on the mixture, differentiable towards the scores."""
    solver = PENALTY_STEPS if isinstance(hypergrad, bl.Penalty) else step
    if isinstance(hypergrad, bl.Implicit):
        hypergrad = replace(hypergrad, operator=mixture.curvature)
    objective = bl.distributed.sharded(mixture)
    return bl.argmin(objective, params, scores, solver=solver, hypergrad=hypergrad, throw="ignore")
