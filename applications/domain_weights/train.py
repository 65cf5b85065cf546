"""The training of a transformer on a mixture of the domains, whose weights are fixed, or follow the target's loss."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from applications.domain_weights.corpus import Corpus, pieces, windows
from applications.domain_weights.learning import Mixture, Onward, look_ahead
from applications.domain_weights.model import Params, Transformer, logits_of, losses_of
from applications.frame.checkpoint import restore_optimizer
from applications.frame.run import Row

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Settings:
    """Settings of all trainings of a run.

    Args:
        context, width, heads, layers: of the transformer.
        batch: windows of a step. lr: of Adam; it falls to 0 by a cosine.
        outer_batch: windows of each domain, and of the target, of a step of the weights. outer_lr: of Adam on the
            scores. warm_up: steps before the weights learn. every: steps of the network for one of the weights.
    """

    context: int
    width: int
    heads: int
    layers: int
    batch: int
    lr: float
    outer_batch: int
    outer_lr: float
    warm_up: int
    every: int
    precision: str
    seed: int


class MixtureTraining:
    """A transformer trained on windows that are drawn from the domains by their weights; a `Training`.

    Args:
        scores: of the domains, ``[K]``; the weights are their softmax.
        hypergrad: by which the scores follow the loss on the validation part of the target; None: they stay.
    """

    def __init__(
        self,
        corpus: Corpus,
        settings: Settings,
        steps: int,
        scores: Tensor,
        hypergrad: Any = None,
        device: torch.device = CPU,
    ):
        self.corpus, self.settings, self.steps, self.hypergrad, self.device = corpus, settings, steps, hypergrad, device
        dtype = torch.float64 if settings.precision == "float64" else torch.float32
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            sizes = settings.width, settings.heads, settings.layers, settings.context
            self.module = Transformer(len(corpus.alphabet), *sizes).to(device, dtype)
        self.params: Params = dict(self.module.named_parameters())
        self.optimizer = torch.optim.Adam(self.params.values(), settings.lr)
        self.scores = scores.to(device, dtype, copy=True).requires_grad_()
        self.outer = torch.optim.Adam([self.scores], settings.outer_lr)
        self.random = torch.Generator().manual_seed(settings.seed)
        self.step = 0
        self.fit: bl.Solution | None = None

    @property
    def weights(self) -> Tensor:
        return self.scores.detach().softmax(0)

    def rows(self) -> Iterator[Row]:
        """See `Training`."""
        settings = self.settings
        while self.step < self.steps:
            lr = settings.lr * (1 + math.cos(math.pi * self.step / self.steps)) / 2
            self.optimizer.param_groups[0]["lr"] = lr
            row: Row = {}
            if self.hypergrad is not None and self.step >= settings.warm_up and self.step % settings.every == 0:
                row = {"target_loss": self.outer_step(lr), "weights": self.weights.tolist()}
            row = {"loss": self.network_step(), **row}
            self.step += 1
            yield {"step": self.step, **row}

    def outer_step(self, lr: float) -> float:
        """The scores follow the loss on the target of a network that made one step more."""
        settings = self.settings
        batch = self.corpus.batch(settings.outer_batch, settings.context, self.random).to(self.device)
        target = windows(self.corpus.validation, settings.outer_batch, settings.context, self.random)
        target = target[bl.distributed.shard(len(target))].to(self.device)
        ahead = self.fit = look_ahead(
            Mixture(self.module, batch), self.params, self.scores, self.hypergrad, self.next_step(lr)
        )

        def on_target(params: Params) -> Tensor:
            return losses_of(logits_of(self.module, params, target), target).sum() / settings.outer_batch

        loss = bl.distributed.sharded(on_target)(ahead.value)
        (self.scores.grad,) = torch.autograd.grad(loss, [self.scores])
        self.outer.step()
        return loss.item()

    def next_step(self, lr: float) -> Onward:
        """That of the optimizer, with its moments as one vector each."""
        moments = self.optimizer.state
        state = {
            name: torch.cat([moments[leaf][name].flatten() for leaf in bl.extending.leaves(self.params)])
            for name in ("exp_avg", "exp_avg_sq")
            if moments
        }
        return Onward(bl.Adam(lr), state or None, self.step)

    def network_step(self) -> float:
        """One step on windows of domains that are drawn by their weights; each rank has some of them."""
        settings, texts = self.settings, list(self.corpus.domains.values())
        weights = self.weights.cpu()
        if not bool(weights.isfinite().all()):
            raise ArithmeticError("the weights of the domains are not finite any more")
        chosen = torch.multinomial(weights, settings.batch, replacement=True, generator=self.random)
        drawn = torch.cat([windows(texts[domain], 1, settings.context, self.random) for domain in chosen.tolist()])
        own = drawn[bl.distributed.shard(settings.batch)].to(self.device)
        loss = losses_of(logits_of(self.module, self.params, own), own).sum() / settings.batch
        self.optimizer.zero_grad()
        loss.backward()
        (total,) = bl.distributed.reduce_gradients(self.params.values(), loss.item())
        self.optimizer.step()
        return total

    @torch.no_grad()
    def loss_on(self, text: Tensor) -> float:
        """The mean loss of its characters, in nats."""
        cut = pieces(text, self.settings.context).to(self.device)
        parts = [losses_of(logits_of(self.module, self.params, part), part) for part in cut.split(256)]
        return float(torch.cat(parts).mean())

    def state(self) -> dict[str, Any]:
        """See `Training`."""
        return {
            "step": self.step,
            "params": {name: value.detach() for name, value in self.params.items()},
            "optimizer": self.optimizer.state_dict(),
            "scores": self.scores.detach(),
            "outer": self.outer.state_dict(),
            "random": self.random.get_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """See `Training`."""
        with torch.no_grad():
            for name, value in self.params.items():
                value.copy_(state["params"][name])
            self.scores.copy_(state["scores"])
        restore_optimizer(self.optimizer, state["optimizer"])
        restore_optimizer(self.outer, state["outer"])
        self.random.set_state(state["random"])
        self.step = state["step"]
