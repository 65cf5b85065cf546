"""The other libraries on workload A, each in its own style, on the same network of PyTorch's layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from applications.measurements.benchmarks.contest import HYPERTORCH, IMAML, Contestant, Round, checkout, needs, timed
from applications.measurements.benchmarks.meta_step_task import FewShot, checked, flat

Task = tuple[Tensor, Tensor, Tensor, Tensor]


def contestants(workload: FewShot) -> dict[str, Callable[[], Contestant]]:
    """Name -> builder."""
    makers = {
        "TorchOpt, functional": torchopt_functional,
        "TorchOpt, object-oriented": torchopt_objects,
        "hypertorch": hypertorch,
        "imaml_dev": imaml_dev,
    }
    return {name: lambda make=make: task_by_task(workload, make) for name, make in makers.items()}  # type: ignore[misc]


def task_by_task(workload: FewShot, make: Callable[[nn.Module, FewShot], Callable[[Task], Tensor]]) -> Contestant:
    """Runs ``make``'s function of a task on all tasks; it gives the task's gradient, flat."""
    learner, episodes = workload.problem()
    net = build(workload).to(workload.device)
    with torch.no_grad():
        for param, value in zip(net.parameters(), learner.meta.values(), strict=True):
            param.copy_(value)
    tasks = list(zip(*episodes.tensors(), strict=True))
    gradient = make(net, workload)

    def run() -> Round:
        seconds, answer = timed(lambda: torch.stack([gradient(task) for task in tasks]))
        return Round(seconds, checked(answer))

    return run


def build(workload: FewShot) -> nn.Module:
    """Conv4-64 as everybody writes it."""
    layers: list[nn.Module] = []
    pool = workload.halve == "pool"
    for channels in (1, 64, 64, 64):
        norm = nn.BatchNorm2d(64, track_running_stats=False)
        layers += [nn.Conv2d(channels, 64, 3, 1 if pool else 2, padding=1), norm, nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if pool else []
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 if pool else 64 * 4, workload.ways))


def named_loss(net: nn.Module) -> Callable[[Sequence[Tensor], Tensor, Tensor], Tensor]:
    """The cross-entropy of the network as a function of its parameters."""
    names = [name for name, _ in net.named_parameters()]

    def loss(params: Sequence[Tensor], x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(torch.func.functional_call(net, dict(zip(names, params, strict=True)), (x,)), y)

    return loss


def proximal(strength: float, params: Iterable[Tensor], meta: Iterable[Tensor]) -> Tensor:
    """``strength / 2 ||params - meta||^2``"""
    return strength / 2 * torch.stack([(p - m).square().sum() for p, m in zip(params, meta, strict=True)]).sum()


def torchopt_functional(net: nn.Module, workload: FewShot) -> Callable[[Task], Tensor]:
    torchopt = needs("torchopt")

    loss = named_loss(net)
    meta = tuple(param.detach().clone().requires_grad_() for param in net.parameters())

    def objective(params: tuple[Tensor, ...], meta: tuple[Tensor, ...], x: Tensor, y: Tensor) -> Tensor:
        return loss(params, x, y) + proximal(workload.strength, params, meta)

    @torchopt.diff.implicit.custom_root(
        torch.func.grad(objective, argnums=0),
        argnums=1,
        solve=torchopt.linear_solve.solve_cg(maxiter=workload.cg_steps, rtol=0.0, atol=0.0),
    )
    def solve(params: tuple[Tensor, ...], meta: tuple[Tensor, ...], x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        optimizer = torchopt.sgd(lr=workload.inner_lr)
        state = optimizer.init(params)
        with torch.enable_grad():
            for _ in range(workload.inner_steps):
                params = tuple(p.detach().requires_grad_() for p in params)
                grads = torch.autograd.grad(objective(params, meta, x, y), params)
                updates, state = optimizer.update(grads, state)
                params = torchopt.apply_updates(params, updates)
        return tuple(p.detach() for p in params)

    def gradient(task: Task) -> Tensor:
        sx, sy, qx, qy = task
        start = tuple(m.detach().clone().requires_grad_() for m in meta)
        adapted = solve(start, meta, sx, sy)
        return flat(torch.autograd.grad(loss(adapted, qx, qy), meta))

    return gradient


def torchopt_objects(net: nn.Module, workload: FewShot) -> Callable[[Task], Tensor]:
    torchopt = needs("torchopt")

    solver = torchopt.linear_solve.solve_cg(maxiter=workload.cg_steps, rtol=0.0, atol=0.0)

    class Inner(torchopt.nn.ImplicitMetaGradientModule, linear_solve=solver):  # type: ignore[name-defined,call-arg]
        def __init__(self, meta_net: nn.Module):
            super().__init__()
            self.meta_net = meta_net
            self.net = torchopt.module_clone(meta_net, by="deepcopy", detach_buffers=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def objective(self, x: Tensor, y: Tensor) -> Tensor:
            return cross_entropy(self(x), y) + proximal(workload.strength, self.parameters(), self.meta_parameters())

        def reset(self) -> None:
            with torch.no_grad():
                for p, m in zip(self.parameters(), self.meta_parameters(), strict=True):
                    p.data.copy_(m.data)
                    p.detach_().requires_grad_()

        def solve(self, x: Tensor, y: Tensor) -> Any:
            params = tuple(self.parameters())
            optimizer = torch.optim.SGD(params, lr=workload.inner_lr)
            with torch.enable_grad():
                for _ in range(workload.inner_steps):
                    optimizer.zero_grad()
                    self.objective(x, y).backward(inputs=params)
                    optimizer.step()
            return self

    inner = Inner(net)

    def gradient(task: Task) -> Tensor:
        sx, sy, qx, qy = task
        inner.reset()
        inner.solve(sx, sy)
        return flat(torch.autograd.grad(cross_entropy(inner(qx), qy), list(net.parameters())))

    return gradient


def hypertorch(net: nn.Module, workload: FewShot) -> Callable[[Task], Tensor]:
    hypergrad = checkout("hypergrad", *HYPERTORCH)

    loss = named_loss(net)
    meta = [param.detach().clone().requires_grad_() for param in net.parameters()]

    def gradient(task: Task) -> Tensor:
        sx, sy, qx, qy = task

        def objective(params: list[Tensor], hparams: list[Tensor]) -> Tensor:
            return loss(params, sx, sy) + proximal(workload.strength, params, hparams)

        optimizer = hypergrad.GradientDescent(objective, workload.inner_lr)
        fixed = [m.detach() for m in meta]
        params = [m.detach().clone() for m in meta]
        for _ in range(workload.inner_steps):
            params = [p.detach().requires_grad_() for p in params]
            params = optimizer.step(params, fixed, create_graph=False)
        grads = hypergrad.CG(
            params, meta, workload.cg_steps, optimizer, lambda params, _: loss(params, qx, qy), set_grad=False
        )
        return flat(grads)

    return gradient


def imaml_dev(net: nn.Module, workload: FewShot) -> Callable[[Task], Tensor]:
    """The code of the paper, with the two things mended that make its answer another one."""
    learner_model = checkout("implicit_maml.learner_model", *IMAML)
    utils = checkout("implicit_maml.utils", *IMAML)

    learner = learner_model.Learner(net, cross_entropy, inner_lr=workload.inner_lr)
    start = learner.get_params()

    def gradient(task: Task) -> Tensor:
        sx, sy, qx, qy = task
        named = {"x_train": sx, "y_train": sy, "x_val": qx, "y_val": qy}
        learner.set_params(start)
        # As released, the steps leave the proximal term out, and the system is 2 I + H / 12: here both are the paper's.
        learner.learn_task(named, workload.inner_steps, add_regularization=True, w_0=start, lam=workload.strength)
        right = flat(torch.autograd.grad(learner.get_loss(qx, qy), list(net.parameters())))
        matrix = learner.matrix_evaluator(named, workload.strength, regu_coef=0.0, lam_damping=0.0)
        return utils.cg_solve(matrix, right, workload.cg_steps)

    return gradient


def higher(net: nn.Module, workload: FewShot) -> Callable[[Task], Tensor]:
    """MAML as higher's own example writes it, with the proximal term: another gradient, through the steps."""
    library = needs("higher")
    params = list(net.parameters())
    optimizer = torch.optim.SGD(params, lr=workload.inner_lr)

    def gradient(task: Task) -> Tensor:
        sx, sy, qx, qy = task
        with library.innerloop_ctx(net, optimizer, copy_initial_weights=False) as (inner, unrolled):
            for _ in range(workload.inner_steps):
                unrolled.step(cross_entropy(inner(sx), sy) + proximal(workload.strength, inner.parameters(), params))
            return flat(torch.autograd.grad(cross_entropy(inner(qx), qy), params))

    return gradient
