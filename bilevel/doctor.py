"""``python -m bilevel.doctor``: what is installed here, on what it runs, and whether hypergradients are right on it.

Its output belongs into a report of a bug. It exits with 1 where a hypergradient is wrong.
"""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from collections.abc import Iterator
from importlib import metadata

import torch

from .diagnostics.methods import accurate_solver
from .diagnostics.problem import solve
from .problems import collection

USES = {
    "tuning": "bl.tuning, Optuna studies",
    "sklearn": "bl.sklearn, BilevelSearchCV",
    "progress": "bl.ProgressBar",
    "applications": "python -m applications.few_shot and the others; pictures",
    "test": "pytest and lint",
    "docs": "the site: guides, gallery, reference",
    "bench": "comparison with other libraries",
    "dev": "all that contributors use",
}
"""What each extra is for."""

PROBLEMS = ("quadratics", "ridge, a penalty each", "logistic", "linear fixed point")
BOUNDS = {torch.float64: 1e-8, torch.float32: 1e-3}
"""Relative errors of hypergradients, at most."""


def version(package: str) -> str | None:
    """The version that is installed, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def requirements() -> dict[str, list[str]]:
    """Names of packages by the extra that brings them; of the core under ``""``."""
    found: dict[str, list[str]] = {"": []}
    for line in metadata.requires("bilevel") or []:
        name = re.split(r"[^\w.-]", line)[0]
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", line)
        if name != "bilevel":
            found.setdefault(extra.group(1) if extra else "", []).append(name)
    return found


def versions() -> Iterator[str]:
    """The interpreter, the core, and what else is there."""
    yield f"bilevel {version('bilevel')} from {os.path.dirname(__file__)}"
    yield f"Python {platform.python_version()}, {platform.platform()}"
    for extra, names in requirements().items():
        there = [f"{name} {version(name)}" for name in names if version(name)]
        if not extra:
            yield ", ".join(there)
            continue
        missing = [name for name in names if not version(name)]
        state = f'missing {", ".join(missing)}: pip install "bilevel[{extra}]"' if missing else "complete"
        yield f"[{extra}] ({USES.get(extra, 'unknown')}): {', '.join([*there, state])}"


def machine() -> Iterator[str]:
    """Processors, threads and accelerators."""
    threads = (
        f"{torch.get_num_threads()} inside an operation, {torch.get_num_interop_threads()} between operations, "
        f"OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'is not set')}"
    )
    yield f"{os.cpu_count()} CPU cores; threads of torch: {threads}"
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}: {card.name}, {card.total_memory / 2**30:.1f} GiB, CUDA {torch.version.cuda}"
    if torch.backends.mps.is_available():
        yield "mps"
    if not torch.cuda.is_available():
        yield f"no CUDA device (torch built for {torch.version.cuda or 'the CPU'})"


def devices() -> dict[str, tuple[torch.dtype, ...]]:
    """Where gradients are checked, and in which precisions."""
    found: dict[str, tuple[torch.dtype, ...]] = {"cpu": (torch.float64, torch.float32)}
    if torch.cuda.is_available():
        found["cuda"] = (torch.float64, torch.float32)
    if torch.backends.mps.is_available():
        found["mps"] = (torch.float32,)
    return found


def error_of(name: str, device: str, dtype: torch.dtype) -> float:
    """Relative error of a hypergradient by `Implicit`, beside the closed form in the same precision."""
    problem = collection(dtype)[name]
    for attribute, value in list(vars(problem).items()):
        if isinstance(value, torch.Tensor):
            setattr(problem, attribute, value.to(device))
    x = problem.hparams.detach().clone().requires_grad_()
    fit = solve(problem, x, solver=accurate_solver(problem))
    (found,) = torch.autograd.grad(problem.outer(fit.value, x), x)
    exact = problem.hypergradient(problem.hparams)
    found, exact = found.cpu().double(), exact.cpu().double()  # some devices have no float64
    return float((found - exact).norm() / exact.norm())


def gradients() -> Iterator[tuple[str, bool]]:
    """A line for each problem, and whether its hypergradient is right."""
    for device, dtypes in devices().items():
        for dtype in dtypes:
            for name in PROBLEMS:
                begin = time.perf_counter()
                try:
                    error = error_of(name, device, dtype)
                except Exception as failure:  # whatever it is, the reader of the report wants it
                    yield f"{device} {dtype} {name}: FAILS, {type(failure).__name__}: {failure}", False
                    continue
                seconds, right = time.perf_counter() - begin, error <= BOUNDS[dtype]
                word = "right" if right else f"WRONG, at most {BOUNDS[dtype]:.0e} was expected"
                yield f"{device} {dtype} {name}: relative error {error:.1e} in {seconds:.2f} s, {word}", right


def main() -> int:
    """Print all of it; 0, or 1 where a hypergradient is wrong."""
    for title, lines in (("Versions", versions()), ("Machine", machine())):
        print(title, *lines, "", sep="\n")
    print("Hypergradients beside their closed form")
    right = True
    for line, fine in gradients():
        print(line)
        right = right and fine
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
