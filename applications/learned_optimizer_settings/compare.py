"""How good the settings are on networks that nobody chose them for, and what a hypergradient costs."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch

import bilevel as bl
from applications.learned_optimizer_settings.learn import EXACT, FRESH, Method, end_of_run
from applications.learned_optimizer_settings.networks import Networks, Params, losses, outputs, seed_of, train
from applications.learned_optimizer_settings.settings import Settings

CURVE_POINTS = 25
COST_STEPS, COST_EXAMPLES = 30, 256


def on_fresh_networks(networks: Networks, lr: list[float], momentum: float, count: int, seed: int) -> dict[str, Any]:
    """Train ``count`` networks from new starts, on new mini-batches, the same ones for all settings.

    Returns:
        ``validation_loss``, ``test_loss``, ``test_accuracy`` (%), one for each network; ``curve``, pairs of a step and
        the mean validation loss.
    """
    fresh, curve = replace(networks, count=count), []
    every = max(1, len(lr) // CURVE_POINTS)

    def look(step: int, params: Params) -> None:
        if step % every == 0 or step == len(lr):
            with torch.no_grad():
                curve.append((step, fresh.validation_loss(params).mean().item()))

    found = train(fresh, lr, momentum, seed_of(seed, FRESH), look)
    features, classes = networks.data.test
    right = outputs(found, features).argmax(-1) == classes
    return {
        "validation_loss": fresh.validation_loss(found).tolist(),
        "test_loss": losses(found, features, classes).tolist(),
        "test_accuracy": (100 * right.double().mean(1)).tolist(),
        "curve": curve,
    }


def costs(networks: Networks, settings: Settings, window: int, seed: int) -> list[dict[str, Any]]:
    """One short run on full batches, the same for every method: CPU seconds, and the difference from forward mode."""
    features, classes = networks.data.train
    few = replace(networks.data, train=(features[:COST_EXAMPLES], classes[:COST_EXAMPLES]))
    full = replace(networks, data=few, batch=0)
    truncated = f"truncated, last {window}"
    methods: dict[str, Method] = {"forward": EXACT["forward"], **EXACT, truncated: bl.Truncated(window)}
    rows: list[dict[str, Any]] = []
    truth = None
    for name, method in methods.items():
        end_of_run(full, settings, COST_STEPS, 2, method, seed)  # what PyTorch sets up at the first use of an operation
        begin = time.process_time()
        loss = end_of_run(full, settings, COST_STEPS, COST_STEPS, method, seed).mean()
        grads = torch.autograd.grad(loss, settings.tensors)
        seconds = time.process_time() - begin
        found = torch.cat([grad.flatten() for grad in grads])
        truth = found if truth is None else truth
        difference = ((found - truth).norm() / truth.norm()).item()
        rows.append({"hypergradient": name, "CPU seconds": seconds, "difference from forward mode": difference})
    return rows
