"""Workload D: seconds from a fixed start to a given validation loss, for data cleaning and per-feature penalties."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import scipy.optimize
import scipy.sparse.linalg
import torch
from scipy.special import log_softmax, softmax
from torch import Tensor
from torch.nn.functional import cross_entropy

import bilevel as bl
from applications.frame.data import mislabel
from applications.frame.mini_batches import BATCHES, STOCHASTIC, Batches
from applications.measurements.benchmarks.contest import Contestant, Round, Workload

Step = Callable[[], Any]
"""One outer step; returns the hyperparameters that it leads to, as anything that numpy reads."""
Begin = Callable[[], Step]
"""A new run from the start: it sets up what the first step needs, on the clock."""

DESCENT_STEPS = 20
"""Of the inner solvers that are unrolled; they start where the last outer step ended."""


@dataclass(frozen=True)
class Task:
    """Softmax regression in float32 whose hyperparameters weigh the examples, or the penalties of the features.

        cleaning:   g(W, x) = mean_i sigmoid(x_i) loss_i(W) + ridge/2 |W|^2
        penalties:  g(W, x) = mean_i loss_i(W) + sum_k exp(x_k) |W_k|^2 / 2
        f(W)        = mean loss of W on the validation data

    Attributes:
        outer_lr: of Adam on x, the same for all two-loop contestants.
        sgd_lr: outer step of the stochastic methods, which are plain gradient steps.
        multiply: the product of features and weights: PyTorch's, or ours for our contestants.
    """

    kind: str
    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    classes: int
    ridge: float
    outer_lr: float
    sgd_lr: float
    multiply: Callable[[Tensor, Tensor], Tensor] = torch.matmul

    @property
    def size(self) -> int:
        return len(self.train[0]) if self.kind == "cleaning" else self.train[0].shape[1]

    def start(self) -> tuple[Tensor, Tensor]:
        """W and x, all zeros."""
        return torch.zeros(self.train[0].shape[1], self.classes), torch.zeros(self.size)

    def inner(self, weights: Tensor, x: Tensor, batch: Tensor | None = None) -> Tensor:
        features, labels = self.train if batch is None else (self.train[0][batch], self.train[1][batch])
        if self.kind == "penalties":
            penalty = (x.exp() * weights.square().sum(1)).sum() / 2
            return cross_entropy(self.multiply(features, weights), labels) + penalty
        losses = cross_entropy(self.multiply(features, weights), labels, reduction="none")
        each = x if batch is None else x[batch]
        return (each.sigmoid() * losses).mean() + self.ridge / 2 * weights.square().sum()

    def outer(self, weights: Tensor, x: Tensor, batch: Tensor | None = None) -> Tensor:
        features, labels = self.val if batch is None else (self.val[0][batch], self.val[1][batch])
        return cross_entropy(self.multiply(features, weights), labels)

    @cached_property
    def _curvature(self) -> float:
        """Of the mean loss at most: a softmax has 1/2 at most, an example in cleaning the weight 1."""
        features = self.train[0]
        return float(torch.linalg.matrix_norm(features, 2)) ** 2 / len(features) / 2

    def inner_lr(self, x: Tensor) -> float:
        """1/L, for gradient descent; penalties that grow make it smaller."""
        return 1 / (self._curvature + (self.ridge if self.kind == "cleaning" else float(x.detach().max().exp())))

    def bilevel(self) -> bl.diagnostics.BilevelProblem:
        return bl.diagnostics.BilevelProblem(self.inner, self.outer, *self.start())


class Truth:
    """The same problem in float64 numpy, by formulas: accurate solutions, losses and hypergradients."""

    def __init__(self, task: Task):
        self.task = task
        self.features, self.val = (data[0].double().numpy() for data in (task.train, task.val))
        self.targets, self.val_targets = (np.eye(task.classes)[data[1].numpy()] for data in (task.train, task.val))
        self.shape = (self.features.shape[1], task.classes)
        self.weights = np.zeros(self.shape)

    def _scales(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The weight of each example, divided by their number, and the penalty of each feature; columns."""
        n, k = len(self.features), self.shape[0]
        if self.task.kind == "cleaning":
            return 1 / (1 + np.exp(-x))[:, None] / n, np.full((k, 1), self.task.ridge)
        return np.full((n, 1), 1 / n), np.exp(x)[:, None]

    def solve(self, x: np.ndarray, gtol: float = 1e-5) -> np.ndarray:
        """W*(x) by L-BFGS from the last solution, in variables scaled by the penalty; NaN where x overflows."""
        if self.task.kind == "penalties" and x.max() > LARGEST_LOG_PENALTY:
            return np.full(self.shape, np.nan)
        each, penalty = self._scales(x)
        scale = 1 / np.sqrt(penalty + 0.1)

        def evaluate(flat: np.ndarray) -> tuple[float, np.ndarray]:
            weights = flat.reshape(self.shape) * scale
            logs = log_softmax(self.features @ weights, 1)
            loss = -(each * self.targets * logs).sum() + (penalty * weights**2).sum() / 2
            gradient = self.features.T @ (each * (np.exp(logs) - self.targets)) + penalty * weights
            return loss, (gradient * scale).ravel()

        settings = {"gtol": gtol, "ftol": 0.0, "maxiter": 5000, "maxfun": 10000, "maxcor": 20}
        start = (self.weights / scale).ravel()
        found = scipy.optimize.minimize(evaluate, start, jac=True, method="L-BFGS-B", options=settings)
        self.weights = found.x.reshape(self.shape) * scale
        return self.weights

    def loss(self, x: np.ndarray) -> float:
        """The validation loss at W*(x)."""
        logs = log_softmax(self.val @ self.solve(x), 1)
        return float(-(self.val_targets * logs).sum() / len(self.val))

    def hypergradient(self, x: np.ndarray, rtol: float = 1e-8) -> np.ndarray:
        """By scipy's CG on the Hessian at W*(x)."""
        each, penalty = self._scales(x)
        weights = self.solve(x)
        chances = softmax(self.features @ weights, 1)

        def product(flat: np.ndarray) -> np.ndarray:
            v = flat.reshape(self.shape)
            logits = self.features @ v
            pushed = chances * (logits - (chances * logits).sum(1, keepdims=True))
            return (self.features.T @ (each * pushed) + penalty * v).ravel()

        size = weights.size
        hessian = scipy.sparse.linalg.LinearOperator((size, size), matvec=product, dtype=np.float64)
        inverse = np.broadcast_to(1 / (penalty + 0.1), self.shape).ravel()
        jacobi = scipy.sparse.linalg.LinearOperator((size, size), matvec=lambda v: inverse * v, dtype=np.float64)
        errors = softmax(self.val @ weights, 1) - self.val_targets
        u, _ = scipy.sparse.linalg.cg(hessian, (self.val.T @ errors).ravel() / len(self.val), rtol=rtol, M=jacobi)
        u = u.reshape(self.shape)
        if self.task.kind == "penalties":
            return -np.exp(x) * (weights * u).sum(1)
        slopes = ((chances - self.targets) * (self.features @ u)).sum(1)
        chance = 1 / (1 + np.exp(-x))
        return -chance * (1 - chance) / len(x) * slopes


LARGEST_LOG_PENALTY = 80.0
"""Its exponential still fits float32, in which the contestants work."""


def adam(x: np.ndarray, lr: float) -> Callable[[np.ndarray], None]:
    """torch's Adam on an array, in place, for the reference and for libraries without torch."""
    shared = torch.from_numpy(x)
    optimizer = torch.optim.Adam([shared], lr=lr)

    def step(gradient: np.ndarray) -> None:
        shared.grad = torch.tensor(gradient, dtype=shared.dtype)
        optimizer.step()

    return step


@dataclass(frozen=True)
class Solutions(Workload):
    """Seconds until the validation loss has made ``part`` of the way that a long accurate run makes.

    Args:
        problem: ``"cleaning"``: digits of which half of the training labels are wrong, one weight for each training
            example. ``"penalties"``: 20 of 500 features tell the class, one penalty for each.
        root: folder of torchvision's MNIST, for cleaning; None: scikit-learn's digits.
        cache: folder that keeps the target, so that all processes run to the same one.
        limit: seconds for one run, without those of the measurements.
        small: a few seconds in all, for tests.
    """

    problem: Literal["cleaning", "penalties"] = "cleaning"
    root: str | None = None
    cache: str = "runs/benchmarks/cache"
    limit: float = 20.0
    part: float = 0.95
    small: bool = False
    seed: int = 0

    letter: ClassVar[str] = "D"
    warm_up: ClassVar[bool] = False
    repeats: ClassVar[bool] = False

    def title(self) -> str:
        task = self.task
        data = "features" if self.problem == "penalties" else "MNIST" if self.root else "digits"
        return (
            f"Time to a solution, {self.problem}: {task.size} hyperparameters, {task.start()[0].numel()} weights, "
            f"{len(task.train[0])} training and {len(task.val[0])} validation examples ({data})"
        )

    @cached_property
    def task(self) -> Task:
        if self.problem == "penalties":
            train, val = sparse_classes(*((200, 40, 5) if self.small else (2000, 500, 20)), seed=self.seed)
            return Task("penalties", train, val, 5, 0.0, outer_lr=1.0, sgd_lr=train[0].shape[1] / 25)
        sizes = (200, 200) if self.small else (2500, 2500) if self.root else (800, 800)
        train, val = noisy_digits(self.root, *sizes, seed=self.seed)
        return Task("cleaning", train, val, 10, 1e-2, outer_lr=1.0, sgd_lr=len(train[0]) / 2)

    def reference(self) -> None:
        """No gradient is compared; this computes and keeps the target."""
        self.target()

    def target(self) -> dict[str, float]:
        """``start``, ``best`` and ``target``: losses of 40 steps of Adam with exact hypergradients; kept in a file."""
        settings = {**asdict(self), "cache": None, "limit": None, "root": self.root is not None}
        key = hashlib.sha256(json.dumps([settings, REFERENCE_STEPS, self.title()]).encode()).hexdigest()[:12]
        path = Path(self.cache) / f"solutions-{self.problem}-{key}.json"
        if path.exists():
            found: dict[str, float] = json.loads(path.read_text())
            return found
        truth, x, losses = Truth(self.task), np.zeros(self.task.size), []
        step = adam(x, self.task.outer_lr)
        for _ in range(REFERENCE_STEPS):
            losses.append(truth.loss(x))
            step(truth.hypergradient(x, rtol=1e-6))
        start, best = losses[0], min(losses)
        found = {"start": start, "best": best, "target": start - self.part * (start - best)}
        path.parent.mkdir(parents=True, exist_ok=True)
        bl.files.write_atomically(path, lambda file: file.write(json.dumps(found).encode()))
        return found

    def contestants(self) -> dict[str, Callable[[], Contestant]]:
        from applications.measurements.benchmarks.peers_solutions import peers

        builders = {**ours(self.task), **peers(self.task)}
        return {name: partial(self._prepare, build) for name, build in builders.items()}

    def _prepare(self, build: Callable[[], Begin]) -> Contestant:
        begin, known = build(), self.target()
        begin()()  # compilation, and what libraries set up at their first step, is nobody's time to a solution
        return partial(race, Truth(self.task), known, self.limit, begin)


REFERENCE_STEPS = 40


def race(truth: Truth, known: dict[str, float], limit: float, begin: Begin) -> Round:
    """Run to the target or to the limit; the loss is that of the exact inner solution, found outside the clock.

    It is measured whenever the time has grown by half. Once the target is reached, bisection among the points kept
    since the last measurement (one for each percent of time) finds where.
    """
    truth.weights = np.zeros(truth.shape)
    curve = [[0.0, known["start"]]]
    kept: list[tuple[float, np.ndarray]] = []
    elapsed, steps, stopped, step = 0.0, 0, "", None
    while elapsed < limit and not stopped:
        clock = time.perf_counter()
        try:
            if step is None:
                step = begin()
            x = step()
        except (bl.SolveError, FloatingPointError, RuntimeError) as error:
            stopped = f"{type(error).__name__}: {error}"
        elapsed += time.perf_counter() - clock
        if stopped:
            break
        steps += 1
        if kept and elapsed < 1.01 * kept[-1][0]:
            continue
        kept.append((elapsed, np.asarray(x).astype(np.float64)))
        if not np.isfinite(kept[-1][1]).all():
            stopped = "diverged"
        elif elapsed > max(1.5 * curve[-1][0], limit / 100) or elapsed >= limit:
            curve.append([elapsed, truth.loss(kept[-1][1])])
            if not math.isfinite(curve[-1][1]):
                stopped = "diverged"
            if curve[-1][1] <= known["target"]:
                break
            kept = []
    if not curve[-1][1] <= known["target"]:  # nor is a NaN a solution
        return Round(
            math.inf, None, {"curve": curve, "steps": steps, **known, **({"stopped": stopped} if stopped else {})}
        )
    last = curve.pop()
    low, high = -1, len(kept) - 1
    while high - low > 1:
        middle = (low + high) // 2
        loss = truth.loss(kept[middle][1])
        low, high, last = (low, middle, [kept[middle][0], loss]) if loss <= known["target"] else (middle, high, last)
    # The last step may have begun just before the limit: what it reaches after it came too late.
    seconds = last[0] if last[0] <= limit else math.inf
    return Round(seconds, None, {"curve": [*curve, last], "steps": steps, **known})


def noisy_digits(root: str | None, train: int, val: int, seed: int) -> tuple[tuple[Tensor, Tensor], ...]:
    """MNIST or scikit-learn's digits, with a column of ones; half of the training labels become another class."""
    if root:
        from torchvision.datasets import MNIST

        data = MNIST(root, train=True)
        images, labels = data.data.flatten(1).float() / 255, data.targets
    else:
        from sklearn.datasets import load_digits

        images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
        images = images.float() / 16
    random = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(images), generator=random)[: train + val]
    features = torch.cat([images[chosen], torch.ones(len(chosen), 1)], 1)
    labels = labels[chosen].long()
    noisy = mislabel(labels[:train], 10, 0.5, random)
    return (features[:train], noisy), (features[train:], labels[train:])


def sparse_classes(samples: int, size: int, useful: int, seed: int) -> tuple[tuple[Tensor, Tensor], ...]:
    """Gaussian features of which the first ``useful`` ones tell which of five classes it is; two data sets."""
    random = torch.Generator().manual_seed(seed)
    truth = torch.zeros(size, 5)
    truth[:useful] = torch.randn(useful, 5, generator=random)
    sets = []
    for _ in range(2):
        features = torch.randn(samples, size, generator=random)
        sets.append((features, torch.multinomial((features @ truth).softmax(1), 1, generator=random)[:, 0]))
    return tuple(sets)


def ours(task: Task) -> dict[str, Callable[[], Begin]]:
    """What `advise` recommends, `Adaptive`, every method that suits, and the stochastic ones."""
    task = replace(task, multiply=bl.nn.matmul)
    problem = task.bilevel()
    builders: dict[str, Callable[[], Begin]] = {
        "bilevel: advised": lambda: partial(advised, task),
        "bilevel: adaptive": lambda: partial(adaptive, task),
    }
    for method in bl.diagnostics.all_methods(rtol=RTOL):
        if method.suits(problem) and fits(method, problem):
            builders[f"bilevel: {method.name}"] = partial(partial, two_loops, task, method)
    for name in STOCHASTIC:
        builders[f"bilevel: stochastic, {name}"] = partial(partial, stochastic, task, name)
    return builders


RTOL, GTOL = 1e-2, 1e-3
"""Of the linear and the inner solves of the two-loop methods, whose errors Adam's steps hide."""


def fits(method: bl.diagnostics.Method, problem: bl.diagnostics.BilevelProblem) -> bool:
    """Dense factors and forward mode are for small problems only."""
    if isinstance(method.hypergrad, bl.ForwardMode):
        return bool(problem.hparams.numel() <= method.hypergrad.max_hparams)
    dense = isinstance(method.hypergrad, bl.Implicit) and isinstance(
        method.hypergrad.linear_solver, bl.Cholesky | bl.LU
    )
    return not dense or problem.init.numel() <= 2500


def outer_loop(
    task: Task, settings: Callable[[Tensor], dict[str, Any]], seen: Callable[[Tensor], None] | None = None
) -> Step:
    """Adam on the hyperparameters; params and adjoint start from the last ones."""
    params, x = task.start()
    x.requires_grad_()
    outer, fit = torch.optim.Adam([x], lr=task.outer_lr), None

    def step() -> Tensor:
        nonlocal params, fit
        fit = bl.argmin(task.inner, params, x, **settings(x), throw="ignore", warm_start=fit)
        loss = task.outer(fit.value, x)
        outer.zero_grad()
        loss.backward()
        outer.step()
        params = fit.value.detach()
        if seen:
            seen(loss)
        return x.detach()

    return step


def two_loops(task: Task, method: bl.diagnostics.Method) -> Step:
    """L-BFGS, or as many steps of gradient descent as are unrolled; step sizes 1/L."""
    hypergrad, solver = method.hypergrad, bl.LBFGS(gtol=GTOL)

    def settings(x: Tensor) -> dict[str, Any]:
        lr = task.inner_lr(x)
        if isinstance(hypergrad, bl.OneStep):
            return {"solver": solver, "hypergrad": bl.OneStep(lr)}
        if isinstance(hypergrad, bl.FiniteDifference):
            return {"solver": solver, "hypergrad": bl.FiniteDifference(lr)}
        if isinstance(hypergrad, bl.SAMA):
            return {"solver": bl.Steps(bl.SGD(lr), max_steps=DESCENT_STEPS), "hypergrad": bl.SAMA()}
        if method.solver is None:
            return {"solver": solver, "hypergrad": hypergrad}
        short = bl.Truncated(DESCENT_STEPS // 2) if isinstance(hypergrad, bl.Truncated) else hypergrad
        return {"solver": bl.GradientDescent(lr, max_steps=DESCENT_STEPS), "hypergrad": short}

    return outer_loop(task, settings)


def advised(task: Task) -> Step:
    """What `advise` recommends at the start, to the accuracy of the others; its measurements are on the clock."""
    solver = bl.LBFGS(gtol=GTOL)
    advice = bl.diagnostics.advise(task.bilevel(), solver=solver, accuracy=RTOL)
    return outer_loop(task, lambda x: {"solver": solver, "hypergrad": advice.hypergrad})


def adaptive(task: Task) -> Step:
    tolerance = bl.Adaptive()

    def seen(loss: Tensor) -> None:
        nonlocal tolerance
        tolerance = tolerance.after(loss)

    return outer_loop(task, lambda x: tolerance.settings(), seen)


def stochastic(task: Task, name: str) -> Step:
    """Gradient steps on mini-batches, both levels side by side; BOME has one step size for the two."""
    kind, multiple, settings = STOCHASTIC[name]
    params, x = (tensor.requires_grad_() for tensor in task.start())
    lr = task.inner_lr(x)
    sizes = {"inner_lr": lr, "outer_lr": multiple * task.sgd_lr or lr}
    method = kind(params, x, task.inner, task.outer, **sizes, **settings)
    batches = Batches(len(task.train[0]), BATCHES)

    def step() -> Tensor:
        batches.step(method)
        return x.detach()

    return step
