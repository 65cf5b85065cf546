"""Run by a Python that has JAXopt and optimistix, and need not have PyTorch: ``peers.py PROBLEMS.npz FOUND.npz``."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

jax.config.update("jax_enable_x64", True)


def problem(kind, data):
    """``(residual(y, x), outer(y, x))`` of a kind; the same in `problems` for PyTorch."""
    A, b, C, d = (jnp.asarray(data[name]) for name in ("A", "b", "C", "d"))

    def ridge(y, x):
        return ((A @ y - b) ** 2).mean() / 2 + (jnp.exp(x) * y**2).sum() / 2

    def logistic(y, x):
        return jax.nn.softplus(-b * (A @ y)).mean() + (jnp.exp(x) * y**2).sum() / 2

    if kind == "ridge":
        return jax.grad(ridge), lambda y, x: ((C @ y - d) ** 2).mean() / 2
    if kind == "logistic":
        return jax.grad(logistic), lambda y, x: jax.nn.softplus(-d * (C @ y)).mean()
    return lambda y, x: y - jnp.tanh(A @ y + x), lambda y, x: ((C @ y - d) ** 2).mean() / 2


def newton(residual, y, x):
    for _ in range(30):
        y = y - jnp.linalg.solve(jax.jacobian(residual)(y, x), residual(y, x))
    return y


def by_jaxopt(residual, outer, y, x):
    from jaxopt import implicit_diff, linear_solve

    solve = implicit_diff.custom_root(residual, solve=linear_solve.solve_lu)(partial(newton, residual))
    return jax.grad(lambda x: outer(solve(y, x), x))(x)


def by_optimistix(residual, outer, y, x):
    import optimistix as optx

    def loss(x):
        found = optx.root_find(residual, optx.Newton(rtol=1e-13, atol=1e-13), y, args=x, max_steps=200)
        return outer(found.value, x)

    return jax.grad(loss)(x)


PEERS = {"JAXopt": by_jaxopt, "optimistix": by_optimistix}

if __name__ == "__main__":
    with np.load(sys.argv[1], allow_pickle=False) as archive:
        given = dict(archive)
    found = {}
    for name in sorted({key.rpartition(".")[0] for key in given}):
        data = {part: given[f"{name}.{part}"] for part in ("A", "b", "C", "d", "x", "y")}
        residual, outer = problem(name.partition(" ")[0], data)
        for peer, gradient in PEERS.items():
            found[f"{peer}.{name}"] = np.asarray(gradient(residual, outer, data["y"], jnp.asarray(data["x"])))
    np.savez(sys.argv[2], **found)
