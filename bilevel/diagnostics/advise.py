"""What to take for a problem: inner solver, hypergradient and outer scheme, by a look at the problem itself."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adaptive import Adaptive
from ..context import differentiates
from ..hypergrad.base import Point
from ..hypergrad.implicit import Implicit
from ..inner.fixed_point import Anderson
from ..inner.lbfgs import LBFGS
from ..inner.newton_cg import NewtonCG
from ..inner.roots import Newton
from ..linalg.cg import CG
from ..linalg.direct import LU, Cholesky
from ..linalg.gmres import GMRES
from ..linalg.minres import MINRES
from ..linalg.operator import Operator
from ..linalg.solve import LinearSolver
from ..solution import Result, Solution
from ..tree import Tree, leaves, norm
from .checked import corrected_hypergradient, distance, outer_gradients
from .compare import LARGEST_DENSE
from .cost import median_seconds, wait
from .differences import OuterLoss
from .network import PRODUCTS, find_network, first_order_solver, fresh, left_by_few_products, network_hypergrad
from .problem import SOLVED_KINDS, Bilevel, Solver, as_solved, leaf_copies, solve, statement_of
from .spectrum import Spectrum, look
from .written import written


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
        solver: the inner solver. hypergrad: to be passed on with it.
        tolerance: where it is not None, ``**tolerance.settings()`` take the place of both in an outer loop, and
            ``tolerance = tolerance.after(loss)`` follows each outer step; ``hypergrad`` is then for a single one.
        why: the reason. random: in words, which function is; the rest is then not measured. None: none is.
        num_params, num_hparams: how many there are.
        predicted_error: relative error of the hypergradient by ``hypergrad``, at the inner solution that ``solver``
            finds: the largest of ``asked`` (what the linear solve is set to), ``rounding`` (that of the params'
            precision times the condition number that was seen) and ``measured`` (from an estimate as `hypergradient`
            makes it, inner error included; inf where no solution is near). Of a network, whose params are no minimum:
            what many more products would change.
        predicted_products, predicted_seconds: of one backward pass. inner_seconds: of one inner solve from ``init``.
        inner, inner_residual: how the inner solve by ``solver``, or by the default one where none was given, ended, and
            its largest residual norm.
        spectrum: None where the Jacobian is not symmetric. condition: the number that was seen, a lower bound unless
            all eigenvalues were; None where it is not known. product_seconds, gradient_seconds: measured.
        candidates: all linear solvers that were considered, cheapest first.
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
    solver: Solver | None = None
    tolerance: Adaptive | None = None
    why: str = ""
    entry: str = "argmin"
    random: str | None = None
    num_params: int = 0
    num_hparams: int = 0
    inner_seconds: float = math.nan

    @property
    def predicted_error(self) -> float:
        return max(self.asked, self.rounding, self.measured)

    @property
    def expression(self) -> str:
        """An outer step that can be pasted; what stands before the loop follows it as a comment."""
        if self.random is not None:
            return (
                "method = bl.stochastic.SOBA(params, hparams, train_loss, val_loss, inner_lr=bl.stochastic.Decay(0.1), "
                "outer_lr=bl.stochastic.Decay(0.1)); method.step(train_batch, val_batch)"
            )
        settings = f"solver={written(self.solver)}, hypergrad={written(self.hypergrad)}"
        if self.tolerance is not None:
            settings = "**tolerance.settings()"
        call = f"fit = bl.{self.entry}(inner, params, {settings}, warm_start=fit); params = fit.value"
        if self.tolerance is None:
            return f"{call}  # begin with fit = None"
        begin = f"begin with fit = None, tolerance = {written(self.tolerance)}"
        return f"{call}  # {begin}; then tolerance = tolerance.after(loss)"

    def __str__(self) -> str:
        if self.random is not None:
            return f"Take a stochastic method, since {self.random}. In each step: {self.expression}"
        ratio = self.product_seconds / self.gradient_seconds
        take = f"Take {written(self.hypergrad)}: {self.why}. In each outer step: {self.expression}."
        if self.tolerance is not None:
            take = (
                f"In an outer loop take tolerances that make both solves as accurate as they help: {self.expression}. "
                f"For one accurate hypergradient take {written(self.hypergrad)}: {self.why}."
            )
        return (
            f"{take} {self._solved()} "
            f"{self._curvature()}; one product costs {ratio:.1f} gradients, with {self.num_params} params and "
            f"{self.num_hparams} hyperparameters. Predicted: relative error {self.predicted_error:.0e}{self._limit()} "
            f"with {self.predicted_products} products in {self.predicted_seconds:.3g} s, after an inner solve of "
            f"{self.inner_seconds:.3g} s."
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
        if self.asked == 0.0:
            return " beside many more products"
        if max(self.rounding, self.measured) <= self.asked:
            return ""
        if self.rounding >= self.measured:
            return f", not the {self.asked:.0e} asked for: rounding at this condition number"
        return f", not the {self.asked:.0e} asked for: measured at this inner solution"


@differentiates
def advise(
    problem: Bilevel,
    hparams: Tree | None = None,
    *,
    solver: Solver | None = None,
    accuracy: float | None = None,
    num_steps: int = 30,
) -> Advice:
    """Look at a problem, then name an inner solver, a hypergradient, and how to go from one outer step to the next.

    It looks whether the functions are random, whether the inner problem was solved, at the curvature, the numbers of
    params and hyperparameters, and at what an evaluation and a product cost. That takes an inner solve, up to 512
    products for the spectrum, and about two hypergradients; of a network about 200 gradients.

    Args:
        problem: with both levels; see `Bilevel`.
        hparams: where; the problem's own by default. solver: of the inner problem; None: one is named.
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
    problem, solver = as_solved(problem, solver)
    random = OuterLoss(problem, x, solver, "ignore").randomness(problem.init)
    if random is not None:
        return _for_random(random, problem, x)
    fit, seconds = _timed(problem, x, solver)
    network = None
    if solver is None and problem.kind == "argmin" and not fit.result.ok:
        if fit.result is Result.NEGATIVE_CURVATURE:
            network = find_network(problem, x)
        elif _count(problem.init) <= LARGEST_DENSE:
            newton = _timed(problem, x, NewtonCG())
            if newton[0].result.ok:
                solver, (fit, seconds) = NewtonCG(), newton
    ended = fit
    if network is not None:
        solver = first_order_solver(problem, x)
        fit, seconds = _timed(problem, x, solver)
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
    tolerance, why = None, ""
    hypergrad, asked, rounding = Implicit(best.linear_solver), accuracy, torch.finfo(dtype).eps * (condition or 1.0)
    products, price = best.products, best.seconds
    if network is not None:
        hypergrad, asked, rounding, why = network_hypergrad(network), 0.0, 0.0, NETWORK_REASON
        cotangent = point.raveler.ravel(outer_gradients(problem, fit.value, x)[2])
        begin = time.perf_counter()
        hypergrad.pull(fresh(point), cotangent)
        wait()
        products, price = PRODUCTS, time.perf_counter() - begin
        measured = left_by_few_products(hypergrad, point, cotangent)
    else:
        measured = _measured(problem, fit, x, point, hypergrad)
        if solver is None and _definite(spectrum) and fit.result.ok and problem.kind == "argmin":
            tolerance = _tolerance(problem, x)
    return Advice(
        hypergrad=hypergrad,
        asked=asked,
        rounding=rounding,
        measured=measured,
        predicted_products=products,
        predicted_seconds=price,
        inner=ended.result,
        inner_residual=float(ended.stats["residual_norm"].max()),
        spectrum=spectrum,
        condition=condition,
        product_seconds=product_seconds,
        gradient_seconds=gradient_seconds,
        candidates=candidates,
        solver=_named(problem) if solver is None else solver,
        tolerance=tolerance,
        why=why or best.why,
        entry=_entry(problem),
        num_params=_count(problem.init),
        num_hparams=_count(x),
        inner_seconds=seconds,
    )


def _timed(problem: Bilevel, x: Tree, solver: Solver | None) -> tuple[Solution, float]:
    """An inner solve and its seconds."""
    begin = time.perf_counter()
    fit = solve(problem, x, solver=solver, hypergrad=Implicit(), throw="ignore")
    wait()
    return fit, time.perf_counter() - begin


NETWORK_REASON = (
    "the Hessian of a network is indefinite away from a minimum, and a minimum is too far to be paid for in each outer "
    "step; a few steps of Adam from where the last one ended, and the Gauss-Newton matrix, serve instead"
)


def _for_random(random: str, problem: Bilevel, x: Tree) -> Advice:
    """The advice where nothing else can be measured."""
    unknown = math.nan
    return Advice(
        hypergrad=Implicit(),
        asked=unknown,
        rounding=unknown,
        measured=math.inf,
        predicted_products=0,
        predicted_seconds=unknown,
        inner=Result.STAGNATED,
        inner_residual=unknown,
        spectrum=None,
        condition=None,
        product_seconds=unknown,
        gradient_seconds=unknown,
        candidates=[],
        entry=_entry(problem),
        random=random,
        num_params=_count(problem.init),
        num_hparams=_count(x),
    )


def _count(tree: Tree) -> int:
    return sum(leaf.numel() for leaf in leaves(tree))


def _entry(problem: Bilevel) -> str:
    """The function that solves such a problem: of a composite one, `argmin` by a solver with bounds or a prox."""
    return "argmin" if problem.kind == "composite" else problem.kind


def _named(problem: Bilevel) -> Solver:
    """The default solver of a kind of problem, by its name."""
    solvers: dict[str, Solver] = {"argmin": LBFGS(), "root": Newton(), "fixed_point": Anderson()}
    return solvers[problem.kind]


def _definite(spectrum: Spectrum | None) -> bool:
    return spectrum is not None and spectrum.smallest > 0 and not spectrum.singular


def _tolerance(problem: Bilevel, x: Tree) -> Adaptive:
    """In units of the inner gradient at the start."""
    params = leaf_copies(problem.init)
    with torch.enable_grad():
        grads = torch.autograd.grad(problem.inner(params, x).sum(), leaves(params), allow_unused=True)
    size = float(norm(torch.cat([grad.reshape(-1) for grad in grads if grad is not None])))
    return Adaptive(scale=float(f"{size:.2g}")) if size > 0 else Adaptive()


def _random_vector(operator: Operator) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (*operator.batch_shape, operator.size)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(
        operator.device, operator.dtype
    )


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
        steps = math.ceil(min(2 * size, condition * math.log(2 / rtol) / 2))
        why = "it minimises the residual whatever the signs of the eigenvalues, zeros among them"
        found.append(Candidate(MINRES(rtol=rtol), steps + 1, (steps + 1) * product_seconds, why))
    else:
        steps = math.ceil(min(2 * size, math.sqrt(condition) * math.log(2 / rtol) / 2))
        why = "it needs about the root of the condition number of steps"
        found.append(Candidate(CG(rtol=rtol), steps + 1, (steps + 1) * product_seconds, why))
    return found
