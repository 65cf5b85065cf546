"""The outer loop: Adam on the settings, by hypergradients through whole runs, or through their last steps only."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from applications.frame.checkpoint import restore_optimizer
from applications.frame.command import require
from applications.learned_optimizer_settings.networks import Networks, seed_of
from applications.learned_optimizer_settings.settings import Settings

LARGEST_NORM = 1.0
"""Near the edge of stability a hypergradient may be a million times too long (Metz et al. 2019): it is cut."""

MOST_POINTS = 1000
Method = bl.Unroll | bl.Truncated | bl.ForwardMode

EXACT: dict[str, Method] = {
    "unroll": bl.Unroll(),
    "checkpoint": bl.Unroll(checkpoint=True),
    "forward": bl.ForwardMode(max_hparams=MOST_POINTS + 1),
}
"""The same derivative: the fastest; with memory of ``2 sqrt(steps)`` steps; with memory of one step."""

SETTINGS: dict[str, Any] = {"hypergrad": EXACT["unroll"], "outer_lr": 0.2}
"""Settings of the outer loop: ``--hypergrad`` and ``--outer-lr``."""


def ways(hypergrad: str, outer_lr: float, settings: Mapping[str, Any]) -> tuple[Method, float]:
    """The hypergradient method and Adam's learning rate: those of ``--solver`` before those of the knobs.

    Raises:
        UserError: a setting that cannot be used here.
    """
    chosen = {"hypergrad": EXACT[hypergrad], "outer_lr": outer_lr, **settings}
    method, lr = chosen["hypergrad"], chosen["outer_lr"]
    require(isinstance(method, Method), f"--solver has {method}: Unroll, Truncated or ForwardMode is needed.")
    return method, lr


def end_of_run(networks: Networks, settings: Settings, steps: int, stop: int, method: Method, seed: int) -> Tensor:
    """Validation loss of each network ``[count]`` after ``stop`` of the ``steps`` that the schedule is for."""
    torch.manual_seed(seed)
    fit = bl.argmin(
        networks.train_loss,
        networks.start(seed),
        solver=bl.Steps(settings.rule(steps), max_steps=stop),
        hypergrad=method,
        throw="ignore",  # a run that diverges is seen by its loss
    )
    return networks.validation_loss(fit.value)


class Learning:
    """Learns the settings; each outer step trains fresh networks on fresh mini-batches.

    Exact: the validation loss at the end of the run, differentiated through all steps (Maclaurin et al. 2015;
    Franceschi et al. 2017). `bl.Truncated`: the loss at two points of the run, differentiated through the window of
    steps before each. Every learning rate then answers for what comes at most ``window`` steps later, as in online
    tuning (Baydin et al. 2018 with a window of one), at the same number of training steps on average.
    """

    def __init__(
        self,
        networks: Networks,
        settings: Settings,
        steps_of_run: int,
        outer_steps: int,
        outer_lr: float,
        seed: int,
        hypergrad: Method = SETTINGS["hypergrad"],
    ):
        self.networks, self.settings, self.steps_of_run = networks, settings, steps_of_run
        self.steps, self.outer_lr, self.seed = outer_steps, outer_lr, seed
        self.hypergrad = hypergrad
        self.window = hypergrad.last if isinstance(hypergrad, bl.Truncated) else None
        self.optimizer = torch.optim.Adam(settings.tensors, lr=outer_lr, betas=(0.9, 0.95))
        self.step = 0

    def rows(self) -> Iterator[dict[str, Any]]:
        """See `applications.frame.run.Training`."""
        while self.step < self.steps:
            for group in self.optimizer.param_groups:
                group["lr"] = self.outer_lr * (1 + math.cos(math.pi * self.step / self.steps)) / 2
            self.optimizer.zero_grad()
            loss = self.gradient()
            norm = torch.nn.utils.clip_grad_norm_(self.settings.tensors, LARGEST_NORM).item()
            diverged = not (math.isfinite(loss) and math.isfinite(norm))
            if diverged:  # which says only that the learning rates are too large
                with torch.no_grad():
                    self.settings.log_lr.sub_(math.log(2))
            else:
                self.optimizer.step()
            self.step += 1
            seen = {"diverged": True} if diverged else {"loss": loss, "hypergradient_norm": norm}
            momentum = self.settings.logit.sigmoid().item()
            yield {"step": self.step, **seen, "log_lr": self.settings.log_lr.tolist(), "momentum": momentum}

    def gradient(self) -> float:
        """Leave the hypergradient in ``grad``; the validation loss of the last runs, mean over the networks."""
        for place, stop in enumerate(self.stops()):
            seed = seed_of(self.seed, LEARNING, self.step, place)
            loss = end_of_run(self.networks, self.settings, self.steps_of_run, stop, self.hypergrad, seed).mean()
            loss.backward()
        return loss.item()

    def stops(self) -> list[int]:
        """Where the loss is taken: a random point in the first half of the run and the same in the second."""
        if not self.window:
            return [self.steps_of_run]
        generator = torch.Generator().manual_seed(seed_of(self.seed, STOPS, self.step))
        half = self.steps_of_run // 2
        first = int(torch.randint(1, half + 1, (), generator=generator))
        return [first, first + self.steps_of_run - half]

    def state(self) -> dict[str, Any]:
        """See `applications.frame.run.Training`; the random numbers follow from the step."""
        log_lr, logit = (tensor.detach().clone() for tensor in self.settings.tensors)
        return {"step": self.step, "log_lr": log_lr, "logit": logit, "optimizer": self.optimizer.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        with torch.no_grad():
            self.settings.log_lr.copy_(state["log_lr"])
            self.settings.logit.copy_(state["logit"])
        restore_optimizer(self.optimizer, state["optimizer"])
        self.step = state["step"]


LEARNING, STOPS, SEARCH, FRESH = range(4)
"""Kinds of random numbers."""
