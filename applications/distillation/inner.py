"""The inner problem: a network trained on the synthetic images, as a differentiable function of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bilevel as bl
from applications.distillation.networks import Params, outputs

TO_THE_MINIMUM: dict[str, Any] = {
    "solver": bl.LBFGS(),
    "hypergrad": bl.Implicit(bl.CG(rtol=1e-3)),
}
CUT_OFF: dict[str, Any] = {
    "solver": bl.LBFGS(max_steps=30, gtol=1e-6),
    "hypergrad": bl.Implicit(bl.CG(rtol=1e-2, max_steps=20)),
}
"""Settings of a ConvNet: its training is cut off on purpose, and so is the solve for the hypergradient."""


@dataclass(frozen=True)
class Inner:
    """``min over w of  cross-entropy(images, labels) + l2 / 2 ||w - start||^2``.

    Of the linear classifier, which starts at zero, this is softmax regression with weight decay: one minimum, and an
    implicit hypergradient that is exact up to the tolerances of both solves. Of a ConvNet it is training that stays
    near its initialisation (as implicit MAML, Rajeswaran et al. 2019), cut off early.

    Attributes:
        network: its own parameters are not used.
        settings: ``solver`` and ``hypergrad``.
        throw: ``"warn"`` of a solve that did not converge; its residual is recorded either way.
        gauss_newton: the system of the hypergradient has the generalized Gauss-Newton matrix in place of the Hessian.
            The same for a linear classifier; for a network positive definite, with at most images x classes
            eigenvalues above l2, which is why few products do. What it leaves out vanishes where the images are fitted.
    """

    network: nn.Module
    l2: float
    settings: Mapping[str, Any] = field(default_factory=lambda: TO_THE_MINIMUM)
    gauss_newton: bool = False
    throw: Literal["warn", "ignore"] = "warn"

    def train(
        self, start: Params, images: Tensor, labels: Tensor, *, follow: bool = True, guess: Params | None = None
    ) -> bl.Solution:
        """The network trained on images ``[n, c, h, w]`` with classes ``[n]``.

        Args:
            follow: False detaches the value.
            guess: where the solver starts, in place of ``start``: a point near the minimum.
        """

        def logits(params: Params) -> Tensor:
            return outputs(self.network, params, images)

        def fit(out: Tensor) -> Tensor:
            return cross_entropy(out, labels)

        def decay(params: Params) -> Tensor:
            moved = [(param - start[name]).square().sum() for name, param in params.items()]
            return self.l2 / 2 * torch.stack(moved).sum()

        hypergrad = self.settings["hypergrad"]
        if self.gauss_newton and isinstance(hypergrad, bl.Implicit):
            hypergrad = replace(hypergrad, operator=bl.GaussNewton(logits, fit, rest=decay))
        return bl.argmin(
            lambda params: fit(logits(params)) + decay(params),
            start if guess is None else guess,
            solver=self.settings["solver"],
            hypergrad=hypergrad if follow else None,
            throw=self.throw,
        )
