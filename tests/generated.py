"""Generated problems whose hypergradient is known, and what became of them: right, flagged, or wrong without a word.

    python -m tests.generated 10000

runs as many examples and prints the figures that stand in ``docs/reliability.md``.
"""

from __future__ import annotations

import collections
import math
import random
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import bilevel as bl

D = torch.float64
PROMISED = {torch.float32: 1e-3, torch.float64: 1e-6}
NEAR = {torch.float32: 1e-3, torch.float64: 1e-7}
"""How near the params are, or it is told: what a hypergradient that amplifies their distance may lose."""
DEFAULT_RTOL = {torch.float32: 1e-5, torch.float64: 1e-10}
FEATURES, EXAMPLES = 6, 14

POINTWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "squares": lambda t, b: (t - b).square() / 2,
    "logistic": lambda t, b: F.softplus(-torch.sign(b) * t),
    "poisson": lambda t, b: t.exp() - b.abs().round() * t,
    "huber": lambda t, b: F.huber_loss(t, b.expand_as(t), reduction="none", delta=0.7),
    "pseudo-huber": lambda t, b: (1 + (t - b).square()).sqrt() - 1,
    "probit": lambda t, b: -torch.special.log_ndtr(torch.sign(b) * t),
}
KINDS = (*POINTWISE, "root", "fixed point", "lasso", "program")

MINIMISERS = (None, bl.LBFGS(), bl.NewtonCG(), bl.ScipyMinimize(), bl.ScipyMinimize("BFGS"), "gtol", "descent")
SYSTEM_SOLVERS = {
    "root": (None, bl.Newton(), bl.ScipyRoot()),
    "fixed point": (None, bl.Anderson(history=2), bl.Picard()),
    "lasso": ("accelerated", "plain"),
    "program": (None,),
}
SYMMETRIC = (
    bl.Implicit(),
    bl.Implicit(operator="func"),
    bl.Implicit(bl.CG()),
    bl.Implicit(bl.CG(rtol=1e-5)),
    bl.Implicit(bl.CG(preconditioner=bl.Jacobi())),
    bl.Implicit(bl.CG(max_steps=3)),
    bl.Implicit(bl.MINRES()),
    bl.Implicit(bl.Cholesky()),
    bl.Implicit(bl.LU(), operator="func"),
    bl.Implicit(bl.Nystrom(rank=FEATURES, damping=1e-12)),
    bl.Implicit(bl.Neumann()),
)
GENERAL = (
    bl.Implicit(),
    bl.Implicit(bl.GMRES()),
    bl.Implicit(bl.BiCGSTAB()),
    bl.Implicit(bl.LSMR()),
    bl.Implicit(bl.NormalCG()),
    bl.Implicit(bl.LU()),
)

CHOICES: dict[str, tuple[Any, ...]] = {
    "kind": KINDS,
    "dtype": (torch.float64, torch.float32),
    "seed": tuple(range(1000)),
    "tree": ("tensor", "dict", "nested"),
    "tasks": (None, None, 1, 3),
    "condition": (1.0, 10.0, 100.0, 1e4, 1e6, 1e8),
    "spread": (1.0, 1.0, 1.0, 10.0, 1e3),
    "loss": (1.0, 1.0, 1e-6, 1e-3, 1e3, 1e6),
    "params": (1.0, 1.0, 1e-6, 1e-3, 1e3, 1e6),
    "data": (1.0, 1.0, 1e-6, 1e-3, 1e3, 1e6),
    "start": (0.0, 0.0, "solution", 1e-6, 1.0, 100.0, 1e4),
    "outer": ("linear", "squares", "units"),
    "solver": tuple(range(len(MINIMISERS))),
    "method": tuple(range(len(SYMMETRIC))),
    "throw": ("warn", "warn", "raise", "fallback", "ignore"),
}


@dataclass(frozen=True)
class Case:
    """One example: numbers and names only, so that it can be pasted back.

    Attributes:
        condition: of the quadratic part in its own units. spread: between the units of the first and the last param.
        loss, params, data: units. start: its size in that of the solution.
        solver, method: numbers, of those that serve the kind.
    """

    kind: str = "squares"
    dtype: torch.dtype = D
    seed: int = 0
    tree: str = "tensor"
    tasks: int | None = None
    condition: float = 10.0
    spread: float = 1.0
    loss: float = 1.0
    params: float = 1.0
    data: float = 1.0
    start: float | str = 0.0
    outer: str = "squares"
    solver: int = 0
    method: int = 0
    throw: str = "warn"

    @classmethod
    def drawn(cls, source: random.Random) -> Case:
        return cls(**{name: source.choice(choices) for name, choices in CHOICES.items()})

    @property
    def solver_setting(self) -> Any:
        known = MINIMISERS if self.kind in POINTWISE else SYSTEM_SOLVERS[self.kind]
        return known[self.solver % len(known)]

    @property
    def hypergrad(self) -> bl.Hypergrad:
        if self.kind == "program":
            return bl.Implicit(bl.LeastNorm())
        if self.kind == "lasso":
            return SYMMETRIC[self.method % 7]
        known = SYMMETRIC if self.kind in POINTWISE else GENERAL
        return known[self.method % len(known)]

    @property
    def modest(self) -> bool:
        """Whether all sizes lie within 1e3 of each other, and every part of the solve is one of the defaults'."""
        sizes = (self.loss, self.params, self.data)
        near = self.start == "solution" or float(self.start) <= 100
        return all(1e-3 <= size <= 1e3 for size in sizes) and near and self.spread == 1


@dataclass
class Truth:
    """The problem of a case in float64, and its solution in units of its own, ``z = params / unit``."""

    case: Case
    z: Tensor
    unit: Tensor
    hparams: list[Tensor]
    residual: Callable[[Tensor, list[Tensor]], Tensor]
    value: Callable[[Tensor, list[Tensor]], Tensor] | None
    outer: Callable[[Tensor], Tensor]
    jacobian: Callable[[Tensor], Tensor]
    free: Tensor | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    condition: float = 1.0
    own_condition: float = 1.0
    amplification: float = 1.0
    hypergradient: list[Tensor] = field(default_factory=list)
    regular: bool = True

    def differentiate(self) -> Truth:
        """The implicit function theorem, in float64 and with dense matrices."""
        z = self.z.detach()
        matrix, u = self._adjoint(z)
        self.hypergradient = self._pull(z, u)
        self.own_condition = float(torch.linalg.cond(matrix).max())
        rows = {"root": torch.ones_like(self.unit), "fixed point": self.unit}.get(self.case.kind, 1 / self.unit)
        scaled = rows.unsqueeze(-1) * matrix / self.unit
        self.condition = float(torch.linalg.cond(scaled).max())
        self.amplification = self._amplified(z)
        return self

    def _pull(self, z: Tensor, u: Tensor) -> list[Tensor]:
        x = [h.detach().requires_grad_() for h in self.hparams]
        with torch.enable_grad():
            pulled = -(u * self.residual(z, x)).sum()
            return list(torch.autograd.grad(pulled, x, materialize_grads=True))

    def _adjoint(self, z: Tensor) -> tuple[Tensor, Tensor]:
        matrix, gradient = self.jacobian(z), torch.func.grad(lambda z: self.outer(z).sum())(z)
        if self.free is not None:  # params that a constraint holds
            keep = self.free.unsqueeze(-1) & self.free.unsqueeze(-2)
            matrix = torch.where(keep, matrix, matrix.diagonal(dim1=-2, dim2=-1).amax() * torch.eye(FEATURES, dtype=D))
            gradient = gradient * self.free
        return matrix, torch.linalg.solve(matrix.mT, gradient.unsqueeze(-1)).squeeze(-1)

    def _amplified(self, z: Tensor) -> float:
        """By how much a relative error of the params shows in the hypergradient, at worst; by differences."""
        size = (z * self.unit).norm(dim=-1, keepdim=True)
        changes = []
        for e in torch.eye(FEATURES, dtype=D):
            there = z + 1e-6 * e * size / self.unit * (1 if self.free is None else self.free)
            changes.append(relative_error(self._pull(there, self._adjoint(there)[1]), self.hypergradient))
        return 1e6 * math.hypot(*changes)


def relative_error(found: Sequence[Tensor], true: list[Tensor]) -> float:
    """The error of the worst hyperparameter; NaN where one is NaN."""
    errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, true, strict=True) if b.norm() > 0]
    return math.nan if any(map(math.isnan, errors)) else max(errors, default=0.0)


def times(matrix: Tensor, z: Tensor) -> Tensor:
    return (matrix.to(z) @ z.unsqueeze(-1)).squeeze(-1)


def newton(
    residual: Callable[[Tensor], Tensor], jacobian: Callable[[Tensor], Tensor], z: Tensor
) -> tuple[Tensor, bool]:
    """A root to machine precision, by damped Newton, each problem with its own step; and whether it was found."""
    r = residual(z)
    for _ in range(100):
        step = torch.linalg.solve(jacobian(z), r.unsqueeze(-1)).squeeze(-1)
        if bool((step.norm(dim=-1) <= 1e-12 * z.norm(dim=-1)).all()):
            return z - step, True
        length = torch.ones(z.shape[:-1], dtype=D)
        for _ in range(30):
            trial = z - length.unsqueeze(-1) * step
            new = residual(trial)
            worse = ~(new.norm(dim=-1) < r.norm(dim=-1))
            if not bool(worse.any()):
                break
            length = torch.where(worse, length / 2, length)
        if bool(worse.all()):
            break
        z, r = torch.where(worse.unsqueeze(-1), z, trial), torch.where(worse.unsqueeze(-1), r, new)
    return z, bool((step.norm(dim=-1) <= 1e-9 * z.norm(dim=-1)).all())


def truth_of(case: Case) -> Truth:
    """The numbers of a case, rounded to its dtype first, and what is true of them."""
    generator = torch.Generator().manual_seed(case.seed)
    batch = () if case.tasks is None else (case.tasks,)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*batch, *shape, generator=generator, dtype=D)

    def rounded(tensor: Tensor) -> Tensor:
        return tensor.to(case.dtype).double()

    n, m = FEATURES, EXAMPLES
    spectrum = torch.logspace(0, -math.log10(case.condition), n, dtype=D)
    spread = 1.0 if case.kind == "lasso" else case.spread
    unit = rounded(case.params * torch.logspace(0, math.log10(spread), n, dtype=D))
    weights, goal = draw(n), draw(n)
    units = torch.ones(n, dtype=D) if case.outer != "units" else unit / unit.max()

    def outer(z: Tensor) -> Tensor:
        z = z * units
        return (weights * z).sum(-1) if case.outer == "linear" else (z - goal * units).square().sum(-1) / 2

    if case.kind == "root":
        q, _ = torch.linalg.qr(draw(n, n))
        skew = draw(n, n)
        a = rounded((q * spectrum.unsqueeze(-2)) @ q.mT + (skew - skew.mT) * 0.3 * spectrum.min())
        x = [rounded(draw(n)), torch.tensor(0.5, dtype=D)]

        def residual(z: Tensor, x: list[Tensor]) -> Tensor:
            return times(a, z) + x[1] * z.tanh() - x[0]

        def jacobian(z: Tensor) -> Tensor:
            return a + torch.diag_embed(x[1] * (1 - z.tanh() ** 2))

        z, found = newton(lambda z: residual(z, x), jacobian, torch.zeros(*batch, n, dtype=D))
        return Truth(case, z, unit, x, residual, None, outer, jacobian, regular=found).differentiate()
    if case.kind == "fixed point":
        contraction = 1 - 1 / min(max(case.condition, 2.0), 1e2 if case.dtype is torch.float32 else 1e4)
        w = rounded(contraction * torch.linalg.qr(draw(n, n))[0])
        x = [rounded(draw(n)), torch.tensor(0.5, dtype=D)]

        def residual(z: Tensor, x: list[Tensor]) -> Tensor:
            return z - times(w, z).tanh() - x[1] * x[0]

        def jacobian(z: Tensor) -> Tensor:
            return torch.eye(n, dtype=D) - (1 - times(w, z).tanh() ** 2).unsqueeze(-1) * w

        z, found = newton(lambda z: residual(z, x), jacobian, torch.zeros(*batch, n, dtype=D))
        return Truth(case, z, unit, x, residual, None, outer, jacobian, regular=found).differentiate()

    left, _ = torch.linalg.qr(draw(m, n))
    right, _ = torch.linalg.qr(draw(n, n))
    features = m**0.5 * (left * spectrum.sqrt().unsqueeze(-2)) @ right.mT
    if case.kind in ("lasso", "program"):
        a = rounded(features.mT @ features / m)
        sign = torch.sign(draw(n))
        free = torch.arange(n) % 2 == case.seed % 2
        slack = 0.5 + torch.rand(*batch, n, generator=generator, dtype=D) / 3
        magnitude = 0.5 + torch.rand(*batch, n, generator=generator, dtype=D)
        if case.kind == "lasso":
            log_strength = rounded(torch.tensor(-1.0, dtype=D))
            z = torch.where(free, sign * magnitude, torch.zeros_like(sign))
            subgradient = torch.where(free, sign, (slack - 0.2) * sign)
            c = rounded(times(a, z) + log_strength.exp() * subgradient)

            def residual(z: Tensor, x: list[Tensor]) -> Tensor:
                return times(a, z) - x[0] + x[1].exp() * sign.to(z)

            x = [c, log_strength]
        else:  # z <= h
            h = rounded(draw(n))
            z = torch.where(free, h - magnitude, h)
            c = rounded(times(a, z) + torch.where(free, torch.zeros_like(h), slack))

            def residual(z: Tensor, x: list[Tensor]) -> Tensor:
                return times(a, z) - x[0]

            x = [c]
        # The rounding of the data moves the free ones.
        keep = free.unsqueeze(-1) & free.unsqueeze(-2)
        system = torch.where(keep, a, torch.eye(n, dtype=D))
        r = residual(z, x) * free
        z = z - torch.linalg.solve(system, r.unsqueeze(-1)).squeeze(-1)
        extra = {"matrix": a} | ({"bound": h} if case.kind == "program" else {})
        inside = z * sign if case.kind == "lasso" else h - z
        strict = bool((inside[..., free] > 0.1).all())
        truth = Truth(case, z, unit, x, residual, None, outer, lambda z: a, free.expand_as(z), extra, regular=strict)
        return truth.differentiate()

    pointwise = POINTWISE[case.kind]
    a = rounded(features * case.data)
    b = rounded(draw(m) * (case.data if case.kind == "squares" else 1) + (1 if case.kind == "poisson" else 0))
    ridge = rounded(torch.log(torch.full((n,), case.data**2 * spectrum.min().item(), dtype=D)))
    x = [ridge, rounded(0.1 * torch.randn(m, generator=generator, dtype=D))]

    def value(z: Tensor, x: list[Tensor]) -> Tensor:
        t = times(a, z)
        fit = (x[1].exp() * pointwise(t, b.to(z))).mean(-1)
        return fit + (x[0].exp() * z.square()).sum(-1) / 2

    def residual(z: Tensor, x: list[Tensor]) -> Tensor:
        return torch.func.grad(lambda z: value(z, x).sum())(z)

    def jacobian(z: Tensor) -> Tensor:
        t = times(a, z).requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad((x[1].exp() * pointwise(t, b)).sum() / m, t, create_graph=True)
            (curvature,) = torch.autograd.grad(slope.sum(), t)
        return (a.mT * curvature.unsqueeze(-2)) @ a + torch.diag(x[0].exp())

    z, found = newton(lambda z: residual(z, x), jacobian, torch.zeros(*batch, n, dtype=D))
    return Truth(case, z, unit, x, residual, value, outer, jacobian, regular=found).differentiate()


def as_tree(flat: Tensor, kind: str) -> Any:
    """``[*batch, 6]`` as a tree."""
    if kind == "tensor":
        return flat
    if kind == "dict":
        return {"weight": flat[..., :4].unflatten(-1, (2, 2)), "bias": flat[..., 4:]}
    return {"layers": [{"w": flat[..., 0:1], "b": flat[..., 1:4]}, (flat[..., 4:].unsqueeze(-1),)]}


def as_flat(tree: Any, batch_dims: int) -> Tensor:
    return torch.cat([leaf.flatten(batch_dims) for leaf in bl.tree.leaves(tree)], -1)


def solve(truth: Truth, x: list[Tensor]) -> tuple[bl.Solution, Tensor]:
    """As a user would: the solution, and the outer loss."""
    case = truth.case
    batch_dims = 0 if case.tasks is None else 1
    unit = truth.unit.to(case.dtype)
    if case.start == "solution":
        start = truth.z
    else:
        direction = torch.randn(truth.z.shape, generator=torch.Generator().manual_seed(case.seed), dtype=D)
        start = float(case.start) * direction * truth.z.norm(dim=-1, keepdim=True) / FEATURES**0.5
    init = as_tree((start * truth.unit).to(case.dtype), case.tree)
    how = {"hypergrad": case.hypergrad, "throw": case.throw}
    solver = case.solver_setting

    def inner(tree: Any) -> Tensor:
        return case.loss * truth.value(as_flat(tree, batch_dims) / unit, x)

    def residual(tree: Any) -> Any:
        return as_tree(case.loss * truth.residual(as_flat(tree, batch_dims) / unit, x), case.tree)

    def step(tree: Any) -> Any:
        z = as_flat(tree, batch_dims) / unit
        return as_tree((z - truth.residual(z, x)) * unit, case.tree)

    def smooth(tree: Any) -> Tensor:
        z = as_flat(tree, batch_dims) / unit
        quadratic = (z * times(truth.extra["matrix"], z)).sum(-1) / 2
        return case.loss * (quadratic - (x[0] * z).sum(-1))

    if case.kind == "program":
        scales = truth.unit.to(case.dtype)
        q = case.loss * truth.extra["matrix"].to(case.dtype) / scales.unsqueeze(-1) / scales
        c = -case.loss * x[0] / scales
        bound = truth.extra["bound"].to(case.dtype) * scales
        fit = bl.quadratic_program(q, c, G=torch.eye(FEATURES, dtype=case.dtype), h=bound, **how)
        return fit, truth.outer(fit.value.primal / unit).sum()
    if case.kind == "root":
        fit = bl.root(residual, init, solver=solver or bl.Newton(), **how)
    elif case.kind == "fixed point":
        fit = bl.fixed_point(step, init, solver=solver or bl.Anderson(), **how)
    elif case.kind == "lasso":
        penalty = bl.prox.L1(case.loss * x[1].exp() / unit[0])
        fit = bl.argmin(smooth, init, solver=bl.ProximalGradient(penalty, accelerated=solver != "plain"), **how)
    else:
        fit = bl.argmin(inner, init, solver=minimiser(truth), **how)
    return fit, truth.outer(as_flat(fit.value, batch_dims) / unit).sum()


def minimiser(truth: Truth) -> Any:
    setting = truth.case.solver_setting
    if setting == "gtol":
        return bl.LBFGS(gtol=natural_gtol(truth))
    if setting == "descent":
        return bl.GradientDescent(line_search=True, max_steps=300, gtol=natural_gtol(truth))
    return setting


TAU = {torch.float64: 1e-8, torch.float32: 1e-5}


def natural_gtol(truth: Truth) -> float:
    """A gradient norm that is small against the terms that cancel at the solution, in the units of the case."""
    scaled = truth.case.loss * truth.jacobian(truth.z) / truth.unit.unsqueeze(-1) / truth.unit.unsqueeze(-2)
    sizes = torch.linalg.matrix_norm(scaled, 2) * (truth.z * truth.unit).norm(dim=-1)
    return TAU[truth.case.dtype] * float(sizes.min())


@dataclass(frozen=True)
class Verdict:
    """What became of a case.

    Attributes:
        error: relative, of the worst hyperparameter. allowed: what it may be. flag: what was said, or None.
        benign: whether a flag would be a false alarm. strict: whether the error is within the bare promise.
    """

    error: float
    allowed: float
    flag: str | None
    benign: bool
    strict: bool

    @property
    def wrong(self) -> bool:
        """Wrong, and nobody said so."""
        return self.flag is None and not self.error <= self.allowed

    @property
    def false_alarm(self) -> bool:
        return self.benign and self.flag is not None


def allowed_error(truth: Truth, fit: bl.Solution) -> float:
    """What a case promises: that of default solves, or the tolerances and residuals that it tells, by the condition."""
    case, promise = truth.case, PROMISED[truth.case.dtype]
    assert isinstance(case.hypergrad, bl.Implicit)
    linear = case.hypergrad.linear_solver
    stated = getattr(linear, "rtol", None) or 0.0
    if fit.adjoint is not None and fit.adjoint.result is bl.Result.STEPS_DONE:
        stated = float(fit.adjoint.stats["relative_residual"].max())
    near = truth.condition * TAU[case.dtype] if case.solver_setting in ("gtol", "descent") else NEAR[case.dtype]
    return max(promise, truth.amplification * near) + truth.condition * (10 * stated or DEFAULT_RTOL[case.dtype])


def judge(case: Case) -> Verdict | None:
    """Run a case; None where there is no truth to hold it against."""
    truth = truth_of(case)
    if case.kind == "probit" and case.start not in ("solution", 0.0, 1e-6):
        return None  # the second derivative of log_ndtr is wrong in PyTorch below -1e6
    finite = all(bool(torch.isfinite(g).all()) for g in truth.hypergradient)
    if not truth.regular or not finite or truth.own_condition > 1e11:
        return None
    x = [h.to(case.dtype).requires_grad_() for h in truth.hparams]
    error, allowed, flag = float("nan"), 0.0, None
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            fit, loss = solve(truth, x)
            grads = torch.autograd.grad(loss, x, materialize_grads=True)
        except (bl.SolveError, ValueError, bl.ObjectiveChangedError) as caught:
            flag = f"{type(caught).__name__}: {caught}"
        else:
            told = [str(w.message) for w in seen if issubclass(w.category, bl.SolveWarning)]
            adjoint, allowed = fit.adjoint, allowed_error(truth, fit)
            if told:
                flag = told[0]
            elif case.throw == "ignore" and not fit.result.ok:
                flag = f"result {fit.result}"
            elif case.throw == "ignore" and adjoint is not None and not adjoint.result.ok:
                flag = f"adjoint {adjoint.result}"
            error = relative_error(grads, truth.hypergradient)
            if flag is None and case.throw == "ignore" and error != error:
                flag = "NaN"
    plain = "Neumann" not in repr(case.hypergrad) and case.solver_setting not in ("descent", "plain")
    plain = plain and not ("NormalCG" in repr(case.hypergrad) and truth.condition > 10)  # squares the condition
    plain = plain and not isinstance(case.solver_setting, bl.Picard | bl.ScipyMinimize | bl.ScipyRoot)
    far = case.start != "solution" and float(case.start) > 1
    benign = case.modest and not (far and case.kind == "poisson") and truth.condition <= 100 and plain
    return Verdict(error, allowed, flag, benign, error <= PROMISED[case.dtype])


def main(count: int, seed: int = 0) -> None:
    torch.set_num_threads(1)
    source, began = random.Random(seed), time.time()
    tally: dict[Any, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for _ in range(count):
        case = Case.drawn(source)
        verdict = judge(case)
        if verdict is None:
            tally["skipped"][case.kind] += 1
            continue
        what = "wrong" if verdict.wrong else "flagged" if verdict.flag else "right" if verdict.strict else "amplified"
        tally[case.kind][what] += 1
        tally[str(case.dtype)][what] += 1
        if verdict.benign:
            tally["benign"][what] += 1
        if verdict.wrong or verdict.false_alarm:
            name = "WRONG" if verdict.wrong else "FALSE ALARM"
            print(
                f"{name}: {verdict.error:.2g}, allowed {verdict.allowed:.2g}: {case}  {verdict.flag or ''}", flush=True
            )
    for name, counts in tally.items():
        print(name, dict(counts))
    print(f"{time.time() - began:.0f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]), *map(int, sys.argv[2:]))
