"""One training of one method: Adam on the cross-entropy, resumable after any step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import bilevel as bl
from applications.equilibrium.knobs import Config, Parts
from applications.equilibrium.methods import Method, hidden
from applications.equilibrium.network import Network
from applications.frame.checkpoint import restore_optimizer
from applications.frame.run import Row


class Fitting:
    """A `Training` of a network; batches depend on the seed and the step only, so that its state is small.

    Args:
        settings: see `hidden`.
    """

    def __init__(
        self,
        network: Network,
        method: Method,
        parts: Parts,
        config: Config,
        seed: int,
        settings: Mapping[str, Any] | None = None,
    ):
        self.network, self.method, self.parts, self.config, self.seed = network, method, parts, config, seed
        self.settings = settings
        self.fit: bl.Solution | None = None
        self.optimizer = torch.optim.Adam(network.parameters(), lr=config.lr)
        self.steps_per_epoch = -(-len(parts.train[1]) // config.batch_size)
        self.steps, self.step = config.epochs * self.steps_per_epoch, 0

    def rows(self) -> Iterator[Row]:
        """See `Training`."""
        x, y = self.parts.train
        while self.step < self.steps:
            chosen = self._batch()
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.lr * (1 - self.step / self.steps)
            found = hidden(self.network, x[chosen], self.method, self.config, self.settings)
            self.fit = found.solution
            loss = cross_entropy(self.network.head(found.z), y[chosen])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.step += 1
            row: Row = {"step": self.step, "loss": loss.item()}
            if found.solution is not None:
                row["iterations"] = mean_steps(found.solution)
                if found.solution.adjoint is not None:
                    row["adjoint_iterations"] = mean_steps(found.solution.adjoint)
            if self.step % self.steps_per_epoch == 0:
                row["validation_accuracy"] = accuracy(
                    self.network, self.method, self.parts.validation, self.config, self.settings
                )
            yield row

    def state(self) -> dict[str, Any]:
        """See `Training`."""
        return {"step": self.step, "network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """See `Training`."""
        self.network.load_state_dict(state["network"])
        restore_optimizer(self.optimizer, state["optimizer"])
        self.step = state["step"]

    def _batch(self) -> Tensor:
        epoch, place = divmod(self.step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(1_000_000 * self.seed + epoch)
        order = torch.randperm(len(self.parts.train[1]), generator=generator)
        return order[place * self.config.batch_size :][: self.config.batch_size].to(self.parts.train[1].device)


def mean_steps(solution: bl.Solution) -> float:
    """Iterations, in the mean over the examples."""
    return float(solution.stats["num_steps"].double().mean())


@torch.no_grad()
def accuracy(
    network: Network,
    method: Method,
    part: tuple[Tensor, Tensor],
    config: Config,
    settings: Mapping[str, Any] | None = None,
) -> float:
    """In percent, of a network evaluated as it was trained."""
    x, y = part
    right = 0
    for images, labels in zip(x.split(BATCH), y.split(BATCH), strict=True):
        logits = network.head(hidden(network, images, method, config, settings).z)
        right += int((logits.argmax(1) == labels).sum())
    return 100 * right / len(y)


BATCH = 1000
"""Examples at once where no gradient is kept."""
