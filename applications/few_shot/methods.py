"""Ways to a meta-gradient on the same episodes: implicit MAML (two inner solvers), MAML, FOMAML, Reptile, and
prototypical networks, whose adaptation is a formula.

Each adapts copies of the meta-parameters to tasks as one tensor program, and gives the objectives of the tasks, whose
mean has the meta-gradient as its gradient.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

import bilevel as bl
from applications.few_shot.config import Config
from applications.few_shot.episodes import Episodes
from applications.few_shot.guard import LEFT_OUT, guarded
from applications.frame.errors import UserError
from applications.frame.interruption import stop_if_asked
from applications.frame.tune import settings_usable
from bilevel._torch import pytree

Params = dict[str, Tensor]

NUMBERS_AT_ONCE = 2_100_000
"""In the largest tensor of one program on a CPU, about: with fewer, dispatching the operations takes the time; with
more, memory does."""

SMALL = 4096
"""Numbers of a parameter below which it is joined with others. Where large ones are, each second derivative fills and
adds the whole vector once for every part of it."""


@dataclass(frozen=True)
class Learner:
    """A network, its meta-parameters and what adaptation needs.

    Attributes:
        meta: name -> parameter, the initialisation that is learned.
        log_strength: layer -> log lambda, 0-d; one entry ``"all"`` unless lambda is learned for each layer.
        chosen: ``solver`` and ``hypergrad`` in place of those that the configuration describes.
    """

    config: Config
    net: nn.Module
    meta: Params
    log_strength: Params
    chosen: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def create(cls, config: Config, net: nn.Module, chosen: Mapping[str, Any] | None = None) -> Learner:
        """At the network's parameters, a head that stays at zero set to it; ``chosen`` may have a ``strength`` too."""
        chosen = dict(chosen or {})
        config = replace(config, strength=chosen.pop("strength", config.strength))
        meta: Params = dict(net.named_parameters())
        refuse_other_heads(config, meta)
        with torch.no_grad():
            for name in fixed_at_zero(config, meta):
                meta[name].zero_()
        names = {_layer(name) for name in meta} if config.learn_strength == "layer" else {"all"}
        like = next(iter(meta.values()))
        start = torch.tensor(config.strength, dtype=like.dtype, device=like.device).log()
        learned = config.learn_strength != "no"
        return cls(config, net, meta, {name: start.clone().requires_grad_(learned) for name in sorted(names)}, chosen)

    def inner_solver(self) -> Any:
        """What adapts to a task."""
        config = self.config
        if "solver" in self.chosen:
            return self.chosen["solver"]
        if config.method == "imaml-hf":
            return bl.NewtonCG(max_steps=config.inner_steps, cg_steps=config.newton_cg_steps, operator=config.hessian)
        return bl.GradientDescent(
            config.inner_lr, config.inner_steps, momentum=config.inner_momentum, safeguard=config.safeguard
        )

    def hypergrad(self) -> Any:
        """How implicit MAML differentiates the adaptation; a task whose solve is worse than none counts as zero."""
        config = self.config
        smallest = torch.stack(list(self.log_strength.values())).detach().amin().exp()
        if "hypergrad" in self.chosen:
            return guarded(self.chosen["hypergrad"], smallest)
        linear = bl.CG(max_steps=config.cg_steps) if config.cg_steps else bl.Identity(1 / config.strength)
        return guarded(bl.Implicit(linear, operator=config.hessian), smallest)

    def unrolled(self) -> Any:
        """How MAML differentiates the adaptation: through its steps, in the chosen way where that is one of them."""
        chosen = self.chosen.get("hypergrad")
        return chosen if isinstance(chosen, bl.Unroll | bl.ForwardGradient) else bl.Unroll()

    @cached_property
    def task_objectives(self) -> Callable[..., Any]:
        """``(params, *episodes of t tasks) -> objectives [t], Queried``, recorded where the configuration says so."""
        objectives = partial(_task_objectives, self)
        return bl.capture(objectives) if self.config.capture else objectives

    def with_steps(self, steps: int) -> Learner:
        """The same, which makes so many steps of adaptation (at most, where it stops by itself)."""
        chosen = dict(self.chosen)
        if "solver" in chosen:
            chosen["solver"] = replace(chosen["solver"], max_steps=steps)
        return replace(self, config=replace(self.config, inner_steps=steps), chosen=chosen)

    def for_evaluation(self) -> Learner:
        """The same with the steps that the configuration asks for in evaluations."""
        steps = self.config.eval_steps
        return self if steps is None else self.with_steps(steps)

    def late(self) -> Learner:
        """The same with the steps that the configuration asks for late in training."""
        config = self.config
        steps = config.late_inner_steps or config.inner_steps
        return replace(
            self, config=replace(config, inner_steps=steps, cg_steps=config.late_cg_steps or config.cg_steps)
        )

    def parameters(self) -> list[Tensor]:
        """What the meta-optimizer updates.

        Raises:
            UserError: nothing: the network is nothing but a head that stays at zero.
        """
        fixed = fixed_at_zero(self.config, self.meta)
        learned = [param for name, param in self.meta.items() if name not in fixed]
        if not learned:
            raise UserError(
                f"--model {self.config.model} has no parameters beside those of its head, which --head zero keeps at "
                "zero: nothing is left to learn. Give it features, or take --head learned."
            )
        return [*learned, *(s for s in self.log_strength.values() if s.requires_grad)]

    def tasks_at_once(self, x: Tensor, beside: int = 0) -> int | None:
        """Tasks in one tensor program, of images ``x [T, n, ...]`` and ``beside`` numbers a task; None for all."""
        if x.device.type != "cpu":
            return None
        each = getattr(self.net, "largest", 64 * x[0, 0].numel())
        return max(1, NUMBERS_AT_ONCE // (each * x.shape[1] + beside))

    def sharing(self, x: Tensor, beside: int = 0) -> dict[str, Any]:
        """How T tasks with images ``x [T, n, ...]`` are shared out: the settings of `bl.map_tasks`."""
        threads = self.config.threads or (torch.get_num_threads() if x.device.type == "cpu" else 1)
        return {"chunk_size": self.config.chunk_size or self.tasks_at_once(x, beside), "num_threads": threads}

    def predict(self, params: Params, x: Tensor) -> Tensor:
        """Logits ``[n, ways]`` of one task's images ``[n, channels, size, size]``; with T in front, of T tasks.

        A meta-step calls it many times, so that a signal need not wait for its end.
        """
        stop_if_asked()
        call: Callable[..., Tensor] = partial(bl.nn.functional_call, self.net)
        if x.dim() == 5 and not getattr(self.net, "takes_tasks", False):
            call = torch.vmap(call)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            return call(params, x).to(x.dtype)

    def features(self, params: Params, x: Tensor) -> Tensor:
        """What the head sees of T tasks' images ``x [T, n, ...]``: ``[T, n, size]``.

        Raises:
            UserError: the network has no module called features before a linear layer called head.
        """
        features, head = getattr(self.net, "features", None), getattr(self.net, "head", None)
        if not isinstance(features, nn.Module) or not isinstance(head, nn.Linear):
            raise UserError(
                f"--method prototypical needs a network that is a module called features and a linear layer called "
                f"head behind it; {self.config.model} is not. Name them so, or take another method."
            )
        own = {name.removeprefix("features."): p for name, p in params.items() if name.startswith("features.")}
        call: Callable[..., Tensor] = partial(bl.nn.functional_call, features)
        if not getattr(self.net, "takes_tasks", False):
            call = torch.vmap(call)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            return call(own, x).to(x.dtype)

    def loss(self, params: Params, x: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy, the mean over the images of a task; ``[T]`` for T tasks."""
        return task_cross_entropy(self.predict(params, x), y)

    def proximal_loss(self, params: Params, x: Tensor, y: Tensor) -> Tensor:
        """The inner objective of implicit MAML: ``loss + lambda / 2 ||params - meta||^2``."""
        return self.loss(params, x, y) + self.proximal_term(params)

    def proximal_term(self, params: Params) -> Tensor:
        """``[T]`` for parameters of T tasks."""
        terms = []
        for layer, log_strength in self.log_strength.items():
            names = [name for name in params if layer in ("all", _layer(name))]
            small = [name for name in names if self.meta[name].numel() < SMALL]
            groups = [[name] for name in names if name not in small] + ([small] if small else [])
            distances = [self._squared_distance(params, group) for group in groups]
            terms.append(log_strength.exp() / 2 * sum(distances[1:], distances[0]))
        return sum(terms[1:], terms[0])

    def _squared_distance(self, params: Params, names: list[str]) -> Tensor:
        """Distances of the parameters of T tasks from the meta-parameters, ``[T]``: as one vector, fast."""
        moved = _joined([self._flat(params[name], name) for name in names])
        return (moved - _joined([self.meta[name].reshape(-1) for name in names])).square().sum(-1)

    def _flat(self, param: Tensor, name: str) -> Tensor:
        return param.reshape(*param.shape[: param.dim() - self.meta[name].dim()], -1)


def _joined(vectors: list[Tensor]) -> Tensor:
    return vectors[0] if len(vectors) == 1 else torch.cat(vectors, -1)


def fixed_at_zero(config: Config, names: Iterable[str]) -> list[str]:
    """Those of the module called head, where the configuration keeps it at zero: they are not learned."""
    return [name for name in names if config.head == "zero" and name.startswith("head.")]


def refuse_other_heads(config: Config, meta: Params) -> None:
    """Refuse what is called head and is no linear layer of the outputs: zeros in its place let nothing be learned.

    Raises:
        UserError: it is another layer, or several.
    """
    fixed = fixed_at_zero(config, meta)
    outputs = all(meta[name].shape[:1] == (config.ways,) for name in fixed)
    if outputs and {name: meta[name].dim() for name in fixed}.items() <= {"head.weight": 2, "head.bias": 1}.items():
        return
    raise UserError(
        f"--head zero starts the layer called head at zero, and that of --model {config.model} is not one linear layer "
        f"of {config.ways} outputs: it has {', '.join(f'{name} {list(meta[name].shape)}' for name in fixed)}. At zero "
        "it would pass nothing on, and nothing would be learned. Call the last linear layer alone head, or take --head "
        "learned."
    )


def task_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """``logits [*T, n, ways], y [*T, n] -> [*T]``"""
    return cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="none").view_as(y).mean(-1)


@dataclass(frozen=True)
class Outcome:
    """What one meta-step gives: the scalar to differentiate, and what to record.

    Attributes:
        objective: its gradient is the sum of the meta-gradients of the tasks that are kept, divided by the number of
            all tasks.
        query_loss, accuracy: means over the tasks that are kept, detached; NaN where none is.
        kept: 0-d, tasks whose meta-gradient is of use, see `Guarded`.
        solution: of the adaptation; its ``adjoint`` tells of the linear solve. Without values, unless they were
            asked for: they are two networks a task.
    """

    objective: Tensor
    query_loss: Tensor
    accuracy: Tensor
    kept: Tensor
    solution: bl.Solution


@dataclass(frozen=True)
class Queried:
    """How t adapted tasks do on their queries: losses and accuracies ``[t]``, and the adaptation.

    ``objective [t]`` has the meta-gradients of the tasks as its gradients; but for Reptile it is the loss.
    """

    objective: Tensor
    loss: Tensor
    accuracy: Tensor
    solution: bl.Solution


pytree.register_dataclass(Queried)  # a recording returns it


def meta_step(learner: Learner, episodes: Episodes, values: bool = False) -> Outcome:
    """The meta-objective of the configured method on these episodes, a few tasks at a time."""
    params = {"meta": learner.meta, "log_strength": learner.log_strength}
    data = episodes.tensors()
    keep = None if values else _without_values
    sharing = learner.sharing(episodes.support_x)
    objective, found = bl.mean_over_tasks(learner.task_objectives, params, *data, **sharing, keep=keep)
    solution = bl.Solution.joined([queried.solution for queried in found])
    loss, accuracy = (torch.cat([getattr(queried, name) for queried in found]) for name in ("loss", "accuracy"))
    left_out = torch.zeros_like(loss, dtype=torch.bool)
    if solution.adjoint is not None:
        left_out = solution.adjoint.stats.get(LEFT_OUT, left_out)
    kept = ~left_out
    count = kept.sum()
    query_loss, hits = (torch.where(kept, each, torch.zeros_like(each)).sum() / count for each in (loss, accuracy))
    return Outcome(objective, query_loss, hits, count, solution)


def _task_objectives(learner: Learner, params: dict[str, Params], *data: Tensor) -> tuple[Tensor, Queried]:
    own = replace(learner, meta=params["meta"], log_strength=params["log_strength"])
    queried = METHODS[learner.config.method](own, Episodes(*data))
    return queried.objective, queried


def _without_values(queried: Queried) -> Queried:
    return replace(queried, solution=queried.solution.without_values())


def rehearse(config: Config, chosen: Mapping[str, Any]) -> None:
    """A meta-step of a network of a few numbers, and an adaptation as in evaluations, with settings of ``--solver``.

    Raises:
        UserError: they cannot be used.
    """
    own = replace(config, ways=2, threads=1, chunk_size=None, capture=False, precision="float32")
    x, y = torch.rand(2, 2, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([[0, 1], [0, 1]])
    with torch.random.fork_rng(devices=[]), settings_usable():
        layers = OrderedDict(flat=nn.Flatten(), features=nn.Linear(4, 2), head=nn.Linear(2, 2))
        learner = Learner.create(own, nn.Sequential(layers), chosen)
        meta_step(learner, Episodes(x, y, x, y)).objective.backward()
        adapt(learner.for_evaluation(), x, y)


def adapt(learner: Learner, x: Tensor, y: Tensor, hypergrad: Any = None) -> bl.Solution:
    """Adapt to T support sets ``x [T, n, ...]``, ``y [T, n]``: the solution's value has leaves ``[T, ...]``."""
    if learner.config.method == "prototypical":
        return with_prototypes(learner, x, y)
    proximal = learner.config.method.startswith("imaml")
    objective = learner.proximal_loss if proximal else learner.loss
    start = bl.stack(learner.meta, len(x))
    # Residuals and curvature are recorded with the metrics and a non-finite step is skipped: no need to shout.
    return bl.argmin(objective, start, x, y, solver=learner.inner_solver(), hypergrad=hypergrad, throw="ignore")


def implicit(learner: Learner, episodes: Episodes) -> Queried:
    """Implicit MAML: query loss at the proximal minimum, differentiated implicitly, ``(I + H / lambda) v = g``."""
    solution = adapt(learner, episodes.support_x, episodes.support_y, learner.hypergrad())
    return _queried(learner, episodes, solution, solution.value)


def maml(learner: Learner, episodes: Episodes) -> Queried:
    """MAML (Finn et al. 2017): query loss after the steps, differentiated through them."""
    solution = adapt(learner, episodes.support_x, episodes.support_y, learner.unrolled())
    return _queried(learner, episodes, solution, solution.value)


def first_order(learner: Learner, episodes: Episodes) -> Queried:
    """First-order MAML: the gradient at the adapted parameters is applied to the meta-parameters as it is."""
    solution = adapt(learner, episodes.support_x, episodes.support_y)
    shifted = {name: meta + (solution.value[name] - meta).detach() for name, meta in learner.meta.items()}
    return _queried(learner, episodes, solution, shifted)


def reptile(learner: Learner, episodes: Episodes) -> Queried:
    """Reptile (Nichol et al. 2018): move towards parameters that were adapted to all images of the task."""
    x = torch.cat([episodes.support_x, episodes.query_x], 1)
    y = torch.cat([episodes.support_y, episodes.query_y], 1)
    solution = adapt(learner, x, y)
    with torch.no_grad():
        queried = _queried(learner, episodes, solution, solution.value)
    moved = [(meta - solution.value[name]).square().reshape(len(x), -1).sum(1) for name, meta in learner.meta.items()]
    return replace(queried, objective=torch.stack(moved).sum(0) / 2)


def prototypical(learner: Learner, episodes: Episodes) -> Queried:
    """Prototypical networks (Snell et al. 2017): query loss of the nearest class mean, differentiated through it."""
    solution = adapt(learner, episodes.support_x, episodes.support_y)
    return _queried(learner, episodes, solution, solution.value)


def with_prototypes(learner: Learner, x: Tensor, y: Tensor) -> bl.Solution:
    """The meta-parameters with a head that takes the nearest class mean of the features, differentiable.

    ``2 c . f - ||c||^2`` is ``-||f - c||^2`` up to a term that all classes share.
    """
    params = {name: param.expand(len(x), *param.shape) for name, param in learner.meta.items()}
    features = learner.features(params, x)
    members = one_hot(y, learner.meta["head.weight"].shape[0]).to(features.dtype).mT
    means = members @ features / members.sum(-1, keepdim=True)
    head = {"head.weight": 2 * means, "head.bias": -means.square().sum(-1)}
    nothing = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    codes = torch.full_like(nothing, int(bl.Result.CONVERGED), dtype=torch.int64)
    stats = {"num_steps": torch.zeros_like(codes), "result": codes, "residual_norm": nothing}
    return bl.Solution({**params, **head}, stats)


METHODS: dict[str, Callable[[Learner, Episodes], Queried]] = {
    "imaml": implicit,
    "imaml-hf": implicit,
    "maml": maml,
    "fomaml": first_order,
    "reptile": reptile,
    "prototypical": prototypical,
}


def _queried(learner: Learner, episodes: Episodes, solution: bl.Solution, params: Params) -> Queried:
    """Fewer tasks at once than in the adaptation: the query sets are the largest tensors of a meta-step."""

    def chunk(params: Params, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = learner.predict(params, x)
        return task_cross_entropy(logits, y), (logits.detach().argmax(-1) == y).float().mean(-1)

    size = learner.tasks_at_once(episodes.query_x)
    loss, accuracy = bl.losses_of_tasks(chunk, params, episodes.query_x, episodes.query_y, chunk_size=size)
    return Queried(loss, loss, torch.cat(accuracy), solution)


def _layer(name: str) -> str:
    return name.rpartition(".")[0] or name
