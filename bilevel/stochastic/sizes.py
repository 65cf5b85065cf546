"""Step sizes for a problem of which nothing is known: measured on one batch."""

from __future__ import annotations

from typing import Any

import torch

from ..tree import Raveler, Tree, norm, scale
from .oracles import Batch, Loss, Oracles
from .params import check_params
from .schedule import Decay, check_positive

PRODUCTS = 20
"""Steps of the power iteration that measures the largest curvature."""
CAUTION = 0.5
"""The inner step size in units of one over that curvature, which other batches may exceed."""
DELAY = 100.0
"""Steps before the decay is felt."""
LONGEST_MOVE = 0.1
"""How far one step may move a level, relative to one plus its norm."""


def step_sizes(
    inner_params: Tree,
    outer_params: Tree,
    inner_loss: Loss,
    batch: Batch = None,
    *,
    ratio: float = 1.0,
) -> dict[str, Any]:
    """Settings that survive where nothing is known of the problem, measured on one batch::

        sizes = step_sizes(params, hparams, train_loss, batch)
        method = SOBA(params, hparams, train_loss, val_loss, **sizes)

    The inner step size is half of one over the largest curvature of the inner loss on the batch, by 20 Hessian
    products; both decay by the root of the step number after 100
    steps, as mini-batches need. ``longest_move`` takes care of what no size at the start can foresee.

    Args:
        inner_params, outer_params, inner_loss: those of the method. batch: one of those that it will be given.
        ratio: of the outer step size to the inner one.

    Returns:
        ``inner_lr``, ``outer_lr`` and ``longest_move``.

    Raises:
        TypeError, ValueError: as the method would.
    """
    check_positive("ratio", ratio)
    inner, outer = check_params("inner_params", inner_params), check_params("outer_params", outer_params)
    ravelers = Raveler(inner_params), Raveler(outer_params)
    oracles = Oracles(*ravelers, inner_loss, inner_loss, {"inner_params": inner, "outer_params": outer})
    at = oracles.linearize(ravelers[0].ravel(inner).detach(), ravelers[1].ravel(outer).detach(), batch)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(ravelers[0].size, generator=generator, dtype=torch.float64, device="cpu").to(at.gradient)
    size = norm(v)
    for _ in range(PRODUCTS):
        v = at.product(scale(1 / size, v))
        size = norm(v).clamp_min(torch.finfo(torch.float64).tiny)
    largest = float(size)
    lr = float(f"{CAUTION / largest:.2g}") if largest > 1e-12 else 1.0
    return {
        "inner_lr": Decay(lr, delay=DELAY),
        "outer_lr": Decay(ratio * lr, delay=DELAY),
        "longest_move": LONGEST_MOVE,
    }
