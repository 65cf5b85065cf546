"""What people do instead: a grid over constant or cosine learning rates and momenta, and Optuna's TPE."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import optuna
import torch

from applications.learned_optimizer_settings.learn import SEARCH
from applications.learned_optimizer_settings.networks import Networks, seed_of, train
from applications.learned_optimizer_settings.settings import Settings

MOMENTA = (0.0, 0.8, 0.9, 0.95)
RANGE = (0.01, 3.0)
"""Learning rates to be searched."""
DIVERGED = 1e3
"""Stands for the loss of a run that is not finite."""


def constant(lr: float, steps: int) -> list[float]:
    return [lr] * steps


def cosine(lr: float, steps: int) -> list[float]:
    """From ``lr`` to 0 (Loshchilov and Hutter 2017)."""
    return [lr * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps)]


SHAPES = {"constant": constant, "cosine": cosine}


def grid(networks: Networks, shape: str, steps: int, trials: int, seed: int) -> dict[str, Any]:
    """The best of ``trials`` pairs of a learning rate and a momentum, tried in random order.

    Returns:
        ``lr`` of each step, ``momentum``, ``peak`` learning rate, and ``losses``, the validation loss of each trial.
    """
    rates = np.geomspace(*RANGE, max(1, trials // len(MOMENTA)))
    pairs = [(float(rate), momentum) for rate in rates for momentum in MOMENTA][:trials]
    order = np.random.default_rng(seed).permutation(len(pairs))
    pairs = [pairs[place] for place in order]
    losses = [loss_of(networks, SHAPES[shape](rate, steps), momentum, seed) for rate, momentum in pairs]
    rate, momentum = pairs[int(np.argmin(losses))]
    return {"lr": SHAPES[shape](rate, steps), "momentum": momentum, "peak": rate, "losses": losses}


def tpe(networks: Networks, points: int, steps: int, trials: int, seed: int) -> dict[str, Any]:
    """Bayesian optimisation of the very settings that are learned (Bergstra et al. 2011); as `grid`."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def numbers(values: dict[str, float]) -> tuple[list[float], float]:
        log_lr = torch.tensor([math.log(values[f"lr {point}"]) for point in range(points)])
        rates, _ = Settings(log_lr, torch.zeros(())).numbers(steps)
        return rates, 1 - values["1 - momentum"]

    def objective(trial: optuna.Trial) -> float:
        for point in range(points):
            trial.suggest_float(f"lr {point}", *RANGE, log=True)
        trial.suggest_float("1 - momentum", 0.02, 1.0, log=True)
        return loss_of(networks, *numbers(trial.params), seed)

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    study.optimize(objective, n_trials=trials)
    rates, momentum = numbers(study.best_params)
    losses = [float(trial.value) for trial in study.trials if trial.value is not None]
    return {"lr": rates, "momentum": momentum, "peak": max(rates), "losses": losses}


def loss_of(networks: Networks, lr: list[float], momentum: float, seed: int) -> float:
    """Mean validation loss of the networks; the same starts and mini-batches in every trial."""
    found = train(networks, lr, momentum, seed_of(seed, SEARCH))
    with torch.no_grad():
        loss = networks.validation_loss(found).mean().item()
    return min(loss, DIVERGED) if math.isfinite(loss) else DIVERGED
