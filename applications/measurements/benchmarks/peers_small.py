"""Workload E, contestant by contestant: solve and hypergradient of the same small problem, from the same start."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

import bilevel as bl
from applications.measurements.benchmarks.contest import HYPERTORCH, Contestant, Round, checkout, needs
from applications.measurements.benchmarks.peers_solutions import minimised
from applications.measurements.benchmarks.small_task import NUMPY, Functions, Small

GTOL, RTOL, MAX_STEPS = 1e-8, 1e-7, 500
"""Gradient norm and relative residual that the peers solve to; and ours, in its second row."""
RUNS = 15
"""Hypergradients in a run, whose median time counts."""

T = TypeVar("T")
TORCH = Functions(torch.exp, torch.tanh, softplus)


def contestants(problem: Callable[[], Small]) -> dict[str, Callable[[], Contestant]]:
    """Ours stands twice: as it comes, whose tolerances are smaller, and with those of the peers."""
    same = {"solver": bl.LBFGS(gtol=GTOL), "hypergrad": bl.Implicit(bl.CG(rtol=RTOL))}
    return {
        "bilevel": lambda: Ours(Losses(problem()), {}),
        "bilevel, tolerances of the peers": lambda: Ours(Losses(problem()), same),
        "TorchOpt": lambda: Peer(torchopt(Losses(problem()))),
        "hypertorch": lambda: Peer(hypertorch(Losses(problem()))),
        "JAXopt, compiled": lambda: Peer(jaxopt(problem())),
        "SciPy, formulas by hand": lambda: Peer(scipy(problem())),
    }


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Seconds of CPU, all threads together, which another program on the machine does not add to; and the result."""
    begin = time.process_time()
    found = work()
    return time.process_time() - begin, found


class Losses:
    """A `Small` of tensors, and its losses as functions."""

    def __init__(self, problem: Small):
        self.problem = problem.converted(torch.from_numpy)
        self.start, self.x = self.problem.start, self.problem.x.requires_grad_()

    def inner(self, w: Tensor, x: Tensor) -> Tensor:
        found: Tensor = self.problem.inner(w, x, TORCH)
        return found

    def total(self, w: Tensor, x: Tensor) -> Tensor:
        """The batch as one problem, for libraries that know one only."""
        return self.inner(w, x).sum()

    def outer(self, w: Tensor) -> Tensor:
        found: Tensor = self.problem.outer(w, TORCH)
        return found


class Peer:
    """A contestant that only has a hypergradient."""

    def __init__(self, hypergradient: Callable[[], np.ndarray]):
        self.hypergradient = hypergradient
        hypergradient()

    def __call__(self) -> Round:
        seconds, answers = zip(*(timed(self.hypergradient) for _ in range(RUNS)), strict=True)
        return Round(statistics.median(seconds), answers[-1])


class Ours:
    """`argmin` and a backward pass; beside it, in turn, the evaluations that are in it, by themselves."""

    def __init__(self, losses: Losses, settings: dict[str, Any]):
        self.losses, self.settings, self.calls = losses, settings, 0
        self.fit = self.hypergradient(self._counted)[1]
        # The last evaluation has a graph, over which the products and the hypergradient go.
        self.gradients = self.calls - 1
        assert self.fit.adjoint is not None
        self.products = int(self.fit.adjoint.stats["num_steps"].max()) + 1

    def _counted(self, w: Tensor, x: Tensor) -> Tensor:
        self.calls += 1
        return self.losses.inner(w, x)

    def hypergradient(self, inner: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, bl.Solution]:
        fit = bl.argmin(inner, self.losses.start, self.losses.x, **self.settings)
        return torch.autograd.grad(self.losses.outer(fit.value), self.losses.x)[0], fit

    def bare(self) -> None:
        """As many gradients and products as there are in the hypergradient."""
        x, w = self.losses.x, self.fit.value.detach().clone().requires_grad_()
        for _ in range(self.gradients):
            torch.autograd.grad(self.losses.total(w, x.detach()), w)
        (residual,) = torch.autograd.grad(self.losses.total(w, x), w, create_graph=True)
        (right,) = torch.autograd.grad(self.losses.outer(w), w)
        for _ in range(self.products):
            torch.autograd.grad(residual, w, right, retain_graph=True)
        torch.autograd.grad(residual, x, right)

    def __call__(self) -> Round:
        times = [(timed(lambda: self.hypergradient(self.losses.inner))[0], timed(self.bare)[0]) for _ in range(RUNS)]
        ours, bare = zip(*times, strict=True)
        found, _ = self.hypergradient(self.losses.inner)
        facts = {
            "gradients": self.gradients,
            "products": self.products,
            "ratio": statistics.median(one / other for one, other in times),
            "to": f"its {self.gradients} gradients and {self.products} products by themselves",
            "bare_seconds": statistics.median(bare),
        }
        return Round(statistics.median(ours), found.double().numpy().ravel(), facts)


def torchopt(losses: Losses) -> Callable[[], np.ndarray]:
    """``custom_root`` on the gradient, around PyTorch's L-BFGS, with the CG of TorchOpt."""
    torchopt = needs("torchopt")
    solve = torchopt.linear_solve.solve_cg(rtol=RTOL, maxiter=MAX_STEPS)

    @torchopt.diff.implicit.custom_root(torch.func.grad(losses.total), argnums=1, solve=solve)
    def solver(start: Tensor, x: Tensor) -> Tensor:
        return minimised(lambda w: losses.total(w, x.detach()), start, GTOL)

    def hypergradient() -> np.ndarray:
        found = losses.outer(solver(losses.start, losses.x))
        return torch.autograd.grad(found, losses.x)[0].numpy().ravel()

    return hypergradient


def hypertorch(losses: Losses) -> Callable[[], np.ndarray]:
    """PyTorch's L-BFGS, and hypertorch's CG on the map of one gradient step; its tolerance is absolute."""
    hypergrad = checkout("hypergrad", *HYPERTORCH)
    w = losses.start.clone().requires_grad_()
    tolerance = RTOL * torch.autograd.grad(losses.outer(w), w)[0].norm().item()

    def step(params: list[Tensor], hparams: list[Tensor]) -> list[Tensor]:
        loss = losses.total(params[0], hparams[0])
        return [params[0] - torch.autograd.grad(loss, params, create_graph=True)[0]]

    def outer(params: list[Tensor], hparams: list[Tensor]) -> Tensor:
        return losses.outer(params[0]) + 0 * hparams[0].sum()  # it wants a gradient towards both

    def hypergradient() -> np.ndarray:
        found = minimised(lambda w: losses.total(w, losses.x.detach()), losses.start, GTOL).requires_grad_()
        (grad,) = hypergrad.CG([found], [losses.x], MAX_STEPS, step, outer, tol=tolerance, set_grad=False)
        return np.asarray(grad.detach().numpy().ravel())

    return hypergradient


def jaxopt(problem: Small) -> Callable[[], np.ndarray]:
    """Its L-BFGS with implicit differentiation, compiled as a whole; a batch by ``vmap``."""
    jaxopt, jax = needs("jaxopt"), needs("jax")
    jax.config.update("jax_enable_x64", True)
    arrays = problem.converted(jax.numpy.asarray)
    functions = Functions(jax.numpy.exp, jax.numpy.tanh, jax.nn.softplus)
    linear = partial(jaxopt.linear_solve.solve_cg, tol=RTOL, maxiter=MAX_STEPS)

    def inner(w: Any, x: Any, train: Any) -> Any:
        return Small(problem.model, train, train, w, x).inner(w, x, functions)

    solver = jaxopt.LBFGS(inner, maxiter=MAX_STEPS, tol=GTOL, implicit_diff_solve=linear)

    def solved(start: Any, x: Any, train: Any) -> Any:
        return solver.run(start, x, train).params

    solve = jax.vmap(solved) if problem.start.ndim == 2 else solved

    def outer(x: Any, start: Any, train: Any) -> Any:
        return arrays.outer(solve(start, x, train), functions)

    compiled = jax.jit(jax.grad(outer))
    return lambda: np.asarray(compiled(arrays.x, arrays.start, arrays.train)).ravel()


def scipy(problem: Small) -> Callable[[], np.ndarray]:
    """``minimize`` by L-BFGS-B and ``cg``, with gradients and products in NumPy; a batch is one problem."""
    from scipy.optimize import minimize
    from scipy.sparse.linalg import LinearOperator, cg

    shape, size, x = problem.start.shape, problem.start.size, problem.x

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        w = w.reshape(shape)
        return float(problem.inner(w, x, NUMPY).sum()), problem.gradient(w, x).ravel()

    options = {"gtol": GTOL / size**0.5, "ftol": 0.0, "maxiter": MAX_STEPS}

    def hypergradient() -> np.ndarray:
        w = minimize(loss, problem.start.ravel(), jac=True, method="L-BFGS-B", options=options).x.reshape(shape)

        def product(v: np.ndarray) -> np.ndarray:
            return problem.product(w, x, v.reshape(shape)).ravel()

        operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
        u, _ = cg(operator, problem.outer_gradient(w).ravel(), rtol=RTOL, maxiter=MAX_STEPS)
        return problem.pull(w, x, u.reshape(shape)).ravel()

    return hypergradient
