"""Peak memory of one training step against the number of forward iterations, each in a process of its own."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch
from torch.nn.functional import cross_entropy

import bilevel as bl
from applications.equilibrium.knobs import Config, create_network, parts_of, read
from applications.equilibrium.methods import equilibrium, iterate
from applications.frame import memory
from applications.frame.device import select_device
from applications.frame.run import Row

EXAMPLES = 300
"""In the step that is measured: enough that its tensors stand out of what Python itself allocates."""


def measure(config: Config, unrolled: bool, steps: int) -> float:
    """Peak MiB of a step above what the process held before it; meant for a fresh process.

    The equilibrium takes ``steps`` steps of Anderson's acceleration and as many terms of the adjoint series.
    """
    device = select_device(config.device)
    examples = read(config)
    x, y = (tensor[:EXAMPLES] for tensor in parts_of(config, examples, config.seed).train)
    network = create_network(config, examples, config.seed)

    def step(steps: int) -> None:
        injected = network.inject(x)
        if unrolled:
            z = iterate(network, injected, steps)
        else:
            solver = bl.Anderson(history=config.history, max_steps=steps, tol=0.0)
            hypergrad = bl.Implicit(bl.Neumann(alpha=1.0, max_steps=steps))
            z = equilibrium(network, injected, solver, hypergrad).value
        cross_entropy(network.head(z), y).backward()

    step(2)  # libraries allocate on their first use
    return memory.peak_of(device, lambda: step(steps))[1]


def curve(config: Config) -> list[Row]:
    """A row for each of ``config.depths``: MiB of the equilibrium, and of the unrolled network or why there is none."""
    context = multiprocessing.get_context("forkserver")  # one import of torch for all of them
    context.set_forkserver_preload(["applications.equilibrium.__main__"])
    rows: list[Row] = []
    for steps in sorted(config.depths):
        row: Row = {"iterations": steps}
        for name, unrolled in (("implicit, MiB", False), ("unrolled, MiB", True)):
            try:
                with memory.environment(memory.RETURN_FREED), ProcessPoolExecutor(1, mp_context=context) as pool:
                    row[name] = round(pool.submit(measure, config, unrolled, steps).result(), 1)
            except (BrokenProcessPool, torch.OutOfMemoryError):
                row[name] = None
        rows.append(row)
    return rows
