"""Hyper-cleaning itself: the hypergradient of the validation loss with respect to the weight of every example."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import bilevel as bl
from applications.data_cleaning.model import SOLVER, Model, Params, mean_loss
from applications.data_cleaning.scores import detection
from applications.data_cleaning.task import Task
from applications.frame.checkpoint import restore_optimizer
from applications.frame.run import Row

SETTINGS: dict[str, Any] = {"solver": SOLVER, "hypergrad": bl.Implicit(bl.CG(rtol=1e-2, max_steps=40))}
"""Solvers of the inner problem and its hypergradient; the operator is always the Gauss-Newton matrix."""


class Cleaning:
    """One weight ``sigmoid(x_i)`` for each training example, learned on the validation loss (Franceschi et al. 2017).

        min over x   mean over val of loss(W*(x)),
        where        W*(x) = argmin over W   mean_i sigmoid(x_i) loss_i(W) + ridge/2 |W|^2

    by Adam on x, with hypergradients by implicit differentiation at L-BFGS solutions. All weights begin at 1/2: what
    helps the validation loss rises above it, and what falls below it is taken to be wrong. Each inner solve starts from
    the last solution. The Hessian is the Gauss-Newton matrix, which CG can always solve with: of the softmax regression
    that is the Hessian itself, of a network an approximation that is positive definite.

    A `Training`: its state is W, x and Adam's moments.

    Args:
        settings: ``solver`` and ``hypergrad`` in place of `SETTINGS`.
    """

    def __init__(self, model: Model, task: Task, steps: int, lr: float, settings: Mapping[str, Any] | None = None):
        self.model, self.task, self.steps = model, task, steps
        self.step, self.params = 0, model.start()
        self.logits = torch.zeros(len(task.train), dtype=task.train.features.dtype, requires_grad=True)
        self.outer = torch.optim.Adam([self.logits], lr=lr)
        chosen = {**SETTINGS, **(settings or {})}
        operator = bl.GaussNewton(outputs=self.outputs, loss=self.weighted, rest=model.penalty)
        self.solver, self.hypergrad = chosen["solver"], chosen["hypergrad"]
        if isinstance(self.hypergrad, bl.Implicit):
            self.hypergrad = replace(self.hypergrad, operator=operator)
        self.fit: bl.Solution | None = None

    @property
    def weights(self) -> Tensor:
        return self.logits.sigmoid()

    def outputs(self, params: Params) -> Tensor:
        return self.model.logits(params, self.task.train.features)

    def weighted(self, outputs: Tensor) -> Tensor:
        return mean_loss(outputs, self.task.train.labels, self.weights)

    def train_loss(self, params: Params) -> Tensor:
        return self.weighted(self.outputs(params)) + self.model.penalty(params)

    def val_loss(self, params: Params) -> Tensor:
        return cross_entropy(self.model.logits(params, self.task.val.features), self.task.val.labels)

    def solve(self) -> bl.Solution:
        """W*(x), differentiable."""
        # Adam hides the errors of solves that are not exact; the records tell how far each one went.
        return bl.argmin(self.train_loss, self.params, solver=self.solver, hypergrad=self.hypergrad, throw="ignore")

    def rows(self) -> Iterator[Row]:
        while self.step < self.steps:
            fit = self.fit = self.solve()
            loss = self.val_loss(fit.value)
            self.outer.zero_grad()
            loss.backward()
            self.outer.step()
            self.params = {name: value.detach() for name, value in fit.value.items()}
            self.step += 1
            row = {
                "step": self.step,
                "val_loss": loss.item(),
                "f1": detection(self.weights.detach(), self.task.wrong)["F1"],
                "inner_steps": int(fit.stats["num_steps"]),
                "inner_residual": fit.stats["residual_norm"].item(),
            }
            if fit.adjoint is not None:
                row["adjoint_steps"] = int(fit.adjoint.stats["num_steps"])
                row["adjoint_residual"] = fit.adjoint.stats["relative_residual"].item()
            yield row

    def state(self) -> dict[str, Any]:
        return {"step": self.step, "params": self.params, "logits": self.logits, "outer": self.outer.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        if state["logits"].shape != self.logits.shape:
            raise ValueError(f"{len(state['logits'])} weights for {len(self.logits)} examples")
        self.step, self.params = state["step"], state["params"]
        with torch.no_grad():
            self.logits.copy_(state["logits"])
        restore_optimizer(self.outer, state["outer"])
