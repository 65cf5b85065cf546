"""`Influence`: gradients, solves and products over chunks of examples."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..checks import check_leaves, check_linear_solver
from ..linalg.cg import CG
from ..linalg.noise import signs
from ..linalg.operator import Operator
from ..linalg.preconditioners import InversePreconditioner, Multiplies
from ..linalg.solve import LinearSolver
from ..solution import Result, Solution, Throw, check_throw, marked, settle
from ..tree import Raveler, Tree, digest, leaves, norm, tree_map
from .curvature import Curvature, push
from .data import Losses, Outputs, count_of, part
from .scores import InfluenceScores, joined, keep, kept

ADVICE: dict[Result | None, str] = {
    None: "The influences are inexact: raise max_steps, loosen rtol, raise the damping, or precondition CG",
    Result.NEGATIVE_CURVATURE: (
        "The params are no minimum, or the curvature is not that of one: train further, raise the damping, or take "
        "curvature='gauss_newton'"
    ),
    Result.NONFINITE: (
        "The params, the training examples or the queries hold such values, or have such losses: look at the loss of "
        "each example, and leave out those where it is not finite"
    ),
}


OF_A_MODULE = "lambda params, batch: torch.func.functional_call(module, params, (batch[0],))"
OF_OUTPUTS = "lambda outputs, batch: cross_entropy(outputs, batch[1], reduction='none')"


class Influence:
    """The influences of training examples at trained params; memory does not grow with the examples.

    Args:
        outputs: ``outputs(params, batch) -> [b, ...]``, the model, one example by itself, where a batch is a tree like
            ``train``; of a module ``lambda params, batch: torch.func.functional_call(module, params, (batch[0],))``.
        losses: ``losses(outputs, batch) -> [b]``, one for each example.
        params: where the training ended: a tree of tensors; a part of the model's params holds the others fixed.
        train: a tree of tensors whose first dimension counts the n examples.
        penalty: ``penalty(params)``, a scalar that the training added to the mean of the losses.
        curvature: ``"gauss_newton"``, positive semi-definite for convex losses wherever the training ended; ``"full"``
            is the Hessian, whose influences are exact to first order at a minimum.
        damping: added to the curvature. None: nothing where there is a penalty, and a thousandth of the mean curvature
            where there is none, since the curvature of a network is singular.
        linear_solver: `CG` by default; with a preconditioner, such as `InversePreconditioner` of KFAC's or EKFAC's
            inverse, or `Neumann(alpha, max_steps)`, LiSSA's recursion.
        inverse: an approximate inverse of A as the whole answer in place of a solver, such as that of KFAC or EKFAC:
            anything that `InversePreconditioner` takes. What it leaves of the system is in the stats all the same.
        chunk: examples that are evaluated at once. query_chunk: right-hand sides that are solved at once.
        throw: as in `argmin`, of the linear solves.

    Raises:
        TypeError, ValueError: bad input.
    """

    def __init__(
        self,
        outputs: Outputs,
        losses: Losses,
        params: Tree,
        train: Tree,
        *,
        penalty: Callable[[Tree], Tensor] | None = None,
        curvature: Literal["gauss_newton", "full"] = "gauss_newton",
        damping: float | None = None,
        linear_solver: LinearSolver | None = None,
        inverse: Multiplies | None = None,
        chunk: int = 1024,
        query_chunk: int = 64,
        throw: Throw = "warn",
    ):
        check_throw(throw)
        check_linear_solver(linear_solver)
        if inverse is not None and linear_solver is not None:
            raise ValueError(
                "Both inverse and linear_solver are given, and inverse is the whole answer: leave one out, or write "
                "linear_solver=CG(preconditioner=InversePreconditioner(inverse))."
            )
        if curvature not in ("gauss_newton", "full"):
            raise ValueError(f"curvature is {curvature!r}: it is 'gauss_newton' or 'full'.")
        if damping is not None and (isinstance(damping, bool) or not isinstance(damping, Real)):
            raise TypeError(f"damping is {damping!r}: a number is needed, or None.")
        if damping is not None and not 0 <= damping < math.inf:
            raise ValueError(f"damping is {damping}: it cannot be negative, and is finite.")
        if not (penalty is None or callable(penalty)):
            raise TypeError(f"penalty is {penalty!r}: a function of the params is needed, or None.")
        if not all(isinstance(size, Integral) and size >= 1 for size in (chunk, query_chunk)):
            raise ValueError(f"chunk is {chunk} and query_chunk {query_chunk}: one example at least goes at once.")
        for name, function, written in (("outputs", outputs, OF_A_MODULE), ("losses", losses, OF_OUTPUTS)):
            if isinstance(function, nn.Module) or not callable(function):
                kind = type(function).__name__
                raise TypeError(f"{name} is {kind}: a function is needed, such as {written}.")
        self.outputs, self.losses, self.penalty, self.curvature = outputs, losses, penalty, curvature
        check_leaves("params", leaves(params), Tensor.is_floating_point, "such as dict(module.named_parameters())")
        self.params = tree_map(torch.Tensor.detach, params)
        self.raveler = Raveler(self.params)
        self.y = self.raveler.ravel(leaves(self.params))
        self.train, self.num_examples = train, count_of(train)
        self.chunk, self.query_chunk, self.throw = chunk, query_chunk, throw
        self.linear_solver, self.inverse = linear_solver or CG(), inverse
        self._check()
        self.damping = self._default_damping() if damping is None else damping

    @torch.no_grad()  # of a model whose other parts require grad, no graph is kept
    def of(self, queries: Tree, losses: Losses | None = None, *, file: str | Path | None = None) -> InfluenceScores:
        """The influences on queries.

        Args:
            queries: as ``train``, q of them. losses: of the outputs for queries; None: those of training.
            file: kept up to date after each chunk of queries; where it is there already, the queries go on from it.

        Raises:
            SolveError: as ``throw`` says.
            ValueError: queries that outputs and losses do not take; the file has influences of other data, params or
                settings, or none.
        """
        count = count_of(queries)
        self._check_queries(queries, losses or self.losses)
        mark = [] if file is None else self._mark(queries, losses or self.losses)
        done = [] if file is None else kept(Path(file), mark)
        begin = done[0].values.shape[0] if done else 0
        for first in range(begin, count, self.query_chunk):
            batch = part(queries, first, min(first + self.query_chunk, count))
            done = [joined([*done, self._scores(self._gradients(batch, losses or self.losses))])]
            if file is not None:
                keep(file, mark, done[0])
        return done[0]

    @torch.no_grad()
    def of_themselves(self) -> Tensor:
        """``g_i^T A^{-1} g_i`` of each training example, ``[n]``: large where the fit rests on that example alone."""
        parts = []
        for batch in self._batches(self.train, self.query_chunk):
            g = self._gradients(batch, self.losses)
            parts.append((g * self._solve(g).value).sum(-1))
        return torch.cat(parts)

    @property
    @torch.no_grad()
    def distance(self) -> Tensor:
        """The Newton step that is left, relative to the norm of the params: influences are those of a minimum."""
        slope = self._objective_gradient().unsqueeze(0)
        return (norm(self._solve(slope).value) / norm(self.y)).squeeze(0)

    def operator(self, count: int) -> Operator:
        """``A`` for that many right-hand sides."""
        return Curvature(self, count)

    def _check(self) -> None:
        one = part(self.train, 0, min(2, self.num_examples))
        with torch.no_grad():
            found = self.losses(self.outputs(self.params, one), one)
            added = None if self.penalty is None else self.penalty(self.params)
        if added is not None and not (isinstance(added, Tensor) and added.shape == ()):
            kind = f"a tensor of shape {tuple(added.shape)}" if isinstance(added, Tensor) else type(added).__name__
            raise ValueError(f"penalty returned {kind}: a scalar tensor is needed, its sum.")
        if found.shape != (count_of(one),):
            raise ValueError(
                f"losses returned {tuple(found.shape)} for {count_of(one)} examples: one loss for each is needed "
                "(reduction='none')."
            )
        self._check_alone(part(one, 0, 1), found[:1])

    @torch.no_grad()
    def _check_alone(self, one: Tree, among: Tensor) -> None:
        """That the loss of an example does not depend on others, or on chance."""
        advice = "(dropout or batch norm in training mode?). Call module.eval() first"
        try:
            apart = (self.losses(self.outputs(self.params, one), one) - among).abs()
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"outputs and losses do not take one example by itself {advice}: {error}") from error
        if bool((apart > 1e-2 * among.abs() + 1e-4).any()):
            raise ValueError(
                "The first example has another loss when it is evaluated by itself: outputs draws random numbers, or "
                f"its examples depend on each other {advice}."
            )

    def _check_queries(self, queries: Tree, losses: Losses) -> None:
        one = part(queries, 0, 1)
        try:
            with torch.no_grad():
                losses(self.outputs(self.params, one), one)
        except (RuntimeError, IndexError, KeyError) as error:

            def described(data: Tree) -> str:
                return ", ".join(f"{list(leaf.shape[1:])} of {leaf.dtype}" for leaf in leaves(data))

            raise ValueError(
                f"outputs and losses take the examples ({described(self.train)}), but not the queries "
                f"({described(queries)}): {error}"
            ) from error

    @torch.no_grad()
    def _default_damping(self) -> float:
        if self.penalty is not None:
            return 0.0
        self.damping = 0.0
        probes = signs((8, *self.y.shape), 0, self.y.device).to(self.y)
        mean = (probes * self.operator(8).matvec(probes)).sum(-1).mean() / self.y.shape[-1]
        return 1e-3 * max(float(mean), 0.0)

    def _at(self, y: Tensor) -> Tree:
        return self.raveler.unflatten(self.raveler.unravel(y))

    def _batches(self, data: Tree, size: int) -> Iterator[Tree]:
        count = count_of(data)
        for first in range(0, count, size):
            yield part(data, first, min(first + size, count))

    def _each(self, y: Tensor, batch: Tree, losses: Losses) -> Tensor:
        return losses(self.outputs(self._at(y), batch), batch)

    def _gradients(self, batch: Tree, losses: Losses) -> Tensor:
        """One for each example, ``[b, p]``."""

        def one(y: Tensor, example: Tree) -> Tensor:
            return self._each(y, tree_map(lambda leaf: leaf.unsqueeze(0), example), losses).squeeze(0)

        found: Tensor = torch.func.vmap(torch.func.grad(one), (None, 0))(self.y, batch)
        return found

    def _objective_gradient(self) -> Tensor:
        total = torch.zeros_like(self.y)
        for batch in self._batches(self.train, self.chunk):
            total = total + torch.func.grad(lambda y, b=batch: self._each(y, b, self.losses).sum())(self.y)
        total = total / self.num_examples
        penalty = self.penalty
        return total if penalty is None else total + torch.func.grad(lambda y: penalty(self._at(y)))(self.y)

    def _solve(self, g: Tensor) -> Solution[Tensor]:
        operator = self.operator(len(g))
        if self.inverse is None:
            found = self.linear_solver.solve(operator, g)
        else:
            u = InversePreconditioner(self.inverse)(operator)(g)
            left, size = norm(g - operator.matvec(u)), norm(g)
            stats = {"num_steps": torch.zeros_like(size, dtype=torch.int64), "residual_norm": left}
            codes = torch.full_like(size, int(Result.STEPS_DONE), dtype=torch.int8)
            codes = marked(codes, left > size, Result.STAGNATED)
            found = Solution(u, {**stats, "relative_residual": left / size, "result": codes})
        settle(found, self.throw, "The linear solve of the influences", ADVICE)
        return found

    def _scores(self, g: Tensor) -> InfluenceScores:
        """The influences on queries of gradients ``[q, p]``; the error by a loose solve for what the first one left."""
        found = self._solve(g)
        left = g - self.operator(len(g)).matvec(found.value)
        rest = CG(max_steps=ERROR_STEPS).solve(self.operator(len(g)), left).value
        along = torch.cat([found.value, rest])
        rows = torch.cat([self._slopes(batch, along) for batch in self._batches(self.train, self.chunk)], -1)
        values, missed = rows.split(len(g))
        return InfluenceScores(-values, missed.square().mean(-1).sqrt(), dict(found.stats))

    def _slopes(self, batch: Tree, along: Tensor) -> Tensor:
        """``g_i . u`` of every example of a batch, without the gradients: ``[k, p] -> [k, b]``."""
        _, pull = torch.func.vjp(lambda y: self._each(y, batch, self.losses), self.y)  # type: ignore[misc]
        return push(pull, (count_of(batch),), along)

    def _mark(self, queries: Tree, losses: Losses) -> list[Tensor]:
        """What a kept file has to be of: the data to the last bit, and what is done with them by a few numbers."""
        count = count_of(queries)
        ends = [self._gradients(part(queries, i, i + 1), losses)[0].double() for i in (0, count - 1)]
        probe = signs((1, *self.y.shape), 0, self.y.device).to(self.y)
        product = self.operator(1).matvec(probe)[0].double()  # of params, losses, penalty, curvature and damping
        vectors = [*ends, product, self._objective_gradient().double()]
        numbers = [v @ torch.arange(len(v), dtype=v.dtype, device=v.device).cos() for v in vectors]
        solver = self.linear_solver if self.inverse is None else self.inverse
        settings = [getattr(solver, name, None) for name in ("rtol", "max_steps")]
        named = zlib.crc32(repr((type(solver).__name__, settings, self.curvature, count)).encode())
        exact = torch.tensor(
            [digest([*leaves(self.train), *leaves(queries)]), named], dtype=torch.float64, device="cpu"
        )
        return [exact, torch.stack([v.norm() for v in vectors]), torch.stack(numbers)]


ERROR_STEPS = 10
"""Products that the estimate of the error costs."""


def influence(
    outputs: Outputs, losses: Losses, params: Tree, train: Tree, queries: Tree, **settings: Any
) -> InfluenceScores:
    """The influence of every training example on every query, ``[q, n]``; ``settings`` are those of `Influence`.

    Example::

        scores = bl.influence(
            lambda params, batch: functional_call(model, params, (batch[0],)),
            lambda outputs, batch: cross_entropy(outputs, batch[1], reduction="none"),
            dict(model.named_parameters()), (x, labels), (x_test, labels_test),
        )
    """
    return Influence(outputs, losses, params, train, **settings).of(queries)
