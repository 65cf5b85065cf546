"""Which hypergradient method to take: measured on the problem itself, in a few products."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..hypergrad.base import Point
from ..hypergrad.implicit import Implicit
from ..linalg.cg import CG
from ..linalg.direct import LU, Cholesky
from ..linalg.minres import MINRES
from ..linalg.operator import Operator
from ..linalg.scipy import GMRES
from ..linalg.solve import LinearSolver
from ..tree import Tree, leaves
from .compare import LARGEST_DENSE
from .problem import Bilevel, leaf_copies, solve, statement_of


@dataclass(frozen=True)
class Spectrum:
    """What a few Lanczos steps saw of the Hessian, the extremes over all problems of a batch.

    The true spectrum reaches at least as far: ``condition`` is a lower bound.
    """

    smallest: float
    largest: float
    steps: int

    @property
    def indefinite(self) -> bool:
        return self.smallest < -1e-6 * abs(self.largest)

    @property
    def condition(self) -> float:
        magnitude = max(abs(self.smallest), abs(self.largest) * 1e-16)
        return max(abs(self.largest), abs(self.smallest)) / magnitude


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
        hypergrad: to be passed on. predicted_error: relative error of its linear solve, so of the hypergradient at an
            exact inner solution. predicted_products, predicted_seconds: of one backward pass.
        spectrum: None where the Jacobian is not symmetric. product_seconds, gradient_seconds: measured.
        candidates: all that were considered, cheapest first.
    """

    hypergrad: Implicit
    predicted_error: float
    predicted_products: int
    predicted_seconds: float
    spectrum: Spectrum | None
    product_seconds: float
    gradient_seconds: float
    candidates: list[Candidate]

    def __str__(self) -> str:
        seen = "The Jacobian is not symmetric"
        if self.spectrum is not None:
            kind = "indefinite" if self.spectrum.indefinite else "positive definite"
            seen = f"The Hessian is {kind}, its condition number at least {self.spectrum.condition:.3g}"
        return (
            f"Take {self.hypergrad!r}: {self.candidates[0].why}. {seen}; one product costs "
            f"{self.product_seconds / self.gradient_seconds:.1f} gradients. Predicted: relative error "
            f"{self.predicted_error:.0e} with {self.predicted_products} products in {self.predicted_seconds:.3g} s."
        )


def advise(
    problem: Bilevel,
    hparams: Tree | None = None,
    *,
    solver: Any = None,
    accuracy: float | None = None,
    num_steps: int = 30,
) -> Advice:
    """Measure a few products and the spectrum, then name the method and predict its error and cost.

    Args:
        problem: with both levels; see `Bilevel`.
        hparams: where; the problem's own by default. solver: of the inner problem.
        accuracy: relative error of the hypergradient that is wanted; None: 1e-6 in float64, 1e-4 in float32.
        num_steps: Lanczos steps spent on the spectrum.

    Raises:
        ValueError: an accuracy that the precision of the params cannot give.
    """
    x = leaf_copies(problem.hparams if hparams is None else hparams)
    dtype = leaves(problem.init)[0].dtype
    if accuracy is None:
        accuracy = 1e-6 if dtype is torch.float64 else 1e-4
    if not torch.finfo(dtype).eps * 10 < accuracy < 1:
        raise ValueError(
            f"accuracy is {accuracy}: in {dtype} a relative error between {torch.finfo(dtype).eps * 10:.0e} and 1 can "
            "be asked for."
        )
    fit = solve(problem, x, solver=solver, hypergrad=Implicit(), throw="ignore")
    statement, flat = statement_of(problem, x)
    params = [leaf.detach() for leaf in leaves(fit.value)]
    point = Point(statement, params, [t.detach() for t in flat], fit.stats["num_steps"].dim(), "ignore")
    operator = Implicit().operator_at(point)
    generator = torch.Generator().manual_seed(0)
    shape = (*operator.batch_shape, operator.size)
    b = torch.randn(shape, generator=generator, dtype=torch.float64).to(operator.device, operator.dtype)
    product_seconds = _median_seconds(lambda: operator.T.matvec(b))
    gradient_seconds = _median_seconds(lambda: statement.linearize(point.params, point.hparams))
    spectrum = _spectrum(operator, b, min(num_steps, operator.size)) if operator.symmetric else None
    candidates = sorted(_candidates(operator, spectrum, accuracy, product_seconds), key=lambda c: c.seconds)
    best = candidates[0]
    return Advice(
        Implicit(best.linear_solver),
        accuracy,
        best.products,
        best.seconds,
        spectrum,
        product_seconds,
        gradient_seconds,
        candidates,
    )


def _spectrum(operator: Operator, b: Tensor, num_steps: int) -> Spectrum:
    found = MINRES(max_steps=num_steps).solve(operator, b)
    assert found.curvature is not None
    smallest, largest = found.curvature
    return Spectrum(float(smallest.min()), float(largest.max()), int(found.stats["num_steps"].max()))


def _candidates(
    operator: Operator, spectrum: Spectrum | None, accuracy: float, product_seconds: float
) -> list[Candidate]:
    size = operator.size
    found = []
    if size <= LARGEST_DENSE:
        definite = spectrum is not None and spectrum.smallest > 0
        direct: LinearSolver = Cholesky() if definite else LU()
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
    if spectrum.indefinite:
        steps = min(2 * size, math.ceil(condition * math.log(2 / rtol) / 2))
        why = "it minimises the residual whatever the signs of the eigenvalues"
        found.append(Candidate(MINRES(rtol=rtol), steps + 1, (steps + 1) * product_seconds, why))
    else:
        steps = min(2 * size, math.ceil(math.sqrt(condition) * math.log(2 / rtol) / 2))
        why = "it needs about the root of the condition number of steps"
        found.append(Candidate(CG(rtol=rtol), steps + 1, (steps + 1) * product_seconds, why))
    return found


def _median_seconds(run: Callable[[], Any], repeats: int = 5) -> float:
    run()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)
