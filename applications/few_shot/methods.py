"""Five ways to a meta-gradient on the same episodes: implicit MAML (two inner solvers), MAML, FOMAML, Reptile.

Each adapts T copies of the meta-parameters as one tensor program and returns a scalar whose backward pass leaves the
meta-gradient in the meta-parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import bilevel as bl
from applications.few_shot.config import Config
from applications.few_shot.episodes import Episodes

Params = dict[str, Tensor]


@dataclass(frozen=True)
class Learner:
    """A network, its meta-parameters and what adaptation needs.

    Attributes:
        meta: name -> parameter, the initialisation that is learned.
        log_strength: layer -> log lambda, 0-d; one entry ``"all"`` unless lambda is learned for each layer.
    """

    config: Config
    net: nn.Module
    meta: Params
    log_strength: Params

    @classmethod
    def create(cls, config: Config, net: nn.Module) -> Learner:
        meta: Params = dict(net.named_parameters())
        names = {_layer(name) for name in meta} if config.learn_strength == "layer" else {"all"}
        like = next(iter(meta.values()))
        start = torch.tensor(config.strength, dtype=like.dtype, device=like.device).log()
        learned = config.learn_strength != "no"
        return cls(config, net, meta, {name: start.clone().requires_grad_(learned) for name in sorted(names)})

    def parameters(self) -> list[Tensor]:
        """What the meta-optimizer updates."""
        fixed = "head." if self.config.head == "zero" else None
        learned = [param for name, param in self.meta.items() if fixed is None or not name.startswith(fixed)]
        return [*learned, *(s for s in self.log_strength.values() if s.requires_grad)]

    def predict(self, params: Params, x: Tensor) -> Tensor:
        """Logits ``[n, ways]`` of one task's images ``[n, channels, size, size]``."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            return functional_call(self.net, params, (x,)).to(x.dtype)

    def loss(self, params: Params, x: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy of one task, the mean over its images."""
        return cross_entropy(self.predict(params, x), y)

    def proximal_loss(self, params: Params, x: Tensor, y: Tensor) -> Tensor:
        """The inner objective of implicit MAML: ``loss + lambda / 2 ||params - meta||^2``."""
        return self.loss(params, x, y) + self.proximal_term(params)

    def proximal_term(self, params: Params) -> Tensor:
        total = torch.zeros((), dtype=next(iter(params.values())).dtype, device=next(iter(params.values())).device)
        for name, param in params.items():
            log_strength = self.log_strength.get(_layer(name), self.log_strength.get("all"))
            assert log_strength is not None
            total = total + log_strength.exp() / 2 * (param - self.meta[name]).square().sum()
        return total


@dataclass(frozen=True)
class Outcome:
    """Of one meta-step: the scalar to differentiate, and what to record.

    Attributes:
        objective: its gradient is the meta-gradient. query_loss, accuracy: means over the tasks, detached.
        solution: of the adaptation; after ``objective.backward()`` its ``adjoint`` tells of the linear solve.
    """

    objective: Tensor
    query_loss: Tensor
    accuracy: Tensor
    solution: bl.Solution


def adapt(learner: Learner, x: Tensor, y: Tensor, hypergrad: bl.Implicit | bl.Unroll | None = None) -> bl.Solution:
    """Adapt to T support sets ``x [T, n, ...]``, ``y [T, n]``: the solution's value has leaves ``[T, ...]``."""
    config = learner.config
    proximal = config.method.startswith("imaml")
    objective = learner.proximal_loss if proximal else learner.loss
    solver: bl.GradientDescent | bl.NewtonCG
    if config.method == "imaml-hf":
        solver = bl.NewtonCG(max_steps=config.inner_steps, cg_steps=config.newton_cg_steps, operator=config.hessian)
    else:
        solver = bl.GradientDescent(
            config.inner_lr, config.inner_steps, momentum=config.inner_momentum, safeguard=config.safeguard
        )
    start = bl.stack(learner.meta, len(x))
    # Residuals and curvature are recorded with the metrics and a non-finite step is skipped: no need to shout.
    return bl.argmin(torch.vmap(objective), start, x, y, solver=solver, hypergrad=hypergrad, throw="ignore")


def meta_step(learner: Learner, episodes: Episodes) -> Outcome:
    """The meta-objective of the configured method on these episodes."""
    return METHODS[learner.config.method](learner, episodes)


def implicit(learner: Learner, episodes: Episodes) -> Outcome:
    """Implicit MAML: query loss at the proximal minimum, differentiated implicitly, ``(I + H / lambda) v = g``."""
    config = learner.config
    linear = bl.CG(max_steps=config.cg_steps) if config.cg_steps else bl.Identity(1 / config.strength)
    solution = adapt(learner, episodes.support_x, episodes.support_y, bl.Implicit(linear, operator=config.hessian))
    return _queried(learner, episodes, solution, solution.value)


def maml(learner: Learner, episodes: Episodes) -> Outcome:
    """MAML (Finn et al. 2017): query loss after the steps, differentiated through them."""
    solution = adapt(learner, episodes.support_x, episodes.support_y, bl.Unroll())
    return _queried(learner, episodes, solution, solution.value)


def first_order(learner: Learner, episodes: Episodes) -> Outcome:
    """First-order MAML: the gradient at the adapted parameters is applied to the meta-parameters as it is."""
    solution = adapt(learner, episodes.support_x, episodes.support_y)
    shifted = {name: meta + (solution.value[name] - meta).detach() for name, meta in learner.meta.items()}
    return _queried(learner, episodes, solution, shifted)


def reptile(learner: Learner, episodes: Episodes) -> Outcome:
    """Reptile (Nichol et al. 2018): move towards parameters that were adapted to all images of the task."""
    x = torch.cat([episodes.support_x, episodes.query_x], 1)
    y = torch.cat([episodes.support_y, episodes.query_y], 1)
    solution = adapt(learner, x, y)
    with torch.no_grad():
        queried = _queried(learner, episodes, solution, solution.value)
    distance = sum(
        ((meta - solution.value[name]).square().sum() for name, meta in learner.meta.items()), torch.zeros(())
    )
    return replace(queried, objective=distance / 2 / len(x))


METHODS: dict[str, Callable[[Learner, Episodes], Outcome]] = {
    "imaml": implicit,
    "imaml-hf": implicit,
    "maml": maml,
    "fomaml": first_order,
    "reptile": reptile,
}


def _queried(learner: Learner, episodes: Episodes, solution: bl.Solution, params: Params) -> Outcome:
    logits = torch.vmap(learner.predict)(params, episodes.query_x)
    loss = cross_entropy(logits.flatten(0, 1), episodes.query_y.flatten())
    accuracy = (logits.detach().argmax(-1) == episodes.query_y).float().mean()
    return Outcome(loss, loss.detach(), accuracy, solution)


def _layer(name: str) -> str:
    return name.rpartition(".")[0] or name
