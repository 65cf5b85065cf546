"""The parts that are measured here: each prints one JSON object a line, as soon as it is known."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from applications.frame import memory
from applications.measurements.gpu.steps import (
    Rows,
    captured,
    gradient_of,
    paper,
    processor_seconds,
    seconds_of,
    workload_a,
    workload_c,
    workload_f,
)
from bilevel.extending import Dense


def precision(device: torch.device, seconds: float, root: Path | None = None) -> Rows:
    """Errors of the meta-gradient against float64, the lower quartile over batches of tasks hidden in one."""
    truth = gradient_of(paper(device, precision="float64"))()
    for name in ("float32", "tf32", "bf16"):
        found = gradient_of(paper(device, precision=name))
        gradient = found().double()
        cosine = float((gradient @ truth) / (gradient.norm() * truth.norm()))
        error = float((gradient - truth).norm() / truth.norm())
        yield {"precision": name, "relative_error": error, "cosine": cosine, "seconds": seconds_of(found, device, 3)}


def memory_of_tasks(device: torch.device, seconds: float, root: Path | None = None) -> Rows:
    """Peak memory of a meta-gradient, all tasks at once."""
    begin = time.monotonic()
    for tasks in (1, 2, 4) if device.type == "cpu" else (4, 8, 16, 32, 64, 128, 256):
        gradient = gradient_of(paper(device, tasks=tasks, chunk_size=tasks))
        gradient()
        before = memory.reset_peak(device)
        gradient()
        yield {"tasks": tasks, "peak_mib": memory.peak(device) - before}
        if time.monotonic() - begin > 0.6 * seconds:
            return


def large(device: torch.device, seconds: float, root: Path | None = None) -> Rows:
    """The hypergradient of networks with 10^7 and 10^8 parameters: ten steps, five products."""
    for width in (300,) if device.type == "cpu" else (2236, 7071):
        yield large_network(device, width)


def large_network(device: torch.device, width: int) -> dict[str, Any]:
    """Two hidden layers of this width on random data, a penalty strength as hyperparameter."""
    generator = torch.Generator(device).manual_seed(0)
    x, y = (torch.randn(512, width, generator=generator, device=device) for _ in range(2))
    init = {name: torch.randn(width, width, generator=generator, device=device) / width**0.5 for name in ("a", "b")}
    strength = torch.tensor(-3.0, device=device, requires_grad=True)

    def objective(params: dict[str, Tensor]) -> Tensor:
        fitted = torch.tanh(x @ params["a"]) @ params["b"]
        penalty = sum(p.square().sum() for p in params.values())
        return (fitted - y).square().mean() + strength.exp() * penalty / width**2

    def hypergradient() -> Tensor:
        solver, hypergrad = bl.GradientDescent(0.1, max_steps=10), bl.Implicit(bl.CG(max_steps=5))
        fit = bl.argmin(objective, init, solver=solver, hypergrad=hypergrad, throw="ignore")
        outer = (torch.tanh(x @ fit.value["a"]) @ fit.value["b"] - y).abs().mean()
        return torch.autograd.grad(outer, strength)[0]

    took = seconds_of(hypergradient, device, 3)
    before = memory.reset_peak(device)
    found = float(hypergradient())
    return {
        "parameters": 2 * width**2,
        "seconds": took,
        "peak_mib": memory.peak(device) - before,
        "hypergradient": found,
    }


def linear(device: torch.device, seconds: float, root: Path | None = None) -> Rows:
    """GMRES and BiCGSTAB beside SciPy's on 1, 16 and 256 systems of 64 unknowns, to 1e-6 in float64.

    In turn, the median of a few; on a CPU the time of the processor, which others that use it do not add to.
    """
    generator = torch.Generator().manual_seed(0)
    for count in (1, 16, 256):
        noise = torch.randn(count, 64, 64, generator=generator, dtype=torch.float64) / 16
        matrix = (torch.eye(64, dtype=torch.float64) + noise).to(device)
        b = torch.randn(count, 64, generator=generator, dtype=torch.float64).to(device)
        truth = torch.linalg.solve(matrix, b.unsqueeze(-1)).squeeze(-1)
        operator = Dense(matrix, symmetric=False)
        solvers = (bl.GMRES(rtol=1e-6), bl.ScipyGMRES(1e-6), bl.BiCGSTAB(rtol=1e-6), bl.ScipyBiCGSTAB(1e-6))
        took: dict[str, list[float]] = {type(solver).__name__: [] for solver in solvers}
        for _ in range(9):
            for solver in solvers:
                took[type(solver).__name__].append(processor_seconds(lambda: solver.solve(operator, b), device))  # noqa: B023
        for solver in solvers:
            found, name = solver.solve(operator, b), type(solver).__name__
            error = float(((found.value - truth).norm(dim=-1) / truth.norm(dim=-1)).max())
            row = {"solver": name, "systems": count, "seconds": statistics.median(took[name]), "largest_error": error}
            yield {**row, "steps": int(found.stats["num_steps"].max())}


PARTS: dict[str, Callable[[torch.device, float, Path | None], Rows]] = {
    "captured": captured,
    "linear": linear,
    "precision": precision,
    "memory": memory_of_tasks,
    "large": large,
    "peers-A": workload_a,
    "peers-C": workload_c,
    "peers-F": workload_f,
}

if __name__ == "__main__":
    name, place, budget, *folder = sys.argv[1:]
    for row in PARTS[name](torch.device(place), float(budget), Path(folder[0]) if folder else None):
        print(json.dumps(row), flush=True)
