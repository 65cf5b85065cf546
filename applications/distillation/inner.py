"""The inner problem: a network trained on the synthetic images, as a differentiable function of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bilevel as bl
from applications.distillation.networks import Params, outputs


@dataclass(frozen=True)
class Inner:
    """``min over w of  cross-entropy(images, labels) + l2 / 2 ||w - start||^2``.

    Of the linear classifier, which starts at zero, this is softmax regression with weight decay: one minimum, and an
    implicit hypergradient that is exact up to the tolerances of both solves. Of a ConvNet it is training that stays
    near its initialisation (as implicit MAML, Rajeswaran et al. 2019), cut off after ``max_steps``.

    Attributes:
        network: its own parameters are not used.
        max_steps: of L-BFGS; None: to its own tolerance.
        products: of conjugate gradients at most, to a relative residual of 0.01; None: to one of 0.001.
        gauss_newton: the system of the hypergradient has the generalized Gauss-Newton matrix in place of the Hessian.
            The same for a linear classifier; for a network positive definite, with at most images x classes
            eigenvalues above l2, which is why few products
            do. What it leaves out vanishes where the images are fitted.
    """

    network: nn.Module
    l2: float
    max_steps: int | None = None
    products: int | None = None
    gauss_newton: bool = False

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

        solver = bl.LBFGS() if self.max_steps is None else bl.LBFGS(max_steps=self.max_steps, gtol=0.0)
        linear = bl.CG(rtol=1e-3) if self.products is None else bl.CG(rtol=1e-2, max_steps=self.products)
        operator = bl.GaussNewton(logits, fit, rest=decay) if self.gauss_newton else "graph"
        return bl.argmin(
            lambda params: fit(logits(params)) + decay(params),
            start if guess is None else guess,
            solver=solver,
            hypergrad=bl.Implicit(linear, operator=operator) if follow else None,
            throw="warn" if self.max_steps is None else "ignore",  # cut off on purpose: the residual is recorded
        )
