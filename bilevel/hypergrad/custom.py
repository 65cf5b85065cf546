"""Custom autograd Functions whose backward has no derivative, so that second derivatives miss their part in silence.

Such a backward computes in NumPy, on detached tensors or under ``once_differentiable``. One that does not depend on
what the Function was given needs no derivative, and cannot be told from it by its graph: differences tell.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from ..linalg.jacobian import GraphJacobian
from ..linalg.noise import normal
from ..notices import tell
from ..recording import recording
from ..tree import is_continuous
from .base import Point

DIFFERS = 0.05
"""The relative distance of a derivative from differences that is no error of theirs."""

_RIGHT: weakref.WeakSet[type] = weakref.WeakSet()
"""Functions that were held against differences before."""


def warn_of_custom(nodes: Iterable[Node], point: Point) -> None:
    """Warn where the residual at a solution lacks derivatives, by a custom Function in the graph of its loss."""
    if recording():
        return
    found = {kind for node in nodes if (kind := _suspicious(node)) is not None} - set(_RIGHT)
    if not found:
        return
    if _agrees(point):
        _RIGHT.update(found)
        return
    names = ", ".join(sorted(kind.__name__ for kind in found))
    tell(
        f"The backward of the custom autograd Function {names} has no derivative (it computes in NumPy, on detached "
        "tensors or under once_differentiable), so that second derivatives through it are missing and the "
        "hypergradient is wrong. Write it in operations of PyTorch on ctx.saved_tensors, or take Penalty() or "
        "FiniteDifference(), which need no second derivatives.",
        UserWarning,
        kind=names,
    )


def _suspicious(node: Node) -> type | None:
    """The Function of a node whose backward reads what has a gradient, and whose result has none."""
    kind = getattr(node, "_forward_cls", None) if isinstance(node, BackwardCFunction) else None
    if kind is None or kind.__module__.partition(".")[0] in ("bilevel", "torch"):
        return None
    if not any(isinstance(t, Tensor) and t.requires_grad for t in node.saved_tensors):
        return None
    given = [torch.ones(meta.shape, dtype=meta.dtype, device=meta.device) for meta in node._input_metadata]
    with torch.enable_grad():
        grads = node.apply(*given)
    grads = grads if isinstance(grads, tuple) else (grads,)
    return None if any(isinstance(grad, Tensor) and grad.requires_grad for grad in grads) else kind


def _agrees(point: Point) -> bool:
    """Whether a Hessian product and a mixed derivative are those that differences of gradients show."""
    at, raveler, statement = point.linearization(), point.raveler, point.statement

    def residual(params: list[Tensor], hparams: list[Tensor]) -> Tensor:
        return raveler.ravel([part.detach() for part in statement.linearize(params, hparams).residual])

    y = raveler.ravel([leaf.detach() for leaf in point.params])
    v = normal(y.shape, 1, y.device).to(y.dtype)
    step = _step(y, v)
    ahead, behind = (residual(raveler.unravel(y + way * step * v), point.hparams) for way in (1, -1))
    if _apart(GraphJacobian(raveler, at, symmetric=True).matvec(v), (ahead - behind) / (2 * step)):
        return False
    u = normal(y.shape, 2, y.device).to(y.dtype)
    pulled = at.pull(raveler.unravel(u), retain_graph=True)
    for index, hparam in enumerate(point.hparams):
        if not is_continuous(hparam):
            continue
        w = normal(hparam.shape, 3, hparam.device).to(hparam.dtype)
        step = _step(hparam, w)
        moved = [[*point.hparams[:index], hparam + way * step * w, *point.hparams[index + 1 :]] for way in (1, -1)]
        ahead, behind = (residual(point.params, hparams) for hparams in moved)
        by_hparam = pulled[index]
        found = torch.zeros_like(w) if by_hparam is None else by_hparam
        if _apart(-(found * w).sum(), (u * (ahead - behind)).sum() / (2 * step)):
            return False
    return True


def _step(x: Tensor, v: Tensor) -> float:
    """By how much to move ``x`` along ``v`` for a difference."""
    size = float(torch.linalg.vector_norm(x)) or 1.0
    relative: float = torch.finfo(x.dtype).eps ** (1 / 3)
    return relative * size / float(torch.linalg.vector_norm(v))


def _apart(found: Tensor, difference: Tensor) -> bool:
    return bool(torch.linalg.vector_norm(found - difference) > DIFFERS * torch.linalg.vector_norm(difference))
