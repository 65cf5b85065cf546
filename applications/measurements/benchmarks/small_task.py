"""The problems of workload E: their losses, which read the same in PyTorch, JAX and NumPy, and their derivatives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from scipy.special import expit

HIDDEN, INPUTS = 8, 4
NUM_BATCH = 64
WANTED = 1e-12
"""The gradient norm of the reference, relative to that at the start."""

Array = np.ndarray


class Functions(NamedTuple):
    """Where the libraries have different names."""

    exp: Callable[[Any], Any]
    tanh: Callable[[Any], Any]
    softplus: Callable[[Any], Any]


@dataclass(frozen=True)
class Small:
    """``min_x outer(w*(x))`` with ``w*(x) = argmin inner(w, x)``; ``x`` are logarithms of L2 penalties.

    Attributes:
        model: of ``"ridge"``, ``"logistic"``, ``"network"``.
        train, val: features ``[*batch, examples, features]`` and targets ``[*batch, examples]``.
        start: params to start from, ``[*batch, n]``. x: ``[*batch, 1]``, or one for each of the params.
    """

    model: str
    train: tuple[Any, Any]
    val: tuple[Any, Any]
    start: Any
    x: Any

    def converted(self, make: Callable[[Array], Any]) -> Small:
        """The same with the arrays of another library."""
        train, val = (tuple(make(part) for part in data) for data in (self.train, self.val))
        return replace(self, train=train, val=val, start=make(self.start), x=make(self.x))

    def inner(self, w: Any, x: Any, f: Functions) -> Any:
        """Losses of the batch shape."""
        return self._fit(w, self.train, f) + (f.exp(x) * w**2).sum(-1) / 2

    def outer(self, w: Any, f: Functions) -> Any:
        """The mean validation loss over the batch, a scalar."""
        return self._fit(w, self.val, f).mean()

    def _fit(self, w: Any, data: tuple[Any, Any], f: Functions) -> Any:
        features, targets = data
        if self.model == "network":
            first, bias, second, last = _layers(w)
            z = f.tanh(features @ first.T + bias) @ second + last
        else:
            z = (features @ w[..., None])[..., 0]
        return (f.softplus(z) - targets * z if self.model == "logistic" else (z - targets) ** 2 / 2).mean(-1)

    def gradient(self, w: Array, x: Array) -> Array:
        """``d inner / dw`` by its formula, in NumPy."""
        return self._fit_gradient(w, self.train) + np.exp(x) * w

    def outer_gradient(self, w: Array) -> Array:
        """``d outer / dw``."""
        return self._fit_gradient(w, self.val) / (w.shape[0] if w.ndim == 2 else 1)

    def _fit_gradient(self, w: Array, data: tuple[Any, Any]) -> Array:
        features, targets = data
        if self.model == "network":
            first, bias, second, last = _layers(w)
            hidden = np.tanh(features @ first.T + bias)
            error = (hidden @ second + last - targets) / len(targets)
            back = error[:, None] * second * (1 - hidden**2)
            return np.concatenate([(back.T @ features).ravel(), back.sum(0), hidden.T @ error, [error.sum()]])
        z = (features @ w[..., None])[..., 0]
        slopes = (expit(z) if self.model == "logistic" else z) - targets
        return (slopes[..., None, :] @ features)[..., 0, :] / targets.shape[-1]

    def product(self, w: Array, x: Array, v: Array) -> Array:
        """The Hessian of ``inner`` by w, times ``v``."""
        features, targets = self.train
        if self.model == "network":
            return self._network_product(w, v) + np.exp(x) * v
        moved = (features @ v[..., None])[..., 0]
        if self.model == "logistic":
            p = expit((features @ w[..., None])[..., 0])
            moved = moved * p * (1 - p)
        return (moved[..., None, :] @ features)[..., 0, :] / targets.shape[-1] + np.exp(x) * v

    def _network_product(self, w: Array, v: Array) -> Array:
        """Pearlmutter's R operator."""
        features, targets = self.train
        (first, bias, second, last), (first_v, bias_v, second_v, last_v) = _layers(w), _layers(v)
        hidden = np.tanh(features @ first.T + bias)
        slope = 1 - hidden**2
        hidden_v = slope * (features @ first_v.T + bias_v)
        error = (hidden @ second + last - targets) / len(targets)
        error_v = (hidden_v @ second + hidden @ second_v + last_v) / len(targets)
        back_v = (error_v[:, None] * second + error[:, None] * second_v) * slope
        back_v -= error[:, None] * second * 2 * hidden * hidden_v
        second_row = hidden.T @ error_v + hidden_v.T @ error
        return np.concatenate([(back_v.T @ features).ravel(), back_v.sum(0), second_row, [error_v.sum()]])

    def pull(self, w: Array, x: Array, u: Array) -> Array:
        """``-(d_x r)^T u`` with ``r`` the gradient: the hypergradient, where ``H u`` is the outer gradient."""
        pulled = -np.exp(x) * w * u
        return pulled if x.shape == w.shape else pulled.sum(-1, keepdims=True)

    def hypergradient(self) -> Array:
        """By Newton's method with dense Hessians, to rounding."""
        w = self.minimum(self.x)
        u = np.linalg.solve(self.hessian(w, self.x), self.outer_gradient(w)[..., None])[..., 0]
        return self.pull(w, self.x, u).ravel()

    def hessian(self, w: Array, x: Array) -> Array:
        columns = [self.product(w, x, np.broadcast_to(e, w.shape)) for e in np.eye(w.shape[-1])]
        return np.stack(columns, -1)

    def minimum(self, x: Array) -> Array:
        """Newton steps from the start; of the network from a solution by L-BFGS near it."""
        w = self.start
        if self.model == "network":
            from scipy.optimize import minimize

            w = minimize(lambda w: float(self.inner(w, x, NUMPY)), w, jac=lambda w: self.gradient(w, x), tol=1e-8).x
        size = np.linalg.norm(self.gradient(self.start, x))
        for _ in range(50):
            slope = self.gradient(w, x)
            if np.linalg.norm(slope) <= WANTED * size:
                return w
            w = w - np.linalg.solve(self.hessian(w, x), slope[..., None])[..., 0]
        raise RuntimeError("The reference did not converge.")


NUMPY = Functions(np.exp, np.tanh, lambda z: np.logaddexp(0, z))


def _layers(w: Any) -> tuple[Any, Any, Any, Any]:
    """Both layers of the 4-8-1 network, from its 49 params."""
    first, rest = w[: HIDDEN * INPUTS].reshape(HIDDEN, INPUTS), w[HIDDEN * INPUTS :]
    return first, rest[:HIDDEN], rest[HIDDEN : 2 * HIDDEN], rest[2 * HIDDEN]


def small(name: str, seed: int = 0) -> Small:
    """The problem of one name of `NAMES`."""
    random = np.random.default_rng(seed)
    model, batch, size, examples = NAMES[name]
    inputs = INPUTS if model == "network" else size
    truth = random.standard_normal((*batch, inputs))

    def data() -> tuple[Array, Array]:
        features = random.standard_normal((*batch, examples, inputs))
        scores = (features @ truth[..., None])[..., 0]
        noisy = scores + 0.5 * random.standard_normal(scores.shape)
        if model == "network":
            return features, np.sin(scores)
        return features, (noisy > 0).astype(float) if model == "logistic" else noisy

    train, val = data(), data()
    if model != "network":
        x = np.full((*batch, size if model == "logistic" else 1), -3.0)
        return Small(model, train, val, np.zeros((*batch, size)), x)
    drawn = Small(model, train, val, 0.5 * random.standard_normal(size), np.full(1, -4.0))
    # Where the last outer step left it: a network has many minima, and all contestants shall go to the same one.
    return replace(drawn, start=drawn.minimum(drawn.x + 0.1))


NAMES: dict[str, tuple[str, tuple[int, ...], int, int]] = {
    "ridge-9": ("ridge", (), 9, 50),
    "ridge-100": ("ridge", (), 100, 300),
    "logistic-30": ("logistic", (), 30, 200),
    "network": ("network", (), HIDDEN * (INPUTS + 2) + 1, 40),
    "batch": ("ridge", (NUM_BATCH,), 9, 50),
}
"""Model, batch shape, unknowns of one problem, examples."""
