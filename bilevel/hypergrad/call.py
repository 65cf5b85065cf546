"""One differentiable solve: what its functions are given, and what they leave for the caller."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .._torch import pytree
from ..inner.first_look import Known
from ..inner.outcome import COUPLED_ADVICE, is_coupled
from ..linalg.curvature import fused_norm, has_layer_norm
from ..linalg.jacobian import GraphJacobian
from ..linalg.solve import LinearState
from ..notices import Place
from ..problem import Linearization, Problem, RootProblem, graph_nodes, refuse_hidden
from ..ranks import Ranks
from ..recording import recording
from ..solution import AdjointCell, Result, Solution, SolveError, Throw, marked, settle
from ..tree import norm
from .advice import NONFINITE_ADVICE, adjoint_advice
from .base import Hypergrad, Point, Pulled
from .custom import warn_of_custom
from .implicit import Implicit
from .search import Later, Search
from .seen import Seen
from .statement import Statement


def rounding_hint(device: str, dtype: torch.dtype) -> str:
    """What to add to an advice where products are less accurate than their dtype says."""
    switches = {
        "torch.backends.cudnn.allow_tf32": torch.backends.cudnn.allow_tf32,
        "torch.backends.cuda.matmul.allow_tf32": torch.backends.cuda.matmul.allow_tf32,
    }
    on = [name for name, value in switches.items() if value]
    if device != "cuda" or dtype is not torch.float32 or not on:
        return ""
    return (
        f". TF32 is on ({' and '.join(on)}; for convolutions it is PyTorch's default): products of float32 have three "
        "digits then, and the default tolerance of 1e-5 is out of reach. Switch it off, or give the linear solver "
        "rtol=1e-2 or max_steps"
    )


@dataclass
class Findings:
    """What the plain solves below all transforms leave for the caller."""

    found: Solution | None = None
    point: Point | None = None
    seen: Seen | None = None
    ranks: Ranks | None = None
    names: list[str] = field(default_factory=list)
    adjoint_cell: AdjointCell = field(default_factory=AdjointCell)
    fused: str | None = None
    layer_norm: bool = False
    later: Later | None = None
    reached: list[bool] | None = None


@dataclass(frozen=True)
class Call:
    """One differentiable solve.

    Attributes:
        search: how the problem is solved.
        problem: the problem, where it was built already (outside of transforms).
        linear_state: what the linear solve starts from.
        place: the user's line of the solve, where the threads of the backward pass have none.
    """

    statement: Statement
    spec: pytree.TreeSpec
    batch_dims: int
    hypergrad: Hypergrad
    search: Search
    problem: Problem | RootProblem | None = None
    minimize: Callable[[Problem], Solution[Tensor]] | None = None
    linear_state: LinearState | None = None
    place: Place | None = None
    findings: Findings = field(default_factory=Findings)

    @property
    def throw(self) -> Throw:
        return self.search.throw

    @property
    def num_leaves(self) -> int:
        return self.spec.num_leaves

    def split(self, tensors: Sequence[Any], num_groups: int = 1) -> list[list[Any]]:
        """Groups of as many tensors as there are leaves, and the rest."""
        cuts = [index * self.num_leaves for index in range(num_groups + 1)]
        groups = [list(tensors[a:b]) for a, b in itertools.pairwise(cuts)]
        return [*groups, list(tensors[cuts[-1] :])]

    def point(self, params: list[Tensor], hparams: list[Tensor]) -> Point:
        return Point(
            self.statement,
            params,
            hparams,
            self.batch_dims,
            self.throw,
            self.minimize,
            self.findings.found,
            self.linear_state,
            self.findings.seen if self.throw != "ignore" else None,
        )

    def may_be_random(self, problem: Problem) -> bool:
        """Whether to spend an evaluation on an objective whose solver and hypergradient see it once at the solution.

        It is spent where the objective drew random numbers from a global generator, and the first time that a function
        is solved, which may have a generator or an iterator of its own. Other operators and methods evaluate it again
        themselves, and raise where it has changed.
        """
        once = isinstance(self.hypergrad, Implicit) and self.hypergrad.operator == "graph"
        if not once or recording() or self.throw == "ignore":
            return False
        fn = getattr(self.statement.closure, "fn", None)
        return problem.draws or (fn is not None and _SOLVED.is_new(fn))

    def keep(self, adjoint: Solution | None, point: Point) -> None:
        """Leave the adjoint solve where the caller finds it, and let it be heard, and what was put off till now."""
        later, self.findings.later = self.findings.later, None
        failed = None if adjoint is None else (adjoint.stats["result"] > int(Result.STEPS_DONE)).any()
        well = later is not None and not later.look(failed)
        if adjoint is not None:
            cell = self.findings.adjoint_cell
            value = pytree.tree_unflatten(point.raveler.unravel(adjoint.value), self.spec)
            cell.solution = Solution(value, adjoint.stats, adjoint.recovered, state=adjoint.state)
            found = self.findings.found

            def advice() -> str:
                hint = rounding_hint(point.params[0].device.type, point.params[0].dtype)
                if point.raveler.batch_shape and self._is_coupled(point):
                    return COUPLED_ADVICE
                return adjoint_advice(self.hypergrad, self.statement, found, adjoint) + hint

            if not well:
                settle(adjoint, self.throw, "The adjoint solve of the hypergradient", advice, place=self.place)

    def _is_coupled(self, point: Point) -> bool:
        coupled = is_coupled(GraphJacobian(point.raveler, point.linearization(), self.statement.symmetric))
        point.release()
        return coupled

    def check_finite(self, pulled: Pulled) -> Pulled:
        """Mark, or where there is no linear solve refuse, a hypergradient that is not finite.

        Raises:
            SolveError: as ``throw`` says.
        """
        grads = [grad for grad in (*pulled.hparams, *(pulled.start or [])) if grad is not None and grad.numel()]
        if self.throw == "ignore" or recording() or not grads:
            return pulled
        largest = torch.stack([torch.linalg.vector_norm(grad.detach(), torch.inf).double() for grad in grads])
        finite = torch.isfinite(largest).all()
        if pulled.adjoint is not None:
            stats = pulled.adjoint.stats
            codes = marked(stats["result"], ~finite, Result.NONFINITE)
            adjoint = pulled.adjoint.with_stats(result=codes)
            return dataclasses.replace(pulled, adjoint=adjoint)
        if not bool(finite):
            assert self.findings.found is not None
            message = f"The hypergradient is NaN or infinite. {NONFINITE_ADVICE}"
            raise SolveError(message, self.findings.found)
        return pulled

    def vmapped(self, in_dims: Sequence[int | None]) -> Call:
        return dataclasses.replace(
            self, statement=self.statement.vmapped(tuple(in_dims)), batch_dims=self.batch_dims + 1, problem=None
        )


_SOLVED = Known()
"""The objectives that were solved."""


def measured(found: Solution, residual: Tensor, loss: Tensor | None) -> Solution:
    """What was found, with the norm of its residual ``[*batch, n]``; where that or a loss is not finite, it says so.

    A loss that is not the one that the solver ended with is no minimum of anything: the objective is random.
    """
    size, codes = norm(residual), found.stats["result"]
    finite, stats = size < torch.inf, {}
    if loss is not None:
        loss = loss.double()
        finite, stats = finite & (loss.abs() < torch.inf), {"loss": loss}
    if loss is not None and "loss" in found.stats and found.stats["loss"].shape == loss.shape:
        ended = found.stats["loss"]
        rounding = torch.finfo(residual.dtype).eps ** 0.5 * torch.maximum(ended.abs(), loss.abs())
        other = (loss - ended).abs() > rounding
        codes = marked(codes, other & (codes < int(Result.STAGNATED)), Result.STAGNATED)
    return found.with_stats(result=marked(codes, ~finite, Result.NONFINITE), residual_norm=size, **stats)


def measured_at_solution(problem: Problem | RootProblem, found: Solution) -> Solution:
    """The same for a solution without a graph: one more evaluation."""
    return measured(found, *problem.residual_at(found.value.detach()))


def _among(nodes: Iterable[Node], tensors: Sequence[Tensor]) -> list[bool]:
    """Which of these leaves a graph reaches."""
    variables = {id(variable) for node in nodes if (variable := getattr(node, "variable", None)) is not None}
    return [id(tensor) in variables for tensor in tensors]


def inspect(findings: Findings, at: Linearization, *, second: bool) -> None:
    """Look through the graph once: for hyperparameters that cannot be reached, for norms whose higher derivatives
    are wrong in PyTorch, and for custom Functions that have none.

    Args:
        second: the hypergradient is made of second derivatives of the loss.
    """
    nodes = list(graph_nodes(at.residual if at.loss is None else [at.loss]))
    refuse_hidden(nodes, [*at.leaves, *at.hparams])
    findings.reached = _among(nodes, at.hparams)
    if not all(findings.reached):  # a prox has its own beside those of the loss
        others = _among(graph_nodes(at.residual), at.hparams)
        findings.reached = [one or other for one, other in zip(findings.reached, others, strict=True)]
    findings.fused = fused_norm(nodes)
    findings.layer_norm = has_layer_norm(nodes)
    if second and at.loss is not None and findings.point is not None and findings.point.throw != "ignore":
        warn_of_custom(nodes, findings.point)
