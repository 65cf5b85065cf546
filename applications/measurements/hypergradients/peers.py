"""Run by a Python that has JAXopt and optimistix, and need not have PyTorch: ``peers.py PROBLEMS.npz FOUND.npz``."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

jax.config.update("jax_enable_x64", True)


def problem(kind: str, data: Any) -> tuple[Any, Any]:
    """``(residual(y, x), outer(y, x))`` of a kind; the same for PyTorch are in the command."""
    A, b, C, d = (data[name] for name in ("A", "b", "C", "d"))

    def ridge(y: Any, x: Any) -> Any:
        return ((A @ y - b) ** 2).mean() / 2 + (jnp.exp(x) * y**2).sum() / 2

    def logistic(y: Any, x: Any) -> Any:
        return jax.nn.softplus(-b * (A @ y)).mean() + (jnp.exp(x) * y**2).sum() / 2

    if kind == "ridge":
        return jax.grad(ridge), lambda y, x: ((C @ y - d) ** 2).mean() / 2
    if kind == "logistic":
        return jax.grad(logistic), lambda y, x: jax.nn.softplus(-d * (C @ y)).mean()
    return lambda y, x: y - jnp.tanh(A @ y + x), lambda y, x: ((C @ y - d) ** 2).mean() / 2


def by_jaxopt(kind: str, data: Any) -> Any:
    """By `jaxopt.implicit_diff.custom_root` around Newton's steps."""
    from jaxopt import implicit_diff, linear_solve

    residual, outer = problem(kind, data)

    @implicit_diff.custom_root(residual, solve=linear_solve.solve_lu)
    def solve(y: Any, x: Any) -> Any:
        def step(_: int, y: Any) -> Any:
            return y - jnp.linalg.solve(jax.jacobian(residual)(y, x), residual(y, x))

        return jax.lax.fori_loop(0, 30, step, y)

    return jax.grad(lambda x: outer(solve(data["y"], x), x))(data["x"])


def by_optimistix(kind: str, data: Any) -> Any:
    """By `optimistix.root_find`, whose adjoint is the implicit one unless it is told otherwise."""
    import optimistix as optx

    residual, outer = problem(kind, data)

    def loss(x: Any) -> Any:
        found = optx.root_find(residual, optx.Newton(rtol=1e-13, atol=1e-13), data["y"], args=x, max_steps=200)
        return outer(found.value, x)

    return jax.grad(loss)(data["x"])


PEERS = {"JAXopt": jax.jit(by_jaxopt, static_argnums=0), "optimistix": jax.jit(by_optimistix, static_argnums=0)}


def main(given: str, found: str) -> None:
    """Read the problems, write ``PEER.PROBLEM`` -> hypergradient."""
    with np.load(given, allow_pickle=False) as archive:
        arrays = dict(archive)
    gradients: dict[str, Any] = {}
    for name in sorted({key.rpartition(".")[0] for key in arrays}):
        data = {part: jnp.asarray(arrays[f"{name}.{part}"]) for part in ("A", "b", "C", "d", "x", "y")}
        for peer, gradient in PEERS.items():
            gradients[f"{peer}.{name}"] = np.asarray(gradient(name.partition(" ")[0], data))
    np.savez(found, **gradients)


if __name__ == "__main__":
    main(*sys.argv[1:])
