"""Which hypergradient method to take: measured on the problem itself, in a few products."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..hypergrad.base import Point
from ..hypergrad.implicit import Implicit
from ..linalg.cg import CG
from ..linalg.direct import LU, Cholesky
from ..linalg.gmres import GMRES
from ..linalg.minres import MINRES
from ..linalg.operator import Operator
from ..linalg.solve import LinearSolver
from ..solution import Result, Solution
from ..tree import Tree, leaves
from .checked import corrected_hypergradient, distance, outer_gradients
from .compare import LARGEST_DENSE
from .cost import median_seconds
from .problem import SOLVED_KINDS, Bilevel, Solver, leaf_copies, solve, statement_of, with_decay_outside
from .spectrum import Spectrum, look


@dataclass(frozen=True)
class Candidate:
    """One linear solver with its predicted price."""

    linear_solver: LinearSolver
    products: int
    seconds: float
    why: str


@dataclass(frozen=True)
class Advice:
    """What `advise` recommends; ``str()`` says it in words.

    Attributes:
        hypergrad: to be passed on.
        predicted_error: relative error of the hypergradient by it, at the inner solution that ``solver`` finds: the
            largest of ``asked`` (what the linear solve is set to), ``rounding`` (that of the params' precision times
            the condition number that was seen) and ``measured`` (from an estimate as `hypergradient` makes it, inner
            error included; inf where no solution is near).
        predicted_products, predicted_seconds: of one backward pass.
        inner, inner_residual: how the inner solve ended, and its largest residual norm.
        spectrum: None where the Jacobian is not symmetric. condition: the number that was seen, a lower bound unless
            all eigenvalues were; None where it is not known. product_seconds, gradient_seconds: measured.
        candidates: all that were considered, cheapest first.
    """

    hypergrad: Implicit
    asked: float
    rounding: float
    measured: float
    predicted_products: int
    predicted_seconds: float
    inner: Result
    inner_residual: float
    spectrum: Spectrum | None
    condition: float | None
    product_seconds: float
    gradient_seconds: float
    candidates: list[Candidate]

    @property
    def predicted_error(self) -> float:
        return max(self.asked, self.rounding, self.measured)

    def __str__(self) -> str:
        return (
            f"Take {self.hypergrad!r}: {self.candidates[0].why}. {self._solved()} {self._curvature()}; one product "
            f"costs {self.product_seconds / self.gradient_seconds:.1f} gradients. Predicted: relative error "
            f"{self.predicted_error:.0e}{self._limit()} with {self.predicted_products} products in "
            f"{self.predicted_seconds:.3g} s."
        )

    def _solved(self) -> str:
        words = f"{self.inner.help}; residual norm {self.inner_residual:.1e}"
        if not self.inner.ok:
            return f"The inner problem was NOT solved ({words}): a hypergradient holds at a solution only."
        if self.inner is Result.STEPS_DONE:
            return f"Whether the inner problem was solved is not known ({words})."
        return f"The inner problem was solved ({words})."

    def _curvature(self) -> str:
        if self.spectrum is None:
            seen = "The Jacobian is not symmetric"
            return seen if self.condition is None else f"{seen}, its condition number {self.condition:.3g}"
        kind = "The Hessian is indefinite" if self.spectrum.indefinite else "No negative curvature was seen"
        bound = "" if self.spectrum.complete and not self.spectrum.singular else "at least "
        return f"{kind} in {self.spectrum.steps} products; the condition number is {bound}{self.spectrum.condition:.3g}"

    def _limit(self) -> str:
        """What keeps the error above the one that was asked for."""
        if max(self.rounding, self.measured) <= self.asked:
            return ""
        if self.rounding >= self.measured:
            return f", not the {self.asked:.0e} asked for: rounding at this condition number"
        return f", not the {self.asked:.0e} asked for: measured at this inner solution"


def advise(
    problem: Bilevel,
    hparams: Tree | None = None,
    *,
    solver: Solver | None = None,
    accuracy: float | None = None,
    num_steps: int = 30,
) -> Advice:
    """Measure products, the spectrum and one hypergradient, then name the method and predict its error and cost.

    It costs an inner solve, up to 512 products for the spectrum and about two hypergradients.

    Args:
        problem: with both levels; see `Bilevel`.
        hparams: where; the problem's own by default. solver: of the inner problem.
        accuracy: relative error of the hypergradient that is wanted; None: 1e-6 in float64, 1e-4 in float32.
        num_steps: Lanczos steps spent on the spectrum where there are more than 512 unknowns.

    Raises:
        NotImplementedError: a problem that brings its own solver: its adjoint system is its own as well.
        ValueError: an accuracy that the precision of the params cannot give.
    """
    if problem.kind not in SOLVED_KINDS:
        raise NotImplementedError(
            f"Advice for a problem of kind {problem.kind!r} would need its curvature on the active set: compare the "
            "methods with compare_methods."
        )
    x = leaf_copies(problem.hparams if hparams is None else hparams)
    dtype = leaves(problem.init)[0].dtype
    if accuracy is None:
        accuracy = 1e-6 if dtype is torch.float64 else 1e-4
    if not torch.finfo(dtype).eps * 10 < accuracy < 1:
        raise ValueError(
            f"accuracy is {accuracy}: in {dtype} a relative error between {torch.finfo(dtype).eps * 10:.0e} and 1 can "
            "be asked for."
        )
    problem, solver = with_decay_outside(problem, solver)
    fit = solve(problem, x, solver=solver, hypergrad=Implicit(), throw="ignore")
    statement, flat = statement_of(problem, x)
    params = [leaf.detach() for leaf in leaves(fit.value)]
    point = Point(statement, params, [t.detach() for t in flat], fit.stats["num_steps"].dim(), "ignore")
    operator = Implicit().operator_at(point)
    b = _random_vector(operator)
    product_seconds = median_seconds(lambda: operator.T.matvec(b), warm_up=True)
    gradient_seconds = median_seconds(lambda: statement.linearize(point.params, point.hparams), warm_up=True)
    spectrum, condition = look(operator, b, num_steps)
    candidates = sorted(_candidates(operator, spectrum, accuracy, product_seconds), key=lambda c: c.seconds)
    best = candidates[0]
    hypergrad = Implicit(best.linear_solver)
    return Advice(
        hypergrad,
        accuracy,
        torch.finfo(dtype).eps * (condition or 1.0),
        _measured(problem, fit, x, point, hypergrad),
        best.products,
        best.seconds,
        fit.result,
        float(fit.stats["residual_norm"].max()),
        spectrum,
        condition,
        product_seconds,
        gradient_seconds,
        candidates,
    )


def _random_vector(operator: Operator) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (*operator.batch_shape, operator.size)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(operator.device, operator.dtype)


def _measured(problem: Bilevel, fit: Solution, x: Tree, point: Point, hypergrad: Implicit) -> float:
    """The estimated relative error of a hypergradient by this method, at the solution found."""
    _, by_x, by_params = outer_gradients(problem, fit.value, x)
    pulled = hypergrad.pull(point, point.raveler.ravel(by_params)).hparams
    found = [one if other is None else one + other for one, other in zip(by_x, pulled, strict=True)]
    corrected, solved = corrected_hypergradient(problem, fit, x, accuracy=1e-3)
    if not solved:
        return math.inf
    error, size = (float(distance(corrected, other)) for other in (found, [torch.zeros_like(c) for c in corrected]))
    return error / size if size else (0.0 if error == 0 else math.inf)


def _candidates(
    operator: Operator, spectrum: Spectrum | None, accuracy: float, product_seconds: float
) -> list[Candidate]:
    size = operator.size
    found = []
    if size <= LARGEST_DENSE and not (spectrum is not None and spectrum.singular):
        direct: LinearSolver = Cholesky() if spectrum is not None and spectrum.smallest > 0 else LU()
        why = f"{size} unknowns are few enough to factorise"
        found.append(Candidate(direct, size, size * product_seconds + 1e-10 * size**3, why))
    if spectrum is None:
        steps = min(size, 100)
        why = "the matrix is not symmetric; the number of steps is a guess"
        found.append(Candidate(GMRES(rtol=accuracy / 10), steps, 2 * steps * product_seconds, why))
        return found
    condition = max(spectrum.condition, 1.0)
    # The error of u exceeds the relative residual by up to the condition number, typically by its root.
    rtol = max(accuracy / math.sqrt(condition), 4 * torch.finfo(operator.dtype).eps)
    if spectrum.indefinite or spectrum.singular:
        steps = min(2 * size, math.ceil(condition * math.log(2 / rtol) / 2))
        why = "it minimises the residual whatever the signs of the eigenvalues, zeros among them"
        found.append(Candidate(MINRES(rtol=rtol), steps + 1, (steps + 1) * product_seconds, why))
    else:
        steps = min(2 * size, math.ceil(math.sqrt(condition) * math.log(2 / rtol) / 2))
        why = "it needs about the root of the condition number of steps"
        found.append(Candidate(CG(rtol=rtol), steps + 1, (steps + 1) * product_seconds, why))
    return found
