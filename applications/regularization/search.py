"""Hyperparameters learned by gradient: what the three problems have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from applications.frame.checkpoint import restore_optimizer
from applications.frame.run import Row

Params = dict[str, Tensor]


class Search:
    """Adam along the hypergradient of the validation loss; a `applications.frame.run.Training`.

    Each step solves the inner problem from the last solution, measures there, and moves the hyperparameters. So the
    first record is that of the first hyperparameters.

    Args:
        hparams: what is learned: leaves that require grad.
        init: where the first inner solve starts.
        solve: the inner problem from given parameters; its second argument is the step, from 0, which may seed
            what is random.
        validation_loss: of the solution's value.
        measure: plain numbers to record, of the solution's value (detached).
        lr: of Adam at first; it falls linearly, to nothing after the last step.
        most: what no hyperparameter may exceed.

    Attributes:
        fit: the last inner solution; None before the first step.
    """

    def __init__(
        self,
        hparams: Params,
        init: Params,
        solve: Callable[[Params, int], bl.Solution],
        validation_loss: Callable[[Params], Tensor],
        measure: Callable[[Params], Row],
        steps: int,
        lr: float,
        most: float = float("inf"),
    ):
        self.steps, self.step = steps, 0
        self.hparams, self.params = hparams, init
        self.fit: bl.Solution | None = None
        self._solve, self._validation_loss, self._measure = solve, validation_loss, measure
        self._lr, self._most = lr, most
        self._adam = torch.optim.Adam(hparams.values(), lr=lr, betas=(0.5, 0.9))  # few steps: little momentum

    def rows(self) -> Iterator[Row]:
        while self.step < self.steps:
            fit = self.fit = self._solve(self.params, self.step)
            loss = self._validation_loss(fit.value)
            self._adam.zero_grad()
            loss.backward()
            self.params = {name: p.detach() for name, p in fit.value.items()}
            measured = self._measure(self.params)
            self._adam.param_groups[0]["lr"] = self._lr * (1 - self.step / self.steps)
            self._adam.step()
            for x in self.hparams.values():
                x.data.clamp_(max=self._most)
            self.step += 1
            row = {"step": self.step, "validation_loss": loss.item(), **measured}
            row["inner_gradient_norm"] = fit.stats["residual_norm"].item()
            if fit.adjoint is not None:
                row["adjoint_steps"] = fit.adjoint.stats["num_steps"].item()
                row["adjoint_residual"] = fit.adjoint.stats["relative_residual"].item()
                row["adjoint"] = fit.adjoint.result.name
            yield row

    def state(self) -> dict[str, Any]:
        hparams = {name: x.detach() for name, x in self.hparams.items()}
        return {"step": self.step, "hparams": hparams, "params": self.params, "adam": self._adam.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, x in self.hparams.items():
                x.copy_(state["hparams"][name])
        for name, p in self.params.items():
            if state["params"][name].shape != p.shape:
                raise ValueError(f"{name} is {tuple(state['params'][name].shape)}, not {tuple(p.shape)}")
        self.step, self.params = state["step"], state["params"]
        restore_optimizer(self._adam, state["adam"])


def accuracy(logits: Tensor, targets: Tensor) -> float:
    """In percent."""
    return 100 * (logits.argmax(1) == targets).double().mean().item()
