"""Any function as inner solver: a black box that is asked for params and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._torch import pytree
from ..checks import check_fields, check_leaves
from ..closure import Closure, Tracer
from ..problem import Problem, ordered
from ..solution import Result, Solution, make_codes, marked
from ..tree import Tree, leaves, norm
from .minimize import check_settings


def _of_params(problem: Problem) -> Callable[[Tree], Tensor]:
    """The losses as a function of the params alone: what else requires grad stands there as a constant."""
    tracer, start = Tracer(differentiable=False), [leaf.requires_grad_() for leaf in leaves(problem.tree)]
    tracer.know(start)
    tracer.note(problem.args)
    with torch.enable_grad(), problem.autocast.evaluating(), tracer:
        problem.objective(problem.raveler.unflatten(start), *problem.args)
    closure = Closure.traced(problem.objective, problem.raveler.spec, problem.args, tracer, problem.start.y.device)
    constants = [tensor.detach() for tensor in tracer.captured]
    return lambda params: closure(leaves(params), constants)


@dataclass(frozen=True)
class External:
    """``solve(loss, start) -> params``: another library's optimizer, a simulation, an exhaustive search.

    With `Implicit` its solution is differentiated like any other; with `EvolutionStrategies` it is only ever asked
    again, at other hyperparameters, so that it may be as rough as it likes.

    Args:
        solve: called with a function from params to losses and with the params to start from, a tree like ``init``;
            returns such a tree. The function is differentiable by the params, with autograd and with `torch.func`, and
            knows nothing of hyperparameters: their ``grad`` stays as it is.
        gtol: the gradient norm that counts as a minimum; None: whatever it returns is what was ordered.
    """

    solve: Callable[[Callable[[Tree], Tensor], Tree], Tree]
    gtol: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if not callable(self.solve):
            raise TypeError(f"solve is {self.solve!r}: a function (loss, start) -> params is needed.")
        check_settings(max_steps=1, gtol=self.gtol)

    def minimize(self, problem: Problem) -> Solution[Tensor]:
        """Ask once; see `InnerSolver`."""
        raveler = problem.raveler

        start = raveler.unflatten(raveler.unravel(problem.start.y.detach().clone()))
        with torch.enable_grad():
            found = self.solve(_of_params(problem), start)
        check_leaves("External: what solve returned", leaves(found), Tensor.is_floating_point, "torch.as_tensor(array)")
        if pytree.tree_structure(found) != raveler.spec or [t.shape for t in leaves(found)] != raveler.shapes:
            raise TypeError(
                "External: solve returned something that is not a tree like init, of the same structure and shapes."
                f"{ordered(found, start)}"
            )
        y = raveler.ravel([leaf.detach() for leaf in leaves(found)])
        codes = make_codes(Result.STEPS_DONE, problem.start.f)
        if self.gtol is not None:
            short = norm(problem.evaluate(y).g) > self.gtol
            codes = marked(make_codes(Result.CONVERGED, short), short, Result.STAGNATED)
        return Solution(y, {"num_steps": torch.ones_like(codes, dtype=torch.int64), "result": codes})
