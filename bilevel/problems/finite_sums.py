"""Finite-sum bilevel problems whose solution is known: quadratics in closed form, penalised logistic regression."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..argmin import argmin
from ..checks import check_fields
from ..inner.lbfgs import LBFGS


@dataclass(frozen=True)
class Quadratics:
    """Both losses are means of rank-one quadratics, as in the `simulated` data of benchmark_bilevel.

        g_i(y, x) = (a_i.y)^2/2 + (b_i.x)^2/2 + (p_i.x)(q_i.y) + c_i.y + d_i.x

    and f_j alike with numbers of its own. The Hessians of the means have eigenvalues exactly in
    [1/condition, 1]; the coupling's singular values go up to ``coupling``, so that y* moves with x.
    A batch is a tensor of sample indices, or None for all.
    """

    size: int = 100
    outer_size: int = 100
    num_samples: int = 256
    condition: float = 10.0
    coupling: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        largest = max(self.size, self.outer_size)
        if min(self.size, self.outer_size) < 1 or self.num_samples < largest:
            raise ValueError(
                f"size is {self.size}, outer_size {self.outer_size} and num_samples {self.num_samples}: sizes are at "
                f"least 1, and at least as many samples as the larger of them ({largest}) are needed."
            )
        if not self.condition >= 1:
            raise ValueError(f"condition is {self.condition}: it is at least 1.")

    @cached_property
    def _data(self) -> dict[str, dict[str, Tensor]]:
        random = torch.Generator().manual_seed(self.seed)
        return {level: self._draw(random, coupling) for level, coupling in (("g", self.coupling), ("f", 0.02))}

    def _draw(self, random: torch.Generator, coupling: float) -> dict[str, Tensor]:
        n, m, samples = self.size, self.outer_size, self.num_samples

        def gauss(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random, dtype=torch.float64, device="cpu")

        def basis(rows: int, columns: int) -> Tensor:
            basis: Tensor = torch.linalg.qr(gauss(rows, columns))[0]
            return basis

        def spread(dimension: int) -> Tensor:
            return torch.logspace(-np.log10(self.condition), 0, dimension, dtype=torch.float64, device="cpu").sqrt()

        rank = min(n, m)
        left = basis(samples, rank)
        values = coupling * torch.logspace(-1, 0, rank, dtype=torch.float64, device="cpu")
        return {
            "a": samples**0.5 * basis(samples, n) * spread(n) @ basis(n, n).mT,
            "b": samples**0.5 * basis(samples, m) * spread(m) @ basis(m, m).mT,
            "p": samples**0.5 * left * values @ basis(m, rank).mT,
            "q": samples**0.5 * left @ basis(n, rank).mT,
            "c": gauss(samples, n) + gauss(1, n),
            "d": gauss(samples, m) + gauss(1, m),
        }

    def inner_loss(self, y: Tensor, x: Tensor, batch: Tensor | None = None) -> Tensor:
        return _quadratic(self._data["g"], y, x, batch)

    def outer_loss(self, y: Tensor, x: Tensor, batch: Tensor | None = None) -> Tensor:
        return _quadratic(self._data["f"], y, x, batch)

    def start(self) -> tuple[Tensor, Tensor]:
        """Zeros, ready for a method: inner and outer."""
        zeros = (torch.zeros(size, dtype=torch.float64, device="cpu") for size in (self.size, self.outer_size))
        y, x = (vector.requires_grad_() for vector in zeros)
        return y, x

    def dense(self, level: str) -> dict[str, Tensor]:
        """The mean loss of ``level`` "g" or "f" as y.A y/2 + x.B x/2 + x.C y + c.y + d.x."""
        data, samples = self._data[level], self.num_samples
        return {
            "A": data["a"].mT @ data["a"] / samples,
            "B": data["b"].mT @ data["b"] / samples,
            "C": data["p"].mT @ data["q"] / samples,
            "c": data["c"].mean(0),
            "d": data["d"].mean(0),
        }

    def inner_solution(self, x: Tensor) -> Tensor:
        g = self.dense("g")
        y: Tensor = torch.linalg.solve(g["A"], -(g["C"].mT @ x + g["c"]))
        return y

    def value(self, x: Tensor) -> Tensor:
        """f(y*(x), x)."""
        x = x.detach()
        return self.outer_loss(self.inner_solution(x), x)

    @cached_property
    def solution(self) -> Tensor:
        """The minimiser of `value`: with y*(x) = S x + s, f(S x + s, x) is a quadratic in x."""
        g, f = self.dense("g"), self.dense("f")
        slope = torch.linalg.solve(g["A"], -g["C"].mT)
        shift = torch.linalg.solve(g["A"], -g["c"])
        hessian = slope.mT @ f["A"] @ slope + f["B"] + f["C"] @ slope + slope.mT @ f["C"].mT
        linear = slope.mT @ (f["A"] @ shift + f["c"]) + f["C"] @ shift + f["d"]
        y: Tensor = torch.linalg.solve(hessian, -linear)
        return y

    def suboptimality(self, x: Tensor) -> float:
        """The outer gap as a part of the gap at the start."""
        best, start = self.value(self.solution), self.value(torch.zeros_like(self.solution))
        return float((self.value(x) - best) / (start - best))


def _quadratic(data: dict[str, Tensor], y: Tensor, x: Tensor, batch: Tensor | None) -> Tensor:
    part = data if batch is None else {name: rows[batch] for name, rows in data.items()}
    squares = ((part["a"] @ y).square() + (part["b"] @ x).square()) / 2 + (part["p"] @ x) * (part["q"] @ y)
    return (squares + part["c"] @ y + part["d"] @ x).mean()


@dataclass(frozen=True)
class Logistic:
    """Logistic regression with one penalty for each feature, learned on validation data.

        g(y, x) = mean log(1 + exp(-t a.y)) + sum_k exp(x_k) y_k^2 / 2,    f = the same mean on validation data
                                                                               + outer_penalty |x|^2 / 2

    A tenth of the features carry the signal. The small outer penalty makes the solution unique: without it the
    penalty of a useless feature runs away.
    """

    size: int = 20
    num_samples: int = 256
    outer_penalty: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.size < 1 or self.num_samples < 1:
            raise ValueError(f"size is {self.size} and num_samples {self.num_samples}: at least one of each is needed.")
        if not self.outer_penalty > 0:
            raise ValueError(f"outer_penalty is {self.outer_penalty}: it must be positive.")

    @property
    def outer_size(self) -> int:
        return self.size

    @cached_property
    def _data(self) -> dict[str, tuple[Tensor, Tensor]]:
        random = torch.Generator().manual_seed(self.seed)
        truth = torch.zeros(self.size, dtype=torch.float64, device="cpu")
        truth[: max(2, self.size // 10)] = 2.0
        found = {}
        for level in ("g", "f"):
            features = torch.randn(self.num_samples, self.size, generator=random, dtype=torch.float64, device="cpu")
            chance = torch.sigmoid(features @ truth)
            labels = 2.0 * torch.bernoulli(chance, generator=random) - 1
            found[level] = (features, labels)
        return found

    def _fit(self, level: str, y: Tensor, batch: Tensor | None) -> Tensor:
        features, labels = self._data[level]
        if batch is not None:
            features, labels = features[batch], labels[batch]
        return softplus(-labels * (features @ y)).mean()

    def inner_loss(self, y: Tensor, x: Tensor, batch: Tensor | None = None) -> Tensor:
        return self._fit("g", y, batch) + (x.exp() * y.square()).sum() / 2

    def outer_loss(self, y: Tensor, x: Tensor, batch: Tensor | None = None) -> Tensor:
        return self._fit("f", y, batch) + self.outer_penalty / 2 * x.square().sum()

    def start(self) -> tuple[Tensor, Tensor]:
        """Penalties of exp(-2), weights of zero: inner and outer."""
        y = torch.zeros(self.size, dtype=torch.float64, requires_grad=True, device="cpu")
        return y, torch.full((self.size,), -2.0, dtype=torch.float64, requires_grad=True, device="cpu")

    def inner_solution(self, x: Tensor) -> Tensor:
        y, _ = self.start()
        found: Tensor = argmin(self.inner_loss, y, x, solver=LBFGS(gtol=1e-9)).value
        return found

    def value(self, x: Tensor) -> Tensor:
        """f(y*(x), x), with a graph where x requires grad."""
        return self.outer_loss(self.inner_solution(x), x)

    @cached_property
    def solution(self) -> Tensor:
        """By implicit differentiation of exact inner solutions, and L-BFGS on the outer problem."""

        def evaluate(point: np.ndarray) -> tuple[float, np.ndarray]:
            x = torch.from_numpy(point.copy()).requires_grad_()
            value = self.value(x)
            (gradient,) = torch.autograd.grad(value, x)
            return float(value.detach()), gradient.numpy()

        start = self.start()[1].detach().numpy()
        import scipy.optimize

        best = scipy.optimize.minimize(
            evaluate, start, jac=True, method="L-BFGS-B", options={"gtol": 1e-8, "ftol": 0.0, "maxiter": 500}
        )
        return torch.from_numpy(best.x)

    @cached_property
    def _gap(self) -> tuple[float, float]:
        best = float(self.value(self.solution).detach())
        return best, float(self.value(self.start()[1].detach()).detach()) - best

    def suboptimality(self, x: Tensor) -> float:
        """The outer gap as a part of the gap at the start."""
        best, whole = self._gap
        return (float(self.value(x.detach()).detach()) - best) / whole
