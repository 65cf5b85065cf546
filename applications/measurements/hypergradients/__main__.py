"""``python -m applications.measurements.hypergradients``: ours beside JAXopt's and optimistix's, on random problems.

The peers run in a process of their own, and with ``--python`` in an environment of their own.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

import bilevel as bl
from applications.frame import measurement
from applications.frame.command import require_at_least_one
from applications.frame.errors import UserError
from applications.frame.run import aligned

KINDS = ("ridge", "logistic", "fixed-point")
TOLERANCE = 1e-8
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Config:
    """Hypergradients of random problems in float64, ours beside those of JAXopt and optimistix."""

    python: str = sys.executable
    """The Python of an environment with jaxopt and optimistix (the extra bench); it need not have PyTorch."""
    problems: int = 10
    """Random problems of each kind."""
    size: int = 12
    """Unknowns, and as many hyperparameters."""
    seed: int = 0
    """Seed of the problems."""


def data(kind: str, size: int, seed: int) -> dict[str, np.ndarray]:
    """A random problem: training data ``A, b``, validation data ``C, d``, the start y and the hyperparameters x."""
    random = np.random.default_rng(seed)
    rows = size if kind == "fixed-point" else 3 * size
    A, C = random.normal(size=(rows, size)), random.normal(size=(2 * size, size))
    b, d = random.normal(size=rows), random.normal(size=2 * size)
    if kind == "logistic":
        b, d = np.sign(b), np.sign(d)
    if kind == "fixed-point":
        A *= 0.7 / np.linalg.norm(A, 2)
    return {"A": A, "b": b, "C": C, "d": d, "x": random.normal(size=size) - 1, "y": np.zeros(size)}


def ours(kind: str, values: dict[str, np.ndarray]) -> np.ndarray:
    """The hypergradient by this library."""
    A, b, C, d, x, y = (torch.from_numpy(values[name]) for name in ("A", "b", "C", "d", "x", "y"))
    x = x.clone().requires_grad_()

    def ridge(y: Tensor, x: Tensor) -> Tensor:
        return (A @ y - b).square().mean() / 2 + (x.exp() * y.square()).sum() / 2

    def logistic(y: Tensor, x: Tensor) -> Tensor:
        return softplus(-b * (A @ y)).mean() + (x.exp() * y.square()).sum() / 2

    if kind == "fixed-point":
        fit = bl.root(lambda y, x: y - torch.tanh(A @ y + x), y, x, solver=bl.Newton(tol=1e-13))
    else:
        inner: Loss = ridge if kind == "ridge" else logistic
        fit = bl.argmin(
            inner, y, x, solver=bl.NewtonCG(gtol=1e-13), hypergrad=bl.Implicit(bl.CG(rtol=1e-13)), throw="warn"
        )
    outer = softplus(-d * (C @ fit.value)).mean() if kind == "logistic" else (C @ fit.value - d).square().mean() / 2
    (found,) = torch.autograd.grad(outer, x)
    return found.numpy()


def check(settings: Config) -> None:
    """Refuse what cannot be run, before anything is."""
    require_at_least_one(settings, "problems", "size")


def run(settings: Config) -> int:
    """Compare, print a row for each kind and peer; 1 where one is off by more than `TOLERANCE`."""
    problems = {
        f"{kind} {index}": data(kind, settings.size, settings.seed + 1000 * number + index)
        for number, kind in enumerate(KINDS)
        for index in range(settings.problems)
    }
    theirs = of_peers(settings.python, problems)
    mine = {name: ours(name.partition(" ")[0], values) for name, values in problems.items()}
    rows = []
    for peer in ("JAXopt", "optimistix"):
        for kind in KINDS:
            names = [name for name in problems if name.startswith(kind)]
            errors = [relative(theirs[f"{peer}.{name}"], mine[name]) for name in names]
            rows.append({"peer": peer, "problems": f"{len(names)} {kind}", "largest difference": f"{max(errors):.1e}"})
    print(aligned(rows))
    largest = max(relative(value, mine[name.partition(".")[2]]) for name, value in theirs.items())
    print(f"All within {TOLERANCE:g}." if largest <= TOLERANCE else f"Some differ by more than {TOLERANCE:g}.")
    return int(not largest <= TOLERANCE)


def relative(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def of_peers(python: str, problems: dict[str, dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """``PEER.PROBLEM`` -> the hypergradient.

    Raises:
        UserError: the peers cannot be run there.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "problems.npz", Path(folder) / "found.npz"
        flat: dict[str, Any] = {
            f"{name}.{part}": value for name, values in problems.items() for part, value in values.items()
        }
        np.savez(given, **flat)
        command = [python, str(Path(__file__).with_name("peers.py")), str(given), str(found)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise UserError(f"--python {python} cannot be run: {error}.") from error
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            raise UserError(
                f"The peers cannot be run by {python}: {last[0]}. In an environment of its own: python -m venv DIR, "
                "then DIR/bin/pip install jaxopt optimistix, and --python DIR/bin/python."
            )
        with np.load(found, allow_pickle=False) as archive:
            return dict(archive)


def main(arguments: list[str]) -> int:
    """Run the command."""
    return measurement.main("measurements.hypergradients", arguments, Config, run, check, folder=None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
